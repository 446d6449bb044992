"""kd_loss inside PyTorch: autograd's corners, opcheck, torch.compile, autocast, torch.func."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import kd_cases
import pytest
import torch
from tolerances import assert_matches_reference
from torch import Tensor
from torch.autograd import forward_ad

from lrds_fast import DKD, divergences, functional, kd_loss, kd_loss_parts, linear_kd_loss, reference


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "elementmean"])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 2.5])
def test_gradcheck(temperature: float, reduction: str) -> None:
    student, teacher, target = kd_cases.rows(8, 5, torch.float64)
    student = torch.randn_like(student).requires_grad_()
    target[3] = -100
    selected = torch.tensor([1.0, 0.0, 0.3, 1.0, 1.0, 0.5, 0.0, 1.0])
    assert torch.autograd.gradcheck(
        lambda z: kd_loss(
            z,
            teacher,
            target,
            temperature=temperature,
            selected=selected,
            reduction=reduction,
            label_smoothing=0.1,
        ),
        student,
    )


def test_parts_are_detached() -> None:
    student, teacher, target = kd_cases.rows(8, 33)
    student.requires_grad_()
    for reduction in ("mean", "none"):
        parts = kd_loss_parts(student, teacher, target, reduction=reduction)
        assert parts.loss.requires_grad and parts.loss.grad_fn is not None
        assert not any(value.requires_grad for value in parts[1:])


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize("grad_scale", [None, 8.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_survive_a_kept_graph(reduction: str, grad_scale: float | None, dtype: torch.dtype) -> None:
    """The saved gradient may be scaled in place only if backward runs once."""
    student, teacher, target = kd_cases.rows(16, 33, dtype)
    student.requires_grad_()
    loss = kd_loss(student, teacher, target, reduction=reduction, grad_scale=grad_scale)
    results = []
    for factor in (1.0, 0.0, 2.0):
        given = torch.full_like(loss, factor)
        (result,) = torch.autograd.grad(loss, student, given, retain_graph=True)
        results.append((factor, result, result.clone()))
        if factor == 0.0:
            assert not result.any()
    loss.backward()
    assert student.grad is not None
    for factor, result, copied in results:
        assert torch.equal(result, copied), "a later call changed an earlier result"
        torch.testing.assert_close(result, factor * student.grad, rtol=1e-2, atol=1e-6)
    with pytest.raises(RuntimeError, match="second time|retain_graph"):
        loss.backward()


def test_gradients_accumulate() -> None:
    student, teacher, target = kd_cases.rows(16, 33)
    student.requires_grad_()
    kd_loss(student, teacher, target).backward()
    assert student.grad is not None
    once = student.grad.clone()
    (2.0 * kd_loss(student, teacher, target)).backward()
    torch.testing.assert_close(student.grad, 3.0 * once)
    first, second = (kd_loss(student, teacher, target) for _ in range(2))
    (both,) = torch.autograd.grad(first + second, student)
    torch.testing.assert_close(both, 2.0 * once)


def test_gradient_reaches_the_producer_of_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(33, 8, generator=generator, dtype=torch.float64).requires_grad_()
    _, teacher, target = kd_cases.rows(16, 33, torch.float64)
    ours = torch.autograd.grad(kd_loss(features @ weight.T, teacher, target), weight)
    theirs = torch.autograd.grad(reference.kd_loss(features @ weight.T, teacher, target), weight)
    torch.testing.assert_close(ours, theirs)


def test_student_and_teacher_may_share_memory() -> None:
    student, _, target = kd_cases.rows(16, 33, torch.float64)
    student.requires_grad_()
    ours = torch.autograd.grad(kd_loss(student, student, target), student)
    theirs = torch.autograd.grad(reference.kd_loss(student, student, target), student)
    torch.testing.assert_close(ours, theirs)


def test_changing_the_logits_between_forward_and_backward_is_not_silently_wrong() -> None:
    """The gradient was made in the forward pass (mean), or autograd's version check speaks (none)."""
    for dtype in (torch.float32, torch.float16):
        for reduction in ("mean", "none"):
            student, teacher, target = kd_cases.rows(16, 33, dtype)
            leaf = student.clone().requires_grad_()
            logits = leaf * 1.0
            loss = kd_loss(logits, teacher, target, reduction=reduction).sum()
            expected = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
            with torch.no_grad():
                logits.mul_(3.0)
            # Either torch refuses, or the gradient was saved before.
            with contextlib.suppress(RuntimeError):
                actual = torch.autograd.grad(loss, leaf)[0]
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_gradients(reduction: str, mode: Callable[[], Any]) -> None:
    student, teacher, target = kd_cases.rows(16, 33)
    expected = kd_loss(student.clone().requires_grad_(), teacher, target, reduction=reduction)
    leaf = student.clone().requires_grad_()
    with mode():
        parts = kd_loss_parts(leaf, teacher, target, reduction=reduction)
    assert not parts.loss.requires_grad
    assert torch.equal(parts.loss, expected.detach())
    assert torch.equal(kd_loss(student, teacher, target, reduction=reduction), expected.detach())


def test_inference_tensors_of_a_teacher() -> None:
    """A teacher run under inference_mode, the student's backward outside; such a tensor counts no changes."""
    student, teacher, target = kd_cases.rows(16, 33)
    for reduction in ("mean", "none"):
        for dtype in (torch.float32, torch.float16):
            with torch.inference_mode():
                inferred = teacher * 1.0
            leaf = student.to(dtype).requires_grad_()
            loss = kd_loss(leaf, inferred, target, reduction=reduction).sum()
            expected = kd_loss(leaf, teacher, target, reduction=reduction).sum()
            ours, theirs = (torch.autograd.grad(x, leaf, create_graph=True)[0] for x in (loss, expected))
            assert torch.equal(ours, theirs)
            with torch.inference_mode():
                inferred.mul_(-3.0)
            ours, theirs = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (loss, expected))
            assert torch.equal(ours, theirs)
            # A copy was kept, or the change is noticed.
            with contextlib.suppress(RuntimeError):
                ours, theirs = (torch.autograd.grad(x, leaf, create_graph=True)[0] for x in (loss, expected))
                assert torch.equal(ours, theirs)
    loss = kd_loss(student.requires_grad_(), inferred, target)
    with torch.inference_mode():
        inferred.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"teacher_logits.*inference_mode.*clone"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_saving_for_second_derivatives_does_not_affect_first_ones() -> None:
    """The teacher's buffer may be overwritten before backward, and is released by backward while the loss lives."""
    student, teacher, target = kd_cases.rows(16, 33)
    student.requires_grad_()
    teacher = teacher * 1.0
    loss = kd_loss(student, teacher, target)
    expected = torch.autograd.grad(loss, student, retain_graph=True)[0]
    teacher.mul_(-3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, student, create_graph=True)
    gone = weakref.ref(teacher.untyped_storage())
    del teacher
    assert gone() is not None
    loss.backward()
    assert gone() is None
    assert student.grad is not None and torch.equal(student.grad, expected)


# --- Derivatives beyond the first, forward-mode and batched ones


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor, grad_output: Tensor) -> Tensor:
    """The kernel's gradient by the student's logits."""
    leaf = at.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf, grad_output)[0]


@pytest.mark.parametrize("divergence", divergences.NAMES)
def test_second_derivatives_are_the_gradients_differences(divergence: str) -> None:
    """In the student's logits and in grad_output, for every revision, reduction and kind of target; by every route."""
    generator = torch.Generator().manual_seed(0)
    z, v, d = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    soft = torch.softmax(3.0 * torch.randn(5, 4, generator=generator, dtype=torch.float64), dim=-1)
    indices = torch.tensor([0, 1, -100, 2, 3])
    common: dict[str, Any] = dict(divergence=divergence, temperature=(1.5, 3.0), label_smoothing=0.1)
    common |= dict(selected=torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0]), class_weight=torch.linspace(0.5, 1.5, 4))
    # Other pairs of revision and reduction for every divergence.
    reductions = deque(("mean", "none", "sum", "elementmean"))
    reductions.rotate(divergences.NAMES.index(divergence))
    for target, policies in ((indices, ("lr", "mft", "swap", None)), (soft, ("lr", None, None, "lr"))):
        for revise, reduction in zip(policies, reductions, strict=True):

            def loss(
                z: Tensor, target: Tensor = target, revise: str | None = revise, reduction: str = reduction
            ) -> Tensor:
                return kd_loss(z, 2.0 * v, target, revise=revise, reduction=reduction, **common)

            value = loss(z)
            grad_output = torch.linspace(0.5, 2.0, value.numel(), dtype=torch.float64).view(value.shape)
            grad_output.requires_grad_()
            (first,) = torch.autograd.grad(value, z, grad_output, create_graph=True)
            torch.testing.assert_close(first, gradient(loss, z, grad_output))
            second, by_output = torch.autograd.grad(first, (z, grad_output), d)
            ahead, behind = (gradient(loss, z + step * d, grad_output) for step in (1e-5, -1e-5))
            torch.testing.assert_close(second, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)

            unit = gradient(loss, z, torch.ones_like(grad_output)) * d
            torch.testing.assert_close(by_output, unit.sum() if value.dim() == 0 else unit.sum(-1))
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(z.detach(), d))).tangent
                torch.testing.assert_close(tangent, by_output)
                # The gradient is linear in grad_output.
                dual = forward_ad.make_dual(torch.ones_like(value), grad_output.detach())
                (result,) = torch.autograd.grad(loss(z), z, dual)
                torch.testing.assert_close(forward_ad.unpack_dual(result).tangent, first)
            rows = torch.autograd.functional.jacobian(loss, z, vectorize=True)
            weights = grad_output.view(-1, 1, 1)
            torch.testing.assert_close((rows.reshape(-1, 5, 4) * weights).sum(0), first)


@pytest.mark.parametrize("divergence", [name for name in divergences.NAMES if name != "tvd"])
def test_second_derivatives_where_the_student_is_the_teacher(divergence: str) -> None:
    """Most are 0 there, their curvature is not; excluded classes have none. The total variation has a kink there."""
    _, teacher, target = kd_cases.rows(5, 4, torch.float64)
    direction = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64).view(5, 4).cos()

    def loss(z: Tensor) -> Tensor:
        return kd_loss(z, teacher, target, divergence=divergence, revise=None, ce_weight=0.0)

    second = torch.autograd.functional.hvp(loss, teacher.clone(), direction)[1]
    one = torch.ones((), dtype=torch.float64)
    ahead, behind = (gradient(loss, teacher + step * direction, one) for step in (1e-5, -1e-5))
    torch.testing.assert_close(second, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)
    assert divergence == "nkd" or second.any()

    excluded = torch.full((5, 1), -torch.inf, dtype=torch.float64)
    teacher = torch.cat([teacher, excluded], dim=-1)
    wider = torch.cat([direction, torch.ones_like(excluded)], dim=-1)
    scale = 5 / 4 if divergence.startswith("mse") else 1.0  # the mean over classes
    with_excluded = torch.autograd.functional.hvp(loss, teacher.clone(), wider)[1]
    torch.testing.assert_close(scale * with_excluded[:, :4], second)
    assert not with_excluded[:, 4].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradgradcheck(reduction: str) -> None:
    student, teacher, target = kd_cases.rows(3, 4, torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: kd_loss(z, teacher, target, reduction=reduction), student)


def products(loss: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Hessian-vector products and similar uses of second derivatives, for a small network under `loss`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = (normal(8, 3).requires_grad_(), normal(5, 8).requires_grad_())
    x, v, y, d = normal(4, 3), normal(4, 5), torch.tensor([0, 1, 2, 3]), normal(4, 5)

    def of(weights: Sequence[Tensor]) -> Tensor:
        return loss((x @ weights[0].T).tanh() @ weights[1].T, v, y)

    def flat(gradients: Sequence[Tensor]) -> Tensor:
        return torch.cat([gradient.flatten() for gradient in gradients])

    def first() -> Tensor:
        return flat(torch.autograd.grad(of(weights), weights, create_graph=True))

    results = {
        "hessian": torch.autograd.functional.hessian(lambda z: loss(z, v, y), d),
        "hessian, vectorized": torch.autograd.functional.hessian(lambda z: loss(z, v, y), d, vectorize=True),
        "hvp": torch.autograd.functional.hvp(lambda z: loss(z, v, y), d, 2.0 * d)[1],
        "vhp": torch.autograd.functional.vhp(lambda z: loss(z, v, y), d, 2.0 * d)[1],
        "torch.func": torch.func.hessian(lambda z: loss(z, v, y))(d),
        "penalty": flat(torch.autograd.grad(first().square().sum(), weights)),
        "materialized": flat(torch.autograd.grad(first().sum(), weights, materialize_grads=True)),
    }
    inner = torch.autograd.grad(of(weights), weights, create_graph=True)
    outer = of([weight - 0.5 * step for weight, step in zip(weights, inner, strict=True)])
    results["inner step"] = flat(torch.autograd.grad(outer, weights))
    z = 1.0 * d.requires_grad_()
    z.register_hook(lambda gradient: 2.0 * gradient)  # once
    first_of_z = torch.autograd.grad(loss(z, v, y), d, create_graph=True)[0]
    results["third"] = torch.autograd.grad(
        torch.autograd.grad(first_of_z.square().sum(), d, create_graph=True)[0].sum(), d
    )[0]
    first().square().sum().backward()
    results["backward"] = flat([weight.grad for weight in weights if weight.grad is not None])
    return results


def test_every_route_to_a_second_derivative() -> None:
    torch.testing.assert_close(products(kd_loss), products(reference.kd_loss))


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_gradients(reduction: str, dtype: torch.dtype) -> None:
    """is_grads_batched, the graph kept or not, with a grad_scale and without."""
    student, teacher, target = kd_cases.rows(6, 33, dtype)
    student.requires_grad_()
    for grad_scale in (None, 8.0):
        for keep in (True, False):
            loss = kd_loss(student, teacher, target, reduction=reduction, grad_scale=grad_scale)
            given = torch.linspace(-1.0, 2.0, 3 * loss.numel(), dtype=loss.dtype).view(3, *loss.shape)
            expected = torch.stack([torch.autograd.grad(loss, student, g, retain_graph=True)[0] for g in given])
            (actual,) = torch.autograd.grad(loss, student, given, is_grads_batched=True, retain_graph=keep)
            assert actual.dtype == dtype
            torch.testing.assert_close(actual, expected)


def test_only_the_student_has_derivatives() -> None:
    """At any order, by backward, forward and functional modes."""
    student, teacher, target = kd_cases.rows(6, 5, torch.float64)
    soft = torch.softmax(teacher.roll(1, dims=0), dim=-1)
    del target
    others = [teacher, soft, torch.linspace(0.1, 0.9, 6).double(), torch.linspace(0.5, 1.5, 5).double()]

    def loss(z: Tensor, v: Tensor, t: Tensor, selected: Tensor, class_weight: Tensor) -> Tensor:
        return kd_loss(z, v, t, selected=selected, class_weight=class_weight)

    given = [student, *(other.clone() for other in others)]
    leaves = [tensor.requires_grad_() for tensor in given]
    (first,) = torch.autograd.grad(loss(*leaves), student, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), leaves, allow_unused=True)
    assert second[0] is not None and all(other is None for other in second[1:])
    for gradient in torch.func.grad(loss, argnums=(1, 2, 3, 4))(student.detach(), *others):
        assert not gradient.any()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(other, torch.ones_like(other)) for other in others]
        assert forward_ad.unpack_dual(loss(student.detach(), *duals)).tangent is None


# --- opcheck


def op_arguments(dtype: torch.dtype = torch.float32, prefix: int | None = None, **given: Any) -> dict[str, Any]:
    """The operators' arguments by name: kd_loss's defaults, those of `given` replaced."""
    student, teacher, target = kd_cases.rows(6, 10, dtype)
    student.requires_grad_(given.pop("requires_grad", True))
    arguments: dict[str, Any] = dict(
        student=student,
        teacher=teacher[:prefix],
        target=target,
        selected=None,
        class_weight=None,
        teacher_indices=None,
        teacher_rest=None,
        num_valid=None,
        weight_sum=None,
        grad_scale=None,
        temperature=[4.0],
        ce_weight=0.1,
        kd_weight=0.9,
        ce_weight_unselected=1.0,
        eta=0.8,
        revise_temperature=0.0,
        label_smoothing=0.1,
        revise=1,
        reduction=1,
        ignore_index=-100,
        divergence=0,
        divergence_parameters=[0.0, 0.0, 0.0],
        standardize=False,
    )
    assert given.keys() <= arguments.keys()
    return arguments | given


SOFT = torch.softmax(torch.arange(60.0).view(6, 10).sin(), dim=-1)
OP_CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": 2},
    "none": {"reduction": 0},
    "elementmean": {"reduction": 3},
    "mask": {"selected": torch.arange(6) % 2 == 0},
    "weights": {"selected": torch.linspace(0, 1, 6)},
    "prefix": {"prefix": 4},
    "num_valid": {"num_valid": torch.tensor(9.0)},
    "float16": {"dtype": torch.float16},
    "float16 scaled": {"dtype": torch.float16, "grad_scale": torch.tensor(1024.0)},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "no gradient": {"requires_grad": False},
    "class weights": {"class_weight": torch.linspace(0.5, 1.5, 10), "weight_sum": torch.tensor(4.0)},
    "temperatures": {"temperature": [1.0, 2.5, 4.0]},
    "revised at 1": {"revise_temperature": 1.0},
    "revised at 1, temperatures": {"revise_temperature": 1.0, "temperature": [1.0, 4.0]},
    "soft targets": {"target": SOFT},
    "soft targets, rows": {"target": SOFT, "reduction": 0},
    "cached teacher": {
        "teacher": torch.arange(18.0).view(6, 3),
        "teacher_indices": torch.tensor([[0, 4, 9]] * 6),
        "teacher_rest": torch.full((6,), 20.0),
    },
    "dkd, standardized": {"divergence": 2, "divergence_parameters": [1.0, 8.0, 0.0], "standardize": True},
    "jsd, rows": {"divergence": 7, "divergence_parameters": [0.5, 0.0, 0.0], "reduction": 0},
}


@pytest.mark.parametrize("case", OP_CASES)
def test_opcheck_kd_loss(case: str) -> None:
    torch.library.opcheck(torch.ops.lrds_fast.kd_loss.default, (), op_arguments(**OP_CASES[case]))


@pytest.mark.parametrize("case", OP_CASES)
def test_opcheck_forward_and_backward(case: str) -> None:
    arguments = op_arguments(**OP_CASES[case] | {"requires_grad": False})
    ops = torch.ops.lrds_fast
    for with_gradient in (False, True):
        torch.library.opcheck(ops.kd_loss_forward.default, (), arguments | {"with_gradient": with_gradient})
    torch.library.opcheck(ops.kd_loss_forward_.default, (), arguments | {"student": arguments["student"].clone()})
    grad_output = torch.ones(6 if arguments["reduction"] == 0 else (), dtype=torch.float32)
    torch.library.opcheck(ops.kd_loss_backward.default, (grad_output,), arguments)
    torch.library.opcheck(ops.kd_logit_gradient.default, (), arguments)


@pytest.mark.parametrize("case", OP_CASES)
def test_composite_is_the_same(case: str) -> None:
    """kd_loss_composite, which derivatives beyond the first come from, takes every argument as the kernel does."""
    arguments = op_arguments(**OP_CASES[case] | {"requires_grad": False})
    actual, expected = (op(**arguments) for op in (torch.ops.lrds_fast.kd_loss_composite, torch.ops.lrds_fast.kd_loss))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    if case == "mean":
        torch.library.opcheck(torch.ops.lrds_fast.kd_loss_composite.default, (), arguments)


@pytest.mark.parametrize("case", OP_CASES)
def test_in_place_is_the_same(case: str) -> None:
    """kd_loss_forward_ leaves in the logits' memory what kd_loss_forward returns."""
    arguments = op_arguments(**OP_CASES[case] | {"requires_grad": False})
    *expected, gradient = torch.ops.lrds_fast.kd_loss_forward(**arguments, with_gradient=True)
    logits = arguments.pop("student").clone()
    actual = torch.ops.lrds_fast.kd_loss_forward_(logits, **arguments)
    for ours, theirs in zip((*actual, logits), (*expected, gradient), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_opcheck_scale_gradient(dtype: torch.dtype) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    gradient = torch.linspace(-1, 1, 60).view(6, 10).to(dtype)
    grad_output = torch.tensor(2.5, dtype=compute)
    for grad_scale in (None, torch.tensor(0.5, dtype=compute)):
        for name in ("scale_gradient", "scale_gradient_"):
            op = getattr(torch.ops.lrds_fast, name).default
            torch.library.opcheck(op, (gradient.clone(), grad_output, grad_scale))
            factor = 2.5 / (1.0 if grad_scale is None else 0.5)
            scaled = gradient.clone()
            returned = op(scaled, grad_output, grad_scale)
            if name == "scale_gradient":
                assert torch.equal(scaled, gradient)
                scaled = returned
            torch.testing.assert_close(scaled, (gradient.double() * factor).to(dtype))


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize(("ce_weight", "kd_weight"), [(0.1, 0.9), (-0.9, 0.9), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_kd_logit_gradient(ce_weight: float, kd_weight: float, dtype: torch.dtype) -> None:
    """The per-row gradient that influence scores are made of: float32 out, weights of any sign."""
    for classes in (2, 33, 1000):
        student, teacher, target = kd_cases.rows(9, classes, dtype)
        for revise in (None, "lr"):
            actual = functional.kd_logit_gradient(
                student,
                teacher,
                target,
                temperature=2.5,
                ce_weight=ce_weight,
                kd_weight=kd_weight,
                eta=0.6,
                label_smoothing=0.1,
                revise=revise,
            )
            expected = reference.kd_logit_gradient(
                student.double(),
                teacher.double(),
                target,
                temperature=2.5,
                ce_weight=ce_weight,
                kd_weight=kd_weight,
                eta=0.6,
                label_smoothing=0.1,
                revise=revise,
            )
            compute = torch.float64 if dtype == torch.float64 else torch.float32
            assert actual.dtype == compute
            torch.testing.assert_close(
                actual.double(),
                expected,
                rtol=1e-5,
                atol=1e-6 if compute == torch.float32 else 1e-12,
            )


def test_every_operator_is_checked() -> None:
    """A new operator without an opcheck in this file (or its own) fails here."""
    known = {
        "linear_kd_loss_forward",  # tests/test_linear_kd_loss.py
        "kd_moments",  # tests/test_kd_moments.py
        "kd_loss",
        "kd_loss_composite",
        "kd_loss_forward",
        "kd_loss_forward_",
        "kd_loss_backward",
        "scale_gradient",
        "scale_gradient_",
        "kd_logit_gradient",
    }
    schemas = torch._C._jit_get_all_schemas()
    registered = {schema.name.split("::")[1] for schema in schemas if schema.name.startswith("lrds_fast::")}
    assert registered == known


# --- torch.compile


def step(student: Tensor, teacher: Tensor, target: Tensor, **arguments: Any) -> Tensor:
    """A step with other operations around the loss, so that the compiler has something to fuse."""
    return kd_loss(2.0 * student, teacher, target, **arguments).sum() * 3.0


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reduction": "none"},
        {"selected": torch.arange(8) % 3 > 0},
        {"temperature": 2.5, "revise": None, "label_smoothing": 0.1},
        {"num_valid": torch.tensor(6.0), "grad_scale": torch.tensor(2.0)},
        {"num_valid": 6.0, "grad_scale": 2.0},
        {"divergence": "jsd", "temperature": (2.0, 4.0), "class_weight": torch.linspace(0.5, 1.5, 33)},
        {"divergence": DKD(beta=2.0), "standardize": True},
    ],
    ids=["default", "none", "selected", "hyperparameters", "0-d tensors", "numbers", "family", "object"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiles_fullgraph(dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    torch.compiler.reset()
    student, teacher, target = kd_cases.rows(8, 33, dtype)
    student.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, traced = (f(student, teacher, target, **arguments) for f in (step, compiled))
    torch.testing.assert_close(eager, traced)
    torch.testing.assert_close(torch.autograd.grad(traced, student), torch.autograd.grad(eager, student))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_with_the_teacher_under_inference_mode(reduction: str) -> None:
    """A step of which the teacher's forward pass is a part."""
    torch.compiler.reset()
    student, teacher, target = kd_cases.rows(8, 33)
    student.requires_grad_()

    def loss_with_teacher(student: Tensor, features: Tensor) -> Tensor:
        with torch.inference_mode():
            logits = 2.0 * features
        return kd_loss(student, logits, target, reduction=reduction).sum()

    traced = torch.compile(loss_with_teacher, fullgraph=True, backend="aot_eager")(student, teacher)
    eager = kd_loss(student, 2.0 * teacher, target, reduction=reduction).sum()
    torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(torch.autograd.grad(traced, student), torch.autograd.grad(eager, student))


def test_transforms_find_the_values_that_the_kernel_refuses() -> None:
    """Also through linear_kd_loss and in forward mode; a batch of targets (vmap) cannot be read."""
    student, teacher, target = kd_cases.rows(4, 5)
    hidden, weight = torch.ones(4, 3), torch.ones(5, 3)
    bad_target = target.index_fill(0, torch.tensor(2), 7)
    bad_weights = torch.tensor([1.0, 0.5, 1.5, math.nan])
    for name, y, selected in (("target", bad_target, None), ("selected", target, bad_weights)):
        losses: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
            (lambda z, y=y, w=selected: kd_loss(z, teacher, y, selected=w), student),  # type: ignore[misc]
            (lambda h, y=y, w=selected: linear_kd_loss(h, weight, h, weight, y, selected=w), hidden),  # type: ignore[misc]
        ]
        for loss, at in losses:
            with pytest.raises(ValueError, match=rf"{name}\[2\] is"):
                torch.func.grad(loss)(at)
            with forward_ad.dual_level(), pytest.raises(ValueError, match=rf"{name}\[2\] is"):
                loss(forward_ad.make_dual(at, torch.ones_like(at)))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian])
def test_transforms_compile(transform: Callable[..., Any]) -> None:
    torch.compiler.reset()
    student, teacher, target = kd_cases.rows(4, 5)
    f: Callable[[Tensor], Tensor] = transform(lambda z: kd_loss(z, teacher[:3], target, teacher_rows=3))
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(student), f(student))


def test_compiles_fullgraph_dynamic() -> None:
    """One graph for every batch size, an empty prefix included."""
    torch.compiler.reset()
    frames = []

    def count(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        frames.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    first = 0
    for rows, classes in ((8, 33), (5, 33), (17, 100), (64, 7)):
        student, teacher, target = kd_cases.rows(rows, classes)
        student.requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad(compiled(student, teacher, target), student),
            torch.autograd.grad(step(student, teacher, target), student),
        )
        # The first call may trace twice: torch tries float arguments as symbols, then as constants.
        first = first or len(frames)
    assert len(frames) == first
    # The first prefix traces again. Then sizes that torch specialises on: no rows, one row, no teacher rows.
    with_prefix = 0
    for rows, prefix in ((8, 5), (17, 9), (12, 12), (0, 0), (1, 1), (8, 0)):
        student, teacher, target = kd_cases.rows(rows, 33)
        student.requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad(compiled(student, teacher[:prefix], target, teacher_rows=prefix), student),
            torch.autograd.grad(step(student, teacher[:prefix], target, teacher_rows=prefix), student),
        )
        with_prefix = with_prefix or len(frames)
        assert len(frames) == with_prefix <= first + 2 or prefix < 2


def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    student, teacher, target = kd_cases.rows(8, 33)
    student.requires_grad_()
    compiled = torch.compile(step, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(
            torch.autograd.grad(compiled(student, teacher, target), student),
            torch.autograd.grad(step(student, teacher, target), student),
        )
    transposed = kd_cases.strided(student.detach(), "transposed").requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(compiled(transposed, teacher, target), transposed),
        torch.autograd.grad(step(transposed, teacher, target), transposed),
    )


def test_parts_compile() -> None:
    torch.compiler.reset()
    rows = kd_cases.rows(8, 33)
    compiled = torch.compile(kd_loss_parts, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(*rows), kd_loss_parts(*rows), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_errors_survive_compilation() -> None:
    torch.compiler.reset()
    student, teacher, target = kd_cases.rows(8, 33)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="eta"):
        compiled(student, teacher, target, eta=2.0)


def test_fake_tensors_have_the_real_metadata() -> None:
    """The fake implementation and the kernel return the same shape, dtype and strides."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in kd_cases.FLOATING:
        for reduction in ("mean", "none"):
            for layout in ("wide rows", "transposed"):
                rows = kd_cases.rows(6, 10, dtype)
                student = kd_cases.strided(rows.student, layout)
                real = kd_loss_parts(student, rows.teacher, rows.target, reduction=reduction)
                with FakeTensorMode() as mode:
                    inputs = [mode.from_tensor(x) for x in (student, *rows[1:])]
                    fake = kd_loss_parts(*inputs, reduction=reduction)
                for r, f in zip(real, fake, strict=True):
                    assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


# --- Autocast, torch.func, copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Half-precision logits come in, a float32 loss goes out, and no cast is inserted around them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(16, 8, generator=generator)
    layer = torch.nn.Linear(8, 33)
    _, teacher, target = kd_cases.rows(16, 33)
    with torch.autocast("cpu", dtype):
        logits = layer(features)
        assert logits.dtype == dtype
        logits.retain_grad()
        loss = kd_loss(logits, teacher, target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad is not None and logits.grad.dtype == dtype
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()
    outside = logits.detach().requires_grad_()
    assert torch.equal(kd_loss(outside, teacher, target), loss)
    with torch.autocast("cpu", dtype):
        assert_matches_reference(kd_loss_parts, logits, teacher, target)


def refuses_or_equals(ours: Callable[[], Tensor], expected: Tensor) -> None:
    """A transform works or raises an error. It must never return a wrong number."""
    try:
        actual = ours()
    except RuntimeError as error:
        message = str(error)
        assert "kd_loss" in message or "lrds_fast" in message, message
        assert "INTERNAL ASSERT" not in message
    else:
        torch.testing.assert_close(actual, expected)


def test_func_grad() -> None:
    student, teacher, target = kd_cases.rows(6, 10, torch.float64)
    expected = torch.func.grad(lambda z: reference.kd_loss(z, teacher, target))(student)
    refuses_or_equals(lambda: torch.func.grad(lambda z: kd_loss(z, teacher, target))(student), expected)
    part: dict[str, Any] = {"teacher_rows": 4}
    expected = torch.func.grad(lambda z: reference.kd_loss(z, teacher[:4], target, **part))(student)
    refuses_or_equals(lambda: torch.func.grad(lambda z: kd_loss(z, teacher[:4], target, **part))(student), expected)
    with pytest.raises(ValueError, match="teacher_rows=4"):
        torch.func.grad(lambda z: kd_loss(z, teacher[:4], target))(student)


def test_func_vmap() -> None:
    student, teacher, target = kd_cases.rows(6, 10, torch.float64)

    def per_row(loss: Callable[..., Tensor]) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fallback's performance warning
            return torch.func.vmap(lambda z, v, y: loss(z[None], v[None], y[None]))(student, teacher, target)

    refuses_or_equals(lambda: per_row(kd_loss), per_row(reference.kd_loss))


def test_func_jvp() -> None:
    student, teacher, target = kd_cases.rows(6, 10, torch.float64)
    tangent = torch.ones_like(student).cumsum(1)

    def jvp(loss: Callable[..., Tensor]) -> Tensor:
        along: Tensor = torch.func.jvp(lambda z: loss(z, teacher, target), (student,), (tangent,))[1]
        return along

    refuses_or_equals(lambda: jvp(kd_loss), jvp(reference.kd_loss))


def test_deepcopied_logits() -> None:
    rows = kd_cases.rows(6, 10)
    assert torch.equal(kd_loss(*copy.deepcopy(rows)), kd_loss(*rows))


def test_checkpointing_recomputes_the_same_gradient() -> None:
    from torch.utils.checkpoint import checkpoint

    student, teacher, target = kd_cases.rows(8, 33)
    student.requires_grad_()
    plain = torch.autograd.grad(step(student, teacher, target), student)
    again = checkpoint(step, student, teacher, target, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, student)[0], plain[0])
