"""Feature distillation: which modules of which network are compared, and what recipes may say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from feature_cases import CLASSES, SAMPLES, batch, features, maps, one_loss, pair
from torch import nn

from lrds_fast.features.distillation import FeatureDistillation
from lrds_fast.features.places import usual_stages
from lrds_fast.recipe import names as grid
from lrds_fast.recipe.feature_methods import METHODS
from lrds_fast.recipe.recipe import FeatureOptions, from_mapping
from lrds_fast.train import load_recipe

pytest.importorskip("torchdistill", reason="needs torchdistill: pip install torchdistill")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("student", "teacher", "places"),
    [
        ("wrn_16_1", "wrn_16_2", (["block1", "block2", "block3"], ["block1", "block2", "block3"])),
        ("vgg8", "vgg11", ([f"block{i}:relu" for i in (1, 2, 3, 4)],) * 2),
        ("ShuffleV1", "resnet8x4", (["layer1", "layer2", "layer3"],) * 2),
        ("ShuffleV2", "ResNet18", (["layer1", "layer2", "layer3"], ["layer2", "layer3", "layer4"])),
        ("MobileNetV2", "vgg8", ([f"blocks.{i}" for i in (1, 2, 4, 6)], [f"block{i}:relu" for i in (1, 2, 3, 4)])),
        ("MobileNetV2", "wrn_16_2", (["blocks.2", "blocks.4", "blocks.6"], ["block1", "block2", "block3"])),
        ("torchvision:resnet18", "torchvision:resnet18", ([f"layer{i}" for i in (1, 2, 3, 4)],) * 2),
        (
            "timm:mobilenetv1_100",
            "timm:resnet18",
            ([f"blocks.{i}" for i in (1, 2, 3, 4)], [f"layer{i}" for i in (1, 2, 3, 4)]),
        ),
    ],
)  # fmt: skip
def test_the_families_usual_places_pair(student: str, teacher: str, places: tuple[list[str], list[str]]) -> None:
    if ":" in student:
        pytest.importorskip(student.partition(":")[0])
    own, given = pair(student, teacher)
    images = torch.randn(2, 3, 32, 32)
    target, indices = torch.tensor([0, 1]), torch.tensor([3, 4])
    for method in ("at", "reviewkd", "fitnet"):
        loss = FeatureDistillation(FeatureOptions(method=method), own, given, images, SAMPLES)
        if method == "at":
            assert (loss.student_layers, loss.teacher_layers) == places
        own(images)
        with torch.no_grad():
            given(images)
        value = loss(target, indices)
        value.backward()
        assert value.isfinite() and value > 0
        loss.close()


def test_places_can_be_named() -> None:
    student, teacher = pair()
    student.eval()
    images, target = batch()
    named = features("at", student, teacher, student_layers=("layer1", "layer3"), teacher_layers=("layer1", "layer3.2"))
    assert "layer3 <- layer3.2" in repr(named)
    own, given = maps(student, images), maps(teacher, images)
    same = features("at", student, teacher, student_layers=("layer2",))
    assert (same.student_layers, same.teacher_layers) == (["layer2"], ["layer3"]), "the deepest of the other's"
    review = features("reviewkd", student, teacher, student_layers=("layer2", "layer3", "fc:input"))
    assert review.teacher_layers == ["layer2", "layer3", "fc:input"]
    hint = features("fitnet", student, teacher, student_layers=("layer2.0",))
    assert (hint.student_layers, hint.teacher_layers) == (["layer2.0"], ["layer2"])
    value = one_loss(named, student, teacher)
    attention = [[F.normalize(x.pow(2).mean(dim=1).flatten(1)) for x in (side[0], side[2])] for side in (own, given)]
    torch.testing.assert_close(value, 1000 * sum(F.mse_loss(s, t) for s, t in zip(*attention, strict=True)))
    pooled = features("rkd", student, teacher, student_layers=("layer3",), teacher_layers=("fc:input",))
    usual = features("rkd", student, teacher)
    torch.testing.assert_close(one_loss(pooled, student, teacher), one_loss(usual, student, teacher))
    doubled = features("rkd", student, teacher, weight=2.0)
    torch.testing.assert_close(one_loss(doubled, student, teacher), 2 * one_loss(usual, student, teacher))
    zero = features("rkd", student, teacher, weight=0.0)
    assert one_loss(zero, student, teacher).item() == 0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("at", {"student_layers": ("layr3",)}, r"the student has no module 'layr3'; did you mean 'layer3'"),
        ("at", {"teacher_layers": ("layer1", "x")}, r"the teacher has no module 'x'; it has conv1, bn1"),
        ("at", {"student_layers": ("layer1:output:relu",)}, r"must end in :input, :relu or neither"),
        ("at", {"student_layers": ("fc",)}, r"'at' takes maps \(N, C, H, W\); fc gives \(2, 4\)"),
        ("at", {"student_layers": ("layer1",) * 4}, r"teacher_layers: name 4 modules, as many as for the other"),
        ("reviewkd", {"teacher_layers": ("layer1",) * 5}, r"student_layers: name 5 modules, .* defaults are layer1,"),
        ("rkd", {"student_layers": ("layer1.0.downsample",)}, "has no module"),
    ],
)  # fmt: skip
def test_wrong_places_are_named_in_one_line(method: str, options: dict[str, Any], message: str) -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match=message) as raised:
        features(method, student, teacher, **options)
    assert "\n" not in str(raised.value)
    assert not any(module._forward_hooks for network in (student, teacher) for module in network.modules())


def test_unknown_networks_list_the_possible_places() -> None:
    _, teacher = pair()
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, CLASSES))
    with pytest.raises(ValueError, match=r"default modules of Sequential for 'at' are not known; choose from 0, 1"):
        features("at", student, teacher)
    with pytest.raises(
        ValueError, match=r"teacher_layers: the default modules of Sequential for 'reviewkd' are not known"
    ):
        features("reviewkd", teacher, student)
    value = one_loss(features("at", student, teacher, student_layers=("1",)), student, teacher)
    assert value.item() > 0
    assert usual_stages(student) == []
    assert one_loss(features("pkt", student, teacher), student, teacher).item() > 0


def recipes() -> Iterator[tuple[list[str], str]]:
    yield ["features.method=fitnets"], r"features.method must be one of fitnet, at.*did you mean 'fitnet'\?"
    yield ["features.method=zzz"], r"got 'zzz'; or \"\" for none"
    yield ["features.options.size=3"], r"features.options needs features.method"
    yield ['features.student_layers=["a"]'], r"features.student_layers needs features.method"
    yield ["features.method=at", "features.options.size=3"], r"options.size: 'at' has no such option; it has none"
    yield ["features.method=rkd", "features.options.size=3"], r"'rkd' has no such option; it has distance, angle"
    yield ["features.method=crd", "features.options.size=3.5"], r"options.size must be a whole number of at least 1"
    yield ["features.method=crd", "features.options.momentum=1"], r"options.momentum must be in \[0, 1\); got 1.0"
    yield ["features.method=crd", "features.options.temperature=0"], r"options.temperature must be above 0; got 0.0"
    yield ["features.method=rkd", "features.options.angle=-1"], r"options.angle must be at least 0"
    yield ["features.method=rkd", "features.options.angle=inf"], r"options.angle must be at least 0"
    yield ["features.method=rkd", "features.options.angle=x"], r"features.options.angle must be float"
    yield ["features.method=at", "features.weight=nan"], r"features.weight must be finite"
    yield ["features.method=sp", 'features.student_layers=["a", "b"]'], r"'sp' compares one pair of modules; got a, b"
    yield ["features.method=reviewkd", 'features.teacher_layers=["a"]'], r"'reviewkd' takes two modules or more"
    yield (
        ["features.method=at", 'features.student_layers=["a"]', 'features.teacher_layers=["a", "b"]'],
        r"must have the same length; got 1 and 2",
    )
    yield ["features.metod=at"], r"unknown key 'features.metod'; did you mean 'features.method'"


@pytest.mark.parametrize(("settings", "message"), list(recipes()))
def test_mistakes_in_recipes_are_named(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("digits_kd", settings)


def test_recipes_take_features_and_leave_them_out_by_default() -> None:
    assert load_recipe("digits_kd").features == FeatureOptions()
    settings = ["features.method=crd", "features.options.negatives=64", "features.weight=0.5"]
    recipe = load_recipe("cifar100_resnet56_resnet20", settings)
    assert (recipe.features.options, recipe.features.weight) == ({"negatives": 64.0}, 0.5)
    assert from_mapping(json.loads(recipe.to_json())) == recipe


@pytest.mark.parametrize("name", [prefix + name for prefix in ("", "kd-") for name in METHODS])
def test_every_entry_for_the_grid_is_a_recipe(name: str) -> None:
    base = load_recipe("cifar100_resnet56_resnet20")
    entry = grid.PROTOCOLS["cifar100"].methods[name].values
    values = {f"{table}.{key}": value for table, keys in entry.items() for key, value in keys.items()}
    recipe = base.with_values(**values)
    assert recipe.features.method == name.removeprefix("kd-")
    assert (recipe.loss.ce_weight, recipe.loss.kd_weight) == (1.0, float(name.startswith("kd-")))


WEIGHED = ("resnet56-resnet20/reviewkd", "resnet56-resnet20/crd", "resnet32x4-resnet8x4/kd-reviewkd")


def test_published_weights_and_accuracies_are_the_published_ones() -> None:
    published = {"fitnet": 100, "at": 1000, "sp": 3000, "vid": 1, "rkd": 1, "pkt": 30000, "crd": 0.8, "ickd": 2.5}
    assert {name: METHODS[name].weight for name in published} == published
    weights = {name: load_recipe(f"cifar100/{name}").features.weight for name in WEIGHED}
    assert weights["resnet56-resnet20/reviewkd"] == 0.6 and weights["resnet56-resnet20/crd"] == -1
    assert weights["resnet32x4-resnet8x4/kd-reviewkd"] == 5.0
    rows: dict[str, dict[str, float]] = {}
    for name in grid.names():
        parts = grid.parts_of(name)
        assert parts is not None
        accuracy = grid.published(name)
        if parts.method in METHODS and accuracy is not None:
            rows.setdefault(f"{parts.teacher}-{parts.student}", {})[parts.method] = accuracy
    assert rows["resnet56-resnet20"]["crd"] == 71.16
    assert rows["resnet32x4-ShuffleV1"] == {
        "fitnet": 73.59, "at": 71.73, "sp": 73.48, "cc": 71.14, "vid": 73.38, "rkd": 72.28, "pkt": 74.10, "crd": 75.11,
        "reviewkd": 77.45,
    }  # fmt: skip
    assert len(rows) == 13 and sum(map(len, rows.values())) == 108
