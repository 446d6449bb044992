"""Crops of pictures, drawn per sample, seed and epoch, the same for every reader."""

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
from lrds_fast.data.transform import shorter_side

#: RandomResizedCrop's range of the crop's share of the area, and of its ratio of width to height (Szegedy et al. 2015).
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


class Box(NamedTuple):
    """A crop, in pixels. The region [top, top + height) x [left, left + width) is decoded and resized to
    (resized_height, resized_width). The image_size x image_size square from (down, right) on is used, mirrored or not.
    """

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
    """The seed of a sample's box. view: the epoch whose augmentation it is; stream: see Strong."""
    return derived_seed(f"crop{stream}", seed, view, index)


def random_box(height: int, width: int, size: int, seed: int) -> Box:
    """RandomResizedCrop(size) and RandomHorizontalFlip: up to ten draws of an area and a ratio; if no crop fits, the
    largest central one within RATIO."""
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
    """Resize(size / 0.875) of the shorter side and CenterCrop(size), with torchvision's rounding."""
    shorter = shorter_side(size)
    if height <= width:
        h, w = shorter, max(shorter, int(shorter * width / height))
    else:
        h, w = max(shorter, int(shorter * height / width)), shorter
    return Box(0, 0, height, width, h, w, round((h - size) / 2), round((w - size) / 2), False)


def geometry(source: Source, rows: Tensor, seeds: Sequence[int] | None, size: int) -> Tensor:
    """(N, 5) int32: top, left, height, width and mirrored of the boxes that `seeds` draw in the pictures `rows`, (N,)
    int64; without seeds, the whole pictures. Reads the files' headers; an unreadable picture has zeros."""
    boxes = torch.zeros(len(rows), 5, dtype=torch.int32)
    for i, row in enumerate(rows.tolist()):
        try:
            with reading():
                height, width = picture_size(source.read(row))
        except Unreadable:
            continue
        box = centre_box(height, width, size) if seeds is None else random_box(height, width, size, seeds[i])
        boxes[i] = torch.tensor((*box[:4], box.mirrored), dtype=torch.int32)
    return boxes
