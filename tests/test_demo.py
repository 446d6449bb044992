"""A reduced demo: its table recomputed from the logs, its counts from the data, its report from the files."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from html_page import Page
from PIL import Image

from lrds_fast.data import digits
from lrds_fast.selection import Selection
from lrds_fast.train import demo as run_demo
from lrds_fast.train import run
from lrds_fast.train.demo import ARMS, DemoResult
from lrds_fast.train.recipe import from_mapping
from lrds_fast.train.report import header, text_table
from lrds_fast.train.step import predicted

SEEDS = 2
FOLDERS = {"teacher": "teacher"} | {arm.name: arm.folder for arm in ARMS}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    out = tmp_path_factory.mktemp("demo")
    return run_demo(out, seeds=SEEDS, settings=["schedule.epochs=4"], progress=False)


def last(result: DemoResult, seed: int, name: str) -> dict[str, Any]:
    """The last record, read without the code under test."""
    log = result.report.parent / f"seed{seed}" / FOLDERS[name] / "log.jsonl"
    record: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
    return record


def test_the_table_has_every_student_in_order(result: DemoResult) -> None:
    assert [row.name for row in result.rows] == [
        "teacher",
        "student alone",
        "KD",
        "KD + LR",
        "KD + random",
        "KD + DS",
        "KD + LR + DS",
    ]
    lines = text_table(result.rows, baseline="KD").splitlines()
    assert len(lines) == 2 + len(result.rows)
    for title in header("KD")[:-1]:
        assert title in lines[0]


def test_statistics_are_those_of_the_logs(result: DemoResult) -> None:
    for row in result.rows:
        accuracy = [last(result, seed, row.name)["test_acc"] for seed in range(SEEDS)]
        loss = [last(result, seed, row.name)["test_ce"] for seed in range(SEEDS)]
        base = [last(result, seed, "KD")["test_acc"] for seed in range(SEEDS)]
        assert row.accuracy.mean == pytest.approx(mean(accuracy))
        assert row.accuracy.error == pytest.approx(stdev(accuracy) / math.sqrt(SEEDS))
        assert row.cross_entropy.mean == pytest.approx(mean(loss))
        assert row.cross_entropy.error == pytest.approx(stdev(loss) / math.sqrt(SEEDS))
        if row.name == "KD":
            assert row.accuracy_difference is None
            continue
        paired = [a - b for a, b in zip(accuracy, base, strict=True)]
        assert row.accuracy_difference is not None
        assert row.accuracy_difference.mean == pytest.approx(mean(paired))
        assert row.accuracy_difference.error == pytest.approx(stdev(paired) / math.sqrt(SEEDS))


def test_counts_are_those_of_the_data(result: DemoResult) -> None:
    """Revised: rows where this teacher is wrong, asked anew. Deselected: rows with kd_gain >= 0."""
    rows = {row.name: row for row in result.rows}
    folder = result.report.parent / "seed0"
    recipe = from_mapping(json.loads((folder / "kd_lr" / "recipe.json").read_text()))
    data = run.load_data(recipe)
    teacher = run.build_teacher(recipe, data)
    assert teacher is not None
    teacher.eval()
    with torch.no_grad():
        logits = torch.cat([teacher(batch.images) for batch in data.score.epoch(0)])
    wrong = predicted(logits, data.score.labels) != data.score.labels
    assert last(result, 0, "KD + LR")["n_revised"] == int(wrong.sum()) > 0
    selection = Selection.load(folder / "kd_lr_ds" / "selection.parquet")
    assert torch.equal(selection.mask, selection.scores["kd_gain"] < 0)
    record = last(result, 0, "KD + LR + DS")
    assert record["n_selected"] == int(selection.mask.sum()) <= record["teacher_rows"]
    assert record["teacher_rows"] <= record["n_selected"] + record["step"] / record["epoch"], "one more a batch at most"
    assert record["n_revised"] == int((wrong & selection.mask).sum())
    assert rows["KD"].revised is not None
    assert rows["KD"].revised.mean == 0
    deselected = [last(result, seed, "KD + DS") for seed in range(SEEDS)]
    assert rows["KD + DS"].deselected is not None
    assert rows["KD + DS"].deselected.mean == mean(record["rows"] - record["n_selected"] for record in deselected)
    assert rows["student alone"].revised is None


def test_chance_gets_as_many_samples_as_kd_gain(result: DemoResult) -> None:
    for seed in range(SEEDS):
        assert last(result, seed, "KD + random")["n_selected"] == last(result, seed, "KD + DS")["n_selected"]


def test_students_differ_in_nothing_but_what_they_are_told(result: DemoResult) -> None:
    recipes = {
        arm.name: json.loads((result.report.parent / "seed1" / arm.folder / "recipe.json").read_text()) for arm in ARMS
    }
    for recipe in recipes.values():
        for table in ("data", "student", "optimizer", "schedule", "seed"):
            assert recipe[table] == recipes["KD"][table]
        assert recipe["data"]["label_noise"] == 0
    assert recipes["KD + LR"]["loss"] == recipes["KD"]["loss"] | {"revise": "lr"}


def test_the_text_says_how_unreliable_the_teacher_is(result: DemoResult) -> None:
    text = " ".join(result.introduction)
    assert "30% of its training labels were replaced" in text
    accuracy = mean(last(result, seed, "teacher")["test_acc"] for seed in range(SEEDS))
    assert f"right on {accuracy:.1%} of the test split" in text
    assert any("against KD + random" in sentence for sentence in result.conclusions)
    assert any("against student alone" in sentence for sentence in result.conclusions)
    # Five students against KD, one against KD + random, four against the student alone; two measures of each.
    assert any("over these 20 differences" in sentence for sentence in result.conclusions)
    assert torch.backends.cpu.get_cpu_capability() in result.introduction[-1]


def test_the_report_is_one_file_with_charts_tables_and_digits(result: DemoResult) -> None:
    text = result.report.read_text()
    page = Page(text)
    names = [row.name for row in result.rows]
    assert [row[0] for row in page.table("run", "seeds")] == names
    assert [heading for heading in page.headings if heading.startswith("Differences to")] == [
        f"Differences to {base}" for base in ("KD", "KD + random", "student alone")
    ]
    assert "over all 20 differences" in text
    # Two forests a baseline, three charts of curves, calibration, classes, two heat maps, three histograms of scores.
    assert page.tags["svg"] == 6 + 3 + 1 + 1 + 2 + 3
    assert "KD + LR, seed 0: revised" in page.headings and "KD + DS, seed 0: deselected" in page.headings
    # The pictures are the digits: the first revised one, decoded, is the sample its caption names.
    folder = result.report.parent / "seed0" / "kd_lr"
    entry = json.loads((folder / "gallery.json").read_text())["revised"][0]
    assert entry["label"] != entry["teacher"]
    pixels = list(base64.b64decode(entry["pixels"]))
    shown = next(source for source in page.sources if source.startswith("data:image/png;base64,"))
    assert list(Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))).tobytes()) == pixels
    recipe = from_mapping(json.loads((folder / "recipe.json").read_text()))
    data = run.load_data(recipe)
    assert pixels == data.train.picture(entry["index"]).flatten().tolist()
    assert int(data.train.labels[entry["index"]]) == entry["label"]
    assert any(
        [round(value * 255) for value in image.flatten().tolist()] == pixels and int(label) == entry["label"]
        for image, label in zip(*digits(), strict=True)
    )


def test_a_summary_is_that_of_the_last_epoch(result: DemoResult) -> None:
    """Against the log, and against the networks and the teacher asked anew."""
    folder = result.report.parent / "seed0" / "kd_lr_ds"
    summary = json.loads((folder / "summary.json").read_text())
    record = last(result, 0, "KD + LR + DS")
    assert summary["test"]["accuracy"] == record["test_acc"] and summary["test"]["ece"] == record["test_ece"]
    assert summary["test"]["cross_entropy"] == record["test_ce"]
    assert summary["teacher"]["asked"] == record["n_selected"] and summary["teacher"]["wrong"] == record["n_revised"]
    recipe = from_mapping(json.loads((folder / "recipe.json").read_text()))
    data = run.load_data(recipe)
    teacher = run.build_teacher(recipe, data)
    assert teacher is not None
    teacher.eval()
    with torch.no_grad():
        answers = torch.cat([teacher(batch.images) for batch in data.score.epoch(0)])
    mask, labels = Selection.load(folder / "selection.parquet").mask, data.train.labels
    pairs = Counter(zip(labels[mask].tolist(), predicted(answers, labels)[mask].tolist(), strict=True))
    wrong = {(label, found): count for (label, found), count in pairs.items() if label != found}
    assert {(label, found): count for label, found, count in summary["teacher"]["pairs"]} == wrong
    counts = [count for _, _, count in summary["teacher"]["pairs"]]
    assert counts == sorted(counts, reverse=True) and sum(counts) == record["n_revised"]
    assert summary["made"]["torch"] == torch.__version__


def test_nothing_temporary_is_left(result: DemoResult) -> None:
    assert not [path for path in Path(result.report.parent).rglob("*") if path.name.startswith(".")]


def test_the_number_of_threads_is_as_before(result: DemoResult) -> None:
    assert result.rows
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="unknown key 'x'"):
        run_demo(result.report.parent, seeds=1, settings=["x=1"], progress=False)
    assert torch.get_num_threads() == before
