"""Two networks for small pictures, which one laptop core can train and which disagree with each other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lrds_fast.models.classifier import Classifier


class MLP(Classifier):
    """One hidden layer of `width` ReLU units on the flattened picture of `inputs` pixels."""

    def __init__(self, num_classes: int = 10, *, inputs: int = 64, width: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, width)
        self.fc = nn.Linear(width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.hidden(images.flatten(1)))


class SmallCNN(Classifier):
    """Two 3 x 3 convolutions, each with a halving of the picture, and one hidden layer.

    Without normalisation on purpose: its output on a row does not depend on the other rows of the batch.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        channels: int = 1,
        size: int = 8,
        width: int = 16,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(2 * width * (size // 4) ** 2, hidden)
        self.fc = nn.Linear(hidden, num_classes)

    def features(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))
