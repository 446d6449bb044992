"""The command line that the benchmark suites have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.tables import Row, read_csv


def suite_parser(description: str | None, *, quick: str, threads: int | None = 1) -> argparse.ArgumentParser:
    """A parser with --device, --threads, --quick, --csv and --markdown. quick: the help of --quick."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--csv", type=Path, help="file to write the rows to; rewritten after every case")
    parser.add_argument("--markdown", type=Path, metavar="CSV", help="print the tables of a stored run and exit")
    return parser


def parse_suite(
    parser: argparse.ArgumentParser, table: Callable[[list[Row]], str], *, cpu_only: bool = False
) -> argparse.Namespace | None:
    """The arguments; None if --markdown was given, after the tables are printed. Exits with an error if --device is
    "cuda" and there is no CUDA device, or the suite is cpu_only."""
    arguments = parser.parse_args()
    if arguments.markdown is not None:
        say(table(read_csv(arguments.markdown)))
        return None
    if arguments.device == "cuda" and cpu_only:
        parser.error("this suite measures the CPU; run it with --device cpu")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    return arguments


def say(text: str) -> None:
    """Prints a line at once, also into a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
