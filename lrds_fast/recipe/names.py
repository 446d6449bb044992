"""The literature's experiments by name, put together from parts: PROTOCOL/TEACHER-STUDENT/METHOD+lr+ds.

A name stands for a recipe that extends a protocol by a pair of networks, a method, and what is switched on: nothing is
written down twice, and what depends on the protocol's epochs or learning rate is computed from these. PROTOCOL/MODEL
trains a network alone, as teachers and baselines are. The protocols are PROTOCOLS.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from lrds_fast.recipe import feature_recipes
from lrds_fast.recipe import published as literature
from lrds_fast.recipe.published import Pair

Values = Mapping[str, Any]


class Protocol(NamedTuple):
    """What names with one prefix have in common.

    base: the recipe that they extend. title: the data, for descriptions. pairs, methods: by name; a method's values go
    on top of the base's. alone: published accuracies (%) of networks by themselves. compares: whether the published
    accuracies are of this protocol. models: the full names of networks that are called by a short one.
    selected: what "+ds" says beyond the epoch of the scoring. small_steps: networks that train with a fifth of the
    learning rate. overrides: by method, what the protocol has otherwise than `base`.
    checkpoints: whether teachers are trained by the protocol too, and looked for where that leaves them.
    """

    base: str
    title: str
    pairs: Mapping[str, Pair]
    methods: Mapping[str, Values]
    alone: Mapping[str, float]
    compares: bool
    selected: Values
    models: Mapping[str, str] = {}
    small_steps: tuple[str, ...] = ()
    overrides: Mapping[str, Values] = {}
    checkpoints: bool = True


#: "+ds" scores once, after this share of the epochs (docs/benchmarks/method.md).
_SCORED_AFTER = 1 / 3
#: Features of the inner layers, alone ("crd") and beside KD ("kd-crd").
_FEATURES: Mapping[str, Values] = feature_recipes.METHODS
_CIFAR_METHODS: Mapping[str, Values] = {
    "kd": {"loss": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9}},
    # Sun et al. 2024. They choose T and the weight by pair; these are their program's.
    "kd-lskd": {"loss": {"standardize": True, "temperature": 2.0, "ce_weight": 0.1, "kd_weight": 9.0}},
    "dkd": {"loss": {"divergence": "dkd", "temperature": 4.0, "ce_weight": 1.0, "kd_weight": 1.0}},
    "rld": {"loss": {"divergence": "rld", "temperature": 4.0, "ce_weight": 1.0, "kd_weight": 1.0}},
    "mlkd": {
        "data": {"second_view": "strong"},
        "loss": {"method": "mlkd", "temperatures": [2.0, 3.0, 4.0, 5.0, 6.0], "ce_weight": 0.1, "kd_weight": 0.9},
    },
    "dist": {"loss": {"method": "dist", "temperature": 4.0, "ce_weight": 1.0, "kd_weight": 2.0}},
    # What the paper's label revision has been re-implemented as in public: it revises by itself.
    "revision": {"loss": {"method": "revision", "kd_weight": 1.0, "revise": "lr"}},
    **_FEATURES,
}
_IMAGENET_METHODS: Mapping[str, Values] = {
    "kd": {"loss": {"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5}},
    # The baseline to beat.
    "kd-tuned": {"loss": {"temperature": 1.0, "ce_weight": 1.0, "kd_weight": 3.0}},
    "dkd": {"loss": {"divergence": "dkd", "temperature": 1.0, "ce_weight": 1.0, "kd_weight": 1.0}},
    "rld": {"loss": {"divergence": "rld", "temperature": 1.0, "ce_weight": 1.0, "kd_weight": 1.0}},
    "nkd": {
        "loss": {
            "divergence": "nkd",
            "divergence_options": {"gamma": 1.5},
            "temperature": 1.0,
            "ce_weight": 1.0,
            "kd_weight": 1.0,
        }
    },
    "dist": {"loss": {"method": "dist", "temperature": 1.0, "ce_weight": 1.0, "kd_weight": 2.0}},
    "revision": _CIFAR_METHODS["revision"],
    "mlkd": _CIFAR_METHODS["mlkd"],
}
#: Mixed pictures are not shown in two views.
_MODERN_METHODS: Mapping[str, Values] = {
    **{name: values for name, values in _IMAGENET_METHODS.items() if name != "mlkd"},
    "kd": {"loss": {"temperature": 4.0, "ce_weight": 0.9, "kd_weight": 1.0}},
}
#: 2500 samples held out of CIFAR's training set: what decides is the standard error over them.
_CIFAR_SELECTED: Values = {"data": {"val_fraction": 0.05}, "selection": {"by": "kd_gain"}}
#: 12,812 samples of ImageNet's; scores in closed form over the last layer, of which 1.28 million take one pass.
_IMAGENET_SELECTED: Values = {
    "data": {"val_fraction": 0.01},
    "selection": {"by": "kd_gain"},
    "score": {"scores": ["kd_gain", "teacher_correct"], "curvature": "ekfac"},
}
_IMAGENET_MODELS = {
    "resnet18": "torchvision:resnet18",
    "resnet34": "torchvision:resnet34",
    "resnet50": "torchvision:resnet50",
    "resnet50sb": "timm:resnet50",
    "mobilenetv1": "timm:mobilenetv1_100",
    "mobilenetv2": "torchvision:mobilenet_v2",
    "efficientnet_b0": "timm:efficientnet_b0",
}

_CIFAR = Protocol(
    base="cifar100",
    title="CIFAR-100",
    pairs=literature.CIFAR100,
    methods=_CIFAR_METHODS,
    alone=literature.CIFAR100_ALONE,
    compares=True,
    selected=_CIFAR_SELECTED,
    small_steps=("MobileNetV2", "ShuffleV1", "ShuffleV2"),
    # Twice the epochs, half the learning rate.
    overrides={
        "mlkd": {"optimizer": {"lr": 0.025}, "schedule": {"epochs": 480, "milestones": [300, 360, 420]}},
    },
)
_IMAGENET = Protocol(
    base="imagenet",
    title="ImageNet",
    pairs=literature.IMAGENET,
    methods=_IMAGENET_METHODS,
    alone=literature.IMAGENET_ALONE,
    compares=True,
    selected=_IMAGENET_SELECTED,
    models=_IMAGENET_MODELS,
    # The teachers' weights are torchvision's and timm's: teacher.checkpoint says where they are.
    checkpoints=False,
)
_MODERN = _IMAGENET._replace(
    base="imagenet_modern",
    pairs=literature.IMAGENET_MODERN,
    methods=_MODERN_METHODS,
    alone=literature.IMAGENET_MODERN_ALONE,
)
PROTOCOLS: Mapping[str, Protocol] = {
    "cifar100": _CIFAR,
    "cifar100-short": _CIFAR._replace(base="cifar100_short", compares=False, overrides={}),
    "imagenet": _IMAGENET,
    "imagenet-modern": _MODERN,
    # Its pictures are mixed, which the public re-implementation of label revision cannot take.
    "imagenet-adamw": _MODERN._replace(
        base="imagenet_adamw",
        compares=False,
        methods={name: values for name, values in _MODERN_METHODS.items() if name != "revision"},
    ),
}


class Parts(NamedTuple):
    """A name of the grid taken apart. student: what is trained. teacher, method: "" for a network alone."""

    protocol: str
    teacher: str
    student: str
    method: str
    switches: tuple[str, ...]


def is_name(source: str) -> bool:
    """Whether it is a name of this grid, right or wrong."""
    return source.partition("/")[0] in PROTOCOLS and "/" in source and not source.endswith(".toml")


def parent(source: str) -> str:
    """The recipe that a name of this grid extends."""
    return PROTOCOLS[source.partition("/")[0]].base


def names() -> list[str]:
    """Every name; of each protocol networks alone first."""
    found = []
    for prefix, protocol in PROTOCOLS.items():
        found += [f"{prefix}/{model}" for model in models_of(protocol)]
        found += [
            f"{prefix}/{pair}/{method}{switch}"
            for pair, method, switch in itertools.product(
                protocol.pairs, protocol.methods, ("", "+lr", "+ds", "+lr+ds")
            )
            if "+lr" not in switch or _can_revise(method)
        ]
    return found


def _can_revise(method: str) -> bool:
    """Whether "+lr" changes it: not what revises by itself, nor what has none of the teacher's labels."""
    return method not in ("revision", "rld") and (method not in _FEATURES or _FEATURES[method]["loss"]["kd_weight"] > 0)


def models_of(protocol: Protocol) -> list[str]:
    """The networks of its pairs."""
    return sorted({model for pair in protocol.pairs.values() for model in (pair.teacher, pair.student)})


def parts_of(name: str) -> Parts | None:
    """A name taken apart; None where it is none of this grid's."""
    prefix, _, rest = name.partition("/")
    protocol = PROTOCOLS.get(prefix)
    if protocol is None:
        return None
    pair, slash, what = rest.partition("/")
    if not slash:
        return Parts(prefix, "", pair, "", ()) if pair in models_of(protocol) else None
    method, *switches = what.split("+")
    known = pair in protocol.pairs and method in protocol.methods
    allowed = ([], ["lr"], ["ds"], ["lr", "ds"]) if _can_revise(method) else ([], ["ds"])
    if not known or switches not in allowed:
        return None
    return Parts(prefix, protocol.pairs[pair].teacher, protocol.pairs[pair].student, method, tuple(switches))


def compose(source: str, base: Values) -> dict[str, Any]:
    """What the recipe of that name says beyond `base`, the values of the one it extends (parent), as a TOML file would
    hold it; ValueError with the nearest name for another."""
    parts = parts_of(source)
    if parts is None:
        near = difflib.get_close_matches(source, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "lrds-fast recipes lists the pairs and methods"
        raise ValueError(f"there is no recipe {source!r}; {hint}")
    protocol = PROTOCOLS[parts.protocol]
    student, teacher = (protocol.models.get(model, model) for model in (parts.student, parts.teacher))
    own = protocol.overrides.get(parts.method, {})
    schedule, optimizer = ({**base[table], **own.get(table, {})} for table in ("schedule", "optimizer"))
    title = f"{protocol.title} in {schedule['epochs']} epochs"
    rate = optimizer["lr"] * (0.2 if parts.student in protocol.small_steps else 1.0)
    recipe: dict[str, Any] = {
        "name": source,
        "description": f"{title}, {parts.student} alone",
        "student": {"model": student},
        "optimizer": {"lr": rate},
    }
    if not parts.teacher:
        return recipe
    recipe["description"] = f"{title}, {parts.teacher} teaches {parts.student}: {source.rpartition('/')[2]}"
    recipe["teacher"] = {"model": teacher}
    if protocol.checkpoints:
        recipe["teacher"]["checkpoint"] = f"runs/{parts.protocol}/{parts.teacher}/last.pt"
    recipe["schedule"] = dict(own.get("schedule", {}))
    recipe["loss"] = {"revise": "lr" if "lr" in parts.switches else "none"}
    layers = [protocol.methods[parts.method]]
    if parts.method in ("dkd", "rld"):
        beta = protocol.pairs[f"{parts.teacher}-{parts.student}"].beta
        warm_up = max(1, schedule["epochs"] // 12) if protocol.base.startswith("cifar") else 1
        layers.append({"loss": {"divergence_options": {"beta": beta}, "kd_warmup_epochs": warm_up}})
    if parts.method in _FEATURES:
        layers.append({"features": {"weight": feature_recipes.weight(parts.method, parts.student)}})
        if "kd_warmup_epochs" in _FEATURES[parts.method]["loss"]:
            layers.append({"loss": {"kd_warmup_epochs": max(1, schedule["epochs"] // 12)}})
    if "ds" in parts.switches:
        # Scored once.
        after = max(2, int(schedule["epochs"] * _SCORED_AFTER + 1e-6))
        layers += [protocol.selected, {"selection": {"after": after}}]
    for layer in layers:
        for table, values in layer.items():
            recipe[table] = {**recipe.get(table, {}), **values}
    return recipe


def published(name: str) -> float | None:
    """The published test accuracy (%) of a name's experiment, where there is one: without revision or selection."""
    parts = parts_of(name)
    if parts is None or parts.switches or not PROTOCOLS[parts.protocol].compares:
        return None
    protocol = PROTOCOLS[parts.protocol]
    if not parts.teacher:
        return protocol.alone.get(parts.student)
    pair = f"{parts.teacher}-{parts.student}"
    found = protocol.pairs[pair].accuracies.get(parts.method)
    if found is None and protocol.base == "cifar100":
        found = feature_recipes.ACCURACIES.get(pair, {}).get(parts.method)
    return found
