"""Charts by matplotlib, as SVG for light and dark pages: for reports and for the documentation.

Every chart is a function from numbers to a matplotlib Figure. `svg` returns it for a page, `save` writes it to a file.
The same numbers give the same SVG. matplotlib is imported when the first chart is drawn.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from xml.etree import ElementTree

from lrds_fast.files import replacing

#: Colour name -> (in light pages, in dark pages). Charts are drawn in the light colours; pages and files define both.
PALETTE = {
    "paper": ("#ffffff", "#14171c"),
    "ink": ("#1d2127", "#e6e8eb"),
    "muted": ("#59616c", "#a3abb6"),
    "grid": ("#d8dce1", "#363c45"),
    # Contrast of at least 3 : 1 to the paper; after the palette of Okabe and Ito for colour-blind readers.
    "c0": ("#0072b2", "#56b4e9"),
    "c1": ("#d55e00", "#ff8f4a"),
    "c2": ("#00835f", "#2ec99a"),
    "c3": ("#b8578f", "#e7a3c9"),
    "c4": ("#a06f00", "#efb73e"),
    "c5": ("#6f58c9", "#b3a1f7"),
    "c6": ("#7a4a21", "#d3a57c"),
    "c7": ("#2b8c9c", "#6fd3e3"),
}
PAPER, INK, MUTED, GRID, *SERIES = (light for light, _ in PALETTE.values())
#: The palette as CSS variables.
CSS = "".join(
    start
    + ":root{color-scheme:light dark;"
    + "".join(f"--{name}:{pair[dark]};" for name, pair in PALETTE.items())
    + end
    for start, dark, end in (("", 0, "}"), ("@media (prefers-color-scheme:dark){", 1, "}}"))
)
_STYLE: Any = {
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 10.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "figure.constrained_layout.use": True,
    # Names may contain $, which is no formula; and the SVG has text, not outlines.
    "text.parse_math": False,
    "svg.fonttype": "none",
}
#: Width of a chart in points. Pages show it at 360 to 480 pixels, which gives text of 9 to 13 pixels.
_WIDTH = 360.0

_SVG = "{http://www.w3.org/2000/svg}"

Made = TypeVar("Made", bound=Callable[..., Any])


def require() -> None:
    """Raises ImportError, which says what to install, without matplotlib or Jinja2."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"reports need matplotlib and Jinja2, and there is no {error.name}: pip install 'matplotlib>=3.8'"
            " 'jinja2>=3.1' (the package's extra \"report\")"
        ) from error


def styled(make: Made) -> Made:
    """Decorates a function that draws in the style of these charts. It needs matplotlib when it is called."""

    @functools.wraps(make)
    def drawn(*arguments: Any, **options: Any) -> Any:
        require()
        import matplotlib

        # matplotlib's font lacks some alphabets; the browser's fonts have them.
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            return make(*arguments, **options)

    return drawn  # type: ignore[return-value]


def _drawn(fig: Any, title: str) -> ElementTree.Element:
    """The figure as an <svg> element whose colours are the palette's variables, without dates and random ids."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        fig.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    names = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}
    for element in list(root.iter()):
        for child in list(element):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                element.remove(child)
        if element.tag == f"{_SVG}g":
            element.attrib.pop("id", None)  # every figure of a page would have the id figure_1
        style = re.sub(r"(font: [\d.]+px) [^;]*", r"\1 system-ui, sans-serif", element.get("style", ""))
        if style:
            element.set("style", re.sub(r"#[0-9a-f]{6}", lambda colour: names.get(colour[0], colour[0]), style))
        for attribute in ("text", "tail"):
            if not (getattr(element, attribute) or "").strip():
                setattr(element, attribute, None)
    if title:
        root.set("role", "img")
        root.set("aria-label", title)
        named = ElementTree.Element(f"{_SVG}title")
        named.text = title
        root.insert(0, named)
    return root


def _text(root: ElementTree.Element) -> str:
    ElementTree.register_namespace("", _SVG[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")


@styled
def svg(fig: Any, title: str) -> str:
    """A figure as an <svg> element for a page that defines the colours of CSS. title: what it shows, for screen
    readers; every figure of a page needs a title of its own."""
    root = _drawn(fig, title)
    del root.attrib["width"], root.attrib["height"]
    return _text(root)


@styled
def save(fig: Any, path: str | os.PathLike[str], title: str = "") -> None:
    """Writes a figure as an SVG file that follows the reader's preference for light or dark. Writes atomically."""
    root = _drawn(fig, title)
    style = ElementTree.Element(f"{_SVG}style")
    style.text = f"{CSS}*{{stroke-linejoin:round;stroke-linecap:butt}}"
    root.insert(0, style)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(_text(root) + "\n")


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """(Figure, array (rows, columns) of axes) of width x height points; call it in a @styled function."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width / 72, height / 72))
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


class Interval(NamedTuple):
    """A line of a forest plot. mean: of the paired differences; low, high: the ends of its confidence interval, nan
    where there is none (one pair); pairs: the differences themselves, drawn faintly.

    For paired values: e = lrds_fast.report.statistics.paired(values, baseline), then Interval(name, e.mean,
    *e.interval, differences)."""

    name: str
    mean: float
    low: float
    high: float
    pairs: Sequence[float] = ()


@styled
def forest_plot(
    panels: Mapping[str, Sequence[Interval]], *, x_label: str, better: str = "higher", width: float = 0.0
) -> Any:
    """Differences to a reference, which is the line at 0: one line per mean and its interval, the first one on top.

    panels: title -> lines. Several panels are drawn side by side on one scale, each name at the same height in all of
    them (one panel per regime, for example). x_label: the difference and its unit. better: "higher" or "lower"; an
    interval that excludes 0 is blue where it is better and orange where it is worse. An interval that contains 0 is
    grey, and its mean a hollow dot. width: in points; 0 is 360, and 150 more for every further panel. Lines whose mean
    is not finite are left empty. Returns a matplotlib Figure: see `svg` and `save`. ValueError for another `better` or
    without lines.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"better must be 'higher' or 'lower'; got {better!r}")
    names = list(dict.fromkeys(row.name for rows in panels.values() for row in rows))
    if not names:
        raise ValueError("a forest plot needs at least one line; got none")
    fig, axes = figure(
        width or _WIDTH + 150 * (len(panels) - 1), 52 + 20 * len(names), 1, len(panels), sharey=True, sharex=True
    )
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        axis.axvline(0.0, color=INK, linewidth=0.8)
        axis.grid(axis="x")
        axis.set_axisbelow(True)
        axis.set_title(title)
        for row in rows:
            place = names.index(row.name)
            finite = [value for value in row.pairs if math.isfinite(value)]
            known = math.isfinite(row.low) and math.isfinite(row.high)
            sure = known and (row.low > 0 or row.high < 0)
            colour = MUTED if not sure else SERIES[0] if (row.mean > 0) == (better == "higher") else SERIES[1]
            axis.plot(finite, [place + 0.22] * len(finite), "o", color=colour, markersize=2.6, alpha=0.45, mew=0)
            if known:
                axis.plot([row.low, row.high], [place, place], color=colour, linewidth=1.6)
            if math.isfinite(row.mean):
                axis.plot([row.mean], [place], "o", markersize=5, color=colour, mfc=colour if sure else PAPER)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    axes[0, 0].set_yticks(range(len(names)), [short(name) for name in names])
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    fig.supxlabel(f"{x_label} ({better} is better)", fontsize=10)
    return fig


def short(name: str, width: int = 26) -> str:
    """A name in at most `width` characters, without its middle, because long names differ mostly at their ends."""
    name = " ".join(name.split())
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[head + 1 - width :]}"


class Style(NamedTuple):
    """How a name is drawn in every chart of a page. colour: a key of PALETTE. dash: a line style, as in CSS."""

    colour: str
    dash: str = "solid"

    @property
    def light(self) -> str:
        """The colour that matplotlib draws with."""
        return PALETTE[self.colour][0]


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A style per name; the first eight have solid lines."""
    count = len(SERIES)
    dashes = ("solid", "dashed", "dotted")
    return {name: Style(f"c{i % count}", dashes[i // count % 3]) for i, name in enumerate(names)}


#: Whether a sample keeps its teacher.
KEPT = {True: Style("c0"), False: Style("c1")}


@styled
def curves(
    series: Mapping[str, Mapping[float, Sequence[float]]],
    look: Mapping[str, Style],
    *,
    y_label: str,
    x_label: str = "epoch",
    percent: bool = False,
    levels: Mapping[str, float] | None = None,
) -> Any:
    """A line per name through the means, and a band from the lowest to the highest value.

    series: name -> x -> values (one per seed). Values that are not finite are left out. The y axis covers the bands
    without their first fifth, because the first epochs of training would compress all later ones. levels: name -> a
    constant to compare with: a line if it lies in the range of the y axis, else a number above the chart.
    """
    fig, axes = figure(_WIDTH, 210)
    axis = axes[0, 0]
    settled: list[float] = []
    for name, points in series.items():
        finite = {x: [y for y in values if math.isfinite(y)] for x, values in sorted(points.items())}
        xs = [x for x, values in finite.items() if values]
        if not xs:
            continue
        means = [math.fsum(finite[x]) / len(finite[x]) for x in xs]
        low, high = [min(finite[x]) for x in xs], [max(finite[x]) for x in xs]
        colour, dash = look[name].light, look[name].dash
        axis.plot(xs, means, color=colour, linestyle=dash, linewidth=1.5, marker="o" if len(xs) == 1 else None)
        axis.fill_between(xs, low, high, color=colour, alpha=0.16, linewidth=0)
        settled += low[len(xs) // 5 :] + high[len(xs) // 5 :]
    if settled:
        pad = 0.06 * (max(settled) - min(settled)) or 0.05 * abs(settled[0]) or 0.05
        axis.set_ylim(min(settled) - pad, max(settled) + pad)
    _levels(axis, levels or {}, percent)
    axis.grid(axis="y")
    axis.set(xlabel=x_label, ylabel=y_label)
    _whole_numbers(axis.xaxis)
    if percent:
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    return fig


def _levels(axis: Any, levels: Mapping[str, float], percent: bool) -> None:
    low, high = axis.get_ylim()
    beyond = []
    for name, value in levels.items():
        text = f"{short(name)} {100 * value:.1f}%" if percent else f"{short(name)} {value:.3g}"
        if low <= value <= high:
            axis.axhline(value, color=MUTED, linewidth=0.9, linestyle="dashed")
            axis.annotate(text, (0.99, value), (0, 2), ("axes fraction", "data"), "offset points", ha="right", size=9)
        else:
            beyond.append(f"{text}, {'above' if value > high else 'below'}")
    axis.set_title("; ".join(beyond), loc="right", fontsize=9)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(6, integer=True))


@styled
def reliability(series: Mapping[str, Sequence[tuple[float, float, float]]], look: Mapping[str, Style]) -> Any:
    """Accuracy by confidence, and below it how many rows have that confidence.

    series: name -> (rows, mean confidence, accuracy) of each bin, shares in [0, 1]. A dot's area is proportional to the
    bin's rows; bins with fewer than 10 rows have no dot. A calibrated network lies on the diagonal, an overconfident
    one below it.
    """
    fig, axes = figure(_WIDTH, 300, 2, 1, sharex=True, height_ratios=(3, 1))
    top, bottom = axes[:, 0]
    top.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle="dashed")
    for name, bins in series.items():
        total = sum(rows for rows, _, _ in bins) or 1.0
        colour, dash = look[name].light, look[name].dash
        line = {"color": colour, "linestyle": dash, "linewidth": 1.1}
        sure = [(rows / total, x, y) for rows, x, y in bins if rows >= 10]
        top.plot([x for _, x, _ in sure], [y for _, _, y in sure], **line)
        top.scatter(*([part[i] for part in sure] for i in (1, 2)), [6 + 60 * part[0] for part in sure], color=colour)
        bottom.plot([x for _, x, _ in bins], [100 * rows / total for rows, _, _ in bins], **line)
    for axis in (top, bottom):
        axis.grid()
        axis.set_xlim(0, 1)
    top.set(ylim=(0, 1), ylabel="accuracy")
    bottom.set(xlabel="confidence (highest probability)", ylabel="% of rows")
    return fig


@styled
def heat_map(
    counts: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], *, x_label: str, y_label: str
) -> Any:
    """A table of numbers >= 0 as shades. counts[row][column] is also printed in its cell where it fits."""
    from matplotlib.patches import Rectangle

    cell = min(24.0, 270 / max(len(columns), 1))
    fig, axes = figure(_WIDTH, 84 + cell * len(rows))
    axis = axes[0, 0]
    largest = max((value for row in counts for value in row), default=0) or 1
    for y, row in enumerate(counts):
        for x, value in enumerate(row):
            if value:
                shade = 0.08 + 0.62 * value / largest
                axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=SERIES[0], alpha=shade, linewidth=0))
                if cell >= 18:
                    axis.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=8)
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel=x_label, ylabel=y_label)
    axis.set_xticks(range(len(columns)), [short(name, 14) for name in columns], rotation=60, ha="right")
    axis.set_xticks([x + 0.5 for x in range(len(columns))], minor=True)
    axis.set_yticks(range(len(rows)), [short(name, 14) for name in rows])
    axis.set_yticks([y + 0.5 for y in range(len(rows))], minor=True)
    axis.tick_params(which="both", length=0)
    axis.grid(which="minor")
    return fig


@styled
def dots(
    rows: Sequence[str],
    series: Mapping[str, Sequence[float]],
    look: Mapping[str, Style],
    *,
    x_label: str,
    aside: Sequence[str] = (),
) -> Any:
    """A dot per row and name, and in each row a line from the lowest to the highest. series[name][row]; nan has no dot.

    aside: names that the lines and the axis leave out; their dots may lie outside the axis.
    """
    fig, axes = figure(_WIDTH, 48 + 15 * len(rows))
    axis = axes[0, 0]
    for y in range(len(rows)):
        finite = [values[y] for name, values in series.items() if name not in aside and math.isfinite(values[y])]
        if finite:
            axis.plot([min(finite), max(finite)], [y, y], color=GRID, linewidth=3, zorder=1)
    axis.autoscale_view()
    axis.set_xlim(axis.get_xlim())
    for name, values in series.items():
        hollow = look[name].dash != "solid"
        fill = PAPER if hollow else look[name].light
        axis.scatter(values, range(len(rows)), 20, facecolor=fill, edgecolor=look[name].light, linewidths=1, zorder=2)
    axis.set_yticks(range(len(rows)), [short(name) for name in rows])
    axis.set(xlabel=x_label, ylim=(len(rows) - 0.4, -0.6))
    axis.grid(axis="x")
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    return fig


@styled
def histogram(
    groups: Mapping[str, Sequence[float]],
    look: Mapping[str, Style],
    *,
    x_label: str,
    threshold: float | None = None,
    bins: int = 40,
) -> Any:
    """Stacked counts of finite values per group. threshold: where a vertical line is drawn.

    The outermost half per cent on either side is counted in the outermost bins; a few outliers would otherwise compress
    all other samples into one bin.
    """
    import numpy as np

    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in groups.items()}
    arrays = {name: values[np.isfinite(values)] for name, values in arrays.items()}
    everything = np.sort(np.concatenate([*arrays.values(), np.empty(0)]))
    fig, axes = figure(_WIDTH, 190)
    axis = axes[0, 0]
    if len(everything):
        cut = len(everything) // 200
        low, high = everything[cut], everything[-1 - cut]
        low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
        edges = np.linspace(low, high, bins + 1)
        if threshold is not None and low < threshold < high:  # the threshold is a bin edge
            step = edges[1] - edges[0]
            first, last = math.floor((low - threshold) / step), math.ceil((high - threshold) / step)
            edges = threshold + step * np.arange(first, last + 1)
        below = np.zeros(len(edges) - 1)
        for name, values in arrays.items():
            counts = np.histogram(values.clip(edges[0], edges[-1]), edges)[0]
            axis.bar(edges[:-1], counts, edges[1] - edges[0], below, align="edge", color=look[name].light, linewidth=0)
            below = below + counts
    _threshold(axis.axvline, axis, threshold)
    axis.set(xlabel=x_label, ylabel="samples")
    _whole_numbers(axis.yaxis)
    return fig


def _threshold(line: Callable[..., Any], axis: Any, threshold: float | None) -> None:
    if threshold is None or not math.isfinite(threshold):
        return
    line(threshold, color=INK, linewidth=1.1, linestyle="dashed")
    axis.set_title(f"dashed: the threshold {threshold:.4g}", loc="right", fontsize=9)


@styled
def ranked(
    scores: Sequence[float],
    errors: Sequence[float],
    kept: Sequence[bool],
    look: Mapping[bool, Style],
    *,
    y_label: str,
    width: float,
    threshold: float | None = None,
) -> Any:
    """Scores in ascending order with error bars of `width` standard errors, at no more than 60 evenly spaced ranks.

    errors: the scores' standard errors. kept: whether a sample keeps the teacher; look has a style for either.
    """
    order = sorted((i for i, score in enumerate(scores) if math.isfinite(score)), key=lambda i: scores[i])
    count = min(len(order), 60)
    fig, axes = figure(_WIDTH, 210)
    axis = axes[0, 0]
    for value in (True, False):
        ranks = [round(k * (len(order) - 1) / max(count - 1, 1)) for k in range(count)]
        ranks = [rank for rank in ranks if kept[order[rank]] is value]
        axis.errorbar(
            [rank + 1 for rank in ranks],
            [scores[order[rank]] for rank in ranks],
            [width * errors[order[rank]] for rank in ranks],
            fmt="o",
            markersize=3,
            linewidth=0.9,
            color=look[value].light,
        )
    _threshold(axis.axhline, axis, threshold)
    axis.grid(axis="y")
    axis.set(xlabel="rank of the sample", ylabel=f"{y_label} ± {width:.3g} standard errors")
    return fig


@styled
def spreads(rows: Mapping[str, Sequence[float]], look: Style, *, x_label: str, threshold: float | None = None) -> Any:
    """The distribution of each row's finite values: 5% to 95% as a thin line, 25% to 75% thick, the median as a dot."""
    import numpy as np

    fig, axes = figure(_WIDTH, 56 + 14 * len(rows))
    axis = axes[0, 0]
    for y, values in enumerate(rows.values()):
        array = np.asarray(values, dtype=np.float64)
        if np.isfinite(array).any():
            low, first, middle, third, high = np.quantile(array[np.isfinite(array)], (0.05, 0.25, 0.5, 0.75, 0.95))
            axis.plot([low, high], [y, y], color=look.light, linewidth=1)
            axis.plot([first, third], [y, y], color=look.light, linewidth=4)
            axis.plot([middle], [y], "o", color=look.light, mfc=PAPER, markersize=4)
    _threshold(axis.axvline, axis, threshold)
    axis.set_yticks(range(len(rows)), [short(name) for name in rows])
    axis.set(xlabel=x_label, ylim=(len(rows) - 0.4, -0.6))
    axis.grid(axis="x")
    axis.tick_params(axis="y", length=0)
    return fig
