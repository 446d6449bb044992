"""The teacher at work: a network that is run, on a stream of its own if wanted, or its cached answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lrds_fast.topk import TopKTeacher


class CachedAnswers(Protocol):
    """What a teacher said of a view of each sample; lrds_fast.data.soft_labels.SoftLabels is one."""

    @property
    def views(self) -> int:
        """How many views of each sample there are."""

    def batch(self, view: int, indices: Tensor, device: torch.device) -> Tensor | TopKTeacher:
        """The logits of these samples, (K, C) or their top k."""


@dataclass(frozen=True)
class Stored:
    """A teacher's CachedAnswers in memory. logits: (N, C), of every sample as it is."""

    logits: Tensor
    views: int = 1

    def batch(self, view: int, indices: Tensor, device: torch.device) -> Tensor:
        return self.logits[indices].to(device)


@dataclass(frozen=True)
class MixedUp:
    """CachedAnswers some of which are those to other samples. source: (N,) int64, whose answer each sample gets."""

    answers: CachedAnswers
    source: Tensor

    @property
    def views(self) -> int:
        return self.answers.views

    def batch(self, view: int, indices: Tensor, device: torch.device) -> Tensor | TopKTeacher:
        return self.answers.batch(view, self.source[indices], device)


class Teacher:
    """Answers for the first rows of a batch. The network is in eval mode, frozen, and keeps no graph.

    model: the network, None where `cached` answers. autocast: its precision. run: the network as it is called
    (compiled, for example); model itself by default. own_stream: on a CUDA device it runs beside the student's forward
    pass. keep_tensors: its activations are used in a loss, which inference tensors cannot be.
    """

    def __init__(
        self,
        model: nn.Module | None,
        device: torch.device,
        *,
        autocast: Callable[[], AbstractContextManager[Any]],
        run: Callable[[Tensor], Tensor] | None = None,
        cached: CachedAnswers | None = None,
        own_stream: bool = False,
        keep_tensors: bool = False,
    ) -> None:
        if (model is None) == (cached is None):
            raise ValueError("a teacher is a network or cached answers, one of them")
        self._run = model if run is None else run  # a compiled module has no truth value
        self._cached, self._device, self._autocast = cached, device, autocast
        self._without_graph: Callable[[], AbstractContextManager[Any]] = (
            torch.no_grad if keep_tensors else torch.inference_mode
        )
        stream: Any = torch.cuda.Stream  # untyped
        self._stream = stream(device) if own_stream and device.type == "cuda" else None

    def ask(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor | TopKTeacher:
        """The answers (K, C) to K > 0 images, of samples `indices` in `epoch`; see answered()."""
        if self._cached is not None:
            return self._cached.batch(epoch % self._cached.views, indices, self._device)
        assert self._run is not None
        if self._stream is None:
            with self._without_graph(), self._autocast():
                return self._run(images)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), self._without_graph(), self._autocast():
            answers = self._run(images)
        images.record_stream(self._stream)
        return answers

    def answered(self, answers: Tensor | TopKTeacher) -> Tensor | TopKTeacher:
        """The answers, once they are there for the student's stream. Nothing waits on the host."""
        if self._stream is not None and isinstance(answers, Tensor):
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            answers.record_stream(current)
        return answers
