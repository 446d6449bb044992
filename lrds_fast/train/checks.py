"""Checks of recipe, data and networks together, before anything is trained or written.

Rules on the recipe alone are in lrds_fast.recipe, unless they hold only where a teacher's weights or a selection
are really read: those are here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lrds_fast.data import Data
from lrds_fast.influence.options import HELD_OUT
from lrds_fast.ranks import Ranks
from lrds_fast.recipe.recipe import Recipe


def check_teacher(recipe: Recipe) -> None:
    """ValueError unless the recipe has both a teacher's model and its weights, or neither."""
    options = recipe.teacher
    if options.checkpoint and not options.model:
        raise ValueError(f"teacher.checkpoint is {options.checkpoint!r}, but teacher.model is empty; name the model")
    if options.model and not options.checkpoint:
        raise ValueError(
            f"teacher.checkpoint is empty: {options.model} would teach with random weights;"
            " train it first and set teacher.checkpoint=runs/.../last.pt"
        )


def check_selection(recipe: Recipe) -> None:
    """ValueError for selection.path without a teacher, FileNotFoundError where there is no such file."""
    path = recipe.selection.path
    if path and not recipe.teacher.model:
        raise ValueError(f"selection.path is {path!r}, but there is no teacher to select for; set teacher.model")
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"selection.path: there is no file {path}; lrds-fast select writes one")


def check_run(recipe: Recipe, data: Data, teacher: nn.Module | None, selected: Tensor | None, ranks: Ranks) -> None:
    """ValueError for what a run needs and does not have. selected: see lrds_fast.train.loop.train."""
    size = len(data.train.labels)
    if selected is not None and (selected.dtype != torch.bool or selected.shape != (size,)):
        raise ValueError(
            f"selected must be bool of shape ({size},), one per training sample;"
            f" got {selected.dtype} of shape {tuple(selected.shape)}"
        )
    micro_batches = ranks.count * recipe.run.accumulate
    if micro_batches > 1 and min(recipe.data.batch_size, size) < 2 * micro_batches:
        raise ValueError(
            f"data.batch_size is shared by all processes and accumulation steps: {min(recipe.data.batch_size, size)}"
            f" rows are fewer than 2 for each of {ranks.count} process(es) x {recipe.run.accumulate} step(s)"
        )
    if recipe.features.method and teacher is None:
        raise ValueError("features.method needs teacher.model, the network whose features are distilled")
    options = recipe.selection
    if options.after and teacher is None:
        raise ValueError(
            f"selection.after is {options.after}, but there is no teacher to select for; set teacher.model"
        )
    if options.after and data.val is None and options.by in HELD_OUT:
        raise ValueError(f"selection.by = {options.by!r} needs held-out samples; set data.val_fraction, e.g. to 0.1")


def check_class_counts(
    data: Data,
    student: nn.Module,
    teacher: nn.Module | None,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    """ValueError unless student and teacher give as many logits as the data has classes. Runs one row through each."""
    first = next(iter(data.test.epoch(0)), None)
    if first is None:
        raise ValueError(f"data {data.name!r} has no test samples")
    image = first.images[:1].to(device, memory_format=memory_format)
    for name, model in (("student", student), ("teacher", teacher)):
        if model is None:
            continue
        was_training = model.training
        try:
            with torch.inference_mode():
                shape = tuple(model.eval()(image).shape)
        except RuntimeError as error:
            raise ValueError(
                f"the {name} does not take images of shape {tuple(image.shape[1:])} of data {data.name!r}:"
                f" {str(error).splitlines()[0]}"
            ) from error
        finally:
            model.train(was_training)
        if shape != (1, data.num_classes):
            raise ValueError(
                f"the {name} gives {shape[-1]} logits per sample, data {data.name!r} has {data.num_classes} classes;"
                " they must be equal"
            )
