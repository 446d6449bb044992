"""Reports: averages over seeds, paired differences, and verdicts about noise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from scipy import stats

from lrds_fast.recipe.recipe import Recipe
from lrds_fast.report import paper
from lrds_fast.report.page import html_report
from lrds_fast.report.runs import read_run
from lrds_fast.report.statistics import estimate, holm, paired, two_sided
from lrds_fast.report.tables import NOTES, cells, tabulate
from lrds_fast.report.verdicts import verdicts


def write_run(folder: Path, name: str, seed: int, accuracies: list[float], **more: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(Recipe(name=name, seed=seed).to_json())
    records = [
        {"epoch": i + 1, "test_acc": a, "test_ce": 1 - a, "train_loss": 1.0, "rows": 10} | more
        for i, a in enumerate(accuracies)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_repeated_run_does_not_count_as_a_second_seed(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / folder, "a", 0, [0.5])) for folder in ("x", "y")]
    with pytest.raises(ValueError, match=r"x and .*y are both a, seed 0: runs of one name are averaged"):
        tabulate(runs)


def test_p_values_are_those_of_the_t_distribution() -> None:
    for degrees in (1, 2, 3, 4, 7, 10, 31, 500):
        for t in (0.0, 0.3, 2.2, 9.0):
            assert two_sided(t, degrees) == pytest.approx(2 * stats.t.sf(t, degrees), abs=1e-13)


def test_paired_differences_agree_with_the_t_test() -> None:
    a, b = [0.91, 0.95, 0.93, 0.96, 0.92], [0.90, 0.93, 0.93, 0.92, 0.91]
    difference = paired(a, b)
    p = stats.ttest_rel(a, b).pvalue
    assert difference.mean == pytest.approx(0.016)
    assert difference.p_value == pytest.approx(p)
    assert difference.within_noise == (p > 0.05)
    assert difference.interval == pytest.approx(stats.ttest_rel(a, b).confidence_interval(0.95))
    assert not paired([x + 0.2 for x in a], b).within_noise
    with pytest.raises(ValueError, match="equally many values; got 2 and 1"):
        paired([1.0, 2.0], [1.0])


def test_one_seed_has_no_noise_to_be_within() -> None:
    assert not estimate([0.5]).within_noise and math.isnan(estimate([0.5]).p_value)
    assert all(map(math.isnan, estimate([0.5]).interval))
    assert estimate([0.0, 0.0]).within_noise and not estimate([0.5, 0.5]).within_noise


def test_holm_corrects_for_the_number_of_tests() -> None:
    # The textbook's: the smallest times 4, the next times 3, ..., never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    alone = holm([math.nan, 0.02])
    assert math.isnan(alone[0]) and alone[1] == 0.02, "what is no test is not counted"
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_runs_of_one_name_are_averaged_and_compared_by_seed(tmp_path: Path) -> None:
    values = {"a": [0.5, 0.7, 0.6], "b": [0.8, 0.9, 0.7]}
    folders = [
        write_run(tmp_path / f"{name}{seed}", name, seed, [0.95, accuracy])
        for name, accuracies in values.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    # The order on the command line must not matter to the pairing: a's runs forwards, b's backwards.
    folders[3:] = folders[:2:-1]
    rows = {row.name: row for row in tabulate([read_run(folder) for folder in folders], baseline="a")}
    assert rows["a"].accuracy.mean == pytest.approx(0.6)
    assert rows["b"].best_accuracy.mean == pytest.approx(0.95)
    difference = rows["b"].accuracy_difference
    assert difference is not None
    assert difference.mean == pytest.approx((0.3 + 0.2 + 0.1) / 3)
    assert difference.error == pytest.approx(0.1 / math.sqrt(3))
    assert rows["a"].accuracy_difference is None


def test_differences_need_the_same_seeds(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "a", "a", 0, [0.5])),
        read_run(write_run(tmp_path / "b", "b", 1, [0.6])),
    ]
    assert tabulate(runs, baseline="a")[1].accuracy_difference is None
    with pytest.raises(ValueError, match="baseline must be the name of a run; got 'c': there are a, b"):
        tabulate(runs, baseline="c")


def test_verdicts_are_better_worse_or_noise(tmp_path: Path) -> None:
    runs = []
    for name, accuracies in {
        "base": [0.50, 0.52, 0.51, 0.53],
        "up": [0.60, 0.63, 0.61, 0.63],
        "down": [0.40, 0.43, 0.41, 0.43],
        "same": [0.51, 0.51, 0.52, 0.52],
    }.items():
        runs += [read_run(write_run(tmp_path / f"{name}{i}", name, i, [a])) for i, a in enumerate(accuracies)]
    up, down, same, how = verdicts([(tabulate(runs, baseline="base"), "base")])
    assert up.startswith("up against base: accuracy +10.25 points (better), cross-entropy -0.1025 (better)")
    assert down.startswith("down against base: accuracy -9.75 points (worse), cross-entropy +0.0975 (worse)")
    assert same == "same against base: accuracy within noise, cross-entropy within noise."
    assert how.startswith("'Better', 'worse' and 'within noise' are results of paired t tests at 5% over these 6")


def test_p_values_are_corrected_for_many_comparisons(tmp_path: Path) -> None:
    """A difference with p = 0.01 is significant alone, but not among many others that are noise."""
    values = {"base": [0.50, 0.50, 0.50, 0.50], "up": [0.51, 0.515, 0.52, 0.51]}
    values |= {f"same{i}": [0.49, 0.51, 0.48, 0.52] for i in range(5)}
    runs = [
        read_run(write_run(tmp_path / f"{name}{seed}", name, seed, [accuracy]))
        for name, accuracies in values.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    rows = tabulate(runs, baseline="base")
    difference = rows[1].accuracy_difference
    assert difference is not None and 0.005 < difference.p_value < 0.02 and "~" not in cells(rows[1])[5]
    assert verdicts([(rows[:2], "base")])[0].startswith("up against base: accuracy +1.38 points (better)")
    assert verdicts([(rows, "base")])[0] == "up against base: accuracy within noise, cross-entropy within noise."


def test_a_single_seed_gives_no_noise_estimate(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, name, 0, [value])) for name, value in (("a", 0.5), ("b", 0.54))]
    rows = tabulate(runs, baseline="a")
    (sentence,) = verdicts([(rows, "a")])
    expected = "b against a: accuracy +4.00 points, cross-entropy -0.0400; one seed gives no estimate of the noise."
    assert sentence == expected
    assert cells(rows[1])[5:7] == ("+4.00 ?", "-0.0400 ?")
    assert "? those of one seed, which gives no estimate of the noise" in NOTES
    assert "one gives no estimate of the noise" in paper.NOTE


def test_folders_that_are_no_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds no recipe.json"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "empty", "a", 0, [])
    with pytest.raises(ValueError, match="has no finished epoch yet"):
        read_run(folder)
    (folder / "log.jsonl").write_text('{"epoch": 1, "test_acc": 0.5, "test_ce": 0.5, "rows": 1}\n{"epoch": 2}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 2 has no 'rows'; the log is damaged"):
        read_run(folder)
    (folder / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"recipe.json is not JSON"):
        read_run(folder)


def test_names_are_escaped_and_missing_numbers_are_survived(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "x", "<b>&", 0, [0.5, 0.6], test_ce=None))
    text = html_report([run], title="<title>")
    assert "<b>" not in text and Page(text).headings[0] == "<title>"
    assert Page(text).table("run")[0][0] == "<b>&"
    assert "nan" in cells(tabulate([run])[0])[4]
