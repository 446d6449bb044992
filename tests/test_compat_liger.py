"""Liger's fused linear losses against their twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lrds_fast

pytest.importorskip("liger_kernel", reason="needs liger-kernel: pip install liger-kernel")

from lrds_fast.compat.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss

N, V = 24, 31


def tensors() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Leaves (input, weight, bias) of the student; the teacher's input and weight; labels."""
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(*size, generator=generator).requires_grad_() for size in ((N, 6), (V, 6), (V,))]
    taught, weight = (torch.randn(*size, generator=generator) for size in ((N, 9), (V, 9)))
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = -100
    return own, taught, weight, labels


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_the_jsd_loss_is_ligers(beta: float, temperature: float, hard: float) -> None:
    theirs = pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError).LigerFusedLinearJSDLoss
    arguments: dict[str, Any] = {"beta": beta, "temperature": temperature, "compiled": False, "chunk_size": 8}
    results = []
    for twin in (theirs, LigerFusedLinearJSDLoss):
        own, taught, weight, labels = tensors()
        value = twin(hard, 0.7, **arguments)(own[0], own[1], taught, weight, labels, own[2])
        (2 * value).backward()
        results.append([value.detach(), *(tensor.grad for tensor in own)])
    for ours, reference in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("labelled", [False, True])
def test_the_jsd_alone_is_the_loss_without_cross_entropy(beta: float, labelled: bool) -> None:
    """Liger's own class is a Triton kernel; its definition is the JSD of the logits."""
    own, taught, weight, labels = tensors()
    value = LigerFusedLinearJSD(beta, temperature=2.0)(own[0], own[1], taught, weight, labels if labelled else None)
    z, v = own[0].double() @ own[1].double().t() / 2, taught.double() @ weight.double().t() / 2
    q, p = z.log_softmax(1), v.log_softmax(1)
    if beta in (0.0, 1.0):
        rows = (p.exp() * (p - q)).sum(1) if beta == 0 else (q.exp() * (q - p)).sum(1)
    else:
        m = (beta * p.exp() + (1 - beta) * q.exp()).log()
        rows = beta * (p.exp() * (p - m)).sum(1) + (1 - beta) * (q.exp() * (q - m)).sum(1)
    expected = rows[labels >= 0].mean() if labelled else rows.mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_revision_is_linear_kd_loss_and_mistakes_are_named() -> None:
    own, taught, weight, labels = tensors()
    value = LigerFusedLinearJSDLoss(beta=0.0, revise="lr", eta=0.6)(own[0], own[1], taught, weight, labels)
    weights: dict[str, Any] = {"ce_weight": 0.5, "kd_weight": 0.5, "ce_weight_unselected": 0.5}
    expected = lrds_fast.linear_kd_loss(own[0], own[1], taught, weight, labels, temperature=1.0, eta=0.6, **weights)
    torch.testing.assert_close(value, expected)
    with pytest.raises(ValueError, match="return_soft_hard_loss must be False"):
        LigerFusedLinearJSDLoss(return_soft_hard_loss=True)
    with pytest.raises(ValueError, match="revise needs shift_labels"):
        LigerFusedLinearJSD(revise="lr")(own[0], own[1], taught, weight)
