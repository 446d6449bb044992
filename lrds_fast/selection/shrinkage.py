"""Weights in place of a selection: how likely each sample's teacher helps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lrds_fast.influence import Scores
from lrds_fast.influence.scores import ERROR_SUFFIX
from lrds_fast.selection.columns import score_columns, score_tensor
from lrds_fast.selection.rule import standard_error


def shrinkage_weights(scores: Scores | Mapping[str, Tensor], by: str = "kd_gain") -> Tensor:
    """How likely each sample's teacher is to help: P(true score < 0), (N,) float32 on the CPU, for `selected=`.

    Sample i's true score is drawn from N(m, t^2), and its estimate from N(true score, error_i^2). m and t^2 have the
    maximum likelihood over all samples. Given the estimate, the true score is normal with mean m + b_i (score_i - m)
    and variance b_i error_i^2, b_i = t^2 / (t^2 + error_i^2). A score with a larger error is moved closer to the
    mean of all. With an error of 0 the weight is 1 below 0, 1/2 at 0, 0 above. Recipes do not use these weights: with
    good teachers they cost accuracy (docs/benchmarks/method.md).

    scores, by: as in select with confidence. Raises ValueError or TypeError as select does. Source: Efron and Morris,
    "Data analysis using Stein's estimator and its generalizations", 1975.
    """
    columns = score_columns(scores, by)
    table = {name: score_tensor(name, columns[name]) for name in (by, by + ERROR_SUFFIX) if name in columns}
    score, variance = table[by].double(), standard_error(by, table).square()
    bad = (~score.isfinite()).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"score {by!r} is not finite at sample {int(bad[0])}; score again without it")
    if len(score) == 0:
        return score.float()
    mean, spread = _prior(score, variance)
    total = variance + spread
    share = torch.where(total > 0, spread / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
    posterior = mean + share * (score - mean)
    deviation = (share * variance).sqrt()
    # 0 / 0 is a true score that is certainly 0: weight 1/2.
    z = torch.where(posterior == 0, 0.0, posterior / deviation)
    weights: Tensor = torch.special.ndtr(-z).float()
    return weights


def _prior(score: Tensor, variance: Tensor) -> tuple[float, float]:
    """m and t^2 with the highest likelihood of score_i ~ N(m, t^2 + variance_i), by bisection on its slope in t^2."""

    def at(spread: float) -> tuple[float, float]:
        """m, and the slope of the likelihood in t^2, at t^2 = spread."""
        total = variance + spread
        if not (total > 0).all():
            return float(score[total <= 0].mean()), math.inf
        weight = 1 / total
        mean = float((weight * score).sum() / weight.sum())
        return mean, float((weight.square() * (score - mean).square() - weight).sum())

    low, high = 0.0, float((score - score.mean()).square().max())
    if high == 0 or at(0.0)[1] <= 0:
        return at(low)[0], low
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] > 0 else (low, middle)
    return at(high)[0], high
