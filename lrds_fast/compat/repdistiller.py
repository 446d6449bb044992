"""The KD losses of RepDistiller and mdistiller with kd_loss.

Neither is a package, so nothing is imported: DistillKL takes the place of RepDistiller's distiller_zoo.DistillKL, and
LRDS is added to mdistiller's distiller_dict by `distiller(Distiller)`, Distiller being mdistiller.distillers._base's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrds_fast.functional import kd_loss, kd_loss_parts
from lrds_fast.nn import KDLoss


class DistillKL(nn.Module):
    """T^2 KL(teacher || student), the mean over rows: RepDistiller's criterion_div(logit_s, logit_t).

    revise, eta: kd_loss's; with revise the target must be passed, criterion_div(logit_s, logit_t, target).
    """

    def __init__(self, T: float, *, revise: str | None = None, eta: float = 0.8) -> None:
        super().__init__()
        self.T, self.revise, self.eta = T, revise, eta

    def forward(self, y_s: Tensor, y_t: Tensor, target: Tensor | None = None) -> Tensor:
        """y_s, y_t: (N, C) logits; target: (N,), needed where revise is not None."""
        if target is None and self.revise is not None:
            raise ValueError("revise needs the target; call criterion_div(logit_s, logit_t, target)")
        weights: dict[str, Any] = {"ce_weight": 0.0, "ce_weight_unselected": 0.0, "kd_weight": 1.0}
        return kd_loss(y_s, y_t, target, temperature=self.T, revise=self.revise, eta=self.eta, **weights)


def distiller(base: type[nn.Module]) -> type[nn.Module]:
    """mdistiller's KD distiller with kd_loss, a subclass of base, its Distiller.

    Reads KD.TEMPERATURE, KD.LOSS.CE_WEIGHT and KD.LOSS.KD_WEIGHT of its config, and an LRDS node with keywords of
    KDLoss, such as REVISE and ETA, where the config has one.
    """

    class LRDS(base):  # type: ignore[misc, valid-type]
        def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
            super().__init__(student, teacher)
            own = dict(getattr(cfg, "LRDS", {}))
            self.options: dict[str, Any] = {
                "temperature": cfg.KD.TEMPERATURE,
                "ce_weight": cfg.KD.LOSS.CE_WEIGHT,
                "kd_weight": cfg.KD.LOSS.KD_WEIGHT,
                **{name.lower(): value for name, value in own.items()},
            }
            KDLoss(**self.options)  # checks them

        def forward_train(self, image: Tensor, target: Tensor, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
            logits, _features = self.student(image)
            with torch.no_grad():
                taught, _features = self.teacher(image)
            # mdistiller adds the losses: the first has the gradient of both, the second is 0 and logged.
            parts = kd_loss_parts(logits, taught, target, **self.options)
            return logits, {"loss_ce": parts.loss - parts.kd, "loss_kd": parts.kd}

    return LRDS
