"""Label noise and teacher noise, for experiments with unreliable supervision."""

from __future__ import annotations

import torch
from torch import Tensor

from lrds_fast.data.loader import generator


def mislabelled(targets: Tensor, fraction: float, *, num_classes: int, seed: int) -> Tensor:
    """A copy of targets (N,) int64 in which floor(fraction * N + .5) labels are replaced by another class, uniformly.

    seed: draws the samples and their new classes. ValueError for a fraction outside [0, 1) or fewer than 2 classes.
    """
    if not 0.0 <= fraction < 1.0 or num_classes < 2:
        raise ValueError(f"label_noise must be in [0, 1) over at least 2 classes; got {fraction} over {num_classes}")
    draws = generator("label noise", seed)
    rows = torch.randperm(len(targets), generator=draws)[: int(fraction * len(targets) + 0.5)]
    noisy = targets.clone()
    noisy[rows] = (targets[rows] + torch.randint(1, num_classes, (len(rows),), generator=draws)) % num_classes
    return noisy


def answer_sources(size: int, fraction: float, *, seed: int) -> Tensor:
    """(size,) int64: for each sample, the sample whose teacher logits it gets.

    floor(fraction * size + .5) samples, drawn by seed, get the logits of another one; the others get their own.
    ValueError for a fraction outside [0, 1), or where there is no other sample.
    """
    if not 0.0 <= fraction < 1.0 or (fraction and size < 2):
        raise ValueError(f"answer_noise must be in [0, 1), over at least 2 samples; got {fraction} over {size}")
    order = torch.randperm(size, generator=generator("answer noise", seed))
    count = int(fraction * size + 0.5)
    source = torch.arange(size)
    source[order[:count]] = order.roll(1)[:count]
    return source
