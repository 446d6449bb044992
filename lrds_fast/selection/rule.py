"""The rules that decide from a score which samples keep their teacher; selection.select describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrds_fast._numbers import number
from lrds_fast.influence.options import GAINS
from lrds_fast.influence.scores import ERROR_SUFFIX

# The standard deviation of a normal distribution divided by its median absolute deviation.
_NORMAL_MAD = 1.4826


@dataclass(frozen=True)
class Rule:
    """A rule of select, checked; the fields are its keywords.

    Raises ValueError or TypeError unless exactly one of ratio, threshold, confidence and outliers is given, within its
    range, and the other fields go with it.
    """

    ratio: float | None
    threshold: float | None
    confidence: float | None
    outliers: float | None
    max_drop: float = 1.0
    per_class: bool = False
    largest: bool = False
    leave: float | None = None

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("confidence", "outliers", "ratio", "threshold")}
        if sum(value is not None for value in limits.values()) != 1:
            raise ValueError(
                "exactly one of confidence, outliers, ratio and threshold must be given; got "
                + ", ".join(f"{name}={value}" for name, value in limits.items())
            )
        checks = {
            "ratio": checked_share,
            "threshold": _checked_threshold,
            "confidence": _checked_multiple,
            "outliers": _checked_multiple,
            "max_drop": checked_share,
        }
        for name, check in checks.items():
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else check(name, value))
        if self.multiple is None and self.max_drop != 1.0:
            raise ValueError(f"max_drop applies to confidence and outliers; got max_drop={self.max_drop} without them")
        if self.outliers is not None and self.per_class:
            raise ValueError(
                "outliers are those of all samples together: leave per_class out, or use confidence or ratio"
            )
        if self.leave is not None:
            object.__setattr__(self, "leave", self._checked_leave())

    def _checked_leave(self) -> float:
        """leave, which must not be stricter than the limit that lets samples in."""
        leave = float(number("leave", self.leave))
        for name in ("confidence", "outliers"):
            limit = getattr(self, name)
            if limit is not None and not leave >= limit:
                raise ValueError(f"leave must be >= {name}, {limit}; got {leave}")
        if self.ratio is not None and not self.ratio <= leave <= 1:
            raise ValueError(f"leave must lie in [ratio, 1], {self.ratio} to 1; got {leave}")
        limit = self.threshold
        if limit is not None and not (leave <= limit if self.largest else leave >= limit):
            raise ValueError(f"leave must be {'<=' if self.largest else '>='} threshold, {limit}; got {leave}")
        return leave

    @property
    def multiple(self) -> float | None:
        """How many standard errors or robust deviations a sample may be harmed by; None for ratio and threshold."""
        return self.confidence if self.outliers is None else self.outliers

    def policy(self, by: str) -> dict[str, Any]:
        """The rule as a selection's file stores it. by: the name of the score."""
        dropped = {
            name: limit
            for name, limit in (("confidence", self.confidence), ("outliers", self.outliers))
            if limit is not None
        }
        return {
            "by": by,
            "ratio": self.ratio,
            "threshold": self.threshold,
            **dropped,
            **({"max_drop": self.max_drop} if dropped else {}),
            "per_class": self.per_class,
            "largest": self.largest,
            **({} if self.leave is None else {"leave": self.leave}),
        }

    def mask(self, by: str, table: Mapping[str, Tensor], labels: Tensor | None, previous: Tensor | None) -> Tensor:
        """(N,) bool, which samples keep their teacher.

        table: columns (N,) by name, with the score `by` and its standard error. labels: (N,), for per_class. previous:
        (N,) bool, the samples that had their teacher before; used with leave only.
        """
        score = table[by].double()
        groups = self._groups(len(score), labels)
        if self.multiple is not None:
            return ~self._harmed(by, score, table, groups, previous)
        mask = _kept(score, groups, self.ratio, self.threshold, self.largest)
        if previous is not None and self.leave is not None:
            ratio, threshold = (self.leave, None) if self.threshold is None else (None, self.leave)
            mask = mask | (previous & _kept(score, groups, ratio, threshold, self.largest))
        return mask

    def _groups(self, size: int, labels: Tensor | None) -> list[Tensor]:
        """The indices of the samples that are ranked together: of each class with per_class, else of all."""
        if self.per_class and self.threshold is None and labels is not None:
            return [(labels == label).nonzero()[:, 0] for label in torch.unique(labels)]
        return [torch.arange(size)]

    def _harmed(
        self, by: str, score: Tensor, table: Mapping[str, Tensor], groups: Sequence[Tensor], previous: Tensor | None
    ) -> Tensor:
        """(N,) bool: harm > limit * deviation, and among the max_drop share of the group with the most harm."""
        harm = -score if self.largest else score
        harm, deviation = (harm, standard_error(by, table)) if self.outliers is None else _robust(by, harm)
        assert self.multiple is not None
        limits = torch.full_like(score, self.multiple)
        if previous is not None and self.leave is not None:
            limits[previous] = self.leave
        worst = torch.zeros(len(score), dtype=torch.bool)
        for group in groups:
            order = group[torch.argsort(harm[group], stable=True)]
            worst[order[len(order) - share_of(self.max_drop, len(group)) :]] = True
        return worst & (harm > limits * deviation)


def share_of(share: float, size: int) -> int:
    """The number of samples in a share of `size` samples, rounded half up."""
    return math.floor(share * size + 0.5)


def checked_share(name: str, value: float) -> float:
    """A number in [0, 1], as a float."""
    share = float(number(name, value))
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {share!r}")
    return share


def _checked_threshold(name: str, value: float) -> float:
    threshold = float(number(name, value))
    if math.isnan(threshold):
        raise ValueError(f"{name} must be a number; got {threshold!r}")
    return threshold


def _checked_multiple(name: str, value: float) -> float:
    multiple = float(number(name, value))
    if not 0 <= multiple < math.inf:
        unit = "standard errors" if name == "confidence" else "robust standard deviations"
        raise ValueError(f"{name} must be >= 0 and finite, in {unit}; got {multiple!r}")
    return multiple


def _kept(
    score: Tensor, groups: Sequence[Tensor], ratio: float | None, threshold: float | None, largest: bool
) -> Tensor:
    """(N,) bool: the lowest share of every group, or the scores below the threshold; with largest the other end."""
    if threshold is not None:
        return score > threshold if largest else score < threshold
    mask = torch.zeros(len(score), dtype=torch.bool)
    for group in groups:
        order = group[torch.argsort(score[group], stable=True, descending=largest)]
        mask[order[: share_of(ratio or 0.0, len(group))]] = True
    return mask


def standard_error(by: str, table: Mapping[str, Tensor]) -> Tensor:
    """(N,) float64, the standard error of the score `by`. ValueError if it is missing, not finite or negative."""
    error = table.get(by + ERROR_SUFFIX)
    if error is None:
        raise ValueError(
            f"confidence needs the standard error of {by!r}: teacher_harm and kd_gain have one where they were computed"
            f" with folds > 0 and at least 2 held-out samples; a plain mapping needs the entry {by + ERROR_SUFFIX!r}"
        )
    error = error.double()
    bad = (~(error.isfinite() & (error >= 0))).nonzero()[:, 0]
    if len(bad):
        sample = int(bad[0])
        raise ValueError(
            f"{by + ERROR_SUFFIX!r} must be finite and >= 0; got {float(error[sample])} at sample {sample}"
        )
    return error


def _robust(by: str, score: Tensor) -> tuple[Tensor, Tensor]:
    """The scores minus their median, and their robust standard deviation, (N,) both.

    ValueError if either is not finite, or if the deviation is 0 and scores lie above the median.
    """
    if not len(score):
        return score, score
    above = score - _median(score)
    deviation = _NORMAL_MAD * _median(above.abs())
    if not deviation.isfinite():
        raise ValueError(f"outliers needs a score that is finite for more than half of the samples; {by!r} is not")
    if deviation == 0 and (above > 0).any():
        raise ValueError(
            f"outliers: the median absolute deviation of {by!r} is 0, half of the samples have the same score: use"
            " threshold"
        )
    return above, deviation.expand_as(above)


def _median(values: Tensor) -> Tensor:
    """The middle value, or the mean of the two middle values."""
    ordered = values.sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def weight_hint(by: str, scores: Mapping[str, Tensor]) -> str:
    """The advice to tune the cross-entropy's weight first, where the mean of kd_gain is above 0; otherwise "".

    by: the score that decides; only kd_gain and teacher_harm depend on that weight.

    A sample without its teacher also has another weight of the cross-entropy. Where that alone lowers the held-out
    loss, kd_gain is above 0 for most samples, whatever their teachers say (docs/benchmarks/method.md, part 8).
    """
    if by not in GAINS or "kd_gain" not in scores:
        return ""
    mean = float(scores["kd_gain"].double().mean())
    if not mean > 0.0:
        return ""
    return (
        f"the mean of kd_gain is {mean:+.2g}: by this estimate the average sample lowers the held-out loss more without"
        " its teacher, often because the cross-entropy's weight (loss.ce_weight) is too small; tune it before selecting"
    )
