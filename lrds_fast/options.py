"""The hyperparameters of a distillation loss: defaults, checks and the order in which operators take them."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, get_type_hints

import torch
from torch import Tensor

from lrds_fast._numbers import integer, number
from lrds_fast.divergences import (
    NEED_TARGET,
    REVISE,
    REVISE_TEMPERATURE,
    Divergence,
    from_code,
    resolve,
    resolve_revise,
)

MAX_TEMPERATURES = 8
"""Temperatures that one call can add up (csrc/core/kd_loss.h: kMaxTemperatures)."""

REDUCTION = {"none": 0, "mean": 1, "sum": 2, "elementmean": 3}
"""Reductions and their codes (csrc/core/kd_loss.h: Reduction)."""


class KDOptions(NamedTuple):
    """Checked hyperparameters, with the operators' codes for names. `*options` are the last arguments of an operator.

    temperature: one or several T. revise_temperature: 0 stands for the temperature of the divergence. revise,
    reduction, divergence: codes. divergence_parameters: Divergence.parameters.
    """

    temperature: list[float]
    ce_weight: float
    kd_weight: float
    ce_weight_unselected: float
    eta: float
    revise_temperature: float
    label_smoothing: float
    revise: int
    reduction: int
    ignore_index: int
    divergence: int
    divergence_parameters: list[float]
    standardize: bool

    # Methods, because torch.compile cannot trace a property of a named tuple.
    def policy(self) -> str | None:
        """The revision policy: "lr", "mft", "swap" or None."""
        return next(name for name, code in REVISE.items() if code == self.revise)

    def reduction_name(self) -> str:
        """ "none", "mean", "sum" or "elementmean"."""
        return next(name for name, code in REDUCTION.items() if code == self.reduction)

    def divergence_object(self) -> Divergence:
        """The divergence with its parameters."""
        return from_code(self.divergence, self.divergence_parameters)


_SCHEMA_TYPES = {float: "float", int: "int", bool: "bool", list[float]: "float[]"}

SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(KDOptions).items())
"""KDOptions' fields as parameters in an operator's schema."""


class DivergenceKeywords(TypedDict, total=False):
    """The keywords of a function that has the KD term alone; the names, values and defaults of kd_loss."""

    temperature: float | Sequence[float]
    revise: str | None
    eta: float
    revise_temperature: float | None
    divergence: str | Divergence
    standardize: bool


def default_ce_weight_unselected(ce_weight: float, kd_weight: float) -> float:
    """The weight of the cross-entropy of rows without a teacher: ce_weight + kd_weight if that is <= 1, else
    max(ce_weight, 1)."""
    total = ce_weight + kd_weight
    return total if total <= 1.0 else max(ce_weight, 1.0)


def _choice(name: str, value: object, choices: dict[Any, int]) -> int:
    # Not `in`: an unhashable value deserves the same message.
    for choice, code in choices.items():
        if value is choice or value == choice:
            return code
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_policy(policy: object) -> None:
    """ValueError unless `policy` is a name that revise_labels takes: "lr", "mft" or "swap"."""
    _choice("policy", policy, {name: code for name, code in REVISE.items() if name is not None})


def _finite(name: str, value: object) -> float:
    checked = number(name, value)
    if not -math.inf < checked < math.inf:  # math.isfinite does not trace with symbolic floats
        raise ValueError(f"{name} must be finite; got {value!r}")
    return checked


def _weight(name: str, value: object, signed: bool = False) -> float:
    checked = _finite(name, value)
    if checked < 0 and not signed:
        raise ValueError(f"{name} must be >= 0; got {checked!r}")
    return checked


def temperatures(temperature: float | Sequence[float]) -> list[float]:
    """The temperatures of a call, one or several. Raises TypeError or ValueError for anything but numbers > 0."""
    if isinstance(temperature, (tuple, list)):
        several = list(temperature)
        if not 1 <= len(several) <= MAX_TEMPERATURES:
            raise ValueError(f"temperature must be a number or 1 to {MAX_TEMPERATURES} numbers; got {temperature!r}")
    else:
        several = [temperature]
    checked = [_finite("temperature", value) for value in several]
    if min(checked) <= 0:
        raise ValueError(f"temperature must be > 0; got {temperature!r}")
    return checked


def kd_options(
    temperature: float | Sequence[float] = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    ce_weight_unselected: float | None = None,
    revise: str | None = "lr",
    eta: float = 0.8,
    revise_temperature: float | None = REVISE_TEMPERATURE,
    divergence: str | Divergence = "kl",
    standardize: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    signed: bool = False,
) -> KDOptions:
    """Checks the hyperparameters of kd_loss, which documents them, and resolves names and defaults.

    signed: the weights may be negative, as in the difference of two losses. Raises TypeError for a value of a wrong
    type, ValueError for one out of range. Each message names the argument, what it must be and what arrived.
    """
    ce_weight, kd_weight = _weight("ce_weight", ce_weight, signed), _weight("kd_weight", kd_weight, signed)
    eta, label_smoothing = _finite("eta", eta), _weight("label_smoothing", label_smoothing)
    if ce_weight_unselected is None:
        ce_weight_unselected = default_ce_weight_unselected(ce_weight, kd_weight)
    else:
        ce_weight_unselected = _weight("ce_weight_unselected", ce_weight_unselected, signed)
    if not 0 < eta < 1:
        raise ValueError(f"eta must be inside (0, 1), the paper's default is 0.8; got {eta!r}")
    if not label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing!r}")
    if revise_temperature is not None:
        revise_temperature = _finite("revise_temperature", revise_temperature)
        if not revise_temperature > 0:
            raise ValueError(
                f"revise_temperature must be > 0, or None for the divergence's temperature; got {revise_temperature!r}"
            )
    ignore_index = integer("ignore_index", ignore_index)
    if not isinstance(standardize, bool):
        raise TypeError(f"standardize must be a bool; got {standardize!r}")
    resolved = resolve(divergence)
    return KDOptions(
        temperatures(temperature),
        ce_weight,
        kd_weight,
        ce_weight_unselected,
        eta,
        revise_temperature or 0.0,
        label_smoothing,
        REVISE[resolve_revise(revise)],
        _choice("reduction", reduction, REDUCTION),
        ignore_index,
        resolved.code,
        resolved.parameters,
        standardize,
    )


def without_target(options: KDOptions, *, partial: bool) -> KDOptions:
    """The options of a call whose target is None, whose rows all count.

    partial: only some rows have a teacher. ValueError names every option that needs a target.
    """
    needs = []
    if options.ce_weight != 0:
        needs.append(f"ce_weight={options.ce_weight:g} (pass 0)")
    if partial and options.ce_weight_unselected != 0:
        needs.append(f"ce_weight_unselected={options.ce_weight_unselected:g} (pass 0)")
    if options.revise != REVISE[None]:
        needs.append(f"revise={options.policy()!r} (pass None)")
    if options.divergence in NEED_TARGET:
        needs.append(f"divergence={options.divergence_object().name!r} (pass another)")
    if needs:
        raise ValueError(f"target is None, and these options need one: {', '.join(needs)}; or pass the target")
    return options._replace(ignore_index=-100)


KEYWORDS = tuple(p.name for p in inspect.signature(kd_options).parameters.values() if p.kind is not p.KEYWORD_ONLY)
"""The names of the hyperparameters, in the order of kd_options."""


@functools.lru_cache(maxsize=64, typed=True)
def _cached(temperature: Any, *others: Any) -> KDOptions:
    several = temperature if isinstance(temperature, tuple) else (temperature,)
    if any(isinstance(value, Tensor) for value in (*several, *others)):
        raise TypeError("tensors cannot be cached: their hash does not depend on their value")
    return kd_options(temperature, *others)


def cached_kd_options(*hyperparameters: Any) -> KDOptions:
    """kd_options, cached: a training loop passes the same values at every step. By position: fewer microseconds."""
    if not torch.compiler.is_compiling():  # torch.compile cannot trace the cache, and runs this code once
        try:
            return _cached(*hyperparameters)
        except TypeError:
            pass  # a wrong type, which kd_options reports, or a value without a hash: a list of temperatures, a tensor
    return kd_options(*hyperparameters)
