"""kd_loss inside PyTorch: autograd's corners, opcheck, torch.compile, autocast, torch.func."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import kd_cases
import pytest
import torch
from tolerances import assert_matches_reference
from torch import Tensor

from lrds_fast import DKD, functional, kd_loss, kd_loss_parts, reference


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
    """The saved gradient may be scaled in place only when nobody will ask again."""
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


def test_gradient_flows_through_what_made_the_logits() -> None:
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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_says_that_there_is_none(reduction: str) -> None:
    student, teacher, target = kd_cases.rows(8, 10, torch.float64)
    student.requires_grad_()
    loss = kd_loss(student, teacher, target, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    torch.testing.assert_close(
        gradient,
        torch.autograd.grad(kd_loss(student, teacher, target, reduction=reduction).sum(), student)[0],
    )
    with pytest.raises(RuntimeError, match=r"kd_loss.*reference"):
        gradient.square().sum().backward()


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
    """A teacher run under inference_mode, the student's backward outside."""
    student, teacher, target = kd_cases.rows(16, 33)
    with torch.inference_mode():
        inferred = teacher * 1.0
    for reduction in ("mean", "none"):
        for dtype in (torch.float32, torch.float16):
            leaf = student.to(dtype).requires_grad_()
            loss = kd_loss(leaf, inferred, target, reduction=reduction).sum()
            expected = kd_loss(leaf, teacher, target, reduction=reduction).sum()
            ours, theirs = (torch.autograd.grad(x, leaf)[0] for x in (loss, expected))
            assert torch.equal(ours, theirs)


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
    """More than the loss alone, so that the graph has something to fuse around it."""
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
    # Sizes that torch specialises on: no rows, one row, no teacher rows.
    for rows, prefix in ((0, 0), (1, 1), (8, 0)):
        student, teacher, target = kd_cases.rows(rows, 33)
        student.requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad(compiled(student, teacher[:prefix], target), student),
            torch.autograd.grad(step(student, teacher[:prefix], target), student),
        )


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
    """What a tracer is told equals what the kernel returns: shape, dtype and strides."""
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
    """A transform works, or says that it does not. A wrong number is the forbidden outcome."""
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
        return torch.func.jvp(lambda z: loss(z, teacher, target), (student,), (tangent,))[1]

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
