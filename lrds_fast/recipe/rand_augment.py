"""RandAugment: policies from names such as "m9-n2-mstd0.5", and the operations that they draw for a picture."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

#: The largest magnitude.
FULL = 10.0
OPERATIONS = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
_FORM = "parts such as m9, n2, mstd0.5, mmax10, inc1 and p0.5 joined by '-', for example 'm9-n2-mstd0.5'"


class RandAugment(NamedTuple):
    """`steps` operations of OPERATIONS, drawn with replacement, each applied with `probability`.

    magnitude: from 0 to 10. deviation: the standard deviation of a normal distribution around magnitude; inf means
    uniform in [0, magnitude]. limit: magnitudes are clamped to [0, limit]. increasing: every operation gets stronger
    with the magnitude.
    Cubuk et al., "RandAugment", 2019, with the ranges of timm.
    """

    magnitude: float = FULL
    steps: int = 2
    deviation: float = 0.0
    limit: float = FULL
    increasing: bool = False
    probability: float = 0.5

    def plan(self, seed: int) -> list[tuple[str, float]]:
        """(operation, value) of each step; ("", 0.0) for no operation."""
        import numpy as np  # recipes are read without it

        draws = np.random.Generator(np.random.PCG64(seed))
        plan = []
        for place in draws.integers(len(OPERATIONS), size=self.steps):
            chance, low, mirrored = draws.random(3)
            if math.isinf(self.deviation):
                level = self.magnitude * low
            else:
                level = self.magnitude + self.deviation * draws.standard_normal()
            value = self._value(OPERATIONS[place], min(max(level, 0.0), self.limit) / FULL, mirrored < 0.5)
            plan.append((OPERATIONS[place], value) if chance < self.probability else ("", 0.0))
        return plan

    def _value(self, name: str, share: float, mirrored: bool) -> float:
        """The argument of an operation (degrees, bits, ...) at `share`, in [0, 1], of the largest magnitude."""
        sign = -1.0 if mirrored else 1.0
        if name == "rotate":
            return sign * 30.0 * share
        if name == "posterize":
            bits = int(4 * share)
            return float(max(4 - bits, 0) if self.increasing else min(bits, 8))
        if name == "solarize":
            threshold = min(256, int(256 * share))
            return float(256 - threshold if self.increasing else threshold)
        if name == "solarize_add":
            return float(min(128, int(110 * share)))
        if name in ("color", "contrast", "brightness", "sharpness"):
            return max(0.1, 1.0 + sign * 0.9 * share) if self.increasing else 0.1 + 1.8 * share
        if name.startswith("shear"):
            return sign * 0.3 * share
        return sign * 0.45 * share if name.startswith("translate") else 0.0


def parse_rand_augment(text: str) -> RandAugment:
    """The policy of a name in timm's form, "m9-n2-mstd0.5"; a leading "rand-" is allowed.

    m: magnitude, n: operations, mstd: deviation ("inf", or above 100: uniform up to m), mmax: limit, inc: 1 for
    increasing, p: probability. ValueError for another form or a value out of range.
    """
    values: dict[str, float] = {}
    for part in text.removeprefix("rand-").split("-"):
        match = re.fullmatch(r"(mstd|mmax|inc|m|n|p)(inf|\d+(?:\.\d+)?)", part)
        if match is None or match[1] in values:
            raise ValueError(f"data.rand_augment must be {_FORM}; got {text!r}")
        values[match[1]] = float(match[2])
    deviation = values.get("mstd", 0.0)
    limit = values.get("mmax", FULL)
    policy = RandAugment(
        magnitude=values.get("m", FULL),
        steps=int(min(values.get("n", 2.0), 99)),
        deviation=math.inf if deviation > 100 else deviation,
        limit=limit,
        increasing=bool(values.get("inc", 0.0)),
        probability=values.get("p", 0.5),
    )
    for key, low, high, value in (
        ("m", 0.0, limit, policy.magnitude),
        ("n", 1.0, 16.0, values.get("n", 2.0)),
        ("mmax", 1.0, 30.0, limit),
        ("p", 0.0, 1.0, policy.probability),
    ):
        if not low <= value <= high:
            raise ValueError(f"data.rand_augment {text!r}: {key} must be in [{low:g}, {high:g}]; got {value:g}")
    return policy
