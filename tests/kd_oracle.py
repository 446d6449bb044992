"""The KD term and its gradient by the definitions of docs/method.md, and a scan of the neighbourhood of its
singularities.

The oracle is written in log space and in numpy's longdouble (80 bits on x86, where nothing below underflows or
cancels), gradients by hand. It shares no code with lrds_fast. `python kd_oracle.py CASES SEED` prints how many rows of
each divergence were compared.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrds_fast import kd_loss
from lrds_fast.divergences import DKD, JSD, KL, MSE, NKD, RKL, RLD, SKL, SRKL, TVD, Divergence

Array = NDArray[Any]
INF = np.longdouble(np.inf)


class Answer(NamedTuple):
    """Rows' losses (N,) and gradients (N, C); the sizes of their terms, to which rounding is relative; the rows (N,)
    where a revision subtracts two nearly equal probabilities."""

    loss: Array
    gradient: Array
    loss_size: Array
    gradient_size: Array
    ill: Array


def log_sum(x: Array) -> Array:
    """logsumexp over the last axis, which is kept; -inf where every entry is -inf."""
    top = x.max(axis=-1, keepdims=True)
    top = np.where(top == -INF, 0, top)
    total: Array = top + np.log(np.exp(x - top).sum(axis=-1, keepdims=True))
    return total


def distribution(x: Array) -> Array:
    """log softmax over the last axis; -inf where every entry is -inf."""
    total = log_sum(x)
    return np.where(total == -INF, -INF, x - np.where(total == -INF, 0, total))


def size_of(*logs: Array) -> Any:
    """1 + what the logarithms of these probabilities are; an excluded one is exact."""
    return 1 + sum(np.abs(np.where(np.isinf(x), 0, x)) for x in logs)


class Rows:
    """z, v: (N, C) longdouble. y (N,). soft: (N, C) or None. Masses below `floor` count as 0. unit: the rounding error
    of what is compared, relative to a size."""

    def __init__(
        self, z: Array, v: Array, y: Array, soft: Array | None, floor: float, unit: float, **options: Any
    ) -> None:
        self.y, self.floor, self.unit = y[:, None], np.longdouble(floor), np.longdouble(unit)
        self.divergence: Divergence = options["divergence"]
        self.revise, self.eta = options["revise"], np.longdouble(options["eta"])
        self.t = np.longdouble(options["temperature"])
        at = options.get("revise_temperature")
        self.revise_temperature = None if at is None else np.longdouble(at)
        self.at_y = np.arange(z.shape[1]) == self.y
        self.raw, self.soft = v, soft
        self.ill = np.zeros(len(z), dtype=bool)
        self.standardized = options["standardize"]
        self.z, self.v = z, v
        if self.standardized:
            self.z, self.d, self.deviation, self.scale = self._standard(z)
            self.v = self._standard(v)[0]

    @staticmethod
    def _standard(x: Array) -> tuple[Array, Array, Array, Array]:
        d = x - x.max(axis=1, keepdims=True)
        d = d - d.mean(axis=1, keepdims=True)
        deviation = np.sqrt((d * d).sum(axis=1, keepdims=True) / (x.shape[1] - 1))
        scale = 1 / (deviation + np.longdouble("1e-7"))
        return d * scale, d, deviation, scale

    def of(self, x: Array) -> Array:
        """x at the target, (N, 1)."""
        return np.take_along_axis(x, self.y, axis=1)

    def others(self, x: Array) -> Array:
        """x with -inf at the target."""
        return np.where(self.at_y, -INF, x)

    def mass(self, log_p: Array) -> Array:
        p = np.exp(log_p)
        return np.where(p < self.floor, 0, p)

    def times(self, log_p: Array, ratio: Array) -> Array:
        """p * ratio, 0 where p is."""
        p = self.mass(log_p)
        return np.where(p == 0, 0, p * np.where(p == 0, 0, ratio))

    def revised(self, t: Array) -> tuple[Array, Array]:
        """log p' at the temperature t, and v'."""
        r = self.revise_temperature
        if r is None or r == t or self.revise not in ("lr", "mft"):
            return self.revised_at(t)
        log_p, v = self.revised_at(r)  # p' to the power of r / t, normalised
        return distribution(log_p * (r / t)), v

    def revised_at(self, t: Array) -> tuple[Array, Array]:
        """log p' of a revision at the temperature t, and v'."""
        v, eta = self.v, self.eta
        raw_y, raw_top = self.of(self.raw), self.raw.max(axis=1, keepdims=True)
        wrong = raw_y < raw_top
        if self.revise == "swap":
            top = self.raw.argmax(axis=1)[:, None]
            swapped = v.copy()
            np.put_along_axis(swapped, self.y, np.take_along_axis(v, top, axis=1), axis=1)
            np.put_along_axis(swapped, top, self.of(v), axis=1)
            v = np.where(wrong, swapped, v)
        log_p = distribution(v / t)
        if self.revise in (None, "swap"):
            return log_p, v
        gap = np.where(wrong, self.of(v) - v.max(axis=1, keepdims=True), 0)
        lead = -np.exp(log_p.max(axis=1, keepdims=True)) * np.expm1(gap / t)  # p_a - p_y
        if self.soft is not None:
            positive = np.where(self.soft > 0, self.soft, 0)
            total = positive.sum(axis=1, keepdims=True)
            wrong = wrong & (total > 0)
            target = positive / np.where(total > 0, total, 1)
            margin = self.of(target) - np.where(self.at_y, 0, target).max(axis=1, keepdims=True)
            # What a float32 sum makes of probabilities that add up to one.
            tied = margin == 0
            beta = np.where(tied, 0, eta * margin / np.where(tied, 1, margin + lead))
        else:
            target = self.at_y.astype(np.longdouble)
            beta = eta / (1 + lead)
        changed = wrong
        if self.revise == "mft":
            log_others = log_sum(self.others(log_p))
            others = np.exp(log_others)
            left = others - (1 - eta)
            self.ill |= (~wrong & (np.abs(left) < (1 - eta) / 50))[:, 0]
            lifted = np.where(left > 0, left / np.where(left > 0, others, 1), 0)
            beta = np.where(wrong, beta, lifted)
            changed = wrong | (log_others > -INF)
        mixed = np.logaddexp(np.log(beta) + log_p, np.log1p(-beta) + np.log(target))
        new = np.where(target > 0, mixed, np.log(beta) + log_p)
        total = log_sum(v / t)
        lifted_v = np.where(target > 0, t * (mixed - np.log(beta) + total), v)
        if self.soft is not None:  # of a teacher that nothing is left of, the anchor
            lifted_v = np.where(beta > 0, lifted_v, v.max(axis=1, keepdims=True) + t * mixed)
        return np.where(changed, new, log_p), np.where(changed, lifted_v, v)

    # --- Each: loss (N,), gradient (N, C) with respect to self.z, and their sizes.

    def answer(self) -> Answer:
        with np.errstate(all="ignore"):
            if isinstance(self.divergence, RLD):
                self.revise = None
            loss, gradient, loss_size, size = getattr(self, "_" + self.divergence.name)(self.divergence)
            if self.standardized:
                slope = self.scale / ((self.z.shape[1] - 1) * np.where(self.deviation > 0, self.deviation, INF))
                mean = gradient.mean(axis=1, keepdims=True)
                along = (gradient * self.d).sum(axis=1, keepdims=True)
                gradient = self.scale * (gradient - mean - self.d * slope * along)
                d = np.abs(self.d)
                size = self.scale * (
                    size + size.mean(axis=1, keepdims=True) + d * slope * (size * d).sum(axis=1, keepdims=True)
                )
            return Answer(loss.sum(axis=1), gradient, loss_size.sum(axis=1), size, self.ill)

    def _kl(self, _: KL) -> tuple[Array, ...]:
        t = self.t
        log_p, log_q = self.revised(t)[0], distribution(self.z / t)
        p, q = self.mass(log_p), self.mass(log_q)
        loss = t * t * self.times(log_p, log_p - log_q)
        sizes = p * size_of(log_p) * size_of(log_p, log_q)
        return loss, t * (q - p), t * t * sizes, t * (q * size_of(log_q) + p * size_of(log_p))

    def _rkl(self, _: RKL) -> tuple[Array, ...]:
        t = self.t
        log_p, log_q = self.revised(t)[0], distribution(self.z / t)
        q = self.mass(log_q)
        loss = self.times(log_q, log_q - log_p)
        kl = loss.sum(axis=1, keepdims=True)
        sizes = q * size_of(log_q) * size_of(log_p, log_q)
        gradient = t * self.times(log_q, log_q - log_p - kl)
        return (
            t * t * loss,
            gradient,
            t * t * sizes,
            t * (sizes + q * size_of(log_q) * sizes.sum(axis=1, keepdims=True)),
        )

    def _binary(self, log_p: Array, log_rest: Array, log_q: Array, log_q_rest: Array) -> tuple[Array, ...]:
        """KL((p, 1 - p) || (q, 1 - q)), its derivative by logit q, and sizes; all (N, 1)."""
        loss = self.times(log_p, log_p - log_q) + self.times(log_rest, log_rest - log_q_rest)
        p, rest, q, q_rest = (np.exp(x) for x in (log_p, log_rest, log_q, log_q_rest))
        loss_size = p * size_of(log_p) * size_of(log_p, log_q) + rest * size_of(log_rest) * size_of(
            log_rest, log_q_rest
        )
        difference = np.where(q > q_rest, rest - q_rest, q - p)
        by = size_of(log_p, log_rest, log_q, log_q_rest)
        return loss, difference, loss_size, by * (np.minimum(p, rest) + np.minimum(q, q_rest) + np.abs(difference))

    def _hat(self, v: Array, keep: Array) -> tuple[Array, ...]:
        """KL(phat || qhat) over the classes `keep`, per class; phat, qhat and their logarithms."""
        log_p = distribution(np.where(keep, v / self.t, -INF))
        log_q = distribution(np.where(keep, self.z / self.t, -INF))
        return self.times(log_p, log_p - log_q), self.mass(log_p), self.mass(log_q), log_p, log_q

    def _dkd(self, d: DKD) -> tuple[Array, ...]:
        t = self.t
        log_p, v = self.revised(t)
        log_q = distribution(self.z / t)
        rest_p, rest_q = log_sum(self.others(log_p)), log_sum(self.others(log_q))
        binary, lead, binary_size, lead_size = self._binary(self.of(log_p), rest_p, self.of(log_q), rest_q)
        hat, p_hat, q_hat, log_p_hat, log_q_hat = self._hat(v, ~self.at_y)
        zero = np.zeros_like(log_q)
        loss, gradient, loss_size, size = zero, zero, zero, zero
        if d.alpha:
            loss = loss + d.alpha * np.where(self.at_y, binary, 0)
            loss_size = loss_size + d.alpha * np.where(self.at_y, binary_size, 0)
            gradient = gradient + d.alpha * np.where(self.at_y, lead, -lead * q_hat)
            size = size + d.alpha * np.where(self.at_y, lead_size, lead_size * q_hat * size_of(log_q_hat))
        if d.beta:
            loss = loss + d.beta * hat
            loss_size = loss_size + d.beta * p_hat * size_of(log_p_hat) * size_of(log_p_hat, log_q_hat)
            taught = p_hat.sum(axis=1, keepdims=True) > 0
            gradient = gradient + d.beta * np.where(taught, q_hat - p_hat, 0)
            size = size + d.beta * (q_hat * size_of(log_q_hat) + p_hat * size_of(log_p_hat))
        return t * t * loss, t * gradient, t * t * loss_size, t * size

    def _rld(self, d: RLD) -> tuple[Array, ...]:
        t, tc, v = self.t, np.longdouble(d.confidence_temperature), self.v
        log_p, log_q = distribution(v / tc), distribution(self.z / tc)
        wrong = self.of(self.raw) < self.raw.max(axis=1, keepdims=True)
        top = np.where(wrong, self.raw.argmax(axis=1)[:, None], self.y)
        rest_p = log_sum(np.where(np.arange(v.shape[1]) == top, -INF, log_p))
        rest_q = log_sum(self.others(log_q))
        top_p = np.take_along_axis(log_p, top, axis=1)
        binary, lead, binary_size, lead_size = self._binary(top_p, rest_p, self.of(log_q), rest_q)
        q_hat = np.exp(distribution(self.others(log_q)))
        zero = np.zeros_like(log_q)
        loss, gradient, loss_size, size = zero, zero, zero, zero
        if d.alpha:
            loss = loss + d.alpha * tc * tc * np.where(self.at_y, binary, 0)
            loss_size = loss_size + d.alpha * tc * tc * np.where(self.at_y, binary_size, 0)
            gradient = gradient + d.alpha * tc * np.where(self.at_y, lead, -lead * q_hat)
            size = size + d.alpha * tc * np.where(self.at_y, lead_size, lead_size * q_hat * size_of(np.log(q_hat)))
        if d.beta:
            hat, p_hat, q_hat, log_p_hat, log_q_hat = self._hat(v, self.raw < self.of(self.raw))
            loss = loss + d.beta * t * t * hat
            loss_size = loss_size + d.beta * t * t * p_hat * size_of(log_p_hat) * size_of(log_p_hat, log_q_hat)
            taught = p_hat.sum(axis=1, keepdims=True) > 0
            gradient = gradient + d.beta * t * np.where(taught, q_hat - p_hat, 0)
            size = size + d.beta * t * (q_hat * size_of(log_q_hat) + p_hat * size_of(log_p_hat))
        return loss, gradient, loss_size, size

    def _nkd(self, d: NKD) -> tuple[Array, ...]:
        t = self.t
        log_p1, v = self.of(self.revised(np.longdouble(1))[0]), self.revised(t)[1]
        log_q1 = distribution(self.z)
        p1, q1 = self.mass(log_p1), np.exp(log_q1)
        rest = np.exp(log_sum(self.others(log_q1)))
        loss = np.where(self.at_y, self.times(log_p1, -self.of(log_q1)), 0)
        loss_size = np.where(self.at_y, p1 * size_of(log_p1) * size_of(self.of(log_q1)), 0)
        gradient = p1 * np.where(self.at_y, -rest, q1)
        size = p1 * size_of(log_p1) * np.where(self.at_y, rest * size_of(np.log(rest)), q1 * size_of(log_q1))
        if d.gamma:
            _, p_hat, q_hat, log_p_hat, log_q_hat = self._hat(v, ~self.at_y)
            loss = loss + d.gamma * t * t * self.times(log_p_hat, -log_q_hat)
            loss_size = loss_size + d.gamma * t * t * p_hat * size_of(log_p_hat) * size_of(log_q_hat)
            taught = p_hat.sum(axis=1, keepdims=True) > 0
            gradient = gradient + d.gamma * t * np.where(taught, q_hat - p_hat, 0)
            size = size + d.gamma * t * (q_hat * size_of(log_q_hat) + p_hat * size_of(log_p_hat))
        return loss, gradient, loss_size, size

    def _mse_logits(self, _: MSE) -> tuple[Array, ...]:
        classes = self.z.shape[1]
        log_p, v = self.revised(self.t)
        d = np.where(self.z == v, 0, self.z - v)
        magnitude = np.abs(d) + self.t * size_of(np.where(v == self.v, 0, log_p))
        # What standardised logits, and a teacher revised towards a distribution, are made of.
        v_finite, z_finite = (np.where(np.isinf(x), np.nan, x) for x in (self.v, self.z))
        spread = np.nanmax(v_finite, axis=1, keepdims=True) - np.nanmin(v_finite, axis=1, keepdims=True)
        if self.standardized or self.soft is not None:
            spread = spread + np.nanmax(z_finite, axis=1, keepdims=True) - np.nanmin(z_finite, axis=1, keepdims=True)
            magnitude = magnitude + spread
        else:
            magnitude = magnitude + np.where(self.at_y, spread, 0)
        by_d = np.maximum(np.abs(d), 1e-5 * magnitude)
        return d * d / classes, 2 * d / classes, magnitude * by_d / classes, 2 * magnitude / classes

    def _mse_probs(self, _: MSE) -> tuple[Array, ...]:
        classes = self.z.shape[1]
        log_p, log_q = self.revised(self.t)[0], distribution(self.z / self.t)
        p, q = np.exp(log_p), np.exp(log_q)
        along = (q * (q - p)).sum(axis=1, keepdims=True)
        by_p, by_q = p * size_of(log_p), q * size_of(log_q)
        size = by_q * (by_p + by_q + (by_q * (by_p + by_q)).sum(axis=1, keepdims=True))
        by = 2 / (classes * self.t)
        by_d = np.maximum(np.abs(q - p), 1e-5 * (by_p + by_q))
        return (q - p) ** 2 / classes, by * q * (q - p - along), (by_p + by_q) * by_d / classes, by * size

    def _jsd(self, d: JSD) -> tuple[Array, ...]:
        t, w = self.t, np.longdouble(d.weight)
        log_p, log_q = self.revised(t)[0], distribution(self.z / t)
        log_m = np.logaddexp(np.log(w) + log_p, np.log1p(-w) + log_q)
        student = self.times(log_q, log_q - log_m)
        loss = w * self.times(log_p, log_p - log_m) + (1 - w) * student
        p, q = self.mass(log_p), self.mass(log_q)
        by_p, by_q = p * size_of(log_p) * size_of(log_p, log_m), q * size_of(log_q) * size_of(log_q, log_m)
        gradient = t * (1 - w) * self.times(log_q, log_q - log_m - student.sum(axis=1, keepdims=True))
        size = t * (1 - w) * (by_q + q * size_of(log_q) * by_q.sum(axis=1, keepdims=True))
        return t * t * loss, gradient, t * t * (w * by_p + (1 - w) * by_q), size

    def _skewed(self, w: np.longdouble, log_a: Array, log_b: Array) -> tuple[Array, ...]:
        """KL(a || m), m = w a + (1 - w) b, per class; log(a / m); the loss's size."""
        log_m = np.logaddexp(np.log(w) + log_a, np.log1p(-w) + log_b)
        size = self.mass(log_a) * size_of(log_a) * size_of(log_a, log_m)
        return self.times(log_a, log_a - log_m), log_a - log_m, size

    def _skl(self, d: SKL) -> tuple[Array, ...]:
        t, w = self.t, np.longdouble(d.weight)
        log_p, log_q = self.revised(t)[0], distribution(self.z / t)
        loss, log_ratio, size = self._skewed(w, log_p, log_q)
        q, ratio = self.mass(log_q), np.where(log_p == -INF, 0, np.exp(log_ratio))
        mean = (q * np.where(q == 0, 0, ratio)).sum(axis=1, keepdims=True)
        gradient = -t * (1 - w) * self.times(log_q, ratio - mean)
        by = np.where(q == 0, 0, ratio * size_of(log_p, log_q))
        spread = t * (1 - w) * q * size_of(log_q) * (by + (q * by).sum(axis=1, keepdims=True))
        return t * t * loss, gradient, t * t * size, spread

    def _srkl(self, d: SRKL) -> tuple[Array, ...]:
        t, w = self.t, np.longdouble(d.weight)
        log_p, log_q = self.revised(t)[0], distribution(self.z / t)
        loss, log_ratio, size = self._skewed(w, log_q, log_p)
        q, slope = self.mass(log_q), log_ratio - w * np.exp(log_ratio)
        mean = self.times(log_q, slope).sum(axis=1, keepdims=True)
        gradient = t * self.times(log_q, slope - mean)
        spread = t * (size + q * size_of(log_q) * size.sum(axis=1, keepdims=True))
        return t * t * loss, gradient, t * t * size, spread

    def _tvd(self, _: TVD) -> tuple[Array, ...]:
        t, apart = self.t, ~np.eye(self.z.shape[1], dtype=bool)
        log_p, log_q = self.revised(t)[0], distribution(self.z / t)
        p, q = np.exp(log_p), np.exp(log_q)
        by_p, by_q = p * size_of(log_p), q * size_of(log_q)
        # 1 - x of each class as a sum, whose difference has the digits that q - p has not where both are nearly 1.
        rest_p, rest_q, by_rest = ((x[:, None, :] * apart).sum(axis=2) for x in (p, q, by_p + by_q))
        sure = q > rest_q
        d = np.where(sure, rest_p - rest_q, q - p)
        sign = np.sign(d)
        gradient = q / 2 * (q[:, None, :] * apart * (sign[:, :, None] - sign[:, None, :])).sum(axis=2)
        size = by_q * (1 + by_q.sum(axis=1, keepdims=True))
        # Rounding decides the signs of probabilities that are nearly equal.
        rounding = np.where(self.at_y & sure, by_rest, by_p + by_q)
        near = np.abs(d) <= self.unit * rounding
        size = size + q * (near + np.where(near, q, 0).sum(axis=1, keepdims=True)) / self.unit
        return t / 2 * np.abs(d), gradient, t / 2 * (by_p + by_q), size


# --- The scan

# Those with parameters at their defaults, away from them, and with each part switched off.
DIVERGENCES: tuple[Divergence, ...] = (
    KL(),
    RKL(),
    DKD(),
    DKD(0.0, 2.0),
    DKD(3.0, 0.0),
    RLD(),
    RLD(0.0, 2.0),
    RLD(1.0, 0.0),
    RLD(0.5, 2.0, confidence_temperature=3.0),
    NKD(),
    NKD(0.0),
    MSE("logits"),
    MSE("probs"),
    JSD(),
    JSD(0.1),
    TVD(),
    SKL(),
    SKL(0.9),
    SRKL(),
    SRKL(0.9),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Differences of logits over T: an ulp of 1; half an ulp of float32 and of float64; the smallest normal and subnormal
# exponentials of float32 and of float64.
GAPS = (
    1e-7,
    16.6,
    36.7,
    87.0,
    87.34,
    88.0,
    102.9,
    103.0,
    103.28,
    103.97,
    104.0,
    150.0,
    708.0,
    708.4,
    744.4,
    745.2,
    800.0,
)
# Rounding errors: of the loss and of a gradient's element, over their sizes in units of half an ulp of 1, and what sums
# over many classes add. Below floor an exponential may have underflown.
ULPS = 100.0
FLOOR = {torch.float32: 1e-36, torch.float64: 1e-300}
STORED = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def ulp_above(x: Tensor) -> Tensor:
    """The next number of this type, away from 0."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.view(bits) + 1).view(x.dtype)


def rows(
    count: int, classes: int, dtype: torch.dtype, temperature: float, finite: bool, seed: int
) -> tuple[Tensor, ...]:
    """Student, teacher, target: each row mixes what is near a singularity. finite: no excluded classes."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 1.0, 5.0, 20.0])

    def draw(n: int) -> Tensor:
        return torch.randint(n, (count,), generator=g)

    def sometimes(p: float) -> Tensor:
        return torch.rand(count, generator=g) < p

    z, v = (
        torch.randn(count, classes, generator=g, dtype=torch.float64) * spread[draw(4)][:, None].double()
        for _ in range(2)
    )
    y, row = draw(classes), torch.arange(count)
    gaps = torch.tensor(GAPS, dtype=torch.float64) * temperature
    for x in (z, v):
        flat = sometimes(0.3)  # nothing but the gap
        x[flat] = 0.0
        for p, sign in ((0.4, -1.0), (0.2, 1.0)):
            some, where = sometimes(p), draw(classes)
            far = x.amax(1) + sign * gaps[draw(len(GAPS))] * (1 + 1e-7 * draw(3).double())
            x[row[some], where[some]] = far[some]
    same = sometimes(0.15)
    z[same] = v[same]
    for x in (z, v):
        shift = torch.tensor([0.0, 0.0, 0.0, 1e2, -1e3, 1e4])[draw(6)].double()
        x += shift[:, None]
    z, v = z.to(dtype), v.to(dtype)
    some = sometimes(0.3)
    v[row[some], y[some]] = v[some].amax(1)
    some, where = some & sometimes(0.5), draw(classes)
    v[row[some], where[some]] = ulp_above(v[some, :].amax(1))
    if not finite:
        for x, p in ((z, 0.1), (v, 0.2)):
            some, where = sometimes(p), draw(classes)
            x[row[some], where[some]] = -torch.inf
        some, where = sometimes(0.05), draw(classes)
        v[some] = torch.where(torch.arange(classes) == where[some][:, None], v[some], -torch.inf)
        alive = ~((z == -torch.inf).all(1) | (v == -torch.inf).all(1))
        z, v, y = z[alive], v[alive], y[alive]
    return z, v, y


def soft_targets(y: Tensor, classes: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Mixes of two classes, ties among them; smoothed; half precision's; sums of 2; numbers below 0; rows of 0."""
    g = torch.Generator().manual_seed(seed)
    count = len(y)
    one_hot = torch.nn.functional.one_hot(y, classes).double()
    lam = torch.rand(count, 1, generator=g, dtype=torch.float64)
    lam[::3] = 0.5
    t = lam * one_hot + (1 - lam) * one_hot.roll(1, dims=1)
    kind = torch.randint(8, (count,), generator=g)
    t[kind == 1] = 0.9 * t[kind == 1] + 0.1 / classes
    t[kind == 2] *= 2.0
    t[kind == 3] = 1.2 * t[kind == 3] - 0.2 / classes
    t[kind == 4] = one_hot[kind == 4]
    t[(kind == 5) & (torch.arange(count) % 4 == 0)] = 0.0
    return t.half().to(dtype) if seed % 2 else t.to(dtype)


def compare(z: Tensor, v: Tensor, target: Tensor, function: Callable[..., Tensor] = kd_loss, **options: Any) -> int:
    """kd_loss's KD rows and their gradient against the oracle's; the number of rows. AssertionError names the first.

    For another function, whose gradient autograd sums with cancellation, the tolerance is eight digits of the row.
    """
    student = z.clone().requires_grad_()
    got = function(student, v, target, ce_weight=0.0, kd_weight=1.0, reduction="none", **options)
    (got_gradient,) = torch.autograd.grad(got.sum(), student)
    compute = got.dtype
    soft = None
    y = target
    if target.is_floating_point():
        soft = target.double().numpy().astype(np.longdouble)
        y = target.argmax(dim=-1)
    z_wide, v_wide = (x.double().numpy().astype(np.longdouble) for x in (z, v))
    floor = FLOOR[compute]
    loss, gradient = got.detach().double().numpy(), got_gradient.double().numpy()
    t = max(1.0, options["temperature"])
    unit = torch.finfo(compute).eps / 2 * (ULPS + z.shape[1]) if function is kd_loss else 1e-8
    exact, flushed = (Rows(z_wide, v_wide, y.numpy(), soft, least, unit, **options).answer() for least in (0.0, floor))
    ok = np.zeros(len(z), dtype=bool)
    for want in (exact, flushed):
        infinite = np.isinf(want.loss)
        with np.errstate(all="ignore"):
            close = np.abs(loss - want.loss) <= unit * want.loss_size + 1e3 * t * t * floor
            allowed = unit * want.gradient_size + STORED[z.dtype] * np.abs(want.gradient) + 1e3 * t * floor
            if function is not kd_loss:
                allowed = allowed.max(axis=1, keepdims=True) + 1e-10
            if z.dtype == torch.float16:
                allowed = allowed + 2.0**-24
                allowed = np.where(np.abs(want.gradient) > 65000, np.inf, allowed)
            close &= (np.abs(gradient - want.gradient) <= allowed).all(axis=1)
        ok |= np.where(infinite, loss == want.loss, close)
    ok |= exact.ill
    if not ok.all():
        i = int(np.flatnonzero(~ok)[0])
        raise AssertionError(
            f"{int((~ok).sum())} of {len(ok)} rows off with {options}: z={z[i].tolist()} v={v[i].tolist()} "
            f"target={target[i].tolist()} ({z.dtype}): loss {loss[i]!r}, want {exact.loss[i]!r} +- "
            f"{float(unit * exact.loss_size[i]):.2g}; gradient {gradient[i].tolist()}, want "
            f"{exact.gradient[i].astype(float).tolist()} +- {(unit * exact.gradient_size[i]).astype(float).tolist()}"
        )
    return int((~exact.ill).sum())


# Classes, temperature, standardize.
SHAPES = ((2, 1.0, False), (3, 4.0, False), (9, 0.5, False), (5, 2.0, True), (33, 1.0, False), (100, 4.0, False))
# revise_temperature, in turn.
REVISE_TEMPERATURES = (None, 1.0, 2.5)


def scan(
    cases: int,
    seed: int,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    shapes: int = len(SHAPES),
    function: Callable[..., Tensor] = kd_loss,
) -> dict[str, int]:
    """About `cases` rows of every divergence, revision and dtype near their singularities; how many of each divergence.

    shapes: how many of SHAPES each of them meets, in turn. The plain KL, which has kernels of its own, also meets long
    rows.
    """
    checked: Counter[str] = Counter()
    settings = [
        (dtype, revise, divergence)
        for dtype in dtypes
        for revise in (None, "lr", "mft", "swap", "soft lr", "soft")
        for divergence in DIVERGENCES
        if not isinstance(divergence, RLD) or revise in ("lr", "soft lr")
    ]
    each = max(8, -(-cases // (len(settings) * shapes)))
    for number, (dtype, revise, divergence) in enumerate(settings):
        met = [SHAPES[(number + shape + seed) % len(SHAPES)] for shape in range(shapes)]
        if isinstance(divergence, KL):
            met.append((1001, 4.0, False))
        for classes, temperature, standardize in met:
            own = seed + 1000 * number + classes
            z, v, target = rows(each, classes, dtype, temperature, standardize, own)
            if revise is not None and revise.startswith("soft"):
                target = soft_targets(target, classes, torch.promote_types(dtype, torch.float32), own)
            checked[divergence.name] += compare(
                z,
                v,
                target,
                function,
                divergence=divergence,
                revise={"soft lr": "lr", "soft": None}.get(revise or "", revise),
                temperature=temperature,
                standardize=standardize,
                eta=0.75,
                revise_temperature=REVISE_TEMPERATURES[(number + classes) % len(REVISE_TEMPERATURES)],
            )
    return dict(checked)


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = int(sys.argv[1])
    found = scan(cases, int(sys.argv[2]), shapes=len(SHAPES) if cases >= 50_000 else 1)
    print(f"{sum(found.values())} rows:", ", ".join(f"{name} {n}" for name, n in found.items()))
