"""The training objective that samples are scored by: one sample's gradient and Hessian in its logits.

With s in [0, 1] the weight of sample i's teacher (`selected`), y its label, c_y a class weight (1 without), p' the
teacher's revised probabilities and T each of the loss's temperatures, one sample's objective is

    L(z; s) = a(s) c_y CE(z, y) + s kd_weight sum_T T^2 D(p'_T || softmax(z / T))
    a(s) = s ce_weight + (1 - s) ce_weight_unselected

For D = KL both terms are linear in their targets, so the Hessian in z needs no targets:

    d2L/dz2 = sum_t w_t J(softmax(z / T_t)),    J(q) = diag(q) - q q^T

with one term for the cross-entropy (T = 1) and one for each temperature. Another divergence is given its Hessian at q =
p', where the student agrees with its teacher: KL's times `agreement_curvature`. `TrainingObjective.hessian_terms` is
the only place that computes the weights w_t. For the last layer's closed form they are float64 (curvature.py); over
more layers `fisher_gradients` turns them into gradients of labels that the model itself would give.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lrds_fast import functional
from lrds_fast.divergences import DKD, JSD, KL, MSE, NKD, RKL, RLD, SKL, SRKL, TVD, Divergence, resolve
from lrds_fast.influence.inputs import check_choice
from lrds_fast.nn import KDLoss
from lrds_fast.ranks import Ranks

#: "objective": the Hessian of the training objective. "gt": that of the label's cross-entropy alone, weight 1.
HESSIANS = ("objective", "gt")

_RECORDED_HYPERPARAMETERS = (
    "temperature",
    "ce_weight",
    "kd_weight",
    "resolved_ce_weight_unselected",
    "revise",
    "eta",
    "revise_temperature",
    "standardize",
    "label_smoothing",
)


class HessianTerm(NamedTuple):
    """One term of the Hessian: weight (N,) of J(softmax(z / temperature)), row by row."""

    weight: Tensor
    temperature: float


LogitTerms = Callable[[Tensor], Sequence[tuple[Tensor, float]]]
"""From a batch's logits (B, C) to its Hessian's terms: weights (B,) >= 0 of J(softmax(z / T)), and T."""


def agreement_curvature(divergence: Divergence) -> float:
    """c of the divergence's Hessian in z at q = p', c J(softmax(z / T)).

    KL and reverse KL have c = 1, and a mixture's weight makes it smaller. dkd, rld, nkd and mse have another matrix
    than J there, and are given KL's. Raises ValueError for the total variation distance, which has a kink at q = p' and
    no positive semi-definite Hessian elsewhere.
    """
    match divergence:
        case JSD(weight):
            return weight * (1.0 - weight)
        case SKL(weight) | SRKL(weight):
            return (1.0 - weight) ** 2
        case TVD():
            raise ValueError(
                "hessian='objective' needs a divergence with a curvature; got a loss with divergence 'tvd', whose"
                " second derivative does not exist where student and teacher agree and is indefinite elsewhere: pass"
                " hessian='gt', the cross-entropy's, or curvature='identity'"
            )
        case KL() | RKL() | DKD() | RLD() | NKD() | MSE():
            return 1.0
    raise NotImplementedError(f"agreement_curvature has no case for the divergence {divergence!r}")


@dataclass(frozen=True, eq=False)
class TrainingObjective:
    """The objective of `loss`, and which Hessian of it is used.

    loss: its reduction matters only where there are class weights (see `normalised`). hessian: one of HESSIANS. Raises
    TypeError or ValueError for anything else.
    """

    loss: KDLoss = dataclasses.field(default_factory=KDLoss)
    hessian: str = "objective"

    def __post_init__(self) -> None:
        check_choice("hessian", self.hessian, HESSIANS)
        if not isinstance(self.loss, KDLoss):
            raise TypeError(f"loss must be a KDLoss or None; got {type(self.loss).__name__}")

    @classmethod
    def of(cls, loss: KDLoss | None, hessian: str) -> TrainingObjective:
        """The objective of `loss`; None: of KDLoss()."""
        return cls(KDLoss() if loss is None else loss, hessian)

    def loss_facts(self) -> dict[str, object]:
        """The hyperparameters that the scores depend on, as JSON can hold them."""
        facts = {name: getattr(self.loss, name) for name in _RECORDED_HYPERPARAMETERS}
        weight = self.loss.class_weight
        return {
            **facts,
            "divergence": repr(resolve(self.loss.divergence)),
            "class_weight": None if weight is None else weight.tolist(),
        }

    def normalised(self, ranks: Ranks, targets: Iterable[Tensor]) -> TrainingObjective:
        """The objective with class weights divided by their mean over the samples of all processes.

        reduction="mean" divides the sum of the cross-entropies by the sum of the class weights, and the sum of the
        divergences by the number of rows. With normalised weights both are divided by the number of rows, as H is. The
        objective is unchanged without class weights or under another reduction.

        targets: labels of this process's samples, (B,) int64 each; read only where they are needed.
        """
        weight = self.loss.class_weight
        if weight is None or self.loss.reduction != "mean":
            return self
        total = torch.zeros(2, dtype=torch.float64, device=weight.device)
        for y in targets:
            total[0] += weight[y.to(weight.device)].double().sum()
            total[1] += len(y)
        sum_of_weights, count = ranks.sum(total).unbind()
        if not sum_of_weights > 0:
            return self
        loss = copy.deepcopy(self.loss)
        loss.class_weight = (weight.double() * (count / sum_of_weights)).to(weight.dtype)
        return dataclasses.replace(self, loss=loss)

    @property
    def ce_weight_change(self) -> float:
        """What a teacher adds to the weight of its sample's cross-entropy: ce_weight - ce_weight_unselected."""
        return self.loss.ce_weight - self.loss.resolved_ce_weight_unselected

    def hessian_terms(self, target: Tensor, selected: Tensor | None, dtype: torch.dtype) -> list[HessianTerm]:
        """The Hessian's terms of samples with labels `target` (B,), the cross-entropy's first; weights (B,) in `dtype`.

        selected: (B,) weights of the samples' teachers, bool or floats in [0, 1]; None: 1 for all. Raises ValueError
        if a weight is negative, because H is then indefinite, or if the divergence has no curvature (tvd).
        """
        ones = torch.ones(target.shape, dtype=dtype, device=target.device)
        if self.hessian == "gt":
            return [HessianTerm(ones, 1.0)]
        loss = self.loss
        s = ones if selected is None else selected.to(ones)
        unselected = loss.resolved_ce_weight_unselected
        terms = self._weighted(s * loss.ce_weight + (1.0 - s) * unselected, s * loss.kd_weight, target)
        if any((term.weight < 0).any() for term in terms):
            raise ValueError(
                "hessian='objective' needs a loss whose weights are >= 0, or H is indefinite; got"
                f" ce_weight={loss.ce_weight}, ce_weight_unselected={unselected}, kd_weight={loss.kd_weight}"
            )
        return terms

    def teacher_terms(self, target: Tensor, dtype: torch.dtype) -> list[HessianTerm]:
        """What a teacher adds to its sample's Hessian, L(z; 1) - L(z; 0); weights may be negative.

        target: (B,) labels. Returns weights (B,) in `dtype`.
        """
        ce = torch.full(target.shape, self.ce_weight_change, dtype=dtype, device=target.device)
        return self._weighted(ce, torch.full_like(ce, self.loss.kd_weight), target)

    def _weighted(self, ce: Tensor, kd: Tensor, target: Tensor) -> list[HessianTerm]:
        if self.loss.class_weight is not None:
            ce = ce * self.loss.class_weight.to(ce)[target]
        if self.loss.kd_weight != 0:
            kd = kd * agreement_curvature(resolve(self.loss.divergence))
        return [HessianTerm(ce, 1.0), *(HessianTerm(kd, t) for t in functional.temperatures(self.loss.temperature))]

    def teacher_sign(self, target: Tensor, selected: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B,) 1 where H has the sample without its teacher, -1 where H has it with its teacher; 1 - 2 s in between.

        target: (B,), for shape and device. selected: as in hessian_terms.
        """
        if self.hessian == "gt":
            s = torch.zeros(target.shape, dtype=dtype, device=target.device)
        elif selected is None:
            s = torch.ones(target.shape, dtype=dtype, device=target.device)
        else:
            s = selected.to(dtype)
        return 1.0 - 2.0 * s

    def logit_gradient(self, of: str, z: Tensor, v: Tensor, y: Tensor) -> Tensor:
        """(B, C) gradients in the logits z of one term of each sample's objective.

        of: "gt", the label's cross-entropy with weight 1, without smoothing or class weight; "kd", the divergence with
        weight 1; "delta", L(z; 1) - L(z; 0), the change when the sample is given its teacher. z, v: student's and
        teacher's logits (B, C). y: labels (B,) int64.
        """
        loss = self.loss
        smoothing, class_weight = 0.0, None
        if of == "gt":
            weights = (1.0, 0.0)
        elif of == "kd":
            weights = (0.0, 1.0)
        else:
            weights = (self.ce_weight_change, loss.kd_weight)
            smoothing, class_weight = loss.label_smoothing, loss.class_weight
        return functional.kd_logit_gradient(
            z,
            v,
            y,
            temperature=loss.temperature,
            ce_weight=weights[0],
            kd_weight=weights[1],
            revise=loss.revise,
            eta=loss.eta,
            revise_temperature=loss.revise_temperature,
            divergence=loss.divergence,
            standardize=loss.standardize,
            label_smoothing=smoothing,
            class_weight=class_weight,
        )


def cross_entropy_gradient(z: Tensor, y: Tensor) -> Tensor:
    """(B, C) gradient of each row's cross-entropy with its label y (B,) in its logits z (B, C), in z's dtype."""
    return functional.kd_logit_gradient(z, z, y, temperature=1.0, ce_weight=1.0, kd_weight=0.0, revise=None)


def cross_entropy_terms(logits: Tensor, start: int = 0) -> list[HessianTerm]:
    """The Hessian of the label's cross-entropy alone, weight 1. start: unused; see factors.Terms."""
    return [HessianTerm(logits.new_ones(len(logits)), 1.0)]


def nonzero_terms(terms: Sequence[HessianTerm], ranks: Ranks) -> list[HessianTerm]:
    """The terms with a weight above 0 on any row of any process: all processes get the same terms."""
    present = ranks.sum(torch.stack([(term.weight > 0).sum() for term in terms]))
    return [term for term, count in zip(terms, present.tolist(), strict=True) if count]


def logit_hessian(z: Tensor, terms: Iterable[HessianTerm]) -> Tensor:
    """(B, C, C): sum_t w_t J(softmax(z / T_t)) for logits z (B, C), as dense matrices."""
    total = z.new_zeros(*z.shape, z.shape[1])
    for weight, temperature in terms:
        q = torch.softmax(z / temperature, dim=1)
        total += weight[:, None, None] * (torch.diag_embed(q) - q[:, :, None] * q[:, None, :])
    return total


def fisher_gradients(
    logits: Tensor, terms: Sequence[tuple[Tensor, float]], labels: int | str, generator: torch.Generator
) -> Iterator[Tensor]:
    """Logit gradients (B, C) whose outer products add up to sum_t w_t J(softmax(z / T_t)).

    labels: "all" takes every class with its probability: exact, one yield per class and term. A number takes that many
    draws from the model's own distribution: exact on average.
    """
    for weight, temperature in terms:
        q = torch.softmax(logits / temperature, dim=1)
        scale = weight.sqrt()[:, None]
        if labels == "all":
            for k in range(q.shape[1]):
                hot = torch.zeros_like(q)
                hot[:, k] = 1.0
                yield scale * q[:, k : k + 1].sqrt() * (q - hot)
            continue
        count = int(labels)
        for _ in range(count):
            drawn = torch.multinomial(q.double().cpu(), 1, generator=generator).to(q.device)
            yield scale / count**0.5 * (q - torch.zeros_like(q).scatter_(1, drawn, 1.0))
