"""Networks of torchvision and timm behind the same three methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class External(nn.Module):
    """A foreign classifier with features(), forward_with_features(), head and num_classes.

    The state dict is the wrapped network's own, without a prefix, so that published checkpoints load as they are.
    The features are what the last nn.Linear receives, read by a hook: this holds for every network whose forward ends
    in that layer.
    """

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise ValueError(
                f"model {name!r} has no nn.Linear layer, so it has no features to score; choose another one"
            )
        self.net = net
        # Not registered a second time: a submodule under two names would be saved twice.
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
