"""kd_loss of two linear classifiers, chunk of rows by chunk of rows: no (N, C) tensor of logits ever exists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lrds_fast import _ops
from lrds_fast._numbers import integer
from lrds_fast.arguments import check_teacher_rows, check_tensor, unknown_keyword
from lrds_fast.divergences import MSE, REVISE_TEMPERATURE, Divergence
from lrds_fast.functional import (
    SELECTED_TWICE,
    check_class_dimension,
    check_class_weight,
    check_hyperparameters,
    check_values,
    class_dimension_hint,
    composite,
    scalar_argument,
    transforms_active,
)

__all__ = ["default_chunk_rows", "linear_kd_loss"]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Both logits of a chunk. On the CPU smaller chunks cost nothing (docs/linear.md); a GPU wants large products.
_CHUNK_BYTES = {"cpu": 64 << 20}
_CHUNK_BYTES_ELSEWHERE = 256 << 20
_LEAST_ROWS = 64
_unpack_dual: Any = forward_ad.unpack_dual
# A block of a 16-bit weight gradient that the CPU adds while it is still in cache (measured in docs/linear.md).
_BLOCK_ELEMENTS = 1 << 19


class _Options(NamedTuple):
    """The hyperparameters of the loss's operators, in their order."""

    temperature: list[float]
    ce_weight: float
    kd_weight: float
    ce_weight_unselected: float
    eta: float
    revise_temperature: float
    label_smoothing: float
    revise: int
    reduction: int
    ignore_index: int
    divergence: int
    divergence_parameters: list[float]
    standardize: bool


class _Rows(NamedTuple):
    """What a call needs besides the differentiable inputs; nothing here gets a gradient."""

    options: _Options
    teacher_hidden: Tensor  # (K, d_t), K <= N
    teacher_weight: Tensor  # (C, d_t)
    teacher_bias: Tensor | None
    target: Tensor  # (N,)
    selected: Tensor | None  # (N,)
    class_weight: Tensor | None  # (C,)
    num_valid: Tensor | None  # 0-d, the count that divides a mean
    weight_sum: Tensor | None  # 0-d, what divides a mean of weighted cross-entropies
    grad_scale: Tensor | None  # 0-d, the factor folded into the gradients
    student_dtype: torch.dtype  # of the student's logits: the autocast dtype, or the inputs' own
    teacher_dtype: torch.dtype
    chunk_rows: int  # 0: default_chunk_rows


class _Wanted(NamedTuple):
    """Which gradients somebody will ask for."""

    hidden: bool
    weight: bool
    bias: bool


def default_chunk_rows(rows: int, classes: int, bytes_per_class: int, device: str) -> int:
    """Rows per chunk when the caller names none; a function of the shapes and the device's type alone.

    bytes_per_class: of one student logit and one teacher logit together. device: "cpu", "cuda". The two logits buffers
    stay within 64 MiB on the CPU and 256 MiB elsewhere, but hold at least 64 rows (a matrix product of fewer rows
    wastes the hardware). No more chunks than that takes, and those equal up to rounding to 64 rows. Never more than
    `rows`, never less than 1.
    """
    limit = _CHUNK_BYTES.get(device, _CHUNK_BYTES_ELSEWHERE)
    most = max(_LEAST_ROWS, limit // (classes * bytes_per_class) // _LEAST_ROWS * _LEAST_ROWS)
    chunks = max(1, -(-rows // most))
    even = -(-rows // chunks)
    return max(1, min(rows, -(-even // _LEAST_ROWS) * _LEAST_ROWS))


# --- Arithmetic


def _accumulate_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _logits_into(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """out = hidden @ weight.T + bias; all of one dtype."""
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def _chunk_loss_and_gradient(z: Tensor, v: Tensor, chunk: slice, rows: _Rows, with_gradient: bool) -> Tensor:
    """The chunk's share of the loss (0-d); its gradient by z, if wanted, takes the place of z.

    v holds the teacher's first rows of the chunk, all of them or fewer. The share is final: divided by the whole
    call's num_valid or weight_sum, the gradient times grad_scale.
    """
    arguments = (
        z,
        v,
        rows.target[chunk],
        None if rows.selected is None else rows.selected[chunk],
        rows.class_weight,
        None,
        None,
        rows.num_valid,
        rows.weight_sum,
        rows.grad_scale,
        *rows.options,
    )
    loss: Tensor = (_ops.kd_loss_forward_(*arguments) if with_gradient else _ops.kd_loss_forward(*arguments, False))[0]
    return loss


def _multiplies_into_float32(tensor: Tensor) -> bool:
    """Does the backend multiply 16-bit matrices into float32? CUDA does, and into no other type but their own."""
    return tensor.is_cuda


def _add_transposed_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total (C, d) += gradient.T (C, n) @ hidden (n, d), accumulated in total's dtype.

    float16 and bfloat16 into float32: CUDA's matrix product does it in one call. The CPU's returns 16 bits. A chunk's
    bfloat16 product is rounded once and then added in float32; float16, where a sum over rows could overflow, is
    multiplied as float32. Both go by blocks of classes, which stay in cache and need no second (C, d) buffer.
    """
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden)
    elif _multiplies_into_float32(gradient):
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        wide = hidden.to(total.dtype) if gradient.dtype == torch.float16 else None
        block = max(1, _BLOCK_ELEMENTS // max(1, hidden.shape[1]))
        for part, columns in zip(torch.split(total, block), torch.split(gradient, block, dim=1), strict=True):
            if wide is None:
                part.add_(torch.mm(columns.t(), hidden))
            else:
                part.addmm_(columns.to(wide.dtype).t(), wide)


def _add_column_sums(total: Tensor, gradient: Tensor) -> None:
    """total (C,) += gradient (n, C) summed over rows in total's dtype."""
    # By blocks: a sum into another dtype converts its whole input first on the CPU.
    block = max(1, _BLOCK_ELEMENTS // max(1, gradient.shape[0])) if not gradient.is_cuda else gradient.shape[1]
    for part, columns in zip(torch.split(total, block), torch.split(gradient, block, dim=1), strict=True):
        part.add_(columns.sum(0, dtype=total.dtype))


def _product_into(out: Tensor, gradient: Tensor, weight: Tensor) -> None:
    """out (n, d) = gradient (n, C) @ weight (C, d), rounded once, to out's dtype where the backend can.

    The dtypes differ under autocast: hidden has float32, or the other 16-bit type.
    """
    if out.dtype == gradient.dtype:
        torch.mm(gradient, weight, out=out)
    elif _multiplies_into_float32(gradient):
        if out.dtype == torch.float32:
            torch.mm(gradient, weight, out_dtype=torch.float32, out=out)
        else:
            out.copy_(torch.mm(gradient, weight, out_dtype=torch.float32))
    else:
        out.copy_(torch.mm(gradient, weight))


def _unread(rows: _Rows) -> Tensor:
    """(N, 1) bool: rows whose student logits no term reads. 0 * NaN there must not reach the weight gradient."""
    options = rows.options
    unread = rows.target == options.ignore_index
    if options.ce_weight_unselected == 0:
        if rows.selected is not None:
            unread = unread | (rows.selected == 0)
        else:
            teacher_rows = rows.teacher_hidden.shape[0]
            unread = unread | (torch.arange(unread.shape[0], device=unread.device) >= teacher_rows)
    return unread[:, None]


_Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _loss_and_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, wanted: _Wanted) -> _Results:
    """The loss and the wanted gradients, which already carry grad_scale and the reduction.

    The gradient of hidden has hidden's dtype; those of weight and bias are the accumulators, float32 or float64.
    """
    classes = weight.shape[0]
    check_values(rows.target, rows.selected, classes, rows.options.ignore_index)
    if rows.chunk_rows == 0:
        bytes_per_class = rows.student_dtype.itemsize + rows.teacher_dtype.itemsize
        rows = rows._replace(
            chunk_rows=default_chunk_rows(hidden.shape[0], classes, bytes_per_class, hidden.device.type)
        )

    # The dtypes are autocast's already (see _check_head); it casts nothing again below.
    count, teacher_rows = hidden.shape[0], rows.teacher_hidden.shape[0]
    device = hidden.device
    weight, teacher_weight = weight.to(rows.student_dtype), rows.teacher_weight.to(rows.teacher_dtype)
    bias = None if bias is None else bias.to(rows.student_dtype)
    teacher_bias = None if rows.teacher_bias is None else rows.teacher_bias.to(rows.teacher_dtype)
    reads_teacher = rows.options.kd_weight != 0
    with_gradient = any(wanted)

    accumulate = _accumulate_dtype(rows.student_dtype)
    loss = torch.zeros((), dtype=_accumulate_dtype(rows.student_dtype, rows.teacher_dtype), device=device)
    hidden_gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted.hidden else None
    weight_gradient = torch.zeros(weight.shape, dtype=accumulate, device=device) if wanted.weight else None
    bias_gradient = torch.zeros(classes, dtype=accumulate, device=device) if wanted.bias else None
    unread = _unread(rows) if wanted.weight else None

    z_rows, v_rows = min(rows.chunk_rows, count), min(rows.chunk_rows, teacher_rows)
    z_buffer = torch.empty((z_rows, classes), dtype=rows.student_dtype, device=device)
    v_buffer = torch.empty((v_rows, classes), dtype=rows.teacher_dtype, device=device)
    for begin in range(0, count, rows.chunk_rows):
        end = min(begin + rows.chunk_rows, count)
        teacher_end = max(begin, min(end, teacher_rows))
        x = hidden[begin:end].to(rows.student_dtype)
        z = _logits_into(z_buffer[: end - begin], x, weight, bias)
        v = v_buffer[: teacher_end - begin]
        if reads_teacher and teacher_end > begin:
            _logits_into(v, rows.teacher_hidden[begin:teacher_end].to(v.dtype), teacher_weight, teacher_bias)
        loss += _chunk_loss_and_gradient(z, v, slice(begin, end), rows, with_gradient)
        if hidden_gradient is not None:
            _product_into(hidden_gradient[begin:end], z, weight)
        if weight_gradient is not None and unread is not None:
            _add_transposed_product(weight_gradient, z, x.masked_fill(unread[begin:end], 0.0))
        if bias_gradient is not None:
            _add_column_sums(bias_gradient, z)
    return loss, hidden_gradient, weight_gradient, bias_gradient


# torch.compile sees one operator instead of the loop: any number of rows in one graph, and the chunks stay chunks.
@torch.library.custom_op(
    "lrds_fast::linear_kd_loss_forward",
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
        "Tensor? teacher_bias, Tensor target, Tensor? selected, Tensor? class_weight, Tensor? num_valid, "
        "Tensor? weight_sum, Tensor? grad_scale, ScalarType student_dtype, ScalarType teacher_dtype, int chunk_rows, "
        "float[] temperature, float ce_weight, float kd_weight, float ce_weight_unselected, float eta, "
        "float revise_temperature, float label_smoothing, int revise, int reduction, int ignore_index, int divergence, "
        "float[] divergence_parameters, bool standardize, bool hidden_gradient, bool weight_gradient, "
        "bool bias_gradient) "
        "-> (Tensor loss, Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient)"
    ),
)
def _forward_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_loss_and_gradients with an empty tensor for each gradient that nobody wants."""
    rows, wanted = _unpack(given)
    loss, *gradients = _loss_and_gradients(hidden, weight, bias, rows, wanted)
    first, second, third = (hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return loss, first, second, third


@_forward_op.register_fake
def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, wanted = _unpack(given)
    accumulate = _accumulate_dtype(rows.student_dtype)
    return (
        hidden.new_empty((), dtype=_accumulate_dtype(rows.student_dtype, rows.teacher_dtype)),
        hidden.new_empty(hidden.shape if wanted.hidden else (0,)),
        hidden.new_empty(weight.shape, dtype=accumulate) if wanted.weight else hidden.new_empty(0),
        hidden.new_empty(weight.shape[:1], dtype=accumulate) if wanted.bias else hidden.new_empty(0),
    )


def _unpack(given: tuple[Any, ...]) -> tuple[_Rows, _Wanted]:
    """The operator's arguments after bias, as `(*rows[1:], *rows.options, *wanted)` put them there."""
    tensors = len(_Rows._fields) - 1
    options = tensors + len(_Options._fields)
    return _Rows(_Options(*given[tensors:options]), *given[:tensors]), _Wanted(*given[options:])


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, wanted: _Wanted) -> _Results:
    if not torch.compiler.is_compiling():
        return _loss_and_gradients(hidden, weight, bias, rows, wanted)
    loss, *gradients = _forward_op(hidden, weight, bias, *rows[1:], *rows.options, *wanted)
    first, second, third = (made if asked else None for made, asked in zip(gradients, wanted, strict=True))
    return loss, first, second, third


def _graph_is_kept() -> bool:
    # The flag of the running backward pass; torch has no public name for it.
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _composed(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows) -> Tensor:
    """The loss in PyTorch ops, for all kinds of derivatives. Forms all the logits at once."""
    z = F.linear(
        hidden.masked_fill(_unread(rows), 0.0).to(rows.student_dtype),
        weight.to(rows.student_dtype),
        None if bias is None else bias.to(rows.student_dtype),
    )
    v = F.linear(
        rows.teacher_hidden.to(rows.teacher_dtype),
        rows.teacher_weight.to(rows.teacher_dtype),
        None if rows.teacher_bias is None else rows.teacher_bias.to(rows.teacher_dtype),
    )
    rest: Any = (None, None, rows.num_valid, rows.weight_sum, None, *rows.options)
    return composite(z, v, rows.target, rows.selected, rows.class_weight, *rest)[0]


def _versions(rows: _Rows) -> list[int | None]:
    """Each tensor's version, the number of its in-place changes; None for inference tensors, which have no version."""
    return [None if tensor.is_inference() else tensor._version for tensor in rows if isinstance(tensor, Tensor)]


def _has_tangent(tensor: Tensor | None) -> bool:
    if tensor is None or torch.compiler.is_compiling():
        return False
    return _unpack_dual(tensor).tangent is not None


def _sees_through(grad_output: Tensor) -> bool:
    """Whether a kernel can read grad_output: not if it is batched (is_grads_batched) or has a tangent."""
    keys = str(torch._C._dispatch_keys(grad_output))  # torch has no function that detects batched tensors
    return "Batched" not in keys and "FuncTorch" not in keys and not _has_tangent(grad_output)


class _LinearKDLoss(torch.autograd.Function):
    """Forward makes the loss and the gradients; backward scales them by grad_output / grad_scale."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, wanted: _Wanted) -> Tensor:
        loss, *gradients = _forward(hidden, weight, bias, rows, wanted)
        ctx.save_for_backward(*gradients, rows.grad_scale, hidden, weight, bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        if not torch.compiler.is_compiling():
            # Not saved variables, which autograd checks for in-place changes even if a backward does not read them.
            ctx.rows, ctx.versions, ctx.wanted = rows, _versions(rows), wanted
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, grad_scale, hidden, weight, bias = ctx.saved_tensors
        tracing = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not tracing:
            return (*_differentiable_gradients(ctx, gradients, (hidden, weight, bias), grad_output), None, None)
        in_place = not tracing and not _graph_is_kept()
        if in_place:
            ctx.rows = None
        sees_through = tracing or _sees_through(grad_output)
        results: list[Tensor | None] = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            if gradient is None:
                results.append(None)
                continue
            with torch.no_grad():
                if not sees_through:
                    factor = grad_output if grad_scale is None else grad_output / grad_scale
                    gradient = gradient.to(grad_output.dtype) * factor
                elif in_place:  # the saved gradient is not needed again
                    torch.ops.lrds_fast.scale_gradient_.default(gradient, grad_output, grad_scale)
                else:
                    gradient = torch.ops.lrds_fast.scale_gradient.default(gradient, grad_output, grad_scale)
                results.append(gradient.to(dtype))
        return (*results, None, None)


def _differentiable_gradients(
    ctx: Any, gradients: Sequence[Tensor | None], given: tuple[Tensor, Tensor, Tensor | None], grad_output: Tensor
) -> list[Tensor | None]:
    """The wanted gradients, computed from `given` and grad_output by PyTorch ops, for higher-order derivatives."""
    unchanged = ctx.versions == _versions(ctx.rows)
    if None in ctx.versions and unchanged:
        # Compared with the gradients of the forward pass, to detect inputs that were changed since.
        with torch.no_grad():
            again = _loss_and_gradients(*given, ctx.rows, ctx.wanted)[1:]
        unchanged = all(
            before is None or (now is not None and torch.allclose(now, before, 0.0, 0.0, equal_nan=True))
            for now, before in zip(again, gradients, strict=True)
        )
    if not unchanged:
        raise RuntimeError(
            "linear_kd_loss: teacher_hidden, or another input without gradient, was changed in place before a "
            "second derivative was computed from it; pass a clone() of it"
        )
    # Views, so that the inputs' hooks do not run here: they run once, in the outer backward pass.
    hidden, weight, bias = given
    hidden, weight, bias = hidden.view_as(hidden), weight.view_as(weight), None if bias is None else bias.view_as(bias)
    loss = _composed(hidden, weight, bias, ctx.rows)
    pairs = zip((hidden, weight, bias), ctx.wanted, strict=True)
    asked = [tensor for tensor, wanted in pairs if wanted and tensor is not None]
    found = iter(torch.autograd.grad(loss, asked, grad_output, create_graph=True))
    return [next(found) if wanted else None for wanted in ctx.wanted]


# --- Arguments


def _matrix(name: str, tensor: Any, shape: str) -> Tensor:
    check_tensor(name, tensor, f"shape {shape}", "last_hidden_state")
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {tensor.dtype}")
    checked: Tensor = tensor
    return checked


def _check_head(who: str, hidden: object, weight: object, bias: object, like: Tensor | None) -> torch.dtype:
    """Checks one classifier and its input; returns the dtype of its logits: F.linear's, autocast considered."""
    hidden = _matrix(f"{who}_hidden", hidden, "(..., d)")
    weight = _matrix(f"{who}_weight", weight, "(C, d)")
    if hidden.dim() < 2:
        raise ValueError(f"{who}_hidden must have shape (..., d), two dimensions or more; got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(f"{who}_weight must have shape (C, d) with C >= 1; got {tuple(weight.shape)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{who}_weight must have {hidden.shape[-1]} columns like {who}_hidden {tuple(hidden.shape)}; "
            f"got {tuple(weight.shape)}"
        )
    tensors = {"hidden": hidden, "weight": weight}
    if bias is not None:
        tensors["bias"] = _matrix(f"{who}_bias", bias, "(C,)")
        if tuple(tensors["bias"].shape) != (weight.shape[0],):
            raise ValueError(f"{who}_bias must have shape ({weight.shape[0]},); got {tuple(tensors['bias'].shape)}")
    device = hidden.device if like is None else like.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    expected = _cast_dtype(hidden.dtype, autocast)
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{who}_{name} must be on {device} like student_hidden; got {tensor.device}")
        if _cast_dtype(tensor.dtype, autocast) != expected:
            raise TypeError(f"{who}_{name} must be {hidden.dtype} like {who}_hidden; got {tensor.dtype}")
    return expected


def _cast_dtype(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    return dtype if autocast is None or dtype == torch.float64 else autocast


def _check_rows(student: Tensor, teacher: Tensor, target: object, selected: object, teacher_rows: int | None) -> None:
    """Checks target, selected and teacher_rows against the leading shapes of the two hidden tensors."""
    leading = tuple(student.shape[:-1])
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor of class indices; got {type(target).__name__} {target!r}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"target must hold int64 or int32 class indices; got {target.dtype} of shape {tuple(target.shape)}"
        )
    if tuple(target.shape) != leading:
        hint = class_dimension_hint("student_hidden", student.shape, target.shape)
        raise ValueError(f"target must have student_hidden's leading shape {leading}; got {tuple(target.shape)}{hint}")
    check_class_dimension("student_hidden", student.shape, target)
    check_teacher_rows(student.shape, teacher.shape, teacher_rows, of="hidden")
    others = [("target", target)]
    if selected is not None:
        if not isinstance(selected, Tensor):
            raise TypeError(f"selected must be a Tensor, bool or floating; got {type(selected).__name__}")
        if selected.dtype != torch.bool and not selected.dtype.is_floating_point:
            raise TypeError(f"selected must be bool, or floating weights in [0, 1]; got {selected.dtype}")
        if teacher_rows is not None:
            raise ValueError(SELECTED_TWICE)
        count = math.prod(leading)
        if tuple(selected.shape) not in (leading, (count,)):
            raise ValueError(f"selected must have target's shape {leading} or ({count},); got {tuple(selected.shape)}")
        others.append(("selected", selected))
    for name, tensor in others:
        if tensor.device != student.device:
            raise ValueError(f"{name} must be on {student.device} like student_hidden; got {tensor.device}")


def _weight_sum(class_weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The sum over the valid rows of their class's weight, 0-d; rows out of range are reported elsewhere."""
    valid = (target != ignore_index) & (target >= 0) & (target < class_weight.shape[0])
    return torch.where(valid, class_weight[torch.where(valid, target, 0).long()], 0.0).sum(dtype=torch.float64)


def _class_divisor(divergence: Divergence, classes: int, temperature: float) -> float:
    """The number of classes that a mean over classes divides a gradient by, at most 1024: the cross-entropy's gradient
    is scaled by it too."""
    if not isinstance(divergence, MSE):
        return 1.0
    return min(1024.0, max(1.0, classes * (temperature if divergence.on == "probs" else 1.0) / 2.0))


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    chunk_rows: int | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """kd_loss(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T, target) without the logits.

    Both classifiers are applied to chunk_rows rows at a time, kd_loss runs on that chunk, and the chunk's gradient is
    multiplied into the gradients of student_hidden, student_weight and student_bias at once. Memory beyond inputs and
    gradients: two chunks of logits and, if student_weight is 16-bit, its gradient in float32.

    student_hidden: (..., d) floating, leading dimensions flattened to N rows. student_weight: (C, d), student_bias:
        (C,) or None; the same dtype. Under autocast all are cast as F.linear casts them.
    teacher_hidden: (..., d_t) with the same leading dimensions. teacher_weight: (C, d_t), teacher_bias: (C,) or None.
        None of them gets a gradient.
    teacher_rows: int K >= 0 if teacher_hidden has only the first K of the N rows, (K, d_t) or (B', ..., d_t). These
        rows are the selected ones, and `selected` must be None. The teacher's other logits are not computed.
    target: (...) int64/int32 class indices in [0, C), or ignore_index.
    selected: as kd_loss. Rows with weight 0 are still multiplied with teacher_weight (which rows those are is known on
        the device only): sort them to the end and pass teacher_rows to save that product.
    reduction: "mean", "sum" or "elementmean". "none" is refused: gradients are made in the forward pass, before each
        row's own grad_output is known.
    grad_scale: as kd_loss. Without it float16 gradients are kept undivided until backward, which multiplies by
        grad_output / N in float32, which avoids underflow. Only "mse_probs" may need a grad_scale: its gradient is a
        product of two probabilities, which underflows float16 for thousands of equally likely classes.
    chunk_rows: rows per chunk; None: as many as keep both logits chunks within 64 MiB on the CPU and 256 MiB on CUDA,
        at least 64. A row's loss does not depend on it, the order in which rows are added does.
    The other keywords are kd_loss's.

    Returns a 0-d float32 tensor (float64 if any logits are). Gradients have their inputs' dtypes; those of the weight
    and the bias are accumulated over chunks in float32 (float64 for float64). Nothing synchronises on CUDA; on the
    CPU a target out of range raises ValueError, on CUDA it makes the loss NaN. Higher-order
    (create_graph=True), forward-mode and torch.func derivatives are computed by PyTorch ops, which form all the logits.
    Compiles with fullgraph=True, for any N in one graph. Raises ValueError or TypeError naming the argument.
    Source: Lan et al., "Improve Knowledge Distillation via Label Revision and Data Selection", arXiv 2404.03693.
    """
    if unknown:
        raise unknown_keyword(linear_kd_loss, unknown)
    checked = check_hyperparameters(
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
    if checked.reduction == _ops.NO_REDUCTION:
        raise ValueError(
            "reduction must be 'mean', 'sum' or 'elementmean'; got 'none': the gradients of hidden and weight are made "
            "in the forward pass, which does not know each row's grad_output yet"
        )
    if chunk_rows is not None:
        chunk_rows = integer("chunk_rows", chunk_rows, "an int or None")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be >= 1; got {chunk_rows!r}")
    student_dtype = _check_head("student", student_hidden, student_weight, student_bias, like=None)
    teacher_dtype = _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias, like=student_hidden)
    classes = student_weight.shape[0]
    if teacher_weight.shape[0] != classes:
        raise ValueError(
            f"teacher_weight must have the student's {classes} classes; got shape {tuple(teacher_weight.shape)}"
        )
    _check_rows(student_hidden, teacher_hidden, target, selected, teacher_rows)
    if class_weight is not None:
        check_class_weight(class_weight, classes, student_hidden.device)

    hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    target = target.reshape(-1)
    selected = None if selected is None else selected.detach().reshape(-1)
    count = scalar_argument("num_valid", num_valid, student_hidden)
    if count is None:
        count = (target != checked.ignore_index).sum()
    weights = scalar_argument("weight_sum", weight_sum, student_hidden)
    if weights is None and class_weight is not None:
        weights = _weight_sum(class_weight.detach(), target, checked.ignore_index)
    scale = scalar_argument("grad_scale", grad_scale, student_hidden)
    if scale is None and torch.float16 in (student_dtype, student_hidden.dtype):
        # Without the divisions, which would underflow in float16; backward divides in float32.
        divisor = {"sum": torch.ones_like(count), "mean": count, "elementmean": count * classes}[reduction]
        scale = torch.where(divisor > 0, divisor, 1).to(torch.float32)
        scale = scale * _class_divisor(checked.divergence, classes, min(checked.temperature))
    rows = _Rows(
        teacher_hidden=teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight=teacher_weight.detach(),
        teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        target=target,
        selected=selected,
        class_weight=None if class_weight is None else class_weight.detach(),
        num_valid=count,
        weight_sum=weights,
        grad_scale=scale,
        student_dtype=student_dtype,
        teacher_dtype=teacher_dtype,
        chunk_rows=chunk_rows or 0,
        options=_Options(
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
            checked.divergence.parameters,
            standardize,
        ),
    )
    given = (student_hidden, student_weight, student_bias)
    if transforms_active() or any(_has_tangent(tensor) for tensor in given):
        return _composed(hidden, student_weight, student_bias, rows)
    grad_enabled = torch.is_grad_enabled()
    wanted = _Wanted(*(grad_enabled and tensor is not None and tensor.requires_grad for tensor in given))
    if not any(wanted):
        return _forward(hidden, student_weight, student_bias, rows, wanted)[0]
    loss: Tensor = _LinearKDLoss.apply(hidden, student_weight, student_bias, rows, wanted)
    return loss
