"""The log for TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrds_fast.files import naming
from lrds_fast.recipe.recipe import Recipe

TENSORBOARD = "tensorboard"


class Trackers:
    """Passes every record of the log on. Events of an earlier run after `step` are discarded.

    TensorBoard's files are written to out/tensorboard if tensorboard is installed and run.tensorboard is true. W&B is
    used if run.wandb names a project; raises ImportError if it is not installed.
    """

    def __init__(self, recipe: Recipe, out: Path, step: int) -> None:
        self._out = out
        self._writer: Any = None
        self._wandb: Any = None
        if recipe.run.tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            # Any: it has types only where tensorboard is installed.
            writer: Any = SummaryWriter
            self._writer = writer(str(out / TENSORBOARD), purge_step=step + 1)
        if recipe.run.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ImportError(
                    f"run.wandb is {recipe.run.wandb!r}, which needs W&B: pip install wandb, or set run.wandb="
                    f" ({error})"
                ) from error
            self._wandb = wandb.init(
                project=recipe.run.wandb,
                name=f"{recipe.name}-seed{recipe.seed}",
                id=_identifier(out),
                resume="allow",
                dir=str(out),
                config=recipe.flat(),
            )

    def log(self, record: Mapping[str, Any]) -> None:
        """Logs one epoch's record at its step."""
        numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
        if self._writer is not None:
            with naming(self._out / TENSORBOARD):
                for key, value in numbers.items():
                    self._writer.add_scalar(key, value, record["step"])
                self._writer.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        """Writes buffered events and ends the W&B run."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _identifier(out: Path) -> str:
    """The id of the folder's run at W&B, so that a resumed run continues the same one."""
    return "-".join(part for part in out.parts if part not in ("/", ".", ".."))[-100:]
