"""The literature's protocols and published accuracies, read from lrds_fast/recipes on first use.

recipes/protocols/NAME.toml is what recipes NAME/... have in common. Its keys are the fields of Protocol, and
`extends`: another protocol, whose keys count where the file has none of its own. `methods` are merged by name, without
those that `without` lists. A method's keys are the fields of Method; its other tables are values of a recipe.

recipes/published.csv holds test accuracies in percent: of the best test epoch, mostly means of 3 to 5 runs. Rows
without a teacher and a method are networks alone. source: the paper, and the file in which the number was read.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from lrds_fast.recipe.library import library_text, library_toml, tomllib

#: Values of a recipe, table by table.
Values = Mapping[str, Mapping[str, Any]]


class Pair(NamedTuple):
    """A teacher, a student, and the methods' numbers for the two, such as beta of DKD."""

    teacher: str
    student: str
    numbers: Mapping[str, float]


class Method(NamedTuple):
    """What a recipe of one method says beyond its protocol.

    values: on top of the protocol's recipe. by_student: more values for some students. from_pair: dotted keys, and the
    pair's number that each gets. kd_warmup: share of the epochs over which kd_weight grows, at least one epoch; 0: the
    protocol's. switches: which of lr (label revision) and ds (data selection) its names may have.
    """

    values: Values
    by_student: Mapping[str, Values] = {}
    from_pair: Mapping[str, str] = {}
    kd_warmup: Fraction = Fraction(0)
    switches: tuple[str, ...] = ("lr", "ds")


class DataSelection(NamedTuple):
    """What the switch ds adds. scored_after: share of the epochs before the one scoring, at least two epochs."""

    values: Values
    scored_after: Fraction


class Protocol(NamedTuple):
    """What names with one prefix have in common.

    base: the recipe that they extend. title: the data, for descriptions. models: full names of networks that are called
    by a short one. small_steps: students that train with a fifth of the learning rate. trains_teachers: whether
    teacher.checkpoint is the run of PROTOCOL/TEACHER.
    """

    base: str
    title: str
    pairs: Mapping[str, Pair]
    methods: Mapping[str, Method]
    data_selection: DataSelection
    models: Mapping[str, str] = {}
    small_steps: tuple[str, ...] = ()
    trains_teachers: bool = True


class _Protocols(Mapping[str, Protocol]):
    """The protocols by name; a protocol comes after the one that it extends."""

    def __getitem__(self, name: str) -> Protocol:
        return _read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_read())

    def __len__(self) -> int:
        return len(_read())


PROTOCOLS: Mapping[str, Protocol] = _Protocols()


@functools.cache
def accuracies() -> Mapping[tuple[str, str, str, str], float]:
    """Published test accuracies in percent by (protocol, teacher, student, method)."""
    rows = csv.DictReader(library_text("published.csv").splitlines())
    return {(row["protocol"], row["teacher"], row["student"], row["method"]): float(row["accuracy"]) for row in rows}


@functools.cache
def _read() -> dict[str, Protocol]:
    texts = library_toml("protocols")
    merged: dict[str, dict[str, Any]] = {}
    for name in texts:
        _merge(name, texts, merged)
    return {name: _protocol(values) for name, values in merged.items()}


def _merge(name: str, texts: Mapping[str, str], merged: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The values of a protocol, with those of the one that it extends; puts both into `merged`."""
    if name in merged:
        return merged[name]
    values = tomllib.loads(texts[name])
    extended = _merge(values.pop("extends"), texts, merged) if "extends" in values else {}
    methods = {**extended.get("methods", {}), **values.pop("methods", {})}
    for method in values.pop("without", []):
        del methods[method]
    merged[name] = {**extended, **values, "methods": methods}
    return merged[name]


def _protocol(values: Mapping[str, Any]) -> Protocol:
    selection = dict(values["data_selection"])
    return Protocol(
        **{
            **values,
            "pairs": {name: _pair(name, numbers) for name, numbers in values["pairs"].items()},
            "methods": {name: _method(method) for name, method in values["methods"].items()},
            "data_selection": DataSelection(scored_after=Fraction(selection.pop("scored_after")), values=selection),
            "small_steps": tuple(values.get("small_steps", ())),
        }
    )


def _pair(name: str, numbers: Mapping[str, float]) -> Pair:
    teacher, _, student = name.partition("-")
    return Pair(teacher, student, numbers)


def _method(values: Mapping[str, Any]) -> Method:
    own = {key: value for key, value in values.items() if key in Method._fields}
    tables = {key: value for key, value in values.items() if key not in own}
    if "kd_warmup" in own:
        own["kd_warmup"] = Fraction(own["kd_warmup"])
    if "switches" in own:
        own["switches"] = tuple(own["switches"])
    return Method(values=tables, **own)
