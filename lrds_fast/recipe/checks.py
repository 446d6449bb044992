"""What values a recipe's keys take, alone and together."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lrds_fast import divergences
from lrds_fast.recipe.rand_augment import parse_rand_augment

if TYPE_CHECKING:
    from lrds_fast.recipe.recipe import LossOptions, Recipe, SelectionOptions, TeacherOptions

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "data.reader": ("auto", "dali", "torchvision"),
    "teacher.cache_dtype": ("float16", "float32"),
    "data.second_view": ("", "strong"),
    "loss.revise": ("lr", "mft", "swap", "none"),
    "loss.method": ("kd", "dist", "mlkd", "revision"),
    "loss.divergence": divergences.NAMES,
    "selection.compose": ("prefix", "mask"),
    "score.hessian": ("objective", "gt"),
    "score.curvature": ("identity", "kfac", "ekfac", "exact"),
    "optimizer.name": ("sgd", "adamw", "rmsprop", "lamb"),
    "schedule.name": ("cosine", "step", "exponential", "constant"),
    "run.amp": ("off", "bf16", "fp16"),
    "run.compile": ("off", "default", "reduce-overhead", "max-autotune"),
    "teacher.amp": ("", "off", "bf16", "fp16"),
    "teacher.weights": ("average", "raw"),
    "student.weights": ("average", "raw"),
}


def check_values(recipe: Recipe) -> None:
    """Raises ValueError naming the key whose value is none of a recipe's, or does not go with another one."""
    for key, choices in _CHOICES.items():
        table, _, name = key.partition(".")
        value = getattr(getattr(recipe, table), name)
        if value not in choices:
            named = ", ".join(choice or repr(choice) for choice in choices)
            raise ValueError(f"{key} must be one of {named}; got {value!r}")
    if not recipe.run.out and not os.path.normpath(f"runs/{recipe.name.strip()}").startswith(f"runs{os.sep}"):
        raise ValueError(f"name must be a folder name, for runs/NAME; got {recipe.name!r}: set name or run.out")
    positive = {
        "data.batch_size": recipe.data.batch_size,
        "data.eval_batch_size": recipe.data.eval_batch_size,
        "data.image_size": recipe.data.image_size,
        "run.save_every": recipe.run.save_every,
        "run.accumulate": recipe.run.accumulate,
        "run.timeout": recipe.run.timeout,
        "teacher.cache_views": recipe.teacher.cache_views,
        "schedule.epochs": recipe.schedule.epochs,
        "optimizer.lr": recipe.optimizer.lr,
        "schedule.decay_epochs": recipe.schedule.decay_epochs,
        "loss.temperature": recipe.loss.temperature,
    }
    for key, number in positive.items():
        if not 0 < number < float("inf"):
            raise ValueError(f"{key} must be above 0 and finite; got {number}")
    at_least_zero = {
        "data.workers": recipe.data.workers,
        "teacher.cache_top_k": recipe.teacher.cache_top_k,
        "data.train_limit": recipe.data.train_limit,
        "data.test_limit": recipe.data.test_limit,
        "data.mixup": recipe.data.mixup,
        "data.cutmix": recipe.data.cutmix,
        "loss.ce_weight": recipe.loss.ce_weight,
        "loss.kd_weight": recipe.loss.kd_weight,
        "loss.ce_weight_unselected": recipe.loss.ce_weight_unselected or 0.0,
        "loss.lambda1": recipe.loss.lambda1,
        "loss.lambda2": recipe.loss.lambda2,
        "optimizer.momentum": recipe.optimizer.momentum,
        "optimizer.weight_decay": recipe.optimizer.weight_decay,
        "schedule.warmup_epochs": recipe.schedule.warmup_epochs,
        "run.clip_grad_norm": recipe.run.clip_grad_norm,
        "run.save_every_steps": recipe.run.save_every_steps,
        "loss.kd_warmup_epochs": recipe.loss.kd_warmup_epochs,
        "selection.after": recipe.selection.after,
        "selection.every": recipe.selection.every,
        "selection.margin": recipe.selection.margin,
        "selection.confidence": recipe.selection.confidence,
    }
    for key, number in at_least_zero.items():
        if not 0 <= number < float("inf"):
            raise ValueError(f"{key} must be at least 0 and finite; got {number}")
    for key, number in {
        "data.val_fraction": recipe.data.val_fraction,
        "data.label_noise": recipe.data.label_noise,
        "teacher.answer_noise": recipe.teacher.answer_noise,
        "loss.label_smoothing": recipe.loss.label_smoothing,
        "run.ema_decay": recipe.run.ema_decay,
    }.items():
        if not 0 <= number < 1:
            raise ValueError(f"{key} must be in [0, 1); got {number}")
    _check_cache(recipe.teacher, recipe.loss)
    for key, given in (
        ("data.mixup", recipe.data.mixup),
        ("data.cutmix", recipe.data.cutmix),
        ("data.second_view", recipe.data.second_view),
    ):
        stored = "cache" if recipe.teacher.cache else "answer_noise" if recipe.teacher.answer_noise else ""
        if stored and given:
            raise ValueError(f"teacher.{stored} takes answers to single pictures: it goes without {key}; got {given!r}")
    for key, number in {
        "data.erasing": recipe.data.erasing,
        "data.mix_probability": recipe.data.mix_probability,
        "selection.max_drop": recipe.selection.max_drop,
    }.items():
        if not 0 <= number <= 1:
            raise ValueError(f"{key} must be in [0, 1]; got {number}")
    if recipe.data.rand_augment:
        parse_rand_augment(recipe.data.rand_augment)
    if recipe.data.second_view and recipe.loss.method != "mlkd":
        raise ValueError(f"data.second_view is for loss.method 'mlkd'; got {recipe.loss.method!r}: set it to ''")
    if recipe.data.second_view and (recipe.data.mixup or recipe.data.cutmix):
        raise ValueError("data.second_view goes without data.mixup and data.cutmix: set one of them to none")
    if (recipe.data.mixup or recipe.data.cutmix) and recipe.loss.method in ("mlkd", "revision"):
        raise ValueError(
            f"loss.method {recipe.loss.method!r} takes class numbers: it goes without data.mixup and data.cutmix"
        )
    if (recipe.data.mixup or recipe.data.cutmix) and recipe.loss.revise in ("mft", "swap"):
        raise ValueError(f"loss.revise {recipe.loss.revise!r} takes class numbers: with data.mixup or cutmix use 'lr'")
    if recipe.run.compile not in ("off", "default") and recipe.run.accumulate > 1:
        raise ValueError(
            f"run.compile {recipe.run.compile!r} uses CUDA graphs, which keep no gradient of a batch's earlier parts:"
            f" set run.accumulate to 1, or run.compile to 'default'; got {recipe.run.accumulate}"
        )
    _check_epochs(recipe)
    _check_answer_noise(recipe)
    _check_features(recipe)
    recipe.loss.chosen_divergence()
    if recipe.loss.method != "kd" and (recipe.loss.divergence != "kl" or recipe.loss.standardize):
        raise ValueError(f"loss.method {recipe.loss.method!r} takes no divergence and no standardize; use method 'kd'")
    if recipe.loss.method in ("dist", "revision") and recipe.loss.temperatures:
        raise ValueError(f"loss.method {recipe.loss.method!r} takes one temperature; got loss.temperatures")
    if recipe.loss.method != "kd" and recipe.loss.revise not in ("lr", "none"):
        raise ValueError(f"loss.method {recipe.loss.method!r} takes loss.revise 'lr' or 'none'")
    if recipe.loss.method == "revision" and recipe.loss.revise != "lr":
        raise ValueError("loss.method 'revision' is label revision: it takes loss.revise 'lr'")
    if any(not 0 < t < float("inf") for t in recipe.loss.temperatures):
        raise ValueError(f"loss.temperatures must be above 0 and finite; got {recipe.loss.temperatures}")
    if recipe.selection.every and not recipe.selection.after:
        raise ValueError("selection.every needs selection.after, the epochs before the first scoring, to be above 0")
    _check_selection(recipe.selection)
    if recipe.selection.by == "set_shift" and (recipe.selection.ratio < 0 or recipe.selection.margin):
        raise ValueError(
            "selection.by = 'set_shift' chooses a share of the samples together: set selection.ratio, no margin"
        )
    if recipe.selection.by == "set_shift" and recipe.score.curvature == "exact":
        raise ValueError("selection.by = 'set_shift' takes score.curvature 'identity', 'kfac' or 'ekfac'; got 'exact'")
    if not 0 < recipe.loss.eta < 1:
        raise ValueError(f"loss.eta must be in (0, 1); got {recipe.loss.eta}")
    revise_temperature = recipe.loss.revise_temperature
    if revise_temperature is not None and not 0 < revise_temperature < math.inf:
        raise ValueError(
            'loss.revise_temperature must be above 0 and finite, or "none" for the temperature of the divergence; got'
            f" {revise_temperature}"
        )


def _check_selection(options: SelectionOptions) -> None:
    """How a selection that is made while training chooses: by confidence, a ratio, a threshold or outliers."""
    if not options.ratio <= 1:
        raise ValueError(f"selection.ratio must be at most 1, or below 0 for no ratio; got {options.ratio}")
    if options.threshold is not None and math.isnan(options.threshold):
        raise ValueError('selection.threshold must be a number, or "none"; got nan')
    if options.ratio >= 0 and options.threshold is not None:
        raise ValueError(
            f"selection.ratio and selection.threshold exclude each other; got {options.ratio} and {options.threshold}:"
            " leave one of them out"
        )
    if options.outliers is not None and not 0 <= options.outliers < math.inf:
        raise ValueError(f'selection.outliers must be at least 0 and finite, or "none"; got {options.outliers}')
    if options.outliers is not None and (options.ratio >= 0 or options.threshold is not None):
        raise ValueError(
            f"selection.outliers excludes selection.ratio and selection.threshold; got {options.outliers},"
            f" {options.ratio} and {options.threshold}: leave the others out"
        )
    if options.by_confidence and options.after and options.by not in ("kd_gain", "set_shift"):
        raise ValueError(
            f"selection.by = {options.by!r} has no standard error, which selection.confidence needs: set"
            " selection.ratio, selection.threshold or selection.outliers"
        )
    if options.per_class and options.after and not (options.by_confidence or options.ratio >= 0):
        raise ValueError(
            "selection.per_class needs a share of every class: selection.ratio, or confidence and max_drop"
        )


def _check_epochs(recipe: Recipe) -> None:
    """Every epoch at which something happens must come before the end of training."""
    epochs, schedule, selection = recipe.schedule.epochs, recipe.schedule, recipe.selection
    happens: list[tuple[str, float, str]] = [("selection.after", selection.after, "selection.after=0")]
    if selection.every:
        happens.append(("selection.after + every", selection.after + selection.every, "selection.every=0"))
    if schedule.name == "step":
        happens.append(("schedule.milestones", max(schedule.milestones, default=0), "schedule.milestones=[]"))
    if schedule.name == "exponential":
        happens.append(("schedule.decay_epochs", schedule.decay_epochs, "schedule.name=constant"))
    for key, epoch, none in happens:
        if epoch >= epochs:
            raise ValueError(
                f"{key} must be below schedule.epochs={epochs}, where training ends; got {epoch:g}: lower it, set"
                f" {none} or raise schedule.epochs"
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


def _check_answer_noise(recipe: Recipe) -> None:
    """Mixed-up answers are stored ones: of pictures as they are, or of a cache's views."""
    if not recipe.teacher.answer_noise:
        return
    if not recipe.teacher.model:
        raise ValueError(
            f"teacher.answer_noise is {recipe.teacher.answer_noise}, but there is no teacher; set teacher.model"
        )
    for key, given, plain in (
        ("data.augment", recipe.data.augment, "none"),
        ("data.rand_augment", recipe.data.rand_augment, ""),
        ("data.erasing", recipe.data.erasing, 0.0),
    ):
        if given != plain and not recipe.teacher.cache:
            raise ValueError(
                f"teacher.answer_noise stores one answer a sample, which {key}={given!r} would not fit: set {key} to"
                f" {plain!r}, or teacher.cache, which has an answer to every view"
            )
    if recipe.selection.after:
        raise ValueError(
            "selection.after scores with the teacher's own answers: it goes without teacher.answer_noise; use"
            " lrds-fast score and select"
        )


def _check_features(recipe: Recipe) -> None:
    """What reads the networks' inner features needs their plain passes, of one picture a sample."""
    if not recipe.features.method:
        return
    for key, given, plain in (
        ("run.compile", recipe.run.compile, "off"),
        ("teacher.cache", recipe.teacher.cache, ""),
        ("teacher.answer_noise", recipe.teacher.answer_noise, 0.0),
        ("data.second_view", recipe.data.second_view, ""),
    ):
        if given != plain:
            raise ValueError(f"features.method {recipe.features.method!r} needs {key}={plain!r}; got {given!r}")


def _check_cache(teacher: TeacherOptions, loss: LossOptions) -> None:
    if teacher.cache and not teacher.model:
        raise ValueError(f"teacher.cache is {teacher.cache!r}, but teacher.model, whose logits it holds, is empty")
    needs_all = {
        f"loss.method={loss.method}": loss.method != "kd",
        f"loss.divergence={loss.divergence}": loss.divergence == "mse_logits",
        "loss.temperatures": bool(loss.temperatures),
        "loss.standardize": loss.standardize,
    }
    for key, needed in needs_all.items():
        if needed and teacher.cache and teacher.cache_top_k:
            raise ValueError(
                f"{key} needs the logits of all classes: set teacher.cache_top_k=0; got {teacher.cache_top_k}"
            )
