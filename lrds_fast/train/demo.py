"""The method on real digits in about a minute: an unreliable teacher, and what revision and selection save."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import lrds_fast
from lrds_fast import charts
from lrds_fast.train import run as runs
from lrds_fast.train.files import write_text
from lrds_fast.train.page import html_report
from lrds_fast.train.recipe import Recipe, load_recipe
from lrds_fast.train.report import Row, Run, read_run, tabulate, verdicts
from lrds_fast.train.statistics import estimate

REPORT = "report.html"
BASELINE = "KD"
TEACHER = "teacher"
ALONE = "student alone"
RANDOM = "KD + random"


class Arm(NamedTuple):
    """One student of the comparison.

    name: in the table. folder, recipe: where and what. scored: the folder of the run whose scores choose the samples,
    "" keeps every sample. by: the score; "random" keeps as many as kd_gain would, which tells choice from dosage.
    """

    name: str
    folder: str
    recipe: str
    scored: str = ""
    by: str = "kd_gain"


ARMS = (
    Arm(ALONE, "alone", "digits_alone"),
    Arm(BASELINE, "kd", "digits_kd"),
    Arm("KD + LR", "kd_lr", "digits_kd_lr"),
    Arm(RANDOM, "kd_random", "digits_kd_ds", "kd", "random"),
    Arm("KD + DS", "kd_ds", "digits_kd_ds", "kd"),
    Arm("KD + LR + DS", "kd_lr_ds", "digits_kd_lr_ds", "kd_lr"),
)

#: Baseline -> whom it is compared with: every student with KD, selection by kd_gain with a random one of as many
#: samples, every other student with the student alone.
COMPARED = {
    BASELINE: [arm.name for arm in ARMS],
    RANDOM: ["KD + DS"],
    ALONE: [arm.name for arm in ARMS if arm.name != BASELINE],
}


@dataclass(frozen=True)
class DemoResult:
    """rows: the table, differences to KD. runs: what it was made of. report: the page. introduction: what was done.
    conclusions: what the numbers say, noise named as noise."""

    rows: list[Row]
    runs: list[Run]
    report: Path
    introduction: list[str]
    conclusions: list[str]


def demo(
    out: Path = Path("runs/demo"),
    *,
    seeds: int = 8,
    settings: Iterable[str] = (),
    progress: bool = True,
) -> DemoResult:
    """Trains teacher and students for every seed, writes out/seedN/... and out/report.html, returns the table.

    A seed draws the wrong labels, the held-out slice, the initial weights and the order; within a seed all students
    share them, so differences are paired. The test split is the same throughout and decides nothing. settings:
    key=value, laid over every recipe. Raises ValueError for fewer than 1 seed or unknown keys.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, 5 or more to say anything; got {seeds}")
    charts.require()
    settings = tuple(settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these networks are smaller than the cost of waking a second thread
    started = time.perf_counter()
    try:
        with tqdm(
            total=seeds * (1 + len(ARMS)), desc="demo", unit="run", disable=not progress or sys.stderr is None
        ) as bar:
            for seed in range(seeds):
                _one_seed(out / f"seed{seed}", seed, settings, bar)
    finally:
        torch.set_num_threads(threads)
    folders = [
        out / f"seed{seed}" / folder for folder in ("teacher", *(arm.folder for arm in ARMS)) for seed in range(seeds)
    ]
    finished = [read_run(folder) for folder in folders]
    introduction = _introduction(finished, seeds, time.perf_counter() - started)
    rows = tabulate(finished, baseline=BASELINE)
    conclusions = _conclusions(finished)
    page = html_report(
        finished,
        title="lrds-fast demo",
        baseline=BASELINE,
        introduction=introduction,
        conclusions=_cost(finished),
        comparisons=COMPARED,
    )
    write_text(out / REPORT, page)
    return DemoResult(rows, finished, out / REPORT, introduction, conclusions)


def _one_seed(folder: Path, seed: int, settings: Sequence[str], bar: tqdm[None]) -> None:
    def recipe(source: str, name: str, out: Path) -> Recipe:
        # Only the last state is of use: nobody resumes a run of a second.
        own = [
            f"seed={seed}",
            f"data.split_seed={seed}",
            "run.device=cpu",
            "run.save_every=1000000",
        ]
        chosen = load_recipe(source, [*settings, *own])
        return chosen.with_values(**{"name": name, "run.out": str(out)})

    def fit(chosen: Recipe) -> None:
        bar.set_postfix_str(f"seed {seed}, {chosen.name}")
        runs.fit(chosen, overwrite=True, progress=False)
        bar.update()

    teacher = folder / "teacher"
    fit(recipe("digits_teacher", TEACHER, teacher))
    for arm in ARMS:
        chosen = recipe(arm.recipe, arm.name, folder / arm.folder)
        if chosen.teacher.model:
            chosen = chosen.with_values(**{"teacher.checkpoint": str(teacher / "last.pt")})
        if arm.scored:
            base = chosen.with_values(**{"run.out": str(folder / arm.scored), "selection.path": ""})
            scores = runs.score(base, progress=False)
            selection = lrds_fast.select(scores, by="kd_gain", confidence=2.0, max_drop=0.1)
            if arm.by != "kd_gain":
                share = len(selection.indices) / len(selection)
                selection = lrds_fast.select(scores, by=arm.by, ratio=share)
            path = folder / arm.folder / "selection.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            selection.save(path)
            chosen = chosen.with_values(**{"selection.path": str(path)})
        fit(chosen)


def _conclusions(finished: Sequence[Run]) -> list[str]:
    """Sentences on what is COMPARED, and on what KD costs."""
    against = {
        base: [row for row in tabulate(finished, baseline=base) if row.name in names]
        for base, names in COMPARED.items()
    }
    return [*verdicts([(rows, base) for base, rows in against.items()]), *_cost(finished)]


def _cost(finished: Sequence[Run]) -> list[str]:
    """What plain KD costs against the student alone, and how much of it is recovered; [] where it costs nothing."""
    differences = {row.name: row.accuracy_difference for row in tabulate(finished, baseline=ALONE)}
    cost = differences[BASELINE]
    if cost is None or not cost.mean < 0:
        return []
    recovered = ", ".join(
        f"{name} {100 * (value.mean - cost.mean):.2f}"
        for name, value in differences.items()
        if name.startswith("KD +") and value is not None
    )
    return [
        f"On average, plain KD from this teacher costs {-100 * cost.mean:.2f} points of accuracy against the student"
        f" alone. Points recovered: {recovered}. The student alone learns from labels that are all right, and the"
        " teacher is less accurate than they are: the demo shows how much LR and DS recover, not that this teacher is"
        " useful.",
    ]


def _introduction(finished: Sequence[Run], seeds: int, seconds: float) -> list[str]:
    teachers = [run for run in finished if run.recipe.name == TEACHER]
    revised = [run for run in finished if run.recipe.name == "KD + LR"]
    noise = teachers[0].recipe.data.label_noise
    accuracy = estimate([run.last["test_acc"] for run in teachers])
    wrong = estimate([run.last["n_revised"] / run.last["n_selected"] for run in revised])
    rows = int(revised[0].last["rows"])
    data = (
        f"Real data: the 1797 8 x 8 digits that scikit-learn ships; {rows} to train on, a slice of the training samples"
        " held out for the scores, a third of all kept for testing and for nothing else."
    )
    teacher = (
        f"The teacher is as unreliable as teachers are in practice, on purpose: {noise:.0%} of its training labels were"
        f" replaced by another class. It is right on {accuracy.mean:.1%} of the test split and wrong on"
        f" {wrong.mean:.1%} of the students' training samples. The students' own labels are correct."
    )
    method = (
        "LR (label revision) corrects the teacher's distribution where it is wrong; DS (data selection) keeps the"
        " teacher on the samples with kd_gain < 0, where it is predicted to lower the held-out loss, as scored on the"
        " student that was trained without selection. 'KD + random' keeps it on as many, drawn at random."
    )
    place = (
        f"{seeds} seed{'s' * (seeds > 1)}, {seconds:.0f} s; torch {torch.__version__}, whose kernels here are"
        f" {torch.backends.cpu.get_cpu_capability()}. The statements below hold for these runs. Another kind of CPU"
        " rounds differently, which changes the trained teacher and has moved differences by a point of accuracy."
    )
    return [data, teacher, method, place]
