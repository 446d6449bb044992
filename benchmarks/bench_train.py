"""A distillation step from end to end, teacher included: images a second, where the time goes, and what loads pictures.

    python -m benchmarks.bench_train                        this machine's CPU, one thread, at toy size
    python -m benchmarks.bench_train --quick                a minute: the pair for 32 x 32, nothing compiled
    python -m benchmarks.bench_train --device cuda --budget 220 --csv out.csv
    python -m benchmarks.bench_train --markdown results/train_cpu.csv   a stored run as tables

Arms (benchmarks/train_steps.py): "baseline", the step as mdistiller writes it (float32, NCHW, eager losses with label
revision, teacher on every row, meters read after every step); "tuned", the same in bfloat16 autocast, channels_last and
torch.compile, with meters that wait for nobody; "ours", the trainer's step with the same three and kd_loss; ours with a
share of the samples selected, or from cached logits; ours with one thing switched off. Before anything is timed, one
step of every arm of ours, in float32, NCHW and not compiled, must change the parameters as the baseline's does with the
same rows masked (`checked`: relative distance of the two changes); `update_error` is the same for the arm as it is
timed, and says how much bfloat16 matters to a network that has not learned anything yet.

A turn is an epoch of a few batches; arms take turns within each round, a row holds medians over rounds. The CPU's clock
is CPU time, that of ended workers included, if there is one thread, wall time if there are several. CUDA: events, after
the first batches of the turn. Shares are medians of three turns under torch.profiler, by wall time. Weights are random.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
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
from benchmarks.bench_kd_loss import Row, facts, quiet_stderr, write_csv
from benchmarks.train_readers import shown
from benchmarks.train_steps import Arm, Case, Contender
from lrds_fast.data import Loader

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
#: Batches that are different from each other.
DISTINCT = 2
#: Turns under the profiler: on a shared machine one of them may meet a neighbour.
PROFILED = 3
#: What a float32 step of ours may differ from the baseline's.
EQUAL = 1e-3


def cases_here() -> tuple[list[Case], list[str]]:
    """(cases whose libraries are installed, reasons why the others are left out)."""
    found, reasons = [], []
    for case in CASES:
        libraries = {name.partition(":")[0] for name in (case.teacher, case.student) if ":" in name}
        lacking = loaders.missing(*sorted(libraries))
        if lacking:
            reasons.append(f"{case}: {lacking} is not installed")
        else:
            found.append(case)
    return found, reasons


def arms_of(case: Case, device: torch.device, *, quick: bool, compile: bool) -> list[Arm]:
    """On the CPU photographs are for the main arms alone, and nothing is compiled for them: it would take minutes an
    arm and spare a few percent."""
    toy = device.type == "cpu" and case.size > 32
    arms = MAIN if quick or toy else MAIN + ABLATIONS
    if compile and not toy:
        return arms
    return [dataclasses.replace(arm, compiled=False) for arm in arms if arm.name != "ours, not compiled"]


def can_compile(device: torch.device) -> str:
    """ "" where torch.compile works, else why not."""
    if hasattr(torch._dynamo.config, "recompile_limit"):
        # The cache belongs to a network's code, which all arms share: beyond the limit they would silently be eager.
        torch._dynamo.config.recompile_limit = 256
    try:
        torch.compile(lambda x: (x + 1).relu())(torch.zeros(8, device=device))
    except Exception as error:  # what a broken tool chain raises is anybody's guess
        return str(error).strip().splitlines()[0]
    return ""


@dataclass
class Turn:
    """What takes turns: an arm with a loader. seconds: of a step, one per round."""

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
        arriving = iter(self.loader.epoch(epoch, self.selected))
        while True:
            yield
            with record_function("loader"):
                batch = next(arriving, None)
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
    """(size,) bool with a share of True; None for all."""
    if share == 1.0:
        return None
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(size, dtype=torch.bool)
    mask[order[: int(share * size + 0.5)]] = True
    return mask


@dataclass(frozen=True)
class Length:
    """Batches of a turn: the first ones are not timed on CUDA, where queues and workers' stocks fill meanwhile."""

    timed: int
    skipped: int = 0

    @property
    def batches(self) -> int:
        return self.timed + self.skipped


@dataclass(frozen=True)
class Plan:
    """How much is measured: batches of a turn on prepared batches, and of one that loads pictures. until: moments
    (time.perf_counter) after which no further arm is prepared, and no further round begun."""

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
    """The turns of a case: every arm, checked, on prepared batches, and three of them on what else loads pictures."""
    device = plan.device
    shape = (3, case.size, case.size)
    ready = {
        share: loaders.prepared(
            shape,
            classes=case.classes,
            size=plan.size,
            batch=plan.batch,
            distinct=DISTINCT,
            batches=plan.prepared.batches,
            device=device,
            selected=keep(plan.size, share),
        )
        for share in {arm.selected for arm in arms}
    }
    pair = steps.make_pair(case, device, ready[1.0].batches[0].images)
    with steps.exact_convolutions():
        cache = steps.cached_logits(pair.teacher, ready[1.0].batches, plan.size)

    def contender(arm: Arm) -> Contender:
        return steps.make_contender(
            arm, case, pair, device, plan.size, keep(plan.size, arm.selected), cache if arm.cached else None
        )

    wanted: dict[float, Tensor] = {}
    turns: list[Turn] = []
    for arm in arms:
        if time.perf_counter() > plan.until[0] and len(turns) > 2:
            say(f"{case}: {arm.name} is left out, the budget is used up")
            continue
        loader = ready[arm.selected]
        first = loader.batches[0]
        if arm.selected not in wanted:
            masked = dataclasses.replace(BASELINE, selected=arm.selected)
            with steps.exact_convolutions():
                wanted[arm.selected] = steps.first_update(contender(masked), first)
        checked = None
        if arm.ours:
            with steps.exact_convolutions():
                checked = steps.distance(steps.first_update(contender(arm.plain()), first), wanted[arm.selected])
            require(checked <= EQUAL, f"{case}: a float32 step of {arm.name} is {checked:.1e} off the baseline's")
        made = contender(arm)
        error = steps.distance(steps.first_update(made, first), wanted[arm.selected])
        require(math.isfinite(error), f"{case}: a step of {arm.name} leaves parameters that are not finite")
        selected = keep(plan.size, arm.selected)
        turns.append(Turn(made, "synthetic", loader, "noise on the device", selected, checked, error, plan.prepared))
    return turns + with_loaders(case, turns, plan, scratch, say)


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def with_loaders(case: Case, turns: list[Turn], plan: Plan, scratch: Path, say: Callable[[str], None]) -> list[Turn]:
    """The baseline with the published loader; ours, with every row and with a selection, with the others."""
    by_name = {turn.contender.arm.name: turn for turn in turns}
    small = case.size == 32
    kinds, reasons = loaders.cifar_kinds() if small else loaders.photograph_kinds()
    for reason in reasons:
        say(f"{case}: without {reason}")
    if not kinds:
        return []
    best = kinds[-1]
    wanted = [(BASELINE.name, "published"), (OURS.name, "torchvision"), (OURS.name, best), (SELECTED.name, best)]
    pictures = loaders.cifar_pictures(plan.size) if small else None
    found = None if small else loaders.photographs(scratch)
    made: dict[str, Loader] = {}
    more = []
    for name, kind in dict.fromkeys(wanted):
        if kind not in kinds or name not in by_name:
            continue
        if kind not in made and pictures is not None:
            made[kind] = loaders.cifar_loader(
                kind, pictures, batch_size=plan.batch, workers=plan.workers, device=plan.device
            )
        elif kind not in made and found is not None:
            made[kind] = loaders.photograph_loader(
                kind,
                found,
                count=plan.size,
                batch_size=plan.batch,
                train=True,
                workers=plan.workers,
                device=plan.device,
                image_size=case.size,
            )
        words = pictures[2] if pictures is not None else found.words if found is not None else ""
        more.append(
            dataclasses.replace(by_name[name], kind=kind, loader=made[kind], pictures=words, length=plan.loaded)
        )
    return more


def measure(turns: list[Turn], plan: Plan) -> None:
    """Fills in the turns' seconds and shares."""
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
        with quiet_stderr():
            found = [steps.shares(steps.profiled(lambda t=turn: t.run(0), plan.device)) for _ in range(PROFILED)]
        turn.shares = {name: statistics.median(each[name] for each in found) for name in found[0]}


def rows_of(case: Case, turns: list[Turn], plan: Plan) -> list[Row]:
    """vs_baseline: the baseline's time over the arm's, on the same kind of batches (prepared, or loaded). vs_tuned:
    likewise, prepared ones only. ceiling: images/s over the same arm's on prepared batches."""
    known = {(turn.contender.arm.name, turn.kind): turn.seconds for turn in turns}
    rows = []
    for turn in turns:
        arm, seconds = turn.contender.arm, turn.seconds
        own = turn.kind == "synthetic"
        against = {
            "vs_baseline": known.get((BASELINE.name, "synthetic" if own else "published")),
            "vs_tuned": known.get(("tuned", "synthetic")) if own else None,
            "ceiling": None if own else known.get((arm.name, "synthetic")),
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
        for name, theirs in against.items():
            ratios = [] if theirs is None else [t / s for t, s in zip(theirs, seconds, strict=True)]
            row[name] = statistics.median(ratios) if ratios else ""
            if name == "vs_baseline":
                row |= {"vs_low": min(ratios, default=""), "vs_high": max(ratios, default="")}
        rows.append(row | {f"share_{name}": share for name, share in turn.shares.items()})
    return rows


def table(rows: list[Row]) -> str:
    """A stored or fresh run as Markdown tables, one per case."""
    lines: list[str] = []
    found = [row for row in rows if row["part"] == "step"]
    unit = "images / CPU-s" if str(rows[0]["threads"]) == "1" else "images/s"
    for case in dict.fromkeys(row["case"] for row in found):
        mine = [row for row in found if row["case"] == case]
        header = ["arm", "settings", "teacher", "loader", unit, "vs baseline", "vs tuned", "of its ceiling"]
        header += ["checked", "update error"]
        lines += [f"## {case}, C = {mine[0]['classes']}, batch {mine[0]['batch']}", ""]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for row in mine:
            spread = f" ({shown(row['vs_low'], '.2f')} to {shown(row['vs_high'], '.2f')})"
            cells = [
                row["arm"],
                row["settings"],
                row["teacher"],
                row["loader"] if row["loader"] == "synthetic" else f"{row['loader']}: {row['pictures']}",
                shown(row["images_s"], ".4g"),
                shown(row["vs_baseline"], ".2f") + ("x" + spread if row["vs_baseline"] not in ("", None) else ""),
                shown(row["vs_tuned"], ".2f") + ("x" if row["vs_tuned"] not in ("", None) else ""),
                shown(row["ceiling"], ".0%"),
                shown(row["checked"], ".0e"),
                shown(row["update_error"], ".0e") if float(row["update_error"]) > 0 else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        names = [*steps.REGIONS, "other", "idle"]
        lines += [
            "",
            "| share of the time: arm | loader | " + " | ".join(names) + " |",
            "|" + "---|" * (2 + len(names)),
        ]
        for row in mine:
            cells = [row["arm"], row["loader"], *(shown(row[f"share_{name}"], ".1%") for name in names)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += train_readers.table([row for row in rows if row["part"] == "reader"])
    for row in {row["command"]: row for row in rows}.values():
        threads = f", {row['threads']} thread(s), {row['isa']}" if row["threads"] != "" else ""
        lines.append(f"{row['device']}{threads}; torch {row['torch']}; commit {row['commit']}; `{row['command']}`.")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--quick", action="store_true", help="the main arms; on the CPU one pair, nothing compiled")
    parser.add_argument("--case", default="", help="only the pairs whose names have this in them; 'readers': no pair")
    parser.add_argument("--rounds", type=int, help="(default 5, quick 3)")
    parser.add_argument("--workers", type=int, help="that load pictures in a step (default: CPU 0, CUDA 8 at most)")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds; arms that do not fit are left out")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, metavar="CSV", help="print a stored run as tables and end")
    arguments = parser.parse_args()
    if arguments.markdown is not None:
        with arguments.markdown.open(newline="", encoding="utf-8") as file:
            sys.stdout.write(table(list(csv.DictReader(file))) + "\n")
        return 0
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.benchmark = True  # as mdistiller has it, for every arm
    device = torch.device(arguments.device)
    began = time.perf_counter()
    workers = arguments.workers if arguments.workers is not None else min(8, os.cpu_count() or 1) if on_gpu else 0

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    rounds = arguments.rounds or (3 if arguments.quick else 5)
    chosen, reasons = cases_here()
    chosen = [case for case in chosen if arguments.case in str(case)]
    if arguments.quick and not on_gpu:
        chosen = chosen[:1]
    why = "a quick run on the CPU" if arguments.quick and not on_gpu else can_compile(device)
    if why:
        reasons.append(f"torch.compile: {why}")
    for reason in reasons:
        say(f"left out: {reason}")
    common = facts(arguments.device)
    rows: list[Row] = []

    def store(found: list[Row]) -> None:
        rows.extend(row | common for row in found)
        if arguments.csv is not None:  # a run that is cut short keeps what it has
            write_csv(arguments.csv, rows)

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for place, case in enumerate(chosen):
            if time.perf_counter() - began > 0.6 * arguments.budget:
                say(f"left out: {case}: the budget is used up")
                continue
            batch = case.cuda_batch if on_gpu else case.cpu_batch // (2 if arguments.quick else 1)
            steady = Length(2) if case.size == 32 else Length(1)
            share = arguments.budget / (len(chosen) + 0.5)  # the readers have the half
            plan = Plan(
                device=device,
                batch=batch,
                rounds=rounds,
                workers=workers,
                prepared=Length(10, 2) if on_gpu else steady,
                loaded=Length(16, 8) if on_gpu else steady,
                until=(began + share * (place + 0.5), began + share * (place + 0.8)),
            )
            torch._dynamo.reset()
            arms = arms_of(case, device, quick=arguments.quick, compile=not why)
            turns = prepare(case, arms, plan, scratch, say)
            measure(turns, plan)
            found = rows_of(case, turns, plan)
            store(found)
            for row in found:
                say(
                    f"{case}, batch {batch}: {row['arm']}, {row['loader']}: {row['images_s']:.4g} images/s,"
                    f" {shown(row['vs_baseline'], '.2f', '-')} x baseline, loss {row['share_loss']:.2%}"
                )
            del turns
        count = 2000 if on_gpu else 64 if arguments.quick else 200
        found = train_readers.rows_of(
            scratch, device=device, count=count, workers=max(1, workers), rounds=rounds, say=say
        )
        store(found)
        for row in found:
            say(f"{row['case']}, {row['loader']}: {row['images_cpu_s']:.4g} images a CPU-second")
    sys.stdout.write("\n" + table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
