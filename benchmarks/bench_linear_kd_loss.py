"""linear_kd_loss forward + backward, time and peak memory, against logits that are materialised first.

    python -m benchmarks.bench_linear_kd_loss                     this machine's CPU, one thread
    python -m benchmarks.bench_linear_kd_loss --quick             a minute
    python -m benchmarks.bench_linear_kd_loss --device cuda --csv out.csv
    python -m benchmarks.bench_linear_kd_loss --markdown results/linear_kd_loss_cpu.csv   a stored run as a table

Contenders: ours, ours with chunks of 256 rows, two F.linear and kd_loss ("materialised"), two F.linear and the eager
loss of benchmarks/baselines.py ("eager"), and where liger-kernel is installed its chunked distillation loss (PyTorch
and torch.compile: CPU and CUDA) and its fused linear JSD (Triton: CUDA). Liger's are run as T^2 KL, without label
revision, its only difference from ours; the Triton one has no cross-entropy either.

Every contender is first checked against lrds_fast.reference in float64. They take turns within each round; a row holds
medians. CPU: process time of one thread, and the peak of resident memory above what was resident before the call. CUDA:
events around queued calls, and the allocator's peak.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import importlib.metadata
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import baselines
from benchmarks.bench_kd_loss import Row, facts, time_cpu, write_csv
from lrds_fast import kd_loss, reference
from lrds_fast.linear import default_chunk_rows, linear_kd_loss

TEMPERATURE = 4.0
CE_WEIGHT, KD_WEIGHT = 0.1, 0.9


@dataclass(frozen=True)
class Case:
    """One row of the table: N rows of width d, C classes; the teacher's width is the student's."""

    rows: int
    width: int
    classes: int
    dtype: torch.dtype

    @property
    def flop(self) -> int:
        """Of the four matrix products: two heads, the gradients of hidden and weight."""
        return 4 * 2 * self.rows * self.width * self.classes

    def __str__(self) -> str:
        return f"{self.rows} x {self.width} -> {self.classes} {str(self.dtype).removeprefix('torch.')}"


CPU = [Case(2048, 512, 32000, dtype) for dtype in (torch.float32, torch.bfloat16)]
QUICK = [Case(512, 128, 10000, dtype) for dtype in (torch.float32, torch.bfloat16)]
CUDA = [
    Case(8192, 4096, 128256, torch.bfloat16),
    Case(8192, 2048, 32000, torch.bfloat16),
    Case(8192, 2048, 32000, torch.float32),
    Case(65536, 2048, 1000, torch.bfloat16),
]


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    target: Tensor

    def first(self, rows: int, dtype: torch.dtype) -> Inputs:
        """The first rows in another dtype, the student's tensors as leaves."""
        return Inputs(
            self.hidden.detach()[:rows].to(dtype, copy=True).requires_grad_(),
            self.weight.detach().to(dtype, copy=True).requires_grad_(),
            self.teacher_hidden[:rows].to(dtype),
            self.teacher_weight.to(dtype),
            self.target[:rows],
        )


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Logits with the spread of trained networks; the teacher is right on three rows of four.

    By a margin: a 16-bit teacher must agree with the float64 reference about which rows are to be revised.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale)

    hidden, weight = normal(case.rows, case.width), normal(case.classes, case.width, scale=2 / case.width**0.5)
    teacher_hidden, teacher_weight = normal(case.rows, case.width), normal(case.classes, case.width)
    teacher_weight *= 3 / case.width**0.5
    target = torch.randint(case.classes, (case.rows,), generator=generator, device=device)
    right = torch.rand(case.rows, generator=generator, device=device) < 0.75
    teacher_hidden += 2.0 * right[:, None] * teacher_weight[target]
    student = (tensor.to(case.dtype).requires_grad_() for tensor in (hidden, weight))
    return Inputs(*student, teacher_hidden.to(case.dtype), teacher_weight.to(case.dtype), target)


Loss = Callable[[Inputs], Tensor]


@dataclass
class Contender:
    """A loss, the arguments with which the reference defines it, and the rows of its chunks (0: all at once)."""

    loss: Loss
    arguments: dict[str, Any]
    chunk_rows: int = 0


def contenders(case: Case, device: str) -> dict[str, Contender]:
    revised: dict[str, Any] = {
        "temperature": TEMPERATURE,
        "ce_weight": CE_WEIGHT,
        "kd_weight": KD_WEIGHT,
        "revise_temperature": None,
    }

    def ours(inputs: Inputs, chunk_rows: int | None = None) -> Tensor:
        return linear_kd_loss(
            inputs.hidden,
            inputs.weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.target,
            chunk_rows=chunk_rows,
            **revised,
        )

    def teacher_logits(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return F.linear(inputs.teacher_hidden, inputs.teacher_weight)

    def materialised(inputs: Inputs) -> Tensor:
        return kd_loss(F.linear(inputs.hidden, inputs.weight), teacher_logits(inputs), inputs.target, **revised)

    def eager(inputs: Inputs) -> Tensor:
        objective = baselines.Objective(temperature=TEMPERATURE, ce_weight=CE_WEIGHT, kd_weight=KD_WEIGHT)
        logits = F.linear(inputs.hidden, inputs.weight)
        return baselines.eager(logits, teacher_logits(inputs), inputs.target, objective)

    default = default_chunk_rows(case.rows, case.classes, 2 * case.dtype.itemsize, device)
    found = {
        "ours": Contender(ours, revised, default),
        "ours, 256 rows": Contender(lambda inputs: ours(inputs, 256), revised, 256),
        "materialised": Contender(materialised, revised),
        "eager": Contender(eager, revised),
    }
    return found | liger_contenders(device)


def liger_contenders(device: str) -> dict[str, Contender]:
    """Liger's two losses of the same shape, if it is installed; the Triton one on CUDA alone."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    chunked = LigerFusedLinearJSDLoss(
        weight_hard_loss=CE_WEIGHT,
        weight_soft_loss=KD_WEIGHT * TEMPERATURE**2,
        beta=0.0,  # KL(teacher || student)
        temperature=TEMPERATURE,
    )
    both = {"temperature": TEMPERATURE, "ce_weight": CE_WEIGHT, "kd_weight": KD_WEIGHT, "revise": None}
    found = {
        "liger chunked": Contender(
            lambda i: chunked(i.hidden, i.weight, i.teacher_hidden, i.teacher_weight, i.target), both, 1024
        )
    }
    if device == "cuda":
        from liger_kernel.transformers import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
        soft = both | {"ce_weight": 0.0, "kd_weight": 1 / TEMPERATURE**2}
        found["liger fused (KD alone)"] = Contender(
            lambda i: fused(i.hidden, i.weight, i.teacher_hidden, i.teacher_weight, i.target), soft
        )
    return found


def backward(loss: Loss, inputs: Inputs) -> None:
    inputs.hidden.grad = inputs.weight.grad = None
    loss(inputs).backward()


def check(case: Case, inputs: Inputs, found: dict[str, Contender]) -> None:
    """Loss and both gradients of a slice against the float64 reference on materialised logits.

    On the logits as the case's dtype rounds them: that rounding is part of the task, not an error in it.
    """
    rows = min(case.rows, max(8, 4_000_000 // case.classes))
    part, exact = inputs.first(rows, case.dtype), inputs.first(rows, torch.float64)
    accuracy = 1e-4 if case.dtype == torch.float32 else 2e-2
    teacher = F.linear(part.teacher_hidden, part.teacher_weight).double()
    logits = F.linear(exact.hidden, exact.weight)
    logits = logits + (F.linear(part.hidden, part.weight).double() - logits).detach()
    definitions: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}
    for name, contender in found.items():
        key = repr(contender.arguments)
        if key not in definitions:
            loss = reference.kd_loss(logits, teacher, exact.target, **contender.arguments)
            leaves = (exact.hidden, exact.weight)
            definitions[key] = loss.detach(), torch.autograd.grad(loss, leaves, retain_graph=True)
        expected, wanted = definitions[key]
        loss = contender.loss(part)
        gradients = torch.autograd.grad(loss, (part.hidden, part.weight))
        for what, actual, value in zip(
            ("loss", "gradient of hidden", "gradient of weight"),
            (loss.detach(), *gradients),
            (expected, *wanted),
            strict=True,
        ):
            error = ((actual.double() - value).norm() / value.norm()).item()
            if not error <= accuracy:
                raise AssertionError(f"{name}: {what} of {case} is off by {error:.1e}")


def time_cuda(run: Callable[[], None]) -> Callable[[], float]:
    """A timer of one of five queued calls: seconds on the device."""

    def timed() -> float:
        run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / 5

    return timed


def resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_mib(run: Callable[[], None], device: str) -> float | str:
    """MiB above what was there before the call, its results included; empty where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc keeps would hide what the call takes
        before = resident_mib("VmRSS:")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        run()
        return resident_mib("VmHWM:") - before
    except (OSError, AttributeError):
        return ""


def run_case(case: Case, device: str, rounds: int) -> list[Row]:
    inputs = make_inputs(case, device)
    found = contenders(case, device)
    check(case, inputs, found)
    torch._dynamo.reset()  # a baseline that compiled the check's shape starts with a fresh cache
    runs = {name: lambda loss=contender.loss: backward(loss, inputs) for name, contender in found.items()}
    for run in runs.values():
        run()
    timers = {name: time_cuda(run) if device == "cuda" else time_cpu(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, timed in timers.items():
            times[name].append(timed())
    rows = []
    for name, seconds in times.items():
        inputs.hidden.grad = inputs.weight.grad = None
        rows.append(
            {
                "rows": case.rows,
                "width": case.width,
                "classes": case.classes,
                "dtype": str(case.dtype).removeprefix("torch."),
                "contender": name,
                "chunk_rows": found[name].chunk_rows or "",
                "median_ms": statistics.median(seconds) * 1e3,
                "min_ms": min(seconds) * 1e3,
                "max_ms": max(seconds) * 1e3,
                "gflop_s": case.flop / statistics.median(seconds) / 1e9,
                "peak_mib": peak_mib(runs[name], device),
                "speedup_of_ours": statistics.median(t / o for t, o in zip(seconds, times["ours"], strict=True)),
            }
        )
    inputs.hidden.grad = inputs.weight.grad = None
    return rows


def table(rows: list[Row]) -> str:
    header = ["case", "contender", "chunk", "ms", "GFLOP/s", "peak MiB", "time / ours"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        peak = f"{float(row['peak_mib']):.0f}" if row["peak_mib"] != "" else ""
        cells = [
            f"{row['rows']} x {row['width']} -> {row['classes']} {row['dtype']}",
            row["contender"],
            str(row["chunk_rows"]),
            f"{float(row['median_ms']):.4g}",
            f"{float(row['gflop_s']):.0f}",
            peak,
            f"{float(row['speedup_of_ours']):.2f}x",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first = rows[0]
    threads = f", {first['threads']} thread(s), {first['isa']}" if first["threads"] != "" else ""
    lines += [
        "",
        f"{first['device']}{threads}; torch {first['torch']}; commit {first['commit']}; `{first['command']}`.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; cases that do not fit are left out")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, metavar="CSV", help="print a stored run as a table and end")
    arguments = parser.parse_args()
    if arguments.markdown is not None:
        with arguments.markdown.open(newline="", encoding="utf-8") as file:
            sys.stdout.write(table(list(csv.DictReader(file))) + "\n")
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    torch.set_num_threads(arguments.threads)
    common = facts(arguments.device)
    liger = importlib.util.find_spec("liger_kernel") is not None
    common["liger"] = importlib.metadata.version("liger-kernel") if liger else ""
    rows: list[Row] = []
    began, longest = time.perf_counter(), 0.0
    for case in QUICK if arguments.quick else {"cpu": CPU, "cuda": CUDA}[arguments.device]:
        begin = time.perf_counter()
        if begin - began + longest > arguments.budget:  # the longest case so far stands for the next one
            sys.stdout.write(f"left out, the budget is used up: {case} and what follows\n")
            break
        found = run_case(case, arguments.device, arguments.rounds)
        longest = max(longest, time.perf_counter() - begin)
        rows += [row | common for row in found]
        for row in found:
            peak = row["peak_mib"] if row["peak_mib"] == "" else f"{row['peak_mib']:.0f} MiB"
            sys.stdout.write(f"{case}: {row['contender']} {row['median_ms']:.4g} ms {peak}\n")
        sys.stdout.flush()
        if arguments.csv is not None:  # a run that is cut short keeps what it has
            write_csv(arguments.csv, rows)
    if rows:
        sys.stdout.write("\n" + table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
