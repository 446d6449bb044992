"""The options of a recipe: one class per table of its file, one field per key.

A key's type, default, range or choices and description are written here, once. Errors, `lrds-fast train --help`, the
table in docs/training.md and the JSON schema for editors are made from these fields. A rule between keys of one table
is a check of that table's class; a rule between tables is in lrds_fast.recipe.recipe.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from lrds_fast import divergences
from lrds_fast.recipe import feature_methods
from lrds_fast.recipe.errors import checked
from lrds_fast.recipe.rand_augment import parse_rand_augment

#: No conversion between types, except that an int may stand for a float.
STRICT = ConfigDict(strict=True, extra="forbid")

_T = TypeVar("_T")


def about(description: str) -> Any:
    """A key's one-line description."""
    return Field(description=description)


def _tuple_of_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _none_of_word(value: Any) -> Any:
    return None if value == "none" else value


Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Positive: TypeAlias = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Share: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]
ShareBelowOne: TypeAlias = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt: TypeAlias = Annotated[int, Field(gt=0)]
NotNegativeInt: TypeAlias = Annotated[int, Field(ge=0)]
#: TOML and JSON have lists, a frozen object has tuples.
List: TypeAlias = Annotated[tuple[_T, ...], BeforeValidator(_tuple_of_list)]
#: TOML has no null: "none" stands for it.
OrNone: TypeAlias = Annotated[_T | None, BeforeValidator(_none_of_word)]

Precision: TypeAlias = Literal["off", "bf16", "fp16"]
Weights: TypeAlias = Literal["average", "raw"]
if TYPE_CHECKING:
    DivergenceName: TypeAlias = str
else:
    DivergenceName = Literal[divergences.NAMES]


@checked("data")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataOptions:
    """What to train on; see lrds_fast.data.load."""

    name: Annotated[str, about("digits, two_digit_numbers, cifar100, cifar10, npz, folder, webdataset or tfrecord")] = (
        "digits"
    )
    root: Annotated[str, about("folder of the data set; for npz its file")] = ""
    batch_size: Annotated[PositiveInt, about("samples of one optimizer step, over all processes")] = 64
    eval_batch_size: Annotated[PositiveInt, about("samples of one forward pass in evaluation and scoring")] = 256
    val_fraction: Annotated[ShareBelowOne, about("share of the training samples that is held out")] = 0.0
    split_seed: Annotated[int, about("seed of the held-out split, of label_noise and of teacher.answer_noise")] = 0
    train_limit: Annotated[NotNegativeInt, about("number of training samples to keep; 0: all")] = 0
    test_limit: Annotated[NotNegativeInt, about("number of test samples to keep; 0: all")] = 0
    label_noise: Annotated[ShareBelowOne, about("share of the training labels to replace by another class")] = 0.0
    augment: Annotated[str, about("none or crop-flip; data in memory: also shift")] = "none"
    image_size: Annotated[PositiveInt, about("height and width of decoded pictures, in pixels")] = 224
    workers: Annotated[NotNegativeInt, about("processes (torchvision) or threads (DALI) that decode")] = 0
    reader: Annotated[Literal["auto", "dali", "torchvision"], about("decoder; auto: DALI if installed")] = "auto"
    mean: Annotated[List[Finite], about("mean per channel, for data in memory; empty: the data set's")] = ()
    std: Annotated[
        List[Positive], about("standard deviation per channel, for data in memory; empty: the data set's")
    ] = ()
    rand_augment: Annotated[str, about("RandAugment policy as timm names it, such as m9-n2-mstd0.5; empty: off")] = ""
    erasing: Annotated[Share, about("probability of random erasing")] = 0.0
    mixup: Annotated[NotNegative, about("alpha of MixUp; 0: off")] = 0.0
    cutmix: Annotated[NotNegative, about("alpha of CutMix; 0: off")] = 0.0
    mix_probability: Annotated[Share, about("probability that a batch is mixed")] = 1.0
    second_view: Annotated[
        Literal["", "strong"], about("strong: a second, strongly augmented view of every sample, for loss.method mlkd")
    ] = ""
    first_label: Annotated[
        int,
        Field(ge=-1),
        about("number of the first class in npz, webdataset and tfrecord files; -1: 1 for tfrecord, 0 for the others"),
    ] = -1

    def __post_init__(self) -> None:
        if self.rand_augment:
            parse_rand_augment(self.rand_augment)
        if self.second_view and self.mixes:
            raise ValueError(
                "data.second_view cannot be combined with data.mixup or data.cutmix: set it to '' or both to 0"
            )

    @property
    def augments(self) -> bool:
        """Whether a sample looks different in another epoch."""
        return bool(self.augment != "none" or self.rand_augment or self.erasing or self.mixes)

    @property
    def mixes(self) -> bool:
        """Whether samples of a batch are mixed."""
        return bool(self.mixup or self.cutmix)


@checked("teacher")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeacherOptions:
    """The network that teaches, or its cached logits."""

    model: Annotated[str, about("name of the network; empty: the student learns from labels alone")] = ""
    checkpoint: Annotated[str, about("file of torch.save or safetensors with the teacher's weights")] = ""
    weights: Annotated[Weights, about("weights to load where the file has both averaged and raw ones")] = "average"
    amp: Annotated[Literal["", "off", "bf16", "fp16"], about("precision of the teacher; empty: that of run.amp")] = ""
    own_stream: Annotated[bool, about("on a GPU, run the teacher in a stream beside the student's")] = False
    answer_noise: Annotated[
        ShareBelowOne, about("share of the samples that get the teacher's logits of another sample, for experiments")
    ] = 0.0
    cache: Annotated[str, about("folder of logits that lrds-fast cache wrote; empty: run the network")] = ""
    cache_views: Annotated[PositiveInt, about("augmented views per sample; epoch e trains on view e % cache_views")] = 1
    cache_top_k: Annotated[NotNegativeInt, about("number of largest logits to store per sample; 0: all")] = 0
    cache_dtype: Annotated[Literal["float16", "float32"], about("type of the cached logits")] = "float16"

    def __post_init__(self) -> None:
        if self.cache and not self.model:
            raise ValueError(f"teacher.cache is {self.cache!r}, but teacher.model, whose logits it holds, is empty")
        if self.answer_noise and not self.model:
            raise ValueError(f"teacher.answer_noise is {self.answer_noise}, but there is no teacher; set teacher.model")


@checked("student")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class StudentOptions:
    """The network that is trained."""

    model: Annotated[str, about("name of the network; also torchvision:NAME and timm:NAME")] = "mlp"
    checkpoint: Annotated[str, about("file of weights to start from; empty: random ones")] = ""
    weights: Annotated[
        Weights, about("weights to load where student.checkpoint or score.base has both averaged and raw ones")
    ] = "average"


@checked("loss")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossOptions:
    """The arguments of lrds_fast.kd_loss, dist_loss, mlkd_loss or revision_loss. Without a teacher only label_smoothing
    counts."""

    temperature: Annotated[Positive, about("temperature T of the divergence")] = 4.0
    temperatures: Annotated[List[Positive], about("several temperatures at once, in place of temperature")] = ()
    method: Annotated[
        Literal["kd", "dist", "mlkd", "revision"],
        about("loss function: kd_loss, dist_loss, mlkd_loss or revision_loss"),
    ] = "kd"
    divergence: Annotated[DivergenceName, about("divergence between teacher and student, for method kd")] = "kl"
    divergence_options: Annotated[
        dict[str, float], about("the divergence's own parameters, such as beta of dkd; left out: as published")
    ] = dataclasses.field(default_factory=dict)
    standardize: Annotated[bool, about("standardize the logits of each row (logit standardization)")] = False
    kd_warmup_epochs: Annotated[NotNegativeInt, about("epochs over which kd_weight grows to its value")] = 0
    ce_weight: Annotated[NotNegative, about("weight of the cross-entropy")] = 0.1
    ce_weight_end: Annotated[
        OrNone[Positive],
        about("weight of the cross-entropy at the end, which ce_weight approaches exponentially; none: it is constant"),
    ] = None
    kd_weight: Annotated[NotNegative, about("weight of the distillation term")] = 0.9
    ce_weight_unselected: Annotated[
        OrNone[NotNegative], about("weight of the cross-entropy of unselected samples; none: kd_loss's default")
    ] = None
    revise: Annotated[
        Literal["lr", "mft", "swap", "none"],
        about("revision of the teacher where it is wrong, with mft also where it is right; none: off"),
    ] = "lr"
    eta: Annotated[float, Field(gt=0.0, lt=1.0), about("the revised label exceeds the next class by 1 - eta")] = 0.8
    revise_temperature: Annotated[
        OrNone[Positive],
        about("temperature at which the teacher is revised; none: that of the divergence, as published"),
    ] = divergences.REVISE_TEMPERATURE
    lambda1: Annotated[NotNegative, about("weight of the rows where the teacher is right, for method revision")] = 4.0
    lambda2: Annotated[NotNegative, about("weight of the rows where the teacher is wrong, for method revision")] = 1.0
    label_smoothing: Annotated[ShareBelowOne, about("label smoothing of the cross-entropy")] = 0.0

    def __post_init__(self) -> None:
        self.chosen_divergence()
        if self.ce_weight_end is not None and not self.ce_weight > 0:
            raise ValueError(
                f"loss.ce_weight must be above 0, because it changes by a factor to loss.ce_weight_end ="
                f" {self.ce_weight_end:g}; got {self.ce_weight:g}; set it, or leave out loss.ce_weight_end"
            )
        if self.method == "kd":
            return
        if self.divergence != "kl" or self.standardize:
            raise ValueError(f"loss.method {self.method!r} takes no divergence and no standardize; use method 'kd'")
        if self.method in ("dist", "revision") and self.temperatures:
            raise ValueError(f"loss.method {self.method!r} takes one temperature; got loss.temperatures")
        if self.revise not in ("lr", "none"):
            raise ValueError(f"loss.method {self.method!r} takes loss.revise 'lr' or 'none'")
        if self.method == "revision" and self.revise != "lr":
            raise ValueError("loss.method 'revision' is label revision: it takes loss.revise 'lr'")
        if self.method == "revision":
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for key in ("temperature", "ce_weight_end", "revise_temperature", "label_smoothing"):
                if getattr(self, key) != defaults[key]:
                    raise ValueError(
                        f"loss.method 'revision' takes no {key}; got {getattr(self, key)!r}: leave out loss.{key}, or"
                        " use method 'kd'"
                    )

    def chosen_divergence(self) -> divergences.Divergence:
        """The divergence with divergence_options. ValueError for an unknown option or a value out of its range."""
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

    def needs_all_classes(self) -> str:
        """The first key, with its value, that needs the teacher's logits of all classes; "" where none does."""
        if self.method != "kd":
            return f"loss.method={self.method}"
        if self.divergence == "mse_logits":
            return f"loss.divergence={self.divergence}"
        return "loss.temperatures" if self.temperatures else "loss.standardize" if self.standardize else ""


@checked("features")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class FeatureOptions:
    """A loss on features, added to that of [loss]; see lrds_fast.features.distillation."""

    method: Annotated[str, about(f"{', '.join(feature_methods.METHODS)}; empty: off")] = ""
    weight: Annotated[float, about("weight of the loss on features; below 0: as published")] = -1.0
    student_layers: Annotated[List[str], about("modules of the student, pair by pair; empty: the default ones")] = ()
    teacher_layers: Annotated[List[str], about("modules of the teacher, pair by pair; empty: the default ones")] = ()
    options: Annotated[
        dict[str, float], about("the method's own numbers, such as negatives of crd; left out: as published")
    ] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        feature_methods.check(self.method, self.weight, self.options, self.student_layers, self.teacher_layers)


@checked("selection")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectionOptions:
    """Which samples keep the teacher: those of a file, or those that the training student's scores say.

    Where training selects (after > 0), a sample loses its teacher if its score is above `confidence` standard errors,
    and at most the share max_drop does, the highest scores first. ratio, threshold or outliers may replace this rule;
    scores other than teacher_harm and kd_gain have no standard error and need one of the three.
    """

    path: Annotated[str, about("file that lrds-fast select wrote; empty: every sample keeps the teacher")] = ""
    compose: Annotated[
        Literal["prefix", "mask"],
        about("prefix: the teacher runs on selected samples only; mask: on all, and the loss leaves the others out"),
    ] = "prefix"
    after: Annotated[NotNegativeInt, about("epochs before the first scoring and selection; 0: never")] = 0
    every: Annotated[NotNegativeInt, about("epochs between further selections; 0: select once")] = 0
    by: Annotated[str, about("score to select by; a low score keeps the teacher")] = "teacher_harm"
    confidence: Annotated[
        NotNegative, about("number of standard errors above 0 beyond which a score denies the teacher")
    ] = 4.0
    max_drop: Annotated[
        Share, about("largest share of the samples that lose the teacher, by confidence or outliers")
    ] = 0.1
    ratio: Annotated[float, Field(le=1.0), about("share of the samples that keep the teacher; below 0: off")] = -1.0
    threshold: Annotated[OrNone[float], about("score below which samples keep the teacher; none: off")] = None
    outliers: Annotated[
        OrNone[NotNegative],
        about(
            "number of robust standard deviations above the median beyond which a score denies the teacher; none: off"
        ),
    ] = None
    margin: Annotated[
        NotNegative, about("hysteresis: a sample that has the teacher loses it only beyond the limit + margin")
    ] = 0.0
    per_class: Annotated[bool, about("apply ratio or max_drop within every class")] = False

    def __post_init__(self) -> None:
        if self.every and not self.after:
            raise ValueError(
                "selection.every needs selection.after, the epochs before the first scoring, to be above 0"
            )
        self._check_rule()
        given = {
            "ratio": self.ratio >= 0,
            "threshold": self.threshold is not None,
            "outliers": self.outliers is not None,
        }
        for key, is_given in given.items():
            if is_given and not self.after:
                raise ValueError(
                    f"selection.{key} needs selection.after, the epochs before the first scoring, to be above 0; got"
                    f" {getattr(self, key)!r}: set selection.after, or leave out selection.{key}"
                )
        if self.by_confidence and self.after and self.by not in ("teacher_harm", "kd_gain", "set_shift"):
            raise ValueError(
                f"selection.by = {self.by!r} has no standard error, which selection.confidence needs: set"
                " selection.ratio, selection.threshold or selection.outliers"
            )
        if self.per_class and self.after and not (self.by_confidence or self.ratio >= 0):
            raise ValueError(
                "selection.per_class needs a share of every class: selection.ratio, or confidence and max_drop"
            )
        if self.by == "set_shift" and self.after and (self.ratio < 0 or self.margin):
            raise ValueError(
                "selection.by = 'set_shift' chooses a share of the samples together: set selection.ratio, no margin"
            )

    def _check_rule(self) -> None:
        """At most one of ratio, threshold and outliers."""
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError('selection.threshold must be a number, or "none"; got nan')
        if self.ratio >= 0 and self.threshold is not None:
            raise ValueError(
                f"selection.ratio and selection.threshold exclude each other; got {self.ratio} and {self.threshold}:"
                " leave one of them out"
            )
        if self.outliers is not None and (self.ratio >= 0 or self.threshold is not None):
            raise ValueError(
                f"selection.outliers excludes selection.ratio and selection.threshold; got {self.outliers},"
                f" {self.ratio} and {self.threshold}: leave the others out"
            )

    @property
    def by_confidence(self) -> bool:
        """Whether a sample is denied by its standard error, rather than by ratio, threshold or outliers."""
        return self.ratio < 0 and self.threshold is None and self.outliers is None


@checked("score")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScoreOptions:
    """What lrds-fast score computes; see lrds_fast.influence.last_layer_scores."""

    scores: Annotated[List[str], about("scores to compute")] = ("teacher_harm", "kd_gain", "teacher_correct")
    curvature: Annotated[
        Literal["identity", "kfac", "ekfac", "exact"], about("approximation of the Hessian in the influence functions")
    ] = "ekfac"
    hessian: Annotated[
        Literal["objective", "gt"],
        about("loss whose Hessian it is; objective: the recipe's, gt: cross-entropy with the label"),
    ] = "objective"
    damping: Annotated[Finite, about("damping of the Hessian; below 0: damping_scale x the mean eigenvalue")] = -1.0
    damping_scale: Annotated[NotNegative, about("damping as a share of the mean eigenvalue")] = 0.1
    base: Annotated[str, about("checkpoint of the student to score; empty: that of this recipe's run")] = ""


@checked("optimizer")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerOptions:
    """How weights are updated."""

    name: Annotated[
        Literal["sgd", "adamw", "rmsprop", "lamb"],
        about("optimizer; rmsprop (as in TensorFlow) and lamb are from timm"),
    ] = "sgd"
    lr: Annotated[Positive, about("learning rate")] = 0.05
    momentum: Annotated[NotNegative, about("momentum, for sgd and rmsprop")] = 0.9
    nesterov: Annotated[bool, about("Nesterov momentum, for sgd")] = False
    weight_decay: Annotated[NotNegative, about("weight decay")] = 5e-4


@checked("schedule")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScheduleOptions:
    """The length of training, and the learning rate over it."""

    name: Annotated[
        Literal["cosine", "step", "exponential", "constant"],
        about(
            "learning rate; cosine: to 0, step: x gamma after each milestone, exponential: x gamma every decay_epochs"
        ),
    ] = "cosine"
    epochs: Annotated[PositiveInt, about("length of training, in epochs")] = 30
    warmup_epochs: Annotated[NotNegative, about("epochs of linear warm-up")] = 0.0
    milestones: Annotated[List[PositiveInt], about("epochs after which the learning rate is multiplied by gamma")] = ()
    gamma: Annotated[Positive, about("factor, for step and exponential")] = 0.1
    decay_epochs: Annotated[Positive, about("epochs between two multiplications, for exponential")] = 1.0


@checked("run")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunOptions:
    """Where and how training runs."""

    out: Annotated[str, about("folder of the run; empty: runs/NAME")] = ""
    device: Annotated[str, about("auto (CUDA where there is one), cpu, cuda or cuda:N")] = "auto"
    amp: Annotated[
        Precision, about("precision of the forward pass; off, or a CPU without 16-bit instructions: float32")
    ] = "off"
    amp_emulated: Annotated[bool, about("keep the 16-bit type on a CPU without instructions for it")] = False
    channels_last: Annotated[bool, about("memory format NHWC")] = False
    ema_decay: Annotated[ShareBelowOne, about("decay of the moving average of the weights; 0: off")] = 0.0
    clip_grad_norm: Annotated[NotNegative, about("largest norm of the gradient; 0: off")] = 0.0
    accumulate: Annotated[PositiveInt, about("micro-batches per optimizer step")] = 1
    compile: Annotated[
        Literal["off", "default", "reduce-overhead", "max-autotune"], about("mode of torch.compile; off: not compiled")
    ] = "off"
    save_every: Annotated[PositiveInt, about("epochs between checkpoints; the last epoch always has one")] = 1
    save_every_steps: Annotated[NotNegativeInt, about("steps between checkpoints within an epoch; 0: off")] = 0
    timeout: Annotated[Positive, about("seconds that a process waits for the others")] = 600.0
    tensorboard: Annotated[bool, about("write TensorBoard events where it is installed")] = True
    wandb: Annotated[str, about("project of W&B to log to; empty: off")] = ""

    def __post_init__(self) -> None:
        if self.compile not in ("off", "default") and self.accumulate > 1:
            raise ValueError(
                f"run.compile {self.compile!r} uses CUDA graphs, which cannot accumulate gradients over micro-batches:"
                f" set run.accumulate to 1, or run.compile to 'default'; got {self.accumulate}"
            )
