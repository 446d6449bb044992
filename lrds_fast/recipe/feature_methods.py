"""Methods of feature distillation: published weights, the layers that they compare, and their parameters."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

#: Kinds of parameters: the values allowed, in words and as a condition.
_KINDS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "count": ("a whole number of at least 1", lambda value: value >= 1 and value == int(value)),
    "positive": ("above 0", lambda value: value > 0),
    "weight": ("at least 0", lambda value: value >= 0),
    "share": ("in [0, 1)", lambda value: 0 <= value < 1),
}


class Option(NamedTuple):
    """A parameter of a method: its published value, and its kind."""

    default: float
    kind: str


class FeatureMethod(NamedTuple):
    """weight: as published. places: "hint" (the second stage), "last" (the last stage), "stages" (every stage),
    "embedding" (the last linear layer's input) or "review" (every stage and the embedding). least: with fewer rows the
    loss, which compares rows or uses statistics of the batch, is 0."""

    weight: float
    places: str
    least: int
    options: Mapping[str, Option]


#: Weights and options are those of RepDistiller's benchmark (Tian et al. 2020); of cc, torchdistill's sample
#: configuration; of ickd and reviewkd, their authors' code.
METHODS: Mapping[str, FeatureMethod] = {
    "fitnet": FeatureMethod(100.0, "hint", 2, {}),
    "at": FeatureMethod(1000.0, "stages", 1, {}),
    "sp": FeatureMethod(3000.0, "last", 2, {}),
    "vid": FeatureMethod(1.0, "stages", 1, {"variance": Option(5.0, "positive")}),
    "ickd": FeatureMethod(2.5, "last", 2, {}),
    "rkd": FeatureMethod(1.0, "embedding", 2, {"distance": Option(25.0, "weight"), "angle": Option(50.0, "weight")}),
    "pkt": FeatureMethod(30000.0, "embedding", 2, {}),
    "cc": FeatureMethod(
        0.003,
        "embedding",
        2,
        {"size": Option(128, "count"), "gamma": Option(0.4, "positive"), "order": Option(2, "count")},
    ),
    "crd": FeatureMethod(
        0.8,
        "embedding",
        1,
        {
            "size": Option(128, "count"),
            "negatives": Option(16384, "count"),
            "temperature": Option(0.07, "positive"),
            "momentum": Option(0.5, "share"),
        },
    ),
    "reviewkd": FeatureMethod(1.0, "review", 2, {"width": Option(512, "count")}),
}


def check(
    method: str,
    weight: float,
    options: Mapping[str, float],
    student_layers: tuple[str, ...],
    teacher_layers: tuple[str, ...],
) -> None:
    """Raises ValueError if these values of [features] do not fit together. method "" is off, and takes no others."""
    named = (("student_layers", student_layers), ("teacher_layers", teacher_layers))
    if not method:
        for key, setting in (("options", options), *named):
            if setting:
                raise ValueError(f"features.{key} needs features.method, one of {', '.join(METHODS)}; got {setting!r}")
        return
    if method not in METHODS:
        near = difflib.get_close_matches(method.lower(), METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else 'or "" for none'
        raise ValueError(f"features.method must be one of {', '.join(METHODS)}; got {method!r}; {hint}")
    if math.isnan(weight) or weight == math.inf:
        raise ValueError(f"features.weight must be finite; below 0 is the published weight; got {weight}")
    known = METHODS[method].options
    for name, value in options.items():
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"features.options.{name}: {method!r} has no such option; {has}")
        words, holds = _KINDS[known[name].kind]
        if not (math.isfinite(value) and holds(value)):
            raise ValueError(f"features.options.{name} must be {words}; got {value}")
    places = METHODS[method].places
    for key, layers in named:
        if len(layers) > 1 and places not in ("stages", "review"):
            raise ValueError(f"features.{key}: {method!r} compares one pair of modules; got {', '.join(layers)}")
        if len(layers) == 1 and places == "review":
            raise ValueError(
                f"features.{key}: {method!r} takes two modules or more, from shallow to deep; got {layers[0]}"
            )
    if student_layers and teacher_layers and len(student_layers) != len(teacher_layers):
        raise ValueError(
            f"features.student_layers and features.teacher_layers must have the same length; got"
            f" {len(student_layers)} and {len(teacher_layers)}"
        )


def values(method: str, options: Mapping[str, float]) -> dict[str, float]:
    """The method's parameters: those of `options`, otherwise the published values; counts as int."""
    resolved: dict[str, float] = {}
    for name, (default, kind) in METHODS[method].options.items():
        value = options.get(name, default)
        resolved[name] = int(value) if kind == "count" else float(value)
    return resolved
