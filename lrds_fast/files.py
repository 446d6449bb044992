"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: The file by which a run holds its folder; see lrds_fast.train.lock.
LOCK = ".lock"

#: What a disk says that takes no more: full, over the quota, a file beyond the limit; damaged.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary name beside path that becomes path, once it is on the disk, if the body succeeds, and disappears if
    it does not.

    What was at path stays until then. The file has the mode that the umask leaves, whatever library writes it. A device
    or a pipe at path is written to as it is. Raises FileNotFoundError where path's folder does not exist, OSError that
    names path where the disk takes no more.
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
            os.chmod(temporary, mode)  # of a library that put a file of its own there
            _sync(temporary)
            os.replace(temporary, target)
        with suppress(OSError):  # not every file system has it for folders
            _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | os.PathLike[str], *, probe: Path | None = None) -> Iterator[None]:
    """Makes what a disk refuses inside, in whatever words a library passes it on, an OSError that names path.

    probe: a file on that disk, at whose end a write tells whether an error without a number was the disk's.
    """
    try:
        yield
    except Exception as error:
        number = _refusal(error) or (None if probe is None else _refused(probe))
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _refusal(error: BaseException | None) -> int | None:
    """The number of a disk's refusal among an error and those that led to it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REFUSALS:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _refused(probe: Path) -> int | None:
    """The number of the refusal that a write at the end of a file meets."""
    try:
        with probe.open("ab") as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return _refusal(error)
    return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partial(folder: str | os.PathLike[str]) -> None:
    """Deletes what a killed process left of `replacing` in a folder."""
    for path in Path(folder).glob(".*.partial"):
        path.unlink(missing_ok=True)
