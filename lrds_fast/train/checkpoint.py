"""Checkpoints, written atomically. Resuming from the checkpoint of another run is an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from lrds_fast import _C
from lrds_fast.files import atomic_write
from lrds_fast.models.weights import load_state, read, safetensors_bytes, safetensors_facts
from lrds_fast.notes import note
from lrds_fast.ranks import Ranks

FORMAT = 2
#: The fact that holds the sha256 of the teacher's weights. Checkpoints of older versions lack it.
TEACHER = "teacher's sha256"


class Stateful(Protocol):
    """Optimizers, gradient scalers, moving averages."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """The reverse of state_dict."""


class Position(NamedTuple):
    """How far a run has come: `epochs` are complete, and `steps` of the next one. state: the state besides the student
    and `parts` (see save)."""

    epochs: int
    steps: int
    state: dict[str, Any]


def machine(device: torch.device, amp: str, ranks: Ranks) -> dict[str, str]:
    """Properties of the machine on which a run's results depend, bit for bit."""
    facts = {"PyTorch": str(torch.__version__), "processes": str(ranks.count), "precision": amp}
    if device.type == "cuda":
        return facts | {"device": torch.cuda.get_device_name(device)}
    return facts | {
        "device": "the CPU",
        "threads": str(torch.get_num_threads()),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "kernels' CPU level": str(_C.build_info()["cpu_isa"]),
    }


def save(
    path: Path,
    position: Position,
    *,
    facts: Mapping[str, str],
    student: nn.Module,
    parts: Mapping[str, Stateful | None],
    machine: Mapping[str, str] | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Writes a checkpoint of the run at `position`; only the first process writes.

    facts: strings that must be equal on resuming (model, data fingerprint, ...). parts: other objects that have state,
    by name; None is left out. machine: see machine(). The states of every process's random generators are stored too.
    """
    ranks = ranks or Ranks()
    generators = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    all_generators = ranks.gather(generators)
    if not ranks.first:
        return
    state: dict[str, Any] = {
        "format": FORMAT,
        "epoch": position.epochs,
        "steps": position.steps,
        "state": position.state,
        "facts": dict(facts),
        "machine": dict(machine or {}),
        "student": student.state_dict(),
        "parts": {name: part.state_dict() for name, part in parts.items() if part is not None},
        "generators": all_generators,
    }
    with atomic_write(path) as file:
        torch.save(state, file)


def resume(
    path: Path,
    *,
    facts: Mapping[str, str],
    student: nn.Module,
    parts: Mapping[str, Stateful | None],
    machine: Mapping[str, str] | None = None,
    ranks: Ranks | None = None,
) -> Position:
    """Loads a checkpoint into student and parts, and returns the run's position. ValueError where a fact differs. Where
    only the machine differs, prints a note that results will not be bit for bit those of an uninterrupted run."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; start without --resume, or correct the path")
    state = read(path, named=str(path), otherwise="restore it from a copy, or delete it and start again")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of lrds-fast train (format {FORMAT}); start again with --overwrite"
        )
    for name, value in facts.items():
        before = state["facts"].get(name, value if name == TEACHER else None)
        if before != value:
            raise ValueError(
                f"{path} is of another run: its {name} is {before}, this one's is {value};"
                " resume with the same recipe, data and teacher, or set another run.out"
            )
    before = state.get("machine", {})
    differences = [
        f"{name} {before[name]}, now {value}"
        for name, value in (machine or {}).items()
        if before.get(name, value) != value
    ]
    if differences:
        note(
            f"{path} was written with {'; '.join(differences)}: the results will not be bit for bit those of an"
            " uninterrupted run"
        )
    load_state(student, state["student"], str(path))
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(state["parts"][name])
    rank = (ranks or Ranks()).rank
    if rank < len(state["generators"]):  # additional processes keep the seeds that they started with
        generators = state["generators"][rank]
        torch.set_rng_state(generators["cpu"])
        if generators["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(generators["cuda"])
    return Position(int(state["epoch"]), int(state["steps"]), state["state"])


def teacher_sha256(path: Path) -> str | None:
    """The sha256 of the teacher's weights in a run's checkpoint; None where it has none. OSError or ValueError for a
    file that cannot be read."""
    state = read(path, named=str(path), otherwise="restore it from a copy")
    sha256: str | None = state.get("facts", {}).get(TEACHER) if isinstance(state, dict) else None
    return sha256


class Stored(NamedTuple):
    """When the weights in a run's file were stored. epoch: after so many epochs; None within one. chosen_by: the
    accuracy by which this epoch was chosen among all, val_acc or test_acc; "" for the last checkpoint."""

    epoch: int | None
    chosen_by: str


def stored(path: Path) -> Stored:
    """What a run's last.pt or best.safetensors says of its weights. ValueError for other files."""
    facts = safetensors_facts(path)
    if facts:
        return Stored(int(facts["epoch"]), facts["chosen by"])
    state = read(path, named=str(path), otherwise="restore it from a copy")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of lrds-fast train (format {FORMAT}); name the folder of a run")
    return Stored(None if state["steps"] else int(state["epoch"]), "")


def save_weights(path: Path, model: nn.Module, facts: Mapping[str, str]) -> None:
    """Writes the weights alone as .safetensors. facts: metadata, see safetensors_bytes."""
    content = safetensors_bytes(model, facts)
    with atomic_write(path) as file:
        file.write(content)
