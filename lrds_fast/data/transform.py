"""The evaluation transform of a data set: from a picture file to the tensor that networks were evaluated on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrds_fast.data.pictures import Unreadable, decoded, reading, rgb

#: Mean and standard deviation per channel of ImageNet's training set, with which published networks are trained.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Transform:
    """Scales a picture, cuts out its centre and normalises it, as in evaluation.

    channels: 1 (grey) or 3 (RGB). resize: (height, width) in pixels; the picture is scaled, with its proportions, to
    the smallest size that covers them (bilinear, antialiased). crop: (height, width) of the centre that is kept. mean,
    std: per channel, of levels in [0, 1].
    """

    channels: int
    resize: tuple[int, int]
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: str | Path | Any) -> Tensor:
        """(channels, height, width) float32: (level / 255 - mean) / std.

        picture: a file's path, or a PIL image. Raises FileNotFoundError for a missing file, a ValueError that names the
        file for an unreadable one, ImportError without Pillow.
        """
        image_module = _pillow()
        image = _read(Path(picture)) if isinstance(picture, (str, Path)) else rgb(picture)
        if self.channels == 1:
            image = image.convert("L")
        size = _covering(image.height, image.width, *self.resize)
        if size != (image.height, image.width):
            image = image.resize(size[::-1], image_module.Resampling.BILINEAR)
        height, width = self.crop
        # As torchvision's CenterCrop rounds.
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        pixels = np.asarray(image.crop((left, top, left + width, top + height)))
        levels = torch.from_numpy(pixels.copy()).view(height, width, self.channels).permute(2, 0, 1)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return levels.float().div_(255).sub_(mean).div_(std).contiguous()

    def to_mapping(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Transform:
        """The reverse of to_mapping. Raises ValueError for other values."""
        names = [field.name for field in fields(cls)]
        try:
            channels, resize, crop, mean, std = (values[name] for name in names)
            made = cls(int(channels), _pair(resize), _pair(crop), tuple(map(float, mean)), tuple(map(float, std)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"a transform must have {', '.join(names)}; got {values!r}") from error
        if made.channels not in (1, 3) or not len(made.mean) == len(made.std) == made.channels or 0 in made.std:
            raise ValueError(f"a transform must have 1 or 3 channels, each with a mean and a std; got {values!r}")
        return made


def shorter_side(size: int) -> int:
    """The length in pixels to which a photograph's shorter side is scaled before the centre of `size` is cut out."""
    return round(size / 0.875)


def photograph_transform(size: int) -> Transform:
    """The transform of data sets of encoded pictures, which are decoded to size x size pixels."""
    shorter = shorter_side(size)
    return Transform(3, (shorter, shorter), (size, size), MEAN, STD)


def in_memory_transform(shape: tuple[int, ...], mean: tuple[float, ...], std: tuple[float, ...]) -> Transform | None:
    """The transform that gives a picture file the form of a data set in memory.

    None unless its pictures are grey or RGB. shape: (channels, height, width) of its pictures. mean, std: one value
    stands for all channels; () is 0 and 1.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        return None
    means, stds = (values * channels if len(values) == 1 else values for values in (mean or (0.0,), std or (1.0,)))
    return Transform(channels, (height, width), (height, width), means, stds)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"reading pictures needs Pillow: pip install pillow ({error})") from error
    return Image


def _pair(values: Any) -> tuple[int, int]:
    height, width = map(int, values)
    if height < 1 or width < 1:
        raise ValueError("sizes must be above 0")
    return height, width


def _read(path: Path) -> Any:
    """The file's PIL image in RGB."""
    if not path.exists():
        raise FileNotFoundError(f"there is no picture {path}; correct the path")
    try:
        with reading():
            return decoded(np.fromfile(path, dtype=np.uint8))
    except Unreadable as error:
        raise ValueError(f"{path} is not a readable picture ({error}); replace it or leave it out") from error


def _covering(height: int, width: int, least_height: int, least_width: int) -> tuple[int, int]:
    """The smallest (height, width) with the proportions of a picture that is at least as large as asked. With a square
    this is torchvision's Resize of the shorter side."""
    if width * least_height >= height * least_width:
        return least_height, max(least_width, int(least_height * width / height))
    return max(least_height, int(least_width * height / width)), least_width
