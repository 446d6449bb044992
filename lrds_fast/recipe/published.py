"""What the literature reports: pairs of a teacher and a student, and their test accuracies (%) by method.

CIFAR-100: the best test epoch, mostly means of 3 to 5 runs. KD, DKD (Zhao et al. 2022) and MLKD (Jin et al. 2023) as in
the tables of mdistiller and of "Logit Standardization in Knowledge Distillation" (2024), whose own KD is kd-lskd; RLD
(Sun et al. 2024) as "A Plug-and-Play KD Method based on Decoupling and Standardization" quotes it; DIST as its authors'
program has it (Huang et al. 2022). ImageNet, classic: mdistiller (KD, DKD), MMRazor (tuned KD), NKD's and DIST's
authors; with stronger training: DIST's authors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Pair(NamedTuple):
    """A teacher and a student; the student's published test accuracies (%) by method; the beta of DKD for them."""

    teacher: str
    student: str
    accuracies: Mapping[str, float]
    beta: float

    @property
    def name(self) -> str:
        """TEACHER-STUDENT."""
        return f"{self.teacher}-{self.student}"


def _pair(teacher: str, student: str, beta: float, **accuracies: float) -> tuple[str, Pair]:
    pair = Pair(teacher, student, {key.replace("_", "-"): value for key, value in accuracies.items()}, beta)
    return pair.name, pair


CIFAR100 = dict(
    (
        _pair("resnet32x4", "resnet8x4", 8.0, kd=73.33, dkd=76.32, mlkd=77.08, dist=76.31, kd_lskd=76.62, rld=76.64),
        _pair("vgg13", "vgg8", 6.0, kd=72.98, dkd=74.68, mlkd=75.18, kd_lskd=74.36, rld=74.93),
        _pair("wrn_40_2", "wrn_40_1", 6.0, kd=73.54, dkd=74.81, mlkd=75.35, dist=74.43, kd_lskd=74.37, rld=74.88),
        _pair("wrn_40_2", "wrn_16_2", 6.0, kd=74.92, dkd=76.24, mlkd=76.63, kd_lskd=76.11, rld=76.02),
        _pair("resnet56", "resnet20", 2.0, kd=70.66, dkd=71.97, mlkd=72.19, dist=71.75, kd_lskd=71.43, rld=72.00),
        _pair("resnet110", "resnet32", 2.0, kd=73.08, dkd=74.11, mlkd=74.11, kd_lskd=74.17, rld=74.02),
        _pair("resnet110", "resnet20", 2.0, kd=70.67, dkd=71.06, mlkd=71.89, kd_lskd=71.48, rld=71.67),
        _pair("resnet32x4", "ShuffleV2", 8.0, kd=74.45, dkd=77.07, mlkd=78.44, dist=77.35, kd_lskd=75.56, rld=77.56),
        _pair("resnet32x4", "wrn_16_2", 8.0, kd=74.90, dkd=75.70, mlkd=76.52, kd_lskd=75.26, rld=76.14),
        _pair("resnet32x4", "wrn_40_2", 8.0, kd=77.70, dkd=78.46, mlkd=79.26, kd_lskd=77.92, rld=78.91),
        _pair("wrn_40_2", "resnet8x4", 6.0, kd=73.97, dkd=75.56, mlkd=77.33, kd_lskd=77.11, rld=76.12),
        _pair("wrn_40_2", "MobileNetV2", 6.0, kd=68.36, dkd=69.28, mlkd=70.78, kd_lskd=69.23, rld=69.75),
        _pair("vgg13", "MobileNetV2", 6.0, kd=67.37, dkd=69.71, mlkd=70.57, kd_lskd=68.61, rld=69.97),
        _pair("ResNet50", "MobileNetV2", 8.0, kd=67.35, dkd=70.35, mlkd=71.04, dist=68.66, kd_lskd=69.02, rld=70.76),
        _pair("resnet32x4", "ShuffleV1", 8.0, kd=74.07, dkd=76.45, dist=76.34),
        _pair("wrn_40_2", "ShuffleV1", 6.0, kd=74.83, dkd=76.70),
        _pair("resnet20", "resnet8", 2.0),
    )
)
#: Test accuracies (%) of the networks alone.
CIFAR100_ALONE = {
    "resnet32x4": 79.42,
    "resnet8x4": 72.50,
    "vgg13": 74.64,
    "vgg8": 70.36,
    "wrn_40_2": 75.61,
    "wrn_40_1": 71.98,
    "wrn_16_2": 73.26,
    "resnet56": 72.34,
    "resnet20": 69.06,
    "resnet110": 74.31,
    "resnet32": 71.14,
    "ShuffleV1": 70.50,
    "ShuffleV2": 71.82,
    "MobileNetV2": 64.60,
    "ResNet50": 79.34,
}

IMAGENET = dict(
    (
        _pair("resnet34", "resnet18", 0.5, kd=71.03, kd_tuned=71.81, dkd=71.70, nkd=71.96, dist=72.07),
        _pair("resnet50", "mobilenetv1", 2.0, kd=70.50, dkd=72.05, nkd=72.58, dist=73.24),
    )
)
IMAGENET_ALONE = {"resnet34": 73.31, "resnet18": 69.76, "resnet50": 76.16, "mobilenetv1": 70.13}

#: resnet50sb: ResNet-50 as trained in "ResNet strikes back" (2021).
IMAGENET_MODERN = dict(
    (
        _pair("resnet50sb", "resnet18", 0.5, kd=72.6, dist=74.5),
        _pair("resnet50sb", "resnet34", 0.5, kd=77.2, dist=77.8),
        _pair("resnet50sb", "mobilenetv2", 2.0, kd=71.7, dist=74.4),
        _pair("resnet50sb", "efficientnet_b0", 2.0, kd=77.4, dist=78.6),
        _pair("resnet34", "resnet18", 0.5),
        _pair("resnet50", "mobilenetv1", 2.0),
    )
)
IMAGENET_MODERN_ALONE = {
    "resnet50sb": 80.1,
    "resnet18": 73.4,
    "resnet34": 76.8,
    "mobilenetv2": 73.6,
    "efficientnet_b0": 78.0,
}
