"""lrds-fast demo: the comparison of lrds_fast.cli.demo_experiment, as a table and a report."""

from __future__ import annotations

import argparse
from pathlib import Path

from lrds_fast.cli.command import OK, Subparsers, add_command, add_settings, shows_progress


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "demo",
        run,
        summary="compare the student alone, KD, KD+LR, KD+DS and KD+LR+DS, with few labels and a teacher that errs, in"
        " a table and a report",
        example="lrds-fast demo --out runs/demo",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, default=8, help="number of repetitions, each with another seed (default: %(default)s)"
    )
    add_settings(parser, "epochs")


def run(options: argparse.Namespace) -> int:
    """Trains everything and prints the table; returns the exit code."""
    from lrds_fast.cli.demo_experiment import NOTE, demo

    result = demo(options.out, seeds=options.seeds, settings=options.settings, progress=shows_progress(options))
    print("\n".join(result.introduction), end="\n\n")
    print(f"{result.table}\n\n{result.comparisons}\n{NOTE}", end="\n\n")
    print("\n".join(result.conclusions))
    print(f"\nreport: {result.report}")
    return OK
