"""Selection by outliers: k robust standard deviations above the median."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lrds_fast import select
from lrds_fast.cli import main as cli
from lrds_fast.influence import Scores
from lrds_fast.selection import Selection

# Median 2, deviations 2 1 0 1 98 2 8: their median is 2, so that one robust standard deviation is 2.9652.
SCORE = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0, 0.0, 10.0])


def denied(selection: Selection) -> set[int]:
    return set((~selection.mask).nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"outliers": 3.0}, {4}),
        ({"outliers": 2.0}, {4, 6}),
        ({"outliers": 2.0, "max_drop": 0.14}, {4}),
        ({"outliers": 2.0, "max_drop": 0.0}, set()),
        ({"outliers": 0.0}, {3, 4, 6}),
        ({"outliers": 0.5, "largest": True}, {0, 5}),
    ],
)
def test_deselected_samples(options: dict[str, float], expected: set[int]) -> None:
    selection = select({"kd": SCORE}, "kd", **options)  # type: ignore[arg-type]
    assert denied(selection) == expected
    assert selection.policy["outliers"] == options["outliers"]
    assert selection.policy["max_drop"] == options.get("max_drop", 1.0)
    assert selection.policy["threshold"] is None and "confidence" not in selection.policy


def test_against_numpy() -> None:
    score = torch.randn(1000, generator=torch.Generator().manual_seed(0)).exp()
    x = score.double().numpy()
    limit = np.median(x) + 2.5 * 1.4826 * np.median(np.abs(x - np.median(x)))
    assert np.array_equal(select({"kd": score}, "kd", outliers=2.5).mask.numpy(), x <= limit)
    # Shift and scale change nothing.
    moved = select({"kd": score.double() * 7 - 3}, "kd", outliers=2.5)
    assert np.array_equal(moved.mask.numpy(), x <= limit)


def test_hysteresis() -> None:
    before = torch.tensor([True, True, True, False, True, True, True])
    assert denied(select({"kd": SCORE}, "kd", outliers=0.1, leave=3.0, previous=before)) == {3, 4}
    assert denied(select({"kd": SCORE}, "kd", outliers=2.0, leave=3.0, previous=~before)) == {4, 6}
    with pytest.raises(ValueError, match="leave must be >= outliers, 2.0; got 1.0"):
        select({"kd": SCORE}, "kd", outliers=2.0, leave=1.0, previous=before)


def test_infinite_and_equal_scores() -> None:
    infinite = SCORE.clone()
    infinite[4] = math.inf
    assert denied(select({"kd": infinite}, "kd", outliers=3.0)) == {4}
    assert denied(select({"kd": torch.ones(5)}, "kd", outliers=0.0)) == set()
    assert len(select({"kd": torch.empty(0)}, "kd", outliers=3.0)) == 0
    with pytest.raises(ValueError, match="the median absolute deviation of 'kd' is 0.*use threshold"):
        select({"kd": torch.tensor([0.0, 0.0, 0.0, 1.0])}, "kd", outliers=3.0)
    with pytest.raises(ValueError, match="finite for more than half of the samples; 'kd' is not"):
        select({"kd": torch.tensor([0.0, 1.0, math.inf, math.inf])}, "kd", outliers=3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outliers": -1.0}, "outliers must be >= 0 and finite, in robust standard deviations"),
        ({"outliers": math.nan}, "outliers must be >= 0"),
        ({"outliers": 3.0, "threshold": 1.0}, "exactly one of confidence, outliers, ratio and threshold"),
        ({"outliers": 3.0, "per_class": True, "labels": SCORE.long()}, "leave per_class out"),
        ({"ratio": 0.5, "max_drop": 0.1}, "max_drop applies to confidence and outliers"),
    ],
)
def test_errors_name_the_way_out(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select({"kd": SCORE}, "kd", **options)  # type: ignore[arg-type]


def test_from_the_command_line(tmp_path: Path) -> None:
    labels = torch.zeros(len(SCORE)).long()
    scores = Scores({"kd": SCORE}, target=labels, teacher_pred=labels, meta={"num_classes": 2})
    table, out = tmp_path / "scores.parquet", tmp_path / "selection.parquet"
    select(scores, "kd", ratio=1.0).save(table)
    command = ["select", str(table), "--by", "kd", "--outliers", "2"]
    assert cli.main(command) == cli.OK
    assert denied(Selection.load(out)) == {4, 6}
    assert cli.main([*command, "--max-drop", "0.14"]) == cli.OK
    assert denied(Selection.load(out)) == {4}
