"""The loss as a module, which stores the hyperparameters and calls kd_loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from lrds_fast.arguments import unknown_keyword
from lrds_fast.divergences import REVISE_TEMPERATURE, Divergence
from lrds_fast.functional import kd_loss
from lrds_fast.logit_maps import LogitScale, Softcap, common_classes, logit_maps
from lrds_fast.options import KEYWORDS, default_ce_weight_unselected, kd_options
from lrds_fast.topk import TopKTeacher


class KDLoss(nn.Module):
    """kd_loss as a module: KDLoss(4.0), or the keywords of kd_loss, which become attributes of the same names.

    The constructor checks the hyperparameters, and so does every call, because the attributes can be assigned to. They
    raise ValueError or TypeError. The module has no parameters; class_weight is a buffer. torch.compile treats numbers
    as constants: it recompiles when a weight changes and, after torch._dynamo.config.recompile_limit (8)
    recompilations, runs the loss uncompiled, with the same results. Do not compile a loss whose weights change every
    epoch: it is a single op already.
    """

    # Also of the class, because a KDLoss that an older version pickled lacks them.
    classes: str = "equal"
    logit_scale: LogitScale = 1.0
    softcap: Softcap = None

    def __init__(
        self,
        temperature: float | Sequence[float] = 4.0,
        *,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        ce_weight_unselected: float | None = None,
        revise: str | None = "lr",
        eta: float = 0.8,
        revise_temperature: float | None = REVISE_TEMPERATURE,
        divergence: str | Divergence = "kl",
        standardize: bool = False,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        classes: str = "equal",
        logit_scale: LogitScale = 1.0,
        softcap: Softcap = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        if unknown:
            raise unknown_keyword(KDLoss, unknown)
        checked = kd_options(
            temperature,
            ce_weight,
            kd_weight,
            ce_weight_unselected,
            revise,
            eta,
            revise_temperature,
            divergence,
            standardize,
            label_smoothing,
            ignore_index,
            reduction,
        )
        # Converted to Python numbers.
        several = isinstance(temperature, (tuple, list))
        self.temperature = tuple(checked.temperature) if several else checked.temperature[0]
        self.ce_weight = checked.ce_weight
        self.kd_weight = checked.kd_weight
        self.ce_weight_unselected = None if ce_weight_unselected is None else checked.ce_weight_unselected
        self.revise = checked.policy()
        self.eta = checked.eta
        self.revise_temperature = checked.revise_temperature or None
        self.divergence = divergence
        self.standardize = standardize
        self.label_smoothing = checked.label_smoothing
        # A buffer, as in nn.CrossEntropyLoss, so that .to(device) moves it.
        self.register_buffer("class_weight", class_weight)
        self.class_weight: Tensor | None
        self.ignore_index = checked.ignore_index
        self.reduction = reduction
        common_classes(classes, 1, 1)
        logit_maps(logit_scale, softcap)
        self.classes = classes
        self.logit_scale = logit_scale
        self.softcap = softcap

    @property
    def resolved_ce_weight_unselected(self) -> float:
        """The CE weight of rows without a teacher: ce_weight_unselected, or its default."""
        if self.ce_weight_unselected is not None:
            return self.ce_weight_unselected
        return default_ce_weight_unselected(self.ce_weight, self.kd_weight)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | TopKTeacher,
        target: Tensor | None = None,
        selected: Tensor | None = None,
        *,
        teacher_rows: int | None = None,
        num_valid: Tensor | float | None = None,
        weight_sum: Tensor | float | None = None,
        grad_scale: Tensor | float | None = None,
    ) -> Tensor:
        """The loss; shapes, dtypes and errors as lrds_fast.kd_loss."""
        hyperparameters: dict[str, Any] = {name: getattr(self, name) for name in KEYWORDS}
        return kd_loss(
            student_logits,
            teacher_logits,
            target,
            selected=selected,
            teacher_rows=teacher_rows,
            class_weight=self.class_weight,
            num_valid=num_valid,
            weight_sum=weight_sum,
            grad_scale=grad_scale,
            classes=self.classes,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            **hyperparameters,
        )

    def extra_repr(self) -> str:
        added = ("classes", "logit_scale", "softcap")
        names = [*KEYWORDS, *(name for name in added if getattr(self, name) != getattr(type(self), name))]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
