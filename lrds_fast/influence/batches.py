"""Data as the scores read it: batches in one fixed order, each with its number and its first sample's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset
from tqdm import tqdm

Data = Dataset[Any] | Iterable[Any]
"""A dataset of (input, target, ...) samples, or an iterable of their batches that can be iterated again."""


class Batch(NamedTuple):
    """number: of the batch. start: of its first sample. x: inputs (B, ...). y: targets (B,) int64."""

    number: int
    start: int
    x: Tensor
    y: Tensor


class _Chosen:
    """A batch sampler's batches of the given numbers."""

    def __init__(self, batches: Iterable[list[int]], numbers: list[int]) -> None:
        self._batches, self._numbers = batches, numbers

    def __iter__(self) -> Iterator[list[int]]:
        wanted = iter(self._numbers)
        following = next(wanted, None)
        for number, batch in enumerate(self._batches):
            if number == following:
                yield batch
                following = next(wanted, None)

    def __len__(self) -> int:
        return len(self._numbers)


class Batches:
    """Batches of some data, in order, on a parameter's device and, if floating, in its dtype.

    What is not wanted of a Dataset or of a DataLoader over one is not read; of any other iterable it is read and
    dropped. Shows a bar over the samples, with the time that is left, where `progress` is set (None: where stderr is a
    terminal).
    """

    def __init__(self, data: Data, parameter: Tensor, batch_size: int, progress: bool | None) -> None:
        if isinstance(data, Iterator):
            raise TypeError("data must be iterable again (a Dataset, a DataLoader, a list of batches), not an iterator")
        if type(data) is TensorDataset:
            # As a loader would collate it sample by sample, but by slices of the tensors.
            data = [
                tuple(tensor[start : start + batch_size] for tensor in data.tensors)
                for start in range(0, len(data), batch_size)
            ]
        self._data: Iterable[Any] = DataLoader(data, batch_size) if isinstance(data, Dataset) else data
        self._parameter, self._progress = parameter, progress
        # Of a loader that reads sample by sample, every batch's size is known beforehand.
        self._sizes: list[int] | None = None
        loader = self._data
        if isinstance(loader, Sequence):
            self._sizes = [len(batch[0]) for batch in loader]
        if not isinstance(loader, DataLoader):
            return
        if isinstance(loader.sampler, RandomSampler):
            raise ValueError("the loader shuffles: scores are in the order of the data; pass one with shuffle=False")
        if getattr(loader, "drop_last", False) or getattr(loader.batch_sampler, "drop_last", False):
            raise ValueError("the loader drops the last batch: every sample needs its score; pass drop_last=False")
        if loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset):
            self._sizes = [len(batch) for batch in loader.batch_sampler]

    @property
    def count(self) -> int | None:
        """How many batches there are, where that is known before reading them."""
        return None if self._sizes is None else len(self._sizes)

    @property
    def samples(self) -> int | None:
        """How many samples there are, where that is known before reading them."""
        return None if self._sizes is None else sum(self._sizes)

    def __call__(self, what: str, wanted: Callable[[int], bool] = lambda _: True) -> Iterator[Batch]:
        """The batches whose number is wanted. Raises ValueError for data without samples or targets not (B,)."""
        device, start = self._parameter.device, 0
        total = None
        if self._sizes is not None:
            total = sum(size for number, size in enumerate(self._sizes) if wanted(number))
        with tqdm(
            desc=what,
            total=total,
            unit="sample",
            disable=None if self._progress is None else not self._progress,
            leave=False,
        ) as bar:
            for number, start, raw in self._raw(wanted):
                if not wanted(number):
                    start += len(raw[0])
                    continue
                x, y = raw[0].to(device, non_blocking=True), raw[1].to(device, non_blocking=True)
                if x.is_floating_point():
                    x = x.to(self._parameter.dtype)
                if y.dim() != 1 or len(y) != len(x):
                    raise ValueError(
                        f"targets must be (B,) class indices; got shape {tuple(y.shape)} for {len(x)} inputs, from"
                        f" sample {start} on"
                    )
                yield Batch(number, start, x, y.long())
                start += len(x)
                bar.update(len(x))
        if self._sizes is None and start == 0 or self._sizes == []:
            raise ValueError("the data holds no samples")

    def _raw(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, int, Any]]:
        """(number, start, what the data gives): only what is wanted where the rest need not be read."""
        if self._sizes is None:
            start = 0
            for number, raw in enumerate(self._data):
                yield number, start, raw
                start += len(raw[0])
            return
        starts = torch.tensor([0, *self._sizes]).cumsum(0).tolist()
        numbers = [number for number in range(len(self._sizes)) if wanted(number)]
        loader = self._data
        if isinstance(loader, Sequence):
            loader = [loader[number] for number in numbers]
        elif len(numbers) < len(self._sizes):
            assert isinstance(loader, DataLoader)
            assert loader.batch_sampler is not None
            loader = DataLoader(
                loader.dataset,
                batch_sampler=_Chosen(loader.batch_sampler, numbers),
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                timeout=loader.timeout,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
                prefetch_factor=loader.prefetch_factor,
            )
        for number, raw in zip(numbers, loader, strict=True):
            yield number, starts[number], raw
