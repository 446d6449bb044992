"""The trainer: recipes, one loop, checkpoints, reports, the demo, and the command line over them."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrds_fast.train.demo import DemoResult, demo
    from lrds_fast.train.evaluate import evaluate, outputs
    from lrds_fast.train.loop import TrainResult, train
    from lrds_fast.train.recipe import Recipe, builtin_recipes, load_recipe
    from lrds_fast.train.run import fit, score

__all__ = [
    "DemoResult",
    "Recipe",
    "TrainResult",
    "builtin_recipes",
    "demo",
    "evaluate",
    "fit",
    "load_recipe",
    "outputs",
    "score",
    "train",
]

_NAMES = {
    "demo": ("DemoResult", "demo"),
    "evaluate": ("evaluate", "outputs"),
    "loop": ("TrainResult", "train"),
    "recipe": ("Recipe", "builtin_recipes", "load_recipe"),
    "run": ("fit", "score"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


class _Package(ModuleType):
    """Loads names on first use, so that the command line starts without importing PyTorch."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # demo and evaluate are functions here; importing the modules of these names must not put those in their place.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted(__all__)


sys.modules[__name__].__class__ = _Package
