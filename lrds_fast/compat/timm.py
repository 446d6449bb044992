"""Label revision and data selection in timm's training tasks (timm >= 1.0.27, which has timm.task).

In timm's train.py one import changes, `LogitDistillationTask` keeps its name and its options:

    from lrds_fast.compat.timm import LRDSDistillationTask as LogitDistillationTask
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lrds_fast.functional import kd_loss_parts
from lrds_fast.nn import KDLoss

try:
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    from timm.task import LogitDistillationTask
except ImportError as error:
    raise ImportError(f"lrds_fast.compat.timm needs timm >= 1.0.27: pip install 'timm>=1.0.27' ({error})") from error


class LRDSDistillationTask(LogitDistillationTask):
    """timm's LogitDistillationTask with kd_loss: label revision, data selection, any divergence.

    Its own arguments are timm's. task_loss_weight, distill_loss_weight and temperature are kd_loss's ce_weight,
    kd_weight and temperature; these attributes may change during training. arguments: the other keywords of KDLoss,
    such as revise (default "lr"; None gives timm's loss), eta, divergence, standardize and ce_weight_unselected. Raises
    as KDLoss does.

    The cross-entropy is computed with the divergence, in one pass, where criterion is nn.CrossEntropyLoss (reduction
    "mean"), LabelSmoothingCrossEntropy or SoftTargetCrossEntropy of timm. Any other criterion is called, and its value
    added for all rows alike; ce_weight_unselected is then an error.
    """

    def __init__(self, *args: Any, **arguments: Any) -> None:
        its = inspect.signature(LogitDistillationTask).parameters
        super().__init__(*args, **{name: arguments.pop(name) for name in its if name in arguments})
        for name in ("class_weight", "label_smoothing", "ignore_index", "reduction", "ce_weight", "kd_weight"):
            if name in arguments:
                owner = {"ce_weight": "task_loss_weight", "kd_weight": "distill_loss_weight"}.get(name, "criterion")
                raise TypeError(f"LRDSDistillationTask takes {name} from timm's argument {owner}; set it there")
        self._arguments = arguments
        KDLoss(**self.options)  # checks them
        if self._cross_entropy() is None and arguments.get("ce_weight_unselected") is not None:
            raise ValueError(
                f"ce_weight_unselected applies to cross-entropies; criterion is {type(self.criterion).__name__}: use "
                "nn.CrossEntropyLoss, LabelSmoothingCrossEntropy or SoftTargetCrossEntropy, or omit it"
            )

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of kd_loss, with timm's attributes as they are now."""
        weights = {"ce_weight": self.task_loss_weight, "kd_weight": self.distill_loss_weight}
        return {"temperature": self.temperature, **weights, **self._arguments}

    def _cross_entropy(self) -> dict[str, Any] | None:
        """The criterion as keywords of kd_loss; None where it is no cross-entropy that kd_loss computes."""
        criterion = self.criterion
        if type(criterion) is nn.CrossEntropyLoss and criterion.reduction == "mean":
            return {
                "class_weight": criterion.weight,
                "label_smoothing": criterion.label_smoothing,
                "ignore_index": criterion.ignore_index,
            }
        if type(criterion) is LabelSmoothingCrossEntropy:
            return {"label_smoothing": criterion.smoothing}
        return {} if type(criterion) is SoftTargetCrossEntropy else None

    def train(self, mode: bool = True) -> LRDSDistillationTask:
        """As nn.Module.train, with the teacher in evaluation mode, also with timm before 1.0.31."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, input: Tensor, target: Tensor, selected: Tensor | None = None) -> dict[str, Tensor]:
        """timm's dict: loss, output (the student's logits), and for logs task_loss and kd_loss without their weights.

        input: (B, ...) normalised for the student. target: (B,) or, as Mixup gives it, (B, C). selected: as kd_loss.
        """
        logits = self.trainable_module(input)
        with torch.no_grad():
            taught = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        cross_entropy = self._cross_entropy()
        options = self.options
        if cross_entropy is None:
            options = {**options, "ce_weight": 0.0, "ce_weight_unselected": 0.0}
        parts = kd_loss_parts(
            logits, taught, target, selected=selected, unweighted=True, **options, **(cross_entropy or {})
        )
        loss, task_loss = parts.loss, parts.ce
        if cross_entropy is None:
            task_loss = self.criterion(logits, target)
            loss = loss + self.task_loss_weight * task_loss
        return {"loss": loss, "output": logits, "task_loss": task_loss, "kd_loss": parts.kd}
