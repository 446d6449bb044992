"""Liger's fused linear distillation losses with linear_kd_loss, on the CPU and on CUDA; Liger itself is not used.

LigerFusedLinearJSDLoss and LigerFusedLinearJSD are twins of the classes of these names in liger_kernel.chunked_loss and
liger_kernel.transformers, with revise and eta beside their arguments.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from lrds_fast.compat import generalized_jsd
from lrds_fast.linear import linear_kd_loss

if importlib.util.find_spec("liger_kernel") is None:
    raise ImportError("lrds_fast.compat.liger needs liger-kernel: pip install liger-kernel")


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss * CE + weight_soft_loss * JSD_beta from hidden states, as liger_kernel.chunked_loss.

    Arguments as Liger's; there is no T^2. compiled is ignored: nothing is compiled. chunk_size: rows in a chunk; None
    is chosen from the shapes. return_soft_hard_loss must be False. Student and teacher must have one vocabulary: Liger
    pads the student's with logit 0. revise, eta: kd_loss's label revision. Raises ValueError.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int | None = 1024,
        return_soft_hard_loss: bool = False,
        *,
        revise: str | None = None,
        eta: float = 0.8,
    ) -> None:
        super().__init__()
        if return_soft_hard_loss:
            raise ValueError("return_soft_hard_loss must be False: linear_kd_loss returns the sum of both losses")
        if temperature <= 0:
            raise ValueError(f"temperature must be > 0; got {temperature!r}")
        self.chunk_size = chunk_size
        self.options: dict[str, Any] = {
            "ce_weight": weight_hard_loss,
            "ce_weight_unselected": weight_hard_loss,
            "kd_weight": weight_soft_loss / temperature**2,
            "divergence": generalized_jsd(beta),
            "ignore_index": ignore_index,
            "temperature": temperature,
            "revise": revise,
            "eta": eta,
        }

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor | None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        """The mean over the labels that are not ignored. *_input: (N, H); *_weight: (V, H); true_labels: (N,)."""
        return linear_kd_loss(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            true_labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            chunk_rows=self.chunk_size,
            **self.options,
        )


class LigerFusedLinearJSD(nn.Module):
    """JSD_beta alone from hidden states, as liger_kernel.transformers.

    Arguments as Liger's. accum_dtype is ignored: gradients are added in float32, or float64 for float64. revise, eta:
    kd_loss's label revision, which needs labels.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        *,
        revise: str | None = None,
        eta: float = 0.8,
    ) -> None:
        super().__init__()
        arguments: dict[str, Any] = {"revise": revise, "eta": eta, "chunk_size": None}
        self.loss = LigerFusedLinearJSDLoss(0.0, 1.0, jsd_beta, ignore_index, temperature, **arguments)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """The mean over the labels that are not ignored, or over all rows without labels."""
        if shift_labels is None and self.loss.options["revise"] is not None:
            raise ValueError("revise needs shift_labels; pass them, or revise=None")
        loss: Tensor = self.loss(student_input, student_weight, teacher_input, teacher_weight, shift_labels)
        return loss
