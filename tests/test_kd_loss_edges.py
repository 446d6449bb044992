"""Edge cases of kd_loss: rows without weight, masked classes, ties, empty batches, exact identities."""

from __future__ import annotations

import math
from typing import Any

import kd_cases
import pytest
import torch
from tolerances import TOLERANCES, assert_matches_reference, sizes
from torch import Tensor

from lrds_fast import kd_loss, kd_loss_parts, reference

POISON = (math.nan, math.inf, -math.inf)
# A scalar row, whole vectors, a tail, and a row long enough to be swept in blocks.
SIZES = (2, 10, 33, 1000, 4097, 40000)


def gradient(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student, torch.ones_like(loss))[0]


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "elementmean"])
@pytest.mark.parametrize("classes", [10, 33, 1000])
def test_ignored_rows_do_not_leak(classes: int, reduction: str, dtype: torch.dtype) -> None:
    student, teacher, target = kd_cases.rows(9, classes, dtype)
    for row, poison in zip((0, 3, 8), POISON, strict=True):
        target[row] = -100
        student[row] = poison
        teacher[row] = poison
        student[row, 0] = math.nan
    arguments: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
    assert_matches_reference(kd_loss_parts, student, teacher, target, **arguments)
    student.requires_grad_()
    loss = kd_loss(student, teacher, target, **arguments)
    assert loss.isfinite().all()
    grad = gradient(loss, student)
    assert grad.isfinite().all() and not grad[[0, 3, 8]].any()
    # The bits are those of a batch in which the ignored rows hold ordinary numbers.
    clean_student = torch.where(target[:, None] == -100, 1.0, student.detach()).requires_grad_()
    clean_teacher = torch.where(target[:, None] == -100, 1.0, teacher)
    clean = kd_loss(clean_student, clean_teacher, target, **arguments)
    assert torch.equal(clean, loss)
    assert torch.equal(gradient(clean, clean_student), grad)


@pytest.mark.parametrize("kind", ["mask", "weights"])
@pytest.mark.parametrize("classes", [10, 33, 1000])
def test_teacher_of_unselected_rows_does_not_leak(classes: int, kind: str) -> None:
    for dtype in kd_cases.FLOATING:
        student, teacher, target = kd_cases.rows(9, classes, dtype)
        mask = torch.ones(9, dtype=torch.bool)
        for row, poison in zip((1, 4, 7), POISON, strict=True):
            mask[row] = False
            teacher[row] = poison
        selected = mask if kind == "mask" else mask.float() * 0.7
        for reduction in ("mean", "none"):
            assert_matches_reference(kd_loss_parts, student, teacher, target, selected=selected, reduction=reduction)
        assert kd_loss(student, teacher, target, selected=selected).isfinite()


def test_terms_of_weight_zero_are_not_read() -> None:
    student, teacher, target = kd_cases.rows(9, 33)
    broken = torch.full_like(teacher, math.nan)
    loss = kd_loss(student, broken, target, kd_weight=0.0)
    assert torch.equal(loss, kd_loss(student, teacher, target, kd_weight=0.0))
    assert_matches_reference(kd_loss_parts, student, broken, target, kd_weight=0.0)
    # A student row that neither term asks for: unselected, and unselected rows weigh nothing.
    student[4] = math.nan
    selected = torch.arange(9) != 4
    arguments: dict[str, Any] = {"selected": selected, "ce_weight_unselected": 0.0}
    assert_matches_reference(kd_loss_parts, student, teacher, target, **arguments)
    assert kd_loss(student, teacher, target, **arguments).isfinite()
    # All weights are 0.
    arguments = {"ce_weight": 0.0, "kd_weight": 0.0, "ce_weight_unselected": 0.0}
    student = torch.full((9, 33), math.nan, requires_grad=True)
    parts = kd_loss_parts(student, broken, target, **arguments)
    assert parts.loss.item() == parts.ce.item() == parts.kd.item() == 0.0
    assert not gradient(parts.loss, student).any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "elementmean"])
@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_all_rows_ignored(dtype: torch.dtype, reduction: str) -> None:
    student = torch.full((5, 33), math.nan, dtype=dtype, requires_grad=True)
    teacher = torch.full((5, 33), math.inf, dtype=dtype)
    target = torch.full((5,), -100)
    parts = kd_loss_parts(student, teacher, target, reduction=reduction)
    assert parts.loss.shape == ((5,) if reduction == "none" else ())
    for value in parts:
        assert not value.any()
    assert torch.equal(gradient(parts.loss, student), torch.zeros(5, 33, dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 33), (0, 4, 33), (3, 0, 33)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "elementmean"])
def test_no_rows(reduction: str, shape: tuple[int, ...]) -> None:
    for dtype in kd_cases.FLOATING:
        student = torch.zeros(shape, dtype=dtype, requires_grad=True)
        target = torch.zeros(shape[:-1], dtype=torch.int64)
        mask = torch.ones(shape[:-1], dtype=torch.bool)
        for selected in (None, mask):
            parts = kd_loss_parts(student, student.detach(), target, reduction=reduction, selected=selected)
            assert parts.loss.shape == (shape[:-1] if reduction == "none" else ())
            assert parts.loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
            assert parts.loss.sum().item() == 0.0
            assert [n.item() for n in parts[3:]] == [0, 0, 0]
            assert gradient(parts.loss, student).shape == shape


def test_one_class() -> None:
    """softmax of one number is 1: both terms and the gradient are 0, whatever the logits."""
    for dtype in kd_cases.FLOATING:
        student, teacher, target = kd_cases.rows(9, 1, dtype)
        student.requires_grad_()
        parts = kd_loss_parts(student, teacher, target)
        assert parts.loss.item() == parts.ce.item() == parts.kd.item() == 0.0
        assert parts.n_revised.item() == 0
        assert not gradient(parts.loss, student).any()


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_masked_classes(dtype: torch.dtype, classes: int) -> None:
    """-inf in both logits excludes the class; its gradient is exactly 0."""
    student, teacher, target = kd_cases.rows(9, classes, dtype)
    keep = torch.ones(classes, dtype=torch.bool)
    keep[:: max(2, classes // 7)] = False  # the first class, and more of them
    keep[1] = True
    target = torch.where(keep[target], target, 1)
    student[:, ~keep] = teacher[:, ~keep] = -math.inf
    assert_matches_reference(kd_loss_parts, student, teacher, target)
    assert_matches_reference(kd_loss_parts, student, teacher, target, temperature=2.5)
    # A smoothed label gives mass to classes that are not there: an infinite loss, as torch's own.
    assert kd_loss(student, teacher, target, label_smoothing=0.1).item() == math.inf
    assert_matches_reference(kd_loss_parts, student, teacher, target, label_smoothing=0.1)
    student.requires_grad_()
    grad = gradient(kd_loss(student, teacher, target), student)
    assert grad.isfinite().all() and not grad[:, ~keep].any()


@pytest.mark.parametrize("classes", SIZES)
def test_masked_teacher_classes(classes: int) -> None:
    """0 log 0 = 0: a class that only the teacher excludes has a finite loss."""
    for dtype in kd_cases.FLOATING:
        student, teacher, target = kd_cases.rows(9, classes, dtype)
        teacher[:, 1:-1:2] = -math.inf
        teacher[6, target[6]] = -math.inf  # also the label's own
        assert_matches_reference(kd_loss_parts, student, teacher, target)
        assert kd_loss(student, teacher, target).isfinite()


@pytest.mark.parametrize("finite", [0, 15, 16, 31, 4095, 4096, 8191, 8192, 39999])
def test_one_finite_class(finite: int) -> None:
    """All of a vector, a tile or a block is -inf before or after the only finite logit."""
    for classes in (finite + 1, 40000):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            student = torch.full((2, classes), -math.inf, dtype=dtype)
            teacher = student.clone()
            student[:, finite], teacher[:, finite] = -2.0, 3.0
            target = torch.tensor([finite, finite])
            leaf = student.requires_grad_()
            parts = kd_loss_parts(leaf, teacher, target)
            assert parts.loss.item() == 0.0 and parts.n_revised.item() == 0
            assert not gradient(parts.loss, leaf).any()


@pytest.mark.parametrize("classes", SIZES)
def test_student_that_rules_out_teacher_mass_is_infinitely_wrong(classes: int) -> None:
    for dtype in kd_cases.FLOATING:
        student, teacher, target = kd_cases.rows(9, classes, dtype)
        student[7, (target[7] + 1) % classes] = -math.inf
        loss = kd_loss(student, teacher, target, reduction="none")
        assert loss[7].item() == math.inf
        assert loss[torch.arange(9) != 7].isfinite().all()
        assert kd_loss(student, teacher, target).item() == math.inf
        assert_matches_reference(kd_loss_parts, student, teacher, target, reduction="none")


def test_student_that_rules_out_the_label() -> None:
    for kd_weight in (0.0, 0.9):
        student, teacher, target = kd_cases.rows(9, 33)
        student[7, target[7]] = -math.inf
        parts = kd_loss_parts(student, teacher, target, reduction="none", kd_weight=kd_weight)
        assert parts.ce[7].item() == math.inf and parts.loss[7].item() == math.inf


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_row_of_minus_infinity_is_nan_in_that_row_only(which: str) -> None:
    for dtype in kd_cases.FLOATING:
        for classes in (1, 10, 1000, 40000):
            rows = kd_cases.rows(5, classes, dtype)
            getattr(rows, which)[2] = -math.inf
            student = rows.student.requires_grad_()
            loss = kd_loss(*rows, reduction="none")
            assert loss.isnan().tolist() == [False, False, True, False, False]
            grad = gradient(loss, student)
            assert grad[torch.arange(5) != 2].isfinite().all() and grad[2].isnan().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("classes", [10, 33, 1000, 40000])
def test_nan_and_inf_in_rows_that_count_are_not_hidden(classes: int, poison: float) -> None:
    """In vectors and in tails. A finite loss would hide the error."""
    for position in {0, 7, classes // 2, classes - 1}:
        for which in (0, 1):
            rows = kd_cases.rows(5, classes)
            rows[which][2, position] = poison
            rows.target[2] = (position + 1) % classes
            loss = kd_loss(*rows, reduction="none")
            assert not loss[2].isfinite(), (position, which)
            assert loss[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_ties_with_the_label_count_as_right(dtype: torch.dtype) -> None:
    """Equal top logits are common in bfloat16; an argmax by order would revise half of them."""
    for classes in (2, 10, 33, 1000):
        teacher = torch.zeros(4, classes, dtype=dtype)
        teacher[:, 0] = teacher[:, classes - 1] = 3.0
        student = torch.linspace(-1.0, 1.0, 4 * classes).view(4, classes).to(dtype)
        target = torch.tensor([0, classes - 1, 0, classes - 1])
        assert kd_loss_parts(student, teacher, target).n_revised.item() == 0
        assert_matches_reference(kd_loss_parts, student, teacher, target)
        above = torch.tensor(3.0, dtype=dtype)
        teacher[0, classes - 1] = above + above * torch.finfo(dtype).eps  # one ulp more
        assert kd_loss_parts(student, teacher, target).n_revised.item() == 1
        assert_matches_reference(kd_loss_parts, student, teacher, target)


def test_revision_is_decided_on_the_logits_not_on_rounded_probabilities() -> None:
    """At T = 100 an ulp between two logits is lost in float32 probabilities."""
    teacher = torch.tensor([[1.0, 1.0 + 2.0**-23, 0.0]])
    student, target = torch.zeros(1, 3), torch.tensor([0])
    for temperature in (1.0, 100.0):
        parts = kd_loss_parts(student, teacher, target, temperature=temperature)
        assert parts.n_revised.item() == 1
        assert_matches_reference(kd_loss_parts, student, teacher, target, temperature=temperature)


@pytest.mark.parametrize("eta", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("temperature", kd_cases.TEMPERATURES)
def test_the_label_wins_by_exactly_one_minus_eta(temperature: float, eta: float) -> None:
    """p' read out of the gradient: with ce_weight 0 and weight 1/T the gradient is q - p'."""
    student, teacher, target = kd_cases.rows(40, 33, torch.float64)
    student.requires_grad_()
    loss = kd_loss(
        student,
        teacher,
        target,
        ce_weight=0.0,
        kd_weight=1.0 / temperature,
        temperature=temperature,
        eta=eta,
        revise_temperature=None,
        reduction="sum",
    )
    q = torch.softmax(student.detach() / temperature, -1)
    revised = q - gradient(loss, student)
    torch.testing.assert_close(revised.sum(-1), torch.ones(40, dtype=torch.float64))
    label = revised.gather(1, target[:, None])[:, 0]
    others = revised.scatter(1, target[:, None], -1.0)
    wrong = teacher.gather(1, target[:, None])[:, 0] < teacher.max(-1).values
    assert 5 < wrong.sum() < 35
    margin = (label - others.max(-1).values)[wrong]
    torch.testing.assert_close(margin, torch.full_like(margin, 1.0 - eta), rtol=0, atol=1e-12)
    # The other classes keep the teacher's ratios: p'_k = beta * p_k for one beta per row.
    p = torch.softmax(teacher / temperature, -1)
    beta = (others / p).scatter(1, target[:, None], torch.nan)[wrong]
    plausible = (p[wrong] > 1e-9) & ~beta.isnan()  # below, q - g has lost p' to cancellation
    for row in range(int(wrong.sum())):
        kept = beta[row][plausible[row]]
        torch.testing.assert_close(kept, kept[:1].expand_as(kept), rtol=1e-5, atol=0)
    assert torch.equal(wrong.sum(), kd_loss_parts(student, teacher, target).n_revised)
    torch.testing.assert_close(revised[~wrong], p[~wrong])


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_gradient_rows_sum_to_zero(dtype: torch.dtype) -> None:
    for classes in (2, 33, 1000):
        rows = kd_cases.rows(30, classes, dtype)
        rows.student.requires_grad_()
        arguments: dict[str, Any] = {"reduction": "sum", "label_smoothing": 0.1}
        grad = gradient(kd_loss(*rows, **arguments), rows.student).double()
        compute = TOLERANCES[torch.float64 if dtype == torch.float64 else torch.float32]
        bound = compute.gradient * sizes(*rows, **arguments).gradient.sum(-1)
        bound += TOLERANCES[dtype].rounding * grad.abs().sum(-1)
        bound += TOLERANCES[dtype].smallest * classes
        assert (grad.sum(-1).abs() <= bound).all()


@pytest.mark.parametrize("shift", [-1024.0, 512.0])
def test_shift_invariance(shift: float) -> None:
    """Shifts that float64 and these multiples of 2^-8 represent exactly: not an ulp may change."""
    student, teacher, target = kd_cases.rows(30, 33, torch.float64)
    student, teacher = ((x * 256).round() / 256 for x in (student, teacher))
    for dtype in (torch.float64, torch.float32):
        z, v = student.to(dtype), teacher.to(dtype)
        plain = kd_loss(z, v, target, reduction="none")
        assert torch.equal(plain, kd_loss(z + shift, v, target, reduction="none"))
        assert torch.equal(plain, kd_loss(z, v + shift, target, reduction="none"))


def test_equal_logits_have_no_distillation_term() -> None:
    for dtype in kd_cases.FLOATING:
        student, _, target = kd_cases.rows(30, 100, dtype)
        parts = kd_loss_parts(student, student.clone(), target, revise=None, reduction="none")
        assert (parts.kd.abs() <= 1e-5).all()
        assert not parts.kd.isnan().any()


def test_inputs_are_not_modified() -> None:
    for dtype in kd_cases.FLOATING:
        rows = kd_cases.rows(9, 100, dtype)
        selected = torch.linspace(0, 1, 9)
        before = [x.clone() for x in (*rows, selected)]
        student = rows.student.requires_grad_()
        kd_loss(student, rows.teacher, rows.target, selected=selected).backward()
        for now, then in zip((*rows, selected), before, strict=True):
            assert torch.equal(now.detach(), then)


def test_teacher_gets_no_gradient() -> None:
    student, teacher, target = kd_cases.rows(9, 33)
    teacher.requires_grad_()
    assert not kd_loss(student, teacher, target).requires_grad
    student.requires_grad_()
    loss = kd_loss(student, teacher, target)
    loss.backward()
    assert teacher.grad is None and student.grad is not None
    (missing,) = torch.autograd.grad(kd_loss(student, teacher, target), teacher, allow_unused=True)
    assert missing is None


def test_selection_weights_interpolate() -> None:
    """w = 0.25 is a quarter of the selected row's loss and three quarters of the unselected one's."""
    student, teacher, target = kd_cases.rows(9, 33, torch.float64)
    options: dict[str, Any] = {"reduction": "none", "ce_weight": 0.3, "kd_weight": 2.0, "ce_weight_unselected": 1.5}
    selected, unselected, quarter = (
        kd_loss(student, teacher, target, selected=torch.full((9,), w), **options) for w in (1.0, 0.0, 0.25)
    )
    torch.testing.assert_close(quarter, 0.25 * selected + 0.75 * unselected)
    torch.testing.assert_close(
        quarter,
        reference.kd_loss(student, teacher, target, selected=torch.full((9,), 0.25), **options),
    )


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["kl", "dkd"])
def test_more_elements_than_32_bits_count(divergence: str) -> None:
    """The rows beyond element 2^31 are the rows that a batch of them alone gives."""
    classes, last = 1000, 8
    count = 2**31 // classes + last
    rows = kd_cases.rows(last, classes, torch.bfloat16)
    student = torch.zeros(count, classes, dtype=torch.bfloat16)  # pages that are only read take no memory
    student[-last:] = rows.student
    teacher = torch.zeros(count, classes, dtype=torch.bfloat16)
    teacher[-last:] = rows.teacher
    target = torch.zeros(count, dtype=torch.int64)
    target[-last:] = rows.target
    student.requires_grad_()
    found = gradient(kd_loss(student, teacher, target, reduction="sum", divergence=divergence), student)
    alone = rows.student.requires_grad_()
    expected = gradient(kd_loss(alone, rows.teacher, rows.target, reduction="sum", divergence=divergence), alone)
    assert torch.equal(found[-last:], expected)
    assert torch.equal(found[-last - 1], found[0]) and found[0].any()
