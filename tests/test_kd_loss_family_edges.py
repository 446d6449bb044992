"""Edges that each divergence meets: nothing to read, excluded classes, saturation, memory layouts, bits, graphs."""

from __future__ import annotations

import math
from typing import Any

import kd_cases
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

import lrds_fast
from lrds_fast import TopKTeacher, kd_loss, kd_loss_parts, reference
from lrds_fast.divergences import Divergence

FAMILY = pytest.mark.parametrize("divergence", kd_cases.FAMILY, ids=repr)
FLOATING = pytest.mark.parametrize("dtype", kd_cases.FLOATING, ids=str)
# Those whose every term is a product with a probability of the teacher's: what it excludes does not count.
MODE_COVERING = ("kl", "dkd", "rld", "nkd")


def gradient(loss: Tensor, student: Tensor, grad_output: Tensor | None = None) -> Tensor:
    return torch.autograd.grad(loss, student, grad_output)[0]


@FLOATING
@FAMILY
def test_values_without_effect_are_not_read(divergence: Divergence, dtype: torch.dtype) -> None:
    """Ignored rows of NaN, NaN teachers of unselected rows: neither the loss nor the gradient depends on them."""
    for classes in (2, 17, 100):
        student, teacher, target = kd_cases.family_rows(12, classes, dtype)
        target[5] = -100
        selected = torch.ones(12, dtype=torch.bool)
        selected[7] = False
        options: dict[str, Any] = {"divergence": divergence, "selected": selected, "temperature": (2.0, 3.0)}
        results = []
        for poison in (0.0, math.nan, math.inf):
            student[5], teacher[5], teacher[7] = poison, poison, poison
            z = student.clone().requires_grad_()
            loss = kd_loss(z, teacher, target, **options)
            g = gradient(loss, z)
            assert loss.isfinite() and (g[5] == 0).all()
            results.append((loss.detach(), g))
        for result in results[1:]:
            assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


@FAMILY
def test_nothing_to_average(divergence: Divergence) -> None:
    """All rows ignored, no rows at all, a teacher of no rows: 0, with a gradient of 0."""
    student, teacher, target = kd_cases.family_rows(6, 10)
    for reduction in ("mean", "sum", "elementmean", "none"):
        z = student.clone().requires_grad_()
        loss = kd_loss(z, teacher, torch.full_like(target, -100), divergence=divergence, reduction=reduction)
        assert (loss == 0).all() and (gradient(loss.sum(), z) == 0).all()
        empty = kd_loss(z[:0], teacher[:0], target[:0], divergence=divergence, reduction=reduction)
        assert (empty == 0).all() and (gradient(empty.sum(), z) == 0).all()
        without = kd_loss(z, teacher[:0], target, teacher_rows=0, divergence=divergence, reduction=reduction)
        plain = kd_loss(z, teacher[:0], target, teacher_rows=0, reduction=reduction)
        torch.testing.assert_close(without, plain)


@FAMILY
def test_one_class_has_nothing_to_distil(divergence: Divergence) -> None:
    for standardize in (False, True):
        z = torch.tensor([[3.0], [-300.0]], requires_grad=True)
        parts = kd_loss_parts(
            z, torch.tensor([[1.0], [2.0]]), torch.tensor([0, 0]), divergence=divergence, standardize=standardize
        )
        assert parts.loss == 0 and parts.kd == 0 and (gradient(parts.loss, z) == 0).all()


@FLOATING
@FAMILY
def test_excluded_classes(divergence: Divergence, dtype: torch.dtype) -> None:
    """-inf in the same classes of both, as in a masked vocabulary: the result equals that without these classes."""
    student, teacher, target = kd_cases.family_rows(12, 40, dtype)
    gone = torch.zeros(40, dtype=torch.bool)
    gone[[0, 1, 15, 16, 38, 39]] = True  # a whole first vector but for its end, and the row's end
    gone[2:15] = True
    kept = (~gone).nonzero()[:, 0]
    target = kept[target % len(kept)]
    small_target = torch.searchsorted(kept, target)
    student[:, gone] = -math.inf
    teacher[:, gone] = -math.inf
    for revise in kd_cases.REVISE:
        options: dict[str, Any] = {"divergence": divergence, "revise": revise, "reduction": "sum", "temperature": 2.0}
        whole, part = student.clone().requires_grad_(), student[:, kept].clone().requires_grad_()
        loss = kd_loss(whole, teacher, target, **options)
        small = kd_loss(part, teacher[:, kept], small_target, **options)
        g, small_g = gradient(loss, whole), gradient(small, part)
        if divergence.name.startswith("mse"):  # a mean over 40 classes instead of 21
            ce = reference.kd_loss_parts(part.double(), teacher[:, kept].double(), small_target, **options).ce
            torch.testing.assert_close(
                (loss - ce) * 40, (small - ce) * len(kept), rtol=1e-4, atol=1e-3, check_dtype=False
            )
            assert g.isfinite().all()
            continue
        torch.testing.assert_close(loss, small, rtol=1e-5, atol=1e-5)
        assert (g[:, gone] == 0).all()
        torch.testing.assert_close(g[:, kept], small_g, rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-4)


@FAMILY
def test_classes_that_only_the_teacher_excludes(divergence: Divergence) -> None:
    student, teacher, target = kd_cases.family_rows(12, 20, torch.float64)
    teacher[:, 3] = -math.inf
    target[target == 3] = 4
    for function in (kd_loss, reference.kd_loss):
        z = student.clone().requires_grad_()
        loss = function(z, teacher, target, divergence=divergence, reduction="none", revise=None)
        if divergence.name in ("rkl", "mse_logits"):
            assert (loss == math.inf).all()  # by definition: the student has mass, or a logit, there
        else:
            assert loss.isfinite().all() and gradient(loss.sum(), z).isfinite().all()


@FAMILY
def test_classes_that_only_the_student_excludes(divergence: Divergence) -> None:
    student, teacher, target = kd_cases.family_rows(12, 20, torch.float64)
    student[:, 3] = -math.inf
    target[target == 3] = 4
    for function in (kd_loss, reference.kd_loss):
        loss = function(student, teacher, target, divergence=divergence, reduction="none", revise=None, ce_weight=0.0)
        if divergence.name in (*MODE_COVERING, "mse_logits"):
            uses_others = divergence.parameters[1] > 0 or divergence.name not in ("dkd", "rld")
            uses_others = uses_others and not (divergence.name == "nkd" and divergence.parameters[0] == 0)
            hit = loss == math.inf
            # rld looks at the classes below the target alone.
            assert hit.any() if divergence.name == "rld" else bool(hit.all()) == uses_others
        else:
            assert loss.isfinite().all()


@pytest.mark.parametrize("lead", [60.0, 200.0])
@FLOATING
@FAMILY
def test_saturation(divergence: Divergence, dtype: torch.dtype, lead: float) -> None:
    """A student sure of one class: log(1 - q_y) is -lead / T, not log(0). Loss and gradient stay exact."""
    classes = 12
    student = torch.zeros(classes, classes, dtype=dtype)
    student.fill_diagonal_(lead)
    _, teacher, target = kd_cases.family_rows(classes, classes, dtype, seed=4)
    for temperature in (1.0, 4.0):
        z = student.clone().requires_grad_()
        loss = kd_loss(z, teacher, target, divergence=divergence, reduction="none", temperature=temperature)
        g = gradient(loss.sum(), z)
        wide = student.double().requires_grad_()
        expected = reference.kd_loss(
            wide, teacher.double(), target, divergence=divergence, reduction="none", temperature=temperature
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
        expected_g = gradient(expected.sum(), wide)
        torch.testing.assert_close(
            g.double(), expected_g, rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-4 * temperature**2
        )


@pytest.mark.parametrize("layout", kd_cases.LAYOUTS)
@FAMILY
def test_memory_layouts(divergence: Divergence, layout: str) -> None:
    for classes in (10, 33):
        student, teacher, target = kd_cases.family_rows(6, classes)
        if layout == "expanded":
            student, teacher = student[:1].repeat(6, 1), teacher[:1].repeat(6, 1)
        z = student.clone().requires_grad_()
        odd = kd_cases.strided(student, layout).requires_grad_()
        expected = kd_loss(z, teacher, target, divergence=divergence)
        actual = kd_loss(odd, kd_cases.strided(teacher, layout), target, divergence=divergence)
        assert torch.equal(actual, expected) and torch.equal(gradient(actual, odd), gradient(expected, z))


@FAMILY
def test_sequences_are_rows(divergence: Divergence) -> None:
    student, teacher, target = kd_cases.family_rows(12, 10)
    flat = kd_loss(student, teacher, target, divergence=divergence, reduction="none")
    shaped = kd_loss(
        student.view(3, 4, 10), teacher.view(3, 4, 10), target.view(3, 4), divergence=divergence, reduction="none"
    )
    assert torch.equal(shaped.view(-1), flat)


@pytest.mark.parametrize("grad_output", [1.0, 65536.0, 1e-4])
@FAMILY
def test_float16_gradients_neither_underflow_nor_overflow(divergence: Divergence, grad_output: float) -> None:
    """grad_output is folded in float32 before rounding: through the recompute form, and through grad_scale."""
    student, teacher, target = kd_cases.family_rows(32, 33, torch.float16)
    by = torch.tensor(grad_output)
    wide = student.double().requires_grad_()
    expected = gradient(reference.kd_loss(wide, teacher.double(), target, divergence=divergence), wide, by.double())
    for scale in (None, grad_output):
        z = student.clone().requires_grad_()
        loss = kd_loss(z, teacher, target, divergence=divergence, grad_scale=scale)
        g = gradient(loss, z, by)
        # What exceeds float16 is inf, for GradScaler to skip; half of the smallest subnormal is 3e-8.
        ours, theirs = g.double().clamp(-65504, 65504), expected.clamp(-65504, 65504)
        torch.testing.assert_close(ours, theirs, rtol=3e-3, atol=1e-3 * grad_output / 32 + 2**-24)


@FAMILY
def test_retain_graph_and_no_grad(divergence: Divergence) -> None:
    student, teacher, target = kd_cases.family_rows(8, 10)
    z = student.requires_grad_()
    loss = kd_loss(z, teacher, target, divergence=divergence)
    first = torch.autograd.grad(loss, z, retain_graph=True)[0]
    kept = first.clone()
    zero = torch.autograd.grad(loss, z, torch.tensor(0.0), retain_graph=True)[0]
    twice = torch.autograd.grad(loss, z, torch.tensor(2.0))[0]
    assert torch.equal(first, kept) and (zero == 0).all()
    torch.testing.assert_close(twice, 2.0 * kept)
    with torch.no_grad():
        assert torch.equal(kd_loss(z, teacher, target, divergence=divergence), loss.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@FAMILY
def test_bits_do_not_depend_on_threads_or_neighbours(divergence: Divergence, dtype: torch.dtype) -> None:
    student, teacher, target = kd_cases.family_rows(300, 100, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            z = student.clone().requires_grad_()
            loss = kd_loss(z, teacher, target, divergence=divergence)
            results.append((loss.detach(), gradient(loss, z)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    whole = kd_loss(student, teacher, target, divergence=divergence, reduction="none")
    part = kd_loss(student[37:41], teacher[37:41], target[37:41], divergence=divergence, reduction="none")
    assert torch.equal(part, whole[37:41])


def test_cached_teacher_as_a_prefix() -> None:
    student, teacher, target = kd_cases.family_rows(12, 10)
    cached = TopKTeacher.from_logits(teacher[:5], 10, temperature=4.0)
    z = student.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"\(12, 10\); got \(5, 10\).*teacher_rows=5$"):
        kd_loss(z, cached, target)
    ours, dense = (kd_loss(z, v, target, teacher_rows=5) for v in (cached, teacher[:5]))
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(gradient(ours, z), gradient(dense, z))


def test_cached_teacher_with_a_class_that_does_not_exist() -> None:
    student, teacher, target = kd_cases.family_rows(4, 10)
    cached = TopKTeacher.from_logits(teacher, 3, temperature=4.0)
    cached.indices[2, 1] = 10
    with pytest.raises(ValueError, match=r"indices\[2\] must be inside \[0, 10\)"):
        kd_loss(student, cached, target)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divergence": "kld"}, ValueError, r"divergence must be one of 'kl'.*got 'kld'"),
        ({"divergence": 2}, TypeError, r"divergence must be one of .* got 2"),
        ({"temperature": ()}, ValueError, r"temperature must be a number or 1 to 8 numbers; got \(\)"),
        ({"temperature": (1.0,) * 9}, ValueError, "1 to 8 numbers"),
        ({"temperature": (1.0, -2.0)}, ValueError, r"temperature must be > 0; got \(1.0, -2.0\)"),
        ({"temperature": (1.0, "2")}, TypeError, "temperature must be a number; got '2'"),
        ({"standardize": 1}, TypeError, "standardize must be a bool; got 1"),
        ({"revise": "rld"}, ValueError, "revise must be one of None, 'lr', 'mft', 'swap'; got 'rld'"),
        ({"class_weight": [1.0] * 10}, TypeError, "class_weight must be a Tensor of 10 weights; got list"),
        (
            {"class_weight": torch.ones(9)},
            ValueError,
            r"class_weight must have shape \(10,\).*classes='truncate'.*got \(9,\)",
        ),
        ({"class_weight": torch.ones(10, dtype=torch.int64)}, TypeError, "class_weight must be floating"),
        ({"weight_sum": -1.0}, ValueError, "weight_sum must be finite and >= 0; got -1.0"),
        ({"target": torch.full((4, 9), 0.1)}, ValueError, r"probabilities of shape \(4, 10\); got .*\(4, 9\)"),
        ({"target": torch.full((4, 10), 0.1), "revise": "mft"}, ValueError, "revise must be 'lr' or None where target"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    student, teacher, target = kd_cases.family_rows(4, 10)
    with pytest.raises(error, match=message):
        kd_loss(student, teacher, options.pop("target", target), **options)


@pytest.mark.parametrize("columns", [3, 5], ids=["without rest", "with rest"])
def test_cached_teachers_of_samples_collate_to_a_batch(columns: int) -> None:
    student, teacher, target = kd_cases.family_rows(4, 10)
    cached = TopKTeacher.from_logits(teacher, np.int64(3), temperature=np.float32(2.0))
    cached = cached._replace(rest=cached.rest if columns == 5 else None)
    tensors = [column for column in cached if isinstance(column, torch.Tensor)]
    samples = [TopKTeacher(*rows[:3], 2.0, *rows[3:]) for rows in zip(*tensors, strict=True)]  # type: ignore[call-arg]
    batch = default_collate(samples)
    assert isinstance(batch, TopKTeacher) and batch.temperature == 2.0 and (batch.rest is None) == (columns == 3)
    for loss in (kd_loss, reference.kd_loss, torch.func.grad(kd_loss)):
        assert torch.equal(
            loss(student, batch, target, temperature=2.0), loss(student, cached, target, temperature=2.0)
        )
    with pytest.raises(ValueError, match=r"TopKTeachers of a batch must have one temperature; got \[2.0, 4.0\]"):
        default_collate([*samples[:3], samples[3]._replace(temperature=4.0)])
    with pytest.raises(ValueError, match=r"must have a rest, or none; got [13] of 4"):
        default_collate([*samples[:3], samples[3]._replace(rest=None if columns == 5 else torch.tensor(0.0))])


def test_cached_teacher_mistakes_are_named() -> None:
    student, teacher, target = kd_cases.family_rows(4, 10)
    cached = TopKTeacher.from_logits(teacher, 3, temperature=2.0)
    with pytest.raises(ValueError, match=r"temperature must be 2.0, at which the TopKTeacher.* got 4.0"):
        kd_loss(student, cached, target)
    for wrong, message in (
        (cached._replace(indices=cached.indices[:, :2]), "TopKTeacher.indices must be int64 or int32"),
        (cached._replace(logsumexp=cached.logsumexp[:3]), r"TopKTeacher.logsumexp must be floating of shape \(4,\)"),
        (cached._replace(values=torch.ones(4, 11), indices=torch.ones(4, 11).long()), "1 <= k <= 10"),
    ):
        with pytest.raises(ValueError, match=message):
            kd_loss(student, wrong, target, temperature=2.0)
    with pytest.raises(ValueError, match=r"k must be in \[1, 10\]; got 11"):
        TopKTeacher.from_logits(teacher, 11, temperature=1.0)
    with pytest.raises(ValueError, match=r"temperature must be > 0; got 0"):
        TopKTeacher.from_logits(teacher, 2, temperature=0)


def test_functional_transforms_see_the_family() -> None:
    """torch.func gets the reference's formulas: per-sample gradients of any divergence."""
    student, teacher, target = kd_cases.family_rows(5, 7, torch.float64)
    for divergence in kd_cases.FAMILY:

        def loss(z: Tensor, v: Tensor, y: Tensor, divergence: Divergence = divergence) -> Tensor:
            return lrds_fast.kd_loss(z[None], v[None], y[None], divergence=divergence)

        per_sample = torch.func.vmap(torch.func.grad(loss))(student, teacher, target)
        z = student.clone().requires_grad_()
        expected = gradient(kd_loss(z, teacher, target, divergence=divergence, reduction="sum"), z)
        torch.testing.assert_close(per_sample, expected, rtol=1e-9, atol=1e-10)
