"""Joint selection: its sums against brute force and random choice, and its effect on the student."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from convex_head import digits_problem
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lrds_fast import KDLoss, influence, select_jointly
from lrds_fast.selection.joint import _fractional, least_sum


def vectors(size: int, width: int, seed: int, mean: float = 0.0) -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


def length(s: Tensor, mask: Tensor) -> float:
    return float(s[mask].sum(dim=0).norm())


def test_near_the_minimum_of_all_subsets() -> None:
    """The joint selection is compared with all 3003 subsets of 6 of 14 samples."""
    found, best, mean = [], [], []
    for seed in range(10):
        s = vectors(14, 3, seed)
        lengths = torch.stack([s[list(rows)].sum(dim=0).norm() for rows in itertools.combinations(range(14), 6)])
        mask = least_sum(s, [6])
        assert int(mask.sum()) == 6
        rank = float((lengths < length(s, mask) - 1e-9).double().mean())
        assert rank < 0.02, "among the best 2% of subsets"
        found.append(length(s, mask))
        best.append(float(lengths.min()))
        mean.append(float(lengths.mean()))
    assert sum(found) < 0.2 * sum(mean)
    assert all(a >= b - 1e-9 for a, b in zip(found, best, strict=True))


@pytest.mark.parametrize("mean", [0.0, 0.3])
def test_close_to_the_bound_of_the_fractional_problem(mean: float) -> None:
    s = vectors(3000, 64, 0, mean)
    mask = least_sum(s, [1000])
    unit = s / s.norm(dim=1).mean()
    w = _fractional(unit, torch.tensor([1000.0], dtype=s.dtype), torch.zeros(3000, dtype=torch.int64))
    assert float(w.sum()) == pytest.approx(1000, abs=1e-3) and float(w.min()) >= 0 and float(w.max()) <= 1
    bound = float((w @ s).norm())
    # What rounding adds does not grow with the number of vectors: a few of their lengths.
    assert length(s, mask) <= bound + 4 * float(s.norm(dim=1).mean())
    chance = math.sqrt(1000) * float(s.norm(dim=1).mean())
    assert length(s, mask) < bound + 0.15 * chance


def test_groups_have_the_requested_counts() -> None:
    s, groups = vectors(600, 16, 3), torch.arange(600) % 7
    counts = [0, 1, 40, 85, 80, 60, 5]
    mask = least_sum(s, counts, groups)
    assert torch.bincount(groups[mask], minlength=7).tolist() == counts
    assert torch.equal(mask, least_sum(s, counts, groups))


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.75, 1.0])
@pytest.mark.parametrize("per_class", [False, True])
def test_selection_reports_the_residual(ratio: float, per_class: bool) -> None:
    s = vectors(203, 8, 1, 0.1).float()
    labels = torch.arange(203) % 3
    chosen = select_jointly(s, ratio=ratio, per_class=per_class, labels=labels, scores={"el2n": torch.rand(203)})
    if per_class:
        sizes = torch.bincount(labels).tolist()
        kept = torch.bincount(labels[chosen.mask], minlength=3).tolist()
        assert kept == [math.floor(ratio * size + 0.5) for size in sizes]
    else:
        assert int(chosen.mask.sum()) == math.floor(ratio * 203 + 0.5)
    assert chosen.policy["residual"] == pytest.approx(length(s.double(), ~chosen.mask), rel=1e-5, abs=1e-6)
    assert set(chosen.scores) == {"el2n", "set_shift"}
    torch.testing.assert_close(chosen.scores["set_shift"], s.norm(dim=1))


def test_residual_of_random_is_that_of_random_choices() -> None:
    s, labels = vectors(120, 5, 2, 0.2), torch.arange(120) % 2
    for per_class in (False, True):
        chosen = select_jointly(s, ratio=0.7, per_class=per_class, labels=labels)
        generator = torch.Generator().manual_seed(0)
        squares = []
        for _ in range(4000):
            order = torch.rand(120, generator=generator).argsort()
            groups = [order[labels[order] == label][:18] for label in (0, 1)] if per_class else [order[:36]]
            squares.append(s[torch.cat(groups)].sum(dim=0).square().sum())
        assert chosen.policy["residual_of_random"] == pytest.approx(float(torch.stack(squares).mean()) ** 0.5, rel=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": torch.rand(4)}, r"shift must be a floating tensor \(N, k\) with k >= 1; got \(4,\)"),
        ({"shift": [[1.0]]}, "shift must be a floating tensor"),
        ({"shift": torch.tensor([[0.0], [math.nan], [1.0]])}, "shift is not finite at sample 1"),
        ({"ratio": 1.5}, r"ratio must lie in \[0, 1\]"),
        ({"per_class": True}, "per_class=True needs labels="),
        ({"scores": {"s": torch.rand(2)}}, "every score must have shift's 3 samples; 's' has 2"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"shift": torch.rand(3, 2), "ratio": 0.5}
    with pytest.raises(ValueError, match=message):
        select_jointly(**(arguments | change))


def network() -> tuple[nn.Module, nn.Module, TensorDataset]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(72, 4))
    data = TensorDataset(torch.randn(120, 2, 6, 6), torch.arange(120) % 4)
    return student.double().eval(), teacher.double(), data


@pytest.mark.parametrize("gradient", ["gt", "kd", "delta"])
def test_set_shift_has_the_lengths_of_param_shift(gradient: str) -> None:
    """Without a sketch |S_i| is param_shift; products of S are those of H^-1 g (pairwise under H^2, for gt)."""
    student, teacher, data = network()
    factors = influence.Factors.fit(student, data.tensors[0].double().split(40), damping=0.05)
    s = influence.set_shift(student, teacher, data, factors=factors, gradient=gradient, dim=None)
    score = f"param_shift:{gradient}"
    expected = influence.score(student, teacher, data, layers="all", factors=factors, scores=score)[score]
    assert s.shape == (120, sum(block.eigenvalues.numel() for block in factors.blocks.values()))
    torch.testing.assert_close(s.norm(dim=1), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dim", [64, 96, 256])
def test_the_sketch_keeps_distances(dim: int) -> None:
    student, teacher, data = network()
    factors = influence.Factors.fit(student, data.tensors[0].double().split(40))
    exact = influence.set_shift(student, teacher, data, factors=factors, dim=None)
    errors = []
    for seed in range(4):
        sketch = influence.set_shift(student, teacher, data, factors=factors, dim=dim, seed=seed, batch_size=33)
        assert sketch.shape == (120, dim)
        errors.append((torch.pdist(sketch) / torch.pdist(exact)).square() - 1)
    relative = torch.stack(errors)
    assert float(relative.square().mean().sqrt()) < 1.25 * math.sqrt(2 / dim)
    # One draw serves all pairs, which share its luck: a mean over four draws is what may be off.
    assert abs(float(relative.mean())) < 3 * math.sqrt(2 / dim) / 2
    again = influence.set_shift(student, teacher, data, factors=factors, dim=dim, seed=3)
    torch.testing.assert_close(sketch, again, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_set_shift_fits_the_factors_of_score(layers: str) -> None:
    student, teacher, data = network()
    selected = torch.arange(120) % 3 > 0
    options: dict[str, Any] = {"layers": layers, "selected": selected, "damping": 0.02, "labels": "all"}
    s = influence.set_shift(student, teacher, data, dim=None, **options)
    expected = influence.score(student, teacher, data, scores="param_shift:delta", **options)["param_shift:delta"]
    torch.testing.assert_close(s.norm(dim=1), expected, rtol=1e-9, atol=0)


def test_set_shift_bad_input() -> None:
    student, teacher, data = network()
    factors = influence.Factors.fit(student, data.tensors[0].double().split(40))
    with pytest.raises(ValueError, match="gradient='delta' needs a teacher"):
        influence.set_shift(student, None, data, factors=factors)
    with pytest.raises(ValueError, match="dim must be None or an int >= 1; got 0"):
        influence.set_shift(student, teacher, data, factors=factors, dim=0)
    with pytest.raises(ValueError, match="gradient must be one of gt, kd, delta; got 'ce'"):
        influence.set_shift(student, teacher, data, factors=factors, gradient="ce")
    shared: dict[str, Any] = {"layers": "last", "labels": "all"}
    for selected, error, message in (
        (torch.ones(130), ValueError, r"selected must have shape \(120,\).*got \(130,\)"),
        (torch.ones(120, dtype=torch.int64), TypeError, "selected must be bool, or floats.*got torch.int64"),
        ([True] * 120, TypeError, "selected must be a torch.Tensor; got list"),
    ):
        for given in (data, [(data[:60]), (data[60:])]):
            with pytest.raises(error, match=message):
                influence.set_shift(student, teacher, given, selected=selected, **shared)  # type: ignore[arg-type]
    without = influence.set_shift(student, None, data, factors=factors, gradient="gt")
    assert torch.equal(without, influence.set_shift(student, teacher, data, factors=factors, gradient="gt"))


@pytest.mark.gate
def test_jointly_deselected_samples_move_the_student_least() -> None:
    """Digits, an exactly trained head: half of the samples are denied their teacher and the head is trained again."""
    temperature = 4.0
    moved: dict[str, list[float]] = {"jointly": [], "least param_shift": [], "random": []}
    for seed in range(3):
        problem = digits_problem(seed, 600, temperature=temperature)
        ones = torch.ones(600, dtype=torch.float64)
        head = problem.head.with_weights(ce=ones, kd=ones)
        w = head.train()
        student, teacher = nn.Linear(64, 10).double(), _Given(problem.teacher_logits, head.h[:, :64])
        with torch.no_grad():
            student.weight.copy_(w[:, :64])
            student.bias.copy_(w[:, 64])
        data = TensorDataset(head.h[:, :64], problem.target)
        factors = influence.Factors.fit(
            student,
            [head.h[:, :64]],
            terms=lambda z, _: [(z.new_ones(len(z)), 1.0), (z.new_ones(len(z)), temperature)],
            labels="all",
            damping=head.decay,
        )
        loss = KDLoss(temperature=temperature, ce_weight=1.0, kd_weight=1.0, ce_weight_unselected=1.0, revise=None)
        shift = influence.set_shift(student, teacher, data, factors=factors, loss=loss, dim=None)
        jointly = select_jointly(shift, ratio=0.5).mask
        low = torch.zeros(600, dtype=torch.bool)
        low[shift.norm(dim=1).argsort()[300:]] = True
        random = torch.rand(600, generator=torch.Generator().manual_seed(seed)).argsort() < 300
        for name, mask in zip(moved, (jointly, low, random), strict=True):
            again = head.with_weights(kd=mask.double()).train(w)
            moved[name].append(float((again - w).norm() / w.norm()))
    print(f"teacher taken from half of the samples, relative change of the weights: {moved}")
    for here, ranked, chance in zip(*moved.values(), strict=True):
        assert here < 0.65 * ranked and here < 0.65 * chance


class _Given(nn.Module):
    """A network that looks up its logits by the inputs."""

    def __init__(self, logits: Tensor, inputs: Tensor) -> None:
        super().__init__()
        self._logits, self._inputs = logits, inputs

    def forward(self, x: Tensor) -> Tensor:
        return self._logits[torch.cdist(x, self._inputs).argmin(dim=1)]
