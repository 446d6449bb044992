"""Locks on folders, so that only one run at a time writes to a folder."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lrds_fast.files import LOCK
from lrds_fast.notes import note
from lrds_fast.ranks import Ranks

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

#: File descriptors of the locks that this process holds.
_held: set[int] = set()


@contextmanager
def holding(folder: Path, *, shared: bool = False, ranks: Ranks | None = None) -> Iterator[None]:
    """Locks `folder` while the body runs and creates it if needed. `shared`: other shared locks are allowed.

    The operating system releases the lock when the process ends, even if it is killed or its child processes live on.
    On a file system without locks a note is printed. ranks: the processes that hold the lock together. If another
    process holds the lock, all of them raise FileExistsError, which names it.
    """
    ranks = ranks or Ranks()
    handle, problem = -1, None
    if ranks.first:
        try:
            if folder.is_file():
                raise FileExistsError(f"{folder} must be a folder; it is a file: choose another path")
            folder.mkdir(parents=True, exist_ok=True)
            handle = _acquire(folder / LOCK, shared)
        except OSError as error:
            problem = error
    problem = ranks.agree(problem)
    if problem is not None:
        raise problem
    try:
        yield
    finally:
        if ranks.first:
            _release(folder / LOCK, handle)


def _acquire(path: Path, shared: bool) -> int:
    """Locks the file and returns its descriptor."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, shared)
        except BlockingIOError:
            holder = os.read(handle, 1000).decode(errors="replace") or "another process"
            os.close(handle)
            raise FileExistsError(
                f"{path.parent} is in use by {holder}; wait until that process has ended, or choose another folder"
            ) from None
        except OSError as error:
            note(f"{path.parent} is on a file system without locks ({error.strerror}); start no second run there")
        if _is_at(handle, path):
            break
        os.close(handle)  # the process that held the lock has deleted the file
    _held.add(handle)
    with suppress(OSError):  # a full disk
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return handle


def _lock(handle: int, shared: bool) -> None:
    if fcntl is None:
        raise OSError(0, "not on this system")
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _release(path: Path, handle: int) -> None:
    if handle not in _held:  # a forked child does not own the lock
        return
    with suppress(OSError):
        _lock(handle, False)  # fails while others share the lock: the last one deletes the file
        if _is_at(handle, path):
            path.unlink()
    _held.remove(handle)
    os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _close_in_child() -> None:
    """Closes the locks in a forked child; otherwise a loader's workers would keep the lock of a killed run."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
