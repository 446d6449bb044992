"""Where features are read: a network's places by name, the usual ones of the families, and the hooks that read them.

A place is a module's name and stands for its output; "NAME:input" is its input, "NAME:relu" its output behind a ReLU
that the network applies by itself.
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
    """The network that has the names: inside DistributedDataParallel and behind torchvision: and timm:."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network = network.module
    if hasattr(network, "_orig_mod") or getattr(network, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"features.method does not go with torch.compile, whose code skips the hooks: pass the {role} as it was"
        )
    return network.net if isinstance(network, External) else network


def usual_stages(network: nn.Module) -> list[str]:
    """The feature maps that the literature compares, shallow to deep, without the stem; [] where it is not known."""
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
    # timm says where its networks' maps are; the stem's are larger than a quarter of the picture.
    info: Any = getattr(network, "feature_info", None)
    maps = [entry for entry in info if entry.get("reduction", 0) >= 4] if isinstance(info, list) else []
    return [entry["module"] for entry in maps] if len({entry["reduction"] for entry in maps}) > 1 else []


def embedding(network: nn.Module) -> str:
    """The input of the last linear layer; "" where there is none."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return f"{linear[-1]}:input" if linear else ""


def choose(
    method: str,
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Sequence[str] = (),
    teacher_layers: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """The places of both, in pairs: those that are named, else the method's usual ones. Of networks with different
    numbers of stages, the deepest are paired. ValueError where the usual places are not known or do not pair."""
    places = METHODS[method].places
    networks, named = (student, teacher), (list(student_layers), list(teacher_layers))
    if all(named):
        return named
    known = [
        given or ([embedding(network)] if places == "embedding" else usual_stages(network))
        for network, given in zip(networks, named, strict=True)
    ]
    for role, network, given, stages in zip(("student", "teacher"), networks, named, known, strict=True):
        last = embedding(network) if places == "review" else "none"
        if not given and not (stages and all(stages) and last):
            raise ValueError(
                f"features.{role}_layers: the usual places of {type(network).__name__} for {method!r} are not known;"
                f" name them, out of {_listing(network)}"
            )
    # A single place that is named is the counterpart of one chosen among all stages of the other network; places that
    # are named for ReviewKD end with the embedding.
    depth = min(
        len(stages) - (places == "review" and bool(given))
        for stages, given in zip(known, named, strict=True)
        if not (given and places in ("hint", "last"))
    )
    chosen = []
    for network, given, stages in zip(networks, named, known, strict=True):
        paired = stages[len(stages) - depth :]
        usual = {
            "hint": paired[:2][-1:],
            "last": paired[-1:],
            "review": [*paired, embedding(network)],
        }
        chosen.append(given or usual.get(places, paired))
    if len(chosen[0]) != len(chosen[1]):
        role, own, others = ("teacher", chosen[1], chosen[0]) if named[0] else ("student", chosen[0], chosen[1])
        raise ValueError(
            f"features.{role}_layers: name {len(others)} places, as many as of the other network; the usual ones are"
            f" {', '.join(own)}"
        )
    return chosen[0], chosen[1]


def _listing(network: nn.Module) -> str:
    """Module names for an error: the upper two levels."""
    names = [name for name, _ in network.named_modules() if name and name.count(".") < 2]
    more = f", ... ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


class Tap:
    """Keeps what a network's places last gave until it is taken.

    role: "student" or "teacher", for errors. The student's places are kept only of passes that record a graph, so that
    evaluation leaves nothing behind. Copies of the network (a moving average) are not heard.
    """

    def __init__(self, network: nn.Module, places: Sequence[str], role: str) -> None:
        self.role = role
        self.places = tuple(places)
        self._kept: dict[int, Tensor] = {}
        network = unwrapped(network, role)
        modules = dict(network.named_modules())
        heard = []
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
            heard.append((modules[name], reading))
        self._handles = [
            module.register_forward_hook(self._hook(module, number, reading))
            for number, (module, reading) in enumerate(heard)
        ]

    def _hook(self, owner: nn.Module, number: int, reading: str) -> Callable[..., None]:
        # A function, not a method: copying the network must not copy what was kept.
        kept, student = self._kept, self.role == "student"

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if module is not owner or (student and not torch.is_grad_enabled()):
                return
            value = arguments[0] if reading == "input" and arguments else output
            if isinstance(value, Tensor):
                kept[number] = F.relu(value) if reading == "relu" else value

        return hook

    def take(self) -> list[Tensor]:
        """What the places gave, in their order, and forgets it; [] where the network did not run."""
        taken = [self._kept[number] for number in sorted(self._kept)]
        self._kept.clear()
        if taken and len(taken) < len(self.places):
            raise ValueError(
                f"features.{self.role}_layers: {', '.join(self.places)}: not all of these run, and give a tensor, in a"
                f" pass through the {self.role}; name others"
            )
        return taken

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()
