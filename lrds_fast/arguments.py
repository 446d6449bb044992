"""What every entry point says of an argument that does not fit: its name, what was expected, what came, the way out."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_WEIGHTS = "ce_weight weighs the cross-entropy, kd_weight the divergence; other programs' {} may be either"
_TEMPERATURE = "did you mean 'temperature'?"
_DIVERGENCE = "a divergence has parameters of its own: divergence=lrds_fast.DKD(alpha=1.0, beta=2.0)"
_ELSEWHERE = dict.fromkeys(("t", "tau", "temp", "kd_t"), _TEMPERATURE)
_ELSEWHERE |= dict.fromkeys(("alpha", "lambda", "lam", "lambd", "lmbda"), _WEIGHTS)
_ELSEWHERE |= dict.fromkeys(("beta", "gamma"), _DIVERGENCE)


def check_tensor(name: str, value: object, holds: str = "logits", attribute: str = "logits") -> None:
    """TypeError unless value is a Tensor. holds: of what. attribute: where a network's output object may have it."""
    if isinstance(value, Tensor):
        return
    hint = ""
    if isinstance(getattr(value, attribute, None), Tensor):
        hint = f"; pass its .{attribute}"
    elif isinstance(value, Mapping):
        hint = f"; pass the value that holds them, of the keys {', '.join(map(repr, value))}"
    elif type(value) in (tuple, list):
        hint = "; pass the element that holds them, often its [0]"
    raise TypeError(f"{name} must be a Tensor of {holds}; got {type(value).__name__}{hint}")


def check_teacher_rows(
    student: Sequence[int], teacher: Sequence[int], teacher_rows: object, *, of: str = "logits"
) -> None:
    """ValueError unless the teacher has a row for each of the student's, or just the first teacher_rows of them.

    student, teacher: shapes of student_{of} and teacher_{of}, (..., size of a row). teacher_rows: None, or the number
    of flattened rows K that the teacher has, as (K, size) or (B', ..., size); TypeError for anything but an int.
    """
    lead = tuple(student[:-1])
    rows, given = math.prod(lead), math.prod(teacher[:-1])
    is_prefix = given <= rows and (len(teacher) == 2 or tuple(teacher[1:-1]) == lead[1:])
    if teacher_rows is None:
        if is_prefix and given == rows:
            return
        way_out = f" If the teacher saw only the first {given} rows, pass teacher_rows={given}" if is_prefix else ""
        raise ValueError(
            f"teacher_{of} must have a row for each row of student_{of} {tuple(student)}; got {tuple(teacher)}: "
            f"is one of them shifted by a token and the other not, or of another batch (a short last one)?{way_out}"
        )
    if isinstance(teacher_rows, bool) or not isinstance(teacher_rows, (int, torch.SymInt)):
        raise TypeError(f"teacher_rows must be an int or None; got {teacher_rows!r}")
    if given != teacher_rows:
        raise ValueError(
            f"teacher_rows must be the number of rows in teacher_{of}, {given} in shape {tuple(teacher)}; "
            f"got {teacher_rows}"
        )
    if not is_prefix:
        raise ValueError(
            f"teacher_{of} must hold the first teacher_rows <= {rows} rows of student_{of} {tuple(student)}, "
            f"as (K, {teacher[-1]}) or with the same inner dimensions; got {tuple(teacher)}"
        )


def unknown_keyword(function: Callable[..., Any], unknown: Iterable[str]) -> TypeError:
    """The error for the first of the unknown keywords of a call, with what it may have meant."""
    name = next(iter(unknown))
    parameters = inspect.signature(function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.default is not parameter.empty]
    hint = _ELSEWHERE.get(name.lower().strip("_"), "").format(name)
    if not hint:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
    return TypeError(f"{function.__name__} got an unexpected keyword argument {name!r}: {hint}")
