"""Scores of a classifier's training samples from its last layer alone."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast import functional
from lrds_fast._version import __version__
from lrds_fast.divergences import resolve
from lrds_fast.influence.curvature import (
    CHUNK_BYTES,
    CURVATURES,
    Curvature,
    HessianTerm,
    Identity,
    Pieces,
    Rows,
    fit_curvature,
)
from lrds_fast.influence.inputs import (
    check_choice,
    check_damping,
    check_device,
    check_folds,
    check_like,
    check_logits,
    check_samples,
    check_scores,
    check_selected,
)
from lrds_fast.influence.mismatch import Agreements
from lrds_fast.influence.scores import ERROR_SUFFIX, ScoreName, Scores, parse_score_names, split_errors, uniform_scores
from lrds_fast.nn import KDLoss
from lrds_fast.ranks import Ranks

HESSIANS = ("objective", "gt")


@torch.no_grad()
def last_layer_scores(
    *,
    features: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    val_features: Tensor | None = None,
    val_logits: Tensor | None = None,
    val_target: Tensor | None = None,
    scores: str | Sequence[str] = ("kd_gain",),
    curvature: str = "ekfac",
    damping: float | None = None,
    damping_scale: float = 0.1,
    hessian: str = "objective",
    folds: int | None = None,
    selected: Tensor | None = None,
    bias: bool = True,
    loss: KDLoss | None = None,
) -> Scores:
    """Scores every sample by what its teacher does to the student's last layer, z = W h + b. LOWER = keep the teacher.

    kd_gain (the default) is -g_val^T H^-1 (ddelta_i outer [h_i; 1]): n times the predicted change of the held-out
    cross-entropy when sample i is given its teacher, so negative = helpful. ddelta_i is the logit gradient of `loss`
    with the row selected minus the one with it unselected. The n * change reading holds for curvature="exact" and
    damping = the weight decay; under the default relative damping, rank by it.

    features: (N, d) inputs h of the layer. student_logits, teacher_logits: (N, C); -inf (masked classes) is legal.
    target: (N,) int32/int64 in [0, C). val_features (M, d), val_logits (M, C), val_target (M,): a slice held out of the
    training set, never the test set; needed by kd_gain and kd_gain_ns. All on one device. Factors are computed in
    float64; scores in float64 if any of features and logits is, else in float32.

    scores: among kd_gain, kd_gain_ns (one Newton step of the retraining instead of its derivative: a C x C solve per
    sample, for small heads and audits), self_influence, param_shift (of the label's gradient; or param_shift:gt, :kd,
    :delta), conflict, mismatch, and the baselines random (seed 0; or random:<seed>), all, none, teacher_correct, ce,
    kd, el2n, grand.
    mismatch, in [0, 1], is the probability that the teacher's answer belongs to another sample: select with
    threshold=0.5. From all samples' logits as they are, without label revision, held-out slice or curvature. 0 where a
    sample's logits say nothing (all equal, or fewer than 3 classes that neither model excludes), and, with a warning,
    for all where fewer than 20 samples' logits say something.
    curvature: H is "identity", "kfac", "ekfac", or "exact" (dense up to 5000 parameters of the layer; beyond that
    conjugate gradients, for kd_gain only).
    damping: >= 0, added to every eigenvalue (to identity's 1 only if given); None: damping_scale * mean eigenvalue.
    With damping 0 the inverse is the pseudo-inverse. A curvature that is zero up to rounding, as that of a student that
    has memorised its training set, is an error unless damping > 0 is given.
    hessian: "objective", that of the training objective, sample i's cross-entropy and divergence weighted as `loss`
    does; or "gt", that of the cross-entropy alone.
    folds: the standard error of kd_gain (Scores.standard_error) is taken over so many parts of the held-out slice, row
    j in part j modulo folds; None: 10. 0: no standard error. H is the same for all parts, so that it is the error from
    the choice of the held-out samples alone. There are at most as many parts as held-out samples.
    selected: (N,) bool or floats in [0, 1], who had the teacher in the training so far (None: all). Enters H alone.
    bias: whether the layer has one. loss: a KDLoss; None: KDLoss().

    Returns Scores, a mapping from the names asked for to (N,) tensors on the inputs' device. Raises ValueError or
    TypeError naming the argument, and for a NaN or a score that is not finite the sample. Memory beyond the inputs: one
    chunk of rows (64 MiB), the factors (C^2 + D^2 + a few C*D float64) and the scores; a C x d gradient per sample is
    never formed.
    """
    names = parse_score_names(scores)
    kinds = {name.kind for name in names}
    check_choice("curvature", curvature, CURVATURES)
    check_choice("hessian", hessian, HESSIANS)
    damping = None if damping is None else check_damping("damping", damping)
    damping_scale = check_damping("damping_scale", damping_scale)
    folds = check_folds(folds, FOLDS)
    loss = checked_loss(loss)
    check_samples(features, student_logits, target)
    check_like("teacher_logits", teacher_logits, "student_logits", student_logits)
    check_logits("teacher_logits", teacher_logits)
    check_device("features", features, [("teacher_logits", teacher_logits)])
    if selected is not None:
        check_selected(selected, features)

    wide = torch.float64 in (features.dtype, student_logits.dtype, teacher_logits.dtype)
    dtype = torch.float64 if wide else torch.float32
    y = target.long()
    layer = LastLayer(
        Rows(features, student_logits, bias), teacher_logits, y, dtype, loss, hessian=hessian, selected=selected
    )
    if not kinds.isdisjoint(CURVED):
        layer.fit(curvature, damping=damping, damping_scale=damping_scale)
    if not kinds.isdisjoint(DIRECTED):
        validation = _checked_validation((features, student_logits), val_features, val_logits, val_target)
        layer.aim(*_fold_gradients(*validation, bias=bias, folds=folds))
    result: dict[str, Tensor] = {}
    teacher_pred = torch.empty_like(y)
    for part in layer.parts(names):
        found, teacher_pred[part] = layer.scores(part, names)
        for key, column in found.items():
            check_scores(key, column, part.start)
            result.setdefault(key, features.new_empty(layer.rows.count, dtype=dtype))[part] = column
    values, errors = split_errors(result)
    for name in names:
        if name.kind == "random":
            values[name.key] = uniform_scores(0, layer.rows.count, name.seed, like=features.new_empty(0, dtype=dtype))
        elif name.kind == "mismatch":
            agreements = Agreements()
            for part in layer.rows.chunks():
                agreements.add(part.start, student_logits[part], teacher_logits[part])
            values[name.key] = agreements.probabilities(layer.rows.ranks).to(features.device, dtype)
    meta = {
        "num_samples": layer.rows.count,
        "num_classes": layer.rows.classes,
        "num_features": features.shape[1],
        "bias": bias,
        "curvature": curvature,
        "hessian": hessian,
        "damping": layer.damping,
        "folds": layer.folds,
        "loss": loss_facts(loss),
        "library_version": __version__,
    }
    ordered = {name.key: values[name.key] for name in names}
    return Scores(ordered, target=y, teacher_pred=teacher_pred, meta=meta, standard_error=errors)


class LastLayer:
    """The last layer's rows, their curvature once fitted, and their scores, slice by slice.

    rows: this process's, with rows.ranks. teacher: (N, C) logits. y: (N,) int64. dtype: what rows are scored in.
    selected: (N,) weights of these rows.
    """

    def __init__(
        self,
        rows: Rows,
        teacher: Tensor | Pieces,
        y: Tensor,
        dtype: torch.dtype,
        loss: KDLoss,
        *,
        hessian: str,
        selected: Tensor | None,
    ) -> None:
        self.rows, self._teacher, self._y, self._dtype = rows, teacher, y, dtype
        self._loss = as_trained(loss, rows.ranks, [y])
        self._hessian, self._selected = hessian, selected
        self._curvature: Curvature = Identity(None)
        self._direction = torch.empty(0, dtype=dtype, device=rows.features.device)
        self._spread: Tensor | None = None
        self.damping: float | None = None

    def fit(
        self, curvature: str, *, damping: float | None, damping_scale: float, where: str = "the last layer"
    ) -> None:
        """Fits H to the rows of all processes. Raises ValueError, naming the layer `where`, if H is about 0."""
        terms = _hessian_terms(self.rows, self._y, self._hessian, self._selected, self._loss)
        if not terms and curvature != "identity":
            _report_zero_hessian(damping)
        self._curvature = fit_curvature(
            curvature,
            self.rows,
            terms,
            damping=damping,
            damping_scale=damping_scale,
            dtype=self._dtype,
            where=where,
        )
        self.damping = self._curvature.damping

    def use(self, curvature: Curvature) -> None:
        """Takes an H that was fitted elsewhere."""
        self._curvature, self.damping = curvature, curvature.damping

    @property
    def folds(self) -> int:
        """The parts of the held-out slice that standard errors are taken over; 0 where there are none."""
        return 0 if self._spread is None else len(self._spread)

    def aim(self, sums: Tensor, counts: Tensor) -> None:
        """Sets H^-1 g_val, and what the standard error needs where there are several parts of the held-out slice.

        sums: (F, C, D) float64, the gradient of the cross-entropy summed over each part. counts: (F,) its samples.
        """
        total = counts.sum()
        mean = sums.sum(dim=0) / total
        self._direction = self._curvature.solve(mean).to(self._dtype)
        if len(sums) > 1:
            # Differences to the mean, so that sums of squares lose no digits; sqrt(w / (F - 1)) is in them.
            scale = part_scales(counts)
            apart = (sums / counts[:, None, None] - mean) * scale[:, None, None]
            self._spread = torch.stack([self._curvature.solve(part) for part in apart]).to(self._dtype)

    def parts(self, names: Sequence[ScoreName]) -> Iterator[slice]:
        """Slices of the rows whose scoring stays within the chunk's memory; on a CPU, within its caches."""
        classes = self.rows.classes
        square = classes**2 if any(name.kind == "kd_gain_ns" for name in names) else 0
        bytes_per_row = 8 * ((6 + self.folds) * classes + 4 * self.rows.inputs + 5 * square)
        step = max(1, CHUNK_BYTES // bytes_per_row)
        if self.rows.features.device.type == "cpu":
            step = min(step, max(_CACHED_ROWS, _CACHED_BYTES // bytes_per_row))
        return self.rows.slices(step)

    def scores(self, part: slice, names: Sequence[ScoreName]) -> tuple[dict[str, Tensor], Tensor]:
        """The slice's scores by key, those that SCORERS makes, and the teacher's predictions."""
        batch = ScoreInputs(
            h=self.rows.augmented(part, self._dtype),
            z=self.rows.logits[part].to(self._dtype),
            v=self._teacher[part].to(self._dtype),
            y=self._y[part],
            loss=self._loss,
            curvature=self._curvature,
            direction=self._direction,
            spread=self._spread,
            switch=_switch(self.rows, part, self._hessian, self._selected, self._dtype),
            fused=any(name.kind in FUSED for name in names),
        )
        with torch.autocast(batch.h.device.type, enabled=False):  # its 16-bit products would be felt in the scores
            found = {name.key: SCORERS[name.kind](batch, name) for name in names if name.kind in SCORERS}
            if self.folds and "kd_gain" in found:
                found["kd_gain" + ERROR_SUFFIX] = batch.gain_error()
        return found, batch.teacher_pred()


class ScoreInputs:
    """Some rows in the compute dtype. Gradients and rotated inputs are made on demand, once each."""

    def __init__(
        self,
        *,
        h: Tensor,
        z: Tensor,
        v: Tensor,
        y: Tensor,
        loss: KDLoss,
        curvature: Curvature,
        direction: Tensor,
        spread: Tensor | None = None,
        switch: Tensor | None = None,
        fused: bool = False,
    ) -> None:
        self.h, self.z, self.v, self.y = h, z, v, y
        self._loss, self._curvature, self._direction = loss, curvature, direction
        self._switch, self._spread = switch, spread
        self._gradients: dict[str, Tensor] = {}
        self._prepared: dict[int, Tensor] = {}
        self._fused = fused

    def gradient(self, of: str) -> Tensor:
        """(B, C) logit gradients: of the label's cross-entropy ("gt"), the divergence ("kd"), the change ("delta")."""
        if of not in self._gradients:
            loss = self._loss
            smoothing, class_weight = 0.0, None
            if of == "gt":
                weights = (1.0, 0.0)
            elif of == "kd":
                weights = (0.0, 1.0)
            else:
                weights = (loss.ce_weight - loss.resolved_ce_weight_unselected, loss.kd_weight)
                smoothing, class_weight = loss.label_smoothing, loss.class_weight
            self._gradients[of] = functional.kd_logit_gradient(
                self.z,
                self.v,
                self.y,
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
        return self._gradients[of]

    def quadratic(self, of: str, power: int) -> Tensor:
        """g^T H^-power g, (B,)."""
        if power not in self._prepared:
            self._prepared[power] = self._curvature.prepare(self.h, power)
        return self._curvature.quadratic(self.gradient(of), self._prepared[power], power)

    @functools.cached_property
    def moments(self) -> functional.KDMoments | None:
        """Losses and products of the logit gradients in one pass; None where they are better made one by one."""
        loss = self._loss
        if not self._fused or loss.revise == "swap" or (loss.class_weight is not None and loss.label_smoothing):
            return None
        return functional.kd_moments(
            self.z,
            self.v,
            self.y,
            direction=self.h @ self._direction.T if len(self._direction) else None,
            temperature=loss.temperature,
            revise=loss.revise,
            eta=loss.eta,
            revise_temperature=loss.revise_temperature,
            divergence=loss.divergence,
            standardize=loss.standardize,
        )

    def gain(self) -> Tensor:
        """-g_val^T H^-1 (ddelta outer h~), (B,): one GEMM against direction = unvec(H^-1 g_val) and a row-dot."""
        if self.moments is None:
            product: Tensor = torch.linalg.vecdot(self.gradient("delta"), self.h @ self._direction.T)
            return -product
        m, loss = self.moments, self._loss
        ce = m.ce_along + loss.label_smoothing * m.target
        if loss.class_weight is not None:
            ce = ce * loss.class_weight.to(ce)[self.y]
        return -((loss.ce_weight - loss.resolved_ce_weight_unselected) * ce + loss.kd_weight * m.kd_along)

    def gain_error(self) -> Tensor:
        """(B,) the standard error of gain: sqrt(sum_f w_f (s_f - s)^2 / (F - 1)), s_f the gain by part f alone."""
        assert self._spread is not None
        parts, classes, width = self._spread.shape
        along = (self.h @ self._spread.reshape(parts * classes, width).T).view(-1, parts, classes)
        error: Tensor = (along @ self.gradient("delta")[:, :, None])[:, :, 0].norm(dim=1)
        return error

    def conflict(self) -> Tensor:
        """-cos of the label's and the divergence's gradient, (B,); 0 where one of them is 0."""
        if self.moments is None:
            return self._exact_conflict(slice(None))
        m = self.moments
        result = -m.ce_kd / (m.ce_ce * m.kd_kd).sqrt()
        # Squares of gradients this small have lost their digits.
        small = torch.minimum(m.ce_ce, m.kd_kd) < torch.finfo(m.ce_ce.dtype).tiny ** 0.75
        if small.any():
            result[small] = self._exact_conflict(small)
        return result

    def _exact_conflict(self, rows: slice | Tensor) -> Tensor:
        gt, kd = (F.normalize(self.gradient(of)[rows], dim=1, eps=_TINY) for of in ("gt", "kd"))
        cosine: Tensor = torch.linalg.vecdot(gt, kd)
        return -cosine

    def ce(self) -> Tensor:
        """(B,) the cross-entropy."""
        return F.cross_entropy(self.z, self.y, reduction="none") if self.moments is None else self.moments.ce

    def el2n(self) -> Tensor:
        """(B,) |softmax(z) - onehot(y)|."""
        return self.gradient("gt").norm(dim=1) if self.moments is None else self.moments.ce_ce.sqrt()

    def newton_gain(self) -> Tensor:
        """-g_val^T (H + t_i/n dH_i)^-1 (ddelta outer h~), (B,): H as it is once sample i has been switched.

        dH_i = M_i (x) h~ h~^T, M_i what the teacher adds to the sample's Hessian in its logits. By Woodbury this is
        kd_gain with (I + t_i/n M_i K_i)^-1 ddelta in place of ddelta, K_i the leverage; t_i/n is `switch`.
        """
        assert self._switch is not None
        loss = self._loss
        change = self.z.new_zeros(*self.z.shape, self.z.shape[1])
        ce = self.z.new_full(self.y.shape, loss.ce_weight - loss.resolved_ce_weight_unselected)
        if loss.class_weight is not None:
            ce = ce * loss.class_weight.to(ce)[self.y]
        kd = torch.full_like(ce, loss.kd_weight)
        for weight, temperature in [(ce, 1.0), *((kd, t) for t in functional.temperatures(loss.temperature))]:
            q = torch.softmax(self.z / temperature, dim=1)
            change += weight[:, None, None] * (torch.diag_embed(q) - q[:, :, None] * q[:, None, :])
        system = self._switch[:, None, None] * (change @ self._curvature.leverage(self.h))
        system.diagonal(dim1=1, dim2=2).add_(1.0)
        corrected = torch.linalg.solve(system, self.gradient("delta"))
        product: Tensor = torch.linalg.vecdot(corrected, self.h @ self._direction.T)
        return -product

    def teacher_right(self) -> Tensor:
        """(B,) bool; a tie that the label takes part in counts as right."""
        if self.moments is not None:
            return self.moments.top == self.y
        return self.v.gather(1, self.y[:, None])[:, 0] >= self.v.amax(dim=1)

    def teacher_pred(self) -> Tensor:
        """(B,) the teacher's top class: the label if it takes part in a tie, else the lowest index."""
        if self.moments is not None:
            return self.moments.top
        return torch.where(self.teacher_right(), self.y, self.v.argmax(dim=1))

    def divergence(self) -> Tensor:
        """(B,) the loss's divergence between p' and q, unweighted."""
        if self.moments is not None:
            return self.moments.kd
        return functional.kd_loss(
            self.z,
            self.v,
            self.y,
            temperature=self._loss.temperature,
            ce_weight=0.0,
            kd_weight=1.0,
            revise=self._loss.revise,
            eta=self._loss.eta,
            revise_temperature=self._loss.revise_temperature,
            divergence=self._loss.divergence,
            standardize=self._loss.standardize,
            reduction="none",
        )


# On a CPU rows are scored so many at a time: products run at their full speed from about 256 rows on, and what lies
# between them (squares, row-dots) then reads what is still in the cache. EK-FAC self-influence, C = 100, d = 512: 9.3
# us a row at 8192 rows, 6.5 at 256, where the three products alone are 6.35.
_CACHED_ROWS = 256
_CACHED_BYTES = 4 << 20
# Divides a zero gradient, so that its cosine is 0, and no other.
_TINY = torch.finfo(torch.float32).tiny
# What is made of a sample by itself: all scores but random and mismatch.
SCORERS: Mapping[str, Callable[[ScoreInputs, ScoreName], Tensor]] = {
    "kd_gain": lambda batch, _: batch.gain(),
    "kd_gain_ns": lambda batch, _: batch.newton_gain(),
    "self_influence": lambda batch, _: batch.quadratic("gt", 1),
    "param_shift": lambda batch, name: batch.quadratic(name.gradient, 2).sqrt(),
    "conflict": lambda batch, _: batch.conflict(),
    "all": lambda batch, _: torch.zeros_like(batch.z[:, 0]),
    "none": lambda batch, _: torch.ones_like(batch.z[:, 0]),
    "teacher_correct": lambda batch, _: (~batch.teacher_right()).to(batch.z),
    "ce": lambda batch, _: batch.ce(),
    "kd": lambda batch, _: batch.divergence(),
    "el2n": lambda batch, _: batch.el2n(),
    "grand": lambda batch, _: batch.el2n() * batch.h.norm(dim=1),
}
#: Parts of the held-out slice where nothing is said.
FOLDS = 10
CURVED = ("kd_gain", "kd_gain_ns", "self_influence", "param_shift")
DIRECTED = ("kd_gain", "kd_gain_ns")
# Scores that functional.kd_moments has at hand.
FUSED = ("kd_gain", "conflict", "ce", "kd", "el2n", "grand", "teacher_correct")
_LOSS_FACTS = (
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


def loss_facts(loss: KDLoss) -> dict[str, object]:
    """The hyperparameters that the scores depend on, as JSON can hold them."""
    facts = {name: getattr(loss, name) for name in _LOSS_FACTS}
    weight = loss.class_weight
    return {
        **facts,
        "divergence": repr(resolve(loss.divergence)),
        "class_weight": None if weight is None else weight.tolist(),
    }


def as_trained(loss: KDLoss, ranks: Ranks, targets: Iterable[Tensor]) -> KDLoss:
    """The loss with its class weights divided by their mean over the samples: reduction="mean" divides the sum of the
    cross-entropies by the sum of the weights, not by the number of rows, as it does with the divergences.

    targets: of this process's samples, (B,) int64 each; read only where there are class weights.
    """
    weight = loss.class_weight
    if weight is None or loss.reduction != "mean":
        return loss
    total = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for y in targets:
        total[0] += weight[y.to(weight.device)].double().sum()
        total[1] += len(y)
    sum_of_weights, count = ranks.sum(total).unbind()
    own = copy.deepcopy(loss)
    own.class_weight = (weight.double() * (count / sum_of_weights)).to(weight.dtype) if sum_of_weights > 0 else weight
    return own


def checked_loss(loss: KDLoss | None) -> KDLoss:
    if loss is None:
        return KDLoss()
    if not isinstance(loss, KDLoss):
        raise TypeError(f"loss must be a KDLoss or None; got {type(loss).__name__}")
    return loss


def _hessian_terms(
    rows: Rows, target: Tensor, hessian: str, selected: Tensor | None, loss: KDLoss
) -> list[HessianTerm]:
    """The terms of H with a weight above 0 on any row; every divergence has the KL's, one per temperature."""
    ones = torch.ones(rows.count, dtype=torch.float64, device=rows.features.device)
    if hessian == "gt":
        return [HessianTerm(ones, 1.0)]
    w = ones if selected is None else selected.double()
    unselected = loss.resolved_ce_weight_unselected
    ce = w * loss.ce_weight + (1.0 - w) * unselected
    if loss.class_weight is not None:
        ce = ce * loss.class_weight.to(ce)[target]
    terms = [HessianTerm(ce, 1.0)]
    terms += [HessianTerm(w * loss.kd_weight, t) for t in functional.temperatures(loss.temperature)]
    for term in terms:
        if (term.weight < 0).any():
            raise ValueError(
                "hessian='objective' needs a loss whose weights are >= 0, or H is indefinite; got"
                f" ce_weight={loss.ce_weight}, ce_weight_unselected={unselected}, kd_weight={loss.kd_weight}"
            )
    # Of all processes, which must agree on the terms.
    present = rows.ranks.sum(torch.stack([(term.weight > 0).sum() for term in terms]))
    return [term for term, count in zip(terms, present.tolist(), strict=True) if count]


def _switch(rows: Rows, part: slice, hessian: str, selected: Tensor | None, dtype: torch.dtype) -> Tensor:
    """t_i / n, (B,): 1 / n where H knows the sample without its teacher, -1 / n where it knows it with it."""
    if hessian == "gt":
        w = torch.zeros_like(rows.logits[part][:, 0], dtype=dtype)
    elif selected is None:
        w = torch.ones_like(rows.logits[part][:, 0], dtype=dtype)
    else:
        w = selected[part].to(dtype)
    return (1.0 - 2.0 * w) / rows.total


def _report_zero_hessian(damping: float | None) -> None:
    """A loss that gives every row weight 0 (leave-one-out's, under selected=None) has no curvature to score with."""
    advice = (
        "hessian='objective' is zero: loss gives every selected row weight 0; pass hessian='gt', or selected= for the"
        " rows that had a teacher"
    )
    if not damping:
        raise ValueError(advice)
    warnings.warn(f"{advice}. Scoring with H = damping * I", stacklevel=5)


def _checked_validation(
    like: tuple[Tensor, Tensor], features: Tensor | None, logits: Tensor | None, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The held-out slice, complete and of the same layer as the features and logits it should be like."""
    if features is None or logits is None or target is None:
        given = {"val_features": features, "val_logits": logits, "val_target": target}
        missing = ", ".join(name for name, tensor in given.items() if tensor is None)
        raise ValueError(
            f"kd_gain needs val_features, val_logits and val_target, a slice held out of the training set; missing:"
            f" {missing}"
        )
    check_samples(features, logits, target, prefix="val_")
    check_like("val_features", features, "features", like[0], dim=1)
    check_like("val_logits", logits, "student_logits", like[1], dim=1)
    check_device("features", like[0], [("val_features", features)])
    return features, logits, target.long()


def _fold_gradients(
    features: Tensor, logits: Tensor, target: Tensor, *, bias: bool, folds: int
) -> tuple[Tensor, Tensor]:
    """The gradient of the cross-entropy in the layer's weights, summed over each part: (F, C, D), and (F,) counts."""
    rows = Rows(features, logits, bias)
    parts = max(1, min(folds, rows.count))
    sums = torch.zeros(parts, rows.classes, rows.inputs, dtype=torch.float64, device=features.device)
    for chunk in rows.chunks():
        add_gradients(sums, rows.augmented(chunk, torch.float64), logits[chunk], target[chunk], chunk.start)
    counts = torch.bincount(torch.arange(rows.count, device=features.device) % parts, minlength=parts)
    return sums, counts.double()


def part_scales(counts: Tensor) -> Tensor:
    """(F,) sqrt(w_f / (F - 1)), w_f the share of part f: the squares of its score's differences to the whole slice's,
    scaled by these, add up to the squared standard error."""
    return (counts / counts.sum() / (len(counts) - 1)).sqrt()


def add_gradients(sums: Tensor, h: Tensor, logits: Tensor, target: Tensor, start: int) -> None:
    """Adds rows' gradients of the cross-entropy to sums (F, C, D), row j to part j modulo F; start: the first row."""
    z = logits.double()
    delta = functional.kd_logit_gradient(z, z, target, temperature=1.0, ce_weight=1.0, kd_weight=0.0, revise=None)
    for number, part in enumerate(sums):
        first = (number - start) % len(sums)
        part.addmm_(delta[first :: len(sums)].T, h[first :: len(sums)])
