"""linear_kd_loss forward + backward, time and peak memory, against losses that store all logits.

    python -m benchmarks.bench_linear_kd_loss                     this machine's CPU, one thread
    python -m benchmarks.bench_linear_kd_loss --quick             a minute
    python -m benchmarks.bench_linear_kd_loss --device cuda --csv out.csv
    python -m benchmarks.bench_linear_kd_loss --markdown results/linear_kd_loss_cpu.csv   a stored run as a table

Contenders: ours; ours with chunks of 256 rows; "materialised", two F.linear and kd_loss; "eager", two F.linear and the
eager loss of benchmarks/baselines.py; if liger-kernel is installed, its chunked distillation loss (PyTorch and
torch.compile: CPU and CUDA) and its fused linear JSD (Triton: CUDA); if trl is, its chunked divergence (PyTorch on the
CPU, Triton on CUDA). These compute KL without label revision, which they do not have; Liger's Triton loss and TRL's
have no cross-entropy either.

Every contender is first checked against lrds_fast.reference in float64. The contenders take turns within each round; a
row holds medians. On the CPU the clock is the process time of one thread, and the peak is that of resident memory above
what was resident before the call. On CUDA they are events around queued calls and the allocator's peak.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
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
from benchmarks.program import parse_suite, say, suite_parser
from benchmarks.tables import Row, facts, markdown_table, origin, processor_details, write_csv
from benchmarks.timing import time_cpu, time_cuda
from lrds_fast import kd_loss, reference
from lrds_fast.linear import default_chunk_rows, linear_kd_loss

TEMPERATURE = 4.0
CE_WEIGHT, KD_WEIGHT = 0.1, 0.9


@dataclass(frozen=True)
class Case:
    """N rows of width d, C classes; the teacher's features have the student's width."""

    rows: int
    width: int
    classes: int
    dtype: torch.dtype

    @property
    def flop(self) -> int:
        """Operations of the four matrix products: two heads, the gradients of hidden and weight."""
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
    """hidden (N, d) and weight (C, d) of the student, leaves with gradients, and of the teacher; target (N,) int64."""

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

    It is right by a margin, so that a 16-bit teacher and the float64 reference revise the same rows.
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
    hidden, weight = (tensor.to(case.dtype).requires_grad_() for tensor in (hidden, weight))
    return Inputs(hidden, weight, teacher_hidden.to(case.dtype), teacher_weight.to(case.dtype), target)


Loss = Callable[[Inputs], Tensor]


@dataclass
class Contender:
    """A loss, the arguments with which lrds_fast.reference computes the same, and the rows of its chunks (0: all)."""

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
    here = {
        "ours": Contender(ours, revised, default),
        "ours, 256 rows": Contender(lambda inputs: ours(inputs, 256), revised, 256),
        "materialised": Contender(materialised, revised),
        "eager": Contender(eager, revised),
    }
    return here | liger_contenders(device) | trl_contenders()


def trl_contenders() -> dict[str, Contender]:
    """TRL's divergence, of its DistillationTrainer: each row's KL without T^2; {} if trl is not installed."""
    if importlib.util.find_spec("trl") is None:
        return {}
    from trl.kernels.chunked_divergence import TOKEN_CHUNK_SIZE, ChunkedDivergenceFunction

    def divergence(i: Inputs) -> Tensor:
        heads = (i.hidden, i.weight, None, i.teacher_hidden, i.teacher_weight, None)
        rows: Tensor = ChunkedDivergenceFunction.apply(*heads, 0.0, TEMPERATURE)[0]
        return rows.mean()

    options = {"temperature": TEMPERATURE, "ce_weight": 0.0, "kd_weight": 1 / TEMPERATURE**2, "revise": None}
    return {"trl chunked (KD alone)": Contender(divergence, options, TOKEN_CHUNK_SIZE)}


def liger_contenders(device: str) -> dict[str, Contender]:
    """Liger's chunked loss, and on CUDA its Triton loss; {} if liger-kernel is not installed."""
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
    liger = {
        "liger chunked": Contender(
            lambda i: chunked(i.hidden, i.weight, i.teacher_hidden, i.teacher_weight, i.target), both, 1024
        )
    }
    if device == "cuda":
        from liger_kernel.transformers import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
        soft = both | {"ce_weight": 0.0, "kd_weight": 1 / TEMPERATURE**2}
        liger["liger fused (KD alone)"] = Contender(
            lambda i: fused(i.hidden, i.weight, i.teacher_hidden, i.teacher_weight, i.target), soft
        )
    return liger


def backward(loss: Loss, inputs: Inputs) -> None:
    """Forward and backward; the gradients are those of inputs.hidden and inputs.weight."""
    inputs.hidden.grad = inputs.weight.grad = None
    loss(inputs).backward()


def check(case: Case, inputs: Inputs, contenders: dict[str, Contender]) -> None:
    """Compares every contender's loss and gradients on the first rows with the float64 reference; AssertionError where
    they differ.

    The reference gets the logits rounded to the case's dtype, because that rounding is the input's, not the loss's.
    """
    rows = min(case.rows, max(8, 4_000_000 // case.classes))
    part, exact = inputs.first(rows, case.dtype), inputs.first(rows, torch.float64)
    accuracy = 1e-4 if case.dtype == torch.float32 else 2e-2
    teacher = F.linear(part.teacher_hidden, part.teacher_weight).double()
    logits = F.linear(exact.hidden, exact.weight)
    logits = logits + (F.linear(part.hidden, part.weight).double() - logits).detach()
    definitions: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}
    for name, contender in contenders.items():
        key = repr(contender.arguments)
        if key not in definitions:
            loss = reference.kd_loss(logits, teacher, exact.target, **contender.arguments)
            leaves = (exact.hidden, exact.weight)
            definitions[key] = loss.detach(), torch.autograd.grad(loss, leaves, retain_graph=True)
        expected_loss, expected_gradients = definitions[key]
        loss = contender.loss(part)
        gradients = torch.autograd.grad(loss, (part.hidden, part.weight))
        for quantity, actual, expected in zip(
            ("loss", "gradient of hidden", "gradient of weight"),
            (loss.detach(), *gradients),
            (expected_loss, *expected_gradients),
            strict=True,
        ):
            error = ((actual.double() - expected).norm() / expected.norm()).item()
            if not error <= accuracy:
                raise AssertionError(f"{name}: {quantity} of {case} is off by {error:.1e}")


def resident_mib(field: str) -> float:
    """A field of /proc/self/status, "VmRSS:" or "VmHWM:", in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_mib(run: Callable[[], None], device: str) -> float | str:
    """Peak memory of `run` in MiB above what was in use before, its results included; "" if the system has no such
    figure."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc keeps would hide what the call allocates
        resident = resident_mib("VmRSS:")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        run()
        return resident_mib("VmHWM:") - resident
    except (OSError, AttributeError):
        return ""


def run_case(case: Case, device: str, rounds: int) -> list[Row]:
    """Checks and times the contenders on a case; a row for each."""
    inputs = make_inputs(case, device)
    losses = contenders(case, device)
    check(case, inputs, losses)
    torch._dynamo.reset()  # contenders that compile have compiled for the shape of the check
    runs = {name: functools.partial(backward, contender.loss, inputs) for name, contender in losses.items()}
    for run in runs.values():
        run()
    timers = {name: time_cuda(run) if device == "cuda" else time_cpu(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
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
                "chunk_rows": losses[name].chunk_rows or "",
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
    body = [
        [
            f"{row['rows']} x {row['width']} -> {row['classes']} {row['dtype']}",
            row["contender"],
            row["chunk_rows"],
            f"{float(row['median_ms']):.4g}",
            f"{float(row['gflop_s']):.0f}",
            f"{float(row['peak_mib']):.0f}" if row["peak_mib"] != "" else "",
            f"{float(row['speedup_of_ours']):.2f}x",
        ]
        for row in rows
    ]
    return "\n".join([*markdown_table(header, body), "", origin(rows[0], processor_details(rows[0]))])


def run_cases(cases: list[Case], common: Row, arguments: argparse.Namespace) -> list[Row]:
    """The rows of all cases, written to --csv after each; common: columns that all rows share."""
    rows: list[Row] = []
    began, longest = time.perf_counter(), 0.0
    for case in cases:
        begin = time.perf_counter()
        # A case starts only if one as long as the longest so far would fit.
        if begin - began + longest > arguments.budget:
            say(f"left out, the budget is used up: {case} and the cases after it")
            break
        measured = run_case(case, arguments.device, arguments.rounds)
        longest = max(longest, time.perf_counter() - begin)
        rows += [row | common for row in measured]
        for row in measured:
            peak = row["peak_mib"] if row["peak_mib"] == "" else f"{row['peak_mib']:.0f} MiB"
            say(f"{case}: {row['contender']} {row['median_ms']:.4g} ms {peak}")
        if arguments.csv is not None:
            write_csv(arguments.csv, rows)
    return rows


def main() -> int:
    parser = suite_parser(__doc__, quick="small shapes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; cases that do not fit are left out")
    arguments = parse_suite(parser, table)
    if arguments is None:
        return 0
    torch.set_num_threads(arguments.threads)
    common = facts(arguments.device)
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    common["liger"] = importlib.metadata.version("liger-kernel") if has_liger else ""
    common["trl"] = importlib.metadata.version("trl") if importlib.util.find_spec("trl") else ""
    cases = QUICK if arguments.quick else CUDA if arguments.device == "cuda" else CPU
    rows = run_cases(cases, common, arguments)
    if rows:
        say(f"\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
