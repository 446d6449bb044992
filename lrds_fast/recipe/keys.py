"""The keys of a recipe for help texts and docs, read without pydantic from the library's JSON schema file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lrds_fast.recipe.library import library_text

#: In lrds_fast.recipes; tools/recipe_keys.py writes it.
SCHEMA = "recipe.schema.json"

_TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "array": "list", "object": "table"}


class Key(NamedTuple):
    """One key. name: dotted. kind: its Python type. limits: what values it takes, "" where the type says all. default:
    as TOML writes it."""

    name: str
    kind: str
    limits: str
    default: str
    about: str


def type_name(node: Mapping[str, Any]) -> str:
    """The Python type of a key by its JSON schema: "int", "list of float", "table of float"."""
    if "anyOf" in node:
        return type_name(node["anyOf"][0])
    name = _TYPES[node.get("type", "object")]
    inner = node.get("items") or node.get("additionalProperties")
    return f"{name} of {type_name(inner)}" if inner else name


def limits(node: Mapping[str, Any]) -> str:
    """The values that a key's JSON schema allows, in words: "above 0 and finite", "in [0, 1)", "one of a, b", and for a
    list "each above 0 and finite"; "" where its type says all."""
    if "anyOf" in node:
        inner = limits(node["anyOf"][0])
        return f'{inner}, or "none"' if inner else ""
    if "items" in node:
        inner = limits(node["items"])
        return f"each {inner}" if inner else ""
    if "enum" in node:
        return "one of " + ", ".join(choice or repr(choice) for choice in node["enum"])
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    least, most = (low if above is None else above), (high if below is None else below)
    if least is not None and most is not None:
        return f"in {'[' if above is None else '('}{least:g}, {most:g}{']' if below is None else ')'}"
    if least is not None:
        return f"{'at least' if above is None else 'above'} {least:g} and finite"
    if most is not None:
        return f"{'at most' if below is None else 'below'} {most:g}"
    return ""


def recipe_keys(schema: Mapping[str, Any] | None = None) -> list[Key]:
    """Every key, in the order of a recipe. schema: as editor_schema returns it; None: the library's file."""
    if schema is None:
        schema = json.loads(library_text(SCHEMA))
    keys = []
    for name, node in schema["properties"].items():
        if name == "extends":
            continue
        if "$ref" not in node:
            keys.append(_key(name, node))
            continue
        table = schema["$defs"][node["$ref"].rpartition("/")[2]]
        keys += [_key(f"{name}.{inner}", part) for inner, part in table["properties"].items()]
    return keys


def _key(name: str, node: Mapping[str, Any]) -> Key:
    allowed = limits(node).replace(" and finite", "")
    if "anyOf" in node and not allowed:
        allowed = 'or "none"'
    default = node.get("default", {} if "additionalProperties" in node else None)
    written = "" if default is None else json.dumps(default, ensure_ascii=False)
    return Key(name, type_name(node), allowed, written, node["description"])


def markdown_table(keys: list[Key]) -> str:
    """The keys as a table of Markdown."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        kind = f"{key.kind}, {key.limits}" if key.limits else key.kind
        default = f"`{key.default}`" if key.default else ""
        lines.append(f"| `{key.name}` | {kind} | {default} | {key.about} |")
    return "\n".join(lines)


def help_text() -> str:
    """The keys for a terminal, as `lrds-fast train --help` shows them."""
    lines = ["keys of a recipe, for --set KEY=VALUE, with their defaults:"]
    for key in recipe_keys():
        lines.append(f"  {key.name}={key.default}" if key.default else f"  {key.name}")
        lines.append(f"      {key.about} ({key.kind}{', ' if key.limits else ''}{key.limits})")
    return "\n".join(lines)
