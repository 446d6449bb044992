"""The folder of an exported student: weights, programs, description, recipe and model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lrds_fast.files import write_text
from lrds_fast.models.export import ONNX, PROGRAM, WEIGHTS, write_onnx, write_program, write_weights
from lrds_fast.models.student import DESCRIPTION, load
from lrds_fast.report.card import model_card
from lrds_fast.report.runs import read_run
from lrds_fast.train.checkpoint import stored
from lrds_fast.train.folder import LOG, RECIPE

CARD = "README.md"
#: Format -> its file and the function that writes it.
_WRITERS = {"pt2": (PROGRAM, write_program), "onnx": (ONNX, write_onnx)}


def export_student(
    source: Path,
    out: Path,
    *,
    formats: Sequence[str] = ("pt2",),
    licences: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> dict[str, float]:
    """Writes the student of a run to the folder `out`, from which lrds_fast.models.load reads it.

    source: a run's folder, or a file of weights in it. formats: programs beside the weights, of pt2 and onnx. licences:
    of "weights", "data" and "teacher", for the model card. overwrite: replaces an older export.

    Returns file name -> the largest difference of its logits from the network's, as a share of its largest logit.
    Raises FileExistsError for an older export without overwrite, ValueError where `out` is the folder of a run,
    ImportError for missing packages, RuntimeError for a network that cannot be exported or a file that gives other
    logits. A failed export leaves no folder that can be loaded.
    """
    student = load(source)
    run = read_run(source if source.is_dir() else source.parent)
    at = stored(run.folder / student.description.weights)
    if (out / LOG).exists():
        raise ValueError(f"{out} is the folder of a run; export to another folder")
    if (out / DESCRIPTION).exists() and not overwrite:
        raise FileExistsError(
            f"{out} holds an exported student already; replace it (--overwrite), or choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name in (DESCRIPTION, WEIGHTS, PROGRAM, ONNX, RECIPE, CARD):
        (out / name).unlink(missing_ok=True)
    facts = {"student.model": student.description.model, "data.name": run.recipe.data.name}
    facts |= {"epoch": str(at.epoch)} if at.epoch is not None else {}
    differences = {WEIGHTS: write_weights(student, out / WEIGHTS, facts)}
    for format in formats:
        name, write = _WRITERS[format]
        differences[name] = write(student, out / name)
    write_text(out / RECIPE, run.recipe.to_json())
    write_text(out / CARD, model_card(student, run, at, differences, licences or {}))
    # The last one: without it the folder cannot be loaded.
    replace(student.description, weights=WEIGHTS).write(out)
    return differences
