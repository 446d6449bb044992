"""Many runs, one after the other: finished ones are kept, interrupted ones go on, failed ones do not stop the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lrds_fast.train import run
from lrds_fast.train.recipe import Recipe
from lrds_fast.train.report import Run, read_run


def listed(sources: Sequence[str]) -> list[str]:
    """The sources; @FILE stands for the lines of a file, but for empty ones and comments (#)."""
    found = []
    for source in sources:
        if not source.startswith("@"):
            found.append(source)
            continue
        lines = Path(source[1:]).read_text(encoding="utf-8").splitlines()
        found += [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return found


def sweep(
    recipes: Sequence[Recipe],
    *,
    seeds: Sequence[int] | None = None,
    progress: bool = True,
    say: Callable[[str], object] = print,
) -> tuple[list[Run], list[tuple[str, str]]]:
    """Trains every recipe, with each of `seeds` in a folder of its own; (finished runs, (name, reason) of failed ones).

    A run whose folder has all of its epochs is not touched; any other goes on after its last checkpoint. say: is told
    of each run. Raises nothing that a single run raises for its own recipe, data or checkpoint.
    """
    planned = (
        [recipe for recipe in recipes]
        if seeds is None
        else [
            recipe.with_values(seed=seed, **{"run.out": str(recipe.out / f"seed{seed}")})
            for recipe in recipes
            for seed in seeds
        ]
    )
    failures = []
    finished = []
    for number, recipe in enumerate(planned, start=1):
        where = f"{recipe.name}, seed {recipe.seed}"
        before = f"[{number}/{len(planned)}] {where}: "
        if _is_finished(recipe):
            say(f"{before}finished already, in {recipe.out}")
        else:
            try:
                run.fit(recipe, resume=True, progress=progress)
            except (ValueError, TypeError, ArithmeticError, OSError, ImportError, RuntimeError) as error:
                failures.append((where, " ".join(str(error).split())))
                say(f"{before}failed: {failures[-1][1]}")
                continue
            say(f"{before}test accuracy {read_run(recipe.out).last['test_acc']:.2%}, in {recipe.out}")
        finished.append(read_run(recipe.out))
    return finished, failures


def _is_finished(recipe: Recipe) -> bool:
    """Whether the folder holds this recipe's run with all of its epochs."""
    try:
        found = read_run(recipe.out)
    except (FileNotFoundError, ValueError):
        return False
    same = found.recipe.with_values(**{"run.out": recipe.run.out}) == recipe
    return same and found.last["epoch"] == recipe.schedule.epochs
