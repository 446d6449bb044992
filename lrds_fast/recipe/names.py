"""The literature's experiments by name, put together from layers: PROTOCOL/TEACHER-STUDENT/METHOD+lr+ds.

A name is the protocol's recipe with layers of values on top: the networks, the method, label revision (lr) and data
selection (ds). Protocols are data (lrds_fast.recipe.protocols). Values that depend on the number of epochs or on the
learning rate are computed here. PROTOCOL/MODEL trains a network without a teacher.
"""

from __future__ import annotations

import difflib
import itertools
from fractions import Fraction
from typing import Any, NamedTuple

from lrds_fast.recipe.mappings import nested, overlay
from lrds_fast.recipe.protocols import PROTOCOLS, Method, Protocol, Values, accuracies

__all__ = [
    "PROTOCOLS",
    "Parts",
    "Protocol",
    "compose",
    "is_name",
    "models_of",
    "names",
    "parent",
    "parts_of",
    "published",
]

#: The learning rate of Protocol.small_steps, as a share of the protocol's.
_SMALL_STEP = 0.2


class Parts(NamedTuple):
    """The parts of a name. student: the network that is trained. teacher, method: "" for a network alone."""

    protocol: str
    teacher: str
    student: str
    method: str
    switches: tuple[str, ...]


def is_name(source: str) -> bool:
    """Whether `source` is in the form of such a name; there may be no recipe of that name."""
    return "/" in source and not source.endswith(".toml") and source.partition("/")[0] in PROTOCOLS


def parent(source: str) -> str:
    """The recipe of the name's protocol."""
    return PROTOCOLS[source.partition("/")[0]].base


def names() -> list[str]:
    """Every name; within a protocol the networks alone come first."""
    every = []
    for prefix, protocol in PROTOCOLS.items():
        every += [f"{prefix}/{model}" for model in models_of(protocol)]
        for pair, (name, method) in itertools.product(protocol.pairs, protocol.methods.items()):
            every += [f"{prefix}/{pair}/{'+'.join((name, *switches))}" for switches in _combinations(method)]
    return every


def _combinations(method: Method) -> list[tuple[str, ...]]:
    """The switches that a method's names may have together: none, each alone, both."""
    sizes = range(len(method.switches) + 1)
    return [chosen for size in sizes for chosen in itertools.combinations(method.switches, size)]


def models_of(protocol: Protocol) -> list[str]:
    """The networks of its pairs."""
    return sorted({model for pair in protocol.pairs.values() for model in (pair.teacher, pair.student)})


def parts_of(name: str) -> Parts | None:
    """The parts of a name; None if there is no recipe of that name."""
    prefix, _, rest = name.partition("/")
    protocol = PROTOCOLS.get(prefix)
    if protocol is None:
        return None
    pair, slash, what = rest.partition("/")
    if not slash:
        return Parts(prefix, "", pair, "", ()) if pair in models_of(protocol) else None
    method, *switches = what.split("+")
    if pair not in protocol.pairs or method not in protocol.methods:
        return None
    if tuple(switches) not in _combinations(protocol.methods[method]):
        return None
    return Parts(prefix, protocol.pairs[pair].teacher, protocol.pairs[pair].student, method, tuple(switches))


def compose(source: str, base: Values) -> dict[str, Any]:
    """The values of the recipe of that name on top of `base`, those of its protocol's recipe, as a TOML file would hold
    them. ValueError with the nearest name if there is no recipe of that name."""
    parts = parts_of(source)
    if parts is None:
        near = difflib.get_close_matches(source, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "lrds-fast recipes lists the pairs and methods"
        raise ValueError(f"there is no recipe {source!r}; {hint}")
    protocol = PROTOCOLS[parts.protocol]
    layers = _taught(parts, protocol, base["schedule"]["epochs"]) if parts.teacher else []
    values = overlay({"optimizer": base["optimizer"], "schedule": base["schedule"]}, *layers)
    rate = values["optimizer"]["lr"] * (_SMALL_STEP if parts.student in protocol.small_steps else 1.0)
    networks = f"{parts.student} alone"
    if parts.teacher:
        networks = f"{parts.teacher} teaches {parts.student}: {source.rpartition('/')[2]}"
    student = {"model": protocol.models.get(parts.student, parts.student)}
    return {
        "name": source,
        "description": f"{protocol.title} in {values['schedule']['epochs']} epochs, {networks}",
        **overlay(*layers, {"student": student, "optimizer": {"lr": rate}}),
    }


def _taught(parts: Parts, protocol: Protocol, epochs: int) -> list[Values]:
    """The layers of a name with a teacher, later ones on top. epochs: the protocol's."""
    method, pair = protocol.methods[parts.method], protocol.pairs[f"{parts.teacher}-{parts.student}"]
    epochs = method.values.get("schedule", {}).get("epochs", epochs)
    teacher = {"model": protocol.models.get(parts.teacher, parts.teacher)}
    if protocol.trains_teachers:
        teacher["checkpoint"] = f"runs/{parts.protocol}/{parts.teacher}/last.pt"
    layers: list[Values] = [
        {"teacher": teacher, "loss": {"revise": "lr" if "lr" in parts.switches else "none"}},
        method.values,
        method.by_student.get(parts.student, {}),
        nested({key: pair.numbers[number] for key, number in method.from_pair.items()}),
    ]
    if method.kd_warmup:
        layers.append({"loss": {"kd_warmup_epochs": max(1, _share(epochs, method.kd_warmup))}})
    if "ds" in parts.switches:
        selection = protocol.data_selection
        layers += [selection.values, {"selection": {"after": max(2, _share(epochs, selection.scored_after))}}]
    return layers


def _share(epochs: int, share: Fraction) -> int:
    return int(epochs * share)


def published(name: str) -> float | None:
    """The published test accuracy of that experiment in percent; None where there is none, as for +lr and +ds."""
    parts = parts_of(name)
    if parts is None or parts.switches:
        return None
    return accuracies().get((parts.protocol, parts.teacher, parts.student, parts.method))
