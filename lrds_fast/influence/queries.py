"""The influence of every training sample on every query, and of every sample on itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from lrds_fast._numbers import integer, number
from lrds_fast.influence.adapters import BatchHook, Classifier, LogitsHook, evaluation_mode
from lrds_fast.influence.batches import BatchReader, Data, ReadOptions
from lrds_fast.influence.conjugate import WholeHessian
from lrds_fast.influence.factors import Factors, HessianBatch
from lrds_fast.influence.inputs import check_scores
from lrds_fast.influence.layers import Outer, SampleGradients, sample_gradients
from lrds_fast.influence.objective import cross_entropy_gradient, cross_entropy_terms
from lrds_fast.ranks import Ranks

#: Queries whose conjugate gradients share the passes over the training set: a few vectors of all parameters each.
QUERIES_AT_ONCE = 64


class Pairwise(NamedTuple):
    """values, indices: (Q, K), each query's K largest influences, largest first, and the numbers of those samples."""

    values: Tensor
    indices: Tensor


def pairwise(
    student: nn.Module,
    query_data: Data,
    train_data: Data,
    *,
    factors: Factors,
    exact: bool = False,
    tolerance: float | None = None,
    top_k: int | None = None,
    largest: bool = True,
    batch_size: int = 256,
    batch: BatchHook | None = None,
    logits: LogitsHook | None = None,
    progress: bool | None = None,
) -> Tensor | Pairwise:
    """g_q^T H^-1 g_i over the layers of `factors`, g the gradients of the labels' cross-entropies.

    Positive: training on sample i lowers the loss of query q (a proponent). To first order the value is n times the
    change of q's loss when i is left out.

    student, query_data, train_data, batch, logits: as influence.score takes them, with targets in [0, C). factors: of
    this student. exact: H is the Gauss-Newton matrix of the training cross-entropy over all layers together, with the
    factors' damping; conjugate gradients, which the factors precondition, solve for QUERIES_AT_ONCE queries at a time,
    and read the training set once a step. Fit the factors with damping = weight decay + (1 - momentum) / (sum of the
    training's learning rates); the default damping is too small for it.
    tolerance: with exact, the residual |H x - g_q| / |g_q| at which the conjugate gradients stop, in (0, 1); None is
    1e-3, or 1e-10 for a float64 student. 0.1 predicts retraining as well in an eighth of the time (docs/influence.md).
    top_k: None returns all influences, (Q, N). A number K >= 1 returns a Pairwise of each query's K largest ones
    (smallest with largest=False) and holds at most (Q, K + batch_size) values. Ties go to the lower index.
    Memory besides: Q preconditioned gradients, in the student's dtype. Results are on the CPU, float32 (float64 for
    a float64 student). Raises ValueError or TypeError as influence.score does.
    """
    if top_k is not None and (top_k := integer("top_k", top_k, "None or an int >= 1")) < 1:
        raise ValueError(f"top_k must be None or an int >= 1; got {top_k!r}")
    if tolerance is not None:
        if not exact:
            raise ValueError(f"tolerance is that of exact=True; got tolerance={tolerance!r} with exact=False")
        if not 0.0 < (tolerance := number("tolerance", tolerance)) < 1.0:
            raise ValueError(f"tolerance must be None or a number in (0, 1); got {tolerance!r}")
    layers = factors.layers_of(student)
    parameter = next(student.parameters())
    read = ReadOptions(batch_size, batch, logits, progress)
    model = read.classifier(student, "student")
    train = read.reader(train_data, parameter, name="train_data")
    query_reader = read.reader(query_data, parameter, name="query_data")
    with evaluation_mode(student):
        queries = {name: _LayerQueries(factors, name, exact) for name in layers}
        for _, gradients in _label_gradients(model, query_reader, "queries", layers):
            for name in layers:
                queries[name].add(gradients[name])
        count = queries[layers[0]].count
        if exact:
            hessian = WholeHessian(model, factors, functools.partial(_cross_entropies, train), Ranks())
            _solve(queries, hessian, tolerance)
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        collected: _All | _Largest = _All(count, train.samples, dtype)
        if top_k is not None:
            collected = _Largest(count, top_k, largest, dtype)
        for start, gradients in _label_gradients(model, train, "pairwise", layers):
            block = queries[layers[0]].against(gradients[layers[0]])
            for name in layers[1:]:
                block += queries[name].against(gradients[name])
            block = block.to(dtype).cpu()
            check_scores("pairwise", block.T, start)
            collected.add(block, start)
    return collected.result()


def _cross_entropies(train: BatchReader) -> Iterator[HessianBatch]:
    for batch in train("H products"):
        yield HessianBatch(batch.start, batch.x, cross_entropy_terms)


def _solve(queries: Mapping[str, _LayerQueries], hessian: WholeHessian, tolerance: float | None) -> None:
    """Replaces the queries' gradients by H^-1 of them."""
    rows = {name: layer.gradients() for name, layer in queries.items()}
    count = len(next(iter(rows.values())))
    for start in range(0, count, QUERIES_AT_ONCE):
        part = range(start, min(start + QUERIES_AT_ONCE, count))
        right = [{name: tensor[row] for name, tensor in rows.items()} for row in part]
        solved = hessian.solve_by_layer(right, tolerance)
        for row, solution in zip(part, solved, strict=True):
            for name, tensor in rows.items():
                tensor[row] = solution[name].to(tensor)


def self_influence(
    student: nn.Module,
    data: Data,
    *,
    factors: Factors,
    batch_size: int = 256,
    batch: BatchHook | None = None,
    logits: LogitsHook | None = None,
    progress: bool | None = None,
) -> Tensor:
    """g_i^T H^-1 g_i over the layers of `factors`, g the gradient of the label's cross-entropy: (N,), high = noise.

    The score that influence.score computes under that name, without a teacher. student, data, batch, logits: as
    influence.score takes them, with targets in [0, C). factors: of this student. The result is on the CPU, float32
    (float64 for a float64 student). Raises ValueError or TypeError as influence.score does.
    """
    layers = factors.layers_of(student)
    parameter = next(student.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    read = ReadOptions(batch_size, batch, logits, progress)
    model, reader = read.classifier(student, "student"), read.reader(data, parameter)
    scores = []
    with evaluation_mode(student):
        for start, gradients in _label_gradients(model, reader, "self_influence", layers):
            scores.append(factors.quadratic(gradients, 1).to(dtype).cpu())
            check_scores("self_influence", scores[-1], start)
    return torch.cat(scores)


def _label_gradients(
    model: Classifier, reader: BatchReader, desc: str, layers: Sequence[str]
) -> Iterator[tuple[int, Mapping[str, SampleGradients]]]:
    """For each batch, the number of its first sample and the gradients of its labels' cross-entropies by layer."""
    for batch in reader(desc):
        y = batch.y
        yield (
            batch.start,
            sample_gradients(model, batch.x, lambda z, y=y: cross_entropy_gradient(z, y).to(z), layers)[1],  # type: ignore[misc]
        )


class _All:
    """All values (Q, N), written into place where N is known: concatenating blocks takes twice the memory."""

    def __init__(self, queries: int, samples: int | None, dtype: torch.dtype) -> None:
        self._whole = torch.empty(queries, samples, dtype=dtype) if samples else None
        self._blocks: list[Tensor] = []

    def add(self, block: Tensor, start: int) -> None:
        """block (Q, B): values of the samples from `start` on."""
        if self._whole is None:
            self._blocks.append(block)
        else:
            self._whole[:, start : start + block.shape[1]] = block

    def result(self) -> Tensor:
        """(Q, N)."""
        return torch.cat(self._blocks, dim=1) if self._whole is None else self._whole


class _Largest:
    """Every query's K largest values so far (smallest with largest=False); of equal values the lower index."""

    def __init__(self, queries: int, k: int, largest: bool, dtype: torch.dtype) -> None:
        self._k, self._sign = k, 1.0 if largest else -1.0
        self._values = torch.empty(queries, 0, dtype=dtype)
        self._indices = torch.empty(queries, 0, dtype=torch.int64)

    def add(self, block: Tensor, start: int) -> None:
        """block (Q, B): values of the samples from `start` on."""
        block = block if self._sign > 0 else -block
        places = torch.arange(start, start + block.shape[1])
        if self._values.shape[1] < self._k:
            self._values, self._indices = self._merged(
                self._values, self._indices, block, places.expand(len(block), -1)
            )
            return
        # Only values above the K-th are sorted: in most blocks few queries have any. A value equal to the K-th has a
        # higher index and is dropped.
        bound = self._values[:, -1:]
        rows = (block.amax(dim=1, keepdim=True) > bound)[:, 0].nonzero()[:, 0]
        if not len(rows):
            return
        block = block[rows]
        better = block > bound[rows]
        width = int(better.sum(dim=1).max())
        first = torch.arange(block.shape[1], 0, -1, dtype=torch.int32)
        columns = torch.where(better, first, 0).topk(width, dim=1).indices
        self._values[rows], self._indices[rows] = self._merged(
            self._values[rows], self._indices[rows], block.gather(1, columns), places[columns]
        )

    def _merged(self, values: Tensor, indices: Tensor, more: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = torch.cat([values, more], dim=1), torch.cat([indices, places], dim=1)
        # Stable: of equal values the earlier one stays first.
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self._k]
        return values.gather(1, order), indices.gather(1, order)

    def result(self) -> Pairwise:
        """(Q, K) values and indices."""
        return Pairwise(self._values * self._sign, self._indices)


class _LayerQueries:
    """The queries' gradients in one layer: H^-1 g_q, or the two factors of each g_q where H is a multiple c of I.

    exact: `add` keeps the g_q, which _solve replaces.

    With H = c I and one position, g_q . g_i / c is (d_q . d_i)(a_q . a_i) / c: 2 (O + I) operations a pair, not 2 O I.
    """

    def __init__(self, factors: Factors, layer: str, exact: bool = False) -> None:
        self._block, self._inverse = factors.blocks[layer], factors.inverse(layer)
        self._plain, self._exact = factors.curvature == "identity" and not exact, exact
        self._dense: list[Tensor] = []
        self._outer: list[Outer] = []

    @property
    def count(self) -> int:
        """The number of queries."""
        return sum(len(part) for part in self._dense) + sum(len(part.deltas) for part in self._outer)

    def add(self, gradients: SampleGradients) -> None:
        """Adds queries, by their gradients in this layer."""
        for part in gradients.parts():
            if self._plain and _one_position(part):
                self._outer.append(part)
            else:
                dense = part.dense()
                if not self._exact:
                    dense = torch.stack([self._block.solve(row, self._inverse) for row in dense]).to(dense)
                self._dense.append(dense)

    def gradients(self) -> Tensor:
        """(Q, P): the queries' gradients, not solved for where H is exact."""
        self._dense = [torch.cat(self._dense)]
        return self._dense[0]

    def against(self, gradients: SampleGradients) -> Tensor:
        """(Q, B): the influence of every sample on every query through this layer."""
        if self._outer:
            assert isinstance(gradients, Outer)
            if len(self._outer) > 1:
                self._outer = [Outer(*(torch.cat(side) for side in zip(*map(_sides, self._outer), strict=True)))]
            inputs, deltas = (side[:, 0, 0] for side in _sides(self._outer[0]))
            pairs = (deltas * float(self._inverse.flatten()[0])) @ gradients.deltas[:, 0, 0].T
            return pairs.mul_(inputs @ gradients.inputs[:, 0, 0].T)
        if len(self._dense) > 1:
            self._dense = [torch.cat(self._dense)]
        return torch.cat([self._dense[0] @ part.dense().T for part in gradients.parts()], dim=1)


def _sides(outer: Outer) -> tuple[Tensor, Tensor]:
    return outer.inputs, outer.deltas


def _one_position(gradients: SampleGradients) -> TypeGuard[Outer]:
    return isinstance(gradients, Outer) and gradients.inputs.shape[1] == 1 and gradients.inputs.shape[2] == 1
