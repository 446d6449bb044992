"""Edge cases of kd_loss on CUDA: values that must not be read, masked classes, factors of backward, streams, memory."""

from __future__ import annotations

import math

import kd_cases
import pytest
import torch
from tolerances import assert_matches_reference
from torch import Tensor

from lrds_fast import kd_loss, kd_loss_parts, revise_labels

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# A row in a few lanes, in a warp, in a block that keeps it, and in a block that has to read it again.
CLASSES = (10, 100, 1000, 4097, 60000)
POISON = (math.nan, math.inf, -math.inf)


def gradient(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student, torch.ones_like(loss))[0]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_ignored_rows_do_not_leak(dtype: torch.dtype, classes: int) -> None:
    student, teacher, target = kd_cases.rows(9, classes, dtype, device=DEVICE)
    for row, poison in zip((0, 3, 8), POISON, strict=True):
        target[row] = -100
        student[row] = teacher[row] = poison
    for reduction in ("mean", "none"):
        assert_matches_reference(kd_loss_parts, student, teacher, target, reduction=reduction, label_smoothing=0.1)
        leaf = student.clone().requires_grad_()
        loss = kd_loss(leaf, teacher, target, reduction=reduction)
        grad = gradient(loss, leaf)
        assert loss.isfinite().all() and grad.isfinite().all() and not grad[[0, 3, 8]].any()


@pytest.mark.parametrize("classes", CLASSES)
def test_teacher_of_unselected_rows_does_not_leak(classes: int) -> None:
    for dtype in kd_cases.FLOATING:
        student, teacher, target = kd_cases.rows(9, classes, dtype, device=DEVICE)
        mask = torch.ones(9, dtype=torch.bool, device=DEVICE)
        for row, poison in zip((1, 4, 7), POISON, strict=True):
            mask[row] = False
            teacher[row] = poison
        for selected in (mask, mask * 0.7):
            assert_matches_reference(kd_loss_parts, student, teacher, target, selected=selected)
            assert kd_loss(student, teacher, target, selected=selected).isfinite()


def test_terms_of_weight_zero_are_not_read() -> None:
    for classes in CLASSES:
        student, teacher, target = kd_cases.rows(9, classes, device=DEVICE)
        broken = torch.full_like(teacher, math.nan)
        assert_matches_reference(kd_loss_parts, student, broken, target, kd_weight=0.0)
        student[4] = math.nan
        selected = torch.arange(9, device=DEVICE) != 4
        assert_matches_reference(kd_loss_parts, student, teacher, target, selected=selected, ce_weight_unselected=0.0)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_masked_classes(dtype: torch.dtype, classes: int) -> None:
    """-inf in both logits excludes the class; in the teacher alone it costs 0; in the student alone the loss is inf."""
    student, teacher, target = kd_cases.rows(9, classes, dtype, device=DEVICE)
    masked_student, masked_teacher = student.clone(), teacher.clone()
    masked_student[:, 1::2] = masked_teacher[:, 1::2] = -math.inf
    even = target // 2 * 2
    for temperature in (4.0, 2.5):
        assert_matches_reference(kd_loss_parts, masked_student, masked_teacher, even, temperature=temperature)
        assert_matches_reference(kd_loss_parts, student, masked_teacher, target, temperature=temperature)
        assert_matches_reference(
            kd_loss_parts, masked_student, teacher, even, temperature=temperature, reduction="none"
        )
    leaf = masked_student.requires_grad_()
    grad = gradient(kd_loss(leaf, masked_teacher, even), leaf)
    assert grad.isfinite().all() and not grad[:, 1::2].any()


@pytest.mark.parametrize("classes", [33, 1000, 4097, 60000])
def test_one_finite_class(classes: int) -> None:
    """Lanes, warps and tiles that hold only -inf merge with the one that does not."""
    for finite in {0, 31, 32, classes // 2, classes - 1}:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            student = torch.full((2, classes), -math.inf, dtype=dtype, device=DEVICE)
            teacher = student.clone()
            student[:, finite], teacher[:, finite] = -2.0, 3.0
            leaf = student.requires_grad_()
            parts = kd_loss_parts(leaf, teacher, torch.full((2,), finite, device=DEVICE))
            assert parts.loss.item() == 0.0 and parts.n_revised.item() == 0
            assert not gradient(parts.loss, leaf).any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("classes", CLASSES)
def test_nan_and_inf_in_rows_that_count_are_not_hidden(classes: int, poison: float) -> None:
    for position in {0, 7, classes // 2, classes - 1}:
        for which in (0, 1):
            rows = kd_cases.rows(5, classes, device=DEVICE)
            rows[which][2, position] = poison
            rows.target[2] = (position + 1) % classes
            loss = kd_loss(*rows, reduction="none")
            assert not loss[2].isfinite(), (position, which)
            assert loss[[0, 1, 3, 4]].isfinite().all()


def test_ties_with_the_label_count_as_right() -> None:
    for classes in CLASSES:
        for dtype in kd_cases.FLOATING:
            teacher = torch.zeros(2, classes, dtype=dtype, device=DEVICE)
            teacher[:, 0] = teacher[:, classes - 1] = 3.0
            target = torch.tensor([0, classes - 1], device=DEVICE)
            assert kd_loss_parts(teacher, teacher, target).n_revised.item() == 0
            teacher[0, classes - 1] *= 1.0 + torch.finfo(dtype).eps
            assert kd_loss_parts(teacher, teacher, target).n_revised.item() == 1


def test_selection_weights_outside_the_unit_interval_give_nan_in_that_row() -> None:
    """The CPU raises an error; CUDA marks the row with NaN, because raising would need a synchronisation."""
    student, teacher, target = kd_cases.rows(6, 100, device=DEVICE)
    selected = torch.tensor([0.0, 1.5, 0.3, -0.1, math.nan, 1.0], device=DEVICE)
    loss = kd_loss(student, teacher, target, selected=selected, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, True, True, False]


@pytest.mark.parametrize("grad_output", [1.0, 0.0, -2.0, 65536.0])
@pytest.mark.parametrize("grad_scale", [None, 65536.0])
@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_grad_output_and_grad_scale(dtype: torch.dtype, grad_scale: float | None, grad_output: float) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    given = torch.tensor(grad_output, dtype=compute, device=DEVICE)
    scale = None if grad_scale is None else torch.tensor(grad_scale, device=DEVICE)
    for classes in (10, 1000, 4097):
        rows = kd_cases.rows(64, classes, dtype, device=DEVICE)
        assert_matches_reference(kd_loss_parts, *rows, grad_output=given, grad_scale=scale)
        per_row = given * torch.linspace(-1.0, 1.0, 64, dtype=compute, device=DEVICE)
        assert_matches_reference(kd_loss_parts, *rows, grad_output=per_row, reduction="none")


def test_gradients_survive_a_kept_graph() -> None:
    for dtype in kd_cases.FLOATING:
        student, teacher, target = kd_cases.rows(64, 100, dtype, device=DEVICE)
        student.requires_grad_()
        loss = kd_loss(student, teacher, target)
        results = []
        for factor in (1.0, 0.0, 2.0):
            (result,) = torch.autograd.grad(loss, student, torch.full_like(loss, factor), retain_graph=True)
            results.append((result, result.clone()))
        loss.backward()
        for result, copied in results:
            assert torch.equal(result, copied), "a later call changed an earlier result"
        assert not results[1][0].any()
        torch.testing.assert_close(results[0][0], student.grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("classes", [10, 104, 1000, 4096, 60000])  # every row as aligned as its copy
def test_a_rows_bits_do_not_depend_on_other_rows(classes: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, target = kd_cases.rows(40, classes, dtype, device=DEVICE)
        student.requires_grad_()
        loss = kd_loss(student, teacher, target, reduction="none")
        whole = gradient(loss, student)
        for row in (0, 7, 39):
            leaf = student.detach()[row : row + 1].clone().requires_grad_()
            alone = kd_loss(leaf, teacher[row : row + 1].clone(), target[row : row + 1], reduction="none")
            assert torch.equal(alone[0], loss[row])
            assert torch.equal(gradient(alone, leaf)[0], whole[row])


def test_agrees_with_the_cpu() -> None:
    """Equal counts, and values equal within the tolerance; the bits may differ."""
    for dtype in kd_cases.FLOATING:
        rows = kd_cases.rows(65, 1000, dtype)
        there = kd_cases.Rows(*(x.to(DEVICE) for x in rows))
        here, other = kd_loss_parts(*rows), kd_loss_parts(*there)
        torch.testing.assert_close(other.loss.cpu(), here.loss, rtol=1e-5, atol=0.0)
        assert [n.item() for n in other[3:]] == [n.item() for n in here[3:]]
        p = revise_labels(there.teacher, there.target)
        torch.testing.assert_close(p.cpu(), revise_labels(rows.teacher, rows.target), rtol=1e-5, atol=1e-7)


def test_error_names_both_devices() -> None:
    student, teacher, target = kd_cases.rows(6, 10, device=DEVICE)
    with pytest.raises(ValueError, match=r"teacher_logits.*cuda.*cpu"):
        kd_loss(student, teacher.cpu(), target)
    with pytest.raises(ValueError, match=r"target.*cuda.*cpu"):
        kd_loss(student, teacher, target.cpu())


def test_runs_on_the_current_stream() -> None:
    """Inputs that a side stream is still writing are read after it, without a synchronisation by the caller."""
    student, teacher, target = kd_cases.rows(4096, 1000, device=DEVICE)
    expected = kd_loss(student, teacher, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(student)
        torch.cuda._sleep(20_000_000)
        late.copy_(student)
        loss = kd_loss(late, teacher, target)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(loss, expected)


def test_memory_is_one_gradient() -> None:
    """Forward and backward together: one gradient of the student's type and a few numbers per row."""
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, target = kd_cases.rows(4096, 1000, dtype, device=DEVICE)
        student.requires_grad_()
        kd_loss(student, teacher, target).backward()
        student.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kd_loss(student, teacher, target).backward()
        added = torch.cuda.max_memory_allocated() - before
        assert added <= student.numel() * student.element_size() + 32 * 4096 + (1 << 16)


@pytest.mark.parametrize("divergence", ["kl", "dkd"])
@pytest.mark.parametrize("classes", [100, 1000, 128256])
def test_more_elements_than_32_bits_count(classes: int, divergence: str) -> None:
    """The rows beyond element 2^31 are the rows that a batch of them alone gives."""
    last = 8
    count = 2**31 // classes + last
    if torch.cuda.mem_get_info()[0] < 4 * 2 * count * classes:
        pytest.skip("needs 16 GiB of free device memory")
    rows = kd_cases.rows(last, classes, torch.bfloat16, device=DEVICE)
    student, teacher = (torch.zeros(count, classes, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    student[-last:], teacher[-last:] = rows.student, rows.teacher
    target = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    target[-last:] = rows.target
    student.requires_grad_()
    found = gradient(kd_loss(student, teacher, target, reduction="sum", divergence=divergence), student)
    alone = rows.student.requires_grad_()
    expected = gradient(kd_loss(alone, rows.teacher, rows.target, reduction="sum", divergence=divergence), alone)
    assert torch.equal(found[-last:], expected)
    assert torch.equal(found[-last - 1], found[0]) and found[0].any()
