"""The work of the commands train, score and cache: data, networks and selection of a recipe, then the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrds_fast import data as data_sets
from lrds_fast import influence, models
from lrds_fast.data import Data, SoftLabels
from lrds_fast.influence.options import HELD_OUT
from lrds_fast.lock import holding
from lrds_fast.models.weights import load_weights
from lrds_fast.ranks import Ranks, joined, pick_device
from lrds_fast.recipe.recipe import Recipe
from lrds_fast.selection import Selection, dataset_fingerprint
from lrds_fast.train import rescoring
from lrds_fast.train.cache import open_cache, teacher_facts, write_cache
from lrds_fast.train.checks import check_selection, check_teacher
from lrds_fast.train.evaluation import outputs
from lrds_fast.train.folder import CHECKPOINT, RECIPE, read_recipe
from lrds_fast.train.gallery import write_gallery
from lrds_fast.train.loop import TrainingRun, TrainResult
from lrds_fast.train.setup import scored_loss
from lrds_fast.train.teaching import CachedLogits, LogitsInMemory, MismatchedLogits


def load_data(recipe: Recipe) -> Data:
    """The recipe's data."""
    return data_sets.load(
        recipe.data,
        seed=recipe.seed,
        device=pick_device(recipe.run.device),
        views=recipe.teacher.cache_views if recipe.teacher.cache else 0,
    )


def build_student(recipe: Recipe, data: Data) -> nn.Module:
    """The student, initialised by the recipe's seed or with the weights of student.checkpoint."""
    torch.manual_seed(data_sets.derived_seed("student", recipe.seed))
    student = models.create(recipe.student.model, num_classes=data.num_classes)
    if recipe.student.checkpoint:
        options = recipe.student
        load_weights(student, Path(options.checkpoint), key="student.checkpoint", weights=options.weights)
    return student


def build_teacher(recipe: Recipe, data: Data) -> nn.Module | None:
    """The teacher with its trained weights; None where the recipe names none."""
    check_teacher(recipe)
    options = recipe.teacher
    if not options.model:
        return None
    teacher = models.create(options.model, num_classes=data.num_classes)
    load_weights(teacher, Path(options.checkpoint), key="teacher.checkpoint", weights=options.weights)
    return teacher


def _sources(recipe: Recipe, data: Data) -> Tensor:
    """(N,) int64: the training sample whose teacher logits each training sample gets (teacher.answer_noise)."""
    options = recipe.teacher
    return data_sets.answer_sources(len(data.train.labels), options.answer_noise, seed=recipe.data.split_seed)


def fingerprint(data: Data) -> str:
    """The fingerprint of the training split, which selections and checkpoints store."""
    return dataset_fingerprint(data.train.labels, data.num_classes)


def load_selection(recipe: Recipe, data: Data) -> Selection | None:
    """The recipe's selection; None where the recipe names none. ValueError for a selection of other data."""
    check_selection(recipe)
    path = recipe.selection.path
    return Selection.load(path, dataset=fingerprint(data)) if path else None


def fit(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], object] | None = None,
) -> TrainResult:
    """Trains as the recipe says; files go to recipe.out. Arguments and errors: see lrds_fast.train.loop.train.

    Under torchrun every process makes this call."""
    with joined(recipe.run.device, recipe.run.timeout) as device:
        run, data, _, selection = _prepared(recipe, device)
        result = run.train(resume=resume, overwrite=overwrite, progress=progress, say=say)
        latest = rescoring.latest(recipe.out, recipe.selection, recipe.schedule.epochs)
        teacher_pred = result.teacher_pred
        if Ranks.current().first and teacher_pred is not None and bool((teacher_pred >= 0).any()):
            write_gallery(recipe, data, teacher_pred, selection if latest is None else latest)
        return result


def check(recipe: Recipe) -> str:
    """Does what fit does before the first step, and writes nothing: opens the data, builds the networks, reads weights,
    selection and cached logits. Returns a line on what would be trained. Raises the errors of fit, but for those of an
    older run in recipe.out."""
    with joined(recipe.run.device, recipe.run.timeout) as device:
        _, data, student, _ = _prepared(recipe, device)
        parameters = sum(parameter.numel() for parameter in student.parameters())
        held_out = 0 if data.val is None else len(data.val.labels)
        teacher = recipe.teacher.model or "none"
        return (
            f"{recipe.student.model} of {parameters:,} parameters, teacher {teacher}, data {data.name} with"
            f" {data.num_classes} classes: {len(data.train.labels):,} training, {held_out:,} held-out and"
            f" {len(data.test.labels):,} test samples; {recipe.schedule.epochs} epochs of {len(data.train):,} steps on"
            f" {device}"
        )


def _prepared(recipe: Recipe, device: torch.device) -> tuple[TrainingRun, Data, nn.Module, Selection | None]:
    """A run that has not begun, its data, its student, and the selection of selection.path."""
    data = load_data(recipe)
    selection = load_selection(recipe, data)
    mask = None if selection is None else torch.as_tensor(selection.mask).cpu()
    teacher = build_teacher(recipe, data)
    cached = None if teacher is None else _cached_logits(recipe, data, teacher, mask, device)
    student = build_student(recipe, data)
    run = TrainingRun(
        recipe,
        data,
        student,
        teacher,
        device,
        out=recipe.out,
        fingerprint=fingerprint(data),
        selected=mask,
        cached=cached,
    )
    return run, data, student, selection


def _cached_logits(
    recipe: Recipe, data: Data, teacher: nn.Module, selected: Tensor | None, device: torch.device
) -> CachedLogits | None:
    """The teacher's logits from teacher.cache, or, with teacher.answer_noise, from one pass over the training samples;
    None where the teacher runs in training."""
    cached: CachedLogits | None = None
    if recipe.teacher.cache:
        # Only with a prefix selection that never changes are the logits of the other samples not needed.
        options = recipe.selection
        selected_suffice = options.compose == "prefix" and not options.after and not recipe.teacher.answer_noise
        facts = teacher_facts(recipe, teacher)
        needed = selected if selected_suffice else None
        cached = open_cache(recipe, data, facts, selected=needed, verify=Ranks.current().first)
    if recipe.teacher.answer_noise:
        if cached is None:
            cached = LogitsInMemory(outputs(teacher, data.score, device).logits)
        cached = MismatchedLogits(cached, _sources(recipe, data))
    return cached


def score(recipe: Recipe, *, progress: bool = True) -> influence.Scores:
    """Scores every training sample from the last layer of a trained student: score.base, by default this recipe's run.

    The objective is that of the end of the training: without score.base with the run's last selection, if it made one.
    The held-out slice (data.val_fraction) gives the gradient that kd_gain needs; the test split is not touched. The
    score set_shift is the length of each sample's influence.set_shift. Under torchrun every process makes this call and
    gets all scores. Raises FileExistsError while this recipe's own run is still training.
    """
    with joined(recipe.run.device, recipe.run.timeout) as device:
        writable = not recipe.score.base and os.access(recipe.out, os.W_OK)
        with holding(recipe.out, shared=True, ranks=Ranks.current()) if writable else nullcontext():
            return _scored(recipe, device, progress)


def _scored(recipe: Recipe, device: torch.device, progress: bool) -> influence.Scores:
    data = load_data(recipe)
    base = Path(recipe.score.base) if recipe.score.base else recipe.out / CHECKPOINT
    student = models.create(recipe.student.model, num_classes=data.num_classes)
    load_weights(student, base, key="score.base", weights=recipe.student.weights)
    teacher = build_teacher(recipe, data)
    if teacher is None:
        raise ValueError("scores compare a student with its teacher, and the recipe has none; set teacher.model")
    names = recipe.score.scores
    in_need = [name for name in names if name in HELD_OUT]
    if data.val is None and in_need:
        raise ValueError(f"{in_need[0]} needs held-out samples; set data.val_fraction, for example to 0.1")
    selection = None if recipe.score.base else rescoring.last(recipe.out)
    if selection is None:
        selection = load_selection(recipe, data)
    teacher_logits = None
    if recipe.teacher.answer_noise:
        teacher_logits = outputs(teacher, data.score, device, progress=progress, desc="teacher").logits
        teacher_logits = teacher_logits[_sources(recipe, data)]
    scores, shift = rescoring.score_samples(
        recipe,
        data,
        student.to(device),
        teacher.to(device) if teacher_logits is None else teacher_logits,
        names=names,
        loss=scored_loss(recipe),
        selected=None if selection is None else torch.as_tensor(selection.mask).cpu(),
        progress=progress,
    )
    return scores if shift is None else scores.with_score(rescoring.JOINTLY, shift.norm(dim=1))


def cache(
    recipe: Recipe, *, only_selected: bool = False, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> SoftLabels:
    """Runs the recipe's teacher once and writes teacher.cache (see lrds_fast.train.cache.write_cache).

    only_selected: writes only the soft labels of the samples that selection.path keeps.
    """
    if only_selected and not recipe.selection.path:
        raise ValueError(
            "selection.path is empty: --selected needs a selection; set selection.path, or leave --selected out"
        )
    data = load_data(recipe)
    selection = load_selection(recipe, data) if only_selected else None
    teacher = build_teacher(recipe, data)
    if teacher is None:
        raise ValueError("teacher.model is empty: there is no teacher to take soft labels from")
    return write_cache(
        recipe,
        data,
        teacher,
        selected=None if selection is None else torch.as_tensor(selection.mask).cpu(),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def pictures_of_run(scores: Path, selection: Selection) -> dict[str, Any]:
    """The arguments pictures and class_names of Selection.report, from the run in whose folder the file of scores is.
    Returns {} where there is no run or its data is not the selection's.
    """
    if not scores.with_name(RECIPE).is_file():
        return {}
    data = load_data(read_recipe(scores.parent))
    if fingerprint(data) != selection.fingerprint:
        return {}
    return {"pictures": data.train.picture, "class_names": data.class_names or None}
