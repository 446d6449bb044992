"""Encoded pictures, read by Pillow and augmented by torchvision: what DALI's are compared with, and the fallback."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lrds_fast.data.loader import Batch, batch_count, derived_seed, epoch_batches
from lrds_fast.data.sources import Source
from lrds_fast.data.strong import PLAIN, Strong

# The statistics of ImageNet's training set that every published network expects.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class _Samples(Dataset[tuple[Tensor, int, int]]):
    """Items are asked for as (index, seed): the seed makes a sample's augmentation independent of the worker that
    draws it, of the order in the batch and of the number of workers."""

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        cut: Callable[[Any], Tensor],
        finish: Callable[[Tensor], Tensor],
        strong: Strong,
    ) -> None:
        self.source = source
        self.rows = rows
        self.cut, self.finish, self.strong = cut, finish, strong

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, int]:
        index, seed = item
        row = int(self.rows[index])
        image, target = self.picture(index), int(self.source.labels[row])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixels = self.cut(image)
        finished = self.finish(self.strong.augment(pixels[None], [seed]))
        return self.strong.erase(finished, [seed])[0], target, index

    def picture(self, index: int) -> Any:
        """The PIL image; ValueError naming the file where there is none."""
        from PIL import Image

        row = int(self.rows[index])
        try:
            with Image.open(io.BytesIO(self.source.read(row).tobytes())) as opened:
                return opened.convert("RGB")
        except OSError as error:
            where = self.source.name(row)
            raise ValueError(f"{where} is not a readable picture ({error}); replace or remove it") from error


class _Items:
    """The items of each batch, made when the batch is due."""

    def __init__(self, batches: list[Tensor], seed: int, epoch: int, view: str) -> None:
        self.batches, self.seed, self.epoch, self.view = batches, seed, epoch, view

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            yield [(i, derived_seed(f"augment{self.view}", self.seed, self.epoch, i)) for i in batch.tolist()]


def _keep(_: int) -> None:
    """In a new worker: what its parent has left is not its to collect, such as objects with threads of the parent's."""
    gc.freeze()


class FolderLoader:
    """A Loader over some rows of a Source; see Loader for its methods.

    train=True: RandomResizedCrop(image_size) and a mirror image half of the time; else Resize(image_size / .875) and
    CenterCrop. strong: what is done to the pictures beyond that. workers: processes that decode; 0 decodes in this one.
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
    ) -> None:
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise ImportError(
                f"data.reader 'torchvision' needs torchvision: pip install torchvision ({error})"
            ) from error
        self.num_classes = len(source.classes)
        self.labels = source.labels[rows]
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.workers = workers
        crop = (
            [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
            if train
            else [v2.Resize(round(image_size / 0.875), antialias=True), v2.CenterCrop(image_size)]
        )
        finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
        self._samples = _Samples(source, rows, v2.Compose([*crop, v2.PILToTensor()]), finish, strong)

    def __len__(self) -> int:
        return batch_count(len(self.labels), self.batch_size)

    def epoch(self, epoch: int, selected: Tensor | None = None) -> Iterator[Batch]:
        batches = epoch_batches(
            len(self.labels),
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            selected=selected,
        )
        loader: DataLoader[Any] = DataLoader(
            cast(Any, self._samples),
            batch_sampler=cast(Any, _Items(batches, self.seed, epoch, self._samples.strong.view)),
            num_workers=self.workers,
            worker_init_fn=_keep,
            pin_memory=torch.cuda.is_available(),
            # Its draw of a seed for the workers must not move the global generator.
            generator=torch.Generator(),
        )
        for images, targets, index in loader:
            yield Batch(images, targets, index)

    def picture(self, index: int) -> Tensor:
        from torchvision.transforms import v2

        image = self._samples.picture(index)
        thumbnail = v2.Compose([v2.Resize(96, antialias=True), v2.CenterCrop(96), v2.PILToTensor()])
        return cast(Tensor, thumbnail(image)).permute(1, 2, 0)
