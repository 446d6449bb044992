"""MixUp and CutMix of a batch, deterministic in seed, epoch and step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast.data import derived_seed


class Mix:
    """Mixes rows that have a teacher with each other, and rows without one with each other.

    mixup, cutmix: parameter alpha of the Beta distribution of the mixing shares (Zhang et al. 2018, Yun et al. 2019); 0
    is off. With both, one of them is drawn for each group of rows. probability: that a group is mixed. The mixing is
    torchvision's.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, *, probability: float = 1.0) -> None:
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise ImportError(
                f"data.mixup and data.cutmix need torchvision: pip install torchvision ({error})"
            ) from error
        self._probability, self._num_classes = probability, num_classes
        self._transforms: list[Any] = []
        if mixup:
            self._transforms.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix:
            self._transforms.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def __call__(self, images: Tensor, target: Tensor, teacher_rows: int, *seed: int | str) -> tuple[Tensor, Tensor]:
        """Mixed images (N, channels, height, width), and labels (N, C) float32, from images and target (N,) int64.

        teacher_rows: the first so many rows have a teacher. seed: everything that the random draws depend on.
        """
        parts = []
        with torch.random.fork_rng(devices=[]):
            for number, rows in enumerate((slice(None, teacher_rows), slice(teacher_rows, None))):
                if len(target[rows]):
                    torch.manual_seed(derived_seed("mix", *seed, number))
                    transform = self._transforms[int(torch.randint(len(self._transforms), ()))]
                    if float(torch.rand(())) < self._probability:
                        parts.append(transform(images[rows], target[rows]))
                    else:
                        parts.append((images[rows], F.one_hot(target[rows], self._num_classes).float()))
        mixed, labels = zip(*parts, strict=True)
        return (mixed[0], labels[0]) if len(parts) == 1 else (torch.cat(mixed), torch.cat(labels))
