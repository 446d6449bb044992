"""The trainer: recipes, one loop, checkpoints, reports, the demo, and the command line over them."""

from __future__ import annotations

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
