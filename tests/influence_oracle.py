"""Last-layer influence by definition: dense per-sample gradients and Hessians from autograd, float64, small sizes.

Nothing here uses the closed forms under test: gradients come from torch.func on lrds_fast.reference's loss as a
function of the weight matrix, the Hessian from differentiating the whole training objective twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, vmap

from lrds_fast import reference
from lrds_fast.nn import KDLoss


@dataclass(frozen=True)
class Case:
    """A small problem whose logits are W h~ exactly, with everything float64. D = d + 1 where there is a bias."""

    weight: Tensor
    features: Tensor
    teacher_logits: Tensor
    target: Tensor
    val_features: Tensor
    val_target: Tensor
    selected: Tensor | None
    bias: bool
    loss: KDLoss

    def augmented(self, features: Tensor) -> Tensor:
        """The features with a column of ones where there is a bias: h~."""
        if not self.bias:
            return features
        return torch.cat([features, features.new_ones(len(features), 1)], dim=1)

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """The keywords of last_layer_scores, with tensors of this dtype."""
        return {
            "features": self.features.to(dtype),
            "student_logits": (self.augmented(self.features) @ self.weight.T).to(dtype),
            "teacher_logits": self.teacher_logits.to(dtype),
            "target": self.target,
            "val_features": self.val_features.to(dtype),
            "val_logits": (self.augmented(self.val_features) @ self.weight.T).to(dtype),
            "val_target": self.val_target,
            "selected": self.selected,
            "bias": self.bias,
            "loss": self.loss,
        }

    def row_loss(self, weight: Tensor, h: Tensor, v: Tensor, y: Tensor, w: Tensor) -> Tensor:
        """The training loss of one row whose teacher has weight w, from KDLoss."""
        return _row_loss(self.loss, weight, h, v, y, w)

    def gradients(self, of: str) -> Tensor:
        """(N, C*D) per-sample gradients in the weights: of the label ("gt"), the teacher ("kd") or the change."""
        h = self.augmented(self.features)
        on, off = torch.ones(len(h), dtype=h.dtype), torch.zeros(len(h), dtype=h.dtype)
        per_row = (None, 0, 0, 0, 0)
        if of == "delta":
            rows = vmap(grad(self.row_loss), in_dims=per_row)
            both = [rows(self.weight, h, self.teacher_logits, self.target, w) for w in (on, off)]
            change: Tensor = both[0] - both[1]
            return change.flatten(1)
        only = KDLoss(
            temperature=self.loss.temperature,
            ce_weight=float(of == "gt"),
            kd_weight=float(of == "kd"),
            revise=self.loss.revise,
            eta=self.loss.eta,
            revise_temperature=self.loss.revise_temperature,
        )

        def loss(weight: Tensor, h: Tensor, v: Tensor, y: Tensor, w: Tensor) -> Tensor:
            return _row_loss(only, weight, h, v, y, w)

        rows = vmap(grad(loss), in_dims=per_row)
        gradients: Tensor = rows(self.weight, h, self.teacher_logits, self.target, on)
        return gradients.flatten(1)

    def validation_gradient(self) -> Tensor:
        """The gradient of the mean held-out cross-entropy, (C*D,)."""
        h = self.augmented(self.val_features)
        gradient: Tensor = grad(lambda weight: F.cross_entropy(h @ weight.T, self.val_target))(self.weight)
        return gradient.flatten()

    def hessian(self, kind: str) -> Tensor:
        """(C*D, C*D) second derivative of the mean training loss, of the cross-entropy alone for kind "gt"."""
        h = self.augmented(self.features)

        def objective(flat: Tensor) -> Tensor:
            z = h @ flat.reshape(self.weight.shape).T
            if kind == "gt":
                return F.cross_entropy(z, self.target)
            return reference_loss(self.loss, z, self.teacher_logits, self.target, self.selected)

        dense: Tensor = hessian(objective)(self.weight.flatten())
        return dense

    def curvature(self, name: str, kind: str, damping: float | None, scale: float = 0.1) -> Tensor:
        """The damped curvature `name`, dense, (C*D, C*D)."""
        size = self.weight.numel()
        eye = torch.eye(size, dtype=torch.float64)
        if name == "identity":
            return eye * (1.0 + (damping or 0.0))
        dense = self.hessian(kind)
        if name == "exact":
            return dense + eye * (scale * dense.trace() / size if damping is None else damping)
        # G as the model's own Fisher: the second derivative in the logits, row by row.
        h = self.augmented(self.features)
        z = h @ self.weight.T
        w = torch.ones(len(h), dtype=h.dtype) if self.selected is None else self.selected.to(h.dtype)

        def row(z: Tensor, v: Tensor, y: Tensor, w: Tensor) -> Tensor:
            if kind == "gt":
                return F.cross_entropy(z[None], y[None])
            return reference_loss(self.loss, z[None], v[None], y[None], w[None])

        g = vmap(hessian(row))(z, self.teacher_logits, self.target, w).mean(0)
        g_values, qg = torch.linalg.eigh(g)
        a_values, qa = torch.linalg.eigh(h.T @ h / len(h))
        basis = torch.kron(qg, qa)
        values = torch.kron(g_values, a_values) if name == "kfac" else (basis * (dense @ basis)).sum(0)
        values = values + (scale * values.mean() if damping is None else damping)
        return basis @ torch.diag(values) @ basis.T

    def scores(self, name: str, kind: str, damping: float | None) -> dict[str, Tensor]:
        """Every score that has a curvature in it, by definition."""
        inverse = torch.linalg.inv(self.curvature(name, kind, damping))
        g = {of: self.gradients(of) for of in ("gt", "kd", "delta")}
        scores = {f"param_shift:{of}": (g[of] @ inverse).norm(dim=1) for of in g}
        scores["self_influence"] = ((g["gt"] @ inverse) * g["gt"]).sum(1)
        along = inverse @ self.validation_gradient()
        scores["kd_gain"] = gain = -(g["delta"] @ along)
        term = -self.loss.kd_weight * (g["kd"] @ along)
        scores["teacher_harm"] = torch.where(term > 0, gain, torch.minimum(gain, term))
        scores["kd_gain_ns"] = self._newton_gain(self.curvature(name, kind, damping), kind, g["delta"])
        return scores

    def _newton_gain(self, curvature: Tensor, kind: str, delta: Tensor) -> Tensor:
        """kd_gain where each row's own Hessian is added to H, or subtracted where the teacher is part of H."""
        h = self.augmented(self.features)
        count, size = len(h), self.weight.numel()
        w = torch.ones(count, dtype=h.dtype) if self.selected is None else self.selected.to(h.dtype)
        w = torch.zeros_like(w) if kind == "gt" else w
        rows = vmap(hessian(self.row_loss), in_dims=(None, 0, 0, 0, 0))
        on, off = torch.ones_like(w), torch.zeros_like(w)
        change = rows(self.weight, h, self.teacher_logits, self.target, on)
        change = (change - rows(self.weight, h, self.teacher_logits, self.target, off)).reshape(count, size, size)
        switched = curvature + (1 - 2 * w)[:, None, None] * change / count
        shift: Tensor = -(torch.linalg.solve(switched, delta) @ self.validation_gradient())
        return shift


def reference_loss(loss: KDLoss, z: Tensor, v: Tensor, y: Tensor, selected: Tensor | None, **keywords: Any) -> Tensor:
    """The reference's kd_loss with the hyperparameters of `loss`. keywords: further ones of kd_loss."""
    return reference.kd_loss(
        z,
        v,
        y,
        temperature=loss.temperature,
        ce_weight=loss.ce_weight,
        kd_weight=loss.kd_weight,
        ce_weight_unselected=loss.ce_weight_unselected,
        revise=loss.revise,
        eta=loss.eta,
        revise_temperature=loss.revise_temperature,
        selected=selected,
        label_smoothing=loss.label_smoothing,
        **keywords,
    )


def _row_loss(loss: KDLoss, weight: Tensor, h: Tensor, v: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return reference_loss(loss, (weight @ h)[None], v[None], y[None], w[None])


def make_case(
    seed: int,
    *,
    rows: int = 60,
    classes: int = 5,
    width: int = 7,
    bias: bool = True,
    selected: str = "all",
    **loss: Any,
) -> Case:
    """selected: "all" (None), "some" (a bool mask) or "weights" (floats in [0, 1])."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # Values that float32 holds exactly, so that both dtypes score the same problem.
        return torch.randn(*shape, generator=generator, dtype=torch.float32).double()

    masks = {
        "all": None,
        "some": torch.rand(rows, generator=generator) < 0.6,
        "weights": torch.rand(rows, generator=generator).double(),
    }
    return Case(
        weight=normal(classes, width + int(bias)),
        features=normal(rows, width),
        teacher_logits=3 * normal(rows, classes),
        target=torch.randint(0, classes, (rows,), generator=generator),
        val_features=normal(21, width),
        val_target=torch.randint(0, classes, (21,), generator=generator),
        selected=masks[selected],
        bias=bias,
        loss=KDLoss(**loss),
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| of whole vectors."""
    return float((actual.double() - expected).norm() / expected.norm())
