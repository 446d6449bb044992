"""The standard error of kd_gain, against separate parts of the held-out slice; selection by it; shrinkage."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lrds_fast import KDLoss, influence, select
from lrds_fast.cli import main as cli
from lrds_fast.influence import Scores, load_scores
from lrds_fast.selection import Selection, shrinkage_weights

CLASSES, WIDTH = 4, 3


def case(rows: int = 40, held_out: int = 23, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=dtype)

    return {
        "features": normal(rows, WIDTH),
        "student_logits": 2 * normal(rows, CLASSES),
        "teacher_logits": 3 * normal(rows, CLASSES),
        "target": torch.randint(0, CLASSES, (rows,), generator=random),
        "val_features": normal(held_out, WIDTH),
        "val_logits": normal(held_out, CLASSES),
        "val_target": torch.randint(0, CLASSES, (held_out,), generator=random),
    }


def gains_by_part(inputs: dict[str, Tensor], folds: int, **options: object) -> tuple[Tensor, Tensor]:
    """(F, N) gains by each part of the held-out slice alone, and (F,) their sizes."""
    found, sizes = [], []
    for fold in range(folds):
        part = {key: value[fold::folds] if key.startswith("val_") else value for key, value in inputs.items()}
        found.append(influence.last_layer_scores(**part, folds=0, **options)["kd_gain"])  # type: ignore[arg-type]
        sizes.append(len(part["val_target"]))
    return torch.stack(found), torch.tensor(sizes, dtype=torch.float64)


def error_of(parts: Tensor, sizes: Tensor) -> Tensor:
    w = (sizes / sizes.sum())[:, None]
    mean = (w * parts).sum(dim=0)
    return ((w * (parts - mean).square()).sum(dim=0) / (len(parts) - 1)).sqrt()


@pytest.mark.parametrize("curvature", ["identity", "kfac", "ekfac", "exact"])
@pytest.mark.parametrize("folds", [2, 5, 23, 100])
def test_error_is_that_of_the_parts(curvature: str, folds: int) -> None:
    inputs = case()
    scores = influence.last_layer_scores(**inputs, curvature=curvature, folds=folds, damping=0.01)  # type: ignore[arg-type]
    used = min(folds, 23)
    parts, sizes = gains_by_part(inputs, used, curvature=curvature, damping=0.01)
    torch.testing.assert_close(scores.standard_error["kd_gain"], error_of(parts, sizes), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores["kd_gain"], (sizes[:, None] / sizes.sum() * parts).sum(dim=0))
    assert scores.meta["folds"] == used


@pytest.mark.parametrize("loss", [KDLoss(revise=None), KDLoss(divergence="dkd", eta=0.5), KDLoss(label_smoothing=0.1)])
def test_error_is_of_the_objective_at_hand(loss: KDLoss) -> None:
    inputs = case(dtype=torch.float32)
    scores = influence.last_layer_scores(**inputs, loss=loss, folds=5)  # type: ignore[arg-type]
    parts, sizes = gains_by_part(inputs, 5, loss=loss)
    torch.testing.assert_close(
        scores.standard_error["kd_gain"].double(), error_of(parts.double(), sizes), rtol=1e-3, atol=1e-5
    )


def test_error_is_the_spread_between_held_out_slices() -> None:
    """Over 200 slices drawn from one distribution the gain's standard deviation is the mean squared error's root."""
    train, pool = case(rows=30), case(held_out=200 * 60, seed=1)
    gains, errors = [], []
    for slice_ in torch.arange(200 * 60).split(60):
        own = {key: value[slice_] if key.startswith("val_") else train[key] for key, value in pool.items()}
        scores = influence.last_layer_scores(**own, damping=0.1)  # type: ignore[arg-type]
        gains.append(scores["kd_gain"])
        errors.append(scores.standard_error["kd_gain"])
    ratio = torch.stack(errors).square().mean(dim=0).sqrt() / torch.stack(gains).std(dim=0)
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(ratio.min()) > 0.8 and float(ratio.max()) < 1.25


def test_no_standard_error_without_folds_or_validation_rows() -> None:
    inputs = case()
    assert influence.last_layer_scores(**inputs, folds=0).standard_error == {}  # type: ignore[arg-type]
    assert influence.last_layer_scores(**inputs, scores="conflict").standard_error == {}  # type: ignore[arg-type]
    one = {key: value[:1] if key.startswith("val_") else value for key, value in inputs.items()}
    assert influence.last_layer_scores(**one).standard_error == {}  # type: ignore[arg-type]
    for folds in (1, -1):
        with pytest.raises(ValueError, match="folds must be None, 0 .* or an int >= 2"):
            influence.last_layer_scores(**inputs, folds=folds)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="folds must be None, 0"):
        influence.last_layer_scores(**inputs, folds=2.5)  # type: ignore[arg-type]


class _Net(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden, self.fc = nn.Linear(5, hidden), nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.tanh(self.hidden(x)))
        return logits


def samples(count: int, seed: int) -> list[tuple[Tensor, int]]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=random, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (count,), generator=random)
    return list(zip(x, y.tolist(), strict=True))


@pytest.mark.parametrize("layers", ["last", "all"])
def test_models_and_data_give_the_same_error(layers: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher = _Net(6).double(), _Net(8).double()
    train, val = samples(50, 1), samples(21, 2)
    common = {"layers": layers, "damping": 0.1, "labels": "all", "batch_size": 8}
    scores = influence.score(student, teacher, train, val, folds=4, **common)  # type: ignore[arg-type]
    parts = torch.stack(
        [
            influence.score(student, teacher, train, val[fold::4], folds=0, **common)["kd_gain"]  # type: ignore[arg-type]
            for fold in range(4)
        ]
    )
    sizes = torch.tensor([6.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(scores.standard_error["kd_gain"], error_of(parts, sizes), rtol=1e-6, atol=1e-9)
    assert scores.meta["folds"] == 4
    stored = influence.score(student, teacher, train, val, folds=4, out=tmp_path / "s", **common)  # type: ignore[arg-type]
    again = load_scores(tmp_path / "s")
    assert list(again) == list(again.standard_error) == ["teacher_harm", "kd_gain"]
    torch.testing.assert_close(again.standard_error["kd_gain"], scores.standard_error["kd_gain"])
    assert torch.equal(stored.standard_error["kd_gain"], again.standard_error["kd_gain"])
    default = influence.score(student, teacher, train, val, **common)  # type: ignore[arg-type]
    assert bool(default.standard_error) == (layers == "last"), "each part costs a JVP, so that it is off by default"


SCORE = torch.tensor([5.0, 1.0, 3.0, -2.0, 4.0, 2.1, 0.0, 4.0])
ERROR = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 1.0, 0.0, 1.0])


def made(**more: Tensor) -> Scores:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    return Scores(
        {"kd_gain": SCORE, **more},
        target=labels,
        teacher_pred=labels,
        meta={"num_classes": 2},
        standard_error={"kd_gain": ERROR},
    )


@pytest.mark.parametrize(
    ("options", "denied"),
    [
        ({"confidence": 2.0}, {0, 2, 5, 7}),
        ({"confidence": 0.0}, {0, 1, 2, 4, 5, 7}),
        ({"confidence": 3.5}, {0, 7}),
        # The highest 3 are 0, 7 and 4; of equal scores the later one goes first, and 4 is not significant.
        ({"confidence": 2.0, "max_drop": 0.375}, {0, 7}),
        ({"confidence": 2.0, "max_drop": 0.25}, {0, 7}),
        ({"confidence": 2.0, "max_drop": 0.0}, set()),
        ({"confidence": 2.0, "max_drop": 0.25, "per_class": True}, {0, 7}),
        ({"confidence": 2.0, "max_drop": 0.5, "per_class": True}, {0, 2, 7}),
        ({"confidence": 1.0, "largest": True}, {3}),
    ],
)
def test_deselected_samples(options: dict[str, float], denied: set[int]) -> None:
    selection = select(made(), **options)  # type: ignore[arg-type]
    assert set((~selection.mask).nonzero()[:, 0].tolist()) == denied
    plain = {"kd_gain": SCORE, "kd_gain_standard_error": ERROR}
    labels = made().target if options.get("per_class") else None
    assert torch.equal(select(plain, labels=labels, **options).mask, selection.mask)  # type: ignore[arg-type]
    assert selection.policy["confidence"] == options["confidence"]
    assert selection.policy["max_drop"] == options.get("max_drop", 1.0)


def test_hysteresis_is_in_standard_errors() -> None:
    before = torch.tensor([True, True, True, True, True, False, False, False])
    selection = select(made(), confidence=2.0, leave=4.0, previous=before)
    # 0 is 5 errors above 0; 2 is 3 and stays; 5 (2.1) and 7 (4) stay out; 6 comes back.
    assert set((~selection.mask).nonzero()[:, 0].tolist()) == {0, 5, 7}
    with pytest.raises(ValueError, match="leave must be >= confidence, 2.0; got 1.0"):
        select(made(), confidence=2.0, leave=1.0, previous=before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": -1.0}, "confidence must be >= 0 and finite, in standard errors"),
        ({"confidence": math.nan}, "confidence must be >= 0"),
        ({"confidence": 2.0, "max_drop": 1.5}, r"max_drop must lie in \[0, 1\]"),
        ({"ratio": 0.5, "max_drop": 0.1}, "max_drop applies to confidence"),
        ({"ratio": 0.5, "confidence": 2.0}, "exactly one of confidence, outliers, ratio and threshold"),
        ({}, "exactly one of confidence, outliers, ratio and threshold"),
        ({"by": "ce", "confidence": 2.0}, "confidence needs the standard error of 'ce'"),
    ],
)
def test_errors_name_the_way_out(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(made(ce=SCORE), **options)  # type: ignore[arg-type]


def test_an_invalid_standard_error_is_refused() -> None:
    bad = ERROR.clone()
    bad[3] = math.nan
    with pytest.raises(ValueError, match="'kd_gain_standard_error' must be finite and >= 0; got nan at sample 3"):
        select({"kd_gain": SCORE, "kd_gain_standard_error": bad}, confidence=2.0)
    with pytest.raises(ValueError, match="standard_error has 'ce', which is none of the scores"):
        Scores(
            {}, target=torch.zeros(1).long(), teacher_pred=torch.zeros(1).long(), meta={}, standard_error={"ce": ERROR}
        )


def test_a_selection_keeps_the_error(tmp_path: Path) -> None:
    path = tmp_path / "selection.parquet"
    select(made(), confidence=2.0, max_drop=0.25).save(path)
    loaded = Selection.load(path)
    assert torch.equal(loaded.scores["kd_gain_standard_error"], ERROR)
    scores = tmp_path / "scores.parquet"
    select(made(), ratio=1.0).save(scores)
    assert cli.main(["select", str(scores), "--confidence", "2", "--max-drop", "0.25"]) == cli.OK
    assert torch.equal(Selection.load(path).mask, loaded.mask)


def test_weights_are_calibrated() -> None:
    """Of the samples with a weight near w a share w has a true gain below 0."""
    random = torch.Generator().manual_seed(0)
    count = 200_000
    true = 0.3 + 0.8 * torch.randn(count, generator=random, dtype=torch.float64)
    error = 0.2 + 2.0 * torch.rand(count, generator=random, dtype=torch.float64)
    score = true + error * torch.randn(count, generator=random, dtype=torch.float64)
    weights = shrinkage_weights({"kd_gain": score, "kd_gain_standard_error": error})
    assert weights.dtype == torch.float32 and float(weights.min()) >= 0 and float(weights.max()) <= 1
    for low in torch.arange(0, 1, 0.1).tolist():
        inside = (weights >= low) & (weights < low + 0.1)
        share = float((true[inside] < 0).double().mean())
        assert share == pytest.approx(float(weights[inside].double().mean()), abs=0.015)


def test_weights_at_zero_and_dominant_errors() -> None:
    exact = shrinkage_weights(
        {"kd_gain": torch.tensor([-1.0, 0.5, 0.0, 2.0]), "kd_gain_standard_error": torch.zeros(4)}
    )
    assert exact.tolist() == [1.0, 0.0, 0.5, 0.0]
    # Estimates that differ by less than their errors: one true gain for all, their mean.
    alike = shrinkage_weights({"kd_gain": torch.tensor([-0.1, 0.3]), "kd_gain_standard_error": torch.full((2,), 9.0)})
    assert alike.tolist() == [0.0, 0.0]
    same = shrinkage_weights({"kd_gain": torch.full((3,), -2.0), "kd_gain_standard_error": torch.ones(3)})
    assert same.tolist() == [1.0, 1.0, 1.0]
    nothing = torch.empty(0)
    assert len(shrinkage_weights({"kd_gain": nothing, "kd_gain_standard_error": nothing})) == 0
    with pytest.raises(ValueError, match="not finite at sample 1"):
        shrinkage_weights({"kd_gain": torch.tensor([0.0, math.inf]), "kd_gain_standard_error": torch.ones(2)})
    with pytest.raises(ValueError, match="needs the standard error of 'ce'"):
        shrinkage_weights({"ce": nothing}, by="ce")
