"""One-line notes to the user on stderr, and which process prints."""

from __future__ import annotations

import os
import sys


def first_process() -> bool:
    """Whether this is the first of torchrun's processes, or a process without torchrun."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def note(text: str, *, every_process: bool = False) -> None:
    """Prints one line above any progress bar, from the first process only unless `every_process`. Does nothing where
    stderr is None."""
    if sys.stderr is not None and (every_process or first_process()):
        from tqdm import tqdm

        tqdm.write(f"lrds-fast: {text}", file=sys.stderr)
        sys.stderr.flush()
