"""The distillation steps that benchmarks/bench_train.py times, and where their time goes.

`published_step` is one step as mdistiller writes it (engine/trainer.py, distillers/KD.py); `our_step` is the trainer's.
Both take a Batch and carry out one optimizer step; both name their parts by record_function (REGIONS).
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function

from benchmarks import baselines
from lrds_fast import models
from lrds_fast.data import Batch
from lrds_fast.recipe.recipe import Recipe, from_mapping
from lrds_fast.train.setup import autocast_factory
from lrds_fast.train.step import Step as TrainerStep

REGIONS = ("loader", "teacher", "student", "loss", "backward", "optimizer")
TURN = "turn"
LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4


@dataclass(frozen=True)
class Arm:
    """A way to carry out the step. ours: the trainer's code, else the published one. selected < 1: the share of the
    samples that keep the teacher; compose "prefix" shows it these alone. cached: its logits were computed before.
    waits: the published step reads its meters after every step, which waits for the device."""

    name: str
    ours: bool = False
    amp: str = "off"
    channels_last: bool = False
    compiled: bool = False
    selected: float = 1.0
    compose: str = "prefix"
    cached: bool = False
    waits: bool = False

    @property
    def settings(self) -> str:
        """What is switched on, for tables."""
        words = ["float32" if self.amp == "off" else self.amp, "channels_last" if self.channels_last else "NCHW"]
        words += ["compiled"] if self.compiled else []
        return ", ".join([*words, "kd_loss" if self.ours else "eager loss"])

    @property
    def teacher(self) -> str:
        """The rows that the teacher runs on, as text for tables."""
        if self.cached:
            return "cached logits"
        if self.selected == 1.0:
            return "every row"
        seen = "selected rows only" if self.compose == "prefix" else "every row, by a mask"
        return f"{self.selected:.0%} selected: {seen}"

    def plain(self) -> Arm:
        """The same code in float32, NCHW and without a compiler: equal to the published step up to rounding."""
        return replace(self, amp="off", channels_last=False, compiled=False)


@dataclass(frozen=True)
class Case:
    """A pair of networks, by the names of lrds_fast.models, their pictures' side, and the objective."""

    teacher: str
    student: str
    size: int
    classes: int
    objective: baselines.Objective
    cpu_batch: int
    cuda_batch: int

    def __str__(self) -> str:
        names = [name.rpartition(":")[2] for name in (self.teacher, self.student)]
        return f"{names[0]} -> {names[1]}, {self.size} x {self.size}"


@dataclass(frozen=True)
class Pair:
    """Freshly initialised networks; every arm works on copies."""

    teacher: nn.Module
    student: nn.Module


def make_pair(case: Case, device: torch.device, images: Tensor) -> Pair:
    """Random networks of the case. The teacher's batch statistics are those of `images`: with the initial ones the
    activations of a deep network in eval mode would grow from layer to layer."""
    torch.manual_seed(0)
    teacher, student = (models.create(name, num_classes=case.classes) for name in (case.teacher, case.student))
    teacher.to(device).train().requires_grad_(False)
    student.to(device).train()
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        teacher(images.to(device))
    return Pair(teacher.eval(), student)


def cached_logits(teacher: nn.Module, batches: Iterable[Batch], size: int) -> Tensor:
    """(size, C) float32, the teacher's logits by sample index, as they would be read back from a file."""
    cache: Tensor | None = None
    with torch.no_grad():
        for batch in batches:
            logits = teacher(batch.images)
            cache = logits.new_zeros(size, logits.shape[1]) if cache is None else cache
            cache[batch.indices.to(cache.device)] = logits
    if cache is None:
        raise ValueError("cached_logits needs at least one batch")
    return cache


Step = Callable[[Batch], None]


@dataclass
class Contender:
    """An arm's step and the student that it trains."""

    arm: Arm
    student: nn.Module
    step: Step


def make_contender(
    arm: Arm, case: Case, pair: Pair, device: torch.device, size: int, selected: Tensor | None, cache: Tensor | None
) -> Contender:
    """size: samples of an epoch. selected: (size,) bool on the CPU, None is all. cache: see cached_logits; needed
    where arm.cached."""
    teacher, student = copy.deepcopy(pair.teacher), copy.deepcopy(pair.student)
    memory_format = torch.channels_last if arm.channels_last else torch.contiguous_format
    for network in (teacher, student):
        network.to(memory_format=memory_format)
    # The trainer compiles by itself, as the recipe says.
    called: list[Any] = [torch.compile(m) if arm.compiled and not arm.ours else m for m in (teacher, student)]
    make = our_step if arm.ours else published_step
    return Contender(arm, student, make(arm, case, called[0], called[1], device, size, selected, cache))


def published_step(
    arm: Arm,
    case: Case,
    teacher: nn.Module,
    student: nn.Module,
    device: torch.device,
    size: int,
    selected: Tensor | None,
    _: Tensor | None,
) -> Step:
    """mdistiller's train_iter with its KD distiller, meters included; label revision and the mask of selected rows are
    those of benchmarks/baselines.py. The teacher runs on every row."""
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    memory_format = torch.channels_last if arm.channels_last else torch.contiguous_format
    autocast = autocast_factory(arm.amp, device)
    kept = torch.device("cpu") if arm.waits else device
    meters = dict.fromkeys(("losses", "top1", "top5"), torch.zeros((), device=kept))

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        images = batch.images.float().to(device, non_blocking=True, memory_format=memory_format)
        target = batch.targets.to(device, non_blocking=True)
        mask = None if selected is None else selected[batch.indices].to(device, non_blocking=True)
        with record_function("student"), autocast():
            logits = student(images)
        with record_function("teacher"), torch.no_grad(), autocast():
            taught = teacher(images)
        with record_function("loss"):
            loss = baselines.eager(logits, taught, target, case.objective, mask)
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()
        with torch.no_grad():
            hits = logits.topk(5, dim=1).indices.eq(target[:, None])
            seen = {"losses": loss.detach(), "top1": hits[:, 0].float().mean(), "top5": hits.any(dim=1).float().mean()}
            for name, value in seen.items():
                meters[name] = meters[name] + value.to(kept)

    return step


def recipe_of(arm: Arm, case: Case) -> Recipe:
    """The arm as a recipe of the trainer."""
    words = {
        "loss": {
            "temperature": case.objective.temperature,
            "ce_weight": case.objective.ce_weight,
            "kd_weight": case.objective.kd_weight,
            "ce_weight_unselected": case.objective.ce_weight_unselected,
            "revise": "lr",
            "eta": case.objective.eta,
            "revise_temperature": None,
        },
        "selection": {"compose": arm.compose},
        "optimizer": {"name": "sgd", "lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY},
        "schedule": {"name": "constant"},
        "run": {
            "amp": arm.amp,
            "channels_last": arm.channels_last,
            "compile": "default" if arm.compiled else "off",
        },
    }
    return from_mapping(words, where="bench_train")


@dataclass(frozen=True)
class Precomputed:
    """Logits (size, C) by sample index, on the device: what lrds_fast.train.teaching.CachedLogits are."""

    logits: Tensor
    views: int = 1

    def batch(self, view: int, indices: Tensor, device: torch.device) -> Tensor:
        """The logits of these samples."""
        return self.logits[indices.to(device, non_blocking=True)]


def our_step(
    arm: Arm,
    case: Case,
    teacher: nn.Module,
    student: nn.Module,
    device: torch.device,
    size: int,
    selected: Tensor | None,
    cache: Tensor | None,
) -> Step:
    """The trainer's step, with its totals for the log and its check for losses that are not finite."""
    recipe = recipe_of(arm, case)
    carry_out = TrainerStep(
        recipe,
        student,
        teacher,
        device,
        num_classes=case.classes,
        num_samples=size,
        steps_per_epoch=1,
        cached=None if cache is None else Precomputed(cache),
    )
    carry_out.begin_epoch(0, selected)
    done = 0

    def step(batch: Batch) -> None:
        nonlocal done
        carry_out(batch, done)
        if device.type == "cpu":
            carry_out.totals.check_finite(recipe)
        done += 1

    return step


def parameters_of(module: nn.Module) -> Tensor:
    """All parameters in one float64 vector on the CPU."""
    return torch.cat([p.detach().double().flatten().cpu() for p in module.parameters()])


def cpu_seconds() -> float:
    """CPU time of this process, its threads, and the child processes that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@dataclass
class Clock:
    """Seconds between start() and seconds(): CPU time with one thread, wall time with several, events on CUDA."""

    device: torch.device
    began: float = 0.0
    event: object = None

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        else:
            self.began = self._now()

    def seconds(self) -> float:
        if self.device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            end.synchronize()
            return float(self.event.elapsed_time(end)) / 1e3  # type: ignore[attr-defined]
        return self._now() - self.began

    @staticmethod
    def _now() -> float:
        return cpu_seconds() if torch.get_num_threads() == 1 else time.perf_counter()


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """cuDNN without TF32 and with the same algorithms each time: a float32 step is then float32."""
    backend: Any = torch.backends.cudnn
    before = backend.allow_tf32, backend.benchmark, backend.deterministic
    backend.allow_tf32, backend.benchmark, backend.deterministic = False, False, True
    try:
        yield
    finally:
        backend.allow_tf32, backend.benchmark, backend.deterministic = before


def first_update(contender: Contender, batch: Batch) -> Tensor:
    """What a step changes: the parameters after it minus those before it, one float64 vector on the CPU."""
    before = parameters_of(contender.student)
    contender.step(batch)
    return parameters_of(contender.student) - before


def distance(update: Tensor, reference: Tensor) -> float:
    """The length of the difference of two updates over that of the reference."""
    return float((update - reference).norm() / reference.norm())


def profiled(run: Callable[[], None], device: torch.device) -> list[dict[str, Any]]:
    """The events of torch.profiler's trace of `run`, which lies in a region TURN until the device has ended."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profile, record_function(TURN):
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def shares(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The share of each of REGIONS, of "other" and of "idle" in the turn, from a trace.

    Without kernels in it: the regions' durations on the main thread; "idle" is 0. With kernels: these, each counted in
    the region during which it was launched by whatever thread (backward launches from one of its own); "idle" is
    when the device had nothing to do.
    """
    spans: list[tuple[float, float, str]] = []
    launched: dict[int, float] = {}
    kernels: list[tuple[int, float]] = []
    total = 0.0
    for event in events:
        category, name = event.get("cat"), event.get("name", "")
        if category == "user_annotation" and name in REGIONS:
            spans.append((event["ts"], event["ts"] + event["dur"], name))
        elif category == "user_annotation" and name == TURN:
            total = event["dur"]
        elif category in ("cuda_runtime", "cuda_driver"):
            launched[event["args"].get("correlation", -1)] = event["ts"]
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append((event["args"].get("correlation", -2), event["dur"]))
    if total <= 0.0:
        raise ValueError(f"the trace has no region {TURN!r}")
    shares_of = dict.fromkeys((*REGIONS, "other", "idle"), 0.0)
    if not kernels:
        for begin, end, name in spans:
            shares_of[name] += (end - begin) / total
        shares_of["other"] = max(0.0, 1.0 - sum(shares_of.values()))
        return shares_of
    spans.sort()
    begins = [span[0] for span in spans]
    for correlation, duration in kernels:
        when = launched.get(correlation)
        place = -1 if when is None else bisect.bisect_right(begins, when) - 1
        inside = place >= 0 and when is not None and when <= spans[place][1]
        shares_of[spans[place][2] if inside else "other"] += duration / total
    shares_of["idle"] = max(0.0, 1.0 - sum(shares_of.values()))
    return shares_of
