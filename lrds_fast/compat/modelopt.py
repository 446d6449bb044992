"""NVIDIA ModelOpt's distillation losses, computed by kd_loss.

    import modelopt.torch.distill as mtd
    from lrds_fast.compat.modelopt import LogitsDistillationLoss

    config = {"teacher_model": teacher, "criterion": LogitsDistillationLoss(temperature=2.0)}
    student = mtd.convert(student, mode=[("kd_loss", config)])

Both take ModelOpt's arguments and give its numbers. LabelRevisionLoss is MFTLoss with the published label revision.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.loss import _Loss

from lrds_fast.functional import kd_loss

_REDUCTIONS = {"mean": "elementmean", "batchmean": "mean", "sum": "sum", "none": "none"}


class LogitsDistillationLoss(_Loss):
    """T^2 KL from the teacher's to the student's softmax(logits / T), as modelopt.torch.distill's (0.47).

    reduction: "mean" divides by rows times classes, "batchmean" by the first dimension as F.kl_div does, "sum", or
    "none": a row's loss each. Raises ValueError or TypeError as kd_loss.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}")
        self._temperature, self._reduction = temperature, reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        """logits_s, logits_t: (..., C) of the student and the teacher, which gets no gradient. 0-d, or (...)."""
        # F.kl_div's "batchmean" divides by the first dimension alone.
        batch = logits_s.shape[0] if self._reduction == "batchmean" else None
        return kd_loss(
            logits_s,
            logits_t,
            temperature=self._temperature,
            ce_weight=0.0,
            kd_weight=1.0,
            revise=None,
            reduction=_REDUCTIONS[self._reduction],
            num_valid=batch,
        )


class MFTLoss(_Loss):
    """Minifinetuning's loss: where the label's probability does not lead by `threshold`, the teacher is corrected.

    threshold: in (0, 1), 1 - eta of kd_loss. revise: "mft", ModelOpt's numbers. reduction: as LogitsDistillationLoss;
    "batchmean" divides by the rows, and "none" gives the rows' losses, which ModelOpt gives for each class. Source:
    Belcak et al., arXiv 2506.15702.
    """

    _revise = "mft"

    def __init__(self, temperature: float = 1.0, threshold: float = 0.2, reduction: str = "batchmean") -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}")
        self._temperature, self._threshold, self._reduction = temperature, threshold, reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor, labels: Tensor) -> Tensor:
        """logits_s, logits_t: (..., C). labels: (...) int64 in [0, C). 0-d, or (...)."""
        return kd_loss(
            logits_s,
            logits_t,
            labels,
            temperature=self._temperature,
            ce_weight=0.0,
            kd_weight=1.0,
            revise=self._revise,
            revise_temperature=None,
            eta=1.0 - self._threshold,
            reduction=_REDUCTIONS[self._reduction],
        )


class LabelRevisionLoss(MFTLoss):
    """MFTLoss that corrects the rows alone where the teacher is wrong: label revision as published, at T."""

    _revise = "lr"
