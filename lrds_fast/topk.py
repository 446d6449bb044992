"""A teacher that was cached: its largest logits of every row, and what the rest adds up to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrds_fast.arguments import check_tensor


class TopKTeacher(NamedTuple):
    """The k largest teacher logits of each row. kd_loss takes it in place of teacher_logits.

    values: (..., k) floating logits. indices: (..., k) int64/int32, their classes, each once. logsumexp: (...,)
    floating, logsumexp(v / temperature) over all classes. temperature: the T it was taken at, and kd_loss's.
    The probability that the kept classes leave, 1 - sum exp(values / T - logsumexp), is spread evenly over the others.
    """

    values: Tensor
    indices: Tensor
    logsumexp: Tensor
    temperature: float

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, *, temperature: float) -> TopKTeacher:
        """The k largest of (..., C) logits; logsumexp in float32 (float64 for float64 logits).

        Raises ValueError for k outside [1, C] or temperature <= 0, TypeError for logits that are no Tensor.
        """
        check_tensor("logits", logits)
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"k must be in [1, {logits.shape[-1]}]; got {k!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0; got {temperature!r}")
        precise = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        values, indices = logits.detach().topk(k, dim=-1)
        return cls(values, indices, torch.logsumexp(precise / temperature, dim=-1), temperature)

    def dense(self, classes: int, dtype: torch.dtype | None = None) -> Tensor:
        """(..., classes) logits with this teacher's softmax at its temperature, in dtype (default: logsumexp's)."""
        dtype = dtype or self.logsumexp.dtype
        values, log_sum = self.values.to(dtype), self.logsumexp.to(dtype)[..., None]
        kept = (values / self.temperature - log_sum).exp().sum(dim=-1, keepdim=True)
        others = classes - values.shape[-1]
        rest = torch.full_like(log_sum, -torch.inf)
        if others > 0:
            rest = self.temperature * (log_sum + ((1.0 - kept).clamp(min=0.0) / others).log())
        shape = (*values.shape[:-1], classes)
        return rest.expand(shape).scatter(-1, self.indices.long(), values)
