"""The processes that score together: one, or those of torch.distributed's default group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's number among `count`. Every method is a step that all of them take together."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """torch.distributed's default group where it is initialised, else this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, in place; the same bits in each."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in place: what depends on how a machine rounds must not differ."""
        if self.count > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def agree(self, value: Any) -> Any:
        """The first process's value, in every process."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank."""
        values = [value]
        if self.count > 1:
            values = [None] * self.count
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all have come this far."""
        if self.count > 1:
            dist.barrier()
