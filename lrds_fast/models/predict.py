"""The classes that a student sees in picture files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lrds_fast.models.student import Student

#: Pictures of one forward pass.
BATCH = 64


class Prediction(NamedTuple):
    """A picture's most probable classes. labels, names, probabilities: of the k classes, the most probable first; empty
    where the picture cannot be read. error: the reason, in one line; "" where it was read."""

    picture: Path
    labels: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    error: str = ""


def predict(student: Student, pictures: Sequence[Path], *, top: int = 5) -> Iterator[Prediction]:
    """The `top` most probable classes of every picture, in order; all classes where there are fewer.

    A missing or unreadable file has a Prediction with its error, and does not stop the others. Raises ValueError for
    top below 1 and for a student whose images no picture file can have.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1; got {top}")
    transform = student.transform
    for start in range(0, len(pictures), BATCH):
        part = pictures[start : start + BATCH]
        errors: dict[int, str] = {}
        images: dict[int, Tensor] = {}
        for place, picture in enumerate(part):
            try:
                images[place] = transform(picture)
            except (ValueError, OSError) as error:  # noqa: PERF203
                errors[place] = str(error)
        rows = iter(_rows(student, list(images.values()), top))
        for place, picture in enumerate(part):
            if place in errors:
                yield Prediction(picture, (), (), (), errors[place])
            else:
                labels, probabilities = next(rows)
                yield Prediction(picture, labels, tuple(student.class_names[k] for k in labels), probabilities)


def _rows(student: Student, images: list[Tensor], top: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """(labels, probabilities) of every image's `top` most probable classes."""
    if not images:
        return []
    device = next(student.parameters()).device
    with torch.inference_mode():
        logits = student(torch.stack(images).to(device)).float()
    best = logits.softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
    return [
        (tuple(labels), tuple(values))
        for labels, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
