"""Runs as one HTML page: results, paired differences, and sections that help to explain them."""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lrds_fast.pages import Figure, Gallery, Section, Table, charts, page, png
from lrds_fast.pages.charts import Interval, Style
from lrds_fast.report import paper
from lrds_fast.report.runs import Run, last_values
from lrds_fast.report.statistics import Estimate, estimate
from lrds_fast.report.tables import NOTES, Row, table_lines, tabulate
from lrds_fast.report.verdicts import Comparisons, judged, what_was_tested
from lrds_fast.selection import Selection
from lrds_fast.selection.report import overlap, score_figures
from lrds_fast.train import rescoring
from lrds_fast.train.folder import GALLERY

#: At most so many classes per chart, pairs of classes per table, and run names with a chart of their own.
_CLASSES, _PAIRS, _CHARTS = 20, 12, 6
#: Keys in which runs of one experiment may differ.
_NOT_COMPARED = ("name", "description", "seed", "run.out")
_TEACHER = Style("muted", "dashed")


def html_report(
    runs: Sequence[Run],
    *,
    title: str,
    baseline: str | None = None,
    introduction: Sequence[str] = (),
    conclusions: Sequence[str] = (),
    comparisons: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """One self-contained page, made from the runs' folders alone.

    comparisons: baseline -> names of the runs that are compared with it; by default every student is compared with
    `baseline`. All comparisons are tested together. introduction, conclusions: paragraphs before and after the numbers.
    """
    groups = _Groups(runs, baseline)
    if comparisons is None:
        comparisons = {baseline: list(groups.students)} if baseline is not None else {}
    sections = [
        *_literature(runs),
        _results(runs, baseline),
        *_differences(runs, groups, comparisons),
        *([Section("What follows", text=conclusions)] if conclusions else []),
        _curves(groups),
        *_calibration(groups),
        *_classes(groups),
        *_errors(groups),
        *_selections(groups),
        *_samples(groups),
        *_made(groups),
    ]
    return page(title, sections, introduction)


def teachers(runs: Sequence[Run]) -> set[str]:
    """The names of the runs that are teachers of other runs."""
    folders = {Path(run.recipe.teacher.checkpoint).parent for run in runs if run.recipe.teacher.checkpoint}
    folders |= {folder.resolve() for folder in folders}
    return {run.recipe.name for run in runs if folders & {run.recipe.out, run.folder, run.folder.resolve()}}


class _Groups:
    """The runs by name, in order of appearance, each name's runs by seed.

    students, teachers: the names with their runs, apart. styles: how each name is drawn. reference: the name with which
    the accuracy by class is compared.
    """

    def __init__(self, runs: Sequence[Run], baseline: str | None) -> None:
        self.by_name: dict[str, list[Run]] = {run.recipe.name: [] for run in runs}
        for run in sorted(runs, key=lambda run: run.recipe.seed):
            self.by_name[run.recipe.name].append(run)
        teacher_names = teachers(runs) - {baseline}
        self.teachers = {name: group for name, group in self.by_name.items() if name in teacher_names}
        self.students = {name: group for name, group in self.by_name.items() if name not in teacher_names}
        self.styles = charts.styles(list(self.students)) | dict.fromkeys(self.teachers, _TEACHER)
        self.reference = baseline if baseline is not None else next(iter(self.students or self.by_name))

    def legend(self, names: Sequence[str]) -> list[tuple[str, Style]]:
        return [(name, self.styles[name]) for name in names]

    def evaluations(self) -> dict[str, list[dict[str, Any]]]:
        """The last evaluations on the test split, of the runs that have a summary, by name: students first."""
        ordered = {**self.students, **self.teachers}
        tests = {name: [run.summary["test"] for run in runs if run.summary] for name, runs in ordered.items()}
        return {name: evaluations for name, evaluations in tests.items() if evaluations}

    def class_name(self) -> Callable[[int], str]:
        """The name of a class, or its number where the runs have different names."""
        known = {tuple(run.summary["class_names"]) for runs in self.by_name.values() for run in runs if run.summary}
        names = known.pop() if len(known) == 1 else ()
        return lambda label: names[label] if label < len(names) else str(label)


def _literature(runs: Sequence[Run]) -> Iterator[Section]:
    tables = []
    for table in paper.paper_tables(runs):
        head = ["", *(kind for _ in table.columns for kind in ("best", "last", "published"))]
        rows = [[label, *(text for cell in cells for text in cell.texts())] for label, cells in table.rows]
        groups = [(f"{teacher} → {student}", 3) for teacher, student in table.columns]
        tables.append(Table(head, rows, table.protocol, groups))
    if tables:
        yield Section("Results as papers print them", tables=tables, notes=[paper.NOTE])


def _results(runs: Sequence[Run], baseline: str | None) -> Section:
    head, *rows = table_lines(tabulate(runs, baseline=baseline), baseline)
    return Section("Results", tables=[Table(head, rows)], notes=[NOTES])


def _differences(runs: Sequence[Run], groups: _Groups, comparisons: Mapping[str, Sequence[str]]) -> Iterator[Section]:
    """For each baseline the differences of accuracy and NLL, as forest plots and in numbers."""
    tables = {
        base: [row for row in tabulate(runs, baseline=base) if row.name in names and row.name != base]
        for base, names in comparisons.items()
    }
    compared: Comparisons = [(rows, base) for base, rows in tables.items()]
    verdicts = {(verdict.row.name, verdict.baseline): verdict for verdict in judged(compared)}
    for base, rows in tables.items():
        paired = [row for row in rows if row.accuracy_difference is not None]
        unpaired = [row.name for row in rows if row.accuracy_difference is None]
        notes = []
        if unpaired:
            notes = [f"Not compared, because their seeds are not those of {base}: {', '.join(unpaired)}."]
        if not paired:
            if notes:
                yield Section(f"Differences to {base}", text=notes)
            continue
        lines = [
            [
                row.name,
                str(len(row.seeds)),
                *_measured(row.accuracy_difference, 100, 2),
                verdicts[row.name, base].accuracy,
                *_measured(row.cross_entropy_difference, 1, 4),
                verdicts[row.name, base].cross_entropy,
            ]
            for row in paired
        ]
        head = ["run", "pairs", "accuracy, points", "95% interval", "", "NLL, nats", "95% interval", ""]
        text = [
            f"Each run minus the run of {base} with the same seed: the mean, its 95% t interval, and the pairs as faint"
            " dots. An interval that by itself excludes 0 is coloured. NLL is the cross-entropy on the test split."
        ]
        if base == list(tables)[-1]:
            explained = what_was_tested(compared, "all")
            notes.append(explained or "One pair gives no estimate of the noise, so nothing was tested.")
        figures = _forests(groups, paired, base)
        yield Section(f"Differences to {base}", text, figures=figures, tables=[Table(head, lines)], notes=notes)


def _forests(groups: _Groups, rows: Sequence[Row], base: str) -> list[Figure]:
    """Forest plots of the rows' differences to `base`, in accuracy and in NLL."""
    figures = []
    for what, key, scale, label, better in (
        ("accuracy", "test_acc", 100.0, f"accuracy − {charts.short(base)}, points", "higher"),
        ("NLL", "test_ce", 1.0, f"NLL − {charts.short(base)}, nats", "lower"),
    ):
        intervals = [_interval(groups, row, base, key, scale) for row in rows]
        plot = charts.forest_plot({"": intervals}, x_label=label, better=better)
        figures.append(Figure(charts.svg(plot, f"{what} minus that of {base}"), ""))
    return figures


def _interval(groups: _Groups, row: Row, base: str, key: str, scale: float) -> Interval:
    values, baseline = (last_values(groups.by_name[name], key) for name in (row.name, base))
    pairs = [scale * (value - other) for value, other in zip(values, baseline, strict=True)]
    mean = estimate(pairs)
    return Interval(row.name, mean.mean, *mean.interval, pairs)


def _measured(value: Estimate | None, scale: float, digits: int) -> tuple[str, str]:
    assert value is not None
    low, high = value.interval
    ends = "-" if math.isnan(low) else f"{scale * low:+.{digits}f} to {scale * high:+.{digits}f}"
    return f"{scale * value.mean:+.{digits}f}", ends


def _curves(groups: _Groups) -> Section:
    figures = []
    for key, label, percent in (
        ("test_acc", "test accuracy", True),
        ("test_ce", "test NLL, nats", False),
        ("train_loss", "training loss (each run's own)", False),
    ):
        series = {name: values_by_epoch(runs, key) for name, runs in groups.students.items()}
        levels = {}
        if key != "train_loss":
            levels = {name: estimate(last_values(runs, key)).mean for name, runs in groups.teachers.items()}
            levels = {name: value for name, value in levels.items() if math.isfinite(value)}
        if any(series.values()):
            plot = charts.curves(series, groups.styles, y_label=label, percent=percent, levels=levels)
            figures.append(Figure(charts.svg(plot, f"{label} by epoch"), ""))
    seeds = max(len(runs) for runs in groups.by_name.values())
    text = ["Lines are means over the seeds; bands reach from the lowest to the highest value."] if seeds > 1 else []
    return Section("Learning curves", text, groups.legend(list(groups.students)), figures)


def values_by_epoch(runs: Sequence[Run], key: str) -> dict[float, list[float]]:
    """epoch -> the values of `key` in that epoch, one per run that reached it."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for record in run.records:
            if record.get(key) is not None:
                values.setdefault(float(record["epoch"]), []).append(record[key])
    return values


def _calibration(groups: _Groups) -> Iterator[Section]:
    evaluations = groups.evaluations()
    if not evaluations:
        return
    figure = charts.reliability({name: pooled_bins(parts) for name, parts in evaluations.items()}, groups.styles)
    rows = [
        [name, *(_percent(parts, key) for key in ("accuracy", "ece")), _nats([part["cross_entropy"] for part in parts])]
        for name, parts in evaluations.items()
    ]
    missing = [name for name in groups.by_name if name not in evaluations]
    yield Section(
        "Calibration",
        [
            "How often the predicted class is right, by the probability that the network assigns to it, on the test"
            " split after the last epoch. A calibrated network is on the dashed line, an overconfident one below it."
        ],
        groups.legend(list(evaluations)),
        [Figure(charts.svg(figure, "accuracy by confidence"), "")],
        [Table(["run", "accuracy, %", "ECE, %", "NLL, nats"], rows)],
        notes=[
            "ECE (expected calibration error): the mean distance between confidence and accuracy over 15 bins of equal"
            " width, weighted by their rows. Mean ± standard error over the seeds.",
            *([f"These runs have no summary of their last evaluation: {', '.join(missing)}."] if missing else []),
        ],
    )


def pooled_bins(parts: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float]]:
    """(rows, mean confidence, accuracy) of each bin over several evaluations."""
    sums: dict[int, np.ndarray] = {}
    for part in parts:
        for rows, confidence, accuracy in part["bins"]:
            place = max(math.ceil(confidence * 15 - 1e-9), 1)
            sums[place] = sums.get(place, np.zeros(3)) + rows * np.array([1.0, confidence, accuracy])
    return [(rows, total / rows, right / rows) for _, (rows, total, right) in sorted(sums.items())]


def _percent(parts: Sequence[Mapping[str, float]], key: str) -> str:
    return _plus_minus([100 * part[key] for part in parts], 2)


def _nats(values: Sequence[float | None]) -> str:
    return _plus_minus([math.nan if value is None else value for value in values], 4)


def _plus_minus(values: Sequence[float], digits: int) -> str:
    mean = estimate(values)
    return f"{mean.mean:.{digits}f}" + ("" if math.isnan(mean.error) else f" ± {mean.error:.{digits}f}")


def _classes(groups: _Groups) -> Iterator[Section]:
    """Accuracy by class of every student and teacher."""
    evaluations = groups.evaluations()
    if len({len(part["classes"]) for parts in evaluations.values() for part in parts}) != 1:
        return  # the runs have different numbers of classes, or no summary
    counts = {name: np.sum([part["classes"] for part in parts], axis=0) for name, parts in evaluations.items()}
    reference = groups.reference if groups.reference in counts else next(iter(counts))
    with np.errstate(invalid="ignore"):
        accuracy = {name: 100 * right / rows for name, (rows, right) in ((n, c.T) for n, c in counts.items())}
    base = accuracy[reference]
    present = np.flatnonzero(np.isfinite(base))
    students = [values for name, values in accuracy.items() if name not in groups.teachers]
    drawn, which = _drawn_classes(present, base, students, reference)
    drawn = drawn[np.argsort(base[drawn], kind="stable")]
    aside = ""
    if groups.teachers:
        aside = " A teacher's hollow dot is left out where it lies beyond the students' range."
    name_of = groups.class_name()
    figure = charts.dots(
        [name_of(label) for label in drawn.tolist()],
        {name: values[drawn].tolist() for name, values in accuracy.items()},
        groups.styles,
        x_label="test accuracy in the class, %",
        aside=list(groups.teachers),
    )
    rows = [
        [name_of(label), str(int(counts[reference][label, 0])), *(f"{accuracy[name][label]:.1f}" for name in accuracy)]
        for label in present[np.argsort(base[present], kind="stable")].tolist()
    ]
    yield Section(
        "Accuracy by class",
        [f"Shown: {which}, sorted by the accuracy of {reference}; test rows of all seeds together.{aside}"],
        groups.legend(list(accuracy)),
        [Figure(charts.svg(figure, "accuracy by class"), "")],
        [Table(["class", "test rows", *accuracy], rows, "Accuracy by class in numbers, %", folded=True)],
    )


def _drawn_classes(
    present: np.ndarray, base: np.ndarray, students: Sequence[np.ndarray], reference: str
) -> tuple[np.ndarray, str]:
    """The classes that the chart shows, and which ones they are, in words.

    present: numbers of the classes that have test rows. base: accuracy by class of `reference`; students: of each.
    """
    if len(present) <= _CLASSES:
        return present, "all classes"
    if len(students) <= 1:
        lowest = present[np.argsort(base[present], kind="stable")[:_CLASSES]]
        return lowest, f"the {_CLASSES} classes with the lowest accuracy"
    change = np.max([np.abs(np.nan_to_num(values - base)) for values in students], axis=0)
    most = present[np.argsort(-change[present], kind="stable")[:_CLASSES]]
    return most, f"the {_CLASSES} classes in which a run differs most from {reference}"


def _errors(groups: _Groups) -> Iterator[Section]:
    """The teacher's errors on the rows whose labels were revised, as pairs of label and the teacher's class."""
    figures: list[Figure] = []
    tables, text = [], []
    for name, runs in groups.students.items():
        errors = [run.summary["teacher"] for run in runs if run.summary and run.summary["teacher"]]
        known, wrong = (sum(part[key] for part in errors) for key in ("asked", "wrong"))
        if not wrong or runs[0].recipe.loss.revise == "none":
            continue
        text.append(
            f"{name}: the teacher's class is not the label on {wrong} of the {known} training samples that keep it"
            f" ({wrong / known:.1%}); there its distribution was revised towards the label."
        )
        if len(figures) < _CHARTS:
            pairs: Counter[tuple[int, int]] = Counter()
            for part in errors:
                for label, teacher, count in part["pairs"]:
                    pairs[label, teacher] += count
            figure, table = _confusions(name, pairs, wrong, groups.class_name())
            figures.append(figure)
            tables.append(table)
    if figures:
        if len(text) > _CHARTS:
            text.append(f"Charts and tables are limited to these runs{_first_of(len(text))}.")
        yield Section("Classes that the teacher confuses", text, figures=figures, tables=tables)


def _confusions(
    name: str, pairs: Counter[tuple[int, int]], wrong: int, name_of: Callable[[int], str]
) -> tuple[Figure, Table]:
    """A heat map of (label, teacher's class) -> samples, and a table of the most frequent pairs."""
    involved: Counter[int] = Counter()
    for pair, count in pairs.items():
        for label in set(pair):
            involved[label] += count
    labels = sorted(label for label, _ in involved.most_common(_CLASSES))
    names = [name_of(label) for label in labels]
    some = "" if len(labels) == len(involved) else f", the {_CLASSES} classes that are most often involved"
    plot = charts.heat_map(
        [[pairs[label, teacher] for teacher in labels] for label in labels],
        names,
        names,
        x_label="the teacher's class",
        y_label="label",
    )
    caption = f"{name}: revised samples by label and the teacher's class{some}"
    rows = [
        [name_of(label), name_of(teacher), str(count), f"{count / wrong:.1%}"]
        for (label, teacher), count in pairs.most_common(_PAIRS)
    ]
    head = ["label", "teacher's class", "samples", "of the revised"]
    return Figure(charts.svg(plot, caption), caption), Table(head, rows, f"{name}: the most frequent pairs")


def _first_of(count: int) -> str:
    return f", the first {_CHARTS} of {count}" if count > _CHARTS else ""


def selection_of(run: Run) -> Selection | None:
    """The run's last selection, whether it made or read it; None without one, or where its file is gone."""
    try:
        latest = rescoring.latest(run.folder, run.recipe.selection, int(run.last["epoch"]))
        path = run.recipe.selection.path
        return latest if latest is not None or not path else Selection.load(path)
    except FileNotFoundError:
        return None


#: Run name -> (seed, selection) of the name's runs that have one.
_Selections: TypeAlias = Mapping[str, Sequence[tuple[int, Selection]]]


def _selections(groups: _Groups) -> Iterator[Section]:
    """How far the selections agree, and the scores that they were made from."""
    selections = {
        name: [(run.recipe.seed, selection) for run in runs if (selection := selection_of(run)) is not None]
        for name, runs in groups.students.items()
    }
    selections = {name: chosen for name, chosen in selections.items() if chosen}
    yield from _agreement(selections)
    figures = [
        Figure(svg, f"{name}, seed {chosen[0][0]}")
        for name, chosen in itertools.islice(selections.items(), _CHARTS)
        for svg in score_figures(chosen[0][1], f"{name}: ")
    ]
    if figures:
        yield Section(
            "Scores",
            [f"Scores behind the selections, for the first seed of each name{_first_of(len(selections))}."],
            [("keeps the teacher", charts.KEPT[True]), ("label alone", charts.KEPT[False])],
            figures,
        )


def _agreement(selections: _Selections) -> Iterator[Section]:
    """The overlap of selections of the same samples, between seeds and between names."""
    rows = []
    for one, other in itertools.combinations_with_replacement(selections, 2):
        overlaps = [overlap(first.mask, second.mask) for first, second in _comparable(selections, one, other)]
        if overlaps:
            kept, jaccard, chance, kappa = (
                estimate([values[i] for values in overlaps if math.isfinite(values[i])]).mean for i in range(4)
            )
            rows.append(
                [
                    f"{one}, between seeds" if one == other else f"{one} and {other}, same seed",
                    str(len(overlaps)),
                    f"{kept:.1%}",
                    f"{jaccard:.3f}",
                    f"{chance:.3f}",
                    "-" if math.isnan(kappa) else f"{kappa:.3f}",
                ]
            )
    several_seeds = any(len(chosen) > 1 for chosen in selections.values())
    other_samples = several_seeds and not any("between seeds" in row[0] for row in rows)
    notes = [
        "Jaccard: samples that both keep, over samples that either keeps; by chance: its value for two independent"
        " selections of these sizes. kappa (Cohen): 1 is full agreement, 0 agreement by chance. Means over the pairs."
    ]
    if other_samples:
        notes.append("Every seed draws other training samples here, so selections of different seeds are not compared.")
    text, tables = [], []
    if rows:
        text = ["Which samples keep their teacher, by pairs of selections of the same training samples."]
        head, folded = ["selections", "pairs", "kept", "Jaccard", "by chance", "kappa"], len(rows) > 36
        tables = [Table(head, rows, "Pairs of selections" if folded else "", folded=folded)]
    if rows or other_samples:
        yield Section("Do the selections agree?", text, tables=tables, notes=notes)


def _comparable(selections: _Selections, one: str, other: str) -> Iterator[tuple[Selection, Selection]]:
    """Pairs of selections of the same samples: of one name between its seeds, of two names with the same seed."""
    if one == other:
        pairs = list(itertools.combinations(selections[one], 2))
    else:
        pairs = list(itertools.product(selections[one], selections[other]))
    for (seed, first), (other_seed, second) in pairs:
        same_samples = len(first) == len(second) and first.fingerprint == second.fingerprint
        if same_samples and (one == other or seed == other_seed):
            yield first, second


def _samples(groups: _Groups) -> Iterator[Section]:
    """Pictures of revised and of denied samples, from each name's first run that has some."""
    name_of = groups.class_name()
    galleries = []
    for name, runs in groups.students.items():
        kinds = next((_gallery(run) for run in runs if (run.folder / GALLERY).is_file()), {})
        for kind, explanation in (
            ("revised", "The teacher was wrong; its distribution was revised towards the label."),
            ("deselected", "The sample is denied the teacher; it is trained on its label alone."),
        ):
            pictures = [_picture(entry, name_of) for entry in kinds.get(kind, []) if "pixels" in entry]
            if pictures:
                galleries.append(Gallery(f"{name}, seed {runs[0].recipe.seed}: {kind}", explanation, pictures))
    if galleries:
        yield Section("Samples", galleries=galleries)


def _gallery(run: Run) -> dict[str, list[dict[str, Any]]]:
    kinds: dict[str, list[dict[str, Any]]] = json.loads((run.folder / GALLERY).read_text(encoding="utf-8"))
    return kinds


def _picture(entry: Mapping[str, Any], name_of: Callable[[int], str]) -> tuple[str, list[str]]:
    pixels = np.frombuffer(base64.b64decode(entry["pixels"]), np.uint8).reshape(entry["shape"])
    lines = [f"#{entry['index']}", f"label {name_of(entry['label'])}"]
    if entry["teacher"] is not None:
        lines.append(f"teacher {name_of(entry['teacher'])}")
    return png(pixels), lines


def _made(groups: _Groups) -> Iterator[Section]:
    """Versions, machine and commands, and the values in which the recipes differ."""
    summaries = [run.summary["made"] for runs in groups.by_name.values() for run in runs if run.summary]
    facts = [
        [key, "; ".join(dict.fromkeys(made[key] for made in summaries if key in made))]
        for key in dict.fromkeys(key for made in summaries for key in made)
    ]
    names = list(groups.by_name)
    rows = [[key, *values.values()] for key, values in recipe_differences(groups.by_name).items()]
    tables = [Table([], facts, words=True)] if facts else []
    if rows:
        tables.append(Table(["", *names], rows, "Values in which the recipes differ, besides their seeds", words=True))
    seeds = [
        f"{name}: seed{'s' * (len(runs) > 1)} {', '.join(str(run.recipe.seed) for run in runs)}"
        for name, runs in groups.by_name.items()
    ]
    if len({text.partition(": ")[2] for text in seeds}) == 1:
        seeds = [f"All runs: {seeds[0].partition(': ')[2]}"]
    yield Section("How the runs were made", [f"{'; '.join(seeds)}."], tables=tables)


def recipe_differences(groups: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, str]]:
    """key -> run name -> value, for the recipe's keys whose values differ between names."""
    flat = {name: [run.recipe.flat() for run in runs] for name, runs in groups.items()}
    keys = [key for key in next(iter(flat.values()))[0] if key not in _NOT_COMPARED]
    differences = {}
    for key in keys:
        values = {name: list(dict.fromkeys(_value(one[key]) for one in many)) for name, many in flat.items()}
        if len({tuple(value) for value in values.values()}) > 1:
            differences[key] = {name: value[0] if len(value) == 1 else "by seed" for name, value in values.items()}
    return {key: values for key, values in differences.items() if len(set(values.values())) > 1}


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(_value, value))
    return str(value) if value not in ("", {}) else "-"
