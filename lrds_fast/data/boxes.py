"""What is cut out of a picture, drawn per sample, seed and epoch: the same for every reader. Sizes from headers."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrds_fast.data.loader import derived_seed
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
            height, width = picture_size(source.read(row))
        except (OSError, ValueError):
            continue
        box = centre_box(height, width, size) if seeds is None else random_box(height, width, size, seeds[i])
        found[i] = torch.tensor((*box[:4], box.mirrored), dtype=torch.int32)
    return found


def picture_size(data: np.ndarray) -> tuple[int, int]:
    """(height, width) from a file's header; ValueError where there is none."""
    raw = data[:64].tobytes()
    if raw[:8] == b"\x89PNG\r\n\x1a\n" and len(raw) >= 24:
        return int.from_bytes(raw[20:24], "big"), int.from_bytes(raw[16:20], "big")
    if raw[:2] == b"\xff\xd8":
        return _jpeg_size(memoryview(data))  # type: ignore[arg-type]
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data.tobytes())) as opened:
            return opened.height, opened.width
    except OSError as error:
        raise ValueError(str(error)) from error


def _jpeg_size(data: memoryview) -> tuple[int, int]:
    """The frame header's height and width: segments are skipped by their lengths."""
    at = 2
    while at + 9 < len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            if height and width:
                return height, width
            break
        if marker in (0x01, 0xD8) or 0xD0 <= marker <= 0xD7:
            at += 2
            continue
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    raise ValueError("a JPEG without a frame header")
