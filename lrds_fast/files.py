"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: The lock file in a run's folder; see lrds_fast.train.lock.
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
