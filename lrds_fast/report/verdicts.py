"""Verdicts on differences between runs: t tests over all of them together, as words and sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from lrds_fast.report.statistics import LEVEL, Estimate, holm
from lrds_fast.report.tables import Row

#: Name, scale, unit and digits of what is compared.
_MEASURES = (("accuracy", 100.0, " points", 2), ("cross-entropy", 1.0, "", 4))
#: Pairs of rows and the name of the baseline that they are compared with.
Comparisons: TypeAlias = Sequence[tuple[Sequence[Row], str]]


class Verdict(NamedTuple):
    """A row compared with a baseline. accuracy, cross_entropy: "better", "worse", "within noise", "not finite", or ""
    with one seed."""

    row: Row
    baseline: str
    accuracy: str
    cross_entropy: str


def judged(comparisons: Comparisons) -> list[Verdict]:
    """The verdict on every row that has differences.

    All differences are tested together by paired t tests at 5%, corrected for their number (Holm). Differences of one
    seed are not tested.
    """
    compared = [
        (row, baseline, (row.accuracy_difference, row.cross_entropy_difference))
        for rows, baseline in comparisons
        for row in rows
        if row.accuracy_difference is not None and row.cross_entropy_difference is not None
    ]
    corrected = iter(holm([value.p_value for _, _, values in compared for value in values if value is not None]))

    def word(value: Estimate | None, better: float) -> str:
        p = next(corrected)
        assert value is not None
        if value.n == 1:
            return ""
        if math.isnan(p):
            return "not finite"
        return "within noise" if p > LEVEL else "better" if value.mean * better > 0 else "worse"

    return [Verdict(row, baseline, word(values[0], 1.0), word(values[1], -1.0)) for row, baseline, values in compared]


def what_was_tested(comparisons: Comparisons, which: str = "these") -> str:
    """A sentence on the tests behind the verdicts, "" where nothing was tested. which: "these" or "all" differences."""
    tests = sum(word not in ("", "not finite") for verdict in judged(comparisons) for word in verdict[2:])
    if not tests:
        return ""
    return (
        f"'Better', 'worse' and 'within noise' are results of paired t tests at {LEVEL:.0%} over {which} {tests}"
        " differences, corrected for their number (Holm)."
    )


def verdicts(comparisons: Comparisons) -> list[str]:
    """The verdicts as a sentence per row and baseline, followed by a sentence on the tests."""
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
