"""VGG with batch normalisation for CIFAR, with the parameter names of the field's published checkpoints."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from lrds_fast.models.classifier import Classifier

# Convolutions per block; the widths are the same for every depth.
WIDTHS = (64, 128, 256, 512, 512)
DEPTHS: dict[str, tuple[int, int, int, int, int]] = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


class CifarVGG(Classifier):
    """Five blocks of 3 x 3 convolutions, the first three halve the picture; a linear head; images (N, 3, 32, 32).

    Inside a block every convolution but the last is followed by a relu that the Sequential holds; the last one's relu
    is applied between blocks, which is why the published indices go in threes.
    """

    head_name = "classifier"

    def __init__(self, depths: tuple[int, int, int, int, int], num_classes: int = 100) -> None:
        super().__init__()
        inputs = 3
        for i, (count, width) in enumerate(zip(depths, WIDTHS, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            setattr(self, f"block{i}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def features(self, images: Tensor) -> Tensor:
        x = images
        for i in range(5):
            x = F.relu(getattr(self, f"block{i}")(x))
            if i < 3:
                x = F.max_pool2d(x, 2)
        return x.mean(dim=(2, 3))
