"""Soft labels of a recipe's teacher: write_cache stores them, open_cache opens them for training."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrds_fast.data import Data, SoftLabels, write_soft_labels
from lrds_fast.lock import holding
from lrds_fast.notes import note
from lrds_fast.ranks import pick_device
from lrds_fast.recipe.recipe import Recipe
from lrds_fast.selection import dataset_fingerprint
from lrds_fast.train.setup import autocast_factory, available_amp

#: Keys of [data] that do not change a sample's picture, apart from the rounding of decoders.
NOT_COMPARED = ("root", "batch_size", "eval_batch_size", "test_limit", "workers", "reader", "first_label")


def write_cache(
    recipe: Recipe,
    data: Data,
    teacher: nn.Module,
    *,
    selected: Tensor | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> SoftLabels:
    """Runs `teacher` over teacher.cache_views views of data.train and writes the folder teacher.cache.

    data: with as many views (see run.load_data). selected: (N,) bool, the samples whose soft labels are needed; None is
    all. resume, overwrite: see write_soft_labels, which raises further errors. Raises ValueError if teacher.cache is
    empty, and FileExistsError if another process writes there.
    """
    options = recipe.teacher
    if not options.cache:
        raise ValueError("teacher.cache is empty: name the folder to write, e.g. --set teacher.cache=runs/soft_labels")
    device = pick_device(recipe.run.device)
    if options.cache_views > 1 and not recipe.data.augments:
        note(
            f"the {options.cache_views} views are equal, because data.augment is none: set data.augment, or"
            " teacher.cache_views=1"
        )
    amp = available_amp(options.amp or recipe.run.amp, device, emulated=recipe.run.amp_emulated)
    with holding(Path(options.cache)):
        return write_soft_labels(
            options.cache,
            teacher,
            data.train,
            views=options.cache_views,
            top_k=options.cache_top_k,
            temperature=recipe.loss.temperature,
            dtype=options.cache_dtype,
            facts=cache_facts(recipe, data, teacher_facts(recipe, teacher)),
            rows=selected,
            autocast=autocast_factory(amp, device),
            device=device,
            memory_format=torch.channels_last if recipe.run.channels_last else torch.contiguous_format,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )


def open_cache(
    recipe: Recipe,
    data: Data,
    teacher_facts: Mapping[str, Any],
    *,
    selected: Tensor | None = None,
    verify: bool = True,
) -> SoftLabels:
    """Opens teacher.cache, which must have been written for this recipe's data, augmentation and teacher.

    teacher_facts: see teacher_facts(). selected: (N,) bool, the samples that must have soft labels; None is all.
    verify: compares checksums, which reads all files. Raises FileNotFoundError without a cache, ValueError for one that
    is incomplete, damaged, written for other data, augmentation, crops or teacher, or that lacks a sample.
    """
    path = Path(recipe.teacher.cache)
    labels = SoftLabels.open(path, facts=cache_facts(recipe, data, teacher_facts), loader=data.train, verify=verify)
    for view in range(labels.views):
        missing = ~labels.cached(view)
        if selected is not None:
            missing &= selected.cpu()
        if bool(missing.any()):
            raise ValueError(
                f"{path} has no soft labels of sample {int(missing.nonzero()[0])} and {int(missing.sum()) - 1} others"
                " that have the teacher; write them (lrds-fast cache, for a selection with --selected)"
            )
    return labels


def cache_facts(recipe: Recipe, data: Data, teacher_facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the teacher's logits depend on, by recipe key where there is one."""
    options = recipe.teacher
    facts = {f"data.{key}": value for key, value in dataclasses.asdict(recipe.data).items() if key not in NOT_COMPARED}
    facts |= {
        "data's fingerprint": dataset_fingerprint(data.train.labels, data.num_classes),
        "number of samples": len(data.train.labels),
        "number of classes": data.num_classes,
        "seed": recipe.seed,
        "teacher.amp": recipe.teacher.amp or recipe.run.amp,
        "teacher.cache_views": options.cache_views,
        "teacher.cache_top_k": options.cache_top_k,
        "teacher.cache_dtype": options.cache_dtype,
        **teacher_facts,
    }
    if options.cache_top_k:
        facts["loss.temperature"] = recipe.loss.temperature
    return facts


def teacher_facts(recipe: Recipe, teacher: nn.Module) -> dict[str, str]:
    """The teacher's identity: its model's name and the sha256 of its weights."""
    return {"teacher.model": recipe.teacher.model, "teacher's weights": weights_sha256(teacher)}


def weights_sha256(model: nn.Module) -> str:
    """sha256, in hex, of a model's state: names, types, shapes and contents."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
