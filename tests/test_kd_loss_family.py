"""Every divergence under every revision policy, target, temperature and teacher, against the float64 reference.

kd_cases.FAMILY is the table; a new divergence is one row there.
"""

from __future__ import annotations

import itertools
from typing import Any

import kd_cases
import pytest
import torch
from torch import Tensor

import lrds_fast
from lrds_fast import functional, reference
from lrds_fast.divergences import Divergence

# 1: KD is 0. 2: one other class. 15, 16, 17: a vector and its tails. 100: CIFAR-100.
# 5000: more than one block of sums.
CLASSES = (1, 2, 15, 16, 17, 100, 5000)
# Relative to the size of what is added up: the row's loss, and the row's largest gradient. float32's exp and log carry
# 1e-7 each, times logits / T of up to a hundred.
LOSS = {torch.float64: 1e-12, torch.float32: 8e-6}
GRADIENT = {torch.float64: 1e-11, torch.float32: 4e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def soft_targets(target: Tensor, classes: int, seed: int = 1) -> Tensor:
    """Mixup of each row's class with the next row's, a label-smoothed row, and a one-hot one."""
    generator = torch.Generator().manual_seed(seed)
    lam = torch.rand(len(target), 1, generator=generator, dtype=torch.float64) * 0.4 + 0.55
    one_hot = torch.nn.functional.one_hot(target, classes).double()
    mixed = lam * one_hot + (1.0 - lam) * one_hot.roll(1, dims=0)
    mixed[0] = 0.9 * one_hot[0] + 0.1 / classes
    mixed[-1] = one_hot[-1]
    return mixed


def rows_and_gradient(
    function: Any, student: Tensor, teacher: Any, target: Tensor, weight: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Per-row losses and the gradient of their weighted sum."""
    z = student.clone().requires_grad_()
    loss = function(z, teacher, target, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss, z, weight.to(loss.dtype))
    return loss.detach(), gradient


def assert_family(
    student: Tensor, teacher: Any, target: Tensor, *, valid: Tensor | None = None, **options: Any
) -> None:
    """The operator's rows and gradient against the reference's in float64, row by row."""

    def wide(x: Any) -> Any:
        if isinstance(x, lrds_fast.TopKTeacher):
            return x._replace(values=x.values.double(), logsumexp=x.logsumexp.double())
        return x.double() if x.is_floating_point() else x

    # Up to a thousandth, and negative: what a mean and a difference of losses would hand down.
    weight = torch.linspace(-1.5, 2.0, len(student), dtype=torch.float64, device=student.device)
    got, got_gradient = rows_and_gradient(lrds_fast.kd_loss, student, teacher, target, weight, **options)
    if "class_weight" in options:
        options["class_weight"] = options["class_weight"].double()
    want, want_gradient = rows_and_gradient(
        reference.kd_loss, wide(student), wide(teacher), wide(target), weight, **options
    )
    keep = slice(None) if valid is None else valid
    finite = want[keep].isfinite()
    assert got[keep].isfinite().equal(finite)
    # A loss is a sum of terms with a T^2, some of which cancel.
    t = max(functional.temperatures(options.get("temperature", 4.0)))
    error = (got.double() - want).abs()[keep][finite] / (max(1.0, t) ** 2 + want.abs()[keep][finite])
    assert error.max() <= LOSS[got.dtype], f"loss off by {error.max():.1e} in row {int(error.argmax())}"
    # The size of a row's gradient includes what cancelled: q and p' of a student that equals its teacher, the log
    # ratios of a reverse KL, which are as large as the loss.
    by = weight.abs()[:, None]
    size = 0.05 * by + want_gradient.abs().amax(dim=-1, keepdim=True) + 0.1 / t * by * want.abs()[:, None]
    if options.get("standardize"):
        # The chain rule multiplies by 1 / std what cancels to 0 for two classes, and a constant row has std = 0.
        size = size + t * by / (student.double().std(dim=-1, keepdim=True, correction=0).nan_to_num() + 1e-7)
    error = ((got_gradient.double() - want_gradient).abs() / size)[keep][finite]
    assert error.max() <= GRADIENT[got_gradient.dtype], f"gradient off by {error.max():.1e} of its row"


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize("revise", kd_cases.REVISE)
@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_matches_reference(divergence: Divergence, revise: str | None, dtype: torch.dtype) -> None:
    for classes in CLASSES:
        count = 12 if classes > 1000 else 40
        student, teacher, target = kd_cases.family_rows(count, classes, dtype)
        for temperature in (1.0, 4.0, 2.5):
            assert_family(student, teacher, target, divergence=divergence, revise=revise, temperature=temperature)


OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": (2.0, 3.0, 6.0)},
    {"standardize": True, "temperature": 2.0},
    {"standardize": True, "temperature": (1.0, 4.0), "label_smoothing": 0.1},
    {"label_smoothing": 0.2, "ce_weight": 1.0},
    {"class_weight": True},
    {"class_weight": True, "label_smoothing": 0.1},
    {"ce_weight": 0.0},
    {"kd_weight": 0.0, "ce_weight": 1.0},
    {"eta": 0.3},
)


def finish_options(options: dict[str, Any], classes: int, dtype: torch.dtype) -> dict[str, Any]:
    if options.get("class_weight"):
        weight = torch.linspace(0.2, 1.7, classes, dtype=torch.float32)
        return {**options, "class_weight": weight.to(torch.float64 if dtype == torch.float64 else torch.float32)}
    return options


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_options(divergence: Divergence, options: dict[str, Any], dtype: torch.dtype) -> None:
    for classes, revise in itertools.product((1, 2, 17, 100), ("lr", "swap")):
        student, teacher, target = kd_cases.family_rows(40, classes, dtype)
        finished = finish_options(options, classes, dtype)
        assert_family(student, teacher, target, divergence=divergence, revise=revise, **finished)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_soft_targets(divergence: Divergence, options: dict[str, Any], dtype: torch.dtype) -> None:
    for classes, revise in itertools.product((1, 2, 17, 100), ("lr", None)):
        student, teacher, target = kd_cases.family_rows(40, classes, dtype)
        soft = soft_targets(target, classes).to(torch.float64 if dtype == torch.float64 else torch.float32)
        finished = finish_options(options, classes, dtype)
        assert_family(student, teacher, soft, divergence=divergence, revise=revise, **finished)


@pytest.mark.parametrize("revise", ["lr", None])
@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_one_hot_probabilities_are_an_index(divergence: Divergence, revise: str | None) -> None:
    student, teacher, target = kd_cases.family_rows(40, 33, torch.float64)
    one_hot = torch.nn.functional.one_hot(target, 33).double()
    weight = torch.ones(40, dtype=torch.float64)
    by_index, by_probability = (
        rows_and_gradient(lrds_fast.kd_loss, student, teacher, t, weight, divergence=divergence, revise=revise)
        for t in (target, one_hot)
    )
    torch.testing.assert_close(by_probability, by_index, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 32, 33])
@pytest.mark.parametrize("revise", kd_cases.REVISE)
@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_cached_teacher(divergence: Divergence, revise: str | None, k: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16):
        student, teacher, target = kd_cases.family_rows(40, 33, dtype)
        # No ties: whether the target ties with the rest's even share is decided by rounding.
        teacher[3] += torch.linspace(-1, 1, 33).to(dtype)
        cached = lrds_fast.TopKTeacher.from_logits(teacher / 8, k, temperature=2.0)
        assert_family(student, cached, target, divergence=divergence, revise=revise, temperature=2.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "elementmean"])
@pytest.mark.parametrize(
    "options", [{}, {"class_weight": True}, {"class_weight": True, "label_smoothing": 0.1}], ids=str
)
@pytest.mark.parametrize("soft", [False, True], ids=("indices", "probabilities"))
def test_reductions(options: dict[str, Any], soft: bool, reduction: str) -> None:
    student, teacher, target = kd_cases.family_rows(40, 17, torch.float64)
    finished = finish_options(options, 17, torch.float64)
    if soft:
        target = soft_targets(target, 17)
    else:
        target[::3] = -100
    given: tuple[dict[str, Any], ...] = ({}, {"num_valid": 7, "weight_sum": torch.tensor(3.5)})
    for denominators in given:
        parts = []
        for function in (lrds_fast.kd_loss_parts, reference.kd_loss_parts):
            z = student.clone().requires_grad_()
            part = function(z, teacher, target, divergence="dkd", reduction=reduction, **finished, **denominators)
            parts.append((*(x.detach() for x in part), *torch.autograd.grad(part.loss, z)))
        torch.testing.assert_close(*parts, rtol=1e-11, atol=1e-13)
