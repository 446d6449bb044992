"""Loads the compiled operators and tells PyTorch their shapes without data (fake kernels, for torch.compile)."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from lrds_fast import _C
except ImportError as error:
    if getattr(error, "name", None) != "lrds_fast._C" and "lrds_fast._C" not in str(error):
        # The extension is there and does not load: nearly always another torch than it was built with.
        raise ImportError(
            f"lrds_fast's compiled extension does not load with torch {torch.__version__} ({error}); "
            "rebuild it against this torch: pip install --no-build-isolation --force-reinstall --no-deps lrds-fast"
        ) from error
    raise ImportError(
        "lrds_fast's compiled extension is missing; build it with: pip install --no-build-isolation -e ."
    ) from error


def _release(version: str) -> str:
    """'2.15.0+cu132' -> '2.15': patch releases keep the C++ ABI."""
    return ".".join(version.split("+")[0].split(".")[:2])


def check_torch_version(built: str, found: str) -> None:
    """Raises ImportError if the extension was compiled against another minor release of torch."""
    if _release(built) != _release(found):
        raise ImportError(
            f"lrds_fast was built with torch {built} but torch {found} is installed; rebuild it against this torch: "
            "pip install --no-build-isolation --force-reinstall --no-deps lrds-fast (or -e . in a checkout)"
        )


check_torch_version(_C.build_info()["torch_version"], torch.__version__)

NO_REDUCTION = 0
"""The `reduction` of the operators that means one loss per row (see csrc/core/kd_loss.h)."""


def _accumulate(student: Tensor, teacher: Tensor) -> torch.dtype:
    wide = student.dtype == torch.float64 or teacher.dtype == torch.float64
    return torch.float64 if wide else torch.float32


def _loss_outputs(
    student: Tensor, teacher: Tensor, target: Tensor, reduction: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = target.shape if reduction == NO_REDUCTION else ()
    dtype = _accumulate(student, teacher)
    loss, ce, kd = (torch.empty(shape, dtype=dtype, device=student.device) for _ in range(3))
    return loss, ce, kd, torch.empty(3, dtype=torch.int64, device=student.device)


def _empty_contiguous(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


@torch.library.register_fake("lrds_fast::kd_loss")
def _kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    selected: Tensor | None,
    num_valid: Tensor | None,
    grad_scale: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    ce_weight_unselected: float,
    eta: float,
    label_smoothing: float,
    revise: int,
    reduction: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _loss_outputs(student, teacher, target, reduction)


@torch.library.register_fake("lrds_fast::kd_loss_forward")
def _kd_loss_forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    selected: Tensor | None,
    num_valid: Tensor | None,
    grad_scale: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    ce_weight_unselected: float,
    eta: float,
    label_smoothing: float,
    revise: int,
    reduction: int,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradient = _empty_contiguous(student) if with_gradient else student.new_empty(0)
    return (*_loss_outputs(student, teacher, target, reduction), gradient)


@torch.library.register_fake("lrds_fast::kd_loss_backward")
def _kd_loss_backward(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    selected: Tensor | None,
    num_valid: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    ce_weight_unselected: float,
    eta: float,
    label_smoothing: float,
    revise: int,
    reduction: int,
    ignore_index: int,
) -> Tensor:
    return _empty_contiguous(student)


@torch.library.register_fake("lrds_fast::scale_gradient")
def _scale_gradient(gradient: Tensor, grad_output: Tensor, grad_scale: Tensor | None) -> Tensor:
    return _empty_contiguous(gradient)


@torch.library.register_fake("lrds_fast::scale_gradient_")
def _scale_gradient_(gradient: Tensor, grad_output: Tensor, grad_scale: Tensor | None) -> None:
    return None


@torch.library.register_fake("lrds_fast::kd_logit_gradient")
def _kd_logit_gradient(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    eta: float,
    label_smoothing: float,
    revise: int,
) -> Tensor:
    return _empty_contiguous(student, _accumulate(student, teacher))


kd_loss = torch.ops.lrds_fast.kd_loss.default
kd_logit_gradient = torch.ops.lrds_fast.kd_logit_gradient.default
build_info = _C.build_info
