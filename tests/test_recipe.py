"""Recipes: every key checked, inheritance, settings on top, and those that come with the library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lrds_fast import models
from lrds_fast.divergences import DKD, KL
from lrds_fast.recipe.recipe import Recipe, all_keys, builtin_recipes, from_mapping, load_recipe
from lrds_fast.reference import default_ce_weight_unselected
from lrds_fast.train.setup import resolved


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", builtin_recipes())
def test_recipes_of_the_library_load_and_name_networks_that_exist(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    for model in (recipe.teacher.model, recipe.student.model):
        if model and not model.startswith(("torchvision:", "timm:")):
            assert model in models.names()
    if recipe.teacher.model:
        # A default that is written in one place, and resolved in the run's own recipe.json.
        weights = recipe.loss.ce_weight, recipe.loss.kd_weight
        assert recipe.loss.ce_weight_unselected is None
        assert resolved(recipe).loss.ce_weight_unselected == default_ce_weight_unselected(*weights)


def test_a_recipe_survives_json() -> None:
    recipe = load_recipe("imagenet_resnet34_resnet18", ["seed=5", "loss.eta=0.5"])
    assert from_mapping(json.loads(recipe.to_json())) == recipe


def test_published_protocols_are_as_published() -> None:
    cifar = load_recipe("cifar100_resnet56_resnet20")
    assert (cifar.optimizer.lr, cifar.optimizer.momentum, cifar.optimizer.weight_decay) == (0.05, 0.9, 5e-4)
    assert (cifar.data.batch_size, cifar.schedule.epochs, cifar.schedule.milestones) == (64, 240, (150, 180, 210))
    assert (cifar.loss.temperature, cifar.loss.ce_weight, cifar.loss.kd_weight) == (4.0, 0.1, 0.9)
    imagenet = load_recipe("imagenet_resnet34_resnet18")
    assert (imagenet.data.batch_size, imagenet.optimizer.lr, imagenet.optimizer.weight_decay) == (512, 0.2, 1e-4)
    assert (imagenet.schedule.epochs, imagenet.schedule.milestones) == (100, (30, 60, 90))
    assert (imagenet.loss.temperature, imagenet.loss.ce_weight, imagenet.loss.kd_weight) == (1.0, 0.5, 0.5)


def test_extends_takes_names_and_relative_paths_and_the_file_wins(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "base.toml", 'extends = "digits_kd"\nname = "base"\n[loss]\neta = 0.5\n')
    path = write(tmp_path / "sub", "top.toml", 'extends = "../base.toml"\n[loss]\ntemperature = 2\n')
    recipe = load_recipe(path)
    assert recipe.name == "base"
    assert (recipe.loss.eta, recipe.loss.temperature) == (0.5, 2.0)
    assert recipe.teacher.model == "mlp_8x16_128"


def test_circles_are_named(tmp_path: Path) -> None:
    a = write(tmp_path, "a.toml", 'extends = "b.toml"\n')
    write(tmp_path, "b.toml", 'extends = "a.toml"\n')
    with pytest.raises(ValueError, match="extend each other in a circle"):
        load_recipe(a)


def test_files_of_one_name_in_two_folders_are_no_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "a.toml", 'extends = "sub/b.toml"\n')
    write(tmp_path / "sub", "b.toml", 'extends = "a.toml"\n[loss]\neta = 0.5\n')
    write(tmp_path / "sub", "a.toml", 'name = "base"\n')
    monkeypatch.chdir(tmp_path)  # relative names: the two files are equal as text
    recipe = load_recipe("a.toml")
    assert (recipe.name, recipe.loss.eta) == ("base", 0.5)
    write(tmp_path / "sub", "a.toml", 'extends = "b.toml"\n')
    with pytest.raises(ValueError, match=r"circle: a.toml -> sub/b.toml -> sub/a.toml -> sub/b.toml$"):
        load_recipe("a.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[loss]\ntemprature = 2\n", r"unknown key 'loss.temprature'; did you mean 'loss.temperature'\?"),
        ("lr = 0.1\n", r"unknown key 'lr'; did you mean 'optimizer.lr'\?"),
        ("[los]\neta = 0.5\n", r"unknown key 'los'; did you mean 'loss"),
        ("[zzz]\nqqq = 1\n", r"unknown key 'zzz'; valid keys here: name, description, seed"),
        ("loss = 3\n", r"loss must be a table; got 3"),
        ('[data]\nbatch_size = "64"\n', r"data.batch_size must be int; got '64' \(str\)"),
        ("[data]\nbatch_size = 64.0\n", r"data.batch_size must be int; got 64.0 \(float\)"),
        ("seed = true\n", r"seed must be int; got True \(bool\)"),
        ("[schedule]\nmilestones = 30\n", r"schedule.milestones must be a list of int; got 30"),
        ('[schedule]\nmilestones = ["a"]\n', r"schedule.milestones must be int; got 'a' \(str\)"),
        ("[loss]\neta = 1.0\n", r"loss.eta must be in \(0, 1\); got 1.0"),
        (
            "[loss]\nrevise_temperature = 0\n",
            r"loss.revise_temperature must be above 0 and finite, or .*; got 0.0",
        ),
        ("[loss]\ntemperature = 0\n", r"loss.temperature must be above 0 and finite; got 0.0"),
        ("[loss]\nkd_weight = -1\n", r"loss.kd_weight must be at least 0 and finite; got -1.0"),
        ("[loss]\nce_weight = inf\n", r"loss.ce_weight must be at least 0 and finite; got inf"),
        ("[data]\nval_fraction = 1\n", r"data.val_fraction must be in \[0, 1\); got 1.0"),
        ('[run]\namp = "fp8"\n', r"run.amp must be one of off, bf16, fp16; got 'fp8'"),
        ("[data\n", r"is not valid TOML"),
        ("extends = 3\n", r"extends must be a name or a path; got 3"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "wrong.toml", text)
    with pytest.raises(ValueError, match=message) as raised:
        load_recipe(path)
    assert "\n" not in str(raised.value)
    assert "wrong.toml" in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["selection.after=40"],
            "selection.after must be below schedule.epochs=40, where training ends; got 40: lower it, set",
        ),
        (["selection.after=5", "selection.every=35"], r"selection.after \+ every must be below .*; got 40"),
        (
            ["schedule.name=step", "schedule.milestones=[20,40]"],
            r"schedule.milestones must be below .*; got 40: .*milestones=\[\]",
        ),
        (
            ["schedule.name=exponential", "schedule.decay_epochs=40.5"],
            "schedule.decay_epochs must be below .*; got 40.5",
        ),
        (["schedule.warmup_epochs=41"], "schedule.warmup_epochs must be at most .*; got 41: lower it"),
        (["loss.kd_warmup_epochs=41"], "loss.kd_warmup_epochs must be at most .*; got 41"),
    ],
)
def test_an_epoch_after_the_end_of_training_is_an_error(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("digits_kd", ["schedule.epochs=40", *settings])


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../b", "a/.."])
def test_a_name_that_is_no_folder_under_runs_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name must be a folder name, for runs/NAME; got .*: set name or run.out"):
        load_recipe("digits_kd", [f"name='{name}'"])
    assert str(load_recipe("digits_kd", [f"name='{name}'", "run.out=x"]).out) == "x"


def test_missing_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no recipe file .*absent.toml"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match=r"there is no recipe 'digits_kd_lrr'; did you mean 'digits_kd_lr'\?"):
        load_recipe("digits_kd_lrr")


def test_settings_are_toml_and_bare_words_are_strings() -> None:
    recipe = load_recipe(
        "digits_kd",
        ["loss.eta=.5", "seed=3", "run.device=cpu", 'name="a b"', "run.channels_last=true", "data.mean=[0.5]"],
    )
    assert (recipe.loss.eta, recipe.seed, recipe.run.device, recipe.name) == (0.5, 3, "cpu", "a b")
    assert recipe.run.channels_last is True
    assert recipe.data.mean == (0.5,)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.eta", r"--set takes key=value.*got 'loss.eta'"),
        ("loss.etta=0.5", r"unknown key 'loss.etta'; did you mean 'loss.eta'\?"),
        ("seed.x=1", r"seed must be int; got \{'x': 1\} \(dict\)"),
    ],
)
def test_wrong_settings_are_named(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("digits_kd", [setting])


def test_values_can_be_replaced_but_the_original_stays() -> None:
    recipe = Recipe()
    other = recipe.with_values(seed=4, **{"loss.eta": 0.3})
    assert (other.seed, other.loss.eta) == (4, 0.3)
    assert (recipe.seed, recipe.loss.eta) == (0, 0.8)
    with pytest.raises(ValueError, match="unknown key 'loss.zeta'"):
        recipe.with_values(**{"loss.zeta": 1})


def test_flat_has_every_key() -> None:
    assert sorted(Recipe().flat()) == sorted(all_keys())


def test_divergences_and_their_options() -> None:
    recipe = load_recipe("digits_kd", ["loss.divergence=dkd", "loss.divergence_options.beta=2"])
    assert recipe.loss.chosen_divergence() == DKD(beta=2.0)
    assert from_mapping(json.loads(recipe.to_json())) == recipe
    assert load_recipe("digits_kd").loss.chosen_divergence() == KL()
    for settings, message in (
        (["loss.divergence=dkl"], "loss.divergence must be one of kl, rkl"),
        (["loss.divergence_options.beta=2"], "loss.divergence_options.beta: 'kl' has no such option; it has none"),
        (["loss.divergence=dkd", "loss.divergence_options.gamma=2"], "'dkd' has no such option; it has alpha, beta"),
        (["loss.divergence=dkd", "loss.divergence_options.beta=-1"], "loss.divergence_options: DKD's beta must be"),
        (["loss.divergence=dkd", "loss.divergence_options.beta=x"], "loss.divergence_options.beta must be float"),
        (["loss.divergence_options=3"], "loss.divergence_options must be a table"),
        (["loss.temperatures=[1, 0]"], "loss.temperatures must be above 0"),
        (["loss.kd_warmup_epochs=-1"], "loss.kd_warmup_epochs must be at least 0"),
        (["loss.ce_weight=0", "loss.ce_weight_end=1"], "loss.ce_weight must be above 0, .*ce_weight_end = 1; got 0"),
        (["loss.ce_weight_end=0"], "loss.ce_weight_end must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe("digits_kd", settings)


@pytest.mark.parametrize(
    "text", ['\ufeffextends = "digits_kd"\n[loss]\neta = 0.5\n', 'extends = "digits_kd"\r\n[loss]\r\neta = 0.5\r\n']
)
def test_recipes_of_other_editors_are_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode())
    assert load_recipe(path) == load_recipe("digits_kd", ["loss.eta=0.5"])


def test_a_byte_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes('# fine\nname = "lé"\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"recipe \S+latin.toml is not UTF-8: byte 0xe9 at position 16, in line 2"):
        load_recipe(path)
