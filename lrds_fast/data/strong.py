"""Strong augmentation, drawn per sample: RandAugment, cutout, random erasing; and a second view of every sample.

The result depends only on the picture and on its seed, which is derived from the run's seed, the epoch and the sample's
index. It depends neither on the batch nor on the reader, and no global generator is used, so that threads may augment.
torchvision's functions for tensors transform the pixels, on the CPU or the GPU, for all samples of a batch at once that
have the same operation and value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrds_fast.data.loader import Batch, Loader, derived_seed
from lrds_fast.recipe.rand_augment import parse_rand_augment
from lrds_fast.recipe.recipe import DataOptions

#: Level of cutouts, and of pixels from outside the picture after it was moved.
GREY = 128


@dataclass(frozen=True)
class Strong:
    """Augmentation of a picture after cropping and mirroring; none by default.

    rand_augment: a policy, see parse_rand_augment; "" is none. erasing: the probability that a box is replaced by
    normal noise, after normalisation. cutout: a grey square, half as wide as the picture, around a uniform point, is
    clipped at the border. stream: a part of the seeds, so that two views of one sample differ.
    ValueError for values out of range, ImportError if rand_augment needs torchvision and it is missing.
    """

    rand_augment: str = ""
    erasing: float = 0.0
    cutout: bool = False
    stream: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.erasing <= 1:
            raise ValueError(f"data.erasing must be in [0, 1]; got {self.erasing}")
        if self.rand_augment:
            parse_rand_augment(self.rand_augment)
            _functions()

    @property
    def moves_pixels(self) -> bool:
        """Whether augment does anything."""
        return bool(self.rand_augment) or self.cutout

    def seed(self, seed: int, view: int, index: int) -> int:
        """A sample's seed for augment and erase. view: the epoch whose augmentation it is."""
        return derived_seed(f"strong{self.stream}", seed, view, index)

    def augment(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """RandAugment and cutout of images (N, 1 or 3, H, W), uint8 or floating in [0, 1]; seeds: one per image.

        Returns images of the same shape and dtype and leaves the argument as it is. Floating images are rounded to 8
        bits in between.
        """
        if not self.moves_pixels:
            return images
        whole = images.dtype == torch.uint8
        pixels = images.clone() if whole else (images * 255.0).round().clamp(0, 255).to(torch.uint8)
        if self.rand_augment:
            policy = parse_rand_augment(self.rand_augment)
            plans = [policy.plan(derived_seed("rand augment", seed)) for seed in seeds]
            for step in zip(*plans, strict=True):
                groups: dict[tuple[str, float], list[int]] = {}
                for row, drawn in enumerate(step):
                    groups.setdefault(drawn, []).append(row)
                for (name, value), rows in groups.items():
                    if name:
                        pixels[rows] = apply(name, pixels[rows], value)
        if self.cutout:
            for picture, seed in zip(pixels, seeds, strict=True):
                _cut_out(picture, seed)
        return pixels if whole else pixels.to(images.dtype) / 255.0

    def erase(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Random erasing of normalised images (N, C, H, W), in place; returns the images. seeds: one per image.

        As in Zhong et al., "Random Erasing Data Augmentation", 2020: 2% to a third of the area, a ratio of height to
        width from 0.3 to 1 / 0.3, noise per pixel."""
        if self.erasing:
            for picture, seed in zip(images, seeds, strict=True):
                _erase(picture, self.erasing, seed)
        return images


#: No strong augmentation.
PLAIN = Strong()


def second_view(name: str) -> Strong | None:
    """The augmentation of a second view by its name, a value of data.second_view; None for "". "strong": RandAugment(2,
    10) and cutout, each operation with probability 1/2 and a uniform magnitude, as in Sohn et al., "FixMatch", 2020."""
    if name not in ("", "strong"):
        raise ValueError(f"data.second_view must be '' or 'strong'; got {name!r}")
    return Strong(rand_augment="m10-n2-mstdinf", cutout=True, stream=" second") if name else None


def training_views(options: DataOptions) -> tuple[Strong, Strong | None]:
    """The augmentation of training pictures after cropping, and that of their second view (None: no second view)."""
    return Strong(options.rand_augment, options.erasing), second_view(options.second_view)


def apply(name: str, images: Tensor, value: float) -> Tensor:
    """Applies one of RandAugment's OPERATIONS to images (N, 1 or 3, H, W) uint8. value, by operation: degrees, number
    of bits, a threshold, an addend, a factor, the tangent of the shear's angle, or a share of the side."""
    f = _functions()
    if name in ("autocontrast", "equalize", "invert"):
        return _tensor(getattr(f, name)(images))
    if name == "posterize":
        return _tensor(f.posterize(images, int(value)))
    if name == "solarize":
        return images if value > 255 else _tensor(f.solarize(images, value))
    if name == "solarize_add":
        return torch.where(images < 128, images.int() + int(value), images.int()).to(torch.uint8)
    if name == "color":
        return _tensor(f.adjust_saturation(images, value))
    if name in ("contrast", "brightness", "sharpness"):
        return _tensor(getattr(f, f"adjust_{name}")(images, value))
    fill = [float(GREY)] * images.shape[1]
    bilinear = f.InterpolationMode.BILINEAR
    if name == "rotate":
        return _tensor(f.rotate(images, value, interpolation=bilinear, fill=fill))
    height, width = images.shape[2:]
    degrees = math.degrees(math.atan(value))
    shear = {"shear_x": [degrees, 0.0], "shear_y": [0.0, degrees]}.get(name, [0.0, 0.0])
    moved = {"translate_x": [round(value * width), 0], "translate_y": [0, round(value * height)]}.get(name, [0, 0])
    # Pillow shears about the corner.
    centre = [0.0, 0.0] if name.startswith("shear") else None
    return _tensor(
        f.affine(
            images,
            angle=0.0,
            translate=moved,
            scale=1.0,
            shear=shear,
            center=centre,
            interpolation=bilinear,
            fill=fill,
        )
    )


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"torchvision gave {type(value).__name__} for a tensor")
    return value


def _functions() -> Any:
    try:
        from torchvision.transforms.v2 import functional
    except ImportError as error:
        raise ImportError(f"data.rand_augment needs torchvision: pip install torchvision ({error})") from error
    return functional


def _cut_out(picture: Tensor, seed: int) -> None:
    """Cutout of an image (C, H, W), in place."""
    height, width = picture.shape[1:]
    draws = np.random.Generator(np.random.PCG64(derived_seed("cutout", seed)))
    side = max(1, width // 2)
    top, left = int(draws.integers(height)) - side // 2, int(draws.integers(width)) - side // 2
    picture[:, max(top, 0) : top + side, max(left, 0) : left + side] = GREY


def _erase(picture: Tensor, probability: float, seed: int) -> None:
    """Random erasing of an image (C, H, W), in place, after up to ten draws of a box that fits."""
    channels, height, width = picture.shape
    draws = np.random.Generator(np.random.PCG64(derived_seed("erase", seed)))
    if draws.random() >= probability:
        return
    for _ in range(10):
        area = draws.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(draws.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(draws.integers(height - h + 1)), int(draws.integers(width - w + 1))
            noise = torch.from_numpy(draws.standard_normal((channels, h, w), dtype=np.float32))
            picture[:, top : top + h, left : left + w] = noise.to(picture.device, picture.dtype)
            return


class TwoViews:
    """A Loader whose batches have two views of each sample: `images` of the first loader, `strong` of the second.

    first, second: loaders over the same samples with the same seed and batch size. Everything but `strong` comes from
    the first. ValueError if their labels differ; RuntimeError, while iterating, if their order does.
    """

    def __init__(self, first: Loader, second: Loader) -> None:
        if not torch.equal(first.labels, second.labels):
            raise ValueError("the loaders of two views must be over the same samples; their labels differ")
        self.first, self.second = first, second
        self.num_classes, self.labels = first.num_classes, first.labels

    def __len__(self) -> int:
        return len(self.first)

    def epoch(self, epoch: int, selected: Tensor | None = None, **options: Any) -> Iterator[Batch]:
        """See Loader.epoch; options are passed to both loaders."""
        batches = self.first.epoch(epoch, selected, **options), self.second.epoch(epoch, selected, **options)
        for one, other in zip(*batches, strict=True):
            if not torch.equal(one.indices, other.indices):
                raise RuntimeError(
                    f"the two views have different samples in epoch {epoch}: the loaders' seeds or batch sizes differ"
                )
            yield one._replace(strong=other.images)

    def boxes(self, epoch: int, indices: Tensor) -> Tensor:
        """The first loader's boxes; see Loader.boxes."""
        return self.first.boxes(epoch, indices)

    def picture(self, index: int) -> Tensor:
        """See Loader.picture."""
        return self.first.picture(index)

    @property
    def errors(self) -> list[tuple[int, str, str]]:
        """(index, name, reason) of each unreadable picture; they are the same for both loaders."""
        return list(getattr(self.first, "errors", []))
