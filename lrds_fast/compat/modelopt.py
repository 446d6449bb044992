"""NVIDIA ModelOpt's logit distillation losses with kd_loss, for the criterion of mtd.convert."""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.loss import _Loss

from lrds_fast.functional import kd_loss

try:
    import modelopt.torch.distill  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"lrds_fast.compat.modelopt needs nvidia-modelopt: pip install nvidia-modelopt ({error})"
    ) from error

_REDUCTIONS = {"mean": "elementmean", "batchmean": "mean", "sum": "sum", "none": "none"}


def _checked(reduction: str) -> str:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}")
    return _REDUCTIONS[reduction]


class LogitsDistillationLoss(_Loss):
    """T^2 KL(teacher || student), as modelopt.torch.distill.LogitsDistillationLoss.

    reduction: "mean" over rows times classes (the default, as there), "batchmean" over the first dimension, "sum", or
    "none", which gives the rows. revise, eta: kd_loss's label revision; compute_kd_loss(labels=...) passes the labels.
    """

    def __init__(
        self, temperature: float = 1.0, reduction: str = "mean", *, revise: str | None = None, eta: float = 0.8
    ) -> None:
        super().__init__()
        self.temperature, self.revise, self.eta = temperature, revise, eta
        self.row_reduction = _checked(reduction)

    def forward(self, logits_s: Tensor, logits_t: Tensor, labels: Tensor | None = None) -> Tensor:
        """logits_s, logits_t: (..., C). labels: (...), needed where revise is not None. -100 is not read."""
        if labels is None and self.revise is not None:
            raise ValueError("revise needs labels; pass compute_kd_loss(labels=...), or revise=None")
        loss = kd_loss(
            logits_s.flatten(0, -2),
            logits_t.flatten(0, -2),
            None if labels is None else labels.flatten(),
            temperature=self.temperature,
            ce_weight=0.0,
            ce_weight_unselected=0.0,
            kd_weight=1.0,
            revise=self.revise,
            eta=self.eta,
            num_valid=logits_s.shape[0] if self.row_reduction == "mean" else None,
            reduction=self.row_reduction,
        )
        return loss.view(logits_s.shape[:-1]) if self.row_reduction == "none" else loss


class MFTLoss(_Loss):
    """Minifinetuning's loss, as modelopt.torch.distill.MFTLoss: revise="mft" with eta = 1 - threshold, at T itself.

    threshold: in (0, 1). reduction: as there, but "none" gives the rows (N,), not the rows times C.
    """

    def __init__(self, temperature: float = 1.0, threshold: float = 0.2, reduction: str = "batchmean") -> None:
        super().__init__()
        self.temperature, self.eta = temperature, 1.0 - threshold
        self.row_reduction = _checked(reduction)

    def forward(self, logits_s: Tensor, logits_t: Tensor, labels: Tensor) -> Tensor:
        """logits_s, logits_t: (..., C), labels: (N,) with a label for each flattened row; -100 is not read."""
        return kd_loss(
            logits_s.flatten(0, -2),
            logits_t.flatten(0, -2),
            labels.flatten(),
            temperature=self.temperature,
            ce_weight=0.0,
            ce_weight_unselected=0.0,
            kd_weight=1.0,
            revise="mft",
            eta=self.eta,
            revise_temperature=None,
            reduction=self.row_reduction,
        )
