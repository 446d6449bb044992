"""A selection as one HTML page: what was kept, by which scores, and which samples these are."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from lrds_fast.picture import png
from lrds_fast.selection.table import Pictures, Selection

#: Pictures of each kind.
_GALLERY = 24
#: Samples that agreement is measured on, at most: ranks of more tell nothing new.
_RANKED = 200_000

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.15rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
    "svg{width:100%;height:9rem}td svg{width:14rem;height:1.6rem;vertical-align:middle}"
    ".kept{fill:#2a6fb0}.denied{fill:#d9822b}h2{margin-top:2rem;font-size:1.1rem}"
    ".pictures{display:flex;flex-wrap:wrap;gap:.6rem}figure{margin:0;width:6.4rem;font-size:12px;line-height:1.3}"
    "figure img{width:6.4rem;height:6.4rem;object-fit:contain;image-rendering:pixelated;background:#eee}"
)


def page(selection: Selection, pictures: Pictures | None, class_names: Sequence[str] | None) -> str:
    """The page's HTML; arguments as Selection.report's."""
    kept, total = int(selection.mask.sum()), len(selection)
    rule = ", ".join(
        f"{name} = {_text(value)}"
        for name, value in selection.policy.items()
        if value is not None and value is not False
    )
    by = str(selection.policy.get("by", ""))
    names = sorted(selection.scores, key=lambda name: name != by)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Selection</title>",
        f"<style>{_STYLE}</style><h1>{kept} of {total} samples keep the teacher</h1>",
        f"<p>{escape(rule)}</p><p>Blue: the teacher is kept. Orange: the label alone.</p>",
        *_teacher(selection),
    ]
    parts += [f"<h2>{escape(name)}</h2>{_histogram(selection.scores[name].double(), selection.mask)}" for name in names]
    parts += _agreement(selection, names)
    if by in selection.scores:
        parts += _extremes(selection, by, pictures, class_names)
    if selection.labels is not None:
        parts += _classes(selection, by, class_names)
    return "\n".join(parts) + "\n"


def _text(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _teacher(selection: Selection) -> list[str]:
    """How often the teacher is right, among the kept and the denied."""
    if selection.labels is None or selection.teacher_pred is None or not len(selection):
        return []
    right = selection.teacher_pred == selection.labels
    shares = []
    for what, rows in (("kept", selection.mask), ("denied", ~selection.mask)):
        if rows.any():
            shares.append(f"on {float(right[rows].double().mean()):.1%} of the {what}")
    return [f"<p>The teacher's top class is the label {', '.join(shares)}.</p>"]


def _agreement(selection: Selection, names: Sequence[str]) -> list[str]:
    """Tables of rank correlations and of overlaps between the sets of D_t's size with the lowest scores."""
    step = -(-len(selection) // _RANKED) or 1
    columns = {name: selection.scores[name].double()[::step] for name in names}
    columns = {k: v for k, v in columns.items() if len(v) > 1 and v.isfinite().all() and v.min() < v.max()}
    if len(columns) < 2:
        return []
    ranks = torch.stack([_ranks(values) for values in columns.values()])
    correlations = torch.corrcoef(ranks)
    size = int(selection.mask[::step].sum())
    largest = bool(selection.policy.get("largest"))
    lowest = torch.zeros(len(columns), ranks.shape[1], dtype=torch.bool)
    for row, values in zip(lowest, columns.values(), strict=True):
        row[values.argsort(stable=True, descending=largest)[:size]] = True
    both = lowest.double() @ lowest.double().T
    overlaps = both / max(size, 1)
    end = "highest" if largest else "lowest"
    return [
        "<h2>Agreement between scores</h2><p>Rank correlation (Spearman).</p>",
        _matrix(list(columns), correlations, "{:.2f}"),
        f"<p>Of the {size} samples with the {end} values of one score, the share that is also among those of the"
        " other.</p>",
        _matrix(list(columns), overlaps, "{:.0%}"),
    ]


def _ranks(values: Tensor) -> Tensor:
    """(N,) float64 ranks, equal values sharing their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    middle: Tensor = ends - (counts.double() - 1) / 2
    return middle[inverse]


def _matrix(names: Sequence[str], values: Tensor, form: str) -> str:
    head = "".join(f"<th>{escape(name)}" for name in names)
    rows = []
    for name, row in zip(names, values.tolist(), strict=True):
        cells = "".join(
            f'<td style="background:rgba({"42,111,176" if value >= 0 else "217,130,43"},{abs(value) * 0.6:.2f})">'
            + form.format(value)
            for value in row
        )
        rows.append(f"<tr><th>{escape(name)}{cells}")
    return f"<table><tr><th>{head}{''.join(rows)}</table>"


def _extremes(selection: Selection, by: str, pictures: Pictures | None, class_names: Sequence[str] | None) -> list[str]:
    """The samples at both ends of the score that decided."""
    score = selection.scores[by].double()
    finite = score.isfinite().nonzero()[:, 0]
    order = finite[score[finite].argsort(stable=True, descending=bool(selection.policy.get("largest")))]
    count = min(_GALLERY, len(order) // 2)
    if not count:
        return []
    ends = (("Most helpful teacher", order[:count]), ("Most harmful teacher", order.flip(0)[:count]))
    parts = []
    for title, rows in ends:
        parts.append(f"<h2>{title}, by {escape(by)}</h2><div class=pictures>")
        for index in rows.tolist():
            image = "" if pictures is None else f'<img src="{_png(pictures, index)}" alt="sample {index}">'
            parts.append(
                f"<figure>{image}<figcaption>{_caption(selection, index, score, class_names)}</figcaption></figure>"
            )
        parts.append("</div>")
    return parts


def _caption(selection: Selection, index: int, score: Tensor, class_names: Sequence[str] | None) -> str:
    lines = [f"#{index}: {float(score[index]):.4g}"]
    if selection.labels is not None:
        lines.append(f"label {_class(int(selection.labels[index]), class_names)}")
    if selection.teacher_pred is not None:
        lines.append(f"teacher {_class(int(selection.teacher_pred[index]), class_names)}")
    return "<br>".join(lines)


def _class(label: int, class_names: Sequence[str] | None) -> str:
    return escape(class_names[label]) if class_names is not None and 0 <= label < len(class_names) else str(label)


def _png(pictures: Pictures, index: int) -> str:
    """A sample's picture as a data: URI."""
    item: Any = pictures(index) if callable(pictures) else pictures[index]
    if isinstance(item, (tuple, list)):
        item = item[0]
    if hasattr(item, "convert"):  # a PIL image
        import numpy as np

        item = torch.from_numpy(np.array(item.convert("L" if item.mode in ("1", "L") else "RGB")))
    picture = torch.as_tensor(item).detach().cpu()
    if picture.dim() == 2:
        picture = picture[..., None]
    if picture.dim() == 3 and picture.shape[2] not in (1, 3) and picture.shape[0] in (1, 3):
        picture = picture.permute(1, 2, 0)
    if picture.dim() != 3 or picture.shape[2] not in (1, 3):
        raise ValueError(
            f"pictures must give (H, W), (H, W, 1 or 3) or (1 or 3, H, W); got {tuple(picture.shape)} for {index}"
        )
    if picture.dtype != torch.uint8:
        low, high = float(picture.min()), float(picture.max())
        picture = ((picture.double() - low) / ((high - low) or 1.0) * 255).round().to(torch.uint8)
    return png(picture)


def _classes(selection: Selection, by: str, class_names: Sequence[str] | None) -> list[str]:
    """Every class's share of D_t, and its histogram of the score that decided, all on one axis."""
    assert selection.labels is not None
    head = "<h2>Classes</h2><table><tr><th>class<th>samples<th>kept<th>share"
    score = selection.scores[by].double() if by in selection.scores else None
    ends: tuple[float, float] | None = None
    if score is not None and score.isfinite().any():
        # Without the last half per cent at either side: one sample would press all others into one bar.
        finite = score[score.isfinite()].sort().values
        cut = len(finite) // 200
        ends = (float(finite[cut]), float(finite[-1 - cut]))
        head += f"<th>{escape(by)}, {ends[0]:.3g} to {ends[1]:.3g} (what lies beyond at the ends)"
    parts = [head]
    for label in torch.unique(selection.labels).tolist():
        rows = selection.labels == label
        size, inside = int(rows.sum()), int((rows & selection.mask).sum())
        cells = f"<tr><td>{_class(label, class_names)}<td>{size}<td>{inside}<td>{inside / size:.0%}"
        if score is not None and ends is not None:
            own = rows & score.isfinite()
            cells += f"<td>{_bars(score[own].clamp(*ends), selection.mask[own], 30, *ends)}"
        parts.append(cells)
    return [*parts, "</table>"]


def _histogram(score: Tensor, mask: Tensor, bins: int = 60) -> str:
    """Stacked bars over the finite values, with the ends of the axis in text."""
    finite = score.isfinite()
    values, kept = score[finite], mask[finite]
    if not len(values):
        return "<p>No finite value.</p>"
    low, high = float(values.min()), float(values.max())
    left_out = f"; {int((~finite).sum())} infinite or NaN left out" if not finite.all() else ""
    return f"{_bars(values, kept, bins, low, high)}<p>from {low:.4g} to {high:.4g}{left_out}</p>"


def _bars(values: Tensor, kept: Tensor, bins: int, low: float, high: float) -> str:
    """An SVG of counts between low and high, the kept below the denied."""
    place = ((values - low) / ((high - low) or 1.0) * bins).long().clamp(0, bins - 1)
    below = torch.bincount(place[kept], minlength=bins)
    above = torch.bincount(place[~kept], minlength=bins)
    scale = 100.0 / max(int((below + above).max()), 1)
    bars = []
    for i, (k, d) in enumerate(zip(below.tolist(), above.tolist(), strict=True)):
        for cls, count, base in (("kept", k, 0), ("denied", d, k)):
            if count:
                top = 100 - (base + count) * scale
                bars.append(f'<rect class={cls} x={i} y="{top:.2f}" width=.92 height="{count * scale:.2f}" />')
    return f'<svg viewBox="0 0 {bins} 100" preserveAspectRatio=none>{"".join(bars)}</svg>'
