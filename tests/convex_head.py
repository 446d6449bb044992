"""Exact retraining of a softmax head: the ground truth that influence scores are measured against.

J(W) = 1/n sum_i [ c_i CE(W h~_i, y_i) + k_i T^2 KL(p_i || softmax(W h~_i / T)) ] + wd/2 |W|^2, everything float64.
Written from the formulas, without the library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

TOLERANCE = 1e-11


@dataclass(frozen=True)
class Head:
    """One training problem: h (n, D) with the bias column, one-hot y (n, C), teacher p (n, C), weights ce, kd (n,)."""

    h: Tensor
    y: Tensor
    p: Tensor
    ce: Tensor
    kd: Tensor
    temperature: float
    decay: float

    def gradient(self, w: Tensor) -> Tensor:
        """dJ/dW, (..., C, D), for W (..., C, D)."""
        z = self.h @ w.mT
        delta = self.ce[:, None] * (z.softmax(-1) - self.y)
        delta = delta + (self.kd * self.temperature)[:, None] * ((z / self.temperature).softmax(-1) - self.p)
        return delta.mT @ self.h / self.h.shape[0] + self.decay * w

    def hessian(self, w: Tensor) -> Tensor:
        """The Hessian at one W, (C*D, C*D)."""
        n, width = self.h.shape
        classes = self.y.shape[1]
        z = self.h @ w.T
        total = self.decay * torch.eye(classes * width, dtype=w.dtype)
        for weight, q in ((self.ce, z.softmax(-1)), (self.kd, (z / self.temperature).softmax(-1))):
            if not weight.any():
                continue
            for c in range(classes):
                block = slice(c * width, (c + 1) * width)
                total[block, block] += self.h.T @ (self.h * (weight * q[:, c])[:, None]) / n
            k = ((weight.sqrt()[:, None] * q)[:, :, None] * self.h[:, None, :]).flatten(1)
            total -= k.T @ k / n
        return total

    def value(self, w: Tensor) -> Tensor:
        """J at W, without the teacher's entropy, which is constant."""
        z = self.h @ w.T
        ce = -(self.y * z.log_softmax(-1)).sum(-1)
        kd = -(self.p * (z / self.temperature).log_softmax(-1)).sum(-1) * self.temperature**2
        return (self.ce * ce + self.kd * kd).mean() + 0.5 * self.decay * w.square().sum()

    def train(self, start: Tensor | None = None) -> Tensor:
        """Returns the minimiser, found by Newton steps with step halving, to a gradient norm of TOLERANCE."""
        w = torch.zeros(self.y.shape[1], self.h.shape[1], dtype=self.h.dtype) if start is None else start
        for _ in range(100):
            gradient = self.gradient(w)
            if gradient.norm() <= TOLERANCE:
                return w
            factor = torch.linalg.cholesky(self.hessian(w))
            step = torch.cholesky_solve(gradient.reshape(-1, 1), factor).reshape(w.shape)
            size, here = 1.0, self.value(w)
            while self.value(w - size * step) > here + 1e-12 * here.abs() and size > 1e-6:
                size /= 2
            w = w - size * step
        raise RuntimeError(f"Newton stopped at a gradient norm of {float(gradient.norm()):.1e}")

    def retrain_each(self, base: Tensor, rows: Tensor, *, ce: float, kd: float) -> Tensor:
        """Minimisers (K, C, D) of K problems: in the k-th, row rows[k] has the weights ce and kd instead of its own.

        Many at once by chord steps from base with base's Hessian: one row changes it little, so every step gains
        digits; each goes on until its own gradient norm is within TOLERANCE.
        """
        factor = torch.linalg.cholesky(self.hessian(base))
        solutions = [self._retrain(base, factor, part, ce, kd) for part in torch.split(rows, 100)]
        return torch.cat(solutions)

    def _retrain(self, base: Tensor, factor: Tensor, rows: Tensor, ce: float, kd: float) -> Tensor:
        t = self.temperature
        solution = base.expand(len(rows), *base.shape).clone()
        active = torch.arange(len(rows))
        for _ in range(500):
            w, row = solution[active], rows[active]
            h, z = self.h[row], torch.einsum("kcd,kd->kc", w, self.h[row])
            delta = (ce - self.ce[row])[:, None] * (z.softmax(-1) - self.y[row])
            delta += ((kd - self.kd[row]) * t)[:, None] * ((z / t).softmax(-1) - self.p[row])
            gradient = self.gradient(w) + delta[:, :, None] * h[:, None, :] / self.h.shape[0]
            step = torch.cholesky_solve(gradient.flatten(1).T, factor).T.reshape(w.shape)
            open_ = gradient.flatten(1).norm(dim=1) > TOLERANCE
            active = active[open_]
            if not len(active):
                return solution
            solution[active] -= step[open_]
        raise RuntimeError(f"{len(active)} retrainings did not converge")

    def with_weights(self, *, ce: Tensor | None = None, kd: Tensor | None = None) -> Head:
        """Returns the same problem with other row weights."""
        return replace(self, ce=self.ce if ce is None else ce, kd=self.kd if kd is None else kd)


def cross_entropy(w: Tensor, h: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of h (m, D) under each W: (...)."""
    log_q = (h @ w.mT).log_softmax(-1)
    return -log_q.gather(-1, target.expand(log_q.shape[:-1])[..., None])[..., 0].mean(-1)


@dataclass(frozen=True)
class DigitsProblem:
    """A noisy distillation problem on scikit-learn's digits, one per seed.

    The pixels over 16 are the features. Of the training rows, a tenth carry a wrong label; of the teacher's logits on
    them, a fifth have their classes permuted (`corrupted`). Teacher: the same head, trained on the clean labels of 448
    other rows with a fifth of the student's decay, so that it has something to teach.
    """

    head: Head
    target: Tensor
    clean_target: Tensor
    teacher_logits: Tensor
    corrupted: Tensor
    val_h: Tensor
    val_target: Tensor
    test_h: Tensor
    test_target: Tensor


def digits_problem(
    seed: int,
    rows: int,
    *,
    val_rows: int = 300,
    temperature: float = 4.0,
    decay: float = 1e-2,
    teacher_decay: float = 2e-3,
) -> DigitsProblem:
    """The problem of one seed; the head's weights are those of cross-entropy alone: ce 1, kd 0."""
    pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
    h = torch.cat([pixels.double() / 16, torch.ones(len(pixels), 1, dtype=torch.float64)], dim=1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(h), generator=generator)
    train, val, teach, test = torch.split(order, [rows, val_rows, 448, len(h) - rows - val_rows - 448])

    target = digits[train].clone()
    flipped = torch.randperm(rows, generator=generator)[: rows // 10]
    target[flipped] = (target[flipped] + torch.randint(1, 10, (len(flipped),), generator=generator)) % 10

    ones, zeros = torch.ones(448, dtype=h.dtype), torch.zeros(448, dtype=h.dtype)
    labels = one_hot(digits[teach])
    teacher = Head(h[teach], labels, labels, ones, zeros, temperature, teacher_decay).train()
    logits = h[train] @ teacher.T
    corrupted = torch.randperm(rows, generator=generator)[: rows // 5]
    for row in corrupted:
        logits[row] = logits[row, torch.randperm(10, generator=generator)]

    ones, zeros = torch.ones(rows, dtype=h.dtype), torch.zeros(rows, dtype=h.dtype)
    p = (logits / temperature).softmax(-1)
    return DigitsProblem(
        head=Head(h[train], one_hot(target), p, ones, zeros, temperature, decay),
        target=target,
        clean_target=digits[train],
        teacher_logits=logits,
        corrupted=corrupted,
        val_h=h[val],
        val_target=digits[val],
        test_h=h[test],
        test_target=digits[test],
    )


def one_hot(target: Tensor) -> Tensor:
    """The labels as one-hot rows, (N, 10) float64."""
    return F.one_hot(target, 10).double()
