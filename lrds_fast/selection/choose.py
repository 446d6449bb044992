"""From scores to a selection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lrds_fast._numbers import number
from lrds_fast._version import __version__
from lrds_fast.influence import Scores
from lrds_fast.influence.scores import ERROR_SUFFIX
from lrds_fast.selection.joint import least_sum
from lrds_fast.selection.table import (
    ARROW_FLOATS,
    RESERVED,
    Selection,
    dataset_fingerprint,
    fingerprint_of,
    label_tensor,
)


def select(
    scores: Scores | Mapping[str, Tensor],
    by: str = "kd_gain",
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    confidence: float | None = None,
    outliers: float | None = None,
    max_drop: float = 1.0,
    per_class: bool = False,
    largest: bool = False,
    leave: float | None = None,
    previous: Selection | Tensor | None = None,
    labels: Tensor | Sequence[int] | None = None,
    dataset: object = None,
) -> Selection:
    """Chooses the samples that keep their teacher: those with the lowest `by` score.

    scores: Scores, or a mapping from names to (N,) values. by: the score to go by.
    Exactly one of
        confidence: z >= 0; a sample loses its teacher only where score > z * its standard error, and, of the N samples,
            only if it is among the floor(max_drop * N + 0.5) with the highest score (ties to the higher index). The
            error is Scores.standard_error[by], or the entry "<by>_standard_error" of a plain mapping; kd_gain has one.
            The recipes have confidence=2, max_drop=0.1 (docs/benchmarks/method.md). With per_class=True max_drop is a
            share of every class.
        outliers: k >= 0; a sample loses its teacher only where score > median + k * 1.4826 * MAD, MAD the median
            absolute deviation of all N scores from their median, and max_drop as above. For normal scores 1.4826 * MAD
            is the standard deviation. Where the MAD is 0, as of a score that is 0 for most samples, there is no such
            limit, and scores above the median are an error. Not by class.
        ratio: in [0, 1]; keeps the floor(ratio * N + 0.5) lowest, ties to the lower index. per_class=True keeps that
            share of every class instead.
        threshold: keeps score < threshold, strictly. On kd_gain, 0 denies the teacher to about half of the samples,
            most of whose gains differ from 0 by noise alone. On mismatch, a probability, it is 0.5.
    largest=True: high scores keep the teacher. ratio keeps the highest, threshold keeps score > threshold, confidence
        denies score < -z * its standard error, outliers deny score < median - k * 1.4826 * MAD.
    leave, previous: hysteresis for scores that are taken again and again. What `previous` (a Selection, or (N,) bool)
        kept stays until score > leave * its standard error (leave >= confidence), score > median + leave * 1.4826 * MAD
        (leave >= outliers), it is out of the lowest `leave` share (leave >= ratio), or its score is >= leave (leave >=
        threshold; <= with largest). What it left out must meet confidence, outliers, ratio or threshold itself.
        Without a previous selection, as at the first scoring, leave changes nothing.
    labels: (N,) class indices, needed for per_class where scores is a plain mapping.
    dataset: what the selection is for: a fingerprint (see dataset_fingerprint), or an object that has a `fingerprint`,
        or `targets` and (for a plain mapping of scores) `classes`. Scores know theirs; if both are given they must
        agree.

    Deterministic. Raises ValueError or TypeError naming the argument; a NaN score is an error that names the sample.
    """
    columns = _columns(scores, by)
    ratio, threshold, confidence, outliers = _checked_budget(ratio, threshold, confidence, outliers)
    max_drop = _checked_share("max_drop", max_drop)
    if confidence is None and outliers is None and max_drop != 1.0:
        raise ValueError(f"max_drop goes with confidence and outliers; got max_drop={max_drop} without them")
    if outliers is not None and per_class:
        raise ValueError("outliers are those of all samples together: leave per_class out, or use confidence or ratio")
    table = {name: _score_tensor(name, values) for name, values in columns.items()}
    size = len(table[by])
    for name, values in table.items():
        if len(values) != size:
            raise ValueError(f"every score must have the {size} samples of {by!r}; {name!r} has {len(values)}")
    score = table[by].double()
    if score.isnan().any():
        raise ValueError(f"score {by!r} is NaN at sample {int(score.isnan().nonzero()[0, 0])}; score again without it")

    y, teacher_pred, num_classes, fingerprint, meta = _facts(scores, labels, dataset, size)
    if per_class and y is None:
        raise ValueError("per_class=True needs labels=, the class of each sample, where scores is a plain mapping")

    groups = [torch.arange(size)]
    if per_class and threshold is None and y is not None:
        groups = [(y == label).nonzero()[:, 0] for label in torch.unique(y)]
    if leave is not None:
        leave = _checked_leave(leave, ratio, threshold, confidence, outliers, largest)
    held = None if leave is None else _previous_mask(previous, size, fingerprint)
    multiple = confidence if outliers is None else outliers
    if multiple is not None:
        bad = -score if largest else score
        bad, error = (bad, _standard_error(by, table)) if outliers is None else _robust(by, bad)
        limits = torch.full_like(score, multiple)
        if held is not None and leave is not None:
            limits[held] = leave
        mask = ~_harmed(bad, error, limits, groups, max_drop)
    else:
        mask = _kept(score, groups, ratio, threshold, largest)
        if held is not None:
            share, limit = (leave, None) if threshold is None else (None, leave)
            mask = mask | (held & _kept(score, groups, share, limit, largest))
    if leave is None and previous is not None:
        raise ValueError("previous needs leave=, the limit at which its samples leave")
    return Selection(
        mask=mask,
        scores=table,
        labels=y,
        teacher_pred=teacher_pred,
        policy={
            "by": by,
            "ratio": ratio,
            "threshold": threshold,
            **({} if confidence is None else {"confidence": confidence, "max_drop": max_drop}),
            **({} if outliers is None else {"outliers": outliers, "max_drop": max_drop}),
            "per_class": per_class,
            "largest": largest,
            **({} if leave is None else {"leave": leave}),
        },
        fingerprint=fingerprint,
        num_classes=num_classes,
        meta={**meta, "library_version": __version__},
    )


def select_jointly(
    shift: Tensor,
    *,
    ratio: float,
    per_class: bool = False,
    scores: Scores | Mapping[str, Tensor] | None = None,
    labels: Tensor | Sequence[int] | None = None,
    dataset: object = None,
) -> Selection:
    """Chooses whom to deny the teacher so that the student's optimum moves as little as possible: |sum S_i| small.

    Ranking by each sample's own shift overlooks that shifts cancel; here the denied are chosen together, as Yang et al.
    2023 (arXiv:2205.09329) prune data sets: minimise |sum_i w_i S_i| over w in {0, 1}^N with as many ones as are
    denied. By projected gradient, rounding that balances errors, and swaps; not certain to be the minimum.

    shift: (N, k) floating, influence.set_shift. ratio: in [0, 1]; floor(ratio * N + 0.5) samples keep the teacher,
    with per_class=True that share of every class. scores: to be kept in the selection's table. labels, dataset: as in
    select; labels are needed for per_class unless scores are Scores.
    The selection's table has `set_shift`, |S_i|; its policy the length of the denied samples' sum, `residual`, and what
    denying as many at random has on average (root mean square), `residual_of_random`.

    Deterministic. Raises ValueError or TypeError naming the argument, and the sample whose shift is not finite.
    """
    if not isinstance(shift, Tensor) or shift.dim() != 2 or not shift.is_floating_point() or shift.shape[1] == 0:
        found = tuple(shift.shape) if isinstance(shift, Tensor) else type(shift).__name__
        raise ValueError(f"shift must be a floating tensor (N, k) with k >= 1; got {found}")
    shift = shift.detach().cpu()
    shift = shift if shift.dtype == torch.float64 else shift.float()
    bad = (~shift.isfinite()).any(dim=1).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"shift is not finite at sample {int(bad[0])}; score again without it")
    if scores is not None and not isinstance(scores, Mapping):
        raise TypeError(f"scores must be Scores or a mapping from names to tensors; got {type(scores).__name__}")
    checked = _checked_share("ratio", ratio)
    size = len(shift)
    table = {name: _score_tensor(name, values) for name, values in (scores or {}).items()}
    for name, values in table.items():
        if len(values) != size:
            raise ValueError(f"every score must have shift's {size} samples; {name!r} has {len(values)}")
    y, teacher_pred, num_classes, fingerprint, meta = _facts(scores or {}, labels, dataset, size)
    if per_class and y is None:
        raise ValueError("per_class=True needs labels=, the class of each sample, or scores= of type Scores")
    groups, sizes = None, [size]
    if per_class and y is not None:
        known, groups = torch.unique(y, return_inverse=True)
        sizes = torch.bincount(groups, minlength=len(known)).tolist()
    counts = [count - math.floor(checked * count + 0.5) for count in sizes]
    denied = least_sum(shift, counts, groups)
    return Selection(
        mask=~denied,
        scores={**table, "set_shift": shift.norm(dim=1)},
        labels=y,
        teacher_pred=teacher_pred,
        policy={
            "by": "set_shift",
            "ratio": checked,
            "per_class": per_class,
            "joint": True,
            "residual": float(shift[denied].double().sum(dim=0).norm()),
            "residual_of_random": _random_residual(shift, counts, groups),
        },
        fingerprint=fingerprint,
        num_classes=num_classes,
        meta={**meta, "library_version": __version__},
    )


def _random_residual(shift: Tensor, counts: Sequence[int], groups: Tensor | None) -> float:
    """sqrt(E |sum over the denied of S_i|^2), so many of each group drawn without replacement."""
    mean, variance = shift.new_zeros(shift.shape[1], dtype=torch.float64), 0.0
    for group, count in enumerate(counts):
        rows = (shift if groups is None else shift[groups == group]).double()
        size = len(rows)
        mean += count / max(size, 1) * rows.sum(dim=0)
        if size > 1:
            spread = float((rows - rows.mean(dim=0)).square().sum()) / (size - 1)
            variance += count * (size - count) / size * spread
    return math.sqrt(float(mean.square().sum()) + variance)


def _kept(
    score: Tensor, groups: Sequence[Tensor], ratio: float | None, threshold: float | None, largest: bool
) -> Tensor:
    """(N,) bool: the lowest share of every group, or what is below the threshold."""
    if threshold is not None:
        return score > threshold if largest else score < threshold
    mask = torch.zeros(len(score), dtype=torch.bool)
    for group in groups:
        order = group[torch.argsort(score[group], stable=True, descending=largest)]
        mask[order[: math.floor((ratio or 0.0) * len(group) + 0.5)]] = True
    return mask


def _columns(scores: Scores | Mapping[str, Tensor], by: str) -> dict[str, Tensor]:
    """The scores by name, and their standard errors as `<name>_standard_error`.

    TypeError for scores that are no mapping, ValueError where they have no `by`.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores must be Scores or a mapping from names to tensors; got {type(scores).__name__}")
    if by not in scores:
        raise ValueError(f"by must be one of the computed scores, {', '.join(map(str, scores))}; got {by!r}")
    errors = scores.standard_error if isinstance(scores, Scores) else {}
    return {**scores, **{name + ERROR_SUFFIX: error for name, error in errors.items()}}


def _harmed(score: Tensor, error: Tensor, limits: Tensor, groups: Sequence[Tensor], max_drop: float) -> Tensor:
    """(N,) bool: score > limit * error, and among the highest max_drop share of the group."""
    worst = torch.zeros(len(score), dtype=torch.bool)
    for group in groups:
        order = group[torch.argsort(score[group], stable=True)]
        worst[order[len(order) - math.floor(max_drop * len(group) + 0.5) :]] = True
    return worst & (score > limits * error)


# The standard deviation of a normal distribution by its median absolute deviation.
_NORMAL_MAD = 1.4826


def _robust(by: str, score: Tensor) -> tuple[Tensor, Tensor]:
    """How far the scores (N,) lie above their median, and their robust standard deviation, as (N,) both.

    ValueError where either is not finite, or the deviation is 0 and yet scores lie above the median.
    """
    if not len(score):
        return score, score
    away = score - _median(score)
    deviation = _NORMAL_MAD * _median(away.abs())
    if not deviation.isfinite():
        raise ValueError(f"outliers needs a score that is finite for more than half of the samples; {by!r} is not")
    if deviation == 0 and (away > 0).any():
        raise ValueError(
            f"outliers: the median absolute deviation of {by!r} is 0, half of the samples have the same score: use"
            " threshold"
        )
    return away, deviation.expand_as(away)


def _median(values: Tensor) -> Tensor:
    """The middle value, or the mean of the two."""
    ordered = values.sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _standard_error(by: str, table: Mapping[str, Tensor]) -> Tensor:
    """(N,) float64. ValueError where the scores have none for `by`, or it is not finite or negative."""
    error = table.get(by + ERROR_SUFFIX)
    if error is None:
        raise ValueError(
            f"confidence needs the standard error of {by!r}: kd_gain has one where it was computed with folds > 0 and"
            f" at least 2 held-out samples; a plain mapping needs the entry {by + ERROR_SUFFIX!r}"
        )
    error = error.double()
    bad = (~(error.isfinite() & (error >= 0))).nonzero()[:, 0]
    if len(bad):
        sample = int(bad[0])
        raise ValueError(
            f"{by + ERROR_SUFFIX!r} must be finite and >= 0; got {float(error[sample])} at sample {sample}"
        )
    return error


def shrinkage_weights(scores: Scores | Mapping[str, Tensor], by: str = "kd_gain") -> Tensor:
    """How likely each sample's teacher is to help: P(true score < 0), (N,) float32 on the CPU, for `selected=`.

    Sample i's true score is drawn from N(m, t^2), and its estimate from N(true score, error_i^2). m and t^2 have the
    maximum likelihood over all samples; given the estimate, the true score is normal with mean m + b_i (score_i - m)
    and variance b_i error_i^2, b_i = t^2 / (t^2 + error_i^2). The larger its error, the more a score is moved towards
    the mean of all. With an error of 0 the weight is 1 below 0, 1/2 at 0, 0 above. No default: with good teachers these
    weights cost accuracy (docs/benchmarks/method.md).

    scores, by: as in select with confidence. Raises ValueError or TypeError as select does. Source: Efron and Morris,
    "Data analysis using Stein's estimator and its generalizations", 1975.
    """
    columns = _columns(scores, by)
    table = {name: _score_tensor(name, columns[name]) for name in (by, by + ERROR_SUFFIX) if name in columns}
    score, variance = table[by].double(), _standard_error(by, table).square()
    bad = (~score.isfinite()).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"score {by!r} is not finite at sample {int(bad[0])}; score again without it")
    if len(score) == 0:
        return score.float()
    mean, spread = _prior(score, variance)
    total = variance + spread
    share = torch.where(total > 0, spread / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
    posterior = mean + share * (score - mean)
    deviation = (share * variance).sqrt()
    # 0 / 0, a true score that is certainly 0, helps as much as it harms.
    z = torch.where(posterior == 0, 0.0, posterior / deviation)
    weights: Tensor = torch.special.ndtr(-z).float()
    return weights


def _prior(score: Tensor, variance: Tensor) -> tuple[float, float]:
    """m and t^2 of the greatest likelihood of score_i ~ N(m, t^2 + variance_i), by bisection on its slope in t^2."""

    def at(spread: float) -> tuple[float, float]:
        total = variance + spread
        if not (total > 0).all():
            return float(score[total <= 0].mean()), math.inf
        weight = 1 / total
        mean = float((weight * score).sum() / weight.sum())
        return mean, float((weight.square() * (score - mean).square() - weight).sum())

    low, high = 0.0, float((score - score.mean()).square().max())
    if high == 0 or at(0.0)[1] <= 0:
        return at(low)[0], low
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] > 0 else (low, middle)
    return at(high)[0], high


def _checked_leave(
    leave: float,
    ratio: float | None,
    threshold: float | None,
    confidence: float | None,
    outliers: float | None,
    largest: bool,
) -> float:
    """The limit at which the kept leave, on the far side of the one at which others enter."""
    leave = float(number("leave", leave))
    if confidence is not None and not leave >= confidence:
        raise ValueError(f"leave must be >= confidence, {confidence}; got {leave}")
    if outliers is not None and not leave >= outliers:
        raise ValueError(f"leave must be >= outliers, {outliers}; got {leave}")
    if ratio is not None and not ratio <= leave <= 1:
        raise ValueError(f"leave must lie in [ratio, 1], {ratio} to 1; got {leave}")
    if threshold is not None and not (leave <= threshold if largest else leave >= threshold):
        side = "<=" if largest else ">="
        raise ValueError(f"leave must be {side} threshold, {threshold}; got {leave}")
    return leave


def _previous_mask(previous: Selection | Tensor | None, size: int, fingerprint: str | None) -> Tensor | None:
    if previous is None:
        return None
    if isinstance(previous, Selection):
        if None not in (fingerprint, previous.fingerprint) and fingerprint != previous.fingerprint:
            raise ValueError("previous was made for another dataset than the scores")
        previous = previous.mask
    if not isinstance(previous, Tensor) or previous.dtype != torch.bool or previous.shape != (size,):
        raise ValueError(f"previous must be a Selection, or bool of shape ({size},)")
    return previous.cpu()


def _checked_budget(
    ratio: float | None, threshold: float | None, confidence: float | None, outliers: float | None
) -> tuple[float | None, float | None, float | None, float | None]:
    """Exactly one of them, as a float within its range."""
    if sum(value is not None for value in (ratio, threshold, confidence, outliers)) != 1:
        raise ValueError(
            "exactly one of confidence, outliers, ratio and threshold must be given; got"
            f" confidence={confidence}, outliers={outliers}, ratio={ratio}, threshold={threshold}"
        )
    ratio = None if ratio is None else _checked_share("ratio", ratio)
    threshold = None if threshold is None else float(number("threshold", threshold))
    confidence = None if confidence is None else float(number("confidence", confidence))
    if threshold is not None and math.isnan(threshold):
        raise ValueError(f"threshold must be a number; got {threshold!r}")
    if confidence is not None and not 0 <= confidence < math.inf:
        raise ValueError(f"confidence must be >= 0 and finite, in standard errors; got {confidence!r}")
    outliers = None if outliers is None else float(number("outliers", outliers))
    if outliers is not None and not 0 <= outliers < math.inf:
        raise ValueError(f"outliers must be >= 0 and finite, in robust standard deviations; got {outliers!r}")
    return ratio, threshold, confidence, outliers


def _checked_share(name: str, value: float) -> float:
    found = float(number(name, value))
    if not 0 <= found <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {found!r}")
    return found


def _facts(
    scores: Mapping[str, Tensor], labels: Tensor | Sequence[int] | None, dataset: object, size: int
) -> tuple[Tensor | None, Tensor | None, int | None, str | None, Mapping[str, object]]:
    """Labels, teacher predictions, C, fingerprint and meta, as far as scores, labels and dataset know them."""
    y = None if labels is None else label_tensor("labels", labels)
    if y is not None and len(y) != size:
        raise ValueError(f"labels must have one entry per sample, {size}; got {len(y)}")
    classes = scores.meta.get("num_classes") if isinstance(scores, Scores) else None
    num_classes = classes if isinstance(classes, int) else None
    wanted = None if dataset is None else fingerprint_of(dataset, num_classes)
    if not isinstance(scores, Scores):
        return y, None, None, wanted, {}
    target = scores.target.cpu()
    if y is not None and not torch.equal(y, target):
        raise ValueError("labels differ from scores.target; leave labels out, Scores carry their own")
    fingerprint = wanted if num_classes is None else dataset_fingerprint(target, num_classes)
    if wanted is not None and fingerprint != wanted:
        raise ValueError(
            f"scores were computed for another dataset (fingerprint {str(fingerprint)[:12]}; dataset's is"
            f" {wanted[:12]}); score this dataset"
        )
    return target, scores.teacher_pred.cpu(), num_classes, fingerprint, scores.meta


def _score_tensor(name: object, values: object) -> Tensor:
    """(N,) float32 or float64 on the CPU."""
    if not isinstance(name, str) or not name or name in RESERVED:
        raise ValueError(f"scores must have names other than {', '.join(RESERVED)}; got {name!r}")
    try:
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"score {name!r} must be a tensor of numbers; got {type(values).__name__}") from error
    if tensor.dim() != 1 or tensor.is_complex():
        raise ValueError(f"score {name!r} must be real with shape (N,); got {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.dtype not in ARROW_FLOATS:
        narrow = tensor.dtype in (torch.float16, torch.bfloat16)
        tensor = tensor.to(torch.float32 if narrow else torch.float64)
    return tensor
