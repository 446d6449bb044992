"""KDLoss is kd_loss with its hyperparameters stored."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import kd_cases
import pytest
import torch

from lrds_fast import DKD, KDLoss, kd_loss

STORED: dict[str, Any] = {
    "temperature": 2.5,
    "ce_weight": 0.3,
    "kd_weight": 1.7,
    "ce_weight_unselected": 0.6,
    "revise": None,
    "eta": 0.55,
    "revise_temperature": 2.0,
    "divergence": DKD(beta=2.0),
    "standardize": True,
    "label_smoothing": 0.05,
    "class_weight": torch.linspace(0.5, 1.5, 10),
    "ignore_index": 3,
    "reduction": "none",
    "classes": "truncate",
    "logit_scale": 0.5,
    "softcap": (5.0, 6.0),
}


def test_defaults_are_kd_losss() -> None:
    ours = dict(inspect.signature(KDLoss).parameters)
    theirs = inspect.signature(kd_loss).parameters
    assert ours.pop("unknown").kind is inspect.Parameter.VAR_KEYWORD  # where the hints come from
    assert list(ours) == list(STORED)
    for name, parameter in ours.items():
        assert parameter.default == theirs[name].default, name
        assert getattr(KDLoss(), name) == parameter.default, name
        assert (parameter.kind is inspect.Parameter.KEYWORD_ONLY) == (name != "temperature"), name


@pytest.mark.parametrize("changed", STORED)
def test_every_hyperparameter_reaches_the_loss(changed: str) -> None:
    rows = kd_cases.rows(12, 10)
    rows.target[5] = 3
    selected = torch.linspace(0, 1, 12)
    keywords = {changed: STORED[changed]}
    loss = KDLoss(**keywords)(*rows, selected)
    assert torch.equal(loss, kd_loss(*rows, selected=selected, **keywords))
    if changed == "classes":
        padded = rows._replace(teacher=torch.nn.functional.pad(rows.teacher, (0, 3), value=9.0))
        assert torch.equal(KDLoss(**keywords)(*padded, selected), loss)
    else:
        assert not torch.equal(loss, kd_loss(*rows, selected=selected))


def test_all_together() -> None:
    rows = kd_cases.rows(12, 10)
    selected = torch.arange(12) % 2 == 0
    module = KDLoss(**STORED)
    assert torch.equal(module(*rows), kd_loss(*rows, **STORED))
    assert torch.equal(module(*rows, selected=selected), kd_loss(*rows, selected=selected, **STORED))
    module = KDLoss()
    scaled = module(*rows, num_valid=7, grad_scale=2.0)
    assert torch.equal(scaled, kd_loss(*rows, num_valid=7, grad_scale=2.0))
    assert torch.equal(
        module(rows.student, rows.teacher[:4], rows.target, teacher_rows=4),
        kd_loss(rows.student, rows.teacher[:4], rows.target, teacher_rows=4),
    )


def test_the_temperature_may_be_positional() -> None:
    """As in RepDistiller's DistillKL(T) and others."""
    assert vars_of(KDLoss(2.5)) == vars_of(KDLoss(temperature=2.5))
    with pytest.raises(TypeError, match="KDLoss got .*'tau': did you mean 'temperature'"):
        KDLoss(tau=2.5)  # type: ignore[arg-type]
    assert KDLoss(revise="none").revise is None


def test_repr_rebuilds_the_module() -> None:
    """class_weight is not in the repr: it is a buffer, as in nn.CrossEntropyLoss."""
    for module in (KDLoss(), KDLoss(**STORED | {"class_weight": None})):
        rebuilt = eval(repr(module))
        assert vars_of(rebuilt) == vars_of(module)


def vars_of(module: KDLoss) -> dict[str, Any]:
    weight = module.class_weight
    facts = {name: getattr(module, name) for name in STORED}
    return facts | {"class_weight": None if weight is None else weight.tolist()}


def test_copies_and_pickles() -> None:
    rows = kd_cases.rows(12, 10)
    module = KDLoss(**STORED)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    for other in (
        copy.copy(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stored, weights_only=False),
    ):
        assert vars_of(other) == vars_of(module)
        assert torch.equal(other(*rows), module(*rows))


def test_a_pickle_of_a_version_with_fewer_hyperparameters_loads() -> None:
    rows = kd_cases.rows(12, 10)
    older = KDLoss()
    for name in ("classes", "logit_scale", "softcap"):
        vars(older).pop(name)
    loaded = pickle.loads(pickle.dumps(older))
    assert torch.equal(loaded(*rows), KDLoss()(*rows))
    assert repr(loaded) == repr(KDLoss())


def test_has_no_state_but_class_weights() -> None:
    module = KDLoss()
    assert list(KDLoss(class_weight=torch.ones(3)).state_dict()) == ["class_weight"]
    assert module.state_dict() == {} and list(module.parameters()) == [] and list(module.buffers()) == []
    module.load_state_dict({})
    assert module.half().to("cpu").eval() is module


def test_assigned_hyperparameters_count() -> None:
    """A temperature schedule assigns to the module; the next call checks the value."""
    rows = kd_cases.rows(12, 10)
    module = KDLoss()
    module.temperature = 2.0
    assert torch.equal(module(*rows), kd_loss(*rows, temperature=2.0))
    module.eta = 1.5
    with pytest.raises(ValueError, match=r"eta.*1\.5"):
        module(*rows)


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"eta": 1.0}, ValueError),
        ({"temperature": -1.0}, ValueError),
        ({"kd_weight": float("nan")}, ValueError),
        ({"revise": "swapp"}, ValueError),
        ({"reduction": "batchmean"}, ValueError),
        ({"label_smoothing": 2.0}, ValueError),
        ({"temperature": "4"}, TypeError),
        ({"alpha": 0.5}, TypeError),
        ({"lambda_": 0.5}, TypeError),
    ],
    ids=str,
)
def test_refused_when_built(keywords: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(keywords))):
        KDLoss(**keywords)


def test_trains_a_layer() -> None:
    """Ten steps of plain gradient descent through the module lower the loss."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 16, generator=generator)
    _, teacher, target = kd_cases.rows(64, 10)
    layer = torch.nn.Linear(16, 10)
    torch.nn.init.zeros_(layer.weight)
    module = KDLoss()
    losses = []
    for _ in range(10):
        layer.zero_grad()
        loss = module(layer(features), teacher, target)
        loss.backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.3 * parameter.grad)
        losses.append(loss.item())
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))


def test_compiles_fullgraph() -> None:
    torch.compiler.reset()
    rows = kd_cases.rows(12, 10)
    student = rows.student.requires_grad_()
    module = KDLoss()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(*rows), module(*rows)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))
