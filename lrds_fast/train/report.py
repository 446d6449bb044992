"""Runs, read back from their folders, as a table and as one HTML file that needs nothing beside it."""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lrds_fast.picture import histogram, line_chart
from lrds_fast.selection import Selection
from lrds_fast.train import grid, paper
from lrds_fast.train.files import read_records
from lrds_fast.train.loop import LOG, RECIPE
from lrds_fast.train.recipe import Recipe, from_mapping
from lrds_fast.train.run import GALLERY
from lrds_fast.train.statistics import LEVEL, Estimate, estimate, holm, paired


@dataclass(frozen=True)
class Run:
    """One run's folder, recipe and log."""

    folder: Path
    recipe: Recipe
    records: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        """The last epoch's record."""
        return self.records[-1]


@dataclass(frozen=True)
class Row:
    """One line of the table: the runs of one name over their seeds.

    Accuracies are shares in [0, 1], cross-entropies nats, on the test split after the last epoch. best_accuracy is
    over epochs, as the literature often has it. The differences are paired by seed, None for the baseline itself or
    where the seeds differ. revised, deselected: training samples per run, in the last epoch. published: the accuracy
    that the literature has for this experiment, None where there is none.
    """

    name: str
    seeds: tuple[int, ...]
    accuracy: Estimate
    best_accuracy: Estimate
    cross_entropy: Estimate
    accuracy_difference: Estimate | None
    cross_entropy_difference: Estimate | None
    revised: Estimate | None
    deselected: Estimate | None
    published: float | None = None


def read_run(folder: Path) -> Run:
    """The run in `folder`; FileNotFoundError or ValueError in one line where there is none or no epoch is done."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; name the folder of a run, such as runs/digits_kd")
    path = folder / RECIPE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RECIPE}, so it is not a run of lrds-fast train")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); the run's folder is damaged") from error
    records = read_records(folder / LOG)
    if not records:
        raise ValueError(f"{folder} has no finished epoch yet; go on with lrds-fast train --resume")
    return Run(folder, from_mapping(values, where=str(path)), records)


def tabulate(runs: Sequence[Run], *, baseline: str | None = None) -> list[Row]:
    """A row per recipe name, in order of appearance; differences to the row named `baseline`. ValueError where two runs
    have one name and seed: they are no two seeds."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.recipe.name, []).append(run)
    for name, group in groups.items():
        group.sort(key=lambda run: run.recipe.seed)
        for run, other in itertools.pairwise(group):
            if run.recipe.seed == other.recipe.seed:
                raise ValueError(
                    f"{run.folder} and {other.folder} are both {name}, seed {run.recipe.seed}: runs of one name are"
                    " averaged over their seeds; name one of them, or train one under another name"
                )
    check_baseline(baseline, list(groups))
    base = groups[baseline] if baseline is not None else []
    return [_row(name, group, [] if name == baseline else base) for name, group in groups.items()]


def check_baseline(baseline: str | None, names: Sequence[str]) -> None:
    """ValueError unless baseline is None or one of names."""
    if baseline is not None and baseline not in names:
        near = difflib.get_close_matches(baseline, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"baseline must be the name of a run; got {baseline!r}: {hint}there are {', '.join(names)}")


def _row(name: str, group: Sequence[Run], base: Sequence[Run]) -> Row:
    seeds = tuple(run.recipe.seed for run in group)
    comparable = bool(base) and seeds == tuple(run.recipe.seed for run in base)

    def difference(key: str) -> Estimate | None:
        return paired(_last(group, key), _last(base, key)) if comparable else None

    taught = all("n_selected" in run.last for run in group)
    percent = grid.published(name)
    return Row(
        name=name,
        seeds=seeds,
        accuracy=estimate(_last(group, "test_acc")),
        best_accuracy=estimate([max(record["test_acc"] for record in run.records) for run in group]),
        cross_entropy=estimate(_last(group, "test_ce")),
        accuracy_difference=difference("test_acc"),
        cross_entropy_difference=difference("test_ce"),
        revised=estimate(_last(group, "n_revised")) if taught else None,
        deselected=estimate([run.last["rows"] - run.last["n_selected"] for run in group]) if taught else None,
        published=None if percent is None else percent / 100,
    )


def _last(group: Sequence[Run], key: str) -> list[float]:
    # The log has null where a number was not finite.
    return [math.nan if run.last[key] is None else run.last[key] for run in group]


HEADER = (
    "run",
    "seeds",
    "test acc. %",
    "best epoch %",
    "test CE",
    "acc. - {base}",
    "CE - {base}",
    "revised",
    "deselected",
    "published %",
)


def cells(row: Row) -> tuple[str, ...]:
    """The row as text, in HEADER's order. Accuracies in percent; "~" marks differences whose 95% interval holds 0, "?"
    those of one seed."""
    return (
        row.name,
        str(len(row.seeds)),
        _plus_minus(row.accuracy, 100, 2),
        _plus_minus(row.best_accuracy, 100, 2),
        _plus_minus(row.cross_entropy, 1, 4),
        _difference(row.accuracy_difference, 100, 2),
        _difference(row.cross_entropy_difference, 1, 4),
        "-" if row.revised is None else f"{row.revised.mean:.0f}",
        "-" if row.deselected is None else f"{row.deselected.mean:.0f}",
        "-" if row.published is None else f"{100 * row.published:.2f}",
    )


def _plus_minus(value: Estimate, scale: float, digits: int) -> str:
    text = f"{scale * value.mean:.{digits}f}"
    return text if math.isnan(value.error) else f"{text} ± {scale * value.error:.{digits}f}"


def _difference(value: Estimate | None, scale: float, digits: int) -> str:
    if value is None:
        return "-"
    text = f"{scale * value.mean:+.{digits}f}"
    if value.n == 1:
        return f"{text} ?"
    if math.isnan(value.error):
        return text
    return f"{text} ± {scale * value.error:.{digits}f}{' ~' if value.within_noise else ''}"


def text_table(rows: Sequence[Row], *, baseline: str | None = None) -> str:
    """The table for a terminal."""
    return aligned(table_lines(rows, baseline))


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """A header and rows in columns as wide as their cells; the first column is flush left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rendered = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    rendered.insert(1, "-" * len(rendered[0]))
    return "\n".join(line.rstrip() for line in rendered)


def printed(runs: Sequence[Run], *, baseline: str | None = None) -> str:
    """The tables of the runs and what their columns mean, for a terminal."""
    parts = [text_table(tabulate(runs, baseline=baseline), baseline=baseline), NOTES]
    tables = paper.paper_tables(runs)
    if tables:
        parts += [*map(paper.text, tables), paper.NOTE]
    return "\n\n".join(parts)


def markdown_report(runs: Sequence[Run], *, title: str, baseline: str | None = None) -> str:
    """The same tables as Markdown."""
    first, *others = table_lines(tabulate(runs, baseline=baseline), baseline)
    rule = ("---", *("---:" for _ in first[1:]))
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (first, rule, *others)]
    parts = [f"# {title}", "\n".join(lines), NOTES]
    tables = paper.paper_tables(runs)
    if tables:
        parts += [*(paper.markdown(table).rstrip() for table in tables), paper.NOTE]
    return "\n\n".join(parts) + "\n"


def table_lines(rows: Sequence[Row], baseline: str | None) -> list[tuple[str, ...]]:
    """The header and a line per row; the published accuracies only where there are any."""
    lines = [header(baseline), *map(cells, rows)]
    return lines if any(row.published is not None for row in rows) else [line[:-1] for line in lines]


def header(baseline: str | None) -> tuple[str, ...]:
    """HEADER with the baseline's name in it."""
    return tuple(title.format(base=baseline or "baseline") for title in HEADER)


NOTES = (
    "Mean ± standard error over seeds, after the last epoch; 'best epoch' is chosen on the test split, as much of the"
    " literature does, and flatters. Differences are paired by seed; ~ marks those whose 95% t interval, each by"
    " itself, holds 0: within noise; ? those of one seed, which gives no estimate of the noise."
)

_MEASURES = (("accuracy", 100.0, " points", 2), ("cross-entropy", 1.0, "", 4))


def verdicts(comparisons: Sequence[tuple[Sequence[Row], str]]) -> list[str]:
    """One sentence per row and baseline: the difference, and whether it is better, worse or within noise.

    comparisons: pairs of rows and the name of their baseline. All differences are tested together by paired t tests at
    5%, corrected for their number (Holm); the last sentence says so. Differences of one seed are not tested.
    """
    found = [
        (row, baseline, (row.accuracy_difference, row.cross_entropy_difference))
        for rows, baseline in comparisons
        for row in rows
        if row.accuracy_difference is not None and row.cross_entropy_difference is not None
    ]
    p_values = [value.p_value for _, _, values in found for value in values if value is not None]
    corrected = iter(holm(p_values))
    sentences = []
    for row, baseline, values in found:
        parts = []
        for value, (what, scale, unit, digits) in zip(values, _MEASURES, strict=True):
            assert value is not None
            p = next(corrected)
            amount = f"{what} {scale * value.mean:+.{digits}f}{unit}"
            if value.n == 1:
                parts.append(amount)
            elif math.isnan(p):
                parts.append(f"{what} not finite")
            elif p > LEVEL:
                parts.append(f"{what} within noise")
            else:
                parts.append(f"{amount} ({'better' if (value.mean > 0) == (what == 'accuracy') else 'worse'})")
        alone = "; one seed gives no estimate of the noise" if len(row.seeds) == 1 else ""
        sentences.append(f"{row.name} against {baseline}: {', '.join(parts)}{alone}.")
    tests = sum(not math.isnan(p) for p in p_values)
    if tests:
        sentences.append(
            f"'Better', 'worse' and 'within noise' are results of paired t tests at {LEVEL:.0%} over these {tests}"
            " differences, corrected for their number (Holm)."
        )
    return sentences


def html_report(
    runs: Sequence[Run],
    *,
    title: str,
    baseline: str | None = None,
    introduction: Sequence[str] = (),
    conclusions: Sequence[str] = (),
) -> str:
    """One self-contained page: the table, curves, score histograms, and pictures of revised and deselected samples."""
    rows = tabulate(runs, baseline=baseline)
    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(text)}</p>" for text in introduction)]
    first, *others = table_lines(rows, baseline)
    titles = "".join(f"<th>{escape(text)}</th>" for text in first)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in others)
    tables = paper.paper_tables(runs)
    if tables:
        body += ["<h2>As the literature has it</h2>", *map(paper.html, tables)]
        body.append(f"<p class='note'>{escape(paper.NOTE)}</p>")
    body.append(
        f"<h2>Results</h2><div class='wide'><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
    body.append(f"<p class='note'>{escape(NOTES)}</p>")
    if conclusions:
        items = "".join(f"<li>{escape(text)}</li>" for text in conclusions)
        body.append(f"<ul>{items}</ul>")
    body.append("<h2>Curves</h2><div class='charts'>")
    for key, label, percent in (
        ("test_acc", "test accuracy", True),
        ("test_ce", "test cross-entropy", False),
        ("train_loss", "training loss (each run's own)", False),
    ):
        chart = line_chart(mean_curves(runs, key), x_label="epoch", y_label=label, percent=percent)
        body.append(f"<figure>{chart}<figcaption>{escape(label)}, mean over seeds</figcaption></figure>")
    body.append("</div>")
    body += _selections(runs)
    body += _galleries(runs)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}{paper.STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def mean_curves(runs: Sequence[Run], key: str) -> dict[str, list[tuple[float, float]]]:
    """(epoch, mean of `key` over the seeds that reached it), by name."""
    sums: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for record in run.records:
            if record.get(key) is not None:
                sums.setdefault(run.recipe.name, {}).setdefault(record["epoch"], []).append(record[key])
    return {
        name: [(float(epoch), math.fsum(values) / len(values)) for epoch, values in sorted(epochs.items())]
        for name, epochs in sums.items()
    }


def _selections(runs: Sequence[Run]) -> list[str]:
    """A histogram per run name of the scores that its first run's selection was made from."""
    body: list[str] = []
    done: set[str] = set()
    for run in runs:
        path = Path(run.recipe.selection.path)
        if not run.recipe.selection.path or run.recipe.name in done or not path.is_file():
            continue
        done.add(run.recipe.name)
        chart = _score_histogram(Selection.load(path))
        body.append(
            f"<figure>{chart}<figcaption>{escape(run.recipe.name)}, seed {run.recipe.seed}</figcaption></figure>"
        )
    return ["<h2>Scores</h2><div class='charts'>", *body, "</div>"] if body else []


def _score_histogram(selection: Selection) -> str:
    by = str(selection.policy.get("by"))
    scores = selection.scores[by]
    threshold = selection.policy.get("threshold")
    groups = {
        "keeps the teacher": scores[selection.mask].tolist(),
        "label alone": scores[~selection.mask].tolist(),
    }
    return histogram(groups, x_label=by, mark=float(threshold) if isinstance(threshold, (int, float)) else None)


def _galleries(runs: Sequence[Run]) -> list[str]:
    """The pictures each name's first run kept."""
    body: list[str] = []
    done: set[str] = set()
    for run in runs:
        path = run.folder / GALLERY
        if run.recipe.name in done or not path.is_file():
            continue
        done.add(run.recipe.name)
        kinds: Mapping[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
        for kind, explanation in (
            ("revised", "the teacher was wrong; its distribution was corrected towards the label"),
            ("deselected", "denied the teacher; the label alone is taught"),
        ):
            if kinds.get(kind):
                pictures = "".join(map(_picture, kinds[kind]))
                body.append(
                    f"<h3>{escape(run.recipe.name)}, seed {run.recipe.seed}: {kind}</h3>"
                    f"<p class='note'>{explanation}</p><div class='gallery'>{pictures}</div>"
                )
    return ["<h2>Samples</h2>", *body] if body else []


def _picture(entry: Mapping[str, Any]) -> str:
    teacher = "" if entry["teacher"] is None else f", teacher {entry['teacher']}"
    caption = f"label {entry['label']}{teacher}"
    return (
        f"<figure><img src='{escape(entry['png'])}' alt='{escape(caption)}'>"
        f"<figcaption>#{entry['index']}: {escape(caption)}</figcaption></figure>"
    )


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.6rem}h2{margin-top:2rem;border-bottom:1px solid #ccc}h3{margin-bottom:0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.3rem .7rem;text-align:right}
td:not(:first-child){white-space:nowrap}th:first-child,td:first-child{text-align:left}
thead th{border-bottom:2px solid #222}
tbody tr:nth-child(even){background:#f4f4f4}
.note{color:#555;font-size:.9rem}.charts{display:flex;flex-wrap:wrap;gap:1rem}
.charts figure{margin:0;width:480px;max-width:100%}
svg{width:100%;font-size:11px}svg .grid{stroke:#ddd}svg .mark{stroke:#000;stroke-dasharray:4 3}
.legend span{margin-right:1rem;font-size:.85rem}
.legend i{display:inline-block;width:.8rem;height:.8rem;margin-right:.3rem}
.gallery{display:flex;flex-wrap:wrap;gap:.6rem}.gallery figure{margin:0;width:96px}
.gallery img{width:96px;height:96px;image-rendering:pixelated;object-fit:contain}.gallery figcaption{font-size:.75rem}
"""
