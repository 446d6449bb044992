"""Grids of values around a recipe: each cell a run of its own, NAME@KEY=VALUE."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lrds_fast.recipe.recipe import Recipe, parse_settings

#: What stands between a recipe's name and the cell's values.
MARK = "@"


class Axis(NamedTuple):
    """One key of a recipe and the values it takes, as they were written and as they are."""

    key: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]


def parse_axis(text: str) -> Axis:
    """ "loss.eta=0.5,0.8" as an Axis; commas within brackets or quotes do not divide. ValueError for another form, an
    empty value or one that is there twice."""
    key, equals, listed = text.partition("=")
    texts = tuple(part.strip() for part in _divided(listed))
    if not equals or not key.strip() or not all(texts):
        raise ValueError(f"--grid takes KEY=VALUE,VALUE,..., for example loss.eta=0.5,0.8; got {text!r}")
    if len(set(texts)) < len(texts):
        raise ValueError(f"--grid {key.strip()} has a value twice: {listed}")
    values = [parse_settings([f"value={part}"])["value"] for part in texts]
    return Axis(key.strip(), texts, tuple(values))


def _divided(text: str) -> list[str]:
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
    found = []
    for places in itertools.product(*(range(len(axis.values)) for axis in axes)):
        chosen = list(zip(axes, places, strict=True))
        suffix = MARK + ",".join(f"{axis.key}={axis.texts[place]}" for axis, place in chosen)
        out = {"run.out": recipe.run.out + suffix} if recipe.run.out else {}
        values = {axis.key: axis.values[place] for axis, place in chosen}
        found.append(recipe.with_values(**values, **{"name": recipe.name + suffix}, **out))
    return found


class Ablation(NamedTuple):
    """A ready grid. axes: as parse_axis takes them. first: what the recipe gets before, where it says otherwise. needs:
    whether a recipe is fit for it, else what it lacks."""

    about: str
    axes: tuple[str, ...]
    needs: Callable[[Recipe], str]
    first: Callable[[Recipe], Mapping[str, Any]] = lambda recipe: {}


def _revision(recipe: Recipe) -> str:
    taught = recipe.teacher.model and recipe.loss.revise == "lr"
    return "" if taught else "label revision (loss.revise 'lr' and a teacher), as .../kd+lr has"


def _weights(recipe: Recipe) -> str:
    taught = recipe.teacher.model and recipe.loss.method != "revision"
    return "" if taught else "a teacher and both weights, as .../kd has"


def _revision_loss(recipe: Recipe) -> str:
    return "" if recipe.loss.method == "revision" else "the loss method 'revision', as .../revision has"


def _selection(recipe: Recipe) -> str:
    return "" if recipe.selection.after else "a selection while training (selection.after), as .../kd+ds has"


ABLATIONS: Mapping[str, Ablation] = {
    "eta": Ablation("the margin of label revision", ("loss.eta=0.5,0.6,0.7,0.8,0.9,0.95",), _revision),
    "weights": Ablation(
        "cross-entropy against distillation", ("loss.ce_weight=0.1,0.5,1.0", "loss.kd_weight=0.5,0.9,2.0"), _weights
    ),
    "lambdas": Ablation(
        "revision_loss's weights on the rows where the teacher is right and where it is wrong",
        ("loss.lambda1=1.0,2.0,4.0,8.0", "loss.lambda2=0.5,1.0,2.0,4.0"),
        _revision_loss,
    ),
    "ratio": Ablation(
        "the share of the samples that keep the teacher",
        ("selection.ratio=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0",),
        _selection,
    ),
    # Scores have different units: all keep the same share.
    "score": Ablation(
        "what samples are selected by, at an equal share",
        (
            "selection.by=kd_gain,kd_gain_ns,self_influence,param_shift,conflict,kd,ce,el2n,grand,teacher_correct,"
            "random,set_shift",
        ),
        _selection,
        lambda recipe: {"selection.ratio": 0.7} if recipe.selection.ratio < 0 else {},
    ),
}


def ablation(name: str, recipe: Recipe) -> list[Recipe]:
    """The cells of ABLATIONS' grid of that name ("eta" or "ablations/eta") around the recipe.

    ValueError for another name, or where the recipe lacks what is varied.
    """
    known = ABLATIONS.get(name.removeprefix("ablations/"))
    if known is None:
        raise ValueError(f"--ablation must be one of {', '.join(ABLATIONS)}; got {name!r}")
    lacks = known.needs(recipe)
    if lacks:
        raise ValueError(f"--ablation {name} needs a recipe with {lacks}; {recipe.name} has not")
    first = dict(known.first(recipe))
    return cells(recipe.with_values(**first) if first else recipe, [parse_axis(axis) for axis in known.axes])
