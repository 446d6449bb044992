"""A selection, its table on disk, and the fingerprint of the dataset that it belongs to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lrds_fast._numbers import integer
from lrds_fast._version import __version__
from lrds_fast.files import replacing
from lrds_fast.selection.flagged import Flagged

_FORMAT = 1
_METADATA_KEY = b"lrds_fast.selection"
RESERVED = ("index", "label", "teacher_pred", "selected")
#: From a sample's index to its picture, by call or by subscript.
Pictures = Callable[[int], Any] | Sequence[Any] | Dataset[Any]
ARROW_FLOATS = {torch.float32: pa.float32(), torch.float64: pa.float64()}


def dataset_fingerprint(labels: Tensor | Sequence[int], num_classes: int) -> str:
    """sha256, in hex, of N, C and the labels in index order, each a little-endian int64.

    labels: (N,) integers in [0, num_classes). Two datasets with equal fingerprints have the same labels in the same
    order, so the row numbers of a selection mean the same samples. Raises TypeError or ValueError for anything else.
    """
    y = label_tensor("labels", labels)
    if (num_classes := integer("num_classes", num_classes, "an int >= 1")) < 1:
        raise ValueError(f"num_classes must be an int >= 1; got {num_classes!r}")
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= num_classes):
        raise ValueError(f"labels must lie in [0, {num_classes}); got values from {int(y.min())} to {int(y.max())}")
    digest = hashlib.sha256()
    for array in (torch.tensor([len(y), num_classes]), y):
        digest.update(array.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """D_t: which of N samples keep teacher supervision, with the scores and the rule that decided.

    mask: (N,) bool, on the CPU. scores: every score that was computed, (N,) float32 or float64 by name. labels,
    teacher_pred: (N,) int64, or None where unknown. policy: the arguments of select. fingerprint: dataset_fingerprint
    of the dataset, None where unknown. num_classes: None where unknown. meta: facts about the scores and
    library_version, the version that made the selection; JSON-ready.
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
        """(K,) int64, the numbers of the kept samples, ascending."""
        return self.mask.nonzero()[:, 0]

    def __len__(self) -> int:
        """N, the number of all samples, kept or not."""
        return self.mask.shape[0]

    def __repr__(self) -> str:
        kept = int(self.mask.sum())
        rule = ", ".join(
            f"{name}={value!r}" for name, value in self.policy.items() if value is not None and value is not False
        )
        return f"Selection({kept} of {len(self)} samples keep the teacher; {rule})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a Parquet table, one row per sample: index, label, teacher_pred, every score, selected.

        Unknown labels and predictions are null. Policy, fingerprint and versions are in the schema's metadata. The file
        is written atomically: complete or not at all. Raises OSError if it cannot be written.
        """
        size = len(self)
        columns: dict[str, pa.Array] = {"index": pa.array(range(size), pa.int64())}
        for name, values in (("label", self.labels), ("teacher_pred", self.teacher_pred)):
            columns[name] = pa.nulls(size, pa.int64()) if values is None else pa.array(values.numpy(), pa.int64())
        for name, score in self.scores.items():
            columns[name] = pa.array(score.numpy(), ARROW_FLOATS[score.dtype])
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
        """Reads what save wrote; with `dataset`, ValueError unless it was made for that dataset.

        dataset: a fingerprint (see dataset_fingerprint), or an object that has a `fingerprint` or, as torchvision's
        datasets do, `targets`, the (N,) labels; its `classes` (their names or number) are needed only where the file
        lacks the number of classes. Raises FileNotFoundError, TypeError for a dataset that has neither, or
        ValueError naming the file for one that is damaged, is not a selection, or belongs to another dataset.
        """
        return read_selection(path, dataset)

    def dataset(self, of: Any) -> Dataset[Any]:
        """The samples of `of` with a flag, True for selected samples: (x, y, ...) becomes (x, y, ..., bool).

        of: a map-style Dataset (or a list) of the samples that the selection was made from, in the same order, with any
        transform; samples that are dicts get the key "selected". A DataLoader collates the flags to (B,) bool, for
        kd_loss's `selected` or for `prefix`. Raises ValueError where the numbers of samples or,
        if `of` has `targets` or a `fingerprint`, the labels differ.
        """
        if not (hasattr(of, "__getitem__") and hasattr(of, "__len__")):
            raise TypeError(f"of must be a map-style Dataset, with a length and items; got {type(of).__name__}")
        if len(of) != len(self):
            raise ValueError(
                f"the selection is for {len(self)} samples, the dataset has {len(of)}; select for this dataset"
            )
        has_labels = any(getattr(of, name, None) is not None for name in ("fingerprint", "targets"))
        has_classes = self.num_classes is not None or getattr(of, "classes", None) is not None
        if self.fingerprint is not None and has_labels and has_classes:
            self._check_dataset("the selection", of)
        return Flagged(of, self.mask)

    def _check_dataset(self, name: str, dataset: object) -> None:
        """ValueError unless the dataset has this fingerprint. name: of the selection, for the error."""
        assert self.fingerprint is not None
        try:
            of_dataset = fingerprint_of(dataset, self.num_classes)
        except ValueError as error:
            raise ValueError(f"{name} cannot be compared with the dataset: {error}") from error
        if self.fingerprint != of_dataset:
            raise ValueError(
                f"{name} was made for another dataset ({len(self)} samples, fingerprint {self.fingerprint[:12]}; this"
                f" one's is {of_dataset[:12]}); score this dataset and select again"
            )

    def _relabelled(self) -> bool:
        """Whether labels, C and fingerprint are all known and the fingerprint is not theirs."""
        if self.labels is None or self.num_classes is None or self.fingerprint is None:
            return False
        return dataset_fingerprint(self.labels, self.num_classes) != self.fingerprint

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        pictures: Pictures | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Writes one self-contained HTML page on which samples were kept and why.

        It has a histogram of every score, with its threshold and, where they are known, standard errors; the agreement
        of the scores (rank correlation, and overlap of what each would keep); every class's share of D_t and the spread
        of the deciding score in it; the samples with the most helpful and the most harmful teacher by this score.
        pictures: a function from a sample's index to its picture, or a dataset whose items are pictures or begin with
        one. A picture is a PIL image, or an array or tensor (H, W), (H, W, 1 or 3) or (1 or 3, H, W): uint8, or
        floating, which is scaled from its lowest to its highest value. None: the page has numbers only. class_names: of
        the classes 0, 1, ...
        Raises OSError if the page cannot be written, ValueError or TypeError for something that is not a picture,
        ImportError without matplotlib and Jinja2.
        """
        from lrds_fast.selection.report import selection_page

        text = selection_page(self, pictures, class_names)
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(text)


def read_selection(
    path: str | os.PathLike[str],
    dataset: object = None,
    *,
    what: str = "selection",
    otherwise: str = "write it again with lrds-fast select or Selection.save",
) -> Selection:
    """Selection.load for any file that Selection.save wrote: selections, and the scores of lrds-fast score.

    what: the kind of file, for errors. otherwise: how to replace a damaged file, for errors.
    """
    name = os.fspath(path)
    table, facts = _read(name, what, otherwise)
    try:
        selection = Selection(
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
        raise ValueError(f"{name} is not a complete {what} ({_one_line(error)}); {otherwise}") from error
    if not in_order:
        raise ValueError(f"{name}: the rows were reordered, added or dropped since it was saved; {otherwise}")
    if selection._relabelled():
        raise ValueError(f"{name}: its labels are not those it was saved with; {otherwise}")
    if dataset is not None:
        if selection.fingerprint is None:
            raise ValueError(
                f"{name} does not say which dataset it was made for; make it from Scores, or with select(dataset=...)"
            )
        selection._check_dataset(name, dataset)
    return selection


def label_tensor(name: str, labels: object) -> Tensor:
    """(N,) int64 on the CPU, from anything that holds integers. name: for the TypeError or ValueError."""
    try:
        tensor = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must hold integers; got {type(labels).__name__}") from error
    if tensor.dim() != 1 or (tensor.numel() and (tensor.is_floating_point() or tensor.is_complex())):
        raise ValueError(f"{name} must be integers with shape (N,); got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.long()


def fingerprint_of(dataset: object, num_classes: int | None = None) -> str:
    """The fingerprint of a dataset, which may be the fingerprint itself. num_classes: C, if it has no `classes`.

    Raises TypeError or ValueError for an object without labels or number of classes.
    """
    if isinstance(dataset, str):
        if len(dataset) != 64 or not set(dataset) <= set("0123456789abcdef"):
            raise ValueError(f"dataset must be a fingerprint of 64 hex digits; got {dataset!r}")
        return dataset
    fingerprint: object = getattr(dataset, "fingerprint", None)
    if isinstance(fingerprint, str):
        return fingerprint_of(fingerprint)
    targets: Any = getattr(dataset, "targets", None)
    classes: Any = getattr(dataset, "classes", None)
    if classes is None:
        classes = num_classes
    if targets is None or classes is None:
        lacking = "`targets`" if targets is None else "`classes`, and the number of classes is not known otherwise"
        raise TypeError(
            f"dataset must be a fingerprint, or have a `fingerprint`, or `targets`; this {type(dataset).__name__} lacks"
            f" {lacking}: pass dataset=lrds_fast.selection.dataset_fingerprint(labels, num_classes), labels being the"
            " (N,) class of each sample"
        )
    return dataset_fingerprint(targets, classes if isinstance(classes, int) else len(classes))


def _one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _read(name: str, what: str, otherwise: str) -> tuple[pa.Table, dict[str, Any]]:
    """The table of a file that Selection.save wrote, and its metadata; what, otherwise: as in read_selection."""
    if not os.path.exists(name):
        raise FileNotFoundError(f"there is no {what} at {name}")
    if not os.path.isfile(name):
        raise ValueError(f"{name} is not a file; give the Parquet file of the {what}")
    try:
        table = pq.read_table(name, use_threads=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} is truncated, damaged or not Parquet ({_one_line(error)}); {otherwise}") from error
    raw = (table.schema.metadata or {}).get(_METADATA_KEY)
    try:
        facts = json.loads(raw) if raw is not None else None
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"{name} is Parquet but not a {what}; name another file")
    if facts.get("format") != _FORMAT:
        raise ValueError(f"{name} has {what} format {facts.get('format')!r}, this version reads {_FORMAT}; {otherwise}")
    return table, facts


def _optional_column(table: pa.Table, name: str) -> Tensor | None:
    """An int64 column, or None where it is all null."""
    column = table[name]
    if len(column) and column.null_count == len(column):
        return None
    if column.null_count:
        raise ValueError(f"column {name!r} has {column.null_count} nulls")
    return torch.tensor(column.to_numpy(), dtype=torch.int64)
