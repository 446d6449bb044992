"""Loads the compiled operators and registers their fake kernels, from which torch.compile learns shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrds_fast import _build

_problem = _build.problem(torch.__version__)
if _problem:
    raise ImportError(_problem)
try:
    import lrds_fast._C as _C
except ImportError as error:
    raise ImportError(
        f"lrds_fast's extension does not load with torch {torch.__version__} ({str(error).splitlines()[0][:150]});"
        f" rebuild it: {_build.how_to_rebuild()}"
    ) from None
_problem = _build.mismatch(_C.build_info()["torch_version"], torch.__version__)
if _problem:
    raise ImportError(_problem)

NO_REDUCTION = 0
"""The operators' code of the reduction "none", one loss per row (csrc/core/kd_loss.h: Reduction)."""


def _accumulate(student: Tensor, teacher: Tensor) -> torch.dtype:
    wide = student.dtype == torch.float64 or teacher.dtype == torch.float64
    return torch.float64 if wide else torch.float32


# The operators of the loss share their parameters (csrc/torch/problem.h: kParameters); the shapes of the results
# depend on three of them. A fake kernel gets each argument as the caller passed it: by position or by name.
_PARAMETERS = tuple(argument.name for argument in torch.ops.lrds_fast.kd_loss.default._schema.arguments)


def _shape_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    by_name = {**dict(zip(_PARAMETERS, args, strict=False)), **kwargs}
    return by_name["student"], by_name["teacher"], by_name["reduction"]


def _loss_outputs(student: Tensor, teacher: Tensor, reduction: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = student.shape[:-1] if reduction == NO_REDUCTION else ()
    dtype = _accumulate(student, teacher)
    loss, ce, kd = (torch.empty(shape, dtype=dtype, device=student.device) for _ in range(3))
    return loss, ce, kd, torch.empty(3, dtype=torch.int64, device=student.device)


def _empty_contiguous(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


@torch.library.register_fake("lrds_fast::kd_loss")
@torch.library.register_fake("lrds_fast::kd_loss_forward_")
def _kd_loss(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _loss_outputs(*_shape_arguments(args, kwargs))


@torch.library.register_fake("lrds_fast::kd_loss_forward")
def _kd_loss_forward(
    *args: Any, with_gradient: bool | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    student, teacher, reduction = _shape_arguments(args, kwargs)
    if with_gradient is None:
        with_gradient = args[-1]
    gradient = _empty_contiguous(student) if with_gradient else student.new_empty(0)
    return (*_loss_outputs(student, teacher, reduction), gradient)


@torch.library.register_fake("lrds_fast::kd_loss_backward")
def _kd_loss_backward(grad_output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _empty_contiguous(_shape_arguments(args, kwargs)[0])


@torch.library.register_fake("lrds_fast::kd_logit_gradient")
def _kd_logit_gradient(*args: Any, **kwargs: Any) -> Tensor:
    student, teacher, _ = _shape_arguments(args, kwargs)
    return _empty_contiguous(student, _accumulate(student, teacher))


@torch.library.register_fake("lrds_fast::kd_moments")
def _kd_moments(*args: Any, direction: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    student, teacher, _ = _shape_arguments(args, kwargs)
    rows = student.shape[:-1].numel()
    moments = torch.empty(8, rows, dtype=_accumulate(student, teacher), device=student.device)
    return moments, torch.empty(rows, dtype=torch.int64, device=student.device)


@torch.library.register_fake("lrds_fast::scale_gradient")
def _scale_gradient(gradient: Tensor, grad_output: Tensor, grad_scale: Tensor | None) -> Tensor:
    return _empty_contiguous(gradient)


@torch.library.register_fake("lrds_fast::scale_gradient_")
def _scale_gradient_(gradient: Tensor, grad_output: Tensor, grad_scale: Tensor | None) -> None:
    return None


_LIBRARY = torch.library.Library("lrds_fast", "IMPL")


def implement_composite(function: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    """Registers `function`, which is kd_loss in PyTorch ops, for the derivatives that the kernels do not compute."""
    _LIBRARY.impl("kd_loss_composite", function, "CompositeImplicitAutograd")


kd_loss = torch.ops.lrds_fast.kd_loss.default
kd_loss_forward = torch.ops.lrds_fast.kd_loss_forward.default
kd_loss_forward_ = torch.ops.lrds_fast.kd_loss_forward_.default
kd_logit_gradient = torch.ops.lrds_fast.kd_logit_gradient.default
kd_moments = torch.ops.lrds_fast.kd_moments.default
build_info = _C.build_info
