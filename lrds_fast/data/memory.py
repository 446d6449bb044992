"""Data sets in memory: tensors, .npz files, scikit-learn's digits and two-digit numbers made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast.data.class_numbers import numbered
from lrds_fast.data.loader import Batch, batch_count, check_sizes, epoch_batches, generator, view_of
from lrds_fast.data.strong import PLAIN, Strong
from lrds_fast.recipe.recipe import DataOptions


class MemoryLoader:
    """A Loader over tensors; see Loader for its methods.

    images: (size, channels, height, width), uint8 (divided by 255) or floating in [0, 1]. targets: (size,) integers in
    [0, num_classes). augment: "none", "shift" (random shift by up to an eighth of the width, with zero padding), or
    "crop-flip" (the same, and mirrored with probability 1/2). strong: further augmentation. mean, std: per channel, for
    normalisation after augmentation; one value stands for all channels. device: where images are stored and augmented,
    and where batches are; None leaves images on their device.
    least: a last batch of fewer samples is added to the one before it. views: 0 draws new augmentations in every epoch;
    n > 0 gives epoch e the augmentations of epoch e % n, in a new order.
    ValueError for shapes, labels or values that do not fit, TypeError for targets that are not integers.
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
        strong: Strong = PLAIN,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        device: torch.device | str | None = None,
        least: int = 2,
        views: int = 0,
    ) -> None:
        if images.dim() != 4:
            raise ValueError(
                f"images must have 4 dimensions (size, channels, height, width); got {tuple(images.shape)}"
            )
        if targets.shape != images.shape[:1]:
            raise ValueError(
                f"targets must have shape ({len(images)},), as there are images; got {tuple(targets.shape)}"
            )
        targets = as_labels(targets)
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
            raise ValueError(
                f"targets must be in [0, {num_classes}); got {int(targets.min())} .. {int(targets.max())}:"
                " correct num_classes or the labels"
            )
        if augment not in ("none", "shift", "crop-flip"):
            raise ValueError(f"augment must be 'none', 'shift' or 'crop-flip' for data in memory; got {augment!r}")
        check_sizes(batch_size, least, views)
        self.images = images if device is None else images.to(device)
        self.labels = targets.cpu()
        self._targets = self.labels.to(self.images.device)
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.least = least
        self.views = views
        self.seed = seed
        self.shuffle = shuffle
        self.augment = augment
        self.strong = strong
        channels = images.shape[1]
        for key, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) not in (1, channels):
                raise ValueError(f"{key} must have one value per channel, {channels}; got {len(values)}")
        scale = 1.0 / 255.0 if images.dtype == torch.uint8 else 1.0
        # (x * scale - mean) / std = x * factor - offset
        divisor = torch.tensor(std or (1.0,), dtype=torch.float64).view(-1, 1, 1)
        offset = torch.tensor(mean or (0.0,), dtype=torch.float64).view(-1, 1, 1) / divisor
        self._factor = (scale / divisor).float().to(self.images.device)
        self._offset = offset.float().to(self.images.device)

    @classmethod
    def of(
        cls,
        options: DataOptions,
        images: Tensor,
        targets: Tensor,
        *,
        train: bool = False,
        **arguments: Any,
    ) -> MemoryLoader:
        """The loader that a recipe's [data] describes. train: shuffled and augmented, in batches of batch_size; else in
        order, as they are, in batches of eval_batch_size. arguments: of MemoryLoader."""
        if train:
            arguments |= {"batch_size": options.batch_size, "shuffle": True, "augment": options.augment}
        else:
            arguments |= {"batch_size": options.eval_batch_size}
        return cls(images, targets, **arguments)

    def __len__(self) -> int:
        return batch_count(len(self.images), self.batch_size, self.least)

    def epoch(
        self, epoch: int, selected: Tensor | None = None, *, start: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        device = self.images.device
        draws = None if self.augment == "none" else self._draws(view_of(epoch, self.views))
        for index in epoch_batches(
            len(self.images),
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            selected=selected,
            least=self.least,
            start=start,
            share=share,
        ):
            place = index.to(device, non_blocking=True)
            images = self.images[place]
            if draws is not None:
                images = self._moved(images, *(column[place] for column in draws))
            if self.strong == PLAIN:
                images = images.float().mul_(self._factor).sub_(self._offset)
            else:
                seeds = [self.strong.seed(self.seed, view_of(epoch, self.views), i) for i in index.tolist()]
                images = self.strong.augment(images, seeds).float().mul_(self._factor).sub_(self._offset)
                images = self.strong.erase(images, seeds)
            yield Batch(images, self._targets[place], index)

    def boxes(self, epoch: int, indices: Tensor) -> Tensor:
        """See Loader.boxes. height and width are the picture's; top and left are the crop's place in it, from minus to
        plus an eighth of the width."""
        boxes = torch.zeros(len(indices), 5, dtype=torch.int32)
        boxes[:, 2], boxes[:, 3] = self.images.shape[2], self.images.shape[3]
        if self.augment != "none":
            down, right, mirrored = (column.cpu()[indices] for column in self._draws(view_of(epoch, self.views)))
            boxes[:, 0], boxes[:, 1], boxes[:, 4] = down - self._padding, right - self._padding, mirrored
        return boxes

    def picture(self, index: int) -> Tensor:
        image = self.images[index].cpu()
        pixels = image if image.dtype == torch.uint8 else (image.float() * 255.0).clamp(0, 255).round().to(torch.uint8)
        return pixels.permute(1, 2, 0)

    def _draws(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """For every sample of the split, (size,) each: the first row and column of its crop in the padded picture, and
        whether it is mirrored. Drawn for the whole epoch, so that a crop does not depend on the batch."""
        draws = generator(f"augment{self.strong.stream}", self.seed, epoch)
        size, device = len(self.images), self.images.device
        down, right = torch.randint(0, 2 * self._padding + 1, (size, 2), generator=draws).to(device).unbind(dim=1)
        mirrored = torch.zeros(size, dtype=torch.bool)
        if self.augment == "crop-flip":
            mirrored = torch.rand(size, generator=draws) < 0.5
        return down, right, mirrored.to(device)

    @property
    def _padding(self) -> int:
        return max(1, self.images.shape[-1] // 8)

    def _moved(self, images: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
        """Crops (N, C, H, W) of the zero-padded images, from row `down` and column `right`, (N,) each; one gather."""
        batch, channels, height, width = images.shape
        padded = F.pad(images, (self._padding,) * 4)
        rows = down[:, None] + torch.arange(height, device=images.device)
        columns = right[:, None] + torch.arange(width, device=images.device)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        flat = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(batch, 1, height * width)
        cut = padded.flatten(2).gather(2, flat.expand(batch, channels, height * width))
        return cut.view(batch, channels, height, width)


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits of 8 x 8: images (1797, 1, 8, 8) float32 in [0, 1], targets (1797,) int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"data 'digits' needs scikit-learn: pip install scikit-learn ({error})") from error
    bunch = load_digits()
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32) / 16.0)
    return images[:, None], torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))


def two_digit_numbers(images: Tensor, targets: Tensor, count: int, *, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` pictures of numbers from 00 to 99, each of two digits side by side.

    images: (n, 1, 8, 8), targets: (n,) in [0, 10): the digits, drawn with replacement by `draws`. Returns images
    (count, 1, 8, 16) and targets (count,) int64, 10 * tens + units.
    """
    tens, units = torch.randint(len(images), (2, count), generator=draws)
    return torch.cat([images[tens], images[units]], dim=3), 10 * targets[tens] + targets[units]


def from_npz(path: Path, *, first_label: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, test images, test labels) from a .npz file with these arrays:

    train_images, test_images: (size, height, width) or (size, height, width, channels), uint8 or floating in [0, 1];
    train_labels, test_labels: (size,) integers, first_label and above. Pickled objects are not read.
    Returns images (size, channels, height, width) in the file's dtype, and labels int64 from 0. Raises
    FileNotFoundError, and ValueError for other arrays or for shapes that may be (size, channels, height, width).
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.root: there is no file {path}; name an existing .npz file")
    names = ("train_images", "train_labels", "test_images", "test_labels")
    arrays = npz_arrays(path, names)
    for array, name in zip(arrays[1::2], names[1::2], strict=True):
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise ValueError(f"{path}: {name} must be integers of shape (size,); got {array.dtype} of {array.shape}")
    for k in (0, 2):
        if len(arrays[k]) != len(arrays[k + 1]):
            raise ValueError(f"{path}: there are {len(arrays[k])} {names[k]}, but {len(arrays[k + 1])} {names[k + 1]}")
    numbers = [int(number) for array in arrays[1::2] for number in array]
    train = len(arrays[1])

    def where(index: int) -> str:
        return f"{path}: {names[1 if index < train else 3]}[{index if index < train else index - train}]"

    labels, _ = numbered(numbers, where, first=first_label)
    images = [_channels_first(array, f"{path}: {name}") for array, name in zip(arrays[::2], names[::2], strict=True)]
    return images[0], labels[:train], images[1], labels[train:]


def npz_arrays(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The named arrays of a .npz file; ValueError if one is missing or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise KeyError(", ".join(missing))
            return [archive[name] for name in names]
    except KeyError as error:
        raise ValueError(f"{path} lacks the array(s) {error.args[0]}; it must hold {', '.join(names)}") from None
    except MemoryError:
        raise
    except Exception as error:  # zipfile and numpy raise half a dozen unrelated types for a damaged file
        raise ValueError(f"{path} is not a readable .npz file: {error}") from error


def _channels_first(array: np.ndarray, name: str) -> Tensor:
    """(size, height, width) or (size, height, width, channels) as (size, channels, height, width)."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"{name} must be uint8, or floating in [0, 1]; got {array.dtype}")
    if array.ndim not in (3, 4):
        raise ValueError(f"{name} must have 3 or 4 dimensions; got {array.shape}")
    if array.ndim == 4:
        height, width, channels = array.shape[1:]
        likely = height == width != channels or (channels in (1, 3) and height not in (1, 3))
        if not likely and (height in (1, 3) or width == channels):
            raise ValueError(
                f"{name} must be (size, height, width, channels); got {array.shape}, which may be (size, channels,"
                " height, width): save array.transpose(0, 2, 3, 1), or grey pictures as (size, height, width)"
            )
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    tensor = torch.from_numpy(np.ascontiguousarray(native))
    return (tensor[..., None] if tensor.dim() == 3 else tensor).permute(0, 3, 1, 2).contiguous()


def as_labels(targets: Tensor) -> Tensor:
    """(size,) integers as int64; TypeError for other dtypes."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integers; got {targets.dtype}")
    return targets.long()
