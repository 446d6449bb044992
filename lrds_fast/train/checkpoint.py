"""Checkpoints: written atomically; a checkpoint of another run is an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from lrds_fast import _C
from lrds_fast.files import atomic_write
from lrds_fast.ranks import Ranks
from lrds_fast.train.notes import note
from lrds_fast.train.weights import load_state, read

FORMAT = 2


class Stateful(Protocol):
    """Optimizers, gradient scalers, moving averages."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """The reverse of state_dict."""


class Position(NamedTuple):
    """Where a run stands: `epochs` are done, and `steps` of the one that follows. state: whatever else goes on."""

    epochs: int
    steps: int
    state: dict[str, Any]


def machine(device: torch.device, amp: str, ranks: Ranks) -> dict[str, str]:
    """The properties of the machine that a run's results depend on bit for bit."""
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
    """A checkpoint of the run at `position`, written by the first process.

    facts: strings that must be equal on resuming (model, data fingerprint, ...). parts: by name, whatever else has
    state; None is left out. machine: see machine(). The random generators' states of
    every process are added.
    """
    ranks = ranks or Ranks()
    generators = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    everybody = ranks.gather(generators)
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
        "generators": everybody,
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
    """Loads what save() wrote and returns the position of the run. ValueError where a fact differs. Where only the
    machine differs, prints a note that the results will not be bit for bit those of an uninterrupted run."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; start without --resume, or correct the path")
    state = read(path, named=str(path), otherwise="restore it from a copy, or delete it and start again")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of lrds-fast train (format {FORMAT}); start afresh without --resume"
        )
    for name, value in facts.items():
        before = state["facts"].get(name)
        if before != value:
            raise ValueError(
                f"{path} is of another run: its {name} is {before}, this one's is {value};"
                " resume with the same recipe and data, or set another run.out"
            )
    before = state.get("machine", {})
    others = [
        f"{name} {before[name]}, now {value}"
        for name, value in (machine or {}).items()
        if before.get(name, value) != value
    ]
    if others:
        note(
            f"{path} was written with {'; '.join(others)}: the results will not be bit for bit those of an"
            " uninterrupted run"
        )
    load_state(student, state["student"], str(path))
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(state["parts"][name])
    rank = (ranks or Ranks()).rank
    if rank < len(state["generators"]):  # more processes than before draw from their own seeds
        generators = state["generators"][rank]
        torch.set_rng_state(generators["cpu"])
        if generators["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(generators["cuda"])
    return Position(int(state["epoch"]), int(state["steps"]), state["state"])


def save_weights(path: Path, model: nn.Module, facts: Mapping[str, str]) -> None:
    """The weights alone, as .safetensors; facts: its metadata, as JSON under the key lrds_fast."""
    from safetensors.torch import save

    # Clones: the format has no room for tensors that share memory, as tied weights do.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    with atomic_write(path) as file:
        # One key: the format does not keep the order of several, and equal weights shall be equal files.
        file.write(save(state, metadata={"lrds_fast": json.dumps(dict(facts))}))
