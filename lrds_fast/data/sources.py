"""Encoded pictures by index: folders per class, WebDataset tars, TFRecords, each read from its place in the files."""

from __future__ import annotations

import json
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

#: Extensions of pictures, the same as torchvision's ImageFolder has.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

#: The largest number of classes that may be above the number of samples. Larger numbers are no class numbers but, for
#: example, WordNet offsets, and a network with so many classes would fill the memory.
MOST_CLASSES = 100_000


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


class _Place(NamedTuple):
    """A range of bytes: the file's number, and offset and size in bytes."""

    file: int
    offset: int
    size: int


class _Archives:
    """Pictures that are byte ranges of a few large files."""

    def __init__(self, paths: Sequence[Path], places: Sequence[_Place], names: Sequence[str]) -> None:
        self._paths = [str(path) for path in paths]
        self._places = torch.tensor(places, dtype=torch.int64).reshape(-1, 3)
        self._names = list(names)
        self._handles: dict[int, int] = {}

    def read(self, index: int) -> np.ndarray:
        file, offset, size = self._places[index].tolist()
        if file not in self._handles:
            # pread has no file position, so threads may share the handle.
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
    """WebDataset: tar files in which KEY.jpg (or another picture) and KEY.cls, the class number, are one sample.

    Members are grouped as in the webdataset library: KEY is a member's path up to the first dot of the file name, the
    rest is the extension, without regard to case, and a key has each extension once. The picture is the member whose
    extension is in EXTENSIONS (KEY.seg.png is none). The label is in .cls or, without it, in .json as "cls" or "label".
    Other members, and hidden ones (macOS's ._*), are skipped.
    classes: names of the class numbers; None for numbers only. first_label: the number of the first class.
    The constructor reads the headers of all tars, which must not be compressed. ValueError for a damaged tar and for a
    sample without a picture or label, or with several.
    """

    def __init__(self, paths: Sequence[Path], classes: Sequence[str] | None = None, *, first_label: int = 0) -> None:
        places: list[_Place] = []
        names: list[str] = []
        labels: list[int] = []
        for number, path in enumerate(paths):
            samples: dict[str, dict[str, bytes]] = {}
            pictures: dict[str, _Place] = {}
            for member, content in _members(path):
                key, extension = _key_of(member.name)
                if not key:
                    continue
                sample = samples.setdefault(key, {})
                twice = extension in sample
                sample[extension] = content
                if f".{extension}" in EXTENSIONS:
                    twice |= key in pictures
                    pictures[key] = _Place(number, member.offset_data, member.size)
                if twice:
                    raise ValueError(
                        f"{path}:{member.name} is in the sample {key!r}, which has {_listed(sample)}; a sample must"
                        f" have one picture, and one member per extension: rename or remove the others ({_GROUPING})"
                    )
            for key, sample in samples.items():
                if key not in pictures and any(f".{name}".endswith((".cls", *EXTENSIONS)) for name in sample):
                    raise ValueError(
                        f"{path}:{key} has no picture ({', '.join(EXTENSIONS)}), but {_listed(sample)}; {_GROUPING}:"
                        " rename the members"
                    )
            for key, place in pictures.items():
                places.append(place)
                names.append(key)
                labels.append(_label_of(samples[key], f"{path}:{key}"))
        super().__init__(paths, places, names)
        self.labels, self.classes = numbered(labels, self.name, classes, first=first_label)


#: The webdataset library's rule for keys, for errors.
_GROUPING = "a member's key ends at the first dot of its file name; the rest is the extension"


def _key_of(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member, as in webdataset; ("", "") for a member to skip."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot or "__MACOSX" in folder.split("/") or re.match(r"__[^/]*__($|/)", name):
        return "", ""
    return folder + slash + stem, extension.lower()


def _listed(sample: dict[str, bytes]) -> str:
    return ", ".join(f".{extension}" for extension in sample)


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Every file in a tar, with its content if it is a label."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    small = member.name.lower().endswith((".cls", ".json"))
                    opened = archive.extractfile(member) if small else None
                    yield member, b"" if opened is None else opened.read()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # tarfile raises many types for damaged headers
        raise ValueError(f"{path} is damaged or no uncompressed tar ({error})") from error


def _label_of(sample: dict[str, bytes], where: str) -> int:
    """The class number in a sample's .cls or, without it, in its .json; ValueError that names `where` without one."""
    extension = next((name for name in ("cls", "json") if name in sample), "")
    if not extension:
        raise ValueError(f"{where} has a picture but no label (.cls, or .json with cls or label)")
    try:
        if extension == "cls":
            return int(sample["cls"])
        parsed = json.loads(sample["json"])
        label = parsed["cls"] if "cls" in parsed else parsed["label"]
        if isinstance(label, bool) or (isinstance(label, float) and label != int(label)):
            raise ValueError(f"{label!r} is not an integer")
        return int(label)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}.{extension} must contain a class number ({error})") from error


def numbered(
    numbers: Sequence[int], name: Callable[[int], str], classes: Sequence[str] | None = None, *, first: int = 0
) -> tuple[Tensor, list[str]]:
    """(labels (size,) int64 from 0, names of the classes) from the class numbers in the data.

    name: a sample's name by its index, for errors. classes: names in the order of the numbers; None for numbers as
    names. first: the number of the first class. ValueError for numbers below `first`, and for numbers that imply more
    classes than there are names or, without names, more than both the number of samples and MOST_CLASSES.
    """
    if numbers:
        low = min(range(len(numbers)), key=numbers.__getitem__)
        high = max(range(len(numbers)), key=numbers.__getitem__)
        count = numbers[high] - first + 1
        if numbers[low] < first:
            raise ValueError(
                f"{name(low)} has the class number {numbers[low]}, but the first class is {first}: set data.first_label"
                " to the number of the first class in the data"
            )
        if classes is not None and len(classes) < count:
            raise ValueError(
                f"there are {len(classes)} class names, but a sample has the class number {count - 1}: {name(high)};"
                " name every class in classes.txt, or set data.first_label to the number of the first class in the data"
            )
        if classes is None and count > max(len(numbers), MOST_CLASSES):
            raise ValueError(
                f"{name(high)} has the class number {numbers[high]}, which makes {count} classes; at most"
                f" {max(len(numbers), MOST_CLASSES)} are allowed for {len(numbers)} samples: number the classes"
                " consecutively or, in archives, name them all in classes.txt"
            )
    else:
        count = 0
    labels = torch.tensor([number - first for number in numbers], dtype=torch.int64)
    return labels, list(classes) if classes is not None else [str(k) for k in range(count)]


class TFRecords(_Archives):
    """TFRecord files of tf.train.Example with `image/encoded` and `image/class/label`, as ImageNet's converters write.

    first_label: the number of the first class in the files (1 if 0 is a background class). The constructor reads the
    files once, to locate the pictures; checksums are not verified. ValueError for a damaged file and for a record
    without a picture or label.
    The parser below exists because the trainer reads pictures by index: DALI's and other TFRecord readers give records
    one after another, and protobuf's parser gives values but not their place in the file.
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
                except (KeyError, IndexError, ValueError, StopIteration) as error:
                    raise ValueError(
                        f"{path}: record {record} is no example with image/encoded and image/class/label ({error})"
                    ) from error
                places.append(_Place(number, offset + start, size))
                names.append(str(record))
                labels.append(label)
        super().__init__(paths, places, names)
        self.labels, self.classes = numbered(labels, self.name, classes, first=first_label)


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset of the content, content) of each record. A record is its length (8 bytes), the length's checksum (4), the
    content and its checksum (4)."""
    with path.open("rb") as file:
        whole = os.fstat(file.fileno()).st_size
        while header := file.read(12):
            offset = file.tell()
            size = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else -1
            content = file.read(size) if 0 <= size <= whole - offset else b""
            if len(content) != size or len(file.read(4)) != 4:
                raise ValueError(f"{path} is damaged or no TFRecord file (at byte {offset - len(header)})")
            yield offset, content


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, place after it) of a varint, protobuf's integer."""
    value, shift = 0, 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of the values in a protobuf message, data[start:end] being a value's bytes."""
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
    """(start, size) of each feature of an Example by name: of the first bytes value, or of the list of integers.

    Example { features = 1 { feature = 1 { key = 1, value = 2 { bytes_list = 1 | int64_list = 3 { value = 1 } } } } }
    """
    places: dict[str, tuple[int, int]] = {}
    for _, features, features_end in _fields(data, 0, len(data)):
        for _, entry, entry_end in _fields(data, features, features_end):
            parts = {number: (a, b) for number, a, b in _fields(data, entry, entry_end)}
            key = data[slice(*parts[1])].decode()
            for kind, a, b in _fields(data, *parts[2]):
                if kind == 1:
                    _, start, end = next(_fields(data, a, b))
                    places[key] = (start, end - start)
                elif kind == 3:
                    places[key] = (a, b - a)
    return places


def _first_integer(data: bytes, place: tuple[int, int]) -> int:
    """The first value of a list of 64-bit integers, packed or not."""
    start, size = place
    _, begin, _ = next(_fields(data, start, start + size))
    value = _varint(data, begin)[0]
    return value - (1 << 64) if value >= 1 << 63 else value


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
