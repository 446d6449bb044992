"""The divergence family on CUDA against the float64 reference, and under graph capture."""

from __future__ import annotations

import math
from typing import Any

import kd_cases
import pytest
import torch
from test_kd_loss_family import OPTIONS, assert_family, finish_options, soft_targets

from lrds_fast import TopKTeacher, kd_loss
from lrds_fast.divergences import Divergence

pytestmark = pytest.mark.gpu

# 33: a warp and one more. 1000: a block. 21841: rows that fill shared memory. 128256: rows that do not fit in it.
CLASSES = (1, 2, 33, 100, 1000, 21841, 128256)


def on_gpu(rows: kd_cases.Rows) -> list[torch.Tensor]:
    return [tensor.cuda() for tensor in rows]


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize("revise", kd_cases.REVISE)
@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_matches_reference(divergence: Divergence, revise: str | None, dtype: torch.dtype) -> None:
    for classes in CLASSES:
        student, teacher, target = on_gpu(kd_cases.family_rows(5 if classes > 1000 else 20, classes, dtype))
        assert_family(student, teacher, target, divergence=divergence, revise=revise, temperature=(2.5, 4.0))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_options_and_soft_targets(divergence: Divergence, options: dict[str, Any]) -> None:
    for classes in (17, 100):
        student, teacher, target = kd_cases.family_rows(20, classes)
        finished = finish_options(options, classes, torch.float32)
        if "class_weight" in finished:
            finished["class_weight"] = finished["class_weight"].cuda()
        soft = soft_targets(target, classes).float()
        for t in (target, soft):
            assert_family(student.cuda(), teacher.cuda(), t.cuda(), divergence=divergence, **finished)


@pytest.mark.parametrize("classes", [33, 60000])
@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_cached_teacher(divergence: Divergence, classes: int) -> None:
    student, teacher, target = on_gpu(kd_cases.family_rows(12, classes))
    teacher[3] += torch.linspace(-1, 1, classes, device="cuda")
    cached = TopKTeacher.from_logits(teacher / 8, 9, temperature=2.0)
    for revise in kd_cases.REVISE:
        assert_family(student, cached, target, divergence=divergence, revise=revise, temperature=2.0)


@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_bad_rows_are_nan(divergence: Divergence) -> None:
    """A target or a cached class out of range, a weight outside [0, 1]: that row alone, without a synchronisation."""
    student, teacher, target = on_gpu(kd_cases.family_rows(6, 10))
    selected = torch.ones(6, device="cuda")
    target[1], selected[2] = 10, 1.5
    z = student.requires_grad_()
    loss = kd_loss(
        z, teacher, target, selected=selected, divergence=divergence, reduction="none", temperature=(1.0, 2.0)
    )
    assert loss.isnan().tolist() == [False, True, True, False, False, False]
    (gradient,) = torch.autograd.grad(loss.nan_to_num().sum(), z)
    assert gradient[[1, 2]].isnan().all() and gradient[[0, 3, 4, 5]].isfinite().all()
    cached = TopKTeacher.from_logits(teacher, 3, temperature=1.0)
    cached.indices[4, 0] = 11
    rows = kd_loss(student, cached, target.clamp(max=9), divergence=divergence, reduction="none", temperature=1.0)
    assert rows.isnan().tolist() == [False] * 4 + [True, False]


@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_graph_capture(divergence: Divergence) -> None:
    student, teacher, target = on_gpu(kd_cases.family_rows(64, 100))
    student.requires_grad_()
    weight = torch.linspace(0.5, 1.5, 100, device="cuda")

    def step() -> list[torch.Tensor]:
        loss = kd_loss(student, teacher, target, divergence=divergence, class_weight=weight, temperature=(2.0, 4.0))
        return [loss.detach(), torch.autograd.grad(loss, student)[0]]

    expected = [tensor.clone() for tensor in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.fill_(math.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
