"""kd_loss forward + backward against the bandwidth of memory, on shapes where memory limits it.

    python -m benchmarks.bench_bandwidth                    this machine's CPU, one thread and all cores
    python -m benchmarks.bench_bandwidth --device cuda

The logits exceed the last cache. After each call of kd_loss the triad a = b + s * c is timed (STREAM's, by torch.add
into memory that is there already). percent_of_triad is the median over rounds of a ratio: the bytes a second that
kd_loss must move (read student, read teacher, write gradient) over those of the triad.

memory says what the allocator does with the freed gradient of the call before. "returned": it goes back to the
operating system, as with glibc's large blocks, so that the next gradient costs page faults. "kept": it stays for the
next step, as with jemalloc and tcmalloc, and with glibc after the mallopt calls of this program. Every case is checked
against lrds_fast.reference in float64 before it is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.bench_kd_loss import Case, backward, check, contenders, make_inputs
from benchmarks.program import parse_suite, say, suite_parser
from benchmarks.tables import Row, facts, markdown_table, origin, write_csv
from benchmarks.timing import TRIAD_ELEMENTS, time_cpu, time_cuda_graph, triad

SHAPES = [(65536, 100), (32768, 1000), (1024, 21841), (256, 128256)]
QUICK = [(8192, 1000), (256, 21841)]
TYPES = (torch.float32, torch.bfloat16)


def keep_memory() -> bool:
    """Makes glibc keep large freed blocks for the next allocation. False if the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def run_case(case: Case, device: str, rounds: int) -> Row:
    """Checks kd_loss on a case and times it in turns with the triad."""
    losses = contenders(case, ["ours", "eager"])  # eager is for the check
    inputs = make_inputs(case, device)
    check(case, inputs, losses)
    inputs.student.grad = None
    timer = time_cuda_graph if device == "cuda" else time_cpu
    ours = timer(lambda: backward(losses["ours"], inputs))
    triad_timer = timer(triad(device))
    seconds, percents, rates = [], [], []
    moved = 3 * case.elements * torch.finfo(case.dtype).bits // 8
    for _ in range(rounds):
        seconds.append(ours())
        rates.append(12 * TRIAD_ELEMENTS / triad_timer())
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
    body = [
        [
            row["threads"],
            row["memory"],
            f"{row['rows']} x {row['classes']}",
            row["dtype"],
            f"{float(row['ns_per_element']):.3f}",
            f"{float(row['gb_s']):.1f}",
            f"{float(row['triad_gb_s']):.1f}",
            f"{float(row['percent_of_triad']):.0f}%",
        ]
        for row in rows
    ]
    isa = [rows[0]["isa"]] if rows[0]["isa"] else []
    return "\n".join([*markdown_table(header, body), "", origin(rows[0], isa)])


class Setting(NamedTuple):
    """What the allocator does with freed memory ("returned" or "kept"), CPU threads, and the case."""

    memory: str
    threads: int
    case: Case


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """Every setting, after its threads and allocator are set."""
    for memory in ("returned", "kept"):
        if arguments.device == "cuda" and memory == "returned":
            continue  # PyTorch's CUDA allocator keeps freed memory
        if arguments.device == "cpu" and memory == "kept" and not keep_memory():
            continue
        for threads in sorted({1, arguments.threads}) if arguments.device == "cpu" else [1]:
            torch.set_num_threads(threads)
            for n, c in QUICK if arguments.quick else SHAPES:
                for dtype in TYPES:
                    yield Setting(memory, threads, Case(n, c, dtype))


def main() -> int:
    parser = suite_parser(__doc__, quick="smaller shapes", threads=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no case starts")
    arguments = parse_suite(parser, table)
    if arguments is None:
        return 0
    rows: list[Row] = []
    began = time.perf_counter()
    for memory, threads, case in settings(arguments):
        if time.perf_counter() - began > arguments.budget:
            say(f"left out, the budget is used up: {case.rows} x {case.classes}")
            continue
        row = run_case(case, arguments.device, arguments.rounds)
        rows.append({"memory": memory} | row | facts(arguments.device))
        shape = f"{case.rows} x {case.classes} {case.types}"
        say(f"{threads} thread(s), {memory}, {shape}: {row['percent_of_triad']:.0f}%")
        if arguments.csv is not None:
            write_csv(arguments.csv, rows)
    if rows:
        say(f"\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
