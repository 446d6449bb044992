"""torchdistill's own training, from its configurations, with label revision and data selection."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrds_fast
from lrds_fast.selection import Selection, select

pytest.importorskip("torchdistill", reason="needs torchdistill: pip install torchdistill")

from torchdistill.common.main_util import import_dependencies
from torchdistill.core.distillation import DistillationBox
from torchdistill.losses.registry import get_high_level_loss

N = 12


class Samples(torch.utils.data.Dataset[Any]):
    """A dataset of twelve points in three classes."""

    classes = ("a", "b", "c")

    def __init__(self) -> None:
        self.points = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
        self.targets = (torch.arange(N) % 3).tolist()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.points[index], self.targets[index]

    def __len__(self) -> int:
        return N


class CountingTeacher(nn.Module):
    """A linear teacher that counts the rows that it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        logits: Tensor = self.fc(x)
        return logits


def selection(path: Path, keeps: list[int]) -> Selection:
    scores = {"kd_gain": torch.ones(N).index_fill(0, torch.tensor(keeps), -1.0)}
    chosen = select(scores, threshold=0.0, dataset=Samples())
    chosen.save(path)
    return chosen


def criterion(**arguments: Any) -> dict[str, Any]:
    term = {"criterion": {"key": "LRDSLoss", "kwargs": arguments}, "criterion_wrapper": None, "weight": 2.0}
    return {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"lrds": term}}}


@pytest.fixture(autouse=True)
def _registered() -> None:
    import_dependencies(["lrds_fast.compat.torchdistill"])


def test_a_criterion_of_a_configuration_is_kd_loss() -> None:
    torch.manual_seed(0)
    own, taught, target = torch.randn(N, 3, requires_grad=True), torch.randn(N, 3), torch.arange(N) % 3
    loss = get_high_level_loss(criterion(temperature=2.0, eta=0.6, divergence="dkd"))
    value = loss({"student": {".": {"output": own}}, "teacher": {".": {"output": taught}}}, {}, target)
    expected = 2 * lrds_fast.kd_loss(own, taught, target, temperature=2.0, eta=0.6, divergence="dkd")
    torch.testing.assert_close(value, expected)
    value.backward()
    assert own.grad is not None and own.grad.abs().max() > 0
    places = {"student_module_path": "fc", "teacher_module_path": "head", "teacher_module_io": "input"}
    elsewhere = get_high_level_loss(criterion(**places))
    dicts = {"student": {"fc": {"output": own}}, "teacher": {"head": {"input": taught}}}
    torch.testing.assert_close(elsewhere(dicts, {}, target), 2 * lrds_fast.kd_loss(own, taught, target))
    with pytest.raises(ValueError, match="eta must be in"):
        get_high_level_loss(criterion(eta=2.0))


def test_nan_is_an_error_of_the_teacher_unless_rows_are_selected() -> None:
    own, taught, target = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    taught[1] = torch.nan
    dicts = {"student": {".": {"output": own}}, "teacher": {".": {"output": taught}}}
    assert get_high_level_loss(criterion())(dicts, {}, target).isnan()
    selected = torch.tensor([True, False, True, True])
    expected = 2 * lrds_fast.kd_loss(own, taught, target, selected=selected)
    torch.testing.assert_close(get_high_level_loss(criterion(selection=True))(dicts, {}, target), expected)


def test_mistakes_of_a_configuration_are_named() -> None:
    own, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    dicts: Any = {"student": {".": {"output": own}}, "teacher": {".": {"output": (own, own)}}}
    for selection in (False, True):
        with pytest.raises(TypeError, match=r"teacher_logits must be a Tensor of logits; got tuple.*\[0\]"):
            get_high_level_loss(criterion(selection=selection))(dicts, {}, target)
    with pytest.raises(TypeError, match="'alpha': ce_weight weights"):
        get_high_level_loss(criterion(alpha=0.5))
    dicts["teacher"]["."]["output"] = own.flip(1)
    plain, none = (get_high_level_loss(criterion(revise=revise))(dicts, {}, target) for revise in (None, "none"))
    assert torch.equal(plain, none)


@pytest.mark.parametrize("keeps", [[1, 2, 5, 6, 7, 11], [9]])
def test_a_training_of_torchdistill_shows_the_teacher_the_selected_rows_alone(tmp_path: Path, keeps: list[int]) -> None:
    torch.manual_seed(0)
    teacher, student = CountingTeacher(), nn.Linear(5, 3)
    reference = copy.deepcopy(student)
    chosen = selection(tmp_path / "selection.parquet", keeps)
    loader = {
        "dataset_id": "train",
        "dataset_wrapper": {"key": "LRDSSelection", "kwargs": {"selection": str(tmp_path / "selection.parquet")}},
        "sampler": {"class_or_func": torch.utils.data.SequentialSampler, "kwargs": {}},
        "kwargs": {"batch_size": 4},
    }
    config = {
        "num_epochs": 1,
        "train_data_loader": loader,
        "teacher": {"forward_proc": "forward_selected", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
        "criterion": criterion(selection=True, ce_weight_unselected=1.0),
    }
    data = Samples()
    box = DistillationBox(teacher, student, {"train": data}, config, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)
    losses = []
    for images, targets, extra in box.train_data_loader:
        box.pre_forward_process()
        losses.append(box.forward_process(images, targets, extra))
        box.post_forward_process(losses[-1])

    mask = chosen.mask
    assert teacher.rows == [max(1, int(part.sum())) for part in mask.split(4)]
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    targets = torch.tensor(data.targets)
    for rows, value in zip(torch.arange(N).split(4), losses, strict=True):
        with torch.no_grad():
            taught = teacher.fc(data.points[rows])
        expected = 2 * lrds_fast.kd_loss(
            reference(data.points[rows]), taught, targets[rows], selected=mask[rows], ce_weight_unselected=1.0
        )
        torch.testing.assert_close(value, expected)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    torch.testing.assert_close(student.weight, reference.weight)


def test_selections_of_other_data_are_refused(tmp_path: Path) -> None:
    from lrds_fast.compat.torchdistill import LRDSSelection, forward_selected

    path = tmp_path / "selection.parquet"
    selection(path, [1, 2])
    other = Samples()
    other.targets[0] = 2
    with pytest.raises(ValueError, match="selection.parquet"):
        LRDSSelection(other, str(path))
    with pytest.raises(ValueError, match="is for 12 samples, the data set has 3"):
        LRDSSelection([(0, 0)] * 3, str(path))
    with pytest.raises(ValueError, match="'forward_selected' needs dataset_wrapper 'LRDSSelection'"):
        forward_selected(nn.Linear(5, 3), torch.randn(2, 5), None, {})


def test_without_torchdistill_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lrds_fast.compat.torchdistill")
    monkeypatch.setitem(sys.modules, "torchdistill.losses.registry", None)
    with pytest.raises(ImportError, match=r"needs torchdistill: pip install torchdistill"):
        import_dependencies(["lrds_fast.compat.torchdistill"])
