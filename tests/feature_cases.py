"""A pair of small networks, a batch and the loss between them, for the tests of feature distillation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrds_fast import models
from lrds_fast.features.distillation import FeatureDistillation
from lrds_fast.recipe.recipe import FeatureOptions

N, CLASSES, SAMPLES = 8, 4, 24
LABELS = torch.arange(SAMPLES) % CLASSES
#: Small enough for a test; what is not here is as published.
SMALL: dict[str, dict[str, float]] = {"crd": {"negatives": 12, "size": 16}, "cc": {"size": 16}}
INDICES = torch.tensor([3, 17, 0, 8, 21, 5, 10, 14])


def batch(rows: int = N) -> tuple[Tensor, Tensor]:
    images = torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return images[:rows], LABELS[INDICES[:rows]]


def pair(student: str = "resnet8", teacher: str = "resnet20") -> tuple[Any, Any]:
    torch.manual_seed(1)
    own, given = models.create(student, num_classes=CLASSES), models.create(teacher, num_classes=CLASSES)
    given.eval().requires_grad_(False)
    return own, given


def features(method: str, student: nn.Module, teacher: nn.Module, **options: Any) -> FeatureDistillation:
    chosen = FeatureOptions(method=method, **({"options": SMALL.get(method, {})} | options))
    return FeatureDistillation(chosen, student, teacher, batch()[0], SAMPLES, LABELS)


def one_loss(loss: FeatureDistillation, student: Any, teacher: Any, rows: Any = None, teacher_rows: int = N) -> Tensor:
    images, target = batch()
    student(images)
    if teacher_rows:
        with torch.no_grad():
            teacher(images[:teacher_rows])
    out: Tensor = loss(target, INDICES, rows)
    return out


def maps(network: Any, images: Tensor) -> list[Tensor]:
    """The outputs of layer1 to layer3 of a CIFAR ResNet, computed step by step."""
    x = F.relu(network.bn1(network.conv1(images)))
    found = []
    for stage in (network.layer1, network.layer2, network.layer3):
        x = stage(x)
        found.append(x)
    return found
