"""Charts show the data, are reproducible, and treat names as text."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lrds_fast.pages import charts
from lrds_fast.pages.charts import Interval, forest_plot

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


def test_panels_share_rows_and_one_pair_has_no_interval() -> None:
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


def test_curves_are_means_and_bands_and_the_first_steps_do_not_count() -> None:
    runs = {"a": {float(x): [100.0 if x == 0 else 1 + 0.1 * x, 1.2 + 0.1 * x, NAN] for x in range(10)}, "none": {}}
    (axis,) = charts.curves(runs, charts.styles(["a", "none"]), y_label="loss").axes
    (line,) = axis.lines
    assert list(line.get_xdata()) == list(range(10))
    assert line.get_ydata()[3] == pytest.approx(1.4) and line.get_color() == charts.SERIES[0]
    band = axis.collections[0].get_paths()[0].vertices
    assert {round(float(y), 6) for x, y in band if x == 3} == {1.3, 1.5}
    low, high = axis.get_ylim()
    assert 1.1 < low < 1.2 and 2.1 < high < 2.2, "the second epoch to the last"


def test_a_level_beyond_the_curves_is_text_and_does_not_move_the_axis() -> None:
    series = {"a": {float(x): [0.2 + 0.01 * x] for x in range(10)}}
    look = charts.styles(["a"])
    (plain,) = charts.curves(series, look, y_label="accuracy", percent=True).axes
    levels = {"teacher": 0.9, "middle": 0.25, "low": 0.01}
    (axis,) = charts.curves(series, look, y_label="accuracy", percent=True, levels=levels).axes
    assert axis.get_ylim() == plain.get_ylim()
    assert axis.get_title(loc="right") == "teacher 90.0%, above; low 1.0%, below"
    assert [text.get_text() for text in axis.texts] == ["middle 25.0%"]
    assert [list(line.get_ydata()) for line in axis.lines[1:]] == [[0.25, 0.25]]


def test_reliability_draws_the_bins_that_have_rows() -> None:
    bins = [(5.0, 0.3, 1.0), (20.0, 0.5, 0.4), (75.0, 0.95, 0.9)]
    top, bottom = charts.reliability({"a": bins, "empty": []}, charts.styles(["a", "empty"])).axes
    assert ([0.5, 0.95], [0.4, 0.9], charts.SERIES[0]) in drawn(top), "5 rows say nothing"
    assert ([0.3, 0.5, 0.95], [5.0, 20.0, 75.0], charts.SERIES[0]) in drawn(bottom)
    assert top.get_xlim() == top.get_ylim() == (0, 1)


def test_a_heat_map_has_a_shade_and_a_number_per_cell() -> None:
    counts = [[0, 4, 2], [1, 0, 0]]
    (axis,) = charts.heat_map(counts, ["r0", "r1"], ["c0", "c1", "c2"], x_label="x", y_label="y").axes
    assert {(text.get_position(), text.get_text()) for text in axis.texts} == {
        ((1, 0), "4"),
        ((2, 0), "2"),
        ((0, 1), "1"),
    }
    shades = {patch.get_xy(): patch.get_alpha() for patch in axis.patches}
    assert shades[0.5, -0.5] > shades[1.5, -0.5] > shades[-0.5, 0.5] and len(shades) == 3
    (large,) = charts.heat_map([[1] * 20] * 20, ["r"] * 20, ["c"] * 20, x_label="x", y_label="y").axes
    assert len(large.patches) == 400 and not large.texts


def test_dots_are_values_and_reference_series_do_not_stretch_the_axis() -> None:
    look = charts.styles(["a", "b"]) | {"teacher": charts.Style("muted", "dashed")}
    series = {"a": [30.0, 40.0], "b": [35.0, NAN], "teacher": [90.0, 38.0]}
    (axis,) = charts.dots(["x", "y"], series, look, x_label="%", aside=["teacher"]).axes
    points = [[tuple(point) for point in part.get_offsets().data.tolist()] for part in axis.collections]
    assert points[0] == [(30.0, 0.0), (40.0, 1.0)] and points[1][0] == (35.0, 0.0) and points[2][1] == (38.0, 1.0)
    assert [(x, y) for x, y, _ in drawn(axis)] == [([30.0, 35.0], [0, 0]), ([40.0, 40.0], [1, 1])]
    assert axis.get_xlim()[1] < 50


def test_a_histogram_counts_everything_once() -> None:
    groups = {"a": [0.0, 0.1, math.inf], "b": [1.0, 0.9, 0.9, NAN]}
    (axis,) = charts.histogram(groups, charts.styles(["a", "b"]), x_label="s", bins=2).axes
    assert [bar.get_height() for bar in axis.patches] == [2, 0, 0, 3]
    heavy = {"a": [*(k / 1000 for k in range(1000)), 1e9]}
    (axis,) = charts.histogram(heavy, charts.styles(["a"]), x_label="s").axes
    assert axis.get_xlim()[1] < 2 and sum(bar.get_height() for bar in axis.patches) == 1001
    (axis,) = charts.histogram({"a": []}, charts.styles(["a"]), x_label="s", threshold=0.5).axes
    assert not axis.patches and list(axis.lines[0].get_xdata()) == [0.5, 0.5]
    (axis,) = charts.histogram({"a": [2.0] * 5}, charts.styles(["a"]), x_label="s").axes
    assert sum(bar.get_height() for bar in axis.patches) == 5


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
def test_colours_contrast_with_the_background(dark: int) -> None:
    """WCAG 2: 4.5 : 1 for text, 3 : 1 for lines and markers."""
    paper = luminance(charts.PALETTE["paper"][dark])
    for name, pair in charts.PALETTE.items():
        light, deep = sorted((paper, luminance(pair[dark])), reverse=True)
        needed = {"paper": 0.0, "grid": 0.0, "ink": 7.0, "muted": 4.5}.get(name, 3.0)
        assert (light + 0.05) / (deep + 0.05) >= needed, name


def test_long_names_are_shortened_in_the_middle() -> None:
    assert charts.short("kd + lr") == "kd + lr"
    shortened = charts.short("cifar100/resnet56-resnet20/kd+lr+ds@loss.eta=0.5")
    assert len(shortened) == 26 and shortened.startswith("cifar100") and shortened.endswith("loss.eta=0.5")


def test_the_library_needs_neither_matplotlib_nor_jinja2() -> None:
    """Losses, selections and training work without them; the modules that write pages import them when they do so."""
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['PIL'] = None\n"
        "import torch, lrds_fast, lrds_fast.report.page, lrds_fast.selection.report\n"
        "z = torch.zeros(2, 3); lrds_fast.kd_loss(z, z, torch.tensor([0, 1]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\nfrom lrds_fast.pages import charts\n"
        "try: charts.forest_plot({}, x_label='')\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("reports need matplotlib and Jinja2, and there is no matplotlib: pip install")
