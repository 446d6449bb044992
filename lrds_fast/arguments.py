"""Argument checks that the entry points share. Errors name what was expected, what was got and what to do."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrds_fast._numbers import integer

_WEIGHTS = "ce_weight weights the cross-entropy, kd_weight the divergence; {} means either of them in other programs"
_TEMPERATURE = "did you mean 'temperature'?"
_DIVERGENCE = "a divergence has parameters of its own: divergence=lrds_fast.DKD(alpha=1.0, beta=2.0)"
_ELSEWHERE = dict.fromkeys(("t", "tau", "temp", "kd_t"), _TEMPERATURE)
_ELSEWHERE |= dict.fromkeys(("alpha", "lambda", "lam", "lambd", "lmbda"), _WEIGHTS)
_ELSEWHERE |= dict.fromkeys(("beta", "gamma"), _DIVERGENCE)


def check_tensor(name: str, value: object, holds: str = "logits", attribute: str = "logits") -> None:
    """TypeError unless value is a Tensor. holds: its content, for the error. attribute: the attribute to suggest if a
    model's output object was passed."""
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
    """ValueError unless the teacher has as many rows as the student or, with teacher_rows, that many.

    student, teacher: shapes of student_{of} and teacher_{of}, (..., size of a row). teacher_rows: None, or the number
    of flattened rows K that the teacher has, as (K, size) or (B', ..., size); TypeError for anything but an int.
    """
    lead = tuple(student[:-1])
    rows, given = math.prod(lead), math.prod(teacher[:-1])
    is_prefix = given <= rows and (len(teacher) == 2 or tuple(teacher[1:-1]) == lead[1:])
    if teacher_rows is None:
        if is_prefix and given == rows:
            return
        hint = f" If the teacher ran on the first {given} rows only, pass teacher_rows={given}" if is_prefix else ""
        raise ValueError(
            f"teacher_{of} must have a row for each row of student_{of} {tuple(student)}; got {tuple(teacher)}: "
            f"check that both are shifted by the same tokens and come from the same batch.{hint}"
        )
    if not isinstance(teacher_rows, torch.SymInt):
        teacher_rows = integer("teacher_rows", teacher_rows, "an int or None")
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
    """The TypeError for the first unknown keyword of a call, with the argument that it may stand for."""
    name = next(iter(unknown))
    parameters = inspect.signature(function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.default is not parameter.empty]
    hint = _ELSEWHERE.get(name.lower().strip("_"), "").format(name)
    if not hint:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
    return TypeError(f"{function.__name__} got an unexpected keyword argument {name!r}: {hint}")
