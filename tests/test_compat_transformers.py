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


def test_samples_are_selected_again_between_epochs(tmp_path: Path) -> None:
    samples = [{name: value for name, value in sample.items() if name != "selected"} for sample in pictures()]
    flags: list[int] = []

    class Recorded(LRDSTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            flags.append(int(inputs["selected"].sum()))
            return super().compute_loss(model, inputs, *rest, **more)

    def run(epochs: int, resume: str | None) -> SelectedDataset:
        student, teacher = classifier(0), classifier(1)
        selected = SelectedDataset(
            samples,
            teacher,
            samples[::-1],
            rule={"ratio": 0.5},
            batch=lambda batch: (batch["pixel_values"], batch["labels"]),
        )
        args = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            num_train_epochs=epochs,
            report_to=[],
            save_strategy="epoch",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Recorded(student, args, train_dataset=selected, teacher=teacher)
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
