"""Properties that hold for any shape and any values, searched by hypothesis (derandomized: the same cases each run)."""

from __future__ import annotations

from typing import Any

import kd_cases
import pytest
import torch
from tolerances import TOLERANCES, assert_matches_reference, assert_within, sizes
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from lrds_fast import kd_loss, kd_loss_parts

repeatable = settings(deadline=None, derandomize=True, max_examples=250, database=None)


@st.composite
def problems(draw: Any) -> tuple[kd_cases.Rows, dict[str, Any]]:
    """Rows of any shape and dtype with some entries replaced by hand-picked hard values, and keywords."""
    count = draw(st.integers(0, 40))
    classes = draw(st.integers(1, 70))
    dtypes = st.sampled_from(kd_cases.FLOATING)
    rows = kd_cases.rows(count, classes, draw(dtypes), draw(dtypes), seed=draw(st.integers(0, 2**16)))
    hard = st.sampled_from([0.0, -0.0, 1e-7, 88.0, -88.0, 104.0, -104.0, 6e4, -6e4, 1e-30])
    for logits in (rows.student, rows.teacher):
        for _ in range(draw(st.integers(0, 4)) if count else 0):
            row, column = draw(st.integers(0, count - 1)), draw(st.integers(0, classes - 1))
            logits[row, column] = draw(hard)
    weight = st.sampled_from([0.0, 0.1, 0.9, 1.0, 3.0])
    keywords: dict[str, Any] = {
        "temperature": draw(st.sampled_from([*kd_cases.TEMPERATURES, 0.5, 7.3])),
        "ce_weight": draw(weight),
        "kd_weight": draw(weight),
        "ce_weight_unselected": draw(st.none() | weight),
        "revise": draw(st.sampled_from(["lr", None])),
        "eta": draw(st.floats(0.01, 0.99)),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none", "elementmean"])),
    }
    how = draw(st.sampled_from(["all", "mask", "weights", "prefix"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if how == "mask":
        keywords["selected"] = torch.rand(count, generator=generator) < 0.5
    elif how == "weights":
        keywords["selected"] = torch.rand(count, generator=generator)
    elif how == "prefix":
        keywords["teacher_rows"] = draw(st.integers(0, count))
        rows = rows._replace(teacher=rows.teacher[: keywords["teacher_rows"]])
    rows.target[torch.rand(count, generator=generator) < 0.2] = -100
    return rows, keywords


@repeatable
@given(problems())
def test_matches_reference(problem: tuple[kd_cases.Rows, dict[str, Any]]) -> None:
    rows, keywords = problem
    assert_matches_reference(kd_loss_parts, *rows, **keywords)


@repeatable
@given(problems())
def test_rows_are_independent(problem: tuple[kd_cases.Rows, dict[str, Any]]) -> None:
    """Permuting the rows permutes losses and gradients, to the bit."""
    rows, keywords = problem
    if rows.teacher.shape[0] < rows.student.shape[0]:
        return
    keywords |= {"reduction": "none"}
    order = torch.randperm(rows.target.shape[0], generator=torch.Generator().manual_seed(1))

    def run(index: Tensor | slice) -> tuple[Tensor, Tensor]:
        student = rows.student[index].clone().requires_grad_()
        given_keywords = dict(keywords)
        if "selected" in keywords:
            given_keywords["selected"] = keywords["selected"][index]
        loss = kd_loss(student, rows.teacher[index], rows.target[index], **given_keywords)
        return loss.detach(), torch.autograd.grad(loss, student, torch.ones_like(loss))[0]

    loss, gradient = run(slice(None))
    permuted_loss, permuted_gradient = run(order)
    assert torch.equal(permuted_loss, loss[order])
    assert torch.equal(permuted_gradient, gradient[order])


@repeatable
@given(problems())
def test_classes_may_be_renamed(problem: tuple[kd_cases.Rows, dict[str, Any]]) -> None:
    rows, keywords = problem
    classes = rows.student.shape[-1]
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(1))
    renamed = torch.where(rows.target >= 0, order.argsort()[rows.target.clamp(min=0)], -100)
    loss = kd_loss(*rows, **keywords)
    other = kd_loss(rows.student[:, order], rows.teacher[:, order], renamed, **keywords)
    bound = 2 * TOLERANCES[loss.dtype].loss * sizes(*rows, **keywords).loss
    assert_within(other, loss, bound, "loss with renamed classes")


@repeatable
@given(problems())
def test_terms_are_linear_in_their_weights(problem: tuple[kd_cases.Rows, dict[str, Any]]) -> None:
    """The loss is ce_weight * CE + ce_weight_unselected * CE' + kd_weight * KD."""
    rows, keywords = problem
    keywords |= {"ce_weight_unselected": keywords["ce_weight_unselected"] or 0.0}
    names = ("ce_weight", "kd_weight", "ce_weight_unselected")
    alone = []
    for name in names:
        weights = {other: float(other == name) for other in names}
        alone.append(keywords[name] * kd_loss(*rows, **keywords | weights).double())
    loss = kd_loss(*rows, **keywords)
    bound = 4 * TOLERANCES[loss.dtype].loss * sizes(*rows, **keywords).loss + 1e-30
    assert_within(loss, torch.stack(alone).sum(0), bound, "loss")


@repeatable
@given(problems())
def test_no_term_is_negative(problem: tuple[kd_cases.Rows, dict[str, Any]]) -> None:
    """CE >= 0 and KL >= 0, up to the rounding of what they were added up from."""
    rows, keywords = problem
    parts = kd_loss_parts(*rows, **keywords)
    slack = TOLERANCES[parts.loss.dtype].loss * sizes(*rows, **keywords).loss
    assert (parts.ce.double() >= -slack).all() and (parts.kd.double() >= -slack).all()
