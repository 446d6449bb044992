"""The curvature of several layers, a block per layer: fitted in one or two passes over the data.

For a layer whose sample gradients are G_i = sum_t d_it (outer) a_it, with d from labels that the model itself would
give (objective.fisher_gradients):

    A = mean_i sum_t a_it a_it^T = Qa diag(a) Qa^T         G = mean_i mean_t d_it d_it^T = Qg diag(g) Qg^T
    K-FAC: H = (Qg (x) Qa) diag(g (outer) a) (Qg (x) Qa)^T
    EK-FAC: the same with Lambda = mean_i (Qg^T G_i Qa)^2 in place of g (outer) a

Grouped convolutions have one such block per group. Layers with one parameter per channel (normalisation) and embedding
tables have the diagonal of the same Fisher matrix. Batches are reduced in the model's dtype; sums over batches,
eigenvectors and inverses are float64.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lrds_fast.files import replacing
from lrds_fast.influence.adapters import BatchHook, Classifier, LogitsHook
from lrds_fast.influence.batches import Data, ReadOptions
from lrds_fast.influence.curvature import check_curvature
from lrds_fast.influence.draws import keyed_generator
from lrds_fast.influence.eigen import inverse_eigenvalues, psd_eigendecomposition
from lrds_fast.influence.layers import Outer, SampleGradients, layer_names, sample_gradients
from lrds_fast.influence.objective import LogitTerms, cross_entropy_terms, fisher_gradients
from lrds_fast.influence.options import BLOCK_CURVATURES, CurvatureOptions
from lrds_fast.ranks import Ranks

Terms = Callable[[Tensor, int], Sequence[tuple[Tensor, float]]]
"""From logits (B, C) and the number of their first sample to the Hessian's terms: weights (B,) >= 0 of
J(softmax(z / T)), and T; see objective.py."""


class HessianBatch(NamedTuple):
    """A batch of samples that H is fitted to. start: the number of the first sample. x: inputs (B, ...)."""

    start: int
    x: Tensor
    terms: LogitTerms


@dataclass(frozen=True)
class Block:
    """The curvature of a layer, float64: eigenvalues (G, O, I) in the basis qg (G, O, O), qa (G, I, I), or eigenvalues
    (P,) of its parameters, without a basis."""

    eigenvalues: Tensor
    qg: Tensor | None = None
    qa: Tensor | None = None
    _bases: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def mean(self) -> float:
        """The mean eigenvalue."""
        return float(self.eigenvalues.mean())

    def _basis(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """qg and qa in the dtype and on the device of `like`; cached."""
        key = (like.dtype, like.device)
        if key not in self._bases:
            assert self.qg is not None
            assert self.qa is not None
            self._bases[key] = (self.qg.to(like), self.qa.to(like))
        return self._bases[key]

    def rotate(self, gradients: SampleGradients) -> Tensor:
        """(B, *eigenvalues.shape): sample gradients in the block's basis, in their own dtype."""
        if self.qg is None or self.qa is None or not isinstance(gradients, Outer):
            return gradients.dense().reshape(-1, *self.eigenvalues.shape)
        a, d = gradients.inputs, gradients.deltas
        qg, qa = self._basis(d)
        positions, inputs, outputs = a.shape[2], a.shape[3], d.shape[3]
        # Each side is rotated where that is cheaper: position by position, or after the sum over positions.
        if positions < inputs:
            d = _applied(d, qg)
        if positions < outputs:
            return d.transpose(2, 3) @ _applied(a, qa)
        tile = _applied(d.transpose(2, 3) @ a, qa)
        return tile if positions < inputs else qg.transpose(1, 2) @ tile

    def quadratic(self, gradients: SampleGradients, normal: Tensor, scale: float) -> Tensor:
        """(B,) sum over the block of scale * normal * rotated^2, float64; normal in the gradients' dtype."""
        if self.qg is not None and self.qa is not None and isinstance(gradients, Outer):
            a, d = gradients.inputs, gradients.deltas
            if a.shape[2] == 1:  # one position: two products and a row-dot, no O x I tile
                qg, qa = self._basis(d)
                v, u = (_rotated(x[:, :, 0], q).square_() for x, q in ((a, qa), (d, qg)))
                return (torch.bmm(u, normal) * v).sum(dim=(0, 2)).double() * scale
        rotated = self.rotate(gradients)
        rotated = rotated.square() if self.qg is None else rotated.square_()
        return (rotated.flatten(1) @ normal.flatten()).double() * scale

    def solve(self, gradient: Tensor, inverse: Tensor) -> Tensor:
        """H^-1 of one flattened gradient (P,)."""
        tile = gradient.to(self.eigenvalues).reshape(self.eigenvalues.shape)
        if self.qg is None or self.qa is None:
            return (tile * inverse).flatten()
        rotated = self.qg.transpose(1, 2) @ tile @ self.qa
        return (self.qg @ (rotated * inverse) @ self.qa.transpose(1, 2)).flatten()


def _applied(x: Tensor, q: Tensor) -> Tensor:
    """x (B, G, R, W) in the bases q (G, W, W); one product where there is one group and x is contiguous."""
    if len(q) == 1 and x.is_contiguous():
        return (x.flatten(0, 2) @ q[0]).view_as(x)
    return x @ q


def _rotated(rows: Tensor, q: Tensor) -> Tensor:
    """Rows (B, G, W) in the bases q (G, W, W): (G, B, W)."""
    return torch.bmm(rows.transpose(0, 1), q)


_FORMAT = "lrds-fast influence factors 1"


def fingerprint(model: nn.Module) -> str:
    """sha256 of a model's parameters and buffers: their names, shapes, dtypes and values."""
    return tensors_fingerprint(model.state_dict())


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors: their names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Factors:
    """The damped curvature of a model's layers and its inverse. Factors.fit and Factors.load make them.

    curvature: "identity", "kfac" or "ekfac". blocks, damping: by layer name; damping is the value that was added to
    every eigenvalue of the layer. model: the fingerprint of the model that the factors were fitted to.
    """

    def __init__(
        self, curvature: str, blocks: Mapping[str, Block], damping: Mapping[str, float], model: str = ""
    ) -> None:
        self.curvature, self.blocks, self.damping, self.model = curvature, dict(blocks), dict(damping), model
        self._inverse = {
            name: inverse_eigenvalues(
                block.eigenvalues + self.damping[name], self.damping[name], max(block.eigenvalues.shape)
            )
            for name, block in self.blocks.items()
        }
        self._scaled: dict[tuple[str, int, torch.dtype, torch.device], tuple[Tensor, float]] = {}

    @property
    def layers(self) -> list[str]:
        """The names of the layers."""
        return list(self.blocks)

    def layers_of(self, student: nn.Module, layers: str | Sequence[str] = "all") -> list[str]:
        """The names of the layers, checked: ValueError unless the factors were fitted to `student` as it is now.

        layers: what the caller of the scoring function requested; a list of names must be the factors' layers.
        """
        if layers not in ("all", "last") and layer_names(student, layers) != self.layers:
            raise ValueError(f"layers and factors differ; the factors are of {', '.join(map(repr, self.layers))}")
        modules = dict(student.named_modules())
        if any(name not in modules for name in self.layers) or fingerprint(student) != self.model:
            raise ValueError("factors were fitted to another student, or to other weights of it; fit them again")
        return self.layers

    @property
    def fingerprint(self) -> str:
        """sha256 of the blocks and their damping."""
        tensors = {
            f"{kind} {name} {self.damping[name]}": tensor
            for name, block in self.blocks.items()
            for kind, tensor in vars(block).items()
            if isinstance(tensor, Tensor)
        }
        return tensors_fingerprint(tensors)

    @classmethod
    def fit(cls, model: nn.Module, data: Data | Iterable[Tensor], **keywords: Any) -> Factors:
        """fit_factors, by its keywords: layers, curvature, terms, labels, damping, damping_scale, seed, batch_size,
        batch, logits, progress."""
        return fit_factors(model, data, **keywords)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file atomically: complete or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, block in self.blocks.items():
            parts = {"eigenvalues": block.eigenvalues, "qg": block.qg, "qa": block.qa}
            tensors |= {f"{kind}:{name}": t.contiguous() for kind, t in parts.items() if t is not None}
        metadata = {
            "format": _FORMAT,
            "facts": json.dumps(
                {"curvature": self.curvature, "layers": self.layers, "damping": self.damping, "model": self.model}
            ),
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> Factors:
        """Reads what save wrote.

        Raises ValueError for a file that is damaged or something else, and, with a model, unless the factors were
        fitted to its layers and weights.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path} holds no influence factors (format {metadata.get('format')!r})")
                facts = json.loads(metadata["facts"])
                keys = set(file.keys())

                def tensor(kind: str, name: str) -> Tensor | None:
                    key = f"{kind}:{name}"
                    # A copy is aligned as every tensor is; results of products depend on the alignment.
                    return file.get_tensor(key).clone() if key in keys else None

                blocks = {}
                for name in facts["layers"]:
                    eigenvalues = tensor("eigenvalues", name)
                    if eigenvalues is None:
                        raise ValueError(f"{path} is damaged: it has no eigenvalues of layer {name!r}")
                    blocks[name] = Block(eigenvalues, tensor("qg", name), tensor("qa", name))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
        if model is not None:
            modules = dict(model.named_modules())
            missing = [name for name in blocks if name not in modules]
            if missing:
                raise ValueError(f"{path} belongs to another model: this one has no layer {missing[0]!r}")
            if fingerprint(model) != facts["model"]:
                raise ValueError(f"{path} belongs to other weights than this model's; fit the factors again")
        return cls(facts["curvature"], blocks, facts["damping"], facts["model"])

    def inverse(self, layer: str) -> Tensor:
        """1 / (eigenvalues + damping) of a layer's block, float64 in the eigenvalues' shape."""
        return self._inverse[layer]

    def solve(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """H^-1 g by layer name, float64. gradient: flattened gradients (P,) in the order of SampleGradients.dense."""
        return {name: block.solve(gradient[name], self._inverse[name]) for name, block in self.blocks.items()}

    def quadratic(self, gradients: Mapping[str, SampleGradients], power: int = 1) -> Tensor:
        """(B,) g_i^T H^-power g_i, summed over the layers. power: 1 (self_influence) or 2 (param_shift squared)."""
        by_layer = []
        for name, block in self.blocks.items():
            parts = []
            for part in gradients[name].parts():
                normal, scale = self._weights(name, power, part)
                parts.append(block.quadratic(part, normal, scale))
            by_layer.append(torch.cat(parts))
        return torch.stack(by_layer).sum(dim=0)

    def _weights(self, name: str, power: int, gradients: SampleGradients) -> tuple[Tensor, float]:
        """(weight, scale): weight * scale is the inverse to a power; weight, in the gradients' dtype, is at most 1 so
        that it cannot overflow."""
        like = next(t for t in vars(gradients).values() if isinstance(t, Tensor) and t.is_floating_point())
        key = (name, power, like.dtype, like.device)
        if key not in self._scaled:
            weight = self._inverse[name].pow(power)
            scale = float(weight.max())
            self._scaled[key] = ((weight / scale if scale > 0 else weight).to(like), scale)
        return self._scaled[key]


def fit_factors(
    model: nn.Module,
    data: Data | Iterable[Tensor],
    *,
    layers: str | Sequence[str] = "all",
    curvature: str = "ekfac",
    terms: Terms = cross_entropy_terms,
    labels: int | str = 1,
    damping: float | None = None,
    damping_scale: float = 0.1,
    seed: int = 0,
    batch_size: int = 256,
    batch: BatchHook | None = None,
    logits: LogitsHook | None = None,
    progress: bool | None = None,
) -> Factors:
    """Fits a model's curvature, block by block.

    model: in eval mode. data: as influence.score takes them, a Dataset of (input, ...) samples or an iterable of
    batches (inputs, ...) or of inputs (B, ...), because targets are not used; also all inputs (N, ...) in one tensor.
    They are read once for "kfac" and twice for "ekfac", and must give the same tensors each time. batch_size, batch,
    logits, progress: as influence.score takes them.
    layers: as layers.layer_names takes them. terms: of the Hessian, from logits (B, C) and the number of their first
    sample. labels: as objective.fisher_gradients takes them, drawn from `seed`. damping: >= 0, added to every
    eigenvalue of every layer; None: damping_scale times each layer's mean eigenvalue. Raises ValueError for an unknown
    curvature, one that is zero up to rounding (see curvature.check_curvature), no samples, and as sample_gradients.
    Warns if a factor has more dimensions than positions.
    """
    options = CurvatureOptions(curvature, damping, damping_scale, labels, BLOCK_CURVATURES)
    read = ReadOptions(batch_size, batch, logits, progress)
    reader = read.reader(data, next(model.parameters()), labelled=False)

    def batches() -> Iterator[HessianBatch]:
        for part in reader("factors"):
            yield HessianBatch(part.start, part.x, lambda z, start=part.start: terms(z, start))  # type: ignore[misc]

    return BlockFit(read.classifier(model), batches, layer_names(model, layers), options, seed=seed).factors()


class BlockFit:
    """Fits the blocks of a model's layers in one or two sweeps over batches.

    batches: this process's; called once per sweep. names: of the layers. Labels are drawn from `seed`, the sweep and
    the batch's first sample, so the factors do not depend on which process reads a batch.
    """

    def __init__(
        self,
        classifier: Classifier,
        batches: Callable[[], Iterable[HessianBatch]],
        names: Sequence[str],
        options: CurvatureOptions,
        *,
        seed: int = 0,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    ) -> None:
        self._classifier, self._batches, self._names = classifier, batches, names
        self._options, self._seed, self._ranks = options, seed, ranks
        self._model = classifier.module
        parameter = next(self._model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        # For check_curvature, the extent of each sweep, from the logit gradients of its draws.
        self._extents = torch.zeros(2, 2, dtype=torch.float64, device=self._device)

    def factors(self) -> Factors:
        """The factors, the same in every process. Raises ValueError for no samples or a curvature of about zero."""
        total, blocks = self._kronecker_blocks()
        curvature = self._options.curvature
        if curvature == "identity":
            blocks = {name: Block(torch.ones_like(block.eigenvalues)) for name, block in blocks.items()}
        if curvature == "ekfac":
            blocks |= self._corrected_blocks(total, blocks)
        self._check_extents()
        damping = self._damping(blocks)
        return Factors(curvature, blocks, damping, fingerprint(self._model))

    def _sweep(self, number: int) -> Iterator[tuple[int, Mapping[str, SampleGradients]]]:
        """(samples of the batch at its first draw, else 0; sample gradients of one draw).

        Every sweep draws its own labels: eigenvalues measured on the draws that the basis was fitted to would be too
        large.
        """
        extent, labels = self._extents[number], self._options.labels
        for batch in self._batches():
            generator = keyed_generator((self._seed, number, batch.start))
            with torch.no_grad():
                logits = self._classifier(batch.x)
            terms = batch.terms(logits)
            extent[1] += torch.stack([weight.double().sum() for weight, _ in terms]).sum()
            for draw, delta in enumerate(fisher_gradients(logits, terms, labels, generator)):
                extent[0] += delta.double().square().sum()
                gradients = sample_gradients(self._classifier, batch.x, lambda _, d=delta: d, self._names)[1]  # type: ignore[misc]
                yield len(batch.x) if draw == 0 else 0, gradients

    def _kronecker_blocks(self) -> tuple[int, dict[str, Block]]:
        """The number of samples, and every layer's K-FAC block, or diagonal; one sweep."""
        ranks = self._ranks
        a, g, diagonal = (self._zeros(kind) for kind in ("a", "g", "diagonal"))
        count = torch.zeros(1, dtype=torch.int64, device=self._device)
        positions = {name: torch.zeros(1, dtype=torch.int64, device=self._device) for name in a}
        for samples, by_layer in self._sweep(0):
            count += samples
            for name, gradients in by_layer.items():
                for part in gradients.parts():
                    if isinstance(part, Outer):
                        if samples:  # inputs do not depend on the draw
                            a[name] += _moment(part.inputs)
                            positions[name] += len(part.inputs) * part.inputs.shape[2]
                        g[name] += _moment(part.deltas) / part.deltas.shape[2]
                    else:
                        diagonal[name] += part.dense().square().sum(dim=0)
        for local in (count, *positions.values(), *a.values(), *g.values(), *diagonal.values()):
            ranks.sum(local)
        total = int(count)
        if total == 0:
            raise ValueError("data must contain samples; got none")
        if self._options.curvature != "identity":
            _warn_of_few_positions({name: int(number) for name, number in positions.items()}, a)
        blocks: dict[str, Block] = {}
        for name in self._names:
            if name in diagonal:
                blocks[name] = Block(diagonal[name] / total)
            else:
                g_values, qg = (ranks.same(part) for part in psd_eigendecomposition(g[name] / total))
                a_values, qa = (ranks.same(part) for part in psd_eigendecomposition(a[name] / total))
                blocks[name] = Block(g_values[:, :, None] * a_values[:, None, :], qg, qa)
        return total, blocks

    def _corrected_blocks(self, total: int, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """The blocks that have a basis, with EK-FAC's eigenvalues; one sweep."""
        eigenvalues = self._zeros("eigenvalues")
        for _, by_layer in self._sweep(1):
            for name in eigenvalues:
                for part in by_layer[name].parts():
                    eigenvalues[name] += blocks[name].rotate(part).square_().sum(dim=0)
        return {
            name: Block(self._ranks.sum(local) / total, blocks[name].qg, blocks[name].qa)
            for name, local in eigenvalues.items()
        }

    def _zeros(self, kind: str) -> dict[str, Tensor]:
        """Float64 zeros by layer: "a" (G, I, I), "g" (G, O, O), "eigenvalues" (G, O, I); "diagonal" (P,) for the
        others.

        Layers that have no such sum are left out.
        """
        zeros = {}
        for name in self._names:
            module = self._model.get_submodule(name)
            weight = next(module.parameters(recurse=False))
            if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                if kind == "diagonal":
                    size = sum(p.numel() for p in module.parameters(recurse=False))
                    zeros[name] = torch.zeros(size, dtype=torch.float64, device=weight.device)
                continue
            groups = getattr(module, "groups", 1)
            outputs, inputs = len(weight) // groups, weight[0].numel() + (module.bias is not None)
            shapes = {"a": (inputs, inputs), "g": (outputs, outputs), "eigenvalues": (outputs, inputs)}
            if kind in shapes:
                zeros[name] = torch.zeros(groups, *shapes[kind], dtype=torch.float64, device=weight.device)
        return zeros

    def _check_extents(self) -> None:
        """ValueError if the curvature that a sweep fitted is zero up to rounding; see check_curvature."""
        options, names = self._options, self._names
        self._ranks.sum(self._extents)
        advice = "" if options.labels == "all" else ", or labels='all', because draws may miss rare labels"
        where = f"layer {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for extent in self._extents[: {"identity": 0, "kfac": 1, "ekfac": 2}[options.curvature]]:
            check_curvature(options.curvature, where, extent, damping=options.damping, dtype=self._dtype, advice=advice)

    def _damping(self, blocks: Mapping[str, Block]) -> dict[str, float]:
        """The absolute damping of each layer. ValueError for a layer whose curvature and damping are both zero."""
        options = self._options
        for name, block in blocks.items():
            # Squares below the smallest normal number are inexact or 0.
            if not options.damping and float(block.eigenvalues.max()) < torch.finfo(self._dtype).tiny:
                raise ValueError(
                    f"layer {name!r}: the curvature is zero, as all of its gradients are, so it has no inverse to"
                    " score with: leave the layer out, or pass a damping > 0"
                )
        if options.curvature == "identity":
            return dict.fromkeys(blocks, options.damping or 0.0)
        return {name: options.absolute_damping(block.mean()) for name, block in blocks.items()}


def _warn_of_few_positions(positions: Mapping[str, int], a: Mapping[str, Tensor]) -> None:
    """Warns of factors with fewer positions than dimensions: they are singular."""
    few = [f"{name!r} ({seen} for {a[name].shape[-1]})" for name, seen in positions.items() if seen < a[name].shape[-1]]
    if few:
        warnings.warn(
            "too few samples for a factor of full rank: the number of positions is below the dimension of the inputs"
            f" in layer {', '.join(few)}. In the other directions H is its damping alone; pass more data",
            stacklevel=5,
        )


def _moment(rows: Tensor) -> Tensor:
    """(G, W, W): sum over samples and positions of the outer products of rows (B, G, T, W)."""
    if rows.shape[2] >= rows.shape[3]:  # one product per sample, without a copy
        return (rows.transpose(2, 3) @ rows).sum(dim=0)
    flat = rows.transpose(0, 1).flatten(1, 2)
    return flat.transpose(1, 2) @ flat
