"""The JSON schema of recipes' TOML files, for completion and checks in editors."""

from __future__ import annotations

import copy
import json
from typing import Any

from lrds_fast.recipe.errors import TABLES, json_schema
from lrds_fast.recipe.recipe import Recipe


def editor_schema() -> dict[str, Any]:
    """What a recipe's file may hold: every table and key, with types, ranges, choices, defaults and descriptions, and
    `extends`. TOML has no null: "none" stands for it."""
    schema = _without_titles(copy.deepcopy(json_schema(Recipe)))
    tables = {name: {"$ref": f"#/$defs/{cls.__name__}"} for name, cls in TABLES.items() if name}
    extends = {"type": "string", "description": "recipe to start from: a name, or a path relative to this file"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "lrds-fast recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {"extends": extends, **schema["properties"], **tables},
        "$defs": schema["$defs"],
    }


def editor_schema_text() -> str:
    """editor_schema as a file."""
    return json.dumps(editor_schema(), indent=1) + "\n"


def _without_titles(node: Any) -> Any:
    """The schema without pydantic's titles, which repeat the keys, and with "none" in the place of null."""
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node == {"type": "null"}:
        return {"const": "none"}
    if "anyOf" in node and node.get("default", 0) is None:
        node = {**node, "default": "none"}
    return {key: _without_titles(value) for key, value in node.items() if key != "title" or isinstance(value, dict)}
