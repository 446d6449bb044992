"""What is cut out of a picture, drawn per sample, seed and epoch: the same for every reader. Sizes from headers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrds_fast.data.loader import derived_seed
from lrds_fast.data.pictures import Unreadable, picture_size, reading
from lrds_fast.data.sources import Source

#: Share of the area, and ratio of the sides, of what RandomResizedCrop cuts out (Szegedy et al. 2015).
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


class Box(NamedTuple):
    """What becomes of a picture: the pixels [top, top + height) x [left, left + width) are decoded and resized to
    (resized_height, resized_width); of these the image_size squared from (down, right) on stay, mirrored or not."""

    top: int
    left: int
    height: int
    width: int
    resized_height: int
    resized_width: int
    down: int
    right: int
    mirrored: bool


def crop_seed(seed: int, view: int, index: int, stream: str = "") -> int:
    """What a sample's box is drawn from. view: the epoch whose augmentation it is; stream: see Strong."""
    return derived_seed(f"crop{stream}", seed, view, index)


def random_box(height: int, width: int, size: int, seed: int) -> Box:
    """RandomResizedCrop(size) and RandomHorizontalFlip: ten tries of a random area and ratio, else the largest box
    within the ratios."""
    draws = np.random.Generator(np.random.PCG64(seed))
    mirrored = bool(draws.random() < 0.5)
    for _ in range(10):
        area = height * width * draws.uniform(*SCALE)
        ratio = math.exp(draws.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws.integers(height - h + 1)), int(draws.integers(width - w + 1))
            return Box(top, left, h, w, size, size, 0, 0, mirrored)
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return Box((height - h) // 2, (width - w) // 2, h, w, size, size, 0, 0, mirrored)


def centre_box(height: int, width: int, size: int) -> Box:
    """Resize(size / 0.875) of the shorter side and CenterCrop(size), as torchvision rounds them."""
    shorter = round(size / 0.875)
    if height <= width:
        h, w = shorter, max(shorter, int(shorter * width / height))
    else:
        h, w = max(shorter, int(shorter * height / width)), shorter
    return Box(0, 0, height, width, h, w, round((h - size) / 2), round((w - size) / 2), False)


def geometry(source: Source, rows: Tensor, seeds: Sequence[int] | None, size: int) -> Tensor:
    """(N, 5) int32: top, left, height, width and mirrored of the boxes that the seeds draw in the pictures of `rows`;
    without seeds all of the picture. Zeros where no size can be read."""
    found = torch.zeros(len(rows), 5, dtype=torch.int32)
    for i, row in enumerate(rows.tolist()):
        try:
            with reading():
                height, width = picture_size(source.read(row))
        except Unreadable:
            continue
        box = centre_box(height, width, size) if seeds is None else random_box(height, width, size, seeds[i])
        found[i] = torch.tensor((*box[:4], box.mirrored), dtype=torch.int32)
    return found
