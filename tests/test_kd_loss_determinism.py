"""The same bits for any thread count, the reference's numbers for every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kd_cases
import pytest
import torch
from torch import Tensor

import lrds_fast
from lrds_fast import kd_loss_parts


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def results(rows: kd_cases.Rows, **arguments: Any) -> list[Tensor]:
    student = rows.student.detach().requires_grad_()
    parts = kd_loss_parts(student, rows.teacher, rows.target, **arguments)
    weight = torch.ones_like(parts.loss)
    return [x.detach() for x in (*parts, *torch.autograd.grad(parts.loss, student, weight))]


# Many rows in uneven shares; rows long enough to be swept in blocks; fewer rows than threads.
@pytest.mark.parametrize("shape", [(20011, 10), (3001, 100), (513, 1001), (7, 40000), (2, 128256)])
@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows = kd_cases.rows(*shape, dtype)
    rows.target[shape[0] // 2] = -100
    selected = torch.rand(shape[0], generator=torch.Generator().manual_seed(2)) < 0.7
    for reduction in ("mean", "none"):
        torch.set_num_threads(1)
        arguments = {"selected": selected, "label_smoothing": 0.1, "reduction": reduction}
        expected = results(rows, **arguments)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for ours, theirs in zip(results(rows, **arguments), expected, strict=True):
                assert torch.equal(ours, theirs), threads


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize("classes", [10, 33, 100, 300, 1001, 40000])
def test_a_rows_bits_do_not_depend_on_other_rows(classes: int, dtype: torch.dtype) -> None:
    """Not on its place in the batch, its alignment, or the batch's size."""
    rows = kd_cases.rows(9, classes, dtype)
    whole = results(rows, reduction="none")
    for row in range(9):
        part = kd_cases.Rows._make(x[row : row + 1].clone() for x in rows)
        alone = results(part, reduction="none")
        assert torch.equal(alone[0][0], whole[0][row])
        assert torch.equal(alone[-1][0], whole[-1][row])
    for layout in ("wide rows", "unaligned", "every other row", "transposed"):
        moved = (kd_cases.strided(x, layout) for x in (rows.student, rows.teacher))
        for ours, theirs in zip(
            results(kd_cases.Rows._make([*moved, rows.target]), reduction="none"), whole, strict=True
        ):
            assert torch.equal(ours, theirs), layout


def test_repeated_calls_give_the_same_bits() -> None:
    rows = kd_cases.rows(3001, 100)
    expected = results(rows)
    for _ in range(20):
        for ours, theirs in zip(results(rows), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_the_backward_forms_agree() -> None:
    """Saved and recomputed gradients agree, and at grad_output 1 have the same bits."""
    rows = kd_cases.rows(33, 1001)
    student = rows.student.requires_grad_()
    saved = torch.autograd.grad(kd_loss_parts(*rows, reduction="sum").loss, student)[0]
    recomputed = torch.autograd.grad(kd_loss_parts(*rows, reduction="none").loss.sum(), student)[0]
    assert torch.equal(saved, recomputed)


LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")

CHECK_EVERYTHING = """
import itertools, sys, torch
import kd_cases, lrds_fast
from test_kd_loss_family import assert_family
from tolerances import assert_matches_reference
torch.set_num_threads(1)
for dtype, classes in itertools.product(kd_cases.FLOATING, (*kd_cases.CLASSES, *range(11, 31), 40000)):
    teacher = torch.float32 if classes == 33 else dtype
    rows = kd_cases.rows(5 if classes > 4097 else 35, classes, dtype, teacher, seed=classes)
    for temperature, smoothing in ((4.0, 0.0), (2.5, 0.1), (1.0, 0.0), (3.0, 0.0)):
        selected = torch.arange(rows.target.shape[0]) % 4 != 1
        for reduction in ("mean", "none"):
            assert_matches_reference(lrds_fast.kd_loss_parts, *rows, temperature=temperature,
                                     label_smoothing=smoothing, selected=selected, reduction=reduction)
    masked = kd_cases.rows(9, classes, dtype, seed=classes)
    masked.student[:, 1::3] = masked.teacher[:, 1::3] = -torch.inf
    masked.target.zero_()
    assert_matches_reference(lrds_fast.kd_loss_parts, *masked)
for dtype, classes, divergence in itertools.product(kd_cases.FLOATING, (2, 10, 33, 1001), kd_cases.FAMILY):
    assert_family(*kd_cases.family_rows(12, classes, dtype), divergence=divergence, revise="mft", temperature=2.5)
print("isa", lrds_fast._C.build_info()["cpu_isa"])
"""


def run_with_isa(level: str | None, code: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "LRDS_FAST_CPU_ISA"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    if level is not None:
        environment["LRDS_FAST_CPU_ISA"] = level
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def best_isa() -> str:
    """The compiled instruction sets that this CPU supports, whatever limit the test run has."""
    done = run_with_isa(None, 'import lrds_fast; print(lrds_fast._C.build_info()["cpu_isa"])')
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_sets_match_the_reference(level: str, best_isa: str) -> None:
    compiled = lrds_fast._C.build_info()["cpu_isas"]
    if level not in compiled:
        pytest.skip(f"{level} is not compiled into this build ({compiled})")
    if LEVELS.index(level) > LEVELS.index(best_isa):
        pytest.skip(f"this CPU runs {best_isa} at most")
    done = run_with_isa(level, CHECK_EVERYTHING)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:] == ["isa", level]


def test_unknown_instruction_set_is_reported() -> None:
    """A typing error must not silently run another level."""
    done = run_with_isa("avx9000", "import lrds_fast, kd_cases; lrds_fast.kd_loss(*kd_cases.rows(2, 3))")
    assert "avx9000" in done.stderr, "neither an error nor a warning"
