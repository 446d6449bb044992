"""Selections during training: their epochs, their scores, and resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import blobs, losses, recipe, student, teacher
from torch import Tensor, nn

import lrds_fast
from lrds_fast import influence
from lrds_fast.data import Data
from lrds_fast.recipe.recipe import SelectionOptions
from lrds_fast.selection import Selection, dataset_fingerprint, select
from lrds_fast.train import Recipe, loop, rescoring, train
from lrds_fast.train.setup import loss_arguments

RESCORED = {
    "schedule.epochs": 5,
    "optimizer.lr": 0.02,
    "selection.after": 1,
    "selection.every": 2,
    "selection.threshold": 0.0,
    "selection.margin": 0.05,
    "score.scores": ["kd_gain", "el2n"],
}


def run(out: Path, chosen: Recipe, data: Data | None = None, **options: Any) -> tuple[loop.TrainResult, nn.Module]:
    model, found = student(), data or blobs(augment="shift")
    result = train(
        chosen,
        found,
        model,
        teacher(),
        out=out,
        fingerprint=dataset_fingerprint(found.train.labels, 3),
        progress=False,
        **options,
    )
    return result, model


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({}, []),
        ({"after": 2}, [2]),
        ({"after": 1, "every": 1}, [1, 2, 3, 4, 5]),
        ({"after": 2, "every": 3}, [2, 5]),
        ({"after": 9, "every": 1}, []),
    ],
)
def test_scoring_epochs(options: dict[str, Any], epochs: list[int]) -> None:
    assert [epoch for epoch in range(6) if rescoring.is_due(SelectionOptions(**options), epoch)] == epochs


def test_selections_are_scores_of_the_student_of_that_moment(tmp_path: Path) -> None:
    """Stopped after the second scoring, the student in the checkpoint gives the selection that the file holds."""
    chosen = recipe(**RESCORED | {"schedule.epochs": 3, "schedule.name": "constant", "selection.every": 0})
    data = blobs(augment="shift")
    run(tmp_path / "run", chosen, data)
    assert sorted(path.name for path in (tmp_path / "run" / "selections").iterdir()) == ["epoch_0001.parquet"]
    longer = recipe(**RESCORED | {"schedule.epochs": 4, "schedule.name": "constant"})
    result, _ = run(tmp_path / "longer", longer, data)
    first, second = (Selection.load(tmp_path / "longer" / "selections" / f"epoch_000{k}.parquet") for k in (1, 3))
    assert result.selected is not None
    assert torch.equal(result.selected, second.mask)
    model, guide = student(), teacher()
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    model.load_state_dict(state["student"])
    expected = influence.score(
        model,
        guide,
        rescoring._Batches(data.score),
        rescoring._Batches(data.val) if data.val else None,
        scores=("teacher_harm", "kd_gain", "el2n"),
        selected=first.mask,
        loss=lrds_fast.KDLoss(**loss_arguments(chosen.loss)),
    )
    again = select(expected, threshold=0.0, leave=0.05, previous=first)
    assert torch.equal(second.scores["teacher_harm"], again.scores["teacher_harm"])
    assert torch.equal(second.mask, again.mask)
    errors = {"teacher_harm_standard_error", "kd_gain_standard_error"}
    assert set(second.scores) == {"teacher_harm", "kd_gain", "el2n"} | errors
    assert 0 < int(second.mask.sum()) < len(second)


def test_by_default_samples_harmed_beyond_the_error_are_deselected(tmp_path: Path) -> None:
    chosen = recipe(**RESCORED | {"selection.threshold": None, "selection.confidence": 0.5, "selection.max_drop": 0.2})
    assert SelectionOptions().by_confidence and SelectionOptions().confidence == 4.0
    run(tmp_path, chosen, blobs())
    first, second = (Selection.load(tmp_path / "selections" / f"epoch_000{k}.parquet") for k in (1, 3))
    gain, error = first.scores["teacher_harm"], first.scores["teacher_harm_standard_error"]
    cap = int(0.2 * len(gain) + 0.5)
    denied = ~first.mask
    assert 0 < int(denied.sum()) <= cap and bool((gain[denied] > 0.5 * error[denied]).all())
    spared = first.mask & (gain > 0.5 * error)
    assert not spared.any() or (int(denied.sum()) == cap and float(gain[spared].max()) <= float(gain[denied].min()))
    # The second time the limit of those that had it is confidence + margin.
    limit = torch.where(first.mask, 0.5 + chosen.selection.margin, 0.5)
    late = second.scores["teacher_harm"], second.scores["teacher_harm_standard_error"]
    assert bool((late[0][~second.mask] > limit[~second.mask] * late[1][~second.mask]).all())


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_a_positive_mean_of_kd_gain_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shift: float
) -> None:
    score = influence.score

    def shifted(*args: Any, **arguments: Any) -> influence.Scores:
        scores = score(*args, **arguments)
        values = {name: value + shift if name == "kd_gain" else value for name, value in scores.items()}
        return influence.Scores(
            values,
            target=scores.target,
            teacher_pred=scores.teacher_pred,
            meta=scores.meta,
            standard_error=scores.standard_error,
        )

    monkeypatch.setattr(influence, "score", shifted)
    chosen = recipe(**RESCORED | {"selection.threshold": None, "selection.confidence": 2.0, "selection.max_drop": 0.2})
    run(tmp_path, chosen, blobs())
    noted = capsys.readouterr().err
    assert noted.count("after epoch 1, the mean of kd_gain is +") == (1 if shift > 0 else 0)
    assert noted.count("tune it before selecting") == (2 if shift > 0 else 0)


def test_the_teacher_labels_only_selected_samples_after_scoring(tmp_path: Path) -> None:
    """Before the first scoring every sample has its teacher, afterwards the selected half."""
    chosen = recipe(
        **RESCORED
        | {"selection.threshold": None}
        | {"selection.ratio": 0.5, "selection.margin": 0.0, "selection.by": "el2n"}
    )
    result, _ = run(tmp_path, chosen)
    size = len(blobs().train.labels)
    n_selected = [record["n_selected"] for record in result.records]
    assert n_selected == [size, *[int(0.5 * size + 0.5)] * 4]


def test_outliers_and_foreign_answers_need_no_held_out_samples(tmp_path: Path) -> None:
    data = blobs()
    without = Data("blobs", data.train, data.score, None, data.test)
    how = {"selection.by": "kd", "selection.threshold": None, "selection.outliers": 1.0, "selection.max_drop": 0.5}
    chosen = recipe(**RESCORED | how | {"score.scores": ["mismatch"]})
    run(tmp_path / "outliers", chosen, without)
    first, second = (Selection.load(tmp_path / "outliers" / "selections" / f"epoch_000{k}.parquet") for k in (1, 3))
    assert torch.equal(first.mask, select(first.scores, "kd", outliers=1.0, max_drop=0.5).mask)
    again = select(second.scores, "kd", outliers=1.0, max_drop=0.5, leave=1.05, previous=first)
    assert torch.equal(second.mask, again.mask) and 0 < int(first.mask.sum()) < len(first)
    assert {"kd", "mismatch"} == set(first.scores)
    chosen = recipe(**RESCORED | {"selection.by": "mismatch", "selection.threshold": 0.5, "score.scores": ["el2n"]})
    run(tmp_path / "mismatch", chosen, without)
    selection = Selection.load(tmp_path / "mismatch" / "selections" / "epoch_0001.parquet")
    assert torch.equal(selection.mask, selection.scores["mismatch"] < 0.5)


def test_joint_selection_in_training(tmp_path: Path) -> None:
    chosen = recipe(
        **RESCORED
        | {
            "selection.threshold": None,
            "selection.by": "set_shift",
            "selection.ratio": 0.5,
            "selection.margin": 0.0,
            "loss.revise_temperature": None,
        }
        | {"schedule.epochs": 2, "selection.every": 0}
    )
    result, _ = run(tmp_path, chosen)
    selection = Selection.load(tmp_path / "selections" / "epoch_0001.parquet")
    assert result.selected is not None and torch.equal(result.selected, selection.mask)
    assert int(selection.mask.sum()) == int(0.5 * len(selection) + 0.5)
    residual, by_chance = (selection.policy[key] for key in ("residual", "residual_of_random"))
    assert isinstance(residual, float) and isinstance(by_chance, float)
    assert residual < 0.5 * by_chance
    assert set(selection.scores) == {"set_shift", "kd_gain", "el2n"}
    with pytest.raises(ValueError, match="set selection.ratio, no margin"):
        recipe(**{"selection.by": "set_shift", "selection.after": 1})


@pytest.mark.parametrize("cut_in", [1, 2, 4])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, cut_in: int) -> None:
    chosen = recipe(**RESCORED)
    data = blobs(augment="shift")
    whole, model = run(tmp_path / "whole", chosen, data)

    class Stop(Exception):
        pass

    class Stopping:
        num_classes, labels = data.train.num_classes, data.train.labels

        def __len__(self) -> int:
            return len(data.train)

        def epoch(self, epoch: int, selected: Tensor | None = None) -> Any:
            for i, batch in enumerate(data.train.epoch(epoch, selected)):
                if epoch == cut_in and i == 3:
                    raise Stop
                yield batch

        def picture(self, index: int) -> Tensor:
            return data.train.picture(index)

    with pytest.raises(Stop):
        run(tmp_path / "cut", chosen, Data("cut", Stopping(), data.score, data.val, data.test))  # type: ignore[arg-type]
    torch.manual_seed(12345)
    resumed, again = run(tmp_path / "cut", chosen, data, resume=True)
    assert losses(resumed.records) == losses(whole.records)
    assert resumed.selected is not None and whole.selected is not None
    assert torch.equal(resumed.selected, whole.selected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_overwriting_a_run_removes_old_selections(tmp_path: Path) -> None:
    run(tmp_path, recipe(**RESCORED))
    assert len(list((tmp_path / "selections").iterdir())) == 2
    run(tmp_path, recipe(**RESCORED | {"selection.every": 0}), overwrite=True)
    assert [path.name for path in (tmp_path / "selections").iterdir()] == ["epoch_0001.parquet"]


def test_missing_scoring_needs_are_errors_before_training(tmp_path: Path) -> None:
    data = blobs()
    without = Data("blobs", data.train, data.score, None, data.test)
    with pytest.raises(ValueError, match="needs held-out samples; set data.val_fraction"):
        run(tmp_path, recipe(**RESCORED), without)
    with pytest.raises(ValueError, match="no teacher to select for; set teacher.model"):
        train(recipe(**RESCORED), data, student(), None, out=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="selection.every needs selection.after"):
        recipe(**{"selection.every": 2})
    with pytest.raises(ValueError, match="selection.per_class needs a share of every class"):
        recipe(**{"selection.after": 2, "selection.per_class": True, "selection.threshold": 0.0})
    with pytest.raises(ValueError, match="selection.by = 'el2n' has no standard error"):
        recipe(**{"selection.after": 2, "selection.by": "el2n"})
    with pytest.raises(ValueError, match="selection.ratio and selection.threshold exclude each other"):
        recipe(**{"selection.ratio": 0.5, "selection.threshold": 0.0})
    with pytest.raises(ValueError, match="selection.outliers excludes selection.ratio and selection.threshold"):
        recipe(**{"selection.outliers": 3.0, "selection.threshold": 0.0})
    with pytest.raises(ValueError, match="selection.outliers must be at least 0 and finite"):
        recipe(**{"selection.outliers": -1.0})
    with pytest.raises(ValueError, match="selection.per_class needs a share of every class"):
        recipe(**{"selection.after": 2, "selection.per_class": True, "selection.by": "kd", "selection.outliers": 3.0})
    with pytest.raises(ValueError, match=r"selection.max_drop must be in \[0, 1\]"):
        recipe(**{"selection.max_drop": 1.5})
    with pytest.raises(ValueError, match="selection.ratio must be at most 1"):
        recipe(**{"selection.ratio": 1.5})


def test_a_lost_selection_is_named(tmp_path: Path) -> None:
    chosen = recipe(**RESCORED)
    run(tmp_path, chosen)
    (tmp_path / "selections" / "epoch_0003.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="epoch_0003.parquet is missing"):
        run(tmp_path, chosen, resume=True)
