"""A recipe carried out: data, networks and selection made from its words, then trained or scored."""

from __future__ import annotations

import json
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
from lrds_fast.ranks import Ranks, joined, pick_device
from lrds_fast.recipe.recipe import Recipe, from_mapping
from lrds_fast.selection import Selection, dataset_fingerprint
from lrds_fast.train import rescoring
from lrds_fast.train.cache import open_cache, teacher_facts, write_cache
from lrds_fast.train.evaluation import outputs
from lrds_fast.train.folder import CHECKPOINT, RECIPE
from lrds_fast.train.gallery import write_gallery
from lrds_fast.train.lock import holding
from lrds_fast.train.loop import TrainResult, train
from lrds_fast.train.setup import scored_loss
from lrds_fast.train.teaching import CachedAnswers, MixedUp, Stored
from lrds_fast.train.weights import load_weights


def load_data(recipe: Recipe) -> Data:
    """The recipe's data."""
    options = recipe.data
    return data_sets.load(
        options.name,
        root=options.root,
        batch_size=options.batch_size,
        eval_batch_size=options.eval_batch_size,
        val_fraction=options.val_fraction,
        split_seed=options.split_seed,
        seed=recipe.seed,
        train_limit=options.train_limit,
        test_limit=options.test_limit,
        label_noise=options.label_noise,
        augment=options.augment,
        image_size=options.image_size,
        workers=options.workers,
        reader=options.reader,
        mean=options.mean,
        std=options.std,
        rand_augment=options.rand_augment,
        erasing=options.erasing,
        second_view=options.second_view,
        first_label=options.first_label,
        device=pick_device(recipe.run.device),
        views=recipe.teacher.cache_views if recipe.teacher.cache else 0,
    )


def build_student(recipe: Recipe, data: Data) -> nn.Module:
    """The student with the recipe's seed in it, or with the weights of student.checkpoint."""
    torch.manual_seed(data_sets.derived_seed("student", recipe.seed))
    student = models.create(recipe.student.model, num_classes=data.num_classes)
    if recipe.student.checkpoint:
        options = recipe.student
        load_weights(student, Path(options.checkpoint), key="student.checkpoint", weights=options.weights)
    return student


def build_teacher(recipe: Recipe, data: Data) -> nn.Module | None:
    """The teacher with its trained weights; None where the recipe names none."""
    options = recipe.teacher
    if not options.model:
        if options.checkpoint:
            raise ValueError(
                f"teacher.checkpoint is {options.checkpoint!r}, but teacher.model is empty; name the model"
            )
        return None
    if not options.checkpoint:
        raise ValueError(
            f"teacher.checkpoint is empty: {options.model} would teach with random weights;"
            " train it first and set teacher.checkpoint=runs/.../last.pt"
        )
    teacher = models.create(options.model, num_classes=data.num_classes)
    load_weights(teacher, Path(options.checkpoint), key="teacher.checkpoint", weights=options.weights)
    return teacher


def _sources(recipe: Recipe, data: Data) -> Tensor:
    """(N,) int64: the training sample whose answer of the teacher each training sample gets."""
    options = recipe.teacher
    return data_sets.answer_sources(len(data.train.labels), options.answer_noise, seed=recipe.data.split_seed)


def fingerprint(data: Data) -> str:
    """The training split's fingerprint, which selections and checkpoints carry."""
    return dataset_fingerprint(data.train.labels, data.num_classes)


def load_selection(recipe: Recipe, data: Data) -> Selection | None:
    """The recipe's selection, refused where it is of other data; None where the recipe names none."""
    path = recipe.selection.path
    if not path:
        return None
    if not recipe.teacher.model:
        raise ValueError(f"selection.path is {path!r}, but there is no teacher to select for; set teacher.model")
    if not Path(path).is_file():
        raise FileNotFoundError(f"selection.path: there is no file {path}; lrds-fast select writes one")
    return Selection.load(path, dataset=fingerprint(data))


def fit(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], object] | None = None,
) -> TrainResult:
    """Trains as the recipe says; files go to recipe.out (see lrds_fast.train.loop.train). Under torchrun every process
    makes this call."""
    with joined(recipe.run.device, recipe.run.timeout):
        ranks = Ranks.current()
        data = load_data(recipe)
        selection = load_selection(recipe, data)
        teacher = build_teacher(recipe, data)
        mask = None if selection is None else torch.as_tensor(selection.mask).cpu()
        cached: CachedAnswers | None = None
        if teacher is not None and recipe.teacher.cache:
            # With a mask, and before samples are scored, the teacher is asked about every row; with mixed-up answers,
            # about samples that are not selected too.
            options = recipe.selection
            alone = options.compose == "prefix" and not options.after and not recipe.teacher.answer_noise
            facts = teacher_facts(recipe, teacher)
            cached = open_cache(recipe, data, facts, selected=mask if alone else None, verify=ranks.first)
        if teacher is not None and recipe.teacher.answer_noise:
            if cached is None:
                cached = Stored(outputs(teacher, data.score, pick_device(recipe.run.device)).logits)
            cached = MixedUp(cached, _sources(recipe, data))
        result = train(
            recipe,
            data,
            build_student(recipe, data),
            teacher,
            out=recipe.out,
            fingerprint=fingerprint(data),
            selected=mask,
            cached=cached,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            say=say,
        )
        made = rescoring.latest(recipe.out, recipe.selection, recipe.schedule.epochs)
        selection = selection if made is None else made
        if ranks.first and result.teacher_pred is not None and bool((result.teacher_pred >= 0).any()):
            write_gallery(recipe, data, result.teacher_pred, selection)
        return result


def score(recipe: Recipe, *, progress: bool = True) -> influence.Scores:
    """Scores every training sample from the last layer of a trained student (score.base, else this recipe's own run).

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
    if data.val is None and any(map(rescoring.needs_held_out, names)):
        raise ValueError("kd_gain needs held-out samples; set data.val_fraction, for example to 0.1")
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
        loss=scored_loss(recipe.loss),
        selected=None if selection is None else torch.as_tensor(selection.mask).cpu(),
        progress=progress,
    )
    return scores if shift is None else scores.with_score(rescoring.JOINTLY, shift.norm(dim=1))


def cache(
    recipe: Recipe, *, only_selected: bool = False, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> SoftLabels:
    """Runs the recipe's teacher once and writes teacher.cache (see lrds_fast.train.cache.write_cache).

    only_selected: only the soft labels of the samples that selection.path keeps.
    """
    if only_selected and not recipe.selection.path:
        raise ValueError("selection.path is empty: --selected takes the samples that it keeps; leave --selected out")
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


def shown_beside(scores: Path, selection: Selection) -> dict[str, Any]:
    """Selection.report's pictures and class_names for a file of scores, by the recipe of the run it lies with; {} where
    that is not there or its data is not the selection's.
    """
    path = scores.with_name(RECIPE)
    if not path.is_file():
        return {}
    data = load_data(from_mapping(json.loads(path.read_text(encoding="utf-8")), where=str(path)))
    if fingerprint(data) != selection.fingerprint:
        return {}
    return {"pictures": data.train.picture, "class_names": data.class_names or None}
