"""Soft labels that a teacher gave once: its logits of a few augmented views of every sample, written and read back.

As FKD has it (Shen & Xing 2022), crop, mirroring and soft label belong together; here they are found by view and
sample, and the crops are those that the loader draws again by itself.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrds_fast.data import label_shards as shards
from lrds_fast.data.label_shards import Entry, Layout, size_text
from lrds_fast.data.loader import Batch, Loader
from lrds_fast.files import LOCK, remove_partial
from lrds_fast.topk import TopKTeacher

#: Batches that make up a shard.
SHARD_BATCHES = 64
#: Samples whose boxes are compared with the loader's, over all views; of every view at least 4.
CHECKED_BOXES = 256


class SoftLabels:
    """A teacher's logits of `views` views of `samples` samples over `classes`, read from the disk as they are asked
    for.

    top_k: how many classes are kept of each sample, 0 for all. bytes: on the disk. facts: what the logits depend
    on. `open` makes one.
    """

    def __init__(self, folder: Path, layout: Layout, facts: Mapping[str, Any], files: list[Entry]) -> None:
        self.folder, self.facts = folder, dict(facts)
        self.views, self.samples, self.classes = layout.views, layout.samples, layout.classes
        self.top_k, self.bytes = layout.top_k, sum(entry.bytes for entry in files)
        self._layout = layout
        parts = {entry.file: entry.rows for entry in files}
        # Where the records of each shard begin, and the end of the last, counted through the view.
        self._starts = [
            np.cumsum([0, *(parts[shards.part_name(view, shard)] for shard in range(layout.shards))])
            for view in range(self.views)
        ]
        self._rows: dict[int, np.ndarray] = {}
        self._records: dict[tuple[int, int], np.ndarray] = {}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        facts: Mapping[str, Any] | None = None,
        loader: Loader | None = None,
        verify: bool = True,
    ) -> SoftLabels:
        """The cache in a folder.

        facts: what the logits must depend on, as it was given when they were written; None takes any. loader: whose
        boxes must be those that the teacher saw, for a spread of the samples. verify: also reads every file and
        compares checksums; sizes are always compared. Raises FileNotFoundError where there is no cache; ValueError for
        one that is not complete, damaged, or of other facts or boxes, each named.
        """
        folder = Path(path)
        meta = shards.read_meta(folder)
        if facts is not None:
            shards.check_facts(folder, meta["facts"], facts)
        layout, files = meta["layout"], meta["files"]
        if files is None:
            done = sum("-part-" in entry.file for entry in shards.read_journal(folder))
            raise ValueError(
                f"the soft labels in {folder} are not complete, {done} of {layout.views * layout.shards} shards are"
                " there; lrds-fast cache --resume goes on"
            )
        for entry in files:
            shards.check(folder, entry, verify=verify)
        found = cls(folder, layout, meta["facts"], files)
        if loader is not None:
            found.check_boxes(loader)
        return found

    def batch(self, view: int, indices: Tensor, device: torch.device | str = "cpu") -> Tensor | TopKTeacher:
        """The teacher of a batch, for kd_loss: (N, C) logits as they are stored, or a TopKTeacher where top_k is not 0.

        view: in [0, views), of epoch e e % views. indices: (N,) int64. ValueError for a sample that is not cached.
        """
        return self._layout.unpack(self._read(view, indices), device)

    def boxes(self, view: int, indices: Tensor) -> Tensor:
        """(N, 5) int32: what the teacher saw of the samples; see Loader.boxes."""
        return torch.from_numpy(np.array(self._read(view, indices)["box"]))

    def cached(self, view: int) -> Tensor:
        """(samples,) bool: who has soft labels in a view."""
        return torch.from_numpy(np.array(self._rows_of(view) >= 0))

    def check_boxes(self, loader: Loader) -> None:
        """ValueError where the loader cuts a sample out otherwise than the teacher saw it."""
        for view in range(self.views):
            there = self.cached(view).nonzero()[:, 0]
            count = min(len(there), max(4, CHECKED_BOXES // self.views))
            if not count:
                continue
            indices = there[torch.linspace(0, len(there) - 1, count).long()]
            ours, theirs = self.boxes(view, indices), loader.boxes(view, indices)
            for index, a, b in zip(indices.tolist(), ours.tolist(), theirs.tolist(), strict=True):
                if a != b:
                    raise ValueError(
                        f"{self.folder}: the teacher saw sample {index} in view {view} at (top, left, height, width,"
                        f" mirrored) = {tuple(a)}, the loader shows it at {tuple(b)}: other pictures, or another"
                        " augmentation; write a cache of its own (lrds-fast cache)"
                    )

    def _rows_of(self, view: int) -> np.ndarray:
        if not 0 <= view < self.views:
            raise ValueError(f"view must be in [0, {self.views}), the cached views of {self.folder}; got {view}")
        if view not in self._rows:
            self._rows[view] = shards.load(self.folder, shards.rows_name(view))
        return self._rows[view]

    def _read(self, view: int, indices: Tensor) -> np.ndarray:
        """The samples' records, copied."""
        rows = self._rows_of(view)
        wanted = indices.cpu().numpy()
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(rows):
            odd = wanted[(wanted < 0) | (wanted >= len(rows))][0]
            raise ValueError(f"indices must be in [0, {len(rows)}), the samples of {self.folder}; got {odd}")
        places = rows[wanted]
        if len(places) and places.min() < 0:
            missing = int(wanted[places < 0][0])
            raise ValueError(
                f"{self.folder} has no soft labels of sample {missing} in view {view}: {int((rows >= 0).sum())} of"
                f" {len(rows)} samples are cached; write a cache of all, or of the selection that is used now"
            )
        starts = self._starts[view]
        shard_of = np.searchsorted(starts, places, side="right") - 1
        found = np.empty(len(places), dtype=self._layout.record)
        for shard in np.unique(shard_of):
            here = shard_of == shard
            found[here] = self._part(view, int(shard))[places[here] - starts[shard]]
        return found

    def _part(self, view: int, shard: int) -> np.ndarray:
        if (view, shard) not in self._records:
            self._records[view, shard] = shards.load(self.folder, shards.part_name(view, shard))
        return self._records[view, shard]


def write_soft_labels(
    path: str | os.PathLike[str],
    teacher: nn.Module,
    loader: Loader,
    *,
    views: int,
    top_k: int = 0,
    temperature: float = 4.0,
    dtype: str = "float16",
    facts: Mapping[str, Any] | None = None,
    rows: Tensor | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
    resume: bool = False,
    overwrite: bool = False,
    shard_batches: int = SHARD_BATCHES,
    progress: bool = True,
) -> SoftLabels:
    """Runs `teacher` once over the first `views` epochs of `loader` and writes its logits to the folder `path`.

    teacher: from images to (N, C) logits; it is put in eval mode and onto `device`, its answer taken in batches as the
    loader brings them, under autocast(). top_k: how many classes of each sample are kept, the largest, with the
    logsumexp of the others at `temperature`, and can be used only at this temperature; 0 keeps all. dtype: "float16"
    or "float32". facts: named JSON values that the logits depend on: the data, the teacher, the augmentation.
    rows: (samples,) bool, whose logits are needed; None is all.
    resume: goes on where a killed run stopped, and writes again what is damaged; without a cache it starts. overwrite:
    a cache in the folder may go. Raises FileExistsError for one that may not, ValueError for one of other facts, or
    logits that are NaN or too large for float16, OSError where the disk has no room, before anything is written.
    """
    folder, facts = Path(path), shards.plain(facts or {})
    samples = len(loader.labels)
    if rows is not None and (rows.dtype != torch.bool or rows.shape != (samples,)):
        raise ValueError(
            f"rows must be bool of shape ({samples},), one per sample; got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    rows = torch.ones(samples, dtype=torch.bool) if rows is None else rows.cpu()
    batches, kept = len(loader), int(rows.sum())
    layout = Layout(
        samples=samples,
        kept=kept,
        rows=hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16],
        classes=loader.num_classes,
        views=views,
        top_k=top_k,
        dtype=dtype,
        temperature=temperature if top_k else 1.0,
        batches=batches,
        shard_batches=shard_batches,
    )
    done = _begun(folder, layout, facts, resume=resume, overwrite=overwrite)

    teacher.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    teacher.eval()

    def records(view: int, batch: Batch) -> np.ndarray:
        wanted = rows[batch.indices]
        indices = batch.indices[wanted]
        if not len(indices):
            return np.empty(0, dtype=layout.record)
        images = batch.images if len(indices) == len(wanted) else batch.images[wanted.to(batch.images.device)]
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        with torch.inference_mode(), autocast():
            logits = teacher(images)
        if logits.shape != (len(indices), layout.classes):
            raise ValueError(
                f"the teacher gives {tuple(logits.shape)} logits for {len(indices)} samples of {layout.classes} classes"
            )
        return layout.pack(indices, loader.boxes(view, indices), logits)

    bar = tqdm(total=views * batches, desc="soft labels", disable=not progress or sys.stderr is None, leave=False)
    for view in range(views):
        coming: Iterator[Batch] | None = None
        place = np.full(samples, -1, dtype=np.int32)
        filled = 0
        for shard in range(layout.shards):
            name = shards.part_name(view, shard)
            first = shard * shard_batches
            count = min(shard_batches, batches - first)
            if name in done:
                indices, coming = np.array(shards.load(folder, name)["index"]), None
                bar.update(count)
            else:
                coming = loader.epoch(view, start=first) if coming is None else coming
                found = []
                for _ in range(count):
                    found.append(records(view, next(coming)))
                    bar.update()
                whole = np.concatenate(found)
                indices = whole["index"]
                _write(folder, layout, done, name, whole, len(whole))
            place[indices] = np.arange(filled, filled + len(indices))
            filled += len(indices)
        if filled != kept or not np.array_equal(place >= 0, rows.numpy()):
            raise ValueError(
                f"view {view} of {folder} does not hold every sample once: the loader's order is not that of the run"
                " which began it (another batch size or seed?); write it afresh with --overwrite"
            )
        name = shards.rows_name(view)
        if name not in done or not np.array_equal(shards.load(folder, name), place):
            _write(folder, layout, done, name, place, filled)
    bar.close()
    shards.write_meta(folder, layout, facts, list(done.values()))
    (folder / shards.JOURNAL).unlink(missing_ok=True)
    return SoftLabels.open(folder, facts=facts, verify=False)


def _begun(
    folder: Path, layout: Layout, facts: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> dict[str, Entry]:
    """Makes the folder, or looks at what is in it; the files that are there and sound, by name."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the soft labels")
    if (folder / shards.META).exists() and not overwrite:
        if not resume:
            raise FileExistsError(
                f"{folder} holds soft labels already; go on with them (--resume), replace them (--overwrite), or name"
                " another folder"
            )
        meta = shards.read_meta(folder)
        shards.check_facts(folder, meta["facts"], facts)
        shards.check_facts(folder, asdict(meta["layout"]), asdict(layout))
        remove_partial(folder)
        complete = meta["files"] is not None
        done = {}
        for entry in meta["files"] if complete else shards.read_journal(folder):
            try:
                shards.check(folder, entry, verify=True)
            except ValueError:
                continue
            done[entry.file] = entry
        if complete and len(done) < len(meta["files"]):
            # From now on it is one that is being written.
            for entry in done.values():
                shards.append_journal(folder, entry)
            shards.write_meta(folder, layout, facts, None)
        _check_room(folder, layout, sum(entry.bytes for entry in done.values()))
        return done
    if folder.exists() and not (folder / shards.META).exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no soft labels; name a new folder")
    _check_room(folder, layout, 0, freed=sum(old.stat().st_size for old in folder.glob("view-*.npy")))
    # Last the file that says that there is a cache.
    for pattern in ("view-*.npy", ".*.partial", shards.JOURNAL, shards.META):
        for old in folder.glob(pattern):
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    shards.write_meta(folder, layout, facts, None)
    return {}


def _write(folder: Path, layout: Layout, done: dict[str, Entry], name: str, array: np.ndarray, rows: int) -> None:
    """One more file, and its line in the journal."""
    try:
        done[name] = shards.save(folder, name, array, rows)
        shards.append_journal(folder, done[name])
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _check_room(folder, layout, sum(entry.bytes for entry in done.values()), full=True)


def _check_room(folder: Path, layout: Layout, written: int, *, freed: int = 0, full: bool = False) -> None:
    """OSError where what is not `written` yet, in bytes, does not fit on the disk, `freed` bytes of which are to be
    replaced. full: the disk has said so itself."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free + freed
    if layout.bytes - written <= free and not full:
        return
    begun = f" ({size_text(written)} are written, --resume goes on)" if written else ""
    raise OSError(
        f"the disk of {folder} is too small: soft labels of {layout.views} views of {layout.kept} samples,"
        f" {layout.classes} classes, need {size_text(layout.bytes)}{begun}, {size_text(free)} are free; make room, or"
        " lower views (teacher.cache_views) or the classes that are kept (teacher.cache_top_k)"
    )
