"""Evaluation of a network on a split: accuracy, calibration, logits and features."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lrds_fast.data import Loader
from lrds_fast.ranks import Ranks

#: Bins of confidence for the calibration error.
BINS = 15


class FeatureModel(Protocol):
    """A classifier that also gives the input of its last linear layer; see lrds_fast.models.create."""

    def forward_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, features)."""


class Outputs(NamedTuple):
    """A network's outputs on a split, in index order: logits (N, C), features (N, d), both float32 on the CPU."""

    logits: Tensor
    features: Tensor


class Evaluation(NamedTuple):
    """The evaluation of a network on a split. accuracy: in [0, 1]; cross_entropy: mean, in nats.

    bins: (15, 3) float64 on the CPU. Row k has the number of samples whose confidence, the highest probability, lies in
    (k / 15, (k + 1) / 15], the sum of their confidences, and how many of them are classified correctly. classes: (C, 2)
    float64, the samples of every class and how many of them are classified correctly.
    """

    accuracy: float
    cross_entropy: float
    bins: Tensor
    classes: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]: mean |accuracy - confidence| of the bins, weighted by their rows (Guo
        et al., "On Calibration of Modern Neural Networks", 2017)."""
        return float((self.bins[:, 2] - self.bins[:, 1]).abs().sum() / self.bins[:, 0].sum().clamp(min=1))

    def parts(self) -> dict[str, Any]:
        """The evaluation for JSON: accuracy, cross_entropy and ece; bins as (rows, mean confidence, accuracy), without
        empty ones; classes as (rows, right)."""
        used = self.bins[self.bins[:, 0] > 0]
        return {
            "accuracy": self.accuracy,
            "cross_entropy": self.cross_entropy,
            "ece": self.ece,
            "bins": [[int(rows), total / rows, right / rows] for rows, total, right in used.tolist()],
            "classes": [[int(rows), int(right)] for rows, right in self.classes.tolist()],
        }


def evaluate(
    model: nn.Module,
    loader: Loader,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Accuracy, cross-entropy and calibration over every sample of a split. The model's training mode is restored.

    ranks: the processes that share the split; all get the same numbers."""
    ranks = ranks or Ranks()
    share: dict[str, Any] = {} if ranks.count == 1 else {"share": (ranks.rank, ranks.count)}
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    bins = torch.zeros(BINS, 3, dtype=torch.float64, device=device)
    classes = torch.zeros(loader.num_classes, 2, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for batch in loader.epoch(0, **share):
            if not len(batch.indices):  # fewer samples than processes
                continue
            target = batch.targets.to(device, non_blocking=True)
            with autocast():
                logits = model(batch.images.to(device, non_blocking=True, memory_format=memory_format))
            logits = logits.float()
            right = (logits.argmax(dim=1) == target).double()
            totals[0] += right.sum()
            totals[1] += F.cross_entropy(logits, target, reduction="sum")
            confidence = logits.softmax(dim=1).amax(dim=1).double().nan_to_num(0.0)
            place = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
            ones = torch.ones_like(right)
            bins.index_add_(0, place, torch.stack([ones, confidence, right], dim=1))
            classes.index_add_(0, target, torch.stack([ones, right], dim=1))
    model.train(was_training)
    flat = ranks.sum(torch.cat([totals, bins.flatten(), classes.flatten()])).cpu()
    rows = max(len(loader.labels), 1)
    correct, total = flat[:2].tolist()
    return Evaluation(
        correct / rows, total / rows, flat[2 : 2 + 3 * BINS].view(BINS, 3), flat[2 + 3 * BINS :].view(-1, 2)
    )


def outputs(model: Any, loader: Loader, device: torch.device, *, progress: bool = False, desc: str = "") -> Outputs:
    """The logits and features of a split. The model is moved to the device and left in eval mode; desc: the progress
    bar's title."""
    model.to(device).eval()
    logits, features, indices = [], [], []
    with torch.inference_mode():
        for batch in tqdm(
            loader.epoch(0), total=len(loader), desc=desc, disable=not progress or sys.stderr is None, leave=False
        ):
            row_logits, row_features = model.forward_with_features(batch.images.to(device, non_blocking=True))
            logits.append(row_logits.float().cpu())
            features.append(row_features.float().cpu())
            indices.append(batch.indices)
    order = torch.cat(indices).argsort()
    return Outputs(torch.cat(logits)[order], torch.cat(features)[order])
