"""WebDataset: tars in which a picture and its label have a common name."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lrds_fast.data.archives import Archives, Place
from lrds_fast.data.class_numbers import numbered
from lrds_fast.data.pictures import EXTENSIONS


class Tars(Archives):
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
        places: list[Place] = []
        names: list[str] = []
        labels: list[int] = []
        for number, path in enumerate(paths):
            samples: dict[str, dict[str, bytes]] = {}
            pictures: dict[str, Place] = {}
            for member, content in _members(path):
                key, extension = _key_of(member.name)
                if not key:
                    continue
                sample = samples.setdefault(key, {})
                twice = extension in sample
                sample[extension] = content
                if f".{extension}" in EXTENSIONS:
                    twice |= key in pictures
                    pictures[key] = Place(number, member.offset_data, member.size)
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
        raise ValueError(f"{path} is damaged or not an uncompressed tar ({error})") from error


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
