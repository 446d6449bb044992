"""The training loop: its steps, resumption, and the errors for contradictory options."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrds_fast
from lrds_fast import files as files_module
from lrds_fast.data import Batch, Data, in_memory, prefix_rows
from lrds_fast.files import read_records
from lrds_fast.models import Classifier
from lrds_fast.models.small import MLP, SmallCNN
from lrds_fast.recipe.recipe import ScheduleOptions
from lrds_fast.train import Recipe, train
from lrds_fast.train.evaluation import evaluate, outputs
from lrds_fast.train.setup import lr_factor
from lrds_fast.train.teaching import predicted, teacher_rows

CPU = torch.device("cpu")


class WithDropout(Classifier):
    """Uses the global generator in training, as resuming must restore it; batch statistics too."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, 12)
        self.norm = nn.BatchNorm1d(12)
        self.fc = nn.Linear(12, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return F.dropout(F.relu(self.norm(self.hidden(images.flatten(1)))), 0.3, self.training)


def blobs(train: int = 90, *, seed: int = 0, augment: str = "none", num_classes: int = 3) -> Data:
    """Pictures of 4 x 4 pixels around a mean per class, noisy enough that no classifier is perfect."""
    draws = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, num_classes, (train + 40,), generator=draws)
    centres = torch.rand(num_classes, 1, 4, 4, generator=draws)
    images = (centres[targets] + 0.35 * torch.randn(train + 40, 1, 4, 4, generator=draws)).clamp(0, 1)
    return in_memory(
        images[:train],
        targets[:train],
        images[train:],
        targets[train:],
        num_classes=num_classes,
        batch_size=16,
        val_fraction=0.1,
        augment=augment,
    )


def student(num_classes: int = 3) -> WithDropout:
    torch.manual_seed(1)
    return WithDropout(num_classes)


def teacher() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def recipe(**values: Any) -> Recipe:
    return Recipe().with_values(**{"schedule.epochs": 3, "optimizer.lr": 0.1, "run.device": "cpu"} | values)


def losses(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def run(tmp_path: Path, name: str = "run", **options: Any) -> tuple[list[dict[str, Any]], nn.Module]:
    model = options.pop("student", None) or student()
    chosen = options.pop("recipe", None) or recipe()
    data = options.pop("data", None) or blobs()
    listened = options.pop("teacher", None)
    result = train(chosen, data, model, listened, out=tmp_path / name, progress=False, **options)
    return losses(result.records), model


def test_one_epoch_is_plain_sgd_on_kd_loss(tmp_path: Path) -> None:
    """The loop against the same steps written out with the reference loss."""
    chosen = recipe(
        **{"schedule.epochs": 1, "schedule.name": "constant", "loss.eta": 0.6, "optimizer.weight_decay": 0.01}
    )
    data = blobs()
    own, expected, guide = MLP(3, inputs=16), MLP(3, inputs=16), teacher()
    expected.load_state_dict(own.state_dict())
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for batch in data.train.epoch(0):
        optimizer.zero_grad()
        loss = lrds_fast.reference.kd_loss(
            expected(batch.images), guide(batch.images), batch.targets, eta=0.6, ce_weight_unselected=1.0
        )
        torch.autograd.backward(loss)
        optimizer.step()
    run(tmp_path, recipe=chosen, student=own, teacher=guide, data=data)
    for name, value in own.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_the_teacher_is_in_eval_mode_frozen_and_unchanged(tmp_path: Path) -> None:
    guide = WithDropout().train()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    run(tmp_path, teacher=guide)
    assert not guide.training
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in guide.parameters())
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize(
    "extra", [{}, {"run.ema_decay": 0.9}, {"optimizer.name": "adamw", "run.amp": "bf16"}, {"run.amp": "fp16"}]
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, with_teacher: bool, extra: dict[str, Any]) -> None:
    chosen = recipe(**{"schedule.epochs": 4, "optimizer.lr": 0.02, "run.amp_emulated": True} | extra)
    guide = teacher() if with_teacher else None
    data = blobs(augment="shift")
    whole, model = run(tmp_path, "whole", recipe=chosen, teacher=guide, data=data)

    class Stop(Exception):
        pass

    class Stopping:
        """The data, with an exception in the middle of the third epoch that simulates a power cut."""

        num_classes, labels = data.train.num_classes, data.train.labels

        def __len__(self) -> int:
            return len(data.train)

        def epoch(self, epoch: int, selected: Tensor | None = None) -> Any:
            for i, batch in enumerate(data.train.epoch(epoch, selected)):
                if epoch == 2 and i == 3:
                    raise Stop
                yield batch

        def picture(self, index: int) -> Tensor:
            return data.train.picture(index)

    with pytest.raises(Stop):
        run(
            tmp_path,
            "cut",
            recipe=chosen,
            teacher=guide,
            data=Data("cut", Stopping(), data.score, data.val, data.test),  # type: ignore[arg-type]
        )
    torch.manual_seed(12345)  # whatever ran in between
    resumed, again = run(tmp_path, "cut", recipe=chosen, teacher=guide, data=data, resume=True)
    assert resumed == whole
    assert losses(read_records(tmp_path / "cut" / "log.jsonl")) == whole
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    whole, model = run(tmp_path)
    again, same = run(tmp_path, resume=True)
    assert again == whole
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in model.state_dict().items())


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    first, _ = run(tmp_path, "a", recipe=recipe(seed=1))
    second, _ = run(tmp_path, "b", recipe=recipe(seed=1))
    other, _ = run(tmp_path, "c", recipe=recipe(seed=2))
    assert first == second
    assert first != other


def selection_of(data: Data, share: float = 0.5) -> Tensor:
    return torch.rand(len(data.train.labels), generator=torch.Generator().manual_seed(4)) < share


class Counting(nn.Module):
    """A teacher that counts the rows that it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = teacher()
        self.rows = 0

    def forward(self, images: Tensor) -> Tensor:
        self.rows += len(images)
        logits: Tensor = self.net(images)
        return logits


def test_teacher_prefix_equals_mask_up_to_rounding_and_saves_the_teacher_rows(tmp_path: Path) -> None:
    data = blobs()
    selected = selection_of(data)
    records, teacher_row_counts, weights = {}, {}, {}
    for compose in ("prefix", "mask"):
        torch.manual_seed(3)
        guide, own = Counting(), MLP(3, inputs=16)
        chosen = recipe(**{"selection.compose": compose})
        records[compose], _ = run(
            tmp_path, compose, recipe=chosen, student=own, teacher=guide, data=data, selected=selected
        )
        teacher_row_counts[compose], weights[compose] = guide.rows, own.state_dict()
    epochs, probe = 3, 1
    rows = sum(prefix_rows(len(batch.indices), len(selected), int(selected.sum())) for batch in data.train.epoch(0))
    assert int(selected.sum()) <= rows <= int(selected.sum()) + len(data.train)
    assert teacher_row_counts["prefix"] == epochs * rows + probe
    assert teacher_row_counts["mask"] == epochs * len(selected) + probe
    for a, b in zip(records["prefix"], records["mask"], strict=True):
        assert a["n_selected"] == b["n_selected"] == int(selected.sum())
        assert a["n_revised"] == b["n_revised"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
    for name, value in weights["prefix"].items():
        torch.testing.assert_close(value, weights["mask"][name], rtol=1e-4, atol=1e-5)


def test_an_empty_selection_trains_on_labels_alone(tmp_path: Path) -> None:
    data = blobs()
    empty = torch.zeros(len(data.train.labels), dtype=torch.bool)
    guide = Counting()
    taught, own = run(tmp_path, "empty", teacher=guide, data=data, selected=empty)
    alone, other = run(tmp_path, "alone", data=data)
    assert guide.rows == 1  # the look at its class count
    assert [record["n_selected"] for record in taught] == [0, 0, 0]
    for a, b in zip(taught, alone, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
    for name, value in own.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_a_loader_that_does_not_sort_gets_a_mask() -> None:
    batch = Batch(torch.zeros(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64), torch.tensor([2, 0, 1, 3]))
    rows, count, mask = teacher_rows(batch, torch.tensor([True, False, False, True]), 2, "prefix")
    assert (rows, count) == (4, 4)
    assert mask is not None
    assert mask.tolist() == [False, True, False, True]
    assert teacher_rows(batch, torch.tensor([True, False, True, False]), 2, "prefix") == (2, 2, None)
    assert teacher_rows(batch, None, 0, "prefix") == (4, 4, None)


def test_the_teacher_sees_as_many_rows_in_every_batch(tmp_path: Path) -> None:
    """For any share: equal batches have the same number of teacher rows, at most one more than are selected."""
    data = blobs(200)
    size, full = len(data.train.labels), 16
    for share in (0.0, 0.1, 0.37, 0.5, 0.93, 1.0):
        selected = selection_of(data, share)
        kept = int(selected.sum())
        prefix_lengths = set()
        for batch in data.train.epoch(1, selected):
            counts = teacher_rows(batch, selected, kept, "prefix")
            assert counts.mask is None
            assert counts.used == int(selected[batch.indices].sum()) <= counts.prefix <= counts.used + 1
            if len(batch.indices) == full:
                prefix_lengths.add(counts.prefix)
        assert prefix_lengths == {-(-full * kept // size)}


def test_log_counts_and_means_are_those_of_the_data(tmp_path: Path) -> None:
    data, guide = blobs(), teacher()
    selected = selection_of(data, 0.7)
    records, model = run(tmp_path, teacher=guide, data=data, selected=selected)
    labels, last = data.train.labels, records[-1]
    said = predicted(outputs_of(guide, data), labels)
    assert last["rows"] == len(labels)
    assert last["n_selected"] == int(selected.sum()) <= last["teacher_rows"] <= last["n_selected"] + len(data.train)
    assert last["n_revised"] == int(((said != labels) & selected).sum()) > 0
    assert last["train_loss"] == pytest.approx(last["train_ce"] + last["train_kd"])
    logits = outputs_of(model, data, "test")
    assert last["test_acc"] == pytest.approx(float((logits.argmax(1) == data.test.labels).double().mean()))
    assert last["test_ce"] == pytest.approx(float(F.cross_entropy(logits, data.test.labels)), rel=1e-5)


def outputs_of(model: nn.Module, data: Data, split: str = "score") -> Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch.images) for batch in getattr(data, split).epoch(0)])


def test_evaluation_covers_short_batches_and_restores_the_mode() -> None:
    data, model = blobs(), student()
    model.train()
    found = evaluate(model, data.score, CPU)
    assert model.training
    logits, labels = outputs_of(model, data), data.score.labels
    right = (logits.argmax(1) == labels).double()
    assert found.accuracy == pytest.approx(float(right.mean()))
    assert found.cross_entropy == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    confidence = logits.softmax(1).amax(1).double()
    ece = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        expected = [inside.sum(), confidence[inside].sum(), right[inside].sum()]
        assert found.bins[k].tolist() == pytest.approx(list(map(float, expected)))
        if inside.any():
            ece += float(inside.double().mean() * (right[inside].mean() - confidence[inside].mean()).abs())
    assert found.ece == pytest.approx(ece) and ece > 0.01
    for label, (rows, correct) in enumerate(found.classes.tolist()):
        members = labels == label
        assert (rows, correct) == (float(members.sum()), float(right[members].sum()))
    parts = found.parts()
    assert sum(rows for rows, _, _ in parts["bins"]) == sum(rows for rows, _ in parts["classes"]) == len(labels)
    assert json.loads(json.dumps(parts))["ece"] == found.ece


def test_outputs_are_in_index_order() -> None:
    data, model = blobs(), student()
    logits, features = outputs(model, data.train, CPU)  # shuffled
    torch.testing.assert_close(logits, outputs_of(model, data))
    torch.testing.assert_close(model.fc(features), logits)


def test_teacher_predictions_come_back_by_sample(tmp_path: Path) -> None:
    data, guide = blobs(), teacher()
    selected = selection_of(data)
    result = train(recipe(), data, student(), guide, out=tmp_path / "run", selected=selected, progress=False)
    assert result.teacher_pred is not None
    expected = torch.where(selected, outputs_of(guide, data).argmax(1), -1)
    assert torch.equal(result.teacher_pred, expected)


def test_channels_last_and_bfloat16_train(tmp_path: Path) -> None:
    values = {"run.channels_last": True, "run.amp": "bf16", "run.amp_emulated": True, "schedule.epochs": 2}
    chosen = recipe(**values)
    torch.manual_seed(0)
    own = SmallCNN(3, size=4)
    records, _ = run(tmp_path, recipe=chosen, student=own, teacher=teacher())
    assert own.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert records[1]["train_loss"] < records[0]["train_loss"]


def test_float16_gradients_are_scaled_and_unscaled(tmp_path: Path) -> None:
    """With the scaler's factor folded into the loss's gradient, float16 training is float32 training up to rounding."""
    trained = {}
    for amp in ("off", "fp16"):
        torch.manual_seed(0)
        own = MLP(3, inputs=16)
        chosen = recipe(**{"run.amp": amp, "run.amp_emulated": True})
        _, trained[amp] = run(tmp_path, amp, recipe=chosen, student=own, teacher=teacher())
    state = torch.load(tmp_path / "fp16" / "last.pt", weights_only=True)
    assert state["parts"]["scaler"]["scale"] == 65536.0, "no step may have been skipped for an overflow"
    torch.manual_seed(0)
    start = MLP(3, inputs=16)
    for name, value in trained["fp16"].state_dict().items():
        moved = (trained["off"].state_dict()[name] - start.state_dict()[name]).norm()
        assert (value - trained["off"].state_dict()[name]).norm() < 0.02 * moved


def test_the_moving_average_is_evaluated_and_saved(tmp_path: Path) -> None:
    chosen = recipe(**{"run.ema_decay": 0.999, "schedule.epochs": 2, "optimizer.lr": 0.2})
    records, model = run(tmp_path, recipe=chosen)
    logits = outputs_of(model, blobs(), "test")
    assert records[-1]["test_ce"] == pytest.approx(float(F.cross_entropy(logits, blobs().test.labels)), rel=1e-5)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert not torch.equal(state["student"]["fc.weight"], model.state_dict()["fc.weight"])
    assert torch.equal(state["parts"]["ema"]["module.fc.weight"], model.state_dict()["fc.weight"])


@pytest.mark.parametrize(
    ("options", "epoch", "expected"),
    [
        (ScheduleOptions(name="cosine", epochs=10), 0.0, 1.0),
        (ScheduleOptions(name="cosine", epochs=10), 5.0, 0.5),
        (ScheduleOptions(name="cosine", epochs=10, warmup_epochs=2), 6.0, 0.5),
        (ScheduleOptions(name="cosine", epochs=10, warmup_epochs=2), 1.0, 0.5),
        (ScheduleOptions(name="step", epochs=9, milestones=(3, 6), gamma=0.1), 2.99, 1.0),
        (ScheduleOptions(name="step", epochs=9, milestones=(3, 6), gamma=0.1), 3.0, 0.1),
        (ScheduleOptions(name="step", epochs=9, milestones=(3, 6), gamma=0.1), 6.5, 0.01),
        (ScheduleOptions(name="constant", epochs=9), 8.0, 1.0),
    ],
)
def test_schedules(options: ScheduleOptions, epoch: float, expected: float) -> None:
    assert lr_factor(options, epoch) == pytest.approx(expected, abs=1e-3)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    data = blobs()
    run(tmp_path, recipe=recipe(**{"schedule.epochs": 1}), data=data)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    # 81 training samples in batches of 16 are 6 steps an epoch; the bad pixel is met somewhere in the first.
    broken = blobs()
    broken.train.images[7] = float("nan")  # type: ignore[attr-defined]
    step = next(i for i, batch in enumerate(broken.train.epoch(0)) if 7 in batch.indices)
    with pytest.raises(
        FloatingPointError,
        match=rf"the loss is not finite at step {step} .*lower optimizer.lr \(0.1\), .*; there is no older checkpoint",
    ):
        run(tmp_path, "broken", data=broken)
    later = blobs()

    def insert_nan(_: str) -> None:
        later.train.images[7] = float("nan")  # type: ignore[attr-defined]

    with pytest.raises(FloatingPointError, match="; .*later/last.pt is older than this step"):
        run(tmp_path, "later", data=later, say=insert_nan)
    assert not (tmp_path / "broken" / "last.pt").exists()
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_class_counts_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the student gives 5 logits per sample, data 'memory' has 3 classes"):
        run(tmp_path, student=student(5))
    wide = nn.Sequential(nn.Flatten(), nn.Linear(16, 100))
    with pytest.raises(ValueError, match="the teacher gives 100 logits per sample, data 'memory' has 3 classes"):
        run(tmp_path, teacher=wide)
    with pytest.raises(ValueError, match=r"the teacher does not take images of shape \(1, 4, 4\)"):
        run(tmp_path, teacher=nn.Sequential(nn.Flatten(), nn.Linear(17, 3)))
    assert not (tmp_path / "run").exists()


def test_an_older_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a run already; continue it \(--resume\)"):
        run(tmp_path)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    run(tmp_path, overwrite=True)


def test_a_selection_must_fit_the_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"selected must be bool of shape \(81,\).*got torch.bool of shape \(80,\)"):
        run(tmp_path, teacher=teacher(), selected=torch.ones(80, dtype=torch.bool))


def test_a_crash_while_writing_a_checkpoint_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(tmp_path, "whole")
    calls = {"save": 0}
    save = torch.save

    def crashing(state: Any, file: Any) -> None:
        calls["save"] += 1
        if calls["save"] == 2:
            file.write(b"half of a checkpoint")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", crashing)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, "crash")
    monkeypatch.setattr(torch, "save", save)
    state = torch.load(tmp_path / "crash" / "last.pt", weights_only=True)
    assert state["epoch"] == 1
    names = sorted(path.name for path in (tmp_path / "crash").iterdir() if path.is_file())
    assert names == ["best.safetensors", "last.pt", "log.jsonl", "recipe.json", "student.json"]
    resumed, _ = run(tmp_path, "crash", resume=True)
    assert resumed == whole


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    files_module.write_text(path, "old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        files_module.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_log_cut_short_by_a_crash_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert [record["epoch"] for record in read_records(path)] == [1, 2]
    path.write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_records(path)
    path.write_text('{"epoch": 1}\n{"step": 2}\n')
    assert read_records(path) == [{"epoch": 1}, {"step": 2}]
    with pytest.raises(ValueError, match=r"log.jsonl, line 2 has no 'epoch'; the log is damaged"):
        read_records(path, keys=("epoch",))


def test_numbers_that_are_not_finite_are_null_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    files_module.append_record(path, {"a": float("inf"), "b": [float("nan"), 1.5]})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5]}


@pytest.mark.parametrize(
    "loss",
    [
        {"loss.divergence": "dkd", "loss.divergence_options": {"beta": 2.0}, "loss.kd_warmup_epochs": 2},
        # 0.1414 * 2 ** (2 t) is 0.2 and 0.4 in the middle of two epochs.
        {"loss.ce_weight": 0.1 * 2**0.5, "loss.ce_weight_end": 0.4 * 2**0.5},
        {"loss.divergence": "mse_logits", "loss.revise": "none"},
        {"loss.temperatures": [2.0, 4.0], "loss.standardize": True, "loss.revise": "mft"},
        {"loss.divergence": "jsd", "loss.divergence_options": {"weight": 0.3}, "loss.revise": "swap"},
        {"loss.divergence": "tvd", "loss.temperature": 2.0},
        {"loss.divergence": "skl"},
        {"loss.divergence": "srkl", "loss.divergence_options": {"weight": 0.2}},
    ],
    ids=str,
)
def test_the_family_of_losses_in_a_recipe(tmp_path: Path, loss: dict[str, Any]) -> None:
    """Two epochs of the loop are two epochs of plain SGD on kd_loss with those arguments."""
    chosen = recipe(**{"schedule.epochs": 2, "schedule.name": "constant", "optimizer.weight_decay": 0.0} | loss)
    data = blobs()
    own, expected, guide = MLP(3, inputs=16), MLP(3, inputs=16), teacher()
    expected.load_state_dict(own.state_dict())
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    divergence: Any = {
        "dkd": lrds_fast.DKD(beta=2.0),
        "jsd": lrds_fast.JSD(weight=0.3),
        "srkl": lrds_fast.SRKL(weight=0.2),
    }.get(chosen.loss.divergence, chosen.loss.divergence)
    for epoch in range(2):
        for batch in data.train.epoch(epoch):
            optimizer.zero_grad()
            value = lrds_fast.kd_loss(
                expected(batch.images),
                guide(batch.images),
                batch.targets,
                temperature=chosen.loss.temperatures or chosen.loss.temperature,
                ce_weight=0.1 if chosen.loss.ce_weight_end is None else (0.2, 0.4)[epoch],
                ce_weight_unselected=1.0,
                kd_weight=0.9 * (0.5 if epoch == 0 and chosen.loss.kd_warmup_epochs else 1.0),
                revise={"none": None}.get(chosen.loss.revise, chosen.loss.revise),
                divergence=divergence,
                standardize=chosen.loss.standardize,
            )
            torch.autograd.backward(value)
            optimizer.step()
    run(tmp_path, recipe=chosen, student=own, teacher=guide, data=data)
    for name, value in own.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compose", ["prefix", "mask"])
@pytest.mark.parametrize("method", ["dist", "mlkd", "revision"])
def test_other_objectives_over_the_selected(tmp_path: Path, method: str, compose: str) -> None:
    """One epoch of the loop, half of the samples selected, against the objective written out row by row."""
    chosen = recipe(
        **{"schedule.epochs": 1, "schedule.name": "constant", "loss.method": method, "selection.compose": compose},
        **{"loss.lambda1": 3.0, "loss.lambda2": 2.0},
    )
    data = blobs()
    selected = selection_of(data)
    own, expected, guide = MLP(3, inputs=16), MLP(3, inputs=16), teacher()
    expected.load_state_dict(own.state_dict())
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for batch in data.train.epoch(0, selected):
        z, v, y = expected(batch.images), guide(batch.images).detach(), batch.targets
        has_teacher = selected[batch.indices]
        share = has_teacher.double().mean().float()
        rows = F.cross_entropy(z, y, reduction="none")
        weighted = (rows * torch.where(has_teacher, 0.1, 1.0)).mean()
        if method == "dist":
            revised = 4.0 * lrds_fast.reference.revise_labels(v, y, eta=0.8, temperature=4.0).log()
            loss = weighted + 0.9 * share * lrds_fast.dist_loss(z[has_teacher], revised[has_teacher], temperature=4.0)
        elif method == "mlkd":
            loss = lrds_fast.mlkd_loss(z, v, y, temperature=4.0, selected=has_teacher, ce_weight_unselected=1.0)
        else:
            revision = lrds_fast.revision_loss(z[has_teacher], v[has_teacher], y[has_teacher], lambda1=3.0, lambda2=2.0)
            loss = 0.9 * share * revision + rows[~has_teacher].sum() / len(z)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    records, _ = run(tmp_path, recipe=chosen, student=own, teacher=guide, data=data, selected=selected)
    for name, value in own.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-3, atol=1e-5)
    assert records[0]["n_selected"] == int(selected.sum())


@pytest.mark.parametrize("method", ["dist", "mlkd", "revision"])
def test_other_objectives_with_an_empty_selection(tmp_path: Path, method: str) -> None:
    data = blobs()
    empty = torch.zeros(len(data.train.labels), dtype=torch.bool)
    chosen = recipe(**{"loss.method": method})
    _, own = run(tmp_path, "empty", recipe=chosen, teacher=teacher(), data=data, selected=empty)
    _, other = run(tmp_path, "alone", recipe=recipe(), data=data)
    for name, value in own.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-5)
