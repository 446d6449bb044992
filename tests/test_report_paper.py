"""Tables as the literature prints them: methods by pairs, best and last over the seeds, the published number beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from html_page import Page
from test_report import write_run

from lrds_fast.cli import main as cli
from lrds_fast.recipe import names as grid
from lrds_fast.report.page import html_report
from lrds_fast.report.paper import NOTE, markdown, paper_tables, text
from lrds_fast.report.runs import Run, read_run
from lrds_fast.train import load_recipe

RESNET, VGG = "cifar100/resnet56-resnet20", "cifar100/vgg13-vgg8"


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two pairs, several methods, one to three seeds; names of another protocol and of none among them."""
    accuracies = {
        "cifar100/resnet56": [[0.71, 0.72]],
        "cifar100/resnet20": [[0.69, 0.68], [0.70, 0.67], [0.71, 0.69]],
        f"{RESNET}/kd+lr+ds": [[0.70, 0.73]],
        f"{RESNET}/kd+lr": [[0.72, 0.71]],
        f"{RESNET}/kd+ds": [[0.72, 0.70]],
        f"{RESNET}/kd": [[0.7066, 0.70], [0.7166, 0.71]],
        f"{RESNET}/dkd": [[0.60, 0.65, 0.64]],
        f"{RESNET}/kd+lr+ds@loss.eta=0.6": [[0.74, 0.735]],
        f"{VGG}/kd": [[0.73, 0.72]],
        "cifar100-short/resnet20-resnet8/kd": [[0.3, 0.4]],
        "digits_alone": [[0.9]],
    }
    return [
        read_run(write_run(tmp_path / f"{number}-{seed}", name, seed, values))
        for number, (name, seeds) in enumerate(accuracies.items())
        for seed, values in enumerate(seeds)
    ]


def test_rows_are_methods_and_columns_pairs(runs: list[Run]) -> None:
    table, short = paper_tables(runs)
    assert (table.protocol, short.protocol) == ("cifar100", "cifar100-short")
    # The literature's order, whatever the order of the runs.
    assert table.columns == (("vgg13", "vgg8"), ("resnet56", "resnet20"))
    assert [label for label, _ in table.rows] == [
        "teacher",
        "student alone",
        "KD",
        "KD+LR",
        "KD+DS",
        "KD+LR+DS",
        "KD+LR+DS, loss.eta=0.6",
        "DKD",
    ]
    cells = {label: row[1] for label, row in table.rows}
    assert cells["KD"].texts() == ("71.16 ± 0.50 (2)", "70.50 ± 0.50", "70.66")
    assert cells["student alone"].texts() == ("70.00 ± 0.58 (3)", "68.00 ± 0.58", "69.06")
    assert cells["teacher"].texts() == ("72.00 (1)", "72.00", "72.34")
    assert cells["KD+LR+DS"].texts() == ("73.00 (1)", "73.00", "-"), "nothing is published with revision or selection"
    assert cells["KD+LR+DS, loss.eta=0.6"].texts() == ("74.00 (1)", "73.50", "-")
    assert cells["DKD"].best is not None and cells["DKD"].best.mean == 0.65
    vgg = {label: row[0] for label, row in table.rows}
    assert vgg["KD"].published == 72.98 and vgg["teacher"].texts() == ("-", "-", "74.64")
    assert vgg["KD+LR"].texts() == ("-", "-", "-")
    assert short.columns == (("resnet20", "resnet8"),)
    assert {cell.published for _, row in short.rows for cell in row} == {None}, "no paper uses the short protocol"
    assert paper_tables([run for run in runs if run.recipe.name == "digits_alone"]) == []
    assert paper_tables([]) == []


def test_every_method_has_a_label() -> None:
    from lrds_fast.report.paper import METHODS

    assert set(METHODS) == {method for protocol in grid.PROTOCOLS.values() for method in protocol.methods}


def test_text_is_aligned_with_best_and_last(runs: list[Run]) -> None:
    lines = text(paper_tables(runs)[0]).splitlines()
    assert lines[0] == "cifar100"
    assert "vgg13 -> vgg8" in lines[1] and lines[1].endswith("resnet56 -> resnet20")
    assert lines[2].split() == ["best", "last", "published"] * 2
    (kd,) = (line for line in lines if line.startswith("KD  "))
    assert " ".join(kd.split()) == "KD 73.00 (1) 72.00 72.98 71.16 ± 0.50 (2) 70.50 ± 0.50 70.66"
    assert {len(line) for line in lines[1:]} == {len(lines[1])}, "every line ends with the last column"
    assert "best epoch, chosen on the test split" in NOTE and "after the last epoch" in NOTE


def test_many_pairs_stay_readable(tmp_path: Path) -> None:
    names = [f"cifar100/{pair}/kd" for pair in grid.PROTOCOLS["cifar100"].pairs]
    runs = [read_run(write_run(tmp_path / str(i), name, 0, [0.5])) for i, name in enumerate(names)]
    (table,) = paper_tables(runs)
    assert len(table.columns) == 17
    printed = text(table)
    assert max(map(len, printed.splitlines())) < 130
    assert all(f"{teacher} -> {student}" in printed for teacher, student in table.columns)


def test_markdown_is_a_table(runs: list[Run]) -> None:
    lines = [line for line in markdown(paper_tables(runs)[0]).splitlines() if line.startswith("|")]
    assert lines[0] == "|  | vgg13 → vgg8 | resnet56 → resnet20 |" and lines[1] == "| --- | ---: | ---: |"
    assert "| KD | 73.00 (1) / 72.00 / 72.98 | 71.16 ± 0.50 (2) / 70.50 ± 0.50 / 70.66 |" in lines
    assert len({line.count("|") for line in lines}) == 1


def test_the_page_has_three_columns_a_pair(runs: list[Run]) -> None:
    page = Page(html_report(runs, title="t"))
    assert page.headings[1] == "Results as papers print them"
    first, second = (table for table in page.tables if table[1][:2] == ["", "best"])
    assert {len(row) for row in first} == {7} and first[1] == ["", *("best", "last", "published") * 2]
    assert ["KD", "73.00 (1)", "72.00", "72.98", "71.16 ± 0.50 (2)", "70.50 ± 0.50", "70.66"] in first
    assert second != first
    assert "As the literature" not in html_report([run for run in runs if "/" not in run.recipe.name], title="t")


def test_report_writes_them_all(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [str(run.folder) for run in runs]
    assert (
        cli.main(["report", *folders, "--out", "r.html", "--markdown", "r.md", "--baseline", f"{RESNET}/kd"]) == cli.OK
    )
    out = capsys.readouterr().out
    assert "resnet56 -> resnet20" in out and NOTE in out
    assert "Results as papers print them" in Path("r.html").read_text()
    found = Path("r.md").read_text()
    assert found.startswith("# lrds-fast report\n") and "### cifar100: best / last / published" in found
    assert f"| {RESNET}/kd | 2 |" in found and NOTE in found


def test_names_with_pipes_do_not_break_markdown(tmp_path: Path) -> None:
    from lrds_fast.report.tables import markdown_report

    folder = write_run(tmp_path / "a", "a|b", 0, [0.5])
    assert json.loads((folder / "recipe.json").read_text())["name"] == "a|b"
    assert "| a\\|b | 1 |" in markdown_report([read_run(folder)], title="t")
    assert load_recipe(f"{RESNET}/kd").name == f"{RESNET}/kd"
