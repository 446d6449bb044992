"""Self-contained HTML pages by Jinja2: sections of text, charts, tables and pictures."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lrds_fast.pages import charts
from lrds_fast.pages.charts import Style


class Figure(NamedTuple):
    """A chart. svg: from charts.svg; it is the only part of a page that is not escaped."""

    svg: str
    caption: str


class Table(NamedTuple):
    """A table. head: column titles, () for none. rows: cells; the first cell is the row's name. groups: (title, number
    of columns) above the column titles, from the second column on. folded: hidden until the reader opens it. words: the
    cells are words, which may break over lines, instead of numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    groups: Sequence[tuple[str, int]] = ()
    folded: bool = False
    words: bool = False


class Gallery(NamedTuple):
    """Pictures side by side. pictures: (data: URI or "", lines of the caption)."""

    title: str
    note: str
    pictures: Sequence[tuple[str, Sequence[str]]]


class Section(NamedTuple):
    """A heading and its content. legend: the colours of the figures."""

    title: str
    text: Sequence[str] = ()
    legend: Sequence[tuple[str, Style]] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    galleries: Sequence[Gallery] = ()
    notes: Sequence[str] = ()


def page(title: str, sections: Sequence[Section], introduction: Sequence[str] = ()) -> str:
    """The HTML of a page. Everything but the figures' SVG is escaped. ImportError without Jinja2 or matplotlib."""
    charts.require()
    rendered: str = _template().render(title=title, introduction=introduction, sections=sections, css=charts.CSS)
    return rendered


@functools.cache
def _template() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")


def png(pixels: Any) -> str:
    """A data: URI of pixels, a (height, width, 1 or 3) uint8 array."""
    from PIL import Image  # a requirement of matplotlib

    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
