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

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lrds_fast.influence.curvature import _eigh, _pseudo_inverse
from lrds_fast.influence.layers import Outer, SampleGradients, layer_names, parameters_of, sample_gradients

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

    def mean(self) -> float:
        return float(self.eigenvalues.mean())

    def rotate(self, gradients: SampleGradients) -> Tensor:
        """(B, *eigenvalues.shape): sample gradients in the block's basis, in their own dtype."""
        if self.qg is None or self.qa is None or not isinstance(gradients, Outer):
            return gradients.dense().reshape(-1, *self.eigenvalues.shape)
        a, d = gradients.inputs, gradients.deltas
        qg, qa = self.qg.to(d), self.qa.to(a)
        positions, inputs, outputs = a.shape[2], a.shape[3], d.shape[3]
        if positions * (inputs**2 + outputs**2) <= inputs * outputs * (inputs + outputs):
            return (d @ qg).transpose(2, 3) @ (a @ qa)
        # Many positions: their sum first, then two small rotations of it.
        tile = d.transpose(2, 3) @ a
        return qg.transpose(1, 2) @ tile @ qa

    def quadratic(self, gradients: SampleGradients, weight: Tensor) -> Tensor:
        """(B,) sum over the block of weight * rotated^2, float64."""
        # In the gradients' dtype, where the inverse of a small eigenvalue may not fit: scaled to at most 1.
        scale = float(weight.max())
        if self.qg is not None and self.qa is not None and isinstance(gradients, Outer):
            a, d = gradients.inputs, gradients.deltas
            if a.shape[2] == 1:  # one position: two products and a row-dot, no O x I tile
                v, u = (a @ self.qa.to(a)).square_(), (d @ self.qg.to(d)).square_()
                normal = (weight / scale if scale > 0 else weight).to(u)
                return ((u @ normal) * v).sum(dim=(1, 2, 3)).double() * scale
        rotated = self.rotate(gradients).square()
        normal = (weight / scale if scale > 0 else weight).to(rotated)
        return (rotated.flatten(1) @ normal.flatten()).double() * scale

    def solve(self, gradient: Tensor, inverse: Tensor) -> Tensor:
        """H^-1 of one flattened gradient (P,)."""
        tile = gradient.to(self.eigenvalues).reshape(self.eigenvalues.shape)
        if self.qg is None or self.qa is None:
            return (tile * inverse).flatten()
        rotated = self.qg.transpose(1, 2) @ tile @ self.qa
        return (self.qg @ (rotated * inverse) @ self.qa.transpose(1, 2)).flatten()


_FORMAT = "lrds-fast influence factors 1"


def fingerprint(model: nn.Module, layers: Sequence[str]) -> str:
    """sha256 of the layers' parameters: their names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, parameter in parameters_of(model, layers).items():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
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
            name: _pseudo_inverse(
                block.eigenvalues + self.damping[name], self.damping[name], max(block.eigenvalues.shape)
            )
            for name, block in self.blocks.items()
        }

    @property
    def layers(self) -> list[str]:
        return list(self.blocks)

    @classmethod
    def fit(cls, model: nn.Module, batches: Iterable[Tensor], **keywords: Any) -> Factors:
        """fit_factors, by its keywords."""
        return fit_factors(model, batches, **keywords)

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
        temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
        try:
            save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise

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
                    return file.get_tensor(key) if key in keys else None

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

    def solve(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """H^-1 g, layer by layer: flattened gradients (P,) in a SampleGradients' order in, float64 out."""
        return {name: block.solve(gradient[name], self._inverse[name]) for name, block in self.blocks.items()}

    def quadratic(self, gradients: Mapping[str, SampleGradients], power: int = 1) -> Tensor:
        """(B,) g_i^T H^-power g_i, added over the layers. power: 1 (self_influence) or 2 (param_shift squared)."""
        parts = [
            block.quadratic(gradients[name], self._inverse[name].pow(power)) for name, block in self.blocks.items()
        ]
        return torch.stack(parts).sum(dim=0)


def fit_factors(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    layers: str | Sequence[str] = "all",
    curvature: str = "ekfac",
    terms: Terms = cross_entropy_terms,
    labels: int | str = 1,
    damping: float | None = None,
    damping_scale: float = 0.1,
    seed: int = 0,
) -> Factors:
    """Fits a model's curvature, block by block.

    model: in eval mode. batches: inputs (B, ...), iterated once for "kfac" and twice for "ekfac". layers: as
    layers.layer_names takes them. terms: the objective's. labels: as fisher_gradients takes them, drawn from `seed`.
    damping: >= 0, added to every eigenvalue of every layer; None: damping_scale times each layer's mean eigenvalue.
    Raises ValueError for an unknown curvature, no samples, or what sample_gradients refuses.
    """
    if curvature not in CURVATURES:
        raise ValueError(f"curvature must be one of {', '.join(CURVATURES)}; got {curvature!r}")
    if labels != "all" and not (isinstance(labels, int) and labels >= 1):
        raise ValueError(f"labels must be 'all' or a number of draws >= 1; got {labels!r}")
    names = layer_names(model, layers)

    # The second pass draws labels of its own: eigenvalues measured on the draws that the basis was fitted to would be
    # too large in it.
    generator = torch.Generator().manual_seed(seed)

    def passes() -> Iterator[tuple[int, Mapping[str, SampleGradients]]]:
        """(samples of the batch where a new one begins, else 0; sample gradients of one draw)."""
        start = 0
        for x in batches:
            with torch.no_grad():
                logits = model(x)
            drawn = fisher_gradients(logits, terms(logits, start), labels, generator)
            start += len(x)
            for draw, delta in enumerate(drawn):
                yield len(x) if draw == 0 else 0, sample_gradients(model, x, lambda _, d=delta: d, names)[1]  # type: ignore[misc]

    a: dict[str, Tensor] = {}
    g: dict[str, Tensor] = {}
    diagonal: dict[str, Tensor] = {}
    count = 0
    for samples, found in passes():
        count += samples
        for name, gradients in found.items():
            if isinstance(gradients, Outer):
                if samples:  # inputs do not depend on the draw
                    _add(a, name, _moment(gradients.inputs))
                _add(g, name, _moment(gradients.deltas) / gradients.deltas.shape[2])
            else:
                _add(diagonal, name, gradients.dense().square().sum(dim=0))
    if count == 0:
        raise ValueError("batches held no samples")
    blocks: dict[str, Block] = {}
    for name in names:
        if name in diagonal:
            blocks[name] = Block(diagonal[name] / count)
        else:
            (g_values, qg), (a_values, qa) = _eigh(g[name] / count), _eigh(a[name] / count)
            blocks[name] = Block(g_values[:, :, None] * a_values[:, None, :], qg, qa)
    if curvature == "identity":
        blocks = {name: Block(torch.ones_like(block.eigenvalues)) for name, block in blocks.items()}
    if curvature == "ekfac":
        corrected: dict[str, Tensor] = {}
        for _, found in passes():
            for name, block in blocks.items():
                if block.qg is not None:
                    _add(corrected, name, block.rotate(found[name]).square().sum(dim=0))
        blocks |= {name: Block(sums / count, blocks[name].qg, blocks[name].qa) for name, sums in corrected.items()}
    if curvature == "identity":
        by_layer = dict.fromkeys(names, damping or 0.0)
    elif damping is None:
        by_layer = {name: damping_scale * block.mean() for name, block in blocks.items()}
    else:
        by_layer = dict.fromkeys(names, float(damping))
    return Factors(curvature, blocks, by_layer, fingerprint(model, names))


def _moment(rows: Tensor) -> Tensor:
    """(G, W, W): sum over samples and positions of the outer products of rows (B, G, T, W)."""
    if rows.shape[2] >= rows.shape[3]:  # sample by sample, as the rows lie
        return (rows.transpose(2, 3) @ rows).sum(dim=0)
    flat = rows.transpose(0, 1).flatten(1, 2)
    return flat.transpose(1, 2) @ flat


def _add(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    sums[name] = sums[name] + part.double() if name in sums else part.double()
