"""Many runs, one after the other: finished ones are kept, interrupted ones go on, failed ones do not stop the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrds_fast.recipe.recipe import Recipe, from_mapping, read_text

if TYPE_CHECKING:
    from lrds_fast.report.runs import Run


def listed(sources: Sequence[str]) -> list[str]:
    """The sources; @FILE stands for the lines of a file, but for empty ones and comments (#)."""
    found = []
    for source in sources:
        if not source.startswith("@"):
            found.append(source)
            continue
        lines = read_text(Path(source[1:]), "list").splitlines()
        found += [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return found


def planned(recipes: Sequence[Recipe], seeds: Sequence[int] | None = None) -> list[Recipe]:
    """The runs of a sweep: each recipe as it is, or once per seed in OUT/seedN.

    Raises ValueError where two runs have the same name and seed or the same folder, and where a folder is not writable
    or contains another run, which cannot be resumed.
    """
    runs = (
        list(recipes)
        if seeds is None
        else [
            recipe.with_values(seed=seed, **{"run.out": str(recipe.out / f"seed{seed}")})
            for recipe in recipes
            for seed in seeds
        ]
    )
    names: set[str] = set()
    folders: dict[Path, str] = {}
    for recipe in runs:
        where = _where(recipe)
        if where in names:
            raise ValueError(f"{where} is given twice; give each recipe and each seed once")
        names.add(where)
        folder = recipe.out.resolve()
        if folder in folders:
            raise ValueError(
                f"run.out must differ between runs; {folders[folder]} and {where} have {recipe.out}: leave it out to"
                " write to runs/NAME"
            )
        folders[folder] = where
        if not (recipe.out.is_dir() and _is_finished(recipe)):  # what is finished is only read
            check_writable(recipe.out, "run.out")
    for recipe in runs:
        _check_earlier_run(recipe)
    return runs


def check_writable(path: Path, key: str, *, folder: bool = True) -> None:
    """ValueError, naming `key`, unless `path` is or can become a writable folder, or with folder=False a file."""
    if path.exists() and path.is_dir() != folder:
        kind, other = ("folder", "file") if folder else ("file", "folder")
        raise ValueError(f"{key}: {path} must be a {kind}; it is a {other}: choose another path")
    wanted = (path if folder else path.parent).absolute()
    there = next(place for place in (wanted, *wanted.parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"{key}: {path} cannot be written: {there} is not a writable folder")


def _check_earlier_run(recipe: Recipe) -> None:
    from lrds_fast.train.folder import CHECKPOINT, RECIPE, identity

    path = recipe.out / RECIPE
    if not path.is_file() or not (recipe.out / CHECKPOINT).is_file():
        return
    try:
        found = from_mapping(json.loads(path.read_text(encoding="utf-8")), where=str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); the run's folder is damaged") from error
    before = identity(found, "", None)
    for key, value in identity(recipe, "", None).items():
        if before[key] != value:
            raise ValueError(
                f"{recipe.out} contains another run, with {key} {before[key]}; {_where(recipe)} has {value}: set"
                " another run.out, or move the older run away"
            )


def _where(recipe: Recipe) -> str:
    return f"{recipe.name}, seed {recipe.seed}"


def sweep(
    recipes: Sequence[Recipe],
    *,
    seeds: Sequence[int] | None = None,
    progress: bool = True,
    say: Callable[[str], object] = print,
    say_epoch: Callable[[str], object] | None = None,
) -> tuple[list[Run], list[tuple[str, str]]]:
    """Trains planned(recipes, seeds) and returns (finished runs, (name, reason) of failed ones).

    Finished runs are kept; the others resume from their last checkpoint. say is called with a line per run, say_epoch
    with a line per epoch. Raises what planned raises, before the first run. Errors of a single run are not raised: they
    are returned.
    """
    from lrds_fast.report.runs import read_run
    from lrds_fast.train import run

    runs = planned(recipes, seeds)
    failures = []
    finished = []
    for number, recipe in enumerate(runs, start=1):
        where = _where(recipe)
        before = f"[{number}/{len(runs)}] {where}: "
        if _is_finished(recipe):
            say(f"{before}finished already, in {recipe.out}")
        else:
            try:
                prefixed = _prefixed(say_epoch, f"[{number}/{len(runs)}] seed {recipe.seed}, ")
                run.fit(recipe, resume=True, progress=progress, say=prefixed)
            except (ValueError, TypeError, ArithmeticError, OSError, ImportError, RuntimeError) as error:
                failures.append((where, " ".join(str(error).split())))
                say(f"{before}failed: {failures[-1][1]}")
                continue
            say(f"{before}test accuracy {read_run(recipe.out).last['test_acc']:.2%}, in {recipe.out}")
        finished.append(read_run(recipe.out))
    return finished, failures


def _prefixed(say: Callable[[str], object] | None, prefix: str) -> Callable[[str], object] | None:
    return None if say is None else lambda line: say(prefix + line)


def _is_finished(recipe: Recipe) -> bool:
    """Whether the folder holds this recipe's run with all of its epochs."""
    from lrds_fast.report.runs import read_run
    from lrds_fast.train.setup import resolved

    try:
        found = read_run(recipe.out)
    except (FileNotFoundError, ValueError):
        return False
    same = resolved(found.recipe.with_values(**{"run.out": recipe.run.out})) == resolved(recipe)
    return same and found.last["epoch"] == recipe.schedule.epochs
