"""Lightning's own training with a teacher."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lrds_fast

lightning = pytest.importorskip("lightning", reason="needs lightning: pip install lightning")

from lrds_fast.compat.lightning import LRDSDistillation, UpdateSelection  # noqa: E402
from lrds_fast.selection import SelectedDataset  # noqa: E402

N, C = 12, 3


class Student(LRDSDistillation, lightning.LightningModule):  # type: ignore[name-defined]
    def __init__(self, teacher: nn.Module | None, **arguments: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(5, C)
        if teacher is not None:
            self.distil(teacher, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x)
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> list[tuple[Tensor, int, bool]]:
    points = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
    return [(point, row % C, row % 4 > 0) for row, point in enumerate(points)]


def fit(
    student: Student, folder: Path, samples: Any, *, workers: int = 0, ckpt_path: Path | None = None, **arguments: Any
) -> Any:
    silent: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(default_root_dir=folder, **{"max_epochs": 1} | silent | arguments)
    loader = DataLoader(samples, batch_size=4, num_workers=workers, persistent_workers=workers > 0)
    trainer.fit(student, loader, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("flags", [False, True])
def test_a_training_is_a_loop_with_kd_loss(flags: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(5, C), nn.Dropout(0.5))
    student = Student(teacher, temperature=2.0, eta=0.6)
    reference = copy.deepcopy(student.fc)
    samples = data() if flags else [sample[:2] for sample in data()]
    trainer = fit(student, tmp_path, samples, enable_checkpointing=False)
    assert not teacher.training and {"loss", "ce", "kd", "revised"} <= set(trainer.callback_metrics)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for begin in range(0, N, 4):
        part = data()[begin : begin + 4]
        x, y, selected = torch.stack([p[0] for p in part]), torch.tensor([p[1] for p in part]), [p[2] for p in part]
        with torch.no_grad():
            taught = teacher(x)
        mask = torch.tensor(selected) if flags else None
        loss = lrds_fast.kd_loss(reference(x), taught, y, temperature=2.0, eta=0.6, selected=mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(student.fc.weight, reference.weight)
    torch.testing.assert_close(trainer.callback_metrics["loss"], loss.detach())


def test_the_teacher_is_no_part_of_the_module(tmp_path: Path) -> None:
    teacher = nn.Linear(5, C)
    student = Student(teacher)
    assert len(list(student.parameters())) == 2 and set(student.state_dict()) == {"fc.weight", "fc.bias"}
    trainer = fit(student, tmp_path, data())
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)
    assert set(saved["state_dict"]) == {"fc.weight", "fc.bias"}
    student.train()
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="eta must be in"):
        Student(nn.Linear(5, C), eta=2.0)
    with pytest.raises(RuntimeError, match="there is no teacher; call self.distil"):
        Student(None).training_step((torch.zeros(2, 5), torch.zeros(2).long()), 0)


def test_samples_are_selected_again_between_epochs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = nn.Linear(5, C)
    student = Student(teacher, temperature=2.0)
    train, held_out = [sample[:2] for sample in data()], [sample[:2] for sample in data()[::-1]]
    rule = {"ratio": 0.5}
    loss = lrds_fast.KDLoss(temperature=2.0)

    def selected() -> SelectedDataset:
        return SelectedDataset(train, teacher, held_out, rule=rule, loss=loss)

    flags: list[int] = []

    class Recorded(lightning.Callback):  # type: ignore[misc, name-defined, unused-ignore]
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            flags.append(int(batch[-1].sum()))

    samples = selected()
    callbacks = [Recorded(), UpdateSelection(samples, after=[1, 3])]
    trainer = fit(student, tmp_path, samples, workers=1, max_epochs=3, enable_checkpointing=False, callbacks=callbacks)
    assert [sum(flags[3 * epoch : 3 * epoch + 3]) for epoch in range(3)] == [N, N // 2, N // 2]
    assert samples.state_dict()["updates"] == 1, "the last epoch needs no selection"
    assert student.training, "scoring leaves the student as it was"

    trainer.save_checkpoint(tmp_path / "with_flags.ckpt")
    again = selected()
    checkpoint = tmp_path / "with_flags.ckpt"
    callbacks = [UpdateSelection(again, after=[1])]
    fit(student, tmp_path, again, ckpt_path=checkpoint, max_epochs=4, enable_checkpointing=False, callbacks=callbacks)
    assert torch.equal(again.state_dict()["mask"], samples.state_dict()["mask"])
    for wrong in ([0], [1.5]):
        with pytest.raises((ValueError, TypeError), match="after"):
            UpdateSelection(samples, after=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="after must be a collection"):
        UpdateSelection(samples, after=2)  # type: ignore[arg-type]


def test_a_checkpoint_of_an_epochs_last_step_loses_no_update(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = nn.Linear(5, C)
    student = Student(teacher, temperature=2.0)
    train, held_out = [sample[:2] for sample in data()], [sample[:2] for sample in data()[::-1]]

    def selected() -> SelectedDataset:
        return SelectedDataset(train, teacher, held_out, rule={"ratio": 0.5})

    class Saved(lightning.Callback):  # type: ignore[misc, name-defined, unused-ignore]
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if trainer.global_step == trainer.num_training_batches:
                trainer.save_checkpoint(tmp_path / "last_step.ckpt")

    first, again = selected(), selected()
    callbacks = [Saved(), UpdateSelection(first, after=[1])]
    fit(student, tmp_path, first, max_epochs=2, enable_checkpointing=False, callbacks=callbacks)
    callbacks = [UpdateSelection(again, after=[1])]
    path = tmp_path / "last_step.ckpt"
    fit(student, tmp_path, again, ckpt_path=path, max_epochs=2, enable_checkpointing=False, callbacks=callbacks)
    assert again.state_dict()["updates"] == 1 and int(again.state_dict()["mask"].sum()) == N // 2
