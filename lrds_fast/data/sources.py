"""Encoded pictures by index: folders per class, WebDataset tars, TFRecords. Bytes come from where they lie."""

from __future__ import annotations

import json
import os
import struct
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

#: Files that count as pictures, as torchvision's ImageFolder has them.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Source(Protocol):
    """Encoded pictures with labels. classes: names, in the order of their numbers. labels: (size,) int64."""

    classes: list[str]
    labels: Tensor

    def read(self, index: int) -> np.ndarray:
        """(bytes,) uint8: the file as it is stored. Threads may call it at the same time."""

    def name(self, index: int) -> str:
        """Where the sample lies, for messages."""


class Folder:
    """root/CLASS/.../picture: classes and samples in alphabetical order, as torchvision's ImageFolder has them."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"data.root: there is no folder {root}; it must hold one folder per class")
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self._paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            before = len(self._paths)
            for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
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


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


class _Place(NamedTuple):
    """Bytes of a file."""

    file: int
    offset: int
    size: int


class _Archives:
    """Pictures that are ranges of bytes of a few large files."""

    def __init__(self, paths: Sequence[Path], places: Sequence[_Place], names: Sequence[str]) -> None:
        self._paths = [str(path) for path in paths]
        self._places = torch.tensor(places, dtype=torch.int64).reshape(-1, 3)
        self._names = list(names)
        self._handles: dict[int, int] = {}

    def read(self, index: int) -> np.ndarray:
        file, offset, size = self._places[index].tolist()
        if file not in self._handles:
            # Two threads may both open it: one handle is kept, pread needs no position of its own.
            self._handles[file] = os.open(self._paths[file], os.O_RDONLY)
        return np.frombuffer(os.pread(self._handles[file], size, offset), dtype=np.uint8)

    def name(self, index: int) -> str:
        return f"{self._paths[int(self._places[index, 0])]}:{self._names[index]}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)


class Tars(_Archives):
    """WebDataset: tar files in which KEY.jpg (or another picture) and KEY.cls, the class number, belong together.

    classes: names for the numbers; None numbers them. The labels may also be in KEY.json under "cls" or "label".
    The tars' headers are read once, at the start; members must not be compressed.
    """

    def __init__(self, paths: Sequence[Path], classes: Sequence[str] | None = None) -> None:
        places: list[_Place] = []
        names: list[str] = []
        labels: list[int] = []
        for number, path in enumerate(paths):
            pictures: dict[str, _Place] = {}
            known: dict[str, int] = {}
            for member, content in _members(path):
                folder, slash, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                key = folder + slash + stem
                if extension.lower().rpartition(".")[2] in ("cls", "json"):
                    known[key] = _label_of(extension, content, f"{path}:{member.name}")
                elif _is_picture(file):
                    pictures[key] = _Place(number, member.offset_data, member.size)
            for key, place in pictures.items():
                if key not in known:
                    raise ValueError(f"{path}:{key} has a picture but no label (.cls, or .json with cls or label)")
                places.append(place)
                names.append(key)
                labels.append(known[key])
        super().__init__(paths, places, names)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.classes = _class_names(self.labels, classes)


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Every file of a tar, with its content where that is a label."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    small = member.name.lower().endswith((".cls", ".json"))
                    opened = archive.extractfile(member) if small else None
                    yield member, b"" if opened is None else opened.read()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no uncompressed tar ({error})") from error


def _label_of(extension: str, content: bytes, where: str) -> int:
    try:
        if extension.lower().endswith("json"):
            parsed = json.loads(content)
            return int(parsed["cls"] if "cls" in parsed else parsed["label"])
        return int(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} holds no class number ({error})") from error


def _class_names(labels: Tensor, classes: Sequence[str] | None) -> list[str]:
    count = int(labels.max()) + 1 if len(labels) else 0
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"class numbers must be at least 0; got {int(labels.min())}")
    if classes is not None and len(classes) < count:
        raise ValueError(f"there are {len(classes)} class names, but a sample has the class number {count - 1}")
    return list(classes) if classes is not None else [str(k) for k in range(count)]


class TFRecords(_Archives):
    """TFRecord files of tf.train.Example with `image/encoded` and `image/class/label`, as ImageNet's converters write.

    first_label: the number of the first class in the files (1 where 0 is a background class). The files are read
    once, at the start, to find the pictures; checksums are not verified.
    """

    def __init__(self, paths: Sequence[Path], classes: Sequence[str] | None = None, *, first_label: int = 1) -> None:
        places: list[_Place] = []
        names: list[str] = []
        labels: list[int] = []
        for number, path in enumerate(paths):
            for record, (offset, content) in enumerate(_records(path)):
                try:
                    features = _features(content)
                    start, size = features["image/encoded"]
                    label = _first_integer(content, features["image/class/label"])
                except (KeyError, IndexError, ValueError) as error:
                    raise ValueError(
                        f"{path}: record {record} is no example with image/encoded and image/class/label ({error})"
                    ) from error
                places.append(_Place(number, offset + start, size))
                names.append(str(record))
                labels.append(label - first_label)
        super().__init__(paths, places, names)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.classes = _class_names(self.labels, classes)


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset of the content, content): length (8 bytes), its checksum (4), content, checksum (4)."""
    with path.open("rb") as file:
        while header := file.read(12):
            offset = file.tell()
            size = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else -1
            content = file.read(size) if 0 <= size < 1 << 40 else b""
            if len(content) != size or len(file.read(4)) != 4:
                raise ValueError(f"{path} is damaged or no TFRecord file (at byte {offset - len(header)})")
            yield offset, content


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, place after it) of a protocol buffer's integer."""
    value, shift = 0, 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of the parts of a protocol buffer message; of an integer, where its bytes lie."""
    at = start
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        begin = at
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            size, begin = _varint(data, at)
            at = begin + size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at > end:
            raise ValueError("a field ends outside its message")
        yield tag >> 3, begin, at


def _features(data: bytes) -> dict[str, tuple[int, int]]:
    """Of an Example: where each feature's bytes lie, or its list of integers: (start, size) by name.

    Example { features = 1 { feature = 1 { key = 1, value = 2 { bytes_list = 1 | int64_list = 3 { value = 1 } } } } }
    """
    found: dict[str, tuple[int, int]] = {}
    for _, features, features_end in _fields(data, 0, len(data)):
        for _, entry, entry_end in _fields(data, features, features_end):
            parts = {number: (a, b) for number, a, b in _fields(data, entry, entry_end)}
            key = data[slice(*parts[1])].decode()
            for kind, a, b in _fields(data, *parts[2]):
                if kind == 1:
                    _, start, end = next(_fields(data, a, b))
                    found[key] = (start, end - start)
                elif kind == 3:
                    found[key] = (a, b - a)
    return found


def _first_integer(data: bytes, place: tuple[int, int]) -> int:
    """The first value of a list of integers, packed or not."""
    start, size = place
    _, begin, _ = next(_fields(data, start, start + size))
    return _varint(data, begin)[0]


def open_split(kind: str, root: Path, split: str) -> Source:
    """A split of a data set: kind "folder" (root/SPLIT/CLASS/...), "webdataset" (root/SPLIT*.tar or root/SPLIT/*.tar),
    or "tfrecord" (root/SPLIT* or root/SPLIT/*). split: "train" or "val"; "validation" is taken for the latter.

    A file classes.txt in root, one name a line, names the classes of archives. FileNotFoundError for what is not there.
    """
    if kind == "folder":
        return Folder(root / split)
    ending = ".tar" if kind == "webdataset" else ""
    # "val*" has validation-00000 as well.
    patterns = [f"{split}*{ending}", f"{split}/*{ending}"] + ([f"validation/*{ending}"] if split == "val" else [])
    found = [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file()]
    if not found:
        raise FileNotFoundError(f"data.root: there is no {root / (split + '*' + ending)} for the split {split!r}")
    listed = root / "classes.txt"
    classes = listed.read_text(encoding="utf-8").split("\n") if listed.is_file() else None
    classes = [name for name in classes if name] if classes else None
    return Tars(found, classes) if kind == "webdataset" else TFRecords(found, classes)
