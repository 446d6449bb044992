"""The processes of torch.distributed that work together, and the device of each: one alone, or those of torchrun."""

from __future__ import annotations

import importlib
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The functions of this module take the default group of the time of its import as a default argument. Imported later,
# by DistributedDataParallel or by torch.func, they would keep the destroyed group and its threads alive, and a thread
# that still runs when the interpreter ends can abort the process.
if dist.is_available() and not dist.is_initialized():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        importlib.import_module("torch.distributed.nn.functional")


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


def pick_device(name: str, key: str = "run.device") -> torch.device:
    """The device that `name` asks for: auto, cpu, cuda or cuda:N. ValueError, naming `key`, where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{key} must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{key} is {name!r}, but PyTorch sees no CUDA device; set {key}=cpu, or see lrds-fast doctor")
    return device


@contextmanager
def joined(device: str, timeout: float) -> Iterator[torch.device]:
    """The device of this process, one of torchrun's or alone. Inside, Ranks.current() says which one it is.

    device: a recipe's run.device; among several processes each takes the CUDA device of its local rank. timeout:
    seconds that a process waits for the others before it gives up: one that died does not hang the rest. A process
    group that is there already is used and left as it is. Raises ValueError where there are fewer CUDA devices than
    processes.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = pick_device(device)
    if count > 1 and chosen.type == "cuda" and chosen.index is None:
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} has no CUDA device: there are {torch.cuda.device_count()}; start one process per"
                " device (torchrun --nproc-per-node), or set run.device=cpu"
            )
        chosen = torch.device("cuda", local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if count == 1 or not dist.is_available() or dist.is_initialized():
        yield chosen
        return
    # Numbers on the host are agreed upon by gloo: nothing waits for the device.
    backend = "gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl"
    limit = timedelta(seconds=timeout)
    rank = int(os.environ["RANK"])
    dist.init_process_group(backend, store=_new_store(limit), rank=rank, world_size=count, timeout=limit)
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


#: The store of the rendezvous, created once per process.
_meeting: list[Any] = []
_groups = itertools.count()
_dist: Any = dist  # torch.distributed does not export all names to type checkers


def _new_store(timeout: timedelta) -> Any:
    """A store without keys. A destroyed process group leaves addresses in its store, and the next group of the same
    processes would connect to them."""
    if not _meeting:
        _meeting.append(next(_dist.rendezvous("env://", timeout=timeout))[0])
    return _dist.PrefixStore(f"lrds_fast/{next(_groups)}", _meeting[0])


def same_buffers(models: Iterable[nn.Module | None], ranks: Ranks) -> None:
    """The first process's buffers (batch norm's running statistics) in every process."""
    if ranks.count > 1:
        for model in models:
            for buffer in () if model is None else model.buffers():
                ranks.same(buffer)


def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """The mean over the processes of gradients that DistributedDataParallel does not know of; one call for all."""
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if ranks.count == 1 or not found:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in found])
    ranks.sum(flat).div_(ranks.count)
    sizes = [gradient.numel() for gradient in found]
    for gradient, part in zip(found, torch.split(flat, sizes), strict=True):
        gradient.copy_(part.view_as(gradient))


def sum_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Replaces the parameters' gradients by their sums over the processes; a missing gradient counts as 0."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    found = [parameter.grad for parameter in wanted]
    flat = torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(wanted, found, strict=True)]
    )
    ranks.sum(flat)
    for parameter, part in zip(wanted, torch.split(flat, [p.numel() for p in wanted]), strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))


def any_process(flag: bool, ranks: Ranks) -> bool:
    """Whether it is so in any process; all of them ask at the same time."""
    return flag if ranks.count == 1 else bool(ranks.sum(torch.tensor(int(flag))))


def rows_of_all(rows: int, device: torch.device, ranks: Ranks) -> Tensor | float:
    """The number of rows that all processes have of a batch; a 0-d tensor on the device where they are several, so that
    nobody waits for it."""
    if ranks.count == 1:
        return float(rows)
    return ranks.sum(torch.full((), float(rows), device=device))
