"""kd_loss equals the float64 reference: value, parts, counts and every element of the gradient."""

from __future__ import annotations

import inspect
import itertools
import math
import random
from typing import Any

import kd_cases
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_matches_reference

import lrds_fast
from lrds_fast import kd_loss, kd_loss_parts, reference

ROWS = 9  # kd_cases' five hard rows and four plain ones; odd, so that two threads get unequal shares


@pytest.mark.parametrize("temperature", kd_cases.TEMPERATURES)
@pytest.mark.parametrize("classes", kd_cases.CLASSES)
@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
def test_matches_reference(dtype: torch.dtype, classes: int, temperature: float) -> None:
    rows = kd_cases.rows(ROWS, classes, dtype)
    assert_matches_reference(kd_loss_parts, *rows, temperature=temperature)


@pytest.mark.parametrize("classes", range(1, 81))
def test_every_tail_length(classes: int) -> None:
    """Rows of up to five 16-lane vectors, with every possible remainder."""
    rows = kd_cases.rows(ROWS, classes, seed=classes)
    assert_matches_reference(kd_loss_parts, *rows, label_smoothing=0.1)
    rows = kd_cases.rows(ROWS, classes, torch.bfloat16, seed=classes)
    assert_matches_reference(kd_loss_parts, *rows, temperature=2.5)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [pair for pair in itertools.product(kd_cases.FLOATING, repeat=2) if pair[0] != pair[1]],
    ids=str,
)
def test_mixed_dtypes(student: torch.dtype, teacher: torch.dtype) -> None:
    for classes in (10, 33, 1000):
        rows = kd_cases.rows(ROWS, classes, student, teacher)
        assert_matches_reference(kd_loss_parts, *rows)
        assert_matches_reference(kd_loss_parts, *rows, temperature=2.5, label_smoothing=0.2)


@pytest.mark.parametrize("classes", [21841, 32768, 65537, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_vocabularies(dtype: torch.dtype, classes: int) -> None:
    """The sizes of ImageNet-21k, of a power of two, of one class more, and of Llama 3. Blocks share these rows."""
    rows = kd_cases.rows(5, classes, dtype)
    assert_matches_reference(kd_loss_parts, *rows)
    assert_matches_reference(kd_loss_parts, *rows, temperature=2.5, label_smoothing=0.1)


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 1000, 4099])
@pytest.mark.parametrize("classes", [2, 10, 16, 100])
def test_many_small_rows(classes: int, count: int) -> None:
    """Rows may be gathered into one vector or one work item: every remainder of that."""
    rows = kd_cases.rows(count, classes, seed=count)
    selected = torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.5
    assert_matches_reference(kd_loss_parts, *rows)
    assert_matches_reference(kd_loss_parts, *rows, selected=selected, temperature=2.5)


def selection(kind: str, rows: kd_cases.Rows, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, Any]]:
    """The teacher's logits and the keywords of kd_loss for one kind of selection."""
    count = rows.target.shape[0]
    if kind == "all":
        return rows.teacher, {}
    if kind == "mask":
        return rows.teacher, {"selected": torch.arange(count) % 3 != 1}
    if kind == "weights":
        weights = torch.linspace(-0.5, 1.5, count).clamp(0.0, 1.0)  # some exactly 0, some exactly 1
        return rows.teacher, {"selected": weights.to(dtype)}
    prefix = {"none of prefix": 0, "prefix": count // 2, "whole prefix": count}[kind]
    return rows.teacher[:prefix], {"teacher_rows": prefix}


SELECTIONS = ("all", "mask", "weights", "none of prefix", "prefix", "whole prefix")
REDUCTIONS = ("mean", "sum", "none", "elementmean")
HYPERPARAMETERS = list(
    itertools.product(
        [torch.float64, torch.float32],
        kd_cases.TEMPERATURES,
        ["lr", None],
        SELECTIONS,
        REDUCTIONS,
        [(0.1, 0.9, None), (0.0, 1.0, None), (1.0, 0.0, 0.5), (0.7, 2.0, 0.0), (0.0, 0.0, 0.0)],
        [0.0, 0.1],
        [-100, 7],  # outside and inside the classes
        [0.8, 0.05, 0.99],
    )
)


def check_hyperparameters(
    dtype: torch.dtype,
    temperature: float,
    revise: str | None,
    kind: str,
    reduction: str,
    weights: tuple[float, float, float | None],
    label_smoothing: float,
    ignore_index: int,
    eta: float,
) -> None:
    rows = kd_cases.rows(15, 33, dtype)
    rows.target[5] = rows.target[12] = ignore_index
    teacher, chosen = selection(kind, rows, dtype)
    generator = torch.Generator().manual_seed(3)
    grad_output = None
    if reduction == "none":
        grad_output = torch.randn(15, generator=generator, dtype=dtype)
    assert_matches_reference(
        kd_loss_parts,
        rows.student,
        teacher,
        rows.target,
        grad_output=grad_output,
        temperature=temperature,
        revise=revise,
        **chosen,
        reduction=reduction,
        ce_weight=weights[0],
        kd_weight=weights[1],
        ce_weight_unselected=weights[2],
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        eta=eta,
    )


@pytest.mark.parametrize("part", range(10))
def test_hyperparameters(part: int) -> None:
    """A fixed tenth of a sample of the full product; all of it is test_hyperparameters_in_full."""
    for case in random.Random(17).sample(HYPERPARAMETERS, 1200)[part::10]:
        check_hyperparameters(*case)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_hyperparameters_in_full(part: int) -> None:
    for case in HYPERPARAMETERS[part::20]:
        check_hyperparameters(*case)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [*kd_cases.CLASSES, 15, 16, 17, 63, 64, 65, 8192, 8193, 32769])
def test_sizes_in_full(classes: int) -> None:
    for student, teacher in itertools.product(kd_cases.FLOATING, repeat=2):
        for temperature, smoothing in itertools.product(kd_cases.TEMPERATURES, (0.0, 0.1)):
            rows = kd_cases.rows(ROWS, classes, student, teacher, seed=classes)
            selected = torch.arange(ROWS) % 4 != 1
            assert_matches_reference(
                kd_loss_parts,
                *rows,
                selected=selected,
                temperature=temperature,
                label_smoothing=smoothing,
            )


@pytest.mark.parametrize("classes", [10, 33, 1001])
@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize("layout", kd_cases.LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, classes: int) -> None:
    """Any row stride, any alignment, and layouts that need a copy; in each argument and in both."""
    student, teacher, target = kd_cases.rows(ROWS, classes, dtype)
    moved_student = kd_cases.strided(student, layout)
    moved_teacher = kd_cases.strided(teacher, layout)
    moved_target = torch.stack([target, target], dim=1)[:, 0]
    assert_matches_reference(kd_loss_parts, moved_student, teacher, target)
    assert_matches_reference(kd_loss_parts, student, moved_teacher, moved_target)
    assert_matches_reference(kd_loss_parts, moved_student, moved_teacher, moved_target)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_dimensions_are_flattened(reduction: str) -> None:
    """(B, T, C) of a sequence model, contiguous and with the leading dimensions swapped in memory."""
    flat = kd_cases.rows(12, 33)
    student, teacher, target = (
        flat.student.view(3, 4, 33),
        flat.teacher.view(3, 4, 33),
        flat.target.view(3, 4),
    )
    target[1, 2] = -100
    mask = torch.arange(12) % 3 > 0
    swapped = student.transpose(0, 1).contiguous().transpose(0, 1)
    for selected in (None, mask, mask.view(3, 4), mask.float().view(3, 4)):
        for given in (student, swapped):
            assert_matches_reference(kd_loss_parts, given, teacher, target, selected=selected, reduction=reduction)
    loss = kd_loss(student, teacher, target, reduction=reduction)
    assert loss.shape == ((3, 4) if reduction == "none" else ())
    flattened = kd_loss(flat.student, flat.teacher, target.reshape(-1), reduction=reduction)
    assert torch.equal(loss.reshape(-1), flattened.reshape(-1))


def test_teacher_prefix_over_sequences() -> None:
    """(B', T, C) and (K, C) with K = B' * T are the same prefix; (N, C) is the whole teacher."""
    student, teacher, target = kd_cases.rows(12, 33)
    student, target = student.view(3, 4, 33), target.view(3, 4)
    target[0, 1] = -100  # keeps its place in the batch and in the prefix
    for given in (teacher[:8].view(2, 4, 33), teacher[:8], teacher[:7], teacher[:0]):  # 7 ends inside a sequence
        rows = given.shape[:-1].numel()
        assert_matches_reference(kd_loss_parts, student, given, target, teacher_rows=rows)
    whole = kd_loss(student, teacher.view(3, 4, 33), target)
    assert torch.equal(kd_loss(student, teacher, target), whole)
    assert torch.equal(kd_loss(student, teacher, target, teacher_rows=12), whole)


def test_single_row_without_leading_dimensions() -> None:
    student, teacher, target = kd_cases.rows(3, 10)
    assert_matches_reference(kd_loss_parts, student[2], teacher[2], target[2])
    loss = kd_loss(student[2], teacher[2], target[2], reduction="none")
    assert loss.shape == ()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 0, 9, -1])
def test_ignored_rows(index_dtype: torch.dtype, ignore_index: int) -> None:
    student, teacher, target = kd_cases.rows(40, 10)
    target[torch.arange(40) % 7 == 3] = ignore_index
    for reduction in REDUCTIONS:
        assert_matches_reference(
            kd_loss_parts,
            student,
            teacher,
            target.to(index_dtype),
            ignore_index=ignore_index,
            reduction=reduction,
        )


def test_selected_kinds_agree() -> None:
    """bool, weights of 0 and 1 in every floating dtype, and a prefix: the same bits."""
    student, teacher, target = kd_cases.rows(16, 33)
    mask = torch.arange(16) < 6
    student.requires_grad_()
    results = []
    for selected in (mask, *(mask.to(dtype) for dtype in kd_cases.FLOATING)):
        loss = kd_loss(student, teacher, target, selected=selected)
        results.append((loss, *torch.autograd.grad(loss, student)))
    prefix = kd_loss(student, teacher[:6], target, teacher_rows=6)
    results.append((prefix, *torch.autograd.grad(prefix, student)))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("selection", ["all", "bool", "weights", "prefix"])
@pytest.mark.parametrize("weights", [(0.1, 0.9), (0.0, 2.0), (0.5, 0.0)], ids=str)
def test_unweighted_terms(reduction: str, selection: str, weights: tuple[float, float]) -> None:
    student, teacher, target = (x.double() if x.is_floating_point() else x for x in kd_cases.rows(12, 33))
    target[5] = -100
    choices: dict[str, dict[str, Any]] = {
        "all": {},
        "bool": {"selected": torch.arange(12) % 3 > 0},
        "weights": {"selected": torch.linspace(0.0, 1.0, 12)},
        "prefix": {"teacher_rows": 7},
    }
    chosen = choices[selection]
    taught = teacher[:7] if selection == "prefix" else teacher
    fixed: dict[str, Any] = {"temperature": 2.5, "label_smoothing": 0.1, "reduction": reduction, **chosen}
    given: dict[str, Any] = dict(zip(("ce_weight", "kd_weight"), weights, strict=True))
    parts = kd_loss_parts(student, taught, target, unweighted=True, **given, **fixed)
    weighted = kd_loss_parts(student, taught, target, **given, **fixed)
    assert torch.equal(parts.loss, weighted.loss)
    assert all(torch.equal(one, other) for one, other in zip(parts[3:], weighted[3:], strict=True))
    expected = F.cross_entropy(student, target, label_smoothing=0.1, reduction=reduction)
    torch.testing.assert_close(parts.ce, expected, rtol=1e-12, atol=1e-12)
    alone: dict[str, Any] = {"ce_weight": 0.0, "ce_weight_unselected": 0.0, "kd_weight": 1.0}
    kd = reference.kd_loss(student, taught, target, **alone, **fixed)
    torch.testing.assert_close(parts.kd, kd, rtol=1e-12, atol=1e-12)
    assert not parts.ce.requires_grad and not parts.kd.requires_grad
    defined = reference.kd_loss_parts(student, taught, target, unweighted=True, **given, **fixed)
    for ours, theirs in zip(parts, defined, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_unweighted_terms_without_labels() -> None:
    student, teacher, _ = kd_cases.rows(12, 33)
    options: dict[str, Any] = {"ce_weight": 0.0, "revise": None}
    parts = kd_loss_parts(student.requires_grad_(), teacher, unweighted=True, kd_weight=0.5, **options)
    assert parts.ce == 0 and not parts.kd.requires_grad
    torch.testing.assert_close(parts.kd, 2 * parts.loss.detach())


def test_strided_selection() -> None:
    student, teacher, target = kd_cases.rows(12, 10)
    mask = torch.stack([torch.arange(12) % 3 > 0, torch.ones(12).bool()], dim=1)[:, 0]
    weights = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))[:, 1]
    assert_matches_reference(kd_loss_parts, student, teacher, target, selected=mask)
    assert_matches_reference(kd_loss_parts, student, teacher, target, selected=weights)
    expanded = torch.tensor(0.3).expand(12)
    assert_matches_reference(kd_loss_parts, student, teacher, target, selected=expanded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_selection_weights_of_other_dtypes(dtype: torch.dtype) -> None:
    student, teacher, target = kd_cases.rows(12, 10)
    weights = torch.linspace(0.0, 1.0, 12).to(dtype)
    assert_matches_reference(kd_loss_parts, student, teacher, target, selected=weights)


@pytest.mark.parametrize("num_valid", [5, 2.5, torch.tensor(7.0), torch.tensor(7), 0, 1e6])
@pytest.mark.parametrize("reduction", ["mean", "elementmean"])
def test_num_valid_replaces_the_count(num_valid: Any, reduction: str) -> None:
    rows = kd_cases.rows(12, 33)
    assert_matches_reference(kd_loss_parts, *rows, num_valid=num_valid, reduction=reduction)
    for dtype in (torch.float64, torch.float16):
        rows = kd_cases.rows(12, 33, dtype)
        assert_matches_reference(kd_loss_parts, *rows, num_valid=num_valid, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "elementmean"])
def test_halves_with_a_global_count_sum_to_the_whole(reduction: str) -> None:
    """What DDP ranks and accumulation steps do: each divides by the valid rows of all."""
    student, teacher, target = kd_cases.rows(21, 33, torch.float64)
    target[4] = target[11] = -100
    selected = torch.arange(21) % 2 == 0
    count = (target != -100).sum()

    def run(part: slice, num_valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = student[part].clone().requires_grad_()
        loss = kd_loss(
            leaf,
            teacher[part],
            target[part],
            selected=selected[part],
            reduction=reduction,
            num_valid=num_valid,
        )
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    whole, gradient = run(slice(0, 21), None)
    first, second = run(slice(0, 8), count), run(slice(8, 21), count)
    torch.testing.assert_close(first[0] + second[0], whole)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), gradient)


@pytest.mark.parametrize("grad_output", [1.0, 0.0, -2.0, 1e-3, 65536.0])
@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_grad_output(reduction: str, dtype: torch.dtype, grad_output: float) -> None:
    """The factor joins in float32 or float64: float16 values are scaled before they are rounded."""
    for classes in (10, 1000):
        rows = kd_cases.rows(64, classes, dtype)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        given = torch.tensor(grad_output, dtype=compute)
        if reduction == "none":
            given = given * torch.linspace(-1.0, 1.0, 64, dtype=compute)
        assert_matches_reference(kd_loss_parts, *rows, grad_output=given, reduction=reduction)


@pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
@pytest.mark.parametrize("kind", ["tensor", "float"])
@pytest.mark.parametrize("coming", [65536.0, 32768.0, 1.0])
def test_grad_scale_never_changes_the_result(coming: float, kind: str, dtype: torch.dtype) -> None:
    """GradScaler's factor announced; then also a factor other than the one announced."""
    rows = kd_cases.rows(64, 1000, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(65536.0) if kind == "tensor" else 65536.0
    given = torch.tensor(coming, dtype=compute)
    assert_matches_reference(kd_loss_parts, *rows, grad_output=given, grad_scale=scale)


def test_grad_scale_keeps_small_float16_gradients() -> None:
    """In a global batch of 2^20 rows most unscaled elements are below the smallest subnormal."""
    rows = kd_cases.rows(64, 1000, torch.float16)
    student = rows.student.requires_grad_()
    (plain,) = torch.autograd.grad(kd_loss(*rows, num_valid=2**20), student)
    assert (plain == 0).float().mean() > 0.9
    given = torch.tensor(65536.0)
    for scale in (None, given, 65536.0):
        arguments: dict[str, Any] = {"num_valid": 2**20, "grad_scale": scale}
        (scaled,) = torch.autograd.grad(kd_loss(*rows, **arguments), student, given)
        assert (scaled != 0).float().mean() > 0.9
        assert_matches_reference(kd_loss_parts, *rows, grad_output=given, **arguments)


def test_float16_overflow_becomes_inf() -> None:
    """What GradScaler looks for: |gradient * factor| > 65504."""
    student, teacher, target = kd_cases.rows(8, 10, torch.float16)
    student.requires_grad_()
    given = torch.tensor(2.0**24)
    for scale in (None, given):
        loss = kd_loss(student, teacher, target, reduction="sum", grad_scale=scale)
        (gradient,) = torch.autograd.grad(loss, student, given)
        assert gradient.isinf().any() and not gradient.isnan().any()


def test_ce_alone_is_torch_cross_entropy() -> None:
    student, teacher, target = kd_cases.rows(64, 1000, torch.float64)
    target[5] = -100
    for smoothing in (0.0, 0.1):
        for reduction in ("mean", "sum", "none"):
            ours = kd_loss(
                student,
                teacher,
                target,
                ce_weight=1.0,
                kd_weight=0.0,
                label_smoothing=smoothing,
                reduction=reduction,
            )
            theirs = F.cross_entropy(student, target, label_smoothing=smoothing, reduction=reduction)
            torch.testing.assert_close(ours, theirs)


def test_kd_alone_is_torch_kl_div() -> None:
    student, teacher, target = kd_cases.rows(64, 1000, torch.float64)
    ours = kd_loss(student, teacher, target, ce_weight=0.0, kd_weight=1.0, revise=None)
    log_q, log_p = F.log_softmax(student / 4.0, 1), F.log_softmax(teacher / 4.0, 1)
    theirs = 16.0 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(ours, theirs)


def test_parts_add_up_to_the_loss_that_kd_loss_returns() -> None:
    rows = kd_cases.rows(50, 100)
    for reduction in REDUCTIONS:
        parts = kd_loss_parts(*rows, reduction=reduction)
        assert torch.equal(parts.loss, kd_loss(*rows, reduction=reduction))
        torch.testing.assert_close(parts.ce + parts.kd, parts.loss, rtol=1e-6, atol=0.0)
    assert type(parts).__name__ == "KDLossParts"
    assert parts._fields == ("loss", "ce", "kd", "n_valid", "n_selected", "n_revised")


@pytest.mark.parametrize("name", ["kd_loss", "kd_loss_parts", "revise_labels"])
def test_signature_is_the_references(name: str) -> None:
    signature = inspect.signature(getattr(lrds_fast, name)).parameters
    # *args and **unknown are there to give a positional temperature and other programs' keywords their hints.
    ours = {k: v for k, v in signature.items() if v.kind not in (v.VAR_POSITIONAL, v.VAR_KEYWORD)}
    # Applied before the operator: lrds_fast.logit_maps defines them, and tests/test_logit_maps.py tests them.
    before = {"classes": "equal", "logit_scale": 1.0, "softcap": None}
    if name != "revise_labels":
        assert {key: ours.pop(key).default for key in before} == before
        assert ours["target"].default is None
    theirs = dict(inspect.signature(getattr(reference, name)).parameters)
    assert list(ours) == list(theirs)
    for key in ours:
        if name != "revise_labels" and key == "target":
            continue
        assert ours[key].default == theirs[key].default, key
        assert ours[key].kind == theirs[key].kind, key


def test_defaults_are_the_documented_ones() -> None:
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(kd_loss).parameters.items()
        if parameter.kind == inspect.Parameter.KEYWORD_ONLY
    }
    assert defaults == {
        "temperature": 4.0,
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "ce_weight_unselected": None,
        "revise": "lr",
        "eta": 0.8,
        "revise_temperature": 1.0,
        "selected": None,
        "teacher_rows": None,
        "divergence": "kl",
        "standardize": False,
        "label_smoothing": 0.0,
        "class_weight": None,
        "ignore_index": -100,
        "reduction": "mean",
        "num_valid": None,
        "weight_sum": None,
        "grad_scale": None,
        "classes": "equal",
        "logit_scale": 1.0,
        "softcap": None,
    }


@pytest.mark.parametrize("temperature", [1e-2, 0.1, 100.0, 1e4])
def test_extreme_temperatures(temperature: float) -> None:
    for dtype in (torch.float64, torch.float32):
        rows = kd_cases.rows(ROWS, 33, dtype)
        assert_matches_reference(kd_loss_parts, *rows, temperature=temperature)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0, 1e3, 1e4])
def test_spread_of_the_logits(spread: float) -> None:
    """From uniform rows to one-hot ones, where all but one exponential underflow."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        student, teacher, target = kd_cases.rows(ROWS, 100, torch.float64)
        limit = 6e4 if dtype == torch.float16 else math.inf
        student, teacher = ((spread * x).clamp(-limit, limit).to(dtype) for x in (student, teacher))
        assert_matches_reference(kd_loss_parts, student, teacher, target)
