"""Which features are read: module names, the default ones of each network family, and the hooks that read them.

A place is a module's name and stands for the module's output; "NAME:input" is its input, "NAME:relu" the ReLU of its
output, for networks that apply the ReLU outside of the module.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrds_fast.models.external import External
from lrds_fast.models.mobilenet_cifar import MobileNetV2
from lrds_fast.models.small import SmallCNN
from lrds_fast.models.vgg_cifar import CifarVGG
from lrds_fast.models.wrn_cifar import WideResNet
from lrds_fast.recipe.feature_methods import METHODS

_READINGS = ("output", "input", "relu")
#: Module names that an error lists at most.
_LISTED = 40


def unwrapped(network: nn.Module, role: str) -> nn.Module:
    """The network whose module names count: inside DistributedDataParallel and the torchvision: and timm: wrapper.

    role: "student" or "teacher", for errors. ValueError for a network compiled by torch.compile."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network = network.module
    if hasattr(network, "_orig_mod") or getattr(network, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"features.method cannot be combined with torch.compile, whose code skips forward hooks: pass the"
            f" uncompiled {role}"
        )
    return network.net if isinstance(network, External) else network


def usual_stages(network: nn.Module) -> list[str]:
    """The places of the feature maps that the literature compares, shallow to deep, without the stem; [] for an unknown
    network."""
    if isinstance(network, CifarVGG):
        return [f"block{i}:relu" for i in range(1, 5)]
    if isinstance(network, WideResNet):
        return ["block1", "block2", "block3"]
    if isinstance(network, MobileNetV2):
        return ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]
    if isinstance(network, SmallCNN):
        return ["conv1:relu", "conv2:relu"]
    layers = [name for name, _ in network.named_children() if name in ("layer1", "layer2", "layer3", "layer4")]
    if len(layers) > 2:
        return layers
    # timm lists its networks' maps; reductions below 4 belong to the stem.
    info: Any = getattr(network, "feature_info", None)
    maps = [entry for entry in info if entry.get("reduction", 0) >= 4] if isinstance(info, list) else []
    return [entry["module"] for entry in maps] if len({entry["reduction"] for entry in maps}) > 1 else []


def embedding(network: nn.Module) -> str:
    """The place of the last linear layer's input; "" without a linear layer."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return f"{linear[-1]}:input" if linear else ""


def choose(
    method: str,
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Sequence[str] = (),
    teacher_layers: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """(student's places, teacher's places), in pairs: those in student_layers and teacher_layers or, where these are
    empty, the method's defaults. If the networks have different numbers of stages, the deepest are paired. ValueError
    if the defaults are unknown or the numbers of places differ."""
    places = METHODS[method].places
    networks, named = (student, teacher), (list(student_layers), list(teacher_layers))
    if all(named):
        return named
    known = [
        layers or ([embedding(network)] if places == "embedding" else usual_stages(network))
        for network, layers in zip(networks, named, strict=True)
    ]
    for role, network, layers, stages in zip(("student", "teacher"), networks, named, known, strict=True):
        last = embedding(network) if places == "review" else "none"
        if not layers and not (stages and all(stages) and last):
            raise ValueError(
                f"features.{role}_layers: the default modules of {type(network).__name__} for {method!r} are not known;"
                f" choose from {_listing(network)}"
            )
    # Number of stages to pair. "hint" and "last" compare one pair: if one network's place is named, the other network's
    # is chosen among all of its stages. Places named for ReviewKD end with the embedding, which is no stage.
    depth = min(
        len(stages) - (places == "review" and bool(layers))
        for stages, layers in zip(known, named, strict=True)
        if not (layers and places in ("hint", "last"))
    )
    chosen = []
    for network, layers, stages in zip(networks, named, known, strict=True):
        paired = stages[len(stages) - depth :]
        defaults = {
            "hint": paired[:2][-1:],
            "last": paired[-1:],
            "review": [*paired, embedding(network)],
        }
        chosen.append(layers or defaults.get(places, paired))
    if len(chosen[0]) != len(chosen[1]):
        role, default, others = ("teacher", chosen[1], chosen[0]) if named[0] else ("student", chosen[0], chosen[1])
        raise ValueError(
            f"features.{role}_layers: name {len(others)} modules, as many as for the other network; the defaults are"
            f" {', '.join(default)}"
        )
    return chosen[0], chosen[1]


def _listing(network: nn.Module) -> str:
    """Module names for an error, of the upper two levels."""
    names = [name for name, _ in network.named_modules() if name and name.count(".") < 2]
    more = f", ... ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


class Tap:
    """Stores a network's features at some places, from its last forward pass until `take`.

    role: "student" or "teacher", for errors. The student's features are stored only while gradients are enabled, so
    that evaluation stores none. Copies of the network, such as a moving average, store none. ValueError for places that
    the network does not have.
    """

    def __init__(self, network: nn.Module, places: Sequence[str], role: str) -> None:
        self.role = role
        self.places = tuple(places)
        self._features: dict[int, Tensor] = {}
        network = unwrapped(network, role)
        modules = dict(network.named_modules())
        taps = []
        for place in places:
            name, _, reading = place.partition(":")
            reading = reading or "output"
            if reading not in _READINGS:
                raise ValueError(f"features.{role}_layers: {place!r} must end in :input, :relu or neither")
            if not name or name not in modules:
                near = difflib.get_close_matches(name, modules, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"features.{role}_layers: the {role} has no module {name!r}; {hint}it has {_listing(network)}"
                )
            taps.append((modules[name], reading))
        self._handles = [
            module.register_forward_hook(self._hook(module, number, reading))
            for number, (module, reading) in enumerate(taps)
        ]

    def _hook(self, owner: nn.Module, number: int, reading: str) -> Callable[..., None]:
        # A closure, not a method: a copy of the network must not copy the stored features.
        features, student = self._features, self.role == "student"

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if module is not owner or (student and not torch.is_grad_enabled()):
                return
            value = arguments[0] if reading == "input" and arguments else output
            if isinstance(value, Tensor):
                features[number] = F.relu(value) if reading == "relu" else value

        return hook

    def take(self) -> list[Tensor]:
        """Returns the stored features in the order of the places and releases them; [] if the network did not run."""
        taken = [self._features[number] for number in sorted(self._features)]
        self._features.clear()
        if taken and len(taken) < len(self.places):
            raise ValueError(
                f"features.{self.role}_layers: {', '.join(self.places)}: not all of these modules run and return a"
                f" tensor in a forward pass of the {self.role}; name others"
            )
        return taken

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._features.clear()
