"""Errors of recipes, one line each: the dotted key, what was expected, what arrived, and the nearest valid key."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lrds_fast.recipe.keys import limits, type_name

_T = TypeVar("_T")

TABLES: dict[str, Any] = {}
"""Every class that `checked` decorates, by the name of its table; "" is the recipe itself."""


def checked(table: str) -> Callable[[type[_T]], type[_T]]:
    """Decorates a pydantic dataclass: its constructor raises ValueErrors of one line that name `table`'s key.

    table: the class's table in a recipe's file, "" for the recipe itself.
    """

    def decorate(cls: type[_T]) -> type[_T]:
        construct: Callable[..., None] = cls.__init__

        @functools.wraps(construct)
        def __init__(self: _T, /, *arguments: Any, **keywords: Any) -> None:
            try:
                construct(self, *arguments, **keywords)
            except ValidationError as error:
                raise ValueError(_line(cls, table, error)) from None

        setattr(cls, "__init__", __init__)  # noqa: B010  an assignment is an error to mypy
        TABLES[table] = cls
        return cls

    return decorate


@functools.cache
def json_schema(cls: Any) -> dict[str, Any]:
    """The JSON schema of a class that `checked` decorates."""
    return TypeAdapter(cls).json_schema()


def all_keys() -> list[str]:
    """Every key of a recipe, dotted."""
    names = {table: [field.name for field in dataclasses.fields(cls)] for table, cls in TABLES.items()}
    top = [name for name in names.pop("", []) if name not in names]
    return top + [f"{table}.{name}" for table, inner in names.items() for name in inner]


def _line(cls: Any, table: str, error: ValidationError) -> str:
    """pydantic's first error as one line of ours."""
    first = error.errors(include_url=False)[0]
    kind, arrived = first["type"], first["input"]
    if kind == "value_error":
        return str(first["ctx"]["error"])
    prefix = f"{table}." if table else ""
    name, *inside = first["loc"]
    if kind == "unexpected_positional_argument":
        return f"{cls.__name__} takes its options by keyword; got {arrived!r}"
    key = f"{prefix}{name}"
    properties = json_schema(cls)["properties"]
    if name not in properties:
        return f"unknown key {key!r}; {_nearest(key, prefix, list(properties))}"
    node = properties[name]
    if inside and "additionalProperties" in node:
        key, node = f"{key}.{inside[0]}", node["additionalProperties"]
    elif inside and "items" in node:
        node = node["items"]
    if kind.endswith("_type"):
        expected = type_name(node)
        if expected.startswith("list"):
            return f"{key} must be a {expected}; got {arrived!r}"
        if expected.startswith("table"):
            return f"{key} must be a table; got {arrived!r}"
        alternative = ', or "none"' if "anyOf" in node else ""
        return f"{key} must be {expected}{alternative}; got {arrived!r} ({type(arrived).__name__})"
    if type_name(node) == "float" and isinstance(arrived, int):
        arrived = float(arrived)
    return f"{key} must be {limits(node) or 'finite'}; got {arrived!r}"


def _nearest(full: str, prefix: str, keys: list[str]) -> str:
    everything = all_keys()
    by_last = {key.rpartition(".")[2]: key for key in everything}
    last = full.rpartition(".")[2]
    near = [by_last[last]] if last in by_last else []
    near = near or difflib.get_close_matches(full, [prefix + key for key in keys], n=1)
    near = near or difflib.get_close_matches(full, everything, n=1)
    near = near or [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1)]
    return f"did you mean {near[0]!r}?" if near else f"valid keys here: {', '.join(prefix + key for key in keys)}"
