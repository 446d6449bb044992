"""Statistics over seeds: means, standard errors, paired differences, t tests and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

#: The significance level of the tests.
LEVEL = 0.05


class Estimate(NamedTuple):
    """mean, its standard error (nan from one value), and how many values it is of."""

    mean: float
    error: float
    n: int

    @property
    def p_value(self) -> float:
        """The two-sided p-value of Student's t test that the mean is 0; nan for one value."""
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return two_sided(abs(self.mean / self.error), self.n - 1) if self.n > 1 else math.nan

    @property
    def within_noise(self) -> bool:
        """Whether the 95% t interval contains 0; False for one value, which has no interval."""
        return self.p_value > LEVEL

    @property
    def half_width(self) -> float:
        """Half the width of the 95% t interval; nan for one value."""
        return quantile(1 - LEVEL / 2, self.n - 1) * self.error if self.n > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the 95% t interval; nan for one value."""
        return self.mean - self.half_width, self.mean + self.half_width


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


def two_sided(t: float, degrees: int) -> float:
    """P(|T| > |t|) of Student's t distribution with integer degrees of freedom (Abramowitz and Stegun, 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    term = total = math.cos(angle) if degrees % 2 else 1.0
    for k in range(2 + degrees % 2, degrees, 2):
        term *= square * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * (total if degrees > 1 else 0.0)) if degrees % 2 else sine * total
    return max(1.0 - inside, 0.0)


def quantile(p: float, degrees: int) -> float:
    """The t with P(T < t) = p, for p in (0.5, 1), of Student's t distribution with integer degrees of freedom."""
    low, high = 0.0, 1.0
    while two_sided(high, degrees) > 2 * (1 - p):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, degrees) > 2 * (1 - p) else (low, middle)
    return (low + high) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number. Compared with LEVEL, the family-wise error rate is at most LEVEL.

    Holm, "A simple sequentially rejective multiple test procedure", 1979. nan stays nan and is not counted.
    """
    corrected = list(p_values)
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min((len(order) - rank) * p_values[i], 1.0))
        corrected[i] = largest
    return corrected
