"""Runs as one HTML page: what differs and by how much, and where to look for the reason."""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrds_fast.pages import Figure, Gallery, Section, Table, charts, page, png
from lrds_fast.pages.charts import Interval, Style
from lrds_fast.report import paper
from lrds_fast.report.runs import NOTES, Row, Run, judged, last_values, table_lines, tabulate, what_was_tested
from lrds_fast.report.statistics import Estimate, estimate
from lrds_fast.selection import Selection
from lrds_fast.selection.report import overlap, score_figures
from lrds_fast.train import rescoring
from lrds_fast.train.folder import GALLERY

#: At most so many classes are drawn, pairs of classes listed, and names given a chart of their own.
_CLASSES, _PAIRS, _CHARTS = 20, 12, 6
#: What runs differ in without being different experiments.
_FREE = ("name", "description", "seed", "run.out")
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

    comparisons: baseline -> names of the runs that are compared with it; by default every student with `baseline`. All
    of them are tested together. introduction, conclusions: paragraphs before and after the numbers.
    """
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.recipe.seed):
        groups.setdefault(run.recipe.name, []).append(run)
    groups = {name: groups[name] for name in dict.fromkeys(run.recipe.name for run in runs)}
    shown = _Shown(groups, teachers(runs), baseline)
    if comparisons is None:
        comparisons = {baseline: list(shown.students)} if baseline is not None else {}
    sections = [
        *_literature(runs),
        _results(runs, baseline),
        *_differences(runs, shown, comparisons),
        *([Section("What follows", text=conclusions)] if conclusions else []),
        _curves(shown),
        *_calibration(shown),
        *_classes(shown),
        *_errors(shown),
        *_selections(shown),
        *_samples(shown),
        *_made(shown),
    ]
    return page(title, sections, introduction)


def teachers(runs: Sequence[Run]) -> set[str]:
    """The names of the runs that other runs were taught by."""
    asked = {Path(run.recipe.teacher.checkpoint).parent for run in runs if run.recipe.teacher.checkpoint}
    asked |= {folder.resolve() for folder in asked}
    return {run.recipe.name for run in runs if asked & {run.recipe.out, run.folder, run.folder.resolve()}}


class _Shown:
    """The runs by name, and how each name is drawn. reference: what classes are compared with."""

    def __init__(self, groups: Mapping[str, list[Run]], teachers: set[str], baseline: str | None) -> None:
        self.groups = groups
        self.teachers = {name: runs for name, runs in groups.items() if name in teachers and name != baseline}
        self.students = {name: runs for name, runs in groups.items() if name not in self.teachers}
        self.look = charts.styles(list(self.students)) | dict.fromkeys(self.teachers, _TEACHER)
        self.reference = baseline if baseline is not None else next(iter(self.students or groups))

    def legend(self, names: Sequence[str]) -> list[tuple[str, Style]]:
        return [(name, self.look[name]) for name in names]

    def tests(self) -> dict[str, list[dict[str, Any]]]:
        """The last evaluations of the runs that have kept them, by name: students first."""
        ordered = {**self.students, **self.teachers}
        found = {name: [run.summary["test"] for run in runs if run.summary] for name, runs in ordered.items()}
        return {name: tests for name, tests in found.items() if tests}

    def class_name(self) -> Callable[[int], str]:
        """A class's name, or its number where the runs do not agree on names."""
        known = {tuple(run.summary["class_names"]) for runs in self.groups.values() for run in runs if run.summary}
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
        yield Section("As the literature has it", tables=tables, notes=[paper.NOTE])


def _results(runs: Sequence[Run], baseline: str | None) -> Section:
    head, *rows = table_lines(tabulate(runs, baseline=baseline), baseline)
    return Section("Results", tables=[Table(head, rows)], notes=[NOTES])


def _differences(runs: Sequence[Run], shown: _Shown, comparisons: Mapping[str, Sequence[str]]) -> Iterator[Section]:
    """A forest plot of accuracy and one of NLL for each baseline, the numbers beside them."""
    tables = {
        base: [row for row in tabulate(runs, baseline=base) if row.name in names and row.name != base]
        for base, names in comparisons.items()
    }
    verdicts = {(verdict.row.name, verdict.baseline): verdict for verdict in judged(list(_flipped(tables)))}
    for base, rows in tables.items():
        paired = [row for row in rows if row.accuracy_difference is not None]
        unpaired = [row.name for row in rows if row.accuracy_difference is None]
        notes = (
            [f"Not compared, because their seeds are not those of {base}: {', '.join(unpaired)}."] if unpaired else []
        )
        if not paired:
            if notes:
                yield Section(f"Differences to {base}", text=notes)
            continue
        forests = [
            Figure(
                charts.svg(
                    charts.forest_plot(
                        {"": [_interval(shown, row, base, key, scale) for row in paired]}, x_label=label, better=better
                    ),
                    f"{what} minus that of {base}",
                ),
                "",
            )
            for what, key, scale, label, better in (
                ("accuracy", "test_acc", 100.0, f"accuracy − {charts.short(base)}, points", "higher"),
                ("NLL", "test_ce", 1.0, f"NLL − {charts.short(base)}, nats", "lower"),
            )
        ]
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
            explained = what_was_tested(list(_flipped(tables)), "all")
            notes.append(explained or "One pair gives no estimate of the noise, so nothing was tested.")
        yield Section(f"Differences to {base}", text, figures=forests, tables=[Table(head, lines)], notes=notes)


def _flipped(tables: Mapping[str, Sequence[Row]]) -> Iterator[tuple[Sequence[Row], str]]:
    for base, rows in tables.items():
        yield rows, base


def _interval(shown: _Shown, row: Row, base: str, key: str, scale: float) -> Interval:
    own, others = (last_values(shown.groups[name], key) for name in (row.name, base))
    pairs = [scale * (value - other) for value, other in zip(own, others, strict=True)]
    found = estimate(pairs)
    return Interval(row.name, found.mean, *found.interval, pairs)


def _measured(value: Estimate | None, scale: float, digits: int) -> tuple[str, str]:
    assert value is not None
    low, high = value.interval
    ends = "-" if math.isnan(low) else f"{scale * low:+.{digits}f} to {scale * high:+.{digits}f}"
    return f"{scale * value.mean:+.{digits}f}", ends


def _curves(shown: _Shown) -> Section:
    figures = []
    for key, label, percent in (
        ("test_acc", "test accuracy", True),
        ("test_ce", "test NLL, nats", False),
        ("train_loss", "training loss (each run's own)", False),
    ):
        series = {name: values_by_epoch(runs, key) for name, runs in shown.students.items()}
        levels = {}
        if key != "train_loss":
            levels = {name: estimate(last_values(runs, key)).mean for name, runs in shown.teachers.items()}
            levels = {name: value for name, value in levels.items() if math.isfinite(value)}
        if any(series.values()):
            made = charts.curves(series, shown.look, y_label=label, percent=percent, levels=levels)
            figures.append(Figure(charts.svg(made, f"{label} by epoch"), ""))
    seeds = max(len(runs) for runs in shown.groups.values())
    text = ["Lines are means over the seeds, bands reach from the lowest to the highest of them."] if seeds > 1 else []
    return Section("Learning curves", text, shown.legend(list(shown.students)), figures)


def values_by_epoch(runs: Sequence[Run], key: str) -> dict[float, list[float]]:
    """epoch -> `key` of the runs that reached it."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for record in run.records:
            if record.get(key) is not None:
                found.setdefault(float(record["epoch"]), []).append(record[key])
    return found


def _calibration(shown: _Shown) -> Iterator[Section]:
    tests = shown.tests()
    if not tests:
        return
    figure = charts.reliability({name: pooled_bins(parts) for name, parts in tests.items()}, shown.look)
    rows = [
        [name, *(_percent(parts, key) for key in ("accuracy", "ece")), _nats([part["cross_entropy"] for part in parts])]
        for name, parts in tests.items()
    ]
    missing = [name for name in shown.groups if name not in tests]
    yield Section(
        "Calibration",
        [
            "How often the predicted class is right, by the probability that the network gives it, on the test split"
            " after the last epoch. On the dashed line a network is calibrated; below it, it is overconfident."
        ],
        shown.legend(list(tests)),
        [Figure(charts.svg(figure, "accuracy by confidence"), "")],
        [Table(["run", "accuracy, %", "ECE, %", "NLL, nats"], rows)],
        notes=[
            "ECE (expected calibration error): the mean distance between confidence and accuracy over 15 bins of equal"
            " width, weighted by their rows. Mean ± standard error over the seeds.",
            *([f"Without a summary of their last evaluation: {', '.join(missing)}."] if missing else []),
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
    found = estimate(values)
    return f"{found.mean:.{digits}f}" + ("" if math.isnan(found.error) else f" ± {found.error:.{digits}f}")


def _classes(shown: _Shown) -> Iterator[Section]:
    """Accuracy by class, of every student, the reference and the teachers."""
    counts = {name: np.sum([part["classes"] for part in parts], axis=0) for name, parts in _same_classes(shown).items()}
    reference = shown.reference if shown.reference in counts else next(iter(counts), None)
    if reference is None:
        return
    with np.errstate(invalid="ignore"):
        accuracy = {name: 100 * right / rows for name, (rows, right) in ((n, c.T) for n, c in counts.items())}
    base = accuracy[reference]
    present = np.flatnonzero(np.isfinite(base))
    students = [name for name in accuracy if name not in shown.teachers]
    chosen, which = present, "all classes"
    if len(present) > _CLASSES:
        change = np.max([np.abs(np.nan_to_num(accuracy[name] - base)) for name in students], axis=0)
        if len(students) > 1:
            chosen = present[np.argsort(-change[present], kind="stable")[:_CLASSES]]
            which = f"the {_CLASSES} classes in which a run differs most from {reference}"
        else:
            chosen = present[np.argsort(base[present], kind="stable")[:_CLASSES]]
            which = f"the {_CLASSES} classes with the lowest accuracy"
    chosen = chosen[np.argsort(base[chosen], kind="stable")]
    aside = ""
    if shown.teachers:
        aside = " A teacher's hollow dot is left out where it lies beyond the students' range."
    name_of = shown.class_name()
    figure = charts.dots(
        [name_of(label) for label in chosen.tolist()],
        {name: values[chosen].tolist() for name, values in accuracy.items()},
        shown.look,
        x_label="test accuracy in the class, %",
        aside=list(shown.teachers),
    )
    rows = [
        [name_of(label), str(int(counts[reference][label, 0])), *(f"{accuracy[name][label]:.1f}" for name in accuracy)]
        for label in present[np.argsort(base[present], kind="stable")].tolist()
    ]
    yield Section(
        "Accuracy by class",
        [f"Shown: {which}, sorted by the accuracy of {reference}; test rows of all seeds together.{aside}"],
        shown.legend(list(accuracy)),
        [Figure(charts.svg(figure, "accuracy by class"), "")],
        [Table(["class", "test rows", *accuracy], rows, "Accuracy by class in numbers, %", folded=True)],
    )


def _same_classes(shown: _Shown) -> dict[str, list[dict[str, Any]]]:
    """The evaluations, where all have equally many classes; {} where they do not."""
    tests = shown.tests()
    sizes = {len(part["classes"]) for parts in tests.values() for part in parts}
    return tests if len(sizes) == 1 else {}


def _errors(shown: _Shown) -> Iterator[Section]:
    """Which classes the teacher takes for which, on the rows whose labels were revised."""
    name_of = shown.class_name()
    figures: list[Figure] = []
    tables, text = [], []
    for name, runs in shown.students.items():
        found = [run.summary["teacher"] for run in runs if run.summary and run.summary["teacher"]]
        asked, wrong = (sum(part[key] for part in found) for key in ("asked", "wrong"))
        if not wrong or runs[0].recipe.loss.revise == "none":
            continue
        pairs: Counter[tuple[int, int]] = Counter()
        for part in found:
            for label, teacher, count in part["pairs"]:
                pairs[label, teacher] += count
        text.append(
            f"{name}: the teacher's class is not the label on {wrong} of the {asked} training samples that keep it"
            f" ({wrong / asked:.1%}); there its distribution was revised towards the label."
        )
        if len(figures) == _CHARTS:
            continue
        involved: Counter[int] = Counter()
        for pair, count in pairs.items():
            for label in set(pair):
                involved[label] += count
        labels = sorted(label for label, _ in involved.most_common(_CLASSES))
        names = [name_of(label) for label in labels]
        some = "" if len(labels) == len(involved) else f", the {_CLASSES} classes that are most often involved"
        figure = charts.heat_map(
            [[pairs[label, teacher] for teacher in labels] for label in labels],
            names,
            names,
            x_label="the teacher's class",
            y_label="label",
        )
        caption = f"{name}: revised samples by label and the teacher's class{some}"
        figures.append(Figure(charts.svg(figure, caption), caption))
        rows = [
            [name_of(label), name_of(teacher), str(count), f"{count / wrong:.1%}"]
            for (label, teacher), count in pairs.most_common(_PAIRS)
        ]
        head = ["label", "teacher's class", "samples", "of the revised"]
        tables.append(Table(head, rows, f"{name}: the most frequent pairs"))
    if figures:
        if len(text) > _CHARTS:
            text.append(f"Charts and tables: of these runs{_first_of(len(text))}.")
        yield Section("What the teacher takes for what", text, figures=figures, tables=tables)


def _first_of(count: int) -> str:
    return f", the first {_CHARTS} of {count}" if count > _CHARTS else ""


def selection_of(run: Run) -> Selection | None:
    """What the run selected last, or was given; None where it has none or its file is gone."""
    try:
        found = rescoring.latest(run.folder, run.recipe.selection, int(run.last["epoch"]))
        path = run.recipe.selection.path
        return found if found is not None or not path else Selection.load(path)
    except FileNotFoundError:
        return None


def _selections(shown: _Shown) -> Iterator[Section]:
    found = {
        name: [(run.recipe.seed, selection) for run in runs if (selection := selection_of(run)) is not None]
        for name, runs in shown.students.items()
    }
    found = {name: chosen for name, chosen in found.items() if chosen}
    if not found:
        return
    rows = []
    for one, other in itertools.combinations_with_replacement(found, 2):
        pairs = [
            overlap(first.mask, second.mask)
            for (seed, first), (other_seed, second) in (
                itertools.combinations(found[one], 2) if one == other else itertools.product(found[one], found[other])
            )
            if (one == other or seed == other_seed)
            and len(first) == len(second)
            and first.fingerprint == second.fingerprint
        ]
        if pairs:
            what = f"{one}, between seeds" if one == other else f"{one} and {other}, same seed"
            kept, jaccard, chance, kappa = (
                estimate([pair[i] for pair in pairs if math.isfinite(pair[i])]).mean for i in range(4)
            )
            rows.append(
                [
                    what,
                    str(len(pairs)),
                    f"{kept:.1%}",
                    f"{jaccard:.3f}",
                    f"{chance:.3f}",
                    "-" if math.isnan(kappa) else f"{kappa:.3f}",
                ]
            )
    several = any(len(chosen) > 1 for chosen in found.values())
    apart = several and not any("between seeds" in row[0] for row in rows)
    head, many = ["selections", "pairs", "kept", "Jaccard", "by chance", "kappa"], len(rows) > 36
    if rows or apart:
        yield Section(
            "Do the selections agree?",
            ["Which samples keep their teacher, by pairs of selections of the same training samples."] if rows else [],
            tables=[Table(head, rows, "Pairs of selections" * many, folded=many)] if rows else [],
            notes=[
                "Jaccard: samples that both keep, over those that either keeps; by chance: what two independent"
                " selections of these sizes have. kappa (Cohen): 1 is full agreement, 0 is that of chance. Means over"
                " the pairs.",
                *(
                    ["Every seed draws other training samples here, so selections of different seeds are not compared."]
                    if apart
                    else []
                ),
            ],
        )
    figures = [
        Figure(svg, f"{name}, seed {chosen[0][0]}")
        for name, chosen in itertools.islice(found.items(), _CHARTS)
        for svg in score_figures(chosen[0][1], f"{name}: ")
    ]
    if figures:
        yield Section(
            "Scores",
            [f"The scores that the selections were made from, of each name's first seed{_first_of(len(found))}."],
            [("keeps the teacher", charts.KEPT[True]), ("label alone", charts.KEPT[False])],
            figures,
        )


def _samples(shown: _Shown) -> Iterator[Section]:
    """The pictures that each name's first run kept."""
    name_of = shown.class_name()
    galleries = []
    for name, runs in shown.students.items():
        kinds = next((_gallery(run) for run in runs if (run.folder / GALLERY).is_file()), {})
        for kind, explanation in (
            ("revised", "The teacher was wrong; its distribution was revised towards the label."),
            ("deselected", "The teacher is denied; the label alone is taught."),
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


def _made(shown: _Shown) -> Iterator[Section]:
    """Versions, machine and commands; and the values in which the recipes differ."""
    summaries = [run.summary["made"] for runs in shown.groups.values() for run in runs if run.summary]
    facts = [
        [key, "; ".join(dict.fromkeys(made[key] for made in summaries if key in made))]
        for key in dict.fromkeys(key for made in summaries for key in made)
    ]
    names = list(shown.groups)
    rows = [[key, *values.values()] for key, values in recipe_differences(shown.groups).items()]
    tables = [Table([], facts, words=True)] if facts else []
    if rows:
        tables.append(Table(["", *names], rows, "What the recipes differ in, beside their seeds", words=True))
    seeds = [
        f"{name}: seed{'s' * (len(runs) > 1)} {', '.join(str(run.recipe.seed) for run in runs)}"
        for name, runs in shown.groups.items()
    ]
    if len({text.partition(": ")[2] for text in seeds}) == 1:
        seeds = [f"All runs: {seeds[0].partition(': ')[2]}"]
    yield Section("How the runs were made", [f"{'; '.join(seeds)}."], tables=tables)


def recipe_differences(groups: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, str]]:
    """key -> name of the runs -> value, of the recipe's values that are not the same for all names."""
    flat = {name: [run.recipe.flat() for run in runs] for name, runs in groups.items()}
    keys = [key for key in next(iter(flat.values()))[0] if key not in _FREE]
    found = {}
    for key in keys:
        values = {name: list(dict.fromkeys(_value(one[key]) for one in many)) for name, many in flat.items()}
        if len({tuple(value) for value in values.values()}) > 1:
            found[key] = {name: value[0] if len(value) == 1 else "by seed" for name, value in values.items()}
    return {key: values for key, values in found.items() if len(set(values.values())) > 1}


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(_value, value))
    return str(value) if value not in ("", {}) else "-"
