"""Pictures and charts as text, for reports that are one file: base64 PNG and inline SVG, no library needed."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape

from torch import Tensor

#: Distinct in print and to most colour-blind readers (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#000000")

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40


def png(picture: Tensor) -> str:
    """A data: URI of picture (height, width, 1 or 3) uint8."""
    height, width, channels = picture.shape
    rows = picture.contiguous().cpu().numpy().reshape(height, width * channels)
    # One filter byte, 0, before each row.
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(raw)) + _chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
) -> str:
    """An SVG of named curves, each a sequence of (x, y); values that are not finite are left out.

    The y axis covers the curves but for their first fifth, whose points may fall outside and are then left out: the
    first steps of a training run would press everything else into one line.
    """
    curves = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    everything = [point for points in curves.values() for point in points]
    if not everything:
        return ""
    x_ticks = ticks(min(x for x, _ in everything), max(x for x, _ in everything))
    settled = [y for points in curves.values() for _, y in points[len(points) // 5 :]]
    y_ticks = ticks(min(settled), max(settled))
    to_x, to_y = _scale(x_ticks, LEFT, WIDTH - RIGHT), _scale(y_ticks, HEIGHT - BOTTOM, TOP)
    parts = _axes(x_ticks, y_ticks, x_label, y_label, percent)
    for i, curve in enumerate(curves.values()):
        points = [(x, y) for x, y in curve if y_ticks[0] <= y <= y_ticks[-1]]
        path = " ".join(f"{_at(to_x, x):.1f},{_at(to_y, y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="1.6"/>')
    return _svg(parts, y_label) + legend(list(curves))


def histogram(
    groups: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    bins: int = 40,
    mark: float | None = None,
) -> str:
    """An SVG of stacked counts of finite values per group; `mark` draws a vertical line (a threshold)."""
    values = [value for group in groups.values() for value in group if math.isfinite(value)]
    if not values:
        return ""
    x_ticks = ticks(min(values), max(values))
    low, high = x_ticks[0], x_ticks[-1]
    counts = {name: [0] * bins for name in groups}
    for name, group in groups.items():
        for value in group:
            if math.isfinite(value):
                counts[name][min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    stacked = [sum(column) for column in zip(*counts.values(), strict=True)]
    y_ticks = ticks(0, max(stacked))
    to_x, to_y = _scale(x_ticks, LEFT, WIDTH - RIGHT), _scale(y_ticks, HEIGHT - BOTTOM, TOP)
    parts = _axes(x_ticks, y_ticks, x_label, "samples", False)
    below = [0] * bins
    bar = (WIDTH - LEFT - RIGHT) / bins
    for i, column in enumerate(counts.values()):
        for k, count in enumerate(column):
            if count:
                top, bottom = _at(to_y, below[k] + count), _at(to_y, below[k])
                parts.append(
                    f'<rect x="{LEFT + k * bar:.1f}" y="{top:.1f}" width="{bar * 0.92:.1f}"'
                    f' height="{bottom - top:.1f}" fill="{COLOURS[i % len(COLOURS)]}"/>'
                )
                below[k] += count
    if mark is not None and low <= mark <= high:
        x = _at(to_x, mark)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" class="mark"/>')
    return _svg(parts, x_label) + legend(list(groups))


def legend(names: Sequence[str]) -> str:
    """Coloured names, in the charts' order."""
    items = (
        f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(items)}</div>'


def ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Round numbers, evenly spaced, from at or below `low` to at or above `high`; at least two."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / target
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(first, max(last, first + 1) + 1)]


def _scale(axis: Sequence[float], start: float, end: float) -> tuple[float, float, float, float]:
    return axis[0], axis[-1], start, end


def _at(scale: tuple[float, float, float, float], value: float) -> float:
    low, high, start, end = scale
    return start + (value - low) / (high - low) * (end - start)


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str, percent: bool) -> list[str]:
    to_x, to_y = _scale(x_ticks, LEFT, WIDTH - RIGHT), _scale(y_ticks, HEIGHT - BOTTOM, TOP)
    parts = []
    for value in y_ticks:
        y = _at(to_y, value)
        text = f"{100 * value:.4g}%" if percent else f"{value:.4g}"
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value in x_ticks:
        x, y = _at(to_x, value), HEIGHT - BOTTOM + 16
        parts += [f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{value:.4g}</text>']
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{middle_x:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    place = f'x="12" y="{middle_y:.0f}" transform="rotate(-90 12 {middle_y:.0f})"'
    parts.append(f'<text {place} text-anchor="middle">{escape(y_label)}</text>')
    return parts


def _svg(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
