"""Losses near ties, underflow, excluded classes, large offsets and weights of 0, against kd_oracle.py's definitions in
80-bit arithmetic."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kd_oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lrds_fast
from lrds_fast import DKD, NKD, RLD, TopKTeacher, kd_loss, reference

INF = math.inf
ULP = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
JUST_BELOW = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
PLAIN: dict[str, Any] = {"temperature": 1.0, "revise": None, "eta": 0.75, "standardize": False}

# Student, teacher, target, divergence, what differs from PLAIN.
#: Student's and teacher's logits and options for the divergences that mix or subtract probabilities.
MIXED: dict[str, tuple[list[float], list[float], dict[str, Any]]] = {
    "subnormal mixture": ([0.0, -103.0], [0.0, -103.0], {}),
    "subnormal at the target": ([-103.5, 0.0], [-103.5, 0.0], {}),
    "lr": ([0.0, -103.5], [0.0, -103.5], {"revise": "lr"}),
    "T below 1": ([0.0, -51.6], [0.0, -51.6], {"temperature": 0.5}),
    "excluded by the student": ([0.0, -INF, 1.0], [0.0, -103.0, 2.0], {}),
    "excluded by the teacher": ([0.0, -103.0, 1.0], [0.0, -INF, 2.0], {}),
    "target excluded by the student": ([-INF, 0.0, 1.0], [0.0, 0.0, 2.0], {}),
    "target excluded by the teacher": ([0.0, 0.0, 1.0], [-INF, 0.0, 2.0], {}),
    "nothing in common": ([0.0, -INF, 1.0, -INF], [-INF, 0.0, -INF, 3.0], {}),
    "huge": ([3e38, 0.0, -3e38], [-3e38, 0.0, 1e38], {}),
    "both sure": ([30.0, 0.0, 0.0], [28.0, 0.0, 0.0], {}),
    "sure of different classes": ([90.0, 0.0, 0.0], [0.0, 95.0, 0.0], {}),
    "an ulp apart": ([1.0, 0.0, 3.0], [ULP, 0.0, 3.0], {}),
}

CASES: dict[str, tuple[list[float], list[float], Any, str | lrds_fast.divergences.Divergence, dict[str, Any]]] = {
    "jsd, subnormal mixture": ([0.0, -103.0], [0.0, -103.0], 0, "jsd", {}),
    "jsd, subnormal at the target": ([-103.5, 0.0], [-103.5, 0.0], 0, "jsd", {}),
    "jsd, lr": ([0.0, -103.5], [0.0, -103.5], 0, "jsd", {"revise": "lr"}),
    "jsd, T below 1": ([0.0, -51.6], [0.0, -51.6], 0, "jsd", {"temperature": 0.5}),
    "jsd, T above 1": ([0.0, -206.5], [0.0, -206.5], 0, "jsd", {"temperature": 2.0}),
    "jsd, excluded by the student": ([0.0, -INF], [0.0, -103.0], 0, "jsd", {}),
    **{
        f"{name}, {case}": (z, v, 0, name, changed)
        for name in ("tvd", "skl", "srkl")
        for case, (z, v, changed) in MIXED.items()
    },
    "dkd, all others excluded by the teacher": ([0.0, 0.0], [0.0, -INF], 0, "dkd", {"temperature": 4.0}),
    "dkd, all others excluded by the student": ([0.0, -INF], [0.0, -INF], 0, "dkd", {"temperature": 4.0}),
    "dkd, both sure": ([30.0, 0.0, 0.0], [28.0, 0.0, 0.0], 0, DKD(1.0, 0.0), {}),
    "nkd, gamma 0": ([0.0, -INF, 1.0], [1.0, 0.0, 2.0], 0, NKD(0.0), {}),
    "rld, beta 0": ([0.0, -INF, 1.0], [1.0, 0.0, 2.0], 0, RLD(1.0, 0.0), {}),
    "rld, alpha 0": ([0.0, 0.0, 1.0], [1.0, -INF, 2.0], 0, RLD(0.0, 1.0), {}),
    "rld, 1 - p_a": ([30.0, 0.0, 0.0], [-10.0, 17.0, 0.0], 0, RLD(1.0, 0.0), {}),
    "rld, two tops": ([3.0, 0.0, 0.0, 1.0], [-10.0, 17.0, 17.0, 0.0], 0, RLD(1.0, 0.0), {}),
    "rld, sure and standardized": (
        [1.0] + [0.0] * 399,
        [0.0, 0.0, 0.0, 30.0] + [0.0] * 396,
        1,
        RLD(1.0, 0.0),
        {"standardize": True, "temperature": 2.0},
    ),
    "rkl, underflow where the teacher excludes": ([0.0, -104.1], [0.0, -INF], 0, "rkl", {}),
    "tied soft target": ([0.0, 0.0, 0.0], [1.0, ULP, 0.0], [0.5, 0.5, 0.0], "kl", {"temperature": 4.0, "revise": "lr"}),
    "tied soft target, rkl": ([0.0, 0.0, 0.0], [1.0, 5.0, 3.0], [0.5, 0.25, 0.25], "rkl", {"revise": "lr"}),
    "standardized to a tie": (
        [0.0, 1.0, 2.0],
        [1000.0, 1000.0 + 2**-14, 0.0],
        0,
        "kl",
        {"standardize": True, "revise": "lr"},
    ),
    "one ulp from a tie": ([0.0, 1.0], [1.0, ULP], 0, "kl", {"revise": "lr"}),
    "one ulp from a tie, below": ([0.0, 1.0], [JUST_BELOW, 1.0], 0, "rkl", {"revise": "lr"}),
    "mft, sure": ([0.0, 1.0], [30.0, 0.0], 0, "kl", {"revise": "mft"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_small_inputs(case: str, dtype: torch.dtype) -> None:
    z, v, target, divergence, changed = CASES[case]
    y = torch.tensor([target], dtype=dtype if isinstance(target, list) else torch.int64)
    options = PLAIN | changed | {"divergence": lrds_fast.divergences.resolve(divergence)}
    assert kd_oracle.compare(torch.tensor([z], dtype=dtype), torch.tensor([v], dtype=dtype), y, **options) == 1


def bound(divergence: str, temperature: float) -> float:
    return {
        "jsd": temperature**2 * math.log(2.0),
        "tvd": temperature,
        "skl": temperature**2 * math.log(10.0),
        "srkl": temperature**2 * math.log(10.0),
    }[divergence]


@pytest.mark.parametrize("divergence", ["jsd", "tvd", "skl", "srkl"])
@pytest.mark.parametrize("revise", [None, "lr"])
def test_bounded(divergence: str, revise: str | None) -> None:
    """However unlike the two; the gradient is finite."""
    generator = torch.Generator().manual_seed(0)
    for temperature, classes in ((0.5, 8000), (1.0, 300), (4.0, 300)):
        z, v = (30.0 * torch.randn(8, classes, generator=generator) for _ in range(2))
        z[4:, 1::2] = v[4:, ::2] = -INF  # nothing in common
        z.requires_grad_()
        loss = kd_loss(
            z,
            v,
            torch.arange(8),
            divergence=divergence,
            revise=revise,
            temperature=temperature,
            ce_weight=0.0,
            kd_weight=1.0,
            reduction="none",
        )
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert bool((loss <= bound(divergence, temperature) * (1 + 1e-5)).all() and (loss > 0).all())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("divergence", [d for d in kd_oracle.DIVERGENCES if d.name != "mse_logits"], ids=repr)
@pytest.mark.parametrize("standardize", [False, True], ids=["plain", "standardized"])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_offsets_change_nothing(divergence: lrds_fast.divergences.Divergence, standardize: bool, soft: bool) -> None:
    """Logits that are multiples of 2^-6 are the same distances apart at any offset, to the last bit."""
    generator = torch.Generator().manual_seed(1)
    z, v = (torch.randint(-200, 200, (20, 7), generator=generator) / 64.0 for _ in range(2))
    target = torch.randint(7, (20,), generator=generator)
    if soft:
        target = 0.75 * F.one_hot(target, 7) + 0.25 * F.one_hot((target + 1) % 7, 7)
    found = []
    for offset in (0.0, 1e4):
        student = (z - offset).requires_grad_()
        loss = kd_loss(
            student,
            v + offset,
            target,
            divergence=divergence,
            temperature=3.0,
            standardize=standardize,
            ce_weight=0.0,
            reduction="none",
        )
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), student)[0]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", ["tvd", "skl", "srkl"])
def test_sure_rows_keep_their_digits(divergence: str) -> None:
    """Student and teacher are both certain of the label, to different degrees: the loss and the target's gradient are
    far below an ulp of 1."""
    rows = ([25.0, 0.0, 1.0], [22.0, 0.5, 0.0])
    found = []
    for dtype in (torch.float32, torch.float64):
        z, v = (torch.tensor([x], dtype=dtype) for x in rows)
        z.requires_grad_()
        options: dict[str, Any] = {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0, "reduction": "none"}
        loss = kd_loss(z, v, torch.tensor([0]), divergence=divergence, **options)
        found.append((loss.detach().double(), torch.autograd.grad(loss.sum(), z)[0][:, 0].double()))
    assert float(found[1][0]) < 1e-8
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0.0)


def test_saturated_mft_is_infinite() -> None:
    z, v, y = torch.zeros(1, 3), torch.tensor([[8.0, 0.0, 0.0]]), torch.tensor([0])
    for function in (kd_loss, reference.kd_loss):
        for divergence in lrds_fast.divergences.NAMES:
            loss = function(z, v, y, divergence=divergence, revise="mft", temperature=1.0)
            assert (loss == INF) == (divergence in ("rkl", "mse_logits")), divergence


# --- Cached teachers


@pytest.mark.parametrize("divergence", ["rkl", "mse_logits", "kl", "jsd", "tvd", "skl", "srkl"])
def test_cached_teacher_that_is_confident(divergence: str) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(4, 100, generator=generator)
    v[:, 0] = torch.tensor([20.0, 40.0, 90.0, 120.0])
    z, y = torch.randn(4, 100, generator=generator), torch.zeros(4, dtype=torch.long)
    options: dict[str, Any] = dict(divergence=divergence, temperature=1.0, ce_weight=0.0, reduction="none")
    cached = TopKTeacher.from_logits(v, 10, temperature=1.0)
    exact = TopKTeacher.from_logits(v.double(), 10, temperature=1.0)
    want = kd_loss(z.double(), exact, y, **options)
    torch.testing.assert_close(kd_loss(z, cached, y, **options).double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reference.kd_loss(z.double(), exact, y, **options), want, rtol=1e-9, atol=1e-12)
    # From the logsumexp alone the rest is bounded, not known: no class is above the smallest that was kept.
    bounded = kd_loss(z, cached._replace(rest=None), y, **options)
    assert bounded.isfinite().all()
    dense = cached._replace(rest=None).dense(100)
    assert bool((dense.isfinite()).all() and (dense >= dense.gather(1, cached.indices).amin(1, True) - 40).all())


def test_cached_teacher_without_rest() -> None:
    """Where the logsumexp resolves it, what it leaves is the rest."""
    v = torch.randn(6, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for k in (1, 10, 50):
        cached = TopKTeacher.from_logits(v, k, temperature=2.0)
        torch.testing.assert_close(cached._replace(rest=None).remainder(50), cached.rest, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match=r"TopKTeacher.rest must be None or floating of shape \(6,\); got .* \(3,\)"):
        kd_loss(v, cached._replace(rest=torch.zeros(3)), torch.zeros(6, dtype=torch.long), temperature=2.0)


# --- Soft targets that are no distribution, and denominators


def soft_targets() -> dict[str, Tensor]:
    y = F.one_hot(torch.tensor([1, 2, 3]), 5).double()
    return {
        "sum 2": 2.0 * y,
        "below 0": 1.25 * y - 0.05,
        "nothing": torch.zeros(3, 5, dtype=torch.float64),
        "all below 0": -0.1 - y,
        "half precision": (0.9 * y + 0.02).half().double(),
        "tied": 0.5 * y + 0.5 * y.roll(1, dims=1),
    }


@pytest.mark.parametrize("kind", soft_targets())
@pytest.mark.parametrize("divergence", kd_oracle.DIVERGENCES, ids=repr)
def test_soft_targets_that_are_no_distribution(divergence: lrds_fast.divergences.Divergence, kind: str) -> None:
    """Kernel, reference and torch.func agree; the cross-entropy is F.cross_entropy's; the gradient is the loss's."""
    t = soft_targets()[kind]
    generator = torch.Generator().manual_seed(3)
    z, v = (2.0 * torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()

    def loss(x: Tensor, function: Any = kd_loss, **weights: float) -> Tensor:
        value: Tensor = function(x, v, t, divergence=divergence, **weights)
        return value

    for smoothing in (0.0, 0.1):
        got = kd_loss(z, v, t, ce_weight=1.0, kd_weight=0.0, label_smoothing=smoothing)
        torch.testing.assert_close(got, F.cross_entropy(z, t, label_smoothing=smoothing))
    torch.testing.assert_close(loss(z), loss(z, reference.kd_loss), rtol=1e-11, atol=1e-12)
    if kind == "tied" and divergence.name in ("rkl", "mse_logits"):
        assert loss(z) == INF  # beta = 0 leaves classes without probability
        return
    (gradient,) = torch.autograd.grad(loss(z), z)
    torch.testing.assert_close(gradient, torch.func.grad(loss)(z.detach()), rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(loss, z)
    scaled = kd_loss(z, v, 3.0 * t, divergence=divergence, ce_weight=0.0)
    torch.testing.assert_close(scaled, loss(z, ce_weight=0.0), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sign", [-1.0, 1.0, 0.0])
def test_class_weights_of_any_sign(sign: float) -> None:
    generator = torch.Generator().manual_seed(4)
    z, y = torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    weight = sign * torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
    want = F.cross_entropy(z, y, weight).nan_to_num(0.0)  # a sum of weights that is 0 leaves nothing
    for function in (kd_loss, reference.kd_loss):
        got = function(z, z, y, ce_weight=1.0, kd_weight=0.0, class_weight=weight)
        torch.testing.assert_close(got, want)


def test_denominators_that_are_no_numbers_are_named() -> None:
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    for value in (math.nan, -1.0):
        with pytest.raises(ValueError, match="num_valid must be >= 0; got"):
            kd_loss(z, z, y, num_valid=torch.tensor(value))
    with pytest.raises(ValueError, match="weight_sum, or the class_weight of the rows, is NaN"):
        kd_loss(z, z, y, class_weight=torch.ones(3), weight_sum=torch.tensor(math.nan))


# --- The scan


LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")


def scan_at(level: str, cases: int, seed: int) -> str:
    done = subprocess.run(
        [sys.executable, str(Path(kd_oracle.__file__)), str(cases), str(seed)],
        check=False,
        env={**os.environ, "LRDS_FAST_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("level", LEVELS)
def test_scan(level: str) -> None:
    """Different inputs for each instruction set. float64 has no instruction sets."""
    print(scan_at(level, 6000, LEVELS.index(level)))


def test_scan_of_the_reference() -> None:
    print(kd_oracle.scan(1500, 50, (torch.float64,), 1, reference.kd_loss))


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_scan_of_100000_cases(level: str) -> None:
    print(scan_at(level, 100_000, 100 + LEVELS.index(level)))
