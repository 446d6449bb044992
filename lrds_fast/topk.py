"""A teacher that was cached: its largest logits of every row, and what the rest adds up to."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrds_fast._numbers import integer, number
from lrds_fast.arguments import check_tensor


class TopKTeacher(NamedTuple):
    """The k largest teacher logits of each row. kd_loss takes it in place of teacher_logits.

    values: (..., k) floating logits. indices: (..., k) int64/int32, their classes, each once. logsumexp: (...,)
    floating, logsumexp(v / temperature) over all classes. temperature: the T it was taken at, and kd_loss's.
    rest: (...,) floating, logsumexp(v / temperature) over the classes that are not kept (-inf if none is), which share
    it evenly. None: what logsumexp leaves. Next to a confident teacher's values that is nothing but rounding;
    no less is then taken than logsumexp's dtype resolves, and no more than classes like the smallest kept one weigh.
    torch.utils.data.default_collate makes batches of a data set's teachers that have a rest, with a temperature per
    sample that is the same for all.
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

    def remainder(self, classes: int) -> Tensor:
        """(...,) floating: rest, or what stands for it, where there are `classes` classes."""
        if self.rest is not None:
            return self.rest
        scaled, log_sum = self.values.double() / self.one_temperature(), self.logsumexp.double()
        left = -torch.expm1(scaled.logsumexp(dim=-1) - log_sum)
        others = classes - self.values.shape[-1]
        if others == 0:
            return torch.full_like(log_sum, -torch.inf)
        resolved = (torch.finfo(self.logsumexp.dtype).eps * log_sum.abs().clamp(min=1.0)).log()
        most = math.log(others) + scaled.amin(dim=-1) - log_sum
        return log_sum + torch.maximum(left.clamp(min=0.0).log(), torch.minimum(resolved, most))

    def one_temperature(self) -> float:
        """temperature as a number; a default_collate'd one is a tensor with an entry per sample.

        Raises ValueError where the entries differ, TypeError for what is no number or is on a GPU.
        """
        temperature: object = self.temperature
        if not isinstance(temperature, Tensor) or temperature.dim() == 0:
            return number("TopKTeacher.temperature", temperature)
        if temperature.is_cuda:
            raise TypeError(
                "TopKTeacher.temperature must be a number, or a tensor on the CPU: teacher._replace(temperature=4.0); "
                f"got one on {temperature.device}"
            )
        found = set(temperature.flatten().tolist())
        if len(found) != 1:
            raise ValueError(f"TopKTeacher.temperature must be the same for all rows; got {sorted(found)}")
        return float(found.pop())

    def dense(self, classes: int, dtype: torch.dtype | None = None) -> Tensor:
        """(..., classes) logits with this teacher's softmax at its temperature, in dtype (default: logsumexp's)."""
        dtype = dtype or self.logsumexp.dtype
        others = max(1, classes - self.values.shape[-1])
        filler = (self.one_temperature() * (self.remainder(classes).double() - math.log(others))).to(dtype)
        shape = (*self.values.shape[:-1], classes)
        return filler[..., None].expand(shape).scatter(-1, self.indices.long(), self.values.to(dtype))
