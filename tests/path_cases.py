"""One small case for every kernel path and type of csrc/cuda/kd_loss_plan.h, checked and timed by name.

tools/gpu_smoke.py runs each in a process of its own, tests/gpu_small_cases.py --paths all in one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kd_cases
import torch
from kd_cases import FAMILY
from test_kd_loss_family import assert_family
from tolerances import assert_matches_reference
from torch import Tensor

import lrds_fast
from lrds_fast import kd_loss_parts, reference
from lrds_fast.divergences import NAMES
from lrds_fast.functional import kd_moments

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class PathCase:
    """What to run. kind: loss, family, moments, scale or linear. timed_rows: enough to fill a large GPU."""

    kind: str
    rows: int
    classes: int
    dtype: torch.dtype = F32
    teacher_dtype: torch.dtype | None = None
    layout: str = "back to back"
    divergence: str = "kl"

    @property
    def timed_rows(self) -> int:
        return max(1, min(65536, 2**26 // self.classes))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_cases() -> dict[str, PathCase]:
    cases = {}
    # Enough rows for every block of the bulk kernel to take a second one.
    for path, rows, classes, layout in (
        ("short", 7, 10, "wide rows"),
        ("short vector", 7, 64, "back to back"),
        ("flat", 7, 10, "back to back"),
        ("warp vector", 7, 1000, "back to back"),
        ("warp element", 7, 200, "wide rows"),
        ("block vector", 7, 4096, "back to back"),
        ("block element", 7, 1001, "wide rows"),
        ("bulk, cluster 1", 150, 16385, "back to back"),
        ("bulk, clusters", 7, 128256, "back to back"),
        ("two passes", 3, 500000, "back to back"),
    ):
        for dtype in (F32, BF16, F16):
            cases[f"{path} {name_of(dtype)}"] = PathCase("loss", rows, classes, dtype, layout=layout)
    cases["block element float16 / float32"] = PathCase("loss", 7, 1000, F16, F32)
    for classes in (10, 1000, 5000):
        cases[f"double {classes}"] = PathCase("loss", 7, classes, F64)
    for divergence in NAMES[1:]:
        for dtype in (F32, BF16):
            cases[f"family {divergence} {name_of(dtype)}"] = PathCase("family", 5, 1001, dtype, divergence=divergence)
        cases[f"moments {divergence}"] = PathCase("moments", 5, 1001, divergence=divergence)
    cases["family dkd 40000"] = PathCase("family", 5, 40000, divergence="dkd")
    cases["moments kl"] = PathCase("moments", 5, 1001)
    for dtype in (F32, BF16, F16):
        cases[f"scale_gradient {name_of(dtype)}"] = PathCase("scale", 7, 1001, dtype)
        cases[f"linear_kd_loss {name_of(dtype)}"] = PathCase("linear", 70, 1000, dtype)
    return cases


CASES = make_cases()


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    return tensor if layout == "back to back" else kd_cases.strided(tensor, layout)


def check(case: PathCase, device: str, wrong: bool = False) -> None:
    """Raises AssertionError where the case differs from float64. wrong: the loss sees other logits (a self-test)."""
    if case.kind == "loss":
        student, teacher, target = kd_cases.rows(case.rows, case.classes, case.dtype, case.teacher_dtype, device=device)
        if case.rows > 5:
            target[5] = -100

        def loss(z: Tensor, *arguments: Any, **options: Any) -> Any:
            return kd_loss_parts(z * 1.01 if wrong else z, *arguments, **options)

        z, v = laid_out(student, case.layout), laid_out(teacher, case.layout)
        assert_matches_reference(loss, z, v, target)
        assert_matches_reference(loss, z, v, target, reduction="none", selected=target > case.classes // 2)
    elif case.kind == "family":
        for divergence in [known for known in FAMILY if known.name == case.divergence]:
            rows = kd_cases.family_rows(case.rows, case.classes, case.dtype)
            assert_family(*(tensor.to(device) for tensor in rows), divergence=divergence)
    elif case.kind == "moments":
        student, teacher, target = (x.to(device) for x in kd_cases.family_rows(case.rows, case.classes, case.dtype))
        z, v = (tensor.cpu().double() for tensor in (student, teacher))
        moments = kd_moments(z, v, target.cpu(), direction=v, divergence=case.divergence)
        found = kd_moments(student, teacher, target, direction=teacher, divergence=case.divergence)
        for name, wanted in moments._asdict().items():
            got = getattr(found, name).cpu().to(wanted)
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(1 + wanted.abs().max()), msg=name)
    elif case.kind == "scale":
        gradient = torch.randn(case.rows, case.classes).to(device, case.dtype)
        factor = torch.tensor(1.5, device=device)
        expected = (gradient.double() * 1.5).to(case.dtype)
        torch.testing.assert_close(torch.ops.lrds_fast.scale_gradient(gradient, factor, None), expected)
        torch.ops.lrds_fast.scale_gradient_(gradient, factor, None)
        torch.testing.assert_close(gradient, expected)
    else:
        check_linear(case, device)


def check_linear(case: PathCase, device: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device, case.dtype)

    hidden, teacher_hidden = normal(case.rows, 64), normal(case.rows, 96)
    weight, teacher_weight = normal(case.classes, 64, scale=0.2), normal(case.classes, 96, scale=0.2)
    target = torch.randint(case.classes, (case.rows,), generator=generator).to(device)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = lrds_fast.linear_kd_loss(inputs[0], inputs[1], teacher_hidden, teacher_weight, target, chunk_rows=32)
    found = torch.autograd.grad(loss, inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    teacher = teacher_hidden.double() @ teacher_weight.double().t()
    expected = reference.kd_loss(exact[0] @ exact[1].t(), teacher, target)
    # Logits of 16 bits are rounded: near 10, by 2^-8 of that.
    allowed = {F32: 1e-4, BF16: 4e-2, F16: 5e-3}[case.dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=allowed, atol=allowed)
    for got, wanted in zip(found, torch.autograd.grad(expected, exact), strict=True):
        error = ((got.double() - wanted).abs().max() / wanted.abs().max()).item()
        assert error <= allowed, f"a gradient is off by {error:.1e} of its largest entry"


def timed(case: PathCase, device: str, rows: int) -> tuple[Callable[[], object], int]:
    """A call of the case's operators with so many rows, and the bytes that it must move (0: not bound by memory)."""
    shape, size = (rows, case.classes), case.dtype.itemsize
    if case.kind == "scale":
        gradient = torch.randn(shape, device=device).to(case.dtype)
        factor = torch.tensor(1.5, device=device)
        return lambda: torch.ops.lrds_fast.scale_gradient(gradient, factor, None), 2 * gradient.numel() * size
    target = torch.randint(case.classes, (rows,), device=device)
    if case.kind == "linear":
        rows = min(rows, 8192)
        hidden = torch.randn(rows, 512, device=device).to(case.dtype).requires_grad_()
        weight = (0.05 * torch.randn(case.classes, 512, device=device)).to(case.dtype).requires_grad_()
        chosen = target[:rows]

        def linear() -> object:
            loss = lrds_fast.linear_kd_loss(hidden, weight, hidden.detach(), weight.detach(), chosen)
            return torch.autograd.grad(loss, [hidden, weight])

        return linear, 0
    student = laid_out((2.0 * torch.randn(shape, device=device)).to(case.dtype), case.layout)
    teacher_dtype = case.teacher_dtype or case.dtype
    teacher = laid_out((3.0 * torch.randn(shape, device=device)).to(teacher_dtype), case.layout)
    elements = rows * case.classes
    if case.kind == "moments":
        return lambda: kd_moments(student, teacher, target, divergence=case.divergence), 2 * elements * size
    student.requires_grad_()

    def loss() -> object:
        value = lrds_fast.kd_loss(student, teacher, target, divergence=case.divergence)
        return torch.autograd.grad(value, student)

    return loss, elements * (2 * size + teacher_dtype.itemsize)
