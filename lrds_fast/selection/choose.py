"""From scores to a selection: sample by sample, or the samples without a teacher together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lrds_fast._version import __version__
from lrds_fast.influence import Scores
from lrds_fast.selection.columns import SampleFacts, default_score, sample_facts, score_columns, score_tensor
from lrds_fast.selection.joint import least_sum
from lrds_fast.selection.rule import Rule, checked_share, share_of
from lrds_fast.selection.table import Selection


def select(
    scores: Scores | Mapping[str, Tensor],
    by: str | None = None,
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

    scores: Scores, or a mapping from names to (N,) values. by: the name of the score that decides; None:
    teacher_harm where it was computed, else kd_gain.
    Exactly one of
        confidence: z >= 0; a sample loses its teacher only where score > z * its standard error, and only if it is
            among the floor(max_drop * N + 0.5) samples with the highest score (ties to the higher index). The standard
            error is Scores.standard_error[by], or the entry "<by>_standard_error" of a plain mapping; teacher_harm and
            kd_gain have one. Recipes use confidence=4, max_drop=0.1 (docs/benchmarks/method.md). With per_class=True
            max_drop is a share of every class.
        outliers: k >= 0; a sample loses its teacher only where score > median + k * 1.4826 * MAD, MAD the median
            absolute deviation of all N scores from their median, and max_drop as above. For normal scores 1.4826 * MAD
            is the standard deviation. Where the MAD is 0, as for a score that is 0 for most samples, scores above the
            median are an error. It cannot be combined with per_class.
        ratio: in [0, 1]; keeps the floor(ratio * N + 0.5) samples with the lowest score, ties to the lower index;
            per_class=True keeps that share of every class.
        threshold: keeps score < threshold, strictly. For kd_gain, 0 denies the teacher to about half of the samples,
            most of whose gains differ from 0 by noise alone. For mismatch, a probability, use 0.5.
    largest=True: high scores keep the teacher. ratio keeps the highest, threshold keeps score > threshold, confidence
        denies score < -z * its standard error, outliers deny score < median - k * 1.4826 * MAD.
    leave, previous: hysteresis for repeated scoring. A sample that `previous` (a Selection, or (N,) bool) kept loses
        its teacher only where score > leave * its standard error (leave >= confidence), score > median + leave * 1.4826
        * MAD (leave >= outliers), it is not in the lowest `leave` share (leave >= ratio), or score >= leave (leave >=
        threshold; <= with largest). A sample that `previous` left out must meet confidence, outliers, ratio or
        threshold itself. Without a previous selection, as at the first scoring, leave changes nothing.
    labels: (N,) class indices, needed for per_class where scores is a plain mapping.
    dataset: the dataset that the selection is for: a fingerprint (see dataset_fingerprint), or an object that has a
        `fingerprint`, or `targets` and (for a plain mapping of scores) `classes`. Scores know theirs; if both are given
        they must agree.

    Deterministic. Raises ValueError or TypeError naming the argument; a NaN score is an error that names the sample.
    """
    if by is None:
        by = default_score(scores)
    columns = score_columns(scores, by)
    rule = Rule(ratio, threshold, confidence, outliers, max_drop, per_class, largest, leave)
    table = {name: score_tensor(name, values) for name, values in columns.items()}
    size = len(table[by])
    for name, values in table.items():
        if len(values) != size:
            raise ValueError(f"every score must have the {size} samples of {by!r}; {name!r} has {len(values)}")
    nan = table[by].isnan().nonzero()[:, 0]
    if len(nan):
        raise ValueError(f"score {by!r} is NaN at sample {int(nan[0])}; score again without it")
    facts = sample_facts(scores, labels, dataset, size)
    if per_class and facts.labels is None:
        raise ValueError("per_class=True needs labels=, the class of each sample, where scores is a plain mapping")
    if leave is None and previous is not None:
        raise ValueError("previous needs leave=, the limit at which its samples leave")
    held = _previous_mask(previous, size, facts.fingerprint)
    return _selection(rule.mask(by, table, facts.labels, held), table, rule.policy(by), facts)


def _selection(
    mask: Tensor, table: Mapping[str, Tensor], policy: Mapping[str, object], facts: SampleFacts
) -> Selection:
    return Selection(
        mask=mask,
        scores=table,
        labels=facts.labels,
        teacher_pred=facts.teacher_pred,
        policy=policy,
        fingerprint=facts.fingerprint,
        num_classes=facts.num_classes,
        meta={**facts.meta, "library_version": __version__},
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
    """Chooses the samples without a teacher so that the student's optimum moves as little as possible: |sum S_i| small.

    Ranking samples by the length of their shift ignores that shifts cancel. Here they are chosen together, as Yang et
    al. 2023 (arXiv:2205.09329) prune data sets: minimise |sum_i w_i S_i| over w in {0, 1}^N with as many ones as there
    are samples without a teacher. Solved by projected gradient, rounding that balances errors, and swaps; the result
    need not be the minimum.

    shift: (N, k) floating, influence.set_shift. ratio: in [0, 1]; floor(ratio * N + 0.5) samples keep the teacher,
    with per_class=True that share of every class. scores: more columns for the selection's table. labels, dataset: as
    in select; labels are needed for per_class unless scores are Scores.
    The selection's table has `set_shift`, |S_i|. Its policy has `residual`, the length of the sum over the samples
    without a teacher, and `residual_of_random`, the root mean square of that length for as many random samples.

    Deterministic. Raises ValueError or TypeError naming the argument, and the sample whose shift is not finite.
    """
    if not isinstance(shift, Tensor) or shift.dim() != 2 or not shift.is_floating_point() or shift.shape[1] == 0:
        actual = tuple(shift.shape) if isinstance(shift, Tensor) else type(shift).__name__
        raise ValueError(f"shift must be a floating tensor (N, k) with k >= 1; got {actual}")
    shift = shift.detach().cpu()
    shift = shift if shift.dtype == torch.float64 else shift.float()
    bad = (~shift.isfinite()).any(dim=1).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"shift is not finite at sample {int(bad[0])}; score again without it")
    if scores is not None and not isinstance(scores, Mapping):
        raise TypeError(f"scores must be Scores or a mapping from names to tensors; got {type(scores).__name__}")
    ratio = checked_share("ratio", ratio)
    size = len(shift)
    table = {name: score_tensor(name, values) for name, values in (scores or {}).items()}
    for name, values in table.items():
        if len(values) != size:
            raise ValueError(f"every score must have shift's {size} samples; {name!r} has {len(values)}")
    facts = sample_facts(scores or {}, labels, dataset, size)
    if per_class and facts.labels is None:
        raise ValueError("per_class=True needs labels=, the class of each sample, or scores= of type Scores")
    groups, sizes = None, [size]
    if per_class and facts.labels is not None:
        classes, groups = torch.unique(facts.labels, return_inverse=True)
        sizes = torch.bincount(groups, minlength=len(classes)).tolist()
    counts = [count - share_of(ratio, count) for count in sizes]
    denied = least_sum(shift, counts, groups)
    policy = {
        "by": "set_shift",
        "ratio": ratio,
        "per_class": per_class,
        "joint": True,
        "residual": float(shift[denied].double().sum(dim=0).norm()),
        "residual_of_random": _random_residual(shift, counts, groups),
    }
    return _selection(~denied, {**table, "set_shift": shift.norm(dim=1)}, policy, facts)


def _random_residual(shift: Tensor, counts: Sequence[int], groups: Tensor | None) -> float:
    """sqrt(E |sum S_i|^2) over counts[g] samples of each group g, drawn without replacement."""
    mean, variance = shift.new_zeros(shift.shape[1], dtype=torch.float64), 0.0
    for group, count in enumerate(counts):
        rows = (shift if groups is None else shift[groups == group]).double()
        size = len(rows)
        mean += count / max(size, 1) * rows.sum(dim=0)
        if size > 1:
            spread = float((rows - rows.mean(dim=0)).square().sum()) / (size - 1)
            variance += count * (size - count) / size * spread
    return math.sqrt(float(mean.square().sum()) + variance)


def _previous_mask(previous: Selection | Tensor | None, size: int, fingerprint: str | None) -> Tensor | None:
    """(N,) bool on the CPU. ValueError for another size or, where both fingerprints are known, another dataset."""
    if previous is None:
        return None
    if isinstance(previous, Selection):
        if None not in (fingerprint, previous.fingerprint) and fingerprint != previous.fingerprint:
            raise ValueError("previous was made for another dataset than the scores")
        previous = previous.mask
    if not isinstance(previous, Tensor) or previous.dtype != torch.bool or previous.shape != (size,):
        raise ValueError(f"previous must be a Selection, or bool of shape ({size},)")
    return previous.cpu()
