"""Cached logits on disk: a folder of NumPy files, one per run of batches, that a killed process leaves usable.

    view-0000-part-00012.npy    one record a sample: index, box, and its logits or the largest of them
    view-0000-rows.npy          (samples,) int32: where in the view's records a sample is, -1 where it is not
    written.jsonl               while writing: what is on the disk, with checksums
    meta.json                   what the logits depend on; last of all the list of files, which makes the cache complete

Every file is whole or absent. A record is contiguous, so that a random sample costs one place of the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrds_fast.files import naming, replacing
from lrds_fast.topk import TopKTeacher

FORMAT = 2
META, JOURNAL = "meta.json", "written.jsonl"
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Layout:
    """What the files hold. kept: how many of the samples have logits; rows: which, as a checksum. top_k 0: all
    `classes` logits of a sample; else its top_k largest, their classes, and the others' logsumexp at `temperature`.
    dtype: "float16" or "float32", of the logits. batches: of an epoch; a shard is `shard_batches` of them."""

    samples: int
    kept: int
    rows: str
    classes: int
    views: int
    top_k: int
    dtype: str
    temperature: float
    batches: int
    shard_batches: int

    def __post_init__(self) -> None:
        if self.views < 1 or self.shard_batches < 1:
            raise ValueError(f"views and shard_batches must be at least 1; got {self.views} and {self.shard_batches}")
        if not 0 <= self.top_k <= self.classes:
            raise ValueError(f"top_k must be 0 (all) to {self.classes}, the number of classes; got {self.top_k}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 and finite; got {self.temperature}")

    @property
    def record(self) -> np.dtype[Any]:
        """The type of a sample's record."""
        logits = "<f2" if self.dtype == "float16" else "<f4"
        fields: list[Any] = [("index", "<i4"), ("box", "<i4", (5,))]
        if self.top_k:
            place = "<i2" if self.classes <= 1 << 15 else "<i4"
            fields += [("rest", "<f4"), ("values", logits, (self.top_k,)), ("indices", place, (self.top_k,))]
        else:
            fields += [("logits", logits, (self.classes,))]
        return np.dtype(fields)

    @property
    def shards(self) -> int:
        """Shards of a view."""
        return -(-self.batches // self.shard_batches)

    @property
    def bytes(self) -> int:
        """What the files take on the disk, but for their list."""
        header = 256  # of a NumPy file, at most
        return self.views * (self.kept * self.record.itemsize + self.samples * 4 + (self.shards + 1) * header)

    def pack(self, indices: Tensor, boxes: Tensor, logits: Tensor) -> np.ndarray:
        """Records of N samples. logits: (N, classes) floating, on any device.

        Raises ValueError for logits that are NaN, or beyond float16 where that is the dtype.
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
        records = np.empty(len(indices), dtype=self.record)
        records["index"], records["box"] = indices.numpy(), boxes.numpy()
        if self.top_k:
            # Of the rounded logits, so that the kept classes and the rest add up to one.
            kept = TopKTeacher.from_logits(stored.float(), self.top_k, temperature=self.temperature)
            records["values"] = kept.values.cpu().numpy()
            records["indices"] = kept.indices.cpu().numpy()
            assert kept.rest is not None
            records["rest"] = kept.rest.cpu().numpy()
        else:
            records["logits"] = stored.cpu().numpy()
        return records

    def unpack(self, records: np.ndarray, device: torch.device | str) -> Tensor | TopKTeacher:
        """The records' logits (N, classes), or the largest of them, as kd_loss takes them."""

        def tensor(name: str, dtype: Any = None) -> Tensor:
            return torch.from_numpy(np.array(records[name], dtype=dtype, order="C")).to(device, non_blocking=True)

        if not self.top_k:
            return tensor("logits")
        values, rest = tensor("values"), tensor("rest")
        log_sum = torch.logaddexp((values.float() / self.temperature).logsumexp(dim=-1), rest)
        return TopKTeacher(values, tensor("indices", np.int32), log_sum, self.temperature, rest)


class Entry(NamedTuple):
    """A file of the cache, as it must be. rows: its records or, of a view's rows, the samples that are cached."""

    file: str
    rows: int
    bytes: int
    sha256: str


def part_name(view: int, shard: int) -> str:
    """The file of a shard."""
    return f"view-{view:04d}-part-{shard:05d}.npy"


def rows_name(view: int) -> str:
    """The file that says where a view's samples are."""
    return f"view-{view:04d}-rows.npy"


def save(folder: Path, name: str, array: np.ndarray, rows: int) -> Entry:
    """Writes an array, whole and on the disk or not at all."""
    with replacing(folder / name) as temporary:
        with open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
        # Of what came back, not of what was meant.
        return Entry(name, rows, os.path.getsize(temporary), sha256(Path(temporary)))


def load(folder: Path, name: str) -> np.ndarray:
    """A file's array, mapped into memory; its contents are read when they are looked at."""
    try:
        array: np.ndarray = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(_damaged(folder / name, f"not readable: {error}")) from error
    return array


def sha256(path: Path) -> str:
    """A file's checksum, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def check(folder: Path, entry: Entry, *, verify: bool) -> None:
    """ValueError where a file is missing or not of its size; with verify, where its checksum is another."""
    path = folder / entry.file
    if not path.is_file():
        raise ValueError(_damaged(path, "missing"))
    if path.stat().st_size != entry.bytes:
        raise ValueError(_damaged(path, f"cut short or overwritten: {path.stat().st_size} bytes, not {entry.bytes}"))
    if verify and sha256(path) != entry.sha256:
        raise ValueError(_damaged(path, "damaged: its checksum is not the one it was written with"))


def _damaged(path: Path, how: str) -> str:
    return f"{path} is {how}; lrds-fast cache --resume writes it again"


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json with a Layout under "layout" and Entry objects under "files" (None while it is not complete).

    Raises FileNotFoundError where there is no cache, ValueError for one that is damaged or of another format.
    """
    path = folder / META
    if not path.is_file():
        raise FileNotFoundError(f"there is no cache of soft labels in {folder}; lrds-fast cache writes one")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        found = meta["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); write the cache afresh with --overwrite") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}, this version reads {FORMAT}; write the cache afresh")
    try:
        layout = Layout(**meta["layout"])
        files = meta["files"] and [Entry(*entry) for entry in meta["files"]]
        facts = dict(meta["facts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); write the cache afresh with --overwrite") from error
    return {"layout": layout, "files": files, "facts": facts}


def write_meta(folder: Path, layout: Layout, facts: Mapping[str, Any], files: list[Entry] | None) -> None:
    """meta.json; with the files, the cache is complete."""
    text = json.dumps({"format": FORMAT, "facts": dict(facts), "layout": asdict(layout), "files": files}, indent=1)
    with replacing(folder / META) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def read_journal(folder: Path) -> list[Entry]:
    """What an unfinished run has written; a line cut short is left out."""
    path = folder / JOURNAL
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [entry for entry in map(_entry, lines) if entry is not None]


def _entry(line: str) -> Entry | None:
    try:
        return Entry(*json.loads(line))
    except (ValueError, TypeError):
        return None


def append_journal(folder: Path, entry: Entry) -> None:
    """One more file is on the disk."""
    with naming(folder / JOURNAL), (folder / JOURNAL).open("a", encoding="utf-8") as file:
        # A line that a crash cut short must not swallow this one.
        file.write(("\n" if file.tell() else "") + json.dumps(entry) + "\n")


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as they come back from JSON."""
    found: dict[str, Any] = json.loads(json.dumps(dict(facts)))
    return found


def check_facts(folder: Path, cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ValueError naming every fact that differs, as it is in the cache and as it is wanted."""
    nothing = "not there"
    wanted = plain(wanted)
    differences = [
        f"its {name} is {cached.get(name, nothing)!r}, wanted is {wanted.get(name, nothing)!r}"
        for name in sorted({*cached, *wanted})
        if cached.get(name, nothing) != wanted.get(name, nothing)
    ]
    if differences:
        raise ValueError(
            f"the soft labels in {folder} are not those that are wanted: {'; '.join(differences)};"
            " write others in another folder (lrds-fast cache)"
        )


def size_text(count: int) -> str:
    """A number of bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
