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
from lrds_fast.influence.ranks import Ranks


class FeatureModel(Protocol):
    """A classifier that also gives the input of its last linear layer; see lrds_fast.models.create."""

    def forward_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, features)."""


class Outputs(NamedTuple):
    """What a network says of a split, in index order: logits (N, C), features (N, d), both float32 on the CPU."""

    logits: Tensor
    features: Tensor


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
) -> tuple[float, float]:
    """(accuracy in [0, 1], mean cross-entropy in nats) over every sample of a split; restores the training mode.

    ranks: the processes that divide the split among them; all get the same numbers."""
    ranks = ranks or Ranks()
    own: dict[str, Any] = {} if ranks.count == 1 else {"share": (ranks.rank, ranks.count)}
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for batch in loader.epoch(0, **own):
            if not len(batch.indices):  # fewer samples than processes
                continue
            target = batch.targets.to(device, non_blocking=True)
            with autocast():
                logits = model(batch.images.to(device, non_blocking=True, memory_format=memory_format))
            logits = logits.float()
            sums[0] += (logits.argmax(dim=1) == target).sum()
            sums[1] += F.cross_entropy(logits, target, reduction="sum")
    model.train(was_training)
    correct, total = ranks.sum(sums).tolist()
    rows = max(len(loader.labels), 1)
    return correct / rows, total / rows


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
