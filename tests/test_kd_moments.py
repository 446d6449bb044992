"""functional.kd_moments against the gradients that kd_logit_gradient writes, which other tests hold to autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast import _ops
from lrds_fast.divergences import NAMES
from lrds_fast.functional import KDMoments, kd_logit_gradient, kd_loss, kd_moments

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not torch.cuda.is_available(),
                reason="needs a CUDA device: run `make gpu-check` on a machine with a GPU",
            ),
        ],
    ),
]


def problem(rows: int, classes: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    z, v, r = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(3))
    y = torch.randint(classes, (rows,), generator=generator)
    return z.to(device, dtype), v.to(device, dtype), y.to(device), r.to(device, dtype)


def expected(z: Tensor, v: Tensor, y: Tensor, r: Tensor | None, **options: Any) -> KDMoments:
    """The definition, in float64."""
    z, v = z.double(), v.double()
    r = torch.zeros_like(z) if r is None else r.double()
    g = kd_logit_gradient(z, v, y, ce_weight=1.0, kd_weight=0.0, **options)
    h = kd_logit_gradient(z, v, y, ce_weight=0.0, kd_weight=1.0, **options)
    right = v.gather(1, y[:, None])[:, 0] >= v.amax(dim=1)
    return KDMoments._make(
        [
            F.cross_entropy(z, y, reduction="none"),
            kd_loss(z, v, y, ce_weight=0.0, kd_weight=1.0, reduction="none", **options),
            *((a * b).sum(dim=1) for a, b in ((g, g), (h, h), (g, h), (g, r), (h, r))),
            r.gather(1, y[:, None])[:, 0] - r.mean(dim=1),
            torch.where(right, y, v.argmax(dim=1)),
        ]
    )


def assert_equal(found: KDMoments, exact: KDMoments, tolerance: float) -> None:
    for name in KDMoments._fields[:-1]:
        got, wanted = getattr(found, name).double(), getattr(exact, name)
        # Products cancel: an error is small beside the factors' lengths.
        size = 1.0 + wanted.abs().nan_to_num(posinf=0.0).max()
        assert torch.equal(got.isinf(), wanted.isinf()) and torch.equal(got.isnan(), wanted.isnan()), name
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(size), msg=name)
    assert torch.equal(found.top, exact.top)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_divergence(dtype: torch.dtype, divergence: str, device: str) -> None:
    for classes in (2, 10, 33, 100, 301):
        z, v, y, r = problem(19, classes, dtype, device, classes)
        options: dict[str, Any] = {"divergence": divergence, "temperature": 3.0, "eta": 0.7}
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        assert_equal(kd_moments(z, v, y, direction=r, **options), expected(z, v, y, r, **options), tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"revise": None},
        {"revise": "mft"},
        {"revise": "lr", "eta": 0.3, "temperature": 1.0},
        {"revise_temperature": 1.0},
        {"temperature": (1.0, 4.0)},
        {"standardize": True, "temperature": 2.0},
    ],
    ids=str,
)
def test_every_option(options: dict[str, Any], device: str) -> None:
    z, v, y, r = problem(23, 70, torch.float64, device)
    assert_equal(kd_moments(z, v, y, direction=r, **options), expected(z, v, y, r, **options), 1e-12)
    without = kd_moments(z, v, y.int(), **options)
    assert_equal(without, expected(z, v, y, None, **options), 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_at_the_edges(dtype: torch.dtype, device: str) -> None:
    """Masked classes, ties of the teacher, certain students and teachers, and a student that excludes the target."""
    z, v, y, r = problem(10, 130, dtype, device)
    others = (y + 1) % 130, (y + 2) % 130
    z[0, others[0][0]] = v[0, others[0][0]] = -float("inf")  # masked for both
    v[1, others[0][1]] = -float("inf")
    v[2, y[2]] = v[2, others[0][2]] = 20.0  # tie with the target
    v[3, others[0][3]] = v[3, others[1][3]] = 20.0  # tie of others
    z[4, y[4]] = 40.0
    v[5, y[5]] = 200.0
    z[6, others[0][6]] = 90.0
    z[7] = v[7]
    z[8, y[8]] = -float("inf")
    v[9] = z[9] = -float("inf")
    v[9, y[9]] = z[9, y[9]] = 1.0
    found, exact = kd_moments(z, v, y, direction=r), expected(z, v, y, r)
    assert_equal(found, exact, 1e-11 if dtype == torch.float64 else 2e-5)
    assert found.ce[8].isinf() and found.ce[9] == 0 and found.kd[9] == 0
    # A certain student's gradient is small, not gone: 1 - p_y is a sum of the others.
    p = torch.softmax(z[4].double(), dim=0)
    p[y[4]] = 0.0
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(found.ce_ce[4].double(), p.square().sum() + p.sum().square(), **tolerance)
    torch.testing.assert_close(found.ce[4].double(), -torch.log1p(-p.sum()), **tolerance)


def test_strides_and_threads() -> None:
    z, v, y, r = problem(300, 64, torch.float32, "cpu")
    wide = torch.randn(300, 200)
    wide[:, 8:72] = r
    exact = kd_moments(z, v, y, direction=r)
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        found = kd_moments(z.T.contiguous().T, v, y, direction=wide[:, 8:72])
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    torch.set_num_threads(threads)
    assert kd_moments(z[:0], v[:0], y[:0], direction=r[:0]).ce.shape == (0,)
    assert not kd_moments(z.requires_grad_(), v, y).ce.requires_grad


def test_shapes_without_data() -> None:
    z, v, y, r = problem(5, 7, torch.float32, "cpu")
    arguments = (z, v, y, *[None] * 7, [4.0], 1.0, 1.0, 1.0, 0.8, 1.0, 0.0, 1, 2, -100, 0, [0.0, 0.0, 0.0], False, r)
    torch.library.opcheck(_ops.kd_moments, arguments)


def test_mistakes_are_named() -> None:
    z, v, y, r = problem(5, 7, torch.float32, "cpu")
    for change, error, message in (
        ({"direction": r[:, :3]}, ValueError, r"direction must have shape \(5, 7\); got \[5, 3\]"),
        ({"revise": "swap"}, ValueError, "revise must be 'lr', 'mft' or None here"),
        ({"target": y + 7}, ValueError, r"target\[0\]"),
        ({"target": F.one_hot(y, 7).float()}, ValueError, "target must hold class indices; got torch.float32"),
        ({"teacher_logits": v[:2]}, ValueError, r"must both be \(N, C\)"),
        ({"temperature": 0.0}, ValueError, "temperature"),
    ):
        given = {"student_logits": z, "teacher_logits": v, "target": y, "direction": r}
        with pytest.raises(error, match=message):
            kd_moments(**(given | change))
