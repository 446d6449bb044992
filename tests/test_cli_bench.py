"""`lrds-fast bench`: the suites, their pages, and that the committed pages show the committed numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lrds_fast.cli import bench
from lrds_fast.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.csv"))


def render(stored: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "benchmarks.render", str(stored), "--out", str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip())


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list"]) == cli.OK
    assert "kd_loss" in capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kd_los"], "there is no suite 'kd_los'; there are: bandwidth, influence, influence_scale, kd_loss, lds"),
        (["--threads", "0"], "--threads must be >= 1; got 0"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == cli.MISUSED
    assert message in capsys.readouterr().err


def test_without_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "_CHECKOUT", tmp_path)
    assert cli.main(["bench"]) == cli.MISUSED
    assert "part of the source checkout" in capsys.readouterr().err


@pytest.mark.skipif(not RESULTS, reason="no stored results")
@pytest.mark.parametrize("stored", RESULTS, ids=lambda path: path.stem)
def test_committed_pages_show_the_committed_numbers(stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = render(stored, tmp_path)
    committed = ROOT / "docs" / "benchmarks" / page.name
    assert committed.is_file(), "run: python -m benchmarks.render"
    assert page.read_text() == committed.read_text(), "run: python -m benchmarks.render"
    for plot in tmp_path.glob("*.svg"):
        assert labels(plot) == labels(committed.parent / plot.name), "run: python -m benchmarks.render"
        assert len(labels(plot)) >= 10


def labels(plot: Path) -> list[str]:
    """The texts of an SVG drawing. Their positions are left out, because versions of matplotlib differ in them."""
    return [element.text or "" for element in ElementTree.parse(plot).iter() if element.tag.endswith("}text")]


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    """Every suite in its short form: checked, timed, stored, rendered."""
    assert cli.main(["bench", "--quick", "--out", str(tmp_path)]) == cli.OK
    for name in bench.suites():
        assert (tmp_path / f"{name}_cpu.csv").stat().st_size > 0
        assert "|" in (tmp_path / f"{name}_cpu.md").read_text()
