"""Encoded pictures, decoded by Pillow and augmented by torchvision: the reference for DALI, and the fallback."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lrds_fast.data.boxes import crop_seed, geometry, random_box
from lrds_fast.data.loader import Batch, batch_count, check_sizes, epoch_batches, view_of
from lrds_fast.data.pictures import Unreadable, decoded, reading
from lrds_fast.data.sources import Source
from lrds_fast.data.strong import PLAIN, Strong
from lrds_fast.data.transform import MEAN, STD, shorter_side
from lrds_fast.recipe.recipe import DataOptions


class _Samples(Dataset[tuple[Tensor, int, int]]):
    """Samples by (index, seed of the box, seed of the strong augmentation): the augmentation depends neither on the
    worker nor on the batch. crop: the side of random crops in pixels, 0 for none. cut: the other transforms of a PIL
    image, to uint8. finish: from uint8 to normalised float32."""

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        cut: Callable[[Any], Tensor],
        finish: Callable[[Tensor], Tensor],
        strong: Strong,
        *,
        crop: int,
    ) -> None:
        self.source = source
        self.rows = rows
        self.cut, self.finish, self.strong = cut, finish, strong
        self.crop = crop

    def __getitem__(self, item: tuple[int, int, int]) -> tuple[Tensor, int, int]:
        index, seed, strong_seed = item
        row = int(self.rows[index])
        image, target = self.picture(index), int(self.source.labels[row])
        if self.crop:
            image = _cut(image, self.crop, seed)
        finished = self.finish(self.strong.augment(self.cut(image)[None], [strong_seed]))
        return self.strong.erase(finished, [strong_seed])[0], target, index

    def picture(self, index: int) -> Any:
        """The PIL image; ValueError naming the file if it is unreadable."""
        row = int(self.rows[index])
        try:
            with reading():
                return decoded(self.source.read(row))
        except Unreadable as error:
            where = self.source.name(row)
            raise ValueError(f"{where} is not a readable picture ({error}); replace or remove it") from error


def _cut(image: Any, size: int, seed: int) -> Any:
    """A random crop of a PIL image, size x size: the box that DALI crops for this seed."""
    from torchvision.transforms.v2 import functional

    box = random_box(image.height, image.width, size, seed)
    cut = functional.resized_crop(image, *box[:4], [size, size], antialias=True)
    return functional.horizontal_flip(cut) if box.mirrored else cut


class _Items:
    """The batch sampler: the items of each batch, derived when the batch is needed."""

    def __init__(self, batches: list[Tensor], seed: int, view: int, strong: Strong) -> None:
        self.batches, self.seed, self.view, self.strong = batches, seed, view, strong

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for batch in self.batches:
            yield [self._item(i) for i in batch.tolist()]

    def _item(self, index: int) -> tuple[int, int, int]:
        """See _Samples."""
        crop = crop_seed(self.seed, self.view, index, self.strong.stream)
        return index, crop, self.strong.seed(self.seed, self.view, index)


def _start_worker(_: int) -> None:
    """Runs first in every worker process."""
    # Inherited objects are never collected here: their destructors could join threads that only the parent has.
    gc.freeze()
    # Ctrl-C and SIGTERM reach the whole process group. The parent saves a checkpoint and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class FolderLoader:
    """A Loader over some rows of a Source; see Loader for its methods.

    source: the pictures. rows: (size,) int64, the split's samples in it. train=True: RandomResizedCrop(image_size) and
    RandomHorizontalFlip; else Resize(image_size / 0.875) and CenterCrop(image_size). Batches are float32 (N, 3,
    image_size, image_size) on the CPU, normalised by ImageNet's mean and standard deviation. strong: further
    augmentation. workers: processes that decode; 0 decodes in this process.
    least: a last batch of fewer samples is added to the one before it. views: 0 draws new augmentations in every epoch;
    n > 0 gives epoch e the augmentations of epoch e % n, in a new order.
    An unreadable picture is a ValueError that names the file. ImportError without torchvision, ValueError for sizes
    below 1.
    """

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        *,
        batch_size: int,
        image_size: int = 224,
        seed: int = 0,
        shuffle: bool = False,
        train: bool = False,
        strong: Strong = PLAIN,
        workers: int = 0,
        least: int = 2,
        views: int = 0,
    ) -> None:
        check_sizes(batch_size, least, views)
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise ImportError(
                f"data.reader 'torchvision' needs torchvision: pip install torchvision ({error})"
            ) from error
        self.num_classes = len(source.classes)
        self.labels = source.labels[rows]
        self.batch_size = batch_size
        self.image_size = image_size
        self.train = train
        self.least = least
        self.views = views
        self.seed = seed
        self.shuffle = shuffle
        self.workers = workers
        centre = [v2.Resize(shorter_side(image_size), antialias=True), v2.CenterCrop(image_size)]
        cut = v2.Compose([v2.PILToTensor()] if train else [*centre, v2.PILToTensor()])
        finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
        self._samples = _Samples(source, rows, cut, finish, strong, crop=image_size if train else 0)

    @classmethod
    def of(
        cls,
        options: DataOptions,
        source: Source,
        rows: Tensor,
        *,
        train: bool = False,
        device: torch.device | str | None = None,
        **arguments: Any,
    ) -> FolderLoader:
        """The loader that a recipe's [data] describes. train: shuffled and augmented, in batches of batch_size; else in
        order, as they are, in batches of eval_batch_size. device: not used. arguments: of FolderLoader."""
        if train:
            arguments |= {"batch_size": options.batch_size, "shuffle": True, "train": options.augment == "crop-flip"}
        else:
            arguments |= {"batch_size": options.eval_batch_size}
        return cls(source, rows, image_size=options.image_size, workers=options.workers, **arguments)

    def __len__(self) -> int:
        return batch_count(len(self.labels), self.batch_size, self.least)

    def epoch(
        self, epoch: int, selected: Tensor | None = None, *, start: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        batches = epoch_batches(
            len(self.labels),
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            selected=selected,
            least=self.least,
            start=start,
            share=share,
        )
        # A process may have no row of the last batch, and an empty batch cannot be collated.
        empty = batches.pop() if batches and not len(batches[-1]) else None
        loader: DataLoader[Any] = DataLoader(
            cast(Any, self._samples),
            batch_sampler=cast(Any, _Items(batches, self.seed, view_of(epoch, self.views), self._samples.strong)),
            num_workers=self.workers,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            # The loader draws its workers' seed from this generator, so that the global one does not advance.
            generator=torch.Generator(),
        )
        for images, targets, index in loader:
            yield Batch(images, targets, index)
        if empty is not None:
            yield Batch(torch.empty(0, 3, self.image_size, self.image_size), self.labels[empty], empty)

    def boxes(self, epoch: int, indices: Tensor) -> Tensor:
        """See Loader.boxes; the same as DaliLoader's. Reads the files' headers. Without train, the whole pictures."""
        view = view_of(epoch, self.views)
        seeds = [crop_seed(self.seed, view, i, self._samples.strong.stream) for i in indices.tolist()]
        rows = self._samples.rows[indices]
        return geometry(self._samples.source, rows, seeds if self.train else None, self.image_size)

    def picture(self, index: int) -> Tensor:
        from torchvision.transforms import v2

        image = self._samples.picture(index)
        thumbnail = v2.Compose([v2.Resize(96, antialias=True), v2.CenterCrop(96), v2.PILToTensor()])
        return cast(Tensor, thumbnail(image)).permute(1, 2, 0)
