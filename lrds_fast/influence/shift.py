"""How far each sample moves the whole parameter vector: H^-1 g, or a sketch of it that keeps its geometry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lrds_fast._numbers import integer
from lrds_fast.influence.adapters import BatchHook, Classifier, LogitsHook
from lrds_fast.influence.batches import Batches, Data
from lrds_fast.influence.factors import CURVATURES, Factors, combined_seed, fit_placed
from lrds_fast.influence.inputs import check_choice, check_damping, check_scores
from lrds_fast.influence.last_layer import HESSIANS, as_trained, checked_loss
from lrds_fast.influence.layers import SampleGradients, layer_names
from lrds_fast.influence.scores import GRADIENTS
from lrds_fast.influence.whole import HessianTerms, ScoredBatch, check_selected_mask, checked_factors, eval_mode
from lrds_fast.nn import KDLoss
from lrds_fast.ranks import Ranks


def set_shift(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    *,
    gradient: str = "delta",
    dim: int | None = 512,
    layers: str | Sequence[str] = "last",
    factors: Factors | None = None,
    curvature: str = "ekfac",
    damping: float | None = None,
    damping_scale: float = 0.1,
    hessian: str = "objective",
    labels: int | str = 1,
    selected: Tensor | None = None,
    loss: KDLoss | None = None,
    seed: int = 0,
    batch_size: int = 256,
    batch: BatchHook | None = None,
    logits: LogitsHook | None = None,
    progress: bool | None = None,
) -> Tensor:
    """S_i = R H^-1 g_i, (N, dim): what select_jointly adds up.

    To first order the optimum moves by -1/n sum_i S_i (before R) when the samples i get that gradient.
    gradient: "delta", the change when a sample gets its teacher; "gt", of its cross-entropy; "kd", of its divergence.
    teacher: None is allowed with "gt".
    dim: R is a count sketch into this many numbers (random signs from `seed`, coordinates of the eigenbasis dealt out
    in turn), which keeps inner products on average; a length is off by about sqrt(2 / dim). None: no sketch, all P
    coordinates in H's eigenbasis, (N, P), lengths and products exact.
    factors: of this student; None fits them here, to `layers`, by curvature ("identity", "kfac" or "ekfac"), damping,
    damping_scale, hessian, labels and selected, which mean what they mean to influence.score.
    student, data, batch_size, batch, logits, progress: as influence.score takes them. Under torch.distributed every
    process computes all of it. The result is on the CPU, float32 (float64 for a float64 student). Raises ValueError or
    TypeError as influence.score does.
    """
    check_choice("gradient", gradient, GRADIENTS)
    if dim is not None and (dim := integer("dim", dim, "None or an int >= 1")) < 1:
        raise ValueError(f"dim must be None or an int >= 1; got {dim!r}")
    if teacher is None and gradient != "gt":
        raise ValueError(f"gradient={gradient!r} needs a teacher")
    check_choice("curvature", curvature, CURVATURES)
    check_choice("hessian", hessian, HESSIANS)
    chosen = layer_names(student, layers) if factors is None else checked_factors(student, factors, "all")
    loss = checked_loss(loss)
    parameter = next(student.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    models = [student] if teacher is None else [student, teacher]
    batches = Batches(data, parameter, batch_size, progress, batch=batch)
    check_selected_mask(selected, batches.samples)
    learner = Classifier(student, "student", logits)
    other = learner if teacher is None else Classifier(teacher, "teacher", logits)
    found = []
    with eval_mode(*models):
        loss = as_trained(loss, Ranks(), batches.targets(Ranks()))
        if factors is None:
            terms = HessianTerms(hessian, selected, loss, batches, Ranks())
            factors = fit_placed(
                learner,
                terms.inputs,
                layers=chosen,
                curvature=curvature,
                terms=terms,
                labels=labels,
                damping=None if damping is None else check_damping("damping", damping),
                damping_scale=check_damping("damping_scale", damping_scale),
            )
        sketch = _Sketch(factors, dim, seed, dtype, parameter.device)
        for part in batches("set_shift"):
            scored = ScoredBatch(learner, other, part.x, part.y, chosen, loss, factors, [], dtype, gradient)
            found.append(sketch(scored._of(gradient)).cpu())
            check_scores("set_shift", found[-1], part.start)
    shifts = torch.cat(found)
    check_selected_mask(selected, len(shifts))
    return shifts


class _Sketch:
    """R H^-1 in the eigenbasis of each layer's block."""

    def __init__(self, factors: Factors, dim: int | None, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._factors, self._dim = factors, dim
        self._weights: dict[str, Tensor] = {}
        for number, (name, block) in enumerate(factors.blocks.items()):
            weights = factors.inverse(name)
            if dim is not None:
                generator = torch.Generator().manual_seed(combined_seed(seed, number))
                signs = torch.randint(0, 2, weights.shape, generator=generator).mul_(2).sub_(1)
                weights = weights * signs.to(weights)
            # As rows of a matrix, whatever the groups.
            self._weights[name] = weights.reshape(-1, block.eigenvalues.shape[-1]).to(device, dtype)

    def __call__(self, gradients: Mapping[str, SampleGradients]) -> Tensor:
        found: list[Tensor] = []
        for name, block in self._factors.blocks.items():
            weights = self._weights[name]
            parts = []
            for part in gradients[name].parts():
                rotated = block.rotate(part)
                rotated = rotated.reshape(len(rotated), *weights.shape).to(weights.dtype)
                parts.append((rotated * weights).flatten(1) if self._dim is None else self._dealt(rotated, weights))
            found.append(torch.cat(parts))
        return torch.cat(found, dim=1) if self._dim is None else torch.stack(found).sum(dim=0)

    def _dealt(self, rotated: Tensor, weights: Tensor) -> Tensor:
        """(B, dim): rotated * weights, its coordinates dealt out to dim sums in turn.

        A column's energy must not fall into one sum: rows are spaced so that they begin at different sums.
        """
        assert self._dim is not None
        rows, width = weights.shape
        stride = next(n for n in range(width, 2 * width + self._dim) if math.gcd(n, self._dim) == 1)
        length = -(-rows * stride // self._dim) * self._dim
        padded = rotated.new_zeros(len(rotated), length)
        torch.mul(rotated, weights, out=padded[:, : rows * stride].view(len(rotated), rows, stride)[..., :width])
        return padded.view(len(rotated), -1, self._dim).sum(dim=1)
