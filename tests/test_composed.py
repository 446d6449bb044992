"""revision_loss, dist_loss and mlkd_loss against their formulas, written out in NumPy and plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import kd_cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast import dist_loss, kd_loss, mlkd_loss, revise_labels, revision_loss

DOUBLE = torch.float64


def is_right(teacher: Tensor, target: Tensor) -> Tensor:
    return teacher.gather(1, target[:, None])[:, 0] == teacher.amax(dim=1)


def revision_by_hand(z: Tensor, v: Tensor, y: Tensor, lambda1: float, lambda2: float, eta: float) -> Tensor:
    right = is_right(v, y)
    loss = torch.zeros((), dtype=z.dtype)
    if right.any():
        loss = loss + F.cross_entropy(z[right], y[right]) + lambda1 * F.mse_loss(z[right], v[right])
    if (~right).any():
        p = revise_labels(v[~right], y[~right], eta=eta)
        loss = loss + lambda2 * F.mse_loss(torch.softmax(z[~right], dim=1), p)
    return loss


@pytest.mark.parametrize("rows", ["both", "right", "wrong", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_revision_loss(dtype: torch.dtype, rows: str) -> None:
    student, teacher, target = kd_cases.family_rows(40, 12, dtype)
    right = is_right(teacher, target)
    keep = {"both": right | True, "right": right, "wrong": ~right, "none": right & False}[rows]
    student, teacher, target = student[keep].requires_grad_(), teacher[keep], target[keep]
    for weights in ((4.0, 1.0, 0.8), (0.5, 3.0, 0.3), (0.0, 0.0, 0.5)):
        ours = revision_loss(student, teacher, target, *weights)
        theirs = revision_by_hand(student, teacher, target, *weights)
        tolerance: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12} if dtype == DOUBLE else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(ours, theirs, **tolerance)
        if rows != "none":
            gradients = (torch.autograd.grad(x, student)[0] for x in (ours, theirs))
            torch.testing.assert_close(*gradients, **tolerance)


def test_revision_loss_gradcheck() -> None:
    student, teacher, target = kd_cases.family_rows(9, 5, DOUBLE)
    z = student[4:].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: revision_loss(x, teacher[4:], target[4:]), z)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_loss(temperature: float) -> None:
    student, teacher, _ = (x[4:] for x in kd_cases.family_rows(30, 12, DOUBLE))
    q, p = (torch.softmax(x / temperature, dim=1).numpy() for x in (student, teacher))
    classes = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    samples = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    expected = temperature**2 * (2.0 * (1 - classes) + 0.5 * (1 - samples))
    ours = dist_loss(student, teacher, beta=2.0, gamma=0.5, temperature=temperature)
    # The correlation's epsilon.
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    assert dist_loss(teacher, teacher, temperature=temperature).item() == pytest.approx(0.0, abs=1e-5)
    assert torch.autograd.gradcheck(lambda z: dist_loss(z, teacher), student.clone().requires_grad_())


def test_dist_loss_of_one_row_and_one_class() -> None:
    """A column of one sample, a row of one class: constant, correlation 0, a finite gradient."""
    for shape in ((1, 5), (5, 1)):
        z = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
        loss = dist_loss(z, torch.randn(shape, dtype=DOUBLE))
        assert loss.isfinite() and torch.autograd.grad(loss, z)[0].isfinite().all()


def mlkd_by_hand(z: Tensor, v: Tensor, y: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    loss = 0.1 * F.cross_entropy(z, y)
    for t in temperatures:
        q, p = torch.softmax(z / t, dim=1), torch.softmax(v / t, dim=1)
        kl = F.kl_div(q.log(), p, reduction="batchmean") * t**2
        batch = ((q @ q.T - p @ p.T) ** 2).sum() / len(z)
        category = ((q.T @ q - p.T @ p) ** 2).sum() / z.shape[1]
        loss = loss + 0.9 * (kl + 2.0 * batch + 3.0 * category)
    return loss


@pytest.mark.parametrize("loss", [lambda z, v, _: dist_loss(z, v), revision_loss, mlkd_loss])
def test_no_rows_give_0(loss: Callable[..., Tensor]) -> None:
    student, teacher, target = (x[:0] for x in kd_cases.family_rows(3, 4, DOUBLE))
    value = loss(student.requires_grad_(), teacher, target)
    assert value.item() == 0.0
    assert torch.autograd.grad(value, student)[0].shape == (0, 4)


def test_mlkd_loss_is_the_published_loss() -> None:
    student, teacher, target = kd_cases.family_rows(30, 12, DOUBLE)
    z = student.requires_grad_()
    for temperatures in ((2.0, 3.0, 4.0, 5.0, 6.0), (1.5,)):
        options: dict[str, Any] = {"temperature": temperatures, "batch_weight": 2.0, "category_weight": 3.0}
        ours = mlkd_loss(z, teacher, target, revise=None, **options)
        theirs = mlkd_by_hand(z, teacher, target, temperatures)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (ours, theirs)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("revise", [None, "lr", "swap"])
def test_mlkd_loss_of_selected_rows(revise: str | None) -> None:
    """Rows that are not selected are in no term but their cross-entropy, whatever their teacher holds."""
    student, teacher, target = kd_cases.family_rows(20, 8, DOUBLE)
    selected = torch.arange(20) % 3 > 0
    poisoned = teacher.masked_fill(~selected[:, None], math.nan)
    ours = mlkd_loss(student, poisoned, target, revise=revise, selected=selected, ce_weight_unselected=0.7)
    part = mlkd_loss(student[selected], teacher[selected], target[selected], revise=revise)
    rows = kd_loss(
        student[selected], teacher[selected], target[selected], revise=revise, temperature=(2.0, 3.0, 4.0, 5.0, 6.0)
    )
    whole = kd_loss(
        student,
        poisoned,
        target,
        revise=revise,
        temperature=(2.0, 3.0, 4.0, 5.0, 6.0),
        selected=selected,
        ce_weight_unselected=0.7,
    )
    torch.testing.assert_close(ours - whole, part - rows, rtol=1e-10, atol=1e-12)


def test_mlkd_loss_under_autocast() -> None:
    """Products of float32 matrices are not computed in 16 bits."""
    student, teacher, target = kd_cases.family_rows(30, 12, torch.float32)
    z = student.requires_grad_()
    expected = mlkd_loss(z, teacher, target, temperature=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = mlkd_loss(z, teacher, target, temperature=1.0)
    assert torch.equal(ours, expected)
    assert torch.equal(*(torch.autograd.grad(x, z)[0] for x in (ours, expected)))


@pytest.mark.parametrize("wrong", [-100, -1, 12])
@pytest.mark.parametrize("loss", [revision_loss, mlkd_loss, lambda *rows: mlkd_loss(*rows, revise=None)])
def test_classes_out_of_range_are_named(loss: Callable[..., Tensor], wrong: int) -> None:
    student, teacher, target = kd_cases.family_rows(6, 12, DOUBLE)
    target[4] = wrong
    with pytest.raises(ValueError, match=rf"target\[4\] is {wrong}, outside \[0, 12\)"):
        loss(student, teacher, target)


def test_mlkd_loss_gradcheck() -> None:
    student, teacher, target = (x[4:] for x in kd_cases.family_rows(10, 4, DOUBLE))
    assert torch.autograd.gradcheck(lambda z: mlkd_loss(z, teacher, target), student.clone().requires_grad_())


@pytest.mark.parametrize("loss", [revision_loss, mlkd_loss, lambda z, v, _: dist_loss(z, v)])
def test_second_derivatives_are_the_gradients_differences(loss: Callable[..., Tensor]) -> None:
    student, teacher, target = kd_cases.family_rows(9, 5, DOUBLE)
    z, direction = student[4:].clone(), student[4:].cos()

    def gradient(step: float) -> Tensor:
        leaf = (z + step * direction).requires_grad_()
        return torch.autograd.grad(loss(leaf, teacher[4:], target[4:]), leaf)[0]

    second = torch.autograd.functional.hvp(lambda z: loss(z, teacher[4:], target[4:]), z, direction)[1]
    torch.testing.assert_close(second, (gradient(1e-5) - gradient(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_types_and_devices(dtype: torch.dtype) -> None:
    student, teacher, target = kd_cases.family_rows(8, 6, dtype)
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda z: revision_loss(z, teacher, target),
        lambda z: dist_loss(z, teacher),
        lambda z: mlkd_loss(z, teacher, target),
    ]
    for make in losses:
        z = student.clone().requires_grad_()
        loss = make(z)
        assert loss.dtype == (DOUBLE if dtype == DOUBLE else torch.float32) and loss.shape == ()
        (gradient,) = torch.autograd.grad(loss, z)
        assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, v, y: revision_loss(z, v, y, lambda1=-1.0), ValueError, "lambda1 must be finite and >= 0; got -1.0"),
        (lambda z, v, y: revision_loss(z, v, y, eta=1.0), ValueError, "eta must be inside"),
        (lambda z, v, y: revision_loss(z, v[:3], y), ValueError, r"must both be \(N, C\), of one shape"),
        (lambda z, v, y: revision_loss(z, v, F.one_hot(y, 5).double()), TypeError, "class indices; got torch.float64"),
        (lambda z, v, y: dist_loss(z, v, beta=math.nan), ValueError, "beta must be finite"),
        (lambda z, v, y: dist_loss(z, v, temperature=0.0), ValueError, "temperature must be > 0"),
        (lambda z, v, y: dist_loss(z, "teacher"), TypeError, "teacher_logits must be a Tensor of logits; got str"),  # type: ignore[arg-type]
        (lambda z, v, y: mlkd_loss(z, v, y, batch_weight="1"), TypeError, "batch_weight must be a number; got '1'"),  # type: ignore[arg-type]
        (lambda z, v, y: mlkd_loss(z, v, y, temperature=()), ValueError, "temperature must be a number or 1 to 8"),
        (lambda z, v, y: mlkd_loss(z, v, y[:3]), ValueError, r"target must have student_logits' leading shape \(6,\)"),
    ],
)
def test_mistakes_are_named(call: Callable[..., Tensor], error: type[Exception], message: str) -> None:
    student, teacher, target = kd_cases.family_rows(6, 5)
    with pytest.raises(error, match=message):
        call(student, teacher, target)
