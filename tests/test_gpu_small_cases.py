"""The first cases of a GPU run, on the CPU: their results are right, and the dispatch table gives their paths."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import path_cases
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Path of csrc/cuda/kd_loss_plan.h by the name of a case.
PATHS = {
    "short": 0,
    "short vector": 1,
    "flat": 2,
    "warp vector": 3,
    "warp element": 4,
    "block vector": 5,
    "two passes": 5,
    "block element": 6,
    "double": 6,
    "bulk, cluster 1": 7,
    "bulk, clusters": 7,
}
PLANS = """
#include <cstdio>

#include "cuda/kd_loss_plan.h"

using namespace lrds;

static void show(DType student, DType teacher, int rows, int classes, int stride) {
  alignas(16) static char memory[16];
  KdLossArgs args{};
  args.rows = args.teacher_rows = rows;
  args.classes = classes;
  args.student_stride = args.teacher_stride = stride;
  args.student = args.teacher = args.gradient = memory;
  args.student_type = student;
  args.teacher_type = teacher;
  args.accumulate = student == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  cuda::DeviceFacts device{};
  device.architecture = 90;
  device.multiprocessors = 132;
  device.shared_per_block = 232448;
  device.shared_per_multiprocessor = 233472;
  device.l2_bytes = 50 << 20;
  const cuda::Plan plan = cuda::plan_rows(args, device);
  std::printf("%d %d\\n", static_cast<int>(plan.path), plan.cluster);
}

int main() {
CALLS
}
"""


def test_every_case_takes_its_path(tmp_path: Path) -> None:
    """The dispatch table for an H100 or H200."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler}")
    types = {
        torch.float64: "kFloat64",
        torch.float32: "kFloat32",
        torch.bfloat16: "kBFloat16",
        torch.float16: "kFloat16",
    }
    cases = {name: case for name, case in path_cases.CASES.items() if case.kind == "loss"}
    calls = []
    for case in cases.values():
        student, teacher = (f"DType::{types[dtype]}" for dtype in (case.dtype, case.teacher_dtype or case.dtype))
        stride = case.classes + 7 * (case.layout == "wide rows")
        calls.append(f"  show({student}, {teacher}, {case.rows}, {case.classes}, {stride});")
    source, program = tmp_path / "plans.cpp", tmp_path / "plans"
    source.write_text(PLANS.replace("CALLS", "\n".join(calls)))
    includes = [f"-I{ROOT / folder}" for folder in ("csrc", "tests/simt", "tests/simt/include")]
    command = [compiler, "-std=c++20", "-DLRDS_SIMT", *includes, "-include", "cuda_runtime.h"]
    done = subprocess.run([*command, str(source), "-o", str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    taken = set()
    for name, line in zip(cases, lines, strict=True):
        path, cluster = map(int, line.split())
        kind = max((known for known in PATHS if name.startswith(known)), key=len)
        assert path == PATHS[kind], name
        assert path != 7 or (cluster == 1) == (kind == "bulk, cluster 1"), f"{name}: {cluster} blocks a row"
        taken.add(path)
    assert taken == set(range(8))


@pytest.mark.slow
@pytest.mark.parametrize("selection", [[], ["--paths"]], ids=["all", "paths"])
def test_on_the_cpu(selection: list[str]) -> None:
    program = Path(__file__).with_name("gpu_small_cases.py")
    done = subprocess.run(
        [sys.executable, str(program), "cpu", *selection], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    count, word = done.stdout.split()
    assert word == "cases"
    assert int(count) < 80 if selection else int(count) > 300
