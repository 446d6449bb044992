"""The students of lab_features.py: definitions of arms and their objectives, and training of many MLPs at once.

Each arm is defined by three tensors: for each sample a cross-entropy weight c, a divergence weight k, and the teacher's
distribution p' at temperature T. The gradient of sample i by its logits z is

    c_i (softmax(z) - e_y) + k_i T (softmax(z / T) - p'_i).

Selections use scores of the last layer, computed as in the library: H is EK-FAC and fitted once, and each fold of the
held-out slice has its direction. The standard error of a score is that of its mean over the folds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast import KDLoss, revise_labels
from lrds_fast.influence.curvature import LayerRows
from lrds_fast.influence.last_layer import LastLayer
from lrds_fast.influence.mismatch import agreement, mixture
from lrds_fast.influence.objective import TrainingObjective
from lrds_fast.influence.options import CurvatureOptions
from lrds_fast.influence.scores import parse_score_names

#: Folds of the held-out slice that the standard error is made of.
FOLDS = 10


# --- Revision -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Revision:
    """How the teacher's distribution is changed where its top class is not the label.

    kind: "lr" (arXiv 2404.03693) at temperature `at` (None: the temperature of the divergence, as published), "swap",
    "mft"; "margin": lr with an eta for each row, such that the label leads by as much as it was behind; "posterior": on
    all rows the label's logit rises by `strength`: Bayes' rule where the odds of the label against any other class
    are e^strength.
    """

    kind: str = "lr"
    at: float | None = 1.0
    eta: float = 0.8
    strength: float = 0.0


def revise_logits(v: Tensor, y: Tensor, at: float, eta: float | Tensor) -> Tensor:
    """v (N, C) with the label's logit moved on wrong rows, so that softmax(v' / at) is the revised distribution.

    eta: a number, or one a row, (N,). With beta = eta / (1 + p_max - p_y),
    v'_y = at (logsumexp(v / at) + log(p_y + (1 - beta) / beta)).
    """
    scaled = v.double() / at
    p = scaled.softmax(dim=1)
    p_y, top = p.gather(1, y[:, None])[:, 0], p.amax(dim=1)
    beta = eta / (1.0 + top - p_y)
    moved = at * (scaled.logsumexp(dim=1) + (p_y + (1.0 - beta) / beta).log())
    wrong = v.gather(1, y[:, None])[:, 0] < v.amax(dim=1)
    revised = v.double().scatter(1, y[:, None], moved[:, None])
    return torch.where(wrong[:, None], revised, v.double()).to(v.dtype)


def revised_logits(v: Tensor, y: Tensor, revision: Revision | None, temperature: float) -> Tensor:
    """Logits v' (N, C) such that softmax(v' / temperature) is the target distribution of the student."""
    if revision is None:
        return v
    if revision.kind == "lr" and revision.at is not None:
        return revise_logits(v, y, revision.at, revision.eta)
    if revision.kind == "margin":
        p = (v.double() / (revision.at or temperature)).softmax(dim=1)
        lost_by = p.amax(dim=1) - p.gather(1, y[:, None])[:, 0]
        return revise_logits(v, y, revision.at or temperature, (1.0 - lost_by).clamp(min=0.02))
    if revision.kind == "posterior":
        return v + revision.strength * F.one_hot(y, v.shape[1])
    p = revise_labels(
        v.double(), y, eta=revision.eta, temperature=temperature, revise_temperature=None, policy=revision.kind
    )
    return (temperature * p.log()).to(v.dtype)


# --- Selection ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """The rule by which samples keep the teacher.

    by: the samples that keep it.
        "threshold": gain < value. "confidence": gain <= value standard errors. "ratio": the share `value` with the
        lowest gain. "random": as many random samples as `like` keeps. "teacher_correct": the teacher is right.
        "teacher_loss": the share `value` with the lowest cross-entropy of the teacher. "divergence": the share `value`
        with the lowest divergence of student and teacher. "outlier": the divergence is at most `value` robust standard
        deviations above its median. "agreement": the share `value` with the highest correlation of student's and
        teacher's logits. "match": the answer is not more likely another sample's (`mismatch`). "robust": both "match"
        and "outlier" keep the sample. "oracle": the answer was not corrupted.
        Weights for all samples: "soft": the probability that the true gain is below 0 (`shrunk`). "soft_z": the
        probability that a standard normal variable is below value - gain / error. "match_soft": the probability that
        the answer is the sample's own.
    cap: the largest share that is denied, the worst samples first; per_class: of each class. ranked: "gain" or "z",
    the order in which ratio and cap deny samples. term: only samples with term > 0 are denied.
    """

    by: str
    value: float = 0.0
    cap: float = 1.0
    per_class: bool = False
    ranked: str = "gain"
    like: Selection | None = None
    term: bool = False


@dataclass(frozen=True)
class Scored:
    """What selections are computed from: gain and its standard error (N,); term (N,), the gain if denied samples kept
    their cross-entropy weight; the divergence of student and teacher (N,), their logits z and v (N, C), labels y (N,),
    a random permutation `order` (N,), the corrupted rows (N,) bool."""

    gain: Tensor
    error: Tensor
    term: Tensor
    divergence: Tensor
    z: Tensor
    y: Tensor
    v: Tensor
    order: Tensor
    corrupted: Tensor


def shrunk(gain: Tensor, error: Tensor, rounds: int = 200) -> Tensor:
    """P(true gain < 0 | gain) where gain ~ N(true, error^2), true ~ N(mu, tau^2); mu, tau by EM. (N,)."""
    gain, noise = gain.double(), error.double().square()
    mu, tau2 = gain.mean(), (gain.var() - noise.mean()).clamp(min=0.05 * float(gain.var()))
    for _ in range(rounds):
        spread = tau2 * noise / (tau2 + noise)
        mean = (gain * tau2 + mu * noise) / (tau2 + noise)
        mu, tau2 = mean.mean(), (spread + (mean - mean.mean()).square()).mean()
    spread = tau2 * noise / (tau2 + noise)
    mean = (gain * tau2 + mu * noise) / (tau2 + noise)
    weight: Tensor = torch.special.ndtr(-mean / spread.clamp(min=1e-30).sqrt())
    return weight.float()


def mismatch(z: Tensor, v: Tensor, order: Tensor) -> Tensor:
    """The library's score `mismatch` (N,), with the teacher's rows permuted by `order`."""
    return mixture(agreement(z, v), agreement(z, v[order])).float()


def kept(selection: Selection, scored: Scored) -> Tensor:
    """The teacher's weight for each sample, (N,) float32 in [0, 1]."""
    size = len(scored.gain)
    gain = scored.gain
    if selection.by == "soft":
        return shrunk(gain, scored.error)
    if selection.by == "robust":
        return kept(Selection("match"), scored) * kept(replace(selection, by="outlier"), scored)
    if selection.by.startswith("match"):
        foreign = mismatch(scored.z, scored.v, scored.order)
        return 1.0 - foreign if selection.by == "match_soft" else (foreign <= 0.5).float()
    if selection.by == "soft_z":
        weight: Tensor = torch.special.ndtr(selection.value - gain / scored.error.clamp(min=1e-30))
        return weight
    if selection.by == "random":
        assert selection.like is not None
        count = int((kept(selection.like, scored) > 0).sum())
        weights = torch.zeros(size)
        weights[scored.order[:count]] = 1.0
        return weights
    if selection.by == "oracle":
        return (~scored.corrupted).float()
    if selection.by == "teacher_correct":
        return (scored.v.gather(1, scored.y[:, None])[:, 0] >= scored.v.amax(dim=1)).float()
    worst = gain / scored.error.clamp(min=1e-30) if selection.ranked == "z" else gain
    if selection.by == "threshold":
        denied = ~(gain < selection.value)
    elif selection.by == "confidence":
        denied = gain > selection.value * scored.error
    elif selection.by == "outlier":
        away = scored.divergence - scored.divergence.median()
        # The normal distribution's median absolute deviation is 0.6745 standard deviations.
        denied = away > selection.value / 0.6745 * away.abs().median()
    elif selection.by in ("ratio", "teacher_loss", "divergence", "agreement"):
        if selection.by == "teacher_loss":
            worst = F.cross_entropy(scored.v, scored.y, reduction="none")
        if selection.by == "agreement":
            worst = -agreement(scored.z, scored.v)
        if selection.by == "divergence":
            worst = scored.divergence
        denied = torch.zeros(size, dtype=torch.bool)
        denied[worst.argsort(stable=True)[math.floor(selection.value * size + 0.5) :]] = True
    else:
        raise ValueError(f"there is no selection by {selection.by!r}")
    if selection.term:
        denied &= scored.term > 0
    if selection.cap < 1.0:
        groups = scored.y if selection.per_class else torch.zeros_like(scored.y)
        for group in groups.unique():
            members = (groups == group).nonzero()[:, 0]
            most = math.floor(selection.cap * len(members) + 0.5)
            denied_members = members[denied[members]]
            denied[denied_members[worst[denied_members].argsort(descending=True, stable=True)[most:]]] = False
    return (~denied).float()


# --- Arms -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A way to train a student.

    Cross-entropy weights: ce for rows with the teacher (None: the one of CE_WEIGHTS with which plain KD has the lowest
    NLL on the held-out slice); unselected for denied rows (None: `ce`); ce_wrong for rows where the teacher is wrong
    (None: `ce`); score_ce in the objective of the scores (None: that of training). rises_to: the weight of the rows
    with the teacher changes exponentially from ce to it over all epochs (None: it is constant).
    keeps_teacher: denied rows keep the teacher, and only their cross-entropy weight changes. rescored: samples are
    scored again after two thirds of the epochs. late: they are scored for the first time then. folds: the number of
    folds for the standard error. on_training: the training samples replace the held-out slice; for each sample, the
    folds that do not contain it. calibrated: the held-out logits are divided by the temperature with which their loss
    is lowest.
    """

    name: str
    ce: float | None = 0.1
    kd: float = 0.9
    revision: Revision | None = None
    selection: Selection | None = None
    unselected: float | None = 1.0
    ce_wrong: float | None = None
    keeps_teacher: bool = False
    rescored: bool = False
    late: bool = False
    score_ce: float | None = None
    folds: int = FOLDS
    on_training: bool = False
    calibrated: bool = False
    rises_to: float | None = None

    @property
    def growth(self) -> float:
        """rises_to / ce; 1 if the weight is constant."""
        assert self.ce is not None
        return 1.0 if self.rises_to is None else self.rises_to / self.ce

    def at(self, ce: float) -> Arm:
        """The arm with `ce` as its cross-entropy weight, unless it has a weight itself."""
        known = ce if self.ce is None else self.ce
        unselected = known if self.unselected is None else max(self.unselected, known)
        return replace(self, ce=known, unselected=unselected)


#: Cross-entropy weights among which "tuned" chooses.
CE_WEIGHTS = (0.1, 0.3, 1.0, 3.0)


def kd_name(ce: float) -> str:
    """The arm of plain KD with this cross-entropy weight."""
    return "kd" if ce == 0.1 else f"kd_ce{ce:g}"


# --- Problems and training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One seed of one regime: inputs x (N, D), labels y (N,), the teacher's logits v (N, C), whose answer was corrupted
    (N,) bool; the held-out slice and the test set; the seed of initial weights and orders."""

    x: Tensor
    y: Tensor
    v: Tensor
    corrupted: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    seed: int
    epochs: int
    temperature: float = 4.0


@dataclass(frozen=True)
class Training:
    """How students are trained: an MLP, AdamW, a cosine schedule.

    Adam's steps do not grow with the loss, so a larger weight of a term does not act as a larger learning rate.
    """

    hidden: int = 64
    batch: int = 128
    rate: float = 5e-3
    decay: float = 0.01
    together: int = 16


@dataclass
class Objective:
    """c, k (N,) and p' (N, C) of the module's formula. c is ce * growth ** t, where growth has shape (N,) and t is the
    finished share of the epochs in the middle of an epoch."""

    ce: Tensor
    kd: Tensor
    target: Tensor
    growth: Tensor


State = list[Tensor]
"""An MLP's weights and biases, layer by layer; then Adam's first moments, then its second moments."""


def initial(problem: Problem, training: Training) -> State:
    """He's initialisation, from the problem's seed."""
    generator = torch.Generator().manual_seed(problem.seed * 7919 + 1)
    sizes = (problem.x.shape[1], training.hidden, training.hidden, problem.classes)
    state = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        state += [torch.randn(inputs, outputs, generator=generator) * (2 / inputs) ** 0.5, torch.zeros(outputs)]
    return state + [torch.zeros_like(tensor) for tensor in state + state]


def orders(problem: Problem) -> Tensor:
    """(epochs, N): the order of the samples, from the problem's seed."""
    generator = torch.Generator().manual_seed(problem.seed * 7919 + 2)
    return torch.stack([torch.randperm(len(problem.y), generator=generator) for _ in range(problem.epochs)])


def hidden_of(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """(A, B, hidden): the inputs of the last layers of A stacked MLPs; weights: see `stacked`."""
    models, width = weights[2].shape[0], weights[2].shape[1]
    first = torch.addmm(weights[1], x, weights[0]).relu().view(len(x), models, width).transpose(0, 1)
    return torch.baddbmm(weights[3], first, weights[2]).relu()


def logits_of(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """The logits (A, B, C) of A stacked MLPs on x (B, D)."""
    return torch.baddbmm(weights[5], hidden_of(weights, x), weights[4])


def stacked(tensors: Sequence[State]) -> State:
    """Weights of A models; the first layer as one matrix (D, A * hidden), since all see the same x."""
    columns = [torch.stack(list(column)) for column in zip(*tensors, strict=True)]
    first = columns[0].permute(1, 0, 2).reshape(columns[0].shape[1], -1)
    return [first.contiguous(), columns[1].flatten(), columns[2], columns[3][:, None], columns[4], columns[5][:, None]]


def unstacked(weights: State) -> list[State]:
    """The inverse of stacked."""
    models, width = weights[2].shape[0], weights[2].shape[1]
    first = weights[0].view(-1, models, width)
    bias = weights[1].view(models, width)
    return [
        [
            first[:, a].clone(),
            bias[a].clone(),
            weights[2][a].clone(),
            weights[3][a, 0].clone(),
            weights[4][a].clone(),
            weights[5][a, 0].clone(),
        ]
        for a in range(models)
    ]


def logit_gradient(z: Tensor, y: Tensor, ce: Tensor, kd: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The gradient of the module's formula, (..., B, C); z, target (..., B, C), y (B,), ce, kd (..., B)."""
    gradient = torch.softmax(z, dim=-1).mul_(ce[..., None])
    gradient -= ce[..., None] * F.one_hot(y, z.shape[-1])
    return gradient.add_((torch.softmax(z / temperature, dim=-1) - target).mul_(temperature * kd[..., None]))


def train(
    problem: Problem,
    states: Sequence[State],
    objectives: Sequence[Objective],
    training: Training,
    span: tuple[int, int],
) -> list[State]:
    """The states after the epochs span[0] to span[1]; models share each batch."""
    ends: list[State] = []
    for first in range(0, len(states), training.together):
        group = slice(first, first + training.together)
        ends += _train_group(problem, states[group], objectives[group], training, span)
    return ends


def _train_group(
    problem: Problem,
    states: Sequence[State],
    objectives: Sequence[Objective],
    training: Training,
    span: tuple[int, int],
) -> list[State]:
    weights = stacked([state[:6] for state in states])
    optimizer = torch.optim.AdamW(weights, lr=training.rate, weight_decay=training.decay, fused=True)
    firsts, seconds = (stacked([state[part] for state in states]) for part in (slice(6, 12), slice(12, 18)))
    per_epoch = -(-len(problem.y) // training.batch)
    step = per_epoch * span[0]
    for weight, mean, square in zip(weights, firsts, seconds, strict=True):
        moments = {"step": torch.tensor(float(step)), "exp_avg": mean, "exp_avg_sq": square}
        optimizer.state[weight.requires_grad_()].update(moments)
    temperature = problem.temperature
    start, kd, growth = (
        torch.stack([getattr(o, key) for o in objectives])[..., None] for key in ("ce", "kd", "growth")
    )
    kd = temperature * kd
    labels, taught = F.one_hot(problem.y, problem.classes), kd * torch.stack([o.target for o in objectives])
    steps = per_epoch * problem.epochs
    order = orders(problem)
    for epoch in range(*span):
        ce = start * growth ** ((epoch + 0.5) / problem.epochs)
        # c e_y + k T p', what does not depend on the student, (N, A, C): a batch's rows are gathered in long pieces.
        fixed = (taught + ce * labels).transpose(0, 1).contiguous()
        for rows in order[epoch].split(training.batch):
            optimizer.param_groups[0]["lr"] = training.rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            logits = logits_of(weights, problem.x[rows])
            z = logits.detach()
            gradient = torch.softmax(z, dim=-1).mul_(ce[:, rows])
            gradient.addcmul_(torch.softmax(z / temperature, dim=-1), kd[:, rows])
            gradient -= fixed.index_select(0, rows).transpose(0, 1)
            logits.backward(gradient.div_(len(rows)))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    means: State = [optimizer.state[weight]["exp_avg"] for weight in weights]
    squares: State = [optimizer.state[weight]["exp_avg_sq"] for weight in weights]
    parts = [unstacked(tensors) for tensors in ([weight.detach() for weight in weights], means, squares)]
    return [sum(state, []) for state in zip(*parts, strict=True)]


def objective_of(arm: Arm, problem: Problem, weight: Tensor | None) -> Objective:
    """The arm's objective; arm.ce must be a number. weight: (N,) of the teacher; None for 1 everywhere, as before there
    are scores."""
    assert arm.ce is not None and arm.unselected is not None
    v, y = problem.v, problem.y
    w = torch.ones(len(y)) if weight is None else weight
    ce = torch.full_like(w, arm.ce)
    if arm.ce_wrong is not None:
        ce[v.gather(1, y[:, None])[:, 0] < v.amax(dim=1)] = arm.ce_wrong
    ce = w * ce + (1.0 - w) * arm.unselected
    kd = torch.full_like(w, arm.kd) if arm.keeps_teacher else arm.kd * w
    target = torch.softmax(revised_logits(v, y, arm.revision, problem.temperature) / problem.temperature, dim=1)
    return Objective(ce, kd, target, torch.where(w > 0, arm.growth, 1.0))


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with which softmax(logits / temperature) has the lowest cross-entropy, of 201 from 0.1 to 10."""
    tried = torch.logspace(-1, 1, 201)
    losses = torch.stack([F.cross_entropy(logits / temperature, labels) for temperature in tried])
    return float(tried[losses.argmin()])


def scores(arm: Arm, problem: Problem, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `Scored` begins with: the library's kd_gain (N,) under the arm's objective, its standard error over held-out
    folds, the term (zeros if the arm's selection does not need it), the divergence (N,) and the student's logits."""
    assert arm.ce is not None and arm.unselected is not None
    # A third of the epochs is finished, or two thirds; a weight that rises is that of the first.
    ce = arm.ce * arm.growth ** (1 / 3) if arm.score_ce is None else arm.score_ce
    weights = stacked([state[:6]])
    with torch.no_grad():
        h, val_h = hidden_of(weights, problem.x)[0], hidden_of(weights, problem.val_x)[0]
        z, val_z = (torch.addmm(state[5], part, state[4]) for part in (h, val_h))
    v = revised_logits(problem.v, problem.y, arm.revision, problem.temperature)
    if arm.calibrated:
        val_z = val_z / best_temperature(val_z, problem.val_y)
    held = (h, z, problem.y) if arm.on_training else (val_h, val_z, problem.val_y)

    def gains(unselected: float) -> Tensor:
        """(folds, N), with the cross-entropy weight `unselected` for samples without the teacher."""
        loss = KDLoss(problem.temperature, ce_weight=ce, kd_weight=arm.kd, ce_weight_unselected=unselected, revise=None)
        layer = LastLayer(LayerRows(h, z, True), v, problem.y, torch.float32, TrainingObjective(loss))
        layer.fit(CurvatureOptions())
        return torch.stack([fold_gain(layer, fold) for fold in range(arm.folds)]).double()

    def fold_gain(layer: LastLayer, fold: int) -> Tensor:
        fold_h, fold_z, fold_y = (part[fold :: arm.folds] for part in held)
        # The gradient of the fold's mean cross-entropy in the last layer.
        errors = (fold_z.double().softmax(dim=1) - F.one_hot(fold_y, problem.classes)) / len(fold_y)
        layer.aim((errors.T @ F.pad(fold_h.double(), (0, 1), value=1.0))[None], torch.ones(1, dtype=torch.float64))
        names = parse_score_names("kd_gain")
        return torch.cat([layer.scores(part, names)[0]["kd_gain"] for part in layer.parts(names)])

    each = gains(max(arm.unselected, ce))
    needs_term = arm.selection is not None and arm.selection.term
    term = gains(ce).mean(dim=0).float() if needs_term else torch.zeros(len(h))
    if arm.on_training:
        others = torch.arange(len(h)) % arm.folds != torch.arange(arm.folds)[:, None]
        each = each.T[others.T].reshape(len(h), arm.folds - 1).T
    log_q, log_p = ((x / problem.temperature).log_softmax(dim=1) for x in (z, v))
    divergence = problem.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=1)
    return each.mean(dim=0).float(), (each.std(dim=0) / len(each) ** 0.5).float(), term, divergence, z


def measures(z: Tensor, y: Tensor, bins: int = 15) -> dict[str, float]:
    """acc and ece in percent, nll, brier of logits (M, C)."""
    log_p = z.log_softmax(dim=1)
    p = log_p.exp()
    confidence, predicted = p.max(dim=1)
    right = (predicted == y).float()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins).index_add_(0, place, confidence - right)
    # |p - e_y|^2 = |p|^2 - 2 p_y + 1
    brier = p.square().sum(dim=1).mean() - 2 * p.gather(1, y[:, None]).mean() + 1
    nll = F.nll_loss(log_p, y)
    return {
        "acc": 100 * float(right.mean()),
        "nll": float(nll),
        "ece": 100 * float(gap.abs().sum() / len(y)),
        "brier": float(brier),
    }


class Trunk(NamedTuple):
    """The options of an arm on which its objective depends before there are scores."""

    ce: float | None
    kd: float
    ce_wrong: float | None
    revision: Revision | None
    growth: float


def run(problem: Problem, arms: Sequence[Arm], training: Training) -> list[dict[str, float]]:
    """Trains the arms' students on a problem; returns one dict of results for each arm. Every arm.ce must be a number.

    Scores are computed after a third of the epochs. Arms are trained as one student as long as their objectives agree.
    """
    first, second = problem.epochs // 3, 2 * problem.epochs // 3
    # Before there are scores, arms with the same objective share a student.
    trunk_of = [Trunk(arm.ce, arm.kd, arm.ce_wrong, arm.revision, arm.growth) for arm in arms]
    trunks = list(dict.fromkeys(trunk_of))
    leaders = [arms[trunk_of.index(trunk)] for trunk in trunks]
    start = initial(problem, training)
    states = train(
        problem, [start] * len(trunks), [objective_of(arm, problem, None) for arm in leaders], training, (0, first)
    )
    at_first = dict(zip(trunks, states, strict=True))

    order = torch.randperm(len(problem.y), generator=torch.Generator().manual_seed(problem.seed * 7919 + 3))
    cached: dict[object, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = {}

    def weight_of(arm: Arm, state: State, when: object) -> Tensor | None:
        if arm.selection is None or (arm.late and isinstance(when, Trunk)):
            return None
        key = (
            when, arm.unselected, arm.growth, arm.score_ce, arm.folds, arm.on_training, arm.calibrated,
            arm.selection.term,
        )  # fmt: skip
        if key not in cached:
            cached[key] = scores(arm, problem, state)
        return kept(arm.selection, Scored(*cached[key], problem.y, problem.v, order, problem.corrupted))

    weights = [weight_of(arm, at_first[trunk], trunk) for arm, trunk in zip(arms, trunk_of, strict=True)]
    objectives = [objective_of(arm, problem, weight) for arm, weight in zip(arms, weights, strict=True)]
    # Arms whose selections agree still share a student.
    keys = [
        (trunk, o.ce.numpy().tobytes(), o.kd.numpy().tobytes(), arm.name if arm.rescored or arm.late else "")
        for trunk, arm, o in zip(trunk_of, arms, objectives, strict=True)
    ]
    distinct = {key: place for place, key in reversed(list(enumerate(keys)))}
    branches = list(distinct.values())
    states = train(
        problem, [at_first[trunk_of[i]] for i in branches], [objectives[i] for i in branches], training, (first, second)
    )
    for at, i in enumerate(branches):
        if arms[i].rescored or arms[i].late:
            weights[i] = weight_of(arms[i], states[at], (i, "again"))
            objectives[i] = objective_of(arms[i], problem, weights[i])
    states = train(problem, states, [objectives[i] for i in branches], training, (second, problem.epochs))
    ends = dict(zip(distinct, states, strict=True))

    results = {key: final_measures(problem, state) for key, state in ends.items()}
    return [
        results[key] | selection_facts(problem, objective, weight)
        for key, objective, weight in zip(keys, objectives, weights, strict=True)
    ]


@torch.no_grad()
def final_measures(problem: Problem, state: State) -> dict[str, float]:
    """`measures` on the test set; val_acc and val_nll on the held-out slice."""
    weights = stacked([state[:6]])
    test = measures(logits_of(weights, problem.test_x)[0], problem.test_y)
    val = measures(logits_of(weights, problem.val_x)[0], problem.val_y)
    return test | {"val_acc": val["acc"], "val_nll": val["nll"]}


def selection_facts(problem: Problem, objective: Objective, weight: Tensor | None) -> dict[str, float]:
    """What revision and selection did to the samples; NaN for the mean of no samples.

    kept: the mean weight of the teacher. teacher_wrong: the share of rows where the teacher is wrong. p_wrong, p_right:
    the probability of the label in p', on rows where the teacher is wrong and where it is right. denied_wrong,
    denied_corrupted: of the denied weight, the share on rows where the teacher is wrong, and on corrupted rows.
    weight: (N,) of the teacher, None for 1 everywhere.
    """
    label = problem.y[:, None]
    wrong = problem.v.gather(1, label)[:, 0] < problem.v.amax(dim=1)
    p_y = objective.target.gather(1, label)[:, 0]
    w = torch.ones(len(problem.y)) if weight is None else weight
    denied = (1.0 - w).double()
    total = float(denied.sum())
    return {
        "kept": float(w.double().mean()),
        "teacher_wrong": float(wrong.double().mean()),
        "p_wrong": float(p_y[wrong].mean()) if wrong.any() else math.nan,
        "p_right": float(p_y[~wrong].mean()) if not wrong.all() else math.nan,
        "denied_wrong": float(denied[wrong].sum()) / total if total else math.nan,
        "denied_corrupted": float(denied[problem.corrupted].sum()) / total if total else math.nan,
    }
