"""The Hessian of a linear layer under a softmax loss, its approximations, and products of gradients with its inverse.

Setting: z = W h~ with h~ = [h; 1], W (C, D). Sample i's gradient is delta_i (outer) h~_i, kept as these two vectors.
The Hessian equals its Gauss-Newton form because the losses are linear in their targets:

    H = 1/N sum_i sum_t w_ti J(softmax(z_i / T_t)) (x) h~_i h~_i^T + damping I,     J(q) = diag(q) - q q^T

objective.py defines the terms t and their weights w.

Factors are accumulated and inverted in float64, whatever the rows' dtype: float32 has too few digits for eigenvectors
of almost equal eigenvalues, the variances p.q^2 - (p.q)^2 of confident rows and the smallest eigenvalues. Rows are then
scored in their own dtype. Everything runs over chunks of rows; the largest temporary is one chunk.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrds_fast.influence.eigen import inverse_eigenvalues, psd_eigendecomposition
from lrds_fast.influence.objective import HessianTerm
from lrds_fast.influence.options import CurvatureOptions
from lrds_fast.influence.solve import conjugate_gradients
from lrds_fast.ranks import Ranks

#: Parameters up to which "exact" factorises the dense Hessian (200 MB, one Cholesky); beyond, it solves by CG.
DENSE_LIMIT = 5000
#: The most bytes of temporaries for a chunk of rows.
CHUNK_BYTES = 64 << 20
#: CG stops at this relative residual; more iterations are an error.
CG_TOLERANCE = 1e-12
CG_ITERATIONS = 2000


class StackedRows:
    """Matrices of one width, stacked as one matrix (N, W) that is read by slices, for example from several files.

    pieces: (n_k, W) each, anything with a length whose slices are tensors. like: an empty (0, W) tensor of the dtype
    and device of the slices.
    """

    def __init__(self, pieces: Sequence[Any], like: Tensor) -> None:
        self._pieces, self._like = list(pieces), like
        self._starts = [0]
        for piece in self._pieces:
            self._starts.append(self._starts[-1] + len(piece))
        self.shape = (self._starts[-1], like.shape[1])
        self.device = like.device

    def __getitem__(self, rows: slice) -> Tensor:
        slices = [
            piece[max(rows.start - first, 0) : rows.stop - first]
            for piece, first in zip(self._pieces, self._starts, strict=False)
            if first < rows.stop and rows.start < first + len(piece)
        ]
        if len(slices) == 1:
            only: Tensor = slices[0].to(self.device)
            return only
        return torch.cat(slices).to(self.device) if slices else self._like


@dataclass(frozen=True)
class LayerRows:
    """The rows that a curvature is fitted to: the layer's inputs (features, (N, d), finite) and outputs (logits, (N,
    C)).

    bias: append a 1 to the features. ranks: the processes that share the rows: N counts this process's, sums are over
    all processes'.
    """

    features: Tensor | StackedRows
    logits: Tensor | StackedRows
    bias: bool
    ranks: Ranks = Ranks()

    @property
    def count(self) -> int:
        """The number of rows of this process."""
        return self.features.shape[0]

    @functools.cached_property
    def total(self) -> int:
        """The number of rows of all processes."""
        return int(self.ranks.sum(torch.tensor([self.count], device=self.features.device)))

    @property
    def classes(self) -> int:
        """C."""
        return self.logits.shape[1]

    @property
    def inputs(self) -> int:
        """D: the width of h~."""
        return self.features.shape[1] + int(self.bias)

    def chunks(self, bytes_per_row: int | None = None) -> Iterator[slice]:
        """Slices that cover the rows in order, each within CHUNK_BYTES of temporaries."""
        if bytes_per_row is None:
            bytes_per_row = 8 * (6 * self.classes + 4 * self.inputs)
        yield from self.slices(max(1, CHUNK_BYTES // bytes_per_row))

    def slices(self, step: int) -> Iterator[slice]:
        """Slices of `step` rows, the last one shorter, that cover the rows in order."""
        for start in range(0, self.count, step):
            yield slice(start, min(start + step, self.count))

    def augmented(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """h~ of some rows, (B, D)."""
        h = self.features[rows].to(dtype)
        return torch.cat([h, h.new_ones(h.shape[0], 1)], dim=1) if self.bias else h

    def probabilities(self, rows: slice, terms: Sequence[HessianTerm]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each term, its weights (B, 1) and softmax(z / T) (B, C) of some rows, float64."""
        z = self.logits[rows].double()
        for term in terms:
            yield term.weight[rows, None], torch.softmax(z / term.temperature, dim=1)


class Curvature(ABC):
    """H^-1 for gradients of one layer. damping: the absolute value that was added to every eigenvalue."""

    damping: float

    @abstractmethod
    def solve(self, gradient: Tensor) -> Tensor:
        """unvec(H^-1 vec(gradient)); (C, D) float64 in and out."""

    @abstractmethod
    def prepare(self, h: Tensor, power: int) -> Tensor:
        """What `quadratic` needs from the rows' inputs h (B, D); computed once for any number of gradients."""

    @abstractmethod
    def quadratic(self, delta: Tensor, prepared: Tensor, power: int) -> Tensor:
        """g^T H^-power g for g = delta (outer) h, row by row: (B,). power is 1 or 2."""

    @abstractmethod
    def leverage(self, h: Tensor) -> Tensor:
        """(B, C, C) (I (x) h)^T H^-1 (I (x) h) for each row h of (B, D): the change of its logits per unit of logit
        gradient."""


class Identity(Curvature):
    """H = (1 + damping) I."""

    def __init__(self, damping: float | None, classes: int = 0) -> None:
        self.damping = 0.0 if damping is None else damping
        self._scale = 1.0 / (1.0 + self.damping)
        self._classes = classes

    def solve(self, gradient: Tensor) -> Tensor:
        return gradient * self._scale

    def prepare(self, h: Tensor, power: int) -> Tensor:
        return h.square().sum(dim=1) * self._scale**power

    def quadratic(self, delta: Tensor, prepared: Tensor, power: int) -> Tensor:
        return delta.square().sum(dim=1) * prepared

    def leverage(self, h: Tensor) -> Tensor:
        return self.prepare(h, 1)[:, None, None] * torch.eye(self._classes, dtype=h.dtype, device=h.device)


class Eigenbasis(Curvature):
    """H = (Qg (x) Qa) diag(eigenvalues + damping) (Qg (x) Qa)^T: K-FAC and EK-FAC.

    eigenvalues (C, D), Qg (C, C), Qa (D, D), float64. Where eigenvalue + damping is 0 the inverse is the
    pseudo-inverse: 0.
    """

    def __init__(self, eigenvalues: Tensor, qg: Tensor, qa: Tensor, damping: float, dtype: torch.dtype) -> None:
        self.damping = damping
        self._qg, self._qa = qg, qa
        self._inverse = inverse_eigenvalues(eigenvalues + damping, damping, max(eigenvalues.shape))
        # In float32 the square of an inverse would overflow long before the score does.
        self._scale = float(self._inverse.max())
        self._rows_qg, self._rows_qa = qg.to(dtype), qa.to(dtype)
        normalised = self._inverse / self._scale if self._scale > 0 else self._inverse
        self._weights = {power: normalised.pow(power).T.contiguous().to(dtype) for power in (1, 2)}

    def solve(self, gradient: Tensor) -> Tensor:
        rotated = self._qg.T @ gradient @ self._qa
        return self._qg @ (rotated * self._inverse) @ self._qa.T

    def prepare(self, h: Tensor, power: int) -> Tensor:
        return (h @ self._rows_qa).square_() @ self._weights[power]

    def quadratic(self, delta: Tensor, prepared: Tensor, power: int) -> Tensor:
        result: Tensor = torch.linalg.vecdot((delta @ self._rows_qg).square_(), prepared)
        return result * self._scale**power

    def leverage(self, h: Tensor) -> Tensor:
        diagonal = self.prepare(h, 1) * self._scale
        return (self._rows_qg * diagonal[:, None, :]) @ self._rows_qg.T


class Dense(Curvature):
    """The dense Hessian, factorised: H^-1 = R R^T. For layers of at most DENSE_LIMIT parameters."""

    def __init__(self, hessian: Tensor, damping: float, dtype: torch.dtype) -> None:
        self.damping = damping
        size = hessian.shape[0]
        damped = hessian + damping * torch.eye(size, dtype=hessian.dtype, device=hessian.device)
        root: Tensor | None = None
        if damping > 0:
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed.item():
                eye = torch.eye(size, dtype=hessian.dtype, device=hessian.device)
                root = torch.linalg.solve_triangular(factor, eye, upper=False).T
        if root is None:
            eigenvalues, vectors = torch.linalg.eigh(damped)
            root = vectors * inverse_eigenvalues(eigenvalues, 0.0, size).sqrt()
        self._root = root
        self._dtype = dtype

    def solve(self, gradient: Tensor) -> Tensor:
        return (self._root @ (self._root.T @ gradient.reshape(-1))).reshape(gradient.shape)

    def prepare(self, h: Tensor, power: int) -> Tensor:
        return h

    def quadratic(self, delta: Tensor, prepared: Tensor, power: int) -> Tensor:
        rows, step = delta.shape[0], max(1, CHUNK_BYTES // (16 * self._root.shape[0]))
        result = delta.new_empty(rows)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            # A dense Hessian needs explicit gradients; their number at a time is bounded.
            gradients = delta[part, :, None].double() * prepared[part, None, :].double()
            half = gradients.flatten(1) @ self._root
            if power == 2:
                half = half @ self._root.T
            result[part] = half.square().sum(dim=1).to(delta.dtype)
        return result

    def leverage(self, h: Tensor) -> Tensor:
        size = self._root.shape[0]
        roots = self._root.reshape(-1, h.shape[1], size)
        step = max(1, CHUNK_BYTES // (8 * roots.shape[0] * size))
        result = h.new_empty(h.shape[0], roots.shape[0], roots.shape[0])
        for start in range(0, h.shape[0], step):
            part = slice(start, start + step)
            half = torch.einsum("bd,cdp->bcp", h[part].double(), roots)
            result[part] = (half @ half.mT).to(h.dtype)
        return result


class Iterative(Curvature):
    """The Hessian, never formed: conjugate gradients on Hessian-vector products, preconditioned by EK-FAC.

    It solves for one right-hand side at a time, which is enough for kd_gain of layers of any size.
    """

    def __init__(
        self, rows: LayerRows, terms: Sequence[HessianTerm], damping: float, preconditioner: Curvature
    ) -> None:
        self.damping = damping
        self._rows, self._terms, self._preconditioner = rows, terms, preconditioner

    def product(self, matrix: Tensor) -> Tensor:
        """unvec(H vec(matrix)), (C, D)."""
        rows, total = self._rows, torch.zeros_like(matrix)
        for part in rows.chunks():
            h = rows.augmented(part, torch.float64)
            y = h @ matrix.T
            jy = torch.zeros_like(y)
            for weight, p in rows.probabilities(part, self._terms):
                jy += weight * p * (y - torch.linalg.vecdot(p, y)[:, None])
            total.addmm_(jy.T, h)
        return rows.ranks.sum(total) / rows.total + self.damping * matrix

    def solve(self, gradient: Tensor) -> Tensor:
        return conjugate_gradients(
            lambda matrices: [self.product(matrix) for matrix in matrices],
            self._preconditioner.solve,
            [gradient],
            tolerance=CG_TOLERANCE,
            iterations=CG_ITERATIONS,
            ranks=self._rows.ranks,
            damping=f"{self.damping:.3g}",
        )[0]

    def _no_quadratic(self) -> ValueError:
        return ValueError(
            f"curvature 'exact' gives self_influence, param_shift and kd_gain_ns for layers of at most {DENSE_LIMIT}"
            f" parameters; this one has {self._rows.classes * self._rows.inputs}: use curvature='ekfac' for them"
        )

    def prepare(self, h: Tensor, power: int) -> Tensor:
        raise self._no_quadratic()

    def quadratic(self, delta: Tensor, prepared: Tensor, power: int) -> Tensor:
        raise self._no_quadratic()

    def leverage(self, h: Tensor) -> Tensor:
        raise self._no_quadratic()


def check_curvature(
    curvature: str, where: str, extent: Tensor, *, damping: float | None, dtype: torch.dtype, advice: str = ""
) -> None:
    """ValueError if a fitted curvature H is zero up to rounding and there is no absolute damping.

    extent: (2,), sums over the rows of w (1 - |p|^2) |h|^2, the row's share of trace(H), and of its bound w |h|^2.
    Their quotient, in [0, 1), measures how far the predictions p are from one-hot, independently of the scale of
    features and weights. Below dtype's eps, H consists of rounding errors, scores computed from its inverse are
    arbitrary, and damping relative to H is 0 too. where: the layer, for the error. advice: one more
    way out.
    """
    trace, bound = extent.tolist()
    if damping:
        return
    if not bound > 0:
        raise ValueError(
            f"curvature {curvature!r} of {where} is zero: its inputs or the loss weights of all rows are 0: pass"
            " hessian='gt', selected= for the rows that had a teacher, or damping= > 0, which scores with damping * I"
        )
    share, eps = trace / bound, torch.finfo(dtype).eps
    if share >= eps:
        return
    raise ValueError(
        f"curvature {curvature!r} of {where} is zero up to rounding: its trace is {share:.1e} of its bound, and"
        f" {str(dtype).removeprefix('torch.')} resolves {eps:.1e}. The student's predictions are one-hot, as after"
        " memorising its training set, and damping relative to this curvature is 0 too: pass damping=, absolute"
        " and > 0 (for example the weight decay), a student that is not saturated (an earlier checkpoint)"
        f"{advice}, or curvature='identity'"
    )


def fit_curvature(
    options: CurvatureOptions,
    rows: LayerRows,
    terms: Sequence[HessianTerm],
    dtype: torch.dtype,
    where: str = "the last layer",
) -> Curvature:
    """The damped curvature of a layer's rows.

    terms: of the Hessian, weights (N,) float64. dtype: of the scores. where: the layer's name, for errors. Raises
    ValueError as check_curvature.
    """
    name, damping = options.curvature, options.damping
    if name == "identity":
        return Identity(damping, rows.classes)
    if name == "exact" and rows.classes * rows.inputs <= DENSE_LIMIT:
        hessian, extent = _dense_hessian(rows, terms)
        check_curvature(name, where, extent, damping=damping, dtype=dtype)
        return Dense(hessian, options.absolute_damping(float(hessian.diagonal().mean())), dtype)

    g, a, extent = _kronecker_factors(rows, terms)
    check_curvature(name, where, extent, damping=damping, dtype=dtype)
    g_values, qg = (rows.ranks.same(part) for part in psd_eigendecomposition(g))
    a_values, qa = (rows.ranks.same(part) for part in psd_eigendecomposition(a))
    eigenvalues = torch.outer(g_values, a_values) if name == "kfac" else _corrected_eigenvalues(rows, terms, qg, qa)
    absolute = options.absolute_damping(float(eigenvalues.mean()))
    basis = Eigenbasis(eigenvalues, qg, qa, absolute, dtype)
    return Iterative(rows, terms, absolute, basis) if name == "exact" else basis


def _extent(h: Tensor, weight: Tensor, p: Tensor) -> Tensor:
    """(2,) sums over the rows of w (1 - |p|^2) |h|^2, their part of trace(H) before damping, and of w |h|^2."""
    squared_norm = h.square().sum(dim=1)
    return torch.stack([(weight * p * (1.0 - p)).sum(dim=1) @ squared_norm, weight[:, 0] @ squared_norm])


def _kronecker_factors(rows: LayerRows, terms: Sequence[HessianTerm]) -> tuple[Tensor, Tensor, Tensor]:
    """G = mean_i sum_t w_ti J(p_ti), (C, C), A = mean_i h~_i h~_i^T, (D, D), and the rows' extent."""
    device = rows.features.device
    g = torch.zeros(rows.classes, rows.classes, dtype=torch.float64, device=device)
    a = torch.zeros(rows.inputs, rows.inputs, dtype=torch.float64, device=device)
    extent = torch.zeros(2, dtype=torch.float64, device=device)
    for part in rows.chunks():
        h = rows.augmented(part, torch.float64)
        a.addmm_(h.T, h)
        for weight, p in rows.probabilities(part, terms):
            extent += _extent(h, weight, p)
            weighted = weight * p
            g.diagonal().add_(weighted.sum(dim=0))
            g.addmm_(weighted.T, p, alpha=-1.0)
    return rows.ranks.sum(g) / rows.total, rows.ranks.sum(a) / rows.total, rows.ranks.sum(extent)


def _corrected_eigenvalues(rows: LayerRows, terms: Sequence[HessianTerm], qg: Tensor, qa: Tensor) -> Tensor:
    """EK-FAC's Lambda: H's diagonal in the basis Qg (x) Qa, in closed form over the model's own labels.

    Lambda = mean_i [sum_t w_ti Var_{k ~ p_ti}(Qg_k.)] (outer) (Qa^T h~_i)^2, Var = (p Qg^2) - (p Qg)^2 by column.
    """
    total = torch.zeros(rows.classes, rows.inputs, dtype=torch.float64, device=rows.features.device)
    squared = qg.square()
    for part in rows.chunks():
        v2 = (rows.augmented(part, torch.float64) @ qa).square_()
        variance = torch.zeros(v2.shape[0], rows.classes, dtype=torch.float64, device=v2.device)
        for weight, p in rows.probabilities(part, terms):
            variance += weight * (p @ squared - (p @ qg).square_()).clamp_min_(0.0)
        total.addmm_(variance.T, v2)
    return rows.ranks.sum(total) / rows.total


def _dense_hessian(rows: LayerRows, terms: Sequence[HessianTerm]) -> tuple[Tensor, Tensor]:
    """H before damping, (C*D, C*D), block (c, k) = mean_i (sum_t w_ti J(p_ti)_ck) h~_i h~_i^T, and the rows' extent."""
    classes, inputs = rows.classes, rows.inputs
    device = rows.features.device
    hessian = torch.zeros(classes, inputs, classes, inputs, dtype=torch.float64, device=device)
    extent = torch.zeros(2, dtype=torch.float64, device=device)
    for part in rows.chunks(bytes_per_row=8 * 3 * classes * inputs):
        h = rows.augmented(part, torch.float64)
        for weight, p in rows.probabilities(part, terms):
            extent += _extent(h, weight, p)
            for c in range(classes):
                column = -weight * p[:, c : c + 1] * p[:, c:]
                column[:, 0] = weight[:, 0] * p[:, c] * (1.0 - p[:, c])
                block = (column[:, :, None] * h[:, None, :]).flatten(1)
                hessian[c, :, c:] += (h.T @ block).reshape(inputs, classes - c, inputs)
    rows.ranks.sum(hessian)
    for c in range(classes):
        hessian[c + 1 :, :, c] = hessian[c, :, c + 1 :].transpose(0, 1)
    return hessian.reshape(classes * inputs, classes * inputs) / rows.total, rows.ranks.sum(extent)
