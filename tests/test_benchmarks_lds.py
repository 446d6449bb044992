"""Gate 5, the linear datamodeling score of benchmarks/bench_lds.py: influence predicts retraining on half the data."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import bench_lds


class Case(NamedTuple):
    problem: bench_lds.Problem
    subsets: Tensor
    outputs: Tensor
    models: list[nn.Sequential]


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    problem = bench_lds.digits(100)
    generator = torch.Generator().manual_seed(1)
    subsets = torch.stack([torch.randperm(1200, generator=generator)[:600] for _ in range(40)])
    everything = bench_lds.train(problem, torch.arange(1200).expand(3, -1), 2)
    models = [bench_lds.module_of(everything, k) for k in range(3)]
    return Case(problem, subsets, bench_lds.retrained(problem, subsets, 2), models)


def test_the_models_are_trained(case: Case) -> None:
    """Modules and stacked weights are the same function, accurate on held-out data."""
    problem = case.problem
    for model in case.models:
        logits = model(problem.queries).detach()
        assert float((logits.argmax(dim=1) == problem.query_y).float().mean()) > 0.93
        assert float(cross_entropy(logits, problem.query_y)) < 0.3
    weights = bench_lds.train(problem, case.subsets[:2], 0)
    for k in range(2):
        stacked = bench_lds.outputs_of(weights, problem.queries.expand(2, -1, -1))[k]
        torch.testing.assert_close(
            bench_lds.module_of(weights, k)(problem.queries).detach(), stacked, rtol=1e-4, atol=1e-4
        )


def test_a_perfect_forecast_scores_one() -> None:
    """Outputs that are sums over the half have an LDS of 1, their negatives -1, other scores about 0."""
    draws = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 200, generator=draws)
    subsets = torch.stack([torch.randperm(200, generator=draws)[:100] for _ in range(60)])
    outputs = torch.stack([scores[:, rows].sum(dim=1) for rows in subsets]).double()
    assert bench_lds.lds(scores, subsets, outputs)[0] == pytest.approx(1.0)
    assert bench_lds.lds(-scores, subsets, outputs)[0] == pytest.approx(-1.0)
    mean, low, high = bench_lds.lds(torch.randn(20, 200, generator=draws), subsets, outputs)
    assert abs(mean) < 0.1
    assert low < mean < high


def test_influence_foresees_retraining(case: Case) -> None:
    problem, model = case.problem, case.models[0]
    found = {
        "ekfac": bench_lds.influences(model, problem, "ekfac"),
        "identity": bench_lds.influences(model, problem, "identity"),
        "last layer": bench_lds.influences(model, problem, "ekfac", "last"),
        "exact": bench_lds.influences(model, problem, "exact", damping=problem.damping),
        "same label": bench_lds.same_label(problem),
    }
    more = [bench_lds.influences(other, problem, "ekfac") for other in case.models[1:]]
    found["3 models"] = torch.stack([found["ekfac"], *more]).mean(dim=0)
    scores = {name: bench_lds.lds(values, case.subsets, case.outputs, draws=1)[0] for name, values in found.items()}
    print(f"gate 5, linear datamodeling score: {scores}")
    assert scores["ekfac"] > 0.55
    assert scores["ekfac"] > scores["last layer"] > scores["identity"] + 0.1
    assert scores["3 models"] > scores["ekfac"]
    assert scores["exact"] > scores["ekfac"] + 0.04
    assert scores["identity"] > scores["same label"]
