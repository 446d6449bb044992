"""The CIFAR-100 experiments of the literature by name, put together from parts: cifar100/TEACHER-STUDENT/METHOD+lr+ds.

A name stands for a recipe that extends a protocol by a pair of networks, a method, and what is switched on: nothing is
written down twice, and what depends on the protocol's epochs or learning rate is computed from these. cifar100/MODEL
trains a network alone, as teachers and baselines are. cifar100-short/... is the same in ten epochs.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

#: What names begin with, and the recipe that holds the protocol. "cifar100" is the literature's.
PROTOCOLS = {"cifar100": "cifar100", "cifar100-short": "cifar100_short"}


class Pair(NamedTuple):
    """A teacher and a student, the test accuracies (%) that are published for KD and DKD, and DKD's beta."""

    teacher: str
    student: str
    kd: float | None
    dkd: float | None
    beta: float = 8.0

    @property
    def name(self) -> str:
        return f"{self.teacher}-{self.student}"


#: As the literature reports them: the best test epoch, mostly means of 3 to 5 runs. beta: Zhao et al. 2022.
PAIRS = {
    pair.name: pair
    for pair in (
        Pair("resnet32x4", "resnet8x4", 73.33, 76.32),
        Pair("vgg13", "vgg8", 72.98, 74.68, 6.0),
        Pair("wrn_40_2", "wrn_40_1", 73.54, 74.81, 6.0),
        Pair("wrn_40_2", "wrn_16_2", 74.92, 76.24, 6.0),
        Pair("resnet56", "resnet20", 70.66, 71.97, 2.0),
        Pair("resnet110", "resnet32", 73.08, 74.11, 2.0),
        Pair("resnet110", "resnet20", 70.67, 71.06, 2.0),
        Pair("resnet32x4", "ShuffleV2", 74.45, 77.07),
        Pair("resnet32x4", "wrn_16_2", 74.90, 75.70),
        Pair("resnet32x4", "wrn_40_2", 77.70, 78.46),
        Pair("wrn_40_2", "resnet8x4", 73.97, 75.56, 6.0),
        Pair("wrn_40_2", "MobileNetV2", 68.36, 69.28, 6.0),
        Pair("vgg13", "MobileNetV2", 67.37, 69.71, 6.0),
        Pair("ResNet50", "MobileNetV2", 67.35, 70.35),
        Pair("resnet32x4", "ShuffleV1", None, None),
        Pair("resnet20", "resnet8", None, None, 2.0),
    )
}
#: Published test accuracies (%) of the networks alone.
ALONE = {
    "resnet32x4": 79.42,
    "resnet8x4": 72.50,
    "vgg13": 74.64,
    "vgg8": 70.36,
    "wrn_40_2": 75.61,
    "wrn_40_1": 71.98,
    "wrn_16_2": 73.26,
    "resnet56": 72.34,
    "resnet20": 69.06,
    "resnet110": 74.31,
    "resnet32": 71.14,
    "ShuffleV2": 71.82,
    "MobileNetV2": 64.60,
    "ResNet50": 79.34,
}
#: Networks that the literature trains with a fifth of the others' learning rate.
_SMALL_STEPS = ("MobileNetV2", "ShuffleV1", "ShuffleV2")
METHODS: Mapping[str, Mapping[str, Any]] = {
    "kd": {"loss": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9}},
    "dkd": {
        "loss": {
            "divergence": "dkd",
            "temperature": 4.0,
            "ce_weight": 1.0,
            "kd_weight": 1.0,
        }
    },
    "mlkd": {
        "loss": {"method": "mlkd", "temperatures": [2.0, 3.0, 4.0, 5.0, 6.0], "ce_weight": 0.1, "kd_weight": 0.9},
    },
    "dist": {"loss": {"method": "dist", "temperature": 4.0, "ce_weight": 1.0, "kd_weight": 2.0}},
    # What the paper's label revision has been re-implemented as in public: it revises by itself.
    "revision": {"loss": {"method": "revision", "kd_weight": 1.0, "revise": "lr"}},
}
#: MLKD's protocol where the others have the literature's: twice the epochs, half the learning rate.
_MLKD: Mapping[str, Mapping[str, Any]] = {
    "optimizer": {"lr": 0.025},
    "schedule": {"epochs": 480, "milestones": [300, 360, 420]},
}


def is_name(source: str) -> bool:
    """Whether it is a name of this grid, right or wrong."""
    return source.partition("/")[0] in PROTOCOLS and "/" in source and not source.endswith(".toml")


def parent(source: str) -> str:
    """The recipe that a name of this grid extends."""
    return PROTOCOLS[source.partition("/")[0]]


def names() -> list[str]:
    """Every name, networks alone first."""
    alone = sorted({model for pair in PAIRS.values() for model in (pair.teacher, pair.student)})
    switches = ("", "+lr", "+ds", "+lr+ds")
    taught = [
        f"{pair}/{method}{switch}"
        for pair, method, switch in itertools.product(PAIRS, METHODS, switches)
        if not (method == "revision" and "+lr" in switch)
    ]
    return [f"{prefix}/{rest}" for prefix in PROTOCOLS for rest in (*alone, *taught)]


def compose(source: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe of that name says beyond `base`, the values of the one it extends (parent), as a TOML file would
    hold it; ValueError with the nearest name for another."""
    if source not in names():
        near = difflib.get_close_matches(source, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "lrds-fast recipes lists the pairs and methods"
        raise ValueError(f"there is no recipe {source!r}; {hint}")
    prefix, pair, *rest = source.split("/")
    title = f"CIFAR-100 in {base['schedule']['epochs']} epochs"
    if not rest:
        return {
            "name": source,
            "description": f"{title}, {pair} alone",
            "student": {"model": pair},
            "optimizer": _optimizer(pair, base),
        }
    teacher, student, *_, beta = PAIRS[pair]
    method, *switches = rest[0].split("+")
    own = _MLKD if method == "mlkd" and prefix == "cifar100" else {}
    base = {**base, **own}
    epochs = base["schedule"]["epochs"]
    loss = {
        "revise": "lr" if "lr" in switches else "none",
        "ce_weight_unselected": 1.0,
        **METHODS[method]["loss"],
    }
    if method == "dkd":
        loss |= {"divergence_options": {"beta": beta}, "kd_warmup_epochs": max(1, epochs // 12)}
    recipe: dict[str, Any] = {
        "name": source,
        "description": f"{title}, {teacher} teaches {student}: {rest[0]}",
        "teacher": {"model": teacher, "checkpoint": f"runs/{prefix}/{teacher}/last.pt"},
        "student": {"model": student},
        "loss": loss,
        "optimizer": _optimizer(student, base),
        "schedule": dict(own.get("schedule", {})),
    }
    if "ds" in switches:
        # Scored once, after a twelfth of the epochs, on 1000 samples held out of the training set.
        recipe["data"] = {"val_fraction": 0.02}
        recipe["selection"] = {"by": "kd_gain", "threshold": 0.0, "after": max(2, epochs // 12)}
    return recipe


def _optimizer(model: str, base: Mapping[str, Any]) -> dict[str, float]:
    return {"lr": base["optimizer"]["lr"] * (0.2 if model in _SMALL_STEPS else 1.0)}


def published(name: str) -> float | None:
    """The published test accuracy (%) of a name's experiment, where there is one: without revision or selection."""
    parts = name.split("/")
    if parts[0] != "cifar100":
        return None
    if len(parts) == 2:
        return ALONE.get(parts[1])
    if len(parts) == 3 and parts[1] in PAIRS and parts[2] in ("kd", "dkd"):
        pair = PAIRS[parts[1]]
        return pair.kd if parts[2] == "kd" else pair.dkd
    return None
