"""The losses that kd_loss is compared with.

They were written before the kernels and do not change, so that ratios of different releases can be compared. Every
baseline takes (student_logits, teacher_logits, target) and the Objective, returns the mean loss as a 0-d float32 tensor
and is differentiated by autograd. They support what published code supports: 2-d logits, int64 targets without ignored
rows, a bool selection, reduction "mean". Half-precision logits are cast to float32 first, as autocast does for these
ops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Objective:
    """The hyperparameters of all contenders, named as in lrds_fast.kd_loss. Labels are revised as published, at the
    temperature of the divergence."""

    temperature: float = 4.0
    ce_weight: float = 0.1
    kd_weight: float = 0.9
    ce_weight_unselected: float = 1.0
    eta: float = 0.8
    revise_temperature: float | None = None


Baseline = Callable[[Tensor, Tensor, Tensor, Objective, "Tensor | None"], Tensor]


def eager(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    objective: Objective,
    selected: Tensor | None = None,
) -> Tensor:
    """Cross-entropy, label revision and T^2 * KL, op by op as in published distillation code."""
    z, v = student_logits.float(), teacher_logits.float()
    temperature = objective.temperature

    p = F.softmax(v / temperature, dim=1)
    one_hot = F.one_hot(target, v.shape[1]).float()
    wrong = v.gather(1, target[:, None]) < v.max(dim=1, keepdim=True).values
    p_target = (p * one_hot).sum(dim=1, keepdim=True)
    beta = objective.eta / (1.0 + p.max(dim=1, keepdim=True).values - p_target)
    p = torch.where(wrong, beta * p + (1.0 - beta) * one_hot, p)

    log_q = F.log_softmax(z / temperature, dim=1)
    if selected is None:
        ce = objective.ce_weight * F.cross_entropy(z, target)
        kd = F.kl_div(log_q, p, reduction="batchmean")
    else:
        mask = selected.float()
        ce_weight = torch.where(selected, objective.ce_weight, objective.ce_weight_unselected)
        ce = (ce_weight * F.cross_entropy(z, target, reduction="none")).mean()
        kd = (F.kl_div(log_q, p, reduction="none").sum(dim=1) * mask).mean()
    return ce + objective.kd_weight * temperature**2 * kd


def lean_eager(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    objective: Objective,
    selected: Tensor | None = None,
) -> Tensor:
    """The same loss with as few passes over the logits as PyTorch ops allow.

    It has no one-hot matrix, revises in place, computes the entropy of the revised labels in closed form, and needs one
    log-softmax where T = 1.
    """
    z, v = student_logits.float(), teacher_logits.float()
    temperature, index = objective.temperature, target[:, None]

    with torch.no_grad():
        log_p = F.log_softmax(v if temperature == 1.0 else v / temperature, dim=1)
        p = log_p.exp()
        log_p_target, log_p_max = log_p.gather(1, index), log_p.max(dim=1, keepdim=True).values
        p_target = log_p_target.exp()
        wrong = log_p_target < log_p_max
        beta = torch.where(wrong, objective.eta / (1.0 + log_p_max.exp() - p_target), 1.0)
        entropy = log_p.mul_(p).sum(dim=1, keepdim=True)  # sum p log p
        revised_target = beta * p_target + (1.0 - beta)
        entropy = beta * (entropy - p_target * log_p_target + (1.0 - p_target) * beta.log())
        entropy += torch.xlogy(revised_target, revised_target)
        p = p.mul_(beta).scatter_add_(1, index, 1.0 - beta)
        rows = z.shape[0]
        weight = torch.full((), objective.kd_weight * temperature**2 / rows, device=z.device)
        ce_weight = torch.full((), objective.ce_weight / rows, device=z.device)
        if selected is not None:
            weight = torch.where(selected, weight, 0.0)
            ce_weight = torch.where(selected, ce_weight, objective.ce_weight_unselected / rows)
        constant = (weight * entropy[:, 0]).sum()
        p = p.mul_(weight[:, None] if weight.dim() else weight)

    log_q = F.log_softmax(z if temperature == 1.0 else z / temperature, dim=1)
    log_softmax = log_q if temperature == 1.0 else F.log_softmax(z, dim=1)
    ce = (ce_weight * F.nll_loss(log_softmax, target, reduction="none")).sum()
    return ce + constant - (p * log_q).sum()


def compiled(mode: str = "default") -> Baseline:
    """torch.compile of `eager`, specialised for each shape as in a training loop with a fixed batch size."""
    return torch.compile(eager, mode=mode, dynamic=False, fullgraph=True)
