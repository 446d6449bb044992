"""Networks of torchvision and timm with the methods of Classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class External(nn.Module):
    """A wrapped classifier with features(), forward_with_features(), head and num_classes.

    The keys of the state dict have no prefix, so that published checkpoints load without a change. A hook reads the
    features, which are the input of the last nn.Linear. This is right for every network whose forward ends there.
    """

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise ValueError(
                f"model {name!r} has no nn.Linear layer, so it has no features to score; choose another one"
            )
        self.net = net
        # In a list, which does not register the module: a submodule under two names would be saved twice.
        self._head = [linears[-1]]

    @property
    def head(self) -> nn.Linear:
        """The last linear layer."""
        return self._head[0]

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_features

    def forward(self, images: Tensor) -> Tensor:
        """(N, classes) logits."""
        logits: Tensor = self.net(images)
        return logits

    def forward_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, features) of one pass."""
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits: Tensor = self.net(images)
        finally:
            hook.remove()
        return logits, seen[-1]

    def features(self, images: Tensor) -> Tensor:
        """(N, d) input of the last linear layer."""
        return self.forward_with_features(images)[1]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.net.load_state_dict(state_dict, strict=strict, assign=assign)
