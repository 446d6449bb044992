"""Per-sample gradients by layer, against autograd's own, sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrds_fast.influence.layers import Outer, layer_names, sample_gradients

CLASSES = 5


class Head(nn.Module):
    """A body whose output is changed in place, pooled over all but samples and channels, and a linear head."""

    def __init__(self, body: nn.Module, width: int, channels_last: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.channels_last = body, nn.Linear(width, CLASSES), channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.body(x), inplace=True)
        if not self.channels_last:
            x = x.movedim(1, -1)
        logits: Tensor = self.head(x.reshape(len(x), -1, x.shape[-1]).mean(dim=1))
        return logits


class Shared(nn.Module):
    """One layer at two depths, with an in-place activation between."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        twice: Tensor = self.layer(F.relu(self.layer(x), inplace=True))
        return twice


def body(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = make().double()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


IMAGE = (3, 6, 9, 8)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    "linear": (lambda: nn.Linear(7, 4), (6, 7), 4, True),
    "linear without bias": (lambda: nn.Linear(7, 4, bias=False), (6, 7), 4, True),
    "linear over tokens": (lambda: nn.Linear(7, 4), (3, 5, 2, 7), 4, True),
    "conv": (lambda: nn.Conv2d(6, 4, 3, padding=1), IMAGE, 4, False),
    "conv, stride and dilation": (lambda: nn.Conv2d(6, 4, (3, 2), (2, 3), (1, 2), (2, 1), bias=False), IMAGE, 4, False),
    "conv, groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), IMAGE, 4, False),
    "conv, depthwise": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), IMAGE, 12, False),
    "conv, same": (lambda: nn.Conv2d(6, 4, 4, padding="same", dilation=2), IMAGE, 4, False),
    "conv, reflected": (lambda: nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect"), IMAGE, 4, False),
    "conv, circular": (lambda: nn.Conv2d(6, 4, 3, padding="same", padding_mode="circular"), IMAGE, 4, False),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, groups=2), (3, 6, 11), 4, False),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1)), (2, 2, 4, 5, 4), 4, False),
    "batch norm": (lambda: nn.BatchNorm2d(6), IMAGE, 6, False),
    "layer norm": (lambda: nn.LayerNorm((2, 7)), (3, 5, 2, 7), 7, True),
    "layer norm without bias": (lambda: nn.LayerNorm(7, bias=False), (3, 5, 7), 7, True),
    "group norm": (lambda: nn.GroupNorm(3, 6), IMAGE, 6, False),
    "rms norm": (lambda: nn.RMSNorm(7), (3, 5, 7), 7, True),
    "shared": (lambda: Shared(nn.Linear(7, 7)), (3, 5, 7), 7, True),
    "shared conv": (lambda: Shared(nn.Conv2d(6, 6, 3, padding=1, groups=3)), IMAGE, 6, False),
    "shared norm": (lambda: Shared(nn.BatchNorm2d(6)), IMAGE, 6, False),
    "resnet block": (
        lambda: nn.Sequential(
            nn.Conv2d(6, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3),
            nn.Dropout(0.5),
        ),
        IMAGE,
        4,
        False,
    ),
}


def logit_gradient(target: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits.softmax(dim=1) - F.one_hot(target, CLASSES)


def autograd(model: nn.Module, x: Tensor, target: Tensor, name: str) -> Tensor:
    """Per-sample gradients, (B, P), from one backward pass per sample; the bias is the last column of a layer's
    weight."""
    layer = model.get_submodule(name)
    rows = []
    for i in range(len(x)):
        parameters = list(layer.parameters(recurse=False))
        loss = F.cross_entropy(model(x[i : i + 1]), target[i : i + 1])
        gradients = torch.autograd.grad(loss, parameters)
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            outputs = len(gradients[0])
            rows.append(torch.cat([g.reshape(outputs, -1) for g in gradients], dim=1).flatten())
        else:
            rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def check(model: nn.Module, x: Tensor, target: Tensor) -> None:
    model.eval()
    before = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        expected_logits = model(x)
    logits, found = sample_gradients(model, x, logit_gradient(target))
    assert torch.equal(logits, expected_logits) and not logits.requires_grad
    assert list(found) == layer_names(model)
    for name, gradients in found.items():
        exact = autograd(model, x, target, name)
        scale = exact.abs().max()
        assert scale > 0
        torch.testing.assert_close(gradients.dense() / scale, exact / scale, rtol=0, atol=1e-12)
        torch.testing.assert_close(gradients.squared_norm(), exact.square().sum(dim=1), rtol=1e-11, atol=0)
    assert {name: p.grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_against_autograd(name: str) -> None:
    make, shape, width, channels_last = MODELS[name]
    model = Head(body(make), width, channels_last).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    check(model, x, torch.randint(CLASSES, (shape[0],), generator=generator))


@pytest.mark.parametrize("padding", [None, 2])
def test_embedding_against_autograd(padding: int | None) -> None:
    torch.manual_seed(0)
    model = Head(nn.Embedding(9, 6, padding_idx=padding), 6, channels_last=True).double()
    tokens = torch.randint(9, (4, 7))
    tokens[:, :3] = torch.tensor([2, 2, 5])  # repeated, and padding
    check(model, tokens, torch.tensor([0, 1, 2, 3]))


def test_both_forms_of_the_norm() -> None:
    """Few positions use Gram matrices, many positions the gradient itself; both have the same norm."""
    torch.manual_seed(0)
    for positions in (1, 3, 40):
        rows = Outer(torch.randn(5, 2, positions, 11).double(), torch.randn(5, 2, positions, 6).double())
        torch.testing.assert_close(rows.squared_norm(), rows.dense().square().sum(dim=1))


def plain() -> tuple[nn.Sequential, Tensor, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)).eval()
    return model, torch.randn(3, 4), logit_gradient(torch.tensor([0, 1, 2]))


def test_layers_by_name() -> None:
    model, x, gradient = plain()
    assert layer_names(model, "last") == ["2"]
    assert layer_names(model, ["1", "0", "1"]) == ["1", "0"]
    assert list(sample_gradients(model, x, gradient, ["1"])[1]) == ["1"]
    model[0].requires_grad_(False)
    assert layer_names(model) == ["1", "2"]
    assert list(sample_gradients(model, x, gradient)[1]) == ["1", "2"]


def test_mistakes_are_named() -> None:
    model, x, gradient = plain()
    for layers, message in (
        ("first", "layers must be 'last', 'all' or a list of names; got 'first'"),
        (["9"], "no module '9'"),
        ([""], "module '' has no trainable parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_names(model, layers)
    with pytest.raises(ValueError, match="a PReLU; per-sample gradients are known for"):
        layer_names(nn.Sequential(nn.Linear(4, 4), nn.PReLU()))
    with pytest.raises(ValueError, match="no trainable parameters"):
        layer_names(nn.ReLU())
    with pytest.raises(ValueError, match=r"nn\.Linear layer; this one has none"):
        layer_names(nn.Conv2d(1, 1, 1), "last")
    model.get_parameter("0.bias").requires_grad_(False)
    with pytest.raises(ValueError, match="'0' is frozen in part"):
        layer_names(model)
    model.get_parameter("0.bias").requires_grad_(True)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="'1' and '0' share a parameter"):
        layer_names(tied)
    model[1].train()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) is in training mode"):
        sample_gradients(model, x, gradient)
    model.eval()
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match="layer '0': the gradient of sample 1 of the batch is not finite"):
        sample_gradients(model, x, gradient)
    aside = nn.ModuleDict({"used": nn.Linear(4, CLASSES), "unused": nn.Linear(4, 2)})
    aside.forward = lambda x: aside["used"](x)
    with pytest.raises(ValueError, match="'unused' has no part in the logits"):
        sample_gradients(aside, torch.randn(3, 4), gradient)


@pytest.mark.parametrize("positions", [1, 50, 51, 120, 199])
@pytest.mark.parametrize("groups", [1, 3])
def test_norms_from_gram_matrices_are_those_of_the_gradients(positions: int, groups: int) -> None:
    draws = torch.Generator().manual_seed(positions)
    a = torch.randn(4, groups, positions, 300, generator=draws, dtype=torch.float64)
    d = torch.randn(4, groups, positions, 280, generator=draws, dtype=torch.float64)
    found = Outer(a, d)
    assert 2 * positions**2 <= 300 * 280, "by Gram matrices"
    torch.testing.assert_close(found.squared_norm(), found.dense().square().sum(dim=1), rtol=1e-12, atol=0)
