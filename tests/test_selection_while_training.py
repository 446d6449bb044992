"""A dataset whose flags are renewed while a student trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lrds_fast
from lrds_fast import influence
from lrds_fast.recipe.options import SelectionOptions
from lrds_fast.selection import SelectedDataset
from lrds_fast.selection.while_training import RULE

N, D, C = 60, 5, 4


def samples(seed: int, size: int = N) -> list[tuple[Tensor, int]]:
    points = torch.randn(size, D, generator=torch.Generator().manual_seed(seed))
    return [(point, row % C) for row, point in enumerate(points)]


def flags(selected: SelectedDataset) -> Tensor:
    return torch.tensor([selected[row][-1] for row in range(len(selected))])


@pytest.fixture
def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(D, C), nn.Linear(D, C)


def test_the_default_rule_is_that_of_recipes() -> None:
    options = SelectionOptions()
    assert options.by_confidence
    assert dict(RULE) == {"confidence": options.confidence, "max_drop": options.max_drop}


def test_an_update_is_a_scoring_and_a_selection(networks: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = networks
    train, held_out = samples(1), samples(2, 30)
    loss = lrds_fast.KDLoss(temperature=2.0, ce_weight=0.3)
    selected = SelectedDataset(train, teacher, held_out, rule={"ratio": 0.8}, loss=loss)
    assert len(selected) == N and flags(selected).all()
    workers = DataLoader(selected, batch_size=20, num_workers=1, persistent_workers=True)
    assert torch.cat([flag for *_, flag in workers]).all()

    chosen = selected.update(student)
    scores = influence.score(student, teacher, train, held_out, loss=loss)
    expected = lrds_fast.select(scores, ratio=0.8).mask
    assert torch.equal(chosen.mask, expected) and selected.selection is chosen
    assert torch.equal(torch.cat([flag for *_, flag in workers]), expected), "the flags reach running workers"
    x, y, flag = selected[3]
    assert torch.equal(x, train[3][0]) and y == 3 and flag is bool(expected[3])

    # The second scoring is of the objective that the student was trained with: unselected samples have no teacher.
    again = selected.update(student)
    scores = influence.score(student, teacher, train, held_out, loss=loss, selected=expected)
    assert torch.equal(again.mask, lrds_fast.select(scores, ratio=0.8).mask)


def test_samples_stay_selected_up_to_the_limit(networks: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = networks
    train, held_out = samples(1), samples(2, 30)
    selected = SelectedDataset(train, teacher, held_out, rule={"confidence": 0.5, "leave": 2.0})
    first = selected.update(student).mask
    scores = influence.score(student, teacher, train, held_out)
    assert torch.equal(first, lrds_fast.select(scores, confidence=0.5).mask) and not first.all()
    state = selected.state_dict()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    second = selected.update(student).mask
    scores = influence.score(student, teacher, train, held_out, selected=first)
    rule: dict[str, Any] = {"confidence": 0.5, "leave": 2.0}
    assert torch.equal(second, lrds_fast.select(scores, **rule, previous=first).mask)
    assert not torch.equal(second, lrds_fast.select(scores, confidence=0.5).mask), "the limit makes a difference"

    resumed = SelectedDataset(train, teacher, held_out, rule=rule)
    resumed.load_state_dict(state)
    assert torch.equal(flags(resumed), first)
    assert torch.equal(resumed.update(student).mask, second)


def test_the_evaluation_transform_has_its_own_dataset(networks: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = networks

    class Augmented:
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            x, y = samples(1)[index]
            return x + torch.randn(D), y

    with pytest.raises(ValueError, match="evaluation transform"):
        SelectedDataset(Augmented(), teacher, samples(2, 30)).update(student)
    selected = SelectedDataset(Augmented(), teacher, samples(2, 30), evaluated=samples(1), rule={"ratio": 0.5})
    assert int(selected.update(student).mask.sum()) == N // 2


def test_wrong_arguments(networks: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = networks
    with pytest.raises(TypeError, match="of must be a map-style Dataset"):
        SelectedDataset(iter(samples(1)), teacher)
    with pytest.raises(ValueError, match="evaluated must have the 60 samples"):
        SelectedDataset(samples(1), teacher, evaluated=samples(1, 59))
    selected = SelectedDataset(samples(1), teacher, samples(2, 30), rule={"ratio": 2.0})
    with pytest.raises(ValueError, match="ratio"):
        selected.update(student)
    assert flags(selected).all(), "a failed update changes nothing"
    with pytest.raises(ValueError, match="flags of 60 samples"):
        selected.load_state_dict({"mask": torch.ones(3, dtype=torch.bool), "updates": 1})
