"""The objective's gradients and Hessian in a sample's logits, against autograd on the reference loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from influence_oracle import reference_loss
from torch import Tensor
from torch.func import grad, hessian, vmap

from lrds_fast import JSD, SKL, SRKL, KDLoss, reference
from lrds_fast.divergences import Divergence
from lrds_fast.influence.objective import (
    HessianTerm,
    TrainingObjective,
    cross_entropy_gradient,
    cross_entropy_terms,
    fisher_gradients,
    logit_hessian,
    nonzero_terms,
)
from lrds_fast.ranks import Ranks

ROWS, CLASSES = 12, 5
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.5, 3.0], dtype=torch.float64)
LOSSES: dict[str, dict[str, Any]] = {
    "default": {},
    "weights": {"ce_weight": 0.3, "kd_weight": 1.7, "ce_weight_unselected": 0.6},
    "several temperatures": {"temperature": (1.0, 2.5), "revise": None},
    "smoothed": {"label_smoothing": 0.2, "revise": "mft"},
    "class weights": {"class_weight": WEIGHTS, "reduction": "sum"},
}
SELECTED: dict[str, Tensor | None] = {
    "all": None,
    "some": torch.arange(ROWS) % 3 > 0,
    "weights": torch.linspace(0, 1, ROWS, dtype=torch.float64),
}


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher (N, C) float64, labels (N,)."""
    draws = torch.Generator().manual_seed(0)
    z, v = (torch.randn(ROWS, CLASSES, generator=draws, dtype=torch.float64) for _ in range(2))
    return z, 3 * v, torch.randint(CLASSES, (ROWS,), generator=draws)


def row_loss(loss: KDLoss, z: Tensor, v: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """L(z; s) of one row by the reference."""
    return reference_loss(loss, z[None], v[None], y[None], s[None], class_weight=loss.class_weight, reduction="sum")


@pytest.mark.parametrize("selected", SELECTED)
@pytest.mark.parametrize("name", LOSSES)
def test_terms_are_the_second_derivative(name: str, selected: str) -> None:
    loss, (z, v, y), chosen = KDLoss(**LOSSES[name]), rows(), SELECTED[selected]
    s = torch.ones(ROWS, dtype=torch.float64) if chosen is None else chosen.double()
    expected = vmap(hessian(lambda *row: row_loss(loss, *row)))(z, v, y, s)
    terms = TrainingObjective(loss).hessian_terms(y, chosen, torch.float64)
    torch.testing.assert_close(logit_hessian(z, terms), expected, rtol=1e-9, atol=1e-12)
    # The label's cross-entropy alone: whatever the loss, and whoever is selected.
    plain = vmap(hessian(lambda z, y: F.cross_entropy(z[None], y[None])))(z, y)
    terms = TrainingObjective(loss, "gt").hessian_terms(y, chosen, torch.float64)
    torch.testing.assert_close(logit_hessian(z, terms), plain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logit_hessian(z, cross_entropy_terms(z)), plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_adds_the_difference_of_two_hessians(name: str) -> None:
    loss, (z, _, y) = KDLoss(**LOSSES[name]), rows()
    objective = TrainingObjective(loss)
    on, off = (objective.hessian_terms(y, torch.full((ROWS,), s), torch.float64) for s in (1.0, 0.0))
    added = logit_hessian(z, objective.teacher_terms(y, torch.float64))
    torch.testing.assert_close(added, logit_hessian(z, on) - logit_hessian(z, off), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_first_derivatives(name: str) -> None:
    loss, (z, v, y) = KDLoss(**LOSSES[name]), rows()
    objective, ones = TrainingObjective(loss), torch.ones(ROWS, dtype=torch.float64)
    of_row = vmap(grad(lambda *row: row_loss(loss, *row)))
    change = of_row(z, v, y, ones) - of_row(z, v, y, 0 * ones)
    torch.testing.assert_close(objective.logit_gradient("delta", z, v, y), change, rtol=1e-9, atol=1e-12)
    label = vmap(grad(lambda z, y: F.cross_entropy(z[None], y[None])))(z, y)
    torch.testing.assert_close(objective.logit_gradient("gt", z, v, y), label, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cross_entropy_gradient(z, y), label, rtol=1e-9, atol=1e-12)


def test_the_sign_tells_whether_a_teacher_is_added_or_removed() -> None:
    _, _, y = rows()
    weights = SELECTED["weights"]
    assert weights is not None
    for hessian_name, selected, expected in (
        ("objective", None, -torch.ones(ROWS)),
        ("objective", weights, 1 - 2 * weights),
        ("gt", weights, torch.ones(ROWS)),
    ):
        sign = TrainingObjective(hessian=hessian_name).teacher_sign(y, selected, torch.float64)
        assert torch.equal(sign, expected.double())


def test_class_weights_are_normalized_by_their_mean() -> None:
    _, _, y = rows()
    loss = KDLoss(class_weight=WEIGHTS)
    normalised = TrainingObjective(loss).normalised(Ranks(), [y[:5], y[5:]]).loss.class_weight
    assert normalised is not None
    torch.testing.assert_close(normalised, WEIGHTS / WEIGHTS[y].mean())
    assert loss.class_weight is not None and torch.equal(loss.class_weight, WEIGHTS), "the caller's loss is unchanged"
    for unchanged in (KDLoss(), KDLoss(class_weight=WEIGHTS, reduction="sum")):
        objective = TrainingObjective(unchanged)
        assert objective.normalised(Ranks(), [y]) is objective


def test_terms_without_weight_are_dropped() -> None:
    _, _, y = rows()
    none_selected = torch.zeros(ROWS)
    terms = TrainingObjective(KDLoss()).hessian_terms(y, none_selected, torch.float64)
    assert [term.temperature for term in terms] == [1.0, 4.0]
    assert [term.temperature for term in nonzero_terms(terms, Ranks())] == [1.0]


@pytest.mark.parametrize("divergence", ["kl", "rkl", JSD(0.3), SKL(0.1), SRKL(0.4)], ids=repr)
def test_a_divergence_has_its_hessian_where_student_and_teacher_agree(divergence: str | Divergence) -> None:
    _, v, y = rows()
    y[:] = v.argmax(dim=1)  # nothing is revised
    loss = KDLoss(2.0, ce_weight=0.0, kd_weight=0.7, divergence=divergence)

    def of(z: Tensor, v: Tensor, y: Tensor) -> Tensor:
        options: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.0, "kd_weight": 0.7, "divergence": divergence}
        return reference.kd_loss(z[None], v[None], y[None], **options)

    expected = torch.stack(
        [torch.autograd.functional.hessian(lambda z, i=i: of(z, v[i], y[i]), v[i]) for i in range(ROWS)]
    )
    terms = TrainingObjective(loss).hessian_terms(y, None, torch.float64)
    torch.testing.assert_close(logit_hessian(v, terms), expected, rtol=1e-9, atol=1e-12)


def test_the_total_variation_distance_has_no_curvature() -> None:
    _, _, y = rows()
    objective = TrainingObjective(KDLoss(divergence="tvd"))
    for terms in (objective.hessian_terms, lambda y, _, dtype: objective.teacher_terms(y, dtype)):
        with pytest.raises(ValueError, match="hessian='objective' needs .*'tvd'.*pass hessian='gt'.*'identity'"):
            terms(y, None, torch.float64)
    assert len(TrainingObjective(KDLoss(divergence="tvd"), "gt").hessian_terms(y, None, torch.float64)) == 1
    # Without a teacher's weight there is nothing to differentiate.
    without = KDLoss(divergence="tvd", kd_weight=0.0, ce_weight=1.0)
    assert TrainingObjective(without).hessian_terms(y, None, torch.float64)[1].weight.eq(0).all()


def test_negative_weights_are_refused() -> None:
    _, _, y = rows()
    loss = KDLoss()
    loss.kd_weight = -0.5
    with pytest.raises(ValueError, match="weights are >= 0, or H is indefinite; got ce_weight=0.1.* kd_weight=-0.5"):
        TrainingObjective(loss).hessian_terms(y, None, torch.float64)
    assert len(TrainingObjective(loss, "gt").hessian_terms(y, None, torch.float64)) == 1


@pytest.mark.parametrize("labels", ["all", 5000])
def test_fisher_gradients_add_up_to_the_hessian_of_the_logits(labels: int | str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, CLASSES, dtype=torch.float64)
    weight = torch.tensor([0.2, 0.24], dtype=torch.float64)
    terms = [HessianTerm(weight, 1.0), HessianTerm(1.0 - weight / 2, 3.0)]
    total = torch.zeros(2, CLASSES, CLASSES, dtype=torch.float64)
    for delta in fisher_gradients(logits, terms, labels, torch.Generator().manual_seed(0)):
        total += delta[:, :, None] * delta[:, None, :]
    expected = torch.zeros_like(total)
    for weight, temperature in terms:
        q = torch.softmax(logits / temperature, dim=1)
        expected += weight[:, None, None] * (torch.diag_embed(q) - q[:, :, None] * q[:, None, :])
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12 if labels == "all" else 0.02)
    torch.testing.assert_close(logit_hessian(logits, terms), expected, rtol=0, atol=1e-12)
