"""Curvature of a whole model, a block per layer: fitted in two passes over data, inverted in its eigenbasis.

For a layer whose sample gradients are G_i = sum_t d_it (outer) a_it, d from labels that the model itself would give:

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
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lrds_fast._numbers import integer
from lrds_fast.files import replacing
from lrds_fast.influence.adapters import BatchHook, Classifier, LogitsHook
from lrds_fast.influence.batches import Batches, Data
from lrds_fast.influence.curvature import check_curvature, psd_eigh, pseudo_inverse
from lrds_fast.influence.layers import Outer, SampleGradients, layer_names, parameters_of, sample_gradients
from lrds_fast.ranks import Ranks

CURVATURES = ("identity", "kfac", "ekfac")
"""What a whole model's blocks can be; "exact" is for a last layer (curvature.py)."""

Terms = Callable[[Tensor, int], Sequence[tuple[Tensor, float]]]
"""From logits (B, C) and the place of their first sample in the data to the objective's terms: weights (B,) >= 0 of
J(softmax(z / T)), and T."""


def cross_entropy_terms(logits: Tensor, start: int) -> list[tuple[Tensor, float]]:
    """The label's cross-entropy alone, weight 1."""
    return [(logits.new_ones(len(logits)), 1.0)]


def fisher_gradients(
    logits: Tensor, terms: Sequence[tuple[Tensor, float]], labels: int | str, generator: torch.Generator
) -> Iterator[Tensor]:
    """Logit gradients (B, C) whose outer products add up to sum_t w_t J(softmax(z / T_t)), on average over draws.

    labels: "all" takes every class with its probability, C backward passes a term and exact; a number takes as many
    draws from the model's own distribution.
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


@dataclass(frozen=True)
class Block:
    """A layer: eigenvalues (G, O, I) in the basis qg (G, O, O), qa (G, I, I), or (P,) on the parameters themselves."""

    eigenvalues: Tensor
    qg: Tensor | None = None
    qa: Tensor | None = None
    _bases: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def mean(self) -> float:
        return float(self.eigenvalues.mean())

    def _basis(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """qg and qa in a dtype and on a device; made once."""
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
        # Each side where it is cheaper: its positions before they are summed, or the sum's rows or columns.
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
    """x (B, G, R, W) in the bases q (G, W, W); one product where there is one group and x's rows lie together."""
    if len(q) == 1 and x.is_contiguous():
        return (x.flatten(0, 2) @ q[0]).view_as(x)
    return x @ q


def _rotated(rows: Tensor, q: Tensor) -> Tensor:
    """Rows (B, G, W) in the bases q (G, W, W): (G, B, W)."""
    return torch.bmm(rows.transpose(0, 1), q)


_FORMAT = "lrds-fast influence factors 1"


def fingerprint(model: nn.Module, layers: Sequence[str]) -> str:
    """sha256 of the layers' parameters: their names, shapes, dtypes and values."""
    return tensors_fingerprint(parameters_of(model, layers))


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors: their names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Factors:
    """The damped curvature of a model's layers and its inverse: Factors.fit, save, load.

    curvature: "identity", "kfac" or "ekfac". blocks: by layer name. damping: by layer name, what was added to every
    eigenvalue. model: the fingerprint of the layers that the factors were fitted to.
    """

    def __init__(
        self, curvature: str, blocks: Mapping[str, Block], damping: Mapping[str, float], model: str = ""
    ) -> None:
        self.curvature, self.blocks, self.damping, self.model = curvature, dict(blocks), dict(damping), model
        self._inverse = {
            name: pseudo_inverse(
                block.eigenvalues + self.damping[name], self.damping[name], max(block.eigenvalues.shape)
            )
            for name, block in self.blocks.items()
        }
        self._scaled: dict[tuple[str, int, torch.dtype, torch.device], tuple[Tensor, float]] = {}

    @property
    def layers(self) -> list[str]:
        return list(self.blocks)

    @property
    def fingerprint(self) -> str:
        """sha256 of the blocks and what was added to them."""
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
        """Writes a safetensors file, whole or not at all."""
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
        """Reads what save wrote. With a model: ValueError unless its layers are those that the factors are of."""
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path} holds no influence factors (format {metadata.get('format')!r})")
                facts = json.loads(metadata["facts"])
                keys = set(file.keys())

                def tensor(kind: str, name: str) -> Tensor | None:
                    key = f"{kind}:{name}"
                    # A copy, at an address as aligned as any other tensor's: products round by alignment.
                    return file.get_tensor(key).clone() if key in keys else None

                blocks = {}
                for name in facts["layers"]:
                    eigenvalues = tensor("eigenvalues", name)
                    if eigenvalues is None:
                        raise ValueError(f"{path} is damaged: it has no eigenvalues of layer {name!r}")
                    blocks[name] = Block(eigenvalues, tensor("qg", name), tensor("qa", name))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
        if model is not None:
            modules = dict(model.named_modules())
            missing = [name for name in blocks if name not in modules]
            if missing:
                raise ValueError(f"{path} belongs to another model: this one has no layer {missing[0]!r}")
            if fingerprint(model, list(blocks)) != facts["model"]:
                raise ValueError(f"{path} belongs to other weights than this model's; fit the factors again")
        return cls(facts["curvature"], blocks, facts["damping"], facts["model"])

    def inverse(self, layer: str) -> Tensor:
        """1 / (eigenvalues + damping) of a layer's block, float64 in the eigenvalues' shape."""
        return self._inverse[layer]

    def solve(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """H^-1 g, layer by layer: flattened gradients (P,) in a SampleGradients' order in, float64 out."""
        return {name: block.solve(gradient[name], self._inverse[name]) for name, block in self.blocks.items()}

    def quadratic(self, gradients: Mapping[str, SampleGradients], power: int = 1) -> Tensor:
        """(B,) g_i^T H^-power g_i, added over the layers. power: 1 (self_influence) or 2 (param_shift squared)."""
        found = []
        for name, block in self.blocks.items():
            parts = []
            for part in gradients[name].parts():
                normal, scale = self._weights(name, power, part)
                parts.append(block.quadratic(part, normal, scale))
            found.append(torch.cat(parts))
        return torch.stack(found).sum(dim=0)

    def _weights(self, name: str, power: int, gradients: SampleGradients) -> tuple[Tensor, float]:
        """A block's inverse to a power in the gradients' dtype, scaled to at most 1: its own values may not fit."""
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

    model: in eval mode. data: as influence.score takes it, a Dataset of (input, ...) samples or an iterable of batches
    (inputs, ...) or of inputs (B, ...), because targets are not used; also all inputs (N, ...) in one tensor. It is
    read once for "kfac" and twice for "ekfac", and must give the same tensors each time. batch_size, batch, logits,
    progress: as influence.score takes them.
    layers: as layers.layer_names takes them. terms: the objective's. labels: as fisher_gradients takes them, drawn from
    `seed`. damping: >= 0, added to every eigenvalue of every layer; None: damping_scale times each layer's mean
    eigenvalue. Raises ValueError for an unknown curvature, one that is zero up to rounding (see
    curvature.check_curvature), no samples, and as sample_gradients. Warns if a factor has more dimensions than
    positions.
    """
    parameter = next(model.parameters())
    batches = Batches(data, parameter, batch_size, progress, batch=batch, labelled=False)

    def placed() -> Iterator[tuple[int, Tensor]]:
        for part in batches("factors"):
            yield part.start, part.x

    return fit_placed(
        Classifier(model, logits=logits),
        placed,
        layers=layers,
        curvature=curvature,
        terms=terms,
        labels=labels,
        damping=damping,
        damping_scale=damping_scale,
        seed=seed,
    )


def fit_placed(
    classifier: Classifier,
    batches: Callable[[], Iterable[tuple[int, Tensor]]],
    *,
    layers: str | Sequence[str],
    curvature: str,
    terms: Terms,
    labels: int | str,
    damping: float | None,
    damping_scale: float,
    seed: int = 0,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> Factors:
    """fit_factors over batches that say where their first sample is in the data: this process's, of those of all.

    The labels that a batch draws depend on its place alone, so that the factors do not depend on who reads what.
    """
    if curvature not in CURVATURES:
        raise ValueError(f"curvature must be one of {', '.join(CURVATURES)}; got {curvature!r}")
    what = "'all' or a number of draws >= 1"
    if labels != "all" and (isinstance(labels, str) or (labels := integer("labels", labels, what)) < 1):
        raise ValueError(f"labels must be {what}; got {labels!r}")
    model = classifier.module
    names = layer_names(model, layers)

    def sweep(number: int) -> Iterator[tuple[int, Mapping[str, SampleGradients]]]:
        """(samples of the batch where a new one begins, else 0; sample gradients of one draw).

        Every sweep draws labels of its own: eigenvalues measured on the draws that the basis was fitted to would be
        too large in it.
        """
        extent = extents[number]
        for start, x in batches():
            generator = torch.Generator().manual_seed(combined_seed(seed, number, start))
            with torch.no_grad():
                logits = classifier(x)
            weighted = terms(logits, start)
            extent[1] += torch.stack([weight.double().sum() for weight, _ in weighted]).sum()
            for draw, delta in enumerate(fisher_gradients(logits, weighted, labels, generator)):
                extent[0] += delta.double().square().sum()
                yield len(x) if draw == 0 else 0, sample_gradients(classifier, x, lambda _, d=delta: d, names)[1]  # type: ignore[misc]

    sums = {kind: _zeros(model, names, kind) for kind in ("a", "g", "diagonal", "corrected")}
    device = next(model.parameters()).device
    count = torch.zeros(1, dtype=torch.int64, device=device)
    # The extent of each sweep, from the logit gradients of its draws, for check_curvature.
    extents = torch.zeros(2, 2, dtype=torch.float64, device=device)
    positions = {name: torch.zeros(1, dtype=torch.int64, device=device) for name in sums["a"]}
    for samples, found in sweep(0):
        count += samples
        for name, gradients in found.items():
            for part in gradients.parts():
                if isinstance(part, Outer):
                    if samples:  # inputs do not depend on the draw
                        sums["a"][name] += _moment(part.inputs)
                        positions[name] += len(part.inputs) * part.inputs.shape[2]
                    sums["g"][name] += _moment(part.deltas) / part.deltas.shape[2]
                else:
                    sums["diagonal"][name] += part.dense().square().sum(dim=0)
    for total_of in (count, *positions.values(), *(t for kind in ("a", "g", "diagonal") for t in sums[kind].values())):
        ranks.sum(total_of)
    total = int(count)
    if total == 0:
        raise ValueError("data must contain samples; got none")
    if curvature != "identity":
        _report_few(model, {name: int(seen) for name, seen in positions.items()}, sums["a"])
    blocks: dict[str, Block] = {}
    for name in names:
        if name in sums["diagonal"]:
            blocks[name] = Block(sums["diagonal"][name] / total)
        else:
            g_values, qg = (ranks.same(part) for part in psd_eigh(sums["g"][name] / total))
            a_values, qa = (ranks.same(part) for part in psd_eigh(sums["a"][name] / total))
            blocks[name] = Block(g_values[:, :, None] * a_values[:, None, :], qg, qa)
    if curvature == "identity":
        blocks = {name: Block(torch.ones_like(block.eigenvalues)) for name, block in blocks.items()}
    if curvature == "ekfac":
        for _, found in sweep(1):
            for name in sums["corrected"]:
                for part in found[name].parts():
                    sums["corrected"][name] += blocks[name].rotate(part).square_().sum(dim=0)
        for name, corrected in sums["corrected"].items():
            blocks[name] = Block(ranks.sum(corrected) / total, blocks[name].qg, blocks[name].qa)
    ranks.sum(extents)
    dtype = next(model.parameters()).dtype
    for extent in extents[: {"identity": 0, "kfac": 1, "ekfac": 2}[curvature]]:
        advice = "" if labels == "all" else ", or labels='all', because draws may miss rare labels"
        where = f"layer {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        check_curvature(curvature, where, extent, damping=damping, dtype=dtype, advice=advice)
    if curvature == "identity":
        by_layer = dict.fromkeys(names, damping or 0.0)
    elif damping is None:
        by_layer = {name: damping_scale * block.mean() for name, block in blocks.items()}
    else:
        by_layer = dict.fromkeys(names, float(damping))
    for name, block in blocks.items():
        # Squares below the smallest normal number are inexact or 0.
        if not damping and float(block.eigenvalues.max()) < torch.finfo(dtype).tiny:
            raise ValueError(
                f"layer {name!r}: the curvature is zero (every gradient of it is), so nothing can be scored by its"
                " inverse: leave the layer out, or pass a damping > 0"
            )
    return Factors(curvature, blocks, by_layer, fingerprint(model, names))


def combined_seed(*numbers: int) -> int:
    """A seed of its own for every tuple of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "little")


def _zeros(model: nn.Module, names: Sequence[str], kind: str) -> dict[str, Tensor]:
    """Sums to add up in, by layer: "a" (G, I, I), "g" (G, O, O), "corrected" (G, O, I); "diagonal" (P,)."""
    found = {}
    for name in names:
        module = model.get_submodule(name)
        weight = next(module.parameters(recurse=False))
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if kind == "diagonal":
                size = sum(p.numel() for p in module.parameters(recurse=False))
                found[name] = torch.zeros(size, dtype=torch.float64, device=weight.device)
            continue
        groups = getattr(module, "groups", 1)
        outputs, inputs = len(weight) // groups, weight[0].numel() + (module.bias is not None)
        shapes = {"a": (inputs, inputs), "g": (outputs, outputs), "corrected": (outputs, inputs)}
        if kind in shapes:
            found[name] = torch.zeros(groups, *shapes[kind], dtype=torch.float64, device=weight.device)
    return found


def _report_few(model: nn.Module, positions: Mapping[str, int], a: Mapping[str, Tensor]) -> None:
    """A warning for factors of fewer positions than dimensions: singular, and their eigenvectors mostly arbitrary."""
    few = [f"{name!r} ({seen} for {a[name].shape[-1]})" for name, seen in positions.items() if seen < a[name].shape[-1]]
    if few:
        warnings.warn(
            f"too few samples for a factor of full rank: positions seen for the inputs of layer {', '.join(few)}."
            " Directions that no sample has are left to the damping; pass more data",
            stacklevel=4,
        )


def _moment(rows: Tensor) -> Tensor:
    """(G, W, W): sum over samples and positions of the outer products of rows (B, G, T, W)."""
    if rows.shape[2] >= rows.shape[3]:  # sample by sample, as the rows lie
        return (rows.transpose(2, 3) @ rows).sum(dim=0)
    flat = rows.transpose(0, 1).flatten(1, 2)
    return flat.transpose(1, 2) @ flat
