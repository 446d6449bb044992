"""The divergences between the (revised) teacher p' and the student q = softmax(z / T), with their parameters.

Pure data: the formulas are in lrds_fast.reference (PyTorch) and csrc/core/divergence_*.h (kernels).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lrds_fast._numbers import number

REVISE: dict[str | None, int] = {None: 0, "lr": 1, "mft": 2, "swap": 3}
"""Revision policies and their codes (csrc/core/kd_loss.h: Revise)."""

REVISE_TEMPERATURE: float | None = 1.0
"""The default of every revise_temperature (docs/benchmarks/method.md). None: the temperature of the divergence."""

MAX_PARAMETERS = 3
"""How many numbers of a divergence the operators take."""


def _check(owner: Divergence, name: str, *, above: float, below: float = math.inf, inclusive: bool = False) -> None:
    what = f"{type(owner).__name__}'s {name}"
    value = number(what, getattr(owner, name))
    if not (above < value < below or (inclusive and value == above)):
        bounds = f"{'>=' if inclusive else '>'} {above:g}" if below == math.inf else f"inside ({above:g}, {below:g})"
        raise ValueError(f"{what} must be finite and {bounds}; got {value!r}")
    object.__setattr__(owner, name, value)  # the class is frozen; a Python number has == and hash()


@dataclass(frozen=True)
class Divergence:
    """The divergence from the teacher to the student. Use one of the subclasses, or its name for its defaults."""

    _name: ClassVar[str]
    _code: ClassVar[int]
    #: The power of T that the divergence of the softened distributions is multiplied by.
    temperature_power: ClassVar[int] = 2

    @property
    def name(self) -> str:
        """The name that kd_loss(divergence=...) takes."""
        return self._name

    @property
    def code(self) -> int:
        """Its place in csrc/core/divergences.h."""
        return self._code

    @property
    def parameters(self) -> list[float]:
        """The numbers among the fields, in order, padded with zeros to MAX_PARAMETERS."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        numbers = [float(value) for value in values if not isinstance(value, str)]
        return numbers + [0.0] * (MAX_PARAMETERS - len(numbers))


@dataclass(frozen=True)
class KL(Divergence):
    """T^2 KL(p' || q). Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015."""

    _name = "kl"
    _code = 0


@dataclass(frozen=True)
class RKL(Divergence):
    """Reverse KL, T^2 KL(q || p'): mode-seeking, as language models are distilled (Gu et al., "MiniLLM", 2024)."""

    _name = "rkl"
    _code = 1


@dataclass(frozen=True)
class DKD(Divergence):
    """alpha T^2 KL(binary(p'_y) || binary(q_y)) + beta T^2 KL(p'hat || qhat), hat renormalised over k != y.

    alpha, beta >= 0 weigh the target-class and the non-target-class part. Zhao et al., "Decoupled Knowledge
    Distillation", CVPR 2022.
    """

    _name = "dkd"
    _code = 2

    alpha: float = 1.0
    beta: float = 8.0

    def __post_init__(self) -> None:
        _check(self, "alpha", above=0.0, inclusive=True)
        _check(self, "beta", above=0.0, inclusive=True)


@dataclass(frozen=True)
class RLD(Divergence):
    """DKD's binary part with the teacher's top probability, and KL over the classes that the teacher ranks below y.

    alpha Tc^2 KL((p_a, 1 - p_a) || (q_y, 1 - q_y)) at Tc = confidence_temperature > 0, plus beta T^2 KL over the
    classes with v_k < v_y, both sides renormalised. It takes the place of label revision. Sun et al., "Knowledge
    Distillation with Refined Logits", 2024.
    """

    _name = "rld"
    _code = 3

    alpha: float = 1.0
    beta: float = 8.0
    confidence_temperature: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "alpha", above=0.0, inclusive=True)
        _check(self, "beta", above=0.0, inclusive=True)
        _check(self, "confidence_temperature", above=0.0)


@dataclass(frozen=True)
class NKD(Divergence):
    """-p'_y log softmax(z)_y at T = 1, plus gamma T^2 times the cross-entropy of phat and qhat over k != y.

    gamma >= 0. Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels", ICCV 2023.
    """

    _name = "nkd"
    _code = 4

    gamma: float = 1.5

    def __post_init__(self) -> None:
        _check(self, "gamma", above=0.0, inclusive=True)


@dataclass(frozen=True)
class MSE(Divergence):
    """Mean over the classes of (z - v')^2 (on="logits") or of (q - p')^2 (on="probs"); no T^2.

    Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014; Kim et al., "Comparing Kullback-Leibler Divergence and
    Mean Squared Error Loss in Knowledge Distillation", 2021.
    """

    temperature_power = 0

    on: str = "logits"

    def __post_init__(self) -> None:
        if self.on not in ("logits", "probs"):
            raise ValueError(f"MSE's on must be 'logits' or 'probs'; got {self.on!r}")

    @property
    def name(self) -> str:
        return f"mse_{self.on}"

    @property
    def code(self) -> int:
        return 5 if self.on == "logits" else 6


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon: T^2 [w KL(p' || m) + (1 - w) KL(q || m)], m = w p' + (1 - w) q, 0 < w < 1.

    Agarwal et al., "On-Policy Distillation of Language Models", 2024.
    """

    _name = "jsd"
    _code = 7

    weight: float = 0.5

    def __post_init__(self) -> None:
        _check(self, "weight", above=0.0, below=1.0)


@dataclass(frozen=True)
class TVD(Divergence):
    """Total variation distance, T / 2 sum_k |q_k - p'_k|, in [0, T]; the gradient's sign is 0 where q_k = p'_k.

    The gradient in z is q_k / 2 (s_k - sum_j q_j s_j), s_k the sign of q_k - p'_k. The signs do not shrink as T grows,
    so the factor T keeps the gradient's size, as T^2 does for KL. Other packages multiply by 1 (Liger) or T^2
    (DistillKit); at T = 1 all are equal. Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge
    Distillation", ACL 2023.
    """

    _name = "tvd"
    _code = 8
    temperature_power = 1


@dataclass(frozen=True)
class SKL(Divergence):
    """Skewed KL: T^2 KL(p' || m), m = w p' + (1 - w) q, 0 < w < 1; at most T^2 log(1 / w).

    Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024.
    """

    _name = "skl"
    _code = 9

    weight: float = 0.1

    def __post_init__(self) -> None:
        _check(self, "weight", above=0.0, below=1.0)


@dataclass(frozen=True)
class SRKL(Divergence):
    """Skewed reverse KL: T^2 KL(q || m), m = w q + (1 - w) p', 0 < w < 1; at most T^2 log(1 / w).

    Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024.
    """

    _name = "srkl"
    _code = 10

    weight: float = 0.1

    def __post_init__(self) -> None:
        _check(self, "weight", above=0.0, below=1.0)


_ALL = (KL(), RKL(), DKD(), RLD(), NKD(), MSE("logits"), MSE("probs"), JSD(), TVD(), SKL(), SRKL())
_BY_NAME = {d.name: d for d in _ALL}
NAMES = tuple(_BY_NAME)
"""Every name that kd_loss(divergence=...) takes."""

NEED_TARGET = tuple(d.code for d in _BY_NAME.values() if isinstance(d, (DKD, RLD, NKD)))
"""The codes of the divergences that treat the target's class apart, and have no value without a target."""


def resolve_revise(revise: str | None) -> str | None:
    """A revision policy, one of REVISE; "none" becomes None. ValueError for anything else."""
    # Not `in`: unhashable values must get the same error.
    for policy in REVISE:
        if revise is policy or revise == policy:
            return policy
    if revise == "none":
        return None
    raise ValueError(f"revise must be one of {', '.join(map(repr, REVISE))}; got {revise!r}")


def from_code(code: int, parameters: Sequence[float]) -> Divergence:
    """The divergence with this code and these parameters."""
    default: Divergence = next(divergence for divergence in _BY_NAME.values() if divergence.code == code)
    names = [field.name for field in dataclasses.fields(default) if field.type != "str"]
    numbers: dict[str, Any] = dict(zip(names, parameters, strict=False))
    return dataclasses.replace(default, **numbers)


def resolve(divergence: str | Divergence) -> Divergence:
    """A divergence from its name (with its defaults) or itself. ValueError for another name, TypeError for the rest."""
    if isinstance(divergence, Divergence) and type(divergence) is not Divergence:
        return divergence
    if isinstance(divergence, str):
        if divergence in _BY_NAME:
            return _BY_NAME[divergence]
        raise ValueError(f"divergence must be one of {', '.join(map(repr, NAMES))}; got {divergence!r}")
    raise TypeError(
        f"divergence must be one of {', '.join(map(repr, NAMES))} or an object of lrds_fast.divergences; "
        f"got {divergence!r}"
    )
