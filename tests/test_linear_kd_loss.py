"""linear_kd_loss against the same loss of materialised float64 logits, and its peak memory."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrds_fast import kd_loss, linear, reference
from lrds_fast.divergences import NAMES
from lrds_fast.linear import default_chunk_rows, linear_kd_loss


class Problem(NamedTuple):
    """Two classifiers and a batch. Sizes are odd on purpose: nothing is a multiple of a vector or of another."""

    hidden: Tensor  # (N, d)
    weight: Tensor  # (C, d)
    bias: Tensor  # (C,)
    teacher_hidden: Tensor  # (N, d_t)
    teacher_weight: Tensor  # (C, d_t)
    teacher_bias: Tensor  # (C,)
    target: Tensor  # (N,), two rows ignored

    def student(self) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh leaves of hidden, weight and bias."""
        return tuple(tensor.detach().clone().requires_grad_() for tensor in self[:3])  # type: ignore[return-value]


def problem(
    rows: int = 23,
    width: int = 13,
    classes: int = 37,
    dtype: torch.dtype = torch.float64,
    *,
    teacher_width: int = 11,
    device: str = "cpu",
) -> Problem:
    """The logits spread like a trained network's; the teacher is right on about half of the rows.

    By a margin: a 16-bit teacher must agree with the float64 reference about which rows are to be revised.
    """
    generator = torch.Generator().manual_seed(rows * classes + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = normal(rows, width), normal(classes, width) * 2 / width**0.5, normal(classes)
    teacher_hidden, teacher_weight = (
        normal(rows, teacher_width),
        normal(classes, teacher_width) * 3 / teacher_width**0.5,
    )
    teacher_bias = normal(classes)
    target = torch.randint(classes, (rows,), generator=generator)
    teacher_hidden[::2] += 2.0 * teacher_weight[target[::2]]
    target[3:5] = -100
    tensors = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    return Problem._make([*(tensor.to(device, dtype) for tensor in tensors), target.to(device)])


def ours(p: Problem, leaves: tuple[Tensor, Tensor, Tensor], **arguments: Any) -> Tensor:
    hidden, weight, bias = leaves
    teacher_hidden = p.teacher_hidden[: arguments.get("teacher_rows")]
    return linear_kd_loss(
        hidden,
        weight,
        teacher_hidden,
        p.teacher_weight,
        p.target,
        student_bias=bias,
        teacher_bias=p.teacher_bias,
        **arguments,
    )


def capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    return logits * scale if softcap is None else softcap * torch.tanh(logits * scale / softcap)


def head_of(side: int, logit_scale: Any = 1.0, softcap: Any = None) -> tuple[float, float | None]:
    """The scale and the soft cap of the student (0) or the teacher (1)."""
    return (
        logit_scale[side] if isinstance(logit_scale, tuple) else logit_scale,
        softcap[side] if isinstance(softcap, tuple) else softcap,
    )


def total(loss: Tensor) -> Tensor:
    """The loss; without a reduction, a sum in which every row has another factor."""
    return loss if loss.dim() == 0 else (loss * torch.linspace(-1, 2, len(loss), dtype=loss.dtype)).sum()


def expected(p: Problem, **arguments: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and the gradients by hidden, weight and bias from (N, C) logits in float64."""
    exact = tuple(tensor.double() for tensor in p[:6])
    leaves = tuple(tensor.requires_grad_() for tensor in exact[:3])
    head = {name: arguments.pop(name) for name in ("logit_scale", "softcap") if name in arguments}
    teacher = capped(F.linear(*exact[3:6])[: arguments.get("teacher_rows")], *head_of(1, **head))
    loss = reference.kd_loss(capped(F.linear(*leaves), *head_of(0, **head)), teacher, p.target, **arguments)
    return loss.detach(), torch.autograd.grad(total(loss), leaves)


# Of the largest entry. A 16-bit logit carries a relative 2^-9 or 2^-12, some logits are near 10.
ACCURACY = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def assert_close(actual: Tensor, wanted: Tensor, accuracy: float, what: str) -> None:
    scale = wanted.abs().max().clamp(min=1e-30)
    error = ((actual.double() - wanted).abs().max() / scale).item()
    assert error <= accuracy, f"{what} is off by {error:.2e} of its largest entry; allowed {accuracy:.0e}"


def assert_matches(p: Problem, accuracy: float, **arguments: Any) -> None:
    leaves = p.student()
    chunk_rows = arguments.pop("chunk_rows", None)
    loss = ours(p, leaves, chunk_rows=chunk_rows, **arguments)
    gradients = torch.autograd.grad(total(loss), leaves)
    arguments.pop("grad_scale", None)
    wanted_loss, wanted = expected(p, **arguments)
    assert loss.shape == wanted_loss.shape and loss.dtype == reference.compute_dtype(p.hidden, p.teacher_hidden)
    assert_close(loss.detach(), wanted_loss, accuracy, "loss")
    for name, leaf, gradient, exact in zip(("hidden", "weight", "bias"), leaves, gradients, wanted, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape and gradient.device == leaf.device
        assert_close(gradient, exact, accuracy, f"gradient of {name}")


# --- Values

ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "sum": {"reduction": "sum"},
    "revised at 1": {"revise_temperature": 1.0},
    "elementmean": {"reduction": "elementmean"},
    "mask": {"selected": torch.arange(23) % 3 > 0},
    "weights": {"selected": torch.linspace(0, 1, 23)},
    "nothing selected": {"selected": torch.zeros(23, dtype=torch.bool)},
    "prefix of 0": {"teacher_rows": 0},
    "prefix ends inside a chunk": {"teacher_rows": 11},
    "prefix ends with a chunk": {"teacher_rows": 14},
    "hyperparameters": {"temperature": 2.5, "revise": None, "label_smoothing": 0.1, "ce_weight_unselected": 0.0},
    "no KD": {"kd_weight": 0.0, "ce_weight": 1.0},
    "no CE": {"ce_weight": 0.0, "ce_weight_unselected": 0.0},
    "num_valid": {"num_valid": 9.0},
    "num_valid tensor": {"num_valid": torch.tensor(9), "reduction": "elementmean"},
    "ignore_index": {"ignore_index": 5},
    "temperatures": {"temperature": (1.0, 4.0)},
    "class weights": {"class_weight": torch.linspace(0.5, 2.0, 37)},
    "class weights, sum": {"class_weight": torch.linspace(0.5, 2.0, 37), "reduction": "sum"},
    "weight_sum": {"class_weight": torch.linspace(0.5, 2.0, 37), "weight_sum": 30.0},
    "standardize": {"standardize": True},
    "mft": {"revise": "mft"},
    "scale": {"logit_scale": 0.25},
    "soft cap": {"softcap": 3.0, "teacher_rows": 11},
    "soft cap of the student": {
        "softcap": (2.0, None),
        "logit_scale": (1.5, 0.5),
        "selected": torch.arange(23) % 2 > 0,
    },
    "by row": {"reduction": "none"},
    "by row, class weights": {"reduction": "none", "class_weight": torch.linspace(0.5, 2.0, 37), "revise": "swap"},
    "by row, prefix, soft cap": {"reduction": "none", "teacher_rows": 11, "softcap": (3.0, 5.0), "logit_scale": 0.5},
    **{name: {"divergence": name} for name in NAMES if name != "kl"},
}


@pytest.mark.parametrize("chunk_rows", [1, 7, 23, 100, None])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_matches_materialised_logits(case: str, chunk_rows: int | None) -> None:
    """One row at a time, a ragged last chunk (23 = 3 * 7 + 2), one chunk, more than there are rows, the default."""
    p = problem()
    if case == "ignore_index":
        p = p._replace(target=p.target.clamp(min=5))
    assert_matches(p, ACCURACY[torch.float64], chunk_rows=chunk_rows, **ARGUMENTS[case])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_rows", [7, None])
def test_matches_materialised_logits_in_lower_precision(dtype: torch.dtype, chunk_rows: int | None) -> None:
    for arguments in (
        {},
        {"reduction": "sum"},
        {"reduction": "elementmean"},
        {"teacher_rows": 11},
        {"grad_scale": 4.0},
        {"reduction": "none"},
        {"softcap": 20.0, "logit_scale": 0.5},
    ):
        assert_matches(problem(dtype=dtype), ACCURACY[dtype], chunk_rows=chunk_rows, **arguments)


def test_student_and_teacher_may_differ_in_dtype() -> None:
    p = problem(dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        mixed = p._replace(**{name: getattr(p, name).to(dtype) for name in p._fields if name.startswith("teacher")})
        assert_matches(mixed, ACCURACY[torch.bfloat16], chunk_rows=7)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_sequences(index: torch.dtype) -> None:
    """(B, T, d) hidden states, (B, T) targets and selections, a prefix of whole sequences."""
    p = problem(rows=24)
    hidden, weight, bias = p.student()
    target = p.target.view(4, 6).to(index)
    selected = torch.arange(24).view(4, 6) % 3 > 0
    common: dict[str, Any] = {"student_bias": bias, "teacher_bias": p.teacher_bias, "chunk_rows": 5}
    for teacher, given, flat in (
        (p.teacher_hidden.view(4, 6, 11), {"selected": selected}, {"selected": selected.flatten()}),
        (p.teacher_hidden.view(4, 6, 11), {"selected": selected.flatten()}, {"selected": selected.flatten()}),
        (p.teacher_hidden.view(4, 6, 11)[:2], {"teacher_rows": 12}, {"teacher_rows": 12}),
        (p.teacher_hidden[:9], {"teacher_rows": 9}, {"teacher_rows": 9}),
        (p.teacher_hidden, {"selected": selected}, {"selected": selected.flatten()}),
    ):
        loss = linear_kd_loss(hidden.view(4, 6, 13), weight, teacher, p.teacher_weight, target, **common, **given)
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        wanted_loss, wanted = expected(p, **flat)
        torch.testing.assert_close(loss.detach(), wanted_loss)
        torch.testing.assert_close(gradients, wanted)


def test_any_strides() -> None:
    p = problem()
    hidden, weight, bias = p.student()
    inputs = (
        hidden.t().contiguous().t(),
        torch.cat([weight, weight], dim=1)[:, : weight.shape[1]],
        torch.stack([bias, bias], dim=1)[:, 0],
    )
    strided = p._replace(
        teacher_hidden=p.teacher_hidden.t().contiguous().t(),
        teacher_weight=torch.cat([p.teacher_weight] * 2, dim=1)[:, :11],
        target=torch.stack([p.target] * 2, dim=1)[:, 0],
    )
    loss = ours(strided, inputs, chunk_rows=7)
    wanted_loss, wanted = expected(p)
    torch.testing.assert_close(loss.detach(), wanted_loss)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight, bias)), wanted)


def test_biases_are_optional() -> None:
    p = problem()
    none = torch.zeros_like(p.bias)
    wanted_loss, wanted = expected(p._replace(bias=none, teacher_bias=none))
    hidden, weight, _ = p.student()
    loss = linear_kd_loss(hidden, weight, p.teacher_hidden, p.teacher_weight, p.target, chunk_rows=7)
    torch.testing.assert_close(loss.detach(), wanted_loss)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), wanted[:2])


def test_signature_extends_that_of_kd_loss() -> None:
    """Every keyword of kd_loss is here with the same default."""
    here = inspect.signature(linear_kd_loss).parameters
    for name, parameter in inspect.signature(kd_loss).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert here[name].default == parameter.default, name
            assert here[name].kind is inspect.Parameter.KEYWORD_ONLY


# --- Rows that are not read


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_rows_may_hold_nan_or_inf(poison: float) -> None:
    """0 * NaN is NaN: a zero logit gradient alone would not keep a masked row out of the weight gradient."""
    clean = problem()
    selected = torch.arange(23) % 3 > 0
    for arguments in (
        {"selected": selected},
        {"selected": selected, "ce_weight_unselected": 0.0},
        {"selected": selected.double(), "ce_weight_unselected": 0.0},
        {"teacher_rows": 14, "ce_weight_unselected": 0.0},
        {"kd_weight": 0.0, "selected": selected},
        {"selected": selected, "softcap": 3.0, "logit_scale": 0.5},
        {"selected": selected, "ce_weight_unselected": 0.0, "reduction": "none", "softcap": 3.0},
    ):
        kept = torch.arange(23) < 14 if "teacher_rows" in arguments else selected
        p = clean._replace(hidden=clean.hidden.clone(), teacher_hidden=clean.teacher_hidden.clone())
        p.hidden[p.target == -100] = poison
        p.teacher_hidden[(p.target == -100) | ~kept] = poison
        if arguments.get("ce_weight_unselected") == 0.0:
            p.hidden[~kept] = poison
        leaves = p.student()
        loss = ours(p, leaves, chunk_rows=7, **arguments)
        gradients = torch.autograd.grad(total(loss), leaves)
        wanted_loss, wanted = expected(clean, **arguments)
        torch.testing.assert_close(loss.detach(), wanted_loss)
        torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_valid_row_and_no_row(dtype: torch.dtype) -> None:
    p = problem(dtype=dtype)
    for empty in (
        p._replace(target=torch.full_like(p.target, -100)),
        p._replace(hidden=p.hidden[:0], teacher_hidden=p.teacher_hidden[:0], target=p.target[:0]),
    ):
        for reduction in ("mean", "sum", "elementmean", "none"):
            leaves = empty.student()
            loss = ours(empty, leaves, reduction=reduction)
            assert loss.shape == (empty.target.shape if reduction == "none" else ()) and not loss.any()
            for leaf, gradient in zip(leaves, torch.autograd.grad(total(loss), leaves), strict=True):
                assert gradient.shape == leaf.shape and not gradient.any()


# --- Precision


def test_float32_accumulation_of_a_bfloat16_weight_gradient() -> None:
    """64 chunks added in bfloat16 lose what float32 keeps. Exact: the very bfloat16 logit gradients, in float64."""
    rows, chunk = 512, 8
    p = problem(rows, width=32, classes=50, dtype=torch.bfloat16)
    hidden, weight, bias = p.student()
    logits = F.linear(hidden, weight, bias).detach().requires_grad_()
    teacher = F.linear(p.teacher_hidden, p.teacher_weight, p.teacher_bias)
    (g,) = torch.autograd.grad(kd_loss(logits, teacher, p.target), logits)
    exact = (g.double().t() @ hidden.detach().double(), g.double().sum(0))
    rounded = torch.zeros_like(weight), torch.zeros_like(bias)
    for g_chunk, x in zip(g.split(chunk), hidden.detach().split(chunk), strict=True):
        rounded[0].add_(g_chunk.t() @ x)
        rounded[1].add_(g_chunk.sum(0))

    h, w, b = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight, bias))
    leaves = (h, w, b)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(p, leaves, chunk_rows=chunk)
    wide = torch.autograd.grad(loss, leaves)[1:]
    narrow = torch.autograd.grad(ours(p, (hidden, weight, bias), chunk_rows=chunk), (weight, bias))
    for accumulated, returned, lost, wanted in zip(wide, narrow, rounded, exact, strict=True):
        assert accumulated.dtype == torch.float32 and returned.dtype == torch.bfloat16

        def error(actual: Tensor, wanted: Tensor = wanted) -> float:
            return float((actual.double() - wanted).norm() / wanted.norm())

        assert error(accumulated) < 0.2 * error(lost)
        assert error(returned) < 0.5 * error(lost)
        # Returned in bfloat16: rounded once more, by at most half an ulp.
        torch.testing.assert_close(returned.float(), accumulated, rtol=2**-8, atol=0)


def test_float16_gradients_do_not_underflow() -> None:
    """The logit gradients of a mean over 2^22 rows are below float16's smallest number; their products need not be."""
    p = problem(dtype=torch.float16)
    for reduction in ("mean", "elementmean"):
        for grad_scale in (None, 2.0**20):
            leaves = p.student()
            loss = ours(p, leaves, num_valid=2**22, reduction=reduction, grad_scale=grad_scale, chunk_rows=7)
            gradients = torch.autograd.grad(loss, leaves, torch.tensor(2.0**20))
            _, wanted = expected(p, num_valid=2**22, reduction=reduction)
            for gradient, exact in zip(gradients, wanted, strict=True):
                assert_close(gradient, exact * 2**20, ACCURACY[torch.float16], f"{reduction}, {grad_scale}")
    leaves = p.student()
    factor = torch.full((23,), 2.0**-20)
    gradients = torch.autograd.grad(2.0**20 * (ours(p, leaves, reduction="none", chunk_rows=7) * factor).sum(), leaves)
    for gradient, exact in zip(gradients, expected(p, reduction="sum")[1], strict=True):
        assert_close(gradient, exact, ACCURACY[torch.float16], "by row")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """As F.linear and kd_loss under autocast, with gradients in the parameters' float32."""
    p = problem(dtype=torch.float32)
    leaves = p.student()
    with torch.autocast("cpu", dtype):
        loss = ours(p, leaves, chunk_rows=7)
        materialised = kd_loss(
            F.linear(*leaves), F.linear(p.teacher_hidden, p.teacher_weight, p.teacher_bias), p.target
        )
    gradients = torch.autograd.grad(loss, leaves)
    assert loss.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in gradients)
    torch.testing.assert_close(loss, materialised, rtol=1e-5, atol=0)
    for gradient, wanted in zip(gradients, torch.autograd.grad(materialised, leaves), strict=True):
        assert_close(gradient, wanted.double(), ACCURACY[dtype], "gradient")
    with torch.autocast("cpu", dtype):  # a float32 head on a bfloat16 network, as nn.Linear takes it
        assert torch.equal(ours(p, (leaves[0].to(dtype), *leaves[1:]), chunk_rows=7), loss)


def _refusing(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.mm or torch.addmm with CUDA's rule for out_dtype: the matrices' own type, or float32 from 16 bits."""

    def multiply(*tensors: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return product(*tensors) if out is None else product(*tensors, out=out)
        first = tensors[-2].dtype
        if first != tensors[-1].dtype:
            raise RuntimeError(f"expected matrices of one dtype; got {first} and {tensors[-1].dtype}")
        if out_dtype != first and not (out_dtype == torch.float32 and first in (torch.float16, torch.bfloat16)):
            raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
        if out is not None and out.dtype != out_dtype:
            raise RuntimeError(f"out must be {out_dtype}; got {out.dtype}")
        with torch.autocast("cpu", enabled=False):
            result = product(*(tensor.to(out_dtype) for tensor in tensors))
        return result if out is None else out.copy_(result)

    return multiply


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("weight", FLOATS, ids=str)
@pytest.mark.parametrize("hidden", FLOATS, ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "as on CUDA"])
def test_autocast_over_any_dtypes(
    cuda: bool, autocast: torch.dtype, hidden: torch.dtype, weight: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's dtypes are the student's swapped. Values against float64 logits of the same rounded inputs."""
    if cuda:
        monkeypatch.setattr(torch, "mm", _refusing(torch.mm))
        monkeypatch.setattr(torch, "addmm", _refusing(torch.addmm))
        monkeypatch.setattr(linear, "_multiplies_into_float32", lambda tensor: tensor.dtype != torch.float64)
    p = problem()
    dtypes = (hidden, weight, weight, weight, hidden, hidden)
    p = Problem._make([*(tensor.to(dtype) for tensor, dtype in zip(p[:6], dtypes, strict=True)), p.target])
    leaves = p.student()
    with torch.autocast("cpu", autocast):
        loss = ours(p, leaves, chunk_rows=7)
    gradients = torch.autograd.grad(loss, leaves)
    wanted_loss, wanted = expected(p)
    accuracy = max(ACCURACY[dtype] for dtype in (autocast, hidden, weight))
    assert_close(loss.detach(), wanted_loss, accuracy, "loss")
    for leaf, gradient, exact in zip(leaves, gradients, wanted, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_close(gradient, exact, accuracy, "gradient")


@pytest.mark.parametrize("reduction", ["mean", "sum", "elementmean"])
@pytest.mark.parametrize("divergence", ["mse_probs", "mse_logits"])
def test_float16_gradients_of_means_over_classes_do_not_underflow(divergence: str, reduction: str) -> None:
    """Both divide by the number of classes; for 1000 classes the gradients of mse_probs are subnormal in float16."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(64, 32, generator=generator) for _ in range(2))
    weight, teacher_weight = (0.1 * torch.randn(1000, 32, generator=generator) for _ in range(2))
    target = torch.randint(1000, (64,), generator=generator)
    inputs = [x.half() for x in (hidden, weight, teacher_hidden, teacher_weight)]
    found = []
    for dtype in (torch.float16, torch.float64):
        given = [x.to(dtype) for x in inputs]
        leaves = [given[0].requires_grad_(), given[1].requires_grad_()]
        options: dict[str, Any] = {
            "divergence": divergence,
            "ce_weight": 0.0,
            "reduction": reduction,
            "revise_temperature": None,
        }
        loss = linear_kd_loss(given[0], given[1], given[2], given[3], target, **options)
        grad_output = torch.tensor({"sum": 1024.0, "mean": 65536.0, "elementmean": 2.0**26}[reduction])
        found.append(torch.autograd.grad(loss, leaves, grad_output.to(loss.dtype)))
    for got, want in zip(*found, strict=True):
        assert (got.double() - want).norm() <= 0.01 * want.norm()
        assert (got == 0).float().mean() < 0.05


def test_float16_hidden_under_bfloat16_autocast_does_not_underflow() -> None:
    """The gradient of hidden is kept in float16, whatever the logits' dtype: it is divided in backward."""
    p = problem(dtype=torch.float16)
    leaves = p.student()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(p, leaves, num_valid=2**22, chunk_rows=7)
    gradients = torch.autograd.grad(loss, leaves, torch.tensor(2.0**20))
    _, wanted = expected(p, num_valid=2**22)
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert_close(gradient, exact * 2**20, ACCURACY[torch.bfloat16], "gradient")


# --- Autograd


@pytest.mark.parametrize("reduction", ["mean", "sum", "elementmean", "none"])
def test_gradcheck(reduction: str) -> None:
    p = problem(rows=6, width=3, classes=5)
    selected = torch.tensor([1.0, 0.0, 0.3, 1.0, 0.5, 1.0])

    def loss(*leaves: Tensor) -> Tensor:
        return ours(p, leaves, selected=selected, reduction=reduction, softcap=4.0, chunk_rows=4)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, p.student())
    assert torch.autograd.gradgradcheck(loss, p.student())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_scale", [None, 8.0])
def test_gradients_survive_a_kept_graph(grad_scale: float | None, dtype: torch.dtype) -> None:
    """The saved gradients may be scaled in place only if backward runs once."""
    p = problem(dtype=dtype)
    leaves = p.student()
    loss = ours(p, leaves, grad_scale=grad_scale, chunk_rows=7)
    results = []
    for factor in (1.0, 0.0, 2.0):
        given = torch.full_like(loss, factor)
        found = torch.autograd.grad(loss, leaves, given, retain_graph=True)
        results.append((factor, found, [tensor.clone() for tensor in found]))
    loss.backward()
    for factor, found, copies in results:
        for leaf, gradient, copied in zip(leaves, found, copies, strict=True):
            assert torch.equal(gradient, copied), "a later call changed an earlier result"
            assert leaf.grad is not None
            torch.testing.assert_close(gradient, factor * leaf.grad, rtol=1e-2, atol=1e-6)
    with pytest.raises(RuntimeError, match="second time|retain_graph"):
        loss.backward()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_that_are_wanted(wanted: tuple[int, ...]) -> None:
    """A frozen head, a frozen body, a bias alone: gradients of frozen tensors are neither returned nor computed."""
    p = problem()
    _, exact = expected(p)
    leaves = p.student()
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index in wanted)
    with Memory() as memory:
        loss = ours(p, leaves, chunk_rows=7)
        loss.backward()
    for index, leaf in enumerate(leaves):
        if index in wanted:
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, exact[index])
        else:
            assert leaf.grad is None
    # Of the chunks' products: two of logits each, then one for hidden and one for the weight.
    products = sum(count for name, count in memory.calls.items() if "mm" in name)
    assert products == 4 * (2 + (0 in wanted) + (1 in wanted))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    p = problem()
    leaves = p.student()
    with mode(), Memory() as memory:
        loss = ours(p, leaves, chunk_rows=7)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.clone(), expected(p)[0])
    assert sum(count for name, count in memory.calls.items() if "mm" in name) == 4 * 2
    assert torch.equal(ours(p, p[:3], chunk_rows=7), loss)


def test_the_teacher_gets_no_gradient() -> None:
    p = problem()
    teacher = tuple(tensor.clone().requires_grad_() for tensor in p[3:6])
    leaves = p.student()
    ours(Problem._make([*p[:3], *teacher, p.target]), leaves, chunk_rows=7).backward()
    assert all(tensor.grad is None for tensor in teacher)
    assert all(leaf.grad is not None for leaf in leaves)
    assert not ours(Problem._make([*p[:3], *teacher, p.target]), p[:3]).requires_grad


def test_gradient_reaches_the_producer_of_the_hidden_states() -> None:
    p = problem()
    hidden, weight, bias = p.student()
    tanh = hidden.tanh()
    loss = 3.0 * ours(p, (tanh, weight, bias), chunk_rows=7)
    exact = hidden.detach().requires_grad_()
    logits = F.linear(exact.tanh(), weight, bias)
    teacher = F.linear(p.teacher_hidden, p.teacher_weight, p.teacher_bias)
    materialised = 3.0 * reference.kd_loss(logits, teacher, p.target)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(materialised, exact))


def test_inference_tensors_of_a_teacher() -> None:
    p = problem()
    with torch.inference_mode():
        inferred = p._replace(teacher_hidden=p.teacher_hidden * 1.0)
    leaves = p.student()
    gradients = torch.autograd.grad(ours(inferred, leaves, chunk_rows=7), leaves)
    torch.testing.assert_close(gradients, expected(p)[1])


Derivatives = dict[str, tuple[Tensor, ...]]


def derivatives(loss: Callable[..., Tensor], leaves: tuple[Tensor, Tensor, Tensor]) -> Derivatives:
    """Derivatives of loss(hidden, weight, bias) beyond plain backward, in every mode of PyTorch."""
    generator = torch.Generator().manual_seed(0)
    directions = tuple(torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves)
    grad_output = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(loss(*leaves), leaves, grad_output, create_graph=True)
    penalty = sum((gradient.square().sum() for gradient in first), torch.zeros((), dtype=torch.float64))
    results: Derivatives = {
        "first": first,
        "second": torch.autograd.grad(penalty, (*leaves, grad_output), retain_graph=True),
        "hvp": torch.autograd.functional.hvp(loss, leaves, directions)[1],
        "vhp": torch.autograd.functional.vhp(loss, leaves, directions)[1],
        "torch.func": torch.func.grad(loss, argnums=(0, 1, 2))(*leaves),
        "torch.func.jvp": torch.func.jvp(loss, leaves, directions),
    }
    several = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    for keep in (True, False):
        results[f"batched, {keep}"] = torch.autograd.grad(
            loss(*leaves), leaves, several, is_grads_batched=True, retain_graph=keep
        )
    with forward_ad.dual_level():
        made = loss(*(forward_ad.make_dual(leaf.detach(), d) for leaf, d in zip(leaves, directions, strict=True)))
        results["tangent"] = (forward_ad.unpack_dual(made).tangent,)
        dual = forward_ad.make_dual(torch.ones_like(several[0]), several[2])
        found = torch.autograd.grad(loss(*leaves), leaves, dual)
        results["tangents of gradients"] = tuple(forward_ad.unpack_dual(gradient).tangent for gradient in found)
    penalty.backward()
    results["backward"] = tuple(leaf.grad for leaf in leaves if leaf.grad is not None)
    return results


@pytest.mark.parametrize("reduction", ["mean", "sum", "elementmean", "none"])
def test_derivatives_beyond_the_first(reduction: str) -> None:
    p = problem(rows=6, width=3, classes=5, teacher_width=2)
    options: dict[str, Any] = dict(reduction=reduction, label_smoothing=0.1, divergence="dkd", revise="mft")
    options |= dict(selected=torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 0.0]), class_weight=torch.linspace(0.5, 1.5, 5))
    teacher = capped(F.linear(p.teacher_hidden, p.teacher_weight, p.teacher_bias), 0.5, 4.0)

    def chunked(*leaves: Tensor) -> Tensor:
        return total(ours(p, leaves, chunk_rows=4, softcap=4.0, logit_scale=0.5, **options))  # type: ignore[arg-type]

    def materialised(*leaves: Tensor) -> Tensor:
        return total(reference.kd_loss(capped(F.linear(*leaves), 0.5, 4.0), teacher, p.target, **options))

    torch.testing.assert_close(derivatives(chunked, p.student()), derivatives(materialised, p.student()))


def test_second_derivatives_after_an_in_place_change_are_refused() -> None:
    """The teacher may be overwritten before backward; a second derivative from it is refused."""
    p = problem()
    for mode in (contextlib.nullcontext, torch.inference_mode):
        with mode():
            changing = p._replace(teacher_hidden=p.teacher_hidden * 1.0)
        leaves = p.student()
        loss = ours(changing, leaves, chunk_rows=7)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves, create_graph=True), expected(p)[1])
        with mode():
            changing.teacher_hidden.mul_(2.0)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves, retain_graph=True), expected(p)[1])
        with pytest.raises(RuntimeError, match=r"linear_kd_loss: teacher_hidden.* changed in place.*clone"):
            torch.autograd.grad(loss, leaves, create_graph=True)


def test_losses_of_rows_after_an_in_place_change_are_refused() -> None:
    """Backward computes the logits again, from inputs that must be the same."""
    p = problem()
    for mode in (contextlib.nullcontext, torch.inference_mode):
        with mode():
            changing = p._replace(teacher_hidden=p.teacher_hidden * 1.0)
        leaves = p.student()
        loss = total(ours(changing, leaves, chunk_rows=7, reduction="none"))
        torch.testing.assert_close(
            torch.autograd.grad(loss, leaves, retain_graph=True), expected(p, reduction="none")[1]
        )
        with mode():
            changing.teacher_hidden.mul_(2.0)
        with pytest.raises(RuntimeError, match=r"linear_kd_loss: teacher_hidden.* changed in place.*clone"):
            torch.autograd.grad(loss, leaves)


def test_derivatives_with_nan_in_masked_rows() -> None:
    p = problem(rows=6, width=3, classes=5)
    p.hidden[3:5] = torch.nan  # the ignored ones
    leaves = p.student()
    first = torch.autograd.grad(ours(p, leaves), leaves, create_graph=True)
    for gradient in torch.autograd.grad(first[1].square().sum(), leaves):
        assert gradient.isfinite().all()


def test_checkpointing_recomputes_the_same_gradient() -> None:
    from torch.utils.checkpoint import checkpoint

    p = problem()
    leaves = p.student()
    plain = torch.autograd.grad(ours(p, leaves, chunk_rows=7), leaves)
    again = checkpoint(lambda *given: ours(p, given, chunk_rows=7), *leaves, use_reentrant=False)
    for first, second in zip(plain, torch.autograd.grad(again, leaves), strict=True):
        assert torch.equal(first, second)


def test_same_input_same_bits() -> None:
    p = problem(rows=200, width=64, classes=300, dtype=torch.float32)
    runs = []
    for _ in range(2):
        leaves = p.student()
        loss = ours(p, leaves, chunk_rows=64)
        runs.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


# --- Memory


class Memory(TorchDispatchMode):
    """Watches every operator: the largest tensor made, the bytes of new storage alive at once, how often each ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.peak = 0
        self.calls: dict[str, int] = {}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        result = func(*args, **kwargs)
        name = func._schema.name
        self.calls[name] = self.calls.get(name, 0) + 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_more_than_chunks_of_logits(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Two chunks (student's, then gradient; teacher's; a third for the soft cap's derivative), the results, and what
    blocks of a 16-bit product take."""
    rows, width, classes, chunk = 512, 4, 3000, 64
    p = problem(rows, width, classes, dtype)
    leaves = p.student()
    with Memory() as memory:
        ours(p, leaves, chunk_rows=chunk, **options).sum().backward()
    assert memory.largest == chunk * classes
    results = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    # A 16-bit weight gradient is accumulated in float32; on the CPU float16 products are made from float32 copies.
    extra = 4 * (leaves[1].numel() + leaves[2].numel()) if dtype != torch.float32 else 0
    extra += 2 * 4 * chunk * classes if dtype == torch.float16 else 0
    small = 64 * rows + 16 * (chunk + classes) * width
    chunks = 3 if "softcap" in options else 2
    assert memory.peak <= chunks * chunk * classes * dtype.itemsize + results + extra + small

    with Memory() as materialised:
        teacher = F.linear(p.teacher_hidden, p.teacher_weight, p.teacher_bias)
        kd_loss(F.linear(*leaves), teacher, p.target).backward()
    assert materialised.largest == rows * classes
    assert memory.peak < 0.25 * materialised.peak


def test_chunks_without_gradient_are_two() -> None:
    rows, classes, chunk = 1024, 300, 64
    p = problem(rows, 8, classes, torch.float32)
    leaves = p.student()
    with Memory() as memory, torch.no_grad():
        ours(p, leaves, chunk_rows=chunk)
    assert memory.peak <= 2 * chunk * classes * 4 + 16 * rows


def test_a_prefix_and_a_kd_weight_of_0_save_the_teachers_products() -> None:
    p = problem()
    with Memory() as memory, torch.no_grad():
        ours(p, p[:3], teacher_rows=8, chunk_rows=7)
    assert sum(count for name, count in memory.calls.items() if "mm" in name) == 4 + 2
    with Memory() as memory, torch.no_grad():
        ours(p, p[:3], kd_weight=0.0, chunk_rows=7)
    assert sum(count for name, count in memory.calls.items() if "mm" in name) == 4


def test_default_chunk_rows() -> None:
    for device, limit in (("cpu", 64 << 20), ("cuda", 256 << 20)):
        check_default_chunk_rows(device, limit)
    assert default_chunk_rows(2048, 32000, 8, "cuda") == 1024
    assert default_chunk_rows(2048, 32000, 8, "cpu") == 256
    assert default_chunk_rows(8192, 128256, 4, "cuda") == 512
    assert default_chunk_rows(1100, 32000, 8, "cuda") == 576  # not 1024 and a stub of 76


def check_default_chunk_rows(device: str, limit: int) -> None:
    for rows in (0, 1, 63, 64, 65, 1000, 8192, 100_000):
        for classes in (1, 100, 32000, 128256, 1_000_000):
            for size in (4, 8):
                chunk = default_chunk_rows(rows, classes, size, device)
                assert 1 <= chunk <= max(rows, 1)
                assert chunk * classes * size <= max(limit, 64 * classes * size)
                assert chunk == rows or chunk % 64 == 0 or rows == 0
                # No more chunks than the largest allowed ones would need.
                largest = max(64, limit // (classes * size) // 64 * 64)
                assert -(-rows // chunk) == -(-rows // largest)


# --- torch.compile


def test_opcheck() -> None:
    p = problem()
    for dtype in (torch.float64, torch.bfloat16):
        head = [tensor.to(dtype) for tensor in p[:3]]
        teacher = [p.teacher_hidden[:11], p.teacher_weight, None]
        numbers = [[4.0], 0.1, 0.9, 1.0, 0.8, 1.0, 0.0, 1, 1, -100, 0, [0.0, 0.0, 0.0], False]
        for wanted in ([True, True, True], [True, False, False], [False, False, False]):
            arguments: list[Any] = [*head, *teacher, p.target, None, None, torch.tensor(21), None, None]
            arguments += [dtype, torch.float64, 7, [1.0, 3.0, 0.5, 0.0]]
            torch.library.opcheck(torch.ops.lrds_fast.linear_kd_loss_forward.default, (*arguments, *numbers, *wanted))


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_fullgraph(backend: str, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    p = problem(dtype=torch.float32)
    selected = torch.arange(23) % 3 > 0

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 3.0 * ours(p, (2.0 * hidden, weight, bias), selected=selected, chunk_rows=7, **options)

    leaves = p.student()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(compiled(*leaves), step(*leaves))
        torch.testing.assert_close(
            torch.autograd.grad(total(compiled(*leaves)), leaves), torch.autograd.grad(total(step(*leaves)), leaves)
        )
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), step(*leaves))


def test_compiles_any_number_of_rows_in_one_graph() -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(linear_kd_loss, fullgraph=True, dynamic=True, backend=count)
    first = 0
    for rows in (23, 24, 40, 100):
        p = problem(rows=rows, dtype=torch.float32)
        hidden, weight, _ = p.student()
        given = (hidden, weight, p.teacher_hidden, p.teacher_weight, p.target)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(*given), (hidden, weight)),
            torch.autograd.grad(linear_kd_loss(*given), (hidden, weight)),
        )
        # The first call may trace twice: torch tries float arguments as symbols, then as constants.
        first = first or len(graphs)
    assert len(graphs) == first


def test_compiles_under_autocast() -> None:
    torch.compiler.reset()
    p = problem(dtype=torch.float32)
    leaves = p.student()

    def step(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours(p, given, chunk_rows=7)  # type: ignore[arg-type]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(step(*leaves), leaves)
    )


# --- Errors


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"student_hidden": torch.ones(13)}, ValueError, r"student_hidden must have shape \(\.\.\., d\).*\(13,\)"),
        ({"student_hidden": [1.0]}, TypeError, "student_hidden must be a Tensor.*list"),
        ({"student_hidden": torch.ones(23, 13).int()}, TypeError, "student_hidden must be float64.*int32"),
        ({"student_hidden": torch.ones(23, 13)}, TypeError, "student_weight must be torch.float32.*torch.float64"),
        (
            {"student_weight": torch.ones(37, 12).double()},
            ValueError,
            r"student_weight must have 13 columns.*\(37, 12\)",
        ),
        ({"student_weight": torch.ones(13).double()}, ValueError, r"student_weight must have shape \(C, d\).*\(13,\)"),
        ({"student_bias": torch.ones(36).double()}, ValueError, r"student_bias must have shape \(37,\); got \(36,\)"),
        ({"teacher_weight": torch.ones(36, 11).double()}, ValueError, r"teacher_weight must have the student's 37.*36"),
        ({"teacher_bias": torch.ones(37)}, TypeError, "teacher_bias must be torch.float64.*torch.float32"),
        (
            {"teacher_hidden": torch.ones(24, 11).double()},
            ValueError,
            r"teacher_hidden must have a row.*got \(24, 11\)",
        ),
        ({"teacher_hidden": torch.ones(9, 11).double()}, ValueError, r"\(23, 13\); got \(9, 11\).*teacher_rows=9$"),
        ({"teacher_rows": 9}, ValueError, "teacher_rows must be the number of rows in teacher_hidden, 23 .*got 9"),
        (
            {"student_hidden": SimpleNamespace(last_hidden_state=torch.ones(2))},
            TypeError,
            r"pass its \.last_hidden_state",
        ),
        ({"tau": 2.0}, TypeError, "linear_kd_loss .*'tau': did you mean 'temperature'"),
        ({"target": torch.zeros(22).long()}, ValueError, r"target must have .*\(23,\); got \(22,\)"),
        ({"target": torch.zeros(23)}, TypeError, "target must hold int64 or int32.*float32"),
        ({"target": 4.0}, TypeError, "target must be a Tensor.*4.0"),
        ({"target": torch.full((23,), 37)}, ValueError, r"target\[0\] is 37, outside \[0, 37\)"),
        ({"selected": torch.ones(22)}, ValueError, r"selected must have .*\(23,\).*\(22,\)"),
        ({"selected": torch.ones(23).long()}, TypeError, "selected must be bool, or floating.*int64"),
        ({"selected": torch.full((23,), 1.5)}, ValueError, r"selected\[0\] is not a weight in \[0, 1\]: 1.5"),
        ({"selected": [True] * 23}, TypeError, "selected must be a Tensor.*list"),
        (
            {"target": None},
            ValueError,
            r"target is None, and these .*ce_weight=0.1 \(pass 0\), revise='lr' \(pass None",
        ),
        ({"classes": "cut"}, ValueError, "classes must be 'equal' or 'truncate'; got 'cut'"),
        ({"classes": "truncate", "teacher_weight": [1.0]}, TypeError, "teacher_weight must be a Tensor.*list"),
        ({"softcap": -1.0}, ValueError, "softcap must be finite and > 0; got -1.0"),
        (
            {"softcap": (1.0, 2.0, 3.0)},
            ValueError,
            r"softcap must be a number > 0 or None, or a pair .*\(1.0, 2.0, 3.0",
        ),
        ({"logit_scale": (1.0, "x")}, TypeError, "logit_scale must be a number; got 'x'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of.*'max'"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be >= 1; got 0"),
        ({"chunk_rows": 2.0}, TypeError, "chunk_rows must be an int or None; got 2.0"),
        ({"chunk_rows": True}, TypeError, "chunk_rows must be an int or None; got True"),
        ({"eta": 1.0}, ValueError, "eta must be inside"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"num_valid": -1.0}, ValueError, "num_valid must be finite and >= 0"),
        ({"grad_scale": 0.0}, ValueError, "grad_scale must be finite and > 0"),
    ],
)
def test_errors_name_the_argument(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    p = problem()
    given: dict[str, Any] = {
        "student_hidden": p.hidden,
        "student_weight": p.weight,
        "teacher_hidden": p.teacher_hidden,
        "teacher_weight": p.teacher_weight,
        "target": p.target,
    }
    with pytest.raises(error, match=message):
        linear_kd_loss(**given | changed)


def test_errors_give_the_row_of_the_batch() -> None:
    """The row counts from the start of the batch, not of the chunk."""
    p = problem()
    target = p.target.clone()
    target[17] = 40
    with pytest.raises(ValueError, match=r"target\[17\] is 40"):
        ours(p._replace(target=target), p.student(), chunk_rows=7)
    selected = torch.ones(23)
    selected[3] = float("nan")  # an ignored row: its weight is not read
    ours(p, p.student(), selected=selected, chunk_rows=7)
    selected[19] = -1.0
    with pytest.raises(ValueError, match=r"selected\[19\]"):
        ours(p, p.student(), selected=selected, chunk_rows=7)


def test_a_prefix_and_a_selection_exclude_each_other() -> None:
    p = problem()
    with pytest.raises(ValueError, match="selected must be None where teacher_rows is given"):
        ours(p, p.student(), teacher_rows=9, selected=torch.ones(23))


# --- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ACCURACY, ids=str)
@pytest.mark.parametrize("case", ARGUMENTS)
def test_cuda_matches_materialised_logits(case: str, dtype: torch.dtype) -> None:
    p = problem(dtype=dtype, device="cuda")
    arguments = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in ARGUMENTS[case].items()}
    if case == "ignore_index":
        p = p._replace(target=p.target.clamp(min=5))
    for chunk_rows in (7, None):
        assert_matches(p, max(ACCURACY[dtype], 1e-12), chunk_rows=chunk_rows, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cuda_accumulates_in_float32(dtype: torch.dtype) -> None:
    """The matrix products write float32: 64 chunks add up to what one product of all rows gives."""
    p = problem(512, 32, 50, torch.float32, device="cuda")
    found = []
    for chunk_rows in (8, 512):
        leaves = p.student()
        with torch.autocast("cuda", dtype):
            loss = ours(p, leaves, chunk_rows=chunk_rows)
        found.append(torch.autograd.grad(loss, leaves))
    for many, one in zip(*found, strict=True):
        assert many.dtype == torch.float32
        assert_close(many, one.double(), 1e-5, "gradient")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_never_waits_for_the_device(dtype: torch.dtype) -> None:
    p = problem(dtype=dtype, device="cuda")
    ours(p, p.student(), chunk_rows=7).backward()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for arguments in ({}, {"teacher_rows": 11, "ce_weight_unselected": 0.0}, {"num_valid": 9.0, "grad_scale": 2.0}):
            ours(p, p.student(), chunk_rows=7, **arguments).backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_cuda_graph_capture() -> None:
    p = problem(dtype=torch.bfloat16, device="cuda")
    leaves = p.student()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ours(p, leaves, chunk_rows=7), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wanted = [tensor.clone() for tensor in step()]
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for actual, exact in zip(captured, wanted, strict=True):
        assert torch.equal(actual, exact)


@pytest.mark.gpu
def test_cuda_peak_memory() -> None:
    """Two chunks of logits and the results, where materialised logits would take three times 512 MiB."""
    rows, width, classes, chunk = 8192, 64, 32768, 256
    p = problem(rows, width, classes, torch.bfloat16, device="cuda")
    leaves = p.student()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours(p, leaves, chunk_rows=chunk).backward()
    peak = torch.cuda.max_memory_allocated() - before
    chunks = 2 * chunk * classes * 2
    results = sum(leaf.numel() * leaf.element_size() for leaf in leaves) + 4 * (width + 1) * classes
    assert peak <= chunks + results + (64 << 20)  # cuBLAS keeps a workspace
