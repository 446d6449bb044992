"""lrds-fast cache: stores the logits of a recipe's teacher."""

from __future__ import annotations

import argparse

from lrds_fast.cli.command import (
    OK,
    RESUME_HINT,
    Subparsers,
    add_command,
    add_recipe,
    add_resume_or_overwrite,
    shows_progress,
)


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "cache",
        run,
        summary="run a recipe's teacher once and store its logits in the folder teacher.cache, which training reads",
        example="lrds-fast cache digits_kd --set teacher.cache=runs/soft_labels --set teacher.cache_views=4",
        interrupted_hint=RESUME_HINT,
    )
    add_recipe(parser, "seed", "device")
    parser.add_argument(
        "--selected", action="store_true", help="store only the logits of the samples that selection.path keeps"
    )
    add_resume_or_overwrite(
        parser,
        resume="continue where an earlier command was stopped, and write damaged files again",
        overwrite="replace the files in the folder",
    )


def run(options: argparse.Namespace) -> int:
    """Writes the cache and prints its size; returns the exit code."""
    from lrds_fast.recipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.settings)

    from lrds_fast.data.label_files import size_text
    from lrds_fast.train.run import cache

    labels = cache(
        recipe,
        only_selected=options.selected,
        resume=options.resume,
        overwrite=options.overwrite,
        progress=shows_progress(options),
    )
    count = sum(int(labels.cached(view).sum()) for view in range(labels.views))
    kept = f"the {labels.top_k} largest" if labels.top_k else "all"
    print(
        f"{count} soft labels, {kept} of {labels.classes} classes, {labels.views} views:"
        f" {size_text(labels.bytes)} in {labels.folder}"
    )
    return OK
