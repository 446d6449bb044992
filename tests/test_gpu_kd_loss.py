"""kd_loss on CUDA against the float64 reference, and on CUDA alone: no synchronisation, graph capture, few launches."""

from __future__ import annotations

from typing import Any

import kd_cases
import pytest
import torch
from tolerances import assert_matches_reference

from lrds_fast import kd_loss, kd_loss_parts, reference
from lrds_fast.functional import kd_logit_gradient

pytestmark = pytest.mark.gpu

# Beyond the CPU's sizes: a row for a block, one for a cluster, and one that no cluster's shared memory holds.
CLASSES = (*kd_cases.CLASSES, 21841, 128256, 300000)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_matches_reference(dtype: torch.dtype, classes: int) -> None:
    rows = 9 if classes < 20000 else 5
    tensors = kd_cases.rows(rows, classes, dtype, device="cuda")
    for extra in (
        {},
        {"revise": None, "temperature": 2.5},
        {"temperature": 1.0, "label_smoothing": 0.1, "reduction": "none"},
        {"selected": torch.arange(rows, device="cuda") % 3 > 0, "reduction": "sum"},
        {"selected": torch.linspace(0, 1, rows, device="cuda"), "reduction": "elementmean"},
    ):
        assert_matches_reference(kd_loss_parts, *tensors, **extra)


@pytest.mark.parametrize("classes", [10, 1000, 4097])
@pytest.mark.parametrize("teacher", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize("student", kd_cases.FLOATING, ids=str)
def test_mixed_types(student: torch.dtype, teacher: torch.dtype, classes: int) -> None:
    assert_matches_reference(kd_loss_parts, *kd_cases.rows(7, classes, student, teacher, device="cuda"))


@pytest.mark.parametrize("classes", [10, 33, 1001, 4097, 21841])
@pytest.mark.parametrize("layout", kd_cases.LAYOUTS)
def test_layouts(layout: str, classes: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, target = kd_cases.rows(6, classes, dtype, device="cuda")
        student, teacher = kd_cases.strided(student, layout), kd_cases.strided(teacher, layout)
        assert_matches_reference(kd_loss_parts, student, teacher, target)


@pytest.mark.parametrize("rows", [1, 127, 5000, 70000])
def test_many_rows(rows: int) -> None:
    """The denominator is counted inside the row kernel, in other ways for few rows than for many."""
    student, teacher, target = kd_cases.rows(rows, 10, device="cuda")
    target[::3] = -100
    assert_matches_reference(kd_loss_parts, student, teacher, target)
    assert_matches_reference(kd_loss_parts, student, teacher[: rows // 2], target, teacher_rows=rows // 2)
    assert_matches_reference(kd_loss_parts, student, teacher, target.int(), num_valid=17.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(300, 21841), (100, 128256), (50, 213000)])
def test_many_long_rows(rows: int, classes: int, dtype: torch.dtype) -> None:
    """Several rows through each cluster's ring of tiles, some of them without teacher, some without student."""
    student, teacher, target = kd_cases.rows(rows, classes, dtype, device="cuda")
    selected = target % 3 > 0
    target[::7] = -100
    assert_matches_reference(kd_loss_parts, student, teacher, target, selected=selected)
    first = kd_loss_parts(student, teacher, target, selected=selected, reduction="none").loss
    for _ in range(3):
        again = kd_loss_parts(student, teacher, target, selected=selected, reduction="none").loss
        assert torch.equal(first, again)


@pytest.mark.parametrize("rows", [0, 5])
def test_empty_and_ignored(rows: int) -> None:
    student, teacher, target = kd_cases.rows(rows, 33, device="cuda")
    target.fill_(-100)
    student.fill_(float("nan")).requires_grad_()
    parts = kd_loss_parts(student, teacher, target)
    parts.loss.backward()
    assert parts.loss.item() == 0 and parts.n_valid.item() == 0
    assert student.grad is not None and not student.grad.any()


@pytest.mark.parametrize("classes", [10, 1000, 21841])
def test_target_out_of_range_is_nan_in_that_row_only(classes: int) -> None:
    student, teacher, target = kd_cases.rows(6, classes, device="cuda")
    target[2], target[4] = classes, -1
    student.requires_grad_()
    loss = kd_loss(student, teacher, target, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    bad = torch.tensor([False, False, True, False, True, False], device="cuda")
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(gradient.isnan().all(dim=1), bad)
    assert torch.equal(gradient.isnan().any(dim=1), bad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_beyond_the_first(reduction: str) -> None:
    """Backward runs on a thread of autograd's there, and calls into Python for these."""
    student, teacher, target = kd_cases.rows(6, 33, torch.float64, device="cuda")
    student.requires_grad_()
    ours, theirs = (loss(student, teacher, target, reduction=reduction) for loss in (kd_loss, reference.kd_loss))
    several = torch.linspace(-1.0, 2.0, 3 * ours.numel(), dtype=torch.float64, device="cuda").view(3, *ours.shape)
    results = []
    for loss in (ours, theirs):
        (first,) = torch.autograd.grad(loss.sum(), student, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), student, retain_graph=True)
        results.append((second, *torch.autograd.grad(loss, student, several, is_grads_batched=True)))
    torch.testing.assert_close(*results)


def test_nothing_synchronises() -> None:
    student, teacher, target = kd_cases.rows(64, 1000, device="cuda")
    student.requires_grad_()
    scale = torch.full((), 1024.0, device="cuda")
    kd_loss(student, teacher, target).backward()  # first use asks the device about itself
    torch.cuda.set_sync_debug_mode("error")
    try:
        options: list[dict[str, Any]] = [
            {},
            {"reduction": "none"},
            {"num_valid": 60.0, "grad_scale": scale},
            {"grad_scale": 1024.0},
        ]
        for extra in options:
            parts = kd_loss_parts(student, teacher, target, selected=target > 10, **extra)
            parts.loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(64, 100), (8192, 10), (33, 1001), (4, 21841)])
def test_graph_capture(shape: tuple[int, int]) -> None:
    student, teacher, target = kd_cases.rows(*shape, device="cuda")
    student.requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss = kd_loss(student, teacher, target)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

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
        tensor.fill_(float("nan"))
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("shape", [(64, 100), (8192, 10), (257, 1001), (8, 128256)])
def test_same_bits_every_time(shape: tuple[int, int]) -> None:
    student, teacher, target = kd_cases.rows(*shape, torch.bfloat16, device="cuda")
    student.requires_grad_()
    runs = []
    for _ in range(5):
        loss = kd_loss(student, teacher, target)
        runs.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    assert all(torch.equal(run[0], runs[0][0]) and torch.equal(run[1], runs[0][1]) for run in runs)


@pytest.mark.parametrize("shape", [(64, 10), (64, 1000), (8192, 1000), (64, 4096)])
def test_launches(shape: tuple[int, int]) -> None:
    """Up to 4096 classes: a row kernel, a finalize kernel, at most one memset; backward adds the scale kernel."""
    student, teacher, target = kd_cases.rows(*shape, device="cuda")
    student.requires_grad_()
    one = torch.ones((), device="cuda")
    torch.autograd.grad(kd_loss(student, teacher, target), student, one)

    def launched() -> list[str]:
        events = profile.events()
        assert events is not None
        cuda = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        return [event.name for event in events if event.device_type == cuda]

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss = kd_loss(student, teacher, target)
        torch.cuda.synchronize()
    memsets = [name for name in launched() if "emset" in name]
    kernels = [name for name in launched() if name not in memsets]
    assert 1 <= len(kernels) <= 2 and len(memsets) <= 1, launched()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(loss, student, one)
        torch.cuda.synchronize()
    assert len(launched()) <= 1, launched()


def test_grad_scaler_and_autocast() -> None:
    """float16 logits, a float32 loss, and the scaled gradient rounded once, announced to the loss or not."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 100, device="cuda")
    inputs, teacher = torch.randn(32, 64, device="cuda"), torch.randn(32, 100, device="cuda")
    target = torch.randint(100, (32,), device="cuda")
    scaler = torch.amp.GradScaler("cuda", init_scale=65536.0)
    assert scaler._scale is None  # before first use: as good as no grad_scale
    for _ in range(2):
        with torch.autocast("cuda", dtype=torch.float16):
            logits = model(inputs)
            loss = kd_loss(logits, teacher, target, grad_scale=scaler._scale)
        assert logits.dtype == torch.float16 and loss.dtype == torch.float32
        logits.retain_grad()
        scaler.scale(loss).backward()
        assert logits.grad is not None and logits.grad.dtype == torch.float16
        exact = logits.detach().double().requires_grad_()
        reference.kd_loss(exact, teacher.double(), target).backward()
        assert exact.grad is not None
        torch.testing.assert_close(logits.grad.double(), 65536.0 * exact.grad, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("announced", [False, True])
def test_grad_scaler_skips_a_step_that_overflows(announced: bool) -> None:
    model = torch.nn.Linear(64, 100, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, teacher = torch.randn(32, 64, device="cuda"), torch.randn(32, 100, device="cuda")
    target = torch.randint(100, (32,), device="cuda")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30)
    before = model.weight.detach().clone()
    for step in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            scale: Any = scaler._scale if announced else None
            loss = kd_loss(model(inputs), teacher, target, grad_scale=scale)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 0:
            assert torch.equal(model.weight, before), "a step with infinite gradients was taken"
    assert not torch.equal(model.weight, before) and model.weight.isfinite().all()
    assert scaler.get_scale() < 2.0**30


def test_compiles_fullgraph() -> None:
    student, teacher, target = kd_cases.rows(64, 1000, device="cuda")
    student.requires_grad_()

    def step(z: torch.Tensor, v: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return kd_loss(2.0 * z, v, y) * 3.0

    compiled = torch.compile(step, fullgraph=True)
    for f in (step, compiled):
        loss = f(student, teacher, target)
        gradient = torch.autograd.grad(loss, student)[0]
        if f is step:
            expected = (loss.detach(), gradient)
    torch.testing.assert_close((loss.detach(), gradient), expected)


def test_logit_gradient() -> None:
    for classes in (10, 1000, 4097):
        student, teacher, target = kd_cases.rows(65, classes, torch.float16, device="cuda")
        actual = kd_logit_gradient(student, teacher, target, ce_weight=-0.9, kd_weight=0.9)
        expected = reference.kd_logit_gradient(
            student.double(), teacher.double(), target, ce_weight=-0.9, kd_weight=0.9
        )
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_more_than_two_to_the_31_elements() -> None:
    classes = 128256
    rows = (1 << 31) // classes + 2
    if torch.cuda.mem_get_info()[0] < 4 * rows * classes * 2 + (4 << 30):
        pytest.skip("needs about 21 GiB of free GPU memory")
    student = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    teacher = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    target = torch.full((rows,), 5, device="cuda")
    tail = kd_cases.rows(2, classes, torch.bfloat16, device="cuda")
    student[-2:], teacher[-2:], target[-2:] = tail
    loss = kd_loss(student.requires_grad_(), teacher, target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, student)
    small = tail.student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(kd_loss(small, tail.teacher, tail.target, reduction="sum"), small)
    assert torch.equal(gradient[-2:], expected)
