"""Batches with a flag for each sample: whether it keeps its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Flagged(Dataset[Any]):
    """A dataset with a flag added to each sample; see Selection.dataset. mask: (N,) bool, which may change later."""

    def __init__(self, of: Any, mask: Tensor) -> None:
        self._of, self._mask = of, mask

    def __len__(self) -> int:
        return len(self._mask)

    def __getitem__(self, index: int) -> Any:
        item, selected = self._of[index], bool(self._mask[index])
        if isinstance(item, Mapping):
            return {**item, "selected": selected}
        if isinstance(item, (tuple, list)):
            return (*item, selected)
        raise TypeError(f"samples must be (x, y, ...) or dicts, to take a flag; got {type(item).__name__} at {index}")


def prefix(*batch: Tensor) -> tuple[Any, ...]:
    """A batch with its selected rows in front: (x, y, ..., selected) becomes (x, y, ..., K), K of them an int.

    batch: tensors with B rows each, the last one (B,) bool, as a DataLoader over Selection.dataset gives them. The
    selected rows keep their order, and so do the others. Run the teacher on x[:K], and pass teacher_rows=K to
    kd_loss. Raises ValueError or TypeError for other batches.
    """
    selected = batch[-1] if batch else None
    if not isinstance(selected, Tensor) or selected.dtype != torch.bool or selected.dim() != 1:
        actual = (
            f"{selected.dtype} {tuple(selected.shape)}" if isinstance(selected, Tensor) else type(selected).__name__
        )
        raise TypeError(f"the last part of a batch must be selected, (B,) bool; got {actual}")
    order = torch.argsort((~selected).to(torch.uint8), stable=True)
    parts = []
    for part in batch[:-1]:
        if not isinstance(part, Tensor):
            raise TypeError(f"the parts of a batch must be tensors; got {type(part).__name__}")
        if part.dim() == 0 or len(part) != len(selected):
            raise ValueError(
                f"every part of a batch must have selected's {len(selected)} rows; got shape {tuple(part.shape)}"
            )
        parts.append(part[order.to(part.device)])
    return (*parts, int(selected.sum()))
