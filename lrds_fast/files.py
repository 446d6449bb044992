"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary name beside path that becomes path if the body succeeds and disappears if it does not.

    What was at path stays until then. Raises FileNotFoundError where path's folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield str(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial(folder: str | os.PathLike[str]) -> None:
    """Deletes what a killed process left of `replacing` in a folder."""
    for path in Path(folder).glob(".*.partial"):
        path.unlink(missing_ok=True)
