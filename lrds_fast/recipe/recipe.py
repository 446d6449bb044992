"""Recipes: a training run as data. One TOML file, frozen dataclasses, and an error for everything unknown."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from lrds_fast import divergences
from lrds_fast.recipe import feature_methods
from lrds_fast.recipe import names as grid
from lrds_fast.recipe.checks import check_values

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class DataOptions:
    """What to train on; see lrds_fast.data.load.

    rand_augment: "" or RandAugment as timm names it, "m9-n2-mstd0.5". erasing: the probability of random erasing.
    mixup, cutmix: the alphas of what mixes two samples of a batch, 0 for none; mix_probability: how many batches are
    mixed. second_view "strong": samples come in a second, strongly augmented view as well, for loss.method "mlkd".
    first_label: the number of the first class in the files of "npz", "webdataset" and "tfrecord"; -1 means 1 for
    "tfrecord" and 0 for the others."""

    name: str = "digits"
    root: str = ""
    batch_size: int = 64
    eval_batch_size: int = 256
    val_fraction: float = 0.0
    split_seed: int = 0
    train_limit: int = 0
    test_limit: int = 0
    label_noise: float = 0.0
    augment: str = "none"
    image_size: int = 224
    workers: int = 0
    reader: str = "auto"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    rand_augment: str = ""
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    second_view: str = ""
    first_label: int = -1


@dataclass(frozen=True)
class TeacherOptions:
    """model "" trains without a teacher. checkpoint: any file of torch.save or safetensors that holds its weights.
    weights: "average" or "raw", which weights to load where the file has both kinds.
    amp: its precision, "" as run.amp has it. own_stream: on a GPU it runs beside the student's forward pass.
    answer_noise: that share of the training samples, by data.split_seed, gets the teacher's answer to another sample,
    as from a file whose rows were mixed up; for experiments. The teacher is then asked once about every sample, or
    cached.

    cache: a folder of the teacher's logits, which lrds-fast cache writes and training reads; "" runs the teacher.
    cache_views: how many augmented views of each sample it holds; epoch e trains on view e modulo that. cache_top_k:
    how many classes it keeps of each, the largest; 0 keeps all. cache_dtype: "float16" or "float32"."""

    model: str = ""
    checkpoint: str = ""
    weights: str = "average"
    amp: str = ""
    own_stream: bool = False
    answer_noise: float = 0.0
    cache: str = ""
    cache_views: int = 1
    cache_top_k: int = 0
    cache_dtype: str = "float16"


@dataclass(frozen=True)
class StudentOptions:
    """checkpoint: weights to start from, "" for fresh ones. weights: "average" or "raw", which weights to load
    where that file, or score.base, has both kinds."""

    model: str = "mlp"
    checkpoint: str = ""
    weights: str = "average"


@dataclass(frozen=True)
class LossOptions:
    """kd_loss's arguments; without a teacher only label_smoothing counts. revise "none" is no revision. temperatures:
    several at once, instead of temperature. divergence_options: the divergence's own parameters, such as alpha and beta
    of "dkd"; what is not given is as published. kd_warmup_epochs: kd_weight grows over so many epochs.
    ce_weight_unselected: left out or "none", kd_loss's default for ce_weight and the full kd_weight.
    revise_temperature: 1 unless set; "none" revises at the divergence's temperature, the published form.

    method "kd" is kd_loss; "dist", "mlkd" and "revision" put lrds_fast.dist_loss, mlkd_loss or revision_loss in its
    place (see lrds_fast.train.methods), and take no divergence. lambda1, lambda2: revision_loss's weights on right rows
    and on wrong rows; no other method has them."""

    temperature: float = 4.0
    temperatures: tuple[float, ...] = ()
    method: str = "kd"
    divergence: str = "kl"
    divergence_options: dict[str, float] = field(default_factory=dict)
    standardize: bool = False
    kd_warmup_epochs: int = 0
    ce_weight: float = 0.1
    kd_weight: float = 0.9
    ce_weight_unselected: float | None = None
    revise: str = "lr"
    eta: float = 0.8
    revise_temperature: float | None = divergences.REVISE_TEMPERATURE
    lambda1: float = 4.0
    lambda2: float = 1.0
    label_smoothing: float = 0.0

    def chosen_divergence(self) -> divergences.Divergence:
        """The divergence with its options; ValueError for an option that it has not, or a value out of its range."""
        default = divergences.resolve(self.divergence)
        known = [item.name for item in dataclasses.fields(default) if isinstance(getattr(default, item.name), float)]
        for name in self.divergence_options:
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise ValueError(f"loss.divergence_options.{name}: {self.divergence!r} has no such option; {has}")
        try:
            return dataclasses.replace(default, **self.divergence_options)
        except ValueError as error:
            raise ValueError(f"loss.divergence_options: {error}") from error


@dataclass(frozen=True)
class FeatureOptions:
    """A loss on features, added to that of [loss]; see lrds_fast.features.distillation. method "" is none. weight < 0:
    as published. student_layers, teacher_layers: module names, pair by pair; () is the method's usual ones.
    options: the method's own numbers; what is not given is as published."""

    method: str = ""
    weight: float = -1.0
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    options: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        feature_methods.check(self.method, self.weight, self.options, self.student_layers, self.teacher_layers)


@dataclass(frozen=True)
class SelectionOptions:
    """path: a file of lrds-fast select, "" for every sample. compose "prefix": batches bring selected samples first
    and the teacher sees these alone; "mask": it sees all, and the loss leaves the others out. The numbers are the same
    up to rounding.

    after > 0: when so many epochs are done the student is scored and the selection is made, and again every `every`
    epochs (0: once). by: the score, lower = keep the teacher; [score] says how it is computed. A sample loses its
    teacher where its score is above `confidence` standard errors; of all samples at most the share max_drop do, those
    with the highest scores. One of three rules may replace this one. ratio >= 0: this share keeps the teacher, the
    lowest scores. threshold: samples with a score below it keep the teacher. outliers: samples with a score more than
    so many robust standard deviations above the median lose it, at most max_drop of all. Scores other than kd_gain have
    no standard error and need one of the three. margin: samples that have the teacher lose it only beyond confidence +
    margin standard errors, ratio + margin, threshold + margin, or outliers + margin. per_class: ratio or max_drop in
    every class, not with outliers. by "set_shift": those are denied that together move the student the least
    (select_jointly); it takes a ratio."""

    path: str = ""
    compose: str = "prefix"
    after: int = 0
    every: int = 0
    by: str = "kd_gain"
    confidence: float = 2.0
    max_drop: float = 0.1
    ratio: float = -1.0
    threshold: float | None = None
    outliers: float | None = None
    margin: float = 0.0
    per_class: bool = False

    @property
    def by_confidence(self) -> bool:
        """Whether a sample is denied by its standard error, rather than by ratio, threshold or outliers."""
        return self.ratio < 0 and self.threshold is None and self.outliers is None


@dataclass(frozen=True)
class ScoreOptions:
    """What lrds-fast score computes; see lrds_fast.influence.last_layer_scores. base: the checkpoint of the student
    that is scored, "" for this recipe's own run. damping < 0: damping_scale counts."""

    scores: tuple[str, ...] = ("kd_gain", "teacher_correct")
    curvature: str = "ekfac"
    hessian: str = "objective"
    damping: float = -1.0
    damping_scale: float = 0.1
    base: str = ""


@dataclass(frozen=True)
class OptimizerOptions:
    """name "sgd" (momentum, nesterov), "adamw", or timm's "rmsprop" (TensorFlow's, with momentum) and "lamb"."""

    name: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class ScheduleOptions:
    """name "cosine" (to 0), "step" (x gamma after each milestone, in epochs), "exponential" (x gamma every
    decay_epochs) or "constant"; linear warm-up first."""

    name: str = "cosine"
    epochs: int = 30
    warmup_epochs: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    decay_epochs: float = 1.0


@dataclass(frozen=True)
class RunOptions:
    """device "auto" is CUDA where there is one. amp "off", "bf16" or "fp16"; on a CPU without instructions for the
    16-bit type it falls back to "off", unless amp_emulated is set. ema_decay 0 is off. out "" is runs/NAME.
    save_every: epochs between checkpoints; the last epoch always has one. save_every_steps: also within an epoch, 0 is
    off. compile: torch.compile's mode for student and teacher, or "off". accumulate: parts that a batch is computed in.
    timeout: seconds that a process waits for the others. tensorboard: events are written where it is installed. wandb:
    the project to log to, "" is off."""

    out: str = ""
    device: str = "auto"
    amp: str = "off"
    amp_emulated: bool = False
    channels_last: bool = False
    ema_decay: float = 0.0
    clip_grad_norm: float = 0.0
    accumulate: int = 1
    compile: str = "off"
    save_every: int = 1
    save_every_steps: int = 0
    timeout: float = 600.0
    tensorboard: bool = True
    wandb: str = ""


@dataclass(frozen=True)
class Recipe:
    """One training run. Every value has a default; every key is checked."""

    name: str = "run"
    description: str = ""
    seed: int = 0
    data: DataOptions = field(default_factory=DataOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    student: StudentOptions = field(default_factory=StudentOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    features: FeatureOptions = field(default_factory=FeatureOptions)
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    score: ScoreOptions = field(default_factory=ScoreOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.run.out or f"runs/{self.name}")

    def with_values(self, **values: Any) -> Recipe:
        """A copy with some values replaced, by dotted name: with_values(seed=1, **{"loss.eta": 0.5})."""
        return from_mapping(_overlay(dataclasses.asdict(self), _nested(values)), where=self.name)

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


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the library."""
    return sorted(_builtin())


@functools.cache
def _builtin() -> dict[str, str]:
    """Their texts by name."""
    files = [entry for entry in resources.files("lrds_fast.recipes").iterdir() if entry.name.endswith(".toml")]
    return {entry.name[:-5]: entry.read_text(encoding="utf-8") for entry in files}


def load_recipe(source: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """The recipe in a TOML file, or the one of that name (lrds_fast.recipe.names), with
    `key=value` settings on top.

    A file may say `extends = "other"`: a name, or a path relative to the file; its own values win. Keys in settings are
    dotted ("loss.eta=0.5"); values are TOML, and a bare word is a string. Raises ValueError for unknown keys, values of
    another type and circles, FileNotFoundError for a missing file.
    """
    values = _load_mapping(str(source), base=None, seen=())
    values = _overlay(values, parse_settings(settings))
    return from_mapping(values, where=str(source))


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Nested mapping of `key=value` strings."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"--set takes key=value, for example loss.eta=0.5; got {setting!r}")
        parsed[key] = _value(text.strip())
    return _nested(parsed)


def _value(text: str) -> Any:
    """A TOML value; what TOML does not know but float() does (.5) is a number, anything else a string."""
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
    """The merged values of a recipe and of those it extends."""
    if source in seen:
        raise ValueError(f"recipes extend each other in a circle: {' -> '.join([*seen, source])}")
    if grid.is_name(source):
        protocol = _load_mapping(grid.parent(source), None, (*seen, source))
        return _overlay(protocol, grid.compose(source, protocol))
    if source.endswith(".toml"):
        path = Path(source) if base is None else base / source
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
    return _overlay(_load_mapping(parent, folder, (*seen, source)), values)


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
    """A Recipe of nested plain values; ValueError names the first key or value that does not fit."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must hold a recipe's tables; got {type(values).__name__}: the file is damaged")
    recipe: Recipe = _build(Recipe, values, prefix="", where=where)
    return recipe


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """A dataclass's types by field; working them out takes longer than the rest of a recipe."""
    return typing.get_type_hints(cls)


def _build(cls: Any, values: Mapping[str, Any], *, prefix: str, where: str) -> Any:
    hints = _hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in hints:
            raise ValueError(f"{where}: unknown key {full!r}; {_nearest(full, prefix, list(hints))}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: {full} must be a table; got {value!r}")
            arguments[key] = _build(hint, value, prefix=f"{full}.", where=where)
        else:
            arguments[key] = _typed(value, hint, full, where)
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _nearest(full: str, prefix: str, keys: list[str]) -> str:
    everything = all_keys()
    by_last = {key.rpartition(".")[2]: key for key in everything}
    last = full.rpartition(".")[2]
    near = [by_last[last]] if last in by_last else []
    near = near or difflib.get_close_matches(full, [prefix + key for key in keys], n=1)
    near = near or difflib.get_close_matches(full, everything, n=1)
    near = near or [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1)]
    return f"did you mean {near[0]!r}?" if near else f"valid keys here: {', '.join(prefix + key for key in keys)}"


def all_keys() -> list[str]:
    """Every key of a recipe, dotted."""
    keys = []
    for name, hint in _hints(Recipe).items():
        if dataclasses.is_dataclass(hint):
            keys += [f"{name}.{inner.name}" for inner in dataclasses.fields(hint)]
        else:
            keys.append(name)
    return keys


def _typed(value: Any, hint: Any, key: str, where: str) -> Any:
    """`value` as the field's type: an integer may stand for a float, a list for a tuple, nothing else for another.
    Where the type has None, "none" is None as well: TOML has no such value."""
    if isinstance(hint, types.UnionType):
        if value is None or value == "none":
            return None
        hint = typing.get_args(hint)[0]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(hint) is dict:
        inner = typing.get_args(hint)[1]
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: {key} must be a table; got {value!r}")
        return {name: _typed(item, inner, f"{key}.{name}", where) for name, item in value.items()}
    if isinstance(hint, types.GenericAlias):
        inner = typing.get_args(hint)[0]
        if isinstance(value, (list, tuple)):
            return tuple(_typed(item, inner, key, where) for item in value)
        raise ValueError(f"{where}: {key} must be a list of {inner.__name__}; got {value!r}")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where}: {key} must be {hint.__name__}; got {value!r} ({type(value).__name__})")
    return value


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *tables, last = key.split(".")
        table = nested
        for name in tables:
            inner = table.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key!r} names a value inside {name!r}, which is itself set to a value")
            table = inner
        table[last] = value
    return nested


def _overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """base with top's values, table by table."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _overlay(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
