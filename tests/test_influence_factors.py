"""A whole model's curvature: against dense matrices, its definition by samples, and the last layer's closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lrds_fast import influence
from lrds_fast.influence.factors import Factors, fit_factors
from lrds_fast.influence.layers import Outer, sample_gradients
from lrds_fast.influence.objective import cross_entropy_terms, fisher_gradients
from lrds_fast.influence.options import BLOCK_CURVATURES

CLASSES = 4


def model_and_batches() -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.AdaptiveAvgPool1d(2),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.Tanh(),
        nn.Linear(5, CLASSES, bias=False),
    )
    return model.double().eval(), [torch.randn(n, 4, 3, 3, dtype=torch.float64) for n in (5, 8, 4)]


def distillation_terms(logits: Tensor, start: int = 0) -> list[tuple[Tensor, float]]:
    weight = 0.2 + 0.04 * torch.arange(start, start + len(logits)).to(logits)
    return [(weight, 1.0), (1.0 - weight / 2, 3.0)]


def dense_blocks(factors: Factors, name: str) -> Tensor:
    """The damped curvature of each layer as a matrix, (P, P)."""
    block = factors.blocks[name]
    damped = block.eigenvalues + factors.damping[name]
    if block.qg is None or block.qa is None:
        return torch.diag(damped.flatten())
    parts = []
    for group in range(len(damped)):
        basis = torch.kron(block.qg[group], block.qa[group])
        parts.append(basis @ torch.diag(damped[group].flatten()) @ basis.T)
    dense: Tensor = torch.block_diag(*parts)
    return dense


@pytest.mark.parametrize("curvature", BLOCK_CURVATURES)
def test_inverse_against_dense_matrices(curvature: str) -> None:
    model, batches = model_and_batches()
    factors = fit_factors(model, batches, curvature=curvature, damping=0.01, labels="all", terms=distillation_terms)
    _, found = sample_gradients(model, batches[0], lambda z: z.softmax(dim=1))
    exact = {1: torch.zeros(5, dtype=torch.float64), 2: torch.zeros(5, dtype=torch.float64)}
    for name, gradients in found.items():
        inverse = torch.linalg.inv(dense_blocks(factors, name))
        g = gradients.dense()
        torch.testing.assert_close(factors.solve({k: v.dense()[2] for k, v in found.items()})[name], inverse @ g[2])
        for power in exact:
            exact[power] += (g @ torch.linalg.matrix_power(inverse, power) * g).sum(dim=1)
    for power, expected in exact.items():
        torch.testing.assert_close(factors.quadratic(found, power), expected, rtol=1e-10, atol=0)


def test_factors_by_definition() -> None:
    """A, G and Lambda from every sample's gradient of every label, one at a time."""
    model, batches = model_and_batches()
    fitted = {
        c: fit_factors(model, batches, curvature=c, labels="all", terms=distillation_terms) for c in BLOCK_CURVATURES
    }
    x = torch.cat(batches)
    sums: dict[str, Tensor] = {}
    a: dict[str, Tensor] = {}
    g: dict[str, Tensor] = {}
    start = 0
    for batch in batches:
        logits = model(batch).detach()
        terms = distillation_terms(logits, start)
        start += len(batch)
        for draw, delta in enumerate(fisher_gradients(logits, terms, "all", torch.Generator())):
            _, found = sample_gradients(model, batch, lambda _, d=delta: d)  # type: ignore[misc]
            for name, gradients in found.items():
                block = fitted["ekfac"].blocks[name]
                for i, row in enumerate(gradients.dense()):
                    tile = row.reshape(block.eigenvalues.shape)
                    if block.qg is not None and block.qa is not None:
                        tile = block.qg.mT @ tile @ block.qa
                    sums[name] = sums.get(name, torch.zeros(())) + tile.square() / len(x)
                    if isinstance(gradients, Outer):
                        inputs, deltas = gradients.inputs[i], gradients.deltas[i]
                        a[name] = a.get(name, torch.zeros(())) + (inputs.mT @ inputs / len(x) if draw == 0 else 0)
                        g[name] = g.get(name, torch.zeros(())) + deltas.mT @ deltas / len(x) / deltas.shape[1]
    assert set(sums) == {"0", "1", "6", "8"}
    for name, expected in sums.items():
        torch.testing.assert_close(fitted["ekfac"].blocks[name].eigenvalues, expected, rtol=1e-10, atol=1e-14)
        assert fitted["ekfac"].damping[name] == pytest.approx(0.1 * expected.mean().item())
    for name, expected in a.items():
        block = fitted["kfac"].blocks[name]
        assert block.qg is not None and block.qa is not None
        kronecker = torch.stack([torch.kron(*pair) for pair in zip(g[name], expected, strict=True)])
        basis = torch.stack([torch.kron(*pair) for pair in zip(block.qg, block.qa, strict=True)])
        rebuilt = basis @ torch.diag_embed(block.eigenvalues.flatten(1)) @ basis.mT
        torch.testing.assert_close(rebuilt, kronecker, rtol=1e-10, atol=1e-14)
    assert all((block.eigenvalues == 1).all() for block in fitted["identity"].blocks.values())
    assert set(fitted["identity"].damping.values()) == {0.0}


@pytest.mark.parametrize("curvature", BLOCK_CURVATURES)
def test_a_last_layer_matches_its_closed_form(curvature: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, CLASSES).double()
    h, target = torch.randn(30, 7, dtype=torch.float64), torch.randint(CLASSES, (30,))
    with torch.no_grad():
        z = layer(h)
    factors = fit_factors(layer, h.split(11), layers=[""], curvature=curvature, labels="all")
    _, found = sample_gradients(layer, h, lambda z: z.softmax(1) - nn.functional.one_hot(target, CLASSES), [""])
    expected = influence.last_layer_scores(
        features=h,
        student_logits=z,
        teacher_logits=z,
        target=target,
        scores=("self_influence", "param_shift"),
        curvature=curvature,
        hessian="gt",
    )
    torch.testing.assert_close(factors.quadratic(found, 1), expected["self_influence"], rtol=1e-9, atol=0)
    torch.testing.assert_close(factors.quadratic(found, 2).sqrt(), expected["param_shift"], rtol=1e-9, atol=0)


def test_drawn_labels_approach_all_of_them() -> None:
    model, batches = model_and_batches()
    exact = fit_factors(model, batches, labels="all")
    drawn = fit_factors(model, batches, labels=400)
    for name, block in exact.blocks.items():
        assert drawn.blocks[name].mean() == pytest.approx(block.mean(), rel=0.1)
    again = fit_factors(model, batches, labels=2, seed=5)
    same = fit_factors(model, batches, labels=2, seed=5)
    assert all(torch.equal(again.blocks[n].eigenvalues, same.blocks[n].eigenvalues) for n in again.blocks)


@pytest.mark.parametrize("curvature", BLOCK_CURVATURES)
def test_saved_factors_load_unchanged(curvature: str, tmp_path: Path) -> None:
    model, batches = model_and_batches()
    factors = Factors.fit(model, batches, curvature=curvature, labels=2)
    factors.save(tmp_path / "factors.safetensors")
    loaded = Factors.load(tmp_path / "factors.safetensors", model)
    _, found = sample_gradients(model, batches[0], lambda z: z.softmax(dim=1))
    for power in (1, 2):
        assert torch.equal(loaded.quadratic(found, power), factors.quadratic(found, power))
    assert loaded.damping == factors.damping and loaded.layers == ["0", "1", "6", "8"]
    assert [path.name for path in tmp_path.iterdir()] == ["factors.safetensors"]


def test_factors_of_another_model_are_refused(tmp_path: Path) -> None:
    model, batches = model_and_batches()
    path = tmp_path / "factors.safetensors"
    Factors.fit(model, batches).save(path)
    with pytest.raises(ValueError, match="this one has no layer '6'"):
        Factors.load(path, nn.Sequential(*list(model)[:3]))
    with torch.no_grad():
        model.get_parameter("6.weight")[0, 0] += 1e-9
    with pytest.raises(ValueError, match="belongs to other weights than this model's"):
        Factors.load(path, model)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        Factors.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"holds no influence factors \(format None\)"):
        Factors.load(path)
    with pytest.raises(FileNotFoundError):
        Factors.load(tmp_path / "nowhere.safetensors")


def test_factors_of_the_last_layer_need_the_model_before_it() -> None:
    model, batches = model_and_batches()
    factors = Factors.fit(model, batches, layers=["6"])
    assert factors.layers_of(model) == ["6"]
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1e-9
    with pytest.raises(ValueError, match="factors were fitted to another student, or to other weights of it"):
        factors.layers_of(model)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_batches()
    factors = Factors.fit(model, batches)
    factors.save(tmp_path / "f")
    before = (tmp_path / "f").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lrds_fast.influence.factors.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        factors.save(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_mistakes_are_named() -> None:
    model, batches = model_and_batches()
    for keywords, message in (
        ({"curvature": "exact"}, "curvature must be one of identity, kfac, ekfac; got 'exact'"),
        ({"labels": 0}, "labels must be 'all' or a number of draws >= 1; got 0"),
        ({"labels": "some"}, "labels must be 'all'"),
        ({"layers": ["2"]}, "module '2' has no trainable parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_factors(model, batches, **keywords)
    with pytest.raises(ValueError, match="data must contain samples"):
        fit_factors(model, [])
    assert cross_entropy_terms(torch.zeros(3, 2), 0)[0][1] == 1.0
