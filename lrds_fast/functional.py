"""The loss as functions: defaults, documentation and errors a user can act on. The arithmetic is in csrc/."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from lrds_fast import _ops, reference
from lrds_fast._numbers import integer, number
from lrds_fast.arguments import check_teacher_rows, check_tensor, unknown_keyword
from lrds_fast.divergences import REVISE, REVISE_TEMPERATURE, Divergence, from_code, resolve, resolve_revise
from lrds_fast.reference import KDLossParts, default_ce_weight_unselected
from lrds_fast.topk import TopKTeacher

__all__ = ["KDLossParts", "kd_logit_gradient", "kd_loss", "kd_loss_parts", "revise_labels"]

MAX_TEMPERATURES = 8
"""Temperatures that one call can add up (csrc/core/kd_loss.h: kMaxTemperatures)."""

SELECTED_TWICE = "selected must be None where teacher_rows is given: the first teacher_rows rows are the selected ones"

_REDUCTION = {"none": 0, "mean": 1, "sum": 2, "elementmean": 3}
_LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _choice(name: str, value: object, choices: dict[Any, int]) -> int:
    # Not `in`: an unhashable value deserves the same message.
    for choice, code in choices.items():
        if value is choice or value == choice:
            return code
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


class Hyperparameters(NamedTuple):
    """kd_loss's keywords, checked, defaults filled in, names except policy replaced by the operators' codes.

    revise_temperature: 0 stands for None.
    """

    temperature: list[float]
    ce_weight: float
    kd_weight: float
    ce_weight_unselected: float
    policy: str | None
    eta: float
    revise_temperature: float
    label_smoothing: float
    revise: int
    reduction: int
    ignore_index: int
    divergence: Divergence
    divergence_parameters: list[float]


def _finite(name: str, value: object) -> float:
    found = number(name, value)
    if not -math.inf < found < math.inf:  # math.isfinite does not trace with symbolic floats
        raise ValueError(f"{name} must be finite; got {value!r}")
    return found


def temperatures(temperature: float | Sequence[float]) -> list[float]:
    """The temperatures of a call, one or several. Raises TypeError or ValueError for anything but numbers > 0."""
    if isinstance(temperature, (tuple, list)):
        several = list(temperature)
        if not 1 <= len(several) <= MAX_TEMPERATURES:
            raise ValueError(f"temperature must be a number or 1 to {MAX_TEMPERATURES} numbers; got {temperature!r}")
    else:
        several = [temperature]
    found = [_finite("temperature", value) for value in several]
    if min(found) <= 0:
        raise ValueError(f"temperature must be > 0; got {temperature!r}")
    return found


def check_hyperparameters(
    *,
    temperature: float | Sequence[float],
    ce_weight: float,
    kd_weight: float,
    ce_weight_unselected: float | None,
    revise: str | None,
    eta: float,
    revise_temperature: float | None,
    divergence: str | Divergence,
    standardize: bool = False,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Hyperparameters:
    """Checks kd_loss's keywords and resolves them.

    Raises TypeError for a value that is not a number, ValueError for one out of range. Each message names the
    argument, what it must be and what arrived.
    """
    ce_weight, kd_weight = _finite("ce_weight", ce_weight), _finite("kd_weight", kd_weight)
    eta, label_smoothing = _finite("eta", eta), _finite("label_smoothing", label_smoothing)
    if ce_weight_unselected is None:
        ce_weight_unselected = default_ce_weight_unselected(ce_weight, kd_weight)
    else:
        ce_weight_unselected = _finite("ce_weight_unselected", ce_weight_unselected)
    for name, value in (
        ("ce_weight", ce_weight),
        ("kd_weight", kd_weight),
        ("label_smoothing", label_smoothing),
        ("ce_weight_unselected", ce_weight_unselected),
    ):
        if value < 0:
            raise ValueError(f"{name} must be >= 0; got {value!r}")
    if not 0 < eta < 1:
        raise ValueError(f"eta must be inside (0, 1), the paper's default is 0.8; got {eta!r}")
    if not label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing!r}")
    if revise_temperature is not None:
        revise_temperature = _finite("revise_temperature", revise_temperature)
        if not revise_temperature > 0:
            raise ValueError(
                f"revise_temperature must be > 0, or None for the divergence's temperature; got {revise_temperature!r}"
            )
    ignore_index = integer("ignore_index", ignore_index)
    if not isinstance(standardize, bool):
        raise TypeError(f"standardize must be a bool; got {standardize!r}")
    resolved, policy = resolve(divergence), resolve_revise(revise)
    return Hyperparameters(
        temperatures(temperature),
        ce_weight,
        kd_weight,
        ce_weight_unselected,
        policy,
        eta,
        revise_temperature or 0.0,
        label_smoothing,
        REVISE[policy],
        _choice("reduction", reduction, _REDUCTION),
        ignore_index,
        resolved,
        resolved.parameters,
    )


@functools.lru_cache(maxsize=64, typed=True)
def _checked_before(*, temperature: Any, **keywords: Any) -> Hyperparameters:
    several = temperature if isinstance(temperature, tuple) else (temperature,)
    if any(isinstance(value, Tensor) for value in (*several, *keywords.values())):
        raise TypeError("tensors cannot be cached: their hash does not depend on their value")
    return check_hyperparameters(temperature=temperature, **keywords)


def _check_once(**keywords: Any) -> Hyperparameters:
    """check_hyperparameters, remembered: a training loop passes the same numbers at every step."""
    if not torch.compiler.is_compiling():  # the compiler wants to see through, and runs this once anyway
        try:
            return _checked_before(**keywords)
        except TypeError:
            pass  # an error, which is raised again below, or unhashable: a list of temperatures, a tensor
    return check_hyperparameters(**keywords)


def _check_logits(name: str, logits: Any) -> None:
    if not isinstance(logits, Tensor):
        if isinstance(logits, TopKTeacher):
            raise TypeError(f"{name} must be a Tensor of logits here; got TopKTeacher; pass its .dense(classes)")
        check_tensor(name, logits)
    if logits.dtype not in _LOGIT_DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must have shape (..., C) with C >= 1; got {tuple(logits.shape)}")


def check_class_dimension(name: str, shape: Sequence[int], target: Tensor) -> None:
    """ValueError where the target fits logits of layout (..., C) and of layout (N, C, H, W): they are ambiguous.

    Three dimensions are always (B, T, C), because T = C is common (a byte model over 256 tokens).
    """
    if len(shape) > 3 and (target.is_floating_point() or all(size == shape[-1] for size in shape[1:])):
        raise ValueError(
            f"{name} must have its classes last; with shape {tuple(shape)} they may be in dimension 1: pass rows, "
            f"{name}.movedim(1, -1).flatten(0, -2) for (N, C, H, W) or {name}.flatten(0, -2) for (N, H, W, C), and "
            "the teacher and the target in the same way"
        )


def class_dimension_hint(name: str, shape: Sequence[int], target: Sequence[int]) -> str:
    """A hint for errors, if the shapes fit logits with their classes in dimension 1; else ""."""
    inner = tuple(shape[2:])
    likely = ((shape[0], *inner), (shape[0], *inner, shape[1]), (shape[0], shape[-1], *shape[1:-1]))
    if len(shape) < 3 or tuple(target) not in likely:
        return ""
    return f"; classes must be the last dimension of logits and soft targets: {name}.movedim(1, -1) for (N, C, ...)"


def _check_target(target: object, logits: Tensor, revise: str | None, name: str = "student_logits") -> None:
    if not isinstance(target, Tensor):
        hint = ""
        if isinstance(target, (int, float)):
            hint = f"; the order is (student_logits, teacher_logits, target): pass temperature={target!r} by keyword"
        raise TypeError(f"target must be a Tensor of class indices; got {type(target).__name__} {target!r}{hint}")
    shape, expected = tuple(target.shape), tuple(logits.shape[:-1])
    if target.dtype.is_floating_point:
        if shape != tuple(logits.shape):
            # As many numbers as rows were meant as indices: their type is wrong. Else the shape is.
            error = TypeError if shape == expected else ValueError
            raise error(
                f"target must be int64 or int32 class indices of shape {expected}, or floating probabilities of shape "
                f"{tuple(logits.shape)}; got {target.dtype} of shape {shape}"
                f"{class_dimension_hint(name, logits.shape, shape)}"
            )
        if revise not in ("lr", None):
            raise ValueError(f"revise must be 'lr' or None where target holds probabilities; got {revise!r}")
    elif target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"target must hold int64 or int32 class indices, or floating probabilities; got {target.dtype} of shape "
            f"{shape}"
        )
    elif shape != expected:
        hint = class_dimension_hint(name, logits.shape, shape)
        raise ValueError(f"target must have {name}' leading shape {expected}; got {shape}{hint}")
    if target.device != logits.device:
        raise ValueError(f"target must be on {logits.device} like {name}; got {target.device}")
    if logits.dim() > 3:
        check_class_dimension(name, logits.shape, target)


def _check_topk(teacher: TopKTeacher, classes: int, temperature: list[float]) -> None:
    values, indices, logsumexp = teacher.values, teacher.indices, teacher.logsumexp
    for name, tensor in (("values", values), ("indices", indices), ("logsumexp", logsumexp)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"TopKTeacher.{name} must be a Tensor; got {type(tensor).__name__}")
        if tensor.device != values.device:
            raise ValueError(f"TopKTeacher.{name} must be on {values.device} like its values; got {tensor.device}")
    if values.dim() < 1 or not 1 <= values.shape[-1] <= classes:
        raise ValueError(f"TopKTeacher.values must be (..., k) with 1 <= k <= {classes}; got {tuple(values.shape)}")
    if indices.dtype not in (torch.int64, torch.int32) or indices.shape != values.shape:
        raise ValueError(
            f"TopKTeacher.indices must be int64 or int32 of shape {tuple(values.shape)}; got {indices.dtype} of shape "
            f"{tuple(indices.shape)}"
        )
    if not logsumexp.dtype.is_floating_point or logsumexp.shape != values.shape[:-1]:
        raise ValueError(
            f"TopKTeacher.logsumexp must be floating of shape {tuple(values.shape[:-1])}; got {logsumexp.dtype} of "
            f"shape {tuple(logsumexp.shape)}"
        )
    rest = teacher.rest
    if rest is not None and not (
        isinstance(rest, Tensor) and rest.is_floating_point() and rest.shape == logsumexp.shape
    ):
        got = f"{rest.dtype} of shape {tuple(rest.shape)}" if isinstance(rest, Tensor) else type(rest).__name__
        raise ValueError(f"TopKTeacher.rest must be None or floating of shape {tuple(logsumexp.shape)}; got {got}")
    if rest is not None and rest.device != values.device:
        raise ValueError(f"TopKTeacher.rest must be on {values.device} like its values; got {rest.device}")
    taken_at = number("TopKTeacher.temperature", teacher.temperature)
    if temperature != [taken_at]:
        raise ValueError(
            f"temperature must be {taken_at!r}, at which the TopKTeacher's logsumexp was taken; "
            f"got {temperature[0] if len(temperature) == 1 else tuple(temperature)!r}"
        )


def check_class_weight(class_weight: object, classes: int, device: torch.device) -> None:
    if not isinstance(class_weight, Tensor):
        raise TypeError(f"class_weight must be a Tensor of {classes} weights; got {type(class_weight).__name__}")
    if not class_weight.dtype.is_floating_point:
        raise TypeError(f"class_weight must be floating; got {class_weight.dtype}")
    if tuple(class_weight.shape) != (classes,):
        raise ValueError(f"class_weight must have shape ({classes},); got {tuple(class_weight.shape)}")
    if class_weight.device != device:
        raise ValueError(f"class_weight must be on {device} like student_logits; got {class_weight.device}")


def _check_tensors(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    target: Tensor,
    selected: Tensor | None,
    class_weight: Tensor | None,
    hyperparameters: Hyperparameters,
    teacher_rows: int | None = None,
) -> None:
    _check_logits("student_logits", student_logits)
    shape = student_logits.shape
    classes = shape[-1]
    if isinstance(teacher_logits, TopKTeacher):
        _check_topk(teacher_logits, classes, hyperparameters.temperature)
        teacher = teacher_logits.values
        _check_logits("TopKTeacher.values", teacher)
        teacher_shape: tuple[int, ...] = (*teacher.shape[:-1], classes)
    else:
        teacher = teacher_logits
        _check_logits("teacher_logits", teacher)
        teacher_shape = teacher.shape
        if teacher_shape[-1] != classes:
            raise ValueError(
                f"teacher_logits must have the student's {classes} classes; got shape {tuple(teacher_shape)}"
            )
    if teacher.device != student_logits.device:
        raise ValueError(f"teacher_logits must be on {student_logits.device} like student_logits; got {teacher.device}")
    _check_target(target, student_logits, hyperparameters.policy)
    if class_weight is not None:
        check_class_weight(class_weight, classes, student_logits.device)
    if teacher_rows is not None or teacher_shape != shape:
        check_teacher_rows(shape, teacher_shape, teacher_rows)
    if selected is None:
        return
    if not isinstance(selected, Tensor):
        raise TypeError(f"selected must be a Tensor, bool or floating; got {type(selected).__name__}")
    if selected.dtype != torch.bool and not selected.dtype.is_floating_point:
        raise TypeError(f"selected must be bool, or floating weights in [0, 1]; got {selected.dtype}")
    if teacher_rows is not None:
        raise ValueError(SELECTED_TWICE)
    leading = tuple(shape[:-1])
    rows = math.prod(leading)
    if tuple(selected.shape) not in (leading, (rows,)):
        raise ValueError(f"selected must have the rows' shape {leading} or ({rows},); got {tuple(selected.shape)}")
    if selected.device != student_logits.device:
        raise ValueError(f"selected must be on {student_logits.device} like student_logits; got {selected.device}")


def _readable(tensor: Tensor) -> bool:
    """Whether the values can be read: not on CUDA, where reading synchronises, not while tracing, not under vmap."""
    # Fake tensors are a subclass without data.
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return not functorch.is_functorch_wrapped_tensor(tensor)


def check_values(target: Tensor, selected: Tensor | None, classes: int, ignore_index: int | None) -> None:
    """ValueError for a class index or a weight out of range, with its flattened row, if the values can be read."""
    valid: Tensor | bool = True
    if not target.is_floating_point():
        if not _readable(target):
            return
        target = target.reshape(-1)
        valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
        outside = valid & ((target < 0) | (target >= classes))
        if outside.any():
            row = int(outside.nonzero()[0])
            ignored = "" if ignore_index is None else f" and not ignore_index = {ignore_index}"
            raise ValueError(f"target[{row}] is {int(target[row])}, outside [0, {classes}){ignored}")
    if selected is not None and selected.dtype != torch.bool and _readable(selected):
        selected = selected.reshape(-1)
        bad = valid & ~((selected >= 0) & (selected <= 1))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"selected[{row}] is not a weight in [0, 1]: {float(selected[row])}")


def _check_matrices(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Checks that both logits are (N, C) and of one shape."""
    _check_logits("student_logits", student_logits)
    _check_logits("teacher_logits", teacher_logits)
    if student_logits.dim() != 2 or teacher_logits.shape != student_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must both be (N, C), of one shape; "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )


def check_pair(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> None:
    """Checks (N, C) logits of student and teacher and, unless None, (N,) class indices. ValueError, TypeError."""
    _check_matrices(student_logits, teacher_logits)
    if teacher_logits.device != student_logits.device:
        raise ValueError(
            f"teacher_logits must be on {student_logits.device} like student_logits; got {teacher_logits.device}"
        )
    if target is not None:
        _check_target(target, student_logits, None)
        if target.dtype.is_floating_point:
            raise TypeError(f"target must hold int64 or int32 class indices; got {target.dtype}")
        check_values(target, None, student_logits.shape[-1], None)


def scalar_argument(name: str, value: Tensor | float | None, like: Tensor) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element; got shape {tuple(value.shape)}")
        if value.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like student_logits; got {value.device}")
        return value.detach()
    value = number(name, value, "a number or a tensor of one element")
    if not math.isfinite(value) or value < 0 or (value == 0 and name == "grad_scale"):
        raise ValueError(f"{name} must be finite and {'> 0' if name == 'grad_scale' else '>= 0'}; got {value!r}")
    # torch.full fills on the device: a copy from the host would wait for it.
    return torch.full(
        (),
        value,
        dtype=torch.float64 if like.device.type == "cpu" else torch.float32,
        device=like.device,
    )


def transforms_active() -> bool:
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def _named(codes: dict[Any, int], code: int) -> Any:
    return next(name for name, other in codes.items() if other == code)


def composite(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    selected: Tensor | None,
    class_weight: Tensor | None,
    teacher_indices: Tensor | None,
    teacher_rest: Tensor | None,
    num_valid: Tensor | None,
    weight_sum: Tensor | None,
    grad_scale: Tensor | None,
    temperature: list[float],
    ce_weight: float,
    kd_weight: float,
    ce_weight_unselected: float,
    eta: float,
    revise_temperature: float,
    label_smoothing: float,
    revise: int,
    reduction: int,
    ignore_index: int,
    divergence: int,
    divergence_parameters: list[float],
    standardize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator kd_loss in PyTorch ops, for torch.func and for forward-mode and higher-order derivatives."""
    check_values(target, selected, student.shape[-1], ignore_index)
    given: Tensor | TopKTeacher = teacher
    if teacher_indices is not None and teacher_rest is not None:
        log_sum = torch.logaddexp((teacher / temperature[0]).logsumexp(dim=-1), teacher_rest)
        given = TopKTeacher(teacher, teacher_indices, log_sum, temperature[0], teacher_rest)
    parts = reference.kd_loss_parts(
        student,
        given,
        target,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        ce_weight_unselected=ce_weight_unselected,
        revise=_named(REVISE, revise),
        eta=eta,
        revise_temperature=revise_temperature or None,
        selected=selected,
        # The caller has checked that a teacher with fewer rows is given with teacher_rows.
        teacher_rows=None if selected is not None else math.prod(teacher.shape[:-1]),
        divergence=from_code(divergence, divergence_parameters),
        standardize=standardize,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=_named(_REDUCTION, reduction),
        num_valid=num_valid,
        weight_sum=weight_sum,
        grad_scale=grad_scale,
    )
    return parts.loss, parts.ce, parts.kd, torch.stack(parts[3:])


_ops.implement_composite(composite)


def _call(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    target: Tensor,
    *,
    temperature: float | Sequence[float],
    ce_weight: float,
    kd_weight: float,
    ce_weight_unselected: float | None,
    revise: str | None,
    eta: float,
    revise_temperature: float | None,
    selected: Tensor | None,
    teacher_rows: int | None,
    divergence: str | Divergence,
    standardize: bool,
    label_smoothing: float,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    num_valid: Tensor | float | None,
    weight_sum: Tensor | float | None,
    grad_scale: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checked = _check_once(
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        ce_weight_unselected=ce_weight_unselected,
        revise=revise,
        eta=eta,
        revise_temperature=revise_temperature,
        divergence=divergence,
        standardize=standardize,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    _check_tensors(student_logits, teacher_logits, target, selected, class_weight, checked, teacher_rows)
    indices = rest = None
    if isinstance(teacher_logits, TopKTeacher):
        indices, rest = teacher_logits.indices, teacher_logits.remainder(student_logits.shape[-1])
        teacher_logits = teacher_logits.values
    # torch.func cannot differentiate a C++ autograd function.
    operator = composite if transforms_active() else _ops.kd_loss
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = operator(
        student_logits,
        teacher_logits,
        target,
        selected,
        class_weight,
        indices,
        rest,
        scalar_argument("num_valid", num_valid, student_logits),
        scalar_argument("weight_sum", weight_sum, student_logits),
        scalar_argument("grad_scale", grad_scale, student_logits),
        checked.temperature,
        checked.ce_weight,
        checked.kd_weight,
        checked.ce_weight_unselected,
        checked.eta,
        checked.revise_temperature,
        checked.label_smoothing,
        checked.revise,
        checked.reduction,
        checked.ignore_index,
        checked.divergence.code,
        checked.divergence_parameters,
        standardize,
    )
    return outputs


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    target: Tensor,
    *args: object,
    temperature: float | Sequence[float] = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    ce_weight_unselected: float | None = None,
    revise: str | None = "lr",
    eta: float = 0.8,
    revise_temperature: float | None = REVISE_TEMPERATURE,
    selected: Tensor | None = None,
    teacher_rows: int | None = None,
    divergence: str | Divergence = "kl",
    standardize: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: Tensor | float | None = None,
    weight_sum: Tensor | float | None = None,
    grad_scale: Tensor | float | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """ce_weight * CE(z, y) + kd_weight * D(p', q): label revision and distillation in one pass over the logits.

    q = softmax(z / T) is the student, p' the teacher's softmax(v / T) with its wrong rows revised, D a divergence
    (T^2 KL(p' || q) by default). One pass reads every logit once and writes the gradient with the loss; backward only
    scales it.

    student_logits: (..., C) float64/float32/bfloat16/float16, last stride 1 (else copied), any row stride.
    teacher_logits: the same shape, any of these dtypes, no gradient. A TopKTeacher is a cached teacher. With
        teacher_rows it has only the first rows.
    target: (...) int64/int32 class indices in [0, C), or ignore_index; or (..., C) floating probabilities (mixup,
        CutMix, soft labels). An index out of range: ValueError on the CPU; on CUDA (no synchronisation) that row's
        loss and gradient are NaN. Classes come last: pass logits (N, C, H, W) as movedim(1, -1). Four dimensions are an
        error where the layout is ambiguous (a floating target, or H = W = C): flatten the rows.
    temperature: T > 0; of several, the terms are added.
    ce_weight, kd_weight: independent weights >= 0; a term of weight 0 is not computed.
    ce_weight_unselected: CE weight of rows without teacher. Default: ce_weight + kd_weight if that is <= 1, else
        max(ce_weight, 1), so that a row's supervision does not shrink when the teacher is silent.
    revise: what happens to p, made at revise_temperature, where the teacher's top class is not the target (a tie that
        the target takes part in counts as right). "lr": beta = eta / (1 + p_max - p_y), p' = beta p + (1 - beta)
        one_hot(y), so the target wins by exactly 1 - eta. "mft": the same there, and on right rows p'_y = min(1, p_y +
        1 - eta). "swap": the target's logit and the top one change places. None or "none": p' = p. With probabilities
        as target, "lr" mixes towards them: beta = eta m / (m + p_max - p_y), m the difference of the target's two
        largest probabilities. For this the target is clamped to >= 0 and normalised; rows of zeros are not revised. The
        cross-entropy uses the target unchanged, like F.cross_entropy. Where "mft" reaches p'_y = 1, "rkl" and
        "mse_logits" are infinite.
    revise_temperature: R > 0: "lr" and "mft" revise softmax(v / R), and p' is softmax(v' / T) of the revised logits v'
        (of which "lr" moves the target's alone), so that the margin 1 - eta does not grow with T. All temperatures have
        the same v'. Default: 1. None: p' is made at each T itself, as published; the same as R = T.
    selected: (...) or (N,), bool or weights w in [0, 1]. A row's CE weight is w * ce_weight + (1 - w) *
        ce_weight_unselected, its KD weight w * kd_weight. None: every row.
    teacher_rows: int K >= 0 if teacher_logits has only the first K of the N flattened rows, (K, C) or (B', ..., C).
        These rows are the selected ones, and `selected` must be None. None: the teacher must have all N rows.
    divergence: "kl", "rkl", "dkd", "rld", "nkd", "mse_logits", "mse_probs", "jsd", or one of lrds_fast.divergences
        with its own parameters, DKD(alpha=1, beta=2). "rld" replaces revision.
    standardize: the divergence sees (x - mean) / (std + 1e-7) of both logits' rows instead of the logits.
    label_smoothing, class_weight: (C,) floating, of the CE term, as in F.cross_entropy.
    ignore_index: rows with this target are not read.
    reduction: "mean" over rows that are not ignored (selected or not; with class_weight the CE sum is divided by their
        weights' sum instead), "elementmean" over those rows times C, "sum", or "none" (the rows' shape, ignored rows
        0). No valid row: loss 0, gradient 0.
    num_valid, weight_sum: numbers or 0-d tensors that replace the means' row count and weight sum. On the CPU a
        num_valid below 0, or NaN in either, raises ValueError. DDP averages the gradients of its processes, so for the
        mean over all of their rows divide the total count by the number of processes:

            count = (target != -100).sum()
            torch.distributed.all_reduce(count)
            loss = kd_loss(student_logits, teacher_logits, target, num_valid=count / torch.distributed.get_world_size())

        With gradient accumulation, count the rows of all micro-batches of the step; without DDP, do not divide. The
        same holds for weight_sum.
    grad_scale: a number or 0-d tensor: the factor the coming grad_output will carry (GradScaler._scale). It never
        changes the result; it is folded in before a 16-bit gradient is rounded.

    Numbers may be of Python or NumPy, or CPU tensors of shape () that require no gradient.
    -inf logits (excluded classes) are legal but for standardize and one-sided mse_logits.
    Only student_logits gets derivatives. Higher-order (create_graph=True), forward-mode and torch.func derivatives are
    computed by the PyTorch ops of lrds_fast.reference, at their cost. The inputs are kept alive until backward for
    them. An input that was changed in place raises an error in a second derivative; a first derivative either raises an
    error or is right.
    Returns a float32 tensor (float64 if any logits are); the gradient has student_logits' dtype. Deterministic: the
    same bits for any thread count. Nothing synchronises on CUDA. Raises ValueError or TypeError naming the argument.
    Source: Lan et al., "Improve Knowledge Distillation via Label Revision and Data Selection", arXiv 2404.03693; the
    divergences' sources are in lrds_fast.divergences.
    """
    if args:
        raise TypeError(
            "kd_loss takes (student_logits, teacher_logits, target), the rest by keyword; got a fourth argument "
            f"{args[0]!r}: write temperature=... (or whichever you meant)"
        )
    if unknown:
        raise unknown_keyword(kd_loss, unknown)
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
        revise_temperature=revise_temperature,
        selected=selected,
        teacher_rows=teacher_rows,
        divergence=divergence,
        standardize=standardize,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        num_valid=num_valid,
        weight_sum=weight_sum,
        grad_scale=grad_scale,
    )[0]


def kd_loss_parts(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    target: Tensor,
    *,
    temperature: float | Sequence[float] = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    ce_weight_unselected: float | None = None,
    revise: str | None = "lr",
    eta: float = 0.8,
    revise_temperature: float | None = REVISE_TEMPERATURE,
    selected: Tensor | None = None,
    teacher_rows: int | None = None,
    divergence: str | Divergence = "kl",
    standardize: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: Tensor | float | None = None,
    weight_sum: Tensor | float | None = None,
    grad_scale: Tensor | float | None = None,
    **unknown: NoReturn,
) -> KDLossParts:
    """kd_loss with what it is made of, for logging: (loss, ce, kd, n_valid, n_selected, n_revised).

    Arguments as kd_loss. ce and kd are weighted and reduced like loss and detached, loss = ce + kd; the counts are 0-d
    int64 tensors on the logits' device. Nothing synchronises.
    """
    if unknown:
        raise unknown_keyword(kd_loss_parts, unknown)
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
        revise_temperature=revise_temperature,
        selected=selected,
        teacher_rows=teacher_rows,
        divergence=divergence,
        standardize=standardize,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        num_valid=num_valid,
        weight_sum=weight_sum,
        grad_scale=grad_scale,
    )
    n_valid, n_selected, n_revised = counts.unbind()
    return KDLossParts(loss, ce, kd, n_valid, n_selected, n_revised)


def revise_labels(
    teacher_logits: Tensor,
    target: Tensor,
    *,
    eta: float = 0.8,
    revise_temperature: float | None = REVISE_TEMPERATURE,
    temperature: float = 1.0,
    policy: str = "lr",
) -> Tensor:
    """softmax(teacher_logits / temperature), corrected where the teacher's top class is not `target`.

    teacher_logits: (..., C) floating. target: (...) int64/int32 in [0, C), or (..., C) floating probabilities with
    policy "lr" (normalised, as in kd_loss). policy: "lr", "mft" or "swap", kd_loss's `revise`. Returns (..., C)
    probabilities, float32 (float64 for float64 logits), without gradient. On rows that "lr" corrects the other classes
    keep their ratios, and at revise_temperature (1; None: `temperature`) the target wins by exactly 1 - eta; the result
    is then softened to `temperature`. kd_loss applies the same revision without forming this tensor. Raises ValueError
    for eta outside (0, 1), temperature <= 0, revise_temperature <= 0, mismatched shapes or, on the CPU, a target
    outside [0, C); TypeError for wrong dtypes. Source: Lan et al., arXiv 2404.03693, label revision.
    """
    checked = check_hyperparameters(
        temperature=[temperature],
        ce_weight=1.0,
        kd_weight=1.0,
        ce_weight_unselected=1.0,
        revise="lr",
        eta=eta,
        revise_temperature=revise_temperature,
        divergence="kl",
        label_smoothing=0.0,
        ignore_index=-100,
        reduction="mean",
    )
    _choice("policy", policy, {name: code for name, code in REVISE.items() if name is not None})
    _check_logits("teacher_logits", teacher_logits)
    _check_target(target, teacher_logits, policy, "teacher_logits")
    check_values(target, None, teacher_logits.shape[-1], None)
    (temperature,) = checked.temperature
    return reference.revise_labels(
        teacher_logits,
        target,
        eta=checked.eta,
        revise_temperature=checked.revise_temperature or None,
        temperature=temperature,
        policy=policy,
    )


def kd_logit_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Sequence[float] = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    revise: str | None = "lr",
    eta: float = 0.8,
    revise_temperature: float | None = REVISE_TEMPERATURE,
    divergence: str | Divergence = "kl",
    standardize: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Each row's d/dz [ce_weight * CE(z, y) + kd_weight * D(p', q)], without any 1/N: influence's delta.

    student_logits, teacher_logits: (N, C) floating. target: (N,) int64/int32 in [0, C), or (N, C) probabilities.
    Weights are finite and may be negative (a difference of two losses); a term of weight 0 is not computed and its
    logits are not read. The rest as in kd_loss. Returns (N, C) float32 (float64 if any logits are), without gradient.
    The arithmetic is kd_loss's own kernel.
    """
    ce_weight, kd_weight = number("ce_weight", ce_weight), number("kd_weight", kd_weight)
    checked = check_hyperparameters(
        temperature=temperature,
        ce_weight=abs(ce_weight),
        kd_weight=abs(kd_weight),
        ce_weight_unselected=1.0,
        revise=revise,
        eta=eta,
        revise_temperature=revise_temperature,
        divergence=divergence,
        standardize=standardize,
        label_smoothing=label_smoothing,
        ignore_index=-100,
        reduction="sum",
    )
    _check_matrices(student_logits, teacher_logits)
    _check_tensors(student_logits, teacher_logits, target, None, class_weight, checked)
    gradient: Tensor = _ops.kd_logit_gradient(
        student_logits.detach(),
        teacher_logits.detach(),
        target,
        None,
        class_weight,
        *[None] * 5,
        checked.temperature,
        ce_weight,
        kd_weight,
        ce_weight,
        checked.eta,
        checked.revise_temperature,
        checked.label_smoothing,
        checked.revise,
        checked.reduction,
        -100,
        checked.divergence.code,
        checked.divergence_parameters,
        standardize,
    )
    return gradient


class KDMoments(NamedTuple):
    """What a row's two logit gradients g = d CE / dz and h = d KD / dz amount to, each (N,); see kd_moments.

    ce, kd: the terms themselves. ce_ce, kd_kd, ce_kd: g.g, h.h, g.h. ce_along, kd_along: g.r, h.r along the direction
    r. target: r_y - mean(r). top: the teacher's top class, int64: the target where it is one, else the lowest.
    """

    ce: Tensor
    kd: Tensor
    ce_ce: Tensor
    kd_kd: Tensor
    ce_kd: Tensor
    ce_along: Tensor
    kd_along: Tensor
    target: Tensor
    top: Tensor


def kd_moments(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    direction: Tensor | None = None,
    temperature: float | Sequence[float] = 4.0,
    revise: str | None = "lr",
    eta: float = 0.8,
    revise_temperature: float | None = REVISE_TEMPERATURE,
    divergence: str | Divergence = "kl",
    standardize: bool = False,
) -> KDMoments:
    """CE, KD and the products of their logit gradients, row by row, in one pass that writes no gradient.

    Both terms have weight 1 and there is no 1/N: any score made of the losses, the gradients' norms, their angle or
    their components along a direction follows (influence: kd_gain, conflict, el2n, ...).

    student_logits, teacher_logits: (N, C) floating. target: (N,) int64/int32 in [0, C). direction: r, (N, C) floating
    on the same device; None: r = 0. revise: "lr", "mft" or None. The rest as in kd_loss. Returns KDMoments in float32
    (float64 if any logits are), without gradient. Raises as kd_loss does; on CUDA a target out of range makes its row
    NaN.
    """
    checked = check_hyperparameters(
        temperature=temperature,
        ce_weight=1.0,
        kd_weight=1.0,
        ce_weight_unselected=1.0,
        revise=revise,
        eta=eta,
        revise_temperature=revise_temperature,
        divergence=divergence,
        standardize=standardize,
        label_smoothing=0.0,
        ignore_index=-100,
        reduction="sum",
    )
    _check_matrices(student_logits, teacher_logits)
    _check_tensors(student_logits, teacher_logits, target, None, None, checked)
    if target.is_floating_point():
        raise ValueError(f"target must hold class indices; got {target.dtype} probabilities")
    if checked.policy == "swap":
        raise ValueError("revise must be 'lr', 'mft' or None here; got 'swap'")
    moments, top = _ops.kd_moments(
        student_logits.detach(),
        teacher_logits.detach(),
        target,
        *[None] * 7,
        checked.temperature,
        1.0,
        1.0,
        1.0,
        checked.eta,
        checked.revise_temperature,
        0.0,
        checked.revise,
        checked.reduction,
        -100,
        checked.divergence.code,
        checked.divergence_parameters,
        standardize,
        direction,
    )
    ce, kd, ce_ce, kd_kd, ce_kd, ce_along, kd_along, at_target = moments.unbind()
    return KDMoments(ce, kd, ce_ce, kd_kd, ce_kd, ce_along, kd_along, at_target, top)
