"""Charts: what is drawn is what was given, the same every time, and names are text."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lrds_fast import charts
from lrds_fast.charts import Interval, forest_plot

pytest.importorskip("matplotlib")
NAN = math.nan


def drawn(axis: Any) -> list[tuple[list[float], list[float], str]]:
    """(x, y, colour) of every line and marker of an axis."""
    return [
        (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())), line.get_color())
        for line in axis.lines
    ]


def test_a_forest_plot_draws_means_intervals_and_pairs() -> None:
    rows = [Interval("up", 2.0, 1.0, 3.0, (1.5, 2.5)), Interval("none", 0.5, -1.0, 2.0), Interval("down", -1, -2, -0.5)]
    figure = forest_plot({"": rows}, x_label="accuracy, points")
    lines = drawn(figure.axes[0])
    assert ([1.5, 2.5], [0.22, 0.22], charts.SERIES[0]) in lines
    assert ([1.0, 3.0], [0, 0], charts.SERIES[0]) in lines and ([2.0], [0], charts.SERIES[0]) in lines
    assert ([-1.0, 2.0], [1, 1], charts.MUTED) in lines, "an interval that holds 0 is grey"
    assert ([-2.0, -0.5], [2, 2], charts.SERIES[1]) in lines
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["up", "none", "down"]
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1], "the first line is on top"
    assert "accuracy, points (higher is better)" in charts.svg(figure, "x")
    lower = drawn(forest_plot({"": rows}, x_label="NLL", better="lower").axes[0])
    assert ([2.0], [0], charts.SERIES[1]) in lower


def test_panels_share_their_lines_and_one_pair_has_no_interval() -> None:
    figure = forest_plot(
        {"one": [Interval("a", 1.0, NAN, NAN)], "two": [Interval("b", 2.0, 1.0, 3.0), Interval("a", NAN, NAN, NAN)]},
        x_label="x",
    )
    first, second = figure.axes
    assert [line for line in drawn(first) if line[0] == [1.0]] == [([1.0], [0.0], charts.MUTED)]
    assert ([2.0], [1.0], charts.SERIES[0]) in drawn(second)
    assert not any(0.0 in line[1] and 0.0 not in line[0] for line in drawn(second)), "a has no mean in panel two"
    assert first.get_xlim() == second.get_xlim() and first.get_title() == "one"


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="better must be 'higher' or 'lower'; got 'up'"):
        forest_plot({"": [Interval("a", 1, 0, 2)]}, x_label="x", better="up")
    with pytest.raises(ValueError, match="at least one line"):
        forest_plot({"": []}, x_label="x")


def test_names_are_text_whatever_is_in_them(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "$x_1$ & co", 'style="fill: #0072b2"', "_hidden", "猫"]
    figure = forest_plot({"": [Interval(name, 1, 0, 2) for name in names]}, x_label="</svg>")
    text = charts.svg(figure, '"><b>')
    found = [element.text for element in ElementTree.fromstring(text).iter() if element.tag.endswith("text")]
    assert [name for name in names if charts.short(name) not in found] == []
    assert "<script" not in text and "<b>" not in text and text.count("</svg>") == 1


def test_a_file_is_the_same_every_time_and_knows_light_and_dark(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        charts.save(forest_plot({"": [Interval("a", 1, 0, 2)]}, x_label="x"), tmp_path / name, "title")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "prefers-color-scheme:dark" in text and "var(--ink)" in text and "<metadata" not in text
    body = text.partition("</style>")[2]
    assert not [light for light, _ in charts.PALETTE.values() if light in body], "a colour that cannot follow"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("dark", [0, 1])
def test_colours_stand_out_from_the_paper(dark: int) -> None:
    """WCAG 2: 4.5 : 1 for text, 3 : 1 for what is drawn."""
    paper = luminance(charts.PALETTE["paper"][dark])
    for name, pair in charts.PALETTE.items():
        light, deep = sorted((paper, luminance(pair[dark])), reverse=True)
        needed = {"paper": 0.0, "grid": 0.0, "ink": 7.0, "muted": 4.5}.get(name, 3.0)
        assert (light + 0.05) / (deep + 0.05) >= needed, name


def test_long_names_keep_their_ends() -> None:
    assert charts.short("kd + lr") == "kd + lr"
    shortened = charts.short("cifar100/resnet56-resnet20/kd+lr+ds@loss.eta=0.5")
    assert len(shortened) == 26 and shortened.startswith("cifar100") and shortened.endswith("loss.eta=0.5")


def test_without_matplotlib_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\nfrom lrds_fast import charts\n"
        "try: charts.forest_plot({}, x_label='')\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("reports need matplotlib and Jinja2, and there is no matplotlib: pip install")
