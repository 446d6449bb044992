"""TRL's divergence, its chunked loss, and GKDTrainer with label revision."""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import lrds_fast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("trl.experimental.gkd", reason="needs trl: pip install trl", exc_type=ImportError)

from trl.experimental.gkd import GKDTrainer

from lrds_fast.compat.trl import LRDSGKDTrainer, chunked_divergence_loss, generalized_jsd_loss

B, T, V = 3, 7, 29
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[:, :2] = -100
    student, teacher = (2 * torch.randn(B, T, V, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "arguments", [{}, {"reduction": "mean"}, {"reduction": "sum"}, {"num_items_in_batch": torch.tensor(40)}]
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_divergence_is_trls(beta: float, temperature: float, arguments: dict[str, Any], masked: bool) -> None:
    student, teacher, labels = inputs()
    values: list[Tensor] = []
    gradients: list[Tensor] = []
    flat = not masked and arguments == {}  # TRL's batchmean without labels divides by B: give it rows
    for loss in (GKDTrainer.generalized_jsd_loss, generalized_jsd_loss):
        student.grad = None
        given = (student.flatten(0, 1), teacher.flatten(0, 1)) if flat else (student, teacher)
        value = loss(*given, labels if masked else None, beta, temperature, **arguments)
        value.backward()
        assert student.grad is not None
        values.append(value.detach())
        gradients.append(student.grad)
    torch.testing.assert_close(values[1], values[0], **CLOSE)
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)


def test_revision_needs_labels_and_is_kd_loss() -> None:
    student, teacher, labels = inputs()
    value = generalized_jsd_loss(student, teacher, labels, 0, revise="lr", eta=0.6)
    weights: dict[str, Any] = {"ce_weight": 0.0, "kd_weight": 1.0, "ce_weight_unselected": 0.0}
    torch.testing.assert_close(value, lrds_fast.kd_loss(student, teacher, labels, temperature=1.0, eta=0.6, **weights))
    assert (value - generalized_jsd_loss(student, teacher, labels, 0)).abs() > 0.1
    with pytest.raises(ValueError, match="revise needs labels"):
        generalized_jsd_loss(student, teacher, revise="lr")
    with pytest.raises(ValueError, match="reduction must be one of"):
        generalized_jsd_loss(student, teacher, reduction="average")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [None, 50])
def test_the_chunked_loss_is_trls(beta: float, count: int | None) -> None:
    theirs = pytest.importorskip("trl.trainer.distillation_trainer", exc_type=ImportError)._chunked_divergence_loss
    if "chunk_size" in inspect.signature(theirs).parameters:
        pytest.skip("this TRL's function has other arguments; its twin follows TRL 1.16")
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(B, T, size, generator=generator) for size in (5, 6))
    head, its = (torch.randn(V, size, generator=generator) for size in (5, 6))
    bias = torch.randn(V, generator=generator)
    mask = torch.arange(B * T).view(B, T) % 4 > 0
    results = []
    for loss in (theirs, chunked_divergence_loss):
        own = [tensor.clone().requires_grad_() for tensor in (hidden, head, bias)]
        head_of = {"student_logit_scale": 0.5, "teacher_logit_scale": 2.0, "student_final_logit_softcapping": 3.0}
        bias_of: dict[str, Any] = {"student_lm_head_bias": own[2], "temperature": 2.0} | head_of
        value = loss(own[0], taught, own[1], its, mask, beta, num_items_in_batch=count, **bias_of)
        value = value[0] if isinstance(value, tuple) else value
        value.backward()
        results.append([value.detach(), *(tensor.grad for tensor in own)])
    for ours, reference in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


class Steps(LRDSGKDTrainer):
    """The trainer without models: a step takes the loss of the batch that training_step would see."""

    def __init__(self, generate: bool) -> None:
        self.revise, self.eta, self.generated, self.generate = "lr", 0.6, False, generate


def test_generated_completions_are_not_revised(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = inputs()

    def step(self: Steps) -> Tensor:
        if self.generate:
            self.generate_on_policy_outputs(None, {}, None)
        return self.generalized_jsd_loss(student_logits=student, teacher_logits=teacher, labels=labels, beta=0.5)

    monkeypatch.setattr(GKDTrainer, "training_step", step)
    monkeypatch.setattr(GKDTrainer, "generate_on_policy_outputs", staticmethod(lambda *_: (None, None, None)))
    plain = GKDTrainer.generalized_jsd_loss(student, teacher, labels)
    torch.testing.assert_close(Steps(generate=True).training_step(), plain, **CLOSE)
    expected = generalized_jsd_loss(student, teacher, labels, revise="lr", eta=0.6)
    assert (expected - plain).abs() > 0.05
    trainer = Steps(generate=False)
    torch.testing.assert_close(trainer.training_step(), expected)
    trainer.generate = True
    torch.testing.assert_close(trainer.training_step(), plain, **CLOSE)
