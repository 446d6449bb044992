"""The page of a comparison: tables and charts show the numbers of the run folders; missing parts are left out."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from html_page import Page
from scipy import stats

from lrds_fast.pages import charts
from lrds_fast.recipe.recipe import Recipe
from lrds_fast.report.page import html_report, pooled_bins, recipe_differences, teachers
from lrds_fast.report.runs import Run, read_run
from lrds_fast.selection import select
from lrds_fast.train.folder import RECIPE

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("error")
SEEDS = 4
EPOCHS = 6
NAMES = ["<i>ant</i>", "bee & wasp", "猫", "$d$"]


def make_run(
    folder: Path,
    name: str,
    seed: int,
    *,
    accuracy: float,
    classes: int = 4,
    names: list[str] | None = None,
    wrong: list[list[int]] | None = None,
    values: dict[str, Any] | None = None,
) -> Run:
    """A finished run with 10 test rows per class, equally many right in each, seed + 1 fewer in the first."""
    out = folder / f"{name}{seed}".replace("/", "_").replace("<", "_")
    out.mkdir(parents=True)
    recipe = Recipe(name=name, seed=seed).with_values(
        **{"schedule.epochs": EPOCHS, "run.out": str(out), "loss.revise": "none"} | (values or {})
    )
    (out / RECIPE).write_text(recipe.to_json())
    records = [
        {
            "epoch": epoch + 1,
            "test_acc": accuracy * (epoch + 1) / EPOCHS,
            "test_ce": 2 - accuracy,
            "train_loss": 1 / (epoch + 1),
            "rows": 10,
            "n_selected": 10,
            "n_revised": 3,
        }
        for epoch in range(EPOCHS)
    ]
    (out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    right = round(10 * accuracy)
    summary = {
        "class_names": NAMES[:classes] if names is None else names,
        "test": {
            "accuracy": accuracy,
            "cross_entropy": 2 - accuracy,
            "ece": 0.01 * (seed + 1),
            "bins": [[10, 0.41, 0.3], [30, 0.95, accuracy]],
            "classes": [[10, max(right - seed - 1, 0)], *[[10, right]] * (classes - 1)],
        },
        "teacher": None if wrong is None else {"asked": 1000, "wrong": sum(row[2] for row in wrong), "pairs": wrong},
        "made": {"torch": "9.9", "command": f"train {name} --set seed={seed}"},
    }
    (out / "summary.json").write_text(json.dumps(summary))
    return read_run(out)


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """KD, KD + LR with two confused classes, and their teacher, which is far better."""
    found = []
    for seed in range(SEEDS):
        teacher = make_run(tmp_path, "teacher", seed, accuracy=0.9)
        taught: dict[str, Any] = {"teacher.model": "mlp", "teacher.checkpoint": str(teacher.folder / "last.pt")}
        found += [
            teacher,
            make_run(tmp_path, "KD", seed, accuracy=0.30 + 0.01 * seed, wrong=[[0, 2, 9]], values=taught),
            make_run(
                tmp_path,
                "KD + <LR>",
                seed,
                accuracy=0.36 + 0.02 * seed,
                wrong=[[0, 1, 5], [1, 2, 1]],
                values=taught | {"loss.revise": "lr", "loss.eta": 0.5},
            ),
        ]
    return found


def test_differences_are_drawn_and_written(runs: list[Run], figures: dict[str, Any]) -> None:
    page = Page(html_report(runs, title="t", baseline="KD"))
    pairs = [100 * (0.06 + 0.01 * seed) for seed in range(SEEDS)]
    low, high = stats.ttest_1samp(pairs, 0).confidence_interval(0.95)
    (row,) = page.table("run", "pairs")
    assert row == ["KD + <LR>", "4", "+7.50", f"{low:+.2f} to {high:+.2f}", "better", *row[5:]]
    assert row[5:] == ["-0.0750", f"{-high / 100:+.4f} to {-low / 100:+.4f}", "better"]
    (axis,) = figures["accuracy minus that of KD"].axes
    lines = [(list(line.get_xdata()), line.get_color()) for line in axis.lines]
    assert any(x == pytest.approx(pairs) for x, _ in lines) and ([pytest.approx(7.5)], charts.SERIES[0]) in lines
    assert any(x == pytest.approx([low, high]) for x, _ in lines)
    (axis,) = figures["NLL minus that of KD"].axes
    assert ([pytest.approx(-0.075)], charts.SERIES[0]) in [
        (list(line.get_xdata()), line.get_color()) for line in axis.lines
    ]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["KD + <LR>"], "no teacher"


def test_comparisons_are_tested_together(runs: list[Run]) -> None:
    text = html_report(runs, title="t", comparisons={"KD": ["KD + <LR>"], "teacher": ["KD", "KD + <LR>"]})
    page = Page(text)
    assert [heading for heading in page.headings if "Diff" in heading] == [
        "Differences to KD",
        "Differences to teacher",
    ]
    assert text.count("over all 6 differences") == 1
    assert [row[4] for table in page.tables if table[0][1] == "pairs" for row in table[1:]] == [
        "better",
        "worse",
        "worse",
    ]


def test_curves_leave_the_axis_to_the_students(runs: list[Run], figures: dict[str, Any]) -> None:
    html_report(runs, title="t", baseline="KD")
    assert teachers(runs) == {"teacher"}
    (axis,) = figures["test accuracy by epoch"].axes
    assert axis.get_ylim()[1] < 0.5 and axis.get_title(loc="right") == "teacher 90.0%, above"
    kd, lr = axis.lines
    assert list(kd.get_ydata()) == pytest.approx([0.315 * (epoch + 1) / EPOCHS for epoch in range(EPOCHS)])
    assert list(lr.get_ydata())[-1] == pytest.approx(0.39)
    assert {round(float(y), 6) for x, y in axis.collections[1].get_paths()[0].vertices if x == EPOCHS} == {0.36, 0.42}


def test_calibration_is_of_all_seeds(runs: list[Run], figures: dict[str, Any]) -> None:
    page = Page(html_report(runs, title="t", baseline="KD"))
    rows = {row[0]: row[1:] for row in page.table("run", "accuracy, %", "ECE, %")}
    assert list(rows) == ["KD", "KD + <LR>", "teacher"]
    assert rows["KD"] == ["31.50 ± 0.65", "2.50 ± 0.65", "1.6850 ± 0.0065"]
    top, bottom = figures["accuracy by confidence"].axes
    assert [list(line.get_ydata()) for line in top.lines[1:3]] == [
        [0.3, pytest.approx(0.315)],
        [0.3, pytest.approx(0.39)],
    ]
    assert list(bottom.lines[0].get_ydata()) == [25.0, 75.0]


def test_bins_of_several_runs_are_put_together() -> None:
    found = pooled_bins([{"bins": [[1, 0.99, 1.0], [2, 0.05, 0.5]]}, {"bins": [[3, 0.95, 0.0]]}])
    assert found == [(2, 0.05, 0.5), (4, pytest.approx((0.99 + 3 * 0.95) / 4), 0.25)]


def test_classes_have_names_and_accuracies(runs: list[Run], figures: dict[str, Any]) -> None:
    page = Page(html_report(runs, title="t", baseline="KD"))
    (axis,) = figures["accuracy by class"].axes
    assert [text.get_text() for text in axis.get_yticklabels()] == NAMES, "the lowest accuracy first"
    first = 100 * sum(max(round(3 + 0.1 * seed) - seed - 1, 0) for seed in range(SEEDS)) / 40
    assert axis.collections[0].get_offsets()[0][0] == pytest.approx(first)
    assert axis.get_xlim()[1] < 60, "the teacher's 90% is not in the way"
    rows = page.table("class", "test rows")
    assert [row[0] for row in rows] == NAMES and rows[0][1:3] == ["40", f"{first:.1f}"] and rows[1][4] == "90.0"


def test_of_many_classes_those_that_differ_are_drawn(tmp_path: Path, figures: dict[str, Any]) -> None:
    runs = [make_run(tmp_path, name, 0, accuracy=a, classes=50, names=[]) for name, a in (("a", 0.5), ("b", 0.5))]
    runs[1].summary["test"]["classes"][33] = [10, 9]
    page = Page(html_report(runs, title="t"))
    names = [text.get_text() for text in figures["accuracy by class"].axes[0].get_yticklabels()]
    assert len(names) == 20 and "33" in names and len(page.table("class", "test rows")) == 50


def test_only_revised_rows_are_confused(runs: list[Run], figures: dict[str, Any]) -> None:
    text = html_report(runs, title="t", baseline="KD")
    rows = Page(text).table("label", "teacher's class")
    assert rows == [["<i>ant</i>", "bee & wasp", "20", "83.3%"], ["bee & wasp", "猫", "4", "16.7%"]]
    assert "is not the label on 24 of the 4000 training samples that keep it (0.6%)" in text
    (axis,) = figures["KD + <LR>: revised samples by label and the teacher's class"].axes
    assert {(text.get_position(), text.get_text()) for text in axis.texts} == {((1, 0), "20"), ((2, 1), "4")}


def test_selections_of_the_same_samples_are_compared(tmp_path: Path, figures: dict[str, Any]) -> None:
    runs = []
    for seed in range(2):
        for name, shift in (("a", 0), ("b", 10)):
            scores = {"kd_gain": ((torch.arange(40) + shift + 5 * seed) % 40).double()}
            path = tmp_path / f"{name}{seed}.parquet"
            chosen = select(scores, ratio=0.5)
            chosen.save(path)
            runs.append(make_run(tmp_path, name, seed, accuracy=0.5, values={"selection.path": str(path)}))
    page = Page(html_report(runs, title="t"))
    rows = {row[0]: row[1:] for row in page.table("selections")}
    # Of 20 each, 15 are in both seeds' selections and 10 in both arms'.
    assert rows["a, between seeds"] == ["1", "50.0%", f"{15 / 25:.3f}", "0.333", "0.500"]
    assert rows["a and b, same seed"] == ["2", "50.0%", f"{10 / 30:.3f}", "0.333", "0.000"]
    (axis,) = figures["a: samples by kd_gain"].axes
    assert list(axis.lines[0].get_xdata()) == [19.5, 19.5], "the threshold that the ratio came to"
    Path(tmp_path / "b1.parquet").unlink()
    figures.clear()
    again = Page(html_report([runs[0], runs[3]], title="t"))
    assert "Do the selections agree?" not in again.headings and "Scores" in again.headings


def test_the_page_shows_provenance_and_recipe_differences(runs: list[Run]) -> None:
    page = Page(html_report(runs, title="t", baseline="KD"))
    made = {row[0]: row[1] for table in page.tables for row in table if row[0] in ("torch", "command")}
    assert (
        made["torch"] == "9.9"
        and made["command"].count(";") == 3 * SEEDS - 1
        and "; train KD + <LR> --set seed=3" in made["command"]
    )
    rows = {row[0]: row[1:] for row in page.table("", "teacher", "KD")}
    assert rows["loss.eta"] == ["0.8", "0.8", "0.5"] and rows["loss.revise"] == ["none", "none", "lr"]
    assert rows["teacher.checkpoint"] == ["-", "by seed", "by seed"]
    assert not {"seed", "name", "run.out", "data.name"} & rows.keys()
    assert recipe_differences({"KD": runs[1::3]}) == {}


def test_pictures_come_from_the_gallery_of_the_run(runs: list[Run]) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for shape in ([2, 3, 3], [6, 3, 1]):
        entry = {
            "index": 7,
            "label": 1,
            "teacher": 0,
            "shape": shape,
            "pixels": base64.b64encode(pixels.tobytes()).decode(),
        }
        (runs[2].folder / "gallery.json").write_text(json.dumps({"revised": [entry], "deselected": []}))
        page = Page(html_report(runs, title="t"))
        (source,) = (
            page.sources[-1:]
            if page.sources[-1].startswith("data:image")
            else [s for s in page.sources if "image" in s]
        )
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert np.array_equal(np.asarray(image).reshape(shape), pixels.reshape(shape))
        assert "KD + <LR>, seed 0: revised" in page.headings


def test_names_are_escaped_everywhere(runs: list[Run]) -> None:
    text = html_report(runs, title="<t>", introduction=["<p1>"], conclusions=["<p2>"], baseline="KD")
    for name in ("<LR>", "<i>", "<t>", "<p1>", "<p2>"):
        assert name not in text
    assert "KD + &lt;LR&gt;" in text and "&lt;i&gt;ant" in text


@pytest.mark.parametrize("parts", ["all", "no summary", "one epoch"])
def test_a_single_run_gives_a_clean_page(parts: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", 0, accuracy=0.5)
    if parts != "all":
        (run.folder / "summary.json").unlink()
    if parts == "one epoch":
        run.records[1:] = []
        run.records[0] |= {"test_ce": None, "train_loss": None}
    page = Page(
        html_report(
            [read_run(run.folder) if parts != "one epoch" else Run(run.folder, run.recipe, run.records)], title="t"
        )
    )
    expected = ["t", "Results", "Learning curves", "How the runs were made"]
    if parts == "all":
        expected[3:3] = ["Calibration", "Accuracy by class"]
    assert page.headings == expected
    assert "nan" not in " ".join(page.texts)


def test_one_seed_and_unequal_seeds_are_reported(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, seed, accuracy=0.5) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    text = html_report(runs, title="t", baseline="a")
    (row,) = Page(text).table("run", "pairs")
    assert row == ["b", "1", "+0.00", "-", "", "+0.0000", "-", ""]
    assert "One pair gives no estimate of the noise" in text
    assert "because their seeds are not those of a: c." in text


def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", 0, accuracy=0.5)
    for text, message in (("{", "is not JSON"), ("{}", "is not a summary of this version")):
        (run.folder / "summary.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_run(run.folder)


def test_of_many_names_the_first_have_charts(tmp_path: Path, figures: dict[str, Any]) -> None:
    runs = []
    for k in range(9):
        path = tmp_path / f"{k}.parquet"
        select({"kd_gain": torch.arange(20).roll(k).double()}, ratio=0.5).save(path)
        more: dict[str, Any] = {"selection.path": str(path), "loss.revise": "lr"}
        runs.append(make_run(tmp_path, f"run {k}", 0, accuracy=0.5, wrong=[[0, 1, 2]], values=more))
    text = html_report(runs, title="t")
    assert sum("revised samples" in title for title in figures) == sum("by kd_gain" in t for t in figures) == 6
    assert text.count("the first 6 of 9") == 2
    assert len(Page(text).table("selections")) == 9 * 8 / 2
