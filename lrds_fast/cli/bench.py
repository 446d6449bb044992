"""Runs the benchmark suites of a source checkout, each as the program it is: they import what the package may not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import lrds_fast
from lrds_fast.pages import charts

_CHECKOUT = Path(lrds_fast.__file__).resolve().parent.parent


def suites() -> dict[str, Path]:
    """Suite name -> program. Raises FileNotFoundError where the package was installed without its sources."""
    folder = _CHECKOUT / "benchmarks"
    found = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if not found:
        raise FileNotFoundError(
            f"the benchmarks are part of the source checkout, and there is no {folder}; clone the repository and run"
            " lrds-fast bench from an editable install (pip install --no-build-isolation -e .)"
        )
    return found


def run_suites(names: Sequence[str], *, device: str, threads: int, quick: bool, out: Path, pages: Path) -> list[Path]:
    """Runs the suites one after the other; returns the pages they were rendered to.

    names: of suites(). device: "cpu" or "cuda". threads: of the CPU, >= 1. Writes <suite>_<device>.csv into out, its
    table (.md) and plot (.svg) into pages. Raises ValueError for an unknown suite, RuntimeError for one that failed:
    its own message is on stderr.
    """
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
        _run(command, name)
        _run([sys.executable, "-m", "benchmarks.render", str(stored), "--out", str(pages)], f"{name}'s page")
        rendered.append(pages / f"{stored.stem}.md")
    return rendered


def _run(command: list[str], what: str) -> None:
    path = os.pathsep.join([str(_CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}).returncode
    if code != 0:
        raise RuntimeError(f"{what} ended with exit code {code}; the command was: {' '.join(command)}")
