"""Options of the loop: mixing, compilation, precision, cached logits, best weights, trackers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from test_train_processes import STEPS, blobs, numbers, selection, teacher, trained
from torch import Tensor, nn

import lrds_fast
from lrds_fast.files import read_records
from lrds_fast.models.small import MLP
from lrds_fast.models.weights import load_weights
from lrds_fast.topk import TopKTeacher
from lrds_fast.train import Recipe, setup, train
from lrds_fast.train.evaluation import evaluate
from lrds_fast.train.mix import Mix
from lrds_fast.train.setup import autocast_factory
from lrds_fast.train.teaching import Teacher, leading_rows, predicted

CPU = torch.device("cpu")


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_keeps_selected_and_unselected_rows_apart(mixup: float, cutmix: float) -> None:
    """Every pixel of a picture is its class, so that the mixed pixels show the mixed target."""
    target = torch.tensor([0, 1, 0, 1, 1, 2, 3, 3, 2])
    images = F.one_hot(target, 4).float()[:, :, None, None].expand(9, 4, 16, 16).contiguous()
    mix = Mix(mixup, cutmix, 4)
    mixed, shares = mix(images, target, 5, "seed", 0)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(9))
    torch.testing.assert_close(mixed.mean(dim=(2, 3)), shares)
    assert not shares[:5, 2:].any() and not shares[5:, :2].any()
    assert ((shares > 0).sum(dim=1) == 2).any(), "nothing was mixed"
    again, _ = mix(images, target, 5, "seed", 0)
    other, _ = mix(images, target, 5, "seed", 1)
    assert torch.equal(again, mixed) and not torch.equal(other, mixed)
    for border in (0, 9):  # one kind alone
        assert mix(images, target, border, 0)[0].shape == images.shape
    state = torch.get_rng_state()
    mix(images, target, 5, 0)
    assert torch.equal(torch.get_rng_state(), state), "the draws are its own"


def test_mixed_training_is_sgd_on_mixed_pictures_and_targets(tmp_path: Path) -> None:
    values: dict[str, Any] = {"data.mixup": 0.4, "data.cutmix": 1.0, "schedule.epochs": 1, "schedule.name": "constant"}
    data, guide, selected = blobs(), teacher(), selection()
    torch.manual_seed(1)
    expected = MLP(3, inputs=16)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    mix = Mix(0.4, 1.0, 3)
    for number, batch in enumerate(data.train.epoch(0, selected)):
        count = int(selected[batch.indices].sum())
        images, target = mix(batch.images, batch.targets, count, 0, 0, number, 0, 0)
        optimizer.zero_grad()
        answers = guide(images)[:count].detach()
        loss = lrds_fast.reference.kd_loss(
            expected(images), answers, target, teacher_rows=count, ce_weight_unselected=1.0
        )
        torch.autograd.backward(loss)
        optimizer.step()
    result, student = trained(tmp_path / "run", data=data, values=values)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-6)
    # Predictions for mixed pictures belong to no sample.
    assert bool((result.teacher_pred == -1).all())
    assert result.records[0]["n_selected"] == int(selected.sum())


def test_mixing_without_a_prefix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.mixup and data.cutmix need selection.compose 'prefix'"):
        trained(tmp_path / "run", values={"data.mixup": 0.4, "selection.compose": "mask"})


def test_compiled_training_is_the_same(tmp_path: Path) -> None:
    eager, student = trained(tmp_path / "eager", values={"schedule.epochs": 1})
    compiled, other = trained(tmp_path / "compiled", values={"schedule.epochs": 1, "run.compile": "default"})
    assert compiled.records[0]["train_loss"] == pytest.approx(eager.records[0]["train_loss"], rel=1e-5)
    assert other.state_dict().keys() == student.state_dict().keys()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-5)


class Asked(nn.Module):
    """A teacher that records the dtype of its inputs and whether gradients were enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.net = teacher()
        self.said: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.said.append(self.net(images))
        return self.said[-1]


@pytest.mark.parametrize(("own", "run", "expected"), [("bf16", "off", torch.bfloat16), ("off", "bf16", torch.float32)])
def test_the_teacher_has_a_separate_precision(tmp_path: Path, own: str, run: str, expected: torch.dtype) -> None:
    guide = Asked()
    chosen = Recipe().with_values(
        **{"teacher.amp": own, "run.amp": run, "run.device": "cpu", "schedule.epochs": 1, "run.amp_emulated": True}
    )
    train(chosen, blobs(), MLP(3, inputs=16), guide, out=tmp_path / "run", progress=False)
    assert {said.dtype for said in guide.said[1:]} == {expected}  # the first is the look at its class count
    assert all(said.is_inference() for said in guide.said)


@pytest.mark.parametrize(("amp", "needs"), [("bf16", "AVX512_BF16 or AMX"), ("fp16", "AVX512_FP16")])
def test_16_bit_types_fall_back_to_float32_without_cpu_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], amp: str, needs: str
) -> None:
    """PyTorch's 16-bit convolutions take ten times as long there. A run prints one note and computes in float32."""
    monkeypatch.setattr(setup, "_computes", lambda _: False)
    setup._note_fall_back.cache_clear()
    plain, _ = trained(tmp_path / "off", values={"schedule.epochs": 1})
    found, _ = trained(tmp_path / amp, values={"schedule.epochs": 1, "run.amp": amp, "run.amp_emulated": False})
    said = capsys.readouterr().err
    assert said == (
        f"lrds-fast: this CPU has no instructions for run.amp={amp} ({needs}): computing in float32, which is faster;"
        f" to compute in {amp} anyway, set run.amp_emulated=true\n"
    )
    assert numbers(found.records) == numbers(plain.records)
    insisted, _ = trained(
        tmp_path / "insisted", values={"schedule.epochs": 1, "run.amp": amp, "run.amp_emulated": True}
    )
    assert numbers(insisted.records) != numbers(plain.records)
    assert setup.available_amp(amp, torch.device("cuda")) == amp
    monkeypatch.setattr(setup, "_computes", lambda _: True)
    assert setup.available_amp(amp, CPU) == amp
    assert capsys.readouterr().err == ""


def test_resuming_with_other_threads_prints_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    trained(tmp_path / "run", values={"schedule.epochs": 1})
    trained(tmp_path / "run", resume=True, values={"schedule.epochs": 1})
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    trained(tmp_path / "run", resume=True, values={"schedule.epochs": 1})
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"lrds-fast: .*last.pt was written with threads 1, now 2: the results will not be bit for bit .*\n", said
    )


def test_a_teacher_with_feature_losses_returns_no_inference_tensors() -> None:
    guide = Asked()
    kept = Teacher(guide, CPU, autocast=autocast_factory("off", CPU), keep_tensors=True)
    answers = kept.wait(kept.start(torch.zeros(2, 1, 4, 4), torch.arange(2), 0))
    assert isinstance(answers, Tensor) and not answers.is_inference() and not answers.requires_grad
    with pytest.raises(ValueError, match="either a network or cached logits; got both or neither"):
        Teacher(None, CPU, autocast=autocast_factory("off", CPU))


class Cached:
    """A cache in which view 0 has the teacher's logits of the unaugmented pictures and view 1 their negatives."""

    views = 2

    def __init__(self, top_k: int = 0) -> None:
        with torch.no_grad():
            self._logits = torch.cat([teacher()(batch.images) for batch in blobs().score.epoch(0)])
        self._top_k = top_k
        self.requests: list[tuple[int, int]] = []

    def batch(self, view: int, indices: Tensor, device: torch.device) -> Tensor | TopKTeacher:
        self.requests.append((view, len(indices)))
        logits = self._logits[indices] if view == 0 else -self._logits[indices]
        return TopKTeacher.from_logits(logits, self._top_k, temperature=4.0) if self._top_k else logits


@pytest.mark.parametrize("top_k", [0, 3], ids=["full", "top 3 of 3"])
def test_cached_logits_train_like_the_teacher(tmp_path: Path, top_k: int) -> None:
    data, cached = blobs(), Cached(top_k)
    data.train.augment = "none"  # type: ignore[attr-defined]
    found = {}
    for name, given in (("online", {"teacher": teacher()}), ("cached", {"cached": cached})):
        torch.manual_seed(1)
        student = MLP(3, inputs=16)
        chosen = Recipe().with_values(**{"run.device": "cpu", "schedule.epochs": 1, "optimizer.lr": 0.1})
        result = train(
            chosen,
            data,
            student,
            out=tmp_path / name,
            selected=selection(),
            progress=False,
            **given,
        )
        found[name] = (result, student.state_dict())
    online, offline = found["online"][0], found["cached"][0]
    assert online.teacher_pred is not None and offline.teacher_pred is not None
    assert torch.equal(online.teacher_pred, offline.teacher_pred)
    for name, value in found["online"][1].items():
        torch.testing.assert_close(found["cached"][1][name], value, rtol=1e-5, atol=1e-6)
    # Only rows that count are read.
    assert sum(rows for _, rows in cached.requests) == int(selection().sum()) == offline.records[0]["teacher_rows"]
    trained_twice = Recipe().with_values(**{"run.device": "cpu", "schedule.epochs": 3})
    train(trained_twice, data, MLP(3, inputs=16), cached=cached, out=tmp_path / "views", progress=False)
    assert [view for view, _ in cached.requests[-3 * STEPS :]] == [0] * STEPS + [1] * STEPS + [0] * STEPS


def test_predictions_from_top_k_answers_are_those_of_the_logits() -> None:
    draws = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (200, 7), generator=draws).float()  # ties
    target = torch.randint(0, 7, (200,), generator=draws)
    answers = TopKTeacher.from_logits(logits, 7, temperature=2.0)
    agree = predicted(answers, target) == predicted(logits, target)
    # If the target is not among tied classes, either may be predicted.
    tied = (logits == logits.amax(dim=1, keepdim=True)).sum(dim=1) > 1
    assert bool((agree | tied).all())
    assert torch.equal(predicted(answers, target) == target, predicted(logits, target) == target)
    some = leading_rows(answers, 3)
    assert isinstance(some, TopKTeacher) and some.temperature == 2.0
    assert [len(column) for column in (some.values, some.indices, some.logsumexp)] == [3, 3, 3]


def test_the_best_weights_are_kept_and_load_as_a_model(tmp_path: Path) -> None:
    """The best epoch by held-out accuracy; the saved network is the evaluated one, here the moving average."""
    result, _ = trained(tmp_path / "run", values={"schedule.epochs": 6, "run.ema_decay": 0.5, "optimizer.lr": 0.5})
    accuracies = [record["val_acc"] for record in result.records]
    best = result.records[accuracies.index(max(accuracies))]
    again = MLP(3, inputs=16)
    load_weights(again, tmp_path / "run" / "best.safetensors", key="teacher.checkpoint")
    assert evaluate(again, blobs().test, CPU)[:2] == (best["test_acc"], best["test_ce"])
    with safe_open(tmp_path / "run" / "best.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["lrds_fast"])
    assert facts["epoch"] == str(best["epoch"]) and facts["chosen by"] == "val_acc"


def test_every_epoch_prints_a_line(tmp_path: Path) -> None:
    lines: list[str] = []
    chosen = Recipe().with_values(**{"name": "some", "run.device": "cpu", "schedule.epochs": 2})
    train(chosen, blobs(), MLP(3, inputs=16), teacher(), out=tmp_path, progress=False, say=lines.append)
    assert len(lines) == 2
    pattern = r"some: epoch 1/2, loss \d\.\d{4}, test \d+\.\d\d%, 146/146 with teacher, \d+\.\d s, \d+ s left"
    assert re.fullmatch(pattern, lines[0]), lines[0]


def test_tensorboard_has_the_log_without_repeated_steps(tmp_path: Path) -> None:
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    trained(out, values={"schedule.epochs": 2, "run.save_every": 2})
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["epoch"] == 2
    result, _ = trained(out, resume=True, values={"schedule.epochs": 2})
    whole, _ = trained(tmp_path / "off", values={"schedule.epochs": 2, "run.tensorboard": False})
    assert not (tmp_path / "off" / "tensorboard").exists()
    events = event_file.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    for key in ("train_loss", "train_kd", "test_acc", "val_ce", "n_revised", "lr"):
        scalars = events.Scalars(key)
        assert [event.step for event in scalars] == [STEPS, 2 * STEPS]
        expected = [record[key] for record in result.records]
        assert [event.value for event in scalars] == pytest.approx(expected, rel=1e-6)
    assert numbers(whole.records) == numbers(result.records)


def test_wandb_gets_the_log_when_enabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, Any], int]] = []
    begun: list[dict[str, Any]] = []

    def init(**options: Any) -> Any:
        begun.append(options)
        return SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    result, _ = trained(tmp_path / "run", values={"run.wandb": "project"})
    assert begun[0]["project"] == "project" and begun[0]["config"]["loss.eta"] == 0.8
    assert [step for _, step in logged] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert [values["test_acc"] for values, _ in logged] == [record["test_acc"] for record in result.records]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="run.wandb is 'project', which needs W&B: pip install wandb"):
        trained(tmp_path / "without", values={"run.wandb": "project"})


def test_the_steps_are_regions_of_a_profile(tmp_path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trained(tmp_path / "run", values={"schedule.epochs": 1})
    counts = {event.key: event.count for event in profile.key_averages()}
    for region in ("teacher", "student", "loss", "backward", "optimizer"):
        assert counts[region] == STEPS


def command(*arguments: str, processes: int = 1) -> list[str]:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *several, "-m", "lrds_fast", *arguments]


def test_the_command_under_torchrun_is_the_command(tmp_path: Path) -> None:
    """One result line and one folder, with the numbers of a single process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, processes in (("two", 2), ("one", 1)):
        arguments = ["train", "digits_teacher", "--quiet", "--set", "schedule.epochs=2", "--set", "run.device=cpu"]
        # Of 898 rows batches of 64 leave two: too few to be divided.
        arguments += ["--set", "data.batch_size=64", "--set", f"run.out={tmp_path / name}"]
        done = subprocess.run(
            command(*arguments, processes=processes), capture_output=True, text=True, env=environment, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("digits_teacher: test accuracy") == 1
    one, two = (numbers(read_records(tmp_path / name / "log.jsonl")) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["rows"]) == (b["step"], b["rows"])
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-6)
        assert b["test_ce"] == pytest.approx(a["test_ce"], rel=1e-6)
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True)["student"] for name in ("one", "two")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-6, atol=1e-6)


def test_the_command_stops_on_sigterm_with_its_exit_code(tmp_path: Path) -> None:
    arguments = ["train", "digits_teacher", "--set", "schedule.epochs=5000", "--set", "run.device=cpu"]
    arguments += ["--set", f"run.out={tmp_path / 'run'}"]
    begun = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / "run" / "last.pt").exists():
            break
        time.sleep(0.1)
    begun.send_signal(signal.SIGTERM)
    _, err = begun.communicate(timeout=60)
    assert begun.returncode == 128 + signal.SIGTERM
    assert "digits_teacher: epoch 1/5000, loss" in err
    last = err.strip().splitlines()[-1]
    assert re.fullmatch(
        r"lrds-fast: stopped by SIGTERM after \d+ epochs( and \d+ steps)?; .*last.pt is saved; .*--resume.*",
        last,
    )


GPU_OPTIONS: list[dict[str, Any]] = [
    {},
    {"teacher.own_stream": True, "run.channels_last": True},
    {"run.amp": "bf16", "run.compile": "reduce-overhead"},
    {"run.amp": "fp16", "run.accumulate": 2, "run.ema_decay": 0.9},
]


@pytest.mark.gpu
@pytest.mark.parametrize("options", GPU_OPTIONS, ids=["plain", "own stream", "bf16, CUDA graphs", "fp16, in parts"])
def test_training_on_a_gpu_is_training_on_the_cpu(tmp_path: Path, options: dict[str, Any]) -> None:
    values: dict[str, Any] = {"optimizer.lr": 0.02, "schedule.epochs": 2}
    cpu, expected = trained(tmp_path / "cpu", data=blobs(), values=values)
    gpu, student = trained(tmp_path / "gpu", data=blobs(), values=values | options | {"run.device": "cuda"})
    tolerance = 1e-4 if options.get("run.amp", "off") == "off" else 2e-2
    for a, b in zip(gpu.records, cpu.records, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=tolerance)
        assert a["n_selected"] == b["n_selected"] and a["rows"] == b["rows"]
    if "run.ema_decay" not in options:
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(student.state_dict()[name].cpu(), value, rtol=0.05, atol=10 * tolerance)
