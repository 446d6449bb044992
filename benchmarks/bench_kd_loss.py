"""kd_loss forward + backward against the baselines of benchmarks/baselines.py, in one run.

    python -m benchmarks.bench_kd_loss                      this machine's CPU, one thread, the shapes of the README
    python -m benchmarks.bench_kd_loss --quick              two minutes
    python -m benchmarks.bench_kd_loss --device cuda --csv out.csv
    python -m benchmarks.bench_kd_loss --markdown results/kd_loss_cpu.csv   a stored run as a table
    pytest benchmarks/bench_kd_loss.py                      the same cases under pytest-benchmark

Every case is checked against lrds_fast.reference in float64 before it is timed. The contenders take turns within each
round, so that other load on the machine slows all of them; each turn begins with one untimed run. A row holds medians
over rounds. On the CPU with one thread the clock is the process's CPU time (page faults included), with several threads
it is wall time. On CUDA a graph of forward + backward is replayed over buffers that together exceed the L2 cache, and
host_us is timed with Python in the loop. The bandwidth of memory (copy and triad, a = b + s * c) is measured in the
same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import lrds_fast
from benchmarks import baselines, rivals
from benchmarks.program import parse_suite, say, suite_parser
from benchmarks.tables import Row, facts, markdown_table, origin, processor_details, write_csv
from benchmarks.timing import bandwidths, peak_mib_cpu, time_cpu, time_cuda_graph
from lrds_fast import reference

SMALL = [(64, 10), (1024, 10), (65536, 10)]
MEDIUM = [(128, 100), (4096, 100), (65536, 100), (64, 1000), (256, 1000), (1024, 1000), (4096, 1000), (1024, 1001)]
LARGE = [(65536, 1000), (4096, 21841), (2048, 32000), (2048, 128256), (1024, 256000)]
CUDA_ONLY = [(16384, 21841), (8192, 128256), (16400, 131072)]
CONTENDERS = ("ours", "eager", "lean", "compile", "compile-autotune", "liger", "triton")
QUICK = [(128, 100), (256, 1000), (1024, 1001), (256, 21841)]


@dataclass(frozen=True)
class Case:
    """A batch of logits (rows, classes) and the loss on it. selected: the share of rows that keep the teacher."""

    rows: int
    classes: int
    dtype: torch.dtype = torch.float32
    temperature: float = 4.0
    selected: float = 1.0
    teacher_dtype: torch.dtype | None = None  # None: dtype
    divergence: str = "kl"
    grad_output: float = 1.0

    @property
    def elements(self) -> int:
        return self.rows * self.classes

    @property
    def types(self) -> str:
        """The dtype, "float32", or those of student and teacher, "bfloat16 / float32"."""
        pair = (self.dtype,) if self.teacher_dtype in (None, self.dtype) else (self.dtype, self.teacher_dtype)
        return " / ".join(str(dtype).removeprefix("torch.") for dtype in pair)

    def __str__(self) -> str:
        more = [] if self.divergence == "kl" else [self.divergence]
        more += [] if self.grad_output == 1.0 else [f"grad_output={self.grad_output:g}"]
        shape = f"{self.rows}x{self.classes} {self.types} T={self.temperature:g} selected={self.selected:.0%}"
        return " ".join([shape, *more])


def cases(shapes: list[tuple[int, int]], variations: bool) -> Iterator[Case]:
    """Every shape as float32, T = 4, all rows selected; with variations, also the other options that change the cost,
    at 1024 x 1000."""
    for rows, classes in shapes:
        yield Case(rows, classes)
    if variations:
        for dtype in (torch.bfloat16, torch.float16):
            yield Case(1024, 1000, dtype=dtype)
        yield Case(1024, 1000, dtype=torch.bfloat16, teacher_dtype=torch.float32)
        for temperature in (1.0, 2.0, 2.5):
            yield Case(1024, 1000, temperature=temperature)
        for selected in (0.0, 0.3):
            yield Case(1024, 1000, selected=selected)
        # A GradScaler's grad_output: backward scales the stored gradient, and in float16 computes it again.
        for dtype in (torch.float32, torch.float16):
            yield Case(1024, 1000, dtype=dtype, grad_output=65536.0)
        for divergence in lrds_fast.divergences.NAMES[1:]:
            yield Case(1024, 1000, divergence=divergence)


@dataclass
class Inputs:
    """Logits (N, C) of student (a leaf that requires grad) and teacher; target (N,) int64; selected (N,) bool, or None
    for all."""

    student: Tensor
    teacher: Tensor
    target: Tensor
    selected: Tensor | None


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Logits with the spread of trained networks: the teacher is right on most rows, wrong on some."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (case.rows, case.classes)
    student = torch.randn(shape, generator=generator, device=device).mul_(2.0).to(case.dtype)
    teacher = torch.randn(shape, generator=generator, device=device).mul_(3.0)
    target = torch.randint(case.classes, (case.rows,), generator=generator, device=device)
    right = torch.rand(case.rows, generator=generator, device=device) < 0.75
    teacher[torch.arange(case.rows, device=device), target] += 12.0 * right
    selected = None
    if case.selected < 1.0:
        selected = torch.rand(case.rows, generator=generator, device=device) < case.selected
    return Inputs(student.requires_grad_(), teacher.to(case.teacher_dtype or case.dtype), target, selected)


Loss = Callable[[Inputs], Tensor]


def contenders(case: Case, names: Iterable[str]) -> dict[str, Loss]:
    """The losses with these names (of CONTENDERS), without those that do not have the case's divergence."""
    objective = baselines.Objective(temperature=case.temperature)
    keywords: dict[str, Any] = {**dataclasses.asdict(objective), "divergence": case.divergence}

    def ours(inputs: Inputs) -> Tensor:
        return lrds_fast.kd_loss(inputs.student, inputs.teacher, inputs.target, selected=inputs.selected, **keywords)

    def composed(inputs: Inputs) -> Tensor:
        """Another divergence in PyTorch ops: the baselines have the KL divergence alone."""
        return reference.kd_loss(inputs.student, inputs.teacher, inputs.target, selected=inputs.selected, **keywords)

    def from_baseline(baseline: baselines.Baseline) -> Loss:
        return lambda i: baseline(i.student, i.teacher, i.target, objective, i.selected)

    makers: dict[str, Callable[[], Loss]] = {
        "ours": lambda: ours,
        "eager": lambda: from_baseline(baselines.eager),
        "lean": lambda: from_baseline(baselines.lean_eager),
        "compile": lambda: from_baseline(baselines.compiled()),
        "compile-autotune": lambda: from_baseline(baselines.compiled("max-autotune-no-cudagraphs")),
        "liger": lambda: from_baseline(rivals.liger_composed),
        "triton": lambda: from_baseline(rivals.triton_two_pass),
    }
    if case.divergence != "kl":
        makers = {
            "ours": lambda: ours,
            "eager": lambda: composed,
            "compile": lambda: torch.compile(composed, dynamic=False, fullgraph=True),
        }
    return {name: makers[name]() for name in names if name in makers}


def backward(loss: Loss, inputs: Inputs, grad_output: float = 1.0) -> None:
    """Forward and backward; the gradient is inputs.student.grad."""
    inputs.student.grad = None
    value = loss(inputs)
    value.backward(None if grad_output == 1.0 else torch.full_like(value, grad_output))


def check(case: Case, inputs: Inputs, losses: dict[str, Loss]) -> None:
    """Compares every contender's loss and gradient with the float64 reference; AssertionError where they differ.

    Of a large batch the reference gets the first rows; on the whole batch ours is then compared with eager.
    """
    rows = min(case.rows, max(1, 4_000_000 // case.classes))
    part = Inputs(
        inputs.student.detach()[:rows].clone().requires_grad_(),
        inputs.teacher[:rows].clone(),
        inputs.target[:rows],
        None if inputs.selected is None else inputs.selected[:rows],
    )
    exact = part.student.detach().double().requires_grad_()
    expected = reference.kd_loss(
        exact,
        part.teacher.double(),
        part.target,
        temperature=case.temperature,
        selected=part.selected,
        revise_temperature=None,
        divergence=case.divergence,
    )
    expected.backward(torch.full_like(expected, case.grad_output))
    assert exact.grad is not None
    scale = exact.grad.abs().max()
    rounding = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}[case.dtype]
    for name, loss in losses.items():
        value = loss(part)
        (gradient,) = torch.autograd.grad(value, part.student, torch.full_like(value, case.grad_output))
        torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-4, atol=1e-6, msg=f"{name}: loss, {case}")
        error = ((gradient.double() - exact.grad).abs().max() / scale).item()
        if not error <= rounding:
            raise AssertionError(f"{name}: gradient of {case} is off by {error:.1e} of its largest entry")
    if rows < case.rows and {"ours", "eager"} <= losses.keys():
        with torch.no_grad():
            torch.testing.assert_close(losses["ours"](inputs), losses["eager"](inputs), rtol=1e-3, atol=1e-5)


def make_timers(case: Case, device: str, inputs: Inputs, losses: dict[str, Loss]) -> dict[str, Callable[[], float]]:
    """For each contender a function that runs it and returns the seconds of forward and backward."""
    if device == "cpu":
        runs = {name: functools.partial(backward, loss, inputs, case.grad_output) for name, loss in losses.items()}
        return {name: time_cpu(run) for name, run in runs.items()}
    # Several batches, together larger than any L2, so that no replay finds its inputs there.
    size = case.elements * torch.finfo(case.dtype).bits // 8
    copies = max(1, min(64, math.ceil((512 << 20) / (3 * size))))
    batches = [inputs] + [make_inputs(case, device, seed) for seed in range(1, copies)]

    def of_one_batch(loss: Loss) -> Callable[[], float]:
        def run() -> None:
            for batch in batches:
                value = loss(batch)
                torch.autograd.grad(value, batch.student, torch.full_like(value, case.grad_output))

        seconds = time_cuda_graph(run)
        return lambda: seconds() / copies

    return {name: of_one_batch(loss) for name, loss in losses.items()}


def peak_and_host(case: Case, device: str, inputs: Inputs, loss: Loss) -> Row:
    """peak_mib, and on CUDA host_us: wall time of a call from Python."""

    def run() -> None:
        backward(loss, inputs, case.grad_output)

    inputs.student.grad = None
    if device == "cpu":
        return {"peak_mib": peak_mib_cpu(run)}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(50):
        run()
    host_us = (time.perf_counter() - begin) / 50 * 1e6
    torch.cuda.synchronize()
    return {"peak_mib": peak_mib, "host_us": host_us}


def run_case(case: Case, device: str, names: Iterable[str], rounds: int) -> list[Row]:
    """Checks and times the contenders on a case; a row for each."""
    losses = contenders(case, names)
    inputs = make_inputs(case, device)
    check(case, inputs, losses)
    timers = make_timers(case, device, inputs, losses)
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    return [
        {
            "rows": case.rows,
            "classes": case.classes,
            "dtype": case.types,
            "temperature": case.temperature,
            "selected": case.selected,
            "divergence": case.divergence,
            "grad_output": case.grad_output,
            "contender": name,
            "median_ms": statistics.median(seconds) * 1e3,
            "min_ms": min(seconds) * 1e3,
            "max_ms": max(seconds) * 1e3,
            "ns_per_element": statistics.median(seconds) / case.elements * 1e9,
            "speedup_of_ours": statistics.median(t / o for t, o in zip(seconds, times["ours"], strict=True)),
        }
        | peak_and_host(case, device, inputs, losses[name])
        for name, seconds in times.items()
    ]


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


class CaseKey(NamedTuple):
    """The columns that tell a stored case from the others."""

    rows: int
    classes: int
    dtype: str
    temperature: float
    selected: float
    divergence: str
    grad_output: float


def case_key(row: Row) -> CaseKey:
    return CaseKey(
        int(row["rows"]),
        int(row["classes"]),
        row["dtype"],
        float(row["temperature"]),
        float(row["selected"]),
        row["divergence"],
        float(row["grad_output"]),
    )


def table(rows: list[Row]) -> str:
    """The rows of a run as a Markdown table, and the geometric means over float32, T = 4 shapes with C >= 100."""
    by_case: dict[CaseKey, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(case_key(row), {})[row["contender"]] = row
    names = [name for name in CONTENDERS[1:] if any(name in by_contender for by_contender in by_case.values())]
    header = ["shape", "case", "kd_loss, ms", "ns/element", *(f"vs {name}" for name in names)]
    header += ["% of triad", "peak MiB (eager)"]
    body = [table_cells(key, by_contender, names) for key, by_contender in by_case.items()]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for by_contender in by_case.values():
        if is_headline(by_contender["ours"]):
            for name in by_contender.keys() & ratios.keys():
                ratios[name].append(float(by_contender[name]["speedup_of_ours"]))
    summary = ", ".join(f"{geometric_mean(r):.1f}x {name} ({len(r)} shapes)" for name, r in ratios.items() if r)
    first = rows[0]
    bandwidth = f"triad {float(first['triad_gb_s']):.1f} GB/s"
    where = origin(first, processor_details(first), [bandwidth])
    means = f"Geometric mean over float32 shapes with C >= 100: {summary}."
    return "\n".join([*markdown_table(header, body), "", means, where])


def table_cells(key: CaseKey, by_contender: dict[str, Row], names: list[str]) -> list[str]:
    """A case's cells; names: the contenders that have a column."""
    ours = by_contender["ours"]
    options = [key.dtype] + ([key.divergence] if key.divergence != "kl" else [])
    options += [f"T = {key.temperature:g}"] if key.temperature != 4 else []
    options += [f"{key.selected:.0%} selected"] if key.selected != 1 else []
    options += [f"grad_output {key.grad_output:g}"] if key.grad_output != 1 else []
    sizes = [4 if name == "float32" else 2 for name in key.dtype.split(" / ")]
    # The student is read, its gradient written; the teacher of unselected rows is not read.
    moved = (2 * sizes[0] + key.selected * sizes[-1]) * key.rows * key.classes / (float(ours["median_ms"]) / 1e3)
    peaks = [float(by_contender[name]["peak_mib"]) for name in ("ours", "eager") if name in by_contender]
    return [
        f"{key.rows} x {key.classes}",
        ", ".join(options),
        f"{float(ours['median_ms']):.3g}",
        f"{float(ours['ns_per_element']):.2f}",
        *(f"{float(by_contender[name]['speedup_of_ours']):.1f}x" if name in by_contender else "" for name in names),
        f"{moved / float(ours['triad_gb_s']) / 1e9:.0%}",
        f"{peaks[0]:.3g}" + (f" ({peaks[1]:.3g})" if len(peaks) > 1 else ""),
    ]


def is_headline(row: Row) -> bool:
    """Whether the row counts for the geometric means: the default loss of float32 logits with C >= 100."""
    key = case_key(row)
    return key.dtype == "float32" and key.classes >= 100 and key[3:] == (4.0, 1.0, "kl", 1.0)


def chosen_contenders(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Names of the contenders to run, "ours" first, without those whose library is not installed."""
    names = ["ours", "eager", "lean", "compile"]
    if arguments.device == "cuda":
        names += ["liger", "triton"] + ([] if arguments.quick else ["compile-autotune"])
    if arguments.contenders is not None:
        names = ["ours", *(name for name in arguments.contenders.split(",") if name not in ("ours", ""))]
        if unknown := [name for name in names if name not in CONTENDERS]:
            parser.error(f"--contenders: there is no {unknown[0]!r}; there are: {', '.join(CONTENDERS)}")
    absent = {"liger": not rivals.has_liger(), "triton": not rivals.has_triton()}
    return [name for name in names if not absent.get(name)]


def chosen_cases(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    """The cases that --quick, --device and --shapes leave."""
    shapes = QUICK if arguments.quick else SMALL + MEDIUM + LARGE
    if arguments.device == "cuda" and not arguments.quick:
        shapes = shapes + CUDA_ONLY
    everything = list(cases(shapes, variations=not arguments.quick))
    if arguments.shapes is None:
        return everything
    parts = [part for part in arguments.shapes.split(",") if part]
    chosen = list(dict.fromkeys(case for part in parts for case in everything if part in str(case)))
    if not chosen:
        parser.error(f"--shapes: no case has any of {arguments.shapes!r} in its name")
    return chosen


def run_cases(
    chosen: list[Case], names: list[str], common: Row, began: float, arguments: argparse.Namespace
) -> list[Row]:
    """The rows of all cases, written to --csv after each; common: columns that all rows share."""
    rows: list[Row] = []
    longest = 0.0
    for number, case in enumerate(chosen):
        begin = time.perf_counter()
        # A case starts only if one as long as the longest so far would fit.
        if begin - began + longest > arguments.budget:
            say(f"the budget of {arguments.budget:g} s is used up: {len(chosen) - number} cases left out")
            break
        torch._dynamo.reset()
        # Baselines take tens of seconds a turn on such batches.
        rounds = min(arguments.rounds, 3) if case.elements > 50_000_000 else arguments.rounds
        try:
            measured = run_case(case, arguments.device, names, rounds)
        except torch.OutOfMemoryError:
            # The baselines need tens of bytes per element where kd_loss needs one gradient.
            measured = run_case(case, arguments.device, ["ours"], rounds) if arguments.device == "cuda" else []
        longest = max(longest, time.perf_counter() - begin)
        rows += [row | common for row in measured]
        say(f"{case}: " + ", ".join(f"{row['contender']} {row['median_ms']:.3g} ms" for row in measured))
        if arguments.csv is not None:
            write_csv(arguments.csv, rows)
    return rows


def main() -> int:
    parser = suite_parser(__doc__, quick="a few small shapes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--contenders", help=f"of {','.join(CONTENDERS)}; ours is always one (default: all that are installed)"
    )
    parser.add_argument("--shapes", help="only cases with one of these in their names, in this order: 65536x1000,rkl")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; cases that do not fit are left out")
    arguments = parse_suite(parser, table)
    if arguments is None:
        return 0
    began = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    names, chosen = chosen_contenders(arguments, parser), chosen_cases(arguments, parser)
    common = facts(arguments.device)
    common |= {f"{name}_gb_s": rate / 1e9 for name, rate in bandwidths(arguments.device).items()}
    rows = run_cases(chosen, names, common, began, arguments)
    if rows:
        say(f"\n{table(rows)}")
    return 0


@pytest.mark.parametrize("name", ["ours", "eager", "lean", "compile"])
@pytest.mark.parametrize("case", list(cases(QUICK, variations=True)), ids=str)
def test_forward_and_backward(benchmark: Any, case: Case, name: str) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(case, "cpu")
    losses = contenders(case, [name])
    if name not in losses:
        pytest.skip(f"{name} has no divergence {case.divergence!r}")
    check(case, inputs, losses)
    benchmark.group = str(case)
    benchmark(backward, losses[name], inputs)


if __name__ == "__main__":
    sys.exit(main())
