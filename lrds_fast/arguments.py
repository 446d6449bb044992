"""Checks of tensor arguments. Each error names the argument, what it must be, what arrived and the way out."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrds_fast._numbers import integer, number

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes that logits and hidden states may have."""

_WEIGHTS = "ce_weight weights the cross-entropy, kd_weight the divergence; {} means either of them in other programs"
_TEMPERATURE = "did you mean 'temperature'?"
_DIVERGENCE = "a divergence has parameters of its own: divergence=lrds_fast.DKD(alpha=1.0, beta=2.0)"
_ELSEWHERE = dict.fromkeys(("t", "tau", "temp", "kd_t"), _TEMPERATURE)
_ELSEWHERE |= dict.fromkeys(("alpha", "lambda", "lam", "lambd", "lmbda"), _WEIGHTS)
_ELSEWHERE |= dict.fromkeys(("beta", "gamma"), _DIVERGENCE)


def check_tensor(name: str, value: object, holds: str = "logits", attribute: str = "logits") -> None:
    """TypeError unless value is a Tensor.

    holds: the content, for the message. attribute: where a model's output object has the tensor, for the message.
    """
    if isinstance(value, Tensor):
        return
    hint = ""
    if isinstance(getattr(value, attribute, None), Tensor):
        hint = f"; pass its .{attribute}"
    elif hasattr(value, "dense"):  # a TopKTeacher
        hint = "; pass its .dense(classes)"
    elif isinstance(value, Mapping):
        hint = f"; pass the value that holds them, of the keys {', '.join(map(repr, value))}"
    elif type(value) in (tuple, list):
        hint = "; pass the element that holds them, often its [0]"
    raise TypeError(f"{name} must be a Tensor of {holds}; got {type(value).__name__}{hint}")


def check_teacher_rows(
    student: Sequence[int], teacher: Sequence[int], teacher_rows: object, *, of: str = "logits"
) -> None:
    """ValueError unless the teacher has as many rows as the student or, with teacher_rows, teacher_rows rows.

    student, teacher: shapes of student_{of} and teacher_{of}, (..., size of a row). teacher_rows: None, or the number
    of flattened rows K that the teacher has, as (K, size) or (B', ..., size); TypeError for anything but an int.
    """
    lead = tuple(student[:-1])
    rows, prefix = math.prod(lead), math.prod(teacher[:-1])
    is_prefix = prefix <= rows and (len(teacher) == 2 or tuple(teacher[1:-1]) == lead[1:])
    if teacher_rows is None:
        if is_prefix and prefix == rows:
            return
        hint = f" If the teacher ran on the first {prefix} rows only, pass teacher_rows={prefix}" if is_prefix else ""
        raise ValueError(
            f"teacher_{of} must have a row for each row of student_{of} {tuple(student)}; got {tuple(teacher)}: "
            f"check that both are shifted by the same tokens and come from the same batch.{hint}"
        )
    if not isinstance(teacher_rows, torch.SymInt):
        teacher_rows = integer("teacher_rows", teacher_rows, "an int or None")
    if prefix != teacher_rows:
        raise ValueError(
            f"teacher_rows must be the number of rows in teacher_{of}, {prefix} in shape {tuple(teacher)}; "
            f"got {teacher_rows}"
        )
    if not is_prefix:
        raise ValueError(
            f"teacher_{of} must hold the first teacher_rows <= {rows} rows of student_{of} {tuple(student)}, "
            f"as (K, {teacher[-1]}) or with the same inner dimensions; got {tuple(teacher)}"
        )


def check_logits(name: str, logits: Any) -> None:
    """TypeError or ValueError unless `logits` is a floating Tensor (..., C) with C >= 1."""
    check_tensor(name, logits)
    if logits.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must have shape (..., C) with C >= 1; got {tuple(logits.shape)}")


def _check_class_dimension(name: str, shape: Sequence[int], target: Tensor) -> None:
    """ValueError if the target fits the logits in layout (..., C) and in layout (N, C, H, W).

    Three dimensions always mean (B, T, C), because T = C is common: a byte model over 256 tokens.
    """
    if len(shape) > 3 and (target.is_floating_point() or all(size == shape[-1] for size in shape[1:])):
        raise ValueError(
            f"{name} must have its classes last; with shape {tuple(shape)} they may be in dimension 1: pass rows, "
            f"{name}.movedim(1, -1).flatten(0, -2) for (N, C, H, W) or {name}.flatten(0, -2) for (N, H, W, C), and "
            "the teacher and the target in the same way"
        )


def _class_dimension_hint(name: str, shape: Sequence[int], target: Sequence[int]) -> str:
    """A hint for the error if the shapes fit logits with their classes in dimension 1; else ""."""
    inner = tuple(shape[2:])
    likely = ((shape[0], *inner), (shape[0], *inner, shape[1]), (shape[0], shape[-1], *shape[1:-1]))
    if len(shape) < 3 or tuple(target) not in likely:
        return ""
    return f"; classes must be the last dimension of logits and soft targets: {name}.movedim(1, -1) for (N, C, ...)"


def check_target(target: object, student: Tensor, name: str = "student_logits", *, probabilities: bool = True) -> None:
    """Checks class indices of `student`'s leading shape or, with `probabilities`, a distribution for each of its rows.

    student: logits or hidden states (..., size of a row). name: what the user calls them. Raises TypeError for a wrong
    dtype, ValueError for a wrong shape or device. check_values checks the values.
    """
    if not isinstance(target, Tensor):
        hint = ""
        if probabilities and isinstance(target, (int, float)):
            hint = f"; the order is (student_logits, teacher_logits, target): pass temperature={target!r} by keyword"
        raise TypeError(f"target must be a Tensor of class indices; got {type(target).__name__} {target!r}{hint}")
    shape, expected = target.shape, student.shape[:-1]
    if probabilities and target.dtype.is_floating_point:
        if shape != student.shape:
            # One number for each row was meant as an index, and its type is wrong. Otherwise the shape is.
            error = TypeError if shape == expected else ValueError
            raise error(
                f"target must be int64 or int32 class indices of shape {tuple(expected)}, or floating probabilities of "
                f"shape {tuple(student.shape)}; got {target.dtype} of shape {tuple(shape)}"
                f"{_class_dimension_hint(name, student.shape, shape)}"
            )
    elif target.dtype not in (torch.int64, torch.int32):
        allowed = "class indices, or floating probabilities" if probabilities else "class indices"
        raise TypeError(f"target must hold int64 or int32 {allowed}; got {target.dtype} of shape {tuple(shape)}")
    elif shape != expected:
        hint = _class_dimension_hint(name, student.shape, shape)
        possessive = "'" if name.endswith("s") else "'s"
        raise ValueError(
            f"target must have {name}{possessive} leading shape {tuple(expected)}; got {tuple(shape)}{hint}"
        )
    if target.device != student.device:
        raise ValueError(f"target must be on {student.device} like {name}; got {target.device}")
    if student.dim() > 3:
        _check_class_dimension(name, student.shape, target)


def check_selected(selected: object, student: Tensor, teacher_rows: int | None, name: str = "student_logits") -> None:
    """Checks the selection of a call: None, or bool or floating, one for each row of `student` (..., size of a row).

    name: what the user calls `student`. Raises TypeError for a wrong dtype; ValueError for a wrong shape or device, and
    for a selection beside teacher_rows.
    """
    if selected is None:
        return
    if not isinstance(selected, Tensor):
        raise TypeError(f"selected must be a Tensor, bool or floating; got {type(selected).__name__}")
    if selected.dtype != torch.bool and not selected.dtype.is_floating_point:
        raise TypeError(f"selected must be bool, or floating weights in [0, 1]; got {selected.dtype}")
    if teacher_rows is not None:
        raise ValueError(
            "selected must be None where teacher_rows is given: the first teacher_rows rows are the selected ones"
        )
    leading = tuple(student.shape[:-1])
    rows = math.prod(leading)
    if tuple(selected.shape) not in (leading, (rows,)):
        raise ValueError(f"selected must have the rows' shape {leading} or ({rows},); got {tuple(selected.shape)}")
    if selected.device != student.device:
        raise ValueError(f"selected must be on {student.device} like {name}; got {selected.device}")


def check_class_weight(class_weight: object, classes: int, device: torch.device) -> None:
    """Checks a floating Tensor (classes,) on `device`. Raises TypeError, ValueError."""
    if not isinstance(class_weight, Tensor):
        raise TypeError(f"class_weight must be a Tensor of {classes} weights; got {type(class_weight).__name__}")
    if not class_weight.dtype.is_floating_point:
        raise TypeError(f"class_weight must be floating; got {class_weight.dtype}")
    if tuple(class_weight.shape) != (classes,):
        raise ValueError(
            f"class_weight must have shape ({classes},), a weight for each class that the loss compares (with "
            f"classes='truncate', those of the smaller vocabulary); got {tuple(class_weight.shape)}"
        )
    if class_weight.device != device:
        raise ValueError(f"class_weight must be on {device} like student_logits; got {class_weight.device}")


def readable(tensor: Tensor) -> bool:
    """Whether the values can be read: not on CUDA, where reading synchronises; not in a trace; not under vmap."""
    # Fake tensors, a subclass, have no data.
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return not functorch.is_functorch_wrapped_tensor(tensor)


def check_values(
    target: Tensor, selected: Tensor | None, classes: int, ignore_index: int | None, name: str = "target"
) -> None:
    """ValueError for a class index or a weight out of range, with its flattened row, if the values can be read.

    name: what the user calls `target`.
    """
    valid: Tensor | bool = True
    if not target.is_floating_point():
        if not readable(target):
            return
        target = target.reshape(-1)
        valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
        outside = valid & ((target < 0) | (target >= classes))
        if outside.any():
            row = int(outside.nonzero()[0])
            ignored = "" if ignore_index is None else f" and not ignore_index = {ignore_index}"
            raise ValueError(f"{name}[{row}] is {int(target[row])}, outside [0, {classes}){ignored}")
    if selected is not None and selected.dtype != torch.bool and readable(selected):
        selected = selected.reshape(-1)
        bad = valid & ~((selected >= 0) & (selected <= 1))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"selected[{row}] is not a weight in [0, 1]: {float(selected[row])}")


def check_matrices(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Checks that both logits are (N, C) and of one shape."""
    check_logits("student_logits", student_logits)
    check_logits("teacher_logits", teacher_logits)
    if student_logits.dim() != 2 or teacher_logits.shape != student_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must both be (N, C), of one shape; "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )


def check_pair(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> None:
    """Checks (N, C) logits of student and teacher and, unless None, (N,) class indices. ValueError, TypeError."""
    check_matrices(student_logits, teacher_logits)
    if teacher_logits.device != student_logits.device:
        raise ValueError(
            f"teacher_logits must be on {student_logits.device} like student_logits; got {teacher_logits.device}"
        )
    if target is not None:
        check_target(target, student_logits)
        if target.dtype.is_floating_point:
            raise TypeError(f"target must hold int64 or int32 class indices; got {target.dtype}")
        check_values(target, None, student_logits.shape[-1], None)


def scalar_argument(name: str, value: Tensor | float | None, like: Tensor) -> Tensor | None:
    """A number, or a tensor of one element, as a tensor on the device of `like`; None as None.

    name: num_valid and weight_sum must be >= 0, grad_scale > 0; the values of tensors are not read. Raises TypeError,
    ValueError.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element; got shape {tuple(value.shape)}")
        if value.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like student_logits; got {value.device}")
        return value.detach()
    value = number(name, value, "a number or a tensor of one element")
    if not math.isfinite(value) or value < 0 or (value == 0 and name == "grad_scale"):
        raise ValueError(f"{name} must be finite and {'> 0' if name == 'grad_scale' else '>= 0'}; got {value!r}")
    # torch.full fills on the device; a copy from the host would synchronise.
    return torch.full(
        (),
        value,
        dtype=torch.float64 if like.device.type == "cpu" else torch.float32,
        device=like.device,
    )


def unknown_keyword(function: Callable[..., Any], unknown: Iterable[str]) -> TypeError:
    """The TypeError for the first unknown keyword of a call, which names the most similar known one."""
    name = next(iter(unknown))
    parameters = inspect.signature(function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.default is not parameter.empty]
    hint = _ELSEWHERE.get(name.lower().strip("_"), "").format(name)
    if not hint:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
    return TypeError(f"{function.__name__} got an unexpected keyword argument {name!r}: {hint}")
