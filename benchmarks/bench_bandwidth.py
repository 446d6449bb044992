"""kd_loss forward + backward against the memory bandwidth of the machine, where memory is what it waits for.

    python -m benchmarks.bench_bandwidth                    this machine's CPU, one thread and all cores
    python -m benchmarks.bench_bandwidth --device cuda

Shapes whose logits exceed the last cache. Each turn of kd_loss is followed by one of a = b + s * c (STREAM's triad, by
torch.add into memory that is already there); percent is the median over rounds of the bytes a second that kd_loss must
move (read student, read teacher, write gradient) over the triad's. memory says what becomes of a gradient that is
dropped: "returned" to the operating system, as glibc does with large blocks, so that the next one costs page faults; or
"kept" for the next step, as jemalloc and tcmalloc do, and glibc with the settings that this program makes by mallopt.
Every case is checked against lrds_fast.reference in float64 before it is timed.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.bench_kd_loss import (
    Case,
    Row,
    backward,
    check,
    contenders,
    facts,
    make_inputs,
    time_cpu,
    time_cuda_graph,
    write_csv,
)

SHAPES = [(65536, 100), (32768, 1000), (1024, 21841), (256, 128256)]
QUICK = [(8192, 1000), (256, 21841)]
TYPES = (torch.float32, torch.bfloat16)
TRIAD_ELEMENTS = 32_000_000


def keep_memory() -> bool:
    """Lets glibc keep large blocks for the next allocation; False where the C library is another one."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def triad(device: str) -> Callable[[], None]:
    a, b, c = (torch.ones(TRIAD_ELEMENTS, device=device) for _ in range(3))

    def run() -> None:
        torch.add(b, c, alpha=3.0, out=a)

    return run


def run_case(case: Case, device: str, rounds: int) -> Row:
    losses = contenders(case, ["ours", "eager"])  # eager to check by, not to time
    inputs = make_inputs(case, device)
    check(case, inputs, losses)
    inputs.student.grad = None
    timer = time_cuda_graph if device == "cuda" else time_cpu
    ours = timer(lambda: backward(losses["ours"], inputs))
    roof = timer(triad(device))
    seconds, percents, rates = [], [], []
    moved = 3 * case.elements * torch.finfo(case.dtype).bits // 8
    for _ in range(rounds):
        seconds.append(ours())
        rates.append(12 * TRIAD_ELEMENTS / roof())
        percents.append(moved / seconds[-1] / rates[-1] * 100)
    return {
        "rows": case.rows,
        "classes": case.classes,
        "dtype": case.types,
        "median_ms": statistics.median(seconds) * 1e3,
        "ns_per_element": statistics.median(seconds) / case.elements * 1e9,
        "gb_s": moved / statistics.median(seconds) / 1e9,
        "triad_gb_s": statistics.median(rates) / 1e9,
        "percent_of_triad": statistics.median(percents),
    }


def table(rows: list[Row]) -> str:
    header = ["threads", "memory", "shape", "dtype", "ns/element", "GB/s", "triad, GB/s", "% of triad"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        numbers = [float(row[name]) for name in ("ns_per_element", "gb_s", "triad_gb_s", "percent_of_triad")]
        cells = [str(row["threads"]), row["memory"], f"{row['rows']} x {row['classes']}", row["dtype"]]
        cells += [f"{numbers[0]:.3f}", f"{numbers[1]:.1f}", f"{numbers[2]:.1f}", f"{numbers[3]:.0f}%"]
        lines.append("| " + " | ".join(cells) + " |")
    first = rows[0]
    isa = f", {first['isa']}" if first["isa"] else ""
    lines += ["", f"{first['device']}{isa}; torch {first['torch']}; commit {first['commit']}; `{first['command']}`."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads beside one (default: all)")
    parser.add_argument("--quick", action="store_true", help="smaller shapes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; after them no case begins")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, metavar="CSV", help="print a stored run as a table and end")
    arguments = parser.parse_args()
    if arguments.markdown is not None:
        with arguments.markdown.open(newline="", encoding="utf-8") as file:
            sys.stdout.write(table(list(csv.DictReader(file))) + "\n")
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    rows: list[Row] = []
    began = time.perf_counter()
    for memory in ("returned", "kept"):
        if arguments.device == "cuda" and memory == "returned":
            continue  # PyTorch's CUDA allocator keeps
        if arguments.device == "cpu" and memory == "kept" and not keep_memory():
            continue
        for threads in sorted({1, arguments.threads}) if arguments.device == "cpu" else [1]:
            torch.set_num_threads(threads)
            for n, c in QUICK if arguments.quick else SHAPES:
                for dtype in TYPES:
                    if time.perf_counter() - began > arguments.budget:
                        sys.stdout.write(f"left out, the budget is used up: {n} x {c}\n")
                        continue
                    row = run_case(Case(n, c, dtype), arguments.device, arguments.rounds)
                    rows.append({"memory": memory} | row | facts(arguments.device))
                    sys.stdout.write(
                        f"{threads} thread(s), {memory}, {n} x {c} {row['dtype']}: {row['percent_of_triad']:.0f}%\n"
                    )
                    sys.stdout.flush()
                    if arguments.csv is not None:  # a run that is cut short keeps what it has
                        write_csv(arguments.csv, rows)
    if rows:
        sys.stdout.write("\n" + table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
