"""The networks that models.create knows, with their sizes."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from lrds_fast.models.registry import create, library_names, names

#: (channels, height, width) of the images of the networks for small pictures; the others take CIFAR's.
_SMALL = {
    "mlp": (1, 8, 8),
    "mlp_8x16_32": (1, 8, 16),
    "mlp_8x16_128": (1, 8, 16),
    "small_cnn": (1, 8, 8),
}
_CIFAR = (3, 32, 32)


class _Unallocated(TorchFunctionMode):
    """Layers that are made in this context get weights without storage. The device `meta` would also apply to tensors
    whose values a constructor reads, such as torchvision's widths of RegNet."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        return func(*args, **(options | {"device": "meta"} if func is torch.empty else options))


class Network(NamedTuple):
    """A network. name: for models.create. parameters: their number. input_size: (channels, height, width) of the images
    that it is made for; None where its library does not say. library: lrds_fast, torchvision or timm."""

    name: str
    parameters: int
    input_size: tuple[int, int, int] | None
    library: str


def networks(patterns: Sequence[str] = (), *, num_classes: int = 100) -> Iterator[Network]:
    """The networks whose names match one of the patterns, in the order of the patterns.

    patterns: with the wildcards * and ?, such as "resnet*", "torchvision:resnet*" or "timm:*"; none means all networks
    of this library. num_classes: number of logits, >= 1. Networks that have no linear layer, which models.create does
    not build, are left out. Raises ValueError for a pattern that matches nothing, ImportError where the library that it
    names is missing.
    """
    for pattern in patterns or ("*",):
        library, colon, wanted = pattern.rpartition(":")
        known = library_names(library) if colon else names()
        matching = [name for name in known if fnmatch.fnmatch(name.lower(), wanted.lower())]
        if not matching:
            raise ValueError(
                f"no network matches {pattern!r}; a pattern is NAME, torchvision:NAME or timm:NAME, where * stands for"
                " any text"
            )
        for name in matching:
            found = _network(f"{library}:{name}" if colon else name, library or "lrds_fast", num_classes)
            if found is not None:
                yield found


def _network(name: str, library: str, num_classes: int) -> Network | None:
    try:
        model = _created(name, num_classes)
    except ValueError:
        if library == "lrds_fast":
            raise
        return None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Network(name, parameters, _input_size(name.rpartition(":")[2], library, model), library)


def _created(name: str, num_classes: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, on how some networks draw their weights
        try:
            with _Unallocated():
                return create(name, num_classes=num_classes)
        except RuntimeError:  # a few of timm's constructors run a layer
            return create(name, num_classes=num_classes)


def _input_size(name: str, library: str, model: Any) -> tuple[int, int, int] | None:
    if library == "lrds_fast":
        return _SMALL.get(name, _CIFAR)
    if library == "timm":
        size = getattr(model.net, "pretrained_cfg", {}).get("input_size")
        return None if size is None else tuple(size)
    from torchvision import models as torchvision_models

    weights = list(torchvision_models.get_model_weights(name))
    if not weights:
        return None
    (side,) = weights[-1].transforms().crop_size
    return 3, side, side
