"""A teacher's logits of a few augmented views of every sample, written once and read in every epoch.

As in FKD (Shen & Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", 2022), a soft label belongs to
one crop of its sample. Crops are drawn again from the seed rather than stored; the cache has the box of each crop, to
check that it is the same.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrds_fast.data import label_files as files
from lrds_fast.data.label_files import Layout, Meta, size_text
from lrds_fast.data.loader import Batch, Loader
from lrds_fast.files import LOCK, remove_partial
from lrds_fast.topk import TopKTeacher

#: Samples whose boxes are compared with the loader's, over all views; of every view at least 4.
CHECKED_BOXES = 256


class SoftLabels:
    """A teacher's logits of `views` views of `samples` samples over `classes`, mapped from the disk. `open` makes one.

    top_k: how many classes are stored per sample, 0 for all. bytes: size on the disk. facts: what the logits depend on.
    """

    def __init__(self, folder: Path, meta: Meta) -> None:
        self.folder, self.facts, self._layout = folder, dict(meta.facts), meta.layout
        self.views, self.samples, self.classes = meta.layout.views, meta.layout.samples, meta.layout.classes
        self.top_k, self.bytes = meta.layout.top_k, meta.layout.bytes
        self._rows = files.read_rows(folder, meta.layout)
        #: Each cached sample's place among a view's records.
        self._places = np.cumsum(self._rows) - 1
        self._records = [files.map_view(folder, meta.layout, view) for view in range(self.views)]

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

        facts: what the logits must depend on, as passed when they were written; None accepts any. loader: its boxes
        must be those that the teacher saw; a spread of the samples is compared. verify: reads everything and compares
        checksums; sizes are always compared. Raises FileNotFoundError where there is no cache, ValueError for one that
        is incomplete, damaged, or of other facts or boxes, each named.
        """
        folder = Path(path)
        meta = files.read_meta(folder)
        if facts is not None:
            files.check_facts(folder, meta.facts, facts)
        if not meta.complete:
            begun = sum(files.view_path(folder, view).exists() for view in range(meta.layout.views))
            raise ValueError(
                f"the soft labels in {folder} are not complete, {begun} of {meta.layout.views} views have been started;"
                " continue with lrds-fast cache --resume"
            )
        labels = cls(folder, meta)
        if verify:
            labels.verify()
        if loader is not None:
            labels.check_boxes(loader)
        return labels

    def batch(self, view: int, indices: Tensor, device: torch.device | str = "cpu") -> Tensor | TopKTeacher:
        """The teacher of a batch, for kd_loss: (N, C) logits in the stored dtype, or a TopKTeacher if top_k is not 0.

        view: in [0, views); epoch e has view e % views. indices: (N,) int64. ValueError for uncached samples.
        """
        records, places = self._located(view, indices)
        return self._layout.unpack(records, device, places)

    def boxes(self, view: int, indices: Tensor) -> Tensor:
        """(N, 5) int32: the boxes of the samples that the teacher saw; see Loader.boxes. Arguments as in batch."""
        records, places = self._located(view, indices)
        return torch.from_numpy(records["box"][places])

    def cached(self, view: int) -> Tensor:
        """(samples,) bool: which samples have soft labels in a view."""
        self._check_view(view)
        return torch.from_numpy(self._rows.copy())

    def verify(self) -> None:
        """Reads all records. ValueError naming the file with a record whose checksum is wrong."""
        for view, records in enumerate(self._records):
            wrong = np.flatnonzero(~files.valid_records(records, view))
            if len(wrong):
                sample = int(np.flatnonzero(self._rows)[wrong[0]])
                how = f"damaged: {len(wrong)} records have a wrong checksum, the first is that of sample {sample}"
                raise files.damaged(files.view_path(self.folder, view), how)

    def check_boxes(self, loader: Loader) -> None:
        """ValueError where the loader's crop of a sample is not the one that the teacher saw."""
        cached = torch.from_numpy(np.flatnonzero(self._rows))
        count = min(len(cached), max(4, CHECKED_BOXES // self.views))
        indices = cached[torch.linspace(0, max(len(cached) - 1, 0), count).long()]
        for view in range(self.views):
            ours, theirs = self.boxes(view, indices), loader.boxes(view, indices)
            for index, a, b in zip(indices.tolist(), ours.tolist(), theirs.tolist(), strict=True):
                if a != b:
                    raise ValueError(
                        f"{self.folder}: the teacher saw sample {index} in view {view} at (top, left, height, width,"
                        f" mirrored) = {tuple(a)}, the loader shows it at {tuple(b)}: the pictures or their"
                        " augmentation differ; write another cache (lrds-fast cache)"
                    )

    def _check_view(self, view: int) -> None:
        if not 0 <= view < self.views:
            raise ValueError(f"view must be in [0, {self.views}), the cached views of {self.folder}; got {view}")

    def _located(self, view: int, indices: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """A view's records and the samples' places among them."""
        self._check_view(view)
        wanted = indices.cpu().numpy()
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.samples:
            odd = wanted[(wanted < 0) | (wanted >= self.samples)][0]
            raise ValueError(f"indices must be in [0, {self.samples}), the samples of {self.folder}; got {odd}")
        if self._layout.kept < self.samples and not self._rows[wanted].all():
            missing = int(wanted[~self._rows[wanted]][0])
            raise ValueError(
                f"{self.folder} has no soft labels of sample {missing} in view {view}: {self._layout.kept} of"
                f" {self.samples} samples are cached; write a cache of all samples, or of the current selection"
            )
        return self._records[view], self._places[wanted]


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
    progress: bool = True,
) -> SoftLabels:
    """Runs `teacher` once over the first `views` epochs of `loader` and writes its logits to the folder `path`.

    teacher: from images to (N, C) logits; it is put in eval mode and onto `device`, and runs on the loader's batches
    under autocast(). top_k: how many of each sample's largest logits are stored, with the logsumexp of the others at
    `temperature`, at which alone they can be used; 0 stores all. dtype: "float16" or "float32". facts: named JSON
    values that the logits depend on: the data, the teacher, the augmentation. rows: (samples,) bool, the samples to
    cache; None is all. resume: continues where a killed run stopped, and writes damaged records again; starts where
    there is no cache. overwrite: replaces a cache in the folder.

    Raises FileExistsError for a folder in use without resume or overwrite; ValueError for a cache of other facts, a
    loader whose order changed, or logits that are NaN or too large for float16; OSError where the disk has no room, if
    possible before anything is written.
    """
    folder = Path(path)
    mask = _mask(rows, len(loader.labels))
    layout = Layout(
        samples=len(mask),
        kept=int(mask.sum()),
        rows=files.rows_checksum(mask),
        classes=loader.num_classes,
        views=views,
        top_k=top_k,
        dtype=dtype,
        temperature=temperature if top_k else 1.0,
        batches=len(loader),
    )
    meta = Meta(layout, files.plain(facts or {}), complete=False)
    _begin(folder, meta, mask, resume=resume, overwrite=overwrite)
    teacher.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    teacher.eval()

    def logits(images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast():
            return teacher(images.to(device, non_blocking=True, memory_format=memory_format))  # type: ignore[no-any-return]

    _write_views(folder, layout, logits, loader, mask, progress=progress)
    files.write_meta(folder, meta._replace(complete=True))
    return SoftLabels.open(folder, verify=False)


def _mask(rows: Tensor | None, samples: int) -> np.ndarray:
    if rows is None:
        return np.ones(samples, bool)
    if rows.dtype != torch.bool or rows.shape != (samples,):
        raise ValueError(
            f"rows must be bool of shape ({samples},), one per sample; got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    return rows.cpu().numpy()


_Logits: TypeAlias = Callable[[Tensor], Tensor]


def _write_views(
    folder: Path, layout: Layout, teacher: _Logits, loader: Loader, rows: np.ndarray, *, progress: bool
) -> None:
    """Writes the batches that are missing."""
    hidden = not progress or sys.stderr is None
    with tqdm(total=layout.views * layout.batches, desc="soft labels", disable=hidden, leave=False) as bar:
        try:
            for view in range(layout.views):
                _write_view(folder, layout, view, teacher, loader, rows, bar)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _check_room(folder, layout, full=True)


def _write_view(
    folder: Path, layout: Layout, view: int, teacher: _Logits, loader: Loader, rows: np.ndarray, bar: Any
) -> None:
    place_of = np.cumsum(rows) - 1
    with files.open_view(folder, layout, view) as file:
        done, written = files.finished(folder, layout, view)
        coming: Iterator[Batch] | None = None
        for number in range(layout.batches):
            if done[number]:
                coming = None
            else:
                coming = loader.epoch(view, start=number) if coming is None else coming
                batch = next(coming)
                wanted = torch.from_numpy(rows)[batch.indices]
                places = place_of[batch.indices[wanted].numpy()]
                if written[places].any():
                    break
                if len(places):
                    records = _records(layout, view, teacher, loader, batch, wanted)
                    files.write_records(file, view, number, places, records)
                written[places] = True
            bar.update()
        if not written.all():
            raise ValueError(
                f"view {view} of {folder} does not hold every sample once: the loader's order differs from that of the"
                " run that began it (another batch size or seed?); write it again with --overwrite"
            )
        os.fsync(file.fileno())


def _records(layout: Layout, view: int, teacher: _Logits, loader: Loader, batch: Batch, wanted: Tensor) -> np.ndarray:
    """Records of a batch's wanted rows, (N,) bool."""
    indices = batch.indices[wanted]
    every = len(indices) == len(wanted)
    logits = teacher(batch.images if every else batch.images[wanted.to(batch.images.device)])
    if logits.shape != (len(indices), layout.classes):
        raise ValueError(
            f"the teacher's logits must have shape ({len(indices)}, {layout.classes}), samples x classes; got"
            f" {tuple(logits.shape)}: use a teacher of the data's classes"
        )
    return layout.pack(indices, loader.boxes(view, indices), logits)


def _begin(folder: Path, meta: Meta, rows: np.ndarray, *, resume: bool, overwrite: bool) -> None:
    """Checks the folder and makes it one whose cache is being written."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the soft labels")
    exists = (folder / files.META).exists()
    if exists and not overwrite:
        if not resume:
            raise FileExistsError(
                f"{folder} holds soft labels already; continue them (--resume), replace them (--overwrite), or name"
                " another folder"
            )
        old = files.read_meta(folder)
        files.check_facts(folder, old.facts, meta.facts)
        files.check_facts(folder, asdict(old.layout), asdict(meta.layout))
        remove_partial(folder)
        _check_room(folder, meta.layout)
    else:
        remove_partial(folder)  # a killed process may have left no more than this
        if not exists and folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty and holds no soft labels; name a new folder")
        # view-*.npy and written.jsonl are of formats before 3. meta.json, which says that this is a cache, goes last.
        old_files = [path for pattern in ("view-*", "written.jsonl", files.META) for path in folder.glob(pattern)]
        _check_room(folder, meta.layout, freed=sum(path.stat().st_size for path in old_files))
        for path in old_files:
            path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    files.write_meta(folder, meta)
    files.write_rows(folder / files.ROWS, rows)


def _check_room(folder: Path, layout: Layout, *, freed: int = 0, full: bool = False) -> None:
    """OSError where the records that are not written yet do not fit on the disk, `freed` bytes of which will be free.
    full: the disk is known to be full."""
    disk = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(disk).free + freed
    views = [] if freed else [files.view_path(folder, view) for view in range(layout.views)]
    written = sum(512 * path.stat().st_blocks for path in views if path.exists())
    if layout.bytes - written <= free and not full:
        return
    begun = f" ({size_text(written)} are written, --resume keeps them)" if written else ""
    raise OSError(
        f"the disk of {folder} is too small: soft labels of {layout.views} views of {layout.kept} samples,"
        f" {layout.classes} classes, need {size_text(layout.bytes)}{begun}, {size_text(free)} are free; make room, or"
        " lower views (teacher.cache_views) or the classes that are kept (teacher.cache_top_k)"
    )
