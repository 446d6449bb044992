"""Runs, read back from their folders."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrds_fast.files import read_records
from lrds_fast.recipe.recipe import Recipe
from lrds_fast.train.folder import LOG, read_recipe
from lrds_fast.train.summary import SUMMARY


@dataclass(frozen=True)
class Run:
    """A run's folder, recipe, log and summary; summary is {} for a run that has not finished."""

    folder: Path
    recipe: Recipe
    records: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> dict[str, Any]:
        """The last epoch's record."""
        return self.records[-1]


def read_run(folder: Path) -> Run:
    """The run in `folder`. FileNotFoundError without a run, ValueError without a finished epoch or if it is damaged."""
    recipe = read_recipe(folder)
    records = read_records(folder / LOG, keys=("epoch", "rows", "test_acc", "test_ce"))
    if not records:
        raise ValueError(f"{folder} has no finished epoch yet; continue it with lrds-fast train --resume")
    return Run(folder, recipe, records, read_summary(folder))


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of the run in `folder`, {} where it has none; ValueError for a damaged one."""
    path = folder / SUMMARY
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); the run's folder is damaged") from error
    if not isinstance(facts, dict) or not {"class_names", "test", "teacher", "made"} <= facts.keys():
        raise ValueError(f"{path} is not a summary of this version; delete it: reports work without it")
    return facts


def last_values(group: Sequence[Run], key: str) -> list[float]:
    """The value of `key` after each run's last epoch; nan where it was not finite, which the log stores as null."""
    return [math.nan if run.last[key] is None else run.last[key] for run in group]
