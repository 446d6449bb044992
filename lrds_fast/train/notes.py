"""What a run has to say beside its results: lines on stderr, where there is one."""

from __future__ import annotations

import os
import sys


def note(text: str, *, of_all: bool = False) -> None:
    """One line, above any bar, of the first process alone or `of_all`; nothing where there is no stderr."""
    if sys.stderr is not None and (of_all or os.environ.get("RANK", "0") == "0"):
        from tqdm import tqdm

        tqdm.write(f"lrds-fast: {text}", file=sys.stderr)
        sys.stderr.flush()


def open_streams() -> None:
    """Puts the null device where stdin, stdout or stderr is closed, as in a daemon: what is said goes nowhere, and no
    file that a run writes gets the number of a stream that others print to."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # the lowest that is free
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
