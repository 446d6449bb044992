"""A cached teacher: the largest logits of every row, and the logsumexp of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from lrds_fast._numbers import integer, number
from lrds_fast.arguments import check_tensor, check_values, readable

# bfloat16 changes the logarithm of a sum of probabilities by at most 0.002 times their entropy.
_LOG_SUM_LIMIT = 0.05


class TopKTeacher(NamedTuple):
    """The k largest teacher logits of each row. kd_loss takes it in place of teacher_logits.

    values: (..., k) floating logits. indices: (..., k) int64/int32, their classes, each once. temperature: T, also that
    of kd_loss. logsumexp: (...,) floating, logsumexp(v / T) over all classes.
    rest: (...,) floating, logsumexp(v / T) over the classes that are not kept, -inf if all are kept. Their probability
    is spread evenly over them. None: the difference of logsumexp and values. For a confident teacher this difference
    consists of rounding errors; it is clamped between the resolution of logsumexp's dtype and its value if every other
    class had the smallest kept logit. torch.utils.data.default_collate batches TopKTeachers of one temperature.
    """

    values: Tensor
    indices: Tensor
    logsumexp: Tensor
    temperature: float
    rest: Tensor | None = None

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, *, temperature: float) -> TopKTeacher:
        """The k largest of (..., C) logits; logsumexp and rest in float32 (float64 for float64 logits).

        Raises ValueError for k outside [1, C] or temperature <= 0, TypeError for logits that are no Tensor.
        """
        check_tensor("logits", logits)
        k, temperature = integer("k", k), number("temperature", temperature)
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"k must be in [1, {logits.shape[-1]}]; got {k!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0; got {temperature!r}")
        scaled = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        values, indices = logits.detach().topk(k, dim=-1)
        rest = scaled.scatter(-1, indices, -torch.inf).logsumexp(dim=-1)
        return cls(values, indices, scaled.logsumexp(dim=-1), temperature, rest)

    @classmethod
    def from_log_probs(
        cls, log_probs: Tensor, indices: Tensor, *, classes: int, temperature: float, tail: str = "spread"
    ) -> TopKTeacher:
        """A teacher of which only the k largest log-probabilities are known, as inference servers return them.

        log_probs: (..., k) floating, natural logarithms of probabilities at temperature 1. indices: (..., k)
        int64/int32, their classes, each once. classes: C > k of the vocabulary, or k. temperature: T > 0 of the loss,
        any. tail: "spread" divides the probability that is left evenly over the other classes, before it softens by T;
        "renormalize" gives them none. With divergence "rkl" and "renormalize" the loss is infinite, since the student
        always gives them some. Raises TypeError for tensors of a wrong type; ValueError for numbers out of range and,
        on the CPU, for rows whose probabilities sum to more than 1, rounding aside.
        """
        check_tensor("log_probs", log_probs, "log-probabilities")
        classes, temperature = integer("classes", classes), number("temperature", temperature)
        if not log_probs.is_floating_point() or log_probs.dim() < 1 or not 1 <= log_probs.shape[-1] <= classes:
            raise ValueError(
                f"log_probs must be floating of shape (..., k) with 1 <= k <= classes = {classes}; got "
                f"{log_probs.dtype} of shape {tuple(log_probs.shape)}"
            )
        check_tensor("indices", indices, "class indices")
        if indices.dtype not in (torch.int64, torch.int32) or indices.shape != log_probs.shape:
            raise ValueError(
                f"indices must be int64 or int32 of log_probs' shape {tuple(log_probs.shape)}; got {indices.dtype} of "
                f"shape {tuple(indices.shape)}"
            )
        check_values(indices, None, classes, None, "indices")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be finite and > 0; got {temperature!r}")
        if tail not in ("spread", "renormalize"):
            raise ValueError(f"tail must be 'spread' or 'renormalize'; got {tail!r}")
        values = log_probs.detach()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if readable(values) and bool((values.logsumexp(dim=-1) > _LOG_SUM_LIMIT).any()):
            raise ValueError(
                "log_probs must be natural logarithms of probabilities, which sum to at most 1; got a row with the sum "
                f"{float(values.logsumexp(dim=-1).nan_to_num().max().exp()):.3g}: pass probabilities.log(), or "
                "logits.log_softmax(-1) before the k largest are taken"
            )
        kept, others = (values / temperature).logsumexp(dim=-1), classes - values.shape[-1]
        rest = torch.full_like(kept, -torch.inf)
        if tail == "spread" and others:
            left = cls(values, indices, torch.zeros_like(kept), 1.0).remainder(classes)
            rest = (math.log(others) + (left - math.log(others)) / temperature).to(kept.dtype)
        return cls(values, indices, torch.logaddexp(kept, rest), temperature, rest)

    def bucketed(self, classes: int) -> Tensor:
        """(..., k + 1) logits: the kept ones, and one for all others together, as bucketed_logits makes them of the
        student's. classes: C > k."""
        if classes <= self.values.shape[-1]:
            raise ValueError(f"classes must be more than the {self.values.shape[-1]} that are kept; got {classes}")
        rest = self.temperature * self.remainder(classes)
        return torch.cat([self.values.to(rest.dtype), rest[..., None]], dim=-1)

    def remainder(self, classes: int) -> Tensor:
        """(...,) floating: rest, computed if it is None. classes: C."""
        if self.rest is not None:
            return self.rest
        scaled, log_sum = (
            self.values.double() / self.temperature,
            self.logsumexp.double(),
        )
        left = -torch.expm1(scaled.logsumexp(dim=-1) - log_sum)
        others = classes - self.values.shape[-1]
        if others == 0:
            return torch.full_like(log_sum, -torch.inf)
        resolved = (torch.finfo(self.logsumexp.dtype).eps * log_sum.abs().clamp(min=1.0)).log()
        most = math.log(others) + scaled.amin(dim=-1) - log_sum
        return log_sum + torch.maximum(left.clamp(min=0.0).log(), torch.minimum(resolved, most))

    def dense(self, classes: int, dtype: torch.dtype | None = None) -> Tensor:
        """(..., classes) logits with this teacher's softmax at its temperature, in dtype (default: logsumexp's)."""
        dtype = dtype or self.logsumexp.dtype
        others = max(1, classes - self.values.shape[-1])
        filler = (self.temperature * (self.remainder(classes).double() - math.log(others))).to(dtype)
        shape = (*self.values.shape[:-1], classes)
        return filler[..., None].expand(shape).scatter(-1, self.indices.long(), self.values.to(dtype))


def bucketed_logits(logits: Tensor, indices: Tensor, *, temperature: float) -> Tensor:
    """(..., k + 1) logits: those of the classes `indices`, and one that stands for all other classes together.

    Its softmax at the temperature has the sum of the other classes' probabilities in the last place. Two models' logits
    over the same indices, of the teacher's or the student's largest classes, are compared by kd_loss(..., ce_weight=0,
    revise=None) without a target. For the kept classes alone, renormalised, logits.gather(-1, indices) needs no sum
    over all classes.

    logits: (..., C) floating, differentiable. indices: (..., k) int64/int32, k < C, each class once. temperature: > 0.
    Raises TypeError or ValueError naming the argument.
    """
    check_tensor("logits", logits)
    check_tensor("indices", indices, "class indices")
    temperature = number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0; got {temperature!r}")
    if indices.dtype not in (torch.int64, torch.int32) or indices.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"indices must be int64 or int32 of shape {(*logits.shape[:-1], 'k')}; got {indices.dtype} of shape "
            f"{tuple(indices.shape)}"
        )
    if not 1 <= indices.shape[-1] < logits.shape[-1]:
        raise ValueError(
            f"indices must name at least one and not all of the {logits.shape[-1]} classes; got {indices.shape[-1]}"
        )
    check_values(indices, None, logits.shape[-1], None, "indices")
    indices = indices.long()
    others = logits.scatter(-1, indices, -torch.inf)
    last = temperature * (others / temperature).logsumexp(dim=-1, keepdim=True)
    return torch.cat([logits.gather(-1, indices), last], dim=-1)


def check_topk(teacher: TopKTeacher, classes: int, temperature: list[float]) -> None:
    """Checks a cached teacher of `classes` classes for a loss at these temperatures. Raises TypeError, ValueError."""
    values, indices, logsumexp = teacher.values, teacher.indices, teacher.logsumexp
    for name, tensor in (("values", values), ("indices", indices), ("logsumexp", logsumexp)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"TopKTeacher.{name} must be a Tensor; got {type(tensor).__name__}")
        if tensor.device != values.device:
            raise ValueError(f"TopKTeacher.{name} must be on {values.device} like its values; got {tensor.device}")
    if values.dim() < 1 or not 1 <= values.shape[-1] <= classes:
        raise ValueError(f"TopKTeacher.values must be (..., k) with 1 <= k <= {classes}; got {tuple(values.shape)}")
    if indices.dtype not in (torch.int64, torch.int32) or indices.shape != values.shape:
        raise ValueError(
            f"TopKTeacher.indices must be int64 or int32 of shape {tuple(values.shape)}; got {indices.dtype} of shape "
            f"{tuple(indices.shape)}"
        )
    if not logsumexp.dtype.is_floating_point or logsumexp.shape != values.shape[:-1]:
        raise ValueError(
            f"TopKTeacher.logsumexp must be floating of shape {tuple(values.shape[:-1])}; got {logsumexp.dtype} of "
            f"shape {tuple(logsumexp.shape)}"
        )
    rest = teacher.rest
    if rest is not None and not (
        isinstance(rest, Tensor) and rest.is_floating_point() and rest.shape == logsumexp.shape
    ):
        got = f"{rest.dtype} of shape {tuple(rest.shape)}" if isinstance(rest, Tensor) else type(rest).__name__
        raise ValueError(f"TopKTeacher.rest must be None or floating of shape {tuple(logsumexp.shape)}; got {got}")
    if rest is not None and rest.device != values.device:
        raise ValueError(f"TopKTeacher.rest must be on {values.device} like its values; got {rest.device}")
    cached_at = number("TopKTeacher.temperature", teacher.temperature)
    if temperature != [cached_at]:
        raise ValueError(
            f"temperature must be {cached_at!r}, at which the TopKTeacher's logsumexp was taken; "
            f"got {temperature[0] if len(temperature) == 1 else tuple(temperature)!r}"
        )


def _collate(teachers: Sequence[TopKTeacher], *, collate_fn_map: object = None) -> TopKTeacher:
    """A batch of the samples' TopKTeachers. Raises ValueError if temperatures differ or only some have a rest."""
    temperatures = {teacher.temperature for teacher in teachers}
    if len(temperatures) != 1:
        raise ValueError(f"the TopKTeachers of a batch must have one temperature; got {sorted(temperatures)}")
    rests = [teacher.rest for teacher in teachers if teacher.rest is not None]
    if len(rests) not in (0, len(teachers)):
        raise ValueError(f"all TopKTeachers of a batch must have a rest, or none; got {len(rests)} of {len(teachers)}")
    values, indices, logsumexp, *_ = zip(*teachers, strict=True)
    rest = torch.stack(rests) if rests else None
    return TopKTeacher(torch.stack(values), torch.stack(indices), torch.stack(logsumexp), temperatures.pop(), rest)


# Registered with default_collate, which would otherwise turn the temperatures into a tensor.
default_collate_fn_map[TopKTeacher] = _collate
