"""The kd_loss of torchtune's knowledge distillation recipes.

kd_loss:
  _component_: lrds_fast.compat.torchtune.LRDSKDLoss
  revise: lr
loss:
  _component_: torch.nn.CrossEntropyLoss    # whole logits; CEWithChunkedOutputLoss passes chunks
"""

from __future__ import annotations

import importlib.util

from torch import Tensor, nn

from lrds_fast.divergences import Divergence
from lrds_fast.functional import kd_loss

if importlib.util.find_spec("torchtune") is None:
    raise ImportError("lrds_fast.compat.torchtune needs torchtune: pip install torchtune torchao")


class LRDSKDLoss(nn.Module):
    """The divergence from the teacher at T = 1, without cross-entropy, which the recipe adds with 1 - kd_ratio.

    ignore_index, normalize as in torchtune's ForwardKLLoss and ReverseKLLoss. divergence "rkl", revise None is
    ReverseKLLoss; "kl", None is ForwardKLLoss minus the teacher's entropy, a constant, so that gradients are equal.
    revise: default "lr". Raises ValueError.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        revise: str | None = "lr",
        eta: float = 0.8,
        divergence: str | Divergence = "kl",
    ) -> None:
        super().__init__()
        self.ignore_index, self.revise, self.eta, self.divergence = ignore_index, revise, eta, divergence

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """*_logits: (..., V), labels: as many. normalize: the mean over labels that are not ignored; else the sum."""
        if not isinstance(student_logits, Tensor):
            raise TypeError(
                "student_logits must be a Tensor; got chunks: set loss to torch.nn.CrossEntropyLoss in the recipe, "
                "instead of CEWithChunkedOutputLoss"
            )
        return kd_loss(
            student_logits.flatten(0, -2),
            teacher_logits.flatten(0, -2),
            labels.flatten(),
            temperature=1.0,
            ce_weight=0.0,
            ce_weight_unselected=0.0,
            kd_weight=1.0,
            revise=self.revise,
            eta=self.eta,
            divergence=self.divergence,
            ignore_index=self.ignore_index,
            reduction="mean" if normalize else "sum",
        )
