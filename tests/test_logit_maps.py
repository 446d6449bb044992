"""kd_loss with a soft cap, a logit scale and padded vocabularies, and without a target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast import JSD, MSE, KDLoss, TopKTeacher, kd_loss, kd_loss_parts, linear_kd_loss

TEACHER_ALONE: dict[str, Any] = {"ce_weight": 0.0, "kd_weight": 1.0, "revise": None}


def logits(rows: int = 19, student: int = 37, teacher: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = 4 * torch.randn(rows, student, generator=generator, dtype=torch.float64)
    v = 4 * torch.randn(rows, teacher, generator=generator, dtype=torch.float64)
    return z.requires_grad_(), v, torch.randint(min(student, teacher), (rows,), generator=generator)


# --- Soft cap and scale


def test_soft_cap_and_scale_of_logits() -> None:
    """Gemma's and Cohere's heads, of both models or of one."""
    z, v, y = logits()
    for given, student, teacher in (
        ({"softcap": 3.0}, 3 * torch.tanh(z / 3), 3 * torch.tanh(v / 3)),
        ({"logit_scale": 0.25}, z / 4, v / 4),
        ({"softcap": (3.0, None), "logit_scale": (1.0, 0.5)}, 3 * torch.tanh(z / 3), v / 2),
        ({"softcap": (None, 2.0), "logit_scale": 0.5}, z / 2, 2 * torch.tanh(v / 4)),
    ):
        expected = kd_loss(student, teacher, y)
        loss = kd_loss(z, v, y, **given)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))
        parts = kd_loss_parts(z, v, y, **given)
        torch.testing.assert_close(parts.loss, loss)
        assert torch.equal(KDLoss(**given)(z, v, y), loss)


def test_the_module_prints_what_differs_from_the_defaults() -> None:
    assert "softcap" not in repr(KDLoss()) and "classes" not in repr(KDLoss())
    assert "classes='truncate', softcap=30.0" in repr(KDLoss(classes="truncate", softcap=30.0))


def test_ignored_rows_of_a_capped_loss_are_not_read() -> None:
    z, v, y = logits()
    y[3:5] = -100
    expected = kd_loss(z, v, y, softcap=3.0)
    poisoned = z.detach().clone()
    poisoned[3:5] = torch.nan
    poisoned.requires_grad_()
    loss = kd_loss(poisoned, v, y, softcap=3.0)
    assert torch.equal(loss, expected)
    assert torch.equal(*torch.autograd.grad(loss, poisoned), *torch.autograd.grad(expected, z))


@pytest.mark.parametrize("target", ["indices", "probabilities", "none"])
@pytest.mark.parametrize("by", ["selected", "teacher_rows"])
def test_rows_of_a_capped_loss_that_no_term_weights_are_not_read(by: str, target: str) -> None:
    z, v, y = logits()
    options: dict[str, Any] = {"softcap": 3.0, "ce_weight_unselected": 0.0, by: 7}
    teacher = v[:7]
    if by == "selected":
        options[by], teacher = torch.arange(19) < 7, v
    labels = {"indices": y, "probabilities": v.softmax(-1), "none": None}[target]
    if labels is None:
        options |= TEACHER_ALONE
    poisoned = torch.cat([z.detach()[:7], torch.full((12, 37), torch.nan, dtype=z.dtype)]).requires_grad_()
    expected, loss = (kd_loss(x, teacher, labels, **options) for x in (z, poisoned))
    assert torch.equal(loss, expected)
    assert torch.equal(*torch.autograd.grad(loss, poisoned), *torch.autograd.grad(expected, z))


# --- Padded vocabularies


@pytest.mark.parametrize(("student", "teacher"), [(37, 40), (40, 37), (37, 37)])
def test_the_larger_vocabulary_is_cut(student: int, teacher: int) -> None:
    z, v, y = logits(student=student, teacher=teacher)
    cut = z.detach()[:, :37].clone().requires_grad_()
    expected = kd_loss(cut, v[:, :37], y)
    loss = kd_loss(z, v, y, classes="truncate")
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close((gradient[:, :37],), torch.autograd.grad(expected, cut), rtol=0, atol=0)
    assert gradient.shape == z.shape and not gradient[:, 37:].any()


@pytest.mark.parametrize(("student", "teacher"), [(37, 40), (40, 37)])
def test_the_larger_head_is_cut(student: int, teacher: int) -> None:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    h, w, b = (tensor.requires_grad_() for tensor in (normal(9, 5), normal(student, 5), normal(student)))
    ht, wt, bt, y = normal(9, 4), normal(teacher, 4), normal(teacher), torch.randint(37, (9,), generator=generator)
    expected = kd_loss(F.linear(h, w, b)[:, :37], F.linear(ht, wt, bt)[:, :37], y)
    loss = linear_kd_loss(h, w, ht, wt, y, student_bias=b, teacher_bias=bt, classes="truncate", chunk_rows=4)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (h, w, b)), torch.autograd.grad(expected, (h, w, b)))


# --- Without a target


@pytest.mark.parametrize("divergence", ["kl", "rkl", JSD(weight=0.3), MSE("logits"), MSE("probs")], ids=str)
@pytest.mark.parametrize("standardize", [False, True])
def test_without_a_target_the_teacher_decides(divergence: Any, standardize: bool) -> None:
    """The same as with any target, of which nothing is used."""
    z, v, y = logits()
    options = TEACHER_ALONE | {"divergence": divergence, "standardize": standardize}
    loss = kd_loss(z, v, **options)
    for target in (y, y.roll(1)):
        expected = kd_loss(z, v, target, **options)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, z, retain_graph=True), torch.autograd.grad(expected, z))
    assert torch.equal(KDLoss(**options)(z, v), loss)
    hidden, other = z.detach(), v
    eye = torch.eye(37, dtype=torch.float64)
    torch.testing.assert_close(linear_kd_loss(hidden, eye, other, eye, **options), loss.detach())


def test_without_a_target_kl_is_the_usual_distillation_loss() -> None:
    z, v, _ = logits()
    expected = F.kl_div((z / 4).log_softmax(-1), (v / 4).softmax(-1), reduction="batchmean") * 16
    torch.testing.assert_close(kd_loss(z, v, None, **TEACHER_ALONE), expected)
    # No row is ignored, whatever the index of ignored rows is.
    torch.testing.assert_close(kd_loss(z, v, None, ignore_index=0, **TEACHER_ALONE), expected)
    rows = kd_loss(z, v, reduction="none", **TEACHER_ALONE)
    assert rows.shape == (19,)
    torch.testing.assert_close(rows.mean(), expected)
    sequences = kd_loss(z.view(1, 19, 37), v.view(1, 19, 37), **TEACHER_ALONE)
    torch.testing.assert_close(sequences, expected)


def test_without_a_target_rows_can_still_be_selected() -> None:
    z, v, y = logits()
    selected = torch.arange(19) % 3 > 0
    options = TEACHER_ALONE | {"ce_weight_unselected": 0.0}
    for given in ({"selected": selected}, {"teacher_rows": 7}):
        teacher = v[: given.get("teacher_rows")]
        assert torch.equal(kd_loss(z, teacher, **given, **options), kd_loss(z, teacher, y, **given, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revise": None}, r"target is None, and .*: ce_weight=0.1 \(pass 0\); or pass the target$"),
        ({"ce_weight": 0}, r"revise='lr' \(pass None\)"),
        ({"ce_weight": 0, "revise": None, "divergence": "dkd"}, r"divergence='dkd' \(pass another\)"),
        ({"ce_weight": 0, "revise": None, "divergence": "nkd"}, r"divergence='nkd' \(pass another\)"),
        ({"ce_weight": 0, "revise": None, "divergence": "rld"}, r"divergence='rld' \(pass another\)"),
        (
            {"ce_weight": 0, "revise": None, "selected": torch.ones(19, dtype=torch.bool)},
            r"ce_weight_unselected=0.9 \(pass 0\)",
        ),
        ({"classes": "pad"}, "classes must be 'equal' or 'truncate'; got 'pad'"),
        ({"logit_scale": 0.0}, "logit_scale must be finite and > 0; got 0.0"),
        ({"softcap": float("inf")}, "softcap must be finite and > 0; got inf"),
    ],
)
def test_errors_say_what_needs_a_target_or_is_out_of_range(options: dict[str, Any], message: str) -> None:
    z, v, _ = logits()
    with pytest.raises(ValueError, match=message):
        kd_loss(z, v, **options)


def test_arrays_are_no_scale_and_no_cap() -> None:
    z, v, y = logits()
    several: Any
    for several in (torch.tensor([0.5, 1.0]), torch.tensor([0.5, 1.0]).numpy()):
        with pytest.raises(TypeError, match="logit_scale must be a number"):
            kd_loss(z, v, y, logit_scale=several)
        with pytest.raises(TypeError, match="softcap must be a number"):
            kd_loss(z, v, y, softcap=several)


def test_unequal_vocabularies_name_the_way_out() -> None:
    z, v, y = logits(student=37, teacher=40)
    with pytest.raises(ValueError, match="classes='truncate'"):
        kd_loss(z, v, y)
    with pytest.raises(ValueError, match="classes='truncate'"):
        linear_kd_loss(z, torch.eye(37, dtype=z.dtype), v, torch.eye(40, dtype=z.dtype), y)


def test_a_cached_teacher_is_capped_before_it_is_made() -> None:
    z, v, y = logits()
    cached = TopKTeacher.from_logits(3 * torch.tanh(v / 3), 37, temperature=4.0)
    torch.testing.assert_close(kd_loss(z, cached, y, softcap=(3.0, None)), kd_loss(z, v, y, softcap=3.0))
    with pytest.raises(ValueError, match=r"softcap cannot act on a TopKTeacher.*\(student's, None\)"):
        kd_loss(z, cached, y, softcap=3.0)
    with pytest.raises(ValueError, match="classes must be 'equal' with a TopKTeacher"):
        kd_loss(z, cached, y, classes="truncate")
