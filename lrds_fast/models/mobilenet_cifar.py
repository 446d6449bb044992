"""MobileNetV2 of half width for CIFAR, with the parameter names of the field's published checkpoints."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from lrds_fast.models.classifier import Classifier

# Expansion, channels at full width, blocks, stride of the first one (Sandler et al. 2018, table 2; two strides are 1
# here, for pictures of 32 x 32).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1 x 1 up, depthwise 3 x 3, 1 x 1 down without an activation; plus the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.keeps_shape = stride == 1 and inputs == outputs
        inner = inputs * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.keeps_shape else out


def _activated(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class MobileNetV2(Classifier):
    """Half as many channels as the original before the last convolution's 1280; images (N, 3, 32, 32)."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        inputs = 16
        self.conv1 = _activated(3, inputs, 3, 2)
        stages = []
        for expansion, channels, depth, stride in STAGES:
            blocks = []
            for k in range(depth):
                blocks.append(InvertedResidual(inputs, channels // 2, stride if k == 0 else 1, expansion))
                inputs = channels // 2
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv2 = _activated(inputs, 1280, 1, 1)
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    @property
    def head(self) -> nn.Linear:
        head = self.classifier[0]
        assert isinstance(head, nn.Linear)
        return head

    def features(self, images: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(images)))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
