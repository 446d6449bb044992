"""The laboratory on frozen features: its losses, revision, scores and statistics; runs end to end, resumption."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from influence_oracle import Case, relative_error
from torch import Tensor, nn

from benchmarks import lab_features, lab_statistics, lab_students
from benchmarks.lab_students import Arm, Problem, Revision, Scored, Selection, Training
from benchmarks.tables import stored_rows
from lrds_fast import KDLoss, reference, revise_labels
from lrds_fast.influence import last_layer_scores

TINY = Training(hidden=12, batch=32, together=3)


def problem(seed: int = 0, *, rows: int = 120, classes: int = 5, epochs: int = 6) -> Problem:
    """Clustered inputs. The teacher is wrong on some rows, and a quarter of the rows have the logits of another row."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 8, generator=generator)
    y = torch.randint(0, classes, (rows + 240,), generator=generator)
    x = centres[y] + torch.randn(len(y), 8, generator=generator)
    v = 2 * x @ centres.T - centres.square().sum(dim=1) + torch.randn(len(y), classes, generator=generator)
    corrupted = torch.arange(rows) % 4 == 0
    v = v[:rows]
    v[corrupted] = v[corrupted].roll(1, 0)
    return Problem(
        x[:rows],
        y[:rows],
        v,
        corrupted,
        x[rows : rows + 40],
        y[rows : rows + 40],
        x[rows + 40 :],
        y[rows + 40 :],
        classes,
        seed,
        epochs,
    )


REVISIONS = {
    "none": (None, None),
    "published": (Revision(at=None), "lr"),
    "swap": (Revision("swap"), "swap"),
    "mft": (Revision("mft", eta=0.9), "mft"),
}


@pytest.mark.parametrize("name", REVISIONS)
def test_the_gradient_is_the_reference_losses(name: str) -> None:
    """The gradient of the whole batch equals the reference's, with fractional weights and a ce_weight for denied
    rows."""
    case = problem()
    revision, policy = REVISIONS[name]
    arm = Arm("", ce=0.2, kd=0.7, revision=revision, unselected=0.6)
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(len(case.y), generator=generator) * (torch.rand(len(case.y), generator=generator) < 0.8)
    objective = lab_students.objective_of(arm, case, weight)
    z = torch.randn(case.v.shape, generator=generator).requires_grad_()
    loss = reference.kd_loss(
        z,
        case.v,
        case.y,
        temperature=4.0,
        ce_weight=0.2,
        kd_weight=0.7,
        ce_weight_unselected=0.6,
        revise=policy,
        eta=0.8 if revision is None else revision.eta,
        revise_temperature=None,
        selected=weight,
        reduction="sum",
    )
    (expected,) = torch.autograd.grad(loss, z)
    found = lab_students.logit_gradient(z.detach(), case.y, objective.ce, objective.kd, objective.target, 4.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [1.0, 2.0])
def test_revision_moves_the_label_alone(at: float) -> None:
    case = problem()
    v = case.v.double()
    revised = lab_students.revised_logits(v, case.y, Revision(at=at, eta=0.8), 4.0)
    published = revise_labels(v, case.y, eta=0.8, temperature=at, revise_temperature=None)
    torch.testing.assert_close((revised / at).softmax(dim=1), published)
    wrong = v.argmax(dim=1) != case.y
    assert 0 < int(wrong.sum()) < len(wrong)
    others = torch.arange(v.shape[1]) != case.y[:, None]
    assert torch.equal(revised[others], v[others]) and torch.equal(revised[~wrong], v[~wrong])


def test_margin_and_posterior_revisions() -> None:
    """By definition: the label wins by what it lost by; its odds against every other class rise by e^strength."""
    case = problem()
    v, y = case.v.double(), case.y[:, None]
    p = v.softmax(dim=1)
    lost_by = (p.amax(dim=1) - p.gather(1, y)[:, 0]).clamp(max=0.98)
    found = lab_students.revised_logits(v, case.y, Revision("margin"), 4.0).softmax(dim=1)
    others = found.scatter(1, y, -1.0).amax(dim=1)
    wrong = lost_by > 0
    torch.testing.assert_close((found.gather(1, y)[:, 0] - others)[wrong], lost_by[wrong])
    found = lab_students.revised_logits(v, case.y, Revision("posterior", strength=2.0), 4.0).softmax(dim=1)
    odds = (found.gather(1, y) / found) / (p.gather(1, y) / p)
    torch.testing.assert_close(odds, torch.where(torch.arange(5) == y, 1.0, math.e**2).double())


def test_models_trained_together_are_the_models_trained_alone_in_plain_pytorch() -> None:
    case = problem()
    arms = [Arm("", ce=0.1, revision=Revision(at=None)), Arm("", ce=1.0), Arm("", ce=0.1), Arm("", ce=1.0, kd=0.0)]
    objectives = [lab_students.objective_of(arm, case, None) for arm in arms]
    start = lab_students.initial(case, TINY)
    first = lab_students.train(case, [start] * 4, objectives, TINY, (0, 2))
    found = lab_students.train(case, first, objectives, TINY, (2, 6))
    for arm, state in zip(arms, found, strict=True):
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 5))
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for layer, weight, bias in zip(layers, start[0:6:2], start[1:6:2], strict=True):
                layer.weight.copy_(weight.T)
                layer.bias.copy_(bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6 * 4)
        for order in lab_students.orders(case):
            for rows in order.split(32):
                assert arm.ce is not None
                loss = reference.kd_loss(
                    model(case.x[rows]),
                    case.v[rows],
                    case.y[rows],
                    ce_weight=arm.ce,
                    kd_weight=arm.kd,
                    revise="lr" if arm.revision else None,
                    revise_temperature=None,
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        for layer, weight in zip(layers, state[0:6:2], strict=True):
            torch.testing.assert_close(layer.weight.detach().T, weight, rtol=1e-3, atol=1e-4)


def test_a_rising_weight_is_a_new_constant_in_every_epoch() -> None:
    """Denied rows keep theirs."""
    data = problem(epochs=3)
    keeps = (torch.arange(len(data.y)) % 3 > 0).float()
    rising, start = Arm("rise", rises_to=0.8), lab_students.initial(data, TINY)
    (together,) = lab_students.train(data, [start], [lab_students.objective_of(rising, data, keeps)], TINY, (0, 3))
    state = start
    for epoch in range(3):
        arm = Arm("constant", ce=0.1 * 8 ** ((epoch + 0.5) / 3))
        objective = lab_students.objective_of(arm, data, keeps)
        assert (objective.ce[keeps == 0] == 1.0).all() and (objective.growth == 1.0).all()
        (state,) = lab_students.train(data, [state], [objective], TINY, (epoch, epoch + 1))
    for ours, expected in zip(together, state, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert rising.growth == pytest.approx(8.0) and Arm("kd").growth == 1.0


def test_scores_are_the_definition() -> None:
    """Scores equal dense autograd (influence_oracle) on each fold, and last_layer_scores on the whole slice."""
    case = problem(rows=40)
    arm = Arm("", ce=0.1, revision=Revision(at=1.0), unselected=0.7)
    state = lab_students.train(
        case, [lab_students.initial(case, TINY)], [lab_students.objective_of(arm, case, None)], TINY, (0, 2)
    )[0]
    gain, error, term, divergence, _ = lab_students.scores(replace(arm, folds=4), case, state)
    assert (term == 0).all()
    v = lab_students.revised_logits(case.v, case.y, arm.revision, 4.0)
    loss = KDLoss(ce_weight=0.1, kd_weight=0.9, ce_weight_unselected=0.7, revise=None)
    weights = lab_students.stacked([state[:6]])
    h, val_h = (lab_students.hidden_of(weights, x)[0] for x in (case.x, case.val_x))
    weight = torch.cat([state[4], state[5][None]]).T.double()
    each = []
    for fold in range(4):
        part = slice(fold, None, 4)
        oracle = Case(weight, h.double(), v.double(), case.y, val_h[part].double(), case.val_y[part], None, True, loss)
        each.append(oracle.scores("ekfac", "objective", None)["kd_gain"])
    each_fold = torch.stack(each)
    assert relative_error(gain, each_fold.mean(dim=0)) < 1e-4
    assert relative_error(error, each_fold.std(dim=0) / 2) < 1e-4
    z, val_z = (lab_students.logits_of(weights, x)[0] for x in (case.x, case.val_x))

    def of_the_library(val_logits: Tensor, unselected: float) -> Tensor:
        """kd_gain by the whole held-out slice."""
        return last_layer_scores(
            features=h,
            student_logits=z,
            teacher_logits=v,
            target=case.y,
            val_features=val_h,
            val_logits=val_logits,
            val_target=case.val_y,
            loss=KDLoss(ce_weight=0.1, kd_weight=0.9, ce_weight_unselected=unselected, revise=None),
        )["kd_gain"].double()

    assert relative_error(gain, of_the_library(val_z, 0.7)) < 1e-4
    # Calibrated held-out logits, and the term: the gain with one cross-entropy weight on both sides.
    best = lab_students.best_temperature(2 * val_z, case.val_y)
    assert best == pytest.approx(2 * lab_students.best_temperature(val_z, case.val_y), rel=0.03)
    harmful = replace(arm, folds=4, calibrated=True, selection=Selection("confidence", 2, term=True))
    gain, _, term, *_ = lab_students.scores(harmful, case, state)
    calibrated = val_z / lab_students.best_temperature(val_z, case.val_y)
    for ours, unselected in ((gain, 0.7), (term, 0.1)):
        assert relative_error(ours, of_the_library(calibrated, unselected)) < 1e-4
    plain = reference.kd_loss(z, v, case.y, ce_weight=0.0, kd_weight=1.0, revise=None, reduction="none")
    torch.testing.assert_close(divergence, plain, rtol=1e-4, atol=1e-5)


def test_scores_on_training_folds_leave_the_row_out() -> None:
    """Directions are the gradients of the folds that the row is not in."""
    case = problem(rows=40)
    arm = Arm("", folds=4)
    state = lab_students.train(
        case, [lab_students.initial(case, TINY)], [lab_students.objective_of(arm, case, None)], TINY, (0, 2)
    )[0]
    gain, error, *_ = lab_students.scores(replace(arm, on_training=True), case, state)
    for fold in range(4):
        rest = torch.arange(40) % 4 != fold
        # As a held-out slice, ordered so that its folds are the training folds.
        order = torch.arange(40)[rest].reshape(10, 3).flatten()
        other = replace(case, val_x=case.x[order], val_y=case.y[order])
        expected, expected_error, *_ = lab_students.scores(replace(arm, folds=3), other, state)
        torch.testing.assert_close(gain[~rest], expected[~rest], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(error[~rest], expected_error[~rest], rtol=1e-3, atol=1e-5)


def scored(size: int = 200) -> Scored:
    generator = torch.Generator().manual_seed(0)
    gain = torch.randn(size, generator=generator)
    y = torch.randint(0, 4, (size,), generator=generator)
    v = torch.randn(size, 4, generator=generator)
    error, divergence = torch.rand(2, size, generator=generator) + 0.1
    divergence[7] = 99.0
    term = torch.randn(size, generator=generator)
    order = torch.randperm(size, generator=generator)
    return Scored(gain, error, term, divergence, -v, y, v, order, gain > 1.5)


def test_selections() -> None:
    facts = scored()
    gain, error = facts.gain, facts.error

    def kept(selection: Selection) -> Tensor:
        return lab_students.kept(selection, facts)

    assert torch.equal(kept(Selection("threshold")), (gain < 0).float())
    harmful = (gain > error) & (facts.term > 0)
    assert 0 < harmful.sum() < (gain > error).sum()
    assert torch.equal(kept(Selection("confidence", 1.0, term=True)), (~harmful).float())
    significant = Selection("confidence", 1.0)
    assert torch.equal(kept(significant), (gain <= error).float())
    capped = kept(replace(significant, cap=0.1))
    assert torch.equal(capped, kept(Selection("ratio", 0.9))) and int(capped.sum()) == 180
    by_z = kept(replace(significant, cap=0.1, ranked="z"))
    assert torch.equal(by_z == 0, gain / error >= (gain / error).sort().values[180])
    per_class = kept(replace(significant, cap=0.1, per_class=True))
    for label in range(4):
        members = facts.y == label
        assert int((1 - per_class[members]).sum()) == math.floor(0.1 * int(members.sum()) + 0.5)
    random = kept(Selection("random", like=significant))
    assert random.sum() == kept(significant).sum() and not torch.equal(random, kept(significant))
    assert torch.equal(kept(Selection("oracle")), (gain <= 1.5).float())
    assert (kept(Selection("outlier", 20.0)) == 0).nonzero().tolist() == [[7]]
    assert facts.divergence[kept(Selection("divergence", 0.9)) == 0].min() > facts.divergence.quantile(0.89)
    soft = kept(Selection("soft_z", 2.0))
    assert torch.equal(soft >= 0.5, gain / error <= 2.0) and 0 <= float(soft.min()) < 0.5 and len(soft.unique()) > 100
    losses = torch.nn.functional.cross_entropy(facts.v, facts.y, reduction="none")
    assert (
        losses[kept(Selection("teacher_loss", 0.8)) == 1].max()
        <= losses[kept(Selection("teacher_loss", 0.8)) == 0].min()
    )


def test_soft_weights_are_probabilities_of_the_model() -> None:
    """Samples are drawn from the model: among rows with weight w, a share w has a true gain below 0."""
    generator = torch.Generator().manual_seed(0)
    true = 0.3 + 0.8 * torch.randn(40000, generator=generator)
    error = 0.2 + torch.rand(40000, generator=generator)
    weight = lab_students.shrunk(true + error * torch.randn(40000, generator=generator), error)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        rows = (weight >= low) & (weight < low + 0.2)
        assert float((true[rows] < 0).float().mean()) == pytest.approx(float(weight[rows].mean()), abs=0.03)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_mismatched_answers_are_detected(share: float) -> None:
    """Rows whose teacher logits belong to another sample; without such rows none is reported."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3000, 20, generator=generator)
    v = 3 * z + 2 * torch.randn(3000, 20, generator=generator)
    foreign = torch.rand(3000, generator=generator) < share
    v[foreign] = v[foreign].roll(1, 0)
    found = lab_students.mismatch(z, v, torch.randperm(3000, generator=generator))
    assert float(found.mean()) == pytest.approx(share, abs=0.02)
    assert float(((found > 0.5) == foreign).float().mean()) > 0.97


def test_runs_resume(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    arms = [
        Arm("alone", ce=1.0, kd=0.0),
        Arm("z1", selection=Selection("confidence", 1.0)),
        Arm("again", selection=Selection("confidence", 1.0), rescored=True),
        Arm("late", selection=Selection("oracle"), late=True),
        Arm("tuned+lr1", ce=None, revision=Revision()),
        Arm("oracle", selection=Selection("oracle")),
    ]
    case = problem(3)
    assert lab_features.run_seed(case, "tiny", arms, path, "abc", TINY) == len(arms) + len(lab_students.CE_WEIGHTS)
    rows = stored_rows(path)
    assert lab_features.run_seed(case, "tiny", arms, path, "abc", TINY) == 0
    by_arm = {row["arm"]: row for row in rows}
    assert len(by_arm) == len(rows) and float(by_arm["oracle"]["denied_corrupted"]) == 1.0
    assert by_arm["late"]["kept"] == by_arm["oracle"]["kept"] and by_arm["late"]["nll"] != by_arm["oracle"]["nll"]
    assert float(by_arm["oracle"]["kept"]) == pytest.approx(0.75) and by_arm["z1"]["commit"] == "abc"
    tuned = min(lab_students.CE_WEIGHTS, key=lambda ce: float(by_arm[lab_students.kd_name(ce)]["val_nll"]))
    assert float(by_arm["tuned+lr1"]["ce_weight"]) == tuned
    # Without the last rows, those alone are run, with the same results.
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lab_features.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[:-2])
    assert lab_features.run_seed(case, "tiny", arms, path, "abc", TINY) == 2
    again = {row["arm"]: row for row in stored_rows(path)}
    for name in ("oracle", "tuned+lr1"):
        assert float(again[name]["nll"]) == pytest.approx(float(by_arm[name]["nll"]), rel=1e-3)


def test_statistics() -> None:
    """A paired difference computed by hand; the best KD weight is chosen per seed."""
    rows = []
    for seed, (kd, other, arm) in enumerate([(20.0, 21.0, 20.5), (22.0, 21.5, 23.0), (24.0, 24.0, 26.0)]):
        names = [lab_students.kd_name(ce) for ce in lab_students.CE_WEIGHTS]
        for name, acc, nll in (
            (names[0], kd, 3.0),
            (names[1], other, 2.9 if seed else 3.1),
            (names[2], 1.0, 9.0),
            (names[3], 1.0, 9.0),
            ("arm", arm, 3.0),
        ):
            rows.append(
                {"regime": "r", "arm": name, "seed": str(seed), "acc": str(acc), "val_nll": str(nll), "p_wrong": ""}
            )
    runs = lab_statistics.Runs(rows)
    assert [runs.of("r", "tuned")[seed]["acc"] for seed in range(3)] == [20.0, 21.5, 24.0]
    found = runs.difference("r", "arm", "kd", "acc")
    # Differences .5, 1, 2: mean 7 / 6, standard deviation sqrt(7 / 12), t = 4.30265.
    assert found.mean == pytest.approx(7 / 6) and found.n == 3
    assert found.half_width == pytest.approx(4.30265 * math.sqrt(7 / 36), rel=1e-5)
    assert lab_statistics.signed(found) == "+1.17 ± 1.90 (3)"


def test_the_page_is_of_the_stored_runs() -> None:
    """docs/benchmarks/method.md agrees with the CSV and shows the plots beside it."""
    page = lab_statistics.PAGE.read_text(encoding="utf-8")
    runs = lab_statistics.Runs(stored_rows(lab_features.STORED))
    assert lab_statistics.page_with(page, runs) == page
    assert set(runs.regimes()) == set(lab_features.REGIMES)
    for regime in runs.regimes():
        assert f"](method_features_{regime}.svg)" in page
        assert (lab_statistics.PAGE.parent / f"method_features_{regime}.svg").is_file()
    with pytest.raises(ValueError, match="must have <!-- features:begin -->"):
        lab_statistics.page_with("no marks", runs)
