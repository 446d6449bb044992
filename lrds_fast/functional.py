"""The loss as functions: their documentation and the way from their arguments to the operators of csrc/."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from lrds_fast import _ops, reference
from lrds_fast.arguments import (
    check_class_weight,
    check_logits,
    check_matrices,
    check_selected,
    check_target,
    check_teacher_rows,
    check_values,
    scalar_argument,
    unknown_keyword,
)
from lrds_fast.divergences import REVISE, REVISE_TEMPERATURE, Divergence
from lrds_fast.logit_maps import IDENTITY, LogitMap, LogitScale, Softcap, common_classes, logit_maps
from lrds_fast.options import (
    DivergenceKeywords,
    KDOptions,
    cached_kd_options,
    check_policy,
    kd_options,
    without_target,
)
from lrds_fast.options import temperatures as temperatures
from lrds_fast.reference import KDLossParts
from lrds_fast.topk import TopKTeacher, check_topk

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["KDLossParts", "kd_logit_gradient", "kd_loss", "kd_loss_parts", "revise_labels"]

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""loss, ce, kd and the three counts of KDLossParts, as the operator returns them."""


def _check_tensors(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    target: Tensor,
    options: KDOptions,
    selected: Tensor | None = None,
    teacher_rows: int | None = None,
    class_weight: Tensor | None = None,
) -> None:
    check_logits("student_logits", student_logits)
    shape = student_logits.shape
    classes = shape[-1]
    if isinstance(teacher_logits, TopKTeacher):
        check_topk(teacher_logits, classes, options.temperature)
        teacher = teacher_logits.values
        check_logits("TopKTeacher.values", teacher)
        teacher_shape: tuple[int, ...] = (*teacher.shape[:-1], classes)
    else:
        teacher = teacher_logits
        check_logits("teacher_logits", teacher)
        teacher_shape = teacher.shape
        if teacher_shape[-1] != classes:
            raise ValueError(
                f"teacher_logits must have the student's {classes} classes; got shape {tuple(teacher_shape)}: if the "
                "larger vocabulary is padded, pass classes='truncate'"
            )
    if teacher.device != student_logits.device:
        raise ValueError(f"teacher_logits must be on {student_logits.device} like student_logits; got {teacher.device}")
    check_target(target, student_logits)
    if options.revise > REVISE["lr"] and target.is_floating_point():
        raise ValueError(f"revise must be 'lr' or None where target holds probabilities; got {options.policy()!r}")
    if class_weight is not None:
        check_class_weight(class_weight, classes, student_logits.device)
    if teacher_rows is not None or teacher_shape != shape:
        check_teacher_rows(shape, teacher_shape, teacher_rows)
    check_selected(selected, student_logits, teacher_rows)


def transforms_active() -> bool:
    """Whether a transform of torch.func is running."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


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
    *options: Any,
) -> _Outputs:
    """The operator kd_loss in PyTorch ops, for torch.func and for forward-mode and higher-order derivatives.

    options: the fields of KDOptions. grad_scale is not needed: nothing is rounded here.
    """
    checked = KDOptions(*options)
    check_values(target, selected, student.shape[-1], checked.ignore_index)
    cached: Tensor | TopKTeacher = teacher
    if teacher_indices is not None and teacher_rest is not None:
        temperature = checked.temperature[0]
        log_sum = torch.logaddexp((teacher / temperature).logsumexp(dim=-1), teacher_rest)
        cached = TopKTeacher(teacher, teacher_indices, log_sum, temperature, teacher_rest)
    parts = reference.loss_parts(
        student,
        cached,
        target,
        checked,
        selected=selected,
        # The caller has checked that a teacher with fewer rows comes with teacher_rows.
        teacher_rows=None if selected is not None else math.prod(teacher.shape[:-1]),
        class_weight=class_weight,
        num_valid=num_valid,
        weight_sum=weight_sum,
    )
    return parts.loss, parts.ce, parts.kd, torch.stack(parts[3:])


_ops.implement_composite(composite)


def _cut(
    student_logits: Tensor, teacher_logits: Tensor | TopKTeacher, classes: str
) -> tuple[Tensor, Tensor | TopKTeacher]:
    """Both logits without the classes that only the larger vocabulary has."""
    check_logits("student_logits", student_logits)
    if isinstance(teacher_logits, TopKTeacher):
        raise ValueError(f"classes must be 'equal' with a TopKTeacher, which has no padding; got {classes!r}")
    check_logits("teacher_logits", teacher_logits)
    common = common_classes(classes, student_logits.shape[-1], teacher_logits.shape[-1])
    if common is None:
        return student_logits, teacher_logits
    return student_logits[..., :common], teacher_logits[..., :common]


def _mapped(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    target: Tensor,
    options: KDOptions,
    selected: Tensor | None,
    teacher_rows: int | None,
    maps: tuple[LogitMap, LogitMap],
) -> tuple[Tensor, Tensor | TopKTeacher]:
    """Both logits scaled and capped; the arguments are checked."""
    student_map, teacher_map = maps
    if not isinstance(teacher_logits, TopKTeacher):
        teacher_logits = teacher_map(teacher_logits.detach())
    elif teacher_map != IDENTITY:
        raise ValueError(
            "logit_scale and softcap cannot act on a TopKTeacher, whose sums are taken: apply them before it is "
            "made, and pass pairs (student's, 1.0) and (student's, None)"
        )
    if student_map.softcap:
        # Rows that no term reads may hold NaN, and 0 times the cap's derivative of NaN would be NaN.
        lead = student_logits.shape[:-1]
        unread = [] if target.is_floating_point() else [target == options.ignore_index]
        if options.ce_weight_unselected == 0 and selected is not None:
            unread.append((selected == 0).reshape(lead))
        if options.ce_weight_unselected == 0 and teacher_rows is not None:
            rows = torch.arange(math.prod(lead), device=student_logits.device)
            unread.append((rows >= teacher_rows).reshape(lead))
        for mask in unread:
            student_logits = student_logits.masked_fill(mask[..., None], 0.0)
    return student_map(student_logits), teacher_logits


def _call(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    target: Tensor | None,
    options: KDOptions,
    selected: Tensor | None,
    teacher_rows: int | None,
    class_weight: Tensor | None,
    num_valid: Tensor | float | None,
    weight_sum: Tensor | float | None,
    grad_scale: Tensor | float | None,
    classes: str,
    logit_scale: LogitScale,
    softcap: Softcap,
) -> _Outputs:
    """Checks the tensors and calls the operator kd_loss."""
    if "DTensor" in [type(tensor).__name__ for tensor in (student_logits, teacher_logits, target, selected)]:
        from lrds_fast.sharded import sharded_call  # torch.distributed.tensor takes a second to import

        tensors = (student_logits, teacher_logits, target, options, selected, teacher_rows, class_weight)
        return sharded_call(_call, *tensors, num_valid, weight_sum, grad_scale, classes, logit_scale, softcap)
    if classes != "equal":
        student_logits, teacher_logits = _cut(student_logits, teacher_logits, classes)
    maps = None
    if type(logit_scale) is not float or logit_scale != 1.0 or softcap is not None:
        maps = logit_maps(logit_scale, softcap)
    if target is None:
        options = without_target(options, partial=selected is not None or teacher_rows is not None)
        check_logits("student_logits", student_logits)
        target = student_logits.new_zeros(student_logits.shape[:-1], dtype=torch.long)
    _check_tensors(student_logits, teacher_logits, target, options, selected, teacher_rows, class_weight)
    if maps is not None:
        student_logits, teacher_logits = _mapped(
            student_logits, teacher_logits, target, options, selected, teacher_rows, maps
        )
    indices = rest = None
    if isinstance(teacher_logits, TopKTeacher):
        indices, rest = teacher_logits.indices, teacher_logits.remainder(student_logits.shape[-1])
        teacher_logits = teacher_logits.values
    # torch.func cannot differentiate a C++ autograd function.
    operator = composite if transforms_active() else _ops.kd_loss
    outputs: _Outputs = operator(
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
        *options,
    )
    return outputs


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    target: Tensor | None = None,
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
    classes: str = "equal",
    logit_scale: LogitScale = 1.0,
    softcap: Softcap = None,
    **unknown: NoReturn,
) -> Tensor:
    """ce_weight * CE(z, y) + kd_weight * D(p', q): label revision and distillation in one fused kernel.

    q = softmax(z / T) is the student, p' the teacher's softmax(v / T) after label revision, and D a divergence
    (T^2 KL(p' || q) by default). The forward pass writes the gradient with the loss, and backward only multiplies
    it. It reads every logit from memory once; on CUDA, rows that do not fit in shared memory are read again.

    student_logits: (..., C) float64/float32/bfloat16/float16, last stride 1 (else copied), any row stride.
    teacher_logits: the same shape, any of these dtypes, no gradient; or a TopKTeacher (cached logits). With
        teacher_rows it has the first rows only.
    target: (...) int64/int32 class indices in [0, C), or ignore_index; or (..., C) floating probabilities (mixup,
        CutMix, soft labels). An index out of range raises ValueError on the CPU; on CUDA, which does not synchronise,
        the row's loss and gradient are NaN. Classes come last: pass logits (N, C, H, W) as movedim(1, -1). Four
        dimensions whose layout is ambiguous (a floating target, or H = W = C) are an error: flatten the rows. None: the
        teacher's term alone, over all rows; ce_weight must be 0, revise None, and the divergence one that does not
        treat the target apart (not "dkd", "rld", "nkd").
    temperature: T > 0, or several, whose terms are added.
    ce_weight, kd_weight: independent weights >= 0; a term of weight 0 is not computed.
    ce_weight_unselected: CE weight of rows without a teacher. Default: ce_weight + kd_weight if that is <= 1, else
        max(ce_weight, 1), so that these rows have as much weight as the others.
    revise: the label revision of wrong rows, where the top class is not the target (a tie with the target counts as
        right). p is softmax(v / revise_temperature). "lr": p' = beta p + (1 - beta) one_hot(y) with beta = eta / (1 +
        p_max - p_y), so that the target exceeds the next class by exactly 1 - eta. "mft": the same on wrong rows, and
        p'_y = min(1, p_y + 1 - eta) on right rows; where that is 1, "rkl" and "mse_logits" are infinite. "swap": the
        logits of the target and of the top class are exchanged. None or "none": p' = p. If the target holds
        probabilities, "lr" mixes p with them: beta = eta m / (m + p_max - p_y), m the difference of the target's two
        largest probabilities. For this the target is clamped to >= 0 and normalised; rows of zeros are not revised.
        The cross-entropy uses the target unchanged, like F.cross_entropy.
    eta: in (0, 1).
    revise_temperature: R > 0: "lr" and "mft" revise softmax(v / R), and p' is softmax(v' / T) of the revised logits v'.
        "lr" changes the target's logit only, and the margin 1 - eta does not grow with T. Several temperatures share
        v'. Default: 1. None: the revision is at each T itself, as published, which is R = T.
    selected: (...) or (N,), bool or weights w in [0, 1]. A row's CE weight is w * ce_weight + (1 - w) *
        ce_weight_unselected, its KD weight w * kd_weight. None: every row.
    teacher_rows: int K >= 0 if teacher_logits has only the first K of the N flattened rows, (K, C) or (B', ..., C).
        These rows are the selected ones, and `selected` must be None. None: the teacher must have all N rows.
    divergence: "kl", "rkl", "dkd", "rld", "nkd", "mse_logits", "mse_probs", "jsd", "tvd", "skl", "srkl", or an object
        of lrds_fast.divergences with its parameters, as DKD(alpha=1, beta=2). "rld" replaces the revision.
    standardize: the divergence uses (x - mean) / (std + 1e-7) of both logits' rows instead of the logits.
    label_smoothing, class_weight: (C,) floating, of the CE term, as in F.cross_entropy.
    ignore_index: rows with this target are not read.
    reduction: "mean" over the rows that are not ignored, selected or not (with class_weight, the CE sum is divided by
        the sum of their weights instead); "elementmean" over these rows times C; "sum"; or "none" (the rows' shape,
        ignored rows 0). Without a valid row, loss and gradient are 0.
    num_valid, weight_sum: numbers or 0-d tensors that replace the mean's row count and weight sum. On the CPU a
        num_valid below 0, or NaN in either, raises ValueError. DDP averages the gradients of its processes, so for the
        mean over all of their rows divide the total count by the number of processes:

            count = (target != -100).sum()
            torch.distributed.all_reduce(count)
            loss = kd_loss(student_logits, teacher_logits, target, num_valid=count / torch.distributed.get_world_size())

        With gradient accumulation, count the rows of all micro-batches of the step; without DDP, do not divide. The
        same holds for weight_sum.
    grad_scale: a number or 0-d tensor, the factor that grad_output will have (GradScaler._scale). It does not change
        the result: the gradient is multiplied by it before it is rounded to 16 bits, which avoids underflow.
    classes: "equal": both have C classes. "truncate": the larger vocabulary is cut to the smaller one, as where a head
        is padded to a multiple of 128; the gradient of the classes that are cut is 0.
    logit_scale, softcap: s > 0 and c > 0, or None: the loss takes c tanh(s x / c), or s x, for x the logits of both. A
        pair is (student's, teacher's). Logits of a Hugging Face model have its scale and cap already; those made from
        hidden states do not. PyTorch ops compute it in the logits' dtype, with a tensor of the logits' size for each.
        A soft cap maps -inf to -c, so that it excludes no class.

    DTensors whose rows are sharded or replicated are legal: student_logits, teacher_logits, target and selected alike.
    Means are over all rows, and the result is a DTensor: loss.full_tensor() is the number. Sharded classes raise
    ValueError.
    Numbers may be of Python or NumPy, or CPU tensors of shape () that require no gradient.
    -inf logits (excluded classes) are legal, except with standardize and with mse_logits if only one side has them.
    Only student_logits gets derivatives. The PyTorch ops of lrds_fast.reference compute higher-order
    (create_graph=True), forward-mode and torch.func derivatives, at their own speed and memory. For these, the inputs
    are kept alive until backward. If an input was changed in place, a second derivative raises an error, and a first
    derivative is right or raises an error.
    Returns a float32 tensor (float64 if any logits are); the gradient has student_logits' dtype. The bits do not depend
    on the number of threads. Nothing synchronises on CUDA. Raises ValueError or TypeError naming the argument.
    Source: Lan et al., "Improve Knowledge Distillation via Label Revision and Data Selection", arXiv 2404.03693; the
    divergences' sources are in lrds_fast.divergences.
    """
    if args:
        raise TypeError(
            "kd_loss takes (student_logits, teacher_logits, target), and all else by keyword; got a fourth argument "
            f"{args[0]!r}: pass it by its name, for example temperature=..."
        )
    if unknown:
        raise unknown_keyword(kd_loss, unknown)
    options = cached_kd_options(
        temperature,
        ce_weight,
        kd_weight,
        ce_weight_unselected,
        revise,
        eta,
        revise_temperature,
        divergence,
        standardize,
        label_smoothing,
        ignore_index,
        reduction,
    )
    return _call(
        student_logits,
        teacher_logits,
        target,
        options,
        selected,
        teacher_rows,
        class_weight,
        num_valid,
        weight_sum,
        grad_scale,
        classes,
        logit_scale,
        softcap,
    )[0]


def kd_loss_parts(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher,
    target: Tensor | None = None,
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
    classes: str = "equal",
    logit_scale: LogitScale = 1.0,
    softcap: Softcap = None,
    unweighted: bool = False,
    **unknown: NoReturn,
) -> KDLossParts:
    """kd_loss with its terms and counts, for logging: (loss, ce, kd, n_valid, n_selected, n_revised).

    Arguments and errors as kd_loss. ce and kd have the weights and the reduction of loss and are detached; loss = ce +
    kd. The counts are 0-d int64 tensors on the logits' device. Nothing synchronises.

    unweighted: ce and kd come without ce_weight, ce_weight_unselected and kd_weight, with the same reduction: loss =
    ce_weight * ce + kd_weight * kd where all rows are selected. kd keeps the rows' own weights in selected. A term
    costs another pass over the logits, without a gradient, if its weight is 0 or, for ce, differs between rows. ce is 0
    without a target.
    """
    if unknown:
        raise unknown_keyword(kd_loss_parts, unknown)
    options = cached_kd_options(
        temperature,
        ce_weight,
        kd_weight,
        ce_weight_unselected,
        revise,
        eta,
        revise_temperature,
        divergence,
        standardize,
        label_smoothing,
        ignore_index,
        reduction,
    )

    def call(options: KDOptions) -> _Outputs:
        return _call(
            student_logits,
            teacher_logits,
            target,
            options,
            selected,
            teacher_rows,
            class_weight,
            num_valid,
            weight_sum,
            grad_scale,
            classes,
            logit_scale,
            softcap,
        )

    loss, ce, kd, counts = call(options)
    if unweighted:
        one_ce_weight = options.ce_weight == options.ce_weight_unselected or (selected is None and teacher_rows is None)
        with torch.no_grad():
            if one_ce_weight and options.ce_weight > 0:
                ce = ce / options.ce_weight
            elif target is not None:
                _, ce, _, _ = call(options._replace(ce_weight=1.0, ce_weight_unselected=1.0, kd_weight=0.0))
            if options.kd_weight > 0:
                kd = kd / options.kd_weight
            else:
                _, _, kd, _ = call(options._replace(ce_weight=0.0, ce_weight_unselected=0.0, kd_weight=1.0))
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
    """softmax(teacher_logits / temperature), revised where the teacher's top class is not `target`.

    teacher_logits: (..., C) floating. target: (...) int64/int32 in [0, C), or (..., C) floating probabilities with
    policy "lr" (normalised, as in kd_loss). policy: "lr", "mft" or "swap", kd_loss's `revise`. Returns (..., C)
    probabilities, float32 (float64 for float64 logits), without gradient. On wrong rows "lr" keeps the ratios between
    the other classes. At revise_temperature (1; None: `temperature`) the target exceeds the next class by exactly 1 -
    eta; the revised logits are then divided by `temperature`. kd_loss applies the same revision and never stores this
    tensor. Raises ValueError for eta outside (0, 1), temperature <= 0, revise_temperature <= 0, mismatched shapes or,
    on the CPU, a target outside [0, C); TypeError for wrong dtypes. Source: Lan et al., arXiv 2404.03693, label
    revision.
    """
    checked = kd_options(temperature=[temperature], eta=eta, revise_temperature=revise_temperature)
    check_policy(policy)
    check_logits("teacher_logits", teacher_logits)
    check_target(target, teacher_logits, "teacher_logits")
    if policy != "lr" and target.is_floating_point():
        raise ValueError(f"revise must be 'lr' or None where target holds probabilities; got {policy!r}")
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
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    **divergence: Unpack[DivergenceKeywords],
) -> Tensor:
    """Each row's d/dz [ce_weight * CE(z, y) + kd_weight * D(p', q)], without any 1/N: influence's delta.

    student_logits, teacher_logits: (N, C) floating. target: (N,) int64/int32 in [0, C), or (N, C) probabilities.
    Weights are finite and may be negative (the difference of two losses); a term of weight 0 is not computed and its
    logits are not read. **divergence: temperature, revise, eta, revise_temperature, divergence, standardize. All
    keywords are kd_loss's. Returns (N, C) float32 (float64 if any logits are), without gradient, from kd_loss's kernel.
    Raises as kd_loss does.
    """
    options = kd_options(
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        ce_weight_unselected=ce_weight,
        signed=True,
        label_smoothing=label_smoothing,
        ignore_index=-100,
        reduction="sum",
        **divergence,
    )
    check_matrices(student_logits, teacher_logits)
    _check_tensors(student_logits, teacher_logits, target, options, class_weight=class_weight)
    gradient: Tensor = _ops.kd_logit_gradient(
        student_logits.detach(), teacher_logits.detach(), target, None, class_weight, *[None] * 5, *options
    )
    return gradient


class KDMoments(NamedTuple):
    """Products of a row's two logit gradients g = d CE / dz and h = d KD / dz, each (N,); see kd_moments.

    ce, kd: the terms themselves. ce_ce, kd_kd, ce_kd: g.g, h.h, g.h. ce_along, kd_along: g.r, h.r along the direction
    r. target: r_y - mean(r). top: the teacher's top class, int64; of a tie the target if it takes part, else the
    lowest class.
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
    **divergence: Unpack[DivergenceKeywords],
) -> KDMoments:
    """CE, KD and the products of their logit gradients, row by row, by a kernel that writes no gradient.

    Both terms have weight 1 and there is no 1/N: any score made of the losses, the gradients' norms, their angle or
    their components along a direction follows (influence: kd_gain, conflict, el2n, ...).

    student_logits, teacher_logits: (N, C) floating. target: (N,) int64/int32 in [0, C). direction: r, (N, C) floating
    on the same device; None: r = 0. **divergence: temperature, revise ("lr", "mft" or None), eta, revise_temperature,
    divergence, standardize, as in kd_loss. Returns KDMoments in float32 (float64 if any logits are), without gradient.
    Raises as kd_loss does; on CUDA a target out of range makes its row NaN.
    """
    options = kd_options(
        ce_weight=1.0,
        kd_weight=1.0,
        ce_weight_unselected=1.0,
        label_smoothing=0.0,
        ignore_index=-100,
        reduction="sum",
        **divergence,
    )
    check_matrices(student_logits, teacher_logits)
    _check_tensors(student_logits, teacher_logits, target, options)
    if target.is_floating_point():
        raise ValueError(f"target must hold class indices; got {target.dtype} probabilities")
    if options.policy() == "swap":
        raise ValueError("revise must be 'lr', 'mft' or None here; got 'swap'")
    moments, top = _ops.kd_moments(
        student_logits.detach(), teacher_logits.detach(), target, *[None] * 7, *options, direction
    )
    ce, kd, ce_ce, kd_kd, ce_kd, ce_along, kd_along, at_target = moments.unbind()
    return KDMoments(ce, kd, ce_ce, kd_kd, ce_kd, ce_along, kd_along, at_target, top)
