"""transformers' Trainer with a teacher: gradients of whole steps, with accumulation, for a classifier and a language
model."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrds_fast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'transformers[torch]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'transformers[torch]'")

from lrds_fast.compat.transformers import LRDSTrainer, UpdateSelection  # noqa: E402
from lrds_fast.selection import SelectedDataset  # noqa: E402

V = 24


def language_model(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.5)
    return transformers.LlamaForCausalLM(config)


def classifier(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.ViTConfig(**sizes, num_attention_heads=2, num_labels=5, initializer_range=0.5)
    return transformers.ViTForImageClassification(config)


def texts() -> list[dict[str, Any]]:
    """Eight sequences whose numbers of ignored labels differ."""
    tokens = torch.randint(0, V, (8, 9), generator=torch.Generator().manual_seed(3))
    samples = []
    for row, ids in enumerate(tokens):
        labels = ids.clone()
        labels[1 : 1 + row] = -100
        samples.append({"input_ids": ids, "labels": labels, "selected": row % 3 > 0})
    return samples


def pictures() -> list[dict[str, Any]]:
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return [{"pixel_values": image, "labels": row % 5, "selected": row % 3 > 0} for row, image in enumerate(images)]


def trainer(model: Any, teacher: Any, folder: Path, data: Any, *, accumulate: int, **arguments: Any) -> LRDSTrainer:
    args = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    return LRDSTrainer(model, args, train_dataset=data, eval_dataset=data, teacher=teacher, **arguments)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize(("make", "data", "shift"), [(language_model, texts, True), (classifier, pictures, False)])
def test_a_step_has_the_gradient_of_the_mean_over_all_its_labels(
    make: Any, data: Any, shift: bool, accumulate: int, tmp_path: Path
) -> None:
    student, teacher, samples = make(0), make(1), data()
    expected = copy.deepcopy(student).train()
    batch = transformers.default_data_collator(samples)
    selected, target = batch.pop("selected").bool(), batch.pop("labels")
    with torch.no_grad():
        taught = teacher(**batch).logits
    logits = expected(**batch).logits
    if shift:
        logits, taught, target = logits[:, :-1], taught[:, :-1], target[:, 1:]
        selected = selected[:, None].expand(target.shape)
    loss = lrds_fast.kd_loss(logits, taught, target, temperature=2.0, selected=selected)
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()

    run = trainer(student, teacher, tmp_path, samples, accumulate=accumulate, loss=lrds_fast.KDLoss(2.0))
    run.data_collator = collate
    result = run.train()
    assert result.training_loss == pytest.approx(loss.item(), rel=1e-5)
    for (name, after), reference in zip(student.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(after, reference, rtol=1e-5, atol=1e-6, msg=name)
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training


def test_class_weights_are_summed_over_the_micro_batches(tmp_path: Path) -> None:
    loss = lrds_fast.KDLoss(2.0, ce_weight=1.0, kd_weight=0.0, class_weight=torch.tensor([1.0, 10.0, 1.0, 1.0, 5.0]))
    found = []
    for accumulate in (1, 2, 4):
        student = classifier(0)
        run = trainer(student, classifier(1), tmp_path, pictures(), accumulate=accumulate, loss=loss)
        found.append([run.train().training_loss, *(p.detach() for p in student.parameters())])
    for other in found[1:]:
        assert other[0] == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(other[1:], found[0][1:], rtol=1e-4, atol=1e-5)


class WithAdapters(nn.Module):
    """A model in a wrapper like those of PEFT."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Any) -> Any:
        return self.model(input_ids=input_ids)

    def get_base_model(self) -> nn.Module:
        return self.model


class OwnLanguageModel(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined, unused-ignore]
    pass


def vision_language_model(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(**sizes, vocab_size=V, pad_token_id=0)
    vision = transformers.CLIPVisionConfig(**(sizes | {"num_hidden_layers": 2}), image_size=8, patch_size=4)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=V - 1)
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize(
    "make",
    [
        lambda: WithAdapters(language_model(0)),
        lambda: OwnLanguageModel(language_model(0).config),
        lambda: vision_language_model(0),
        lambda: torch.compile(language_model(0)),
    ],
    ids=["adapters", "subclass", "vision", "compiled"],
)
def test_wrapped_language_models_shift_labels(make: Any, tmp_path: Path) -> None:
    assert trainer(make(), language_model(1), tmp_path, texts(), accumulate=1).shift


def test_an_encoder_decoder_gets_its_decoder_inputs_from_the_labels(tmp_path: Path) -> None:
    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes = {"vocab_size": V, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        config = transformers.BartConfig(**layers, **sizes, max_position_embeddings=32, init_std=0.3)
        return transformers.BartForConditionalGeneration(config)

    generator = torch.Generator().manual_seed(2)
    source, target = torch.randint(3, V, (2, 8, 6), generator=generator)
    samples = [{"input_ids": x, "labels": y} for x, y in zip(source, target, strict=True)]
    student, loss = model(0), lrds_fast.KDLoss(1.0, ce_weight=1.0, kd_weight=0.0)
    run = trainer(student, model(1), tmp_path, samples, accumulate=1, loss=loss)
    with torch.no_grad():
        expected = student.eval()(input_ids=source, labels=target).loss
    assert not run.shift
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_labels_as_probabilities_are_rows_and_multi_label_is_refused(tmp_path: Path) -> None:
    soft = [{**sample, "labels": torch.eye(5)[sample["labels"]]} for sample in pictures()]
    losses = []
    for samples in (pictures(), soft):
        student = classifier(0)
        losses.append(trainer(student, classifier(1), tmp_path, samples, accumulate=2).train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    student.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="problem_type is 'multi_label_classification'"):
        trainer(student, classifier(1), tmp_path, pictures(), accumulate=1)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = transformers.default_data_collator(samples)
    return {**batch, "selected": batch["selected"].bool()}


def test_evaluation_gives_the_same_loss_and_predictions(tmp_path: Path) -> None:
    student, teacher = classifier(0), classifier(1)
    run = trainer(student, teacher, tmp_path, pictures(), accumulate=1)
    run.data_collator = collate
    found = run.predict(run.eval_dataset)
    batch = collate(pictures())
    selected, target = batch.pop("selected"), batch.pop("labels")
    with torch.no_grad():
        logits, taught = student.eval()(**batch).logits, teacher(**batch).logits
    expected = lrds_fast.kd_loss(logits, taught, target, selected=selected)
    assert found.metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.from_numpy(found.predictions), logits)


def test_other_losses_of_the_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave out compute_loss_func and label_smoothing_factor"):
        trainer(classifier(0), classifier(1), tmp_path, pictures(), accumulate=1, compute_loss_func=lambda *_: 0.0)
    args = transformers.TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="leave out compute_loss_func and label_smoothing_factor"):
        LRDSTrainer(classifier(0), args, teacher=classifier(1))


def test_the_teacher_is_in_no_checkpoint(tmp_path: Path) -> None:
    student = classifier(0)
    run = trainer(student, classifier(1), tmp_path, pictures(), accumulate=1)
    run.save_model(str(tmp_path / "saved"))
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "saved")
    for own, saved in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(own, saved)


def test_a_loss_that_does_not_count_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss must have reduction 'mean'.*'sum'"):
        LRDSTrainer(nn.Linear(2, 2), teacher=nn.Linear(2, 2), loss=lrds_fast.KDLoss(reduction="sum"))


class Recorded(LRDSTrainer):
    """Appends the number of selected samples of each micro-batch to flags."""

    def __init__(self, *args: Any, flags: list[int], **arguments: Any) -> None:
        self.flags = flags
        super().__init__(*args, **arguments)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        self.flags.append(int(inputs["selected"].sum()))
        return super().compute_loss(model, inputs, *rest, **more)


def half_selected(teacher: Any) -> SelectedDataset:
    """pictures(), of which an update selects half."""
    samples = [{name: value for name, value in sample.items() if name != "selected"} for sample in pictures()]
    return SelectedDataset(
        samples,
        teacher,
        samples[::-1],
        rule={"ratio": 0.5},
        batch=lambda batch: (batch["pixel_values"], batch["labels"]),
    )


def test_samples_are_selected_again_between_epochs(tmp_path: Path) -> None:
    flags: list[int] = []

    def run(epochs: int, resume: str | None) -> SelectedDataset:
        student, teacher = classifier(0), classifier(1)
        selected = half_selected(teacher)
        args = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            num_train_epochs=epochs,
            report_to=[],
            save_strategy="epoch",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Recorded(student, args, train_dataset=selected, teacher=teacher, flags=flags)
        trainer.add_callback(UpdateSelection(selected, after=[1, 3]))
        trainer.train(resume_from_checkpoint=resume)
        return selected

    first = run(2, None)
    assert [sum(flags[2 * epoch : 2 * epoch + 2]) for epoch in range(2)] == [8, 4]
    flags.clear()
    again = run(3, str(tmp_path / "checkpoint-4"))
    assert sum(flags) == 4 and again.state_dict()["updates"] == 1
    assert torch.equal(again.state_dict()["mask"], first.state_dict()["mask"])
    (tmp_path / "checkpoint-4" / "selected.pt").unlink()
    with pytest.raises(FileNotFoundError, match="selected.pt"):
        run(3, str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("length", [{"num_train_epochs": 6}, {"max_steps": 12}])
def test_updates_do_not_depend_on_how_the_length_is_given_and_none_is_lost(length: Any, tmp_path: Path) -> None:

    flags: list[int] = []

    def run(resume: str | None) -> int:
        selected = half_selected(classifier(1))
        args = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            report_to=[],
            save_strategy="steps",
            save_steps=2,  # a checkpoint at an epoch's last step, before its update
            use_cpu=True,
            disable_tqdm=True,
            **length,
        )
        run = Recorded(classifier(0), args, train_dataset=selected, teacher=classifier(1), flags=flags)
        run.add_callback(UpdateSelection(selected, after=[1, 4, 6]))
        run.train(resume_from_checkpoint=resume)
        updates: int = selected.state_dict()["updates"]
        return updates

    assert run(None) == 2
    for step in (2, 4, 8):
        flags.clear()
        assert run(str(tmp_path / f"checkpoint-{step}")) == 2
        assert len(flags) == 12 - step and sum(flags[:2]) == 4
