"""The loaders that benchmarks/bench_train.py compares: prepared batches, torchvision's as published, and ours.

Photographs are those of $LRDS_DATA/imagenet_jpegs, repeated to fill an epoch, or, where there are none, generated
JPEGs. CIFAR-100 is that of $LRDS_DATA/cifar100, or noise of its shape.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lrds_fast.data import Batch, DaliLoader, FolderLoader, MemoryLoader, epoch_batches
from lrds_fast.data.cifar import MEAN as CIFAR_MEAN
from lrds_fast.data.cifar import STD as CIFAR_STD
from lrds_fast.data.cifar import cifar
from lrds_fast.data.dali import has_dali
from lrds_fast.data.sources import Folder
from lrds_fast.data.transform import MEAN, STD


def missing(*modules: str) -> str:
    """Names of the modules that are not installed, joined; "" where all are."""
    return ", ".join(name for name in modules if importlib.util.find_spec(name) is None)


class Loader(Protocol):
    """What the benchmark needs of a lrds_fast.data.Loader. labels: (size,) int64, by sample index."""

    labels: Tensor

    def epoch(self, epoch: int, selected: Tensor | None = None) -> Iterator[Batch]:
        """The batches of an epoch. selected: (size,) bool, the samples that keep the teacher; None for all."""


class Prepared:
    """A Loader that repeats the same batches, which lie on the device, until an epoch has `count` of them.

    labels: (size,) int64, the targets of the epoch that the batches were drawn from.
    """

    def __init__(self, batches: Sequence[Batch], labels: Tensor, *, count: int) -> None:
        self.batches, self.labels, self.count = list(batches), labels, count

    def __len__(self) -> int:
        return self.count

    def epoch(self, epoch: int, selected: Tensor | None = None) -> Iterator[Batch]:
        yield from itertools.islice(itertools.cycle(self.batches), self.count)


def prepared(
    shape: tuple[int, int, int],
    *,
    classes: int,
    size: int,
    batch: int,
    distinct: int,
    batches: int,
    device: torch.device,
    selected: Tensor | None = None,
) -> Prepared:
    """Batches of noise of `shape` (channels, height, width).

    size: samples of the epoch that the batches are drawn from. distinct: how many different batches there are. batches:
    how many batches an epoch of the result has. selected: (size,) bool; in each batch the selected samples come first.
    """
    random = torch.Generator(device).manual_seed(1)
    noise = torch.randn(distinct * batch, *shape, generator=random, device=device)
    labels = torch.randint(classes, (size,), generator=torch.Generator().manual_seed(1))
    orders = epoch_batches(size, batch, seed=0, epoch=0, shuffle=True, selected=selected)
    distinct_batches = [
        Batch(noise[i * batch : i * batch + len(order)], labels[order].to(device), order)
        for i, order in enumerate(orders[:distinct])
    ]
    return Prepared(distinct_batches, labels, count=batches)


class _Indexed(Dataset[tuple[Tensor, int, int]]):
    """Items as mdistiller's datasets return them: the transformed picture, its class, its index. rows: the sample of
    each index; samples may repeat."""

    def __init__(self, get: Callable[[int], tuple[Any, int]], rows: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.get, self.rows, self.transform = get, rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, target = self.get(int(self.rows[index]))
        return self.transform(image), target, index


class Published:
    """A Loader as mdistiller has it: PIL pictures, torchvision's transforms, DataLoader with workers.

    get: from a sample's number to its picture and class. labels: by sample number. rows: (size,) int64, the numbers of
    an epoch's samples.
    """

    def __init__(
        self,
        get: Callable[[int], tuple[Any, int]],
        labels: Tensor,
        rows: Tensor,
        transform: Callable[[Any], Tensor],
        *,
        batch_size: int,
        workers: int,
        shuffle: bool = True,
    ) -> None:
        self.labels = labels[rows]
        self._loader: DataLoader[Any] = DataLoader(
            _Indexed(get, rows, transform),
            batch_size=batch_size,
            shuffle=shuffle,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, selected: Tensor | None = None) -> Iterator[Batch]:
        for images, targets, indices in self._loader:
            yield Batch(images, targets, indices)


def generated_photographs(folder: Path, count: int = 64) -> Path:
    """Writes `count` JPEGs with about ImageNet's sizes and detail, in 8 classes, into `folder`, and returns it. Needs
    Pillow."""
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(count):
        height, width = 333 + 21 * (i % 9), 500 - 17 * (i % 7)
        y, x = np.mgrid[0:height, 0:width]
        waves = [128 + 90 * np.sin((x * (k + 1) + y * (i % 5 + 1)) / 23.0) for k in range(3)]
        pixels = np.stack(waves, axis=2) + random.normal(0, 12, (height, width, 3))
        path = folder / f"class{i % 8}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return folder


@dataclass(frozen=True)
class Photographs:
    """A folder with a folder of JPEGs for each class. description: for tables."""

    root: Path
    description: str


def photographs(scratch: Path) -> Photographs:
    """Those of $LRDS_DATA, or, where there are none, generated ones in `scratch`."""
    data = os.environ.get("LRDS_DATA")
    imagenet = Path(data or "") / "imagenet_jpegs"
    if data and imagenet.is_dir():
        return Photographs(imagenet, "ImageNet photographs")
    return Photographs(generated_photographs(scratch), "made JPEGs")


def repeated(size: int, count: int) -> Tensor:
    """(count,) int64: 0 .. size - 1, repeated."""
    return torch.arange(count) % size


def photograph_loader(
    kind: str,
    pictures: Photographs,
    *,
    count: int,
    batch_size: int,
    train: bool,
    workers: int,
    device: torch.device,
    image_size: int = 224,
    shuffle: bool = True,
) -> Loader:
    """kind: "published" (ImageFolder, torchvision's transforms on PIL pictures), "torchvision" (our FolderLoader) or
    "DALI". count: samples of an epoch. workers: processes, for DALI threads."""
    source = Folder(pictures.root)
    rows = repeated(len(source.labels), count)
    if kind == "DALI":
        return DaliLoader(
            source,
            rows,
            batch_size=batch_size,
            image_size=image_size,
            train=train,
            shuffle=shuffle,
            threads=max(1, workers),
            device=device,
        )
    if kind == "torchvision":
        return FolderLoader(
            source, rows, batch_size=batch_size, image_size=image_size, train=train, shuffle=shuffle, workers=workers
        )
    from torchvision import datasets, transforms

    folder = datasets.ImageFolder(str(pictures.root))
    crop = (
        [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()]
        if train
        else [transforms.Resize(round(image_size / 0.875)), transforms.CenterCrop(image_size)]
    )
    transform = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return Published(
        folder.__getitem__,
        source.labels,
        rows,
        transform,
        batch_size=batch_size,
        workers=workers,
        shuffle=shuffle,
    )


def photograph_kinds() -> tuple[list[str], list[str]]:
    """The kinds of photograph_loader whose libraries are installed, and why the others are left out."""
    kinds, reasons = [], []
    if absent := missing("PIL"):
        return [], [f"photographs: {absent} is not installed"]
    if absent := missing("torchvision"):
        reasons.append(f"torchvision's loaders: {absent} is not installed")
    else:
        kinds += ["published", "torchvision"]
    if has_dali():
        kinds.append("DALI")
    else:
        reasons.append("DALI's loader: nvidia.dali is not installed")
    return kinds, reasons


def cifar_pictures(count: int) -> tuple[Tensor, Tensor, str]:
    """Pictures (count, 3, 32, 32) uint8, targets (count,) int64, and their description for tables."""
    data = os.environ.get("LRDS_DATA")
    if data and (Path(data) / "cifar100").is_dir():
        splits = cifar(100)
        rows = repeated(len(splits.train_labels), count)
        return splits.train_images[rows], splits.train_labels[rows], "CIFAR-100"
    random = torch.Generator().manual_seed(2)
    images = torch.randint(256, (count, 3, 32, 32), generator=random, dtype=torch.uint8)
    return images, torch.randint(100, (count,), generator=random), "noise of CIFAR's shape"


def cifar_loader(
    kind: str, pictures: tuple[Tensor, Tensor, str], *, batch_size: int, workers: int, device: torch.device
) -> Loader:
    """kind: "published" (PIL, RandomCrop(32, padding=4), mirror image, DataLoader) or "in memory" (MemoryLoader)."""
    images, targets, _ = pictures
    if kind == "in memory":
        return MemoryLoader(
            images,
            targets,
            num_classes=100,
            batch_size=batch_size,
            shuffle=True,
            augment="crop-flip",
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
            device=device,
        )
    from PIL import Image
    from torchvision import transforms

    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(CIFAR_MEAN, CIFAR_STD),
        ]
    )
    return Published(
        lambda i: (Image.fromarray(pixels[i]), int(targets[i])),
        targets,
        torch.arange(len(targets)),
        transform,
        batch_size=batch_size,
        workers=workers,
    )


def cifar_kinds() -> tuple[list[str], list[str]]:
    """The kinds of cifar_loader whose libraries are installed, and why the others are left out."""
    absent = missing("torchvision", "PIL")
    if absent:
        return ["in memory"], [f"the published CIFAR loader: {absent} is not installed"]
    return ["published", "in memory"], []
