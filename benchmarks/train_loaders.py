"""The loaders that benchmarks/bench_train.py compares: prepared batches, the published ones of torchvision, and ours.

Each is a lrds_fast.data.Loader as far as a step needs it. Photographs are those of $LRDS_DATA/imagenet_jpegs if there,
repeated to fill an epoch, else JPEGs made on the spot; CIFAR-100 is that of $LRDS_DATA/cifar100, else noise.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lrds_fast.data import Batch, DaliLoader, FolderLoader, Loader, MemoryLoader, epoch_batches
from lrds_fast.data.cifar import MEAN as CIFAR_MEAN
from lrds_fast.data.cifar import STD as CIFAR_STD
from lrds_fast.data.cifar import cifar
from lrds_fast.data.dali import has_dali
from lrds_fast.data.folder import MEAN, STD
from lrds_fast.data.sources import Folder


def missing(*modules: str) -> str:
    """Names of the modules that are not installed, joined; "" where all are."""
    return ", ".join(name for name in modules if importlib.util.find_spec(name) is None)


class Prepared:
    """A Loader over batches that were made before and lie on the device, `count` of them an epoch, over and over."""

    def __init__(self, batches: Sequence[Batch], labels: Tensor, *, num_classes: int, count: int) -> None:
        self.batches, self.labels, self.num_classes, self.count = list(batches), labels, num_classes, count

    def __len__(self) -> int:
        return self.count

    def epoch(self, epoch: int, selected: Tensor | None = None) -> Iterator[Batch]:
        yield from itertools.islice(itertools.cycle(self.batches), self.count)

    def picture(self, index: int) -> Tensor:
        raise ValueError("prepared batches have no pictures")


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
    """Noise of `shape` (channels, height, width): the first `distinct` batches of an epoch of `size` samples, of which
    the `selected` come first; `batches` of them make an epoch."""
    draws = torch.Generator(device).manual_seed(1)
    noise = torch.randn(distinct * batch, *shape, generator=draws, device=device)
    labels = torch.randint(classes, (size,), generator=torch.Generator().manual_seed(1))
    orders = epoch_batches(size, batch, seed=0, epoch=0, shuffle=True, selected=selected)
    made = [
        Batch(noise[i * batch : i * batch + len(order)], labels[order].to(device), order)
        for i, order in enumerate(orders[:distinct])
    ]
    return Prepared(made, labels, num_classes=classes, count=batches)


class _Indexed(Dataset[tuple[Tensor, int, int]]):
    """What mdistiller's datasets give: the transformed picture, its class, its index; samples may repeat."""

    def __init__(self, get: Callable[[int], tuple[Any, int]], rows: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.get, self.rows, self.transform = get, rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, target = self.get(int(self.rows[index]))
        return self.transform(image), target, index


class Published:
    """A Loader as mdistiller writes it: PIL pictures, torchvision's transforms, DataLoader with workers."""

    def __init__(
        self,
        get: Callable[[int], tuple[Any, int]],
        labels: Tensor,
        rows: Tensor,
        transform: Callable[[Any], Tensor],
        *,
        num_classes: int,
        batch_size: int,
        workers: int,
        shuffle: bool = True,
    ) -> None:
        self.labels, self.num_classes = labels[rows], num_classes
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

    def picture(self, index: int) -> Tensor:
        raise ValueError("the published loader has no pictures")


def made_photographs(folder: Path, count: int = 64) -> Path:
    """`count` JPEGs of about ImageNet's sizes and detail in 8 classes under `folder`; returns it. Needs Pillow."""
    from PIL import Image

    draws = np.random.default_rng(0)
    for i in range(count):
        height, width = 333 + 21 * (i % 9), 500 - 17 * (i % 7)
        y, x = np.mgrid[0:height, 0:width]
        waves = [128 + 90 * np.sin((x * (k + 1) + y * (i % 5 + 1)) / 23.0) for k in range(3)]
        pixels = np.stack(waves, axis=2) + draws.normal(0, 12, (height, width, 3))
        path = folder / f"class{i % 8}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return folder


@dataclass(frozen=True)
class Photographs:
    """A folder of JPEGs by class, and what they are."""

    root: Path
    words: str


def photographs(scratch: Path) -> Photographs:
    """The real ones of $LRDS_DATA, else made ones in `scratch`."""
    shared = os.environ.get("LRDS_DATA")
    real = Path(shared or "") / "imagenet_jpegs"
    if shared and real.is_dir():
        return Photographs(real, "ImageNet photographs")
    return Photographs(made_photographs(scratch), "made JPEGs")


def repeated(size: int, count: int) -> Tensor:
    """(count,) int64: 0 .. size - 1 over and over."""
    return torch.arange(count) % size


def photograph_loader(
    kind: str,
    found: Photographs,
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
    source = Folder(found.root)
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

    folder = datasets.ImageFolder(str(found.root))
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
        num_classes=len(source.classes),
        batch_size=batch_size,
        workers=workers,
        shuffle=shuffle,
    )


def photograph_kinds() -> tuple[list[str], list[str]]:
    """(kinds of photograph_loader that can be used here, reasons why others cannot)."""
    kinds, reasons = [], []
    if lacking := missing("PIL"):
        return [], [f"photographs: {lacking} is not installed"]
    if lacking := missing("torchvision"):
        reasons.append(f"torchvision's loaders: {lacking} is not installed")
    else:
        kinds += ["published", "torchvision"]
    if has_dali():
        kinds.append("DALI")
    else:
        reasons.append("DALI's loader: nvidia.dali is not installed")
    return kinds, reasons


def cifar_pictures(count: int) -> tuple[Tensor, Tensor, str]:
    """(count, 3, 32, 32) uint8, (count,) int64 and what they are."""
    shared = os.environ.get("LRDS_DATA")
    if shared and (Path(shared) / "cifar100").is_dir():
        found = cifar(100)
        rows = repeated(len(found.train_labels), count)
        return found.train_images[rows], found.train_labels[rows], "CIFAR-100"
    draws = torch.Generator().manual_seed(2)
    images = torch.randint(256, (count, 3, 32, 32), generator=draws, dtype=torch.uint8)
    return images, torch.randint(100, (count,), generator=draws), "noise of CIFAR's shape"


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
        num_classes=100,
        batch_size=batch_size,
        workers=workers,
    )


def cifar_kinds() -> tuple[list[str], list[str]]:
    """(kinds of cifar_loader that can be used here, reasons why others cannot)."""
    lacking = missing("torchvision", "PIL")
    if lacking:
        return ["in memory"], [f"the published CIFAR loader: {lacking} is not installed"]
    return ["published", "in memory"], []
