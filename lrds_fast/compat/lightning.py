"""Distillation with label revision in a LightningModule; the teacher stays out of its checkpoints.

class Student(LRDSDistillation, lightning.LightningModule): ...
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrds_fast.functional import kd_loss_parts
from lrds_fast.nn import KDLoss

try:
    import lightning  # noqa: F401
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
