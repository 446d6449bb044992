"""Losses that take the arguments of TRL's, ModelOpt's, torchtune's and Liger's and give their numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrds_fast import kd_loss
from lrds_fast.compat import liger, modelopt, torchtune, trl

BATCH, LENGTH, CLASSES = 3, 7, 19


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher (B, T, C) and labels (B, T), a quarter of them masked."""
    generator = torch.Generator().manual_seed(0)
    z, v = (3 * torch.randn(BATCH, LENGTH, CLASSES, generator=generator, dtype=dtype) for _ in range(2))
    labels = torch.randint(CLASSES, (BATCH, LENGTH), generator=generator)
    labels.view(-1)[::4] = -100
    return z.requires_grad_(), v, labels


def assert_same(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-6, atol=1e-7)
    for mine, other in zip(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_trl(beta: float, reduction: str) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="needs trl: pip install trl")
    z, v, labels = problem()
    for options in ({}, {"temperature": 2.0}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(5)}):
        for given in (labels, None):
            arguments: dict[str, Any] = {"labels": given, "beta": beta, "reduction": reduction, **options}
            assert_same(
                trl.generalized_jsd_loss(z, v, **arguments), gkd.GKDTrainer.generalized_jsd_loss(z, v, **arguments), z
            )
    with pytest.raises(ValueError, match="reduction must be one of batchmean, mean, sum; got 'none'"):
        trl.generalized_jsd_loss(z, v, labels, reduction="none")


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_modelopt(reduction: str, temperature: float) -> None:
    distill = pytest.importorskip("modelopt.torch.distill", reason="needs ModelOpt: pip install nvidia-modelopt")
    z, v, _ = problem()
    ours, theirs = (module.LogitsDistillationLoss(temperature, reduction) for module in (modelopt, distill))
    assert_same(ours(z, v), theirs(z, v), z)
    labels = torch.arange(BATCH * LENGTH) % CLASSES
    for threshold in (0.05, 0.2, 0.7):
        ours, theirs = (module.MFTLoss(temperature, threshold, reduction) for module in (modelopt, distill))
        rows = z.flatten(0, 1), v.flatten(0, 1), labels
        expected = theirs(*rows)
        assert_same(ours(*rows), expected.sum(-1) if reduction == "none" else expected, z)


def test_modelopt_with_label_revision() -> None:
    z, v, _ = problem()
    labels = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % CLASSES
    expected = kd_loss(z, v, labels, temperature=2.0, ce_weight=0, kd_weight=1, eta=0.7, revise_temperature=None)
    torch.testing.assert_close(modelopt.LabelRevisionLoss(2.0, threshold=0.3)(z, v, labels), expected)
    with pytest.raises(ValueError, match="reduction must be one of mean, batchmean, sum, none; got 'max'"):
        modelopt.LogitsDistillationLoss(reduction="max")


def torchtune_losses() -> Any:
    """torchtune's file of losses, which needs torch alone: the package itself imports with few versions of torchao."""
    package = importlib.util.find_spec("torchtune")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs torchtune: pip install torchtune")
    path = Path(package.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("normalize", [True, False])
def test_torchtune(normalize: bool) -> None:
    modules = torchtune_losses()
    z, v, labels = problem(torch.float32)
    reverse = torchtune.LabelRevisionKDLoss(revise=None, divergence="rkl")(z, v, labels, normalize)
    assert_same(reverse, modules.ReverseKLLoss()(z, v, labels, normalize), z)
    # torchtune's forward KL is a cross-entropy: it leaves out the teacher's entropy.
    forward = torchtune.LabelRevisionKDLoss(revise=None)(z, v, labels, normalize)
    p = v.softmax(-1)
    entropy = -(p * p.log()).sum(-1)[labels != -100]
    assert_same(
        forward + (entropy.mean() if normalize else entropy.sum()), modules.ForwardKLLoss()(z, v, labels, normalize), z
    )
    revised = torchtune.LabelRevisionKDLoss(eta=0.7)(z, v, labels, normalize)
    reduction = "mean" if normalize else "sum"
    expected = kd_loss(z, v, labels, temperature=1.0, ce_weight=0, kd_weight=1, eta=0.7, reduction=reduction)
    torch.testing.assert_close(revised, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_liger(beta: float, temperature: float) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="needs Liger: pip install liger-kernel")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    h, w, b = (tensor.requires_grad_() for tensor in (normal(21, 8), normal(CLASSES, 8), normal(CLASSES)))
    teacher, labels = (normal(21, 6), normal(CLASSES, 6)), torch.arange(21) % CLASSES
    labels[::4] = -100
    arguments: dict[str, Any] = {
        "beta": beta,
        "temperature": temperature,
        "weight_hard_loss": 0.3,
        "weight_soft_loss": 0.7,
    }
    given = (h, w, *teacher, labels, b, normal(CLASSES))
    theirs = chunked.LigerFusedLinearJSDLoss(**arguments, compiled=False)(*given)
    assert_same(liger.LigerFusedLinearJSDLoss(**arguments)(*given), theirs, h, w, b)
    # The divergence alone, without biases: Liger's Triton kernel has no CPU version, its chunked loss has.
    alone = chunked.LigerFusedLinearJSDLoss(0.0, 1.0, beta, temperature=temperature, compiled=False)
    ours = liger.LigerFusedLinearJSD(beta, temperature=temperature)
    assert_same(ours(h, w, *teacher, labels.clamp(min=0)), alone(h, w, *teacher, labels.clamp(min=0)), h, w)
    torch.testing.assert_close(ours(h, w, *teacher), ours(h, w, *teacher, labels.clamp(min=0)))


def test_liger_with_label_revision() -> None:
    generator = torch.Generator().manual_seed(0)
    h, w, ht, wt = (torch.randn(shape, generator=generator) for shape in ((9, 8), (CLASSES, 8), (9, 6), (CLASSES, 6)))
    labels = torch.arange(9)
    loss = liger.LigerFusedLinearJSDLoss(0.1, 0.9, 0.0, temperature=2.0, revise="lr")(h, w, ht, wt, labels)
    expected = kd_loss(h @ w.T, ht @ wt.T, labels, temperature=2.0, ce_weight=0.1, kd_weight=0.9 / 4)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="return_soft_hard_loss must be False"):
        liger.LigerFusedLinearJSDLoss(return_soft_hard_loss=True)
