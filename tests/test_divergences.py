"""Each divergence against its formula, written out independently, in float64, and the identities between them.

The functions here share no code with lrds_fast.reference: they are the papers' formulas, for one row at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import kd_cases
import pytest
import torch
from torch import Tensor

import lrds_fast
from lrds_fast import (
    DKD,
    JSD,
    KL,
    MSE,
    NKD,
    RKL,
    RLD,
    SKL,
    SRKL,
    TVD,
    divergences,
    kd_loss,
    kd_loss_parts,
    reference,
    revise_labels,
)
from lrds_fast.divergences import Divergence

IMPLEMENTATIONS = [kd_loss, reference.kd_loss]


def kd_term(function: Callable[..., Tensor], *rows: Any, **options: Any) -> Tensor:
    """The KD term of kd_loss for each row."""
    return function(*rows, ce_weight=0.0, kd_weight=1.0, reduction="none", **options)


def softmax(x: list[float]) -> list[float]:
    top = max(x)
    e = [math.exp(a - top) for a in x]
    return [a / math.fsum(e) for a in e]


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def revised(p: list[float], y: int, eta: float) -> list[float]:
    top = max(p)
    if p[y] == top:
        return p
    beta = eta / (1.0 + top - p[y])
    return [beta * a + (1.0 - beta) * (k == y) for k, a in enumerate(p)]


def normalised(p: list[float], keep: list[int]) -> list[float]:
    total = math.fsum(p[k] for k in keep)
    return [p[k] / total for k in keep]


def by_hand(d: Divergence, z: list[float], v: list[float], y: int, t: float, eta: float | None) -> float:
    """The divergence of one row, by its definition. eta None: without revision."""
    classes = range(len(z))
    others = [k for k in classes if k != y]
    q, p = softmax([a / t for a in z]), softmax([a / t for a in v])
    plain = p
    if eta is not None:
        p = revised(p, y, eta)
    match d:
        case KL():
            return t**2 * kl(p, q)
        case RKL():
            return t**2 * kl(q, p)
        case DKD(alpha, beta):
            target_part = kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])
            return t**2 * (alpha * target_part + beta * kl(normalised(p, others), normalised(q, others)))
        case RLD(alpha, beta, tc):
            q_c, top = softmax([a / tc for a in z]), max(softmax([a / tc for a in v]))
            loss = alpha * tc**2 * kl([top, 1 - top], [q_c[y], 1 - q_c[y]])
            below = [k for k in classes if v[k] < v[y]]
            return loss + (beta * t**2 * kl(normalised(plain, below), normalised(q, below)) if below else 0.0)
        case NKD(gamma):
            p_1 = softmax(v) if eta is None else revised(softmax(v), y, eta)
            p_hat, q_hat = normalised(p, others), normalised(q, others)
            cross = -math.fsum(a * math.log(b) for a, b in zip(p_hat, q_hat, strict=True))
            return -p_1[y] * math.log(softmax(z)[y]) + gamma * t**2 * cross
        case MSE("probs"):
            return math.fsum((a - b) ** 2 for a, b in zip(q, p, strict=True)) / len(z)
        case MSE():
            # The revised target's logit is the one that gives p': the others keep theirs.
            v_y = v[y] if p == plain else v[others[0]] + t * math.log(p[y] / p[others[0]])
            return math.fsum((z[k] - (v_y if k == y else v[k])) ** 2 for k in classes) / len(z)
        case JSD(w):
            m = [w * a + (1 - w) * b for a, b in zip(p, q, strict=True)]
            return t**2 * (w * kl(p, m) + (1 - w) * kl(q, m))
        case TVD():
            return t * math.fsum(max(a - b, 0.0) for a, b in zip(p, q, strict=True))
        case SKL(w):
            return t**2 * kl(p, [w * a + (1 - w) * b for a, b in zip(p, q, strict=True)])
        case SRKL(w):
            return t**2 * kl(q, [w * b + (1 - w) * a for a, b in zip(p, q, strict=True)])
    raise AssertionError(d)


@pytest.mark.parametrize("function", IMPLEMENTATIONS, ids=["operator", "reference"])
@pytest.mark.parametrize("revise", [None, "lr"])
@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_matches_its_formula(divergence: Divergence, revise: str | None, function: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for classes in (2, 3, 10):
        z, v = (2.0 * torch.randn(20, classes, generator=generator, dtype=torch.float64) for _ in range(2))
        y = torch.randint(classes, (20,), generator=generator)
        for t in (1.0, 4.0):
            options = {"revise": revise, "revise_temperature": None, "temperature": t, "eta": 0.7}
            got = kd_term(function, z, v, y, divergence=divergence, **options)
            eta = 0.7 if revise else None
            want = [
                by_hand(divergence, a, b, c, t, eta) for a, b, c in zip(z.tolist(), v.tolist(), y.tolist(), strict=True)
            ]
            torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-11, atol=1e-12)


@pytest.fixture
def rows() -> kd_cases.Rows:
    return kd_cases.family_rows(60, 33, torch.float64)


def is_wrong(rows: kd_cases.Rows) -> Tensor:
    return rows.teacher.gather(1, rows.target[:, None])[:, 0] < rows.teacher.amax(dim=1)


@pytest.mark.parametrize("function", IMPLEMENTATIONS, ids=["operator", "reference"])
def test_rld_equals_dkd_where_the_teacher_is_right(rows: kd_cases.Rows, function: Callable[..., Tensor]) -> None:
    tied = (rows.teacher == rows.teacher.amax(dim=1, keepdim=True)).sum(dim=1) > 1
    right = ~is_wrong(rows) & ~tied
    assert right.sum() > 20
    options = {"temperature": 3.0, "revise": None}
    rld = kd_term(function, *rows, divergence=RLD(2.0, 5.0, confidence_temperature=3.0), **options)
    dkd = kd_term(function, *rows, divergence=DKD(2.0, 5.0), **options)
    torch.testing.assert_close(rld[right], dkd[right], rtol=1e-10, atol=1e-11)
    # But for the row whose student equals its teacher.
    assert torch.isclose(rld[~right], dkd[~right]).sum() <= 1


@pytest.mark.parametrize("function", IMPLEMENTATIONS, ids=["operator", "reference"])
@pytest.mark.parametrize("revise", [None, "lr"])
def test_kd_equals_its_decoupled_parts(
    rows: kd_cases.Rows, revise: str | None, function: Callable[..., Tensor]
) -> None:
    """The identity of decoupled KD holds: KD = TCKD + (1 - p'_y) NCKD."""
    options: dict[str, Any] = {"temperature": 4.0, "revise": revise, "eta": 0.6}
    target_class = kd_term(function, *rows, divergence=DKD(1.0, 0.0), **options)
    others = kd_term(function, *rows, divergence=DKD(0.0, 1.0), **options)
    weight = torch.softmax(rows.teacher / 4.0, dim=1)
    if revise:
        weight = revise_labels(rows.teacher, rows.target, eta=0.6, temperature=4.0)
    p_y = weight.gather(1, rows.target[:, None])[:, 0]
    kd = kd_term(function, *rows, divergence="kl", **options)
    torch.testing.assert_close(kd, target_class + (1.0 - p_y) * others, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("function", IMPLEMENTATIONS, ids=["operator", "reference"])
@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_jsd_is_a_mean_of_skewed_divergences(
    rows: kd_cases.Rows, weight: float, function: Callable[..., Tensor]
) -> None:
    """JSD(w) = w SKL(w) + (1 - w) SRKL(1 - w): all three compare with the same mixture."""
    jsd = kd_term(function, *rows, divergence=JSD(weight))
    skl = kd_term(function, *rows, divergence=SKL(weight))
    srkl = kd_term(function, *rows, divergence=SRKL(1.0 - weight))
    torch.testing.assert_close(weight * skl + (1.0 - weight) * srkl, jsd, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("function", IMPLEMENTATIONS, ids=["operator", "reference"])
def test_skewed_divergences_swap_student_and_teacher(rows: kd_cases.Rows, function: Callable[..., Tensor]) -> None:
    for weight in (0.1, 0.7):
        skl = kd_term(function, *rows, divergence=SKL(weight), revise=None)
        swapped = kd_term(function, rows.teacher, rows.student, rows.target, divergence=SRKL(weight), revise=None)
        torch.testing.assert_close(skl, swapped, rtol=1e-10, atol=1e-11)
        # A weight of 0 leaves KL and reverse KL.
    for almost, plain in ((SKL(1e-9), "kl"), (SRKL(1e-9), "rkl")):
        z, v = (x[4:] for x in rows[:2])
        near = kd_term(function, z, v, rows.target[4:], divergence=almost, temperature=8.0)
        torch.testing.assert_close(
            near, kd_term(function, z, v, rows.target[4:], divergence=plain, temperature=8.0), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("function", IMPLEMENTATIONS, ids=["operator", "reference"])
def test_tvd_at_one_is_ligers(rows: kd_cases.Rows, function: Callable[..., Tensor]) -> None:
    """liger_kernel.ops.tvd takes probabilities: loss 0.5 |p - q|, gradient 0.5 sign(p - q), 0 at a tie."""
    z = rows.student.clone().requires_grad_()
    q, p = torch.softmax(z, dim=1), torch.softmax(rows.teacher, dim=1)
    assert bool((q == p).all(dim=1).any())  # a row of ties
    want = 0.5 * (q - p).abs().sum(dim=1)
    (want_gradient,) = torch.autograd.grad((q.detach() - p).sign().mul(0.5).mul(q).sum(), z)
    ours = rows.student.clone().requires_grad_()
    got = kd_term(function, ours, rows.teacher, rows.target, divergence=TVD(), revise=None, temperature=1.0)
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(got.sum(), ours)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize("classes", [2, 10, 33, 1001])
def test_tvd_of_equal_logits_has_no_gradient(classes: int, dtype: torch.dtype) -> None:
    """Not even a rounding error of the probabilities gets a sign."""
    generator = torch.Generator().manual_seed(classes)
    z = (3.0 * torch.randn(40, classes, generator=generator)).to(dtype)
    y = torch.randint(classes, (40,), generator=generator)
    for temperature in (1.0, 2.5, 4.0):
        for standardize in (False, True):
            student = z.clone().requires_grad_()
            loss = kd_term(
                kd_loss, student, z, y, divergence="tvd", revise=None, temperature=temperature, standardize=standardize
            )
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert not bool(loss.any()) and not bool(gradient.any()), (temperature, standardize)


@pytest.mark.parametrize("function", IMPLEMENTATIONS, ids=["operator", "reference"])
def test_tvd_keeps_its_gradients_size_as_t_grows(function: Callable[..., Tensor]) -> None:
    """The limit for T to infinity is (s_k - mean s) / 2C, s the signs of the centred differences of the logits."""
    generator = torch.Generator().manual_seed(0)
    z, v = (torch.randn(8, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    sign = ((z - z.mean(1, keepdim=True)) - (v - v.mean(1, keepdim=True))).sign()
    want = (sign - sign.mean(1, keepdim=True)) / 20
    z.requires_grad_()
    loss = kd_term(function, z, v, torch.zeros(8, dtype=torch.long), divergence="tvd", revise=None, temperature=1e5)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), z)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", IMPLEMENTATIONS, ids=["operator", "reference"])
@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_mft_equals_lr_where_the_teacher_is_wrong(
    rows: kd_cases.Rows, divergence: Divergence, function: Callable[..., Tensor]
) -> None:
    wrong = is_wrong(rows)
    mft, lr = (kd_term(function, *rows, divergence=divergence, revise=r, eta=0.7) for r in ("mft", "lr"))
    torch.testing.assert_close(mft[wrong], lr[wrong], rtol=1e-12, atol=1e-12)
    if divergence.name in ("kl", "rkl", "jsd", "mse_probs", "tvd", "skl", "srkl"):
        assert not torch.isclose(mft[~wrong], lr[~wrong]).any()


def test_policies_margins(rows: kd_cases.Rows) -> None:
    """lr: the target wins by 1 - eta. mft: right rows gain 1 - eta, up to 1. swap: the top becomes the target's."""
    wrong, y = is_wrong(rows), rows.target[:, None]
    plain = torch.softmax(rows.teacher, dim=1)
    for policy in ("lr", "mft", "swap"):
        p = revise_labels(rows.teacher, rows.target, eta=0.7, policy=policy)
        torch.testing.assert_close(p.sum(dim=1), torch.ones(60, dtype=torch.float64))
        p_y, rest = p.gather(1, y)[:, 0], p.scatter(1, y, 0.0).amax(dim=1)
        if policy == "swap":
            torch.testing.assert_close(p[wrong].sort(dim=1).values, plain[wrong].sort(dim=1).values)
            assert (p_y >= rest).all()
        else:
            torch.testing.assert_close(p_y[wrong] - rest[wrong], torch.full((int(wrong.sum()),), 0.3).double())
        if policy == "mft":
            torch.testing.assert_close(p_y[~wrong], (plain.gather(1, y)[:, 0] + 0.3).clamp(max=1.0)[~wrong])
        else:
            assert torch.equal(p[~wrong], plain[~wrong])


def test_counts_of_revised_rows(rows: kd_cases.Rows) -> None:
    wrong = int(is_wrong(rows).sum())
    for revise, divergence, expected in (
        ("lr", "kl", wrong),
        ("swap", "dkd", wrong),
        ("mft", "jsd", 60),
        (None, "nkd", 0),
        ("lr", "rld", 0),
        ("swap", "rld", 0),
    ):
        for function in (kd_loss_parts, reference.kd_loss_parts):
            parts = function(*rows, revise=revise, divergence=divergence, temperature=(2.0, 4.0))
            assert int(parts.n_revised) == expected, (revise, divergence)


def test_several_temperatures_are_a_sum(rows: kd_cases.Rows) -> None:
    for divergence in kd_cases.FAMILY:
        together = kd_term(kd_loss, *rows, divergence=divergence, temperature=(1.0, 2.5, 6.0))
        apart = sum(kd_term(kd_loss, *rows, divergence=divergence, temperature=t) for t in (1.0, 2.5, 6.0))
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


def test_standardize_is_standardizing(rows: kd_cases.Rows) -> None:
    student, teacher, target = (x[4:] for x in rows)  # row 3 is constant
    z, v = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) for x in (student, teacher))
    for divergence in kd_cases.FAMILY:
        ours = kd_term(kd_loss, student, teacher, target, divergence=divergence, standardize=True, temperature=2.0)
        by_hand_first = kd_term(kd_loss, z, v, target, divergence=divergence, temperature=2.0)
        torch.testing.assert_close(ours, by_hand_first, rtol=1e-11, atol=1e-12)


def test_cached_teacher_of_every_class_is_the_teacher(rows: kd_cases.Rows) -> None:
    cached = lrds_fast.TopKTeacher.from_logits(rows.teacher, 33, temperature=2.0)
    torch.testing.assert_close(cached.dense(33), rows.teacher)
    for divergence in kd_cases.FAMILY:
        dense, kept = (
            kd_term(kd_loss, rows.student, teacher, rows.target, divergence=divergence, temperature=2.0)
            for teacher in (rows.teacher, cached)
        )
        torch.testing.assert_close(kept, dense, rtol=1e-11, atol=1e-12)


def test_cached_teacher_keeps_the_mass() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0, -2.0]], dtype=torch.float64)
    cached = lrds_fast.TopKTeacher.from_logits(logits, 2, temperature=2.0)
    p = torch.softmax(cached.dense(5) / 2.0, dim=1)
    exact = torch.softmax(logits / 2.0, dim=1)
    torch.testing.assert_close(p[:, :2], exact[:, :2])
    torch.testing.assert_close(p[:, 2:], exact[:, 2:].mean().expand(1, 3))


@pytest.mark.parametrize("standardize", [False, True], ids=["plain", "standardized"])
@pytest.mark.parametrize("revise", kd_cases.REVISE)
@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_gradcheck(divergence: Divergence, revise: str | None, standardize: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    z, v = (2.0 * torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.randint(7, (6,), generator=generator)
    z[0, 3] += 60.0  # saturated: 1 - q_y is 1e-13 or so
    selected = torch.tensor([1.0, 1.0, 0.0, 0.4, 1.0, 1.0], dtype=torch.float64)
    for temperature in (2.0, (1.0, 3.0)):

        def loss(x: Tensor, temperature: Any = temperature, function: Any = kd_loss) -> Tensor:
            value: Tensor = function(
                x,
                v,
                y,
                divergence=divergence,
                revise=revise,
                standardize=standardize,
                temperature=temperature,
                selected=selected,
                reduction="none",
            )
            return value

        assert torch.autograd.gradcheck(loss, z.requires_grad_(), atol=1e-6)
        assert torch.autograd.gradcheck(lambda x: loss(x, function=reference.kd_loss), z, atol=1e-6)


def test_reference_has_second_derivatives() -> None:
    generator = torch.Generator().manual_seed(5)
    z, v = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.tensor([0, 4, 2])
    for divergence in kd_cases.FAMILY:
        assert torch.autograd.gradgradcheck(
            lambda x, d=divergence: reference.kd_loss(x, v, y, divergence=d), z.requires_grad_()
        )


# --- the objects


def test_codes_match_the_kernels() -> None:
    """csrc/core/divergences.h lists the types in the order of their codes."""
    text = (kd_cases.ROOT / "csrc" / "core" / "divergences.h").read_text(encoding="utf-8")
    listed = text.split("using Divergences =")[1].split("<")[1].split(">")[0].replace("\n", " ")
    types = [name.strip().lower() for name in listed.split(",")]
    assert types == [
        d.name.replace("_", "") for d in sorted(map(divergences.resolve, divergences.NAMES), key=lambda d: d.code)
    ]
    assert {d.name for d in kd_cases.FAMILY} == set(divergences.NAMES)


def test_resolve() -> None:
    assert divergences.resolve("dkd") == DKD() and divergences.resolve(DKD(2.0, 3.0)) == DKD(2.0, 3.0)
    assert divergences.resolve("mse_probs") == MSE("probs") and MSE("probs").name == "mse_probs"
    with pytest.raises(ValueError, match=r"divergence must be one of 'kl', .*'srkl'; got 'kld'"):
        divergences.resolve("kld")
    for wrong in (3, KL, None, Divergence()):
        with pytest.raises(TypeError, match="divergence must be one of"):
            divergences.resolve(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DKD(alpha=-1.0), ValueError, r"DKD's alpha must be finite and >= 0; got -1.0"),
        (lambda: DKD(beta=math.inf), ValueError, r"DKD's beta"),
        (lambda: DKD(beta="8"), TypeError, r"DKD's beta must be a number; got '8'"),  # type: ignore[arg-type]
        (lambda: RLD(confidence_temperature=0.0), ValueError, r"confidence_temperature must be finite and > 0"),
        (lambda: NKD(gamma=math.nan), ValueError, r"NKD's gamma"),
        (lambda: JSD(weight=1.0), ValueError, r"JSD's weight must be finite and inside \(0, 1\); got 1.0"),
        (lambda: SKL(weight=0.0), ValueError, r"SKL's weight must be finite and inside \(0, 1\); got 0.0"),
        (lambda: SRKL(weight=1.0), ValueError, r"SRKL's weight must be finite and inside \(0, 1\); got 1.0"),
        (lambda: MSE("both"), ValueError, r"MSE's on must be 'logits' or 'probs'; got 'both'"),
    ],
)
def test_parameters_are_checked(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
