"""Checks of the arguments of the scoring functions. Each error is one line that names the argument and a way out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lrds_fast._numbers import integer, number

_INDEX_DTYPES = (torch.int32, torch.int64)
# Rows per step of the search for non-finite values, which bounds the temporary mask.
_SCAN_ROWS = 1 << 16


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_damping(name: str, value: float) -> float:
    """A finite number >= 0, as a float."""
    damping = float(number(name, value))
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"{name} must be finite and >= 0; got {value!r}")
    return damping


def check_samples(features: Tensor, logits: Tensor, target: Tensor, *, prefix: str = "") -> None:
    """features (N, d), logits (N, C), target (N,): shapes, dtypes, one device, finite values, classes in range."""
    features_name = f"{prefix}features"
    logits_name = "val_logits" if prefix else "student_logits"
    target_name = f"{prefix}target"
    _check_matrix(features_name, features, "(N, d)")
    _check_matrix(logits_name, logits, "(N, C)")
    _check_tensor(target_name, target)
    if target.dtype not in _INDEX_DTYPES:
        raise TypeError(f"{target_name} must be int32 or int64 class indices; got {target.dtype}")
    rows, classes = features.shape[0], logits.shape[1]
    if rows == 0:
        raise ValueError(f"{features_name} must have at least one sample; got shape {tuple(features.shape)}")
    for name, tensor, shape in (
        (logits_name, logits, (rows, classes)),
        (target_name, target, (rows,)),
    ):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape}, one row per sample of {features_name}; got {tuple(tensor.shape)}"
            )
    check_device(features_name, features, {logits_name: logits, target_name: target}.items())
    check_finite(features_name, features)
    check_logits(logits_name, logits)
    outside = (target < 0) | (target >= classes)
    if outside.any():
        row = _first(outside)
        raise ValueError(f"{target_name} must lie in [0, {classes}); got {int(target[row])} at sample {row}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor, *, dim: int | None = None) -> None:
    """tensor is a floating matrix of other's shape; with `dim`, of other's size in that dimension."""
    _check_matrix(name, tensor, "(N, C)")
    if dim is None and tensor.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}; got {tuple(tensor.shape)}")
    if dim is not None and tensor.shape[dim] != other.shape[dim]:
        raise ValueError(
            f"{name} must have {other.shape[dim]} columns, as {other_name} has; got shape {tuple(tensor.shape)}"
        )


def check_device(name: str, tensor: Tensor, others: Iterable[tuple[str, Tensor]]) -> None:
    """All other tensors are on the device of `tensor`."""
    for other_name, other in others:
        if other.device != tensor.device:
            raise ValueError(f"{other_name} must be on {name}'s device {tensor.device}; got {other.device}")


def check_finite(name: str, tensor: Tensor, first: int = 0) -> None:
    """tensor (N, d) has no NaN and no infinity; the error names the first sample that has one.

    first: the number of row 0's sample.
    """
    for start in range(0, tensor.shape[0], _SCAN_ROWS):
        finite = torch.isfinite(tensor[start : start + _SCAN_ROWS]).all(dim=1)
        if not finite.all():
            raise ValueError(
                f"{name} must be finite; sample {first + start + _first(~finite)} has a NaN or an infinity: drop the"
                " sample or find where its activations overflow"
            )


def check_scores(name: str, values: Tensor, first: int = 0) -> None:
    """Raises ValueError, naming the first sample, if scores (B,) or (B, k) are NaN or infinite.

    first: the number of row 0's sample.
    """
    finite = torch.isfinite(values)
    if not finite.all():
        row = _first(~finite)
        value = float(values[row].flatten()[~finite[row].flatten()][0])
        raise ValueError(
            f"score {name!r} is {value} at sample {first + row}: drop the sample, score in float64 (a .double()"
            " student, or float64 tensors), or pass a larger damping; ce or kd is inf if the student excludes (-inf) a"
            " class that the label or the teacher has"
        )


def check_logits(name: str, logits: Tensor, first: int = 0) -> None:
    """tensor (N, C) has no NaN, no +inf and no row of only -inf; the error names the first such sample.

    first: as in check_finite.
    """
    for start in range(0, logits.shape[0], _SCAN_ROWS):
        # A row's maximum is NaN if any entry is, +inf if any is, -inf if all are: finite exactly for legal rows.
        usable = torch.isfinite(logits[start : start + _SCAN_ROWS].amax(dim=1))
        if not usable.all():
            raise ValueError(
                f"{name}: sample {first + start + _first(~usable)} has a NaN, a +inf or nothing but -inf; only some"
                " -inf (masked classes) are legal"
            )


def check_selected(selected: Tensor | None, samples: int | None) -> None:
    """None, or a bool tensor or floats in [0, 1] of shape (samples,). samples: None where it is not known yet."""
    if selected is None:
        return
    _check_tensor("selected", selected)
    if selected.dtype != torch.bool and not selected.is_floating_point():
        raise TypeError(f"selected must be bool, or floats in [0, 1]; got {selected.dtype}")
    if selected.is_floating_point():
        outside = ~((selected >= 0) & (selected <= 1))
        if outside.any():
            row = _first(outside)
            raise ValueError(f"selected must lie in [0, 1]; got {float(selected[row])} at sample {row}")
    if samples is not None and selected.shape != (samples,):
        raise ValueError(f"selected must have shape ({samples},), one value per sample; got {tuple(selected.shape)}")


def check_targets(y: Tensor, classes: int, first: int) -> None:
    """Labels y (B,) lie in [0, classes); the error names the first sample whose label does not.

    first: the number of row 0's sample.
    """
    outside = (y < 0) | (y >= classes)
    if outside.any():
        row = _first(outside)
        raise ValueError(f"targets must lie in [0, {classes}); got {int(y[row])} at sample {first + row}")


def check_teacher_logits(v: Tensor, z: Tensor, first: int) -> None:
    """Teacher's logits v (B, C) are legal and have the classes of the student's, z. first: as in check_finite."""
    if z.shape != v.shape:
        raise ValueError(f"student and teacher must give the same classes; got {tuple(z.shape)}, {tuple(v.shape)}")
    check_logits("teacher_logits", v, first)


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")


def _check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    _check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor; got {tensor.dtype}")
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0, 0])


def check_folds(folds: int | None, default: int) -> int:
    """The number of parts that the held-out slice is divided into; None: `default`. 0: no standard error."""
    if folds is None:
        return default
    what = "None, 0 (no standard error) or an int >= 2"
    parts = integer("folds", folds, what)
    if parts < 0 or parts == 1:
        raise ValueError(f"folds must be {what}; got {folds!r}")
    return parts
