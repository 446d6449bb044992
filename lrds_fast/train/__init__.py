"""The trainer: it trains what a recipe describes, in one loop, with checkpoints that a run resumes from."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrds_fast.recipe.recipe import Recipe, builtin_recipes, load_recipe
    from lrds_fast.train.evaluation import evaluate, outputs
    from lrds_fast.train.loop import TrainResult, train
    from lrds_fast.train.run import fit, score

__all__ = [
    "Recipe",
    "TrainResult",
    "builtin_recipes",
    "evaluate",
    "fit",
    "load_recipe",
    "outputs",
    "score",
    "train",
]

_NAMES = {
    "lrds_fast.recipe.recipe": ("Recipe", "builtin_recipes", "load_recipe"),
    "lrds_fast.train.evaluation": ("evaluate", "outputs"),
    "lrds_fast.train.loop": ("TrainResult", "train"),
    "lrds_fast.train.run": ("fit", "score"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Loads names on first use, so that reading a recipe does not import PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
