"""A distillation step from end to end, teacher included: images a second, the parts of the time, and picture loaders.

    python -m benchmarks.bench_train                        this machine's CPU, one thread, at toy size
    python -m benchmarks.bench_train --quick                a minute: the pair for 32 x 32, nothing compiled
    python -m benchmarks.bench_train --device cuda --budget 220 --csv out.csv
    python -m benchmarks.bench_train --markdown results/train_cpu.csv   a stored run as tables

Arms (benchmarks/train_steps.py). "baseline": the step as mdistiller writes it (float32, NCHW, eager losses with label
revision, teacher on every row, meters read after every step). "tuned": the same in bfloat16 autocast, channels_last and
torch.compile, with meters that do not wait for the device. "ours": the trainer's step with the same three options and
kd_loss. Further arms of ours select a share of the samples, use cached logits, or have one option switched off.

Before anything is timed, one step of every arm of ours, in float32, NCHW and not compiled, must change the parameters
as the baseline's does with the same rows masked. `checked` is the relative distance of the two changes. `update_error`
is the same for the arm as it is timed: the effect of bfloat16 on a network that has not been trained yet.

A turn is an epoch of a few batches; arms take turns within each round, and a row holds medians over rounds. With one
thread the CPU's clock is CPU time, workers that have ended included; with several it is wall time. On CUDA it is
events, after the first batches of the turn. Shares are medians of three turns under torch.profiler, by wall time.
Weights are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

from benchmarks import train_loaders as loaders
from benchmarks import train_readers
from benchmarks import train_steps as steps
from benchmarks.baselines import Objective
from benchmarks.program import parse_suite, say, suite_parser
from benchmarks.tables import Row, facts, markdown_table, origin, processor_details, write_csv
from benchmarks.timing import quiet_stderr
from benchmarks.train_loaders import Loader
from benchmarks.train_readers import formatted
from benchmarks.train_steps import Arm, Case, Contender

CIFAR = Objective()
IMAGENET = Objective(temperature=1.0, ce_weight=0.5, kd_weight=0.5)
CASES = [
    Case("resnet32x4", "resnet8x4", 32, 100, CIFAR, 16, 512),
    Case("torchvision:resnet34", "torchvision:resnet18", 224, 1000, IMAGENET, 8, 256),
    Case("torchvision:resnet50", "timm:mobilenetv1_100", 224, 1000, IMAGENET, 8, 256),
]
OURS = Arm("ours", ours=True, amp="bf16", channels_last=True, compiled=True)
SELECTED = dataclasses.replace(OURS, name="ours, 30% selected", selected=0.3)
BASELINE = Arm("baseline", waits=True)
MAIN = [
    BASELINE,
    Arm("tuned", amp="bf16", channels_last=True, compiled=True),
    OURS,
    SELECTED,
    dataclasses.replace(OURS, name="ours, cached teacher", cached=True),
]
ABLATIONS = [
    dataclasses.replace(OURS, name="ours, 70% selected", selected=0.7),
    dataclasses.replace(SELECTED, name="ours, 30% selected, mask", compose="mask"),
    dataclasses.replace(OURS, name="ours, not compiled", compiled=False),
    dataclasses.replace(OURS, name="ours, NCHW", channels_last=False),
    dataclasses.replace(OURS, name="ours, float32", amp="off"),
]
#: Different prepared batches.
DISTINCT = 2
#: Turns under the profiler; their median is robust to other load on the machine in one of them.
PROFILED = 3
#: The largest relative distance of the updates of a float32 step of ours and the baseline's.
EQUAL = 1e-3


def cases_here() -> tuple[list[Case], list[str]]:
    """The cases whose libraries are installed, and why the others are left out."""
    cases, reasons = [], []
    for case in CASES:
        libraries = {name.partition(":")[0] for name in (case.teacher, case.student) if ":" in name}
        absent = loaders.missing(*sorted(libraries))
        if absent:
            reasons.append(f"{case}: {absent} is not installed")
        else:
            cases.append(case)
    return cases, reasons


def arms_of(case: Case, device: torch.device, *, quick: bool, compile: bool) -> list[Arm]:
    """The arms of a case. On the CPU cases with photographs have the main arms alone and nothing compiled, which would
    take minutes for each arm and save a few percent of a step."""
    toy = device.type == "cpu" and case.size > 32
    arms = MAIN if quick or toy else MAIN + ABLATIONS
    if compile and not toy:
        return arms
    return [dataclasses.replace(arm, compiled=False) for arm in arms if arm.name != "ours, not compiled"]


def can_compile(device: torch.device) -> str:
    """An empty string if torch.compile works, else why it does not."""
    if hasattr(torch._dynamo.config, "recompile_limit"):
        # All arms share the cache of a network's code. Beyond the limit torch would run them eagerly, without a word.
        torch._dynamo.config.recompile_limit = 256
    try:
        torch.compile(lambda x: (x + 1).relu())(torch.zeros(8, device=device))
    except Exception as error:  # a broken tool chain can raise anything
        return str(error).strip().splitlines()[0]
    return ""


@dataclass
class Turn:
    """An arm with a loader, timed in turns with the others.

    kind: of the loader. pictures: their description. selected: (size,) bool, None for all. checked, update_error: see
    the module. seconds: of a step, one per round. shares: of each region in the time of a step.
    """

    contender: Contender
    kind: str
    loader: Loader
    pictures: str
    selected: Tensor | None
    checked: float | None
    update_error: float
    length: Length
    seconds: list[float] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)

    def batches(self, epoch: int) -> Iterator[None]:
        """Carries out the steps of an epoch; yields before each."""
        batches = iter(self.loader.epoch(epoch, self.selected))
        while True:
            yield
            with record_function("loader"):
                batch = next(batches, None)
            if batch is None:
                return
            self.contender.step(batch)

    def run(self, epoch: int) -> None:
        for _ in self.batches(epoch):
            pass

    def timed(self, epoch: int, clock: steps.Clock) -> float:
        """Seconds of a step."""
        for number, _ in enumerate(self.batches(epoch)):
            if number == self.length.skipped:
                clock.start()
        return clock.seconds() / self.length.timed


def keep(size: int, share: float) -> Tensor | None:
    """(size,) bool with this share of True; None for a share of 1."""
    if share == 1.0:
        return None
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(size, dtype=torch.bool)
    mask[order[: int(share * size + 0.5)]] = True
    return mask


@dataclass(frozen=True)
class Length:
    """Batches of a turn. skipped: untimed ones at its begin, in which CUDA queues and the workers' buffers fill."""

    timed: int
    skipped: int = 0

    @property
    def batches(self) -> int:
        return self.timed + self.skipped


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    prepared, loaded: the length of turns on prepared batches and of turns that load pictures. until: times
    (time.perf_counter) after which no further arm is prepared, and after which no further round starts.
    """

    device: torch.device
    batch: int
    rounds: int
    workers: int
    prepared: Length
    loaded: Length
    until: tuple[float, float]

    @property
    def size(self) -> int:
        """Samples of an epoch."""
        return self.batch * self.loaded.batches


def prepare(case: Case, arms: list[Arm], plan: Plan, scratch: Path, say: Callable[[str], None]) -> list[Turn]:
    """The turns of a case: every arm, after its check, on prepared batches, and three arms on the picture loaders."""
    ready = {
        share: loaders.prepared(
            (3, case.size, case.size),
            classes=case.classes,
            size=plan.size,
            batch=plan.batch,
            distinct=DISTINCT,
            batches=plan.prepared.batches,
            device=plan.device,
            selected=keep(plan.size, share),
        )
        for share in {arm.selected for arm in arms}
    }
    pair = steps.make_pair(case, plan.device, ready[1.0].batches[0].images)
    with steps.exact_convolutions():
        cache = steps.cached_logits(pair.teacher, ready[1.0].batches, plan.size)

    def contender(arm: Arm) -> Contender:
        selected = keep(plan.size, arm.selected)
        return steps.make_contender(arm, case, pair, plan.device, plan.size, selected, cache if arm.cached else None)

    @functools.cache
    def baseline_update(share: float) -> Tensor:
        """The first update of the baseline with all but this share of the rows masked."""
        masked = dataclasses.replace(BASELINE, selected=share)
        with steps.exact_convolutions():
            return steps.first_update(contender(masked), ready[share].batches[0])

    turns: list[Turn] = []
    for arm in arms:
        if time.perf_counter() > plan.until[0] and len(turns) > 2:
            say(f"{case}: {arm.name} is left out, the budget is used up")
            continue
        loader = ready[arm.selected]
        expected = baseline_update(arm.selected)
        checked = None
        if arm.ours:
            with steps.exact_convolutions():
                checked = steps.distance(steps.first_update(contender(arm.plain()), loader.batches[0]), expected)
            require(checked <= EQUAL, f"{case}: a float32 step of {arm.name} is {checked:.1e} off the baseline's")
        timed = contender(arm)
        error = steps.distance(steps.first_update(timed, loader.batches[0]), expected)
        require(math.isfinite(error), f"{case}: a step of {arm.name} leaves parameters that are not finite")
        selected = keep(plan.size, arm.selected)
        turns.append(Turn(timed, "synthetic", loader, "noise on the device", selected, checked, error, plan.prepared))
    return turns + with_loaders(case, turns, plan, scratch, say)


def require(condition: bool, message: str) -> None:
    """AssertionError with the message if the condition is false."""
    if not condition:
        raise AssertionError(message)


def with_loaders(case: Case, turns: list[Turn], plan: Plan, scratch: Path, say: Callable[[str], None]) -> list[Turn]:
    """Turns that load pictures: the baseline with the published loader, ours (with all rows and with a selection) with
    the others."""
    by_name = {turn.contender.arm.name: turn for turn in turns}
    is_cifar = case.size == 32
    kinds, reasons = loaders.cifar_kinds() if is_cifar else loaders.photograph_kinds()
    for reason in reasons:
        say(f"{case}: without {reason}")
    if not kinds:
        return []
    best = kinds[-1]
    pairs = [(BASELINE.name, "published"), (OURS.name, "torchvision"), (OURS.name, best), (SELECTED.name, best)]
    pairs = [(name, kind) for name, kind in dict.fromkeys(pairs) if kind in kinds and name in by_name]
    make, description = cifar_loaders(plan) if is_cifar else photograph_loaders(case, plan, scratch)
    by_kind = {kind: make(kind) for kind in dict.fromkeys(kind for _, kind in pairs)}
    return [
        dataclasses.replace(by_name[name], kind=kind, loader=by_kind[kind], pictures=description, length=plan.loaded)
        for name, kind in pairs
    ]


def cifar_loaders(plan: Plan) -> tuple[Callable[[str], Loader], str]:
    """A function from the kind of a loader to the loader, and the description of its pictures."""
    pictures = loaders.cifar_pictures(plan.size)

    def make(kind: str) -> Loader:
        return loaders.cifar_loader(kind, pictures, batch_size=plan.batch, workers=plan.workers, device=plan.device)

    return make, pictures[2]


def photograph_loaders(case: Case, plan: Plan, scratch: Path) -> tuple[Callable[[str], Loader], str]:
    """Like cifar_loaders. scratch: folder for generated photographs."""
    pictures = loaders.photographs(scratch)

    def make(kind: str) -> Loader:
        return loaders.photograph_loader(
            kind,
            pictures,
            count=plan.size,
            batch_size=plan.batch,
            train=True,
            workers=plan.workers,
            device=plan.device,
            image_size=case.size,
        )

    return make, pictures.description


def measure(turns: list[Turn], plan: Plan) -> None:
    """Sets seconds and shares of the turns."""
    clock = steps.Clock(plan.device)
    for turn in turns:
        turn.seconds, turn.shares = [], {}
        turn.run(0)
    for number in range(plan.rounds):
        if number and time.perf_counter() > plan.until[1]:
            break
        for turn in turns:
            turn.seconds.append(turn.timed(1 + number, clock))
    for turn in turns:
        run = functools.partial(turn.run, 0)
        with quiet_stderr():
            profiles = [steps.shares(steps.profiled(run, plan.device)) for _ in range(PROFILED)]
        turn.shares = {name: statistics.median(shares[name] for shares in profiles) for name in profiles[0]}


def rows_of(case: Case, turns: list[Turn], plan: Plan) -> list[Row]:
    """A row for each turn.

    vs_baseline: the baseline's time over the arm's, both on prepared batches or both on loaded ones. vs_tuned: the same
    with the tuned arm, on prepared batches only. ceiling: images/s over those of the arm on prepared batches.
    """
    seconds_of = {(turn.contender.arm.name, turn.kind): turn.seconds for turn in turns}
    rows = []
    for turn in turns:
        arm, seconds = turn.contender.arm, turn.seconds
        is_prepared = turn.kind == "synthetic"
        compared_with = {
            "vs_baseline": seconds_of.get((BASELINE.name, "synthetic" if is_prepared else "published")),
            "vs_tuned": seconds_of.get(("tuned", "synthetic")) if is_prepared else None,
            "ceiling": None if is_prepared else seconds_of.get((arm.name, "synthetic")),
        }
        row: Row = {
            "part": "step",
            "case": str(case),
            "classes": case.classes,
            "batch": plan.batch,
            "arm": arm.name,
            "settings": arm.settings,
            "teacher": arm.teacher,
            "loader": turn.kind,
            "pictures": turn.pictures,
            "steps": turn.length.timed,
            "rounds": len(seconds),
            "images_s": plan.batch / statistics.median(seconds),
            "median_ms": statistics.median(seconds) * 1e3,
            "min_ms": min(seconds) * 1e3,
            "max_ms": max(seconds) * 1e3,
            "checked": "" if turn.checked is None else turn.checked,
            "update_error": turn.update_error,
        }
        for name, others in compared_with.items():
            ratios = [] if others is None else [t / s for t, s in zip(others, seconds, strict=True)]
            row[name] = statistics.median(ratios) if ratios else ""
            if name == "vs_baseline":
                row |= {"vs_low": min(ratios, default=""), "vs_high": max(ratios, default="")}
        rows.append(row | {f"share_{name}": share for name, share in turn.shares.items()})
    return rows


def table(rows: list[Row]) -> str:
    """The rows of a run as Markdown tables, two for each case and one for the loaders."""
    lines: list[str] = []
    step_rows = [row for row in rows if row["part"] == "step"]
    unit = "images / CPU-s" if str(rows[0]["threads"]) == "1" else "images/s"
    for case in dict.fromkeys(row["case"] for row in step_rows):
        of_case = [row for row in step_rows if row["case"] == case]
        lines += [f"## {case}, C = {of_case[0]['classes']}, batch {of_case[0]['batch']}", ""]
        lines += [*speed_table(of_case, unit), "", *share_table(of_case), ""]
    lines += train_readers.table([row for row in rows if row["part"] == "reader"])
    lines += [origin(row, processor_details(row)) for row in {row["command"]: row for row in rows}.values()]
    return "\n".join(lines)


def speed_table(rows: list[Row], unit: str) -> list[str]:
    header = ["arm", "settings", "teacher", "loader", unit, "vs baseline", "vs tuned", "of its ceiling"]
    body = []
    for row in rows:
        spread = f" ({formatted(row['vs_low'], '.2f')} to {formatted(row['vs_high'], '.2f')})"
        cells = [
            row["arm"],
            row["settings"],
            row["teacher"],
            row["loader"] if row["loader"] == "synthetic" else f"{row['loader']}: {row['pictures']}",
            formatted(row["images_s"], ".4g"),
            formatted(row["vs_baseline"], ".2f") + ("x" + spread if row["vs_baseline"] not in ("", None) else ""),
            formatted(row["vs_tuned"], ".2f") + ("x" if row["vs_tuned"] not in ("", None) else ""),
            formatted(row["ceiling"], ".0%"),
            formatted(row["checked"], ".0e"),
            formatted(row["update_error"], ".0e") if float(row["update_error"]) > 0 else "",
        ]
        body.append(cells)
    return markdown_table([*header, "checked", "update error"], body)


def share_table(rows: list[Row]) -> list[str]:
    names = [*steps.REGIONS, "other", "idle"]
    body = [[row["arm"], row["loader"], *(formatted(row[f"share_{name}"], ".1%") for name in names)] for row in rows]
    return markdown_table(["share of the time: arm", "loader", *names], body)


def plan_of(case: Case, arguments: argparse.Namespace, began: float, number: int, cases: int) -> Plan:
    """The plan of the case with this number among the cases. began: when the program started (time.perf_counter)."""
    on_gpu, quick = arguments.device == "cuda", arguments.quick
    on_cpu = Length(2) if case.size == 32 else Length(1)
    share = arguments.budget / (cases + 0.5)  # half a share remains for the loaders
    return Plan(
        device=torch.device(arguments.device),
        batch=case.cuda_batch if on_gpu else case.cpu_batch // (2 if quick else 1),
        rounds=arguments.rounds,
        workers=arguments.workers,
        prepared=Length(10, 2) if on_gpu else on_cpu,
        loaded=Length(16, 8) if on_gpu else on_cpu,
        until=(began + share * (number + 0.5), began + share * (number + 0.8)),
    )


def run_cases(
    cases: list[Case], arguments: argparse.Namespace, began: float, scratch: Path, *, compile: bool
) -> Iterator[list[Row]]:
    """The rows of each case."""
    for number, case in enumerate(cases):
        if time.perf_counter() - began > 0.6 * arguments.budget:
            say(f"left out: {case}: the budget is used up")
            continue
        plan = plan_of(case, arguments, began, number, len(cases))
        torch._dynamo.reset()
        arms = arms_of(case, plan.device, quick=arguments.quick, compile=compile)
        turns = prepare(case, arms, plan, scratch, say)
        measure(turns, plan)
        rows = rows_of(case, turns, plan)
        del turns
        for row in rows:
            say(
                f"{case}, batch {plan.batch}: {row['arm']}, {row['loader']}: {row['images_s']:.4g} images/s,"
                f" {formatted(row['vs_baseline'], '.2f', '-')} x baseline, loss {row['share_loss']:.2%}"
            )
        yield rows


def run_readers(arguments: argparse.Namespace, scratch: Path) -> list[Row]:
    """The rows of the picture loaders by themselves."""
    rows = train_readers.rows_of(
        scratch,
        device=torch.device(arguments.device),
        count=2000 if arguments.device == "cuda" else 64 if arguments.quick else 200,
        workers=max(1, arguments.workers),
        rounds=arguments.rounds,
        say=say,
    )
    for row in rows:
        say(f"{row['case']}, {row['loader']}: {row['images_cpu_s']:.4g} images a CPU-second")
    return rows


def main() -> int:
    parser = suite_parser(__doc__, quick="the main arms; on the CPU one pair, nothing compiled")
    parser.add_argument("--case", default="", help="only the pairs with this in their names; 'readers': no pair")
    parser.add_argument("--rounds", type=int, help="(default 5, quick 3)")
    parser.add_argument("--workers", type=int, help="that load pictures in a step (default: CPU 0, CUDA 8 at most)")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds; arms that do not fit are left out")
    arguments = parse_suite(parser, table)
    if arguments is None:
        return 0
    on_gpu = arguments.device == "cuda"
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5)
    if arguments.workers is None:
        arguments.workers = min(8, os.cpu_count() or 1) if on_gpu else 0
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.benchmark = True  # for every arm, as mdistiller sets it
    began = time.perf_counter()
    installed, reasons = cases_here()
    cases = [case for case in installed if arguments.case in str(case)]
    quick_cpu = arguments.quick and not on_gpu
    not_compiled = "a quick run on the CPU" if quick_cpu else can_compile(torch.device(arguments.device))
    if not_compiled:
        reasons.append(f"torch.compile: {not_compiled}")
    for reason in reasons:
        say(f"left out: {reason}")
    common = facts(arguments.device)
    rows: list[Row] = []

    def store(measured: list[Row]) -> None:
        rows.extend(row | common for row in measured)
        if arguments.csv is not None:
            write_csv(arguments.csv, rows)

    with tempfile.TemporaryDirectory() as folder:
        for measured in run_cases(
            cases[:1] if quick_cpu else cases, arguments, began, Path(folder), compile=not not_compiled
        ):
            store(measured)
        store(run_readers(arguments, Path(folder)))
    say(f"\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
