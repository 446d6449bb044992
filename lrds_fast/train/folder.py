"""The files of a run, and the facts that must be equal when it resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrds_fast.files import append_record, read_records, remove_partial, rewrite_records, write_text
from lrds_fast.ranks import Ranks
from lrds_fast.recipe.recipe import Recipe, from_mapping
from lrds_fast.train import checkpoint, rescoring
from lrds_fast.train.cache import weights_sha256
from lrds_fast.train.checkpoint import TEACHER, Position
from lrds_fast.train.setup import resolved
from lrds_fast.train.step import Step
from lrds_fast.train.summary import SUMMARY

#: File names in a run's folder.
CHECKPOINT = "last.pt"
BEST = "best.safetensors"
LOG = "log.jsonl"
RECIPE = "recipe.json"
GALLERY = "gallery.json"


def read_recipe(folder: Path) -> Recipe:
    """The recipe of the run in `folder`. FileNotFoundError without a run, ValueError for a damaged file."""
    path = folder / RECIPE
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; name the folder of a run, such as runs/digits_kd")
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {RECIPE}, so it is not a run of lrds-fast train; name the folder of a run"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); the run's folder is damaged") from error
    return from_mapping(values, where=str(path))


class Folder:
    """The files of a run. The first process writes; all processes read.

    out: the folder. facts: see identity(). step: its state is loaded and saved.
    """

    def __init__(self, out: Path, recipe: Recipe, facts: Mapping[str, str], step: Step, ranks: Ranks) -> None:
        self._out, self._recipe, self._facts, self._step, self._ranks = out, recipe, facts, step, ranks
        self._machine = checkpoint.machine(step.device, step.amp, ranks)
        self.records: list[dict[str, Any]] = []
        self._best: float | None = None

    def open(self, *, resume: bool, overwrite: bool) -> Position:
        """Returns the position to continue from. With overwrite the files of an older run are deleted; without resume
        and overwrite an older run is a FileExistsError."""
        path = self._out / CHECKPOINT
        exists = self._ranks.agree(path.exists())
        position = Position(0, 0, {})
        if exists and resume:
            position = checkpoint.resume(
                path,
                facts=self._facts,
                student=self._step.student,
                parts=self._step.parts,
                machine=self._machine,
                ranks=self._ranks,
            )
            self._best = position.state["best"]
            self._step.load_state_dict(position.state, within_epoch=False)
            records = read_records(self._out / LOG, keys=("epoch",))
            self.records = [r for r in records if r["epoch"] <= position.epochs]
            if [r["epoch"] for r in self.records] != list(range(1, position.epochs + 1)):
                raise ValueError(
                    f"{self._out / LOG} has {len(self.records)} of the {position.epochs} epochs that {path} has done;"
                    " restore it from a copy, or start again (--overwrite)"
                )
        elif exists and not overwrite:
            raise older_run(self._out)
        self._ranks.wait()
        if self._ranks.first:
            if not exists or not resume:
                path.unlink(missing_ok=True)
                for name in (BEST, SUMMARY):
                    (self._out / name).unlink(missing_ok=True)
                rescoring.forget(self._out)
            rewrite_records(self._out / LOG, self.records)
            remove_partial(self._out)
            write_text(self._out / RECIPE, resolved(self._recipe).to_json())
        self._ranks.wait()
        return position

    def selected_at(self, position: Position, selected: Tensor | None) -> Tensor | None:
        """(N,) bool, the samples that have the teacher at `position`: those of the run's own last selection, and before
        its first one `selected`."""
        begun = position.epochs + (position.steps > 0)
        latest = rescoring.latest(self._out, self._recipe.selection, begun)
        return selected if latest is None else latest.mask

    def add(self, record: dict[str, Any]) -> None:
        """Appends one epoch's record to the log, and stores the network if it is the best so far."""
        self.records.append(record)
        if not self._ranks.first:
            return
        append_record(self._out / LOG, record)
        key = "val_acc" if "val_acc" in record else "test_acc"
        if self._best is None or record[key] > self._best:
            self._best = record[key]
            facts = {"epoch": str(record["epoch"]), "chosen by": key, key: repr(record[key])}
            facts |= {name: self._facts[name] for name in ("student.model", "data.name")}
            checkpoint.save_weights(self._out / BEST, self._step.judged, facts)

    def save(self, position: Position) -> None:
        """Writes the checkpoint."""
        step = self._step
        state = {"best": self._best, **step.state_dict()}
        checkpoint.save(
            self._out / CHECKPOINT,
            position._replace(state=state),
            facts=self._facts,
            student=step.student,
            parts=step.parts,
            machine=self._machine,
            ranks=self._ranks,
        )


def older_run(out: Path) -> FileExistsError:
    """The error for a run that is in the folder already."""
    return FileExistsError(
        f"{out} holds a run already; continue it (--resume), replace it (--overwrite), or set another run.out"
    )


def identity(
    recipe: Recipe, fingerprint: str, selected: Tensor | None, teacher: nn.Module | None = None
) -> dict[str, str]:
    """The facts that must be equal when a run resumes, as strings: the recipe, the data, the selection and the
    teacher's weights.

    Left out are the recipe's name, the paths of its files, the device, and the number of processes that read the data.
    """
    free = (
        "name",
        "description",
        "run.out",
        "run.device",
        "run.amp_emulated",
        "run.save_every",
        "run.save_every_steps",
        "run.timeout",
        "run.tensorboard",
        "run.wandb",
        "data.workers",
        "selection.path",
    )
    facts = {key: repr(value) for key, value in resolved(recipe).flat().items() if key not in free}
    facts["data's fingerprint"] = fingerprint
    mask = b"" if selected is None else selected.cpu().numpy().tobytes()
    facts["selection"] = hashlib.sha256(mask).hexdigest()[:16]
    if teacher is not None:
        facts[TEACHER] = weights_sha256(teacher)
    return facts
