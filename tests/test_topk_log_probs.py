"""Teachers made of an inference server's log-probabilities, and logits with one bucket for the other classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast import TopKTeacher, bucketed_logits, kd_loss

ROWS, CLASSES, KEPT = 11, 29, 4
TEACHER_ALONE: dict[str, Any] = {"ce_weight": 0.0, "kd_weight": 1.0, "revise": None}


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def served(v: Tensor) -> tuple[Tensor, Tensor]:
    """What a server returns: the largest log-probabilities at temperature 1, and their classes."""
    top = v.log_softmax(-1).topk(KEPT)
    return top.values, top.indices


def expected(v: Tensor, tail: str) -> Tensor:
    """(ROWS, CLASSES) probabilities at temperature 1 that agree with the server's."""
    values, indices = served(v)
    left = (1 - values.exp().sum(-1, keepdim=True)) / (CLASSES - KEPT) if tail == "spread" else torch.zeros(ROWS, 1)
    filled = left.double().expand(ROWS, CLASSES).scatter(-1, indices, values.exp())
    return filled / filled.sum(-1, keepdim=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("tail", ["spread", "renormalize"])
def test_log_probabilities_soften_at_any_temperature(tail: str, temperature: float) -> None:
    z, v, y = logits(0).requires_grad_(), logits(1), torch.arange(ROWS)
    cached = TopKTeacher.from_log_probs(*served(v), classes=CLASSES, temperature=temperature, tail=tail)
    dense = expected(v, tail).log()
    torch.testing.assert_close((cached.dense(CLASSES) / temperature).softmax(-1), (dense / temperature).softmax(-1))
    for options in ({}, TEACHER_ALONE, {"divergence": "dkd", "revise": "swap"}, {"divergence": "jsd"}):
        loss = kd_loss(z, cached, y, temperature=temperature, **options)
        wanted = kd_loss(z, dense, y, temperature=temperature, **options)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(wanted, z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_server_that_rounds_leaves_a_finite_loss(dtype: torch.dtype) -> None:
    """Rounded probabilities may add up to more than 1; what is left must not become negative or NaN."""
    z, y = logits(0).float(), torch.arange(ROWS)
    for scale in (1.0, 30.0):
        values, indices = served(scale * logits(1))
        cached = TopKTeacher.from_log_probs(values.to(dtype), indices, classes=CLASSES, temperature=2.0)
        assert cached.values.dtype == torch.float32
        for divergence in ("kl", "rkl", "jsd"):
            assert kd_loss(z, cached, y, temperature=2.0, divergence=divergence).isfinite()


def test_all_classes_leave_no_tail() -> None:
    v = logits(1)
    top = v.log_softmax(-1).topk(CLASSES)
    cached = TopKTeacher.from_log_probs(top.values, top.indices, classes=CLASSES, temperature=4.0)
    assert cached.rest is not None and bool((cached.rest == -torch.inf).all())
    torch.testing.assert_close((cached.dense(CLASSES) / 4).softmax(-1), (v / 4).softmax(-1))


@pytest.mark.parametrize("largest_of", ["teacher", "student"])
def test_one_bucket_holds_the_other_classes_probability(largest_of: str) -> None:
    temperature = 2.0
    z, v = logits(0).requires_grad_(), logits(1)
    indices = (v if largest_of == "teacher" else z).topk(KEPT).indices
    student, teacher = (bucketed_logits(x, indices, temperature=temperature) for x in (z, v))

    def probabilities(x: Tensor) -> Tensor:
        p = (x / temperature).softmax(-1)
        kept = p.gather(-1, indices)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)

    q, p = probabilities(z), probabilities(v)
    torch.testing.assert_close((student / temperature).softmax(-1), q)
    for divergence, wanted in (("kl", F.kl_div(q.log(), p, reduction="batchmean")),
                               ("rkl", F.kl_div(p.log(), q, reduction="batchmean"))):  # fmt: skip
        loss = kd_loss(student, teacher, temperature=temperature, divergence=divergence, **TEACHER_ALONE)
        torch.testing.assert_close(loss, temperature**2 * wanted)
        torch.testing.assert_close(
            torch.autograd.grad(loss, z, retain_graph=True),
            torch.autograd.grad(temperature**2 * wanted, z, retain_graph=True),
        )
    if largest_of == "teacher":
        cached = TopKTeacher.from_logits(v, KEPT, temperature=temperature)
        torch.testing.assert_close((cached.bucketed(CLASSES) / temperature).softmax(-1), p)


def test_gradients_of_a_bucket() -> None:
    z, (_, indices) = logits(0)[:3, :7].clone().requires_grad_(), served(logits(1)[:3, :7])
    assert torch.autograd.gradcheck(lambda x: bucketed_logits(x, indices[:3], temperature=3.0), z)


def test_excluded_classes_in_the_bucket() -> None:
    z = logits(0)
    z[:, 20:] = -torch.inf
    _, indices = served(z)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(bucketed_logits(z, indices, temperature=1.0).softmax(-1).square().sum(), z)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"log_probs": [0.0]}, TypeError, "log_probs must be a Tensor of log-probabilities; got list"),
        ({"log_probs": torch.zeros(3, 4).long()}, ValueError, "log_probs must be floating .*int64"),
        ({"indices": [0]}, TypeError, "indices must be a Tensor of class indices; got list"),
        (
            {"indices": torch.zeros(3, 2).long()},
            ValueError,
            r"indices must be .*shape \(11, 4\); got torch.int64 .*\(3, 2",
        ),
        ({"indices": torch.zeros(ROWS, 4)}, ValueError, r"indices must be int64 or int32 .*; got torch.float32"),
        ({"indices": torch.full((ROWS, 4), CLASSES)}, ValueError, r"indices\[0\] is 29, outside \[0, 29\)"),
        ({"classes": 3}, ValueError, r"1 <= k <= classes = 3; got torch.float64 of shape \(11, 4\)"),
        ({"temperature": 0}, ValueError, "temperature must be finite and > 0; got 0"),
        (
            {"log_probs": served(logits(1))[0].exp()},
            ValueError,
            r"log_probs must be natural logarithms .*pass probabilities.log\(\)",
        ),
        ({"tail": "drop"}, ValueError, "tail must be 'spread' or 'renormalize'; got 'drop'"),
    ],
)
def test_errors_of_log_probabilities(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    values, indices = served(logits(1))
    given: dict[str, Any] = {"log_probs": values, "indices": indices, "classes": CLASSES, "temperature": 4.0} | changed
    with pytest.raises(error, match=message):
        TopKTeacher.from_log_probs(**given)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"indices": None}, TypeError, "indices must be a Tensor of class indices; got NoneType"),
        ({"indices": torch.zeros(3, 2).long()}, ValueError, r"indices must be .*\(11, 'k'\); got torch.int64 .*\(3, 2"),
        ({"indices": torch.zeros(ROWS, CLASSES).long()}, ValueError, "not all of the 29 classes; got 29"),
        ({"indices": torch.full((ROWS, 2), CLASSES)}, ValueError, r"indices\[0\] is 29, outside \[0, 29\)"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and > 0; got -1.0"),
    ],
)
def test_errors_of_buckets(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"logits": logits(1), "indices": served(logits(1))[1], "temperature": 4.0}
    with pytest.raises(error, match=message):
        bucketed_logits(**given | changed)
    with pytest.raises(ValueError, match="classes must be more than the 4 that are kept; got 4"):
        TopKTeacher.from_logits(logits(1), KEPT, temperature=4.0).bucketed(4)
