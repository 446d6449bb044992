"""The examples run as a reader would run them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Example -> the package it needs, and the least accuracy of its student in %. A student that learns nothing has 10 on
#: the digits, and 15 on the next byte of a text (a space).
LIBRARIES = {
    "with_liger": ("liger_kernel", 25.0),
    "with_lightning": ("lightning", 60.0),
    "with_modelopt": ("modelopt", 60.0),
    "with_repdistiller": ("torch", 60.0),
    "with_timm": ("timm.task", 60.0),
    "with_torchtune": ("torchtune", 25.0),
    "with_transformers": ("transformers", 20.0),
    "with_trl": ("trl", 25.0),
}


def run(example: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{example}.py")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )


def test_drop_in_runs_and_revision_helps(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    done = run("drop_in", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    plain, revised = (float(value) for value in re.findall(r"student: test accuracy ([\d.]+)%", done.stdout))
    # A quarter of the teacher's rows are wrong; 2 points apart when written, a sign flip would be a bug.
    assert revised > plain + 0.5


def test_every_library_has_an_example() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("with_*.py")} == set(LIBRARIES)


@pytest.mark.parametrize("example", LIBRARIES)
def test_an_example_with_another_library_trains_a_student(example: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    package, least = LIBRARIES[example]
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"needs {package.partition('.')[0]}: pip install 'lrds-fast[compat]'")
    done = run(example, tmp_path)
    assert done.returncode == 0, done.stderr
    (reached,) = re.findall(r"^student: test accuracy ([\d.]+)%$", done.stdout, re.MULTILINE)
    assert float(reached) > least
