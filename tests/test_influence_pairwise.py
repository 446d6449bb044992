"""Influence of every training sample on every query, against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_influence_factors import dense_blocks
from test_influence_score import CLASSES, data, network
from torch import Tensor

from lrds_fast import influence
from lrds_fast.influence.layers import sample_gradients
from lrds_fast.influence.queries import _Largest


def problem(curvature: str = "ekfac") -> dict[str, Any]:
    student, train = network(0), data(2, 23)
    factors = influence.Factors.fit(student.eval(), train.tensors[0].split(8), curvature=curvature, damping=0.05)
    return {"student": student.train(), "query_data": data(3, 9), "train_data": train, "factors": factors}


@pytest.mark.parametrize("curvature", ["identity", "kfac", "ekfac"])
def test_against_dense_matrices(curvature: str) -> None:
    given = problem(curvature)
    found = influence.pairwise(**given, batch_size=7)
    student, factors = given["student"], given["factors"]
    assert student.training
    student.eval()

    def gradients(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        rows = sample_gradients(student, x, lambda z: z.softmax(dim=1) - F.one_hot(y, CLASSES))[1]
        return {name: g.dense() for name, g in rows.items()}

    query, train = gradients(*given["query_data"].tensors), gradients(*given["train_data"].tensors)
    expected = torch.zeros(9, 23, dtype=torch.float64)
    for name in factors.blocks:
        expected += query[name] @ torch.linalg.inv(dense_blocks(factors, name)) @ train[name].T
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    # A sample's influence on itself is its self-influence.
    square = influence.pairwise(**(given | {"query_data": given["train_data"]}))
    assert isinstance(square, Tensor)
    itself = square.diagonal()
    own = influence.score(student, student, given["train_data"], factors=factors, scores="self_influence")
    torch.testing.assert_close(itself, own["self_influence"], rtol=1e-9, atol=0)


def test_exact_against_the_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers in one Gauss-Newton matrix; the queries are solved for in groups of 4."""
    monkeypatch.setattr("lrds_fast.influence.queries.QUERIES_AT_ONCE", 4)
    given = problem()
    found = influence.pairwise(**given, exact=True, batch_size=7)
    assert isinstance(found, Tensor)
    student = given["student"].eval()
    parameters = {name: p.detach() for name, p in student.named_parameters()}

    def gradients(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, P) gradients of the cross-entropies, (B, C, P) Jacobians of the logits, (B, C) probabilities."""
        made = torch.func.jacrev(lambda p: torch.func.functional_call(student, p, (x,)))(parameters)
        jacobian = torch.cat([made[name].flatten(2) for name in parameters], dim=2)
        q = student(x).detach().softmax(1)
        return torch.einsum("ncp,nc->np", jacobian, q - F.one_hot(y, CLASSES)), jacobian, q

    query, train = gradients(*given["query_data"].tensors), gradients(*given["train_data"].tensors)
    _, j, q = train
    inner = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    h = torch.einsum("ncp,ncd,ndr->pr", j, inner, j) / len(j) + 0.05 * torch.eye(j.shape[2], dtype=torch.float64)
    expected = query[0] @ torch.linalg.solve(h, train[0].T)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    top = influence.pairwise(**given, exact=True, top_k=3)
    assert isinstance(top, influence.Pairwise)
    assert torch.equal(top.indices, expected.argsort(dim=1, descending=True)[:, :3])
    # A loose tolerance stops the conjugate gradients earlier, near the solution.
    early = influence.pairwise(**given, exact=True, tolerance=0.1)
    assert isinstance(early, Tensor)
    error = float((early - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"exact": True, "tolerance": 1.0}, ValueError, r"tolerance must be None or a number in \(0, 1\); got 1.0"),
        ({"exact": True, "tolerance": float("nan")}, ValueError, r"tolerance must be None or a number in \(0, 1\)"),
        ({"exact": True, "tolerance": "0.1"}, TypeError, "tolerance must be a number; got '0.1'"),
        ({"tolerance": 0.1}, ValueError, "tolerance is that of exact=True; got tolerance=0.1 with exact=False"),
    ],
)
def test_tolerances_that_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        influence.pairwise(**problem(), **arguments)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("top_k", [1, 5, 23, 40])
def test_top_k(top_k: int, largest: bool) -> None:
    given = problem()
    full = influence.pairwise(**given)
    found = influence.pairwise(**given, top_k=top_k, largest=largest, batch_size=6)
    assert isinstance(full, Tensor) and isinstance(found, influence.Pairwise)
    order = full.argsort(dim=1, descending=largest, stable=True)[:, :top_k]
    assert torch.equal(found.indices, order)
    torch.testing.assert_close(found.values, full.gather(1, order), rtol=1e-10, atol=0)


def test_ties_go_to_the_lower_index() -> None:
    given = problem()
    x, y = given["train_data"].tensors
    twice = [(x, y), (x, y)]
    found = influence.pairwise(**(given | {"train_data": twice}), top_k=2)
    assert isinstance(found, influence.Pairwise)
    assert torch.equal(found.indices[:, 1], found.indices[:, 0] + 23)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("k", "step"), [(1, 1), (3, 7), (10, 4), (10, 64), (200, 64)])
def test_best_of_many_blocks(k: int, step: int, largest: bool) -> None:
    """Blocks of values with many ties give the same top k as one stable sort of all values."""
    values = torch.randint(-20, 20, (17, 150), generator=torch.Generator().manual_seed(k)).double()
    best = _Largest(17, k, largest, torch.float64)
    for start in range(0, 150, step):
        best.add(values[:, start : start + step], start)
    order = values.argsort(dim=1, descending=largest, stable=True)[:, :k]
    assert torch.equal(best.result().indices, order)
    assert torch.equal(best.result().values, values.gather(1, order))


def test_mistakes_are_named() -> None:
    given = problem()
    for change, message in (
        ({"top_k": 0}, "top_k must be None or an int >= 1; got 0"),
        ({"student": network(5)}, "fitted to another student"),
        ({"train_data": []}, "train_data must contain samples"),
        ({"query_data": []}, "query_data must contain samples"),
    ):
        with pytest.raises(ValueError, match=message):
            influence.pairwise(**(given | change))
