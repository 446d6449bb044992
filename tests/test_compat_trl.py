"""TRL's divergence, its chunked loss, GKDTrainer with label revision, and DistillationTrainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lrds_fast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("trl.experimental.gkd", reason="needs trl: pip install trl", exc_type=ImportError)

from trl.experimental.gkd import GKDTrainer

try:
    from trl.trainer import distillation_trainer
except ImportError:
    distillation_trainer = None

from lrds_fast.compat.trl import (
    LRDSDistillationTrainer,
    LRDSGKDTrainer,
    chunked_divergence_loss,
    entropy_of_rows,
    generalized_jsd_loss,
)

B, T, V = 3, 7, 29
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
#: DistillationTrainer's loss has the arguments that our twins follow.
SUPPORTED = hasattr(distillation_trainer, "ChunkedDivergenceFunction")
needs_distillation_trainer = pytest.mark.skipif(not SUPPORTED, reason="needs trl >= 1.16: pip install -U trl")


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


@needs_distillation_trainer
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [None, 50])
def test_the_chunked_loss_is_trls(beta: float, count: int | None) -> None:
    theirs = distillation_trainer._chunked_divergence_loss
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


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["kl", "rkl", "tvd", "mse_logits", "mse_probs"])
def test_a_divergence_has_no_power_of_the_temperature(name: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(B, T, size, generator=generator) for size in (5, 6))
    head, its = (torch.randn(V, size, generator=generator) for size in (5, 6))
    ones = torch.ones(B, T, dtype=torch.int64)
    found = chunked_divergence_loss(hidden, taught, head, its, ones, 0.5, temperature=temperature, divergence=name)
    z, v = hidden @ head.T, taught @ its.T
    q, p = (torch.softmax(x / temperature, -1) for x in (z, v))
    expected = {
        "kl": (p * (p / q).log()).sum(-1),
        "rkl": (q * (q / p).log()).sum(-1),
        "tvd": 0.5 * (q - p).abs().sum(-1),
        "mse_logits": (z - v).square().mean(-1),
        "mse_probs": (q - p).square().mean(-1),
    }[name]
    torch.testing.assert_close(found, expected.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dkd", "nkd", "rld"])
def test_divergences_that_need_labels_are_refused(name: str) -> None:
    hidden, head = torch.randn(B, T, 5), torch.randn(V, 5)
    with pytest.raises(ValueError, match=f"divergence must need no labels.*got '{name}'"):
        chunked_divergence_loss(hidden, hidden, head, head, torch.ones(B, T), 0.5, divergence=name)
    if SUPPORTED:
        with pytest.raises(ValueError, match="divergence must need no labels"):
            LRDSDistillationTrainer(divergence=name)


def test_the_entropy_of_a_heads_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrds_fast.compat.trl.default_chunk_rows", lambda *_: 4)
    generator = torch.Generator().manual_seed(0)
    hidden, head, bias = (torch.randn(*shape, generator=generator) for shape in ((11, 5), (V, 5), (V,)))
    logits = 3.0 * torch.tanh(0.5 * (hidden @ head.T + bias) / 3.0)
    expected = torch.distributions.Categorical(logits=logits / 2.0).entropy()
    values = entropy_of_rows(hidden.requires_grad_(), head, bias, 0.5, 3.0, 2.0)
    assert not values.requires_grad
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    assert entropy_of_rows(hidden[:0], head).shape == (0,)


def logged(cls: type, folder: Path, **arguments: Any) -> list[dict[str, float]]:
    """The loss, the gradient's norm and the entropy of two on-policy steps of a tiny language model."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DistillationConfig

    special = ["<pad>", "<eos>", "<unk>"]
    words = models.WordLevel({c: i for i, c in enumerate([*special, *"abcdefghijklmnopqrstu"])}, unk_token="<unk>")
    letters = Tokenizer(words)
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, padding_side="left", **names)

    def model(seed: int, width: int) -> Any:
        torch.manual_seed(seed)
        sizes = {"vocab_size": 24, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.5))

    options: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
    }
    args = DistillationConfig(
        str(folder),
        max_completion_length=6,
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-2,
        **options,
    )
    prompts = Dataset.from_dict({"prompt": ["abc", "bcd", "fga", "aaa", "kjc", "bbb", "cde", "fed"]})
    trainer = cls(
        model=model(0, 16),
        teacher_model=model(1, 32),
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
        **arguments,
    )
    trainer.train()
    keys = ("loss", "grad_norm", "entropy")
    return [{key: log[key] for key in keys} for log in trainer.state.log_history if "loss" in log]


@needs_distillation_trainer
@pytest.mark.filterwarnings("ignore::FutureWarning")  # between TRL and transformers
def test_the_distillation_trainer_is_trls(tmp_path: Path) -> None:
    theirs = distillation_trainer._chunked_divergence_loss
    expected = logged(distillation_trainer.DistillationTrainer, tmp_path)
    assert len(expected) == 2 and expected[0] != expected[1]
    for ours, trls in zip(logged(LRDSDistillationTrainer, tmp_path), expected, strict=True):
        assert ours == pytest.approx(trls, rel=1e-5)
    total_variation = logged(LRDSDistillationTrainer, tmp_path, divergence="tvd", log_entropy=False)
    assert all(0 < log["loss"] < 1 for log in total_variation)
    assert all(log["entropy"] is None for log in total_variation)  # transformers writes NaN as None
    assert distillation_trainer._chunked_divergence_loss is theirs


@needs_distillation_trainer
def test_a_batch_without_completions_costs_nothing() -> None:
    trainer: Any = LRDSDistillationTrainer.__new__(LRDSDistillationTrainer)
    trainer.divergence, trainer.log_entropy = None, True
    hidden, head = torch.randn(2, 3, 5, requires_grad=True), torch.randn(V, 5)
    names = ("num_items_in_batch", "student_lm_head_bias", "teacher_lm_head_bias", "student_final_logit_softcapping")
    rest = dict.fromkeys((*names, "teacher_final_logit_softcapping")) | {"student_logit_scale": 1.0}
    mask = torch.zeros(2, 3, dtype=torch.int64)
    loss, entropy, count = trainer._loss(
        hidden, hidden.detach(), head, head, mask, 0.5, teacher_logit_scale=1.0, temperature=1.0, **rest
    )
    loss.backward()
    assert (loss.item(), entropy.item(), count.item()) == (0.0, 0.0, 0)
    assert hidden.grad is not None and not hidden.grad.any()


def test_an_older_trl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrds_fast.compat.trl.distillation_trainer", None)
    with pytest.raises(ImportError, match=r"LRDSDistillationTrainer needs trl >= 1\.16; trl is \d"):
        LRDSDistillationTrainer()
