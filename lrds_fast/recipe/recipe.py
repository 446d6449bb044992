"""Recipes: a training run as data. One TOML file, frozen options, and an error for everything unknown."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from lrds_fast.recipe import names as grid
from lrds_fast.recipe.errors import TABLES, all_keys, checked
from lrds_fast.recipe.library import library_toml, tomllib
from lrds_fast.recipe.mappings import nested, overlay
from lrds_fast.recipe.options import (
    STRICT,
    DataOptions,
    FeatureOptions,
    LossOptions,
    OptimizerOptions,
    RunOptions,
    ScheduleOptions,
    ScoreOptions,
    SelectionOptions,
    StudentOptions,
    TeacherOptions,
    about,
)

__all__ = [
    "DataOptions",
    "FeatureOptions",
    "LossOptions",
    "OptimizerOptions",
    "Recipe",
    "RunOptions",
    "ScheduleOptions",
    "ScoreOptions",
    "SelectionOptions",
    "StudentOptions",
    "TeacherOptions",
    "all_keys",
    "builtin_recipes",
    "from_mapping",
    "load_recipe",
    "parse_settings",
    "read_text",
    "recipe_text",
]

#: In lrds_fast.recipes, beside the recipes; lrds_fast.recipe.ablations reads it.
ABLATIONS_FILE = "ablations.toml"


@checked("")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """One training run. Every value has a default; every key is checked."""

    name: Annotated[str, about("name of the run; its folder is runs/NAME unless run.out is set")] = "run"
    description: Annotated[str, about("one line for lists of recipes")] = ""
    seed: Annotated[int, about("seed of initial weights, order of samples and augmentation")] = 0
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    teacher: TeacherOptions = dataclasses.field(default_factory=TeacherOptions)
    student: StudentOptions = dataclasses.field(default_factory=StudentOptions)
    loss: LossOptions = dataclasses.field(default_factory=LossOptions)
    features: FeatureOptions = dataclasses.field(default_factory=FeatureOptions)
    selection: SelectionOptions = dataclasses.field(default_factory=SelectionOptions)
    score: ScoreOptions = dataclasses.field(default_factory=ScoreOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = dataclasses.field(default_factory=ScheduleOptions)
    run: RunOptions = dataclasses.field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if not self.run.out and not os.path.normpath(f"runs/{self.name.strip()}").startswith(f"runs{os.sep}"):
            raise ValueError(f"name must be a folder name, for runs/NAME; got {self.name!r}: set name or run.out")
        _check_epochs(self)
        _check_stored_answers(self)
        _check_mixing(self)
        _check_features(self)
        if self.selection.by == "set_shift" and self.score.curvature == "exact":
            raise ValueError(
                "selection.by = 'set_shift' takes score.curvature 'identity', 'kfac' or 'ekfac'; got 'exact'"
            )

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.run.out or f"runs/{self.name}")

    def with_values(self, **values: Any) -> Recipe:
        """A copy with some values replaced, by dotted name: with_values(seed=1, **{"loss.eta": 0.5})."""
        return from_mapping(overlay(dataclasses.asdict(self), nested(values)), where=self.name)

    def with_settings(self, settings: Iterable[str]) -> Recipe:
        """A copy with some values replaced, as "KEY=VALUE"; see load_recipe."""
        return from_mapping(overlay(dataclasses.asdict(self), parse_settings(settings)), where=self.name)

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted key."""
        values: dict[str, Any] = {}
        for key, value in dataclasses.asdict(self).items():
            if isinstance(value, dict):
                values |= {f"{key}.{name}": inner for name, inner in value.items()}
            else:
                values[key] = value
        return values

    def to_json(self) -> str:
        """The resolved recipe; from_mapping(json.loads(...)) gives it back."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def _check_stored_answers(recipe: Recipe) -> None:
    """What teacher.cache and teacher.answer_noise, which store the teacher's logits, cannot be combined with."""
    teacher, data = recipe.teacher, recipe.data
    needs_all = recipe.loss.needs_all_classes()
    if teacher.cache and teacher.cache_top_k and needs_all:
        raise ValueError(
            f"{needs_all} needs the logits of all classes: set teacher.cache_top_k=0; got {teacher.cache_top_k}"
        )
    stored = "cache" if teacher.cache else "answer_noise" if teacher.answer_noise else ""
    mixing: dict[str, object] = {
        "data.mixup": data.mixup,
        "data.cutmix": data.cutmix,
        "data.second_view": data.second_view,
    }
    for key, value in mixing.items():
        if stored and value:
            raise ValueError(
                f"teacher.{stored} has the logits of unmixed pictures: it cannot be combined with {key}; got {value!r}"
            )
    if not teacher.answer_noise:
        return
    for key, augmentation, off in (
        ("data.augment", data.augment, "none"),
        ("data.rand_augment", data.rand_augment, ""),
        ("data.erasing", data.erasing, 0.0),
    ):
        if augmentation != off and not teacher.cache:
            raise ValueError(
                f"teacher.answer_noise stores one answer a sample, to the unaugmented picture: set {key} to {off!r},"
                f" or teacher.cache, which stores an answer for each augmented view; got {key}={augmentation!r}"
            )
    if recipe.selection.after:
        raise ValueError(
            "selection.after scores with the teacher's own answers: it cannot be combined with teacher.answer_noise;"
            " use lrds-fast score and lrds-fast select"
        )


def _check_mixing(recipe: Recipe) -> None:
    """Which losses take mixed samples or a second view."""
    data, loss = recipe.data, recipe.loss
    if data.second_view and loss.method != "mlkd":
        raise ValueError(f"data.second_view is for loss.method 'mlkd'; got {loss.method!r}: set it to ''")
    if data.mixes and loss.method in ("mlkd", "revision"):
        raise ValueError(
            f"loss.method {loss.method!r} takes class numbers: it cannot be combined with data.mixup or data.cutmix"
        )
    if data.mixes and loss.revise in ("mft", "swap"):
        raise ValueError(f"loss.revise {loss.revise!r} takes class numbers: with data.mixup or cutmix use 'lr'")


def _check_epochs(recipe: Recipe) -> None:
    """Selections, decays of the learning rate and warm-ups must lie within schedule.epochs."""
    epochs, schedule, selection = recipe.schedule.epochs, recipe.schedule, recipe.selection
    events: list[tuple[str, float, str]] = [("selection.after", selection.after, "selection.after=0")]
    if selection.every:
        events.append(("selection.after + every", selection.after + selection.every, "selection.every=0"))
    if schedule.name == "step":
        events.append(("schedule.milestones", max(schedule.milestones, default=0), "schedule.milestones=[]"))
    if schedule.name == "exponential":
        events.append(("schedule.decay_epochs", schedule.decay_epochs, "schedule.name=constant"))
    for key, epoch, off in events:
        if epoch >= epochs:
            raise ValueError(
                f"{key} must be below schedule.epochs={epochs}, where training ends; got {epoch:g}: lower it, set"
                f" {off} or raise schedule.epochs"
            )
    for key, length in (
        ("schedule.warmup_epochs", schedule.warmup_epochs),
        ("loss.kd_warmup_epochs", recipe.loss.kd_warmup_epochs),
    ):
        if length > epochs:
            raise ValueError(
                f"{key} must be at most schedule.epochs={epochs}, where training ends; got {length:g}: lower it or"
                " raise schedule.epochs"
            )


def _check_features(recipe: Recipe) -> None:
    """Losses on features read inner layers: both networks must run, uncompiled, on one view of each sample."""
    if not recipe.features.method:
        return
    for key, value, off in (
        ("run.compile", recipe.run.compile, "off"),
        ("teacher.cache", recipe.teacher.cache, ""),
        ("teacher.answer_noise", recipe.teacher.answer_noise, 0.0),
        ("data.second_view", recipe.data.second_view, ""),
    ):
        if value != off:
            raise ValueError(f"features.method {recipe.features.method!r} needs {key}={off!r}; got {value!r}")


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the library."""
    return list(_builtin())


@functools.cache
def _builtin() -> dict[str, str]:
    """Their TOML texts by name."""
    texts = library_toml()
    del texts[ABLATIONS_FILE.removesuffix(".toml")]
    return texts


def load_recipe(source: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """The recipe in a TOML file, or the one of that name (lrds_fast.recipe.names), with `settings` on top.

    A file may say `extends = "other"`: a name, or a path relative to the file; the file's own values count. settings:
    "KEY=VALUE" with a dotted key ("loss.eta=0.5"); the value is TOML, and a bare word is a string. Raises ValueError
    for unknown keys, wrong types, impossible values and recipes that extend each other in a circle, FileNotFoundError
    for a missing file.
    """
    values = _load_mapping(str(source), base=None, seen=())
    values = overlay(values, parse_settings(settings))
    return from_mapping(values, where=str(source))


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """The values of "KEY=VALUE" strings, table by table. ValueError for another form."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"--set takes key=value, for example loss.eta=0.5; got {setting!r}")
        parsed[key] = _value(text.strip())
    return nested(parsed)


def _value(text: str) -> Any:
    """`text` as a TOML value; otherwise as a float (.5), otherwise as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def recipe_text(name: str) -> str:
    """The TOML text of a recipe that comes with the library."""
    if name not in builtin_recipes():
        near = difflib.get_close_matches(name, builtin_recipes(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "lrds-fast recipes lists them"
        raise ValueError(f"there is no recipe {name!r}; {hint}")
    return _builtin()[name]


def _load_mapping(source: str, base: Path | None, seen: tuple[str, ...]) -> dict[str, Any]:
    """The merged values of a recipe and of those it extends.

    base: the folder of the file that extends `source`, if a file does. seen: the recipes that extend it, from the first
    one on; a file by its path, because files of one name may lie in several folders.
    """
    path = Path(source) if base is None else base / source
    title = os.path.normpath(path) if source.endswith(".toml") else source
    if title in seen:
        raise ValueError(f"recipes extend each other in a circle: {' -> '.join([*seen, title])}")
    seen = (*seen, title)
    if grid.is_name(source):
        protocol = _load_mapping(grid.parent(source), None, seen)
        return overlay(protocol, grid.compose(source, protocol))
    if source.endswith(".toml"):
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no recipe file {path}; lrds-fast recipes lists those that come with the library"
            )
        text, folder = read_text(path, "recipe"), path.parent
    else:
        text, folder = recipe_text(source), None
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe {source} is not valid TOML: {error}") from error
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ValueError(f"recipe {source}: extends must be a name or a path; got {parent!r}")
    return overlay(_load_mapping(parent, folder, seen), values)


def read_text(path: Path, what: str) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark. Raises ValueError naming the first byte that is not
    UTF-8. what: the kind of file, for the error."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{what} {path} is not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}, in line"
            f" {line}; save it as UTF-8"
        ) from error


def from_mapping(values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """The recipe with these values, table by table. ValueError names `where`, the values' source, and the first wrong
    key or value."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must hold a recipe's tables; got {type(values).__name__}: the file is damaged")
    try:
        return Recipe(**{key: _table(key, value) for key, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _table(key: str, value: Any) -> Any:
    """The options of the table `key`; the value itself where `key` is no table."""
    if not key or key not in TABLES:
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be a table; got {value!r}")
    return TABLES[key](**value)
