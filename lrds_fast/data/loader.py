"""What the trainer asks of data, and the order in which samples arrive."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """images (N, channels, height, width), ready for the network but for the device; targets (N,) int64; indices (N,)
    int64 on the CPU, each sample's place in its split. strong: like images, the same samples in another view, where one
    was asked for (data.second_view), else None."""

    images: Tensor
    targets: Tensor
    indices: Tensor
    strong: Tensor | None = None


class Loader(Protocol):
    """One split of a data set.

    num_classes: C; class numbers are 0 .. C - 1. labels: (size,) int64, the split's targets in index order.
    """

    num_classes: int
    labels: Tensor

    def __len__(self) -> int:
        """Batches per epoch, the same number on every process."""

    def epoch(
        self, epoch: int, selected: Tensor | None = None, *, start: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """The batches of one epoch: a function of the loader's seed and `epoch` alone, whatever ran before.

        selected: (size,) bool. Where given, each batch brings its share of the selected samples, first, so that the
        teacher needs to see a prefix of constant length only (see epoch_batches); a loader that cannot do so ignores
        it, and the trainer falls back to a mask.
        start: how many batches to leave out, for a run that goes on in the middle; the others are those of the whole
        epoch, and what is left out is not decoded. share: (number, count) of this process: of every batch it gets
        the rows number, number + count, ..., so that selected samples are first everywhere, counts differ by one row
        at most, and all processes together have every sample once. A last batch with fewer than two
        rows per process goes to the first process alone, because batch norm needs two rows.
        """

    def boxes(self, epoch: int, indices: Tensor) -> Tensor:
        """(N, 5) int32 on the CPU: where in their pictures samples are cut out in an epoch. top, left, height, width
        in the picture's own pixels, and 1 where what is cut out is mirrored, else 0.

        indices: (N,) int64. A box that begins in an added border has a negative top or left.
        """

    def picture(self, index: int) -> Tensor:
        """(height, width, 1 or 3) uint8: the sample as people see it, without augmentation."""


@dataclass(frozen=True)
class Data:
    """The splits of one data set.

    train: shuffled and augmented. score: the same samples, in order and as they are. val: a slice held out from the
    training samples (None where there is none). test: never used to decide anything. class_names: of the classes 0, 1,
    ..., empty where they have only numbers.
    """

    name: str
    train: Loader
    score: Loader
    val: Loader | None
    test: Loader
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.train.num_classes


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part; equal parts give equal seeds on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by derived_seed."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def view_of(epoch: int, views: int) -> int:
    """The epoch whose augmentation `epoch` has: its own, or with views > 0 that of one of the first `views`."""
    return epoch % views if views else epoch


def check_sizes(batch_size: int, least: int, views: int) -> None:
    """Raises ValueError for a loader's sizes that make no sense."""
    if batch_size < 1 or least < 1:
        raise ValueError(f"batch_size and least must be at least 1; got {batch_size} and {least}")
    if views < 0:
        raise ValueError(f"views must be at least 0 (0: a new augmentation every epoch); got {views}")


def batch_count(size: int, batch_size: int, least: int = 2) -> int:
    """Batches of an epoch. A last batch of fewer than `least` samples joins the one before it: one row has no batch
    statistics."""
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
    """Index tensors of one epoch's batch_count batches; every sample is in one of them.

    With `selected`, (size,) bool, each batch has its share of the selected samples, first, and then of the others: of
    B samples floor or ceil of B * (number selected) / size. Within the selected, and within the others, the order is
    that of one shuffle of all. start, share: see Loader.epoch. Raises ValueError for these out of range.
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
    """The most selected samples that a batch of `rows` has where epoch_batches divides `count` of `size` samples."""
    return min(rows, -(-rows * count // size)) if size else 0
