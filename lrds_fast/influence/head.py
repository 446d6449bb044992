"""Scores of the last layer from models and data: one forward pass that keeps what the closed form needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrds_fast.influence.adapters import Classifier
from lrds_fast.influence.batches import Batch, Batches
from lrds_fast.influence.curvature import Pieces, Rows
from lrds_fast.influence.inputs import check_finite, check_logits
from lrds_fast.influence.last_layer import CURVED, DIRECTED, LastLayer, add_gradients
from lrds_fast.influence.mismatch import Agreements
from lrds_fast.influence.scores import ERROR_SUFFIX, ScoreName, uniform_scores
from lrds_fast.influence.shards import OnDisk, Shards
from lrds_fast.nn import KDLoss
from lrds_fast.ranks import Ranks


class _Seen(NamedTuple):
    """A batch as its last layer saw it: h (B, d), z and v (B, C)."""

    h: Tensor
    z: Tensor
    v: Tensor


class _Rows(NamedTuple):
    """A shard as its last layer saw it: h, z, v as in _Seen, labels y (B,) and the number of the first sample."""

    h: Tensor | OnDisk
    z: Tensor | OnDisk
    v: Tensor | OnDisk
    y: Tensor
    start: int


class Head:
    """A student's last nn.Linear, whose output are its logits, and the teacher."""

    def __init__(self, student: Classifier, teacher: Classifier | None, name: str) -> None:
        self._student, self._teacher, self._name = student, teacher, name
        self._layer = student.module.get_submodule(name)
        assert isinstance(self._layer, nn.Linear)
        self.bias = self._layer.bias is not None
        self.device = self._layer.weight.device
        self.width, self.classes = self._layer.in_features, self._layer.out_features

    @torch.no_grad()
    def see(self, batch: Batch) -> _Seen:
        """One forward pass of both models. Raises ValueError naming the first sample that is not finite."""
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
        v = z if self._teacher is None else self._teacher(batch.x)
        if z.shape != v.shape:
            raise ValueError(f"student and teacher must give the same classes; got {tuple(z.shape)}, {tuple(v.shape)}")
        check_logits("teacher_logits", v, batch.start)
        outside = (batch.y < 0) | (batch.y >= self.classes)
        if outside.any():
            row = int(outside.nonzero()[0, 0])
            raise ValueError(
                f"targets must lie in [0, {self.classes}); got {int(batch.y[row])} at sample {batch.start + row}"
            )
        return _Seen(h, z, v)


@torch.no_grad()
def score_head(
    student: Classifier,
    teacher: Classifier,
    name: str,
    train: Batches,
    held_out: Batches | None,
    shards: Shards,
    names: Sequence[ScoreName],
    *,
    dtype: torch.dtype,
    curvature: str,
    damping: float | None,
    damping_scale: float,
    hessian: str,
    folds: int,
    selected: Tensor | None,
    loss: KDLoss,
) -> dict[str, object]:
    """Writes this process's shards; returns what Scores.meta says of them.

    The last layer's rows, d + 2 C numbers a sample, are kept in the shards' folder, or in memory where there is none.
    """
    head = Head(student, teacher, name)
    own = _own_rows(head, train, shards)
    parameter = next(student.module.parameters())
    device = parameter.device
    like = torch.empty(0, dtype=parameter.dtype, device=device)
    h, z, v = (
        Pieces([getattr(rows, key) for rows in own.values()], like.new_empty(0, width))
        for key, width in (("h", head.width), ("z", head.classes), ("v", head.classes))
    )
    y = torch.cat([rows.y for rows in own.values()] or [torch.empty(0, dtype=torch.int64)]).to(device)
    local = None
    if selected is not None:
        places = [torch.arange(rows.start, rows.start + len(rows.y)) for rows in own.values()]
        local = selected.cpu()[torch.cat(places)].to(device) if places else selected[:0].to(device)
    layer = LastLayer(Rows(h, z, head.bias, shards.ranks), v, y, dtype, loss, hessian=hessian, selected=local)
    kinds = {score.kind for score in names}
    if not kinds.isdisjoint(CURVED):
        layer.fit(curvature, damping=damping, damping_scale=damping_scale, where=f"layer {name!r}")
    if held_out is not None and not kinds.isdisjoint(DIRECTED):
        layer.aim(*_fold_gradients(Head(student, None, name), held_out, shards.ranks, folds))

    slices = list(layer.parts(names))
    step = max((part.stop - part.start for part in slices), default=1)
    mismatch = _mismatch(own, z, v, step, shards.ranks) if "mismatch" in kinds else None
    first = 0
    for shard, rows in own.items():
        count = len(rows.y)
        if not shards.done(shard):
            columns: dict[str, list[Tensor]] = {}
            for start in range(first, first + count, step):
                part = slice(start, min(start + step, first + count))
                found, predicted = layer.scores(part, names)
                for key, column in {"label": y[part], "teacher_pred": predicted, **found}.items():
                    columns.setdefault(key, []).append(column)
            whole = {key: torch.cat(parts) for key, parts in columns.items()}
            shards.write(shard, rows.start, completed(whole, names, rows.start, like.to(dtype), mismatch))
        first += count
    return {
        "num_samples": layer.rows.total,
        "num_classes": head.classes,
        "num_features": head.width,
        "bias": head.bias,
        "damping": layer.damping,
        "folds": layer.folds,
    }


def _mismatch(own: dict[int, _Rows], z: Pieces, v: Pieces, step: int, ranks: Ranks) -> Tensor:
    """The score of all processes' samples, (N,); z, v: this process's rows, read `step` at a time."""
    agreements = Agreements()
    first = 0
    for rows in own.values():
        count = len(rows.y)
        for at in range(0, count, step):
            part = slice(first + at, first + min(at + step, count))
            agreements.add(rows.start + at, z[part], v[part])
        first += count
    return agreements.probabilities(ranks)


def completed(
    columns: dict[str, Tensor], names: Sequence[ScoreName], start: int, like: Tensor, mismatch: Tensor | None
) -> dict[str, Tensor]:
    """A shard's columns in the order of the names, with random scores and, of all samples, mismatch (N,)."""
    stop = start + len(columns["label"])
    ordered = {key: columns[key] for key in ("label", "teacher_pred")}
    for name in names:
        if name.kind == "random":
            ordered[name.key] = uniform_scores(start, stop, name.seed, like)
        elif name.kind == "mismatch":
            assert mismatch is not None
            ordered[name.key] = mismatch[start:stop].to(like)
        else:
            ordered[name.key] = columns[name.key]
        error = name.key + ERROR_SUFFIX
        if error in columns:
            ordered[error] = columns[error]
    return ordered


def _own_rows(head: Head, train: Batches, shards: Shards) -> dict[int, _Rows]:
    """This process's shards' rows by number; from disk what an earlier run has left there."""
    kept = {shard for shard in shards.kept_shards("rows") if shards.mine(shard)}
    found = {}
    batches = train("features", lambda number: shards.mine(shards.of(number)) and shards.of(number) not in kept)
    for shard, rows in _by_shard(head, batches, shards):
        if shards.folder is None:
            found[shard] = _Rows(rows["h"], rows["z"], rows["v"], rows["y"], int(rows["start"]))
        else:
            shards.keep(f"rows-{shard:08d}", rows)
            kept.add(shard)
    for shard in kept:
        path = shards.kept_path(f"rows-{shard:08d}")
        assert path is not None
        h, z, v = (OnDisk(path, key) for key in _Seen._fields)
        found[shard] = _Rows(h, z, v, OnDisk(path, "y")[:], int(OnDisk(path, "start").scalar()))
    return dict(sorted(found.items()))


def _by_shard(head: Head, batches: Iterator[Batch], shards: Shards) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The rows of one shard after the other, on the CPU where they go to disk."""
    parts: list[tuple[_Seen, Tensor]] = []
    shard, start = -1, 0

    def rows() -> dict[str, Tensor]:
        found = {key: torch.cat([getattr(seen, key) for seen, _ in parts]) for key in _Seen._fields}
        found["y"] = torch.cat([y for _, y in parts])
        found = {key: t if shards.folder is None else t.cpu() for key, t in found.items()}
        return {**found, "start": torch.tensor(start)}

    for batch in batches:
        if not parts:
            shard, start = shards.of(batch.number), batch.start
        parts.append((head.see(batch), batch.y))
        if shards.ends_with(batch.number):
            yield shard, rows()
            parts = []
    if parts:
        yield shard, rows()


def _fold_gradients(head: Head, held_out: Batches, ranks: Ranks, folds: int) -> tuple[Tensor, Tensor]:
    """As last_layer's, over the held-out samples of all processes: sums (F, C, D) float64, counts (F,)."""
    parts = max(1, folds)
    sums = torch.zeros(parts, head.classes, head.width + int(head.bias), dtype=torch.float64, device=head.device)
    counts = torch.zeros(parts, dtype=torch.float64, device=head.device)
    for batch in held_out("validation", lambda number: number % ranks.count == ranks.rank):
        seen = head.see(batch)
        h = Rows(seen.h, seen.z, head.bias).augmented(slice(0, len(seen.z)), torch.float64)
        add_gradients(sums, h, seen.z, batch.y, batch.start)
        counts += torch.bincount((batch.start + torch.arange(len(seen.z), device=head.device)) % parts, minlength=parts)
    sums, counts = ranks.sum(sums), ranks.sum(counts)
    return sums[counts > 0], counts[counts > 0]
