"""The experiment of lrds-fast demo: students with few labels, and a teacher a quarter of whose logits are corrupted.

The teacher is good, but a quarter of the training samples get the logits that it computed for another sample.
"""

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
from lrds_fast.files import write_text
from lrds_fast.influence import Scores
from lrds_fast.pages import charts
from lrds_fast.recipe.recipe import Recipe, load_recipe
from lrds_fast.report.page import html_report
from lrds_fast.report.runs import Run, read_run
from lrds_fast.report.statistics import Estimate, estimate
from lrds_fast.report.tables import Row, aligned, tabulate
from lrds_fast.report.verdicts import verdicts
from lrds_fast.selection import Selection
from lrds_fast.train.run import fit, score

REPORT = "report.html"
TEACHER = "teacher"
ALONE = "student alone"
BASELINE = "KD"
TUNED = "KD, tuned"
REVISED = "KD + LR"
RANDOM = "KD + random"
DENIED = "KD + DS"
REVISED_RANDOM = "KD + LR + random"
BOTH = "KD + LR + DS"

#: Selection denies a sample the teacher where kd_gain exceeds 0 by CONFIDENCE standard errors, and at most the share
#: MAX_DROP of the samples.
CONFIDENCE, MAX_DROP = 2.0, 0.1


class Arm(NamedTuple):
    """One student of the comparison.

    name: in the table. folder: under the seed's folder. recipe: of the library. scored: the folder of the run whose
    scores select the samples, "" keeps every sample. by: the score; "random" denies as many samples as kd_gain does
    with the same scores, which separates the effect of which samples are denied from that of how many are.
    """

    name: str
    folder: str
    recipe: str
    scored: str = ""
    by: str = "kd_gain"


ARMS = (
    Arm(ALONE, "alone", "digits_alone"),
    Arm(BASELINE, "kd", "digits_kd"),
    Arm(TUNED, "kd_tuned", "digits_kd_tuned"),
    Arm(REVISED, "kd_lr", "digits_kd_lr"),
    Arm(RANDOM, "kd_random", "digits_kd_ds", "kd", "random"),
    Arm(DENIED, "kd_ds", "digits_kd_ds", "kd"),
    Arm(REVISED_RANDOM, "kd_lr_random", "digits_kd_lr_ds", "kd_lr", "random"),
    Arm(BOTH, "kd_lr_ds", "digits_kd_lr_ds", "kd_lr"),
)

#: Baseline -> the arms that are compared with it. Every student is compared with KD. Selection is compared with a
#: random selection of the same size, without revision and with it. Revision, with selection and without it, is compared
#: with tuned KD, and revision with selection with revision alone.
COMPARED = {
    BASELINE: [arm.name for arm in ARMS if arm.name != BASELINE],
    RANDOM: [DENIED],
    REVISED_RANDOM: [BOTH],
    TUNED: [REVISED, BOTH],
    REVISED: [BOTH],
}

NOTE = (
    "Means over the seeds, after the last epoch. Differences are paired by seed, ± half of their 95% t interval, not"
    " corrected for the number of comparisons. Revised and denied: training samples; in brackets: the denied samples"
    " on which the teacher is wrong."
)
NOT_SHOWN = (
    "The demo does not cover a tuned KD from a good teacher, where revision and selection have little to correct."
)


@dataclass(frozen=True)
class DemoResult:
    """rows: the table, with differences to KD. runs: the finished runs. report: path of the HTML page. introduction:
    sentences on data and method. conclusions: sentences on the differences, each with its test's result."""

    rows: list[Row]
    runs: list[Run]
    report: Path
    introduction: list[str]
    conclusions: list[str]

    @property
    def table(self) -> str:
        """For a terminal: means over the seeds and paired differences to KD with their 95% intervals."""
        return _table(self.rows, self.runs)

    @property
    def comparisons(self) -> str:
        """For a terminal: paired differences to the other baselines of COMPARED with their 95% intervals."""
        return aligned(
            [
                ("", "accuracy %, 95%", "test loss, 95%"),
                *(
                    (
                        f"{row.name} against {base}",
                        _difference(row.accuracy_difference, 100, 1),
                        _difference(row.cross_entropy_difference, 1, 3),
                    )
                    for base, rows in _compared(self.runs).items()
                    if base != BASELINE
                    for row in rows
                ),
            ]
        )


def demo(
    out: Path = Path("runs/demo"),
    *,
    seeds: int = 8,
    settings: Iterable[str] = (),
    progress: bool = True,
) -> DemoResult:
    """Trains teacher and students for every seed, writes out/seedN/... and out/report.html, returns the table.

    The seed determines the training samples, the corrupted logits, the held-out slice, the initial weights and the
    order of the samples. Within a seed all students share them, so differences are paired. The test split is the same
    for all seeds and decides nothing. settings: key=value, override every recipe. Raises ValueError for fewer than 1
    seed and for unknown keys.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, and 5 or more for significant differences; got {seeds}")
    charts.require()
    settings = tuple(settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for networks this small a second thread costs more than it saves
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
        conclusions=[NOT_SHOWN],
        comparisons=COMPARED,
    )
    write_text(out / REPORT, page)
    return DemoResult(rows, finished, out / REPORT, introduction, conclusions)


def _one_seed(folder: Path, seed: int, settings: Sequence[str], bar: tqdm[None]) -> None:
    """Trains the teacher and every arm; each arm that others select by is scored after its training."""

    def recipe(source: str, name: str, out: Path) -> Recipe:
        # Teacher and students train on different samples. A run takes a second, so only its last checkpoint is
        # written, and no TensorBoard events.
        fixed = [
            f"seed={seed}",
            f"data.split_seed={2 * seed + (name == TEACHER)}",
            "run.device=cpu",
            "run.save_every=1000000",
            "run.tensorboard=false",
        ]
        loaded = load_recipe(source, [*settings, *fixed])
        return loaded.with_values(**{"name": name, "run.out": str(out)})

    def train(recipe: Recipe) -> None:
        bar.set_postfix_str(f"seed {seed}, {recipe.name}")
        fit(recipe, overwrite=True, progress=False)
        bar.update()

    teacher = folder / "teacher"
    train(recipe("digits_teacher", TEACHER, teacher))
    scores: dict[str, Scores] = {}
    for arm in ARMS:
        student = recipe(arm.recipe, arm.name, folder / arm.folder)
        if student.teacher.model:
            student = student.with_values(**{"teacher.checkpoint": str(teacher / "last.pt")})
        if arm.scored:
            path = folder / arm.folder / "selection.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            _selected(scores[arm.scored], arm.by).save(path)
            student = student.with_values(**{"selection.path": str(path)})
        train(student)
        if any(other.scored == arm.folder for other in ARMS):
            scores[arm.folder] = score(student, progress=False)


def _selected(scores: Scores, by: str) -> Selection:
    """The samples that kd_gain keeps, or as many samples by another score."""
    selection = lrds_fast.select(scores, by="kd_gain", confidence=CONFIDENCE, max_drop=MAX_DROP)
    if by == "kd_gain":
        return selection
    return lrds_fast.select(scores, by=by, ratio=len(selection.indices) / len(selection))


def _table(rows: Sequence[Row], finished: Sequence[Run]) -> str:
    lines: list[tuple[str, ...]] = [
        ("", "accuracy %", f"- {BASELINE}, 95%", "test loss", f"- {BASELINE}, 95%", "revised", "denied (wrong)")
    ]
    for row in rows:
        counts = [_denied(run) for run in finished if run.recipe.name == row.name and run.recipe.selection.path]
        denied, wrong = (estimate(values).mean for values in zip(*counts, strict=True)) if counts else (0.0, 0.0)
        lines.append(
            (
                row.name,
                f"{100 * row.accuracy.mean:.1f}",
                _difference(row.accuracy_difference, 100, 1),
                f"{row.cross_entropy.mean:.3f}",
                _difference(row.cross_entropy_difference, 1, 3),
                f"{row.revised.mean:.0f}" if row.revised is not None and row.revised.mean else "",
                f"{denied:.0f} ({wrong:.0f})" if counts else "",
            )
        )
    return aligned(lines)


def _difference(value: Estimate | None, scale: float, digits: int) -> str:
    if value is None:
        return ""
    text = f"{scale * value.mean:+.{digits}f}"
    return text if value.n < 2 else f"{text} ± {scale * value.half_width:.{digits}f}"


def _denied(run: Run) -> tuple[int, int]:
    """How many samples a run's selection denies the teacher, and on how many of these the teacher is wrong."""
    selection = Selection.load(run.recipe.selection.path)
    assert selection.teacher_pred is not None and selection.labels is not None
    wrong = selection.teacher_pred != selection.labels
    return int((~selection.mask).sum()), int((~selection.mask & wrong).sum())


def _compared(finished: Sequence[Run]) -> dict[str, list[Row]]:
    """For each baseline in COMPARED its arms, with their differences to it."""
    return {
        base: [row for row in tabulate(finished, baseline=base) if row.name in names]
        for base, names in COMPARED.items()
    }


def _conclusions(finished: Sequence[Run]) -> list[str]:
    """A sentence per comparison in COMPARED, and NOT_SHOWN."""
    return [*verdicts([(rows, base) for base, rows in _compared(finished).items()]), NOT_SHOWN]


def _introduction(finished: Sequence[Run], seeds: int, seconds: float) -> list[str]:
    def named(name: str) -> list[Run]:
        return [run for run in finished if run.recipe.name == name]

    teacher, student = named(TEACHER), named(REVISED)
    accuracy = estimate([run.last["test_acc"] for run in teacher])
    wrong = estimate([run.last["n_revised"] / run.last["n_selected"] for run in student])
    data = (
        f"Real data: two-digit numbers, composed of scikit-learn's 8 x 8 digits. A student has"
        f" {int(student[0].last['rows'])} labelled numbers of 100 classes; the teacher has learnt from"
        f" {int(teacher[0].last['rows'])} others. No digit of the test numbers occurs in the training numbers."
    )
    noise = (
        f"The teacher is right on {accuracy.mean:.1%} of the test numbers. But"
        f" {student[0].recipe.teacher.answer_noise:.0%} of its answers to a student's samples belong to other samples,"
        f" as if the rows of a file of logits had been permuted: {wrong.mean:.1%} of its answers are wrong."
    )
    method = (
        "LR (label revision) corrects the wrong answers. DS (data selection) denies the teacher to a sample where"
        f" kd_gain, the teacher's predicted effect on the loss of a held-out slice, is {CONFIDENCE:g} standard errors"
        f" above 0, but to at most {MAX_DROP:.0%} of the samples. '{RANDOM}' denies it to as many samples as"
        f" '{DENIED}', and '{REVISED_RANDOM}' to as many as '{BOTH}', drawn at random. '{TUNED}' has ten times KD's"
        " weight of the cross-entropy."
    )
    place = (
        f"{seeds} seed{'s' * (seeds > 1)}, {seconds:.0f} s; torch {torch.__version__}, whose kernels here are"
        f" {torch.backends.cpu.get_cpu_capability()}. The statements below hold for these runs; another CPU may round"
        " differently."
    )
    return [data, noise, method, place]
