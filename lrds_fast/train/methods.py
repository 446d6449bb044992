"""Distillation objectives of a recipe: from a batch's logits to the loss and what is logged of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lrds_fast
from lrds_fast import KDLossParts
from lrds_fast.train.recipe import LossOptions
from lrds_fast.train.setup import loss_arguments

Objective = Callable[..., KDLossParts]
"""(student logits (N, C), teacher logits (K, C), target (N,), *, selected, kd_weight, grad_scale, num_valid) -> parts.
K = N with `selected` (N,) bool or None; K < N where the first K rows are the selected ones. num_valid: what sums over
the rows are divided by, where other processes or steps have rows of the same batch; None is N."""


def objective(options: LossOptions) -> Objective:
    """The recipe's objective.

    kd: kd_loss. dist, mlkd, revision: with s the share of the rows that have a teacher and c the weighted cross-entropy
    of kd_loss,

        dist      c + kd_weight * s * dist_loss(student, revised teacher), over these rows
        mlkd      lrds_fast.mlkd_loss
        revision  kd_weight * s * revision_loss over these rows + (1 - s) * ce_weight_unselected * CE over the others
    """
    if options.method == "kd":
        return _kd(options)
    return _shared({"dist": _dist, "mlkd": _mlkd, "revision": _revision}[options.method](options))


def _shared(measure: Objective) -> Objective:
    """An objective whose means are over the rows at hand, as one over num_valid. What relates the rows of a batch to
    each other sees those of this process and part alone."""

    def parts(z: Tensor, *others: Any, num_valid: Tensor | float | None = None, **options: Any) -> KDLossParts:
        found = measure(z, *others, **options)
        if num_valid is None:
            return found
        share = len(z) / num_valid
        return found._replace(loss=found.loss * share, ce=found.ce * share, kd=found.kd * share)

    return parts


def _kd(options: LossOptions) -> Objective:
    arguments = loss_arguments(options)

    def parts(
        z: Tensor,
        v: Tensor,
        y: Tensor,
        *,
        selected: Tensor | None,
        kd_weight: float,
        grad_scale: Any = None,
        num_valid: Tensor | float | None = None,
    ) -> KDLossParts:
        return lrds_fast.kd_loss_parts(
            z,
            v,
            y,
            **(arguments | {"kd_weight": kd_weight}),
            selected=selected,
            grad_scale=grad_scale,
            num_valid=num_valid,
        )

    return parts


def _counted(z: Tensor, v: Tensor, y: Tensor, selected: Tensor | None, options: LossOptions) -> KDLossParts:
    """The weighted cross-entropy and the counts, from kd_loss without its divergence."""
    return lrds_fast.kd_loss_parts(
        z,
        v,
        y,
        selected=selected,
        ce_weight=options.ce_weight,
        ce_weight_unselected=options.ce_weight_unselected,
        kd_weight=0.0,
        label_smoothing=options.label_smoothing,
        revise=None if options.revise == "none" else options.revise,
        eta=options.eta,
    )


def _taught(z: Tensor, v: Tensor, y: Tensor, selected: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that have a teacher: student logits, teacher logits, targets."""
    if selected is None:
        return z[: len(v)], v, y[: len(v)]
    return z[selected], v[selected], y[selected]


def _dist(options: LossOptions) -> Objective:
    def parts(
        z: Tensor, v: Tensor, y: Tensor, *, selected: Tensor | None, kd_weight: float, grad_scale: Any = None
    ) -> KDLossParts:
        counted = _counted(z, v, y, selected, options)
        student, teacher, target = _taught(z, v, y, selected)
        if len(student) < 2:  # no correlation between samples
            return counted
        t = options.temperature
        if options.revise != "none":
            revised = lrds_fast.revise_labels(teacher, target, eta=options.eta, temperature=t)
            teacher = t * revised.clamp_min(torch.finfo(revised.dtype).tiny).log()
        share = len(student) / len(z)
        kd = share * lrds_fast.dist_loss(student, teacher, temperature=t)
        return counted._replace(loss=counted.loss + kd_weight * kd, kd=kd.detach())

    return parts


def _mlkd(options: LossOptions) -> Objective:
    def parts(
        z: Tensor, v: Tensor, y: Tensor, *, selected: Tensor | None, kd_weight: float, grad_scale: Any = None
    ) -> KDLossParts:
        counted = _counted(z, v, y, selected, options)
        if len(v) < len(z):  # the others' rows do not count
            selected = torch.arange(len(z), device=z.device) < len(v)
            v = torch.cat([v, v.new_zeros(len(z) - len(v), v.shape[1])])
        loss = lrds_fast.mlkd_loss(
            z,
            v,
            y,
            temperature=options.temperatures or options.temperature,
            ce_weight=options.ce_weight,
            ce_weight_unselected=options.ce_weight_unselected,
            kd_weight=kd_weight,
            revise=None if options.revise == "none" else options.revise,
            eta=options.eta,
            selected=selected,
        )
        kd = (loss.detach() - counted.loss.detach()) / kd_weight if kd_weight else torch.zeros_like(counted.kd)
        return counted._replace(loss=loss, kd=kd)

    return parts


def _revision(options: LossOptions) -> Objective:
    def parts(
        z: Tensor, v: Tensor, y: Tensor, *, selected: Tensor | None, kd_weight: float, grad_scale: Any = None
    ) -> KDLossParts:
        counted = _counted(z, v, y, selected, options)
        student, teacher, target = _taught(z, v, y, selected)
        loss = counted.loss.new_zeros(())
        if len(student):
            loss = (
                kd_weight * len(student) / len(z) * lrds_fast.revision_loss(student, teacher, target, eta=options.eta)
            )
        if len(student) < len(z):
            rest = z[len(v) :] if selected is None else z[~selected]
            labels = y[len(v) :] if selected is None else y[~selected]
            loss = loss + options.ce_weight_unselected * F.cross_entropy(rest.float(), labels) * len(rest) / len(z)
        return counted._replace(loss=loss, kd=loss.detach())

    return parts
