"""Calls one case of tests/path_cases.py at its timed size, for a profiler: python tools/gpu_profile.py CASE"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import path_cases  # noqa: E402
import torch  # noqa: E402

case = path_cases.CASES[sys.argv[1]]
call, _ = path_cases.timed(case, "cuda", case.timed_rows)
call()
torch.cuda.synchronize()
