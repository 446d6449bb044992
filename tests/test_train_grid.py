"""The literature's experiments by name, and lists of runs that can be interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lrds_fast import models
from lrds_fast.divergences import DKD
from lrds_fast.train import cli, grid, load_recipe
from lrds_fast.train.recipe import from_mapping
from lrds_fast.train.report import cells, header, read_run, table_lines, tabulate
from lrds_fast.train.sweep import listed, sweep

SMALL = ["--set", "schedule.epochs=2", "--set", "data.train_limit=100", "--set", "run.device=cpu", "--quiet"]


@pytest.mark.parametrize("name", grid.names())
def test_every_name_is_a_recipe(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.student.model in models.names()
    assert recipe.teacher.model in ("", *models.names())
    assert (recipe.data.name, recipe.data.batch_size, recipe.data.augment) == ("cifar100", 64, "crop-flip")
    short = name.startswith("cifar100-short/")
    assert (recipe.schedule.name, len(recipe.schedule.milestones)) == (("cosine", 0) if short else ("step", 3))
    switches = name.rpartition("/")[2].split("+")
    assert (recipe.loss.revise == "lr") == ("lr" in switches or "revision" in switches or not recipe.teacher.model)
    assert (recipe.selection.after > 0) == ("ds" in switches)
    assert (recipe.data.val_fraction > 0) == ("ds" in switches or short)


def test_the_grid_is_complete() -> None:
    names = grid.names()
    assert len(set(names)) == len(names)
    assert len(grid.PAIRS) == 16
    for prefix in grid.PROTOCOLS:
        taught = [name for name in names if name.startswith(f"{prefix}/") and name.count("/") == 2]
        assert len(taught) == 16 * (4 * 4 + 2)  # revision revises by itself
        for pair in grid.PAIRS.values():
            for model in (pair.teacher, pair.student):
                assert f"{prefix}/{model}" in names


def test_the_short_protocol_trains_every_run_on_the_same_samples() -> None:
    pair = "cifar100-short/resnet20-resnet8"
    runs = [load_recipe(name) for name in ("cifar100-short/resnet20", "cifar100-short/resnet8", f"{pair}/kd")]
    runs += [load_recipe(f"{pair}/{method}") for method in ("kd+lr", "kd+ds", "kd+lr+ds")]
    for recipe in runs:
        assert recipe.data == runs[0].data and recipe.data.val_fraction == 0.02
        assert (recipe.schedule, recipe.optimizer, recipe.run.amp) == (runs[0].schedule, runs[0].optimizer, "bf16")
    schedule, optimizer = runs[0].schedule, runs[0].optimizer
    assert (schedule.name, schedule.epochs, schedule.warmup_epochs) == ("cosine", 10, 1.0)
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay, optimizer.nesterov) == (0.1, 0.9, 5e-4, False)
    assert [recipe.selection.after for recipe in runs] == [0, 0, 0, 0, 2, 2]
    assert {recipe.teacher.checkpoint for recipe in runs[2:]} == {"runs/cifar100-short/resnet20/last.pt"}
    assert {recipe.student.model for recipe in runs[1:]} == {"resnet8"}
    assert load_recipe("cifar100-short/vgg13-MobileNetV2/kd").optimizer.lr == pytest.approx(0.02)
    assert load_recipe(f"{pair}/mlkd").schedule.epochs == load_recipe(f"{pair}/dkd").schedule.epochs == 10
    assert load_recipe(f"{pair}/dkd").loss.kd_warmup_epochs == 1
    assert grid.published("cifar100-short/resnet20") is None
    assert load_recipe("cifar100/resnet20-resnet8/kd").schedule.epochs == 240


def test_a_name_follows_the_protocol_it_extends() -> None:
    base = {"schedule": {"epochs": 120, "name": "step"}, "optimizer": {"lr": 0.5}}
    recipe = grid.compose("cifar100/resnet32x4-ShuffleV2/dkd+ds", base)
    assert recipe["optimizer"] == {"lr": pytest.approx(0.1)}
    assert recipe["selection"]["after"] == recipe["loss"]["kd_warmup_epochs"] == 10


def test_protocols_are_the_published_ones() -> None:
    kd = load_recipe("cifar100/resnet56-resnet20/kd")
    assert (kd.loss.temperature, kd.loss.ce_weight, kd.loss.kd_weight, kd.loss.revise) == (4.0, 0.1, 0.9, "none")
    assert (kd.optimizer.lr, kd.schedule.epochs, kd.schedule.milestones) == (0.05, 240, (150, 180, 210))
    assert (kd.optimizer.momentum, kd.optimizer.weight_decay, kd.optimizer.nesterov) == (0.9, 5e-4, False)
    for pair, beta in (("resnet56-resnet20", 2.0), ("resnet32x4-resnet8x4", 8.0), ("vgg13-vgg8", 6.0)):
        dkd = load_recipe(f"cifar100/{pair}/dkd")
        assert dkd.loss.chosen_divergence() == DKD(alpha=1.0, beta=beta)
        assert (dkd.loss.ce_weight, dkd.loss.kd_weight, dkd.loss.kd_warmup_epochs) == (1.0, 1.0, 20)
    for student in ("ShuffleV1", "ShuffleV2"):
        assert load_recipe(f"cifar100/resnet32x4-{student}/kd").optimizer.lr == pytest.approx(0.01)
        assert load_recipe(f"cifar100/{student}").optimizer.lr == pytest.approx(0.01)
    assert load_recipe("cifar100/vgg13-MobileNetV2/mlkd").optimizer.lr == pytest.approx(0.005)
    mlkd = load_recipe("cifar100/vgg13-vgg8/mlkd+lr+ds")
    assert (mlkd.schedule.epochs, mlkd.optimizer.lr, mlkd.selection.after) == (480, 0.025, 40)
    assert mlkd.loss.temperatures == (2.0, 3.0, 4.0, 5.0, 6.0)


def test_wrong_names_get_the_nearest() -> None:
    for name, message in (
        ("cifar100/resnet56-resnet20/kd+rl", r"did you mean 'cifar100/resnet56-resnet20/kd\+"),
        ("cifar100/resnet56-resnet21/kd", "did you mean 'cifar100/resnet56-resnet20/kd'"),
        ("cifar100/resnet57", "did you mean 'cifar100/resnet56'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(name)


def test_a_name_is_shown_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "show", "cifar100/resnet56-resnet20/dkd+lr"]) == cli.OK
    shown = from_mapping(json.loads(capsys.readouterr().out))
    assert shown == load_recipe("cifar100/resnet56-resnet20/dkd+lr")
    assert cli.main(["recipes"]) == cli.OK
    assert "resnet32x4-ShuffleV1" in capsys.readouterr().out


def test_published_accuracies_stand_beside_ours(tmp_path: Path) -> None:
    assert grid.published("cifar100/resnet56-resnet20/kd") == 70.66
    assert grid.published("cifar100/resnet56-resnet20/kd+lr") is None
    assert grid.published("cifar100/resnet20") == 69.06
    assert grid.published("digits_kd") is None
    from lrds_fast.train import fit

    runs = []
    for name in ("cifar100/resnet20", "digits_alone"):
        recipe = load_recipe("digits_alone", ["schedule.epochs=1", "data.train_limit=60", "run.device=cpu"])
        recipe = recipe.with_values(name=name, **{"run.out": str(tmp_path / name)})
        fit(recipe, progress=False)
        runs.append(read_run(recipe.out))
    rows = tabulate(runs)
    assert header(None)[-1] == "published %"
    assert [line[-1] for line in table_lines(rows, None)] == ["published %", "69.06", "-"]
    assert table_lines(rows[1:], None)[1] == cells(rows[1])[:-1], "no column where nothing is published"


def test_a_sweep_keeps_goes_on_and_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("# two of them\ndigits_alone\n\n  digits_kd  \n")
    assert listed(["@list.txt", "digits_teacher"]) == ["digits_alone", "digits_kd", "digits_teacher"]
    assert cli.main(["sweep", "@list.txt", "--seeds", "0", "1", *SMALL]) == cli.FAILED
    out, err = capsys.readouterr()
    assert "[1/4] digits_alone, seed 0: test accuracy" in out and "[2/4] digits_alone, seed 1: test accuracy" in out
    assert "digits_kd, seed 0: teacher.checkpoint: there is no file runs/digits_teacher/last.pt" in err
    assert "digits_alone      2" in out, "both seeds in one row of the table"

    assert cli.main(["train", "digits_teacher", *SMALL]) == cli.OK
    before = Path("runs/digits_alone/seed0/last.pt").stat().st_mtime_ns
    longer = [word.replace("epochs=2", "epochs=3") for word in SMALL]
    # A run that was cut short: one epoch of two.
    assert cli.main(["train", "digits_alone", *SMALL, "--set", "seed=1", "--set", "run.out=whole"]) == cli.OK
    shutil.rmtree("runs/digits_alone/seed1")
    assert cli.main(["sweep", "@list.txt", "--seeds", "0", "1", *SMALL, "--report", "all.html"]) == cli.OK
    out, _ = capsys.readouterr()
    assert "[1/4] digits_alone, seed 0: finished already" in out
    assert Path("runs/digits_alone/seed0/last.pt").stat().st_mtime_ns == before
    a, b = (
        torch.load(path, weights_only=True)["student"] for path in ("whole/last.pt", "runs/digits_alone/seed1/last.pt")
    )
    assert all(torch.equal(a[key], b[key]) for key in a), "a run of a sweep is the run of train"
    assert "<svg" in Path("all.html").read_text()
    # The same folders for another recipe: refused, not overwritten.
    assert cli.main(["sweep", "digits_alone", "--seeds", "0", *longer]) == cli.FAILED
    assert "is of another run: its schedule.epochs is 2" in capsys.readouterr().err


def test_sweep_goes_on_after_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lrds_fast.train import run as runner

    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("digits_alone", ["schedule.epochs=3", "data.train_limit=100", "run.device=cpu"])
    original, resumed = runner.fit, []

    def watched(recipe: object, **options: object) -> object:
        resumed.append(options["resume"])
        return original(recipe, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "fit", watched)
    said: list[str] = []
    runs, failures = sweep([recipe], progress=False, say=said.append)
    assert not failures and resumed == [True] and len(runs) == 1
    runs, _ = sweep([recipe], progress=False, say=said.append)
    assert resumed == [True] and runs[0].last["epoch"] == 3
    assert said[1].endswith("finished already, in runs/digits_alone")
