"""TFRecord files, with the part of protobuf's format that locates a picture in its record."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from lrds_fast.data.archives import Archives, Place
from lrds_fast.data.class_numbers import numbered


class TFRecords(Archives):
    """TFRecord files of tf.train.Example with `image/encoded` and `image/class/label`, as ImageNet's converters write.

    first_label: the number of the first class in the files (1 if 0 is a background class). The constructor reads the
    files once, to locate the pictures; checksums are not verified. ValueError for a damaged file and for a record
    without a picture or label.
    The parser below exists because the trainer reads pictures by index: DALI's and other TFRecord readers give records
    one after another, and protobuf's parser gives values but not their place in the file.
    """

    def __init__(self, paths: Sequence[Path], classes: Sequence[str] | None = None, *, first_label: int = 1) -> None:
        places: list[Place] = []
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
                        f"{path}: record {record} is not an example with image/encoded and image/class/label ({error})"
                    ) from error
                places.append(Place(number, offset + start, size))
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
                raise ValueError(f"{path} is damaged or not a TFRecord file (at byte {offset - len(header)})")
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
