"""lrds_fast.options: one order and one set of defaults for the hyperparameters of every loss."""

from __future__ import annotations

import inspect
from typing import Any

import kd_cases
import pytest
import torch

from lrds_fast import _ops, linear, options
from lrds_fast.divergences import DKD, REVISE
from lrds_fast.functional import kd_logit_gradient, kd_loss, kd_moments
from lrds_fast.options import KEYWORDS, REDUCTION, DivergenceKeywords, KDOptions, kd_options


def test_fields_are_the_last_arguments_of_every_operator() -> None:
    """The operators take the fields by position: a wrong order would give a wrong loss without an error."""
    for operator, after in ((_ops.kd_loss, 0), (_ops.kd_loss_forward, 1), (_ops.kd_moments, 1)):
        arguments = operator._schema.arguments
        names = [argument.name for argument in arguments]
        assert tuple(names[len(names) - after - len(KDOptions._fields) : len(names) - after]) == KDOptions._fields
    assert linear  # whose import registers the operator
    forward = torch.ops.lrds_fast.linear_kd_loss_forward.default._schema.arguments
    ours = {argument.name: str(argument.type) for argument in forward if argument.name in KDOptions._fields}
    theirs = {argument.name: str(argument.type) for argument in _ops.kd_loss._schema.arguments}
    assert list(ours) == list(KDOptions._fields)
    assert ours == {name: theirs[name] for name in ours}


def test_defaults_are_those_of_kd_loss() -> None:
    theirs = inspect.signature(kd_loss).parameters
    ours = inspect.signature(kd_options).parameters
    assert {name: ours[name].default for name in KEYWORDS} == {name: theirs[name].default for name in KEYWORDS}
    assert set(DivergenceKeywords.__annotations__) <= set(KEYWORDS)


def test_names_come_back_from_codes() -> None:
    for policy in REVISE:
        assert kd_options(revise=policy).policy() == policy
    for reduction in REDUCTION:
        assert kd_options(reduction=reduction).reduction_name() == reduction
    divergence = DKD(alpha=0.5, beta=2.0)
    assert kd_options(divergence=divergence).divergence_object() == divergence


def test_cached_options_are_the_checked_ones() -> None:
    values = [2.0, 0.25, 0.5, None, "mft", 0.75, None, DKD(beta=2.0), True, 0.125, 3, "sum"]
    checked = kd_options(**dict(zip(KEYWORDS, values, strict=True)))  # type: ignore[arg-type]
    for _ in range(2):
        assert options.cached_kd_options(*values) == checked
    assert options.cached_kd_options(*values) is options.cached_kd_options(*values)
    assert checked[:4] == ([2.0], 0.25, 0.5, 0.75) and checked.revise_temperature == 0.0


def test_signed_weights() -> None:
    assert kd_options(ce_weight=-1.0, kd_weight=-2.0, signed=True)[1:3] == (-1.0, -2.0)
    for name in ("ce_weight", "kd_weight", "ce_weight_unselected"):
        negative: dict[str, Any] = {name: -1.0}
        with pytest.raises(ValueError, match=f"{name} must be >= 0; got -1.0"):
            kd_options(**negative)


def test_functions_without_reduction_refuse_unused_options() -> None:
    rows = kd_cases.rows(4, 3)
    for function in (kd_logit_gradient, kd_moments):
        for name, value in (("reduction", "mean"), ("ignore_index", 1), ("ce_weight_unselected", 0.5)):
            with pytest.raises(TypeError, match=name):
                function(*rows, **{name: value})  # type: ignore[arg-type]
