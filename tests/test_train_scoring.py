"""lrds-fast score: the scores of a trained student, in one process and in several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lrds_fast import influence
from lrds_fast.models import create
from lrds_fast.recipe.recipe import Recipe
from lrds_fast.selection import Selection, dataset_fingerprint
from lrds_fast.train import rescoring, run
from lrds_fast.train.evaluation import outputs
from lrds_fast.train.setup import scored_loss

NAMES = ("kd_gain", "kd_gain_ns", "self_influence", "mismatch", "teacher_correct", "random:3")
SETTINGS: dict[str, Any] = {
    "run.device": "cpu",
    "data.train_limit": 100,
    "data.val_fraction": 0.2,
    "data.eval_batch_size": 7,
    "student.model": "mlp",
    "teacher.model": "mlp",
    "teacher.checkpoint": "teacher.pt",
    "score.base": "student.pt",
    "score.scores": NAMES,
}


@pytest.fixture(autouse=True)
def in_a_folder_with_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("teacher.pt", "student.pt")):
        torch.manual_seed(seed)
        torch.save(create("mlp", num_classes=10).state_dict(), name)


def recipe(**values: Any) -> Recipe:
    return Recipe().with_values(**(SETTINGS | values))


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_scores_are_the_last_layers(noise: float) -> None:
    """Scores of features and logits that are computed here, also with swapped teacher logits."""
    chosen = recipe(**{"teacher.answer_noise": noise, "loss.ce_weight": 0.4})
    data = run.load_data(chosen)
    student, teacher = (create("mlp", num_classes=10) for _ in range(2))
    student.load_state_dict(torch.load("student.pt"))
    teacher.load_state_dict(torch.load("teacher.pt"))
    assert data.val is not None
    cpu = torch.device("cpu")
    train, held_out = outputs(student, data.score, cpu), outputs(student, data.val, cpu)
    teacher_logits = outputs(teacher, data.score, cpu).logits
    expected = influence.last_layer_scores(
        features=train.features,
        student_logits=train.logits,
        teacher_logits=teacher_logits[run._sources(chosen, data)] if noise else teacher_logits,
        target=data.score.labels,
        val_features=held_out.features,
        val_logits=held_out.logits,
        val_target=data.val.labels,
        scores=NAMES,
        loss=scored_loss(chosen),
    )
    found = run.score(chosen, progress=False)
    assert list(found) == list(NAMES)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    error = expected.standard_error["kd_gain"]
    torch.testing.assert_close(found.standard_error["kd_gain"], error, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.target, expected.target) and torch.equal(found.teacher_pred, expected.teacher_pred)
    assert {"layers", "num_features", "bias", "damping"} <= set(found.meta)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_set_shift_is_scored_by_the_vector_length(noise: float) -> None:
    """With H = I it is param_shift:delta but for the sketch, which keeps lengths within about sqrt(2 / 512) = .06."""
    values = {"score.scores": ("param_shift:delta", "set_shift"), "score.curvature": "identity"}
    found = run.score(recipe(**values, **{"teacher.answer_noise": noise}), progress=False)
    assert list(found) == ["param_shift:delta", "set_shift"]
    error = found["set_shift"] / found["param_shift:delta"] - 1
    assert float(error.square().mean().sqrt()) < 0.1


def test_several_processes_share_the_samples(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import os, torch, test_train_scoring as scoring\n"
        "from lrds_fast.influence import head\n"
        "outputs, batches = head.Head.outputs, []\n"
        "head.Head.outputs = lambda self, batch: (batches.append(batch.number), outputs(self, batch))[1]\n"
        "found = scoring.run.score(scoring.recipe(), progress=False)\n"
        "torch.save((dict(found), batches), f'rank{os.environ[\"RANK\"]}.pt')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    expected = run.score(recipe(), progress=False)
    passes = []
    for rank in range(2):
        found, batches = torch.load(tmp_path / f"rank{rank}.pt")
        passes.append(len(batches))
        for name in NAMES:
            torch.testing.assert_close(found[name], expected[name], rtol=2e-4, atol=2e-6)
    data = run.load_data(recipe())
    assert data.val is not None
    # Each batch in one process.
    assert sum(passes) == len(data.score) + len(data.val) and min(passes) > 0.3 * sum(passes)


def test_a_run_is_scored_with_its_last_selection() -> None:
    labels = run.load_data(recipe()).train.labels
    for epoch, kept in ((1, torch.arange(len(labels)) % 2 == 0), (3, torch.arange(len(labels)) % 3 == 0)):
        facts = (None, {"by": "hand"}, dataset_fingerprint(labels, 10), 10)
        path = rescoring.path_of(Path("out"), epoch)
        path.parent.mkdir(parents=True, exist_ok=True)
        Selection(kept, {"hand": -kept.float()}, labels, *facts).save(path)
    Path("out/last.pt").write_bytes(Path("student.pt").read_bytes())
    found = run.score(recipe(**{"score.base": "", "run.out": "out"}), progress=False)["kd_gain"]
    expected = run.score(recipe(**{"selection.path": str(path)}), progress=False)["kd_gain"]
    assert torch.equal(found, expected)
    assert not torch.allclose(found, run.score(recipe(), progress=False)["kd_gain"], rtol=0.01)


def test_missing_needs_are_named() -> None:
    for values, message in (
        ({"data.val_fraction": 0.0}, "kd_gain needs held-out samples; set data.val_fraction"),
        ({"teacher.model": "", "teacher.checkpoint": ""}, "scores compare a student with its teacher"),
        ({"score.scores": ("kd_gian",)}, "there is no score 'kd_gian'"),
    ):
        with pytest.raises(ValueError, match=message):
            run.score(recipe(**values), progress=False)
