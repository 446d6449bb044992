"""Tables as in papers: a row per method, a column per pair of teacher and student, published numbers beside ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lrds_fast.recipe import names as grid
from lrds_fast.recipe.ablations import MARK
from lrds_fast.report.runs import Run
from lrds_fast.report.statistics import Estimate, estimate

TEACHER = "teacher"
ALONE = "student alone"
#: Methods as papers spell them.
METHODS = {
    "kd": "KD",
    "kd-tuned": "KD (tuned)",
    "kd-rise": "KD, rising CE",
    "kd-lskd": "KD+LSKD",
    "dkd": "DKD",
    "rld": "RLD",
    "nkd": "NKD",
    "mlkd": "MLKD",
    "dist": "DIST",
    "revision": "REVISION",
}
_FEATURES = {
    "fitnet": "FitNet",
    "at": "AT",
    "sp": "SP",
    "vid": "VID",
    "ickd": "ICKD",
    "rkd": "RKD",
    "pkt": "PKT",
    "cc": "CC",
    "crd": "CRD",
    "reviewkd": "ReviewKD",
}
METHODS |= _FEATURES | {f"kd-{name}": f"KD+{label}" for name, label in _FEATURES.items()}
NOTE = (
    "Test accuracy in %, mean ± standard error over the seeds (their number in parentheses; one gives no estimate of"
    " the noise). best: of the best epoch, chosen on the test split as most published numbers are, and therefore too"
    " high. last: after the last epoch. published: the literature's number for this protocol, without label revision or"
    " selection; - without one."
)
#: Pairs side by side in a terminal, the others below.
_ACROSS = 2


class Cell(NamedTuple):
    """One method on one pair. best, last: shares in [0, 1] over the seeds, None without runs. published: in percent,
    None where the literature has no number. seeds: how many runs."""

    best: Estimate | None
    last: Estimate | None
    published: float | None
    seeds: int

    def texts(self) -> tuple[str, str, str]:
        """best, last and published in percent, as they are printed."""
        count = f" ({self.seeds})" if self.seeds else ""
        return (
            "-" if self.best is None else _percent(self.best) + count,
            "-" if self.last is None else _percent(self.last),
            "-" if self.published is None else f"{self.published:.2f}",
        )


class PaperTable(NamedTuple):
    """The runs of one protocol. columns: pairs (teacher, student). rows: a label and a cell per column; first the
    teachers, then the students alone, then the methods in the protocol's order."""

    protocol: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def paper_tables(runs: Sequence[Run]) -> list[PaperTable]:
    """A table per protocol that has runs with a teacher. Runs with other names are left out.

    Each value of a sweep's grid (NAME@KEY=VALUE) has its own row. Runs of one name are averaged over their seeds.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.recipe.name, []).append(run)
    by_protocol: dict[str, list[tuple[grid.Parts, str]]] = {}
    for name in groups:
        base, _, cell = name.partition(MARK)
        parts = grid.parts_of(base)
        if parts is not None and parts.teacher:
            by_protocol.setdefault(parts.protocol, []).append((parts, cell))
    return [_table(protocol, students, groups) for protocol, students in by_protocol.items()]


def _table(protocol: str, students: Sequence[tuple[grid.Parts, str]], groups: dict[str, list[Run]]) -> PaperTable:
    known = grid.PROTOCOLS[protocol]
    present = {(parts.teacher, parts.student) for parts, _ in students}
    columns = tuple((p.teacher, p.student) for p in known.pairs.values() if (p.teacher, p.student) in present)
    methods = list(known.methods)
    kinds = sorted(
        {(methods.index(parts.method), len(parts.switches), parts.switches, cell) for parts, cell in students},
        key=lambda kind: (kind[0], kind[1], kind[2] != ("lr",), kind[3]),
    )
    rows = [
        (TEACHER, tuple(_cell(f"{protocol}/{teacher}", groups) for teacher, _ in columns)),
        (ALONE, tuple(_cell(f"{protocol}/{student}", groups) for _, student in columns)),
    ]
    for number, _, switches, cell in kinds:
        what = "+".join((methods[number], *switches)) + (MARK + cell if cell else "")
        names = [f"{protocol}/{teacher}-{student}/{what}" for teacher, student in columns]
        rows.append((_label(methods[number], switches, cell), tuple(_cell(name, groups) for name in names)))
    return PaperTable(protocol, columns, tuple(rows))


def _label(method: str, switches: Sequence[str], cell: str) -> str:
    label = "+".join((METHODS.get(method, method), *(switch.upper() for switch in switches)))
    return f"{label}, {cell}" if cell else label


def _cell(name: str, groups: dict[str, list[Run]]) -> Cell:
    runs = groups.get(name, [])
    return Cell(
        best=estimate([max(_accuracies(run)) for run in runs]) if runs else None,
        last=estimate([_accuracies(run)[-1] for run in runs]) if runs else None,
        published=grid.published(name),
        seeds=len(runs),
    )


def _accuracies(run: Run) -> list[float]:
    return [record["test_acc"] for record in run.records]


def _percent(value: Estimate) -> str:
    text = f"{100 * value.mean:.2f}"
    return text if math.isnan(value.error) else f"{text} ± {100 * value.error:.2f}"


def text(table: PaperTable) -> str:
    """The table for a terminal."""
    blocks = []
    for start in range(0, len(table.columns), _ACROSS):
        columns = table.columns[start : start + _ACROSS]
        lines = [["", *(part for _ in columns for part in ("best", "last", "published"))]]
        for label, cells in table.rows:
            block = cells[start : start + _ACROSS]
            lines.append([label, *(part for cell in block for part in cell.texts())])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        heads = []
        for number, (teacher, student) in enumerate(columns):
            title, columns_of_pair = f"{teacher} -> {student}", slice(1 + 3 * number, 4 + 3 * number)
            missing = len(title) - (sum(widths[columns_of_pair]) + 4)
            widths[columns_of_pair.start] += max(missing, 0)
            heads.append(title.rjust(sum(widths[columns_of_pair]) + 4))
        head = "  ".join(["".ljust(widths[0]), *heads])
        body = [
            "  ".join(
                part.ljust(width) if i == 0 else part.rjust(width)
                for i, (part, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        blocks.append("\n".join(line.rstrip() for line in [head, body[0], "-" * len(body[0]), *body[1:]]))
    return f"{table.protocol}\n" + "\n\n".join(blocks)


def markdown(table: PaperTable) -> str:
    """A heading and a table; each pair is a column, its cells "best / last / published"."""
    heads = [f"{teacher} → {student}" for teacher, student in table.columns]
    lines = [["", *heads], ["---", *("---:" for _ in heads)]]
    lines += [[label, *(" / ".join(cell.texts()) for cell in cells)] for label, cells in table.rows]
    body = "\n".join("| " + " | ".join(part.replace("|", "\\|") for part in line) + " |" for line in lines)
    return f"### {table.protocol}: best / last / published\n\n{body}\n"
