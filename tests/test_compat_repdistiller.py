"""RepDistiller and mdistiller. Neither is a package, so the tests use a Distiller of the same signature."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrds_fast
from lrds_fast.compat.repdistiller import DistillKL, distiller

N, C = 12, 7


class Distiller(nn.Module):
    """The parts of mdistiller's base class that training uses."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        self.teacher.eval()
        return self


class Net(nn.Module):
    """Logits and a dict of features, as mdistiller's models return."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, C)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.fc(x), {"pooled_feat": x}


def test_the_kl_term_is_the_eager_formula() -> None:
    torch.manual_seed(0)
    own, taught, target = torch.randn(N, C, requires_grad=True), torch.randn(N, C), torch.arange(N) % C
    expected = 16 * F.kl_div((own / 4).log_softmax(1), (taught / 4).softmax(1), reduction="sum") / N
    (reference,) = torch.autograd.grad(expected, own)
    value = DistillKL(4.0)(own, taught)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own.grad, reference, rtol=1e-5, atol=1e-6)
    weights: dict[str, Any] = {"ce_weight": 0.0, "kd_weight": 1.0, "ce_weight_unselected": 0.0}
    revised = DistillKL(4.0, revise="lr")(own, taught, target)
    torch.testing.assert_close(revised, lrds_fast.kd_loss(own, taught, target, **weights))
    with pytest.raises(ValueError, match="revise needs the target"):
        DistillKL(4.0, revise="lr")(own, taught)


@pytest.mark.parametrize("lrds", [{}, {"REVISE": None}, {"ETA": 0.6, "DIVERGENCE": "dkd"}])
def test_a_distiller_gives_the_loss_of_its_config(lrds: dict[str, Any]) -> None:
    torch.manual_seed(0)
    student: Any = Net()
    teacher: Any = Net()
    kd = SimpleNamespace(TEMPERATURE=4, LOSS=SimpleNamespace(CE_WEIGHT=0.1, KD_WEIGHT=0.9))
    model: Any = distiller(Distiller)(student, teacher, SimpleNamespace(KD=kd, LRDS=lrds)).train()
    x, target = torch.randn(N, 5), torch.arange(N) % C
    logits, losses = model.forward_train(image=x, target=target, epoch=1)
    # mdistiller's trainer: the sum of the terms' means.
    loss = sum(term.mean() for term in losses.values())
    options = {name.lower(): value for name, value in lrds.items()}
    expected = lrds_fast.kd_loss(student.fc(x), teacher.fc(x).detach(), target, **options)
    torch.testing.assert_close(loss, expected)
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, student.fc.weight)
    (reference,) = torch.autograd.grad(expected, student.fc.weight)
    torch.testing.assert_close(gradient, reference)
    assert logits.shape == (N, C)


def test_mistakes_of_the_config_are_named() -> None:
    kd = SimpleNamespace(TEMPERATURE=4, LOSS=SimpleNamespace(CE_WEIGHT=0.1, KD_WEIGHT=0.9))
    with pytest.raises(TypeError, match="'alpha'"):
        distiller(Distiller)(Net(), Net(), SimpleNamespace(KD=kd, LRDS={"ALPHA": 0.6}))
