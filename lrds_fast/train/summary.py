"""The summary that a finished run writes for reports: its last evaluation, its teacher's errors, its provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrds_fast.data import Data
from lrds_fast.files import plain, write_text
from lrds_fast.provenance import provenance
from lrds_fast.train.evaluation import Evaluation

SUMMARY = "summary.json"
#: At most so many pairs of label and teacher's class are stored, the most frequent first: all pairs of 100 classes.
PAIRS = 10_000


def write_summary(
    out: Path,
    data: Data,
    evaluation: Evaluation,
    teacher_pred: Tensor | None,
    selected: Tensor | None,
    device: torch.device,
    processes: int,
) -> None:
    """Writes out/summary.json: class_names, test (Evaluation.parts), teacher (errors), made (provenance).

    evaluation: of the test split. teacher_pred: (N,) int64, the teacher's class of every training sample, -1 where it
    is not known; None without a teacher. selected: (N,) bool, the samples that keep the teacher; None is all.
    """
    facts = {
        "class_names": list(data.class_names),
        "test": evaluation.parts(),
        "teacher": None if teacher_pred is None else errors(data.train.labels.cpu(), teacher_pred.cpu(), selected),
        "made": provenance(device, processes),
    }
    write_text(out / SUMMARY, json.dumps(plain(facts), allow_nan=False))


def errors(labels: Tensor, teacher_pred: Tensor, selected: Tensor | None) -> dict[str, Any]:
    """The teacher's errors on the samples that keep it.

    "asked": samples whose prediction is known; "wrong": those where it is not the label; "pairs": (label, teacher's
    class, samples), the most frequent pair first.
    """
    known = teacher_pred >= 0
    if selected is not None:
        known &= selected.cpu()
    wrong = known & (teacher_pred != labels)
    pairs, counts = torch.unique(torch.stack([labels[wrong], teacher_pred[wrong]]), dim=1, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:PAIRS]
    return {
        "asked": int(known.sum()),
        "wrong": int(wrong.sum()),
        "pairs": [[*pair, count] for pair, count in zip(pairs.T[order].tolist(), counts[order].tolist(), strict=True)],
    }
