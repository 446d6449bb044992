"""The benchmark's baselines compute the same loss and gradient as the reference."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tolerances import assert_matches_reference
from torch import Tensor

from lrds_fast import reference


def load(name: str) -> ModuleType:
    """A module of benchmarks/, which is not installed."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


baselines = load("baselines")


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

    arguments = {
        "temperature": temperature,
        "ce_weight": 0.3,
        "kd_weight": 1.1,
        "ce_weight_unselected": 0.7,
        "eta": 0.6,
        "selected": selected,
    }
    assert_matches_reference(parts, student, teacher, target, **arguments)
