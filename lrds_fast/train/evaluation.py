"""Passes without training: accuracy, features, and whether the class counts agree."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lrds_fast.data import Data, Loader
from lrds_fast.ranks import Ranks

#: Bins of confidence.
BINS = 15


class FeatureModel(Protocol):
    """A classifier that also gives the input of its last linear layer; see lrds_fast.models.create."""

    def forward_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, features)."""


class Outputs(NamedTuple):
    """What a network says of a split, in index order: logits (N, C), features (N, d), both float32 on the CPU."""

    logits: Tensor
    features: Tensor


class Evaluation(NamedTuple):
    """A network on a split. accuracy: in [0, 1]; cross_entropy: mean, in nats.

    bins: (15, 3) float64 on the CPU, of the rows whose confidence, the highest probability, lies in (k / 15,
    (k + 1) / 15]: how many they are, the sum of their confidences, how many are right. classes: (C, 2) float64, the
    rows of every class and how many of them are right.
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
        """All of it, for JSON: accuracy, cross_entropy and ece; bins as (rows, mean confidence, accuracy), those
        without rows left out; classes as (rows, right)."""
        used = self.bins[self.bins[:, 0] > 0]
        return {
            "accuracy": self.accuracy,
            "cross_entropy": self.cross_entropy,
            "ece": self.ece,
            "bins": [[int(rows), total / rows, right / rows] for rows, total, right in used.tolist()],
            "classes": [[int(rows), int(right)] for rows, right in self.classes.tolist()],
        }


def check_class_counts(
    data: Data,
    student: nn.Module,
    teacher: nn.Module | None,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    """ValueError unless student and teacher give as many logits as the data has classes; one row through each tells."""
    first = next(iter(data.test.epoch(0)), None)
    if first is None:
        raise ValueError(f"data {data.name!r} has no test samples")
    image = first.images[:1].to(device, memory_format=memory_format)
    for name, model in (("student", student), ("teacher", teacher)):
        if model is None:
            continue
        was_training = model.training
        try:
            with torch.inference_mode():
                shape = tuple(model.eval()(image).shape)
        except RuntimeError as error:
            raise ValueError(
                f"the {name} does not take images of shape {tuple(image.shape[1:])} of data {data.name!r}:"
                f" {str(error).splitlines()[0]}"
            ) from error
        finally:
            model.train(was_training)
        if shape != (1, data.num_classes):
            raise ValueError(
                f"the {name} gives {shape[-1]} logits per sample, data {data.name!r} has {data.num_classes} classes;"
                " they must be equal"
            )


def evaluate(
    model: nn.Module,
    loader: Loader,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Accuracy, cross-entropy and calibration over every sample of a split; restores the training mode.

    ranks: the processes that divide the split among them; all get the same numbers."""
    ranks = ranks or Ranks()
    own: dict[str, Any] = {} if ranks.count == 1 else {"share": (ranks.rank, ranks.count)}
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    bins = torch.zeros(BINS, 3, dtype=torch.float64, device=device)
    classes = torch.zeros(loader.num_classes, 2, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for batch in loader.epoch(0, **own):
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
    """The logits and features of a split, in index order, in eval mode and float32."""
    model.to(device).eval()
    logits, features, places = [], [], []
    with torch.inference_mode():
        for batch in tqdm(
            loader.epoch(0), total=len(loader), desc=desc, disable=not progress or sys.stderr is None, leave=False
        ):
            row_logits, row_features = model.forward_with_features(batch.images.to(device, non_blocking=True))
            logits.append(row_logits.float().cpu())
            features.append(row_features.float().cpu())
            places.append(batch.indices)
    order = torch.cat(places).argsort()
    return Outputs(torch.cat(logits)[order], torch.cat(features)[order])
