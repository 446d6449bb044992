"""Every kernel path on small inputs: what compute-sanitizer runs (tools/gpu_check.sh). Non-zero exit if wrong.

python tests/gpu_small_cases.py cpu        holds the cases themselves to the CPU's kernels
python tests/gpu_small_cases.py --paths    one case per path and type: minutes less under a sanitizer
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kd_cases
import path_cases
from test_kd_loss_family import assert_family
from tolerances import assert_matches_reference

from lrds_fast import kd_loss_parts
from lrds_fast.divergences import NAMES

devices = [argument for argument in sys.argv[1:] if argument != "--paths"]
device = devices[0] if devices else "cuda"
if "--paths" in sys.argv:
    for case in path_cases.CASES.values():
        path_cases.check(case, device)
    sys.stdout.write(f"{len(path_cases.CASES)} cases\n")
    sys.exit()
ran = 0
for classes in (1, 10, 64, 100, 200, 1000, 1001, 4097, 40000, 300000):
    for student_dtype, teacher_dtype in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        student, teacher, target = kd_cases.rows(7, classes, student_dtype, teacher_dtype, device=device)
        target[5] = -100
        for layout in ("back to back", "wide rows", "unaligned"):
            back_to_back = layout == "back to back"
            z = student if back_to_back else kd_cases.strided(student, layout)
            v = teacher if back_to_back else kd_cases.strided(teacher, layout)
            assert_matches_reference(kd_loss_parts, z, v, target)
            assert_matches_reference(kd_loss_parts, z, v, target, reduction="none", selected=target > classes // 2)
            ran += 2
for divergence in kd_cases.FAMILY:
    for classes in (10, 1001, 40000):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert_family(*(x.to(device) for x in kd_cases.family_rows(5, classes, dtype)), divergence=divergence)
            ran += 1
for name in NAMES:
    for classes in (10, 1001, 40000):
        path_cases.check(path_cases.PathCase("moments", 5, classes, divergence=name), device)
        ran += 1
# Several rows through each block's ring, and through each cluster's.
for rows, classes in ((300, 21841), (100, 128256)):
    student, teacher, target = kd_cases.rows(rows, classes, torch.bfloat16, device=device)
    assert_matches_reference(kd_loss_parts, student, teacher, target, selected=target % 3 > 0)
    ran += 1
student, teacher, target = kd_cases.rows(6000, 10, device=device)  # enough rows for the shared count
assert_matches_reference(kd_loss_parts, student, teacher, target)
sys.stdout.write(f"{ran + 1} cases\n")
