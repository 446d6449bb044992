"""Fast knowledge distillation with label revision and data selection (Lan et al., arXiv 2404.03693).

kd_loss, kd_loss_parts, KDLoss: the fused loss. KL, RKL, DKD, RLD, NKD, MSE, JSD, TVD, SKL, SRKL: its divergences.
TopKTeacher: a cached teacher; bucketed_logits: some classes, and all others as one. linear_kd_loss: the loss from
hidden states and classifiers. revision_loss, dist_loss, mlkd_loss: losses that compare the rows of a batch.
revise_labels: the revised teacher. influence: scores of samples. select, select_jointly, Selection: which samples keep
their teacher. models: networks by name. reference: every op in plain PyTorch.

A name is imported when it is first used. Importing any loss, or lrds_fast.functional, registers torch.ops.lrds_fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lrds_fast._version import __version__

if TYPE_CHECKING:
    from lrds_fast import divergences, influence, models, reference
    from lrds_fast.composed import dist_loss, mlkd_loss, revision_loss
    from lrds_fast.divergences import DKD, JSD, KL, MSE, NKD, RKL, RLD, SKL, SRKL, TVD
    from lrds_fast.functional import KDLossParts, kd_loss, kd_loss_parts, revise_labels
    from lrds_fast.linear import linear_kd_loss
    from lrds_fast.nn import KDLoss
    from lrds_fast.selection import Selection, select, select_jointly
    from lrds_fast.topk import TopKTeacher, bucketed_logits

__all__ = [
    "DKD",
    "JSD",
    "KL",
    "KDLoss",
    "KDLossParts",
    "MSE",
    "NKD",
    "RKL",
    "RLD",
    "SKL",
    "SRKL",
    "Selection",
    "TVD",
    "TopKTeacher",
    "__version__",
    "bucketed_logits",
    "dist_loss",
    "divergences",
    "influence",
    "kd_loss",
    "kd_loss_parts",
    "linear_kd_loss",
    "mlkd_loss",
    "models",
    "reference",
    "revise_labels",
    "revision_loss",
    "select",
    "select_jointly",
]

# Imported on first use, so that the command line starts without PyTorch, and kd_loss without Parquet and the models.
_NAMES = {
    "_ops": ("_C",),
    "composed": ("dist_loss", "mlkd_loss", "revision_loss"),
    "divergences": ("DKD", "JSD", "KL", "MSE", "NKD", "RKL", "RLD", "SKL", "SRKL", "TVD"),
    "functional": ("KDLossParts", "kd_loss", "kd_loss_parts", "revise_labels"),
    "influence": (),
    "linear": ("linear_kd_loss",),
    "models": (),
    "nn": ("KDLoss",),
    "reference": (),
    "selection": ("Selection", "select", "select_jointly"),
    "topk": ("TopKTeacher", "bucketed_logits"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in (home, *names)}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lrds_fast' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"lrds_fast.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from lrds_fast import _build

        raise ImportError(_build.problem() or str(error)) from None
    value = module if name == _HOMES[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
