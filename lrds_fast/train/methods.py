"""The distillation losses of a recipe: from a batch's logits to the loss and its logged parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lrds_fast
from lrds_fast import KDLossParts
from lrds_fast.composed import gram_terms
from lrds_fast.recipe.recipe import LossOptions
from lrds_fast.topk import TopKTeacher
from lrds_fast.train.setup import ce_weight_unselected, loss_arguments

Objective = Callable[..., KDLossParts]
"""(student logits (N, C), teacher logits (K, C), target (N,), *, selected, grad_scale, num_valid) -> parts.
K = N with `selected` (N,) bool or None; K < N where the first K rows are the selected ones. num_valid: the divisor of
sums over rows where other processes or micro-batches have rows of the same batch; None is N. "mlkd" also takes
`strong`: None, or (student logits, teacher logits) of the same rows in their second view."""


def objective(options: LossOptions) -> Objective:
    """The recipe's objective. Its parts satisfy loss = ce + kd, both weighted.

    Method "kd" is kd_loss. With s the share of the rows that have a teacher and c the weighted cross-entropy of
    kd_loss, the other methods are

        dist      c + kd_weight * s * dist_loss(student, revised teacher), over these rows
        mlkd      lrds_fast.mlkd_loss; over two views see mlkd_views
        revision  kd_weight * s * revision_loss over these rows + (1 - s) * ce_weight_unselected * CE over the others
    """
    if options.method == "kd":
        return _kd(options)
    return _divided_by_num_valid({"dist": _dist, "mlkd": _mlkd, "revision": _revision}[options.method](options))


def _divided_by_num_valid(mean: Objective) -> Objective:
    """Turns an objective that averages over its N rows into one that divides by num_valid. Losses that compare rows
    (DIST, MLKD) use only this process's micro-batch."""

    def parts(z: Tensor, *others: Any, num_valid: Tensor | float | None = None, **options: Any) -> KDLossParts:
        means = mean(z, *others, **options)
        if num_valid is None:
            return means
        share = len(z) / num_valid
        return means._replace(loss=means.loss * share, ce=means.ce * share, kd=means.kd * share)

    return parts


def _kd(options: LossOptions) -> Objective:
    arguments = loss_arguments(options)

    def parts(
        z: Tensor,
        v: Tensor,
        y: Tensor,
        *,
        selected: Tensor | None,
        grad_scale: Any = None,
        num_valid: Tensor | float | None = None,
    ) -> KDLossParts:
        return lrds_fast.kd_loss_parts(
            z,
            v,
            y,
            **arguments,
            **_teacher_keywords(v, selected),
            grad_scale=grad_scale,
            num_valid=num_valid,
        )

    return parts


def _teacher_keywords(v: Tensor | TopKTeacher, selected: Tensor | None) -> dict[str, Any]:
    """kd_loss's argument `selected`, or `teacher_rows` without a mask."""
    if selected is not None:
        return {"selected": selected}
    return {"teacher_rows": len(v.values if isinstance(v, TopKTeacher) else v)}


def _cross_entropy(z: Tensor, v: Tensor, y: Tensor, selected: Tensor | None, options: LossOptions) -> KDLossParts:
    """The weighted cross-entropy and the row counts of kd_loss, without its divergence."""
    return lrds_fast.kd_loss_parts(
        z,
        v,
        y,
        **_teacher_keywords(v, selected),
        ce_weight=options.ce_weight,
        ce_weight_unselected=ce_weight_unselected(options),
        kd_weight=0.0,
        label_smoothing=options.label_smoothing,
        revise=options.revise,
        eta=options.eta,
        revise_temperature=options.revise_temperature,
    )


def _rows_with_teacher(z: Tensor, v: Tensor, y: Tensor, selected: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits and targets of the rows that have a teacher."""
    if selected is None:
        return z[: len(v)], v, y[: len(v)]
    return z[selected], v[selected], y[selected]


def _dist(options: LossOptions) -> Objective:
    def parts(z: Tensor, v: Tensor, y: Tensor, *, selected: Tensor | None, grad_scale: Any = None) -> KDLossParts:
        ce_parts = _cross_entropy(z, v, y, selected, options)
        student, teacher, target = _rows_with_teacher(z, v, y, selected)
        if len(student) < 2:  # no correlation between samples
            return ce_parts
        t = options.temperature
        if options.revise != "none":
            revised = lrds_fast.revise_labels(
                teacher, target, eta=options.eta, revise_temperature=options.revise_temperature, temperature=t
            )
            teacher = t * revised.clamp_min(torch.finfo(revised.dtype).tiny).log()
        share = len(student) / len(z)
        kd = options.kd_weight * share * lrds_fast.dist_loss(student, teacher, temperature=t)
        return ce_parts._replace(loss=ce_parts.loss + kd, kd=kd.detach())

    return parts


def _mlkd(options: LossOptions) -> Objective:
    def parts(
        z: Tensor,
        v: Tensor,
        y: Tensor,
        *,
        selected: Tensor | None,
        grad_scale: Any = None,
        strong: tuple[Tensor, Tensor] | None = None,
    ) -> KDLossParts:
        ce_parts = _cross_entropy(z, v, y, selected, options)
        if strong is not None:
            kd = options.kd_weight * mlkd_views(z, v, y, strong, selected=selected, options=options)
            strong_ce = _cross_entropy(*strong, y, selected, options)
            loss = ce_parts.loss + strong_ce.loss + kd
            return ce_parts._replace(loss=loss, ce=ce_parts.ce + strong_ce.ce, kd=kd.detach())
        if len(v) < len(z):  # mlkd_loss takes as many teacher rows; the mask leaves the zeros out
            selected = torch.arange(len(z), device=z.device) < len(v)
            v = torch.cat([v, v.new_zeros(len(z) - len(v), v.shape[1])])
        kd = lrds_fast.mlkd_loss(
            z,
            v,
            y,
            temperature=options.temperatures or options.temperature,
            ce_weight=0.0,
            ce_weight_unselected=0.0,
            kd_weight=options.kd_weight,
            revise=options.revise,
            eta=options.eta,
            revise_temperature=options.revise_temperature,
            selected=selected,
        )
        return ce_parts._replace(loss=ce_parts.loss + kd, kd=kd.detach())

    return parts


def mlkd_views(
    z: Tensor,
    v: Tensor,
    y: Tensor,
    strong: tuple[Tensor, Tensor],
    *,
    selected: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """s sum_T [m K_T(z, v) + K_T(z', v') + m B_T(z, v) + c C_T(z, v)], with (z', v') = strong.

    What MLKD has beside the cross-entropies of both views: K_T = T^2 KL(p || q), mean over rows, of the first view and
    of the strong one; B_T and C_T as in lrds_fast.mlkd_loss, of the first view alone. All over the K rows that have a
    teacher, s = K / N of the batch, and p revised where the recipe says so. m is the share of these rows whose teacher
    is at most as confident as the median of them, c that of the classes whose mean probability is at most the median
    of the classes, at T = 1 and before revision: about a half each. So the authors' program has them: its masks by
    confidence multiply terms that are means already. In the paper they choose rows and classes. The program also gives
    two of five temperatures of the strong view the first view's logits; here the strong view has all of them.

    z, strong[0]: (N, C) student logits. v, strong[1]: (N, C), or (K, C) for the first K rows, teacher logits. y: (N,)
    int64. selected: (N,) bool or None. Returns a 0-d tensor; 0 where no row has a teacher. ValueError where the views'
    shapes differ. Source: Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023.
    """
    if strong[0].shape != z.shape or strong[1].shape != v.shape:
        raise ValueError(
            f"strong must have the logits' shapes {tuple(z.shape)} and {tuple(v.shape)};"
            f" got {tuple(strong[0].shape)} and {tuple(strong[1].shape)}"
        )
    student, teacher, target = _rows_with_teacher(z, v, y, selected)
    if not len(student):
        return z.sum() * 0.0
    keywords: dict[str, Any] = {
        "temperature": options.temperatures or options.temperature,
        "revise": options.revise,
        "eta": options.eta,
        "revise_temperature": options.revise_temperature,
    }
    p = teacher.softmax(dim=1, dtype=torch.promote_types(teacher.dtype, torch.float32))
    confidence, mass = p.amax(dim=1), p.mean(dim=0)
    rows, classes = ((x <= x.quantile(0.5)).to(p.dtype).mean() for x in (confidence, mass))

    def by_row(z: Tensor, v: Tensor) -> Tensor:
        return lrds_fast.kd_loss(z, v, target, ce_weight=0.0, kd_weight=1.0, **keywords)

    by_batch, by_class = gram_terms(student, teacher, target, **keywords)
    second, second_teacher, _ = _rows_with_teacher(strong[0], strong[1], y, selected)
    kd = rows * (by_row(student, teacher) + by_batch) + classes * by_class + by_row(second, second_teacher)
    return len(student) / len(z) * kd


def _revision(options: LossOptions) -> Objective:
    def parts(z: Tensor, v: Tensor, y: Tensor, *, selected: Tensor | None, grad_scale: Any = None) -> KDLossParts:
        ce_parts = _cross_entropy(z, v, y, selected, options)
        student, teacher, target = _rows_with_teacher(z, v, y, selected)
        ce = kd = ce_parts.loss.new_zeros(())
        if len(student):
            revised = lrds_fast.revision_loss(
                student, teacher, target, lambda1=options.lambda1, lambda2=options.lambda2, eta=options.eta
            )
            kd = options.kd_weight * len(student) / len(z) * revised
        if len(student) < len(z):
            rest = z[len(v) :] if selected is None else z[~selected]
            labels = y[len(v) :] if selected is None else y[~selected]
            ce = ce_weight_unselected(options) * F.cross_entropy(rest.to(ce.dtype), labels) * len(rest) / len(z)
        return ce_parts._replace(loss=ce + kd, ce=ce.detach(), kd=kd.detach())

    return parts
