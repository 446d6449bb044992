"""lrds-fast bench: runs the benchmark suites of a source checkout.

Each suite is a program of its own, because suites import modules that the package must not import.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import lrds_fast
from lrds_fast.cli.command import OK, Subparsers, add_command

_CHECKOUT = Path(lrds_fast.__file__).resolve().parent.parent


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "bench",
        run,
        summary="run the benchmarks on this machine; write the results as CSV, tables and plots",
        example="lrds-fast bench kd_loss --quick",
    )
    parser.add_argument(
        "suites", metavar="SUITE", nargs="*", help="benchmarks to run, as --list names them (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the suites and exit")
    parser.add_argument("--quick", action="store_true", help="measure a few small shapes only")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--pages", type=Path, help="folder for the tables and plots (default: that of --out)")


def run(options: argparse.Namespace) -> int:
    """Runs the suites and prints the paths of their pages; returns the exit code."""
    if options.list:
        print("\n".join(suites()))
        return OK
    import lrds_fast.functional  # noqa: F401  a missing extension is one line here, and a traceback in each suite

    pages = run_suites(
        options.suites or list(suites()),
        device=options.device,
        threads=options.threads,
        quick=options.quick,
        out=options.out,
        pages=options.pages or options.out,
    )
    print("\n".join(f"page: {page}" for page in pages))
    return OK


def suites() -> dict[str, Path]:
    """Suite name -> program. Raises FileNotFoundError where the package was installed without its sources."""
    folder = _CHECKOUT / "benchmarks"
    programs = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if not programs:
        raise FileNotFoundError(
            f"the benchmarks are part of the source checkout, and there is no {folder}; clone the repository and run"
            " lrds-fast bench from an editable install (pip install --no-build-isolation -e .)"
        )
    return programs


def run_suites(names: Sequence[str], *, device: str, threads: int, quick: bool, out: Path, pages: Path) -> list[Path]:
    """Runs the suites one after the other; returns the paths of their pages.

    names: keys of suites(). device: "cpu" or "cuda". threads: CPU threads, >= 1. Writes <suite>_<device>.csv into out,
    its table (.md) and plot (.svg) into pages. Raises ValueError for an unknown suite and RuntimeError for a suite that
    fails; its own message is on stderr.
    """
    from lrds_fast.pages import charts

    known = suites()
    for name in names:
        if name not in known:
            raise ValueError(f"there is no suite {name!r}; there are: {', '.join(known)}")
    if threads < 1:
        raise ValueError(f"--threads must be >= 1; got {threads}")
    charts.require()
    if importlib.util.find_spec("pytest") is None:
        raise ImportError("the benchmarks need pytest: pip install pytest pytest-benchmark")
    out.mkdir(parents=True, exist_ok=True)
    rendered = []
    for name in names:
        stored = out / f"{name}_{device}.csv"
        command = [sys.executable, "-m", f"benchmarks.{known[name].stem}", "--device", device, "--csv", str(stored)]
        command += ["--quick"] if quick else []
        command += ["--threads", str(threads)] if device == "cpu" else []
        _run_program(command, name)
        _run_program([sys.executable, "-m", "benchmarks.render", str(stored), "--out", str(pages)], f"{name}'s page")
        rendered.append(pages / f"{stored.stem}.md")
    return rendered


def _run_program(command: list[str], what: str) -> None:
    path = os.pathsep.join([str(_CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}).returncode
    if code != 0:
        raise RuntimeError(f"{what} ended with exit code {code}; the command was: {' '.join(command)}")
