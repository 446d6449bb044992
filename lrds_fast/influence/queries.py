"""Which training samples speak for and against a query: influence of every sample on every query."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from lrds_fast import functional
from lrds_fast._numbers import integer
from lrds_fast.influence.adapters import BatchHook, Classifier, LogitsHook
from lrds_fast.influence.batches import Batches, Data
from lrds_fast.influence.factors import Factors
from lrds_fast.influence.inputs import check_scores
from lrds_fast.influence.layers import Outer, SampleGradients, sample_gradients
from lrds_fast.influence.whole import checked_factors, eval_mode


class Pairwise(NamedTuple):
    """values, indices: (Q, K), each query's K largest influences, largest first, and whose they are."""

    values: Tensor
    indices: Tensor


def pairwise(
    student: nn.Module,
    query_data: Data,
    train_data: Data,
    *,
    factors: Factors,
    top_k: int | None = None,
    largest: bool = True,
    batch_size: int = 256,
    batch: BatchHook | None = None,
    logits: LogitsHook | None = None,
    progress: bool | None = None,
) -> Tensor | Pairwise:
    """g_q^T H^-1 g_i over the layers of `factors`, g the gradients of the labels' cross-entropies.

    Positive: training on sample i lowers the loss of query q (a proponent); to first order n * the change of q's loss
    when i is left out.

    student, query_data, train_data, batch, logits: as influence.score takes them, with targets in [0, C). factors: of
    this student.
    top_k: None returns all of it, (Q, N); a number K >= 1 a Pairwise of each query's K largest influences (smallest
    with largest=False), and no more than (Q, K + batch_size) of them is ever held. Ties go to the lower index.
    Memory beside that: Q preconditioned gradients, in the student's dtype. Results are on the CPU, float32 (float64 for
    a float64 student). Raises ValueError or TypeError as influence.score does.
    """
    if top_k is not None and (top_k := integer("top_k", top_k, "None or an int >= 1")) < 1:
        raise ValueError(f"top_k must be None or an int >= 1; got {top_k!r}")
    layers = checked_factors(student, factors, "all")
    parameter = next(student.parameters())

    model = Classifier(student, "student", logits)
    train = Batches(train_data, parameter, batch_size, progress, name="train_data", batch=batch)
    queried = Batches(query_data, parameter, batch_size, progress, name="query_data", batch=batch)

    def gradients(data: Batches, what: str) -> Iterator[Mapping[str, SampleGradients]]:
        for part in data(what):
            yield sample_gradients(model, part.x, _label_gradient(part.y), layers)[1]

    with eval_mode(student):
        queries = {name: _Queries(factors, name) for name in layers}
        for found in gradients(queried, "queries"):
            for name in layers:
                queries[name].add(found[name])
        count = queries[layers[0]].count
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        best = None if top_k is None else _Best(count, top_k, largest, dtype)
        blocks, seen = [], 0
        # Written into where its size is known: blocks that are joined at the end are twice the memory.
        whole = torch.empty(count, train.samples, dtype=dtype) if top_k is None and train.samples else None
        for found in gradients(train, "pairwise"):
            block = queries[layers[0]].against(found[layers[0]])
            for name in layers[1:]:
                block += queries[name].against(found[name])
            block = block.to(dtype).cpu()
            check_scores("pairwise", block.T, seen)
            if whole is not None:
                whole[:, seen : seen + block.shape[1]] = block
                seen += block.shape[1]
                continue
            if best is None:
                blocks.append(block)
            else:
                best.add(block, seen)
            seen += block.shape[1]
    if whole is not None:
        return whole
    return torch.cat(blocks, dim=1) if best is None else best.found()


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

    What influence.score gives under that name, without a teacher. student, data, batch, logits: as influence.score
    takes them, with targets in [0, C). factors: of this student. The result is on the CPU, float32 (float64 for a
    float64 student). Raises ValueError or TypeError as influence.score does.
    """
    layers = checked_factors(student, factors, "all")
    parameter = next(student.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    model = Classifier(student, "student", logits)
    batches = Batches(data, parameter, batch_size, progress, batch=batch)
    found = []
    with eval_mode(student):
        for part in batches("self_influence"):
            gradients = sample_gradients(model, part.x, _label_gradient(part.y), layers)[1]
            found.append(factors.quadratic(gradients, 1).to(dtype).cpu())
            check_scores("self_influence", found[-1], part.start)
    return torch.cat(found)


def _label_gradient(y: Tensor) -> Callable[[Tensor], Tensor]:
    """From logits to the gradient of the label's cross-entropy in them."""

    def gradient(logits: Tensor) -> Tensor:
        return functional.kd_logit_gradient(
            logits, logits, y, temperature=1.0, ce_weight=1.0, kd_weight=0.0, revise=None
        ).to(logits)

    return gradient


class _Best:
    """Every query's K largest of the values seen so far (smallest, without `largest`), of equals the first."""

    def __init__(self, queries: int, k: int, largest: bool, dtype: torch.dtype) -> None:
        self._k, self._sign = k, 1.0 if largest else -1.0
        self._values = torch.empty(queries, 0, dtype=dtype)
        self._indices = torch.empty(queries, 0, dtype=torch.int64)

    def add(self, block: Tensor, start: int) -> None:
        """block (Q, B): of the samples from `start` on."""
        block = block if self._sign > 0 else -block
        places = torch.arange(start, start + block.shape[1])
        if self._values.shape[1] < self._k:
            self._values, self._indices = self._merged(
                self._values, self._indices, block, places.expand(len(block), -1)
            )
            return
        # Few queries find anything in a block, and these little: only that is sorted. What equals the K-th comes later.
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
        # Stable: of equals the one that came first stays.
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self._k]
        return values.gather(1, order), indices.gather(1, order)

    def found(self) -> Pairwise:
        return Pairwise(self._values * self._sign, self._indices)


class _Queries:
    """The queries' side of one layer: preconditioned gradients, or the two vectors of each where H is a multiple of I.

    With H = c I and one position, g_q . g_i / c is (d_q . d_i)(a_q . a_i) / c: 2 (O + I) operations a pair, not 2 O I.
    """

    def __init__(self, factors: Factors, layer: str) -> None:
        self._block, self._inverse = factors.blocks[layer], factors.inverse(layer)
        self._plain = factors.curvature == "identity"
        self._dense: list[Tensor] = []
        self._outer: list[Outer] = []

    @property
    def count(self) -> int:
        return sum(len(part) for part in self._dense) + sum(len(part.deltas) for part in self._outer)

    def add(self, gradients: SampleGradients) -> None:
        """More queries."""
        for part in gradients.parts():
            if self._plain and _one_position(part):
                self._outer.append(part)
            else:
                dense = part.dense()
                solved = [self._block.solve(row, self._inverse) for row in dense]
                self._dense.append(torch.stack(solved).to(dense))

    def against(self, gradients: SampleGradients) -> Tensor:
        """(Q, B): every query with every sample."""
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
