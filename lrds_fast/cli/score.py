"""lrds-fast score: scores the training samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from lrds_fast.cli.command import OK, Subparsers, add_command, add_recipe, shows_progress
from lrds_fast.notes import first_process


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "score",
        run,
        summary="score every training sample, to select those that keep their teacher",
        example="lrds-fast score digits_kd --set score.curvature=exact",
    )
    add_recipe(parser, "seed", "device")
    parser.add_argument("--out", type=Path, help="Parquet file to write (default: scores.parquet in the run's folder)")


def run(options: argparse.Namespace) -> int:
    """Writes the scores as a Parquet file; returns the exit code."""
    from lrds_fast.recipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.settings)

    import lrds_fast
    from lrds_fast.train.run import score

    scores = score(recipe, progress=shows_progress(options))
    if not first_process():
        return OK  # under torchrun every process has the scores, and the first one writes them
    path = options.out or recipe.out / "scores.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Scores are stored as a selection that keeps every sample: it has the same columns, the labels and the fingerprint.
    lrds_fast.select(scores, by=next(iter(scores)), ratio=1.0).save(path)
    print(f"{len(scores.target)} samples, scores {', '.join(scores)}: {path}")
    return OK
