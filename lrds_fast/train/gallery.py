"""The pictures that a run stores for its report: samples that were revised, and samples without the teacher."""

from __future__ import annotations

import base64
import json
from typing import Any

import torch
from torch import Tensor

from lrds_fast.data import Data
from lrds_fast.files import write_text
from lrds_fast.recipe.recipe import Recipe
from lrds_fast.selection import Selection
from lrds_fast.train.folder import GALLERY

#: Pictures of each kind.
GALLERY_SIZE = 24


def write_gallery(recipe: Recipe, data: Data, teacher_pred: Tensor, selection: Selection | None) -> None:
    """Writes gallery.json: for revised and for denied samples index, label, the teacher's class (None where it is not
    known), and the picture's shape and uint8 pixels in base64.

    teacher_pred: (N,) int64, the teacher's class of every training sample, -1 where it is not known. selection: the
    run's last one, None where all samples had the teacher.
    """
    labels = data.train.labels
    mask = torch.ones_like(labels, dtype=torch.bool) if selection is None else torch.as_tensor(selection.mask).cpu()
    wrong = (teacher_pred >= 0) & (teacher_pred != labels)
    revised = (wrong & mask).nonzero()[:, 0] if recipe.loss.revise != "none" else labels[:0]
    denied = (~mask).nonzero()[:, 0]
    if selection is not None:
        if selection.teacher_pred is not None:
            # Samples that never had the teacher in training have its prediction from scoring.
            teacher_pred = torch.where(teacher_pred >= 0, teacher_pred, selection.teacher_pred)
        # Samples with the most extreme scores come first.
        scores = selection.scores[str(selection.policy["by"])]
        denied = denied[scores[denied].argsort(descending=not selection.policy.get("largest"), stable=True)]

    def entries(indices: Tensor) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "label": int(labels[index]),
                "teacher": int(teacher_pred[index]) if teacher_pred[index] >= 0 else None,
                **_pixels(data.train.picture(index)),
            }
            for index in indices[:GALLERY_SIZE].tolist()
        ]

    kinds = {"revised": entries(revised), "deselected": entries(denied)}
    write_text(recipe.out / GALLERY, json.dumps(kinds))


def _pixels(picture: Tensor) -> dict[str, Any]:
    raw = picture.contiguous().cpu().numpy().tobytes()
    return {"shape": list(picture.shape), "pixels": base64.b64encode(raw).decode()}
