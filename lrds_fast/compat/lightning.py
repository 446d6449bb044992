"""Distillation with label revision and data selection in Lightning; the teacher stays out of the checkpoints.

class Student(LRDSDistillation, lightning.LightningModule): ...
Trainer(callbacks=[UpdateSelection(selected, after=(10, 20))])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrds_fast.functional import kd_loss_parts
from lrds_fast.nn import KDLoss
from lrds_fast.selection.while_training import UpdatesAfterEpochs

try:
    import lightning
except ImportError as error:
    raise ImportError(f"lrds_fast.compat.lightning needs lightning: pip install lightning ({error})") from error


class LRDSDistillation:
    """A mixin in front of LightningModule whose training_step distils a teacher.

    Call distil(teacher, ...) in __init__, after super().__init__(). The teacher is no submodule: checkpoints,
    parameters(), train() and DDP do not see it. It follows the module's device. Batches are (x, y) or, with the flag of
    Selection.dataset, (x, y, selected); self(x) and teacher(x) are logits.
    """

    def distil(self, teacher: nn.Module, **arguments: Any) -> None:
        """teacher: set to evaluation mode, without gradients. arguments: KDLoss's. Raises as KDLoss does."""
        KDLoss(**arguments)  # checks them
        teacher.eval().requires_grad_(False)
        # Not a submodule: nn.Module.__setattr__ would register it.
        object.__setattr__(self, "_distilled", (teacher, arguments))

    def distillation_step(self, batch: Any) -> Tensor:
        """The loss of a batch. Logs loss, ce and kd, with their weights, and revised, the share of revised rows."""
        module: Any = self
        if "_distilled" not in self.__dict__:
            raise RuntimeError("there is no teacher; call self.distil(teacher, ...) in __init__")
        teacher, arguments = self.__dict__["_distilled"]
        x, target, *flag = batch
        selected = flag[0] if flag else None
        teacher.to(target.device)
        with torch.no_grad():
            taught = teacher(x)
        parts = kd_loss_parts(module(x), taught, target, selected=selected, **arguments)
        revised = parts.n_revised / parts.n_valid.clamp(min=1)
        module.log_dict({"loss": parts.loss.detach(), "ce": parts.ce, "kd": parts.kd, "revised": revised})
        return parts.loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """distillation_step; override it to do more."""
        return self.distillation_step(batch)


class UpdateSelection(UpdatesAfterEpochs, lightning.Callback):  # type: ignore[misc, name-defined, unused-ignore]
    """Calls selected.update(module) after the epochs in `after`. The flags are in Lightning's checkpoints.

    selected: the dataset that the training's DataLoader reads. after: numbers of finished epochs, each >= 1; nothing is
    updated after the last epoch of the training. If a training resumes from a checkpoint of an epoch's last step, it
    makes the epoch's update first; batches that workers of the DataLoader have read by then keep their flags. Raises
    ValueError, TypeError.
    """

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self.update_if_due(trainer.current_epoch, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        if trainer.current_epoch + 1 != trainer.max_epochs:
            self.update_if_due(trainer.current_epoch + 1, pl_module)
