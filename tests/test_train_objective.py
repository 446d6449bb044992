"""Scores use the objective that is trained: scores against finite differences of the trainer's own objective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_train import blobs, recipe, student, teacher
from torch import Tensor, nn

from lrds_fast import KDLoss, influence
from lrds_fast.divergences import NAMES
from lrds_fast.recipe.recipe import LossOptions, from_mapping
from lrds_fast.selection import Selection, dataset_fingerprint
from lrds_fast.train import train
from lrds_fast.train.methods import objective
from lrds_fast.train.setup import in_epoch, scored_loss
from lrds_fast.train.totals import Totals

ROWS, CLASSES, WIDTH = 40, 5, 6
DAMPING, STEP = 0.05, 1e-5


def problem() -> dict[str, Tensor]:
    """A head W (C, D), its rows, teacher logits, a held-out slice and who has a teacher; float64."""
    draws = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    def labels(count: int) -> Tensor:
        return torch.randint(0, CLASSES, (count,), generator=draws)

    return {
        "w": normal(CLASSES, WIDTH),
        "h": normal(ROWS, WIDTH),
        "v": 3 * normal(ROWS, CLASSES),
        "y": labels(ROWS),
        "hv": normal(17, WIDTH),
        "yv": labels(17),
        "selected": torch.rand(ROWS, generator=draws) < 0.7,
    }


def differences(p: dict[str, Tensor], trained: Any, *, curved: bool) -> Tensor:
    """(N,) kd_gain: n times what switching each row's teacher changes in the objective's slope along H^-1 g_val.

    trained: from head weights and a mask to the objective's value. H from differences of its gradient, or I.
    """

    def gradient(w: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        return torch.autograd.grad(trained(w, p["selected"]), w)[0].flatten()

    w = p["w"].clone().requires_grad_()
    direction = torch.autograd.grad(F.cross_entropy(p["hv"] @ w.T, p["yv"]), w)[0].flatten()
    if curved:
        steps = STEP * torch.eye(w.numel(), dtype=torch.float64).reshape(-1, *w.shape)
        columns = [(gradient(p["w"] + step) - gradient(p["w"] - step)) / (2 * STEP) for step in steps]
        h = torch.stack(columns, dim=1) + DAMPING * torch.eye(w.numel(), dtype=torch.float64)
        direction = torch.linalg.solve(h, direction)
    move = STEP * direction.reshape(p["w"].shape)
    found = []
    for row in range(ROWS):
        on, off = p["selected"].clone(), p["selected"].clone()
        on[row], off[row] = True, False
        change = [float(trained(w, on) - trained(w, off)) for w in (p["w"] + move, p["w"] - move)]
        found.append(-ROWS * (change[0] - change[1]) / (2 * STEP))
    return torch.tensor(found, dtype=torch.float64)


def scored(p: dict[str, Tensor], loss: KDLoss, *, curved: bool) -> Tensor:
    return influence.last_layer_scores(
        features=p["h"],
        student_logits=p["h"] @ p["w"].T,
        teacher_logits=p["v"],
        target=p["y"],
        val_features=p["hv"],
        val_logits=p["hv"] @ p["w"].T,
        val_target=p["yv"],
        selected=p["selected"],
        curvature="exact" if curved else "identity",
        damping=DAMPING if curved else None,
        bias=False,
        loss=loss,
    )["kd_gain"]


OBJECTIVES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "default": ({}, 0, True),
    "warming up": ({"kd_warmup_epochs": 5}, 1, True),
    "a rising weight": ({"ce_weight_end": 1.0, "kd_warmup_epochs": 2}, 1, True),
    "warming up, sums above 1": ({"kd_warmup_epochs": 4, "ce_weight": 0.5, "kd_weight": 2.0}, 0, True),
    "revised less": ({"eta": 0.95, "temperature": 2.0}, 0, True),
    "unrevised": ({"revise": "none"}, 0, True),
    "mft": ({"revise": "mft", "eta": 0.9}, 0, True),
    "swap": ({"revise": "swap"}, 0, True),
    "lighter without a teacher": ({"ce_weight_unselected": 0.4}, 0, True),
    "smoothed labels": ({"label_smoothing": 0.1, "ce_weight": 0.3}, 0, True),
    "several temperatures": ({"temperatures": (1.0, 2.0, 4.0), "kd_warmup_epochs": 3}, 1, True),
    **{
        f"{name}": ({"divergence": name, "kd_warmup_epochs": 2, "temperature": 2.0}, 0, False)
        for name in NAMES
        if name != "kl"
    },
    "standardized": ({"standardize": True}, 0, False),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_scores_are_differences_of_the_trained_objective(name: str) -> None:
    """The curvature of a divergence other than KL is exact at q = p' at most: those are compared with H = I."""
    values, epoch, curved = OBJECTIVES[name]
    p = problem()
    chosen = recipe(**{f"loss.{key}": value for key, value in values.items()} | {"schedule.epochs": 8})
    measure = objective(in_epoch(chosen.loss, epoch, 8))

    def trained(w: Tensor, mask: Tensor) -> Tensor:
        return measure(p["h"] @ w.T, p["v"], p["y"], selected=mask).loss

    expected = differences(p, trained, curved=curved)
    actual = scored(p, scored_loss(chosen, epoch), curved=curved)
    assert expected.norm() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "elementmean"])
def test_class_weights_count_as_they_do_in_the_loss(reduction: str) -> None:
    """Under "mean" the cross-entropy is divided by the sum of the weights, here 2.3 of the rows' number on average."""
    p = problem()
    loss = KDLoss(ce_weight=0.4, class_weight=torch.tensor([1.0, 4.0, 0.5, 2.0, 4.0]).double(), reduction=reduction)
    scale = {"mean": 1.0, "sum": 1.0 / ROWS, "elementmean": float(CLASSES)}[reduction]

    def trained(w: Tensor, mask: Tensor) -> Tensor:
        value: Tensor = scale * loss(p["h"] @ w.T, p["v"], p["y"], mask)
        return value

    torch.testing.assert_close(scored(p, loss, curved=True), differences(p, trained, curved=True), rtol=1e-5, atol=1e-6)
    # From the models, over all layers: the same loss, the same weights.
    head, guide = nn.Linear(WIDTH, CLASSES, bias=False).double(), nn.Linear(WIDTH, CLASSES, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(p["w"])
    given: dict[str, Any] = {
        "train_data": list(zip(p["h"], p["y"].tolist(), strict=True)),
        "val_data": [(p["hv"], p["yv"])],
        "selected": p["selected"],
        "loss": loss,
    }
    last, whole = (
        influence.score(head, guide, **given, layers=layers, labels=labels)["kd_gain"]
        for layers, labels in (("last", 1), ("all", "all"))
    )
    torch.testing.assert_close(whole, last, rtol=1e-9, atol=1e-12)


def test_scored_in_training_by_the_objective_of_the_epoch(tmp_path: Path) -> None:
    chosen = recipe(
        **{"loss.kd_warmup_epochs": 4, "schedule.epochs": 4, "selection.after": 1, "selection.every": 2}
        | {"selection.ratio": 0.5}
    )
    data = blobs()
    fingerprint = dataset_fingerprint(data.train.labels, 3)
    train(chosen, data, student(), teacher(), out=tmp_path, fingerprint=fingerprint, progress=False)
    weights = []
    for epoch in (1, 3):
        loss = Selection.load(tmp_path / "selections" / f"epoch_{epoch:04d}.parquet").meta["loss"]
        assert isinstance(loss, dict)
        weights.append((loss["kd_weight"], loss["resolved_ce_weight_unselected"]))
    assert weights == [(pytest.approx(0.45), 1.0), (pytest.approx(0.9), 1.0)]


def test_the_weights_of_an_epoch() -> None:
    options = LossOptions(ce_weight=0.1, ce_weight_end=1.0, kd_weight=0.9, kd_warmup_epochs=2)
    by_epoch = [in_epoch(options, epoch, 5) for epoch in (0, 2, 4, None)]
    assert [each.ce_weight for each in by_epoch] == pytest.approx([10**-0.9, 10**-0.5, 10**-0.1, 1.0])
    assert [each.kd_weight for each in by_epoch] == pytest.approx([0.45, 0.9, 0.9, 0.9])
    assert {each.ce_weight_unselected for each in by_epoch} == {1.0}
    falling = in_epoch(LossOptions(ce_weight=2.0, ce_weight_end=0.5), 0, 1)
    assert falling.ce_weight == pytest.approx(1.0)
    constant = LossOptions(ce_weight=0.0, ce_weight_unselected=0.2)
    assert in_epoch(constant, 3, 5) == constant


def test_without_a_teacher_a_sample_keeps_the_weight_of_the_warmed_up_loss(tmp_path: Path) -> None:
    """The default of ce_weight_unselected goes by the full kd_weight: in the first epoch of a warm-up too."""
    chosen = recipe(**{"loss.kd_warmup_epochs": 3, "schedule.epochs": 3, "optimizer.lr": 1e-9})
    data, model = blobs(), student()
    empty = torch.zeros(len(data.train.labels), dtype=torch.bool)
    records = train(chosen, data, model, teacher(), out=tmp_path, selected=empty, progress=False).records
    losses = [record["train_ce"] for record in records]
    assert max(losses) < 1.3 * min(losses), "not .4, .7 and 1 times the cross-entropy"


def label_probabilities(options: LossOptions, v: Tensor, y: Tensor) -> tuple[float, float]:
    p = torch.softmax(v.double() / options.temperature, dim=1)
    own = p.gather(1, y[:, None])[:, 0]
    top = p.amax(dim=1)
    beta = options.eta / (1 + top - own)
    return float(own[own == top].mean()), float((beta * own + 1 - beta)[own < top].mean())


def test_a_run_warns_when_revised_rows_are_the_most_confident(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, guide = blobs(300), teacher()
    batch = torch.cat([batch.images for batch in data.score.epoch(0)])
    with torch.no_grad():
        v = guide(batch)
    expected = label_probabilities(LossOptions(), v, data.score.labels)

    def run(out: Path, **values: Any) -> list[dict[str, Any]]:
        return train(recipe(**values), data, student(), guide, out=out, progress=False).records

    records = run(tmp_path / "hot", **{"loss.revise_temperature": None})
    for record in records:
        found = (record["p_label_right"], record["p_label_revised"])
        assert found == pytest.approx(expected, rel=1e-5)
    note = capfd.readouterr().err
    assert note.count("label revision gives the label a probability of") == 1, "once a run"
    assert f"{expected[1]:.2f} where the teacher is wrong; the teacher itself gives it {expected[0]:.2f} where" in note
    assert "Revise at T = 1 (loss.revise_temperature=1), or set loss.eta near 0.95 (it is 0.8)" in note
    run(tmp_path / "at one")
    note = capfd.readouterr().err
    assert "Set loss.eta near 0.95 (it is 0.8)" in note and "loss.revise_temperature=1" not in note
    run(tmp_path / "plain", **{"loss.revise": "none"})
    assert "label revision" not in capfd.readouterr().err


def test_label_probabilities_are_of_selected_rows() -> None:
    """Masked rows do not count, and fewer than 32 rows of a kind give no number."""
    draws = torch.Generator().manual_seed(0)
    v, y = 3 * torch.randn(400, 5, generator=draws), torch.randint(0, 5, (400,), generator=draws)
    mask = torch.rand(400, generator=draws) < 0.8
    arguments = {"temperature": 4.0, "revise": "lr", "eta": 0.8, "revise_temperature": None}

    def measured(teacher: Tensor, target: Tensor, selected: Tensor | None) -> list[float]:
        totals = Totals(torch.device("cpu"))
        totals.add_revised(teacher, target, selected, arguments)
        return totals._sums[7:].tolist()

    some, all_of_them = measured(v, y, mask), measured(v[mask], y[mask], None)
    assert some == pytest.approx(all_of_them)
    n_right, p_right, n_wrong, p_wrong = some
    assert (p_right / n_right, p_wrong / n_wrong) == pytest.approx(label_probabilities(LossOptions(), v[mask], y[mask]))
    assert n_right + n_wrong == int(mask.sum())


def test_the_saved_recipe_resolves_defaults_to_numbers(tmp_path: Path) -> None:
    chosen = recipe(**{"schedule.epochs": 1, "loss.ce_weight": 0.2, "loss.kd_weight": 0.3})
    assert chosen.loss.ce_weight_unselected is None
    train(chosen, blobs(), student(), teacher(), out=tmp_path, progress=False)
    written = from_mapping(json.loads((tmp_path / "recipe.json").read_text()))
    assert written.loss.ce_weight_unselected == 0.5
    # A run with the explicit number is the same run.
    train(written, blobs(), student(), teacher(), out=tmp_path, resume=True, progress=False)
    other = chosen.with_values(**{"loss.ce_weight_unselected": 1.0})
    with pytest.raises(ValueError, match="loss.ce_weight_unselected"):
        train(other, blobs(), student(), teacher(), out=tmp_path, resume=True, progress=False)
    assert chosen.with_values(**{"loss.ce_weight_unselected": "none"}) == chosen
