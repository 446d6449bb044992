"""The rows of benchmark runs: the facts about the machine that each row carries, CSV files, Markdown tables."""

from __future__ import annotations

import csv
import fcntl
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import lrds_fast
from lrds_fast.files import replacing
from lrds_fast.provenance import commit, cpu_name

ROOT = Path(__file__).resolve().parent.parent

Row = dict[str, Any]
"""Column name -> value: numbers in a run that has just ended, strings in a run read from a CSV file."""


def facts(device: str) -> Row:
    """The columns that place a number: processor, threads, versions, commit, and this program's command, written so
    that it runs from the root of the repository. device: "cpu" or "cuda"."""
    program = Path(sys.argv[0]).resolve()
    module = ".".join(program.relative_to(ROOT).with_suffix("").parts) if program.is_relative_to(ROOT) else program.stem
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads() if device == "cpu" else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "lrds_fast": lrds_fast.__version__,
        "commit": commit(),
        "isa": lrds_fast._ops.build_info()["cpu_isa"] if device == "cpu" else "",
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
    }


def processor_details(row: Row) -> list[str]:
    """Threads and instruction set of a row measured on the CPU; [] for a row measured on a GPU."""
    return [] if row["threads"] == "" else [f"{row['threads']} thread(s)", row["isa"]]


def origin(row: Row, details: Sequence[str] = (), measured: Sequence[str] = ()) -> str:
    """One line that says where and how a row was measured.

    details: more about the device, printed after its name. measured: other measurements of the same run.
    """
    device = ", ".join([row["device"], *details])
    parts = [device, f"torch {row['torch']}", *measured, f"commit {row['commit']}", f"`{row['command']}`"]
    return f"{'; '.join(parts)}."


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(str, cells)) + " |" for cells in rows]


def csv_text(columns: Sequence[str], rows: Iterable[Row], *, header: bool = True) -> str:
    """The rows as CSV with "\\n" at the ends of lines. ValueError for a row with a key that is not in columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file. FileNotFoundError if there is no such file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stored_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file that append_csv writes; [] before its first row."""
    return read_csv(path) if path.exists() else []


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes a run's rows, floats with six digits. The columns are the keys of all rows, in the order of their first
    appearance. The file is replaced as a whole, and its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as name, open(name, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def append_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Appends rows to a file that several processes of one machine may share; writes the header into a new file."""
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, io.SEEK_END)
        file.write(csv_text(columns, rows, header=file.tell() == 0))
