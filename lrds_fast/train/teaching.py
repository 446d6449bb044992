"""The teacher: a network that runs beside the student, or its cached logits; and which rows of a batch have it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lrds_fast.data import Batch, prefix_rows
from lrds_fast.topk import TopKTeacher


class CachedLogits(Protocol):
    """A teacher's logits for every view of each sample; lrds_fast.data.soft_labels.SoftLabels is one."""

    @property
    def views(self) -> int:
        """The number of views of each sample."""

    def batch(self, view: int, indices: Tensor, device: torch.device) -> Tensor | TopKTeacher:
        """The logits of K samples, (K, C) or their top k, on the device. indices: (K,) int64 on the CPU."""


@dataclass(frozen=True)
class LogitsInMemory:
    """CachedLogits in memory. logits: (N, C), of every sample without augmentation."""

    logits: Tensor
    views: int = 1

    def batch(self, view: int, indices: Tensor, device: torch.device) -> Tensor:
        return self.logits[indices].to(device)


@dataclass(frozen=True)
class MismatchedLogits:
    """CachedLogits some of which belong to other samples, for experiments with an unreliable teacher.

    source: (N,) int64, the sample whose logits each sample gets.
    """

    logits: CachedLogits
    source: Tensor

    @property
    def views(self) -> int:
        return self.logits.views

    def batch(self, view: int, indices: Tensor, device: torch.device) -> Tensor | TopKTeacher:
        return self.logits.batch(view, self.source[indices], device)


class Teacher:
    """Computes the teacher's logits. The network is in eval mode, frozen, and records no graph.

    model: the network, None with `cached` logits. autocast: its precision. run: the network as it is called (compiled,
    for example); by default model itself. own_stream: on a CUDA device the network runs on its own stream, beside the
    student's forward pass. keep_tensors: a loss uses its activations, which therefore must not be inference tensors.
    """

    def __init__(
        self,
        model: nn.Module | None,
        device: torch.device,
        *,
        autocast: Callable[[], AbstractContextManager[Any]],
        run: Callable[[Tensor], Tensor] | None = None,
        cached: CachedLogits | None = None,
        own_stream: bool = False,
        keep_tensors: bool = False,
    ) -> None:
        if (model is None) == (cached is None):
            raise ValueError("a teacher is either a network or cached logits; got both or neither")
        self._run = model if run is None else run  # a compiled module has no truth value
        self._cached, self._device, self._autocast = cached, device, autocast
        self._without_graph: Callable[[], AbstractContextManager[Any]] = (
            torch.no_grad if keep_tensors else torch.inference_mode
        )
        stream: Any = torch.cuda.Stream  # untyped
        self._stream = stream(device) if own_stream and device.type == "cuda" else None

    def start(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor | TopKTeacher:
        """The logits (K, C) of K > 0 images, or the cached ones of samples `indices` in `epoch`.

        With a stream of its own the teacher may still be computing them: pass them to wait() before use.
        """
        if self._cached is not None:
            return self._cached.batch(epoch % self._cached.views, indices, self._device)
        assert self._run is not None
        if self._stream is None:
            with self._without_graph(), self._autocast():
                return self._run(images)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), self._without_graph(), self._autocast():
            logits = self._run(images)
        images.record_stream(self._stream)
        return logits

    def wait(self, logits: Tensor | TopKTeacher) -> Tensor | TopKTeacher:
        """The logits of start(), for use on the current stream, which waits for them. The host does not wait."""
        if self._stream is not None and isinstance(logits, Tensor):
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            logits.record_stream(current)
        return logits


class TeacherRows(NamedTuple):
    """The rows of a batch that have a teacher.

    prefix: the teacher's forward pass takes so many rows, from the first on. used: the loss uses so many of these.
    mask: (N,) bool, the rows that have a teacher where they are not the first `used` ones; None where they are."""

    prefix: int
    used: int
    mask: Tensor | None


def teacher_rows(batch: Batch, selected: Tensor | None, num_selected: int, compose: str) -> TeacherRows:
    """Which rows of a batch have a teacher.

    selected: (num_samples,) bool, the samples that have the teacher; None is all. num_selected: how many they are.
    compose: "prefix" or "mask". Where a batch begins with its selected rows, the teacher always takes prefix_rows rows,
    which keeps shapes constant. If the batch has one selected row fewer, the loss ignores the extra row.
    """
    rows = len(batch.indices)
    if selected is None:
        return TeacherRows(rows, rows, None)
    mask = selected[batch.indices]
    count = int(mask.sum())
    if compose == "prefix" and bool(mask[:count].all()):
        return TeacherRows(max(count, prefix_rows(rows, len(selected), num_selected)), count, None)
    return TeacherRows(rows, rows, mask)


def predicted(logits: Tensor | TopKTeacher, target: Tensor) -> Tensor:
    """(N,) the class of the highest logit; in a tie that includes the target, the target, as in the loss."""
    if isinstance(logits, TopKTeacher):
        top, place = logits.values.max(dim=1)
        tied = ((logits.indices == target[:, None]) & (logits.values >= top[:, None])).any(dim=1)
        return torch.where(tied, target, logits.indices.gather(1, place[:, None])[:, 0].long())
    top, place = logits.max(dim=1)
    return torch.where(logits.gather(1, target[:, None])[:, 0] >= top, target, place)


def leading_rows(logits: Tensor | TopKTeacher, rows: int) -> Tensor | TopKTeacher:
    """The logits of the first `rows` rows."""
    if isinstance(logits, TopKTeacher):
        return logits._replace(
            values=logits.values[:rows],
            indices=logits.indices[:rows],
            logsumexp=logits.logsumexp[:rows],
            rest=None if logits.rest is None else logits.rest[:rows],
        )
    return logits[:rows]
