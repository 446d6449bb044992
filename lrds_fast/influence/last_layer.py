"""Scores of a classifier's training samples from its last layer alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lrds_fast._version import __version__
from lrds_fast.influence.curvature import CHUNK_BYTES, Curvature, Identity, LayerRows, StackedRows, fit_curvature
from lrds_fast.influence.draws import uniform_scores
from lrds_fast.influence.inputs import (
    check_device,
    check_folds,
    check_like,
    check_logits,
    check_samples,
    check_scores,
    check_selected,
)
from lrds_fast.influence.logit_scores import FUSED, LOGIT_SCORERS, LogitScores
from lrds_fast.influence.mismatch import Agreements
from lrds_fast.influence.objective import (
    HessianTerm,
    TrainingObjective,
    cross_entropy_gradient,
    logit_hessian,
    nonzero_terms,
)
from lrds_fast.influence.options import CURVED, FOLDS, GAINS, HELD_OUT, CurvatureOptions, ScoreOptions
from lrds_fast.influence.scores import ERROR_SUFFIX, ScoreName, Scores, split_errors
from lrds_fast.nn import KDLoss
from lrds_fast.ranks import Ranks

# On a CPU so many rows are scored at a time: matrix products reach their full speed at about 256 rows, and the
# elementwise work between them then reads from the cache. EK-FAC self-influence, C = 100, d = 512: 9.3 us a row at 8192
# rows, 6.5 us at 256; the three products alone take 6.35 us.
_CACHED_ROWS = 256
_CACHED_BYTES = 4 << 20


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
    scores: str | Sequence[str] = ("teacher_harm", "kd_gain"),
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

    kd_gain is -g_val^T H^-1 (ddelta_i outer [h_i; 1]): n times the predicted change of the held-out
    cross-entropy when sample i is given its teacher, so negative = helpful. ddelta_i is the logit gradient of `loss`
    with the row selected minus the one with it unselected. kd_gain is n times that change for curvature="exact" and
    damping = the weight decay; under the default relative damping use it for ranking only.

    features: (N, d) inputs h of the layer. student_logits, teacher_logits: (N, C); -inf (masked classes) is legal.
    target: (N,) int32/int64 in [0, C). val_features (M, d), val_logits (M, C), val_target (M,): a slice held out of the
    training set, never the test set; needed by kd_gain, teacher_harm and kd_gain_ns. All on one device. Factors are
    computed in float64; scores in float64 if any of features and logits is, else in float32.

    scores: among kd_gain, teacher_harm, kd_gain_ns (one Newton step of the retraining instead of its derivative: a C x
    C solve per sample, for small heads and audits), self_influence, param_shift (of the label's gradient; or
    param_shift:gt, :kd, :delta), conflict, mismatch, and the baselines random (seed 0; or random:<seed>), all, none,
    teacher_correct, ce, kd, el2n, grand.
    teacher_harm is kd_gain where kd_weight times the divergence raises the held-out cross-entropy by itself; elsewhere
    it is the lower of kd_gain and that term's effect, which is <= 0. kd_gain also contains the effect of the
    cross-entropy's weight, which changes from ce_weight_unselected to ce_weight: if ce_weight is too small, most
    samples seem better off without their teacher, whatever it says. Select by teacher_harm.
    mismatch, in [0, 1], is the probability that the teacher's logits belong to another sample: select with
    threshold=0.5. It is computed from all samples' logits without label revision, held-out slice or curvature. It is 0
    where a sample's logits do not allow a correlation (all equal, or fewer than 3 classes that neither model excludes),
    and, with a warning, for all samples where fewer than 20 samples have one.
    curvature: H is "identity", "kfac", "ekfac", or "exact" (dense up to 5000 parameters of the layer; beyond that
    conjugate gradients, for kd_gain only).
    damping: >= 0, added to every eigenvalue (to identity's 1 only if it is passed); None: damping_scale times the mean
    eigenvalue. With damping 0 the inverse is the pseudo-inverse. A curvature that is zero up to rounding, as that of a
    student that has memorised its training set, is an error unless damping > 0 is passed.
    hessian: "objective", that of the training objective, sample i's cross-entropy and divergence weighted as `loss`
    does; or "gt", that of the cross-entropy alone.
    folds: the number of parts of the held-out slice for the standard error of kd_gain and teacher_harm, which have the
    same (Scores.standard_error); row j is in part j modulo folds. None: 10. 0: no standard error. H is the same for all
    parts: the standard error is over the choice of the held-out samples alone. There are at most as many parts as
    held-out samples.
    selected: (N,) bool or floats in [0, 1]: which samples had the teacher in the training so far (None: all). It enters
    H alone.
    bias: whether the layer has one. loss: a KDLoss; None: KDLoss().

    Returns Scores, a mapping from the requested names to (N,) tensors on the inputs' device. Raises ValueError or
    TypeError naming the argument, and the sample for a NaN or a score that is not finite. Memory beyond the inputs: one
    chunk of rows (64 MiB), the factors (C^2 + D^2 + a few C*D float64) and the scores; a C x d gradient per sample is
    never formed.
    """
    _check_training_rows(features, student_logits, teacher_logits, target, selected)
    wide = torch.float64 in (features.dtype, student_logits.dtype, teacher_logits.dtype)
    options = ScoreOptions(
        CurvatureOptions(curvature, damping, damping_scale),
        TrainingObjective.of(loss, hessian),
        selected,
        torch.float64 if wide else torch.float32,
        scores,
        check_folds(folds, FOLDS),
    )
    y = target.long()
    rows = LayerRows(features, student_logits, bias)
    layer = LastLayer(rows, teacher_logits, y, options.dtype, options.objective, selected)
    if options.include(CURVED):
        layer.fit(options.curvature)
    if options.include(HELD_OUT):
        held_out = _checked_held_out(
            options.those_of(HELD_OUT)[0], (features, student_logits), val_features, val_logits, val_target
        )
        layer.aim(*_held_out_gradients(*held_out, bias=bias, parts=options.parts))
    values, errors, teacher_pred = _score_rows(layer, options)
    meta = {
        "num_samples": rows.count,
        "num_classes": rows.classes,
        "num_features": features.shape[1],
        "bias": bias,
        "curvature": curvature,
        "hessian": hessian,
        "damping": layer.damping,
        "folds": layer.folds,
        "loss": options.objective.loss_facts(),
        "library_version": __version__,
    }
    return Scores(values, target=y, teacher_pred=teacher_pred, meta=meta, standard_error=errors)


def _check_training_rows(
    features: Tensor, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, selected: Tensor | None
) -> None:
    check_samples(features, student_logits, target)
    check_like("teacher_logits", teacher_logits, "student_logits", student_logits)
    check_logits("teacher_logits", teacher_logits)
    check_device("features", features, [("teacher_logits", teacher_logits)])
    check_selected(selected, len(features))
    if selected is not None:
        check_device("features", features, [("selected", selected)])


def _checked_held_out(
    score: str, like: tuple[Tensor, Tensor], features: Tensor | None, logits: Tensor | None, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, logits and target (int64) of the held-out slice, which `score` needs. like: features and logits of the
    training rows."""
    if features is None or logits is None or target is None:
        arguments = {"val_features": features, "val_logits": logits, "val_target": target}
        missing = ", ".join(name for name, tensor in arguments.items() if tensor is None)
        raise ValueError(
            f"{score} needs val_features, val_logits and val_target, a slice held out of the training set; missing:"
            f" {missing}"
        )
    check_samples(features, logits, target, prefix="val_")
    check_like("val_features", features, "features", like[0], dim=1)
    check_like("val_logits", logits, "student_logits", like[1], dim=1)
    check_device("features", like[0], [("val_features", features)])
    return features, logits, target.long()


def _score_rows(layer: LastLayer, options: ScoreOptions) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Scores and standard errors by name, (N,) each, and the teacher's predictions (N,) int64."""
    rows, names = layer.rows, options.names
    device = rows.features.device
    columns: dict[str, Tensor] = {}
    teacher_pred = torch.empty(rows.count, dtype=torch.int64, device=device)
    for part in layer.parts(names):
        part_scores, teacher_pred[part] = layer.scores(part, names)
        for key, column in part_scores.items():
            check_scores(key, column, part.start)
            columns.setdefault(key, column.new_empty(rows.count, dtype=options.dtype))[part] = column
    values, errors = split_errors(columns)
    for name in names:
        if name.kind == "random":
            like = torch.empty(0, dtype=options.dtype, device=device)
            values[name.key] = uniform_scores(0, rows.count, name.seed, like)
        elif name.kind == "mismatch":
            agreements = Agreements()
            for part in rows.chunks():
                agreements.add(part.start, rows.logits[part], layer.teacher_logits[part])
            values[name.key] = agreements.probabilities(rows.ranks).to(device, options.dtype)
    return {name.key: values[name.key] for name in names}, errors, teacher_pred


class LastLayer:
    """The last layer's rows, their curvature once fitted, and their scores, slice by slice.

    rows: this process's. teacher_logits: (N, C). y: labels (N,) int64. dtype: of the scores. selected: (N,) weights of
    these rows' teachers; None: 1 for all.
    """

    def __init__(
        self,
        rows: LayerRows,
        teacher_logits: Tensor | StackedRows,
        y: Tensor,
        dtype: torch.dtype,
        objective: TrainingObjective,
        selected: Tensor | None = None,
    ) -> None:
        self.rows, self.teacher_logits, self.y, self._dtype = rows, teacher_logits, y, dtype
        self._objective, self._selected = objective.normalised(rows.ranks, [y]), selected
        self._curvature: Curvature = Identity(None)
        self._direction = torch.empty(0, dtype=dtype, device=rows.features.device)
        self._part_directions: Tensor | None = None
        self.damping: float | None = None

    def fit(self, options: CurvatureOptions, where: str = "the last layer") -> None:
        """Fits H to the rows of all processes. where: the layer's name, for the ValueError if H is about 0."""
        terms: list[HessianTerm] = []
        if options.curvature != "identity":  # a loss without a Hessian has scores with H = I
            terms = self._objective.hessian_terms(self.y, self._selected, torch.float64)
            terms = nonzero_terms(terms, self.rows.ranks)
            if not terms:
                _report_zero_hessian(options.damping)
        self.use(fit_curvature(options, self.rows, terms, self._dtype, where))

    def use(self, curvature: Curvature) -> None:
        """Takes an H that was fitted elsewhere."""
        self._curvature, self.damping = curvature, curvature.damping

    @property
    def folds(self) -> int:
        """The number of parts of the held-out slice that standard errors are taken over; 0 without standard errors."""
        return 0 if self._part_directions is None else len(self._part_directions)

    def aim(self, sums: Tensor, counts: Tensor) -> None:
        """Sets H^-1 g_val and, for several parts of the held-out slice, what the standard error needs.

        sums: (F, C, D) float64, the gradient of the cross-entropy summed over each part. counts: (F,) its samples.
        """
        total = counts.sum()
        mean = sums.sum(dim=0) / total
        self._direction = self._curvature.solve(mean).to(self._dtype)
        if len(sums) > 1:
            # Differences from the mean, so that sums of squares lose no digits.
            deviations = (sums / counts[:, None, None] - mean) * part_scales(counts)[:, None, None]
            solved = [self._curvature.solve(deviation) for deviation in deviations]
            self._part_directions = torch.stack(solved).to(self._dtype)

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
        """The slice's scores (B,) by key, those in SCORERS, and the teacher's predictions (B,) int64."""
        batch = LastLayerScores(
            self.rows.augmented(part, self._dtype),
            self.rows.logits[part].to(self._dtype),
            self.teacher_logits[part].to(self._dtype),
            self.y[part],
            self._objective,
            curvature=self._curvature,
            direction=self._direction,
            part_directions=self._part_directions,
            switch=self._switch(part),
            fused=any(name.kind in FUSED for name in names),
        )
        with torch.autocast(batch.h.device.type, enabled=False):  # 16-bit products would change the scores
            columns = {name.key: SCORERS[name.kind](batch, name) for name in names if name.kind in SCORERS}
            gains = [name for name in GAINS if self.folds and name in columns]
            if gains:
                columns |= dict.fromkeys((name + ERROR_SUFFIX for name in gains), batch.gain_error())
        return columns, batch.teacher_pred()

    def _switch(self, part: slice) -> Tensor:
        """(B,) t_i / n: 1 / n where H has the sample without its teacher, -1 / n where H has it with its teacher."""
        selected = None if self._selected is None else self._selected[part]
        return self._objective.teacher_sign(self.y[part], selected, self._dtype) / self.rows.total


class LastLayerScores(LogitScores):
    """Scores of a batch of B rows of the last layer.

    h: (B, D) inputs, with a 1 for the bias. z, v, y: as in LogitScores. direction: H^-1 g_val (C, D), or empty.
    part_directions: (F, C, D), of each part of the held-out slice (see LastLayer.aim). switch: (B,) t_i / n, see
    newton_gain. All in the dtype of the scores.
    """

    def __init__(
        self,
        h: Tensor,
        z: Tensor,
        v: Tensor,
        y: Tensor,
        objective: TrainingObjective,
        *,
        curvature: Curvature,
        direction: Tensor,
        part_directions: Tensor | None = None,
        switch: Tensor | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__(z, v, y, objective, fused=fused)
        self.h, self._curvature, self._direction = h, curvature, direction
        self._part_directions, self._switch = part_directions, switch
        self._prepared: dict[int, Tensor] = {}

    def logit_change(self) -> Tensor | None:
        return self.h @ self._direction.T if len(self._direction) else None

    def quadratic(self, of: str, power: int) -> Tensor:
        """(B,) g^T H^-power g, g the gradient `of` in the layer's weights."""
        if power not in self._prepared:
            self._prepared[power] = self._curvature.prepare(self.h, power)
        return self._curvature.quadratic(self.gradient(of), self._prepared[power], power)

    def gain(self) -> Tensor:
        """(B,) -g_val^T H^-1 (ddelta outer h~): one product with the direction and a row-dot."""
        if self.moments is None:
            product: Tensor = torch.linalg.vecdot(self.gradient("delta"), self.h @ self._direction.T)
            return -product
        m, loss = self.moments, self.objective.loss
        ce = m.ce_along + loss.label_smoothing * m.target
        if loss.class_weight is not None:
            ce = ce * loss.class_weight.to(ce)[self.y]
        return -(self.objective.ce_weight_change * ce + loss.kd_weight * m.kd_along)

    def harm(self) -> Tensor:
        """(B,) gain where the divergence alone raises the held-out loss; elsewhere the lower of gain and its effect."""
        if self.moments is None:
            along: Tensor = torch.linalg.vecdot(self.gradient("kd"), self.h @ self._direction.T)
        else:
            along = self.moments.kd_along
        return only_harmful(self.gain(), -self.objective.loss.kd_weight * along)

    def gain_error(self) -> Tensor:
        """(B,) the standard error of gain and harm: sqrt(sum_f w_f (s_f - s)^2 / (F - 1)), s_f the gain by part f."""
        assert self._part_directions is not None
        parts, classes, width = self._part_directions.shape
        along = (self.h @ self._part_directions.reshape(parts * classes, width).T).view(-1, parts, classes)
        error: Tensor = (along @ self.gradient("delta")[:, :, None])[:, :, 0].norm(dim=1)
        return error

    def newton_gain(self) -> Tensor:
        """(B,) -g_val^T (H + t_i/n dH_i)^-1 (ddelta outer h~): H as it is once sample i's teacher has been switched.

        dH_i = M_i (x) h~ h~^T, M_i what the teacher adds to the sample's Hessian in its logits. By Woodbury this is
        kd_gain with (I + t_i/n M_i K_i)^-1 ddelta in place of ddelta, K_i the leverage; t_i/n is `switch`.
        """
        assert self._switch is not None
        added = logit_hessian(self.z, self.objective.teacher_terms(self.y, self.z.dtype))
        system = self._switch[:, None, None] * (added @ self._curvature.leverage(self.h))
        system.diagonal(dim1=1, dim2=2).add_(1.0)
        corrected = torch.linalg.solve(system, self.gradient("delta"))
        product: Tensor = torch.linalg.vecdot(corrected, self.h @ self._direction.T)
        return -product


_Scorer = Callable[[LastLayerScores, ScoreName], Tensor]


def _without_argument(scorer: Callable[[LogitScores], Tensor]) -> _Scorer:
    return lambda batch, _: scorer(batch)


#: The scores that are computed from one sample's row: all but random and mismatch.
SCORERS: Mapping[str, _Scorer] = {
    **{kind: _without_argument(scorer) for kind, scorer in LOGIT_SCORERS.items()},
    "kd_gain": lambda batch, _: batch.gain(),
    "teacher_harm": lambda batch, _: batch.harm(),
    "kd_gain_ns": lambda batch, _: batch.newton_gain(),
    "self_influence": lambda batch, _: batch.quadratic("gt", 1),
    "param_shift": lambda batch, name: batch.quadratic(name.gradient, 2).sqrt(),
    "grand": lambda batch, _: batch.el2n() * batch.h.norm(dim=1),
}


class HeldOutGradients:
    """The gradient of the held-out cross-entropy in the layer's weights, summed over each of F parts.

    Held-out sample j is in part j modulo `parts`. classes: C. inputs: D, the width of h~.
    """

    def __init__(self, parts: int, classes: int, inputs: int, device: torch.device) -> None:
        self._sums = torch.zeros(parts, classes, inputs, dtype=torch.float64, device=device)
        self._counts = torch.zeros(parts, dtype=torch.float64, device=device)

    def add(self, start: int, h: Tensor, logits: Tensor, target: Tensor) -> None:
        """Adds held-out samples start, start + 1, ...: h (B, D) float64, logits (B, C), target (B,) int64."""
        delta = cross_entropy_gradient(logits.double(), target)
        parts = len(self._sums)
        for number, total in enumerate(self._sums):
            first = (number - start) % parts
            total.addmm_(delta[first::parts].T, h[first::parts])
        numbers = start + torch.arange(len(h), device=h.device)
        self._counts += torch.bincount(numbers % parts, minlength=parts)

    def totals(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Sums (F, C, D) and counts (F,) over all processes, float64; without the parts that have no samples."""
        sums, counts = ranks.sum(self._sums), ranks.sum(self._counts)
        return sums[counts > 0], counts[counts > 0]


def _held_out_gradients(
    features: Tensor, logits: Tensor, target: Tensor, *, bias: bool, parts: int
) -> tuple[Tensor, Tensor]:
    rows = LayerRows(features, logits, bias)
    gradients = HeldOutGradients(parts, rows.classes, rows.inputs, features.device)
    for chunk in rows.chunks():
        gradients.add(chunk.start, rows.augmented(chunk, torch.float64), logits[chunk], target[chunk])
    return gradients.totals(Ranks())


def only_harmful(gain: Tensor, of_divergence: Tensor) -> Tensor:
    """teacher_harm (B,): gain where of_divergence > 0, elsewhere min(gain, of_divergence).

    gain: kd_gain. of_divergence: its part that comes from the divergence, without the change of the cross-entropy's
    weight.
    """
    return torch.where(of_divergence > 0, gain, torch.minimum(gain, of_divergence))


def part_scales(counts: Tensor) -> Tensor:
    """(F,) sqrt(w_f / (F - 1)), w_f the share of part f in the held-out samples.

    The differences of each part's score from the whole slice's, multiplied by these, have squares that add up to the
    squared standard error.
    """
    return (counts / counts.sum() / (len(counts) - 1)).sqrt()


def _report_zero_hessian(damping: float | None) -> None:
    """Reports a loss that gives every row weight 0, as leave-one-out's does with selected=None: H is 0."""
    advice = (
        "hessian='objective' is zero: loss gives every selected row weight 0; pass hessian='gt', or selected= for the"
        " rows that had a teacher"
    )
    if not damping:
        raise ValueError(advice)
    warnings.warn(f"{advice}. Scoring with H = damping * I", stacklevel=5)
