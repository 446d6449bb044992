"""The vector by which each sample moves the parameters: H^-1 g, or a sketch of it with the same geometry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lrds_fast._numbers import integer
from lrds_fast.influence.adapters import BatchHook, LogitsHook, evaluation_mode
from lrds_fast.influence.batches import Data, ReadOptions
from lrds_fast.influence.draws import keyed_generator
from lrds_fast.influence.factors import Factors
from lrds_fast.influence.inputs import check_choice, check_scores, check_selected
from lrds_fast.influence.layers import SampleGradients, layer_names
from lrds_fast.influence.objective import TrainingObjective
from lrds_fast.influence.options import BLOCK_CURVATURES, CurvatureOptions, HessianOptions
from lrds_fast.influence.scores import GRADIENTS
from lrds_fast.influence.task import teacher_logits
from lrds_fast.influence.whole import LayerScores, fitted_factors
from lrds_fast.nn import KDLoss
from lrds_fast.ranks import Ranks


def set_shift(
    student: nn.Module,
    teacher: nn.Module | Tensor | None,
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
    """S_i = R H^-1 g_i, (N, dim): the vectors that select_jointly adds up.

    To first order the optimum moves by -1/n sum_i S_i (before R) when the samples i get that gradient.
    gradient: "delta", the change when a sample gets its teacher; "gt", of its cross-entropy; "kd", of its divergence.
    teacher: a model or its logits (N, C), as influence.score takes it; None is allowed with "gt".
    dim: R is a count sketch into this many numbers (random signs from `seed`, coordinates of the eigenbasis dealt out
    in turn), which keeps inner products on average; a length is off by about sqrt(2 / dim). None: no sketch, all P
    coordinates in H's eigenbasis, (N, P), lengths and products exact.
    factors: of this student; None fits them here, to `layers`, by curvature ("identity", "kfac" or "ekfac"), damping,
    damping_scale, hessian, labels and selected, which mean what they mean to influence.score.
    student, data, batch_size, batch, logits, progress: as influence.score takes them. Under torch.distributed every
    process computes all of it. The result is on the CPU, float32 (float64 for a float64 student). Raises ValueError or
    TypeError as influence.score does. Source of the selection: Yang et al. 2023 (arXiv:2205.09329).
    """
    check_choice("gradient", gradient, GRADIENTS)
    if dim is not None and (dim := integer("dim", dim, "None or an int >= 1")) < 1:
        raise ValueError(f"dim must be None or an int >= 1; got {dim!r}")
    if teacher is None and gradient != "gt":
        raise ValueError(f"gradient={gradient!r} needs a teacher")
    parameter = next(student.parameters())
    options = HessianOptions(
        CurvatureOptions(curvature, damping, damping_scale, labels, BLOCK_CURVATURES),
        TrainingObjective.of(loss, hessian),
        selected,
        torch.float64 if parameter.dtype == torch.float64 else torch.float32,
    )
    layer_list = layer_names(student, layers) if factors is None else factors.layers_of(student)
    read = ReadOptions(batch_size, batch, logits, progress)
    reader = read.reader(data, parameter)
    check_selected(selected, reader.samples)
    learner = read.classifier(student, "student")
    # "gt" does not depend on the teacher: the student stands in for it.
    teacher_of = teacher_logits(student if teacher is None else teacher, read, reader)
    shifts = []
    with evaluation_mode(*(model for model in (student, teacher) if isinstance(model, nn.Module))):
        options = options.normalised(Ranks(), reader.targets(Ranks()))
        if factors is None:
            factors = fitted_factors(learner, layer_list, reader, options, Ranks())
        sketch = _Sketch(factors, dim, seed, options.dtype, parameter.device)
        for part in reader("set_shift"):
            scored = LayerScores(learner, teacher_of, part, layer_list, options, factors, [], gradient)
            shifts.append(sketch(scored.gradients(gradient)).cpu())
            check_scores("set_shift", shifts[-1], part.start)
    joined = torch.cat(shifts)
    check_selected(selected, len(joined))
    return joined


class _Sketch:
    """R H^-1 in the eigenbasis of each layer's block. dim, seed: as in set_shift. dtype, device: of the result."""

    def __init__(self, factors: Factors, dim: int | None, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._factors, self._dim = factors, dim
        self._weights: dict[str, Tensor] = {}
        for number, (name, block) in enumerate(factors.blocks.items()):
            weights = factors.inverse(name)
            if dim is not None:
                generator = keyed_generator((seed, number))
                signs = torch.randint(0, 2, weights.shape, generator=generator).mul_(2).sub_(1)
                weights = weights * signs.to(weights)
            # As a matrix: the groups' rows below each other.
            self._weights[name] = weights.reshape(-1, block.eigenvalues.shape[-1]).to(device, dtype)

    def __call__(self, gradients: Mapping[str, SampleGradients]) -> Tensor:
        """(B, dim) or (B, P). gradients: of B samples, by layer name."""
        by_layer: list[Tensor] = []
        for name, block in self._factors.blocks.items():
            weights = self._weights[name]
            parts = []
            for part in gradients[name].parts():
                rotated = block.rotate(part)
                rotated = rotated.reshape(len(rotated), *weights.shape).to(weights.dtype)
                parts.append((rotated * weights).flatten(1) if self._dim is None else self._dealt(rotated, weights))
            by_layer.append(torch.cat(parts))
        return torch.cat(by_layer, dim=1) if self._dim is None else torch.stack(by_layer).sum(dim=0)

    def _dealt(self, rotated: Tensor, weights: Tensor) -> Tensor:
        """(B, dim): rotated * weights, its coordinates dealt out to dim sums in turn.

        Rows are padded so that they begin at different sums; otherwise all of a column could fall into one sum.
        """
        assert self._dim is not None
        rows, width = weights.shape
        stride = next(n for n in range(width, 2 * width + self._dim) if math.gcd(n, self._dim) == 1)
        length = -(-rows * stride // self._dim) * self._dim
        padded = rotated.new_zeros(len(rotated), length)
        torch.mul(rotated, weights, out=padded[:, : rows * stride].view(len(rotated), rows, stride)[..., :width])
        return padded.view(len(rotated), -1, self._dim).sum(dim=1)
