"""Gates of lrds_fast.influence and of the demo: thresholds in gates.toml, measured values on stdout (-s)."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from convex_head import DigitsProblem, Head, cross_entropy, digits_problem
from influence_oracle import make_case, relative_error
from scipy import stats
from torch import Tensor

from lrds_fast import influence
from lrds_fast.cli.demo_experiment import demo
from lrds_fast.nn import KDLoss

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GATES: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("gates.toml").read_text())

pytestmark = pytest.mark.gate

CURVED = ("kd_gain", "kd_gain_ns", "self_influence", "param_shift:gt", "param_shift:kd", "param_shift:delta")
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "no-bias": {"bias": False},
    "some-unselected": {"selected": "some", "ce_weight": 0.7, "kd_weight": 1.3},
    "soft-weights-smoothing": {"selected": "weights", "label_smoothing": 0.1, "ce_weight_unselected": 0.6},
    "no-revision-T1-no-bias": {"revise": None, "temperature": 1.0, "bias": False, "selected": "some"},
}


@pytest.mark.parametrize("hessian", influence.HESSIANS)
@pytest.mark.parametrize("curvature", influence.CURVATURES)
@pytest.mark.parametrize("case", CASES)
def test_scores_are_the_dense_definition(case: str, curvature: str, hessian: str) -> None:
    """Gate 1: both dtypes, both dampings, three seeds, against dense gradients and Hessians from autograd."""
    worst: dict[torch.dtype, float] = {torch.float64: 0.0, torch.float32: 0.0}
    for seed in range(3):
        problem = make_case(seed, **CASES[case])
        for damping in (None, 0.02):
            expected = problem.scores(curvature, hessian, damping)
            for dtype in worst:
                scores = influence.last_layer_scores(
                    **problem.arguments(dtype),
                    scores=CURVED,
                    curvature=curvature,
                    hessian=hessian,
                    damping=damping,
                )
                errors = [relative_error(scores[name], expected[name]) for name in CURVED]
                worst[dtype] = max(worst[dtype], *errors)
    print(f"gate 1 {case} {curvature} {hessian}: relative error", *(f"{e:.1e}" for e in worst.values()))
    assert worst[torch.float64] <= GATES["algebra"]["float64"]
    assert worst[torch.float32] <= GATES["algebra"]["float32"]


def _scores(problem: DigitsProblem, weight: Tensor, loss: KDLoss, **options: Any) -> influence.Scores:
    h = problem.head.h
    return influence.last_layer_scores(
        features=h[:, :-1],
        student_logits=h @ weight.T,
        teacher_logits=problem.teacher_logits,
        target=problem.target,
        val_features=problem.val_h[:, :-1],
        val_logits=problem.val_h @ weight.T,
        val_target=problem.val_target,
        loss=loss,
        **options,
    )


def _pearson_and_slope(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    x, y = predicted - predicted.mean(), true - true.mean()
    return float(x @ y / (x.norm() * y.norm())), float(x @ y / (x @ x))


def _retraining(problem: DigitsProblem, head: Head, base: Tensor, rows: Tensor, *, ce: float, kd: float) -> Tensor:
    """n * the change of the held-out cross-entropy when each row in turn gets the weights ce and kd."""
    after = head.retrain_each(base, rows, ce=ce, kd=kd)
    before = cross_entropy(base, problem.val_h, problem.val_target)
    return len(problem.target) * (cross_entropy(after, problem.val_h, problem.val_target) - before)


ADDED = KDLoss(ce_weight=1.0, kd_weight=1.0, ce_weight_unselected=1.0, revise=None)
REMOVED = KDLoss(ce_weight=0.0, kd_weight=0.0, ce_weight_unselected=1.0)


def test_scores_predict_exact_retraining() -> None:
    """Gate 3: giving one row a teacher, or leaving it out, and training the head again to convergence.

    The gate applies to the correlation over all seeds together: a score claims a size, so seeds are one population.
    """
    gate = GATES["retraining"]
    predicted: dict[str, list[Tensor]] = {}
    true: dict[str, list[Tensor]] = {}
    for seed in range(gate["seeds"]):
        problem = digits_problem(seed, gate["rows"])
        head, rows = problem.head, torch.arange(gate["rows"])
        base = head.train()
        for change, loss, kd in (("toggle", ADDED, 1.0), ("leave-one-out", REMOVED, 0.0)):
            truth = _retraining(problem, head, base, rows, ce=kd, kd=kd)
            for curvature in influence.CURVATURES:
                # One Newton step of the retraining beside its derivative, where H is exact.
                steps = {"kd_gain": curvature} | ({"kd_gain_ns": "newton"} if curvature == "exact" else {})
                options: dict[str, Any] = {"curvature": curvature, "hessian": "gt", "damping": head.decay}
                scores = _scores(problem, base, loss, scores=tuple(steps), **options)
                for score, called in steps.items():
                    predicted.setdefault(f"{change} {called}", []).append(scores[score])
                    true.setdefault(f"{change} {called}", []).append(truth)
    measured: dict[str, tuple[float, float]] = {}
    for name in predicted:
        each = [_pearson_and_slope(p, t)[0] for p, t in zip(predicted[name], true[name], strict=True)]
        measured[name] = _pearson_and_slope(torch.cat(predicted[name]), torch.cat(true[name]))
        print(
            f"gate 3 {name}: Pearson {measured[name][0]:.5f} slope {measured[name][1]:.3f}; by seed",
            *(f"{pearson:.5f}" for pearson in each),
        )
    pearson, slope = measured["toggle exact"]
    assert pearson >= gate["kd_toggle_exact_pearson"]
    low, high = gate["kd_toggle_exact_slope"]
    assert low <= slope <= high
    assert measured["toggle ekfac"][0] >= gate["kd_toggle_ekfac_pearson"]
    assert measured["leave-one-out exact"][0] >= gate["leave_one_out_exact_pearson"]
    assert measured["toggle newton"][0] >= gate["kd_toggle_newton_pearson"]
    assert measured["leave-one-out newton"][0] >= gate["leave_one_out_newton_pearson"]
    for change in ("toggle", "leave-one-out"):
        assert measured[f"{change} newton"][0] > measured[f"{change} exact"][0]


def test_scores_are_the_derivative_of_retraining() -> None:
    """What a whole toggle leaves over is second order: with a hundredth of the teacher's weight it is gone."""
    problem = digits_problem(3, GATES["retraining"]["rows"])
    base, rows = problem.head.train(), torch.arange(0, GATES["retraining"]["rows"], 8)
    small = 0.01
    true = _retraining(problem, problem.head, base, rows, ce=1.0, kd=small) / small
    loss = KDLoss(ce_weight=1.0, kd_weight=1.0, ce_weight_unselected=1.0, revise=None)
    scores = _scores(problem, base, loss, curvature="exact", hessian="gt", damping=problem.head.decay)
    pearson, slope = _pearson_and_slope(scores["kd_gain"][rows], true)
    print(f"gate 3 toggle of weight {small}: 1 - Pearson {1 - pearson:.1e} slope {slope:.5f}")
    assert 1 - pearson <= 1e-6
    assert abs(slope - 1) <= 1e-3


def test_objective_hessian_is_the_one_to_use_on_a_distilled_base() -> None:
    """Taking the teacher from one row of an all-KD head: the objective's H has slope 1, the label's alone does not."""
    problem = digits_problem(0, GATES["retraining"]["rows"])
    rows = torch.arange(0, GATES["retraining"]["rows"], 4)
    head = problem.head.with_weights(kd=problem.head.ce)
    base = head.train()
    true = -_retraining(problem, head, base, rows, ce=1.0, kd=0.0)
    measured = {}
    for hessian in influence.HESSIANS:
        scores = _scores(problem, base, ADDED, curvature="exact", hessian=hessian, damping=head.decay)
        measured[hessian] = _pearson_and_slope(scores["kd_gain"][rows], true)
        print(f"gate 3 all-KD base, H of {hessian}: Pearson %.5f slope %.3f" % measured[hessian])
    gate = GATES["retraining"]
    assert measured["objective"][0] >= gate["kd_toggle_exact_pearson"]
    low, high = gate["kd_toggle_exact_slope"]
    assert low <= measured["objective"][1] <= high
    assert not low <= measured["gt"][1] <= high


def _trained_with_teacher(head: Head, mask: Tensor, start: Tensor) -> Tensor:
    return head.with_weights(kd=mask.double()).train(start)


def test_selection_by_kd_gain_finds_the_teachers_mistakes() -> None:
    """Gate 4: D_t = {kd_gain < 0} trains as good a student as knowing which teacher rows are corrupted."""
    gate = GATES["selection"]
    change: dict[str, list[float]] = {}
    kept: dict[str, list[float]] = {}
    for seed in range(gate["seeds"]):
        problem = digits_problem(100 + seed, gate["rows"])
        head = problem.head
        everyone = torch.ones(gate["rows"], dtype=torch.bool)
        distilled = _trained_with_teacher(head, everyone, torch.zeros(10, head.h.shape[1]).double())
        plain = head.train(distilled)
        oracle = everyone.clone()
        oracle[problem.corrupted] = False
        options: dict[str, Any] = {"damping": head.decay, "scores": ("kd_gain", "teacher_correct")}
        scores = _scores(problem, plain, ADDED, hessian="gt", **options)
        policies = {
            "none": ~everyone,
            "oracle": oracle,
            "teacher_correct": scores["teacher_correct"] < 0.5,
            "kd_gain": scores["kd_gain"] < 0,
            "kd_gain exact": _scores(problem, plain, ADDED, hessian="gt", curvature="exact", **options)["kd_gain"] < 0,
            "kd_gain identity": _scores(problem, plain, ADDED, curvature="identity")["kd_gain"] < 0,
            "kd_gain on the distilled base": _scores(problem, distilled, ADDED, **options)["kd_gain"] < 0,
        }
        everywhere = cross_entropy(distilled, problem.test_h, problem.test_target)
        for name, mask in policies.items():
            weight = _trained_with_teacher(head, mask, distilled)
            after = cross_entropy(weight, problem.test_h, problem.test_target)
            change.setdefault(name, []).append(float(after - everywhere))
            kept.setdefault(name, []).append(float(mask.double().mean()))

    def mean_and_error(values: Tensor) -> tuple[float, float]:
        return float(values.mean()), float(values.std() / len(values) ** 0.5)

    table = {name: torch.tensor(values, dtype=torch.float64) for name, values in change.items()}
    for name, values in table.items():
        share = sum(kept[name]) / len(kept[name])
        print(f"gate 4 {name}: keeps {share:.2f}, test CE %+.4f +- %.4f against all-KD" % mean_and_error(values))
    oracle_cut, _ = mean_and_error(-table["oracle"])
    failed = []
    for name in ("kd_gain", "kd_gain on the distilled base"):
        cut, error = mean_and_error(-table[name])
        gap, gap_error = mean_and_error(table[name] - table["oracle"])
        lead, lead_error = mean_and_error(table["teacher_correct"] - table[name])
        print(f"gate 4 {name}: {cut / oracle_cut:.3f} of the oracle's cut")
        print(f"gate 4 {name}: behind the oracle by {gap:.5f}, paired error {gap_error:.5f}")
        print(f"gate 4 {name}: ahead of teacher_correct by {lead:.5f}, paired error {lead_error:.5f}")
        passed = (
            cut >= oracle_cut - gate["standard_errors"] * error
            and cut >= gate["share_of_oracle"] * oracle_cut
            and lead >= gate["standard_errors"] * lead_error
        )
        failed += [] if passed else [name]
    assert not failed


@pytest.mark.slow
def test_the_demo_shows_the_gain_of_revision_and_selection(tmp_path: Path) -> None:
    """KD is worth having, LR and DS are worth more, within the time that is promised."""
    gate = GATES["demo"]
    started = time.process_time()
    result = demo(tmp_path, seeds=gate["seeds"], progress=False)
    seconds = time.process_time() - started
    print(f"gate demo: {seconds:.1f} s of CPU", result.table, sep="\n")
    accuracy: dict[str, list[float]] = {}
    for run in sorted(result.runs, key=lambda run: run.recipe.seed):
        accuracy.setdefault(run.recipe.name, []).append(100 * run.last["test_acc"])
    ends = {}
    for better, worse in gate["better"]:
        paired = [a - b for a, b in zip(accuracy[better], accuracy[worse], strict=True)]
        ends[better, worse] = stats.ttest_1samp(paired, 0).confidence_interval(0.95)
        print(f"gate demo: {better} - {worse}: {ends[better, worse].low:.2f} to {ends[better, worse].high:.2f} points")
    assert not {pair: end for pair, end in ends.items() if end.low <= 0}
    assert seconds <= gate["cpu_seconds"]
