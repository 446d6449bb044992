"""The program that compute-sanitizer runs on a GPU, run on the CPU: its cases are right before a GPU sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_on_the_cpu() -> None:
    program = Path(__file__).with_name("gpu_small_cases.py")
    done = subprocess.run([sys.executable, str(program), "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == ["cases"]
