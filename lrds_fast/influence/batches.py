"""Reading data for the scores: batches in a fixed order, each with its number and the number of its first sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, default_collate
from tqdm import tqdm

from lrds_fast.influence.adapters import BatchHook, Classifier, LogitsHook, pair, tensors
from lrds_fast.ranks import Ranks

Data = Dataset[Any] | Iterable[Any]
"""A dataset of (input, target, ...) samples, or an iterable of their batches that can be iterated again."""

#: How many samples of a dataset are read twice. One sample would not do: a random flip leaves it unchanged half of the
#: time.
_READ_TWICE = 16


class NumberedBatch(NamedTuple):
    """A batch with its place in the data.

    number: of the batch, from 0. start: the number of its first sample. x: inputs (B, ...). y: targets (B,) int64, or
    (0,) for data without targets.
    """

    number: int
    start: int
    x: Tensor
    y: Tensor


class _BatchSubset:
    """The batches of a batch sampler that have the given numbers, ascending. samples: only the first of each batch."""

    def __init__(self, batches: Iterable[list[int]], numbers: list[int], samples: int | None = None) -> None:
        self._batches, self._numbers, self._samples = batches, numbers, samples

    def __iter__(self) -> Iterator[list[int]]:
        numbers = iter(self._numbers)
        next_number = next(numbers, None)
        for number, batch in enumerate(self._batches):
            if number == next_number:
                yield batch[: self._samples]
                next_number = next(numbers, None)

    def __len__(self) -> int:
        return len(self._numbers)


class BatchReader:
    """Reads batches of some data in order, onto a parameter's device and, if floating, in its dtype.

    A call can ask for some of the batches. The others are not read from a Dataset or a DataLoader over one; from any
    other iterable they are read and dropped. A bar over the samples shows the time left where `progress` is True (None:
    where stderr is a terminal).

    name: of the data, for errors. batch: from an item of the data to (inputs, targets); None: its first two parts.
    labelled=False also accepts inputs without targets. A list of samples is a dataset. Raises TypeError or ValueError
    for data that cannot be read in the same order several times.
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
        self._name, self._hook, self._labelled, self._repeats = name, batch, labelled, False
        if isinstance(data, Tensor) and not labelled:
            data = torch.split(data, batch_size)
        if type(data) is TensorDataset:
            # The batches that a loader would collate from samples, as slices of the tensors.
            data = [
                tuple(tensor[start : start + batch_size] for tensor in data.tensors)
                for start in range(0, len(data), batch_size)
            ]
        of_samples = isinstance(data, Dataset) or self._holds_samples(data)
        self._data: Iterable[Any] = DataLoader(cast(Any, data), batch_size) if of_samples else cast(Any, data)
        self._parameter, self._progress = parameter, progress
        # Batch sizes; known before reading, except for an iterable of batches.
        self._sizes: list[int] | None = None
        # Of all samples of a sequence of batches; empty for other data.
        self._targets: list[Tensor] = []
        loader = self._data
        if isinstance(loader, Sequence):
            self._sizes, start = [], 0
            for raw in loader:
                x, y = self._read(raw, start)
                self._sizes.append(len(x))
                self._targets.append(y)
                start += len(x)
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
        """The number of batches; None where it is not known before reading them."""
        if self._sizes is not None:
            return len(self._sizes)
        return len(self._data) if isinstance(self._data, Sized) and not isinstance(self._data, DataLoader) else None

    @property
    def samples(self) -> int | None:
        """The number of samples; None where it is not known before reading them."""
        return None if self._sizes is None else sum(self._sizes)

    def __call__(self, desc: str, includes: Callable[[int], bool] = lambda _: True) -> Iterator[NumberedBatch]:
        """The batches whose number `includes` accepts. desc: the name of the pass, on the bar.

        The first call reads the first samples twice. Raises ValueError if they differ, for data without samples and for
        targets that are not (B,); TypeError for batches without inputs and targets.
        """
        device, start = self._parameter.device, 0
        total = None
        if self._sizes is not None:
            total = sum(size for number, size in enumerate(self._sizes) if includes(number))
        first_read = None if self._repeats else self._first_samples(includes)
        with tqdm(
            desc=desc,
            total=total,
            unit="sample",
            disable=None if self._progress is None else not self._progress,
            leave=False,
        ) as bar:
            for batch in self._batches(includes):
                if first_read is not None:
                    self._check_repeats(first_read, batch)
                    first_read, self._repeats = None, True
                start = batch.start + len(batch.x)
                if includes(batch.number):
                    x, y = (part.to(device, non_blocking=True) for part in (batch.x, batch.y))
                    if x.is_floating_point():
                        x = x.to(self._parameter.dtype)
                    yield NumberedBatch(batch.number, batch.start, x, y.long())
                    bar.update(len(x))
        if self._sizes is None and start == 0 or self._sizes == []:
            raise ValueError(f"{self._name} must contain samples; got none")

    def share(self, desc: str, ranks: Ranks) -> Iterator[NumberedBatch]:
        """This process's batches: every ranks.count-th, from ranks.rank on."""
        return self(desc, lambda number: number % ranks.count == ranks.rank)

    def known(self) -> dict[str, Tensor]:
        """The data as far as it is known without a pass over it; {} for data without samples.

        "inputs": of the first samples. "targets": of all samples of a sequence of batches, otherwise of the first ones.
        """
        first = self._first_samples(lambda _: True)
        return {} if first is None else {"inputs": first[0], "targets": torch.cat(self._targets or [first[1]])}

    def targets(self, ranks: Ranks) -> Iterator[Tensor]:
        """The targets of this process's batches, (B,) int64 each; a pass over the data."""
        for batch in self.share("labels", ranks):
            yield batch.y

    def _read(self, raw: Any, start: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of an item of the data whose first sample has the number `start`."""
        return tensors(self._name, raw, start, self._hook, labelled=self._labelled)

    def _holds_samples(self, data: Any) -> bool:
        """Whether the items of an indexable are samples, whose target is one number, rather than batches."""
        if isinstance(data, Mapping) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data)):
            return False
        try:
            y = pair(self._name, data[0], self._hook, labelled=self._labelled)[1]
        except Exception:  # reading the items raises it again
            return False
        return isinstance(y, Integral) or getattr(y, "shape", None) == ()

    def _first_samples(self, includes: Callable[[int], bool]) -> tuple[Tensor, Tensor] | None:
        """Inputs and targets of the first samples of a pass: some of a dataset, one batch of other data."""
        loader = self._data
        start = 0
        if self._sizes is None:
            raw = next(iter(loader), None)
        else:
            number = next((number for number in range(len(self._sizes)) if includes(number)), None)
            if number is None:
                return None
            start = sum(self._sizes[:number])
            if isinstance(loader, Sequence):
                raw = loader[number]
            else:
                assert isinstance(loader, DataLoader)
                # A custom collate_fn may collate part of a batch differently, for example with less padding.
                samples = _READ_TWICE if loader.collate_fn is default_collate else None
                raw = next(iter(_reader(loader, [number], min(1, loader.num_workers), samples)))
        return None if raw is None else self._read(raw, start)

    def _check_repeats(self, first_read: tuple[Tensor, Tensor], batch: NumberedBatch) -> None:
        """ValueError unless the batch begins with the samples that were read before the pass."""
        for what, first, again in zip(("inputs", "targets"), first_read, (batch.x, batch.y), strict=True):
            if not _equal(first, again[: len(first)].to(first.device)):
                raise ValueError(
                    f"{self._name} must give the same tensors at every pass; got other {what} when its first samples,"
                    f" from sample {batch.start} on, were read again: pass it with the evaluation transform (no random"
                    " crop, flip or noise, no mixing of samples) and without shuffling"
                )

    def _batches(self, includes: Callable[[int], bool]) -> Iterator[NumberedBatch]:
        """Reads the data; of a dataset or a DataLoader, only the batches that `includes` accepts."""
        if self._sizes is None:
            start = 0
            for number, raw in enumerate(self._data):
                x, y = self._read(raw, start)
                yield NumberedBatch(number, start, x, y)
                start += len(x)
            return
        starts = torch.tensor([0, *self._sizes]).cumsum(0).tolist()
        numbers = [number for number in range(len(self._sizes)) if includes(number)]
        loader = self._data
        if isinstance(loader, Sequence):
            loader = [loader[number] for number in numbers]
        elif len(numbers) < len(self._sizes):
            assert isinstance(loader, DataLoader)
            loader = _reader(loader, numbers, loader.num_workers)
        for number, raw in zip(numbers, loader, strict=True):
            yield NumberedBatch(number, starts[number], *self._read(raw, starts[number]))


@dataclass(frozen=True)
class ReadOptions:
    """How data and models are read; influence.score describes the fields."""

    batch_size: int
    batch: BatchHook | None
    logits: LogitsHook | None
    progress: bool | None

    def reader(self, data: Data, like: Tensor, *, name: str = "data", labelled: bool = True) -> BatchReader:
        """A reader of `data` onto the device and into the dtype of `like`, a parameter. name: for errors."""
        return BatchReader(data, like, self.batch_size, self.progress, name=name, batch=self.batch, labelled=labelled)

    def classifier(self, model: nn.Module, name: str = "model") -> Classifier:
        """The model with its output read as logits. name: for errors."""
        return Classifier(model, name, self.logits)


def _reader(loader: DataLoader[Any], numbers: list[int], workers: int, samples: int | None = None) -> DataLoader[Any]:
    """A loader over the batches with these numbers. samples: only over the first of each batch."""
    assert loader.batch_sampler is not None
    return DataLoader(
        loader.dataset,
        batch_sampler=_BatchSubset(loader.batch_sampler, numbers, samples),
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
