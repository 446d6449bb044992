"""Inputs of kd_loss that the CPU and the GPU tests share, and why each size is there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lrds_fast.divergences import DKD, JSD, NAMES, NKD, RLD, SKL, SRKL, resolve

ROOT = Path(__file__).resolve().parent.parent

# 1: KD is 0. 2: binary. 10: below one vector. 31, 32, 33: a warp, two AVX-512 vectors, their tails.
# 100: CIFAR-100. 1000, 1001: ImageNet without and with background (odd rows are unaligned).
# 4097: one past the last size that a GPU thread block keeps in registers.
CLASSES = (1, 2, 10, 31, 32, 33, 100, 1000, 1001, 4097)
# Integers up to 8 may be computed by multiplying exp(x / T) with itself, others by a second exp.
TEMPERATURES = (1.0, 2.0, 3.0, 4.0, 8.0, 2.5)
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Every divergence with its defaults, and those with parameters away from them.
FAMILY = (
    *map(resolve, NAMES),
    DKD(alpha=0.0, beta=2.0),
    DKD(alpha=3.0, beta=0.0),
    RLD(alpha=0.5, beta=2.0, confidence_temperature=3.0),
    NKD(gamma=0.0),
    JSD(weight=0.1),
    SKL(weight=0.6),
    SRKL(weight=0.6),
)
REVISE = (None, "lr", "mft", "swap")


class Rows(NamedTuple):
    student: Tensor  # (N, C)
    teacher: Tensor  # (N, C)
    target: Tensor  # (N,) int64


def rows(
    count: int,
    classes: int,
    student_dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> Rows:
    """Logits of plausible spread, a few hard rows; the teacher is right on at least every other one.

    Row 1 is shifted by 300, row 2 peaks 500 above the rest, row 3 is constant, and in row 4 the
    student equals the teacher.
    """
    generator = torch.Generator().manual_seed(seed)
    student = 2.0 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    teacher = 3.0 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (count,), generator=generator)
    target[::2] = teacher[::2].argmax(dim=-1)
    student[1:2] += 300.0
    teacher[1:2] -= 300.0
    student[2:3, classes // 2] += 500.0
    teacher[2:3, classes // 3] += 500.0
    student[3:4] = 0.25
    teacher[3:4] = -1.5
    student[4:5] = teacher[4:5]
    return Rows(
        student.to(device, student_dtype),
        teacher.to(device, teacher_dtype or student_dtype),
        target.to(device),
    )


def strided(tensor: Tensor, layout: str) -> Tensor:
    """A copy of the (N, C) tensor with the same values in another memory layout."""
    count, classes = tensor.shape
    if layout == "wide rows":  # a slice of a padded vocabulary
        return tensor.new_full((count, classes + 7), float("nan"))[:, :classes].copy_(tensor)
    if layout == "unaligned":  # rows start one element past an aligned address
        flat = tensor.new_full((count * classes + 1,), float("nan"))
        return flat[1:].view(count, classes).copy_(tensor)
    if layout == "every other row":
        return tensor.new_full((2 * count, classes), float("nan"))[::2].copy_(tensor)
    if layout == "transposed":  # last stride is not 1
        return tensor.t().contiguous().t()
    if layout == "every other class":
        return tensor.new_full((count, 2 * classes), float("nan"))[:, ::2].copy_(tensor)
    if layout == "expanded":  # row stride 0
        return tensor[:1].expand(count, classes)
    raise ValueError(layout)


LAYOUTS = (
    "wide rows",
    "unaligned",
    "every other row",
    "transposed",
    "every other class",
    "expanded",
)


def family_rows(count: int, classes: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Rows:
    """rows(), but the peak of row 2 is 60: divergences with a logarithm of the teacher are finite there in float32."""
    student, teacher, target = rows(count, classes, torch.float64, seed=seed)
    student[2:3, classes // 2] -= 440.0
    teacher[2:3, classes // 3] -= 440.0
    return Rows(student.to(dtype), teacher.to(dtype), target)
