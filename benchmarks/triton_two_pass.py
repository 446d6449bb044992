"""CE + label revision + KL in Triton: a program per row, online statistics, then the gradient in a second pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _two_pass(
    z_ptr,
    v_ptr,
    target_ptr,
    ce_weight_ptr,
    kd_weight_ptr,
    loss_ptr,
    gradient_ptr,
    classes,
    inv_t,
    t,
    eta,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row, v_row, g_row = z_ptr + row * classes, v_ptr + row * classes, gradient_ptr + row * classes
    y = tl.load(target_ptr + row)
    w_ce, w_kd = tl.load(ce_weight_ptr + row), tl.load(kd_weight_ptr + row)
    offsets = tl.arange(0, BLOCK)
    max_z = -float("inf")
    max_v = -float("inf")
    sum_z = 0.0
    sum_zt = 0.0
    sum_vt = 0.0
    dot = 0.0
    for start in range(0, classes, BLOCK):
        k = start + offsets
        z = tl.load(z_row + k, mask=k < classes, other=-float("inf")).to(tl.float32)
        v = tl.load(v_row + k, mask=k < classes, other=-float("inf")).to(tl.float32)
        new_z, new_v = tl.maximum(max_z, tl.max(z, 0)), tl.maximum(max_v, tl.max(v, 0))
        down_z, down_v = max_z - new_z, max_v - new_v
        scale = tl.exp(down_v * inv_t)
        # The first block's scale is exp(-inf) = 0 and its sums are 0.
        shift = tl.where(scale > 0.0, down_v - down_z, 0.0)
        dot = scale * (dot + sum_vt * shift)
        sum_vt = sum_vt * scale
        sum_z = sum_z * tl.exp(down_z)
        sum_zt = sum_zt * tl.exp(down_z * inv_t)
        dz, dv = z - new_z, v - new_v
        ev = tl.exp(dv * inv_t)
        sum_z += tl.sum(tl.exp(dz), 0)
        sum_zt += tl.sum(tl.exp(dz * inv_t), 0)
        sum_vt += tl.sum(ev, 0)
        dot += tl.sum(tl.where(ev > 0.0, ev * (dv - dz), 0.0), 0)
        max_z, max_v = new_z, new_v
    z_y = tl.load(z_row + y).to(tl.float32) - max_z
    v_y = tl.load(v_row + y).to(tl.float32) - max_v
    log_zt, log_vt = tl.log(sum_zt), tl.log(sum_vt)
    kl = dot * inv_t / sum_vt - log_vt + log_zt
    p_y = tl.exp(v_y * inv_t) / sum_vt
    log_p_y, log_q_y = v_y * inv_t - log_vt, z_y * inv_t - log_zt
    wrong = v_y < 0.0
    beta = tl.where(wrong, eta / (1.0 + 1.0 / sum_vt - p_y), 1.0)
    revised_y = beta * p_y + 1.0 - beta
    revised = beta * (1.0 - p_y) * tl.log(beta) + beta * (kl - p_y * (log_p_y - log_q_y))
    kl = tl.where(wrong, revised + revised_y * (tl.log(revised_y) - log_q_y), kl)
    tl.store(loss_ptr + row, w_ce * (tl.log(sum_z) - z_y) + w_kd * kl)
    on_z, on_zt, on_vt = w_ce / sum_z, w_kd * inv_t / sum_zt, w_kd * inv_t * beta / sum_vt
    at_y = -w_ce - w_kd * inv_t * (1.0 - beta)
    for start in range(0, classes, BLOCK):
        k = start + offsets
        z = tl.load(z_row + k, mask=k < classes, other=-float("inf")).to(tl.float32) - max_z
        v = tl.load(v_row + k, mask=k < classes, other=-float("inf")).to(tl.float32) - max_v
        g = on_z * tl.exp(z) + on_zt * tl.exp(z * inv_t) - on_vt * tl.exp(v * inv_t) + tl.where(k == y, at_y, 0.0)
        tl.store(g_row + k, g.to(gradient_ptr.dtype.element_ty), mask=k < classes)


def launch(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kd_weight: Tensor,
    temperature: float,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """Per-row losses (N,) float32 and the gradient (N, C) of their sum, in the student's dtype."""
    rows, classes = student_logits.shape
    z, v = student_logits.contiguous(), teacher_logits.contiguous()
    loss = torch.empty(rows, device=z.device, dtype=torch.float32)
    gradient = torch.empty_like(z)
    block = min(8192, triton.next_power_of_2(classes))
    _two_pass[(rows,)](
        z,
        v,
        target,
        ce_weight,
        kd_weight,
        loss,
        gradient,
        classes,
        1.0 / temperature,
        temperature,
        eta,
        BLOCK=block,
        num_warps=4 if block <= 1024 else 8 if block <= 4096 else 16,
    )
    return loss, gradient
