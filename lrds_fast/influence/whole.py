"""Scores of a classifier's training samples from all of its layers, or some of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

from lrds_fast import functional
from lrds_fast._version import __version__
from lrds_fast.influence.adapters import BatchHook, Classifier, LogitsHook
from lrds_fast.influence.batches import Batches, Data
from lrds_fast.influence.curvature import CURVATURES, Identity
from lrds_fast.influence.factors import Factors, fingerprint, fit_placed, tensors_fingerprint
from lrds_fast.influence.head import completed, score_head
from lrds_fast.influence.inputs import check_choice, check_damping, check_folds, check_logits, check_selected_values
from lrds_fast.influence.last_layer import (
    DIRECTED,
    FOLDS,
    HESSIANS,
    SCORERS,
    ScoreInputs,
    as_trained,
    checked_loss,
    loss_facts,
    part_scales,
)
from lrds_fast.influence.layers import layer_names, parameters_of, sample_gradients
from lrds_fast.influence.mismatch import Agreements
from lrds_fast.influence.scores import ERROR_SUFFIX, ScoreName, Scores, parse_score_names
from lrds_fast.influence.shards import Shards, load_scores
from lrds_fast.nn import KDLoss
from lrds_fast.ranks import Ranks

# Scores that need gradients in the parameters; the others are made of the logits alone.
_OF_PARAMETERS = ("kd_gain", "self_influence", "param_shift", "grand")
# Of these, the ones made of per-sample gradients, and of which, where the name does not say.
_PER_SAMPLE = ("self_influence", "param_shift", "grand")
_GRADIENT_OF = {"self_influence": "gt", "grand": "gt"}


def score(
    student: nn.Module,
    teacher: nn.Module,
    train_data: Data,
    val_data: Data | None = None,
    *,
    layers: str | Sequence[str] = "last",
    scores: str | Sequence[str] = ("kd_gain",),
    curvature: str = "ekfac",
    damping: float | None = None,
    damping_scale: float = 0.1,
    hessian: str = "objective",
    folds: int | None = None,
    labels: int | str = 1,
    selected: Tensor | None = None,
    loss: KDLoss | None = None,
    factors: Factors | None = None,
    batch_size: int = 256,
    batch: BatchHook | None = None,
    logits: LogitsHook | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Scores:
    """Scores every sample by what its teacher does to the student's layers. LOWER = keep the teacher.

    layers="last" is last_layer_scores from the models and the data: one forward pass over each, then the closed form.
    Over more layers, kd_gain costs one forward-mode pass (a JVP) per batch and no per-sample gradient: -(ddelta_i .
    dz_i), dz_i the change of sample i's logits when the parameters move by H^-1 g_val. self_influence, param_shift and
    grand add up over the layers.

    student, teacher: from inputs (B, ...) to logits (B, C); both are put into eval mode and restored. The parameters'
    device is where everything runs. train_data, val_data: a Dataset of (input, target, ...) samples (or a list of
    them), read in order in batches of batch_size, or an iterable of such batches (a DataLoader without shuffling);
    targets are integers in [0, C). val_data, held out of the training set and never the test set, is needed by kd_gain.
    Data are read up to three times (four for mismatch over more layers than the last) and must give exactly the same
    tensors each time: pass them with the evaluation transform, never with random augmentation. To check this, the first
    16 samples of a dataset, or the first batch of other data, are read twice; ValueError if they differ.
    batch: a function from a loader's batch to (inputs, targets), needed unless batches are (inputs, targets, ...):
    batch=lambda b: (b["pixel_values"], b["labels"]). logits: a function from a model's output to its logits
    (B, C), for student and teacher alike: logits=lambda out: out[0]. None: a tensor, or the `logits` of an object that
    has them.
    layers: "last" (the last nn.Linear, whose output must be the logits), "all" with trainable parameters, or a list of
    module names. Linear, Conv (groups, dilation, any padding), Embedding and normalisation layers; others are refused
    by name.
    scores: the names of last_layer_scores; kd_gain_ns with layers="last" only. curvature: "identity", "kfac", "ekfac",
    a block per layer; "exact" with layers="last" only. labels: how H sees the model's own labels: a number of draws per
    sample (seed 0), or "all" (exact, C backward passes a batch); the last layer has them all, in closed form.
    damping: >= 0, added to every eigenvalue; None: damping_scale times each layer's mean eigenvalue, which is an error
    where the curvature is zero up to rounding (a student that has memorised its training set).
    hessian, selected, loss: as in last_layer_scores; selected (N,) in the order of train_data.
    folds: as in last_layer_scores, for the standard error of kd_gain; None: 10 for the last layer, 0 for more layers,
    where each part costs a JVP per batch.
    factors: Factors.fit or .load of this student's layers, instead of fitting them here; layers, curvature, damping,
    damping_scale, hessian and labels are then theirs.
    out: a folder for the scores, one Parquet file per shard of the data (load_scores and any Parquet reader take it as
    one table); what a killed run has finished stays, and resume=True goes on with it, to the same result. Without `out`
    the last layer's rows, d + 2 C numbers a sample, are held in memory; with it they are on disk while needed.
    progress: bars with the time left; None: where stderr is a terminal.

    Under torchrun (an initialised torch.distributed) every process makes this call: the data's batches are divided
    among them, each batch to one, the factors are summed over all, and all get all scores. `out` must be a folder that
    all of them see.

    Returns Scores on the CPU, float32 (float64 for a float64 student). Raises ValueError or TypeError naming what is
    wrong: an argument, a layer, or the sample whose gradient or score is not finite.
    """
    names = parse_score_names(scores)
    kinds = {name.kind for name in names}
    check_choice("curvature", curvature, CURVATURES)
    check_choice("hessian", hessian, HESSIANS)
    damping = None if damping is None else check_damping("damping", damping)
    damping_scale = check_damping("damping_scale", damping_scale)
    loss = checked_loss(loss)
    chosen = layer_names(student, layers) if factors is None else checked_factors(student, factors, layers)
    head = layers == "last" and factors is None
    folds = check_folds(folds, FOLDS if head else 0)
    if not head and "kd_gain_ns" in kinds:
        raise ValueError("kd_gain_ns is a score of the last layer alone: pass layers='last'")
    if not head and curvature == "exact":
        raise ValueError("curvature 'exact' is of the last layer alone: pass layers='last', or curvature='ekfac'")
    if not kinds.isdisjoint(DIRECTED) and val_data is None:
        raise ValueError("kd_gain needs val_data, a slice held out of the training set")
    parameter = next(student.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    ranks = Ranks.current()
    shown = progress if ranks.first else False
    learner, other = Classifier(student, "student", logits), Classifier(teacher, "teacher", logits)
    train = Batches(train_data, parameter, batch_size, shown, name="train_data", batch=batch)
    held_out = None
    if val_data is not None:
        held_out = Batches(val_data, parameter, batch_size, shown, name="val_data", batch=batch)
    check_selected_mask(selected, train.samples)
    meta: dict[str, object] = {
        "layers": chosen,
        "curvature": curvature if factors is None else factors.curvature,
        "hessian": hessian,
        "labels": "all" if head else labels,
        "loss": loss_facts(loss),
        "library_version": __version__,
    }
    facts = {
        **meta,
        "scores": [name.key for name in names],
        "damping": damping,
        "damping_scale": damping_scale,
        "folds": folds,
        "dtype": str(dtype),
        "student": tensors_fingerprint(student.state_dict()),
        "teacher": tensors_fingerprint(teacher.state_dict()),
        "selected": None if selected is None else tensors_fingerprint({"selected": selected}),
        "factors": None if factors is None else factors.fingerprint,
        "train_samples": train.samples,
        "val_samples": None if held_out is None else held_out.samples,
        "batches": train.count,
    }
    shards = Shards(out, facts, resume=resume, batches=train.count, ranks=ranks)
    if shards.complete and out is not None:
        return load_scores(out)
    common: dict[str, Any] = {
        "dtype": dtype,
        "damping": damping,
        "damping_scale": damping_scale,
        "hessian": hessian,
        "folds": folds,
        "selected": selected,
        "loss": loss,
        "curvature": curvature,
    }
    with eval_mode(student, teacher):
        if not head:
            common["loss"] = as_trained(loss, ranks, train.targets(ranks))
        if head:
            more = score_head(learner, other, chosen[0], train, held_out, shards, names, **common)
        else:
            more = _score_layers(
                learner, other, chosen, train, held_out, shards, names, factors=factors, labels=labels, **common
            )
    samples = more["num_samples"]
    assert isinstance(samples, int)
    check_selected_mask(selected, samples)
    return shards.finish({**meta, **more})


def check_selected_mask(selected: Tensor | None, samples: int | None) -> None:
    """TypeError or ValueError unless selected is None or has a weight for each of the samples; None: not known yet."""
    if selected is None:
        return
    check_selected_values(selected)
    if samples is not None and selected.shape != (samples,):
        raise ValueError(f"selected must have shape ({samples},), one value per sample; got {tuple(selected.shape)}")


def _score_layers(
    learner: Classifier,
    teacher: Classifier,
    chosen: list[str],
    train: Batches,
    held_out: Batches | None,
    shards: Shards,
    names: Sequence[ScoreName],
    *,
    dtype: torch.dtype,
    curvature: str,
    damping: float | None,
    damping_scale: float,
    hessian: str,
    folds: int,
    labels: int | str,
    selected: Tensor | None,
    loss: KDLoss,
    factors: Factors | None,
) -> dict[str, object]:
    """Writes this process's shards; returns what Scores.meta says of them."""
    ranks, student = shards.ranks, learner.module
    kinds = {name.kind for name in names}
    if factors is None and not kinds.isdisjoint(("kd_gain", "self_influence", "param_shift")):
        kept = shards.kept_path("factors")
        if kept is not None and ranks.agree(kept.exists()):
            factors = Factors.load(kept, student)
        else:
            terms = HessianTerms(hessian, selected, loss, train, ranks)
            factors = fit_placed(
                learner,
                terms.inputs,
                layers=chosen,
                curvature=curvature,
                terms=terms,
                labels=labels,
                damping=damping,
                damping_scale=damping_scale,
                ranks=ranks,
            )
            if kept is not None:
                if ranks.first:
                    factors.save(kept)
                ranks.wait()
    directions: list[dict[str, Tensor]] = []
    if "kd_gain" in kinds and factors is not None and held_out is not None:
        path = shards.kept_path("directions")
        if path is not None and ranks.agree(path.exists()):
            directions = _listed(shards.kept("directions") or {})
        else:
            wanted = _deviations(*_fold_gradients(learner, chosen, held_out, ranks, folds))
            directions = [_unpacked(student, factors.solve(_packed(student, chosen, sums))) for sums in wanted]
            if path is not None and ranks.first:
                shards.keep("directions", _numbered(directions))
            ranks.wait()
        device = next(student.parameters()).device
        directions = [{name: tensor.to(device) for name, tensor in each.items()} for each in directions]
    mismatch = None
    if "mismatch" in kinds:
        path = shards.kept_path("mismatch")
        if path is not None and ranks.agree(path.exists()):
            mismatch = (shards.kept("mismatch") or {})["mismatch"]
        else:
            mismatch = _mismatch(learner, teacher, train, shards)
            if path is not None and ranks.first:
                shards.keep("mismatch", {"mismatch": mismatch})
            ranks.wait()
    needed = [_GRADIENT_OF.get(name.kind, name.gradient) for name in names if name.kind in _PER_SAMPLE]
    first = needed[0] if needed else None
    like = torch.empty(0, dtype=dtype)
    columns: dict[str, list[Tensor]] = {}
    shard, start, classes = -1, 0, 0

    def flush() -> None:
        if columns:
            whole = {key: torch.cat(parts) for key, parts in columns.items()}
            shards.write(shard, start, completed(whole, names, start, like, mismatch))
            columns.clear()

    for batch in train("scores", lambda n: shards.mine(shards.of(n)) and not shards.done(shards.of(n))):
        if not columns:
            shard, start = shards.of(batch.number), batch.start
        try:
            scored = ScoredBatch(learner, teacher, batch.x, batch.y, chosen, loss, factors, directions, dtype, first)
            found = {name.key: scored.score(name).to(dtype) for name in names if name.kind in SCORERS}
            if len(directions) > 1:
                found["kd_gain" + ERROR_SUFFIX] = scored.gain_error().to(dtype)
        except ValueError as error:
            raise ValueError(f"{error} (the batch begins at sample {batch.start})") from error
        classes = scored.rows.z.shape[1]
        for key, column in {"label": batch.y, "teacher_pred": scored.rows.teacher_pred(), **found}.items():
            columns.setdefault(key, []).append(column.cpu())
        if shards.ends_with(batch.number):
            flush()
    flush()
    written, classes = shards.written(), max(ranks.gather(classes))
    if classes == 0:  # an earlier run had written every shard, but not its end
        batch = next(train("scores", lambda number: number == 0))
        with torch.no_grad():
            classes = learner(batch.x).shape[1]
    return {
        "num_samples": written,
        "num_classes": classes,
        "damping": None if factors is None else factors.damping,
        "folds": max(len(directions) - 1, 0),
    }


@torch.no_grad()
def _mismatch(learner: Classifier, teacher: Classifier, train: Batches, shards: Shards) -> Tensor:
    """The score of all processes' samples, (N,), from a pass of both models over them."""
    agreements = Agreements()
    for batch in train("mismatch", lambda number: shards.mine(shards.of(number))):
        z, v = learner(batch.x), teacher(batch.x)
        _check_pair(z, v, batch.start)
        agreements.add(batch.start, z, v)
    return agreements.probabilities(shards.ranks)


def _check_pair(z: Tensor, v: Tensor, first: int = 0) -> None:
    """Student's and teacher's logits (B, C) of the samples from `first` on: legal, of the same classes."""
    check_logits("student_logits", z, first)
    check_logits("teacher_logits", v, first)
    if z.shape != v.shape:
        raise ValueError(f"student and teacher must give the same classes; got {tuple(z.shape)}, {tuple(v.shape)}")


def checked_factors(student: nn.Module, factors: Factors, layers: str | Sequence[str]) -> list[str]:
    """The layers of factors that were fitted to this student."""
    if layers not in ("all", "last") and layer_names(student, layers) != factors.layers:
        raise ValueError(f"layers and factors differ; the factors are of {', '.join(map(repr, factors.layers))}")
    known = dict(student.named_modules())
    if any(name not in known for name in factors.layers) or fingerprint(student, factors.layers) != factors.model:
        raise ValueError("factors were fitted to another student, or to other weights of it; fit them again")
    return factors.layers


class eval_mode:
    """Models in eval mode for a while; each of their modules gets its own mode back."""

    def __init__(self, *models: nn.Module) -> None:
        self._models = models

    def __enter__(self) -> None:
        self._modes = [(module, module.training) for model in self._models for module in model.modules()]
        for model in self._models:
            model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes:
            module.training = training


class HessianTerms:
    """The objective's terms for fit_factors, which sees inputs only: with the targets of its last batch."""

    def __init__(self, hessian: str, selected: Tensor | None, loss: KDLoss, batches: Batches, ranks: Ranks) -> None:
        self._hessian, self._selected, self._loss, self._batches = hessian, selected, loss, batches
        self._ranks = ranks
        self._target = torch.empty(0)

    def inputs(self) -> Iterator[tuple[int, Tensor]]:
        ranks = self._ranks
        for batch in self._batches("factors", lambda number: number % ranks.count == ranks.rank):
            self._target = batch.y
            yield batch.start, batch.x

    def __call__(self, logits: Tensor, start: int) -> list[tuple[Tensor, float]]:
        ones = logits.new_ones(len(logits))
        if self._hessian == "gt":
            return [(ones, 1.0)]
        loss, w = self._loss, ones
        if self._selected is not None:
            w = self._selected[start : start + len(logits)].to(ones)
            if len(w) != len(logits):
                raise ValueError(
                    f"selected must have one value per sample; got {len(self._selected)}, and there are at least"
                    f" {start + len(logits)} samples"
                )
        ce = w * loss.ce_weight + (1.0 - w) * loss.resolved_ce_weight_unselected
        if loss.class_weight is not None:
            ce = ce * loss.class_weight.to(ce)[self._target]
        terms = [(ce, 1.0)] + [(w * loss.kd_weight, t) for t in functional.temperatures(loss.temperature)]
        if any((weight < 0).any() for weight, _ in terms):
            raise ValueError("hessian='objective' needs a loss whose weights are >= 0, or H is indefinite")
        return terms


class ScoredBatch:
    """A batch of samples: logits now, gradients in the parameters when a score asks for them."""

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier,
        x: Tensor,
        y: Tensor,
        layers: Sequence[str],
        loss: KDLoss,
        factors: Factors | None,
        directions: Sequence[Mapping[str, Tensor]],
        dtype: torch.dtype,
        first: str | None,
    ) -> None:
        self._student, self._x, self._layers, self._factors = student, x, layers, factors
        self._directions, self._loss, self._dtype = directions, loss, dtype
        self._gradients: dict[str, Any] = {}
        with torch.no_grad():
            v = teacher(x).to(dtype)
        if first is None:
            with torch.no_grad():
                self.rows = self._opened(student(x), v, y)
        else:
            # The forward pass of the first gradients is the one that the logits come from.
            def delta(logits: Tensor) -> Tensor:
                self.rows = self._opened(logits, v, y)
                return self.rows.gradient(first).to(logits)

            self._gradients[first] = sample_gradients(student, x, delta, layers)[1]

    def _opened(self, logits: Tensor, v: Tensor, y: Tensor) -> ScoreInputs:
        z = logits.to(self._dtype)
        _check_pair(z, v)
        if y.min() < 0 or y.max() >= z.shape[1]:
            raise ValueError(f"targets must lie in [0, {z.shape[1]}); got {int(y.min())} to {int(y.max())}")
        nothing = z.new_empty(len(z), 0)
        return ScoreInputs(
            h=nothing, z=z, v=v, y=y, loss=self._loss, curvature=Identity(None), direction=nothing[:0].reshape(0, 0)
        )

    def _of(self, gradient: str) -> Any:
        if gradient not in self._gradients:
            delta = self.rows.gradient(gradient)
            self._gradients[gradient] = sample_gradients(
                self._student, self._x, lambda logits: delta.to(logits), self._layers
            )[1]
        return self._gradients[gradient]

    def score(self, name: ScoreName) -> Tensor:
        """(B,) the score."""
        if name.kind not in _OF_PARAMETERS:
            return SCORERS[name.kind](self.rows, name)
        if name.kind == "kd_gain":
            return self._gain()
        if name.kind == "grand":
            return torch.stack([g.squared_norm() for g in self._of("gt").values()]).sum(dim=0).sqrt()
        assert self._factors is not None
        if name.kind == "self_influence":
            return self._factors.quadratic(self._of("gt"), 1)
        return self._factors.quadratic(self._of(name.gradient), 2).sqrt()

    def _gain(self) -> Tensor:
        return -self._along(self._directions[0])

    def gain_error(self) -> Tensor:
        """(B,) the standard error of the gain; see last_layer."""
        parts = torch.stack([self._along(direction) for direction in self._directions[1:]])
        error: Tensor = torch.linalg.vector_norm(parts, dim=0)
        return error

    def _along(self, direction: Mapping[str, Tensor]) -> Tensor:
        """ddelta . dz, dz the derivative of the logits along the direction."""
        student, x = self._student.module, self._x

        def outward(parameters: dict[str, Tensor]) -> Tensor:
            return self._student.read(functional_call(student, parameters, (x,)), len(x))

        moved = {name: tensor.detach() for name, tensor in student.named_parameters() if name in direction}
        with torch.no_grad():
            dz = jvp(outward, (moved,), ({name: direction[name] for name in moved},))[1]
        product: Tensor = torch.linalg.vecdot(self.rows.gradient("delta"), dz.to(self.rows.z))
        return product


def _fold_gradients(
    learner: Classifier, layers: Sequence[str], batches: Batches, ranks: Ranks, folds: int
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """The gradient of the cross-entropy by parameter name, summed over each part of the held-out slice (sample j is in
    part j modulo folds), float64; and how many samples each part has, (F,). Parts without samples are left out."""
    student = learner.module
    parameters = {n: p for n, p in parameters_of(student, layers).items() if p.requires_grad}
    device = next(student.parameters()).device
    parts = max(1, folds)
    sums = [{n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()} for _ in range(parts)]
    counts = torch.zeros(parts, dtype=torch.float64, device=device)
    for batch in batches("validation", lambda number: number % ranks.count == ranks.rank):
        of = (batch.start + torch.arange(len(batch.x), device=device)) % parts
        with torch.enable_grad():
            each = F.cross_entropy(learner(batch.x), batch.y, reduction="none")
            for number in sorted(set(of.tolist())):
                # The graph is kept for the next part.
                gradients = torch.autograd.grad(
                    each[of == number].sum(), list(parameters.values()), allow_unused=True, retain_graph=True
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        sums[number][name] += gradient
        counts += torch.bincount(of, minlength=parts)
    for tensor in (counts, *(tensor for part in sums for tensor in part.values())):
        ranks.sum(tensor)
    return [part for part, count in zip(sums, counts.tolist(), strict=True) if count], counts[counts > 0]


def _deviations(sums: Sequence[Mapping[str, Tensor]], counts: Tensor) -> list[dict[str, Tensor]]:
    """The mean gradient g_val first; then, where there are several parts, each part's difference to it times
    sqrt(w_f / (F - 1)): the squares of the scores that these give add up to the squared standard error."""
    total = counts.sum()
    mean = {name: torch.stack([part[name] for part in sums]).sum(dim=0) / total for name in sums[0]}
    if len(sums) == 1:
        return [mean]
    scales = part_scales(counts)
    return [mean] + [
        {name: (part[name] / count - mean[name]) * scale for name in mean}
        for part, count, scale in zip(sums, counts, scales, strict=True)
    ]


def _packed(student: nn.Module, layers: Sequence[str], gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By parameter name, flattened layer by layer as SampleGradients are."""
    packed = {}
    for layer in layers:
        module = student.get_submodule(layer)
        own = {kind: gradient[f"{layer}.{kind}" if layer else kind] for kind, _ in _own(module)}
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            columns = [own["weight"].flatten(1)] + ([own["bias"][:, None]] if "bias" in own else [])
            packed[layer] = torch.cat(columns, dim=1).flatten()
        else:
            packed[layer] = torch.cat([tensor.flatten() for tensor in own.values()])
    return packed


def _numbered(directions: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Several directions in one mapping, for one file."""
    return {f"{number}:{name}": t for number, each in enumerate(directions) for name, t in each.items()}


def _listed(numbered: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The reverse of _numbered."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in numbered.items():
        number, _, name = key.partition(":")
        found.setdefault(int(number), {})[name] = tensor
    return [found[number] for number in sorted(found)]


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters(recurse=False))


def _unpacked(student: nn.Module, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of packing: by parameter name, in each parameter's shape and dtype."""
    found = {}
    for layer, flat in packed.items():
        module = student.get_submodule(layer)
        own = dict(_own(module))
        parts: dict[str, Tensor] = {}
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            matrix = flat.reshape(len(own["weight"]), -1)
            width = own["weight"][0].numel()
            parts["weight"] = matrix[:, :width]
            if "bias" in own:
                parts["bias"] = matrix[:, width]
        else:
            start = 0
            for kind, parameter in own.items():
                parts[kind] = flat[start : start + parameter.numel()]
                start += parameter.numel()
        for kind, part in parts.items():
            found[f"{layer}.{kind}" if layer else kind] = part.reshape(own[kind].shape).to(own[kind].dtype).contiguous()
    return found
