"""Eigendecompositions and inverses of positive semi-definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def psd_eigendecomposition(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), clamped at 0, and eigenvectors (..., n, n) of positive semi-definite matrices (..., n, n).

    The antisymmetric part that rounding leaves in `matrix` is dropped.
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.clamp_min(0.0), vectors.contiguous()


def inverse_eigenvalues(values: Tensor, damping: float, size: int) -> Tensor:
    """1 / values; with damping 0 the pseudo-inverse: 0 where a value is 0 up to rounding.

    values: damped eigenvalues, of any shape. damping: what was added to them. size: the dimension of the decomposed
    matrix. Without damping, values up to 10 * size * eps * max |values| count as 0.
    """
    floor = 0.0
    if damping == 0.0:
        floor = 10 * size * torch.finfo(values.dtype).eps * float(values.abs().max())
    return torch.where(values > floor, 1.0 / values, 0.0)
