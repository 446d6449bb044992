"""One table of tolerances by dtype, and the one comparison with the float64 reference that uses it.

Errors are judged against the size of what was added up, not of what is left after cancellation:
a loss against
    w_ce * (1 + CE) + w_kd * T^2 * (1 + sum p' (|log p'| + |log q|))
and every single gradient element against
    w_ce * (softmax(z)_k + smoothed one-hot_k) + w_kd * T * (q_k + p'_k).
So the ten-thousandth class of a peaked row is held to the same relative accuracy as the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrds_fast import reference


class Tolerance(NamedTuple):
    """What one dtype may cost.

    loss, gradient: relative to the sizes above, of arithmetic in this dtype.
    rounding, smallest: what storing a gradient in this dtype may add. Relative: half an ulp twice,
    for the gradient and for its product with grad_output. Absolute: the smallest subnormal.
    """

    loss: float
    gradient: float
    rounding: float
    smallest: float


TOLERANCES = {
    torch.float64: Tolerance(loss=1e-13, gradient=1e-12, rounding=2**-52, smallest=1e-300),
    # The exponential of a float32 argument near -80 carries a relative 80 * 2^-24 = 5e-6.
    torch.float32: Tolerance(loss=2e-6, gradient=1e-5, rounding=2**-23, smallest=1e-36),
    torch.bfloat16: Tolerance(loss=2e-6, gradient=1e-5, rounding=2**-7, smallest=1e-36),
    torch.float16: Tolerance(loss=2e-6, gradient=1e-5, rounding=2**-10, smallest=2**-24),
}


class Sizes(NamedTuple):
    """What the loss and its gradient were added up from; shapes and reduction are theirs."""

    loss: Tensor
    gradient: Tensor


def sizes(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    ce_weight_unselected: float | None = None,
    revise: str | None = "lr",
    eta: float = 0.8,
    revise_temperature: float | None = None,
    selected: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: Tensor | float | None = None,
    **_: Any,
) -> Sizes:
    """The denominators of the comparison, in float64, for the arguments of kd_loss."""
    if ce_weight_unselected is None:
        ce_weight_unselected = reference.default_ce_weight_unselected(ce_weight, kd_weight)
    classes = student_logits.shape[-1]
    z = student_logits.detach().reshape(-1, classes).double()
    v = teacher_logits.detach().reshape(-1, classes).double()
    y = target.reshape(-1).long()
    rows = z.shape[0]
    valid = y != ignore_index
    y = torch.where(valid, y, 0)
    v = torch.cat([v, v.new_zeros(rows - v.shape[0], classes)])
    if selected is None:
        prefix = teacher_logits.reshape(-1, classes).shape[0]
        w = (torch.arange(rows, device=z.device) < prefix).double()
    else:
        w = selected.reshape(-1).double()
    w_ce = ((w * ce_weight + (1 - w) * ce_weight_unselected) * valid).abs()[:, None]
    w_kd = (w * kd_weight * valid).abs()[:, None]
    z_ce, z_kd = torch.where(w_ce > 0, z, 0.0), torch.where(w_kd > 0, z, 0.0)
    v = torch.where(w_kd > 0, v, 0.0)

    one_hot = torch.nn.functional.one_hot(y, classes).double()
    smoothed = (1 - label_smoothing) * one_hot + label_smoothing / classes
    p = torch.softmax(v / temperature, -1)
    if revise is not None:
        p = reference.revise_labels(v, y, eta=eta, revise_temperature=revise_temperature, temperature=temperature)
    log_q = torch.log_softmax(z_kd / temperature, -1)
    log_softmax = torch.log_softmax(z_ce, -1)
    ce = (smoothed * torch.where(smoothed > 0, log_softmax, 0.0)).abs().sum(-1)
    kl = torch.where(p > 0, p * (log_q.abs() + torch.where(p > 0, p, 1.0).log().abs()), 0.0).sum(-1)
    # The 1: the logarithm of a sum of exponentials inherits the sum's relative rounding as an
    # absolute one, also where the logarithm itself is nearly 0. Torch's own losses share it.
    loss = w_ce[:, 0] * (1.0 + ce) + w_kd[:, 0] * temperature**2 * (1.0 + kl)
    gradient = w_ce * (log_softmax.exp() + smoothed)
    gradient = gradient + w_kd * temperature * (log_q.exp() + p)

    if reduction == "none":
        return Sizes(loss.reshape(target.shape), gradient.reshape(student_logits.shape))
    scale = 1.0
    if reduction in ("mean", "elementmean"):
        count = float(valid.sum() if num_valid is None else num_valid)
        count *= classes if reduction == "elementmean" else 1
        scale = 1.0 / count if count > 0 else 0.0
    return Sizes(loss.sum() * abs(scale), (gradient * abs(scale)).reshape(student_logits.shape))


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    """actual equals expected within bound, element by element; inf and NaN must be the same."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}"
    actual, expected = actual.detach().double(), expected.detach().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    bad = ~(same | ((actual - expected).abs() <= bound))
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        ratio = ((actual - expected).abs() / bound)[bad].max().item()
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} off by up to {ratio:.3g} times the bound; "
            f"first at {first}: got {actual[first].item():.9g}, "
            f"expected {expected[first].item():.9g} +- {bound[first].item():.3g}"
        )


def assert_matches_reference(
    parts: Callable[..., reference.KDLossParts],
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    grad_output: Tensor | None = None,
    **arguments: Any,
) -> None:
    """parts(...) and its gradient equal lrds_fast.reference's in float64, within the table.

    The logits keep their layout and dtype; the student becomes a leaf on the same storage.
    grad_output: None for ones.
    """
    student = student_logits.detach().requires_grad_()
    exact = student_logits.detach().double().requires_grad_()
    actual = parts(student, teacher_logits, target, **arguments)
    expected = reference.kd_loss_parts(exact, teacher_logits.detach().double(), target, **arguments)
    compute = reference.compute_dtype(student_logits, teacher_logits)
    assert actual.loss.dtype == actual.ce.dtype == actual.kd.dtype == compute
    assert actual.loss.device == student_logits.device
    assert not actual.ce.requires_grad and not actual.kd.requires_grad

    size = sizes(student_logits, teacher_logits, target, **arguments)
    bound = TOLERANCES[compute].loss * size.loss + TOLERANCES[compute].smallest
    assert_within(actual.loss, expected.loss, bound, "loss")
    assert_within(actual.ce, expected.ce, bound, "ce")
    assert_within(actual.kd, expected.kd, bound, "kd")
    for name in ("n_valid", "n_selected", "n_revised"):
        count = getattr(actual, name)
        assert count.dtype == torch.int64 and count.dim() == 0, name
        assert count.item() == getattr(expected, name).item(), name

    weight = torch.ones_like(expected.loss) if grad_output is None else grad_output.double()
    given = torch.ones_like(actual.loss) if grad_output is None else grad_output
    (gradient,) = torch.autograd.grad(actual.loss, student, given)
    (wanted,) = torch.autograd.grad(expected.loss, exact, weight)
    assert gradient.dtype == student.dtype
    stored = TOLERANCES[student.dtype]
    row_weight = weight.abs().reshape(*weight.shape, 1) if weight.dim() else weight.abs()
    bound = (TOLERANCES[compute].gradient * size.gradient + TOLERANCES[compute].smallest) * row_weight
    # Twice half an ulp, and the product of the two.
    bound = bound + stored.rounding * (1.0 + stored.rounding) * wanted.abs() + stored.smallest
    if stored.smallest > 1e-30:  # float16: values beyond its range become inf, on both sides
        wanted = wanted.to(student.dtype)
    assert_within(gradient, wanted, bound, "gradient")
