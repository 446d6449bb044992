"""Liger's fused linear distillation losses, computed by linear_kd_loss.

    from lrds_fast.compat.liger import LigerFusedLinearJSDLoss     # in place of liger_kernel.chunked_loss

They take Liger's arguments and give its numbers on the CPU and on CUDA. Vocabularies must be equal: Liger pads the
student's with logits of 0, which changes the loss; linear_kd_loss(classes="truncate") cuts the larger one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lrds_fast.compat.trl import divergence_of
from lrds_fast.linear import linear_kd_loss


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss * CE + weight_soft_loss * JSD_beta, without T^2, as liger_kernel.chunked_loss (0.8.5).

    beta: 0 is the KL of the teacher to the student, 1 the reverse. revise, eta: label revision of kd_loss, off by
    default. chunk_size, compiled: accepted and not used. return_soft_hard_loss: only False.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        *,
        revise: str | None = None,
        eta: float = 0.8,
    ) -> None:
        super().__init__()
        if return_soft_hard_loss:
            raise ValueError(
                "return_soft_hard_loss must be False; for the parts call linear_kd_loss once for each term"
            )
        self.options: dict[str, Any] = {
            "ce_weight": weight_hard_loss,
            "kd_weight": weight_soft_loss / temperature**2,
            "divergence": divergence_of(beta),
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
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        """student_input: (N, d). student_weight: (C, d). teacher_input: (N, d_t). teacher_weight: (C, d_t).
        true_labels: (N,) int64. Biases: (C,) or None. 0-d. Raises ValueError or TypeError as linear_kd_loss."""
        return linear_kd_loss(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            true_labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            **self.options,
        )


class LigerFusedLinearJSD(nn.Module):
    """JSD_beta alone, as liger_kernel.transformers.LigerFusedLinearJSD (0.8.5), which needs CUDA or another device.

    accum_dtype: accepted and not used: weight gradients are added in float32.
    """

    def __init__(
        self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0, accum_dtype: object = None
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "ce_weight": 0.0,
            "kd_weight": temperature**-2,
            "divergence": divergence_of(jsd_beta),
            "ignore_index": ignore_index,
            "temperature": temperature,
            "revise": None,
        }

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """Shapes as LigerFusedLinearJSDLoss. shift_labels: (N,) int64, for ignore_index; None: all rows count. 0-d."""
        return linear_kd_loss(
            student_input, student_weight, teacher_input, teacher_weight, shift_labels, **self.options
        )
