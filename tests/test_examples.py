"""The examples run as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_drop_in_runs_and_revision_helps(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "drop_in.py")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    plain, revised = (float(value) for value in re.findall(r"student: test accuracy ([\d.]+)%", done.stdout))
    # A quarter of the teacher's rows are wrong; 2 points apart when written, a sign flip would be a bug.
    assert revised > plain + 0.5
