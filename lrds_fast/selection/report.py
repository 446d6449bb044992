"""A selection as one HTML page: how many samples were kept, by which scores, and which samples they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lrds_fast.influence.scores import ERROR_SUFFIX
from lrds_fast.pages import Figure, Gallery, Section, Table, charts, page, png

if TYPE_CHECKING:
    from lrds_fast.selection.table import Pictures, Selection

#: Pictures per gallery.
_GALLERY = 24
#: The most samples that the agreement of scores is measured on.
_RANKED = 200_000
#: The most classes in a chart.
_CLASSES = 40


def selection_page(selection: Selection, pictures: Pictures | None, class_names: Sequence[str] | None) -> str:
    """The page's HTML; arguments as Selection.report's."""
    kept, total = int(selection.mask.sum()), len(selection)
    rule = ", ".join(
        f"{name} = {_text(value)}"
        for name, value in selection.policy.items()
        if value is not None and value is not False
    )
    by = str(selection.policy.get("by", ""))
    names = sorted((name for name in selection.scores if not name.endswith(ERROR_SUFFIX)), key=lambda name: name != by)
    sections = [_score(selection, name) for name in names]
    sections += _agreement(selection, names)
    if by in selection.scores:
        sections += _extremes(selection, by, pictures, class_names)
    if selection.labels is not None and total:
        sections.append(_classes(selection, by, class_names))
    return page(f"{kept} of {total} samples keep the teacher", sections, [f"{rule}.", *_teacher(selection)])


def _text(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _teacher(selection: Selection) -> list[str]:
    """A sentence on how often the teacher is right, on the kept and on the denied samples."""
    if selection.labels is None or selection.teacher_pred is None or not len(selection):
        return []
    right = selection.teacher_pred == selection.labels
    shares = []
    for what, rows in (("kept", selection.mask), ("denied", ~selection.mask)):
        if rows.any():
            shares.append(f"on {float(right[rows].double().mean()):.1%} of the {what}")
    return [f"The teacher's top class is the label {', '.join(shares)}."]


def threshold(selection: Selection) -> float | None:
    """The value of the deciding score that separates the kept from the denied samples.

    The policy's threshold, else the middle between the two sides; None where the sides overlap (a share per class,
    hysteresis) or one is empty.
    """
    of_policy = selection.policy.get("threshold")
    if isinstance(of_policy, (int, float)):
        return float(of_policy)
    score = selection.scores.get(str(selection.policy.get("by")))
    if score is None or selection.mask.all() or not selection.mask.any():
        return None
    sides = score[selection.mask].double(), score[~selection.mask].double()
    low, high = reversed(sides) if selection.policy.get("largest") else sides
    ends = float(low.max()), float(high.min())
    return sum(ends) / 2 if ends[0] <= ends[1] else None


def standard_error(selection: Selection, name: str) -> Tensor | None:
    """(N,) the standard error of each sample's score; None where it was not stored."""
    return selection.scores.get(f"{name}{ERROR_SUFFIX}")


def score_figures(selection: Selection, prefix: str = "", name: str = "") -> list[str]:
    """SVGs of a score: its histogram for kept and denied samples and, where standard errors are known, scores with
    their standard errors by rank; [] without a finite value.

    prefix: of the charts' titles. name: of the score; "" for the one that decided.
    """
    by = str(selection.policy.get("by"))
    name = name or by
    score = selection.scores.get(name)
    if score is None or not score.isfinite().any():
        return []
    decided = name == by
    confidence = selection.policy.get("confidence") if decided else None
    width = float(confidence) if isinstance(confidence, (int, float)) else 1.96
    groups = {kept: score[selection.mask == kept].tolist() for kept in (True, False)}
    cut = threshold(selection) if decided else None
    chart = charts.histogram(
        {str(kept): values for kept, values in groups.items()},
        {str(kept): style for kept, style in charts.KEPT.items()},
        x_label=name,
        threshold=cut,
    )
    figures = [charts.svg(chart, f"{prefix}samples by {name}")]
    error = standard_error(selection, name)
    if error is not None:
        chart = charts.ranked(
            score.tolist(),
            error.tolist(),
            selection.mask.tolist(),
            charts.KEPT,
            y_label=name,
            width=width,
            threshold=cut if cut is not None or confidence is None else 0.0,
        )
        figures.append(charts.svg(chart, f"{prefix}{name} with standard errors, by rank"))
    return figures


_LEGEND = [("keeps the teacher", charts.KEPT[True]), ("label alone", charts.KEPT[False])]


def _score(selection: Selection, name: str) -> Section:
    score = selection.scores[name].double()
    finite = score.isfinite()
    if not finite.any():
        return Section(name, ["No finite value."])
    text = f"From {float(score[finite].min()):.4g} to {float(score[finite].max()):.4g}"
    left_out = f"; {int((~finite).sum())} infinite or NaN left out" if not finite.all() else ""
    figures = [Figure(svg, "") for svg in score_figures(selection, name=name)]
    return Section(name, legend=_LEGEND, figures=figures, notes=[f"{text}{left_out}."])


class Overlap(NamedTuple):
    """How far two selections of the same samples agree.

    kept: the mean share that they keep. jaccard: samples that both keep over samples that at least one keeps. chance:
    the Jaccard index of independent selections of these sizes. kappa: Cohen's kappa, nan where one selection keeps all
    samples or none.
    """

    kept: float
    jaccard: float
    chance: float
    kappa: float


def overlap(one: Tensor, other: Tensor) -> Overlap:
    """The overlap of two masks, (N,) bool each, N > 0."""
    p, q = float(one.double().mean()), float(other.double().mean())
    both, either = float((one & other).double().mean()), float((one | other).double().mean())
    agreed, expected = 1 - (either - both), p * q + (1 - p) * (1 - q)
    return Overlap(
        (p + q) / 2,
        both / either if either else float("nan"),
        p * q / (p + q - p * q) if p + q else float("nan"),
        (agreed - expected) / (1 - expected) if 0 < p < 1 and 0 < q < 1 else float("nan"),
    )


def _agreement(selection: Selection, names: Sequence[str]) -> list[Section]:
    """Tables of rank correlations between scores, and of overlaps between what each would keep at D_t's size."""
    step = -(-len(selection) // _RANKED) or 1
    columns = {name: selection.scores[name].double()[::step] for name in names}
    columns = {k: v for k, v in columns.items() if len(v) > 1 and v.isfinite().all() and v.min() < v.max()}
    if len(columns) < 2:
        return []
    ranks = torch.stack([_ranks(values) for values in columns.values()])
    size = int(selection.mask[::step].sum())
    largest = bool(selection.policy.get("largest"))
    lowest = torch.zeros(len(columns), ranks.shape[1], dtype=torch.bool)
    for row, values in zip(lowest, columns.values(), strict=True):
        row[values.argsort(stable=True, descending=largest)[:size]] = True
    overlaps = lowest.double() @ lowest.double().T / max(size, 1)
    end = "highest" if largest else "lowest"

    def table(values: Tensor, form: str, caption: str) -> Table:
        rows = [[name, *(form.format(v) for v in row)] for name, row in zip(columns, values.tolist(), strict=True)]
        return Table(["", *columns], rows, caption)

    shared = f"Of the {size} samples with the {end} values of one score, the share that is among those of the other"
    tables = [
        table(torch.corrcoef(ranks), "{:.2f}", "Rank correlation (Spearman)"),
        table(overlaps, "{:.0%}", shared),
    ]
    return [Section("Agreement between scores", tables=tables)]


def _ranks(values: Tensor) -> Tensor:
    """(N,) float64 ranks; equal values have their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    middle: Tensor = ends - (counts.double() - 1) / 2
    return middle[inverse]


def _extremes(
    selection: Selection, by: str, pictures: Pictures | None, class_names: Sequence[str] | None
) -> list[Section]:
    """Galleries of the samples with the lowest and the highest values of the deciding score."""
    score = selection.scores[by].double()
    finite = score.isfinite().nonzero()[:, 0]
    order = finite[score[finite].argsort(stable=True, descending=bool(selection.policy.get("largest")))]
    count = min(_GALLERY, len(order) // 2)
    if not count:
        return []
    galleries = []
    for title, rows in (("Most helpful teacher", order[:count]), ("Most harmful teacher", order.flip(0)[:count])):
        shown = [
            ("" if pictures is None else _png(pictures, index), _caption(selection, index, score, class_names))
            for index in rows.tolist()
        ]
        galleries.append(Gallery(f"{title}, by {by}", "", shown))
    return [Section("Samples", galleries=galleries)]


def _caption(selection: Selection, index: int, score: Tensor, class_names: Sequence[str] | None) -> list[str]:
    error = standard_error(selection, str(selection.policy.get("by")))
    lines = [f"#{index}: {float(score[index]):.4g}" + (f" ± {float(error[index]):.2g}" if error is not None else "")]
    if selection.labels is not None:
        lines.append(f"label {_class(int(selection.labels[index]), class_names)}")
    if selection.teacher_pred is not None:
        lines.append(f"teacher {_class(int(selection.teacher_pred[index]), class_names)}")
    return lines


def _class(label: int, class_names: Sequence[str] | None) -> str:
    return class_names[label] if class_names is not None and 0 <= label < len(class_names) else str(label)


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
    return png(picture.contiguous().numpy())


def _classes(selection: Selection, by: str, class_names: Sequence[str] | None) -> Section:
    """Every class's share of D_t, and the spread of the deciding score in it."""
    assert selection.labels is not None
    rows, shares, members = [], {}, {}
    for label in torch.unique(selection.labels).tolist():
        members[label] = selection.labels == label
        size, inside = int(members[label].sum()), int((members[label] & selection.mask).sum())
        shares[label] = inside / size
        rows.append([_class(label, class_names), str(size), str(inside), f"{inside / size:.0%}"])
    tables = [Table(["class", "samples", "kept", "share"], rows, "All classes", folded=len(rows) > _CLASSES)]
    score = selection.scores.get(by)
    if score is None or not score.isfinite().any():
        return Section("Classes", tables=tables)
    order = sorted(shares, key=lambda label: (shares[label], label))
    text = []
    if len(order) > _CLASSES:
        order = order[: _CLASSES // 2] + order[-_CLASSES // 2 :]
        half = _CLASSES // 2
        text = [f"Shown: the {half} classes with the smallest kept share and the {half} with the largest."]
    chart = charts.spreads(
        {_class(label, class_names): score[members[label]].tolist() for label in order},
        charts.KEPT[True],
        x_label=by,
        threshold=threshold(selection),
    )
    caption = "Sorted by the kept share. Thin: 5% to 95% of the class; thick: the middle half; dot: the median."
    return Section("Classes", text, figures=[Figure(charts.svg(chart, f"{by} by class"), caption)], tables=tables)
