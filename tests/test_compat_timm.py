"""timm's LogitDistillationTask, and ours in its place."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrds_fast

pytest.importorskip("timm.task", reason="needs timm >= 1.0.27: pip install timm")

from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import DistillationTeacher, LogitDistillationTask

from lrds_fast.compat.timm import LRDSDistillationTask

N, C = 16, 10
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


class Net(nn.Module):
    """A linear network with what timm reads from a model."""

    num_classes, in_chans = C, 3

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (mean,) * 3, "std": (0.5,) * 3}
        self.fc = nn.Linear(3 * 4 * 4, C)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = 3 * self.fc(x.flatten(1))
        return logits


def networks() -> tuple[Net, Net]:
    torch.manual_seed(0)
    return Net(0.5), Net(0.4)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, 4, 4, generator=generator), torch.randint(0, C, (N,), generator=generator)


def run(task: Any, *inputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The task's dict, and the gradient of the student's weight."""
    task.zero_grad()
    result: dict[str, Tensor] = task(*inputs)
    result["loss"].backward()
    gradient: Tensor = task.trainable_module.fc.weight.grad.clone()
    return result, gradient


@pytest.mark.parametrize(
    "weights", [{}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 2.0, "task_loss_weight": 0.5}]
)
@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, C), label_smoothing=0.2),
        LabelSmoothingCrossEntropy(0.1),
        SoftTargetCrossEntropy(),
        BinaryCrossEntropy(0.1),
    ],
    ids=lambda criterion: type(criterion).__name__,
)
def test_without_revision_it_is_timms_loss(criterion: nn.Module, weights: dict[str, float]) -> None:
    student, teacher = networks()
    images, target = batch()
    if isinstance(criterion, SoftTargetCrossEntropy):
        images, target = Mixup(mixup_alpha=0.8, num_classes=C)(images, target)
    arguments: dict[str, Any] = {"criterion": criterion, "temperature": 3.0, **weights, "verbose": False}
    theirs, gradient = run(LogitDistillationTask(student, teacher, **arguments), images, target)
    ours, own_gradient = run(LRDSDistillationTask(student, teacher, revise=None, **arguments), images, target)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **CLOSE)
    torch.testing.assert_close(own_gradient, gradient, **CLOSE)


def test_the_default_revises_and_selected_rows_alone_have_a_teacher() -> None:
    student, teacher = networks()
    images, target = batch()
    selected = torch.arange(N) % 3 > 0
    with torch.no_grad():
        taught = teacher((images * 0.5 + 0.5 - 0.4) / 0.5)
    task = LRDSDistillationTask(student, teacher, task_loss_weight=0.1, temperature=4.0, eta=0.6, divergence="dkd")
    result = task(images, target, selected)
    assert taught.argmax(1).ne(target).any()
    expected = lrds_fast.kd_loss(student(images), taught, target, eta=0.6, divergence="dkd", selected=selected)
    torch.testing.assert_close(result["loss"], expected)
    plain = LRDSDistillationTask(student, teacher, task_loss_weight=0.1, temperature=4.0, revise=None)
    assert (plain(images, target)["loss"] - task(images, target)["loss"]).abs() > 0.1


@pytest.mark.parametrize("chosen", [None, torch.arange(N) % 2 == 0])
def test_the_logged_terms_have_no_weights(chosen: torch.Tensor | None) -> None:
    """Neither a weight of 0 nor that of the rows without a teacher."""
    student, teacher = networks()
    task = LRDSDistillationTask(student, teacher, distill_loss_weight=0.0)
    images, target = batch()
    result = task(images, target, chosen)
    torch.testing.assert_close(result["task_loss"], F.cross_entropy(result["output"], target))
    assert result["kd_loss"] > 0


def test_timms_own_handling_of_the_teacher_stays() -> None:
    student, teacher = networks()
    task = LRDSDistillationTask(student, DistillationTeacher(teacher), temperature=2.0)
    task.train()
    assert task.trainable_module.training and not task.teacher.training
    run(task, *batch())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_mistakes_are_named() -> None:
    student, teacher = networks()
    with pytest.raises(ValueError, match="eta must be in"):
        LRDSDistillationTask(student, teacher, eta=2.0)
    with pytest.raises(TypeError, match="takes ce_weight from timm's argument task_loss_weight"):
        LRDSDistillationTask(student, teacher, ce_weight=0.5)
    with pytest.raises(TypeError, match="takes label_smoothing from timm's argument criterion"):
        LRDSDistillationTask(student, teacher, label_smoothing=0.1)
    with pytest.raises(TypeError, match="'alpha'"):
        LRDSDistillationTask(student, teacher, alpha=0.5)
    with pytest.raises(ValueError, match="criterion is BinaryCrossEntropy"):
        LRDSDistillationTask(student, teacher, criterion=BinaryCrossEntropy(), ce_weight_unselected=1.0)


def test_without_timm_the_error_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['timm.task'] = None; import lrds_fast.compat.timm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: lrds_fast.compat.timm needs timm >= 1.0.27: pip install 'timm>=1.0.27'" in done.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("task_loss_weight", 2.0), ("distill_loss_weight", 0.5), ("temperature", 1.0)]
)
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), BinaryCrossEntropy()])
def test_weights_may_change_during_training(name: str, value: float, criterion: nn.Module) -> None:
    student, teacher = networks()
    arguments: dict[str, Any] = {"criterion": criterion, "temperature": 3.0, "verbose": False}
    theirs = LogitDistillationTask(student, teacher, **arguments)
    ours = LRDSDistillationTask(student, teacher, revise=None, **arguments)
    before = theirs(*batch())["loss"]
    for task in (theirs, ours):
        setattr(task, name, value)
    after = theirs(*batch())["loss"]
    assert (after - before).abs() > 0.01
    torch.testing.assert_close(ours(*batch())["loss"], after, **CLOSE)
