"""kd_loss forward + backward against the baselines of benchmarks/baselines.py, in one run.

    python -m benchmarks.bench_kd_loss                      this machine's CPU, one thread, the shapes of the README
    python -m benchmarks.bench_kd_loss --quick              two minutes
    python -m benchmarks.bench_kd_loss --device cuda --csv out.csv
    python -m benchmarks.bench_kd_loss --markdown results/kd_loss_cpu.csv   a stored run as a table
    pytest benchmarks/bench_kd_loss.py                      the same cases under pytest-benchmark

Every case is checked against lrds_fast.reference in float64 before it is timed. The contenders take turns within each
round, so that a noisy neighbour meets all of them, each turn after one untimed run; a row holds medians over rounds.
On the CPU with one thread the clock is the process's CPU time (page faults included), with several it is wall time. On
CUDA a graph of forward + backward is replayed over buffers that together exceed the L2 cache; host_us is timed with
Python in the loop. The roofline (copy and triad, a = b + s * c) is measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lrds_fast
from benchmarks import baselines, rivals
from lrds_fast import reference
from lrds_fast.train.provenance import commit, cpu_name

ROOT = Path(__file__).resolve().parent.parent
SMALL = [(64, 10), (1024, 10), (65536, 10)]
MEDIUM = [(128, 100), (4096, 100), (65536, 100), (64, 1000), (256, 1000), (1024, 1000), (4096, 1000), (1024, 1001)]
LARGE = [(65536, 1000), (4096, 21841), (2048, 32000), (2048, 128256), (1024, 256000)]
CUDA_ONLY = [(16384, 21841), (8192, 128256), (16400, 131072)]
# The eager baseline alone needs 40 GB beyond this.
MOST_CPU_ELEMENTS = 270_000_000
KNOWN = ("ours", "eager", "lean", "compile", "compile-autotune", "liger", "triton")
QUICK = [(128, 100), (256, 1000), (1024, 1001), (256, 21841)]


@dataclass(frozen=True)
class Case:
    """One row of the table: a shape, the logits' types, the temperature, the share of selected rows."""

    rows: int
    classes: int
    dtype: torch.dtype = torch.float32
    temperature: float = 4.0
    selected: float = 1.0
    teacher_dtype: torch.dtype | None = None  # as the student's
    divergence: str = "kl"
    grad_output: float = 1.0

    @property
    def elements(self) -> int:
        return self.rows * self.classes

    @property
    def types(self) -> str:
        """ "float32", or "bfloat16 / float32" of student and teacher."""
        pair = (self.dtype,) if self.teacher_dtype in (None, self.dtype) else (self.dtype, self.teacher_dtype)
        return " / ".join(str(dtype).removeprefix("torch.") for dtype in pair)

    def __str__(self) -> str:
        more = [] if self.divergence == "kl" else [self.divergence]
        more += [] if self.grad_output == 1.0 else [f"grad_output={self.grad_output:g}"]
        shape = f"{self.rows}x{self.classes} {self.types} T={self.temperature:g} selected={self.selected:.0%}"
        return " ".join([shape, *more])


def cases(shapes: list[tuple[int, int]], variations: bool) -> Iterator[Case]:
    """Every shape as float32, T = 4, all rows selected; then, at 1024 x 1000, what else changes the cost."""
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
        # What a GradScaler sends down: the stored gradient is scaled once more, or (float16) computed again.
        for dtype in (torch.float32, torch.float16):
            yield Case(1024, 1000, dtype=dtype, grad_output=65536.0)
        for divergence in lrds_fast.divergences.NAMES[1:]:
            yield Case(1024, 1000, divergence=divergence)


@dataclass
class Inputs:
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


def contenders(case: Case, names: list[str]) -> dict[str, Loss]:
    objective = baselines.Objective(temperature=case.temperature)
    keywords: dict[str, Any] = {**dataclasses.asdict(objective), "divergence": case.divergence}

    def ours(inputs: Inputs) -> Tensor:
        return lrds_fast.kd_loss(inputs.student, inputs.teacher, inputs.target, selected=inputs.selected, **keywords)

    def composed(inputs: Inputs) -> Tensor:
        """Another divergence as PyTorch ops: the baselines know the KL alone."""
        return reference.kd_loss(inputs.student, inputs.teacher, inputs.target, selected=inputs.selected, **keywords)

    def from_baseline(baseline: baselines.Baseline) -> Loss:
        return lambda i: baseline(i.student, i.teacher, i.target, objective, i.selected)

    made: dict[str, Callable[[], Loss]] = {
        "ours": lambda: ours,
        "eager": lambda: from_baseline(baselines.eager),
        "lean": lambda: from_baseline(baselines.lean_eager),
        "compile": lambda: from_baseline(baselines.compiled()),
        "compile-autotune": lambda: from_baseline(baselines.compiled("max-autotune-no-cudagraphs")),
        "liger": lambda: from_baseline(rivals.liger_composed),
        "triton": lambda: from_baseline(rivals.triton_two_pass),
    }
    if case.divergence != "kl":
        made |= {"eager": lambda: composed, "compile": lambda: torch.compile(composed, dynamic=False, fullgraph=True)}
        names = [name for name in names if name in ("ours", "eager", "compile")]
    return {name: made[name]() for name in names}


def backward(loss: Loss, inputs: Inputs, grad_output: float = 1.0) -> None:
    inputs.student.grad = None
    value = loss(inputs)
    value.backward(None if grad_output == 1.0 else torch.full_like(value, grad_output))


def check(case: Case, inputs: Inputs, losses: dict[str, Loss]) -> None:
    """Every contender's loss and gradient against the float64 reference, which sees a slice of a large batch."""
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
    if rows < case.rows and "eager" in losses:  # the whole batch, against the field's own code
        with torch.no_grad():
            torch.testing.assert_close(losses["ours"](inputs), losses["eager"](inputs), rtol=1e-3, atol=1e-5)


def cpu_clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def time_cpu(run: Callable[[], None], least_s: float = 0.005) -> Callable[[], float]:
    """A timer of `run` whose every call lasts at least `least_s`: seconds of one run."""
    begin = cpu_clock()
    run()
    once = cpu_clock() - begin
    repeats = max(1, math.ceil(least_s / max(once, 1e-6)))

    def timed() -> float:
        # The contender before this one left the allocator and the page tables in its own state; a training loop
        # repeats itself. On a virtual machine the first touch of a page that the host took back costs microseconds.
        run()
        begin = cpu_clock()
        for _ in range(repeats):
            run()
        return (cpu_clock() - begin) / repeats

    return timed


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Some builds of the profiler announce every start and stop on file descriptor 2."""
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def peak_mib_cpu(run: Callable[[], None]) -> float:
    """The most memory that PyTorch's allocator held for `run` beyond what it held before, MiB."""
    with quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    held = most = 0
    for event in profile.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def triad_cpu() -> float:
    """Bytes per second of a = b + s * c over arrays far larger than the caches, three per element."""
    a, b, c = (torch.ones(32_000_000) for _ in range(3))
    timed = time_cpu(lambda: torch.add(b, c, alpha=3.0, out=a))
    return 12 * a.numel() / statistics.median(timed() for _ in range(7))


def time_cuda_graph(run: Callable[[], None]) -> Callable[[], float]:
    """A timer of one replay of `run` captured as a CUDA graph: no host gaps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def timed() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / 10

    return timed


def roofline_cuda() -> dict[str, float]:
    """Bytes per second of a copy and of a triad over buffers of a gigabyte."""
    a, b, c = (torch.ones(256 << 20, device="cuda") for _ in range(3))
    copy = time_cuda_graph(lambda: a.copy_(b))
    triad = time_cuda_graph(lambda: torch.add(b, c, alpha=3.0, out=a))
    return {
        "copy": 8 * a.numel() / statistics.median(copy() for _ in range(7)),
        "triad": 12 * a.numel() / statistics.median(triad() for _ in range(7)),
    }


Row = dict[str, Any]


def facts(device: str) -> Row:
    """What a reader needs to place a number: device, versions, commit, this program's command from the root."""
    path = Path(sys.argv[0]).resolve()
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts) if path.is_relative_to(ROOT) else path.stem
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads() if device == "cpu" else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "lrds_fast": lrds_fast.__version__,
        "commit": commit(),
        "isa": lrds_fast._ops.build_info()["cpu_isa"] if device == "cpu" else "",
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
    }


def run_case(case: Case, device: str, names: list[str], rounds: int) -> list[Row]:
    losses = contenders(case, names)
    names = list(losses)
    inputs = make_inputs(case, device)
    check(case, inputs, losses)
    timers: dict[str, Callable[[], float]] = {}
    copies = 1
    if device == "cuda":
        # Together larger than any L2, so that no replay finds its inputs there.
        size = case.elements * torch.finfo(case.dtype).bits // 8
        copies = max(1, min(64, math.ceil((512 << 20) / (3 * size))))
        batches = [inputs] + [make_inputs(case, device, seed) for seed in range(1, copies)]
        for name, loss in losses.items():

            def run(loss: Loss = loss) -> None:
                for batch in batches:
                    value = loss(batch)
                    torch.autograd.grad(value, batch.student, torch.full_like(value, case.grad_output))

            timers[name] = time_cuda_graph(run)
    else:
        for name, loss in losses.items():
            timers[name] = time_cpu(lambda loss=loss: backward(loss, inputs, case.grad_output))  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, timed in timers.items():
            times[name].append(timed() / copies)
    rows = [
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
        for name, seconds in times.items()
    ]
    for row, loss in zip(rows, losses.values(), strict=True):
        inputs.student.grad = None
        if device == "cpu":
            row["peak_mib"] = peak_mib_cpu(lambda loss=loss: backward(loss, inputs, case.grad_output))  # type: ignore[misc]
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            backward(loss, inputs, case.grad_output)
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(50):
                backward(loss, inputs, case.grad_output)
            row["host_us"] = (time.perf_counter() - begin) / 50 * 1e6
            torch.cuda.synchronize()
    return rows


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def table(rows: list[Row]) -> str:
    """The rows of a run as a Markdown table, and the geometric means over float32, T = 4 shapes with C >= 100."""
    by_case: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = (int(row["rows"]), int(row["classes"]), row["dtype"], float(row["temperature"]), float(row["selected"]))
        key += (row["divergence"], float(row["grad_output"]))
        by_case.setdefault(key, {})[row["contender"]] = row
    names = [name for name in KNOWN[1:] if any(name in found for found in by_case.values())]
    header = ["shape", "case", "kd_loss, ms", "ns/element", *(f"vs {name}" for name in names)]
    header += ["% of triad", "peak MiB (eager)"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    means: dict[str, list[float]] = {name: [] for name in names}
    for (n, c, dtype, temperature, selected, divergence, grad_output), found in by_case.items():
        ours = found["ours"]
        ratios = [float(found[name]["speedup_of_ours"]) if name in found else None for name in names]
        what = [dtype] + ([divergence] if divergence != "kl" else [])
        what += [f"T = {temperature:g}"] if temperature != 4 else []
        what += [f"{selected:.0%} selected"] if selected != 1 else []
        what += [f"grad_output {grad_output:g}"] if grad_output != 1 else []
        cells = [
            f"{n} x {c}",
            ", ".join(what),
            f"{float(ours['median_ms']):.3g}",
            f"{float(ours['ns_per_element']):.2f}",
        ]
        cells += ["" if ratio is None else f"{ratio:.1f}x" for ratio in ratios]
        sizes = [4 if name == "float32" else 2 for name in dtype.split(" / ")]
        # The student is read, its gradient written; the teacher of unselected rows is not read.
        moved = (2 * sizes[0] + selected * sizes[-1]) * n * c / (float(ours["median_ms"]) / 1e3)
        cells.append(f"{moved / float(ours['triad_gb_s']) / 1e9:.0%}")
        peaks = [float(found[name]["peak_mib"]) for name in ("ours", "eager") if name in found]
        cells.append(f"{peaks[0]:.3g}" + (f" ({peaks[1]:.3g})" if len(peaks) > 1 else ""))
        lines.append("| " + " | ".join(cells) + " |")
        if is_headline(ours):
            for name, ratio in zip(names, ratios, strict=True):
                if ratio is not None:
                    means[name].append(ratio)
    summary = ", ".join(f"{geometric_mean(r):.1f}x {name} ({len(r)} shapes)" for name, r in means.items() if r)
    lines += ["", f"Geometric mean over float32 shapes with C >= 100: {summary}.", provenance(rows[0])]
    return "\n".join(lines)


def is_headline(row: Row) -> bool:
    """Does the row count for the geometric means: the default loss of float32 logits with C >= 100?"""
    numbers = tuple(float(row[name]) for name in ("temperature", "selected", "grad_output"))
    return (
        row["dtype"] == "float32" and row["divergence"] == "kl" and numbers == (4, 1, 1) and int(row["classes"]) >= 100
    )


def provenance(row: Row) -> str:
    """Where and how the rows of a run were measured, in one line."""
    threads = f", {row['threads']} thread(s), {row['isa']}" if row["threads"] != "" else ""
    return (
        f"{row['device']}{threads}; torch {row['torch']}; triad {float(row['triad_gb_s']):.1f} GB/s; "
        f"commit {row['commit']}; `{row['command']}`."
    )


def write_csv(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--quick", action="store_true", help="a few small shapes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", help=f"of {','.join(KNOWN)}; ours is always one (default: all that are here)")
    parser.add_argument("--shapes", help="only cases with one of these in their names, in this order: 65536x1000,rkl")
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
    began = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    names = ["ours", "eager", "lean", "compile"]
    shapes = QUICK if arguments.quick else SMALL + MEDIUM + LARGE
    if arguments.device == "cuda":
        names += [name for name, present in (("liger", rivals.has_liger()), ("triton", rivals.has_triton())) if present]
        if not arguments.quick:
            shapes = shapes + CUDA_ONLY
            names.append("compile-autotune")
    if arguments.contenders is not None:
        wanted = ["ours", *(name for name in arguments.contenders.split(",") if name not in ("ours", ""))]
        if unknown := [name for name in wanted if name not in KNOWN]:
            parser.error(f"--contenders: there is no {unknown[0]!r}; there are: {', '.join(KNOWN)}")
        absent = {"liger": not rivals.has_liger(), "triton": not rivals.has_triton()}
        names = [name for name in wanted if not absent.get(name)]
    chosen = list(cases(shapes, variations=not arguments.quick))
    if arguments.shapes is not None:
        parts = [part for part in arguments.shapes.split(",") if part]
        chosen = list(dict.fromkeys(case for part in parts for case in chosen if part in str(case)))
        if not chosen:
            parser.error(f"--shapes: no case has any of {arguments.shapes!r} in its name")
    rates = roofline_cuda() if arguments.device == "cuda" else {"triad": triad_cpu()}
    common = facts(arguments.device) | {f"{name}_gb_s": rate / 1e9 for name, rate in rates.items()}
    rows: list[Row] = []
    longest = 0.0
    for place, case in enumerate(chosen):
        begin = time.perf_counter()
        # The longest case so far stands for the next one.
        if begin - began + longest > arguments.budget:
            left = len(chosen) - place
            sys.stdout.write(f"the budget of {arguments.budget:g} s is used up: {left} cases left out\n")
            break
        torch._dynamo.reset()
        # The baselines of 1e8 elements take tens of seconds each: three turns of them tell enough.
        rounds = min(arguments.rounds, 3) if case.elements > 50_000_000 else arguments.rounds
        try:
            found = run_case(case, arguments.device, names, rounds)
        except torch.OutOfMemoryError:
            # The baselines need tens of bytes per element where kd_loss needs one gradient.
            found = run_case(case, arguments.device, ["ours"], rounds) if arguments.device == "cuda" else []
        longest = max(longest, time.perf_counter() - begin)
        rows += [row | common for row in found]
        shown = ", ".join(f"{row['contender']} {row['median_ms']:.3g} ms" for row in found)
        sys.stdout.write(f"{case}: {shown}\n")
        sys.stdout.flush()
        if arguments.csv is not None:  # a run that is cut short keeps what it has
            write_csv(arguments.csv, rows)
    if rows:
        sys.stdout.write("\n" + table(rows) + "\n")
    return 0


@pytest.mark.parametrize("name", ["ours", "eager", "lean", "compile"])
@pytest.mark.parametrize("case", list(cases(QUICK, variations=True)), ids=str)
def test_forward_and_backward(benchmark: Any, case: Case, name: str) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(case, "cpu")
    losses = contenders(case, [name])
    check(case, inputs, losses)
    benchmark.group = str(case)
    benchmark(backward, losses[name], inputs)


if __name__ == "__main__":
    sys.exit(main())
