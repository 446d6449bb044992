"""The base class of the networks: forward returns logits, features the input of the last linear layer."""

from __future__ import annotations

from torch import Tensor, nn


class Classifier(nn.Module):
    """logits = head(features(images)).

    Subclasses define features(images) -> (N, d) and set `head_name`, the attribute of their last nn.Linear. Published
    checkpoints contain this name, so it differs between families.
    """

    head_name = "fc"

    @property
    def head(self) -> nn.Linear:
        """The last linear layer, d -> classes."""
        head = getattr(self, self.head_name)
        if not isinstance(head, nn.Linear):
            raise TypeError(f"{type(self).__name__}.{self.head_name} must be nn.Linear; got {type(head).__name__}")
        return head

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_features

    def features(self, images: Tensor) -> Tensor:
        """(N, d) input of the last linear layer."""
        raise NotImplementedError(f"{type(self).__name__} does not define features(images)")

    def forward(self, images: Tensor) -> Tensor:
        """(N, classes) logits of images (N, channels, height, width)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def forward_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, features) of one pass."""
        features = self.features(images)
        return self.head(features), features
