"""mismatch: whether a teacher's answer belongs to another sample."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrds_fast import KDLoss, influence, select
from lrds_fast.influence import mismatch
from lrds_fast.ranks import Ranks


def answers(
    share: float, *, samples: int = 3000, classes: int = 50, noise: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher, (N, C) float64, and the samples with the answer of another sample, (N,) bool."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    v = 3 * z + noise * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    foreign = torch.rand(samples, generator=generator) < share
    v[foreign] = v[foreign].roll(1, 0)
    return z, v, foreign


def score(z: Tensor, v: Tensor, **change: Any) -> influence.Scores:
    target = torch.arange(len(z)) % z.shape[1]
    features = torch.zeros(len(z), 1, dtype=z.dtype)
    keywords: dict[str, Any] = {
        "features": features,
        "student_logits": z,
        "teacher_logits": v,
        "target": target,
        "scores": "mismatch",
    }
    return influence.last_layer_scores(**(keywords | change))


def auc(found: Tensor, foreign: Tensor) -> float:
    """The probability that a foreign answer has a higher score than a sample's own answer; ties count half."""
    above = found[foreign][:, None] - found[~foreign]
    return float((above.sign() + 1).mean() / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.02, 0.25, 0.5])
def test_swapped_answers_are_detected(share: float, dtype: torch.dtype) -> None:
    z, v, foreign = answers(share)
    scores = score(z.to(dtype), v.to(dtype))
    found = scores["mismatch"]
    assert found.dtype == dtype and float(found.min()) >= 0 and float(found.max()) <= 1
    assert auc(found, foreign) > 0.95
    denied = ~select(scores, "mismatch", threshold=0.5).mask
    assert float(denied[~foreign].double().mean()) < 0.01
    assert float(denied[foreign].double().mean()) > 0.95
    # Calibrated: what it expects is what there is.
    assert float(found.mean()) == pytest.approx(float(foreign.double().mean()), abs=0.01)


@pytest.mark.parametrize("noise", [0.0, 0.01, 2.0, 6.0])
def test_own_answers_are_kept(noise: float) -> None:
    """Also where student and teacher agree to the last digit, and one sample is far below the rest."""
    z, v, _ = answers(0.0, noise=noise)
    v[17] += 0.8 * v[18]
    assert float((score(z, v)["mismatch"] >= 0.5).double().mean()) < 0.01
    if noise < 1:
        assert float(score(z, v)["mismatch"].max()) == 0


def test_an_untrained_student_deselects_few_samples() -> None:
    z, _, _ = answers(0.0)
    _, v, _ = answers(0.0, seed=1)
    assert float((score(z, v)["mismatch"] >= 0.5).double().mean()) < 0.01


def plain(found: np.ndarray, exchanged: np.ndarray) -> np.ndarray:
    """The EM algorithm of the model with densities instead of logarithms."""

    def density(x: np.ndarray, mean: float, std: float) -> np.ndarray:
        values: np.ndarray = np.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
        return values

    f, e = np.arctanh(found), np.arctanh(exchanged)
    other = density(f, e.mean(), e.std(ddof=1))
    # torch's median is the lower one of two.
    share, mean, std = 0.1, np.sort(f)[(len(f) - 1) // 2], f.std(ddof=1)
    foreign: np.ndarray = np.zeros_like(f)
    for _ in range(100):
        both = share * other + (1 - share) * density(f, mean, std)
        foreign = np.where(f > mean, 0, share * other / both)
        share = foreign.mean()
        weight = (1 - foreign) / (1 - foreign).sum()
        mean = float((weight * f).sum())
        std = float(np.sqrt((weight * (f - mean) ** 2).sum()))
    return foreign


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_against_plain_em(share: float) -> None:
    z, v, _ = answers(share, samples=500, classes=10)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(3))
    found = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(z, v, strict=True)])
    exchanged = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(z, v[order], strict=True)])
    torch.testing.assert_close(mismatch.agreement(z, v), torch.tensor(found))
    expected = torch.tensor(plain(found, exchanged))
    torch.testing.assert_close(mismatch.mixture(torch.tensor(found), torch.tensor(exchanged)), expected)
    assert 0.5 * share < float(expected.mean()) < 1.5 * share


def test_order_matters_only_to_the_exchange() -> None:
    z, v, _ = answers(0.2)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(5))
    found, again = score(z, v)["mismatch"], score(z[order], v[order])["mismatch"]
    assert float((found[order] - again).abs().max()) < 0.05
    exchanged = mismatch.agreement(z, v.roll(1, 0))
    r = mismatch.agreement(z, v)
    torch.testing.assert_close(mismatch.mixture(r, exchanged)[order], mismatch.mixture(r[order], exchanged))


def test_scale_offset_temperature_and_revision_do_not_matter() -> None:
    z, v, _ = answers(0.2)
    found = score(z, v)["mismatch"]
    torch.testing.assert_close(score(z * 1e3 + 70, v / 50 - 4)["mismatch"], found)
    for loss in (KDLoss(temperature=9.0), KDLoss(revise="swap"), KDLoss(revise=None)):
        assert torch.equal(score(z, v, loss=loss)["mismatch"], found)


def test_parts_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any division of the samples, in any order, also where answers are exchanged among some samples only."""
    monkeypatch.setattr(mismatch, "_LEAST_EXCHANGED", 64)
    monkeypatch.setattr(mismatch, "_EXCHANGED_LOGITS", 1000)
    z, v, foreign = answers(0.2)
    whole = mismatch.Agreements()
    whole.add(0, z, v)
    expected = whole.probabilities(Ranks())
    assert auc(expected, foreign) > 0.95
    parts = mismatch.Agreements()
    for start, stop in ((2500, 3000), (0, 1), (1000, 2500), (1, 1000), (5, 5)):
        parts.add(start, z[start:stop], v[start:stop])
    assert torch.equal(parts.probabilities(Ranks()), expected)
    assert torch.equal(score(z, v)["mismatch"], expected)


def test_excluded_classes_and_constant_rows() -> None:
    z, v, foreign = answers(0.2)
    expected = score(z, v)["mismatch"]
    more = torch.full((len(z), 3), -math.inf, dtype=z.dtype)
    # Classes that either excludes are as if they were not there.
    padded = score(torch.cat([z, more], 1), torch.cat([v, more.clamp(min=0.7)], 1))["mismatch"]
    torch.testing.assert_close(padded, expected)
    z, v, rows = z.clone(), v.clone(), foreign.nonzero()[:, 0]
    z[rows[0]], v[rows[1]] = 0.1, -7.3
    v[rows[2], 2:] = -math.inf
    found = score(z, v)["mismatch"]
    assert found[rows[:3]].tolist() == [0.0, 0.0, 0.0]
    assert float((found[rows[3:]] >= 0.5).double().mean()) > 0.95


@pytest.mark.parametrize(("samples", "classes"), [(1, 50), (19, 50), (200, 1), (200, 2)])
def test_too_little_to_estimate_from(samples: int, classes: int) -> None:
    z, v, _ = answers(0.2, samples=samples, classes=classes)
    with pytest.warns(UserWarning, match="mismatch needs 20 samples"):
        assert not score(z, v)["mismatch"].any()


@pytest.mark.parametrize(("samples", "classes"), [(20, 50), (200, 3)])
def test_just_enough_to_estimate_from(samples: int, classes: int) -> None:
    z, v, _ = answers(0.0, samples=samples, classes=classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(z, v)["mismatch"]
    assert float((found >= 0.5).double().mean()) < 0.05


class Shuffled(nn.Module):
    """A linear teacher. A flag in the input makes it return the answer for another sample."""

    def __init__(self, student: nn.Linear) -> None:
        super().__init__()
        self._student = student

    def forward(self, x: Tensor) -> Tensor:
        swapped = x.clone()
        swapped[:, :10] = torch.where(x[:, -1:] > 0.5, x[:, 10:20], x[:, :10])
        out: Tensor = 3.0 * self._student(swapped)
        return out


@pytest.mark.parametrize("layers", ["last", "all"])
def test_from_the_models(layers: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 21, generator=generator)
    foreign = torch.rand(600, generator=generator) < 0.3
    x[:, -1] = foreign.float()
    student = nn.Linear(21, 30)
    with torch.no_grad():
        student.weight.copy_(torch.randn(30, 21, generator=generator))
        student.weight[:, 10:] *= 0.1
    teacher, data = Shuffled(student), list(zip(x, (torch.arange(600) % 30).tolist(), strict=True))
    scores = influence.score(student, teacher, data, layers=layers, scores="mismatch", batch_size=37)
    found = scores["mismatch"]
    with torch.no_grad():
        expected = score(student(x), teacher(x))["mismatch"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert auc(found, foreign) > 0.95
