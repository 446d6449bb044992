"""Scores over a whole model: against dense gradients and matrices, and against the last layer's closed form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_influence_factors import dense_blocks
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

from lrds_fast import KDLoss, influence
from lrds_fast.functional import kd_logit_gradient
from lrds_fast.influence.factors import fit_factors
from lrds_fast.influence.layers import sample_gradients

CLASSES = 4
LOSS = KDLoss(temperature=3.0, ce_weight=0.3, kd_weight=0.7)
NAMES = (
    "kd_gain",
    "self_influence",
    "param_shift",
    "param_shift:delta",
    "grand",
    "el2n",
    "conflict",
    "random:3",
    "teacher_harm",
)


def network(seed: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(6)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False),
        norm,
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Flatten(),
        nn.Linear(6, 5),
        nn.GELU(),
        nn.Linear(5, CLASSES),
    )
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return model.to(dtype)


def data(seed: int, count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 3, 3, dtype=torch.float64, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (count,), generator=generator))


def deltas(z: Tensor, v: Tensor, y: Tensor, ce: float, kd: float) -> Tensor:
    return kd_logit_gradient(z, v, y, temperature=LOSS.temperature, ce_weight=ce, kd_weight=kd, eta=LOSS.eta)


@pytest.mark.parametrize("curvature", ["identity", "kfac", "ekfac"])
def test_against_dense_gradients(curvature: str) -> None:
    student, teacher, train, val = network(0), network(1), data(2, 23), data(3, 9)
    keywords: dict[str, Any] = {"curvature": curvature, "damping": 0.05, "labels": "all"}
    found = influence.score(
        student, teacher, train, val, layers="all", scores=NAMES, hessian="gt", loss=LOSS, batch_size=7, **keywords
    )
    assert student.training and teacher.training and all(p.grad is None for p in student.parameters())
    student.eval()
    teacher.eval()
    (x, y), (x_val, y_val) = train.tensors, val.tensors
    with torch.no_grad():
        z, v = student(x), teacher(x)
    factors = fit_factors(student, x.split(7), **keywords)

    def gradients(inputs: Tensor, delta: Tensor) -> dict[str, Tensor]:
        return {n: g.dense() for n, g in sample_gradients(student, inputs, lambda _: delta)[1].items()}

    gt, change = gradients(x, deltas(z, v, y, 1.0, 0.0)), gradients(x, deltas(z, v, y, 0.3 - 1.0, 0.7))
    divergence = gradients(x, deltas(z, v, y, 0.0, 0.7))
    held_out = gradients(x_val, student(x_val).detach().softmax(dim=1) - F.one_hot(y_val, CLASSES))
    expected = {name: torch.zeros(len(x), dtype=torch.float64) for name in NAMES[:5]}
    of_divergence = torch.zeros(len(x), dtype=torch.float64)
    for name in factors.blocks:
        inverse = torch.linalg.inv(dense_blocks(factors, name))
        expected["kd_gain"] -= change[name] @ inverse @ held_out[name].mean(dim=0)
        of_divergence -= divergence[name] @ inverse @ held_out[name].mean(dim=0)
        expected["self_influence"] += (gt[name] @ inverse * gt[name]).sum(dim=1)
        expected["param_shift"] += (gt[name] @ inverse).square().sum(dim=1)
        expected["param_shift:delta"] += (change[name] @ inverse).square().sum(dim=1)
        expected["grand"] += gt[name].square().sum(dim=1)
    for key, exact in expected.items():
        exact = exact if key in ("kd_gain", "self_influence") else exact.sqrt()
        torch.testing.assert_close(found[key], exact, rtol=1e-9, atol=1e-12)
    gain = expected["kd_gain"]
    assert ((gain > 0) & (of_divergence > 0)).any() and ((gain > 0) & (of_divergence < 0)).any()
    harm = torch.where(of_divergence > 0, gain, torch.minimum(gain, of_divergence))
    torch.testing.assert_close(found["teacher_harm"], harm, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["el2n"], (z.softmax(dim=1) - F.one_hot(y, CLASSES)).norm(dim=1))
    assert torch.equal(found.target, y) and found.meta["layers"] == ["0", "1", "3", "5", "7"]


@pytest.mark.parametrize("layers", ["last", ["7"]])
@pytest.mark.parametrize("hessian", ["gt", "objective"])
def test_the_last_layer_matches_its_closed_form(hessian: str, layers: Any) -> None:
    student, teacher, train, val = network(0).eval(), network(1).eval(), data(2, 40), data(3, 9)
    selected = torch.arange(40) % 3 > 0
    common: dict[str, Any] = {"scores": NAMES, "hessian": hessian, "selected": selected, "loss": LOSS}
    found = influence.score(student, teacher, train, val, layers=layers, labels="all", batch_size=11, **common)
    with torch.no_grad():
        h, h_val = (student[:-1](split.tensors[0]) for split in (train, val))
        expected = influence.last_layer_scores(
            features=h,
            student_logits=student[-1](h),
            teacher_logits=teacher(train.tensors[0]),
            target=train.tensors[1],
            val_features=h_val,
            val_logits=student[-1](h_val),
            val_target=val.tensors[1],
            **common,
        )
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-12)
    assert torch.equal(found.teacher_pred, expected.teacher_pred)


def test_kd_gain_predicts_the_effect_of_a_step() -> None:
    """The definition: n times the change of the held-out loss when one sample's teacher enters the objective."""
    student, teacher, train, val = network(0).eval(), network(1).eval(), data(2, 12), data(3, 9)
    found = influence.score(student, teacher, train, val, layers="all", curvature="identity", loss=LOSS)["kd_gain"]
    x, y = train.tensors
    parameters = list(student.parameters())

    def held_out() -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(student(val.tensors[0]), val.tensors[1])

    before = held_out()
    for i in range(4):
        z, v = student(x[i : i + 1]), teacher(x[i : i + 1]).detach()
        delta = deltas(z.detach(), v, y[i : i + 1], LOSS.ce_weight - 1.0, LOSS.kd_weight)
        step = torch.autograd.grad(z, parameters, delta)
        size = 1e-6
        with torch.no_grad():
            for parameter, part in zip(parameters, step, strict=True):
                parameter.sub_(size * part)
            change = (held_out() - before) / size
            for parameter, part in zip(parameters, step, strict=True):
                parameter.add_(size * part)
        assert change.item() == pytest.approx(found[i].item(), rel=1e-4)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_data_in_other_forms(layers: str) -> None:
    student, teacher, train, val = network(0, torch.float32), network(1, torch.float32), data(2, 23), data(3, 9)
    first = influence.score(student, teacher, train, val, layers=layers, batch_size=8)
    again = influence.score(student, teacher, DataLoader(train, batch_size=8), [val.tensors], layers=layers)
    torch.testing.assert_close(again["kd_gain"], first["kd_gain"])
    assert first["kd_gain"].dtype == torch.float32 and not first["kd_gain"].requires_grad


def test_fitted_factors_are_used() -> None:
    student, teacher, train, val = network(0), network(1), data(2, 23), data(3, 9)
    batches = train.tensors[0].split(23)
    factors = influence.Factors.fit(student.eval(), batches, curvature="kfac", damping=0.1, layers=["3", "7"])
    names = ("kd_gain", "self_influence")
    given = influence.score(student, teacher, train, val, scores=names, factors=factors)
    own = influence.score(
        student, teacher, train, val, scores=names, curvature="kfac", damping=0.1, layers=["3", "7"], hessian="gt"
    )
    for name in names:
        torch.testing.assert_close(given[name], own[name])
    assert given.meta["curvature"] == "kfac" and given.meta["layers"] == ["3", "7"]
    with pytest.raises(ValueError, match="layers and factors differ; the factors are of '3', '7'"):
        influence.score(student, teacher, train, val, layers=["3"], factors=factors)
    with pytest.raises(ValueError, match="fitted to another student"):
        influence.score(teacher, student, train, val, factors=factors)


def test_exact_curvature_and_newton_steps_from_the_models() -> None:
    student, teacher, train, val = network(0).eval(), network(1).eval(), data(2, 40), data(3, 9)
    common: dict[str, Any] = {"scores": ("kd_gain", "kd_gain_ns"), "curvature": "exact", "damping": 0.02}
    found = influence.score(student, teacher, train, val, batch_size=7, **common)
    with torch.no_grad():
        h, h_val = (student[:-1](split.tensors[0]) for split in (train, val))
        expected = influence.last_layer_scores(
            features=h,
            student_logits=student[-1](h),
            teacher_logits=teacher(train.tensors[0]),
            target=train.tensors[1],
            val_features=h_val,
            val_logits=student[-1](h_val),
            val_target=val.tensors[1],
            **common,
        )
    for name in common["scores"]:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("hessian", ["gt", "objective"])
@pytest.mark.parametrize("layers", ["all", ["0", "5", "7"]], ids=["all", "some"])
def test_exact_curvature_of_several_layers_against_the_dense_matrix(layers: Any, hessian: str) -> None:
    """H = 1/N sum_i J_i^T (sum_t w_it J(softmax(z_i / T_t))) J_i + damping I over all parameters of all layers."""
    student, teacher, train, val = network(0).eval(), network(1).eval(), data(2, 23), data(3, 9)
    selected = torch.arange(23) % 3 > 0
    options: dict[str, Any] = {
        "scores": ("kd_gain", "teacher_harm"),
        "layers": layers,
        "damping": 0.02,
        "hessian": hessian,
        "loss": LOSS,
        "selected": selected,
    }
    found = influence.score(student, teacher, train, val, curvature="exact", folds=3, batch_size=7, **options)
    assert found.meta["curvature"] == "exact"

    (x, y), (x_val, y_val) = train.tensors, val.tensors
    names = [n for n, _ in student.named_parameters() if layers == "all" or n.partition(".")[0] in layers]
    parameters = {n: p.detach() for n, p in student.named_parameters() if n in names}

    def jacobian(inputs: Tensor) -> Tensor:
        """(B, C, P)"""
        by_name = torch.func.jacrev(lambda p: torch.func.functional_call(student, p, (inputs,)))(parameters)
        return torch.cat([by_name[n].flatten(2) for n in names], dim=2)

    with torch.no_grad():
        z, v, z_val = student(x), teacher(x), student(x_val)
    ones, s = torch.ones(23, dtype=torch.float64), selected.double()
    terms = [(ones, 1.0)]
    if hessian == "objective":
        terms = [(s * 0.3 + (1 - s) * 1.0, 1.0), (s * 0.7, 3.0)]
    j, j_val = jacobian(x), jacobian(x_val)
    h = 0.02 * torch.eye(j.shape[2], dtype=torch.float64)
    for weight, temperature in terms:
        q = (z / temperature).softmax(1)
        inner = weight[:, None, None] * (torch.diag_embed(q) - q[:, :, None] * q[:, None, :])
        h += torch.einsum("ncp,ncd,ndr->pr", j, inner, j) / 23
    change = torch.einsum("ncp,nc->np", j, deltas(z, v, y, 0.3 - 1.0, 0.7))
    held_out = torch.einsum("ncp,nc->np", j_val, z_val.softmax(1) - F.one_hot(y_val, CLASSES))
    expected = -change @ torch.linalg.solve(h, held_out.mean(0))
    torch.testing.assert_close(found["kd_gain"], expected, rtol=1e-7, atol=1e-10)
    parts = torch.stack([-change @ torch.linalg.solve(h, held_out[part::3].mean(0)) for part in range(3)])
    torch.testing.assert_close(found.standard_error["kd_gain"], parts.std(0) / 3**0.5, rtol=1e-7, atol=1e-10)
    assert torch.equal(found.standard_error["teacher_harm"], found.standard_error["kd_gain"])
    term = -torch.einsum("ncp,nc->np", j, deltas(z, v, y, 0.0, 0.7)) @ torch.linalg.solve(h, held_out.mean(0))
    harm = torch.where(term > 0, expected, torch.minimum(expected, term))
    torch.testing.assert_close(found["teacher_harm"], harm, rtol=1e-7, atol=1e-10)

    # The products between layers count: the blocks alone give other scores.
    blocks = influence.score(student, teacher, train, val, labels="all", **options)
    assert not torch.allclose(blocks["kd_gain"], expected, rtol=0.01)


def test_exact_curvature_of_float32_and_without_convergence(monkeypatch: pytest.MonkeyPatch) -> None:
    models = network(0).eval(), network(1).eval()
    train, val = data(2, 23), data(3, 9)
    options: dict[str, Any] = {"layers": "all", "curvature": "exact", "damping": 0.05}
    wide = influence.score(*models, train, val, **options)["kd_gain"]
    narrow = [TensorDataset(split.tensors[0].float(), split.tensors[1]) for split in (train, val)]
    found = influence.score(*(model.float() for model in models), *narrow, **options)["kd_gain"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wide, rtol=1e-2, atol=1e-3 * float(wide.abs().max()))
    monkeypatch.setattr("lrds_fast.influence.conjugate.ITERATIONS", 1)
    with pytest.raises(
        RuntimeError, match="'exact': conjugate gradients reached .* in 1 steps, not 1e-03; raise damping"
    ):
        influence.score(*models, *narrow, **options)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_precomputed_teacher_logits_are_accepted(layers: str) -> None:
    student, teacher, train, val = network(0).eval(), network(1).eval(), data(2, 23), data(3, 9)
    with torch.no_grad():
        stored = teacher(train.tensors[0])
    names = ("kd_gain", "conflict", "mismatch")
    options: dict[str, Any] = {"layers": layers, "scores": names, "batch_size": 7}
    expected = influence.score(student, teacher, train, val, **options)
    found = influence.score(student, stored, train, val, **options)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
    shift = influence.set_shift(student, teacher, train, dim=None, layers=layers)
    torch.testing.assert_close(influence.set_shift(student, stored, train, dim=None, layers=layers), shift)
    batches = [tuple(tensor[:12] for tensor in train.tensors), tuple(tensor[12:] for tensor in train.tensors)]

    class Stream:
        def __iter__(self) -> Any:
            return iter(batches)

    for wrong, source, message in (
        (stored[:22], train, "a row for each of the 23 samples; got 22"),
        (stored[:22], Stream(), "got 22, and there are at least 23 samples"),
        (stored[:, 0], train, r"must be floating, \(N, C\); got torch.float64 \(23,\)"),
        (stored[:, :3], train, "the same classes"),
    ):
        with pytest.raises(ValueError, match=message):
            influence.score(student, wrong, source, val, **options)


def test_logits_must_be_the_last_layers() -> None:
    scaled = nn.Sequential(network(0), nn.Softmax(dim=1))
    with pytest.raises(ValueError, match="logits that are the output of the last nn.Linear, '0.7'"):
        influence.score(scaled, network(1), data(2, 12), data(3, 4))


def test_a_sample_that_is_not_finite_is_named() -> None:
    student, teacher, train, val = network(0), network(1), data(2, 12), data(3, 4)
    train.tensors[0][9] = float("nan")
    with pytest.raises(ValueError, match=r"the input of layer '7' must be finite; sample 9 has"):
        influence.score(student, teacher, train, val, batch_size=5)
    with pytest.raises(ValueError, match=r"sample 4 has a NaN.*the batch begins at sample 5"):
        influence.score(student, teacher, train, layers="all", scores="grand", batch_size=5)


def test_few_samples_for_a_factor_are_reported() -> None:
    student, teacher, train, val = network(0), network(1), data(2, 3), data(3, 4)
    with pytest.warns(UserWarning, match=r"too few samples for a factor of full rank.* '5' \(3 for 7\)"):
        influence.score(student, teacher, train, val, layers="all")
    blind = network(0)
    torch.nn.init.zeros_(blind.get_parameter("7.weight"))
    with pytest.raises(ValueError, match="layer '0': the curvature is zero"):
        influence.score(blind, teacher, data(2, 20), val, layers=["0"])


@pytest.mark.parametrize("layers", ["last", "all"])
def test_mistakes_are_named(layers: str) -> None:
    student, teacher, train, val = network(0), network(1), data(2, 12), data(3, 4)
    for change, error, message in (
        ({"val_data": None}, ValueError, "teacher_harm needs val_data"),
        ({"curvature": "none"}, ValueError, "curvature must be one of identity, kfac, ekfac, exact"),
        (
            {"curvature": "exact", "layers": ["7"], "scores": "self_influence"},
            ValueError,
            "self_influence and param_shift need .*layers='last'",
        ),
        ({"scores": "kd_gain_ns", "layers": ["7"]}, ValueError, "a score of the last layer alone"),
        ({"layers": ["nope"]}, ValueError, "no module 'nope'"),
        ({"train_data": DataLoader(train, shuffle=True)}, ValueError, "the loader shuffles"),
        ({"train_data": DataLoader(train, 5, drop_last=True)}, ValueError, "drops the last batch"),
        ({"train_data": iter([])}, TypeError, "iterable again"),
        ({"train_data": []}, ValueError, "must contain samples"),
        ({"val_data": []}, ValueError, "must contain samples"),
        ({"selected": torch.ones(7).bool()}, ValueError, r"selected must have shape \(12,\).*; got \(7,\)"),
        ({"selected": torch.full((12,), 2.0)}, ValueError, r"selected must lie in \[0, 1\]; got 2.0 at sample 0"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()}, ValueError, "the same classes"),
        ({"train_data": [(train.tensors[0], train.tensors[1] + 3)]}, ValueError, r"targets must lie in \[0, 4\)"),
        ({"train_data": [(train.tensors[0], train.tensors[1][:5])]}, ValueError, r"got shape \(5,\) for 12 inputs"),
        ({"resume": True}, ValueError, "resume=True needs out="),
    ):
        given: dict[str, Any] = {"student": student, "teacher": teacher, "train_data": train, "val_data": val}
        with pytest.raises(error, match=message):
            influence.score(**({"layers": layers} | given | change))
        assert student.training and teacher.training


@pytest.mark.parametrize("labels", [1, "all"])
def test_a_saturated_student_is_refused_by_every_curvature(labels: Any) -> None:
    student, teacher, train, val = network(0).eval(), network(1), data(2, 40), data(3, 9)
    with torch.no_grad():
        for parameter in student[7].parameters():
            parameter.mul_(1e5)
    x = train.tensors[0]
    for layers, where in (("last", "layer '7'"), ("all", "layer '0' and 4 more"), (["5"], "layer '5'")):
        with pytest.raises(ValueError, match=f"curvature 'ekfac' of {where} is zero up to rounding"):
            influence.score(student, teacher, train, val, layers=layers, labels=labels)
        found = influence.score(student, teacher, train, val, layers=layers, labels=labels, damping=0.1)
        assert found["kd_gain"].isfinite().all() and found["kd_gain"].abs().max() > 0
    with pytest.raises(ValueError, match="curvature 'kfac' of layer '7' is zero up to rounding"):
        influence.set_shift(student, teacher, train, curvature="kfac", labels=labels)
    with pytest.raises(ValueError, match="curvature 'ekfac' of layer '0' and 4 more is zero up to rounding"):
        influence.Factors.fit(student, x, labels=labels)


class Foreign(nn.Module):
    """A network that applies `out` to its logits, like models that do not return a plain tensor."""

    def __init__(self, seed: int, out: Any) -> None:
        super().__init__()
        self.inner, self.out = network(seed), out

    def forward(self, x: Tensor) -> Any:
        return self.out(self.inner(x))


OUTPUTS: dict[str, tuple[Any, Any]] = {
    "tuple": (lambda z: (z, [z]), lambda out: out[0]),
    "dict": (lambda z: {"logits": z}, lambda out: out["logits"]),
    "object": (lambda z: SimpleNamespace(logits=z, loss=None), None),
}


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_model_outputs_that_are_not_tensors(kind: str, layers: str) -> None:
    out, logits = OUTPUTS[kind]
    student, teacher, train, val = Foreign(0, out), Foreign(1, out), data(2, 23), data(3, 9)
    options: dict[str, Any] = {"layers": layers, "scores": ("kd_gain", "self_influence", "ce"), "batch_size": 10}
    expected = influence.score(student.inner, teacher.inner, train, val, **options)
    found = influence.score(student, teacher, train, val, logits=logits, **options)
    for name in expected:
        assert torch.equal(found[name], expected[name])
    if layers == "all":
        factors = influence.Factors.fit(student.eval(), train, logits=logits)
        common: dict[str, Any] = {"factors": factors, "logits": logits}
        own = influence.self_influence(student, train, **common)
        pairs = influence.pairwise(student, train, train, **common)
        assert isinstance(pairs, Tensor)
        shift = influence.set_shift(student, teacher, train, dim=None, gradient="gt", **common)
        torch.testing.assert_close(pairs.diagonal(), own, rtol=1e-9, atol=0)
        assert shift.isfinite().all()
    if logits is None:
        return
    for one, other, name in ((student, teacher.inner, "student"), (student.inner, teacher, "teacher")):
        with pytest.raises(
            TypeError, match=rf"the {name} must return logits.* a {kind} .*: pass logits=.*lambda out: out\["
        ):
            influence.score(one, other, train, val, layers=layers)
    with pytest.raises(ValueError, match=r"student's logits must be \(B, C\), here with B = 23; got shape \(4,\)"):
        influence.score(student, teacher, train, val, layers=layers, logits=lambda out: logits(out)[0])
    with pytest.raises(
        TypeError, match=r"logits= must return a tensor \(B, C\); it makes an object of type int of the"
    ):
        influence.score(student, teacher, train, val, layers=layers, logits=lambda out: 3)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("layers", ["last", "all"])
def test_batches_that_are_not_pairs(layers: str) -> None:
    student, teacher, train, val = network(0), network(1), data(2, 23), data(3, 9)
    options: dict[str, Any] = {"val_data": val, "layers": layers, "batch_size": 10}
    expected = influence.score(student, teacher, train, **options)["kd_gain"]
    x, y = train.tensors
    samples: Any = [(x[i], int(y[i])) for i in range(23)]
    dicts: Any = [{"pixel_values": x[i], "labels": int(y[i]), "id": str(i)} for i in range(23)]
    batches: Any = [(x[i : i + 10].numpy(), y[i : i + 10].tolist()) for i in range(0, 23, 10)]
    for given in (samples, batches, [(x, y.int(), "more")]):
        found = influence.score(student, teacher, given, **options)["kd_gain"]
        if given is not samples and given is not batches:
            continue  # draws of labels depend on the batches
        assert torch.equal(found, expected)

    def take(b: Any) -> Any:
        return b["pixel_values"], b["labels"]

    for given in (dicts, DataLoader(dicts, 10)):
        scores = influence.score(student, teacher, given, **(options | {"val_data": dicts[:9]}), batch=take)
        assert scores["kd_gain"].shape == (23,)
        wanted = r"train_data must give batches.* dict with keys 'pixel_values', 'labels', 'id': pass batch=.*"
        with pytest.raises(TypeError, match=wanted + r'lambda b: \(b\["pixel_values"\], b\["labels"\]\)'):
            influence.score(student, teacher, given, **options)
    bad_data: list[tuple[Any, type[Exception], str]] = [
        ([x], TypeError, r"train_data must give batches .*; it gives a tensor \(23,"),
        ([(x, ["a"] * 23)], TypeError, "train_data: the targets of a batch must be class indices"),
        ([([x], y)], TypeError, r"train_data: the inputs of a batch must be one tensor.* a list of 1"),
        ([(x, y.double())], TypeError, "targets must be class indices, of an integer dtype; got torch.float64"),
        (5, TypeError, "train_data must be a Dataset, a DataLoader or an iterable of batches; got int"),
    ]
    for given, error, message in bad_data:
        with pytest.raises(error, match=message):
            influence.score(student, teacher, given, **options)
    with pytest.raises(TypeError, match="batch= must return .*; it makes a tensor"):
        influence.score(student, teacher, dicts, **options, batch=lambda b: b["pixel_values"])


def test_factors_accept_the_data_forms_of_score() -> None:
    student, train = network(0).eval(), data(2, 23)
    x, y = train.tensors
    expected = influence.Factors.fit(student, x.split(10)).fingerprint
    dicts: Any = [{"pixel_values": a, "labels": int(b)} for a, b in zip(x, y, strict=True)]
    for given in (x, train, TensorDataset(x), DataLoader(train, 10), [(x[:10],), (x[10:20], y[10:20]), x[20:]]):
        assert influence.Factors.fit(student, given, batch_size=10).fingerprint == expected
    found = influence.Factors.fit(student, DataLoader(dicts, 10), batch=lambda b: b["pixel_values"])
    assert found.fingerprint == expected
    with pytest.raises(TypeError, match=r"data must give batches of inputs, or .*: pass batch="):
        influence.Factors.fit(student, dicts)
    with pytest.raises(TypeError, match="iterable again"):
        influence.Factors.fit(student, iter([x]))


class Moving(Dataset[tuple[Tensor, int]]):
    """Samples that differ at every reading, as with an augmenting transform."""

    def __init__(self, of: TensorDataset, flips: bool) -> None:
        self._x, self._y = of.tensors
        self._flips = flips
        self.reads = 0

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        x = self._x[index]
        return x.flip(-1) if self._flips and torch.rand(()) < 0.5 else x, int(self._y[index])


class Shuffled:
    """Batches in another order at every reading."""

    def __init__(self, of: TensorDataset) -> None:
        self._tensors = of.tensors

    def __iter__(self) -> Any:
        order = torch.randperm(len(self._tensors[0]))
        for part in order.split(20):
            yield tuple(tensor[part] for tensor in self._tensors)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_data_that_change_between_readings_are_refused(layers: str) -> None:
    torch.manual_seed(0)
    student, teacher, train, val = network(0), network(1), data(2, 40), data(3, 9)

    def mixed(samples: Any) -> Any:
        x, y = torch.utils.data.default_collate(samples)
        return x + 0.1 * x[torch.randperm(len(x))], y

    moving = Moving(train, flips=True)
    changing = (
        moving,
        DataLoader(moving, 7),
        DataLoader(train, 7, sampler=SubsetRandomSampler(range(40))),
        DataLoader(Moving(train, flips=False), 7, collate_fn=mixed),
        Shuffled(train),
    )
    message = "must give the same .* got other inputs when its first samples, from sample 0 on.*evaluation transform"
    for given in changing:
        with pytest.raises(ValueError, match=f"train_data {message}"):
            influence.score(student, teacher, given, val, layers=layers)
    with pytest.raises(ValueError, match=f"val_data {message}"):
        influence.score(student, teacher, train, moving, layers=layers)
    factors = influence.Factors.fit(student.eval(), train)
    for call in (
        lambda: influence.pairwise(student, val, moving, factors=factors),
        lambda: influence.pairwise(student, moving, train, factors=factors),
        lambda: influence.self_influence(student, moving, factors=factors),
        lambda: influence.set_shift(student, teacher, moving),
        lambda: influence.Factors.fit(student, moving),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    # Data that do not change are accepted, also with NaN; a few samples are read twice.
    train.tensors[0][3] = float("nan")
    steady = Moving(train, flips=False)
    with pytest.raises(ValueError, match="sample 3"):
        influence.score(student, teacher, steady, val, layers="last")
    steady = Moving(data(2, 40), flips=False)
    influence.score(student, teacher, steady, val, layers=layers)
    assert steady.reads == 16 + 40 * (1 if layers == "last" else 3)
