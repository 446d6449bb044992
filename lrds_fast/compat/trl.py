"""TRL's distillation losses and GKDTrainer with kd_loss.

generalized_jsd_loss and chunked_divergence_loss are twins of TRL's functions. Label revision needs true labels: the
student's own samples, and the teacher's, are no labels, so LRDSGKDTrainer revises the data set's completions only, and
the on-policy DistillationTrainer gets no revision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrds_fast.compat import generalized_jsd
from lrds_fast.functional import kd_loss

try:
    from trl.experimental.gkd import GKDTrainer
except ImportError as error:
    raise ImportError(f"lrds_fast.compat.trl needs trl: pip install trl ({error})") from error

_REDUCTIONS = {"batchmean": "mean", "mean": "elementmean", "sum": "sum", "none": "none"}


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
    *,
    revise: str | None = None,
    eta: float = 0.8,
) -> Tensor:
    """GKDTrainer.generalized_jsd_loss in one pass over the logits.

    student_logits, teacher_logits: (B, T, V), shifted by the caller. labels: (B, T), -100 is not read. reduction:
    "batchmean" over rows, "mean" over rows times V, "sum", or "none", which gives the rows (B, T), not TRL's rows times
    V. num_items_in_batch: the divisor of the sum in place of the reduction. There is no T^2. revise, eta: kd_loss's
    label revision, which needs labels. Raises ValueError, TypeError.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}")
    if labels is None and revise is not None:
        raise ValueError("revise needs labels; pass labels, or revise=None")
    if num_items_in_batch is not None:
        reduction = "batchmean"
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(student_logits.device)
    return kd_loss(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        ce_weight=0.0,
        ce_weight_unselected=0.0,
        kd_weight=temperature**-2,
        revise=revise,
        eta=eta,
        divergence=generalized_jsd(beta),
        num_valid=num_items_in_batch,
        reduction=_REDUCTIONS[reduction],
    )


class LRDSGKDTrainer(GKDTrainer):
    """TRL's GKDTrainer with label revision on the data set's completions and none on generated ones.

    revise, eta: kd_loss's. arguments: GKDTrainer's. With revise=None the losses are GKDTrainer's.
    """

    def __init__(self, *args: Any, revise: str | None = "lr", eta: float = 0.8, **arguments: Any) -> None:
        self.revise, self.eta, self.generated = revise, eta, False
        super().__init__(*args, **arguments)

    def training_step(self, *args: Any, **arguments: Any) -> Any:
        """GKDTrainer's step. generated tells whether it made completions of its own."""
        self.generated = False
        try:
            return super().training_step(*args, **arguments)
        finally:
            self.generated = False

    def generate_on_policy_outputs(self, *args: Any, **arguments: Any) -> Any:
        """GKDTrainer's completions, of the student or, with seq_kd, of the teacher."""
        self.generated = True
        return GKDTrainer.generate_on_policy_outputs(*args, **arguments)

    def generalized_jsd_loss(self, student_logits: Tensor, teacher_logits: Tensor, **arguments: Any) -> Tensor:
        """The loss of a batch, revised unless its completions were generated."""
        revise = None if self.generated else self.revise
        return generalized_jsd_loss(student_logits, teacher_logits, **arguments, revise=revise, eta=self.eta)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The loss of DistillationTrainer from hidden states, in chunks, without its entropy and valid-token count.

    Arguments as trl.trainer.distillation_trainer._chunked_divergence_loss. completion_mask: (B, K), nonzero where a
    token counts. Returns a 0-d tensor. The completions are the student's own samples, so nothing is revised. Raises
    ValueError, TypeError.
    """
    from lrds_fast.linear import linear_kd_loss

    # Of the labels only -100 is read.
    target = torch.where(completion_mask != 0, 0, -100)
    return linear_kd_loss(
        student_hidden_states,
        student_lm_head_weight,
        teacher_hidden_states,
        teacher_lm_head_weight,
        target,
        student_bias=student_lm_head_bias,
        teacher_bias=teacher_lm_head_bias,
        temperature=temperature,
        ce_weight=0.0,
        ce_weight_unselected=0.0,
        kd_weight=temperature**-2,
        revise=None,
        divergence=generalized_jsd(beta),
        num_valid=num_items_in_batch,
        logit_scale=(student_logit_scale, teacher_logit_scale),
        softcap=(student_final_logit_softcapping, teacher_final_logit_softcapping),
    )
