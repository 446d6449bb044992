"""Last-layer scores: their properties beside the gates of test_gates.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from influence_oracle import make_case, relative_error
from torch import Tensor

from lrds_fast import influence, reference
from lrds_fast.influence import curvature as curvature_module
from lrds_fast.influence.curvature import Identity, Iterative, LayerRows, fit_curvature
from lrds_fast.influence.last_layer import SCORERS
from lrds_fast.influence.objective import HessianTerm
from lrds_fast.influence.options import CurvatureOptions
from lrds_fast.nn import KDLoss

NAMES = (*influence.SCORES, "param_shift:gt", "param_shift:kd", "param_shift:delta", "random:7")
CURVED = (
    "kd_gain",
    "teacher_harm",
    "kd_gain_ns",
    "self_influence",
    "param_shift:gt",
    "param_shift:kd",
    "param_shift:delta",
)


def score(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> influence.Scores:
    arguments = make_case(seed).arguments(dtype)
    return influence.last_layer_scores(**{**arguments, "scores": NAMES, **options})


def test_every_score_has_the_shape_dtype_and_facts_it_promises() -> None:
    scores = score(dtype=torch.float32)
    assert list(scores) == list(NAMES)
    assert len(scores) == len(NAMES)
    for name in NAMES:
        assert scores[name].shape == (60,)
        assert scores[name].dtype == torch.float32
        assert scores[name].isfinite().all()
    facts = json.loads(json.dumps(scores.meta))
    assert facts["num_samples"] == 60
    assert facts["num_classes"] == 5
    assert facts["num_features"] == 7
    assert facts["damping"] > 0
    assert facts["loss"]["resolved_ce_weight_unselected"] == 1.0


def test_one_scorer_per_score() -> None:
    assert set(SCORERS) | {"random", "mismatch"} == set(influence.SCORES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_features_are_scored_in_float32(dtype: torch.dtype) -> None:
    arguments = make_case(0).arguments(torch.float32)
    arguments["features"] = arguments["features"].to(dtype)
    narrow = influence.last_layer_scores(**arguments)
    arguments["features"] = arguments["features"].float()
    assert narrow["kd_gain"].dtype == torch.float32
    assert torch.equal(narrow["kd_gain"], influence.last_layer_scores(**arguments)["kd_gain"])


def test_scores_under_autocast_are_the_same() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        ours = score(dtype=torch.float32)
    for name, expected in score(dtype=torch.float32).items():
        assert torch.equal(ours[name], expected), name


def test_baselines_match_their_definitions() -> None:
    case = make_case(1, bias=True)
    arguments = case.arguments(torch.float64)
    scores = influence.last_layer_scores(**arguments, scores=NAMES)
    z, v, y = arguments["student_logits"], arguments["teacher_logits"], arguments["target"]
    error = z.softmax(-1) - F.one_hot(y, 5)
    expected = {
        "all": torch.zeros(60),
        "none": torch.ones(60),
        "teacher_correct": (v.argmax(-1) != y).double(),
        "ce": F.cross_entropy(z, y, reduction="none"),
        "kd": reference.kd_loss(z, v, y, ce_weight=0.0, kd_weight=1.0, reduction="none"),
        "el2n": error.norm(dim=1),
        "grand": case.gradients("gt").norm(dim=1),
        "conflict": -F.cosine_similarity(case.gradients("gt"), case.gradients("kd")),
        "param_shift": scores["param_shift:gt"],
    }
    for name, value in expected.items():
        torch.testing.assert_close(scores[name], value.double(), rtol=1e-10, atol=1e-12, msg=name)


def test_random_takes_its_seed_from_the_name() -> None:
    scores = score(scores=("random", "random:0", "random:7"))
    again = score(1, scores=("random",))
    assert torch.equal(scores["random"], scores["random:0"])
    assert torch.equal(scores["random"], again["random"])
    assert not torch.equal(scores["random"], scores["random:7"])
    assert scores["random"].min() >= 0
    assert scores["random"].max() < 1


def test_conflict_is_zero_for_a_zero_gradient() -> None:
    arguments = make_case(0).arguments(torch.float64)
    arguments["teacher_logits"] = arguments["student_logits"]
    scores = influence.last_layer_scores(**{**arguments, "loss": KDLoss(revise=None)}, scores=("conflict",))
    assert torch.equal(scores["conflict"], torch.zeros(60, dtype=torch.float64))


def test_teacher_pred_of_a_tie_is_the_label_if_it_takes_part() -> None:
    arguments = make_case(0).arguments(torch.float64)
    arguments["teacher_logits"][0] = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])
    arguments["teacher_logits"][1] = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])
    arguments["target"] = arguments["target"].clone()
    arguments["target"][0], arguments["target"][1] = 4, 3
    scores = influence.last_layer_scores(**arguments, scores=("teacher_correct",))
    assert scores.teacher_pred[:2].tolist() == [4, 1]
    assert scores["teacher_correct"][:2].tolist() == [0.0, 1.0]
    assert torch.equal(scores["teacher_correct"] == 0, scores.teacher_pred == scores.target)


@pytest.mark.parametrize("name", ["kd_gain", "teacher_correct", "kd", "conflict", "param_shift:kd"])
def test_lower_means_keep_the_teacher(name: str) -> None:
    """A teacher that agrees with the label scores below one that is confident of a wrong class."""
    case = make_case(2, rows=200, revise=None, ce_weight=1.0, kd_weight=1.0, ce_weight_unselected=1.0)
    arguments = case.arguments(torch.float64)
    z = (3 * F.one_hot(case.target, 5) + arguments["student_logits"] / 2).double()
    wrong = torch.arange(200) % 2 == 0
    teacher_class = torch.where(wrong, (case.target + 1) % 5, case.target)
    arguments.update(student_logits=z, teacher_logits=6.0 * F.one_hot(teacher_class, 5).double())
    # Held-out rows are training rows with their labels: the training labels are the validation labels.
    arguments.update(val_features=case.features, val_logits=z, val_target=case.target)
    values = influence.last_layer_scores(**arguments, scores=(name,))[name]
    assert values[~wrong].mean() < values[wrong].mean()


@pytest.mark.parametrize("name", ["self_influence", "ce", "el2n", "grand"])
def test_lower_means_an_ordinary_sample(name: str) -> None:
    """Scores of the label alone rank mislabelled samples last: those are the ones to deselect."""
    case = make_case(2, rows=200)
    arguments = case.arguments(torch.float64)
    noisy = torch.arange(200) % 10 == 0
    clean = torch.where(noisy, (case.target + 1) % 5, case.target)
    arguments["student_logits"] = 4.0 * F.one_hot(clean, 5).double()
    values = influence.last_layer_scores(**arguments, scores=(name,))[name]
    assert values[~noisy].max() < values[noisy].min() or values[~noisy].mean() < values[noisy].mean() / 2


@pytest.mark.parametrize("curvature", influence.CURVATURES)
def test_leave_one_out_is_kd_gain_of_a_loss_that_drops_selected_rows(curvature: str) -> None:
    case = make_case(3)
    loss = KDLoss(ce_weight=0.0, kd_weight=0.0, ce_weight_unselected=1.0)
    arguments = {**case.arguments(torch.float64), "loss": loss}
    scores = influence.last_layer_scores(**arguments, curvature=curvature, hessian="gt", damping=0.1)
    inverse = torch.linalg.inv(case.curvature(curvature, "gt", 0.1))
    expected = case.gradients("gt") @ inverse @ case.validation_gradient()
    assert relative_error(scores["kd_gain"], expected) <= 1e-10


def test_chunks_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    for curvature in influence.CURVATURES:
        whole = score(curvature=curvature)
        with monkeypatch.context() as patch:
            patch.setattr(curvature_module, "CHUNK_BYTES", 4000)
            pieces = score(curvature=curvature)
        for name in NAMES:
            torch.testing.assert_close(pieces[name], whole[name], rtol=1e-9, atol=1e-11)


def test_scores_are_repeatable() -> None:
    first, second = score(dtype=torch.float32), score(dtype=torch.float32)
    for name in NAMES:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
def test_scores_do_not_depend_on_the_sample_order(curvature: str) -> None:
    """Permuting the rows permutes the scores."""
    case = make_case(4, selected="weights")
    arguments = case.arguments(torch.float64)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    permuted = dict(arguments)
    for name in ("features", "student_logits", "teacher_logits", "target", "selected"):
        permuted[name] = arguments[name][order]
    for name in CURVED:
        here = influence.last_layer_scores(**arguments, scores=(name,), curvature=curvature)[name]
        there = influence.last_layer_scores(**permuted, scores=(name,), curvature=curvature)[name]
        torch.testing.assert_close(there, here[order], rtol=1e-8, atol=1e-10)


def test_per_sample_gradients_are_never_materialised() -> None:
    """Peak of a layer whose per-sample gradients would take 2.6 GB: chunks and factors only."""
    rows, classes, width = 4000, 100, 800
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, width, generator=generator)
    z, v = (torch.randn(rows, classes, generator=generator) for _ in range(2))
    y = torch.randint(0, classes, (rows,), generator=generator)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        influence.last_layer_scores(
            features=h,
            student_logits=z,
            teacher_logits=v,
            target=y,
            val_features=h[:100],
            val_logits=z[:100],
            val_target=y[:100],
            scores=CURVED,
        )
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    factors = 8 * (classes**2 + (width + 1) ** 2 + classes * (width + 1))
    assert 0 < peak <= 2 * curvature_module.CHUNK_BYTES + 8 * factors


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
def test_damping_zero_is_the_pseudo_inverse(curvature: str) -> None:
    """Softmax has a null direction always; features with a repeated column have another."""
    case = make_case(5, rows=200)
    case.features[:, 1] = case.features[:, 0]
    arguments = case.arguments(torch.float64)
    scores = influence.last_layer_scores(**arguments, scores=CURVED, curvature=curvature, damping=0.0)
    dense = case.curvature(curvature, "objective", 0.0)
    inverse = torch.linalg.pinv(dense, hermitian=True, rtol=1e-11)
    gain = -(case.gradients("delta") @ inverse @ case.validation_gradient())
    own = ((case.gradients("gt") @ inverse) * case.gradients("gt")).sum(1)
    assert relative_error(scores["kd_gain"], gain) <= 1e-7
    assert relative_error(scores["self_influence"], own) <= 1e-7


def test_tiny_damping_does_not_overflow_float32() -> None:
    """1 / damping^2 is beyond float32; the shift it belongs to is not."""
    narrow = score(dtype=torch.float32, damping=1e-22, scores=("param_shift", "self_influence"))
    wide = score(dtype=torch.float64, damping=1e-22, scores=("param_shift", "self_influence"))
    for name in narrow:
        assert narrow[name].isfinite().all()
        assert wide[name].isfinite().all()


@pytest.mark.parametrize("damping", [None, 0.05])
def test_exact_beyond_the_dense_limit_solves_by_conjugate_gradients(
    damping: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = score(curvature="exact", damping=damping, scores=("kd_gain",))
    monkeypatch.setattr(curvature_module, "DENSE_LIMIT", 10)
    solved = score(curvature="exact", damping=damping, scores=("kd_gain",))
    assert solved.meta["damping"] == pytest.approx(dense.meta["damping"], rel=1e-12)
    assert relative_error(solved["kd_gain"], dense["kd_gain"]) <= 1e-9
    with pytest.raises(ValueError, match="exact.*at most 10 parameters; this one has 40.*ekfac"):
        score(curvature="exact", damping=damping, scores=("self_influence",))


def test_conjugate_gradients_raise_when_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature_module, "CG_ITERATIONS", 2)
    case = make_case(0)
    arguments = case.arguments(torch.float64)
    rows = LayerRows(arguments["features"], arguments["student_logits"], True)
    terms = [HessianTerm(torch.ones(60, dtype=torch.float64), 1.0)]
    plain = Iterative(rows, terms, 1e-9, Identity(None))
    with pytest.raises(RuntimeError, match="relative residual.*raise damping"):
        plain.solve(torch.randn(5, 8, dtype=torch.float64))


def test_solve_inverts_the_product() -> None:
    arguments = make_case(0).arguments(torch.float64)
    rows = LayerRows(arguments["features"], arguments["student_logits"], True)
    terms = [HessianTerm(torch.rand(60, dtype=torch.float64), 4.0)]
    fitted = fit_curvature(CurvatureOptions("exact", damping=0.01), rows, terms, torch.float64)
    product = Iterative(rows, terms, 0.01, Identity(None)).product
    matrix = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(product(fitted.solve(matrix)), matrix, rtol=1e-10, atol=1e-12)


def test_masked_classes_are_legal() -> None:
    """-inf logits: the class has no mass, and the scores equal those without it."""
    arguments = make_case(6).arguments(torch.float64)
    inf = torch.full((60, 1), -torch.inf, dtype=torch.float64)
    wider = dict(arguments)
    wider["student_logits"] = torch.cat([arguments["student_logits"], inf], 1)
    wider["teacher_logits"] = torch.cat([arguments["teacher_logits"], inf], 1)
    wider["val_logits"] = torch.cat([arguments["val_logits"], inf[:21]], 1)
    for curvature in ("identity", "exact", "ekfac"):
        options: dict[str, Any] = {"scores": ("kd_gain", "el2n", "ce"), "curvature": curvature, "damping": 0.1}
        without = influence.last_layer_scores(**arguments, **options)
        masked = influence.last_layer_scores(**wider, **options)
        for name in without:
            torch.testing.assert_close(masked[name], without[name], rtol=1e-9, atol=1e-12)


def test_inputs_that_require_grad_are_left_alone() -> None:
    arguments = make_case(0).arguments(torch.float64)
    arguments["features"].requires_grad_()
    arguments["student_logits"].requires_grad_()
    scores = influence.last_layer_scores(**arguments, scores=NAMES)
    assert not any(scores[name].requires_grad for name in NAMES)


def test_objective_hessian_without_weight_needs_another() -> None:
    loss = KDLoss(ce_weight=0.0, kd_weight=0.0, ce_weight_unselected=1.0)
    with pytest.raises(ValueError, match="hessian='objective' is zero.*hessian='gt'"):
        score(loss=loss)
    with pytest.warns(UserWarning, match="hessian='objective' is zero"):
        flat = score(loss=loss, damping=0.5, scores=("kd_gain",))
    identity = score(loss=loss, curvature="identity", scores=("kd_gain",))
    torch.testing.assert_close(flat["kd_gain"], identity["kd_gain"] / 0.5)
    with_gt = score(loss=loss, selected=torch.zeros(60), damping=0.5, scores=("kd_gain",))
    assert not torch.allclose(with_gt["kd_gain"], flat["kd_gain"])


def saturated(scale: float, dtype: torch.dtype) -> dict[str, Any]:
    """A student that has memorised its labels: its logits are a multiple of the one-hot labels."""
    arguments = make_case(0).arguments(dtype)
    arguments["student_logits"] = F.one_hot(arguments["target"], 5).to(dtype) * scale
    return arguments


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(90.0, torch.float32), (200.0, torch.float32), (1e3, torch.float32), (200.0, torch.float64), (1e4, torch.float64)],
)
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact", "conjugate gradients"])
def test_a_vanished_curvature_is_refused(
    curvature: str, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if curvature == "conjugate gradients":
        monkeypatch.setattr(curvature_module, "DENSE_LIMIT", 10)
        curvature = "exact"
    arguments = saturated(scale, dtype) | {"loss": KDLoss(), "selected": None, "curvature": curvature}
    changes: list[dict[str, Any]] = [{}, {"damping": 0.0}, {"damping_scale": 1e6}]
    for change in changes:
        with pytest.raises(ValueError, match=f"curvature '{curvature}' of the last layer is zero up to.*damping="):
            influence.last_layer_scores(**(arguments | change))
    # The remedy in the message: damping as an absolute multiple of I.
    damped = influence.last_layer_scores(**arguments, damping=0.5)["kd_gain"]
    identity = influence.last_layer_scores(**arguments | {"curvature": "identity"})["kd_gain"]
    torch.testing.assert_close(damped, identity / 0.5, rtol=1e-4, atol=1e-6)


def test_a_confident_student_is_not_a_saturated_one() -> None:
    """The check depends on the predictions only, not on the scale of the features or the loss weights."""
    found = []
    for features, weight in ((1.0, 1.0), (1e-9, 1e-9), (1e9, 1e9)):
        arguments = saturated(20.0, torch.float32) | {"selected": None, "bias": False}
        for name in ("features", "val_features"):
            arguments[name] = arguments[name][:, : arguments["features"].shape[1]] * features
        arguments["loss"] = KDLoss(ce_weight=0.1 * weight, kd_weight=0.9 * weight, ce_weight_unselected=weight)
        found.append(influence.last_layer_scores(**arguments)["kd_gain"])
    for scaled in found[1:]:
        torch.testing.assert_close(scaled, found[0], rtol=1e-3, atol=1e-3)


def test_inputs_of_zero_have_no_curvature() -> None:
    arguments = make_case(0).arguments(torch.float64) | {"bias": False}
    arguments["features"] = torch.zeros_like(arguments["features"])
    for curvature in ("ekfac", "exact"):
        with pytest.raises(ValueError, match=f"curvature '{curvature}' of the last layer is zero: its inputs or"):
            influence.last_layer_scores(**arguments, curvature=curvature)


def test_a_score_that_is_not_finite_is_an_error() -> None:
    arguments = make_case(0).arguments(torch.float32)
    excluded = (int(arguments["target"][7]) + 1) % 5
    arguments["student_logits"][7, excluded] = -torch.inf
    with pytest.raises(ValueError, match="score 'kd' is inf at sample 7: drop the sample"):
        influence.last_layer_scores(**arguments, scores=("ce", "kd"))


@pytest.mark.gpu
@pytest.mark.parametrize("curvature", influence.CURVATURES)
def test_cuda_scores_are_the_cpu_scores(curvature: str) -> None:
    arguments = make_case(7, selected="weights").arguments(torch.float32)
    on_gpu: dict[str, Any] = {
        name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    here = influence.last_layer_scores(**arguments, scores=NAMES, curvature=curvature)
    there = influence.last_layer_scores(**on_gpu, scores=NAMES, curvature=curvature)
    assert there.meta["damping"] == pytest.approx(here.meta["damping"])
    for name in NAMES:
        assert there[name].is_cuda
        torch.testing.assert_close(there[name].cpu(), here[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="teacher_logits must be on features's device cuda:0; got cpu"):
        influence.last_layer_scores(**{**on_gpu, "teacher_logits": arguments["teacher_logits"]})


def test_a_loss_with_a_negative_weight_has_no_objective_to_invert() -> None:
    loss = KDLoss()
    loss.kd_weight = -0.5
    with pytest.raises(ValueError, match="weights are >= 0, or H is indefinite; got .*kd_weight=-0.5"):
        score(loss=loss)


def test_the_documented_example_runs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "influence.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    names = {"h": "features", "z": "student_logits", "v": "teacher_logits", "y": "target"}
    names |= {"hv": "val_features", "zv": "val_logits", "yv": "val_target"}
    scope: dict[str, Any] = {short: GOOD[name] for short, name in names.items()}
    exec(code.rsplit("chosen.save", 1)[0], scope)
    gain, error = scope["scores"]["teacher_harm"], scope["scores"].standard_error["teacher_harm"]
    worst = torch.zeros(len(gain), dtype=torch.bool)
    worst[gain.argsort()[len(gain) - int(0.1 * len(gain) + 0.5) :]] = True
    assert torch.equal(scope["chosen"].mask, ~(worst & (gain > 4 * error)))


def nan_at(tensor: Tensor, row: int, value: float = float("nan")) -> Tensor:
    tensor = tensor.clone()
    tensor[row, 2] = value
    return tensor


GOOD = make_case(0).arguments(torch.float64)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nan feature": (
        {"features": nan_at(GOOD["features"], 17)},
        ValueError,
        "features must be finite; sample 17",
    ),
    "inf validation feature": (
        {"val_features": nan_at(GOOD["val_features"], 3, torch.inf)},
        ValueError,
        "val_features must be finite; sample 3",
    ),
    "nan student": (
        {"student_logits": nan_at(GOOD["student_logits"], 5)},
        ValueError,
        "student_logits: sample 5",
    ),
    "inf teacher": (
        {"teacher_logits": nan_at(GOOD["teacher_logits"], 9, torch.inf)},
        ValueError,
        "teacher_logits: sample 9",
    ),
    "row of -inf": (
        {"teacher_logits": torch.full((60, 5), -torch.inf)},
        ValueError,
        "teacher_logits: sample 0 .*nothing but -inf",
    ),
    "features of rank 3": ({"features": GOOD["features"][None]}, ValueError, r"features must have shape \(N, d\)"),
    "integer features": ({"features": GOOD["features"].long()}, TypeError, "features must be a floating tensor"),
    "array features": (
        {"features": GOOD["features"].numpy()},
        TypeError,
        "features must be a torch.Tensor; got ndarray",
    ),
    "no samples": ({"features": GOOD["features"][:0]}, ValueError, "at least one sample"),
    "short logits": (
        {"student_logits": GOOD["student_logits"][:59]},
        ValueError,
        r"student_logits must have shape \(60, 5\).*\(59, 5\)",
    ),
    "narrow teacher": (
        {"teacher_logits": GOOD["teacher_logits"][:, :4]},
        ValueError,
        r"teacher_logits must have the shape of student_logits, \(60, 5\); got \(60, 4\)",
    ),
    "short target": ({"target": GOOD["target"][:9]}, ValueError, r"target must have shape \(60,\)"),
    "soft target": ({"target": GOOD["student_logits"]}, TypeError, "target must be int32 or int64"),
    "target out of range": ({"target": GOOD["target"] + 3}, ValueError, r"target must lie in \[0, 5\); got"),
    "ignored target": ({"target": GOOD["target"] * 0 - 100}, ValueError, "got -100 at sample 0"),
    "no validation": (
        {"val_features": None, "val_target": None},
        ValueError,
        "teacher_harm needs.*missing: val_features, val_target",
    ),
    "narrow validation": (
        {"val_features": GOOD["val_features"][:, :3]},
        ValueError,
        "val_features must have 7 columns, as features has",
    ),
    "validation of other classes": (
        {"val_logits": torch.cat([GOOD["val_logits"]] * 2, 1)},
        ValueError,
        "val_logits must have 5 columns, as student_logits has",
    ),
    "validation target": ({"val_target": GOOD["val_target"] + 9}, ValueError, r"val_target must lie in \[0, 5\)"),
    "unknown score": (
        {"scores": ("kd_gian",)},
        ValueError,
        "there is no score 'kd_gian'; choose from kd_gain, teacher_harm, kd_gain_ns, self_influence, .*grand",
    ),
    "unknown gradient": ({"scores": ("param_shift:ce",)}, ValueError, r"param_shift:gt\|kd\|delta"),
    "argument of a score without": ({"scores": ("ce:3",)}, ValueError, "only param_shift"),
    "seed that is no number": ({"scores": ("random:x",)}, ValueError, "random:<seed>"),
    "score that is no name": ({"scores": (3,)}, TypeError, "scores must be names; got 3"),
    "no score": ({"scores": ()}, ValueError, "scores must name at least one of kd_gain"),
    "unknown curvature": (
        {"curvature": "fisher"},
        ValueError,
        "curvature must be one of identity, kfac, ekfac, exact; got 'fisher'",
    ),
    "unknown hessian": ({"hessian": "ce"}, ValueError, "hessian must be one of objective, gt; got 'ce'"),
    "negative damping": ({"damping": -1.0}, ValueError, "damping must be finite and >= 0; got -1.0"),
    "damping in words": ({"damping": "auto"}, TypeError, "damping must be a number; got 'auto'"),
    "nan damping": ({"damping": float("nan")}, ValueError, "damping must be finite"),
    "negative scale": ({"damping_scale": -0.1}, ValueError, "damping_scale must be finite and >= 0"),
    "selected of another length": ({"selected": torch.ones(9)}, ValueError, r"selected must have shape \(60,\)"),
    "selected of indices": ({"selected": torch.arange(60)}, TypeError, "selected must be bool, or floats"),
    "selected above 1": (
        {"selected": torch.arange(60) / 50.0},
        ValueError,
        r"selected must lie in \[0, 1\]; got 1.0\d* at sample 51",
    ),
    "another loss": (
        {"loss": torch.nn.CrossEntropyLoss()},
        TypeError,
        "loss must be a KDLoss or None; got CrossEntropy",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what: str) -> None:
    change, error, message = BAD[what]
    with pytest.raises(error, match=message) as raised:
        influence.last_layer_scores(**{**GOOD, **change})
    assert "\n" not in str(raised.value)


def test_only_kd_gain_needs_validation_data() -> None:
    change = dict.fromkeys(("val_features", "val_logits", "val_target"))
    scores = influence.last_layer_scores(**{**GOOD, **change, "scores": ("self_influence", "ce")})
    assert list(scores) == ["self_influence", "ce"]


def test_a_score_that_was_not_computed_is_named() -> None:
    scores = score(scores="ce")
    assert "ce" in scores
    assert "kd" not in scores
    with pytest.raises(KeyError, match="'kd' was not computed; computed scores: ce"):
        scores["kd"]


def test_scores_check_the_shapes_of_tensors() -> None:
    y = torch.zeros(4, dtype=torch.int64)
    made = influence.Scores({"mine": torch.rand(4)}, target=y, teacher_pred=y, meta={})
    assert repr(made) == "Scores(mine; 4 samples)"
    with pytest.raises(ValueError, match=r"score 'mine' must have shape \(4,\)"):
        influence.Scores({"mine": torch.rand(3)}, target=y, teacher_pred=y, meta={})
    with pytest.raises(ValueError, match="teacher_pred must have target's shape"):
        influence.Scores({"mine": torch.rand(4)}, target=y, teacher_pred=y[:2], meta={})
