"""Data as the scores read it: batches in one fixed order, each with its number and its first sample's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, default_collate
from tqdm import tqdm

from lrds_fast.influence.adapters import BatchHook, pair, tensors
from lrds_fast.ranks import Ranks

Data = Dataset[Any] | Iterable[Any]
"""A dataset of (input, target, ...) samples, or an iterable of their batches that can be iterated again."""

#: The number of a dataset's samples that are read twice. A random flip leaves a single one unchanged half of the time.
_READ_TWICE = 16


class Batch(NamedTuple):
    """number: of the batch. start: of its first sample. x: inputs (B, ...). y: targets (B,) int64, or (0,)."""

    number: int
    start: int
    x: Tensor
    y: Tensor


class _Chosen:
    """A batch sampler's batches of the given numbers; the first `samples` of each, where that is given."""

    def __init__(self, batches: Iterable[list[int]], numbers: list[int], samples: int | None = None) -> None:
        self._batches, self._numbers, self._samples = batches, numbers, samples

    def __iter__(self) -> Iterator[list[int]]:
        wanted = iter(self._numbers)
        following = next(wanted, None)
        for number, batch in enumerate(self._batches):
            if number == following:
                yield batch[: self._samples]
                following = next(wanted, None)

    def __len__(self) -> int:
        return len(self._numbers)


class Batches:
    """Batches of some data, in order, on a parameter's device and, if floating, in its dtype.

    What is not wanted of a Dataset or of a DataLoader over one is not read; of any other iterable it is read and
    dropped. Shows a bar over the samples, with the time that is left, where `progress` is set (None: where stderr is a
    terminal).

    name: of the data, for errors. batch: from an item of the data to (inputs, targets); None: its first two parts.
    labelled=False also accepts inputs without targets. A list of samples is a dataset.
    """

    def __init__(
        self,
        data: Data,
        parameter: Tensor,
        batch_size: int,
        progress: bool | None,
        *,
        name: str = "data",
        batch: BatchHook | None = None,
        labelled: bool = True,
    ) -> None:
        if isinstance(data, Iterator):
            raise TypeError(
                f"{name} must be iterable again (a Dataset, a DataLoader, a list of batches), not an iterator"
            )
        if not isinstance(data, Dataset) and not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
            raise TypeError(
                f"{name} must be a Dataset, a DataLoader or an iterable of batches; got {type(data).__name__}"
            )
        self._name, self._hook, self._labelled, self._steady = name, batch, labelled, False
        if isinstance(data, Tensor) and not labelled:
            data = torch.split(data, batch_size)
        if type(data) is TensorDataset:
            # As a loader would collate it sample by sample, but by slices of the tensors.
            data = [
                tuple(tensor[start : start + batch_size] for tensor in data.tensors)
                for start in range(0, len(data), batch_size)
            ]
        of_samples = isinstance(data, Dataset) or self._holds_samples(data)
        self._data: Iterable[Any] = DataLoader(cast(Any, data), batch_size) if of_samples else cast(Any, data)
        self._parameter, self._progress = parameter, progress
        # Of a loader that reads sample by sample, every batch's size is known beforehand.
        self._sizes: list[int] | None = None
        loader = self._data
        if isinstance(loader, Sequence):
            self._sizes, start = [], 0
            for raw in loader:
                self._sizes.append(len(self._read(raw, start)[0]))
                start += self._sizes[-1]
        if not isinstance(loader, DataLoader):
            return
        if isinstance(loader.sampler, RandomSampler):
            raise ValueError(
                f"{name}: the loader shuffles: scores are in the order of the data; pass one with shuffle=False"
            )
        if getattr(loader, "drop_last", False) or getattr(loader.batch_sampler, "drop_last", False):
            raise ValueError(
                f"{name}: the loader drops the last batch: every sample needs its score; pass drop_last=False"
            )
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
        """The batches whose number is wanted.

        Raises ValueError for data without samples, targets not (B,), or first samples that are others when they are
        read again (at the first call); TypeError for batches that hold no inputs and targets.
        """
        device, start = self._parameter.device, 0
        total = None
        if self._sizes is not None:
            total = sum(size for number, size in enumerate(self._sizes) if wanted(number))
        ahead = None if self._steady else self._ahead(wanted)
        with tqdm(
            desc=what,
            total=total,
            unit="sample",
            disable=None if self._progress is None else not self._progress,
            leave=False,
        ) as bar:
            for batch in self._found(wanted):
                if ahead is not None:
                    self._check_steady(ahead, batch)
                    ahead, self._steady = None, True
                start = batch.start + len(batch.x)
                if wanted(batch.number):
                    x, y = (part.to(device, non_blocking=True) for part in (batch.x, batch.y))
                    if x.is_floating_point():
                        x = x.to(self._parameter.dtype)
                    yield Batch(batch.number, batch.start, x, y.long())
                    bar.update(len(x))
        if self._sizes is None and start == 0 or self._sizes == []:
            raise ValueError(f"{self._name} must contain samples; got none")

    def targets(self, ranks: Ranks) -> Iterator[Tensor]:
        """Of this process's batches, (B,) int64 each, in a pass of its own."""
        for batch in self("labels", lambda number: number % ranks.count == ranks.rank):
            yield batch.y

    def _read(self, raw: Any, start: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of an item of the data."""
        return tensors(self._name, raw, start, self._hook, labelled=self._labelled)

    def _holds_samples(self, data: Any) -> bool:
        """Whether an indexable's items are samples, whose target is one number, and not batches."""
        if isinstance(data, Mapping) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data)):
            return False
        try:
            y = pair(self._name, data[0], self._hook, labelled=self._labelled)[1]
        except Exception:  # reported where the items are read
            return False
        return isinstance(y, Integral) or getattr(y, "shape", None) == ()

    def _ahead(self, wanted: Callable[[int], bool]) -> tuple[Tensor, Tensor] | None:
        """Reads the first samples of a pass before it: some of a dataset, the first batch of other data."""
        loader = self._data
        start = 0
        if self._sizes is None:
            raw = next(iter(loader), None)
        else:
            number = next((number for number in range(len(self._sizes)) if wanted(number)), None)
            if number is None:
                return None
            start = sum(self._sizes[:number])
            if isinstance(loader, Sequence):
                raw = loader[number]
            else:
                assert isinstance(loader, DataLoader)
                # A custom collate_fn may collate a part of a batch differently, for example with less padding.
                samples = _READ_TWICE if loader.collate_fn is default_collate else None
                raw = next(iter(_reader(loader, [number], min(1, loader.num_workers), samples)))
        return None if raw is None else self._read(raw, start)

    def _check_steady(self, ahead: tuple[Tensor, Tensor], batch: Batch) -> None:
        """ValueError unless a batch begins with the samples that were read before the pass."""
        for what, first, again in zip(("inputs", "targets"), ahead, (batch.x, batch.y), strict=True):
            if not _equal(first, again[: len(first)].to(first.device)):
                raise ValueError(
                    f"{self._name} must give the same tensors at every pass; got other {what} when its first samples,"
                    f" from sample {batch.start} on, were read again: pass it with the evaluation transform (no random"
                    " crop, flip or noise, no mixing of samples) and without shuffling"
                )

    def _found(self, wanted: Callable[[int], bool]) -> Iterator[Batch]:
        """The items of the data; of a dataset or a DataLoader, only the wanted ones are read."""
        if self._sizes is None:
            start = 0
            for number, raw in enumerate(self._data):
                x, y = self._read(raw, start)
                yield Batch(number, start, x, y)
                start += len(x)
            return
        starts = torch.tensor([0, *self._sizes]).cumsum(0).tolist()
        numbers = [number for number in range(len(self._sizes)) if wanted(number)]
        loader = self._data
        if isinstance(loader, Sequence):
            loader = [loader[number] for number in numbers]
        elif len(numbers) < len(self._sizes):
            assert isinstance(loader, DataLoader)
            loader = _reader(loader, numbers, loader.num_workers)
        for number, raw in zip(numbers, loader, strict=True):
            yield Batch(number, starts[number], *self._read(raw, starts[number]))


def _reader(loader: DataLoader[Any], numbers: list[int], workers: int, samples: int | None = None) -> DataLoader[Any]:
    """A loader over some of the batches, or over their first samples."""
    assert loader.batch_sampler is not None
    return DataLoader(
        loader.dataset,
        batch_sampler=_Chosen(loader.batch_sampler, numbers, samples),
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal; NaNs are equal to each other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())
