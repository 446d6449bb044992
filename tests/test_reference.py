"""The reference, against a second implementation in scalar Python and PyTorch's own losses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast import reference


def softmax(x: list[float], temperature: float) -> list[float]:
    top = max(x)
    e = [math.exp((k - top) / temperature) for k in x]
    return [k / sum(e) for k in e]


def log_softmax(x: list[float], temperature: float) -> list[float]:
    top = max(x)
    total = math.log(sum(math.exp((k - top) / temperature) for k in x))
    return [(k - top) / temperature - total for k in x]


def revised(v: list[float], y: int, temperature: float, eta: float) -> list[float]:
    """p' of docs/method.md, class by class."""
    p = softmax(v, temperature)
    if v[y] == max(v):
        return p
    beta = eta / (1.0 + max(p) - p[y])
    return [beta * p_k + (1.0 - beta if k == y else 0.0) for k, p_k in enumerate(p)]


class Row:
    """One row's terms and gradients, unweighted, written down from the formulas."""

    def __init__(
        self,
        z: list[float],
        v: list[float],
        y: int,
        temperature: float,
        eta: float,
        revise: bool,
        smoothing: float,
    ) -> None:
        classes = len(z)
        p = revised(v, y, temperature, eta) if revise else softmax(v, temperature)
        self.is_wrong = v[y] < max(v)
        log_q, log_s = log_softmax(z, temperature), log_softmax(z, 1.0)
        label = [(1.0 - smoothing) * (k == y) + smoothing / classes for k in range(classes)]
        self.ce = -sum(t * s for t, s in zip(label, log_s, strict=True))
        self.kd = temperature**2 * sum(a * (math.log(a) - b) for a, b in zip(p, log_q, strict=True) if a > 0.0)
        self.ce_gradient = [math.exp(s) - t for t, s in zip(label, log_s, strict=True)]
        self.kd_gradient = [temperature * (math.exp(b) - a) for a, b in zip(p, log_q, strict=True)]


def batch(rows: int = 12, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    z = 2.0 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    v = 2.0 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (rows,), generator=generator)
    y[::2] = v[::2].argmax(dim=1)
    return z, v, y


@pytest.mark.parametrize(
    ("temperature", "revise", "smoothing", "reduction", "selection"),
    list(
        itertools.product(
            [1.0, 4.0, 2.5],
            ["lr", None],
            [0.0, 0.1],
            ["mean", "sum", "none", "elementmean"],
            [None, "mask", "weights", "prefix"],
        )
    ),
)
def test_matches_the_formulas(
    temperature: float, revise: str | None, smoothing: float, reduction: str, selection: str | None
) -> None:
    z, v, y = batch()
    rows, classes = z.shape
    y[5] = -100
    y[9] = -100
    w = torch.ones(rows, dtype=torch.float64)
    teacher, selected, teacher_rows = v, None, None
    if selection == "mask":
        selected = torch.arange(rows) % 3 > 0
        w = selected.double()
    elif selection == "weights":
        selected = torch.linspace(0.0, 1.0, rows, dtype=torch.float64)
        w = selected
    elif selection == "prefix":
        teacher, teacher_rows = v[:7], 7
        w = (torch.arange(rows) < 7).double()
    ce_weight, kd_weight, unselected, eta = 0.3, 1.2, 0.8, 0.7

    ce, kd = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    gradient = torch.zeros_like(z)
    n_selected = n_revised = 0
    for i in range(rows):
        if y[i] == -100:
            continue
        row = Row(
            z[i].tolist(),
            v[i].tolist(),
            int(y[i]),
            temperature,
            eta,
            revise is not None,
            smoothing,
        )
        share = float(w[i])
        w_ce, w_kd = share * ce_weight + (1.0 - share) * unselected, share * kd_weight
        ce[i], kd[i] = w_ce * row.ce, w_kd * row.kd
        terms = zip(row.ce_gradient, row.kd_gradient, strict=True)
        gradient[i] = torch.tensor([w_ce * a + w_kd * b for a, b in terms], dtype=torch.float64)
        n_selected += share > 0.0
        n_revised += share > 0.0 and row.is_wrong and revise is not None
    scale = {"mean": 1 / 10, "elementmean": 1 / (10 * classes)}.get(reduction, 1.0)
    if reduction != "none":
        ce, kd = ce.sum(), kd.sum()

    z.requires_grad_()
    parts = reference.kd_loss_parts(
        z,
        teacher,
        y,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        ce_weight_unselected=unselected,
        revise=revise,
        eta=eta,
        revise_temperature=None,
        selected=selected,
        teacher_rows=teacher_rows,
        label_smoothing=smoothing,
        reduction=reduction,
    )
    torch.testing.assert_close(parts.ce, scale * ce)
    torch.testing.assert_close(parts.kd, scale * kd)
    torch.testing.assert_close(parts.loss, scale * (ce + kd))
    counts = (parts.n_valid.item(), parts.n_selected.item(), parts.n_revised.item())
    assert counts == (10, n_selected, n_revised)
    assert n_revised > 0 or revise is None
    (actual,) = torch.autograd.grad(parts.loss.sum(), z)
    torch.testing.assert_close(actual, scale * gradient)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ce_is_torch_cross_entropy(reduction: str, smoothing: float, ignore_index: int) -> None:
    z, v, y = batch()
    y[4] = ignore_index
    parts = reference.kd_loss_parts(
        z,
        v,
        y,
        ce_weight=1.0,
        kd_weight=0.0,
        label_smoothing=smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    expected = F.cross_entropy(z, y, ignore_index=ignore_index, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(parts.loss, expected)
    assert not parts.kd.any()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_torch_kl_div(temperature: float) -> None:
    z, v, y = batch()
    loss = reference.kd_loss(z, v, y, temperature=temperature, ce_weight=0.0, kd_weight=1.0, revise=None)
    log_q, p = F.log_softmax(z / temperature, 1), F.softmax(v / temperature, 1)
    torch.testing.assert_close(loss, temperature**2 * F.kl_div(log_q, p, reduction="batchmean"))


def test_kd_is_torch_kl_div_to_the_revised_labels() -> None:
    z, v, y = batch()
    loss = reference.kd_loss(z, v, y, temperature=2.0, ce_weight=0.0, kd_weight=1.0, eta=0.5)
    p = reference.revise_labels(v, y, eta=0.5, temperature=2.0)
    expected = 4.0 * F.kl_div(F.log_softmax(z / 2.0, 1), p, reduction="batchmean")
    torch.testing.assert_close(loss, expected)


def test_revise_labels_matches_the_formulas() -> None:
    _, v, y = batch(30, 7)
    actual = reference.revise_labels(v, y, eta=0.6, temperature=1.5, revise_temperature=None)
    expected = [revised(v[i].tolist(), int(y[i]), 1.5, 0.6) for i in range(30)]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("ce_weight", "kd_weight"), [(0.1, 0.9), (0.0, 1.0), (0.7, 0.0), (-0.3, -0.9)])
def test_logit_gradient_is_the_gradient(ce_weight: float, kd_weight: float) -> None:
    z, v, y = batch()
    options: dict[str, Any] = {
        "temperature": 3.0,
        "ce_weight": ce_weight,
        "kd_weight": kd_weight,
        "label_smoothing": 0.1,
    }
    actual = reference.kd_logit_gradient(z, v, y, **options)
    z.requires_grad_()
    loss = reference.kd_loss(z, v, y, reduction="sum", ce_weight_unselected=0.0, **options)
    torch.testing.assert_close(actual, torch.autograd.grad(loss, z)[0])


@pytest.mark.parametrize(
    ("ce_weight", "kd_weight", "expected"),
    [
        (0.1, 0.9, 1.0),
        (0.2, 0.3, 0.5),
        (1.0, 1.0, 1.0),
        (2.0, 0.5, 2.0),
        (0.0, 4.0, 1.0),
        (0, 0, 0),
    ],
)
def test_default_weight_of_unselected_rows(ce_weight: float, kd_weight: float, expected: float) -> None:
    z, v, y = batch()
    loss = reference.kd_loss(z, v[:0], y, teacher_rows=0, ce_weight=ce_weight, kd_weight=kd_weight)
    torch.testing.assert_close(loss, expected * F.cross_entropy(z, y))


def test_gradient_is_right_by_finite_differences() -> None:
    z, v, y = batch(6, 4)
    z.requires_grad_()
    selected = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.2], dtype=torch.float64)
    y[3] = -100
    assert torch.autograd.gradcheck(
        lambda x: reference.kd_loss(x, v, y, selected=selected, label_smoothing=0.1, reduction="none"),
        z,
    )


def test_masked_classes() -> None:
    """-inf in both logits excludes the class; -inf in the student under teacher mass is an infinite loss."""
    z, v, y = batch(6, 5)
    y.clamp_(max=3)
    masked_z, masked_v = z.clone(), v.clone()
    masked_z[:, 4] = masked_v[:, 4] = -math.inf
    masked_z.requires_grad_()
    loss = reference.kd_loss(masked_z, masked_v, y)
    torch.testing.assert_close(loss, reference.kd_loss(z[:, :4], v[:, :4], y))
    (gradient,) = torch.autograd.grad(loss, masked_z)
    assert gradient.isfinite().all() and not gradient[:, 4].any()
    assert reference.kd_loss(masked_z.detach(), v, y).item() == math.inf
