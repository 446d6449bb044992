"""The loss as functions: defaults, documentation and errors a user can act on. The arithmetic is in csrc/."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lrds_fast import _ops, reference
from lrds_fast.reference import KDLossParts, default_ce_weight_unselected

__all__ = ["KDLossParts", "kd_logit_gradient", "kd_loss", "kd_loss_parts", "revise_labels"]

_REVISE = {None: 0, "lr": 1}
_REDUCTION = {"none": 0, "mean": 1, "sum": 2, "elementmean": 3}
_LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _choice(name: str, value: object, choices: dict[Any, int]) -> int:
    # Not `in`: an unhashable value deserves the same message.
    for choice, code in choices.items():
        if value is choice or value == choice:
            return code
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_hyperparameters(
    *,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    ce_weight_unselected: float | None,
    revise: str | None,
    eta: float,
    divergence: str,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[float, int, int]:
    """Checks kd_loss's keywords; returns (ce_weight_unselected with its default, revise code, reduction code).

    Raises TypeError for a value that is not a number, ValueError for one out of range. Each message names the
    argument, what it must be and what arrived.
    """
    numbers = {
        "temperature": temperature,
        "ce_weight": ce_weight,
        "kd_weight": kd_weight,
        "eta": eta,
        "label_smoothing": label_smoothing,
    }
    if ce_weight_unselected is not None:
        numbers["ce_weight_unselected"] = ce_weight_unselected
    for name, value in numbers.items():
        # The common case costs one comparison.
        if type(value) is not float and (isinstance(value, bool) or not isinstance(value, (int, float))):
            several = name == "temperature" and isinstance(value, (tuple, list))
            hint = "; several temperatures: add one kd_loss per temperature" if several else ""
            raise TypeError(f"{name} must be a number; got {value!r}{hint}")
        if not -math.inf < value < math.inf:  # math.isfinite does not trace with symbolic floats
            raise ValueError(f"{name} must be finite; got {value!r}")
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0; got {temperature!r}")
    if not 0 < eta < 1:
        raise ValueError(f"eta must be inside (0, 1), the paper's default is 0.8; got {eta!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing!r}")
    for name in ("ce_weight", "kd_weight", "ce_weight_unselected"):
        if name in numbers and numbers[name] < 0:
            raise ValueError(f"{name} must be >= 0; got {numbers[name]!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int; got {ignore_index!r}")
    if divergence != "kl":
        raise ValueError(f"divergence must be 'kl'; got {divergence!r}")
    if ce_weight_unselected is None:
        ce_weight_unselected = default_ce_weight_unselected(ce_weight, kd_weight)
    return (
        ce_weight_unselected,
        _choice("revise", revise, _REVISE),
        _choice("reduction", reduction, _REDUCTION),
    )


def _check_logits(name: str, logits: object) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a Tensor of logits; got {type(logits).__name__}")
    if logits.dtype not in _LOGIT_DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must have shape (..., C) with C >= 1; got {tuple(logits.shape)}")


def _check_target(target: object, student_logits: Tensor) -> None:
    if not isinstance(target, Tensor):
        hint = ""
        if isinstance(target, (int, float)):
            hint = f"; the order is (student_logits, teacher_logits, target): pass temperature={target!r} by keyword"
        raise TypeError(f"target must be a Tensor of class indices; got {type(target).__name__} {target!r}{hint}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"target must hold int64 or int32 class indices; got {target.dtype} of shape {tuple(target.shape)}"
        )
    if target.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"target must have student_logits' leading shape {tuple(student_logits.shape[:-1])}; "
            f"got {tuple(target.shape)}"
        )
    if target.device != student_logits.device:
        raise ValueError(f"target must be on {student_logits.device} like student_logits; got {target.device}")


def _check_tensors(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, selected: Tensor | None) -> None:
    _check_logits("student_logits", student_logits)
    _check_logits("teacher_logits", teacher_logits)
    classes = student_logits.shape[-1]
    if teacher_logits.shape[-1] != classes:
        raise ValueError(
            f"teacher_logits must have the student's {classes} classes; got shape {tuple(teacher_logits.shape)}"
        )
    if teacher_logits.device != student_logits.device:
        raise ValueError(
            f"teacher_logits must be on {student_logits.device} like student_logits; got {teacher_logits.device}"
        )
    _check_target(target, student_logits)
    prefix = teacher_logits.shape != student_logits.shape
    if prefix:
        rows, teacher_rows = target.numel(), math.prod(teacher_logits.shape[:-1])
        inner = student_logits.shape[1:]
        fits = teacher_logits.dim() == 2 or teacher_logits.shape[1:] == inner
        if teacher_rows > rows or not fits:
            raise ValueError(
                f"teacher_logits must have student_logits' shape {tuple(student_logits.shape)}, or hold its first "
                f"K <= {rows} rows; got {tuple(teacher_logits.shape)}"
            )
    if selected is None:
        return
    if not isinstance(selected, Tensor):
        raise TypeError(f"selected must be a Tensor, bool or floating; got {type(selected).__name__}")
    if selected.dtype != torch.bool and not selected.dtype.is_floating_point:
        raise TypeError(f"selected must be bool, or floating weights in [0, 1]; got {selected.dtype}")
    if prefix:
        raise ValueError(
            f"selected must be None when teacher_logits holds only the first {teacher_logits.shape[0]} rows: "
            "those rows are the selected ones"
        )
    if selected.shape != target.shape and tuple(selected.shape) != (target.numel(),):
        raise ValueError(
            f"selected must have target's shape {tuple(target.shape)} or ({target.numel()},); "
            f"got {tuple(selected.shape)}"
        )
    if selected.device != student_logits.device:
        raise ValueError(f"selected must be on {student_logits.device} like student_logits; got {selected.device}")


def _scalar(name: str, value: Tensor | float | None, like: Tensor) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element; got shape {tuple(value.shape)}")
        if value.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like student_logits; got {value.device}")
        return value.detach()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor of one element; got {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and name == "grad_scale"):
        raise ValueError(f"{name} must be finite and {'> 0' if name == 'grad_scale' else '>= 0'}; got {value!r}")
    # torch.full fills on the device: a copy from the host would wait for it.
    return torch.full(
        (),
        value,
        dtype=torch.float64 if like.device.type == "cpu" else torch.float32,
        device=like.device,
    )


def _transforms_active() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _call(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    ce_weight_unselected: float | None,
    revise: str | None,
    eta: float,
    selected: Tensor | None,
    divergence: str,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    num_valid: Tensor | float | None,
    grad_scale: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    unselected, revise_code, reduction_code = check_hyperparameters(
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        ce_weight_unselected=ce_weight_unselected,
        revise=revise,
        eta=eta,
        divergence=divergence,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    _check_tensors(student_logits, teacher_logits, target, selected)
    if _transforms_active():
        # torch.func cannot look into a C++ autograd function; the same loss in PyTorch ops it can.
        parts = reference.kd_loss_parts(
            student_logits,
            teacher_logits,
            target,
            temperature=temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            ce_weight_unselected=unselected,
            revise=revise,
            eta=eta,
            selected=selected,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            num_valid=num_valid,
        )
        return parts.loss, parts.ce, parts.kd, torch.stack(parts[3:])
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _ops.kd_loss(
        student_logits,
        teacher_logits,
        target,
        selected,
        _scalar("num_valid", num_valid, student_logits),
        _scalar("grad_scale", grad_scale, student_logits),
        temperature,
        ce_weight,
        kd_weight,
        unselected,
        eta,
        label_smoothing,
        revise_code,
        reduction_code,
        ignore_index,
    )
    return outputs


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *args: object,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    ce_weight_unselected: float | None = None,
    revise: str | None = "lr",
    eta: float = 0.8,
    selected: Tensor | None = None,
    divergence: str = "kl",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: Tensor | float | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """ce_weight * CE(z, y) + kd_weight * T^2 * KL(p' || softmax(z / T)), p' the teacher with its wrong rows revised.

    One pass reads every logit once and writes the gradient with the loss; backward only scales it.

    student_logits: (..., C) float64/float32/bfloat16/float16, last stride 1 (else copied), any row stride.
    teacher_logits: the same shape, any of these dtypes, no gradient. It may hold only the first K of the N flattened
        rows, (K, C) or (B', ..., C): those are then the selected ones, and `selected` must be None. K = 0 is legal.
    target: (...) int64/int32 class indices in [0, C), or ignore_index. Out of range: ValueError on the CPU; on CUDA
        (no synchronisation) that row's loss and gradient are NaN.
    temperature: T > 0. ce_weight, kd_weight: independent weights >= 0; a term of weight 0 is not computed.
    ce_weight_unselected: CE weight of rows without teacher. Default: ce_weight + kd_weight if that is <= 1, else
        max(ce_weight, 1), so that a row's supervision does not shrink when the teacher is silent.
    revise: "lr" rewrites p on rows where the teacher's top class is not the target (a tie that the target takes part
        in counts as right): beta = eta / (1 + p_max - p_y), p' = beta p + (1 - beta) one_hot(y), so the target wins by
        exactly 1 - eta. None: p' = p.
    selected: (...) or (N,), bool or weights w in [0, 1]. A row's CE weight is w * ce_weight + (1 - w) *
        ce_weight_unselected, its KD weight w * kd_weight. None: every row.
    label_smoothing: of the CE term, as in F.cross_entropy. ignore_index: rows with this target are not read.
    reduction: "mean" over rows that are not ignored (selected or not), "elementmean" over those rows times C, "sum",
        or "none" (target's shape, ignored rows 0). No valid row: loss 0, gradient 0.
    num_valid: a number or 0-d tensor that replaces the row count of the means (global means in DDP or accumulation).
    grad_scale: a number or 0-d tensor: the factor the coming grad_output will carry (GradScaler._scale). It never
        changes the result; it is folded in before a 16-bit gradient is rounded.

    Returns a float32 tensor (float64 if any logits are); the gradient has student_logits' dtype. Deterministic: the
    same bits for any thread count. Nothing synchronises on CUDA. Raises ValueError or TypeError naming the argument.
    Source: Lan et al., "Improve Knowledge Distillation via Label Revision and Data Selection", arXiv 2404.03693.
    """
    if args:
        raise TypeError(
            "kd_loss takes (student_logits, teacher_logits, target), the rest by keyword; got a fourth argument "
            f"{args[0]!r}: write temperature=... (or whichever you meant)"
        )
    return _call(
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        ce_weight_unselected=ce_weight_unselected,
        revise=revise,
        eta=eta,
        selected=selected,
        divergence=divergence,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        num_valid=num_valid,
        grad_scale=grad_scale,
    )[0]


def kd_loss_parts(
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
    selected: Tensor | None = None,
    divergence: str = "kl",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: Tensor | float | None = None,
    grad_scale: Tensor | float | None = None,
) -> KDLossParts:
    """kd_loss with what it is made of, for logging: (loss, ce, kd, n_valid, n_selected, n_revised).

    Arguments as kd_loss. ce and kd are weighted and reduced like loss and detached, loss = ce + kd; the counts are 0-d
    int64 tensors on the logits' device. Nothing synchronises.
    """
    loss, ce, kd, counts = _call(
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        ce_weight_unselected=ce_weight_unselected,
        revise=revise,
        eta=eta,
        selected=selected,
        divergence=divergence,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        num_valid=num_valid,
        grad_scale=grad_scale,
    )
    n_valid, n_selected, n_revised = counts.unbind()
    return KDLossParts(loss, ce, kd, n_valid, n_selected, n_revised)


def revise_labels(
    teacher_logits: Tensor,
    target: Tensor,
    *,
    eta: float = 0.8,
    temperature: float = 1.0,
    policy: str = "lr",
) -> Tensor:
    """softmax(teacher_logits / temperature), corrected where the teacher's top class is not `target`.

    teacher_logits: (..., C) floating. target: (...) int64/int32 in [0, C). Returns (..., C) probabilities, float32
    (float64 for float64 logits), without gradient. On corrected rows the target wins by exactly 1 - eta and the other
    classes keep their ratios; kd_loss applies the same revision inside its kernel, without forming this tensor.
    Raises ValueError for eta outside (0, 1), temperature <= 0, mismatched shapes or, on the CPU, a target outside
    [0, C); TypeError for wrong dtypes. Source: Lan et al., arXiv 2404.03693, label revision.
    """
    check_hyperparameters(
        temperature=temperature,
        ce_weight=1.0,
        kd_weight=1.0,
        ce_weight_unselected=1.0,
        revise="lr",
        eta=eta,
        divergence="kl",
        label_smoothing=0.0,
        ignore_index=-100,
        reduction="mean",
    )
    _choice("policy", policy, {"lr": 1})
    _check_logits("teacher_logits", teacher_logits)
    if not isinstance(target, Tensor) or target.shape != teacher_logits.shape[:-1]:
        got = tuple(target.shape) if isinstance(target, Tensor) else target
        raise ValueError(
            f"target must have teacher_logits' leading shape {tuple(teacher_logits.shape[:-1])}; got {got!r}"
        )
    _check_target(target, teacher_logits)
    classes = teacher_logits.shape[-1]
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and not _transforms_active():
        outside = ((target < 0) | (target >= classes)).flatten()
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(f"target[{row}] is {int(target.flatten()[row])}, outside [0, {classes})")
    return reference.revise_labels(teacher_logits, target, eta=eta, temperature=temperature, policy=policy)


def kd_logit_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    revise: str | None = "lr",
    eta: float = 0.8,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Each row's d/dz [ce_weight * CE(z, y) + kd_weight * T^2 * KL(p' || q)], without any 1/N: influence's delta.

    student_logits, teacher_logits: (N, C) floating. target: (N,) int64/int32 in [0, C). Weights are finite and may be
    negative (a difference of two losses); a term of weight 0 is not computed and its logits are not read.
    Returns (N, C) float32 (float64 if any logits are), without gradient. The arithmetic is kd_loss's own kernel.
    """
    check_hyperparameters(
        temperature=temperature,
        ce_weight=abs(ce_weight),
        kd_weight=abs(kd_weight),
        ce_weight_unselected=1.0,
        revise=revise,
        eta=eta,
        divergence="kl",
        label_smoothing=label_smoothing,
        ignore_index=-100,
        reduction="sum",
    )
    _check_tensors(student_logits, teacher_logits, target, None)
    if student_logits.dim() != 2 or teacher_logits.shape != student_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must both be (N, C); "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    gradient: Tensor = _ops.kd_logit_gradient(
        student_logits.detach(),
        teacher_logits.detach(),
        target,
        temperature,
        ce_weight,
        kd_weight,
        eta,
        label_smoothing,
        _REVISE[revise],
    )
    return gradient
