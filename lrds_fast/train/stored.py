"""The evaluation of a student that is stored in a run's or in an exported folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from lrds_fast.models.student import Student, load
from lrds_fast.notes import note
from lrds_fast.ranks import pick_device
from lrds_fast.train.evaluation import Evaluation, evaluate
from lrds_fast.train.folder import read_recipe
from lrds_fast.train.run import load_data
from lrds_fast.train.setup import autocast_factory, available_amp


class Assessment(NamedTuple):
    """A stored student and its evaluation."""

    student: Student
    evaluation: Evaluation


def assess(path: Path, *, split: str = "test", settings: Iterable[str] = ()) -> Assessment:
    """Evaluates a stored student as its run does, in the recipe's precision; on the same machine the numbers are the
    run's.

    path: see lrds_fast.models.load. split: "test", or "val", the held-out training samples. settings: "KEY=VALUE" over
    the stored recipe's values, such as data.root=... or run.device=cpu. Raises ValueError for val where nothing is held
    out and for data with another number of classes, and the errors of load and of the data.
    """
    student = load(path)
    recipe = read_recipe(path if path.is_dir() else path.parent).with_settings(settings)
    device = pick_device(recipe.run.device)
    data = load_data(recipe)
    loader = data.test if split == "test" else data.val
    if loader is None:
        raise ValueError(
            f"split is 'val', but the run held out no samples (data.val_fraction={recipe.data.val_fraction:g}): take"
            " --split test"
        )
    if data.num_classes != len(student.class_names):
        raise ValueError(
            f"data {data.name!r} has {data.num_classes} classes, the student {len(student.class_names)}; set data.name"
            " and data.root to data with the student's classes"
        )
    if data.class_names and data.class_names != student.class_names:
        differing = sum(a != b for a, b in zip(data.class_names, student.class_names, strict=True))
        note(
            f"{differing} of the {data.num_classes} class names in the data are not the student's: compare their order"
        )
    memory_format = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
    student.network.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    amp = available_amp(recipe.run.amp, device, emulated=recipe.run.amp_emulated)
    return Assessment(student, evaluate(student.network, loader, device, memory_format, autocast_factory(amp, device)))
