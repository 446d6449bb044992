"""Charts by matplotlib, as SVG that is readable in light and dark: for reports and for the documentation.

Every chart is a function from numbers to a matplotlib Figure. `svg` writes it for a page, `save` to a file of its own.
The same numbers give the same text. matplotlib is imported when the first chart is made.
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

#: Name of a colour -> in light, in dark. Charts are drawn in the light ones; pages and files define both.
PALETTE = {
    "paper": ("#ffffff", "#14171c"),
    "ink": ("#1d2127", "#e6e8eb"),
    "muted": ("#59616c", "#a3abb6"),
    "grid": ("#d8dce1", "#363c45"),
    # At least 3 : 1 against the paper; after Okabe and Ito, whom most colour-blind readers can tell apart.
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
#: The palette as CSS: of the page, or of a file by itself.
CSS = "".join(
    start
    + ":root{color-scheme:light dark;"
    + "".join(f"--{name}:{pair[dark]};" for name, pair in PALETTE.items())
    + end
    for start, dark, end in (("", 0, "}"), ("@media (prefers-color-scheme:dark){", 1, "}}"))
)
_STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
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
    "legend.fontsize": 8.0,
    "figure.constrained_layout.use": True,
    # Names are text, whatever is in them; text stays text.
    "text.parse_math": False,
    "svg.fonttype": "none",
}
#: Width of a chart in points. It is shown at 360 to 480 pixels, so that its text is 9 to 12.
_WIDTH = 360.0

_SVG = "{http://www.w3.org/2000/svg}"

Made = TypeVar("Made", bound=Callable[..., Any])


def require() -> None:
    """ImportError, with what to install, where there is no matplotlib or no Jinja2."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"reports need matplotlib and Jinja2, and there is no {error.name}: pip install 'matplotlib>=3.8'"
            " 'jinja2>=3.1' (the package's extra \"report\")"
        ) from error


def styled(make: Made) -> Made:
    """A function that draws in the style of these charts, and needs matplotlib when it is called."""

    @functools.wraps(make)
    def drawn(*arguments: Any, **options: Any) -> Any:
        require()
        import matplotlib

        # A font lacks some alphabets; the reader's does not.
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            return make(*arguments, **options)

    return drawn  # type: ignore[return-value]


def _drawn(made: Any, title: str) -> ElementTree.Element:
    """The figure as an <svg> element whose colours are the palette's variables, without dates or ids of chance."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        made.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    names = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}
    for element in list(root.iter()):
        for child in list(element):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                element.remove(child)
        if element.tag == f"{_SVG}g":
            element.attrib.pop("id", None)  # figure_1 would be in a page many times
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
def svg(made: Any, title: str) -> str:
    """A figure as an <svg> element for a page that defines CSS's colours. title: what it shows, for those who cannot
    see it; of the figures of a page, each has another."""
    root = _drawn(made, title)
    del root.attrib["width"], root.attrib["height"]
    return _text(root)


@styled
def save(made: Any, path: str | os.PathLike[str], title: str = "") -> None:
    """Writes a figure as an SVG file that follows the reader's preference for light or dark; whole or not at all."""
    root = _drawn(made, title)
    style = ElementTree.Element(f"{_SVG}style")
    style.text = f"{CSS}*{{stroke-linejoin:round;stroke-linecap:butt}}"
    root.insert(0, style)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(_text(root) + "\n")


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """(Figure, array (rows, columns) of axes) of width x height points; call it in a styled function."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width / 72, height / 72))
    return made, made.subplots(rows, columns, squeeze=False, **options)


class Interval(NamedTuple):
    """A line of a forest plot. mean: of the paired differences; low, high: the ends of its confidence interval, nan
    where there is none (one pair); pairs: the differences themselves, drawn faintly.

    Of paired values: e = lrds_fast.train.statistics.paired(values, baseline), Interval(name, e.mean, *e.interval,
    differences)."""

    name: str
    mean: float
    low: float
    high: float
    pairs: Sequence[float] = ()


@styled
def forest_plot(
    panels: Mapping[str, Sequence[Interval]], *, x_label: str, better: str = "higher", width: float = 0.0
) -> Any:
    """Differences to a reference, which is the line at 0: a mean with its interval per line, the first line on top.

    panels: title -> lines; several are drawn side by side on one scale, a name's line at the same height in all of them
    (a regime a panel, say). x_label: what the difference is, with its unit. better: "higher" or "lower"; an interval
    that excludes 0 is blue where it is better and orange where it is worse, one that holds 0 is grey and its mean is
    open. width: in points, 0 for 360 and 150 more for every further panel. Lines whose mean is not finite are left
    empty. Returns a matplotlib Figure: see `svg` and `save`. ValueError for another `better` or no line at all.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"better must be 'higher' or 'lower'; got {better!r}")
    names = list(dict.fromkeys(row.name for rows in panels.values() for row in rows))
    if not names:
        raise ValueError("a forest plot needs at least one line; got none")
    made, axes = figure(
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
    made.supxlabel(f"{x_label} ({better} is better)", fontsize=9)
    return made


def short(name: str, width: int = 26) -> str:
    """A name in at most `width` characters, its middle left out: what tells long names apart stands at their ends."""
    name = " ".join(name.split())
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[head + 1 - width :]}"
