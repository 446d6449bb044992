"""Runs, read back from their folders: averages over seeds, paired differences, and these as text."""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lrds_fast.files import read_records
from lrds_fast.recipe import names as grid
from lrds_fast.recipe.recipe import Recipe, from_mapping
from lrds_fast.report import paper
from lrds_fast.report.statistics import LEVEL, Estimate, estimate, holm, paired
from lrds_fast.train.folder import LOG, RECIPE
from lrds_fast.train.summary import read_summary


@dataclass(frozen=True)
class Run:
    """One run's folder, recipe, log and summary ({} where it has none, as runs that have not ended)."""

    folder: Path
    recipe: Recipe
    records: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)

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
    return Run(folder, from_mapping(values, where=str(path)), records, read_summary(folder))


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
        return paired(last_values(group, key), last_values(base, key)) if comparable else None

    taught = all("n_selected" in run.last for run in group)
    percent = grid.published(name)
    return Row(
        name=name,
        seeds=seeds,
        accuracy=estimate(last_values(group, "test_acc")),
        best_accuracy=estimate([max(record["test_acc"] for record in run.records) for run in group]),
        cross_entropy=estimate(last_values(group, "test_ce")),
        accuracy_difference=difference("test_acc"),
        cross_entropy_difference=difference("test_ce"),
        revised=estimate(last_values(group, "n_revised")) if taught else None,
        deselected=estimate([run.last["rows"] - run.last["n_selected"] for run in group]) if taught else None,
        published=None if percent is None else percent / 100,
    )


def last_values(group: Sequence[Run], key: str) -> list[float]:
    """`key` after the last epoch, of each run."""
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
Comparisons = Sequence[tuple[Sequence[Row], str]]


class Verdict(NamedTuple):
    """A row against a baseline: each measure is "better", "worse", "within noise", "not finite" or, of one seed, ""."""

    row: Row
    baseline: str
    accuracy: str
    cross_entropy: str


def judged(comparisons: Comparisons) -> list[Verdict]:
    """The verdict on every row that has differences.

    comparisons: pairs of rows and the name of their baseline. All differences are tested together by paired t tests at
    5%, corrected for their number (Holm). Differences of one seed are not tested.
    """
    found = [
        (row, baseline, (row.accuracy_difference, row.cross_entropy_difference))
        for rows, baseline in comparisons
        for row in rows
        if row.accuracy_difference is not None and row.cross_entropy_difference is not None
    ]
    corrected = iter(holm([value.p_value for _, _, values in found for value in values if value is not None]))

    def word(value: Estimate | None, better: float) -> str:
        p = next(corrected)
        assert value is not None
        if value.n == 1:
            return ""
        if math.isnan(p):
            return "not finite"
        return "within noise" if p > LEVEL else "better" if value.mean * better > 0 else "worse"

    return [Verdict(row, baseline, word(values[0], 1.0), word(values[1], -1.0)) for row, baseline, values in found]


def what_was_tested(comparisons: Comparisons, which: str = "these") -> str:
    """A sentence on the tests that the verdicts are results of, `which` differences; "" where there were none."""
    tests = sum(word not in ("", "not finite") for verdict in judged(comparisons) for word in verdict[2:])
    if not tests:
        return ""
    return (
        f"'Better', 'worse' and 'within noise' are results of paired t tests at {LEVEL:.0%} over {which} {tests}"
        " differences, corrected for their number (Holm)."
    )


def verdicts(comparisons: Comparisons) -> list[str]:
    """`judged` as a sentence per row and baseline, and what was tested as the last one."""
    sentences = []
    for row, baseline, *words in judged(comparisons):
        parts = []
        values = (row.accuracy_difference, row.cross_entropy_difference)
        for value, word, (what, scale, unit, digits) in zip(values, words, _MEASURES, strict=True):
            assert value is not None
            amount = f"{what} {scale * value.mean:+.{digits}f}{unit}"
            if word in ("better", "worse"):
                amount = f"{amount} ({word})"
            parts.append(f"{what} {word}" if word in ("within noise", "not finite") else amount)
        alone = "; one seed gives no estimate of the noise" if len(row.seeds) == 1 else ""
        sentences.append(f"{row.name} against {baseline}: {', '.join(parts)}{alone}.")
    return [*sentences, *filter(None, [what_was_tested(comparisons)])]
