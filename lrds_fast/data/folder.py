"""Encoded pictures, read by Pillow and augmented by torchvision: what DALI's are compared with, and the fallback."""

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
from lrds_fast.recipe.recipe import DataOptions

# The statistics of ImageNet's training set that every published network expects.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class _Samples(Dataset[tuple[Tensor, int, int]]):
    """Items are asked for as (index, seed of the box, seed of the strong augmentation): a sample's augmentation does
    not depend on the worker that draws it, the order in the batch or the number of workers. crop: the side of random
    boxes, 0 for none."""

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
        """The PIL image; ValueError naming the file where there is none."""
        row = int(self.rows[index])
        try:
            with reading():
                return decoded(self.source.read(row))
        except Unreadable as error:
            where = self.source.name(row)
            raise ValueError(f"{where} is not a readable picture ({error}); replace or remove it") from error


def _cut(image: Any, size: int, seed: int) -> Any:
    """A PIL image of size x size: the box that the seed draws, as DALI cuts it out."""
    from torchvision.transforms.v2 import functional

    box = random_box(image.height, image.width, size, seed)
    cut = functional.resized_crop(image, *box[:4], [size, size], antialias=True)
    return functional.horizontal_flip(cut) if box.mirrored else cut


class _Items:
    """The items of each batch, made when the batch is due."""

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


def _keep(_: int) -> None:
    """In a new worker: what its parent has left is not its to collect, such as objects with threads of the parent's.
    A signal to all processes is the parent's to answer: it saves a checkpoint first, and then ends its workers."""
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class FolderLoader:
    """A Loader over some rows of a Source; see Loader for its methods.

    train=True: RandomResizedCrop(image_size) and a mirror image half of the time; else Resize(image_size / .875) and
    CenterCrop. strong: what is done to the pictures beyond that. workers: processes that decode; 0 decodes in this one.
    least: a last batch of fewer samples joins the one before it. views: 0 augments anew every epoch; n > 0 gives epoch
    e the augmentation of epoch e % n, in an order of its own.
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
        centre = [v2.Resize(round(image_size / 0.875), antialias=True), v2.CenterCrop(image_size)]
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
        # Only the last batch may be so short that a process has no row of it, and nothing cannot be collated.
        nothing = batches.pop() if batches and not len(batches[-1]) else None
        loader: DataLoader[Any] = DataLoader(
            cast(Any, self._samples),
            batch_sampler=cast(Any, _Items(batches, self.seed, view_of(epoch, self.views), self._samples.strong)),
            num_workers=self.workers,
            worker_init_fn=_keep,
            pin_memory=torch.cuda.is_available(),
            # Its draw of a seed for the workers must not move the global generator.
            generator=torch.Generator(),
        )
        for images, targets, index in loader:
            yield Batch(images, targets, index)
        if nothing is not None:
            yield Batch(torch.empty(0, 3, self.image_size, self.image_size), self.labels[nothing], nothing)

    def boxes(self, epoch: int, indices: Tensor) -> Tensor:
        """See Loader.boxes; DALI's boxes. Reads the files' headers; an evaluated picture's box is all of it."""
        view = view_of(epoch, self.views)
        seeds = [crop_seed(self.seed, view, i, self._samples.strong.stream) for i in indices.tolist()]
        rows = self._samples.rows[indices]
        return geometry(self._samples.source, rows, seeds if self.train else None, self.image_size)

    def picture(self, index: int) -> Tensor:
        from torchvision.transforms import v2

        image = self._samples.picture(index)
        thumbnail = v2.Compose([v2.Resize(96, antialias=True), v2.CenterCrop(96), v2.PILToTensor()])
        return cast(Tensor, thumbnail(image)).permute(1, 2, 0)
