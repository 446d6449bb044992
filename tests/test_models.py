"""Networks: published names, shapes and outputs; consistent logits and features."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrds_fast import models

SMALL = {"mlp": (8, 8), "mlp_8x16_32": (8, 16), "mlp_8x16_128": (8, 16), "small_cnn": (8, 8)}
CIFAR = [name for name in models.names() if name not in SMALL]


def images_for(name: str) -> Tensor:
    shape = (3, 1, *SMALL[name]) if name in SMALL else (2, 3, 32, 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name",
    [
        *SMALL,
        "resnet8",
        "resnet8x4",
        "wrn_16_1",
        "vgg8",
        "ResNet18",
        "MobileNetV2",
        "ShuffleV1",
        "ShuffleV2",
    ],
)
def test_logits_are_the_head_of_the_features(name: str) -> None:
    model = models.create(name, num_classes=7).eval()
    images = images_for(name)
    with torch.no_grad():
        logits, features = model.forward_with_features(images)
        assert torch.equal(model(images), logits)
        assert torch.equal(model.features(images), features)
        assert features.shape == (len(images), model.head.in_features)
        torch.testing.assert_close(model.head(features), logits)
    assert logits.shape == (len(images), 7)
    assert model.num_classes == 7


def published(name: str) -> tuple[dict[str, list[int]], np.ndarray]:
    folder = Path(os.environ.get("LRDS_DATA", "")) / "cifar_models"
    if not os.environ.get("LRDS_DATA") or not folder.is_dir():
        pytest.skip("LRDS_DATA is not set, or has no cifar_models")
    with (folder / "state_dict_shapes.json").open() as file:
        shapes: dict[str, dict[str, list[int]]] = json.load(file)
    with np.load(folder / "golden_logits.npz") as golden:
        return shapes[name], golden[name]


def fill(state: dict[str, Tensor]) -> None:
    """The deterministic weights that the golden outputs were computed with."""
    for k, (name, tensor) in enumerate(state.items()):
        if name.endswith("num_batches_tracked"):
            tensor.zero_()
            continue
        wave = torch.sin(0.37 * torch.arange(tensor.numel(), dtype=torch.float64) + 1.3 * k).view(tensor.shape)
        if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
            tensor.copy_(1 + 0.1 * wave)
        elif name.endswith("running_mean") or tensor.dim() == 1:
            tensor.copy_(0.05 * wave)
        else:
            tensor.copy_(wave * math.sqrt(0.25 / tensor[0].numel()))


@pytest.mark.parametrize("name", CIFAR)
def test_is_the_published_network(name: str) -> None:
    shapes, golden = published(name)
    model = models.create(name, num_classes=100).double().eval()
    state = model.state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == list(shapes.items())
    fill(state)
    images = torch.sin(0.013 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).view(2, 3, 32, 32)
    with torch.no_grad():
        error = np.abs(model(images).numpy() - golden).max() / np.abs(golden).max()
    assert error < 1e-8


def test_torchvision_networks_have_features_and_their_own_state_dict() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = models.create("torchvision:resnet18", num_classes=5).eval()
    plain = torchvision.models.resnet18(num_classes=5)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, features = model.forward_with_features(images)
        torch.testing.assert_close(logits, plain.eval()(images))
        torch.testing.assert_close(plain.fc(features), logits)
    assert features.shape == (2, 512)


def test_timm_networks_have_features() -> None:
    pytest.importorskip("timm")
    model = models.create("timm:resnet10t", num_classes=5).eval()
    with torch.no_grad():
        logits, features = model.forward_with_features(torch.randn(2, 3, 64, 64))
        torch.testing.assert_close(model.head(features), logits)


def test_features_are_differentiable_and_leave_no_hook_behind() -> None:
    pytest.importorskip("torchvision")
    model = models.create("torchvision:resnet18", num_classes=3)
    features = model.features(torch.randn(2, 3, 32, 32))
    features.sum().backward()
    assert next(model.parameters()).grad is not None
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt20", r"unknown model 'resnt20'; did you mean 'resnet20'\?"),
        ("torchvision:resnet19", r"torchvision has no model 'resnet19'; did you mean 'resnet18'\?"),
        ("keras:resnet", r"unknown model library 'keras'"),
    ],
)
def test_unknown_names_raise_with_the_nearest(name: str, message: str) -> None:
    if name.startswith("torchvision"):
        pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=message):
        models.create(name, num_classes=10)


def test_names_in_any_case_and_as_papers_have_them() -> None:
    assert isinstance(models.create("shufflenetv2", num_classes=3), type(models.create("ShuffleV2", num_classes=3)))
    assert list(models.create("RESNET8").state_dict()) == list(models.create("resnet8").state_dict())
    assert "MobileNetV2" in models.names() and "mobilenetv2" not in models.names()


def test_wrong_class_counts_and_heads_are_named() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1; got 0"):
        models.create("mlp", num_classes=0)
    with pytest.raises(ValueError, match="has no nn.Linear layer"):
        models.External(nn.Sequential(nn.Flatten()), "flatten")
