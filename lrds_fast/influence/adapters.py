"""Adapters for models and loaders: from a model's output to logits, from a loader's batch to inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LogitsHook = Callable[[Any], Tensor]
"""A function from a model's output to its logits (B, C)."""

BatchHook = Callable[[Any], Any]
"""A function from a loader's batch to (inputs, targets)."""

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Classifier:
    """A model with its output read as logits.

    name: the model's name in errors. logits: from the model's output to its logits; None: the output is a tensor or has
    an attribute `logits`.
    """

    module: nn.Module
    name: str = "model"
    logits: LogitsHook | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C) logits of inputs (B, ...). Raises TypeError or ValueError if the output has no logits."""
        return self.read(self.module(x), len(x))

    def read(self, output: Any, rows: int) -> Tensor:
        """(rows, C) logits of the module's output."""
        logits = getattr(output, "logits", None) if self.logits is None else self.logits(output)
        if self.logits is None and isinstance(output, Tensor):
            logits = output
        if not isinstance(logits, Tensor):
            if self.logits is not None:
                raise TypeError(
                    f"logits= must return a tensor (B, C); it makes {describe(logits)} of the {self.name}'s output,"
                    f" {describe(output)}"
                )
            index = '"logits"' if isinstance(output, Mapping) else "0"
            raise TypeError(
                f"the {self.name} must return logits (B, C), a tensor or an object with .logits; it returns"
                f" {describe(output)}: pass logits=, for example logits=lambda out: out[{index}]"
            )
        if logits.dim() != 2 or len(logits) != rows:
            raise ValueError(
                f"the {self.name}'s logits must be (B, C), here with B = {rows}; got shape {tuple(logits.shape)}: pass"
                " logits=, a function from the model's output to its logits"
            )
        return logits


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Puts models into eval mode; afterwards each of their modules has the mode that it had before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def classifier(model: nn.Module | Classifier) -> Classifier:
    """The model as a Classifier."""
    return model if isinstance(model, Classifier) else Classifier(model)


def pair(name: str, raw: Any, hook: BatchHook | None, *, labelled: bool) -> tuple[Any, Any]:
    """(inputs, targets) of a batch or a sample, unchecked. With labelled=False targets may be missing (None).

    name: of the data, for errors. Raises TypeError for layouts that need `batch=`.
    """
    parts = raw if hook is None else hook(raw)
    if isinstance(parts, (tuple, list)) and len(parts) >= (2 if labelled else 1):
        return parts[0], parts[1] if len(parts) > 1 else None
    if isinstance(parts, Tensor) and not labelled:
        return parts, None
    layout = "(inputs, targets, ...)" if labelled else "of inputs, or (inputs, ...)"
    if hook is not None:
        raise TypeError(f"batch= must return {layout}; it makes {describe(parts)} of {name}'s batch, {describe(raw)}")
    x, y = "pixel_values", "labels"
    if isinstance(raw, Mapping):
        y = next((key for key in raw if key in _TARGET_KEYS), y)
        x = next((key for key in raw if key not in _TARGET_KEYS), x)
    raise TypeError(
        f"{name} must give batches {layout}; it gives {describe(raw)}: pass batch=, for example"
        f' batch=lambda b: (b["{x}"], b["{y}"])'
    )


def tensors(name: str, raw: Any, start: int, hook: BatchHook | None, *, labelled: bool) -> tuple[Tensor, Tensor]:
    """Inputs (B, ...) and integer targets (B,) of a batch; with labelled=False the targets are (0,).

    name: of the data, start: the number of the batch's first sample, for errors. Raises TypeError or ValueError for
    other batches.
    """
    x, y = pair(name, raw, hook, labelled=labelled)
    if hasattr(x, "__array__") and not isinstance(x, Tensor):
        x = torch.as_tensor(x)
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise TypeError(
            f"{name}: the inputs of a batch must be one tensor (B, ...); got {describe(x)}: pass batch=, a"
            " function from a batch to (inputs, targets)"
        )
    if not labelled:
        return x, x.new_empty(0, dtype=torch.int64)
    if not isinstance(y, Tensor):
        try:
            y = torch.as_tensor(y)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{name}: the targets of a batch must be class indices (B,); got {describe(y)}: pass batch=, a"
                " function from a batch to (inputs, targets)"
            ) from None
    if y.dim() != 1 or len(y) != len(x):
        advice = "; it gives samples, not batches: pass a Dataset, or DataLoader(...)" if y.dim() == 0 else ""
        raise ValueError(
            f"{name}: targets must be (B,) class indices; got shape {tuple(y.shape)} for {len(x)} inputs, from sample"
            f" {start} on{advice}"
        )
    if y.is_floating_point() or y.is_complex():
        raise TypeError(f"{name}: targets must be class indices, of an integer dtype; got {y.dtype}")
    return x, y


def describe(value: Any) -> str:
    """A value's type and the types in it, for an error."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        keys = ", ".join(map(repr, list(value)[:8]))
        return f"a {kind} with keys {keys}" if keys else f"an empty {kind}"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(f"{type(item).__name__}" for item in value[:4])
        return f"a {kind} of {len(value)} ({inside}{', ...' if len(value) > 4 else ''})"
    return f"an object of type {kind}"
