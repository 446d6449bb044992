"""Scores against other packages, run side by side: pip install -e '.[peers]'.

kronfluence gives its own factors to both, so that what is compared is the algebra. Its grouped convolutions are left
out: they average activations over the groups.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks import bench_lds
from benchmarks.peers import Kronfluence, dattri_ekfac, trak
from lrds_fast import influence

pytestmark = pytest.mark.slow


def data(count: int, seed: int, *shape: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, *shape, generator=generator), torch.arange(count) % 5)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, dilation=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 20),
        nn.GELU(),
        nn.Linear(20, 5),
    ).eval()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_kronfluence_with_kronfluence_factors(tmp_path: Path) -> None:
    pytest.importorskip("kronfluence", reason="pip install -e '.[peers]'")
    model, train, queries = network(), data(90, 1, 3, 9, 9), data(11, 2, 3, 9, 9)
    peer = Kronfluence(model, ["0", "3", "7", "9"], train, tmp_path)
    peer.fit()
    factors = peer.factors()
    own = influence.self_influence(model, train, factors=factors, batch_size=32)
    errors = {"self": relative_error(own, peer.self_influence())}
    pairs = influence.pairwise(model, queries, train, factors=factors, batch_size=32)
    assert isinstance(pairs, Tensor)
    errors["pairwise"] = relative_error(pairs, peer.pairwise(queries))
    errors["aggregated"] = relative_error(pairs.sum(dim=0, keepdim=True), peer.pairwise(queries, aggregate=True))
    print(f"gate 2, kronfluence: {errors}")
    assert max(errors.values()) <= 1e-5, errors


def test_our_factors_match_kronfluence(tmp_path: Path) -> None:
    """For both ways to sample labels, the two fits differ by no more than two samples do."""
    pytest.importorskip("kronfluence", reason="pip install -e '.[peers]'")
    model, train = network(), data(2000, 1, 3, 9, 9)
    layers = ["0", "3", "7", "9"]
    peer = Kronfluence(model, layers, train, tmp_path)
    peer.fit()
    theirs = influence.self_influence(model, train, factors=peer.factors())
    found = []
    for labels in (1, "all"):
        fitted = influence.Factors.fit(model, train.tensors[0].split(250), layers=layers, labels=labels)
        own = influence.self_influence(model, train, factors=fitted)
        found.append(float(torch.corrcoef(torch.stack([own, theirs]))[0, 1]))
    print(f"self-influence, own factors against kronfluence's: correlation {found[0]:.4f}, exact {found[1]:.4f}")
    assert min(found) > 0.98


@pytest.mark.parametrize("bias", [False, True])
def test_captum_closed_form(bias: bool) -> None:
    """captum's TracInCPFast equals our closed form without the bias."""
    captum = pytest.importorskip("captum.influence", reason="pip install -e '.[peers]'")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5, bias=bias)).eval()
    train, queries = data(70, 1, 30), data(9, 2, 30)

    def load(net: nn.Module, _: str) -> float:
        return 1.0

    peer = captum.TracInCPFast(
        model, model[2], train, ["now"], load, nn.CrossEntropyLoss(reduction="sum"), batch_size=32
    )
    theirs = peer.influence(queries.tensors)
    factors = influence.Factors.fit(model, train.tensors[0].split(70), layers=["2"], curvature="identity")
    ours = influence.pairwise(model, queries, train, factors=factors)
    assert isinstance(ours, Tensor)
    error = relative_error(ours, theirs)
    print(f"gate 2, captum, bias {bias}: {error:.1e}")
    if bias:
        x, q = (model[:2](part.tensors[0]) for part in (train, queries))
        (dx, dq) = (model(part.tensors[0]).softmax(dim=1) - F.one_hot(part.tensors[1], 5) for part in (train, queries))
        assert error > 1e-3
        assert relative_error(theirs, (dq @ dx.T) * (q @ x.T)) <= 1e-6
        assert relative_error(ours, (dq @ dx.T) * (q @ x.T + 1)) <= 1e-6
    else:
        assert error <= 1e-6


def test_lds_matches_kronfluence(tmp_path: Path) -> None:
    """Gate 5: with the same H no worse than .01; with our own H, which takes every label, no worse at all."""
    pytest.importorskip("kronfluence", reason="pip install -e '.[peers]'")
    problem = bench_lds.digits(100)
    generator = torch.Generator().manual_seed(1)
    subsets = torch.stack([torch.randperm(1200, generator=generator)[:600] for _ in range(40)])
    outputs = bench_lds.retrained(problem, subsets, 2)
    model = bench_lds.module_of(bench_lds.train(problem, torch.arange(1200)[None], 2), 0)
    peer = Kronfluence(model, ["0", "2"], problem.train_set, tmp_path)
    peer.fit()
    same = influence.pairwise(model, problem.query_set, problem.train_set, factors=peer.factors())
    assert isinstance(same, Tensor)
    found = {
        "kronfluence": peer.pairwise(problem.query_set),
        "same factors": same,
        "own factors": bench_lds.influences(model, problem, "ekfac"),
    }
    scores = {name: bench_lds.lds(values, subsets, outputs, draws=1)[0] for name, values in found.items()}
    print(f"gate 5: {scores}")
    assert abs(scores["same factors"] - scores["kronfluence"]) < 0.01
    assert scores["own factors"] > scores["kronfluence"] - 0.01


def test_lds_of_dattri_and_trak(tmp_path: Path) -> None:
    """They run with the settings of benchmarks/bench_lds.py, and their LDS is above 0.15."""
    for package in ("dattri", "trak"):
        pytest.importorskip(package, reason="pip install -e '.[peers]'")
    problem = bench_lds.digits(50)
    generator = torch.Generator().manual_seed(1)
    subsets = torch.stack([torch.randperm(1200, generator=generator)[:600] for _ in range(40)])
    outputs = bench_lds.retrained(problem, subsets, 1)
    model = bench_lds.module_of(bench_lds.train(problem, torch.arange(1200)[None], 2), 0)
    found = {
        "dattri": dattri_ekfac(model, problem.train_set, problem.query_set),
        "trak": trak([model], problem.train_set, problem.query_set, tmp_path),
    }
    scores = {name: bench_lds.lds(values, subsets, outputs, draws=1)[0] for name, values in found.items()}
    print(f"gate 5: {scores}")
    assert min(scores.values()) > 0.15
