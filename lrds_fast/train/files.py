"""Files that are whole or absent, and logs of one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lrds_fast.files import naming, replacing


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that is renamed to `path` once it is complete; see lrds_fast.files.replacing. Creates parent
    folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8 at `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """One more line of a JSON-lines log. NaN and infinities become null, which is all that JSON has for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(record), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines log. A last line cut short by a crash is left out; any other bad line is an error."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no log {path}; name the folder of a run that lrds-fast train has written")
    lines = path.read_text(encoding="utf-8").split("\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); the log is damaged") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} must be an object; got {line[:40]!r}")
        records.append(record)
    return records


def rewrite_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """A log of exactly these records, whole or as it was before."""
    write_text(path, "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records))


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: null where a number is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
