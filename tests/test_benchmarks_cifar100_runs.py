"""The stored CIFAR-100 runs: README.md and the page agree with the CSV."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from test_report import write_run

from benchmarks import cifar100_runs
from lrds_fast.report.runs import read_run

ROOT = Path(__file__).resolve().parent.parent


def test_readme_and_page_are_of_the_stored_runs() -> None:
    text = cifar100_runs.STORED.read_text(encoding="utf-8")
    assert cifar100_runs.PAGE.read_text(encoding="utf-8") == cifar100_runs.page(text)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert cifar100_runs.readme_with(readme, text) == readme
    runs = cifar100_runs.runs_of(text)
    assert len({(run.recipe.name, run.recipe.seed) for run in runs}) == len(runs)
    seeds = Counter(run.recipe.name.rpartition("/")[2] for run in runs)
    published = "kd+lr@loss.revise_temperature=none"
    settings = {"resnet8", "kd", published, "kd+lr", "kd+ds", "kd+lr+ds", "kd-rise", "kd-rise+lr+ds"}
    assert {name for name, count in seeds.items() if count >= 3} == settings
    # The selection of before, by kd_gain at two standard errors, has fewer. README.md does not show it.
    before = "@selection.by=kd_gain,selection.confidence=2"
    assert seeds.keys() - settings - {"resnet20"} == {
        f"{name}{before}" for name in ("kd+ds", "kd+lr+ds", "kd-rise+lr+ds")
    }
    assert "selection.by" not in readme.partition(cifar100_runs.BEGIN)[2].partition(cifar100_runs.END)[0]
    for run in runs:
        assert [record["epoch"] for record in run.records] == [*range(1, run.recipe.schedule.epochs + 1)]


def test_runs_survive_the_csv(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", "cifar100-short/resnet20-resnet8/kd", 3, [0.25, 0.5]))
    unfinished = run.recipe.with_values(**{"schedule.epochs": 3})
    with pytest.raises(ValueError, match="has 2 of 3 epochs; finish it first"):
        cifar100_runs.rows_of([type(run)(run.folder, unfinished, run.records)], "abc", "command")
    finished = run.recipe.with_values(**{"schedule.epochs": 2})
    rows = cifar100_runs.rows_of([type(run)(run.folder, finished, run.records)], "abc", "a command")
    (again,) = cifar100_runs.runs_of(cifar100_runs.as_csv(rows))
    assert (again.recipe.name, again.recipe.seed) == (run.recipe.name, 3)
    for found, record in zip(again.records, run.records, strict=True):
        assert found == {key: record[key] for key in cifar100_runs.LOGGED if key in record}
    stored = tmp_path / "stored.csv"
    stored.write_text(cifar100_runs.as_csv(rows))
    other = [{**row, "seed": 4} for row in rows]
    both = cifar100_runs.with_stored([*other, {**rows[0], "command": "a newer command"}], stored)
    assert [(row["seed"], row["command"]) for row in both] == [(4, "a command")] * 2 + [(3, "a newer command")]
    assert [row["seed"] for row in cifar100_runs.with_stored(other, stored)] == ["3", "3", 4, 4]
    marks = f"{cifar100_runs.BEGIN}{cifar100_runs.END}"
    alone = [{**row, "name": "cifar100-short/resnet8"} for row in rows]
    dkd = [{**row, "name": "cifar100-short/resnet20-resnet8/dkd"} for row in rows]
    three = [{**row, "seed": seed} for seed in (3, 4, 5) for row in rows]
    readme = cifar100_runs.readme_with(marks, cifar100_runs.as_csv([*alone, *dkd, *three]))
    assert "student alone" in readme and "| KD |" in readme and "DKD" not in readme, "DKD has one seed"
    with pytest.raises(ValueError, match="must have <!-- cifar100:begin -->"):
        cifar100_runs.readme_with("no marks", cifar100_runs.as_csv(alone))
