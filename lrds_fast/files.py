"""Files that appear whole or not at all, and logs of one JSON object a line."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

#: The lock file in a run's folder; see lrds_fast.lock.
LOCK = ".lock"

#: Errors of the disk: full, over the quota, the file too large, input/output error.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields the name of a temporary file beside path. If the body succeeds the file is synced to the disk and renamed
    to path; if it fails the file is deleted.

    An older file at path stays until the rename. The new file's mode follows the umask. If path is a device or a pipe,
    path itself is yielded. Raises FileNotFoundError if path's folder does not exist, and OSError naming path for errors
    of the disk (DISK_ERRORS).
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}")
    if target.exists() and not target.is_file():
        with naming(target):
            yield str(target)
        return
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        with naming(target, probe=temporary):
            yield str(temporary)
            os.chmod(temporary, mode)  # a library may have replaced the file by one with another mode
            _sync(temporary)
            os.replace(temporary, target)
        with suppress(OSError):  # not every file system can sync folders
            _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | os.PathLike[str], *, probe: Path | None = None) -> Iterator[None]:
    """Turns an error of the disk in the body, even one that a library has wrapped, into an OSError that names path.

    probe: a file on the same disk. If an error has no errno, a write to this file finds out whether the disk failed.
    """
    try:
        yield
    except Exception as error:
        number = _disk_errno(error) or (None if probe is None else _write_errno(probe))
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _disk_errno(error: BaseException | None) -> int | None:
    """The errno of the first error of the disk among an error and its causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _write_errno(probe: Path) -> int | None:
    """Appends to a file and returns the errno of the disk's error, None without one."""
    try:
        with probe.open("ab") as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return _disk_errno(error)
    return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partial(folder: str | os.PathLike[str]) -> None:
    """Deletes the temporary files of `replacing` that a killed process left in a folder."""
    for path in Path(folder).glob(".*.partial"):
        path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that is renamed to `path` once it is complete; see replacing. Creates parent
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


def read_records(path: Path, *, keys: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The records of a JSON-lines log. A last line cut short by a crash is left out; any other bad line is an error.

    keys: what every record must hold.
    """
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
        for key in keys:
            if key not in record:
                raise ValueError(f"{path}, line {number} has no {key!r}; the log is damaged")
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
