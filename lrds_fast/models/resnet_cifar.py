"""CIFAR ResNets (He et al. 2016, section 4.2) with the parameter names of the field's published checkpoints."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lrds_fast.models.classifier import Classifier


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn plus the input (projected where the shape changes), then relu."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != width:
            projection = nn.Conv2d(inputs, width, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(Classifier):
    """Three stages of (depth - 2) / 6 basic blocks; images (N, 3, 32, 32).

    widths: channels of the stem and of the three stages.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int = 100) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6 n + 2 with n >= 1; got {depth}")
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return x.mean(dim=(2, 3))


def _stage(inputs: int, width: int, blocks: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, width, stride), *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))
