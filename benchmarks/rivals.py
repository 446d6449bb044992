"""Baselines for GPUs beside torch.compile: the loss from Liger's kernels, and as a Triton kernel of two passes.

They have the signature and the restrictions of benchmarks/baselines.py. tests/test_kd_loss_baselines.py checks the
Triton kernel without a GPU, under Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import Objective


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _row_weights(rows: int, objective: Objective, selected: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Per-row weights of the CE and the KD term of the mean, (N,) float32 each."""
    w = torch.ones(rows, device=like.device) if selected is None else selected.float()
    ce = w * objective.ce_weight + (1.0 - w) * objective.ce_weight_unselected
    return ce / rows, w * (objective.kd_weight * objective.temperature**2 / rows)


def liger_composed(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    objective: Objective,
    selected: Tensor | None = None,
) -> Tensor:
    """Liger's cross-entropy and its KL divergence of the student's log-probabilities and the teacher's probabilities.

    Label revision and the softmaxes are PyTorch's, because Liger has no kernels for them.
    """
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_kl_div

    t, index = objective.temperature, target[:, None]
    with torch.no_grad():
        v = teacher_logits.float()
        p = F.softmax(v / t, dim=1)
        p_y, p_max = p.gather(1, index), p.max(dim=1, keepdim=True).values
        wrong = v.gather(1, index) < v.max(dim=1, keepdim=True).values
        beta = torch.where(wrong, objective.eta / (1.0 + p_max - p_y), 1.0)
        p = p.mul_(beta).scatter_add_(1, index, 1.0 - beta)
    ce_weight, kd_weight = _row_weights(len(target), objective, selected, student_logits)
    log_q = F.log_softmax(student_logits.float() / t, dim=1)
    kd: Tensor = liger_kl_div(log_q, p, "none").sum(dim=1)
    # Liger's cross-entropy writes its gradient in the forward pass, without the rows' weights: it supports means alone.
    ce: Tensor = liger_cross_entropy(student_logits.clone(), target, reduction="mean")
    if selected is not None:
        ce_rows = F.cross_entropy(student_logits.float(), target, reduction="none")
        return (ce_weight * ce_rows).sum() + (kd_weight * kd).sum()
    return objective.ce_weight * ce + (kd_weight * kd).sum()


_KERNEL: Any = None


def _kernel() -> Any:
    """The launcher of the Triton kernel, imported at the first call: Triton need not be installed."""
    global _KERNEL
    if _KERNEL is None:
        from benchmarks import triton_two_pass as module

        _KERNEL = module.launch
    return _KERNEL


class _TritonTwoPass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, v: Tensor, target: Tensor, objective: Objective, selected: Tensor | None
    ) -> Tensor:
        ce_weight, kd_weight = _row_weights(len(target), objective, selected, z)
        loss, gradient = _kernel()(z, v, target, ce_weight, kd_weight, objective.temperature, objective.eta)
        ctx.save_for_backward(gradient)
        total: Tensor = loss.sum()
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(gradient.dtype), None, None, None, None


def triton_two_pass(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    objective: Objective,
    selected: Tensor | None = None,
) -> Tensor:
    """One Triton program per row: one pass for the statistics, one for the gradient."""
    loss: Tensor = _TritonTwoPass.apply(student_logits, teacher_logits, target, objective, selected)
    return loss
