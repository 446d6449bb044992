"""TRL's generalised Jensen-Shannon divergence, computed by kd_loss.

    from trl.experimental.gkd import GKDTrainer
    from lrds_fast.compat.trl import generalized_jsd_loss

    GKDTrainer.generalized_jsd_loss = staticmethod(generalized_jsd_loss)

The numbers are TRL's. There is no label revision: TRL trains on samples that the student wrote itself, whose labels are
no truth. On supervised data call kd_loss(..., revise="lr") in your own compute_loss.
"""

from __future__ import annotations

from torch import Tensor

from lrds_fast.divergences import JSD, Divergence
from lrds_fast.functional import kd_loss

_REDUCTIONS = {"batchmean": "mean", "mean": "elementmean", "sum": "sum"}


def divergence_of(beta: float) -> str | Divergence:
    """The divergence that TRL and Liger call beta: 0 is the KL of the teacher to the student, 1 the reverse."""
    return {0.0: "kl", 1.0: "rkl"}.get(float(beta)) or JSD(weight=beta)


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The same call as trl.experimental.gkd.GKDTrainer.generalized_jsd_loss (trl 1.16), without its factor T^2.

    student_logits, teacher_logits: (..., C) floating. labels: (...) int64, -100 where masked; the other values are not
    used. None: all rows. beta: in [0, 1]. reduction: "batchmean" over the rows that are not masked, or without labels
    over the first dimension; "mean" over the rows times C; or "sum". "none", of (rows, C) in TRL, is an error here.
    num_items_in_batch: replaces the number of rows. Raises ValueError or TypeError as kd_loss.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}")
    if num_items_in_batch is not None:
        reduction = "batchmean"
    elif labels is None and reduction == "batchmean":
        num_items_in_batch = student_logits.shape[0]
    masked = None if labels is None else labels.where(labels == -100, 0)
    return kd_loss(
        student_logits,
        teacher_logits,
        masked,
        temperature=temperature,
        ce_weight=0.0,
        kd_weight=temperature**-2,
        revise=None,
        divergence=divergence_of(beta),
        reduction=_REDUCTIONS[reduction],
        num_valid=num_items_in_batch,
    )
