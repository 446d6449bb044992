"""The benchmark's baselines compute the same loss and gradient as the reference."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_matches_reference
from torch import Tensor

from benchmarks import baselines
from lrds_fast import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 2.5])
@pytest.mark.parametrize("name", ["eager", "lean_eager"])
def test_baseline_matches_reference(name: str, temperature: float, share: float | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    student = (2 * torch.randn(37, 101, generator=generator)).to(dtype)
    teacher = (3 * torch.randn(37, 101, generator=generator)).to(dtype)
    target = torch.randint(101, (37,), generator=generator)
    target[::3] = teacher[::3].argmax(dim=1)  # both right and wrong rows
    selected = None if share is None else torch.rand(37, generator=generator) < share
    objective = baselines.Objective(
        temperature=temperature, ce_weight=0.3, kd_weight=1.1, ce_weight_unselected=0.7, eta=0.6
    )

    def parts(z: Tensor, v: Tensor, y: Tensor, **_: object) -> reference.KDLossParts:
        loss = getattr(baselines, name)(z, v, y, objective, selected)
        assert loss.shape == () and loss.dtype == torch.float32
        detached = reference.kd_loss_parts(z.detach(), v, y, **arguments)
        return detached._replace(loss=loss)

    arguments: dict[str, Any] = {
        "temperature": temperature,
        "ce_weight": 0.3,
        "kd_weight": 1.1,
        "ce_weight_unselected": 0.7,
        "eta": 0.6,
        "revise_temperature": None,
        "selected": selected,
    }
    assert_matches_reference(parts, student, teacher, target, **arguments)


TRITON_CHECK = """
import torch
from benchmarks import baselines, rivals
from lrds_fast import reference

generator = torch.Generator().manual_seed(0)
for classes in (10, 300):
    student = 2 * torch.randn(6, classes, generator=generator)
    teacher = 3 * torch.randn(6, classes, generator=generator)
    target = torch.randint(classes, (6,), generator=generator)
    target[::2] = teacher[::2].argmax(dim=1)
    selected = torch.tensor([True, True, False, True, True, False])
    for mask in (None, selected):
        z = student.clone().requires_grad_()
        loss = rivals.triton_two_pass(z, teacher, target, baselines.Objective(temperature=2.5), mask)
        exact = student.double().requires_grad_()
        options = {"temperature": 2.5, "revise_temperature": None, "selected": mask}
        expected = reference.kd_loss(exact, teacher.double(), target, **options)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        gradients = (torch.autograd.grad(x, y)[0].double() for x, y in ((loss, z), (expected, exact)))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (CPU-only torch)")
def test_triton_rival_matches_reference() -> None:
    """The Triton baseline, under Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", TRITON_CHECK],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
