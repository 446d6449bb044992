"""Published losses that compare the rows of a batch, composed of kd_loss and PyTorch ops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast._numbers import number
from lrds_fast.arguments import check_pair
from lrds_fast.divergences import REVISE_TEMPERATURE, resolve_revise
from lrds_fast.functional import kd_loss, revise_labels
from lrds_fast.options import temperatures
from lrds_fast.reference import compute_dtype

__all__ = ["dist_loss", "mlkd_loss", "revision_loss"]

_EPSILON = 1e-8
"""Added to the product of norms in a correlation, so that the correlation of a constant row is 0."""


def _weight(name: str, value: float) -> float:
    weight = number(name, value)
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(f"{name} must be finite and >= 0; got {value!r}")
    return weight


def revision_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    lambda1: float = 4.0,
    lambda2: float = 1.0,
    eta: float = 0.8,
) -> Tensor:
    """mean_R CE + lambda1 * mean_{R,k} (z - v)^2 + lambda2 * mean_{W,k} (softmax(z) - p')^2, all at T = 1.

    R are the rows where the teacher is right (its top class is the target, ties included), W the others; an empty set
    contributes 0. Public re-implementations of label revision have this objective: wrong rows have no cross-entropy,
    right rows match raw logits.

    student_logits, teacher_logits: (N, C) floating. target: (N,) int64/int32 in [0, C). lambda1, lambda2 >= 0, eta in
    (0, 1). Returns a 0-d float32 tensor (float64 for float64 logits). The device counts the sets, so nothing
    synchronises; in DDP each process averages over its rows alone. Raises ValueError or TypeError naming the argument.
    Source: Sun et al., "Knowledge Distillation with Refined Logits", 2024, on Lan et al., arXiv 2404.03693.
    """
    lambda1, lambda2 = _weight("lambda1", lambda1), _weight("lambda2", lambda2)
    check_pair(student_logits, teacher_logits, target)
    top = teacher_logits.amax(dim=-1)
    right = teacher_logits.gather(-1, target.long()[:, None])[:, 0] >= top
    on_right = kd_loss(
        student_logits,
        teacher_logits,
        target,
        ce_weight=1.0,
        kd_weight=lambda1,
        divergence="mse_logits",
        revise=None,
        selected=right,
        num_valid=right.sum(),
        temperature=1.0,
        ce_weight_unselected=0.0,
        eta=eta,
    )
    on_wrong = kd_loss(
        student_logits,
        teacher_logits,
        target,
        ce_weight=0.0,
        kd_weight=lambda2,
        divergence="mse_probs",
        selected=~right,
        num_valid=(~right).sum(),
        temperature=1.0,
        ce_weight_unselected=0.0,
        eta=eta,
        revise_temperature=None,
    )
    return on_right + on_wrong


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along dim."""
    a, b = (x - x.mean(dim=dim, keepdim=True) for x in (a, b))
    correlation: Tensor = (a * b).sum(dim=dim) / (a.norm(dim=dim) * b.norm(dim=dim) + _EPSILON)
    return correlation


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """T^2 [beta (1 - mean_i corr(q_i., p_i.)) + gamma (1 - mean_k corr(q_.k, p_.k))], corr Pearson's correlation.

    q, p = softmax of the logits at T. The first term compares the classes within each sample, the second the samples
    within each class, over the rows of this call.

    student_logits, teacher_logits: (N, C) floating; the teacher gets no gradient. beta, gamma >= 0; temperature > 0.
    Returns a 0-d float32 tensor (float64 for float64 logits), 0 for no rows. Raises ValueError or TypeError naming the
    argument. Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.
    """
    beta, gamma = _weight("beta", beta), _weight("gamma", gamma)
    (t,) = temperatures([temperature])
    check_pair(student_logits, teacher_logits, None)
    dtype = compute_dtype(student_logits, teacher_logits)
    q = F.softmax(student_logits.to(dtype) / t, dim=-1)
    p = F.softmax(teacher_logits.detach().to(dtype) / t, dim=-1)
    if q.shape[0] == 0:
        return q.sum()
    between_classes = 1.0 - _correlation(q, p, 1).mean()
    between_samples = 1.0 - _correlation(q, p, 0).mean()
    return t**2 * (beta * between_classes + gamma * between_samples)


def mlkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    batch_weight: float = 1.0,
    category_weight: float = 1.0,
    revise: str | None = "lr",
    eta: float = 0.8,
    revise_temperature: float | None = REVISE_TEMPERATURE,
    selected: Tensor | None = None,
    ce_weight_unselected: float | None = None,
) -> Tensor:
    """ce_weight * CE + kd_weight * sum_T [T^2 KL(p' || q) + batch_weight * B_T + category_weight * C_T].

    Q, P are the (N, C) matrices of q and p' at T. B_T = |Q Q^T - P P^T|^2 / N compares the samples of the batch,
    C_T = |Q^T Q - P^T P|^2 / C the classes (squared Frobenius norms). One call of kd_loss computes the KL terms of all
    temperatures. revise=None is the published loss.

    student_logits, teacher_logits: (N, C) floating; the teacher gets no gradient. target: (N,) int64/int32 in [0, C).
    temperature: one or several T > 0. revise, eta, revise_temperature, selected, ce_weight_unselected: as in kd_loss; a
    row that is not selected is in neither matrix; a weight multiplies its row. Returns a 0-d float32 tensor (float64
    for float64 logits). Raises ValueError or TypeError naming the argument. Source: Jin, Wang, Lin, "Multi-Level Logit
    Distillation", CVPR 2023, without its masks by confidence.
    """
    batch_weight = _weight("batch_weight", batch_weight)
    category_weight = _weight("category_weight", category_weight)
    kd_weight = number("kd_weight", kd_weight)
    check_pair(student_logits, teacher_logits, target)
    rows = kd_loss(
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        revise=revise,
        eta=eta,
        revise_temperature=revise_temperature,
        selected=selected,
        ce_weight_unselected=ce_weight_unselected,
    )
    by_batch, by_class = gram_terms(
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        revise=revise,
        eta=eta,
        revise_temperature=revise_temperature,
        selected=selected,
        batch=batch_weight > 0,
        classes=category_weight > 0,
    )
    return rows + kd_weight * (batch_weight * by_batch + category_weight * by_class)


def gram_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Sequence[float],
    revise: str | None,
    eta: float,
    revise_temperature: float | None,
    selected: Tensor | None = None,
    batch: bool = True,
    classes: bool = True,
) -> tuple[Tensor, Tensor]:
    """(sum_T B_T, sum_T C_T) of mlkd_loss, which has these arguments. batch=False, classes=False: 0 instead."""
    revise = resolve_revise(revise)
    dtype = compute_dtype(student_logits, teacher_logits)
    z, v = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    count: Tensor | int = max(1, z.shape[0])
    w = None
    if selected is not None:
        w = selected.to(dtype)[:, None]
        v = torch.where(w > 0, v, 0.0)  # rows that are not selected may hold NaN
        count = w.sum().clamp(min=1.0)
    by_batch = by_class = torch.zeros((), dtype=dtype, device=z.device)
    for t in temperatures(temperature):
        q = F.softmax(z / t, dim=-1)
        if revise is None:
            p = F.softmax(v / t, dim=-1)
        else:
            p = revise_labels(v, target, eta=eta, revise_temperature=revise_temperature, temperature=t, policy=revise)
        if w is not None:
            q, p = torch.where(w > 0, w * q, 0.0), w * p
        with torch.autocast(z.device.type, enabled=False):  # autocast would multiply the matrices in 16 bits
            if batch:
                by_batch = by_batch + (q @ q.T - p @ p.T).square().sum() / count
            if classes:
                by_class = by_class + (q.T @ q - p.T @ p).square().sum() / z.shape[1]
    return by_batch, by_class
