"""What a run has to say beside its results: lines on stderr."""

from __future__ import annotations

import sys


def note(text: str) -> None:
    """One line; nothing where there is no stderr, as in a daemon."""
    if sys.stderr is not None:
        print(f"lrds-fast: {text}", file=sys.stderr, flush=True)
