"""The files of a teacher's cached logits: one memory-mapped array per view.

    view-0000.bin  a record per cached sample, in the samples' order: checksum, batch, box, and logits or the largest
    rows.npy       (samples,) bool: the samples that are cached
    meta.json      what the logits depend on, the layout, and whether the cache is complete

A record counts only if its CRC-32 is right: a killed process, a power cut or a bad disk costs the batches whose records
it tore, and nothing else has to be on the disk first. Records are written as to any file, never through the mapping, so
that a full disk is an error and not a signal.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrds_fast.files import atomic_write, naming, write_text
from lrds_fast.topk import TopKTeacher

FORMAT = 3
META, ROWS = "meta.json", "rows.npy"
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Layout:
    """Shape and types of a cache.

    samples: of the training set. kept: how many of them are cached; rows: a checksum of which ones. top_k: 0 for all
    `classes` logits of a sample; else its top_k largest, their classes, and the logsumexp of the others at
    `temperature`. dtype: of the logits, "float16" or "float32". batches: in each view.
    """

    samples: int
    kept: int
    rows: str
    classes: int
    views: int
    top_k: int
    dtype: str
    temperature: float
    batches: int

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ValueError(f"views must be at least 1; got {self.views}")
        if not 0 <= self.top_k <= self.classes:
            raise ValueError(f"top_k must be 0 (all) to {self.classes}, the number of classes; got {self.top_k}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 and finite; got {self.temperature}")

    @property
    def record(self) -> np.dtype[Any]:
        """The type of a sample's record. batch: the number of the batch that wrote it; batch_rows: the batch's
        records."""
        logits = "<f2" if self.dtype == "float16" else "<f4"
        fields: list[Any] = [("crc", "<u4"), ("batch", "<i4"), ("batch_rows", "<i4"), ("box", "<i4", (5,))]
        if self.top_k:
            number = "<i2" if self.classes <= 1 << 15 else "<i4"
            fields += [("rest", "<f4"), ("values", logits, (self.top_k,)), ("indices", number, (self.top_k,))]
        else:
            fields += [("logits", logits, (self.classes,))]
        return np.dtype(fields)

    @property
    def view_bytes(self) -> int:
        """Size of a view's file."""
        return self.kept * self.record.itemsize

    @property
    def bytes(self) -> int:
        """Size of all files but meta.json."""
        return self.views * self.view_bytes + self.samples

    def pack(self, indices: Tensor, boxes: Tensor, logits: Tensor) -> np.ndarray:
        """Records of N samples, without checksum, batch and batch_rows.

        indices: (N,) int64, for errors. boxes: (N, 5) int32. logits: (N, classes) floating, on any device. Raises
        ValueError for logits that are NaN, or beyond float16 where that is the dtype.
        """
        exact = logits.float()
        stored = exact.to(torch.float16 if self.dtype == "float16" else torch.float32)
        wrong = (stored.isinf() & ~exact.isinf()) | stored.isnan()
        if bool(wrong.any()):
            row = int(wrong.any(dim=1).nonzero()[0])
            value = float(exact[row][wrong[row]][0])
            raise ValueError(
                f"the teacher's logits of sample {int(indices[row])} hold {value:g}: "
                + ("it gives NaN; check its weights" if value != value else "too much for float16; take dtype float32")
            )
        records = np.zeros(len(logits), dtype=self.record)
        records["box"] = boxes.numpy()
        if self.top_k:
            # From the rounded logits, so that the probabilities of the kept classes and of the rest add up to one.
            largest = TopKTeacher.from_logits(stored.float(), self.top_k, temperature=self.temperature)
            records["values"] = largest.values.cpu().numpy()
            records["indices"] = largest.indices.cpu().numpy()
            assert largest.rest is not None
            records["rest"] = largest.rest.cpu().numpy()
        else:
            records["logits"] = stored.cpu().numpy()
        return records

    def unpack(
        self, records: np.ndarray, device: torch.device | str, places: np.ndarray | slice = slice(None)
    ) -> Tensor | TopKTeacher:
        """Logits (N, classes) of the records at N places, or the largest of them, as kd_loss takes them."""

        def tensor(name: str, dtype: Any = None) -> Tensor:
            column = np.ascontiguousarray(records[name][places], dtype=dtype)
            return torch.from_numpy(column).to(device, non_blocking=True)

        if not self.top_k:
            return tensor("logits")
        values, rest = tensor("values"), tensor("rest")
        log_sum = torch.logaddexp((values.float() / self.temperature).logsumexp(dim=-1), rest)
        return TopKTeacher(values, tensor("indices", np.int32), log_sum, self.temperature, rest)


def view_path(folder: Path, view: int) -> Path:
    """The file of a view's records."""
    return folder / f"view-{view:04d}.bin"


def map_view(folder: Path, layout: Layout, view: int) -> np.ndarray:
    """A view's (kept,) records, mapped into memory. ValueError where the file is missing or not of its size."""
    path = view_path(folder, view)
    if not path.is_file():
        raise damaged(path, "missing")
    if path.stat().st_size != layout.view_bytes:
        raise damaged(path, f"cut short or overwritten: {path.stat().st_size} bytes, not {layout.view_bytes}")
    if not layout.kept:  # an empty file cannot be mapped
        return np.empty(0, layout.record)
    return np.memmap(path, layout.record, "r").view(np.ndarray)


def checksums(records: np.ndarray, places: np.ndarray, view: int) -> np.ndarray:
    """(N,) uint32: the CRC-32 of each contiguous record behind its first field, begun with its view and place. Never 0,
    which is what a file has where nothing was written."""
    data = records.view(np.uint8).reshape(len(records), records.itemsize)[:, 4:]
    begin = (places.astype(np.int64) + (view << 24)).tolist()
    return np.maximum(np.fromiter(map(zlib.crc32, data, begin), np.uint32, len(records)), 1)


def valid_records(records: np.ndarray, view: int) -> np.ndarray:
    """(kept,) bool: which of a view's records have the right checksum. Reads all of them."""
    valid: np.ndarray = records["crc"] == checksums(records, np.arange(len(records)), view)
    return valid


def open_view(folder: Path, layout: Layout, view: int) -> BinaryIO:
    """A view's file, opened for write_records, with the room that it needs; records that it has stay."""
    path = view_path(folder, view)
    with naming(path):
        file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        try:
            file.truncate(layout.view_bytes)
            if layout.kept:
                os.posix_fallocate(file.fileno(), 0, layout.view_bytes)
        except OSError:
            file.close()
            raise
    return file


def finished(folder: Path, layout: Layout, view: int) -> tuple[np.ndarray, np.ndarray]:
    """((batches,) bool, (kept,) bool): the batches of a view whose records are all valid, and these records."""
    records = map_view(folder, layout, view)
    valid = valid_records(records, view)
    if valid.all():
        return np.ones(layout.batches, bool), valid
    batch, batch_rows = records["batch"][valid], records["batch_rows"][valid]
    complete = np.bincount(batch, minlength=layout.batches)[batch] == batch_rows
    valid[valid] = complete
    done = np.zeros(layout.batches, bool)
    done[batch[complete]] = True
    return done, valid


def write_records(file: BinaryIO, view: int, batch: int, places: np.ndarray, records: np.ndarray) -> None:
    """Writes all records of a batch at their places (N,), and adds what `pack` leaves out."""
    records["batch"], records["batch_rows"] = batch, len(records)
    records["crc"] = checksums(records, places, view)
    with naming(file.name):
        for place, record in zip(places.tolist(), records, strict=True):
            data, offset = memoryview(record.tobytes()), place * records.itemsize
            while data:  # a write may be short; the next one raises the reason
                count = os.pwrite(file.fileno(), data, offset)
                data, offset = data[count:], offset + count


def write_rows(path: Path, rows: np.ndarray) -> None:
    """Writes the mask of the cached samples, (samples,) bool, whole or not at all."""
    with atomic_write(path) as file:
        np.save(file, rows, allow_pickle=False)


def read_rows(folder: Path, layout: Layout) -> np.ndarray:
    """(samples,) bool: the samples that are cached. ValueError where the file is missing or damaged."""
    try:
        rows: np.ndarray = np.load(folder / ROWS, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise damaged(folder / ROWS, "missing or damaged") from error
    if rows.shape != (layout.samples,) or rows_checksum(rows) != layout.rows:
        raise damaged(folder / ROWS, "damaged: its checksum is not the one in meta.json")
    return rows


def rows_checksum(rows: np.ndarray) -> str:
    """The checksum of a mask (samples,) bool, for Layout.rows."""
    return hashlib.sha256(rows.tobytes()).hexdigest()[:16]


def damaged(path: Path, how: str) -> ValueError:
    """The error for a file that --resume repairs."""
    return ValueError(f"{path} is {how}; lrds-fast cache --resume writes it again")


class Meta(NamedTuple):
    """meta.json: the layout, the facts that the logits depend on, and whether every record is written."""

    layout: Layout
    facts: dict[str, Any]
    complete: bool


def read_meta(folder: Path) -> Meta:
    """Raises FileNotFoundError where there is no cache, ValueError for a damaged one or one of another format."""
    path = folder / META
    if not path.is_file():
        raise FileNotFoundError(f"there is no cache of soft labels in {folder}; lrds-fast cache writes one")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] == FORMAT:
            return Meta(Layout(**meta["layout"]), dict(meta["facts"]), bool(meta["complete"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); write the cache again with --overwrite") from error
    raise ValueError(
        f"{path} has format {meta['format']!r}, this version reads {FORMAT}: run lrds-fast cache again with --overwrite"
    )


def write_meta(folder: Path, meta: Meta) -> None:
    """Writes meta.json, whole or not at all."""
    fields = {"format": FORMAT, "complete": meta.complete, "layout": asdict(meta.layout), "facts": meta.facts}
    write_text(folder / META, json.dumps(fields, indent=1))


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as they come back from JSON."""
    copied: dict[str, Any] = json.loads(json.dumps(dict(facts)))
    return copied


def check_facts(folder: Path, cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ValueError naming every fact that differs, as it is in the cache and as it is wanted."""
    nothing = "not there"
    wanted = plain(wanted)
    differences = [
        f"its {name} is {cached.get(name, nothing)!r}, this run's is {wanted.get(name, nothing)!r}"
        for name in sorted({*cached, *wanted})
        if cached.get(name, nothing) != wanted.get(name, nothing)
    ]
    if differences:
        raise ValueError(
            f"the cache in {folder} does not fit this run: {'; '.join(differences)};"
            " write one for this run in another folder (lrds-fast cache)"
        )


def size_text(count: int) -> str:
    """A number of bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
