"""ModelOpt's losses against their twins, and its distillation with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrds_fast

mtd = pytest.importorskip(
    "modelopt.torch.distill", reason="needs nvidia-modelopt: pip install nvidia-modelopt", exc_type=ImportError
)

from lrds_fast.compat.modelopt import LogitsDistillationLoss, MFTLoss  # noqa: E402

C = 17
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 2e-6}


def logits(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(*shape, C, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(0, C, shape, generator=generator)


def compare(theirs: Any, ours: Any, student: Tensor, *others: Tensor, sums: bool = False) -> None:
    results: list[tuple[Tensor, Tensor]] = []
    for loss in (theirs, ours):
        student.grad = None
        value = loss(student, *others)
        if sums and loss is theirs:
            value = value.sum(-1)
        (value * torch.arange(1.0, value.numel() + 1).view(value.shape)).sum().backward()
        assert student.grad is not None
        results.append((value.detach(), student.grad))
    torch.testing.assert_close(results[1][0], results[0][0], **CLOSE)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_the_logits_loss_is_modelopts(reduction: str, temperature: float, shape: tuple[int, ...]) -> None:
    student, teacher, _ = logits(*shape)
    arguments = (temperature, reduction)
    compare(mtd.LogitsDistillationLoss(*arguments), LogitsDistillationLoss(*arguments), student, teacher)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize(("temperature", "threshold"), [(1.0, 0.2), (2.0, 0.4)])
def test_the_mft_loss_is_modelopts(reduction: str, temperature: float, threshold: float) -> None:
    student, teacher, labels = logits(12)
    theirs = mtd.MFTLoss(temperature, threshold, reduction)
    compare(theirs, MFTLoss(temperature, threshold, reduction), student, teacher, labels, sums=reduction == "none")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x)
        return logits


def test_a_distillation_of_modelopt_with_revision() -> None:
    torch.manual_seed(0)
    student, teacher = Net(), Net()
    config = {"teacher_model": teacher, "criterion": LogitsDistillationLoss(2.0, "batchmean", revise="lr")}
    model = mtd.convert(student, mode=[("kd_loss", config)])
    x, labels = torch.randn(6, 5), torch.arange(6)
    logits = model(x).detach()
    weights: dict[str, Any] = {"ce_weight": 0.0, "kd_weight": 1.0, "ce_weight_unselected": 0.0}
    expected = lrds_fast.kd_loss(logits, teacher.fc(x), labels, temperature=2.0, **weights)
    torch.testing.assert_close(model.compute_kd_loss(labels=labels), expected)


def test_mistakes_are_named() -> None:
    student, teacher, _ = logits(4)
    with pytest.raises(ValueError, match="revise needs labels"):
        LogitsDistillationLoss(revise="lr")(student, teacher)
    with pytest.raises(ValueError, match="reduction must be one of"):
        MFTLoss(reduction="average")
