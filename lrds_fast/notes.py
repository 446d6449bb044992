"""One-line notes to the user on stderr."""

from __future__ import annotations

import os
import sys


def note(text: str, *, every_process: bool = False) -> None:
    """Prints one line above any progress bar, from the first process only unless `every_process`. Does nothing where
    stderr is None."""
    if sys.stderr is not None and (every_process or os.environ.get("RANK", "0") == "0"):
        from tqdm import tqdm

        tqdm.write(f"lrds-fast: {text}", file=sys.stderr)
        sys.stderr.flush()
