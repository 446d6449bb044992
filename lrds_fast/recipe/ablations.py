"""Grids of values around a recipe. Each cell is a recipe, NAME@KEY=VALUE,KEY=VALUE."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lrds_fast.recipe.library import library_text, tomllib
from lrds_fast.recipe.recipe import ABLATIONS_FILE, Recipe, parse_settings

#: Separates a recipe's name from the cell's values.
MARK = "@"


class Axis(NamedTuple):
    """A key and its values: as text, and parsed."""

    key: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]


def parse_axis(text: str) -> Axis:
    """The axis of a text such as "loss.eta=0.5,0.8"; commas within brackets or quotes do not separate values.
    ValueError for another form, an empty value or a repeated one."""
    key, equals, listed = text.partition("=")
    texts = tuple(part.strip() for part in _split_at_commas(listed))
    if not equals or not key.strip() or not all(texts):
        raise ValueError(f"--grid takes KEY=VALUE,VALUE,..., for example loss.eta=0.5,0.8; got {text!r}")
    if len(set(texts)) < len(texts):
        raise ValueError(f"--grid {key.strip()} has a value twice: {listed}")
    values = [parse_settings([f"value={part}"])["value"] for part in texts]
    return Axis(key.strip(), texts, tuple(values))


def _split_at_commas(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
    return parts


def cells(recipe: Recipe, axes: Sequence[Axis]) -> list[Recipe]:
    """A recipe per combination of the axes' values, in the order of the axes, the last one the fastest.

    A cell is called NAME@KEY=VALUE,KEY=VALUE, and its folder likewise. ValueError for an unknown key, a value that does
    not fit it, or a key that two axes have.
    """
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        raise ValueError(f"--grid has a key twice: {', '.join(keys)}")
    if not axes:
        return [recipe]
    recipes = []
    for places in itertools.product(*(range(len(axis.values)) for axis in axes)):
        chosen = list(zip(axes, places, strict=True))
        suffix = MARK + ",".join(f"{axis.key}={axis.texts[place]}" for axis, place in chosen)
        out = {"run.out": recipe.run.out + suffix} if recipe.run.out else {}
        values = {axis.key: axis.values[place] for axis, place in chosen}
        recipes.append(recipe.with_values(**values, **{"name": recipe.name + suffix}, **out))
    return recipes


class Ablation(NamedTuple):
    """A ready grid, a table of recipes/ablations.toml, which explains the fields."""

    about: str
    axes: Sequence[str]
    needs: Sequence[str]
    lacks: str
    defaults: Mapping[str, Any] = {}


def _read() -> dict[str, Ablation]:
    return {name: Ablation(**values) for name, values in tomllib.loads(library_text(ABLATIONS_FILE)).items()}


ABLATIONS: Mapping[str, Ablation] = _read()


def _holds(need: str, values: Mapping[str, Any]) -> bool:
    """Whether a recipe's values by dotted key fulfil "KEY", "KEY=VALUE" or "KEY!=VALUE"."""
    key, equals, value = need.partition("=")
    if not equals:
        return bool(values[key])
    return str(values[key.removesuffix("!")]) != value if key.endswith("!") else str(values[key]) == value


def ablation(name: str, recipe: Recipe) -> list[Recipe]:
    """The cells of ABLATIONS' grid of that name ("eta" or "ablations/eta") around the recipe.

    ValueError for another name, or where the recipe lacks what is varied.
    """
    known = ABLATIONS.get(name.removeprefix("ablations/"))
    if known is None:
        raise ValueError(f"--ablation must be one of {', '.join(ABLATIONS)}; got {name!r}")
    values, standard = recipe.flat(), Recipe().flat()
    if not all(_holds(need, values) for need in known.needs):
        raise ValueError(f"--ablation {name} needs a recipe with {known.lacks}; {recipe.name} lacks it")
    defaults = {key: value for key, value in known.defaults.items() if values[key] == standard[key]}
    return cells(recipe.with_values(**defaults), [parse_axis(axis) for axis in known.axes])
