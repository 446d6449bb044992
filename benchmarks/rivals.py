"""The same loss made of other people's kernels, and as a plain Triton kernel of two passes: what runs on a GPU beside
torch.compile.

Same signature and restrictions as the baselines (benchmarks/baselines.py). On a machine without a GPU the Triton
kernel runs under Triton's interpreter (TRITON_INTERPRET=1): tests/test_kd_loss_baselines.py checks it so.
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
    """Liger's cross-entropy and its KL divergence, which takes log-probabilities of one and probabilities of the other.

    The revision and the softmaxes between the two kernels are PyTorch's: Liger has neither.
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
    kd = liger_kl_div(log_q, p, "none").sum(dim=1)
    # Liger's per-row cross-entropy writes its gradient before it knows the row's weight: it takes a mean only.
    ce = liger_cross_entropy(student_logits.clone(), target, reduction="mean")
    if selected is not None:
        ce_rows = F.cross_entropy(student_logits.float(), target, reduction="none")
        return (ce_weight * ce_rows).sum() + (kd_weight * kd).sum()
    return objective.ce_weight * ce + (kd_weight * kd).sum()


_KERNEL: Any = None


def _kernel() -> Any:
    """The Triton kernel, compiled by whoever asks first: the module must import where there is no Triton."""
    global _KERNEL
    if _KERNEL is None:
        from benchmarks import triton_two_pass as module

        _KERNEL = module.launch
    return _KERNEL


class _TritonTwoPass(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, z: Tensor, v: Tensor, target: Tensor, objective: Objective, selected: Tensor | None
    ) -> Tensor:
        ce_weight, kd_weight = _row_weights(len(target), objective, selected, z)
        loss, gradient = _kernel()(z, v, target, ce_weight, kd_weight, objective.temperature, objective.eta)
        ctx.save_for_backward(gradient)
        total: Tensor = loss.sum()
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(gradient.dtype), None, None, None, None


def triton_two_pass(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    objective: Objective,
    selected: Tensor | None = None,
) -> Tensor:
    """The honest rival: one Triton program per row, one pass for the statistics, one for the gradient."""
    loss: Tensor = _TritonTwoPass.apply(student_logits, teacher_logits, target, objective, selected)
    return loss
