"""What a handful of seeds can say: means, standard errors, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

#: Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, 1.96 + 2.5 / df is within 1%.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Estimate(NamedTuple):
    """mean, its standard error (nan from one value), and how many values it is of."""

    mean: float
    error: float
    n: int

    @property
    def interval(self) -> float:
        """Half the width of the 95% t interval."""
        return self.error * t95(self.n - 1)

    @property
    def within_noise(self) -> bool:
        """Whether the 95% interval holds 0; one value alone is always within noise."""
        return not abs(self.mean) > self.interval


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error (sample standard deviation / sqrt(n))."""
    count = len(values)
    if count == 0:
        return Estimate(math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """The estimate of values[i] - baseline[i]; both hold the same seeds in the same order."""
    if len(values) != len(baseline):
        raise ValueError(f"paired differences need equally many values; got {len(values)} and {len(baseline)}")
    return estimate([value - other for value, other in zip(values, baseline, strict=True)])


def t95(degrees: int) -> float:
    """Two-sided 95% quantile of Student's t; nan for fewer than one degree of freedom."""
    if degrees < 1:
        return math.nan
    return _T95[degrees - 1] if degrees <= len(_T95) else 1.96 + 2.5 / degrees
