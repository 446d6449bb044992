"""Data sets that fit in memory: tensors, .npz files, the digits of scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast.data.loader import Batch, batch_count, epoch_batches, generator


class MemoryLoader:
    """A Loader over tensors; see Loader for its methods.

    images: (size, channels, height, width), uint8 (divided by 255) or floating in [0, 1]. targets: (size,) integers in
    [0, num_classes). augment: "none", "shift" (random shift by up to an eighth of the side), or "crop-flip" (the same
    and a mirror image half of the time). mean, std: per channel, taken off after augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        num_classes: int,
        batch_size: int = 64,
        seed: int = 0,
        shuffle: bool = False,
        augment: str = "none",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        if images.dim() != 4:
            raise ValueError(
                f"images must have 4 dimensions (size, channels, height, width); got {tuple(images.shape)}"
            )
        if targets.shape != images.shape[:1]:
            raise ValueError(
                f"targets must have shape ({len(images)},), as there are images; got {tuple(targets.shape)}"
            )
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(f"targets must be integers; got {targets.dtype}")
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
            raise ValueError(
                f"targets must be in [0, {num_classes}); got {int(targets.min())} .. {int(targets.max())}:"
                " correct num_classes or the labels"
            )
        if augment not in ("none", "shift", "crop-flip"):
            raise ValueError(f"augment must be 'none', 'shift' or 'crop-flip' for data in memory; got {augment!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        self.images = images
        self.labels = targets.long()
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.augment = augment
        self.mean = None if mean is None else torch.tensor(mean).view(-1, 1, 1)
        self.std = None if std is None else torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return batch_count(len(self.images), self.batch_size)

    def epoch(self, epoch: int, selected: Tensor | None = None) -> Iterator[Batch]:
        for index in epoch_batches(
            len(self.images),
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            selected=selected,
        ):
            images = self._as_float(self.images[index])
            if self.augment != "none":
                images = self._augmented(images, index, epoch)
            if self.mean is not None:
                images = images - self.mean
            if self.std is not None:
                images = images / self.std
            yield Batch(images, self.labels[index], index)

    def picture(self, index: int) -> Tensor:
        pixels = self._as_float(self.images[index]) * 255.0
        return pixels.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0)

    @staticmethod
    def _as_float(images: Tensor) -> Tensor:
        return images.float() / 255.0 if images.dtype == torch.uint8 else images.float()

    def _augmented(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        """One draw per sample of the split and epoch, so that a sample's picture does not depend on its batch."""
        draws = generator("augment", self.seed, epoch)
        reach = max(1, self.images.shape[-1] // 8)
        shifts = torch.randint(0, 2 * reach + 1, (len(self.images), 2), generator=draws)[index]
        height, width = images.shape[-2:]
        padded = F.pad(images, (reach, reach, reach, reach))
        rows = shifts[:, 0, None] + torch.arange(height)
        columns = shifts[:, 1, None] + torch.arange(width)
        if self.augment == "crop-flip":
            mirrored = torch.rand(len(self.images), generator=draws)[index] < 0.5
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        batch = torch.arange(len(images))[:, None, None]
        return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits of 8 x 8: images (1797, 1, 8, 8) float32 in [0, 1], targets (1797,) int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"data 'digits' needs scikit-learn: pip install scikit-learn ({error})") from error
    bunch = load_digits()
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32) / 16.0)
    return images[:, None], torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))


def from_npz(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, test images, test labels) of a .npz file with these arrays:

    train_images, test_images: (size, height, width) or (size, height, width, channels), uint8 or floating in [0, 1];
    train_labels, test_labels: (size,) integers. No pickled objects are read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.root: there is no file {path}; name an existing .npz file")
    names = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise KeyError(", ".join(missing))
            arrays = [archive[name] for name in names]
    except KeyError as error:
        raise ValueError(f"{path} lacks the array(s) {error.args[0]}; it must hold {', '.join(names)}") from None
    except Exception as error:  # zipfile and numpy raise half a dozen unrelated types for a damaged file
        raise ValueError(f"{path} is not a readable .npz file: {error}") from error
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    for i in (0, 2):
        if tensors[i].dim() == 3:
            tensors[i] = tensors[i][..., None]
        if tensors[i].dim() != 4:
            raise ValueError(f"{path}: {names[i]} must have 3 or 4 dimensions; got {tuple(arrays[i].shape)}")
        tensors[i] = tensors[i].permute(0, 3, 1, 2).contiguous()
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], tuple(tensors))
