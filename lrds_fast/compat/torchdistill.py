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

Without the data set wrapper, the teacher's forward_proc and `selection` every row keeps its teacher.
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

    *_module_path, *_module_io: where the logits (N, C) are in the io dicts; "." and "output" are the networks' own.
    selection: rows of which all teacher logits are NaN (forward_selected) have no teacher. arguments: KDLoss's.
    revise: null or "none" for none. Errors as KDLoss.
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
        own = student_io_dict[self.student_place[0]][self.student_place[1]]
        taught = teacher_io_dict[self.teacher_place[0]][self.teacher_place[1]]
        selected = ~taught.isnan().all(dim=-1) if self.selection and isinstance(taught, Tensor) else None
        loss: Tensor = self.loss(own, taught, targets, selected)
        return loss


class LRDSSelection(Dataset[Any]):
    """A data set of (sample, target) pairs that also says, in torchdistill's supplementary dict, who keeps the teacher.

    selection: a file of `lrds-fast select` or Selection.save, for the same samples in the same order; ValueError where
    their number differs, or the fingerprint of a data set that has `targets` and `classes`.
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
    """(N, C) logits of the selected rows alone; the others are NaN, and the model does not see them.

    supp_dict: as LRDSSelection's samples are collated, {"selected": (N,) bool, ...}.
    """
    if not supp_dict or "selected" not in supp_dict:
        raise ValueError("forward_proc 'forward_selected' needs dataset_wrapper 'LRDSSelection' in train_data_loader")
    mask: Tensor = supp_dict["selected"].to(sample_batch.device)
    # One row says how many classes there are.
    logits: Tensor = model(sample_batch[mask] if bool(mask.any()) else sample_batch[:1])
    spread = logits.new_full((len(mask), logits.shape[1]), torch.nan)
    spread[mask] = logits[: int(mask.sum())]
    return spread


register_mid_level_loss(LRDSLoss, key="LRDSLoss")
register_dataset_wrapper(LRDSSelection, key="LRDSSelection")
register_forward_proc_func(forward_selected, key="forward_selected")
