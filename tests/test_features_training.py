"""A loss of inner features in the loop: selected rows alone, adapters trained, averaged and kept in checkpoints."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_processes import assert_close, blobs, numbers, run, selection
from torch import nn

from lrds_fast.models.small import SmallCNN
from lrds_fast.train import Recipe, TrainResult, train
from lrds_fast.train.stopping import Stopped

pytest.importorskip("torchdistill", reason="pip install torchdistill")

#: Compares rows one by one, with regressors and variances of its own.
VID: dict[str, Any] = {
    "features.method": "vid",
    "features.student_layers": ["conv2"],
    "features.teacher_layers": ["conv2"],
}
#: Has a memory bank and draws from the global generator.
CRD: dict[str, Any] = {"features.method": "crd", "features.options": {"negatives": 16, "size": 8}}


def teacher() -> SmallCNN:
    torch.manual_seed(2)
    return SmallCNN(3, size=4, width=6)


def trained(
    out: Path, *, data: Any = None, resume: bool = False, values: dict[str, Any] | None = None
) -> tuple[TrainResult, nn.Module]:
    torch.manual_seed(1)
    student = SmallCNN(3, size=4, width=4)
    chosen = Recipe().with_values(
        **{"schedule.epochs": 2, "run.device": "cpu", "data.batch_size": 16, "optimizer.lr": 0.05} | (values or {})
    )
    result = train(
        chosen,
        data or blobs(),
        student,
        teacher(),
        out=out,
        selected=selection(),
        resume=resume,
        progress=False,
    )
    return result, student


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", [VID, CRD], ids=["vid", "crd"])
def test_features_are_a_part_of_the_loss_over_the_selected(tmp_path: Path, method: dict[str, Any]) -> None:
    found = {
        compose: trained(tmp_path / compose, values=method | {"selection.compose": compose})
        for compose in ("prefix", "mask")
    }
    plain, _ = trained(tmp_path / "plain")
    for result, _ in found.values():
        for record in result.records:
            total = record["train_ce"] + record["train_kd"] + record["train_features"]
            assert record["train_loss"] == pytest.approx(total)
            assert abs(record["train_features"]) > 1e-3
    assert "train_features" not in plain.records[0]
    assert found["prefix"][0].records[0]["train_features"] == pytest.approx(
        found["mask"][0].records[0]["train_features"], rel=1e-3
    )
    off, student = trained(tmp_path / "off", values=method | {"features.weight": 0.0})
    other, expected = trained(tmp_path / "none")
    assert off.records[-1]["test_ce"] == pytest.approx(other.records[-1]["test_ce"], rel=1e-5)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [VID, CRD], ids=["vid", "crd"])
def test_a_run_with_features_resumes_bit_for_bit(tmp_path: Path, method: dict[str, Any]) -> None:
    whole, expected = trained(tmp_path / "whole", values=method)
    stopping = blobs((1, 4), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        trained(tmp_path / "cut", data=stopping, values=method)
    state = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    assert (state["epoch"], state["steps"]) == (1, 5)
    assert state["parts"]["features"], "what the features learn is in the checkpoint"
    assert not any("features" in name for name in state["student"]), "and no part of the student"
    resumed, found = trained(tmp_path / "cut", resume=True, values=method)
    assert numbers(resumed.records) == numbers(whole.records)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_adapters_learn_from_all_processes_and_parts(tmp_path: Path) -> None:
    code = f"""
import test_features_training as features
result, student = features.trained(folder / "two", data=cases.blobs(), values={VID!r})
torch.save([result.records, student.state_dict()], folder / f"rank{{rank}}.pt")
"""
    done = run(tmp_path, code, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, student = trained(tmp_path / "one", data=blobs(), values=VID)
    learned, adapters = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["parts"]["features"] for name in ("two", "one")
    )
    divided, in_parts = trained(tmp_path / "parts", data=blobs(), values=VID | {"run.accumulate": 2})
    assert_close(numbers(divided.records), numbers(whole.records))
    for rank in range(2):
        records, state = torch.load(tmp_path / f"rank{rank}.pt")
        assert_close(numbers(records), numbers(whole.records))
        for name, value in student.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(in_parts.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    for name, value in adapters.items():
        torch.testing.assert_close(learned[name], value, rtol=1e-5, atol=1e-6)


def test_features_need_a_teacher_that_runs(tmp_path: Path) -> None:
    chosen = Recipe().with_values(**CRD, **{"run.device": "cpu"})
    with pytest.raises(ValueError, match="features.method needs teacher.model"):
        train(chosen, blobs(), SmallCNN(3, size=4), out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
