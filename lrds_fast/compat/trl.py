"""TRL's distillation losses, GKDTrainer and DistillationTrainer with kd_loss.

generalized_jsd_loss and chunked_divergence_loss are twins of TRL's functions. Label revision needs true labels: the
student's own samples, and the teacher's, are no labels, so LRDSGKDTrainer revises the data set's completions only, and
the on-policy LRDSDistillationTrainer revises nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from lrds_fast.compat import generalized_jsd
from lrds_fast.divergences import NEED_TARGET, Divergence, resolve
from lrds_fast.functional import kd_loss
from lrds_fast.linear import default_chunk_rows, linear_kd_loss

try:
    import trl
    from trl.experimental.gkd import GKDTrainer
except ImportError as error:
    raise ImportError(f"lrds_fast.compat.trl needs trl: pip install trl ({error})") from error
try:
    from trl.trainer import distillation_trainer
except ImportError:  # TRL 1.8 has none
    distillation_trainer = None

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
    *,
    divergence: str | Divergence | None = None,
) -> Tensor:
    """The loss of DistillationTrainer from hidden states, in chunks, without its entropy and valid-token count.

    Arguments as trl.trainer.distillation_trainer._chunked_divergence_loss of TRL 1.16 and later. completion_mask:
    (B, K), nonzero where a token counts. divergence: kd_loss's, in place of beta's, without its power of the
    temperature; "dkd", "rld" and "nkd" need labels and are refused. Returns a 0-d tensor. The completions are the
    student's own samples, which are no labels, so nothing is revised. Raises ValueError, TypeError.
    """
    chosen = _without_labels(generalized_jsd(beta) if divergence is None else divergence)
    # Of the labels, these divergences read only -100.
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
        kd_weight=temperature**-chosen.temperature_power,
        revise=None,
        divergence=chosen,
        num_valid=num_items_in_batch,
        logit_scale=(student_logit_scale, teacher_logit_scale),
        softcap=(student_final_logit_softcapping, teacher_final_logit_softcapping),
    )


def _without_labels(divergence: str | Divergence) -> Divergence:
    chosen = resolve(divergence)
    if chosen.code in NEED_TARGET:
        raise ValueError(
            f"divergence must need no labels, because the student's own samples are none; got {chosen.name!r}: use"
            " 'kl', 'rkl', 'jsd', 'tvd', 'skl', 'srkl', 'mse_logits' or 'mse_probs'"
        )
    return chosen


@torch.no_grad()
def entropy_of_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The entropy, in nats, of softmax(logits / temperature) for each row of a linear head, in chunks of rows.

    hidden: (N, d). weight: (C, d), bias: (C,) or None. logit_scale, softcap: kd_loss's, one number each. Returns (N,)
    float32 without a gradient.
    """
    rows = default_chunk_rows(max(len(hidden), 1), len(weight), 8, hidden.device.type)
    entropies = []
    for part in hidden.split(rows):
        logits = linear(part, weight, bias).float() * logit_scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logs = (logits / temperature).log_softmax(-1)
        entropies.append(-(logs.exp() * logs).sum(-1))
    return torch.cat(entropies)


class LRDSDistillationTrainer(getattr(distillation_trainer, "DistillationTrainer", object)):  # type: ignore[misc]
    """TRL's on-policy DistillationTrainer (TRL >= 1.16) with linear_kd_loss as its loss.

    divergence: kd_loss's, such as "tvd" or SKL(0.1), without its power of the temperature; "dkd", "rld" and "nkd" need
    labels and are refused. None: args.beta's, and the losses are DistillationTrainer's.
    log_entropy: whether the student's mean entropy is logged, as TRL does; it costs one more product with the student's
    head, and False logs NaN. arguments: DistillationTrainer's. Raises ImportError with an older TRL, ValueError.
    """

    def __init__(
        self, *args: Any, divergence: str | Divergence | None = None, log_entropy: bool = True, **arguments: Any
    ) -> None:
        if not hasattr(distillation_trainer, "ChunkedDivergenceFunction"):
            raise ImportError(
                f"LRDSDistillationTrainer needs trl >= 1.16; trl is {trl.__version__}: pip install -U trl"
            )
        if divergence is not None:
            divergence = _without_labels(divergence)
        self.divergence, self.log_entropy = divergence, log_entropy
        super().__init__(*args, **arguments)

    def _compute_loss(self, *args: Any, **arguments: Any) -> Any:
        """DistillationTrainer's (loss, sum of the entropies, number of tokens), from linear_kd_loss."""
        with _replaced_loss(self._loss):
            return super()._compute_loss(*args, **arguments)

    def _loss(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        student_weight: Tensor,
        teacher_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """trl.trainer.distillation_trainer._chunked_divergence_loss: the same arguments and results."""
        student_weight, student_bias = _whole(student_weight, arguments.pop("student_lm_head_bias"), student_hidden)
        teacher_weight, teacher_bias = _whole(teacher_weight, arguments.pop("teacher_lm_head_bias"), teacher_hidden)
        valid = completion_mask.flatten() != 0
        count = valid.sum()
        # Without a token that counts the mean is 0, not 0 / 0.
        if arguments["num_items_in_batch"] is None:
            arguments["num_items_in_batch"] = count.clamp(min=1)
        loss = chunked_divergence_loss(
            student_hidden,
            teacher_hidden,
            student_weight,
            teacher_weight,
            completion_mask,
            beta,
            student_lm_head_bias=student_bias,
            teacher_lm_head_bias=teacher_bias,
            divergence=self.divergence,
            **arguments,
        )
        if not self.log_entropy:
            return loss, torch.full_like(loss, torch.nan), count
        entropies = entropy_of_rows(
            student_hidden.flatten(0, -2),
            student_weight,
            student_bias,
            arguments["student_logit_scale"],
            arguments["student_final_logit_softcapping"],
            arguments["temperature"],
        )
        return loss, entropies.where(valid, 0.0).sum(), count


@contextmanager
def _replaced_loss(loss: Any) -> Iterator[None]:
    """Within this context DistillationTrainer._compute_loss calls `loss` in place of a function of TRL's module."""
    theirs = distillation_trainer._chunked_divergence_loss
    distillation_trainer._chunked_divergence_loss = loss
    try:
        yield
    finally:
        distillation_trainer._chunked_divergence_loss = theirs


def _whole(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """A head's weight and bias, gathered if FSDP2 shards them; the weight then has the hidden states' dtype."""
    if not isinstance(weight, DTensor):
        return weight, bias
    return weight.full_tensor().to(hidden.dtype), bias.full_tensor() if isinstance(bias, DTensor) else bias
