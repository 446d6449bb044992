"""Files generated from the options of recipes: the table in the docs, the help text, the JSON schema; and errors."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from lrds_fast.recipe.errors import TABLES
from lrds_fast.recipe.keys import SCHEMA, help_text, markdown_table, recipe_keys
from lrds_fast.recipe.options import (
    DataOptions,
    LossOptions,
    RunOptions,
    ScheduleOptions,
    ScoreOptions,
    SelectionOptions,
    TeacherOptions,
)
from lrds_fast.recipe.recipe import Recipe, all_keys, builtin_recipes, load_recipe, recipe_text
from lrds_fast.recipe.schema import editor_schema

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("recipe_keys", ROOT / "tools" / "recipe_keys.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_up_to_date() -> None:
    assert tool().outdated() == [], "run python tools/recipe_keys.py"


def test_an_outdated_file_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tool()
    for name in (f"lrds_fast/recipes/{SCHEMA}", "docs/training.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module.outdated() == []
    page = tmp_path / "docs" / "training.md"
    page.write_text(page.read_text().replace("| `data.batch_size` |", "| `data.batch` |"))
    assert module.outdated() == [page]
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"training.md must have the lines '<!-- keys of a recipe"):
        module.contents()


def test_every_key_is_described_once() -> None:
    keys = recipe_keys(editor_schema())
    assert [key.name for key in keys] == all_keys()
    assert all(key.about and "\n" not in key.about and "|" not in key.about for key in keys)
    by_name = {key.name: key for key in keys}
    assert by_name["data.batch_size"][1:4] == ("int", "above 0", "64")
    assert by_name["loss.revise_temperature"][1:4] == ("float", 'above 0, or "none"', "1.0")
    assert by_name["selection.threshold"][1:4] == ("float", 'or "none"', '"none"')
    assert by_name["data.second_view"][2] == "one of '', strong"
    table, text = markdown_table(keys), help_text()
    for key in keys:
        assert f"\n| `{key.name}` | " in table
        assert f"\n  {key.name}={key.default}\n      {key.about} (" in text


def test_help_and_losses_need_no_pydantic() -> None:
    code = (
        "import sys; from lrds_fast.recipe.keys import help_text; help_text(); import lrds_fast; lrds_fast.kd_loss;"
        "print([name for name in ('pydantic', 'lrds_fast.recipe.options') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", builtin_recipes())
def test_the_schema_accepts_every_recipe(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    validator = jsonschema.Draft7Validator(editor_schema())
    validator.check_schema(editor_schema())
    values = tomllib.loads(recipe_text(name))
    validator.validate(values)
    validator.validate(json.loads(load_recipe(name).to_json().replace("null", '"none"')))
    for table, key, value in (
        ("data", "batch_size", "64"),
        ("loss", "eta", 1),
        ("run", "amp", "fp8"),
        ("loss", "x", 1),
    ):
        wrong = copy.deepcopy(values)
        wrong.setdefault(table, {})[key] = value
        assert not validator.is_valid(wrong), f"{table}.{key}"
    assert not validator.is_valid({**values, "lr": 0.1})


def test_the_schema_is_shipped() -> None:
    text = resources.files("lrds_fast.recipes").joinpath(SCHEMA).read_text(encoding="utf-8")
    assert json.loads(text) == editor_schema()


def test_options_of_one_table_check_themselves() -> None:
    options = DataOptions(name="cifar100", batch_size=32, mean=[0.5], mixup=1)  # type: ignore[arg-type]
    assert (options.batch_size, options.mean, options.mixup) == (32, (0.5,), 1.0)
    assert pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.batch_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        (DataOptions, {"batch_size": 0}, "data.batch_size must be above 0 and finite; got 0"),
        (DataOptions, {"batch_size": True}, "data.batch_size must be int; got True (bool)"),
        (DataOptions, {"batch_sise": 8}, "unknown key 'data.batch_sise'; did you mean 'data.batch_size'?"),
        (DataOptions, {"mean": 0.5}, "data.mean must be a list of float; got 0.5"),
        (DataOptions, {"mean": {0.5}}, "data.mean must be a list of float; got {0.5}"),
        (DataOptions, {"mean": (0.5, "a")}, "data.mean must be float; got 'a' (str)"),
        (DataOptions, {"mean": (float("nan"),)}, "data.mean must be finite; got nan"),
        (DataOptions, {"std": (0.5, 0.0)}, "data.std must be above 0 and finite; got 0.0"),
        (DataOptions, {"first_label": -2}, "data.first_label must be at least -1"),
        (ScheduleOptions, {"milestones": (20, -1)}, "schedule.milestones must be above 0 and finite; got -1"),
        (ScheduleOptions, {"gamma": 0.0}, "schedule.gamma must be above 0 and finite; got 0.0"),
        (ScoreOptions, {"damping": float("nan")}, "score.damping must be finite; got nan"),
        (ScoreOptions, {"damping_scale": -0.1}, "score.damping_scale must be at least 0 and finite; got -0.1"),
        (DataOptions, {"reader": 3}, "data.reader must be one of auto, dali, torchvision; got 3"),
        (
            DataOptions,
            {"second_view": "strong", "mixup": 1.0},
            "data.second_view cannot be combined with data.mixup or",
        ),
        (LossOptions, {"temperature": float("nan")}, "loss.temperature must be above 0 and finite; got nan"),
        (LossOptions, {"temperatures": (2.0, 0)}, "loss.temperatures must be above 0 and finite; got 0.0"),
        (LossOptions, {"revise_temperature": -1}, 'loss.revise_temperature must be above 0 and finite, or "none"; got'),
        (LossOptions, {"revise_temperature": "x"}, "loss.revise_temperature must be float, or \"none\"; got 'x' (str)"),
        (LossOptions, {"divergence_options": [1]}, "loss.divergence_options must be a table; got [1]"),
        (SelectionOptions, {"threshold": "low"}, "selection.threshold must be float, or \"none\"; got 'low' (str)"),
        (SelectionOptions, {"every": 1}, "selection.every needs selection.after"),
        (
            SelectionOptions,
            {"ratio": 0.0},
            "selection.ratio needs selection.after, the epochs before the first scoring, to",
        ),
        (SelectionOptions, {"threshold": 0.0, "path": "s"}, "selection.threshold needs selection.after"),
        (SelectionOptions, {"outliers": 3.0, "by": "kd"}, "selection.outliers needs selection.after"),
        (
            LossOptions,
            {"method": "revision", "temperature": 2.0},
            "loss.method 'revision' takes no temperature; got 2.0: leave out loss.temperature, or use method 'kd'",
        ),
        (
            LossOptions,
            {"method": "revision", "ce_weight_end": 1.0},
            "loss.method 'revision' takes no ce_weight_end; got 1.0",
        ),
        (
            LossOptions,
            {"method": "revision", "revise_temperature": None},
            "loss.method 'revision' takes no revise_temperature; got None",
        ),
        (
            LossOptions,
            {"method": "revision", "label_smoothing": 0.1},
            "loss.method 'revision' takes no label_smoothing",
        ),
        (TeacherOptions, {"cache": "soft"}, "teacher.cache is 'soft', but teacher.model"),
        (RunOptions, {"compile": "max-autotune", "accumulate": 2}, "run.compile 'max-autotune' uses CUDA graphs"),
        (Recipe, {"data": 3}, "data must be a table; got 3"),
        (Recipe, {"selection": SelectionOptions(after=30)}, "selection.after must be below schedule.epochs=30"),
    ],
)
def test_wrong_options_are_one_line(table: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the whole text is compared
        table(**values)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
    assert type(raised.value) is ValueError


def test_options_are_keyword_only() -> None:
    with pytest.raises(ValueError, match="DataOptions takes its options by keyword; got 'digits'"):
        DataOptions("digits")  # type: ignore[call-arg]


def test_every_table_of_a_recipe_is_checked() -> None:
    tables = [
        field.name for field in dataclasses.fields(Recipe) if dataclasses.is_dataclass(getattr(Recipe(), field.name))
    ]
    assert tables == [name for name in TABLES if name]


def test_train_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    from lrds_fast.cli.main import main

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert help_text() in capsys.readouterr().out
