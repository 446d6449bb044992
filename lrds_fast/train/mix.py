"""MixUp and CutMix: pictures and labels of two samples in one, repeatable by seed, epoch and step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast.data import derived_seed


class Mix:
    """Mixes every row of a batch with another of its kind: those with a teacher among themselves, and the others.

    mixup, cutmix: parameters alpha of the Beta distribution that shares are drawn from (Zhang et al. 2018, Yun et al.
    2019); 0 is off, with both one of them is drawn for each batch and kind. probability: of mixing them at all.
    torchvision's transforms do the mixing.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, *, probability: float = 1.0) -> None:
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise ImportError(
                f"data.mixup and data.cutmix need torchvision: pip install torchvision ({error})"
            ) from error
        self._probability, self._num_classes = probability, num_classes
        self._kinds: list[Any] = []
        if mixup:
            self._kinds.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix:
            self._kinds.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def __call__(self, images: Tensor, target: Tensor, first: int, *seed: int | str) -> tuple[Tensor, Tensor]:
        """(images, target (N, C) float32) of images (N, channels, height, width) and target (N,) int64.

        first: so many rows are one kind, the rest the other. seed: whatever the draws depend on.
        """
        parts = []
        with torch.random.fork_rng(devices=[]):
            for number, rows in enumerate((slice(None, first), slice(first, None))):
                if len(target[rows]):
                    torch.manual_seed(derived_seed("mix", *seed, number))
                    kind = self._kinds[int(torch.randint(len(self._kinds), ()))]
                    if float(torch.rand(())) < self._probability:
                        parts.append(kind(images[rows], target[rows]))
                    else:
                        parts.append((images[rows], F.one_hot(target[rows], self._num_classes).float()))
        mixed, shares = zip(*parts, strict=True)
        return (mixed[0], shares[0]) if len(parts) == 1 else (torch.cat(mixed), torch.cat(shares))
