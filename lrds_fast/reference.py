"""Every op of the library in plain PyTorch: the definition with which tests and benchmarks compare the kernels.

Nothing here is fast. Everything is differentiable, works under torch.func, and reads like the formulas of
docs/method.md. Symbols: z student logits, v teacher logits, y target class, T temperature, q = softmax(z / T),
p = softmax(v / T), p' the revised p. A divergence is one function from LogitRows to the losses of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast.arguments import check_teacher_rows, check_tensor
from lrds_fast.divergences import DKD, JSD, KL, MSE, NKD, REVISE_TEMPERATURE, RKL, RLD, SKL, SRKL, TVD, Divergence
from lrds_fast.options import KDOptions, kd_options
from lrds_fast.options import default_ce_weight_unselected as default_ce_weight_unselected
from lrds_fast.topk import TopKTeacher


class KDLossParts(NamedTuple):
    """A loss with its terms and counts, all on the logits' device. Nothing synchronises.

    loss: as kd_loss returns it. ce, kd: its two terms, weighted and reduced like loss, detached; loss = ce + kd.
    lrds_fast.kd_loss_parts(unweighted=True) returns them without their weights.
    n_valid, n_selected, n_revised: 0-d int64. n_valid rows are not ignored; n_selected of them have a teacher weight
    above 0; n_revised of these have a revised teacher.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    n_valid: Tensor
    n_selected: Tensor
    n_revised: Tensor


def compute_dtype(student_logits: Tensor, teacher_logits: Tensor) -> torch.dtype:
    """float64 if either input is float64, else float32."""
    if torch.float64 in (student_logits.dtype, teacher_logits.dtype):
        return torch.float64
    return torch.float32


def _at(x: Tensor, y: Tensor) -> Tensor:
    """x[i, y[i]], (N,)."""
    return x.gather(-1, y[:, None])[:, 0]


def _is_target(y: Tensor, classes: int) -> Tensor:
    """(N, C) bool, true at the target. F.one_hot does not vmap."""
    return torch.arange(classes, device=y.device) == y[:, None]


def _times_log(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p * log_ratio, and 0 where p = 0, for every log_ratio and in the gradient too. A NaN in p stays NaN."""
    nonzero = p != 0
    return torch.where(nonzero, p, 0.0) * torch.where(nonzero, log_ratio, 0.0) + torch.where(p.isnan(), p, 0.0)


def _without_target(x: Tensor, y: Tensor) -> Tensor:
    """x with -inf at the target."""
    return x.masked_fill(_is_target(y, x.shape[-1]), -torch.inf)


# --- Revision -------------------------------------------------------------------------------------------------------


class Revised(NamedTuple):
    """A teacher after revision: p', log p' and v' (N, C), softmax(v' / T) = p'; the rows that changed (N,)."""

    p: Tensor
    log_p: Tensor
    v: Tensor
    changed: Tensor


def _wrong(v: Tensor, y: Tensor) -> Tensor:
    """The rows (N,) where the top class is not the target. A tie with the target counts as right."""
    return _at(v, y) < v.max(dim=-1).values


def _log_mixture(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)) without underflow; -inf with gradient 0 where both are -inf."""
    nothing = (a == -torch.inf) & (b == -torch.inf)
    mixed = torch.logaddexp(torch.where(nothing, 0.0, a), torch.where(nothing, 0.0, b))
    return torch.where(nothing, -torch.inf, mixed)


def _towards(plain: Revised, target: Tensor, beta: Tensor, rows: Tensor, temperature: float, soft: bool) -> Revised:
    """p' = beta p + (1 - beta) target on `rows` (N,), with the v' that equals v where the target's probability is 0.

    soft: the target is a distribution. If beta = 0, v' is T log target up to a constant.
    """
    p, log_p, v, _ = plain
    beta = beta[:, None]
    revised_p = beta * p + (1.0 - beta) * target
    mixed = _log_mixture(beta.log() + log_p, (1.0 - beta).log() + target.log())
    revised_log_p = torch.where(target > 0, mixed, log_p + beta.log())
    anchor = v.amax(dim=-1, keepdim=True)
    log_sum = ((v - anchor) / temperature).logsumexp(dim=-1, keepdim=True)
    revised_v = torch.where(target > 0, anchor + temperature * (mixed - beta.log() + log_sum), v)
    if soft:
        revised_v = torch.where(beta > 0, revised_v, anchor + temperature * mixed)
    where = rows[:, None]
    return Revised(
        torch.where(where, revised_p, p),
        torch.where(where, revised_log_p, log_p),
        torch.where(where, revised_v, v),
        rows,
    )


def _distribution(soft: Tensor) -> Tensor:
    """Soft targets (N, C) clamped to >= 0 and normalised; rows of 0 are returned as they are."""
    soft = torch.where(soft < 0, 0.0, soft)
    total = soft.sum(dim=-1, keepdim=True)
    return soft / torch.where(total > 0, total, 1.0)


def _softened(revised: Revised, temperature: float) -> Revised:
    """`revised`, which may be at another temperature, as p' = softmax(v' / temperature).

    v'_y is infinite if the revision has made p' one-hot; then this p' is one-hot too.
    """
    v = revised.v
    certain = v == torch.inf
    log_p = F.log_softmax(torch.where(certain.any(dim=-1, keepdim=True), 0.0, v) / temperature, dim=-1)
    one_hot = torch.where(certain, 0.0, -torch.inf)
    log_p = torch.where(certain.any(dim=-1, keepdim=True), one_hot, log_p)
    return Revised(log_p.exp(), log_p, v, revised.changed)


def _revise(
    v: Tensor,
    raw_v: Tensor,
    y: Tensor,
    soft: Tensor | None,
    temperature: float,
    eta: float,
    policy: str | None,
    revise_temperature: float | None,
) -> Revised:
    """The teacher's logits v (N, C) revised towards y (N,), or towards the distributions soft (N, C) around y.

    raw_v: v before standardisation, which may round different logits to equal ones. It decides which rows are wrong.
    temperature: of p'. revise_temperature: of the revision; None: the same.
    """
    if policy in ("lr", "mft") and revise_temperature not in (None, temperature):
        anchor = v.amax(dim=-1, keepdim=True)  # a common offset must not round v'
        revised = _revise(v - anchor, raw_v, y, soft, revise_temperature, eta, policy, None)
        softened = _softened(revised, temperature)
        # Rows that were not revised keep their bits.
        plain = _revise(v, raw_v, y, soft, temperature, eta, None, None)
        pairs = zip(softened[:3], (plain.p, plain.log_p, plain.v - anchor), strict=True)
        p, log_p, moved = (torch.where(revised.changed[:, None], new, old) for new, old in pairs)
        return Revised(p, log_p, moved + anchor, revised.changed)
    wrong = _wrong(raw_v, y)
    if policy == "swap":
        top = raw_v.argmax(dim=-1)
        v_y, v_top = _at(v, y)[:, None], _at(v, top)[:, None]
        swapped = v.scatter(-1, y[:, None], v_top).scatter(-1, top[:, None], v_y)
        v = torch.where(wrong[:, None], swapped, v)
    p, log_p = F.softmax(v / temperature, dim=-1), F.log_softmax(v / temperature, dim=-1)
    plain = Revised(p, log_p, v, wrong if policy == "swap" else torch.zeros_like(wrong))
    if policy in (None, "swap"):
        return plain
    # p_max - p_y, computed from the difference of logits without cancellation.
    lead = -p.amax(dim=-1) * torch.expm1((_at(v, y) - v.amax(dim=-1)) / temperature)
    if soft is None:
        target = _is_target(y, v.shape[-1]).to(v.dtype)
        beta = eta / (1.0 + lead)
    else:
        target = _distribution(soft)
        margin = _at(target, y) - _without_target(target, y).amax(dim=-1).clamp(min=0.0)
        beta = torch.where(margin == 0, 0.0, eta * margin / torch.where(margin == 0, 1.0, margin + lead))
        wrong = wrong & (_at(target, y) != 0)  # a target of zeros revises nothing
    if policy == "lr":
        return _towards(plain, target, beta, wrong, temperature, soft is not None)
    # "mft" revises right rows too: p'_y = min(1, p_y + 1 - eta).
    log_others = _log_others(log_p, y)
    others = log_others.exp()
    lifted = (others - (1.0 - eta)).clamp(min=0.0) / torch.where(others > 0, others, 1.0)
    changed = wrong | (log_others > -torch.inf)
    return _towards(plain, target, torch.where(wrong, beta, lifted), changed, temperature, False)


def revise_labels(
    teacher_logits: Tensor,
    target: Tensor,
    *,
    eta: float = 0.8,
    revise_temperature: float | None = REVISE_TEMPERATURE,
    temperature: float = 1.0,
    policy: str = "lr",
) -> Tensor:
    """softmax(teacher_logits / temperature), revised where the teacher's top class is not `target`.

    teacher_logits: (..., C) floating. target: (...) int32/int64 in [0, C), or (..., C) probabilities with policy "lr".
    Returns (..., C) probabilities, float32 (float64 for float64 logits). On wrong rows "lr" gives p' = beta * p + (1 -
    beta) * one_hot(target), with p = softmax(teacher_logits / revise_temperature) and beta = eta / (1 + p_max - p_y):
    the target exceeds the next class by exactly 1 - eta, and the other classes keep their ratios. The logits of p' are
    then divided by `temperature`. revise_temperature: 1 by default; None: `temperature`, the published form. Source:
    Lan et al. 2024 (arXiv 2404.03693), label revision.
    """
    check_tensor("teacher_logits", teacher_logits)
    classes = teacher_logits.shape[-1]
    v = teacher_logits.detach().to(compute_dtype(teacher_logits, teacher_logits)).reshape(-1, classes)
    y, soft = _targets(target, classes, v.dtype)
    return _revise(v, v, y, soft, temperature, eta, policy, revise_temperature).p.reshape(teacher_logits.shape)


# --- Divergences ----------------------------------------------------------------------------------------------------


class LogitRows(NamedTuple):
    """The arguments of a divergence. All logits are (N, C), y is (N,).

    z, v: student and teacher, standardised with standardize=True. raw_v: the teacher before standardisation. teacher:
    v revised for `temperature`. revise_at(T): v revised for another temperature.
    """

    z: Tensor
    v: Tensor
    raw_v: Tensor
    y: Tensor
    temperature: float
    teacher: Revised
    revise_at: Callable[[float], Revised]


def _log_others(log_p: Tensor, y: Tensor) -> Tensor:
    """log(1 - p_y), as a logsumexp over the other classes; -inf if their probability is 0."""
    others = _without_target(log_p, y)
    empty = (others == -torch.inf).all(dim=-1)
    return torch.where(empty, -torch.inf, torch.where(empty[:, None], 0.0, others).logsumexp(dim=-1))


def _binary_kl(log_p: Tensor, log_rest: Tensor, log_q: Tensor, log_q_rest: Tensor) -> Tensor:
    """KL((p, 1 - p) || (q, 1 - q)), (N,), from log p, log(1 - p), log q and log(1 - q)."""
    return _times_log(log_p.exp(), log_p - log_q) + _times_log(log_rest.exp(), log_rest - log_q_rest)


def _masked_kl(v: Tensor, z: Tensor, keep: Tensor, temperature: float) -> Tensor:
    """KL(softmax(v / T) || softmax(z / T)) over the classes in `keep` (N, C), renormalised.

    0 where p is 0 on all of them, infinite where only q is.
    """
    log_p, empty = _renormalised(v, keep, temperature)
    log_q, unanswered = _renormalised(z, keep, temperature)
    kl = _times_log(log_p.exp(), log_p - log_q).sum(dim=-1)
    return torch.where(empty, 0.0, torch.where(unanswered, torch.inf, kl))


def _renormalised(x: Tensor, keep: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(x / T) over the classes in `keep` (N, C), and the rows (N,) that have no such class.

    The values of these rows are finite.
    """
    empty = (~keep | (x == -torch.inf)).all(dim=-1, keepdim=True)
    x = torch.where(empty, 0.0, (x / temperature).masked_fill(~keep, -torch.inf))
    return F.log_softmax(x, dim=-1), empty[:, 0]


def _kl(rows: LogitRows, _: KL) -> Tensor:
    log_q = F.log_softmax(rows.z / rows.temperature, dim=-1)
    return rows.temperature**2 * _times_log(rows.teacher.p, rows.teacher.log_p - log_q).sum(dim=-1)


def _rkl(rows: LogitRows, _: RKL) -> Tensor:
    log_q = F.log_softmax(rows.z / rows.temperature, dim=-1)
    return rows.temperature**2 * _times_log(log_q.exp(), log_q - rows.teacher.log_p).sum(dim=-1)


def _dkd(rows: LogitRows, d: DKD) -> Tensor:
    t, y, log_p = rows.temperature, rows.y, rows.teacher.log_p
    log_q = F.log_softmax(rows.z / t, dim=-1)
    loss = torch.zeros_like(log_q[:, 0])
    if d.alpha:
        loss = loss + d.alpha * _binary_kl(_at(log_p, y), _log_others(log_p, y), _at(log_q, y), _log_others(log_q, y))
    if d.beta:
        others = ~_is_target(y, log_q.shape[-1])
        loss = loss + d.beta * _masked_kl(rows.teacher.v, rows.z, others, t)
    return t**2 * loss


def _rld(rows: LogitRows, d: RLD) -> Tensor:
    t, tc, v, raw_v, y = rows.temperature, d.confidence_temperature, rows.v, rows.raw_v, rows.y
    loss = torch.zeros_like(v[:, 0])
    if d.alpha:
        log_p, log_q = F.log_softmax(v / tc, dim=-1), F.log_softmax(rows.z / tc, dim=-1)
        # The top class; the target, where it ties with another.
        top = torch.where(_wrong(raw_v, y), raw_v.argmax(dim=-1), y)
        binary = _binary_kl(_at(log_p, top), _log_others(log_p, top), _at(log_q, y), _log_others(log_q, y))
        loss = loss + d.alpha * tc**2 * binary
    if d.beta:
        loss = loss + d.beta * t**2 * _masked_kl(v, rows.z, raw_v < _at(raw_v, y)[:, None], t)
    return loss


def _nkd(rows: LogitRows, d: NKD) -> Tensor:
    t, y = rows.temperature, rows.y
    p_y = _at(rows.revise_at(1.0).p, y)
    loss = _times_log(p_y, -_at(F.log_softmax(rows.z, dim=-1), y))
    if d.gamma:
        others = ~_is_target(y, rows.z.shape[-1])
        log_p, empty = _renormalised(rows.teacher.v, others, t)
        log_q, unanswered = _renormalised(rows.z, others, t)
        cross = -_times_log(log_p.exp(), log_q).sum(dim=-1)
        loss = loss + d.gamma * t**2 * torch.where(empty, 0.0, torch.where(unanswered, torch.inf, cross))
    return loss


def _mse(rows: LogitRows, d: MSE) -> Tensor:
    if d.on == "probs":
        return (F.softmax(rows.z / rows.temperature, dim=-1) - rows.teacher.p).square().mean(dim=-1)
    z, v = rows.z, rows.teacher.v
    both = (z.detach() == v) & v.isinf()  # a class that both exclude has no difference
    return torch.where(both, 0.0, torch.where(both, 0.0, z) - torch.where(both, 0.0, v)).square().mean(dim=-1)


def _jsd(rows: LogitRows, d: JSD) -> Tensor:
    log_q, log_p = F.log_softmax(rows.z / rows.temperature, dim=-1), rows.teacher.log_p
    p, q = rows.teacher.p, log_q.exp()
    log_m = _log_mixture(math.log(d.weight) + log_p, math.log1p(-d.weight) + log_q)
    teacher_kl, student_kl = (_times_log(x, log_x - log_m).sum(dim=-1) for x, log_x in ((p, log_p), (q, log_q)))
    return rows.temperature**2 * (d.weight * teacher_kl + (1.0 - d.weight) * student_kl)


def _tvd(rows: LogitRows, _: TVD) -> Tensor:
    q = F.softmax(rows.z / rows.temperature, dim=-1)
    return rows.temperature / 2.0 * (q - rows.teacher.p).abs().sum(dim=-1)  # abs has the gradient 0 at 0


def _skewed_kl(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """KL(a || weight a + (1 - weight) b), (N,), from log a and log b."""
    log_m = _log_mixture(math.log(weight) + log_a, math.log1p(-weight) + log_b)
    return _times_log(log_a.exp(), log_a - log_m).sum(dim=-1)


def _skl(rows: LogitRows, d: SKL) -> Tensor:
    log_q = F.log_softmax(rows.z / rows.temperature, dim=-1)
    return rows.temperature**2 * _skewed_kl(rows.teacher.log_p, log_q, d.weight)


def _srkl(rows: LogitRows, d: SRKL) -> Tensor:
    log_q = F.log_softmax(rows.z / rows.temperature, dim=-1)
    return rows.temperature**2 * _skewed_kl(log_q, rows.teacher.log_p, d.weight)


DIVERGENCES: dict[type[Divergence], Callable[[LogitRows, Any], Tensor]] = {
    KL: _kl,
    RKL: _rkl,
    DKD: _dkd,
    RLD: _rld,
    NKD: _nkd,
    MSE: _mse,
    JSD: _jsd,
    TVD: _tvd,
    SKL: _skl,
    SRKL: _srkl,
}
"""Each divergence's per-row losses, (N,)."""


# --- The loss -------------------------------------------------------------------------------------------------------


def _targets(target: Tensor, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Class indices (N,) and, if the target holds probabilities, these (N, C); the indices are their top classes."""
    if not target.dtype.is_floating_point:
        return target.reshape(-1).long(), None
    soft = target.detach().reshape(-1, classes).to(dtype)
    return soft.argmax(dim=-1), soft


def _standardize(x: Tensor) -> Tensor:
    x = x - x.detach().amax(dim=-1, keepdim=True)  # a common offset must not round the differences
    return (x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True) + 1e-7)


def _cross_entropy(
    z: Tensor, y: Tensor, soft: Tensor | None, label_smoothing: float, class_weight: Tensor | None
) -> Tensor:
    """F.cross_entropy(..., reduction="none"), (N,), with 0 * inf = 0."""
    classes = z.shape[-1]
    weight = _is_target(y, classes).to(z.dtype) if soft is None else soft
    if label_smoothing:
        weight = (1.0 - label_smoothing) * weight + label_smoothing / classes
    if class_weight is not None:
        weight = weight * class_weight.to(z.dtype)
    return -_times_log(weight, F.log_softmax(z, dim=-1)).sum(dim=-1)


def _distillation(z: Tensor, v: Tensor, y: Tensor, soft: Tensor | None, options: KDOptions) -> tuple[Tensor, Tensor]:
    """The KD terms, added over the temperatures, (N,), and the rows that were revised at any of them, (N,) bool."""
    none = torch.zeros_like(y, dtype=torch.bool)
    if z.shape[-1] == 1:
        return (z[:, 0] + v[:, 0]) * 0.0, none
    raw_v = v
    if options.standardize:
        z, v = _standardize(z), _standardize(v)
    divergence = options.divergence_object()
    policy = None if isinstance(divergence, RLD) else options.policy()
    loss, changed = torch.zeros_like(z[:, 0]), none

    def revise_at(temperature: float) -> Revised:
        return _revise(v, raw_v, y, soft, temperature, options.eta, policy, options.revise_temperature or None)

    for temperature in options.temperature:
        teacher = revise_at(temperature)
        rows = LogitRows(z, v, raw_v, y, temperature, teacher, revise_at)
        loss = loss + DIVERGENCES[type(divergence)](rows, divergence)
        changed = changed | teacher.changed
    return loss, changed


def _inverse(denominator: Tensor) -> Tensor:
    """1 / denominator; 0 where it is 0, because then there is no row to average."""
    return torch.where(denominator == 0, 0.0, 1.0 / torch.where(denominator == 0, 1.0, denominator))


class _Weights(NamedTuple):
    """The weights of each row's terms, (N,). valid: bool, the rows that are not ignored. selected, ce, kd: floating."""

    valid: Tensor
    selected: Tensor
    ce: Tensor
    kd: Tensor


def _row_weights(valid: Tensor, selected: Tensor, options: KDOptions) -> _Weights:
    ce = selected * options.ce_weight + (1.0 - selected) * options.ce_weight_unselected
    return _Weights(valid, selected, ce, selected * options.kd_weight)


def _terms(
    z: Tensor,
    v: Tensor,
    y: Tensor,
    soft: Tensor | None,
    weights: _Weights,
    class_weight: Tensor | None,
    options: KDOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted terms of each row, CE and KD, (N,), and the rows whose teacher was revised, (N,) bool.

    A term of weight 0 is neither read nor added: its logits are replaced before any arithmetic, so that an inf or a NaN
    in a row that the term does not use reaches neither the loss nor the gradient.
    """
    use_ce = weights.valid & (weights.ce != 0)
    ce_rows = _cross_entropy(torch.where(use_ce[:, None], z, 0.0), y, soft, options.label_smoothing, class_weight)
    use_kd = weights.valid & (weights.kd != 0)
    kd_z, kd_v = torch.where(use_kd[:, None], z, 0.0), torch.where(use_kd[:, None], v, 0.0)
    kd_rows, changed = _distillation(kd_z, kd_v, y, soft, options)
    return (
        torch.where(use_ce, weights.ce * ce_rows, 0.0),
        torch.where(use_kd, weights.kd * kd_rows, 0.0),
        use_kd & changed,
    )


def _reduced(
    ce: Tensor,
    kd: Tensor,
    shape: torch.Size,
    reduction: str,
    num_valid: Tensor,
    weight_sum: Tensor,
) -> tuple[Tensor, Tensor]:
    """Both terms (N,), reduced.

    shape: the logits', (..., C). num_valid, weight_sum: 0-d, the denominators of KD and CE in a mean.
    """
    if reduction == "none":
        return ce.reshape(shape[:-1]), kd.reshape(shape[:-1])
    ce, kd = ce.sum(), kd.sum()
    if reduction == "mean":
        return ce * _inverse(weight_sum), kd * _inverse(num_valid)
    if reduction == "elementmean":
        return ce * _inverse(num_valid * shape[-1]), kd * _inverse(num_valid * shape[-1])
    return ce, kd


def _teacher_logits(student_logits: Tensor, teacher_logits: Tensor | TopKTeacher, teacher_rows: int | None) -> Tensor:
    """The teacher's logits (..., C); those of a cached teacher are float32, or float64 if any are."""
    check_tensor("student_logits", student_logits)
    if isinstance(teacher_logits, TopKTeacher):
        dtype = compute_dtype(student_logits, teacher_logits.values)
        teacher_logits = teacher_logits.dense(student_logits.shape[-1], dtype)
    check_tensor("teacher_logits", teacher_logits)
    check_teacher_rows(student_logits.shape, teacher_logits.shape, teacher_rows)
    return teacher_logits


def loss_parts(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    target: Tensor,
    options: KDOptions,
    *,
    selected: Tensor | None = None,
    teacher_rows: int | None = None,
    class_weight: Tensor | None = None,
    num_valid: Tensor | float | None = None,
    weight_sum: Tensor | float | None = None,
) -> KDLossParts:
    """kd_loss_parts for hyperparameters that have been checked. The other arguments are those of kd_loss."""
    teacher_logits = _teacher_logits(student_logits, teacher_logits, teacher_rows)
    classes = student_logits.shape[-1]
    dtype = compute_dtype(student_logits, teacher_logits)
    z = student_logits.reshape(-1, classes).to(dtype)
    v = teacher_logits.detach().reshape(-1, classes).to(dtype)
    y, soft = _targets(target, classes, dtype)
    valid = torch.ones_like(y, dtype=torch.bool) if soft is not None else y != options.ignore_index
    y = torch.where(valid, y, 0)
    rows, prefix = z.shape[0], v.shape[0]
    if selected is None:
        selected = torch.arange(rows, device=z.device) < prefix
    if prefix < rows:
        v = torch.cat([v, v.new_zeros(rows - prefix, classes)])
    weights = _row_weights(valid, selected.detach().reshape(-1).to(dtype), options)
    class_weight = None if class_weight is None else class_weight.detach().to(dtype)
    ce, kd, revised = _terms(z, v, y, soft, weights, class_weight, options)

    def scalar(value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=z.device).detach().reshape(())

    n_valid = valid.sum()
    count = ce_count = scalar(n_valid if num_valid is None else num_valid)
    if class_weight is not None and soft is None:
        counted = torch.where(valid, class_weight[y], 0.0).sum()
        ce_count = scalar(counted if weight_sum is None else weight_sum)
    ce, kd = _reduced(ce, kd, student_logits.shape, options.reduction_name(), count, ce_count)
    return KDLossParts(
        loss=ce + kd,
        ce=ce.detach(),
        kd=kd.detach(),
        n_valid=n_valid,
        n_selected=(valid & (weights.selected > 0)).sum(),
        n_revised=revised.sum(),
    )


def kd_loss_parts(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    target: Tensor,
    *,
    temperature: float | Sequence[float] = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    ce_weight_unselected: float | None = None,
    revise: str | None = "lr",
    eta: float = 0.8,
    revise_temperature: float | None = REVISE_TEMPERATURE,
    selected: Tensor | None = None,
    teacher_rows: int | None = None,
    divergence: str | Divergence = "kl",
    standardize: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: Tensor | float | None = None,
    weight_sum: Tensor | float | None = None,
    grad_scale: Tensor | float | None = None,
    unweighted: bool = False,
) -> KDLossParts:
    """kd_loss_parts as a composition of PyTorch ops; see lrds_fast.kd_loss_parts for the arguments.

    grad_scale is accepted and has no effect: nothing is rounded here.
    """
    del grad_scale
    options = kd_options(
        temperature,
        ce_weight,
        kd_weight,
        ce_weight_unselected,
        revise,
        eta,
        revise_temperature,
        divergence,
        standardize,
        label_smoothing,
        ignore_index,
        reduction,
        signed=True,
    )

    def parts(options: KDOptions) -> KDLossParts:
        return loss_parts(
            student_logits,
            teacher_logits,
            target,
            options,
            selected=selected,
            teacher_rows=teacher_rows,
            class_weight=class_weight,
            num_valid=num_valid,
            weight_sum=weight_sum,
        )

    weighted = parts(options)
    if not unweighted:
        return weighted
    ce = parts(options._replace(ce_weight=1.0, ce_weight_unselected=1.0, kd_weight=0.0)).ce
    kd = parts(options._replace(ce_weight=0.0, ce_weight_unselected=0.0, kd_weight=1.0)).kd
    return weighted._replace(ce=ce, kd=kd)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    target: Tensor,
    *,
    temperature: float | Sequence[float] = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    ce_weight_unselected: float | None = None,
    revise: str | None = "lr",
    eta: float = 0.8,
    revise_temperature: float | None = REVISE_TEMPERATURE,
    selected: Tensor | None = None,
    teacher_rows: int | None = None,
    divergence: str | Divergence = "kl",
    standardize: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: Tensor | float | None = None,
    weight_sum: Tensor | float | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """kd_loss as a composition of PyTorch ops; see lrds_fast.kd_loss for the arguments."""
    return kd_loss_parts(
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        ce_weight_unselected=ce_weight_unselected,
        revise=revise,
        eta=eta,
        revise_temperature=revise_temperature,
        selected=selected,
        teacher_rows=teacher_rows,
        divergence=divergence,
        standardize=standardize,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        num_valid=num_valid,
        weight_sum=weight_sum,
        grad_scale=grad_scale,
    ).loss


def kd_logit_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Sequence[float] = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    revise: str | None = "lr",
    eta: float = 0.8,
    revise_temperature: float | None = REVISE_TEMPERATURE,
    divergence: str | Divergence = "kl",
    standardize: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Each row's d/dz [ce_weight * CE(z, y) + kd_weight * D(p', q)], without any 1/N.

    Logits (N, C), target (N,) or (N, C) probabilities. Weights may be negative or 0 (a term of weight 0 is not read).
    Returns (N, C) in float32 (float64 for float64 logits).
    """
    check_tensor("student_logits", student_logits)
    check_tensor("teacher_logits", teacher_logits)
    check_teacher_rows(student_logits.shape, teacher_logits.shape, None)
    options = kd_options(
        temperature,
        revise=revise,
        eta=eta,
        revise_temperature=revise_temperature,
        divergence=divergence,
        standardize=standardize,
        label_smoothing=label_smoothing,
    )
    dtype = compute_dtype(student_logits, teacher_logits)
    y, soft = _targets(target, student_logits.shape[-1], dtype)
    v = teacher_logits.detach().to(dtype)
    with torch.enable_grad():
        z = student_logits.detach().to(dtype).requires_grad_()
        loss = z.new_zeros(())
        if ce_weight != 0:
            loss = loss + ce_weight * _cross_entropy(z, y, soft, options.label_smoothing, class_weight).sum()
        if kd_weight != 0:
            rows, _ = _distillation(z, v, y, soft, options)
            loss = loss + kd_weight * rows.sum()
        if not loss.requires_grad:
            return torch.zeros_like(z)
        return torch.autograd.grad(loss, z)[0]
