"""lrds-fast train: trains one recipe."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lrds_fast.cli.command import (
    OK,
    RESUME_HINT,
    Subparsers,
    add_command,
    add_recipe,
    add_resume_or_overwrite,
    epoch_printer,
    shows_progress,
)
from lrds_fast.notes import first_process
from lrds_fast.recipe.keys import help_text

if TYPE_CHECKING:
    from lrds_fast.recipe.recipe import Recipe


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "train",
        run,
        summary="train a recipe",
        example="lrds-fast train digits_alone --epochs 20 --seed 1 --set optimizer.lr=0.1",
        interrupted_hint=RESUME_HINT,
    )
    parser.details = help_text
    add_recipe(parser, "seed", "epochs", "device", "out")
    add_resume_or_overwrite(
        parser,
        resume="continue from the run's last checkpoint, if there is one",
        overwrite="replace an older run in the same folder",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check recipe, data and networks, print all values of the recipe as JSON, and train nothing",
    )


def run(options: argparse.Namespace) -> int:
    """Trains the recipe and prints the last test accuracy; returns the exit code."""
    from lrds_fast.recipe.recipe import load_recipe

    # Before PyTorch is imported, so that an error in the recipe is reported at once.
    recipe = load_recipe(options.recipe, options.settings)

    if options.dry_run:
        return _dry_run(recipe, replaces=options.resume or options.overwrite)
    from lrds_fast.train.run import fit

    result = fit(
        recipe,
        resume=options.resume,
        overwrite=options.overwrite,
        progress=shows_progress(options),
        say=epoch_printer(options),
    )
    if not first_process():
        return OK
    last = result.records[-1]
    best = max(record["test_acc"] for record in result.records)
    print(
        f"{recipe.name}: test accuracy {last['test_acc']:.2%} after epoch {last['epoch']} (best epoch {best:.2%}),"
        f" test cross-entropy {last['test_ce']:.4f}; {recipe.out}"
    )
    return OK


def _dry_run(recipe: Recipe, *, replaces: bool) -> int:
    """Checks what training needs, and prints the recipe. replaces: whether an older run in its folder is expected."""
    from lrds_fast.cli.sweep import check_writable
    from lrds_fast.notes import note
    from lrds_fast.train.folder import CHECKPOINT, older_run
    from lrds_fast.train.run import check
    from lrds_fast.train.setup import resolved

    check_writable(recipe.out, "run.out")
    if (recipe.out / CHECKPOINT).exists() and not replaces:
        raise older_run(recipe.out)
    what = check(recipe)
    if first_process():
        print(resolved(recipe).to_json())
        note(f"nothing was trained: {what}, into {recipe.out}")
    return OK
