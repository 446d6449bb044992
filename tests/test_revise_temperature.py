"""revise_temperature: label revision at a temperature of its own, against its definition in float64 and, through
kd_oracle, in 80-bit arithmetic; on every path of the CPU and in everything that is made of kd_loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import kd_cases
import kd_oracle
import pytest
import torch
import torch.nn.functional as F
from test_kd_loss_family import assert_family, soft_targets
from torch import Tensor

import lrds_fast
from lrds_fast import TopKTeacher, functional, kd_loss, kd_loss_parts, linear_kd_loss, mlkd_loss, reference
from lrds_fast.divergences import REVISE_TEMPERATURE, Divergence, resolve
from lrds_fast.recipe.recipe import LossOptions

DOUBLE = torch.float64
# One lane a row, several rows a group, one row a group, more than one block of sums.
CLASSES = (2, 10, 48, 49, 100, 1001, 4099)
# T and R: powers of the exponentials at T, and all others.
TEMPERATURES = ((4.0, 1.0), (2.0, 1.0), (3.0, 1.0), (8.0, 1.0), (6.0, 3.0), (2.5, 1.0), (1.0, 4.0), (4.0, 0.7))


def softened(v: Tensor, y: Tensor, t: float, r: float, eta: float) -> Tensor:
    """p' by its definition: softmax at R, revision, logits R log p, softmax at T."""
    v = v.double()
    p = torch.softmax(v / r, dim=-1)
    p_y, p_max = p.gather(-1, y[:, None]), p.amax(dim=-1, keepdim=True)
    beta = torch.where(v.gather(-1, y[:, None]) < v.amax(dim=-1, keepdim=True), eta / (1 + p_max - p_y), 1.0)
    revised = beta * p + (1 - beta) * F.one_hot(y, v.shape[-1])
    return torch.softmax(r * revised.log() / t, dim=-1)


def kl(z: Tensor, p: Tensor, t: float) -> Tensor:
    return t**2 * torch.where(p > 0, p * (p.log() - F.log_softmax(z.double() / t, dim=-1)), 0.0).sum(dim=-1)


def test_the_default_is_temperature_one() -> None:
    """The constant lrds_fast.divergences.REVISE_TEMPERATURE sets the default."""
    assert REVISE_TEMPERATURE == 1.0
    rows = kd_cases.rows(12, 10)
    assert torch.equal(kd_loss(*rows), kd_loss(*rows, revise_temperature=1.0))
    assert not torch.equal(kd_loss(*rows), kd_loss(*rows, revise_temperature=None))
    assert LossOptions().revise_temperature == 1.0


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_kl_matches_its_definition(dtype: torch.dtype) -> None:
    for classes, (t, r) in itertools.product(CLASSES, TEMPERATURES):
        z, v, y = (x[5:] for x in kd_cases.rows(45, classes, dtype))
        student = z.clone().requires_grad_()
        options: dict[str, Any] = {"temperature": t, "revise_temperature": r, "eta": 0.7, "ce_weight": 0.0}
        options |= {"kd_weight": 1.0, "reduction": "none"}
        got = kd_loss(student, v, y, **options)
        (gradient,) = torch.autograd.grad(got.sum(), student)
        with torch.no_grad():  # the exponentials are not kept
            assert torch.allclose(kd_loss(z, v, y, **options), got, rtol=1e-6, atol=1e-6 * t * t)
        p = softened(v, y, t, r, 0.7)
        want = kl(z, p, t)
        assert ((got - want).abs() / (t * t + want)).max() < (1e-13 if dtype == DOUBLE else 3e-6)
        exact = t * (torch.softmax(z.double() / t, dim=-1) - p)
        rounding = {DOUBLE: 1e-13, torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
        assert ((gradient - exact).abs() <= rounding * (t + exact.abs())).all()


@pytest.mark.parametrize("function", [kd_loss, reference.kd_loss])
@pytest.mark.parametrize("divergence", [d for d in kd_cases.FAMILY if d.name != "nkd"], ids=repr)
def test_at_the_divergences_temperature_it_is_the_published_form(divergence: Divergence, function: Any) -> None:
    """The bits are equal, except for nkd, whose term at temperature 1 has its own revision in the published form."""
    for dtype, revise, standardize in itertools.product((DOUBLE, torch.float32), kd_cases.REVISE, (False, True)):
        rows = kd_cases.family_rows(40, 33, dtype)
        options: dict[str, Any] = {"divergence": divergence, "revise": revise, "standardize": standardize}
        assert torch.equal(
            function(*rows, temperature=2.5, revise_temperature=2.5, reduction="none", **options),
            function(*rows, temperature=2.5, revise_temperature=None, reduction="none", **options),
        )
    rows = kd_cases.family_rows(40, 33)
    nkd = {"divergence": "nkd", "temperature": 1.0, "reduction": "none"}
    published = function(*rows, **nkd, revise_temperature=None)
    assert torch.equal(function(*rows, **nkd, revise_temperature=1.0), published)


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize("revise", kd_cases.REVISE)
@pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
def test_matches_reference(divergence: Divergence, revise: str | None, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"divergence": divergence, "revise": revise}
    for classes, (t, r) in itertools.product((1, 2, 17, 100), ((4.0, 1.0), (1.0, 2.0), ((1.0, 2.0, 4.0), 2.0))):
        rows = kd_cases.family_rows(40, classes, dtype)
        assert_family(*rows, temperature=t, revise_temperature=r, **options)
        if dtype in (DOUBLE, torch.float32) and t == 4.0:
            assert_family(*rows, temperature=t, revise_temperature=r, standardize=True, **options)
            soft = soft_targets(rows.target, classes).to(dtype)
            if revise in ("lr", None):
                assert_family(*rows[:2], soft, temperature=t, revise_temperature=1.5, **options)
    assert_family(*kd_cases.family_rows(12, 5000, dtype), revise_temperature=1.0, **options)


@pytest.mark.parametrize("k", [1, 5, 32, 33])
@pytest.mark.parametrize("rest", [True, False], ids=("rest", "without rest"))
@pytest.mark.parametrize("divergence", ["kl", "rkl", "dkd", "nkd", "jsd", "mse_probs", "tvd", "skl", "srkl"])
def test_cached_teacher(divergence: str, rest: bool, k: int) -> None:
    """The remaining mass is spread evenly: C - k classes of the logit T (rest - log(C - k)), at R as at T."""
    for dtype in (DOUBLE, torch.float32):
        z, v, y = kd_cases.family_rows(40, 33, dtype)
        cached = TopKTeacher.from_logits(v / 8 + torch.linspace(-1, 1, 33).to(dtype), k, temperature=2.0)
        cached = cached if rest else cached._replace(rest=None)
        options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "revise_temperature": 1.0}
        if rest:
            assert_family(z, cached, y, **options)
        dense = kd_loss(z, cached.dense(33), y, reduction="none", **options)
        torch.testing.assert_close(kd_loss(z, cached, y, reduction="none", **options), dense, rtol=2e-5, atol=2e-5)


# Student, teacher, target, T, R.
SATURATED: dict[str, tuple[list[float], list[float], int, float, float]] = {
    "a sure wrong teacher": ([0.5, 0.0, -1.0], [0.0, 60.0, 1.0], 0, 4.0, 1.0),
    "surer than float32": ([0.5, 0.0, -1.0], [0.0, 300.0, 1.0], 0, 4.0, 1.0),
    "the target is excluded": ([0.5, 0.0, -1.0], [-math.inf, 3.0, 1.0], 0, 4.0, 1.0),
    "all but one are excluded": ([0.5, 0.0, -1.0], [-math.inf, 3.0, -math.inf], 0, 4.0, 1.0),
    "far from 0": ([10000.5, 10000.0, 9999.0], [9999.0, 10002.0, 10000.0], 0, 4.0, 1.0),
    "cold, then cooled": ([0.5, 0.0, -1.0], [0.0, 3.0, 1.0], 0, 0.05, 4.0),
    "hot, then cooled": ([0.5, 0.0, -1.0], [0.0, 3.0, 1.0], 0, 0.5, 300.0),
    "cold, then heated": ([0.5, 0.0, -1.0], [0.0, 3.0, 1.0], 0, 30.0, 0.05),
    "one ulp from a tie": ([0.5, 0.0, -1.0], [1.0, 1.0000001192092896, 0.0], 0, 4.0, 1.0),
    "a student that excludes the target": ([-math.inf, 0.0, -1.0], [0.0, 3.0, 1.0], 0, 4.0, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("revise", ["lr", "mft"])
@pytest.mark.parametrize("divergence", [d for d in kd_cases.FAMILY if d.name != "rld"], ids=repr)
@pytest.mark.parametrize("case", SATURATED)
def test_saturated_rows(case: str, divergence: Divergence, revise: str, dtype: torch.dtype) -> None:
    z, v, y, t, r = SATURATED[case]
    options: dict[str, Any] = {"divergence": divergence, "revise": revise, "temperature": t, "revise_temperature": r}
    # Of the same row several classes longer, too: other paths of plain KL.
    for padding in (0, 60, 2000):
        z_row, v_row = (torch.tensor([[*x, *[-math.inf] * padding]], dtype=dtype) for x in (z, v))
        kd_oracle.compare(z_row, v_row, torch.tensor([y]), eta=0.75, standardize=False, **options)
        if divergence.name != "kl":
            break


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_saturated_rows_in_sixteen_bits(dtype: torch.dtype) -> None:
    for (z, v, y, t, r), name in itertools.product(SATURATED.values(), ("kl", "dkd", "jsd", "tvd", "skl", "srkl")):
        z_row, v_row = (torch.tensor([x], dtype=dtype) for x in (z, v))
        options: dict[str, Any] = {"divergence": resolve(name), "revise": "lr", "temperature": t}
        kd_oracle.compare(z_row, v_row, torch.tensor([y]), eta=0.75, standardize=False, revise_temperature=r, **options)


def test_a_confident_wrong_row_by_hand() -> None:
    """At R = 1 a gap of 60 leaves p = (0, 1): the label's new logit is that of the top + log((2 - eta) / eta)."""
    v = torch.tensor([[0.0, 60.0]], dtype=DOUBLE)
    p = lrds_fast.revise_labels(v, torch.tensor([0]), eta=0.8, temperature=4.0, revise_temperature=1.0)
    odds = (1.2 / 0.8) ** 0.25
    torch.testing.assert_close(p, torch.tensor([[odds, 1.0]], dtype=DOUBLE) / (1 + odds), rtol=1e-13, atol=0)


def test_only_the_labels_logit_moves() -> None:
    _, v, y = kd_cases.family_rows(60, 20, DOUBLE)
    others = ~F.one_hot(y, 20).bool()
    for t in (0.5, 1.0, 4.0):
        p = lrds_fast.revise_labels(v, y, temperature=t, revise_temperature=1.0)
        torch.testing.assert_close(p, softened(v, y, t, 1.0, 0.8), rtol=1e-11, atol=1e-300)
        ratio = (t * p.log() - v).masked_select(others).view(60, 19)
        # One number a row, and the same label at every temperature: v'_y - v_k.
        assert (ratio - ratio[:, :1]).abs().max() < 1e-11
    beside = (y[:, None] + 1) % 20
    first, second = (
        t * (log_p.gather(1, y[:, None]) - log_p.gather(1, beside))
        for t in (1.0, 4.0)
        for log_p in (lrds_fast.revise_labels(v, y, temperature=t, revise_temperature=1.0).log(),)
    )
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("policy", ["lr", "mft", "swap"])
def test_revise_labels_is_softened(policy: str) -> None:
    """p' at R to the power of R / T, normalised; a swap does not depend on a temperature."""
    _, v, y = kd_cases.family_rows(60, 20, DOUBLE)
    ours = lrds_fast.revise_labels(v, y, temperature=4.0, revise_temperature=1.5, policy=policy)
    at_r = lrds_fast.revise_labels(v, y, temperature=1.5, revise_temperature=None, policy=policy)
    powers = at_r ** (1.5 / 4.0)
    torch.testing.assert_close(ours, powers / powers.sum(dim=1, keepdim=True), rtol=1e-11, atol=1e-13)
    if policy == "swap":
        assert torch.equal(ours, lrds_fast.revise_labels(v, y, temperature=4.0, policy=policy))
    soft = soft_targets(y, 20)
    ours = lrds_fast.revise_labels(v, soft, temperature=4.0, revise_temperature=1.5)
    powers = lrds_fast.revise_labels(v, soft, temperature=1.5, revise_temperature=None) ** (1.5 / 4.0)
    torch.testing.assert_close(ours, powers / powers.sum(dim=1, keepdim=True), rtol=1e-11, atol=1e-13)


def test_mse_logits_moves_the_labels_logit() -> None:
    """mse_logits compares with the revised logits, which are the same at every temperature."""
    z, v, y = kd_cases.family_rows(60, 20, DOUBLE)
    p = softened(v, y, 1.0, 1.0, 0.8)
    moved = p.log() + v.logsumexp(dim=1, keepdim=True)
    wrong = v.gather(1, y[:, None]) < v.amax(dim=1, keepdim=True)
    # Relative to a class that keeps its logit.
    anchor = v.argmax(dim=1, keepdim=True)
    moved = torch.where(wrong, moved - moved.gather(1, anchor) + v.gather(1, anchor), v)
    want = (z - moved).square().mean(dim=1)
    for t in (1.0, 4.0):
        options: dict[str, Any] = {"divergence": "mse_logits", "temperature": t, "revise_temperature": 1.0}
        got = kd_loss(z, v, y, ce_weight=0.0, kd_weight=1.0, reduction="none", **options)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in lrds_fast.divergences.NAMES if name != "rld"])
@pytest.mark.parametrize("soft", [False, True], ids=("indices", "probabilities"))
def test_derivatives(name: str, soft: bool) -> None:
    """First and second, and through torch.func: the composite operator."""
    z, v, y = (x[5:] for x in kd_cases.family_rows(11, 5, DOUBLE))
    target = soft_targets(y, 5) if soft else y
    options: dict[str, Any] = {"divergence": name, "temperature": (4.0, 2.0), "revise_temperature": 1.0}

    def loss(student: Tensor) -> Tensor:
        return kd_loss(student, v, target, **options)

    student = z.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)
    (first,) = torch.autograd.grad(loss(student), student)
    torch.testing.assert_close(torch.func.grad(loss)(z), first, rtol=1e-9, atol=1e-11)
    along: Tensor = torch.func.jvp(loss, (z,), (torch.ones_like(z),))[1]
    torch.testing.assert_close(along, first.sum(), rtol=1e-9, atol=1e-11)
    (narrow,) = torch.autograd.grad(
        kd_loss((near := z.float() + 1e4).requires_grad_(), v.float() + 1e4, target, **options), near, create_graph=True
    )
    # The PyTorch ops keep the precision of shifted rows too; 1e4 itself rounds them to 2^-11.
    exact = torch.autograd.grad(
        reference.kd_loss(
            far := (near.detach().double() - 1e4).requires_grad_(),
            (v.float() + 1e4).double() - 1e4,
            target,
            **options,
        ),
        far,
    )[0]
    torch.testing.assert_close(narrow.double(), exact, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("revise", [None, "lr", "mft"])
@pytest.mark.parametrize("divergence", ["kl", "dkd", "rkl", "nkd", "jsd", "tvd", "skl", "srkl"])
def test_influences_functions(divergence: str, revise: str | None) -> None:
    """kd_logit_gradient and kd_moments."""
    if (divergence, revise) == ("rkl", "mft"):
        pytest.skip("infinite on confident right rows, by definition")
    for dtype, (t, r) in itertools.product((DOUBLE, torch.float32), ((4.0, 1.0), (2.5, 4.0))):
        z, v, y = (x[5:] for x in kd_cases.family_rows(35, 70, dtype))
        options: dict[str, Any] = {"divergence": divergence, "revise": revise, "temperature": t}
        options |= {"revise_temperature": r}
        h = reference.kd_logit_gradient(z.double(), v.double(), y, ce_weight=0.0, kd_weight=1.0, **options)
        got = functional.kd_logit_gradient(z, v, y, ce_weight=0.0, kd_weight=1.0, **options)
        tolerance: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11} if dtype == DOUBLE else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(got.double(), h, **tolerance)
        kd = reference.kd_loss(z.double(), v.double(), y, ce_weight=0.0, kd_weight=1.0, reduction="none", **options)
        moments = functional.kd_moments(z, v, y, **options)
        torch.testing.assert_close(moments.kd.double(), kd, **tolerance)
        torch.testing.assert_close(moments.kd_kd.double(), h.square().sum(dim=1), **tolerance)


def test_linear_kd_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(40, 9, generator=generator, dtype=DOUBLE) for _ in range(2))
    weight, fixed = (torch.randn(30, 9, generator=generator, dtype=DOUBLE) for _ in range(2))
    y = torch.randint(30, (40,), generator=generator)
    for divergence in ("kl", "dkd"):
        options: dict[str, Any] = {"divergence": divergence, "revise_temperature": 1.0}
        found = []
        losses: list[Callable[[Tensor, Tensor, dict[str, Any]], Tensor]] = [
            lambda h, w, o: linear_kd_loss(h, w, taught, fixed, y, chunk_rows=7, **o),
            lambda h, w, o: reference.kd_loss(h @ w.T, taught @ fixed.T, y, **o),
        ]
        for loss in losses:
            leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
            value = loss(*leaves, options)
            found.append((value.detach(), *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)
        (by_func,) = torch.func.grad(lambda h, o: linear_kd_loss(h, weight, taught, fixed, y, **o), argnums=(0,))(
            hidden, options
        )
        torch.testing.assert_close(by_func, found[0][1])
        options["revise_temperature"] = None
        assert not torch.allclose(found[0][0], linear_kd_loss(hidden, weight, taught, fixed, y, **options))


def test_mlkd_loss() -> None:
    """The Gram matrices are of the same p' as the rows."""
    z, v, y = kd_cases.family_rows(30, 12, DOUBLE)
    options: dict[str, Any] = {"temperature": (2.0, 5.0), "revise_temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0}
    want = kd_loss(z, v, y, **options)
    for t in (2.0, 5.0):
        q, p = torch.softmax(z / t, dim=1), softened(v, y, t, 1.0, 0.8)
        want = want + ((q @ q.T - p @ p.T) ** 2).sum() / 30 + ((q.T @ q - p.T @ p) ** 2).sum() / 12
    torch.testing.assert_close(mlkd_loss(z, v, y, **options), want, rtol=1e-10, atol=1e-12)


def test_counts_and_threads() -> None:
    """The same rows are revised, with the same bits for any thread count; only wrong rows change."""
    z, v, y = kd_cases.rows(64, 1000)
    published, ours = (kd_loss_parts(z, v, y, revise_temperature=r) for r in (None, 1.0))
    assert ours.n_revised == published.n_revised > 0
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.equal(kd_loss_parts(z, v, y, revise_temperature=1.0).loss, ours.loss)
    torch.set_num_threads(threads)
    a, b = (kd_loss(z, v, y, revise_temperature=r, reduction="none") for r in (None, 1.0))
    right = v.gather(1, y[:, None])[:, 0] >= v.amax(dim=1)
    assert torch.equal(a[right], b[right]) and not torch.isclose(a[~right], b[~right]).any()
    for policy in (None, "swap"):
        assert torch.equal(kd_loss(z, v, y, revise=policy, revise_temperature=1.0), kd_loss(z, v, y, revise=policy))


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, "1", True])
def test_mistakes_are_named(value: Any) -> None:
    rows = kd_cases.rows(4, 3)
    error = TypeError if isinstance(value, (str, bool)) else ValueError
    for function in (kd_loss, kd_loss_parts, functional.kd_logit_gradient, functional.kd_moments, mlkd_loss):
        with pytest.raises(error, match=r"revise_temperature must be .*; got"):
            function(*rows, revise_temperature=value)
    with pytest.raises(error, match="revise_temperature must be"):
        lrds_fast.KDLoss(revise_temperature=value)
    with pytest.raises(error, match="revise_temperature must be"):
        lrds_fast.revise_labels(*rows[1:], revise_temperature=value)
    with pytest.raises(error, match="revise_temperature must be"):
        linear_kd_loss(rows.student, torch.eye(3), rows.teacher, torch.eye(3), rows.target, revise_temperature=value)
    with pytest.raises(ValueError, match="revise_temperature must be > 0, or 0 for the temperature of the divergence"):
        torch.ops.lrds_fast.kd_logit_gradient(
            *rows, *[None] * 7, [4.0], 0.1, 0.9, 1.0, 0.8, -1.0, 0.0, 1, 1, -100, 0, [0.0] * 3, False
        )
