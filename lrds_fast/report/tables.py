"""Tables of runs: means over seeds and paired differences, as text and as Markdown."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lrds_fast.recipe import names as grid
from lrds_fast.report import paper
from lrds_fast.report.runs import Run, last_values
from lrds_fast.report.statistics import Estimate, estimate, paired


@dataclass(frozen=True)
class Row:
    """One line of the table: the runs of one name over their seeds.

    Accuracies are shares in [0, 1], cross-entropies are in nats, both on the test split after the last epoch.
    best_accuracy: of the best epoch, which much of the literature reports. The differences are paired by seed; None for
    the baseline itself and where the seeds differ. revised, deselected: training samples per run, in the last epoch.
    published: the accuracy that the literature reports for this experiment, None without one.
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


def tabulate(runs: Sequence[Run], *, baseline: str | None = None) -> list[Row]:
    """A row per recipe name, in order of appearance, with differences to the row named `baseline`. ValueError where two
    runs have the same name and seed."""
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

    with_teacher = all("n_selected" in run.last for run in group)
    percent = grid.published(name)
    return Row(
        name=name,
        seeds=seeds,
        accuracy=estimate(last_values(group, "test_acc")),
        best_accuracy=estimate([max(record["test_acc"] for record in run.records) for run in group]),
        cross_entropy=estimate(last_values(group, "test_ce")),
        accuracy_difference=difference("test_acc"),
        cross_entropy_difference=difference("test_ce"),
        revised=estimate(last_values(group, "n_revised")) if with_teacher else None,
        deselected=estimate([run.last["rows"] - run.last["n_selected"] for run in group]) if with_teacher else None,
        published=None if percent is None else percent / 100,
    )


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
    """The row as text, in the order of header(). Accuracies in percent; "~" marks differences whose 95% interval
    contains 0, "?" differences of one seed."""
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
    """A header and rows, each column as wide as its widest cell; the first column is left-aligned."""
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
    """The tables of the runs and notes on their columns, for a terminal."""
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
    """The header and a line per row. The column of published accuracies is left out where no row has one."""
    lines = [header(baseline), *map(cells, rows)]
    return lines if any(row.published is not None for row in rows) else [line[:-1] for line in lines]


def header(baseline: str | None) -> tuple[str, ...]:
    """The column titles, with the baseline's name."""
    return tuple(title.format(base=baseline or "baseline") for title in HEADER)


NOTES = (
    "Mean ± standard error over seeds, after the last epoch. 'best epoch' is chosen on the test split, as in much of"
    " the literature, and is therefore too high. Differences are paired by seed: ~ marks those within noise, whose 95%"
    " t interval, not corrected for the number of comparisons, contains 0; ? those of one seed, which gives no estimate"
    " of the noise."
)
