"""A loss for torchtune's knowledge distillation recipes.

    kd_loss:
      _component_: lrds_fast.compat.torchtune.LabelRevisionKDLoss
      eta: 0.8

The recipe adds it to the cross-entropy as kd_ratio * kd_loss + (1 - kd_ratio) * class_loss. ForwardKLLoss and
ReverseKLLoss are torchtune's own, faster: set revise to null. The recipes of chunked losses pass lists of logits;
these losses take one tensor of each, because they never make a copy in float32.
"""

from __future__ import annotations

from torch import Tensor, nn

from lrds_fast.divergences import Divergence
from lrds_fast.functional import kd_loss


class LabelRevisionKDLoss(nn.Module):
    """KL of the revised teacher to the student, at T = 1, over the labels that are not ignored.

    revise, eta, divergence: as kd_loss; revise=None and "kl" is torchtune's ForwardKLLoss (0.6.1) minus the teacher's
    entropy, which has no gradient; "rkl" its ReverseKLLoss. ignore_index: the label of rows that do not count.
    """

    def __init__(
        self,
        revise: str | None = "lr",
        eta: float = 0.8,
        divergence: str | Divergence = "kl",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.revise, self.eta, self.divergence, self.ignore_index = revise, eta, divergence, ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """student_logits, teacher_logits: (..., C). labels: their rows, in any shape. normalize: the mean over the rows
        that count, else their sum. 0-d. Raises ValueError or TypeError as kd_loss."""
        return kd_loss(
            student_logits.flatten(0, -2),
            teacher_logits.flatten(0, -2),
            labels.flatten(),
            temperature=1.0,
            ce_weight=0.0,
            kd_weight=1.0,
            revise=self.revise,
            eta=self.eta,
            divergence=self.divergence,
            ignore_index=self.ignore_index,
            reduction="mean" if normalize else "sum",
        )
