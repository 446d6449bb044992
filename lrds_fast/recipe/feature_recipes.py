"""Feature distillation for the grid: methods alone and beside KD, weights by student, published accuracies.

A method is what a recipe says beyond its protocol, table by table, as lrds_fast.recipe.names's methods are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrds_fast.recipe.feature_methods import METHODS as FEATURE_METHODS

_ALONE = {"ce_weight": 1.0, "kd_weight": 0.0}
_BESIDE = {"temperature": 4.0, "ce_weight": 1.0, "kd_weight": 1.0}
#: ReviewKD's weight grows over 20 of 240 epochs.
_WARM_UP = {"reviewkd": {"kd_warmup_epochs": 20}}

#: "crd": cross-entropy and CRD, as published, with no labels of the teacher's that could be revised; "kd-crd": KD too,
#: of weight 1, as the literature combines them.
METHODS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    prefix + name: {"loss": {**loss, **_WARM_UP.get(name, {})}, "features": {"method": name}}
    for prefix, loss in (("", _ALONE), ("kd-", _BESIDE))
    for name in FEATURE_METHODS
}

_REVIEWKD_WEIGHTS = {"resnet20": 0.6, "resnet32": 1.0, "ShuffleV2": 8.0, "resnet18": 1.0, "mobilenetv1": 8.0}


def weight(method: str, student: str) -> float:
    """features.weight of a METHODS entry for a student by its short name; -1 is the method's own. ReviewKD's authors
    chose one by student (Chen et al. 2021, their scripts); 5 where they are silent."""
    return _REVIEWKD_WEIGHTS.get(student, 5.0) if method.removeprefix("kd-") == "reviewkd" else -1.0


_COLUMNS = {
    "wrn_40_2-wrn_16_2": (73.58, 74.08, 73.83, 73.56, 74.11, 73.35, 74.54, 75.48, 76.12),
    "wrn_40_2-wrn_40_1": (72.24, 72.77, 72.43, 72.21, 73.30, 72.22, 73.45, 74.14, 75.09),
    "resnet56-resnet20": (69.21, 70.55, 69.67, 69.63, 70.38, 69.61, 70.34, 71.16, 71.89),
    "resnet110-resnet20": (68.99, 70.22, 70.04, 69.48, 70.16, 69.25, 70.25, 71.46, None),
    "resnet110-resnet32": (71.06, 72.31, 72.69, 71.48, 72.61, 71.82, 72.61, 73.48, 73.89),
    "resnet32x4-resnet8x4": (73.50, 73.44, 72.94, 72.97, 73.09, 71.90, 73.64, 75.51, 75.63),
    "vgg13-vgg8": (71.02, 71.43, 72.68, 70.71, 71.23, 71.48, 72.88, 73.94, 74.84),
    "vgg13-MobileNetV2": (64.14, 59.40, 66.30, 64.86, 65.56, 64.52, 67.13, 69.73, 70.37),
    "ResNet50-MobileNetV2": (63.16, 58.58, 68.08, 65.43, 67.57, 64.43, 66.52, 69.11, 69.89),
    "resnet32x4-ShuffleV1": (73.59, 71.73, 73.48, 71.14, 73.38, 72.28, 74.10, 75.11, 77.45),
    "resnet32x4-ShuffleV2": (73.54, 72.73, 74.56, 71.29, 73.40, 73.21, 74.69, 75.65, 77.78),
}
#: Published test accuracies (%) on CIFAR-100 by pair and method, of methods alone: Tian et al. 2020, tables 1 and 2;
#: reviewkd: Chen et al. 2021.
ACCURACIES: Mapping[str, Mapping[str, float]] = {
    pair: {
        method: value
        for method, value in zip(
            ("fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "crd", "reviewkd"), values, strict=True
        )
        if value is not None
    }
    for pair, values in _COLUMNS.items()
}
