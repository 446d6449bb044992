"""Scores of the last layer from models and data: one forward pass that keeps what the closed form needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrds_fast.influence.adapters import Classifier
from lrds_fast.influence.batches import BatchReader, NumberedBatch
from lrds_fast.influence.curvature import LayerRows, StackedRows
from lrds_fast.influence.inputs import check_finite, check_logits, check_targets, check_teacher_logits
from lrds_fast.influence.last_layer import HeldOutGradients, LastLayer
from lrds_fast.influence.mismatch import Agreements
from lrds_fast.influence.options import CURVED, HELD_OUT
from lrds_fast.influence.shards import OnDisk, Shards
from lrds_fast.influence.task import ScoreTask, ShardWriter, TeacherLogits
from lrds_fast.ranks import Ranks


class HeadOutputs(NamedTuple):
    """The last layer on a batch: its inputs h (B, d), its outputs z (B, C), and the teacher's logits v (B, C)."""

    h: Tensor
    z: Tensor
    v: Tensor


class ShardRows(NamedTuple):
    """The last layer on a shard: h, z, v as in HeadOutputs, labels y (n,), the number of the first sample."""

    h: Tensor | OnDisk
    z: Tensor | OnDisk
    v: Tensor | OnDisk
    y: Tensor
    start: int


class Head:
    """A student's last nn.Linear, whose output must be its logits, and the teacher. name: of the layer."""

    def __init__(self, student: Classifier, teacher: TeacherLogits | None, name: str) -> None:
        self._student, self._teacher, self._name = student, teacher, name
        self._layer = student.module.get_submodule(name)
        assert isinstance(self._layer, nn.Linear)
        self.bias = self._layer.bias is not None
        self.device, self.dtype = self._layer.weight.device, self._layer.weight.dtype
        self.width, self.classes = self._layer.in_features, self._layer.out_features

    @torch.no_grad()
    def outputs(self, batch: NumberedBatch) -> HeadOutputs:
        """One forward pass of both models; v is z without a teacher.

        Raises ValueError naming the first sample that is not finite, for logits that are not the layer's output, and
        for targets out of range.
        """
        calls: list[tuple[Tensor, Tensor]] = []
        handle = self._layer.register_forward_hook(lambda _, args, out: calls.append((args[0].clone(), out)))
        try:
            z = self._student(batch.x)
        finally:
            handle.remove()
        h = calls[-1][0] if calls else z[:, :0]
        if calls and h.dim() == 2:
            check_finite(f"the input of layer {self._name!r}", h, batch.start)
        if z.dim() == 2 and len(z):
            check_logits("student_logits", z, batch.start)
        if len(calls) != 1 or z.shape != calls[0][1].shape or z.dim() != 2 or not torch.equal(z, calls[0][1]):
            raise ValueError(
                f"layers='last' needs logits that are the output of the last nn.Linear, {self._name!r}, of shape (B,"
                " C); here they are not: name the layers, or use layers='all'"
            )
        v = z
        if self._teacher is not None:
            v = self._teacher(batch)
            check_teacher_logits(v, z, batch.start)
        check_targets(batch.y, self.classes, batch.start)
        return HeadOutputs(h, z, v)


@torch.no_grad()
def score_head(task: ScoreTask) -> dict[str, object]:
    """Writes this process's shards; returns their part of Scores.meta.

    The last layer's rows, d + 2 C numbers a sample, are kept in the shards' folder, or in memory without one.
    """
    name, options, shards = task.layers[0], task.options, task.shards
    head = Head(task.student, task.teacher, name)
    rows = _rows_of_shards(head, task.train, shards)
    layer = _last_layer(task, head, rows)
    if options.include(CURVED):
        layer.fit(options.curvature, where=f"layer {name!r}")
    if task.held_out is not None and options.include(HELD_OUT):
        held_out_head = Head(task.student, None, name)
        layer.aim(*_held_out_gradients(held_out_head, task.held_out, shards.ranks, options.parts))
    _write_scores(task, layer, rows)
    return {
        "num_samples": layer.rows.total,
        "num_classes": head.classes,
        "num_features": head.width,
        "bias": head.bias,
        "damping": layer.damping,
        "folds": layer.folds,
    }


def _last_layer(task: ScoreTask, head: Head, rows: dict[int, ShardRows]) -> LastLayer:
    """All rows of this process as one layer."""
    selected, device = task.options.selected, head.device
    like = torch.empty(0, dtype=head.dtype, device=device)
    h, z, v = (
        StackedRows([getattr(shard, key) for shard in rows.values()], like.new_empty(0, width))
        for key, width in (("h", head.width), ("z", head.classes), ("v", head.classes))
    )
    y = torch.cat([shard.y for shard in rows.values()] or [torch.empty(0, dtype=torch.int64)]).to(device)
    local_selected = None
    if selected is not None:
        numbers = [torch.arange(shard.start, shard.start + len(shard.y)) for shard in rows.values()]
        local_selected = selected.cpu()[torch.cat(numbers)].to(device) if numbers else selected[:0].to(device)
    layer_rows = LayerRows(h, z, head.bias, task.shards.ranks)
    return LastLayer(layer_rows, v, y, task.options.dtype, task.options.objective, local_selected)


def _write_scores(task: ScoreTask, layer: LastLayer, rows: dict[int, ShardRows]) -> None:
    """Scores the rows and writes the shards that an earlier run has not written."""
    names, shards = task.options.names, task.shards
    step = max((part.stop - part.start for part in layer.parts(names)), default=1)
    mismatch = _mismatch(layer, rows, step) if task.options.include(("mismatch",)) else None
    writer = ShardWriter(task, mismatch)
    for shard, slices in _slices(rows, step).items():
        if not shards.done(shard):
            for start, part in slices:
                scores, teacher_pred = layer.scores(part, names)
                writer.add(start, {"label": layer.y[part], "teacher_pred": teacher_pred, **scores})
            writer.write(shard)


def _mismatch(layer: LastLayer, rows: dict[int, ShardRows], step: int) -> Tensor:
    """(N,) the score of all processes' samples, from this process's rows, `step` at a time."""
    agreements = Agreements()
    for slices in _slices(rows, step).values():
        for start, part in slices:
            agreements.add(start, layer.rows.logits[part], layer.teacher_logits[part])
    return agreements.probabilities(layer.rows.ranks)


def _slices(rows: dict[int, ShardRows], step: int) -> dict[int, list[tuple[int, slice]]]:
    """By shard, the numbers of first samples and slices of this process's rows, `step` rows at most each."""
    slices: dict[int, list[tuple[int, slice]]] = {}
    first = 0
    for shard, of_shard in rows.items():
        count = len(of_shard.y)
        slices[shard] = [
            (of_shard.start + at, slice(first + at, first + min(at + step, count))) for at in range(0, count, step)
        ]
        first += count
    return slices


def _rows_of_shards(head: Head, train: BatchReader, shards: Shards) -> dict[int, ShardRows]:
    """The rows of this process's shards by number; from disk where an earlier run has kept them."""
    kept = {shard for shard in shards.kept_shards("rows") if shards.mine(shard)}
    by_shard = {}
    batches = train("features", lambda number: shards.mine(shards.of(number)) and shards.of(number) not in kept)
    for shard, rows in _computed_rows(head, batches, shards):
        if shards.folder is None:
            by_shard[shard] = ShardRows(rows["h"], rows["z"], rows["v"], rows["y"], int(rows["start"]))
        else:
            shards.keep(f"rows-{shard:08d}", rows)
            kept.add(shard)
    for shard in kept:
        path = shards.kept_path(f"rows-{shard:08d}")
        assert path is not None
        h, z, v = (OnDisk(path, key) for key in HeadOutputs._fields)
        by_shard[shard] = ShardRows(h, z, v, OnDisk(path, "y")[:], int(OnDisk(path, "start").scalar()))
    return dict(sorted(by_shard.items()))


def _computed_rows(
    head: Head, batches: Iterator[NumberedBatch], shards: Shards
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The rows of one shard after the other, by the names of ShardRows; on the CPU where they go to disk."""
    parts: list[tuple[HeadOutputs, Tensor]] = []
    shard, start = -1, 0

    def rows() -> dict[str, Tensor]:
        joined = {key: torch.cat([getattr(outputs, key) for outputs, _ in parts]) for key in HeadOutputs._fields}
        joined["y"] = torch.cat([y for _, y in parts])
        joined = {key: t if shards.folder is None else t.cpu() for key, t in joined.items()}
        return {**joined, "start": torch.tensor(start)}

    for batch in batches:
        if not parts:
            shard, start = shards.of(batch.number), batch.start
        parts.append((head.outputs(batch), batch.y))
        if shards.ends_with(batch.number):
            yield shard, rows()
            parts = []
    if parts:
        yield shard, rows()


def _held_out_gradients(head: Head, held_out: BatchReader, ranks: Ranks, parts: int) -> tuple[Tensor, Tensor]:
    """HeldOutGradients.totals over the held-out samples of all processes."""
    gradients = HeldOutGradients(parts, head.classes, head.width + int(head.bias), head.device)
    for batch in held_out.share("validation", ranks):
        outputs = head.outputs(batch)
        h = LayerRows(outputs.h, outputs.z, head.bias).augmented(slice(0, len(outputs.z)), torch.float64)
        gradients.add(batch.start, h, outputs.z, batch.y)
    return gradients.totals(ranks)
