"""Label revision and data selection in torchdistill's YAML configurations; importing this module registers the names.

    dependencies: ['lrds_fast.compat.torchdistill']
    train:
      train_data_loader:
        dataset_wrapper: {key: 'LRDSSelection', kwargs: {selection: 'selection.parquet'}}
      teacher: {forward_proc: 'forward_selected', requires_grad: False}
      student: {forward_proc: 'forward_batch_only'}
      criterion:
        key: 'WeightedSumLoss'
        kwargs:
          sub_terms:
            lrds: {criterion: {key: 'LRDSLoss', kwargs: {temperature: 4.0, selection: True}}, weight: 1.0}

Without the data set wrapper, the teacher's forward_proc and `selection`, every row keeps its teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lrds_fast.nn import KDLoss
from lrds_fast.selection import Selection

try:
    from torchdistill.core.interfaces.registry import register_forward_proc_func
    from torchdistill.datasets.registry import register_dataset_wrapper
    from torchdistill.losses.registry import register_mid_level_loss
except ImportError as error:
    raise ImportError(
        f"lrds_fast.compat.torchdistill needs torchdistill: pip install torchdistill ({error})"
    ) from error


class LRDSLoss(nn.Module):
    """KDLoss as a middle-level loss of torchdistill, cross-entropy included.

    *_module_path, *_module_io: where the logits (N, C) are in the io dicts; "." and "output" are the outputs of the
    networks. selection: rows whose teacher logits are all NaN (forward_selected) have no teacher. arguments: KDLoss's;
    null or "none" is revise=None. Raises as KDLoss does.
    """

    def __init__(
        self,
        student_module_path: str = ".",
        student_module_io: str = "output",
        teacher_module_path: str = ".",
        teacher_module_io: str = "output",
        selection: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.student_place = (student_module_path, student_module_io)
        self.teacher_place = (teacher_module_path, teacher_module_io)
        self.selection = selection
        self.loss = KDLoss(**arguments)

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Tensor]],
        teacher_io_dict: Mapping[str, Mapping[str, Tensor]],
        targets: Tensor,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """The loss of a batch, with targets as kd_loss takes them."""
        student_logits = student_io_dict[self.student_place[0]][self.student_place[1]]
        teacher_logits = teacher_io_dict[self.teacher_place[0]][self.teacher_place[1]]
        selected = None
        if self.selection and isinstance(teacher_logits, Tensor):
            selected = ~teacher_logits.isnan().all(dim=-1)
        loss: Tensor = self.loss(student_logits, teacher_logits, targets, selected)
        return loss


class LRDSSelection(Dataset[Any]):
    """A data set of (sample, target) pairs with {"selected": bool}, torchdistill's supplementary dict.

    selection: a file of `lrds-fast select` or Selection.save, for the same samples in the same order. Raises ValueError
    if it has another number of samples or, for a data set with `targets` and `classes`, another fingerprint.
    """

    def __init__(self, org_dataset: Any, selection: str) -> None:
        known = hasattr(org_dataset, "targets") and hasattr(org_dataset, "classes")
        mask = Selection.load(selection, dataset=org_dataset if known else None).mask
        if len(mask) != len(org_dataset):
            raise ValueError(
                f"{selection} is for {len(mask)} samples, the data set has {len(org_dataset)}; select for this one"
            )
        self.org_dataset = org_dataset
        self.selected: list[bool] = mask.tolist()

    def __getitem__(self, index: int) -> tuple[Any, Any, dict[str, bool]]:
        sample, target = self.org_dataset[index]
        return sample, target, {"selected": self.selected[index]}

    def __len__(self) -> int:
        return len(self.selected)


def forward_selected(
    model: nn.Module, sample_batch: Tensor, targets: Any = None, supp_dict: Any = None, **_: Any
) -> Tensor:
    """(N, C) logits: the model's on the selected rows, NaN on the others, on which the model does not run.

    supp_dict: {"selected": (N,) bool, ...}, the batch of LRDSSelection's dicts. Raises ValueError without it.
    """
    if not supp_dict or "selected" not in supp_dict:
        raise ValueError("forward_proc 'forward_selected' needs dataset_wrapper 'LRDSSelection' in train_data_loader")
    mask: Tensor = supp_dict["selected"].to(sample_batch.device)
    # Without a selected row the model runs on one row, for the number of classes.
    selected: Tensor = model(sample_batch[mask] if bool(mask.any()) else sample_batch[:1])
    logits = selected.new_full((len(mask), selected.shape[1]), torch.nan)
    logits[mask] = selected[: int(mask.sum())]
    return logits


register_mid_level_loss(LRDSLoss, key="LRDSLoss")
register_dataset_wrapper(LRDSSelection, key="LRDSSelection")
register_forward_proc_func(forward_selected, key="forward_selected")
