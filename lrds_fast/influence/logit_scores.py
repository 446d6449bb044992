"""Scores of samples that need logits and labels only: losses, their gradients' norms and angles, baselines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast import functional
from lrds_fast.influence.objective import TrainingObjective

# Divides a zero gradient, so that its cosine is 0, and no other gradient.
_TINY = torch.finfo(torch.float32).tiny


class LogitScores:
    """Scores of a batch of B samples from their logits. Every gradient is computed once, when it is first needed.

    z, v: student's and teacher's logits (B, C), both in the dtype of the scores. y: labels (B,) int64. fused: compute
    the losses and the products of their gradients in one pass (functional.kd_moments), worthwhile for FUSED scores.
    """

    def __init__(self, z: Tensor, v: Tensor, y: Tensor, objective: TrainingObjective, *, fused: bool = False) -> None:
        self.z, self.v, self.y = z, v, y
        self.objective, self._fused = objective, fused
        self._gradients: dict[str, Tensor] = {}

    def gradient(self, of: str) -> Tensor:
        """(B, C) logit gradients of one of scores.GRADIENTS; see TrainingObjective.logit_gradient."""
        if of not in self._gradients:
            self._gradients[of] = self.objective.logit_gradient(of, self.z, self.v, self.y)
        return self._gradients[of]

    def logit_change(self) -> Tensor | None:
        """(B, C) how the student's logits move along H^-1 times the held-out gradient; None without a direction."""
        return None

    @functools.cached_property
    def moments(self) -> functional.KDMoments | None:
        """Losses and products of the logit gradients in one pass; None where they are computed one by one."""
        loss = self.objective.loss
        if not self._fused or loss.revise == "swap" or (loss.class_weight is not None and loss.label_smoothing):
            return None
        return functional.kd_moments(
            self.z,
            self.v,
            self.y,
            direction=self.logit_change(),
            temperature=loss.temperature,
            revise=loss.revise,
            eta=loss.eta,
            revise_temperature=loss.revise_temperature,
            divergence=loss.divergence,
            standardize=loss.standardize,
        )

    def conflict(self) -> Tensor:
        """(B,) -cos of the label's and the divergence's gradient; 0 where one of them is 0."""
        if self.moments is None:
            return self._exact_conflict(slice(None))
        m = self.moments
        result = -m.ce_kd / (m.ce_ce * m.kd_kd).sqrt()
        # Squares of gradients this small have lost their digits.
        small = torch.minimum(m.ce_ce, m.kd_kd) < torch.finfo(m.ce_ce.dtype).tiny ** 0.75
        if small.any():
            result[small] = self._exact_conflict(small)
        return result

    def _exact_conflict(self, rows: slice | Tensor) -> Tensor:
        gt, kd = (F.normalize(self.gradient(of)[rows], dim=1, eps=_TINY) for of in ("gt", "kd"))
        cosine: Tensor = torch.linalg.vecdot(gt, kd)
        return -cosine

    def ce(self) -> Tensor:
        """(B,) the cross-entropy."""
        return F.cross_entropy(self.z, self.y, reduction="none") if self.moments is None else self.moments.ce

    def el2n(self) -> Tensor:
        """(B,) |softmax(z) - onehot(y)|."""
        return self.gradient("gt").norm(dim=1) if self.moments is None else self.moments.ce_ce.sqrt()

    def divergence(self) -> Tensor:
        """(B,) the loss's divergence between p' and q, with weight 1."""
        if self.moments is not None:
            return self.moments.kd
        loss = self.objective.loss
        return functional.kd_loss(
            self.z,
            self.v,
            self.y,
            temperature=loss.temperature,
            ce_weight=0.0,
            kd_weight=1.0,
            revise=loss.revise,
            eta=loss.eta,
            revise_temperature=loss.revise_temperature,
            divergence=loss.divergence,
            standardize=loss.standardize,
            reduction="none",
        )

    def teacher_right(self) -> Tensor:
        """(B,) bool: whether the label is among the teacher's top classes; a tie counts as right."""
        if self.moments is not None:
            return self.moments.top == self.y
        return self.v.gather(1, self.y[:, None])[:, 0] >= self.v.amax(dim=1)

    def teacher_pred(self) -> Tensor:
        """(B,) int64 the teacher's top class; of a tie the label if it takes part, else the lowest index."""
        if self.moments is not None:
            return self.moments.top
        return torch.where(self.teacher_right(), self.y, self.v.argmax(dim=1))


#: The scores that need logits only.
LOGIT_SCORERS: Mapping[str, Callable[[LogitScores], Tensor]] = {
    "conflict": LogitScores.conflict,
    "all": lambda batch: torch.zeros_like(batch.z[:, 0]),
    "none": lambda batch: torch.ones_like(batch.z[:, 0]),
    "teacher_correct": lambda batch: (~batch.teacher_right()).to(batch.z),
    "ce": LogitScores.ce,
    "kd": LogitScores.divergence,
    "el2n": LogitScores.el2n,
}
#: Scores that functional.kd_moments provides.
FUSED = ("kd_gain", "teacher_harm", "conflict", "ce", "kd", "el2n", "grand", "teacher_correct")
