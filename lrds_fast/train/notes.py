"""What a run has to say beside its results: lines on stderr."""

from __future__ import annotations

import os
import sys


def note(text: str) -> None:
    """One line, of the first process; nothing where there is no stderr, as in a daemon."""
    if sys.stderr is not None and os.environ.get("RANK", "0") == "0":
        print(f"lrds-fast: {text}", file=sys.stderr, flush=True)
