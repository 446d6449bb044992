"""Preconditioned conjugate gradients for several right-hand sides, which share the passes over the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lrds_fast.ranks import Ranks


def conjugate_gradients(
    products: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    precondition: Callable[[Tensor], Tensor],
    right: Sequence[Tensor],
    *,
    tolerance: float,
    iterations: int,
    ranks: Ranks,
    damping: str,
) -> list[Tensor]:
    """x with H x = b for every b in `right`, tensors of one shape, float64.

    products: H v for several v at once. precondition: an approximation of H^-1 v. tolerance: on |H x - b| / |b|. ranks:
    the processes that take the same steps. damping: H's, for the error. Raises RuntimeError where the tolerance is not
    reached.
    """
    solutions = [torch.zeros_like(b) for b in right]
    residuals = [b.clone() for b in right]
    norms = [float(b.norm()) for b in right]
    active = [number for number, norm in enumerate(norms) if norm > 0.0]
    directions = {number: precondition(residuals[number]) for number in active}
    inner = {number: float((residuals[number] * directions[number]).sum()) for number in active}
    for _ in range(iterations):
        if not active:
            return solutions
        for number, product in zip(active, products([directions[number] for number in active]), strict=True):
            step = inner[number] / float((directions[number] * product).sum())
            solutions[number] += step * directions[number]
            residuals[number] -= step * product
        # Processes that round differently must still take the same number of steps.
        active = ranks.agree([n for n in active if not float(residuals[n].norm()) <= tolerance * norms[n]])
        for number in active:
            z = precondition(residuals[number])
            inner[number], previous = float((residuals[number] * z).sum()), inner[number]
            directions[number] = z + (inner[number] / previous) * directions[number]
    if not active:
        return solutions
    worst = max(float(residuals[number].norm()) / norms[number] for number in active)
    raise RuntimeError(
        f"curvature 'exact': conjugate gradients reached a relative residual of {worst:.1e} in {iterations} steps, not"
        f" {tolerance:.0e}; raise damping (now {damping}) or use curvature='ekfac'"
    )
