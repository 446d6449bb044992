"""The experiment itself, short: a teacher and five variants on CIFAR-100, or on a synthetic twin where it is not."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrds_fast import models
from lrds_fast.data import Data, in_memory, load
from lrds_fast.data.memory import MemoryLoader
from lrds_fast.models.weights import load_weights
from lrds_fast.recipe.recipe import load_recipe
from lrds_fast.selection import Selection
from lrds_fast.train import TrainResult, train

#: Two epochs of 75 steps of 32 pictures.
TRAIN, BATCH, STEPS = 2400, 32, 150
TEST = 1000
VARIANTS = ("", "kd", "kd+lr", "kd+ds", "kd+lr+ds")


def cifar() -> Data:
    """The first samples of CIFAR-100, with 1000 held out; a twin of it, by its means per class, without LRDS_DATA."""
    options: dict[str, Any] = {"batch_size": BATCH, "augment": "crop-flip", "val_fraction": 0.02, "train_limit": TRAIN}
    shared = os.environ.get("LRDS_DATA")
    if shared and (Path(shared) / "cifar100").is_dir():
        data = load("cifar100", **options)
        test = data.test
        assert isinstance(test, MemoryLoader)
        few = MemoryLoader(
            test.images[:TEST],
            test.labels[:TEST],
            num_classes=100,
            batch_size=250,
            mean=(0.5071, 0.4867, 0.4408),
            std=(0.2675, 0.2565, 0.2761),
        )
        return dataclasses.replace(data, test=few)
    draws = torch.Generator().manual_seed(0)
    centres = torch.rand(100, 3, 4, 4, generator=draws)

    def split(size: int) -> tuple[Tensor, Tensor]:
        targets = torch.randint(0, 100, (size,), generator=draws)
        coarse = nn.functional.interpolate(centres[targets], scale_factor=8.0, mode="bilinear")
        noisy = coarse + 0.15 * torch.randn(size, 3, 32, 32, generator=draws)
        return (noisy.clamp(0, 1) * 255).to(torch.uint8), targets

    return in_memory(*split(TRAIN + 1100), *split(TEST), num_classes=100, **(options | {"val_fraction": 0.25}))


def fitted(out: Path, name: str, data: Data, teacher: nn.Module | None = None, **values: Any) -> TrainResult:
    chosen = load_recipe(name).with_values(
        **{
            "schedule.epochs": 2,
            "schedule.warmup_epochs": 0.2,
            "data.batch_size": BATCH,
            "run.device": "cpu",
            "optimizer.lr": 0.05,
        }
        | values
    )
    torch.manual_seed(0)
    student = models.create(chosen.student.model, num_classes=100)
    return train(chosen, data, student, teacher, out=out, progress=False)


@pytest.fixture(scope="module")
def data_and_teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, nn.Module, TrainResult]:
    """The data and a briefly trained ResNet-8 teacher, which is wrong on most samples, so that LR and DS have an
    effect."""
    data = cifar()
    out = tmp_path_factory.mktemp("teacher")
    result = fitted(out, "cifar100-short/resnet8", data)
    teacher = models.create("resnet8", num_classes=100)
    load_weights(teacher, out / "last.pt", key="teacher.checkpoint")
    return data, teacher, result


# The variant that is all of the others at once is in `make test`; each alone is slow.
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, id=variant or "alone", marks=() if variant == "kd+lr+ds" else pytest.mark.slow)
        for variant in VARIANTS
    ],
)
def test_resnet8x4_learns_by_every_variant(
    tmp_path: Path, data_and_teacher: tuple[Data, nn.Module, TrainResult], variant: str
) -> None:
    data, teacher, of_teacher = data_and_teacher
    name = "cifar100-short/" + (f"resnet32x4-resnet8x4/{variant}" if variant else "resnet8x4")
    values = {"selection.after": 1} if "ds" in variant else {}
    result = fitted(tmp_path, name, data, teacher if variant else None, **values)
    before, after = result.records
    assert after["step"] == STEPS
    if "ds" not in variant:  # else the second epoch's loss is another
        assert after["train_loss"] < before["train_loss"]
    assert after["test_ce"] < before["test_ce"]
    assert after["test_acc"] > 0.02, "no better than a guess"
    if not variant:
        return
    rows = len(data.train.labels)
    assert before["n_selected"] == rows
    wrong = after["n_revised"] / max(after["n_selected"], 1)
    if variant == "kd+lr":
        # The teacher's own mistakes, on pictures that were cropped otherwise than when it was judged.
        assert abs(1.0 - of_teacher.records[-1]["test_acc"] - wrong) < 0.3
    if "lr" in variant:
        assert after["n_revised"] > 0
    else:
        assert after["n_revised"] == 0
    if "ds" not in variant:
        assert after["n_selected"] == rows
        return
    selection = Selection.load(tmp_path / "selections" / "epoch_0001.parquet")
    kept = int(selection.mask.sum())
    assert 0.9 * rows - 1 <= kept <= rows and after["n_selected"] == kept
    assert kept <= after["teacher_rows"] <= kept + STEPS // 2
    gain, error = selection.scores["kd_gain"], selection.scores["kd_gain_standard_error"]
    assert bool((gain[~selection.mask] > 2 * error[~selection.mask]).all())
    assert result.teacher_pred is not None and bool((result.teacher_pred[selection.mask] >= 0).all())
