"""Nested mappings of a recipe's values: from dotted keys, and one on top of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}. ValueError where a key is a value and a table."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        *tables, last = key.split(".")
        table = result
        for name in tables:
            inner = table.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key!r} is a key of the table {name!r}, but {name!r} is set to a value")
            table = inner
        table[last] = value
    return result


def overlay(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all layers, table by table; where several have a key, the last one counts."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            if isinstance(below, Mapping) and isinstance(value, Mapping):
                value = overlay(below, value)
            merged[key] = value
    return merged
