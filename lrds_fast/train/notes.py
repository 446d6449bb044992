"""Notes to the user on stderr."""

from __future__ import annotations

import os
import sys


def note(text: str, *, of_all: bool = False) -> None:
    """Prints one line above any progress bar, from the first process only unless `of_all`; nothing without a stderr."""
    if sys.stderr is not None and (of_all or os.environ.get("RANK", "0") == "0"):
        from tqdm import tqdm

        tqdm.write(f"lrds-fast: {text}", file=sys.stderr)
        sys.stderr.flush()


def open_streams() -> None:
    """Opens the null device for each of stdin, stdout and stderr that is closed, as in a daemon. Otherwise a file that
    a run writes could get the descriptor of stdout or stderr and receive printed text."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # open() returns the lowest free descriptor
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
