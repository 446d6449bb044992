"""What a finished run leaves for its report: its last evaluation in parts, where its teacher erred, how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrds_fast.data import Data
from lrds_fast.files import plain, write_text
from lrds_fast.train.evaluation import Evaluation
from lrds_fast.train.provenance import provenance

SUMMARY = "summary.json"
#: Pairs of label and teacher's class that are kept, the most frequent first; all there are of 100 classes.
PAIRS = 10_000


def write_summary(
    out: Path,
    data: Data,
    evaluation: Evaluation,
    predicted: Tensor | None,
    selected: Tensor | None,
    device: torch.device,
    processes: int,
) -> None:
    """Writes out/summary.json: class_names, test (Evaluation.parts), teacher (errors), made (provenance).

    evaluation: of the test split. predicted: (N,) int64, the teacher's class of every training sample, -1 where it was
    not asked; None without a teacher. selected: (N,) bool, who keeps the teacher; None is all.
    """
    facts = {
        "class_names": list(data.class_names),
        "test": evaluation.parts(),
        "teacher": None if predicted is None else errors(data.train.labels.cpu(), predicted.cpu(), selected),
        "made": provenance(device, processes),
    }
    write_text(out / SUMMARY, json.dumps(plain(facts), allow_nan=False))


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of the run in `folder`, {} where it has none; ValueError for one that is damaged."""
    path = folder / SUMMARY
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); the run's folder is damaged") from error
    if not isinstance(facts, dict) or not {"class_names", "test", "teacher", "made"} <= facts.keys():
        raise ValueError(f"{path} is no summary of this version; delete it, and reports do without")
    return facts


def errors(labels: Tensor, predicted: Tensor, selected: Tensor | None) -> dict[str, Any]:
    """Where the teacher's class is not the label, among the samples that keep the teacher: how many were asked and how
    many of these are wrong, and (label, teacher's class, samples) from the most frequent pair on."""
    asked = predicted >= 0
    if selected is not None:
        asked &= selected.cpu()
    wrong = asked & (predicted != labels)
    pairs, counts = torch.unique(torch.stack([labels[wrong], predicted[wrong]]), dim=1, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:PAIRS]
    return {
        "asked": int(asked.sum()),
        "wrong": int(wrong.sum()),
        "pairs": [[*pair, count] for pair, count in zip(pairs.T[order].tolist(), counts[order].tolist(), strict=True)],
    }
