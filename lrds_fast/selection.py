"""From scores to D_t, the samples that keep their teacher: choosing, saving, loading, looking at it."""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lrds_fast._version import __version__
from lrds_fast.files import replacing
from lrds_fast.influence import Scores

_FORMAT = 1
_METADATA_KEY = b"lrds_fast.selection"
_RESERVED = ("index", "label", "teacher_pred", "selected")
_ARROW_FLOATS = {torch.float32: pa.float32(), torch.float64: pa.float64()}


def dataset_fingerprint(labels: Tensor | Sequence[int], num_classes: int) -> str:
    """sha256, in hex, of N, C and the labels in index order, each a little-endian int64.

    labels: (N,) integers in [0, num_classes). Two datasets with equal fingerprints have the same labels in the same
    order, which is what a selection's row numbers refer to. Raises TypeError or ValueError for anything else.
    """
    y = _label_tensor("labels", labels)
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral) or num_classes < 1:
        raise ValueError(f"num_classes must be an int >= 1; got {num_classes!r}")
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= num_classes):
        raise ValueError(f"labels must lie in [0, {num_classes}); got values from {int(y.min())} to {int(y.max())}")
    digest = hashlib.sha256()
    for array in (torch.tensor([len(y), int(num_classes)]), y):
        digest.update(array.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """D_t: which of N samples keep teacher supervision, with the scores and the rule it came from.

    mask: (N,) bool, on the CPU. indices: ascending int64 positions of the kept samples. scores: every score that was
    computed, (N,) by name. labels, teacher_pred: (N,) int64 or None where unknown. policy: how select was called.
    fingerprint: dataset_fingerprint of the dataset, None where unknown. num_classes: None where unknown. meta: facts
    about the scores and library_version, the version that made the selection; JSON-ready.
    """

    mask: Tensor
    scores: Mapping[str, Tensor]
    labels: Tensor | None
    teacher_pred: Tensor | None
    policy: Mapping[str, object]
    fingerprint: str | None
    num_classes: int | None
    meta: Mapping[str, object] = field(default_factory=dict)

    @property
    def indices(self) -> Tensor:
        """(K,) int64, ascending."""
        return self.mask.nonzero()[:, 0]

    def __len__(self) -> int:
        """N: the samples that were chosen from, not those chosen."""
        return self.mask.shape[0]

    def __repr__(self) -> str:
        kept = int(self.mask.sum())
        rule = ", ".join(f"{name}={value!r}" for name, value in self.policy.items() if value not in (None, False))
        return f"Selection({kept} of {len(self)} samples keep the teacher; {rule})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a Parquet table, one row per sample: index, label, teacher_pred, every score, selected.

        Labels and predictions that are not known are null. Policy, fingerprint and versions are in the schema's
        metadata. The file appears complete or not at all. Raises OSError where it cannot be written.
        """
        size = len(self)
        columns: dict[str, pa.Array] = {"index": pa.array(range(size), pa.int64())}
        for name, values in (("label", self.labels), ("teacher_pred", self.teacher_pred)):
            columns[name] = pa.nulls(size, pa.int64()) if values is None else pa.array(values.numpy(), pa.int64())
        for name, score in self.scores.items():
            columns[name] = pa.array(score.numpy(), _ARROW_FLOATS[score.dtype])
        columns["selected"] = pa.array(self.mask.numpy(), pa.bool_())
        facts = {
            "format": _FORMAT,
            "library_version": __version__,
            "fingerprint": self.fingerprint,
            "num_samples": size,
            "num_classes": self.num_classes,
            "scores": list(self.scores),
            "policy": dict(self.policy),
            "meta": dict(self.meta),
        }
        table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(facts)})
        with replacing(path) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], dataset: object = None) -> Selection:
        """Reads what save wrote; with `dataset`, only if it was made for that dataset.

        dataset: a fingerprint (see dataset_fingerprint), or an object that has a `fingerprint` or, as torchvision's
        datasets do, `targets` and `classes`. Raises FileNotFoundError, or ValueError naming the file for one that is
        damaged, is not a selection, or belongs to another dataset.
        """
        name = os.fspath(path)
        table, facts = _read(name)
        try:
            selection = cls(
                mask=torch.tensor(table["selected"].to_numpy(), dtype=torch.bool),
                scores={score: torch.tensor(table[score].to_numpy()) for score in facts["scores"]},
                labels=_optional_column(table, "label"),
                teacher_pred=_optional_column(table, "teacher_pred"),
                policy=facts["policy"],
                fingerprint=facts["fingerprint"],
                num_classes=facts["num_classes"],
                meta=facts["meta"],
            )
            in_order = table["index"].to_pylist() == list(range(facts["num_samples"]))
        except (KeyError, TypeError, ValueError, RuntimeError, pa.ArrowException) as error:
            raise ValueError(f"{name} is not a complete selection ({_one_line(error)}); run select again") from error
        if not in_order:
            raise ValueError(f"{name}: the rows were reordered, added or dropped since it was saved; run select again")
        if selection._relabelled():
            raise ValueError(f"{name}: its labels are not those it was saved with; run select again")
        if dataset is not None:
            wanted = _fingerprint_of(dataset)
            if selection.fingerprint is None:
                raise ValueError(
                    f"{name} does not say which dataset it was made for; make it from Scores, or with"
                    " select(dataset=...)"
                )
            if selection.fingerprint != wanted:
                raise ValueError(
                    f"{name} was made for another dataset ({len(selection)} samples, fingerprint"
                    f" {selection.fingerprint[:12]}; this one's is {wanted[:12]}); score this dataset and select again"
                )
        return selection

    def _relabelled(self) -> bool:
        """Whether labels, C and fingerprint are all known and do not belong together."""
        if self.labels is None or self.num_classes is None or self.fingerprint is None:
            return False
        return dataset_fingerprint(self.labels, self.num_classes) != self.fingerprint

    def report(self, path: str | os.PathLike[str]) -> None:
        """Writes one self-contained HTML page: the rule, a histogram per score, and the classes' shares of D_t."""
        page = _html_report(self)
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(page)


def select(
    scores: Scores | Mapping[str, Tensor],
    by: str = "kd_gain",
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    per_class: bool = False,
    largest: bool = False,
    labels: Tensor | Sequence[int] | None = None,
    dataset: object = None,
) -> Selection:
    """Chooses the samples that keep their teacher: those with the lowest `by` score.

    scores: Scores, or a mapping from names to (N,) values. by: the score to go by.
    Exactly one of
        ratio: in [0, 1]; keeps the floor(ratio * N + 0.5) lowest, ties to the lower index. per_class=True keeps that
            share of every class instead.
        threshold: keeps score < threshold, strictly. 0 is the meaningful one for kd_gain: the teacher helps there.
    largest=True turns the order around: the highest, or score > threshold.
    labels: (N,) class indices, needed for per_class where scores is a plain mapping.
    dataset: what the selection is for: a fingerprint (see dataset_fingerprint), or an object that has a `fingerprint`,
        or `targets` and `classes`. Scores know theirs; if both are given they must agree.

    Deterministic. Raises ValueError or TypeError naming the argument; a NaN score is an error that names the sample.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores must be Scores or a mapping from names to tensors; got {type(scores).__name__}")
    if by not in scores:
        raise ValueError(f"by must be one of the computed scores, {', '.join(map(str, scores))}; got {by!r}")
    ratio, threshold = _checked_budget(ratio, threshold)
    table = {name: _score_tensor(name, values) for name, values in scores.items()}
    size = len(table[by])
    for name, values in table.items():
        if len(values) != size:
            raise ValueError(f"every score must have the {size} samples of {by!r}; {name!r} has {len(values)}")
    score = table[by].double()
    if score.isnan().any():
        raise ValueError(f"score {by!r} is NaN at sample {int(score.isnan().nonzero()[0, 0])}; score again without it")

    y, teacher_pred, num_classes, fingerprint, meta = _facts(scores, labels, dataset, size)
    if per_class and y is None:
        raise ValueError("per_class=True needs labels=, the class of each sample, where scores is a plain mapping")

    mask = torch.zeros(size, dtype=torch.bool)
    if threshold is not None:
        mask = score > threshold if largest else score < threshold
    elif ratio is not None:
        order = torch.argsort(score, stable=True, descending=largest)
        groups = [order]
        if per_class and y is not None:
            groups = [order[y[order] == label] for label in torch.unique(y)]
        for group in groups:
            mask[group[: math.floor(ratio * len(group) + 0.5)]] = True
    return Selection(
        mask=mask,
        scores=table,
        labels=y,
        teacher_pred=teacher_pred,
        policy={"by": by, "ratio": ratio, "threshold": threshold, "per_class": per_class, "largest": largest},
        fingerprint=fingerprint,
        num_classes=num_classes,
        meta={**meta, "library_version": __version__},
    )


def _checked_budget(ratio: float | None, threshold: float | None) -> tuple[float | None, float | None]:
    """Exactly one of them, as a float within its range."""
    if (ratio is None) == (threshold is None):
        raise ValueError(f"exactly one of ratio and threshold must be given; got ratio={ratio}, threshold={threshold}")
    for name, value in (("ratio", ratio), ("threshold", threshold)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise TypeError(f"{name} must be a number; got {value!r}")
    if ratio is not None and not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in [0, 1]; got {ratio!r}")
    if threshold is not None and math.isnan(threshold):
        raise ValueError(f"threshold must be a number; got {threshold!r}")
    return None if ratio is None else float(ratio), None if threshold is None else float(threshold)


def _facts(
    scores: Mapping[str, Tensor], labels: Tensor | Sequence[int] | None, dataset: object, size: int
) -> tuple[Tensor | None, Tensor | None, int | None, str | None, Mapping[str, object]]:
    """Labels, teacher predictions, C, fingerprint and meta, as far as scores, labels and dataset know them."""
    y = None if labels is None else _label_tensor("labels", labels)
    if y is not None and len(y) != size:
        raise ValueError(f"labels must have one entry per sample, {size}; got {len(y)}")
    wanted = None if dataset is None else _fingerprint_of(dataset)
    if not isinstance(scores, Scores):
        return y, None, None, wanted, {}
    target = scores.target.cpu()
    if y is not None and not torch.equal(y, target):
        raise ValueError("labels differ from scores.target; leave labels out, Scores carry their own")
    classes = scores.meta.get("num_classes")
    num_classes = classes if isinstance(classes, int) else None
    fingerprint = wanted if num_classes is None else dataset_fingerprint(target, num_classes)
    if wanted is not None and fingerprint != wanted:
        raise ValueError(
            f"scores were computed for another dataset (fingerprint {str(fingerprint)[:12]}; dataset's is"
            f" {wanted[:12]}); score this dataset"
        )
    return target, scores.teacher_pred.cpu(), num_classes, fingerprint, scores.meta


def _score_tensor(name: object, values: object) -> Tensor:
    """(N,) float32 or float64 on the CPU."""
    if not isinstance(name, str) or not name or name in _RESERVED:
        raise ValueError(f"scores must have names other than {', '.join(_RESERVED)}; got {name!r}")
    try:
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"score {name!r} must be a tensor of numbers; got {type(values).__name__}") from error
    if tensor.dim() != 1 or tensor.is_complex():
        raise ValueError(f"score {name!r} must be real with shape (N,); got {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.dtype not in _ARROW_FLOATS:
        narrow = tensor.dtype in (torch.float16, torch.bfloat16)
        tensor = tensor.to(torch.float32 if narrow else torch.float64)
    return tensor


def _label_tensor(name: str, labels: object) -> Tensor:
    """(N,) int64 on the CPU, from anything that holds integers."""
    try:
        tensor = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must hold integers; got {type(labels).__name__}") from error
    if tensor.dim() != 1 or (tensor.numel() and (tensor.is_floating_point() or tensor.is_complex())):
        raise ValueError(f"{name} must be integers with shape (N,); got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.long()


def _fingerprint_of(dataset: object) -> str:
    """A dataset's fingerprint, from whatever the caller has of it."""
    if isinstance(dataset, str):
        if len(dataset) != 64 or not set(dataset) <= set("0123456789abcdef"):
            raise ValueError(f"dataset must be a fingerprint of 64 hex digits; got {dataset!r}")
        return dataset
    fingerprint: object = getattr(dataset, "fingerprint", None)
    if isinstance(fingerprint, str):
        return _fingerprint_of(fingerprint)
    targets: Any = getattr(dataset, "targets", None)
    classes: Any = getattr(dataset, "classes", None)
    if targets is None or classes is None:
        raise TypeError(
            "dataset must be a fingerprint (see dataset_fingerprint), or have a `fingerprint`, or `targets` and"
            f" `classes`; got {type(dataset).__name__}"
        )
    return dataset_fingerprint(targets, classes if isinstance(classes, int) else len(classes))


def _one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _read(name: str) -> tuple[pa.Table, dict[str, Any]]:
    """The table of a selection file and its metadata."""
    if not os.path.exists(name):
        raise FileNotFoundError(f"there is no selection at {name}")
    if not os.path.isfile(name):
        raise ValueError(f"{name} is not a file; give the Parquet file that Selection.save wrote")
    try:
        table = pq.read_table(name, use_threads=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{name} is truncated, damaged or not Parquet ({_one_line(error)}); run select again"
        ) from error
    raw = (table.schema.metadata or {}).get(_METADATA_KEY)
    try:
        facts = json.loads(raw) if raw is not None else None
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        message = f"{name} is Parquet but not a selection; give a file that Selection.save wrote"
        raise ValueError(message)
    if facts.get("format") != _FORMAT:
        raise ValueError(
            f"{name} has selection format {facts.get('format')!r}, this version reads {_FORMAT}; run select again"
        )
    return table, facts


def _optional_column(table: pa.Table, name: str) -> Tensor | None:
    """An int64 column, or None where it is all null."""
    column = table[name]
    if len(column) and column.null_count == len(column):
        return None
    if column.null_count:
        raise ValueError(f"column {name!r} has {column.null_count} nulls")
    return torch.tensor(column.to_numpy(), dtype=torch.int64)


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.15rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
    "svg{width:100%;height:9rem}.kept{fill:#2a6fb0}.denied{fill:#d9822b}h2{margin-top:2rem;font-size:1.1rem}"
)


def _html_report(selection: Selection) -> str:
    kept, total = int(selection.mask.sum()), len(selection)
    rule = ", ".join(f"{name} = {value}" for name, value in selection.policy.items())
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Selection</title>",
        f"<style>{_STYLE}</style><h1>{kept} of {total} samples keep the teacher</h1>",
        f"<p>{html.escape(rule)}</p><p>Blue: the teacher is kept. Orange: the label alone.</p>",
    ]
    by = str(selection.policy.get("by", ""))
    parts += [
        f"<h2>{html.escape(name)}</h2>{_histogram(selection.scores[name].double(), selection.mask)}"
        for name in sorted(selection.scores, key=lambda name: name != by)
    ]
    if selection.labels is not None:
        parts.append("<h2>Classes</h2><table><tr><th>class<th>samples<th>kept<th>share")
        for label in torch.unique(selection.labels).tolist():
            rows = selection.labels == label
            size, inside = int(rows.sum()), int((rows & selection.mask).sum())
            parts.append(f"<tr><td>{label}<td>{size}<td>{inside}<td>{inside / size:.0%}")
        parts.append("</table>")
    return "\n".join(parts) + "\n"


def _histogram(score: Tensor, mask: Tensor, bins: int = 60) -> str:
    """An SVG of stacked bars over the finite values, with the ends of the axis in text."""
    finite = score.isfinite()
    values, kept = score[finite], mask[finite]
    if not len(values):
        return "<p>No finite value.</p>"
    low, high = float(values.min()), float(values.max())
    place = ((values - low) / ((high - low) or 1.0) * bins).long().clamp(max=bins - 1)
    below = torch.bincount(place[kept], minlength=bins)
    above = torch.bincount(place[~kept], minlength=bins)
    scale = 100.0 / int((below + above).max())
    bars = []
    for i, (k, d) in enumerate(zip(below.tolist(), above.tolist(), strict=True)):
        for cls, count, base in (("kept", k, 0), ("denied", d, k)):
            if count:
                top = 100 - (base + count) * scale
                bars.append(f'<rect class={cls} x={i} y="{top:.2f}" width=.92 height="{count * scale:.2f}" />')
    left_out = f"; {int((~finite).sum())} infinite or NaN left out" if not finite.all() else ""
    return (
        f'<svg viewBox="0 0 {bins} 100" preserveAspectRatio=none>{"".join(bars)}</svg>'
        f"<p>from {low:.4g} to {high:.4g}{left_out}</p>"
    )
