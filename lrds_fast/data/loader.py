"""The interface between data and trainer, and the order of the samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lrds_fast.data.transform import Transform


class Batch(NamedTuple):
    """N samples.

    images: (N, channels, height, width) float32, normalised, on any device. targets: (N,) int64. indices: (N,) int64 on
    the CPU, the samples' numbers in their split. strong: with data.second_view, a second view of the same samples, like
    images; else None.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    strong: Tensor | None = None


class Loader(Protocol):
    """One split of a data set.

    num_classes: C; class numbers are 0 to C - 1. labels: (size,) int64 on the CPU, the targets by sample number.
    """

    num_classes: int
    labels: Tensor

    def __len__(self) -> int:
        """Batches per epoch, the same number on every process."""

    def epoch(
        self, epoch: int, selected: Tensor | None = None, *, start: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """The batches of one epoch. They depend only on the loader's seed and `epoch`, not on earlier calls.

        selected: (size,) bool. If passed, each batch has its share of the selected samples, as its first rows, so that
        the teacher runs on a prefix of constant length (see epoch_batches). A loader that cannot order samples so
        ignores it, and the trainer uses a mask.
        start: the number of batches to skip, to resume within an epoch; skipped batches are not decoded, and the others
        do not change. share: (number, count) of this process, which gets the rows number, number + count, ... of every
        batch. So selected samples are first on all processes, their numbers differ by at most one, and every sample is
        on one process. A last batch with fewer than two rows per process goes to the first process alone, because batch
        norm needs two rows.
        """

    def boxes(self, epoch: int, indices: Tensor) -> Tensor:
        """The samples' crops in an epoch: (N, 5) int32 on the CPU, with top, left, height and width in pixels of the
        stored picture, and 1 if the crop is mirrored, else 0.

        indices: (N,) int64. A crop that begins in the padding has a negative top or left.
        """

    def picture(self, index: int) -> Tensor:
        """(height, width, 1 or 3) uint8: the sample for display, without augmentation and normalisation."""


@dataclass(frozen=True)
class Data:
    """The splits of one data set.

    train: shuffled and augmented. score: the same samples, in order and without augmentation. val: samples that are
    held out from training; None without any. test: the test split, on which nothing is decided. class_names: of the
    classes 0, 1, ...; () if they have only numbers. transform: gives a picture file the form of the test split's
    images; None where no picture file can have it.
    """

    name: str
    train: Loader
    score: Loader
    val: Loader | None
    test: Loader
    class_names: tuple[str, ...] = ()
    transform: Transform | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.train.num_classes


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed: a hash of the parts, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by derived_seed."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def view_of(epoch: int, views: int) -> int:
    """The epoch whose augmentation `epoch` has: `epoch` itself or, with views > 0, epoch % views."""
    return epoch % views if views else epoch


def check_sizes(batch_size: int, least: int, views: int) -> None:
    """Raises ValueError for sizes that a loader cannot have."""
    if batch_size < 1 or least < 1:
        raise ValueError(f"batch_size and least must be at least 1; got {batch_size} and {least}")
    if views < 0:
        raise ValueError(f"views must be at least 0 (0: a new augmentation every epoch); got {views}")


def batch_count(size: int, batch_size: int, least: int = 2) -> int:
    """Number of batches in an epoch. A last batch of fewer than `least` samples is added to the one before it: one row
    has no batch statistics."""
    full, rest = divmod(size, batch_size)
    return full + (rest >= max(least, 1) or (rest > 0 and full == 0))


def epoch_batches(
    size: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    selected: Tensor | None = None,
    least: int = 2,
    start: int = 0,
    share: tuple[int, int] = (0, 1),
) -> list[Tensor]:
    """The (rows,) int64 sample numbers of each batch of an epoch; every sample is in one batch.

    selected: (size,) bool. If passed, the first rows of a batch of B samples are selected ones, floor or ceil of B *
    (number selected) / size, and the others follow. The selected samples, and the others, keep the order of the epoch's
    shuffle. start, share: see Loader.epoch; ValueError if these are out of range.
    """
    number, count = share
    if not 0 <= number < count:
        raise ValueError(f"share must be (number, count) with 0 <= number < count; got {share}")
    if count > batch_size:
        raise ValueError(f"share: batches of {batch_size} cannot be divided among {count} processes; raise batch_size")
    batches = _whole_batches(size, batch_size, seed, epoch, shuffle, selected, least)
    if not 0 <= start <= len(batches):
        raise ValueError(f"start must be in [0, {len(batches)}], the batches of an epoch; got {start}")
    divisible = min(batch_size, 2 * count)
    rest = slice(None) if number == 0 else slice(0)
    return [batch[number::count] if len(batch) >= divisible else batch[rest] for batch in batches[start:]]


def _whole_batches(
    size: int, batch_size: int, seed: int, epoch: int, shuffle: bool, selected: Tensor | None, least: int
) -> list[Tensor]:
    order = torch.randperm(size, generator=generator("order", seed, epoch)) if shuffle else torch.arange(size)
    ends = [(i + 1) * batch_size for i in range(batch_count(size, batch_size, least))]
    if ends:
        ends[-1] = size
    starts = [0, *ends[:-1]]
    if selected is None:
        return [order[start:end] for start, end in zip(starts, ends, strict=True)]
    chosen = selected[order]
    first, second = order[chosen], order[~chosen]
    count = len(first)
    cuts = [end * count // size for end in [0, *ends]]
    return [
        torch.cat([first[a:b], second[start - a : end - b]])
        for start, end, a, b in zip(starts, ends, cuts[:-1], cuts[1:], strict=True)
    ]


def prefix_rows(rows: int, size: int, count: int) -> int:
    """The largest number of selected samples in a batch of `rows`, if `count` of `size` samples are selected; see
    epoch_batches."""
    return min(rows, -(-rows * count // size)) if size else 0
