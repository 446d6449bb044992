"""Encoded pictures by index: the interface, folders per class, and where a data set's splits are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lrds_fast.data.pictures import EXTENSIONS
from lrds_fast.data.tfrecord import TFRecords
from lrds_fast.data.webdataset import Tars


class Source(Protocol):
    """Encoded pictures with labels. classes: names of the classes 0, 1, .... labels: (size,) int64."""

    classes: list[str]
    labels: Tensor

    def read(self, index: int) -> np.ndarray:
        """(bytes,) uint8: the encoded picture. Threads may call it at the same time."""

    def name(self, index: int) -> str:
        """The sample's path, and its name within an archive, for messages."""


class Folder:
    """root/CLASS/.../picture: classes and samples in alphabetical order, as in torchvision's ImageFolder.

    Unlike there, hidden files and folders (.ipynb_checkpoints, __MACOSX) are skipped, and a folder that several links
    point to is read once per class. FileNotFoundError for a missing folder and for a class without pictures.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"data.root: there is no folder {root}; it must hold one folder per class")
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_hidden(entry.name))
        self._paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            before = len(self._paths)
            for folder, files in sorted(_folders(root / name)):
                self._paths += [os.path.join(folder, file) for file in sorted(files) if _is_picture(file)]
            labels += [label] * (len(self._paths) - before)
            if len(self._paths) == before:
                raise FileNotFoundError(f"data.root: {root / name} holds no pictures ({', '.join(EXTENSIONS)})")
        if not self.classes:
            raise FileNotFoundError(f"data.root: {root} holds no folders; it must hold one per class")
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def read(self, index: int) -> np.ndarray:
        return np.fromfile(self._paths[index], dtype=np.uint8)

    def name(self, index: int) -> str:
        return self._paths[index]


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, file names) of every folder under root, once each; follows links, also cyclic ones."""
    seen: set[str] = set()
    for folder, inside, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        inside[:] = [] if real in seen else sorted(name for name in inside if not _is_hidden(name))
        if real not in seen:
            yield folder, files
        seen.add(real)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not _is_hidden(name)


def open_split(kind: str, root: Path, split: str, *, first_label: int = -1) -> Source:
    """A split of a data set.

    kind: "folder" (root/SPLIT/CLASS/...), "webdataset" (root/SPLIT*.tar or root/SPLIT/*.tar), or "tfrecord"
    (root/SPLIT* or root/SPLIT/*). split: "train" or "val"; a folder or prefix "validation" is taken for "val".
    first_label: the number of the first class in archives; -1 means 1 for "tfrecord", as ImageNet's converters number,
    else 0. The file root/classes.txt, one name per line, may name the classes of archives. FileNotFoundError for
    missing files, ValueError for damaged ones.
    """
    if kind == "folder":
        return Folder(root / split)
    ending = ".tar" if kind == "webdataset" else ""
    # "val*" matches validation-00000 too.
    patterns = [f"{split}*{ending}", f"{split}/*{ending}"] + ([f"validation/*{ending}"] if split == "val" else [])
    paths = [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file()]
    if not paths:
        raise FileNotFoundError(f"data.root: there is no {root / (split + '*' + ending)} for the split {split!r}")
    listed = root / "classes.txt"
    classes = listed.read_text(encoding="utf-8").split("\n") if listed.is_file() else None
    classes = [name for name in classes if name] if classes else None
    first_label = int(kind == "tfrecord") if first_label < 0 else first_label
    archive = Tars if kind == "webdataset" else TFRecords
    source = archive(paths, classes, first_label=first_label)
    if not len(source.labels):
        raise FileNotFoundError(f"data.root: {', '.join(map(str, paths[:3]))} contain no pictures")
    return source
