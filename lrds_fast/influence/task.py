"""One call of influence.score, resolved: models, data, options and shards, as the scoring of each kind takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrds_fast.influence.adapters import Classifier
from lrds_fast.influence.batches import BatchReader, NumberedBatch, ReadOptions
from lrds_fast.influence.draws import uniform_scores
from lrds_fast.influence.options import ScoreOptions
from lrds_fast.influence.scores import ERROR_SUFFIX
from lrds_fast.influence.shards import Shards

TeacherLogits = Callable[[NumberedBatch], Tensor]
"""From a batch of training samples to the teacher's logits (B, C)."""


@dataclass(frozen=True, eq=False)
class ScoreTask:
    """What a call of influence.score scores. layers: the names of the student's layers. held_out: the reader of
    val_data, None without."""

    student: Classifier
    teacher: TeacherLogits
    layers: Sequence[str]
    train: BatchReader
    held_out: BatchReader | None
    shards: Shards
    options: ScoreOptions


class ShardWriter:
    """Collects the columns of one shard, batch by batch, and writes it.

    mismatch: (N,) the mismatch score of all samples, where it was requested.
    """

    def __init__(self, task: ScoreTask, mismatch: Tensor | None) -> None:
        self._shards, self._options, self._mismatch = task.shards, task.options, mismatch
        self._columns: dict[str, list[Tensor]] = {}
        self._start = 0

    def add(self, start: int, columns: Mapping[str, Tensor]) -> None:
        """Adds columns (B,): label, teacher_pred, scores by key. start: the number of the first sample."""
        if not self._columns:
            self._start = start
        for key, column in columns.items():
            self._columns.setdefault(key, []).append(column.cpu())

    def write(self, shard: int) -> None:
        """Writes what was added since the last write, completed by the random and mismatch scores."""
        if self._columns:
            columns = {key: torch.cat(parts) for key, parts in self._columns.items()}
            self._shards.write(shard, self._start, self._complete(columns))
            self._columns = {}

    def _complete(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The columns in the order of the requested names."""
        start, stop = self._start, self._start + len(columns["label"])
        like = torch.empty(0, dtype=self._options.dtype)
        ordered = {key: columns[key] for key in ("label", "teacher_pred")}
        for name in self._options.names:
            if name.kind == "random":
                ordered[name.key] = uniform_scores(start, stop, name.seed, like)
            elif name.kind == "mismatch":
                assert self._mismatch is not None
                ordered[name.key] = self._mismatch[start:stop].to(like)
            else:
                ordered[name.key] = columns[name.key]
            error = name.key + ERROR_SUFFIX
            if error in columns:
                ordered[error] = columns[error]
        return ordered


def teacher_logits(teacher: nn.Module | Tensor, read: ReadOptions, reader: BatchReader) -> TeacherLogits:
    """The teacher's logits of a batch, from the model or from its stored logits (N, C) in the order of the data.

    Raises ValueError for stored logits that do not fit the data.
    """
    if not isinstance(teacher, Tensor):
        classifier = read.classifier(teacher, "teacher")
        return lambda batch: classifier(batch.x)
    if teacher.dim() != 2 or not teacher.is_floating_point():
        raise ValueError(f"teacher: logits must be floating, (N, C); got {teacher.dtype} {tuple(teacher.shape)}")
    if reader.samples not in (None, len(teacher)):
        raise ValueError(
            f"teacher: logits must have a row for each of the {reader.samples} samples; got {len(teacher)}"
        )

    def stored(batch: NumberedBatch) -> Tensor:
        rows = teacher[batch.start : batch.start + len(batch.y)]
        if len(rows) < len(batch.y):
            raise ValueError(
                f"teacher: logits must have a row for each sample; got {len(teacher)}, and there are at least"
                f" {batch.start + len(batch.y)} samples"
            )
        return rows.to(batch.y.device)

    return stored
