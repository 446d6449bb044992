"""MLKD over two views: the formula written out, selected rows alone, and the recipe keys that it needs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import kd_cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lrds_fast
from lrds_fast.recipe.recipe import LossOptions
from lrds_fast.train import load_recipe
from lrds_fast.train.methods import objective
from lrds_fast.train.setup import ce_weight_unselected

DOUBLE = torch.float64
MLKD: dict[str, Any] = {
    "method": "mlkd",
    "temperatures": (2.0, 5.0),
    "ce_weight": 0.3,
    "kd_weight": 0.9,
    "revise": "none",
}


def views(rows: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits of student and teacher for the first and for the strong view, and the targets."""
    z, v, y = (x[4:] for x in kd_cases.family_rows(rows + 4, classes, DOUBLE))
    draws = torch.Generator().manual_seed(7)
    z2, v2 = (x + torch.randn(x.shape, generator=draws, dtype=DOUBLE) for x in (z, v))
    return z, v, z2, v2, y


def by_hand(z: Tensor, v: Tensor, z2: Tensor, v2: Tensor, y: Tensor, revise: bool) -> Tensor:
    """The terms of MLKD except the cross-entropy, from their formulas."""
    p1 = torch.softmax(v, dim=1)
    confidence, mass = p1.max(dim=1).values, p1.sum(dim=0)
    m = (confidence <= confidence.median() if len(v) % 2 else confidence <= confidence.quantile(0.5)).double().mean()
    c = (mass <= mass.quantile(0.5)).double().mean()
    total = torch.zeros((), dtype=DOUBLE)
    for t in (2.0, 5.0):
        kl, p_of = [], []
        for student, teacher in ((z, v), (z2, v2)):
            p = lrds_fast.revise_labels(teacher, y, temperature=t) if revise else torch.softmax(teacher / t, dim=1)
            kl.append(F.kl_div(torch.log_softmax(student / t, dim=1), p, reduction="batchmean") * t**2)
            p_of.append(p)
        q, p = torch.softmax(z / t, dim=1), p_of[0]
        batch = ((q @ q.T - p @ p.T) ** 2).sum() / len(z)
        category = ((q.T @ q - p.T @ p) ** 2).sum() / z.shape[1]
        total = total + m * (kl[0] + batch) + c * category + kl[1]
    return total


@pytest.mark.parametrize("revise", ["none", "lr"])
@pytest.mark.parametrize("rows", [12, 13])
def test_two_views_are_the_formula(rows: int, revise: str) -> None:
    z, v, z2, v2, y = views(rows, 6)
    z.requires_grad_()
    z2.requires_grad_()
    measure = objective(LossOptions(**(MLKD | {"revise": revise})))
    parts = measure(z, v, y, selected=None, strong=(z2, v2))
    kd = by_hand(z, v, z2, v2, y, revise == "lr")
    wanted = 0.3 * (F.cross_entropy(z, y) + F.cross_entropy(z2, y)) + 0.9 * kd
    torch.testing.assert_close(parts.loss, wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(parts.kd.double(), 0.9 * kd.detach(), rtol=1e-6, atol=1e-7)
    ours, theirs = (torch.autograd.grad(loss, (z, z2)) for loss in (parts.loss, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_rows_without_a_teacher_have_the_cross_entropy_of_both_views() -> None:
    """As a mask over all rows or as a prefix; teacher logits of other rows have no effect."""
    z, v, z2, v2, y = views(12, 6)
    measure = objective(LossOptions(**(MLKD | {"ce_weight_unselected": 1.5})))
    mask = torch.arange(12) < 5
    poisoned = [x.masked_fill(~mask[:, None], math.nan) for x in (v, v2)]
    masked = measure(z, poisoned[0], y, selected=mask, strong=(z2, poisoned[1]))
    prefix = measure(z, v[:5], y, selected=None, strong=(z2, v2[:5]))
    torch.testing.assert_close(masked.loss, prefix.loss, rtol=1e-9, atol=1e-10)
    weights = torch.full((12,), 1.5, dtype=DOUBLE).masked_fill(mask, 0.3)
    ce = sum((weights * F.cross_entropy(x, y, reduction="none")).mean() for x in (z, z2))
    kd = by_hand(z[:5], v[:5], z2[:5], v2[:5], y[:5], False)
    torch.testing.assert_close(prefix.loss, ce + 0.9 * 5 / 12 * kd, rtol=1e-9, atol=1e-10)
    none = measure(z, v[:0], y, selected=None, strong=(z2, v2[:0]))
    unselected = 1.5 * (F.cross_entropy(z, y) + F.cross_entropy(z2, y))
    torch.testing.assert_close(none.loss, unselected, rtol=1e-9, atol=1e-10)
    assert (int(none.n_selected), int(prefix.n_selected), int(masked.n_selected)) == (0, 5, 5)


@pytest.mark.parametrize("teacher_rows", [0, 1, 7, 12])
@pytest.mark.parametrize("method", ["kd", "dist", "mlkd", "mlkd, two views", "revision"])
def test_the_loss_equals_the_sum_of_its_parts(method: str, teacher_rows: int) -> None:
    """Half the kd_weight halves kd and leaves ce unchanged."""
    z, v, z2, v2, y = views(12, 6)
    smoothing = 0.0 if method == "revision" else 0.1
    options = LossOptions(method=method.split(",")[0], ce_weight=0.3, kd_weight=0.9, label_smoothing=smoothing)  # type: ignore[arg-type]
    more: dict[str, Any] = {"strong": (z2, v2[:teacher_rows])} if "views" in method else {}
    # A number, because the default depends on kd_weight.
    options = dataclasses.replace(options, ce_weight_unselected=ce_weight_unselected(options))
    whole, half, shared = (
        objective(dataclasses.replace(options, kd_weight=weight))(
            z, v[:teacher_rows], y, selected=None, num_valid=rows, **more
        )
        for weight, rows in ((0.9, None), (0.45, None), (0.9, 24.0))
    )
    for parts in (whole, half, shared):
        torch.testing.assert_close(parts.ce + parts.kd, parts.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(half.kd, whole.kd / 2, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(half.ce, whole.ce, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(shared.kd, whole.kd / 2, rtol=1e-9, atol=1e-12)
    assert whole.kd > 0 if teacher_rows > 1 else teacher_rows or whole.kd == 0


def test_views_of_other_shapes_are_refused() -> None:
    z, v, z2, v2, y = views(12, 6)
    measure = objective(LossOptions(**MLKD))
    with pytest.raises(ValueError, match=r"strong must have the logits' shapes \(12, 6\) and \(12, 6\); got \(11, 6\)"):
        measure(z, v, y, selected=None, strong=(z2[1:], v2))


def test_recipes_name_the_strong_data_they_need() -> None:
    data = load_recipe("cifar100/resnet56-resnet20/kd", ["data.rand_augment=m9-n2-mstd0.5", "data.erasing=0.25"]).data
    assert (data.rand_augment, data.erasing, data.mixup, data.mix_probability) == ("m9-n2-mstd0.5", 0.25, 0.0, 1.0)
    for setting, message in (
        ("data.rand_augment=9", "data.rand_augment must be str; got 9"),
        ("data.rand_augment=nine", "data.rand_augment must be parts such as m9.*got 'nine'"),
        ("data.erasing=2", r"data.erasing must be in \[0, 1\]; got 2"),
        ("data.mixup=-1", "data.mixup must be at least 0 and finite; got -1"),
        ("data.cutmix=inf", "data.cutmix must be at least 0 and finite; got inf"),
        ("data.mix_probability=1.5", r"data.mix_probability must be in \[0, 1\]; got 1.5"),
        ("data.second_view=weak", "data.second_view must be one of '', strong; got 'weak'"),
        ("data.second_view=strong", "data.second_view is for loss.method 'mlkd'; got 'kd'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe("cifar100/resnet56-resnet20/kd", [setting])
    with pytest.raises(ValueError, match="teacher.cache .* it cannot be combined with data.second_view"):
        load_recipe("cifar100/resnet56-resnet20/mlkd", ["teacher.cache=soft"])
    with pytest.raises(ValueError, match="data.second_view cannot be combined with data.mixup or data.cutmix"):
        load_recipe("cifar100/resnet56-resnet20/mlkd", ["data.second_view=strong", "data.cutmix=1"])
