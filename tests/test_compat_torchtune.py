"""torchtune's distillation losses against kd_loss."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lrds_fast

if importlib.util.find_spec("torchtune") is None:
    pytest.skip("needs torchtune: pip install torchtune torchao", allow_module_level=True)

from lrds_fast.compat.torchtune import LRDSKDLoss

N, V = 20, 23


def theirs(name: str) -> Any:
    """A class of torchtune's kd_losses.py, which needs torch only, whatever its package needs."""
    found = importlib.util.find_spec("torchtune")
    assert found is not None and found.origin is not None
    path = Path(found.origin).parent / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return getattr(module, name)


def logits() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(N, V, generator=generator) for _ in range(2))
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::4] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("name", "divergence"), [("ForwardKLLoss", "kl"), ("ReverseKLLoss", "rkl")])
def test_it_is_torchtunes_loss(name: str, divergence: str, normalize: bool) -> None:
    student, teacher, labels = logits()
    results: list[tuple[Tensor, Tensor]] = []
    for loss in (theirs(name)(), LRDSKDLoss(revise=None, divergence=divergence)):
        student.grad = None
        value = loss(student, teacher, labels, normalize)
        value.backward()
        assert student.grad is not None
        results.append((value.detach(), student.grad))
    constant = torch.tensor(0.0)
    if divergence == "kl":
        p = teacher[labels >= 0].log_softmax(1)
        rows = -(p.exp() * p).sum(1)
        constant = rows.mean() if normalize else rows.sum()
    torch.testing.assert_close(results[1][0] + constant, results[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-6)


def test_revision_is_the_default_and_chunks_are_refused() -> None:
    student, teacher, labels = logits()
    weights: dict[str, Any] = {"ce_weight": 0.0, "kd_weight": 1.0, "ce_weight_unselected": 0.0}
    expected = lrds_fast.kd_loss(student, teacher, labels, temperature=1.0, **weights)
    shape = (4, 5)
    value = LRDSKDLoss()(student.view(*shape, V), teacher.view(*shape, V), labels.view(shape))
    torch.testing.assert_close(value, expected)
    assert LRDSKDLoss().ignore_index == -100
    with pytest.raises(TypeError, match="got chunks: set loss to torch.nn.CrossEntropyLoss"):
        LRDSKDLoss()([student], [teacher], labels)
