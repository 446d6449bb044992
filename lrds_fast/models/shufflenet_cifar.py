"""ShuffleNet V1 and V2 for CIFAR, with the parameter names of the field's published checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrds_fast.models.classifier import Classifier

GROUPS = 3
#: Blocks and channels of V1's stages; every stage begins with a stride of 2.
STAGES_V1 = ((4, 240), (8, 480), (4, 960))
#: Blocks and channels of V2's stages; every stage begins with a stride of 2.
STAGES_V2 = ((4, 116), (8, 232), (4, 464))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """(N, C, H, W) with the channels interleaved: the first of every group, then the second of every group, ..."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


def _convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)


class BottleneckV1(nn.Module):
    """Grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1. Stride 2 appends the pooled input, stride 1 adds it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        # The first block has only 24 channels, which are not grouped.
        self.groups = 1 if inputs == 24 else GROUPS
        outputs = outputs - inputs if stride == 2 else outputs
        inner = outputs // 4
        self.conv1 = _convolution(inputs, inner, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _convolution(inner, inner, 3, stride, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = _convolution(inner, outputs, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1))
        return F.relu(out + x)


class ShuffleNetV1(Classifier):
    """Zhang et al. 2018 with three groups, behind a 1 x 1 convolution; images (N, 3, 32, 32)."""

    head_name = "linear"

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        inputs = 24
        self.conv1 = _convolution(3, inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        for i, (depth, outputs) in enumerate(STAGES_V1):
            blocks = [BottleneckV1(inputs, outputs, 2)]
            blocks += [BottleneckV1(outputs, outputs, 1) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inputs = outputs
        self.linear = nn.Linear(inputs, num_classes)

    def features(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        for i in range(3):
            x = getattr(self, f"layer{i + 1}")(x)
        return x.mean(dim=(2, 3))


class DownV2(nn.Module):
    """Two branches over the whole input, each of stride 2, side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = _convolution(inputs, inputs, 3, 2, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = _convolution(inputs, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _convolution(inputs, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _convolution(half, half, 3, 2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _convolution(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return shuffle(torch.cat([left, right], dim=1), 2)


class BlockV2(nn.Module):
    """Half of the channels stay as they are; the others go through 1 x 1, depthwise 3 x 3, 1 x 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _convolution(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _convolution(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _convolution(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        by, through = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(through)))
        out = F.relu(self.bn3(self.conv3(self.bn2(self.conv2(out)))))
        return shuffle(torch.cat([by, out], dim=1), 2)


class ShuffleNetV2(Classifier):
    """Ma et al. 2018 at width 1, behind a 1 x 1 convolution; images (N, 3, 32, 32)."""

    head_name = "linear"

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        inputs = 24
        self.conv1 = _convolution(3, inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        for i, (depth, outputs) in enumerate(STAGES_V2):
            blocks = [DownV2(inputs, outputs), *(BlockV2(outputs) for _ in range(depth - 1))]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inputs = outputs
        self.conv2 = _convolution(inputs, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def features(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        for i in range(3):
            x = getattr(self, f"layer{i + 1}")(x)
        x = F.relu(self.bn2(self.conv2(x)))
        return x.mean(dim=(2, 3))
