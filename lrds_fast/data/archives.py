"""Pictures in a few large files, read by their place in the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


class Place(NamedTuple):
    """A range of bytes: the file's number, and offset and size in bytes."""

    file: int
    offset: int
    size: int


class Archives:
    """Pictures that are byte ranges of a few large files."""

    def __init__(self, paths: Sequence[Path], places: Sequence[Place], names: Sequence[str]) -> None:
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
