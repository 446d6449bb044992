"""What scores find: corrupted teacher rows and flipped labels on digits, the obvious rules beside ours.

AUC: the chance that a spoilt sample has a higher score than a sound one. `pytest -s` prints every rule's, also where a
rule without influence wins; docs/influence.md has the table.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from convex_head import DigitsProblem, digits_problem
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks import bench_lds
from lrds_fast import influence
from lrds_fast.nn import KDLoss

pytestmark = pytest.mark.gate

SEEDS = 8
TEMPERATURE = 4.0


def auc(score: Tensor, spoilt: Tensor) -> float:
    """The area under the ROC curve of `score` for the rows (N,) bool that should have high scores; ties count half."""
    ranks = torch.from_numpy(rankdata(score.double().numpy()))
    bad = int(spoilt.sum())
    return (float(ranks[spoilt].sum()) - bad * (bad + 1) / 2) / (bad * (len(score) - bad))


def mean_auc(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in found) / len(found) for name in found[0]}


def printed(what: str, values: dict[str, float]) -> None:
    ordered = sorted(values.items(), key=lambda item: -item[1])
    print(f"{what}: " + ", ".join(f"{name} {value:.3f}" for name, value in ordered))


def scores_of_head(
    problem: DigitsProblem, curvature: str, damping: float | None, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """Scores of a head that is trained with cross-entropy alone."""
    h, w = problem.head.h, problem.head.train()
    return dict(
        influence.last_layer_scores(
            features=h[:, :-1],
            student_logits=h @ w.T,
            teacher_logits=problem.teacher_logits,
            target=problem.target,
            val_features=problem.val_h[:, :-1],
            val_logits=problem.val_h @ w.T,
            val_target=problem.val_target,
            loss=KDLoss(temperature=TEMPERATURE, ce_weight=1.0, kd_weight=1.0, ce_weight_unselected=1.0, revise=None),
            hessian="gt",
            curvature=curvature,
            damping=damping,
            scores=names,
        )
    )


def test_auc_is_the_chance_of_the_right_order() -> None:
    score, spoilt = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0]), torch.tensor([False, True, False, True, False])
    pairs = [float(a > b) + 0.5 * float(a == b) for a in score[spoilt] for b in score[~spoilt]]
    assert auc(score, spoilt) == pytest.approx(sum(pairs) / len(pairs))


def test_corrupted_teacher_rows() -> None:
    """A fifth of the teacher's rows have their classes permuted, a tenth of the labels are wrong."""
    found = []
    for seed in range(SEEDS):
        problem = digits_problem(seed, 600, temperature=TEMPERATURE)
        spoilt = torch.zeros(600, dtype=torch.bool)
        spoilt[problem.corrupted] = True
        plain = ("kd", "teacher_correct", "conflict", "ce", "param_shift:kd", "kd_gain")
        ekfac = scores_of_head(problem, "ekfac", None, plain)
        columns = {name: ekfac[name] for name in plain}
        columns["kd_gain, exact"] = scores_of_head(problem, "exact", problem.head.decay, ("kd_gain",))["kd_gain"]
        columns["kd_gain, identity"] = scores_of_head(problem, "identity", None, ("kd_gain",))["kd_gain"]
        teacher = problem.teacher_logits.log_softmax(dim=1)
        columns["teacher's CE"] = -teacher.gather(1, problem.target[:, None])[:, 0]
        found.append({name: auc(column, spoilt) for name, column in columns.items()})
    mean = mean_auc(found)
    printed("corrupted teacher rows, AUC", mean)
    assert mean["kd_gain"] > 0.93
    assert mean["kd_gain, exact"] > 0.93
    assert mean["kd_gain"] > mean["teacher_correct"] + 0.03
    assert mean["kd_gain"] > mean["kd_gain, identity"] + 0.1
    # Who only wants the corrupted rows is served best by the distance between the two networks' outputs.
    assert mean["kd"] > 0.97


def test_flipped_labels() -> None:
    """On the same problem, scores detect the wrong labels of a head that is too small to memorise them."""
    found = []
    for seed in range(SEEDS):
        problem = digits_problem(seed, 600, temperature=TEMPERATURE)
        spoilt = problem.target != problem.clean_target
        names = ("self_influence", "param_shift:gt", "el2n", "ce", "grand", "teacher_correct")
        columns = scores_of_head(problem, "ekfac", None, names)
        columns["self_influence, exact"] = scores_of_head(problem, "exact", problem.head.decay, ("self_influence",))[
            "self_influence"
        ]
        found.append({name: auc(column, spoilt) for name, column in columns.items()})
    mean = mean_auc(found)
    printed("flipped labels, convex head, AUC", mean)
    assert mean["self_influence"] > 0.97
    # Here the obvious rules are as good or better, and cost nothing.
    assert mean["el2n"] > 0.98 and mean["ce"] > 0.98
    assert abs(mean["self_influence"] - mean["self_influence, exact"]) < 0.01


@pytest.mark.slow
def test_memorised_flipped_labels() -> None:
    """An MLP is trained until it fits the wrong labels too. Its losses are small, but rank the wrong labels first."""
    found = []
    for seed in range(3):
        clean = bench_lds.digits(10)
        generator = torch.Generator().manual_seed(seed)
        y = clean.y.clone()
        spoilt = torch.zeros(len(y), dtype=torch.bool)
        spoilt[torch.randperm(len(y), generator=generator)[: len(y) // 10]] = True
        y[spoilt] = (y[spoilt] + torch.randint(1, 10, (int(spoilt.sum()),), generator=generator)) % 10
        problem = dataclasses.replace(clean, y=y, epochs=300, decay=1e-5)
        model = bench_lds.module_of(bench_lds.train(problem, torch.arange(len(y))[None], seed), 0)
        with torch.no_grad():
            fitted = float((model(problem.x).argmax(dim=1) == y).float().mean())
        assert fitted > 0.99, f"the network must know the labels by heart; it fits {fitted:.1%}"
        data = TensorDataset(problem.x, y)
        columns: dict[str, Tensor] = {}
        for layers in ("all", "last"):
            names = ("self_influence", "el2n", "ce", "grand")
            scores = influence.score(model, nn.Sequential(model), data, layers=layers, scores=names, progress=False)
            columns |= {f"{name}, {layers}": scores[name] for name in ("self_influence", "grand")}
            columns |= {name: scores[name] for name in ("el2n", "ce")}
        found.append({name: auc(column, spoilt) for name, column in columns.items()})
    mean = mean_auc(found)
    printed("flipped labels, MLP that knows them by heart, AUC", mean)
    assert mean["self_influence, all"] > 0.94
    assert mean["self_influence, all"] > mean["el2n"] - 0.005
