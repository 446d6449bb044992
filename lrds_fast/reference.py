"""Every op of the library in plain PyTorch: the definition that kernels, tests and benchmarks are compared with.

Nothing here is fast. Everything here is differentiable, works under torch.func, and is written to be read next to the
formulas of docs/method.md. Symbols: z student logits, v teacher logits, y target class, T temperature,
q = softmax(z / T), p = softmax(v / T), p' the revised p.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class KDLossParts(NamedTuple):
    """A loss and what it is made of. All tensors live on the logits' device; nothing is synchronised.

    loss: as kd_loss returns it. ce, kd: its two terms, weighted and reduced like loss, detached; loss = ce + kd.
    n_valid, n_selected, n_revised: 0-d int64; rows that are not ignored, those among them with a teacher weight
    above 0, and those among these whose teacher distribution was revised.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    n_valid: Tensor
    n_selected: Tensor
    n_revised: Tensor


def default_ce_weight_unselected(ce_weight: float, kd_weight: float) -> float:
    """Cross-entropy weight of rows without teacher: ce + kd where that is a mixture (<= 1), else max(ce, 1)."""
    total = ce_weight + kd_weight
    return total if total <= 1.0 else max(ce_weight, 1.0)


def compute_dtype(student_logits: Tensor, teacher_logits: Tensor) -> torch.dtype:
    """float64 if either input is float64, else float32."""
    if torch.float64 in (student_logits.dtype, teacher_logits.dtype):
        return torch.float64
    return torch.float32


def _revise(v: Tensor, y: Tensor, temperature: float, eta: float, policy: str | None) -> tuple[Tensor, Tensor]:
    """p' (N, C) and the (N,) bool of revised rows; v (N, C) in the compute dtype, y (N,) in [0, C)."""
    p = F.softmax(v / temperature, dim=-1)
    v_y = v.gather(-1, y[:, None])
    wrong = v_y < v.max(dim=-1, keepdim=True).values
    if policy is None:
        return p, torch.zeros_like(wrong[:, 0])
    p_y = p.gather(-1, y[:, None])
    beta = eta / (1.0 + p.max(dim=-1, keepdim=True).values - p_y)
    revised = (beta * p).scatter_add(-1, y[:, None], 1.0 - beta)
    return torch.where(wrong, revised, p), wrong[:, 0]


def revise_labels(
    teacher_logits: Tensor,
    target: Tensor,
    *,
    eta: float = 0.8,
    temperature: float = 1.0,
    policy: str = "lr",
) -> Tensor:
    """softmax(teacher_logits / temperature), corrected where the teacher's top class is not `target`.

    teacher_logits: (..., C) floating. target: (...) int32/int64 in [0, C). Returns (..., C) probabilities, float32
    (float64 for float64 logits). On corrected rows, beta = eta / (1 + p_max - p_y) and the result is
    beta * p + (1 - beta) * one_hot(target): the target wins by exactly 1 - eta, the other classes keep their ratios.
    Lan et al. 2024 (arXiv 2404.03693), label revision.
    """
    v = teacher_logits.detach().to(compute_dtype(teacher_logits, teacher_logits))
    classes = v.shape[-1]
    p, _ = _revise(v.reshape(-1, classes), target.reshape(-1).long(), temperature, eta, policy)
    return p.reshape(teacher_logits.shape)


def _xlogy_difference(p: Tensor, log_q: Tensor) -> Tensor:
    """p * (log p - log q) with 0 wherever p = 0, whatever log q is there. A NaN in p stays."""
    nonzero = p != 0
    log_p = torch.where(nonzero, p, 1.0).log()
    return torch.where(nonzero, p * (log_p - log_q), 0.0)


def kd_loss_parts(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    ce_weight_unselected: float | None = None,
    revise: str | None = "lr",
    eta: float = 0.8,
    selected: Tensor | None = None,
    divergence: str = "kl",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: Tensor | float | None = None,
    grad_scale: Tensor | float | None = None,
) -> KDLossParts:
    """kd_loss_parts as a composition of PyTorch ops; see lrds_fast.kd_loss_parts for the arguments.

    grad_scale is accepted and has no effect: it only says how a rounded gradient may be stored.
    """
    del grad_scale
    if divergence != "kl":
        raise ValueError(f"divergence must be 'kl'; got {divergence!r}")
    if ce_weight_unselected is None:
        ce_weight_unselected = default_ce_weight_unselected(ce_weight, kd_weight)
    dtype = compute_dtype(student_logits, teacher_logits)
    classes = student_logits.shape[-1]
    z = student_logits.reshape(-1, classes).to(dtype)
    v = teacher_logits.detach().reshape(-1, classes).to(dtype)
    y = target.reshape(-1).long()
    rows, teacher_rows = z.shape[0], v.shape[0]

    valid = y != ignore_index
    y = torch.where(valid, y, 0)
    if selected is not None:
        w = selected.reshape(-1).to(dtype)
    else:
        w = (torch.arange(rows, device=z.device) < teacher_rows).to(dtype)
    w_ce = w * ce_weight + (1.0 - w) * ce_weight_unselected
    w_kd = w * kd_weight
    if teacher_rows < rows:
        v = torch.cat([v, v.new_zeros(rows - teacher_rows, classes)])

    # A term of weight 0 is neither read nor added: its logits are replaced before any arithmetic, so that an inf or
    # a NaN in a row that nobody asked for reaches neither the loss nor the gradient.
    use_ce = valid & (w_ce != 0)
    z_ce = torch.where(use_ce[:, None], z, 0.0)
    log_p1 = F.log_softmax(z_ce, dim=-1)
    ce = (1.0 - label_smoothing) * -log_p1.gather(-1, y[:, None])[:, 0]
    if label_smoothing:
        ce = ce - label_smoothing * log_p1.mean(dim=-1)
    ce = torch.where(use_ce, w_ce * ce, 0.0)

    use_kd = valid & (w_kd != 0)
    z_kd = torch.where(use_kd[:, None], z, 0.0)
    v_kd = torch.where(use_kd[:, None], v, 0.0)
    p, revised = _revise(v_kd, y, temperature, eta, revise)
    log_q = F.log_softmax(z_kd / temperature, dim=-1)
    kl = _xlogy_difference(p, log_q).sum(dim=-1)
    kd = torch.where(use_kd, w_kd * temperature**2 * kl, 0.0)

    n_valid = valid.sum()
    if reduction == "none":
        ce, kd = ce.reshape(target.shape), kd.reshape(target.shape)
    else:
        denominator = torch.ones((), dtype=dtype, device=z.device)
        if reduction in ("mean", "elementmean"):
            count = n_valid if num_valid is None else num_valid
            denominator = torch.as_tensor(count, dtype=dtype, device=z.device)
            denominator = denominator * (classes if reduction == "elementmean" else 1)
        elif reduction != "sum":
            raise ValueError(f"reduction must be 'mean', 'sum', 'none' or 'elementmean'; got {reduction!r}")
        scale = torch.where(denominator > 0, 1.0 / denominator.clamp(min=torch.finfo(dtype).tiny), 0.0)
        ce, kd = ce.sum() * scale, kd.sum() * scale
    selected_rows = valid & (w > 0)
    return KDLossParts(
        loss=ce + kd,
        ce=ce.detach(),
        kd=kd.detach(),
        n_valid=n_valid,
        n_selected=selected_rows.sum(),
        n_revised=(use_kd & revised).sum(),
    )


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    ce_weight_unselected: float | None = None,
    revise: str | None = "lr",
    eta: float = 0.8,
    selected: Tensor | None = None,
    divergence: str = "kl",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: Tensor | float | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """kd_loss as a composition of PyTorch ops; see lrds_fast.kd_loss for the arguments."""
    return kd_loss_parts(
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        ce_weight_unselected=ce_weight_unselected,
        revise=revise,
        eta=eta,
        selected=selected,
        divergence=divergence,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        num_valid=num_valid,
        grad_scale=grad_scale,
    ).loss


def kd_logit_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    revise: str | None = "lr",
    eta: float = 0.8,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Each row's d/dz [ce_weight * CE(z, y) + kd_weight * T^2 * KL(p' || q)], without any 1/N.

    Logits (N, C), target (N,). Weights may be negative or 0 (a term of weight 0 is not read). Returns (N, C) in
    float32 (float64 for float64 logits).
    """
    dtype = compute_dtype(student_logits, teacher_logits)
    z, v, y = student_logits.detach().to(dtype), teacher_logits.detach().to(dtype), target.long()
    gradient = torch.zeros_like(z)
    if ce_weight != 0:
        one_hot = F.one_hot(y, z.shape[-1]).to(dtype)
        smoothed = (1.0 - label_smoothing) * one_hot + label_smoothing / z.shape[-1]
        gradient = gradient + ce_weight * (F.softmax(z, dim=-1) - smoothed)
    if kd_weight != 0:
        p, _ = _revise(v, y, temperature, eta, revise)
        gradient = gradient + kd_weight * temperature * (F.softmax(z / temperature, dim=-1) - p)
    return gradient
