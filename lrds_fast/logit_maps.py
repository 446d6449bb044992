"""What a language model's head does after its matrix product: a scale, a soft cap, and classes that only pad it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lrds_fast._numbers import number

LogitScale: TypeAlias = "float | tuple[float, float]"
Softcap: TypeAlias = "float | tuple[float | None, float | None] | None"


class LogitMap(NamedTuple):
    """x -> softcap * tanh(scale * x / softcap), or scale * x where softcap is 0."""

    scale: float = 1.0
    softcap: float = 0.0

    def __call__(self, logits: Tensor) -> Tensor:
        """The mapped logits, in their dtype, as a model's own head computes them."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def apply_(self, logits: Tensor) -> None:
        """Maps logits in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward_(self, gradient: Tensor, mapped: Tensor | None) -> None:
        """Turns the gradient of the mapped logits into that of the logits, in place.

        mapped: the mapped logits, which it overwrites; needed with a soft cap.
        """
        if self.softcap and mapped is not None:
            gradient.mul_(mapped.div_(self.softcap).square_().neg_().add_(1.0))
        if self.scale != 1.0:
            gradient.mul_(self.scale)


IDENTITY = LogitMap()


def _pair(name: str, value: object, what: str) -> tuple[object, object]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be {what}, or a pair (student's, teacher's); got {value!r}")
        return value[0], value[1]
    return value, value


def _positive(name: str, value: object) -> float:
    checked = number(name, value)
    if not 0 < checked < math.inf:
        raise ValueError(f"{name} must be finite and > 0; got {value!r}")
    return checked


def logit_maps(logit_scale: LogitScale, softcap: Softcap) -> tuple[LogitMap, LogitMap]:
    """The student's and the teacher's map, from one number for both or a pair. Raises TypeError, ValueError."""
    student_scale, teacher_scale = _pair("logit_scale", logit_scale, "a number > 0")
    student_cap, teacher_cap = _pair("softcap", softcap, "a number > 0 or None")
    student, teacher = (
        LogitMap(_positive("logit_scale", scale), 0.0 if cap is None else _positive("softcap", cap))
        for scale, cap in ((student_scale, student_cap), (teacher_scale, teacher_cap))
    )
    return student, teacher


def common_classes(classes: object, student: int, teacher: int) -> int | None:
    """The number of classes to which both sides are cut; None where nothing is cut.

    classes: "equal" cuts nothing, "truncate" cuts the larger vocabulary. student, teacher: their classes. Raises
    ValueError for another word.
    """
    if classes == "equal":
        return None
    if classes != "truncate":
        raise ValueError(f"classes must be 'equal' or 'truncate'; got {classes!r}")
    return None if student == teacher else min(student, teacher)


def cut(tensors: Sequence[Tensor | None], count: int | None, dim: int = 0) -> list[Tensor | None]:
    """The first `count` entries of each tensor along dim, as views; the tensors themselves where count is None."""
    if count is None:
        return list(tensors)
    return [None if tensor is None else tensor.narrow(dim, 0, count) for tensor in tensors]
