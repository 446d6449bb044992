"""Published experiments by name, and sweeps that resume."""

from __future__ import annotations

import csv
import json
import re
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from lrds_fast import models
from lrds_fast.cli import main as cli
from lrds_fast.cli.sweep import listed, sweep
from lrds_fast.divergences import DKD, NKD, RLD
from lrds_fast.recipe import names as grid
from lrds_fast.recipe import recipe as recipe_module
from lrds_fast.recipe.recipe import from_mapping
from lrds_fast.report.runs import read_run
from lrds_fast.report.tables import cells, header, table_lines, tabulate
from lrds_fast.train import load_recipe
from lrds_fast.train.setup import build_optimizer, lr_factor

SMALL = ["--set", "schedule.epochs=2", "--set", "data.train_limit=100", "--set", "run.device=cpu", "--quiet"]


def test_every_name_is_a_recipe() -> None:
    for name in grid.names():
        recipe, parts = load_recipe(name), grid.parts_of(name)
        assert parts is not None and recipe.name == name
        protocol = grid.PROTOCOLS[parts.protocol]
        base = load_recipe(protocol.base)
        assert recipe.student.model == protocol.models.get(parts.student, parts.student)
        assert recipe.teacher.model == protocol.models.get(parts.teacher, parts.teacher)
        if parts.teacher:
            assert (recipe.loss.revise == "lr") == ("lr" in parts.switches or parts.method == "revision")
        assert (recipe.selection.after > 0) == ("ds" in parts.switches)
        assert (recipe.data.val_fraction > 0) == ("ds" in parts.switches or base.data.val_fraction > 0)
        assert (recipe.data.second_view == "strong") == (parts.method == "mlkd")
        # All else is the protocol's.
        assert recipe.data.batch_size == base.data.batch_size and recipe.data.rand_augment == base.data.rand_augment
        assert recipe.schedule.name == base.schedule.name and recipe.run == base.run
        if (parts.protocol, parts.method) != ("cifar100", "mlkd"):
            assert recipe.schedule == base.schedule


def test_every_network_exists() -> None:
    for protocol in grid.PROTOCOLS.values():
        for short in grid.models_of(protocol):
            name = protocol.models.get(short, short)
            library, colon, foreign = name.partition(":")
            if not colon:
                assert name in models.names()
            elif library == "timm":
                assert pytest.importorskip("timm", reason="pip install timm").is_model(foreign)
            else:
                torchvision = pytest.importorskip("torchvision", reason="pip install torchvision")
                assert foreign in torchvision.models.list_models(module=torchvision.models)


def test_the_grid_is_complete() -> None:
    names = grid.names()
    assert len(set(names)) == len(names)
    # Pairs, methods, and those of them that "+lr" does not change: revision, rld, and features alone.
    sizes = {"cifar100": (17, 28, 12), "cifar100-short": (17, 28, 12), "imagenet": (2, 10, 3)}
    sizes |= {"imagenet-modern": (6, 8, 2), "imagenet-adamw": (6, 7, 1)}
    for prefix, (pairs, methods, fixed) in sizes.items():
        protocol = grid.PROTOCOLS[prefix]
        assert (len(protocol.pairs), len(protocol.methods)) == (pairs, methods)
        taught = [name for name in names if name.startswith(f"{prefix}/") and name.count("/") == 2]
        assert len(taught) == pairs * ((methods - fixed) * 4 + fixed * 2)
        for pair in protocol.pairs.values():
            for model in (pair.teacher, pair.student):
                assert f"{prefix}/{model}" in names


def test_the_short_protocol_trains_every_run_on_the_same_samples() -> None:
    pair = "cifar100-short/resnet20-resnet8"
    runs = [load_recipe(name) for name in ("cifar100-short/resnet20", "cifar100-short/resnet8", f"{pair}/kd")]
    runs += [load_recipe(f"{pair}/{method}") for method in ("kd+lr", "kd+ds", "kd+lr+ds")]
    for recipe in runs:
        assert recipe.data == runs[0].data and recipe.data.val_fraction == 0.05
        assert (recipe.schedule, recipe.optimizer, recipe.run.amp) == (runs[0].schedule, runs[0].optimizer, "bf16")
    schedule, optimizer = runs[0].schedule, runs[0].optimizer
    assert (schedule.name, schedule.epochs, schedule.warmup_epochs) == ("cosine", 10, 1.0)
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay, optimizer.nesterov) == (0.1, 0.9, 5e-4, False)
    assert [recipe.selection.after for recipe in runs] == [0, 0, 0, 0, 3, 3]
    assert {recipe.teacher.checkpoint for recipe in runs[2:]} == {"runs/cifar100-short/resnet20/last.pt"}
    assert {recipe.student.model for recipe in runs[1:]} == {"resnet8"}
    assert load_recipe("cifar100-short/vgg13-MobileNetV2/kd").optimizer.lr == pytest.approx(0.02)
    assert load_recipe(f"{pair}/mlkd").schedule.epochs == load_recipe(f"{pair}/dkd").schedule.epochs == 10
    assert load_recipe(f"{pair}/dkd").loss.kd_warmup_epochs == 1
    assert grid.published("cifar100-short/resnet20") is None
    assert load_recipe("cifar100/resnet20-resnet8/kd").schedule.epochs == 240


def test_a_name_follows_the_protocol_it_extends(monkeypatch: pytest.MonkeyPatch) -> None:
    base: dict[str, dict[str, Any]] = {"schedule": {"epochs": 120, "name": "step"}, "optimizer": {"lr": 0.5}}
    composed = grid.compose("cifar100/resnet32x4-ShuffleV2/dkd+ds", base)
    assert composed["optimizer"] == {"lr": pytest.approx(0.1)}
    assert composed["selection"]["after"] == 40 and composed["loss"]["kd_warmup_epochs"] == 10

    text = recipe_module.recipe_text

    def changed(name: str) -> str:
        if name == "imagenet":
            return (
                text(name)
                .replace("weight_decay = 1e-4", "weight_decay = 3e-4")
                .replace("image_size = 224", "image_size = 160")
            )
        return text(name)

    variants = ("imagenet/resnet34-resnet18/nkd+lr+ds", "imagenet-modern/resnet18", "imagenet_resnet50_mobilenetv1")
    before = [load_recipe(name) for name in variants]
    monkeypatch.setattr(recipe_module, "recipe_text", changed)
    after = [load_recipe(name) for name in variants]
    assert [recipe.data.image_size for recipe in before] == [224] * 3
    assert [recipe.data.image_size for recipe in after] == [160] * 3
    # The modern protocol has a weight decay of its own.
    assert [recipe.optimizer.weight_decay for recipe in after] == [3e-4, 1e-5, 3e-4]


def test_recipes_of_users_extend_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "imagenet/resnet34-resnet18/kd+lr"\nname = "mine"\n[loss]\neta = 0.6\n')
    mine, theirs = load_recipe(path), load_recipe("imagenet/resnet34-resnet18/kd+lr")
    assert mine == theirs.with_values(name="mine", description=theirs.description, **{"loss.eta": 0.6})


def test_imagenet_protocols_are_the_published_ones() -> None:
    pair = "imagenet/resnet34-resnet18"
    for method, weights in (("kd", (1.0, 0.5, 0.5)), ("kd-tuned", (1.0, 1.0, 3.0)), ("nkd", (1.0, 1.0, 1.0))):
        loss = load_recipe(f"{pair}/{method}").loss
        assert (loss.temperature, loss.ce_weight, loss.kd_weight) == weights
    assert load_recipe(f"{pair}/nkd").loss.chosen_divergence() == NKD(gamma=1.5)
    assert load_recipe(f"{pair}/dkd").loss.chosen_divergence() == DKD(alpha=1.0, beta=0.5)
    assert load_recipe("imagenet/resnet50-mobilenetv1/dkd").loss.chosen_divergence() == DKD(alpha=1.0, beta=2.0)
    assert load_recipe(f"{pair}/dkd").loss.kd_warmup_epochs == 1
    lskd = load_recipe(f"{pair}/kd-lskd").loss
    assert (lskd.standardize, lskd.temperature, lskd.ce_weight, lskd.kd_weight) == (True, 2.0, 0.5, 9.0)
    crd = load_recipe(f"{pair}/crd+ds")
    assert (crd.features.method, crd.loss.ce_weight, crd.loss.kd_weight, crd.selection.after) == ("crd", 1.0, 0.0, 33)
    dist = load_recipe(f"{pair}/dist+lr+ds")
    assert (dist.loss.method, dist.loss.kd_weight, dist.optimizer.lr, dist.data.batch_size) == ("dist", 2.0, 0.2, 512)
    assert (dist.selection.after, dist.data.val_fraction, dist.score.curvature) == (33, 0.01, "ekfac")
    assert (dist.schedule.milestones, dist.optimizer.weight_decay, dist.run.channels_last) == ((30, 60, 90), 1e-4, True)
    for old, new in (
        ("imagenet_resnet34_resnet18", f"{pair}/kd+lr"),
        ("imagenet_resnet50_mobilenetv1", "imagenet/resnet50-mobilenetv1/kd+lr"),
    ):
        one, other = load_recipe(old), load_recipe(new)
        assert one == other.with_values(name=old, description=one.description)

    modern = load_recipe("imagenet-modern/resnet50sb-resnet18/dist")
    assert (modern.optimizer.name, modern.optimizer.lr, modern.data.batch_size) == ("rmsprop", 0.048, 768)
    assert (modern.data.rand_augment, modern.data.erasing, modern.run.ema_decay) == ("m9-mstd0.5", 0.2, 0.9999)
    assert lr_factor(modern.schedule, 2.5) < 1 and lr_factor(modern.schedule, 3.0) == pytest.approx(0.97)
    assert lr_factor(modern.schedule, 24.0) == pytest.approx(0.97**10)
    adamw = load_recipe("imagenet-adamw/resnet50sb-resnet18/kd")
    assert (adamw.optimizer.name, adamw.optimizer.lr, adamw.data.batch_size) == ("adamw", 1e-3, 1024)
    assert (adamw.data.mixup, adamw.data.cutmix, adamw.loss.label_smoothing) == (0.8, 1.0, 0.1)


def test_optimizers_of_timm_step() -> None:
    pytest.importorskip("timm", reason="pip install timm")
    for name in ("rmsprop", "lamb"):
        net = torch.nn.Linear(3, 2)
        optimizer = build_optimizer(
            load_recipe("digits_alone", [f"optimizer.name={name}", "optimizer.lr=0.1"]).optimizer, net
        )
        before = net.weight.detach().clone()
        net(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(before, net.weight) and optimizer.param_groups[0]["lr"] == 0.1


def test_protocols_are_the_published_ones() -> None:
    kd = load_recipe("cifar100/resnet56-resnet20/kd")
    assert (kd.loss.temperature, kd.loss.ce_weight, kd.loss.kd_weight, kd.loss.revise) == (4.0, 0.1, 0.9, "none")
    assert (kd.optimizer.lr, kd.schedule.epochs, kd.schedule.milestones) == (0.05, 240, (150, 180, 210))
    assert (kd.optimizer.momentum, kd.optimizer.weight_decay, kd.optimizer.nesterov) == (0.9, 5e-4, False)
    for pair, beta in (("resnet56-resnet20", 2.0), ("resnet32x4-resnet8x4", 8.0), ("vgg13-vgg8", 6.0)):
        dkd = load_recipe(f"cifar100/{pair}/dkd")
        assert dkd.loss.chosen_divergence() == DKD(alpha=1.0, beta=beta)
        assert (dkd.loss.ce_weight, dkd.loss.kd_weight, dkd.loss.kd_warmup_epochs) == (1.0, 1.0, 20)
        rld = load_recipe(f"cifar100/{pair}/rld")
        assert rld.loss.chosen_divergence() == RLD(alpha=1.0, beta=beta, confidence_temperature=1.0)
        assert (rld.loss.ce_weight, rld.loss.kd_weight, rld.loss.kd_warmup_epochs) == (1.0, 1.0, 20)
        assert rld.loss.temperature == 4.0 and rld.loss.revise == "none"
    lskd = load_recipe("cifar100/resnet56-resnet20/kd-lskd").loss
    assert (lskd.standardize, lskd.temperature, lskd.ce_weight, lskd.kd_weight) == (True, 2.0, 0.1, 9.0)
    for student in ("ShuffleV1", "ShuffleV2"):
        assert load_recipe(f"cifar100/resnet32x4-{student}/kd").optimizer.lr == pytest.approx(0.01)
        assert load_recipe(f"cifar100/{student}").optimizer.lr == pytest.approx(0.01)
    assert load_recipe("cifar100/vgg13-MobileNetV2/mlkd").optimizer.lr == pytest.approx(0.005)
    mlkd = load_recipe("cifar100/vgg13-vgg8/mlkd+lr+ds")
    assert (mlkd.schedule.epochs, mlkd.optimizer.lr, mlkd.selection.after) == (480, 0.025, 160)
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
    printed = from_mapping(json.loads(capsys.readouterr().out))
    assert printed == load_recipe("cifar100/resnet56-resnet20/dkd+lr")
    assert cli.main(["recipes"]) == cli.OK
    assert "resnet32x4-ShuffleV1" in capsys.readouterr().out


def test_published_accuracies_stand_beside_ours(tmp_path: Path) -> None:
    assert grid.published("cifar100/resnet56-resnet20/kd") == 70.66
    assert grid.published("cifar100/resnet56-resnet20/kd+lr") is None
    assert grid.published("cifar100/resnet20") == 69.06
    assert grid.published("cifar100/resnet56-resnet20/crd") == 71.16
    assert grid.published("cifar100-short/resnet56-resnet20/crd") is None
    assert grid.published("digits_kd") is None
    assert grid.published("imagenet/resnet34-resnet18/kd-tuned") == 71.81
    assert grid.published("imagenet/resnet34-resnet18/crd") == 71.17
    assert grid.published("imagenet-modern/resnet50sb-resnet18/dist") == 74.5
    assert grid.published("imagenet-modern/resnet18") == 73.4
    assert grid.published("imagenet-adamw/resnet18") is None
    for name in grid.names():
        percent = grid.published(name)
        assert percent is None or 55 < percent < 87
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
    assert cli.main(["sweep", "digits_alone", "--seeds", "0", *longer]) == cli.MISUSED
    assert "contains another run, with schedule.epochs 2; digits_alone, seed 0 has 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "digits_kdd"], "the name of a run; got 'digits_kdd': did you mean 'digits_kd'?"),
        (["--set", "run.out=x"], "must differ between runs; digits_alone, seed 0 and digits_kd, seed 0 have x"),
        (["--set", "run.out=x", "--seeds", "0", "1"], "digits_kd, seed 0 have x/seed0"),
        (["--set", "name=x"], "x, seed 0 is given twice"),
        (["--seeds", "0", "1", "0"], "digits_alone, seed 0 is given twice"),
        (["--grid", "nope.eta=1,2"], "error: digits_alone: unknown key 'nope'"),
        (["--grid", "loss.etta=1,2"], "error: digits_alone: unknown key 'loss.etta'; did you mean 'loss.eta'?"),
        (["--set", "run.out=a_file/x"], "run.out: a_file/x"),
        (["--report", "."], "--report: . must be a file"),
        (["--markdown", "a_file/m.md"], "--markdown: a_file/m.md cannot be written"),
    ],
)
def test_a_sweep_is_checked_before_the_first_run(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    recipes = ["digits_alone", "digits_kd"] if "a_file/x" not in arguments[1] else ["digits_alone"]
    assert cli.main(["sweep", *recipes, *SMALL, *arguments]) == cli.MISUSED
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""
    assert [path.name for path in Path().iterdir()] == ["a_file"]


def test_a_sweep_without_a_terminal_prints_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", "digits_alone", *SMALL[:-1]]) == cli.OK
    found = re.findall(r"^\[1/1\] seed 0, digits_alone: epoch (\d)/2", capsys.readouterr().err, re.MULTILINE)
    assert found == ["1", "2"]


def test_lists_of_other_editors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeff# é\r\ndigits_alone\r\n".encode())
    assert listed([f"@{path}"]) == ["digits_alone"]


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


def test_feature_methods_are_published_ones_with_their_weights() -> None:
    pair = "cifar100/resnet32x4-ShuffleV2"
    alone, beside = load_recipe(f"{pair}/reviewkd"), load_recipe(f"{pair}/kd-reviewkd+lr+ds")
    assert alone.features.method == beside.features.method == "reviewkd"
    assert alone.features.weight == beside.features.weight == 8.0
    assert (alone.loss.kd_weight, beside.loss.kd_weight, beside.loss.revise) == (0.0, 1.0, "lr")
    assert alone.loss.kd_warmup_epochs == 20 and beside.selection.after == 80
    assert load_recipe("cifar100-short/resnet20-resnet8/reviewkd").loss.kd_warmup_epochs == 1
    with pytest.raises(ValueError, match=r"there is no recipe 'cifar100/resnet32x4-ShuffleV2/crd\+lr'"):
        load_recipe(f"{pair}/crd+lr")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run.compile": "default"}, r"features.method 'crd' needs run.compile='off'; got 'default'"),
        ({"teacher.cache": "runs/soft"}, r"features.method 'crd' needs teacher.cache=''; got 'runs/soft'"),
        (
            {"data.mixup": 0.2, "loss.method": "revision", "loss.revise": "lr"},
            "'revision' takes class numbers: it cannot be combined with data.mixup",
        ),
        ({"data.cutmix": 1.0, "loss.revise": "swap"}, "loss.revise 'swap' takes class numbers"),
        (
            {"run.compile": "reduce-overhead", "run.accumulate": 2},
            "set run.accumulate to 1, or run.compile to 'default'",
        ),
    ],
)
def test_incompatible_options_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("cifar100/resnet56-resnet20/kd-crd").with_values(**values)


def test_published_accuracies_are_of_names_and_have_sources() -> None:
    """Every row of published.csv is shown beside a name of the grid, once, and names the file in which it was
    read."""
    text = resources.files("lrds_fast.recipes").joinpath("published.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    names = set()
    for row in rows:
        pair = f"{row['teacher']}-{row['student']}/{row['method']}" if row["teacher"] else row["student"]
        names.add(f"{row['protocol']}/{pair}")
        assert re.search(r"\w\.(md|tsv)\b", row["source"]) and bool(row["teacher"]) == bool(row["method"])
        assert grid.published(f"{row['protocol']}/{pair}") == float(row["accuracy"])
    assert names <= set(grid.names()) and len(names) == len(rows)


def test_protocols_come_after_those_they_extend_and_share_methods() -> None:
    assert list(grid.PROTOCOLS) == ["cifar100", "cifar100-short", "imagenet", "imagenet-modern", "imagenet-adamw"]
    short, whole = grid.PROTOCOLS["cifar100-short"], grid.PROTOCOLS["cifar100"]
    assert short.pairs == whole.pairs and list(short.methods) == list(whole.methods)
    assert [name for name in whole.methods if short.methods[name] != whole.methods[name]] == ["mlkd"]
    modern, adamw = grid.PROTOCOLS["imagenet-modern"], grid.PROTOCOLS["imagenet-adamw"]
    assert set(modern.methods) - set(adamw.methods) == {"revision"} and "mlkd" not in modern.methods
    for protocol in grid.PROTOCOLS.values():
        students = {pair.student for pair in protocol.pairs.values()}
        assert set(protocol.small_steps) <= students
        for method in protocol.methods.values():
            assert set(method.by_student) <= students and set(method.switches) <= {"lr", "ds"}


def test_a_finished_run_of_a_sweep_has_the_present_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights, teacher = Path("teacher.pt"), models.create("mlp_8x16_128", num_classes=100)
    torch.save(teacher.state_dict(), weights)
    settings = ["schedule.epochs=1", "data.train_limit=100", "run.device=cpu", f"teacher.checkpoint={weights}"]
    recipe = load_recipe("digits_kd", settings)
    said: list[str] = []
    assert sweep([recipe], progress=False, say=said.append)[1] == []
    teacher.fc.bias.data += 1  # type: ignore[union-attr,operator]
    torch.save(teacher.state_dict(), weights)
    runs, failures = sweep([recipe], progress=False, say=said.append)
    assert runs == [] and "of another run: its teacher's sha256 is" in failures[0][1]
    weights.unlink()
    runs, failures = sweep([recipe], progress=False, say=said.append)
    assert len(runs) == 1 and failures == [] and "finished already" in said[-1]
