"""Scores of a classifier's training samples from several layers, with a block of curvature per layer."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jvp

from lrds_fast.influence.adapters import Classifier
from lrds_fast.influence.batches import BatchReader, NumberedBatch
from lrds_fast.influence.conjugate import WholeHessian
from lrds_fast.influence.factors import BlockFit, Factors, HessianBatch
from lrds_fast.influence.flatten import flatten_by_layer, unflatten_by_layer
from lrds_fast.influence.inputs import check_logits, check_teacher_logits
from lrds_fast.influence.last_layer import only_harmful, part_scales
from lrds_fast.influence.layers import parameters_of, sample_gradients
from lrds_fast.influence.logit_scores import LOGIT_SCORERS, LogitScores
from lrds_fast.influence.mismatch import Agreements
from lrds_fast.influence.objective import LogitTerms, TrainingObjective
from lrds_fast.influence.options import BLOCK_CURVATURES, CURVED, GAINS, HessianOptions
from lrds_fast.influence.scores import ERROR_SUFFIX, ScoreName
from lrds_fast.influence.task import ScoreTask, ShardWriter, TeacherLogits
from lrds_fast.ranks import Ranks

# Scores made of per-sample gradients in the parameters, and which gradient, where the name does not say.
_OF_SAMPLE_GRADIENTS = ("self_influence", "param_shift", "grand")
_GRADIENT_OF = {"self_influence": "gt", "grand": "gt"}


def score_layers(task: ScoreTask, factors: Factors | None) -> dict[str, object]:
    """Writes this process's shards; returns their part of Scores.meta. factors: fitted earlier; None: fit them here."""
    options, shards = task.options, task.shards
    if factors is None and options.include(CURVED):
        factors = shards.once(
            "factors",
            lambda: fitted_factors(task.student, task.layers, task.train, options, shards.ranks),
            lambda made, path: made.save(path),
            lambda path: Factors.load(path, task.student.module),
        )
    directions = _directions(task, factors) if factors is not None and options.include(GAINS) else []
    mismatch = None
    if options.include(("mismatch",)):
        mismatch = shards.tensors_once("mismatch", lambda: {"mismatch": _mismatch(task)})["mismatch"]
    classes = _write_scores(task, factors, directions, mismatch)
    written, classes = shards.written(), max(shards.ranks.gather(classes))
    if classes == 0:  # an earlier run wrote every shard, but did not finish
        batch = next(task.train("scores", lambda number: number == 0))
        with torch.no_grad():
            classes = task.student(batch.x).shape[1]
    return {
        "num_samples": written,
        "num_classes": classes,
        "damping": None if factors is None else factors.damping,
        "folds": max(len(directions) - 1, 0),
    }


def fitted_factors(
    student: Classifier, layers: Sequence[str], train: BatchReader, options: HessianOptions, ranks: Ranks
) -> Factors:
    """The factors of the objective's Hessian over the training samples of all processes: EK-FAC's for "exact"."""
    curvature = options.curvature
    if curvature.curvature == "exact":
        curvature = replace(curvature, curvature="ekfac", choices=BLOCK_CURVATURES)
    batches = functools.partial(_hessian_batches, train, options, ranks, "factors")
    return BlockFit(student, batches, layers, curvature, ranks=ranks).factors()


def _hessian_batches(train: BatchReader, options: HessianOptions, ranks: Ranks, desc: str) -> Iterator[HessianBatch]:
    """This process's batches with the terms of the objective's Hessian. desc: of the progress bar."""
    for batch in train.share(desc, ranks):
        yield HessianBatch(batch.start, batch.x, _terms_of(batch, options.objective, options.selected))


def _terms_of(batch: NumberedBatch, objective: TrainingObjective, selected: Tensor | None) -> LogitTerms:
    """The Hessian's terms of a batch. selected: (N,), of all samples."""
    rows = None
    if selected is not None:
        stop = batch.start + len(batch.y)
        if stop > len(selected):
            raise ValueError(
                f"selected must have one value per sample; got {len(selected)}, and there are at least {stop} samples"
            )
        rows = selected[batch.start : stop]
    return lambda logits: objective.hessian_terms(batch.y, rows, logits.dtype)


def _write_scores(
    task: ScoreTask, factors: Factors | None, directions: Sequence[Mapping[str, Tensor]], mismatch: Tensor | None
) -> int:
    """Scores this process's batches and writes its shards; returns C, 0 where there is no batch left to score."""
    options, shards = task.options, task.shards
    of_gradients = [name for name in options.names if name.kind in _OF_SAMPLE_GRADIENTS]
    first = _GRADIENT_OF.get(of_gradients[0].kind, of_gradients[0].gradient) if of_gradients else None
    writer = ShardWriter(task, mismatch)
    shard = -1
    classes = 0
    for batch in task.train("scores", lambda n: shards.mine(shards.of(n)) and not shards.done(shards.of(n))):
        shard = shards.of(batch.number)
        try:
            scored = LayerScores(task.student, task.teacher, batch, task.layers, options, factors, directions, first)
            columns = {name.key: scored.score(name).to(options.dtype) for name in options.names if scored.knows(name)}
            if len(directions) > 1:
                error = scored.gain_error().to(options.dtype)
                columns |= {name + ERROR_SUFFIX: error for name in GAINS if name in columns}
        except ValueError as error:
            raise ValueError(f"{error} (the batch begins at sample {batch.start})") from error
        classes = scored.logits.z.shape[1]
        writer.add(batch.start, {"label": batch.y, "teacher_pred": scored.logits.teacher_pred(), **columns})
        if shards.ends_with(batch.number):
            writer.write(shard)
    writer.write(shard)
    return classes


@torch.no_grad()
def _mismatch(task: ScoreTask) -> Tensor:
    """(N,) the score of all processes' samples, from a pass of both models over them."""
    shards = task.shards
    agreements = Agreements()
    for batch in task.train("mismatch", lambda number: shards.mine(shards.of(number))):
        z, v = task.student(batch.x), task.teacher(batch)
        check_logits("student_logits", z, batch.start)
        check_teacher_logits(v, z, batch.start)
        agreements.add(batch.start, z, v)
    return agreements.probabilities(shards.ranks)


class LayerScores:
    """Scores of a batch from its logits, and from its samples' gradients in the parameters of several layers.

    factors: of `layers`; None where no score needs them. directions: H^-1 g_val by parameter name, then the directions
    of the standard error (see _deviations). first: the gradient that comes out of the same forward pass as the logits,
    one of scores.GRADIENTS; None for a forward pass alone. Raises ValueError for illegal logits or targets.
    """

    def __init__(
        self,
        student: Classifier,
        teacher: TeacherLogits,
        batch: NumberedBatch,
        layers: Sequence[str],
        options: HessianOptions,
        factors: Factors | None,
        directions: Sequence[Mapping[str, Tensor]],
        first: str | None,
    ) -> None:
        self._student, self._x, self._layers, self._factors = student, batch.x, layers, factors
        self._directions = directions
        self._gradients: dict[str, Any] = {}
        with torch.no_grad():
            v = teacher(batch).to(options.dtype)

        def logit_scores(logits: Tensor) -> LogitScores:
            z = logits.to(options.dtype)
            check_logits("student_logits", z)
            check_teacher_logits(v, z, 0)
            if batch.y.min() < 0 or batch.y.max() >= z.shape[1]:
                raise ValueError(
                    f"targets must lie in [0, {z.shape[1]}); got {int(batch.y.min())} to {int(batch.y.max())}"
                )
            return LogitScores(z, v, batch.y, options.objective)

        if first is None:
            with torch.no_grad():
                self.logits = logit_scores(student(self._x))
        else:

            def delta(logits: Tensor) -> Tensor:
                self.logits = logit_scores(logits)
                return self.logits.gradient(first).to(logits)

            self._gradients[first] = sample_gradients(student, self._x, delta, layers)[1]

    def gradients(self, of: str) -> Any:
        """SampleGradients by layer name. of: one of scores.GRADIENTS."""
        if of not in self._gradients:
            delta = self.logits.gradient(of)
            self._gradients[of] = sample_gradients(
                self._student, self._x, lambda logits: delta.to(logits), self._layers
            )[1]
        return self._gradients[of]

    def knows(self, name: ScoreName) -> bool:
        """Whether `score` computes it; random and mismatch come from elsewhere."""
        return name.kind in (*GAINS, *LOGIT_SCORERS, *_OF_SAMPLE_GRADIENTS)

    def score(self, name: ScoreName) -> Tensor:
        """(B,) the score."""
        if name.kind in LOGIT_SCORERS:
            return LOGIT_SCORERS[name.kind](self.logits)
        if name.kind in GAINS:
            gain = -self._product("delta", self._logit_change)
            if name.kind == "kd_gain":
                return gain
            return only_harmful(gain, -self.logits.objective.loss.kd_weight * self._product("kd", self._logit_change))
        if name.kind == "grand":
            return torch.stack([g.squared_norm() for g in self.gradients("gt").values()]).sum(dim=0).sqrt()
        assert self._factors is not None
        if name.kind == "self_influence":
            return self._factors.quadratic(self.gradients("gt"), 1)
        return self._factors.quadratic(self.gradients(name.gradient), 2).sqrt()

    def gain_error(self) -> Tensor:
        """(B,) the standard error of kd_gain and teacher_harm; see LastLayerScores.gain_error."""
        parts = torch.stack([self._product("delta", self._along(direction)) for direction in self._directions[1:]])
        error: Tensor = torch.linalg.vector_norm(parts, dim=0)
        return error

    @functools.cached_property
    def _logit_change(self) -> Tensor:
        """(B, C) the derivative of the logits along H^-1 g_val."""
        return self._along(self._directions[0])

    def _product(self, of: str, dz: Tensor) -> Tensor:
        """(B,) the logit gradient `of`, one of scores.GRADIENTS, times dz (B, C)."""
        product: Tensor = torch.linalg.vecdot(self.logits.gradient(of), dz)
        return product

    def _along(self, direction: Mapping[str, Tensor]) -> Tensor:
        """(B, C) the derivative of the logits along the direction."""
        student, x = self._student.module, self._x

        def logits_of(parameters: dict[str, Tensor]) -> Tensor:
            return self._student.read(functional_call(student, parameters, (x,)), len(x))

        moved = {name: tensor.detach() for name, tensor in student.named_parameters() if name in direction}
        with torch.no_grad():
            dz: Tensor = jvp(logits_of, (moved,), ({name: direction[name] for name in moved},))[1]
        return dz.to(self.logits.z)


def _directions(task: ScoreTask, factors: Factors) -> list[dict[str, Tensor]]:
    """H^-1 times the gradients of _deviations, by parameter name; [] without held-out samples."""
    held_out, student = task.held_out, task.student.module
    if held_out is None:
        return []

    def solved() -> dict[str, Tensor]:
        gradients = _deviations(*_held_out_gradients(task, held_out))
        if task.options.curvature.curvature == "exact":
            batches = functools.partial(_hessian_batches, task.train, task.options, task.shards.ranks, "H products")
            solutions = WholeHessian(task.student, factors, batches, task.shards.ranks).solve(gradients)
        else:
            solutions = [
                unflatten_by_layer(student, factors.solve(flatten_by_layer(student, task.layers, gradient)))
                for gradient in gradients
            ]
        return {
            f"{number}:{name}": tensor for number, solution in enumerate(solutions) for name, tensor in solution.items()
        }

    device = next(student.parameters()).device
    directions: dict[int, dict[str, Tensor]] = {}
    for key, tensor in task.shards.tensors_once("directions", solved).items():
        number, _, name = key.partition(":")
        directions.setdefault(int(number), {})[name] = tensor.to(device)
    return [directions[number] for number in sorted(directions)]


def _held_out_gradients(task: ScoreTask, held_out: BatchReader) -> tuple[list[dict[str, Tensor]], Tensor]:
    """The gradient of the cross-entropy by parameter name, summed over each part of the held-out slice, float64, and
    the number of samples in each part, (F,).

    Sample j is in part j modulo options.parts. Sums are over all processes; parts without samples are left out.
    """
    student, ranks, parts = task.student.module, task.shards.ranks, task.options.parts
    parameters = {n: p for n, p in parameters_of(student, task.layers).items() if p.requires_grad}
    device = next(student.parameters()).device
    sums = [{n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()} for _ in range(parts)]
    counts = torch.zeros(parts, dtype=torch.float64, device=device)
    for batch in held_out.share("validation", ranks):
        part_of = (batch.start + torch.arange(len(batch.x), device=device)) % parts
        with torch.enable_grad():
            losses = F.cross_entropy(task.student(batch.x), batch.y, reduction="none")
            for part in sorted(set(part_of.tolist())):
                # The graph is kept for the next part.
                gradients = torch.autograd.grad(
                    losses[part_of == part].sum(), list(parameters.values()), allow_unused=True, retain_graph=True
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        sums[part][name] += gradient
        counts += torch.bincount(part_of, minlength=parts)
    for tensor in (counts, *(tensor for part_sums in sums for tensor in part_sums.values())):
        ranks.sum(tensor)
    return [part_sums for part_sums, count in zip(sums, counts.tolist(), strict=True) if count], counts[counts > 0]


def _deviations(sums: Sequence[Mapping[str, Tensor]], counts: Tensor) -> list[dict[str, Tensor]]:
    """The mean gradient g_val, then, for several parts, each part's mean gradient minus g_val, times part_scales.

    The squares of the scores along the latter add up to the squared standard error.
    """
    total = counts.sum()
    mean = {name: torch.stack([part[name] for part in sums]).sum(dim=0) / total for name in sums[0]}
    if len(sums) == 1:
        return [mean]
    return [mean] + [
        {name: (part[name] / count - mean[name]) * scale for name in mean}
        for part, count, scale in zip(sums, counts, part_scales(counts), strict=True)
    ]
