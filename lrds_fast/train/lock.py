"""Folders that one run at a time writes to."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lrds_fast.files import LOCK
from lrds_fast.influence.ranks import Ranks
from lrds_fast.train.notes import note

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

#: The locks' file descriptors in this process.
_held: set[int] = set()


@contextmanager
def holding(folder: Path, *, shared: bool = False, ranks: Ranks | None = None) -> Iterator[None]:
    """Nobody else holds `folder` while the body runs; with `shared`, others may share it. It is made where it is not.

    The lock is the system's, on a file in the folder: it ends with the process, however that ends, and not only with
    the processes that it has started. Where the file system has no locks a note says so. ranks: the processes that
    hold it together. Raises FileExistsError, which names the holder, in all of them.
    """
    ranks = ranks or Ranks()
    handle, problem = -1, None
    if ranks.first:
        try:
            if folder.is_file():
                raise FileExistsError(f"{folder} is a file; name a folder")
            folder.mkdir(parents=True, exist_ok=True)
            handle = _taken(folder / LOCK, shared)
        except OSError as error:
            problem = error
    problem = ranks.agree(problem)
    if problem is not None:
        raise problem
    try:
        yield
    finally:
        if ranks.first:
            _let_go(folder / LOCK, handle)


def _taken(path: Path, shared: bool) -> int:
    """The descriptor of the locked file."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, shared)
        except BlockingIOError:
            holder = os.read(handle, 1000).decode(errors="replace") or "another process"
            os.close(handle)
            raise FileExistsError(
                f"{path.parent} is in use by {holder}; wait until that has ended, or name another folder"
            ) from None
        except OSError as error:
            note(f"{path.parent}: its file system has no locks ({error.strerror}); start no second run there meanwhile")
        if _is_at(handle, path):
            break
        os.close(handle)  # whoever had it has deleted it
    _held.add(handle)
    with suppress(OSError):  # a full disk
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return handle


def _lock(handle: int, shared: bool) -> None:
    if fcntl is None:
        raise OSError(0, "not on this system")
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _let_go(path: Path, handle: int) -> None:
    if handle not in _held:  # in a child that unwinds
        return
    with suppress(OSError):
        _lock(handle, False)  # the last of those who share it deletes the file
        if _is_at(handle, path):
            path.unlink()
    _held.remove(handle)
    os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _leave_to_parent() -> None:
    """A lock belongs to whoever has a descriptor of it: a loader's worker would keep that of a killed run."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
