"""kd_loss of two linear classifiers in chunks of rows, so that no (N, C) tensor of logits ever exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lrds_fast import _ops
from lrds_fast._numbers import integer
from lrds_fast.arguments import (
    FLOATING,
    check_class_weight,
    check_selected,
    check_target,
    check_teacher_rows,
    check_tensor,
    check_values,
    scalar_argument,
    unknown_keyword,
)
from lrds_fast.divergences import MSE, REVISE_TEMPERATURE, Divergence
from lrds_fast.functional import composite, transforms_active
from lrds_fast.logit_maps import LogitMap, LogitScale, Softcap, common_classes, cut, logit_maps
from lrds_fast.options import SCHEMA, KDOptions, kd_options, without_target

__all__ = ["default_chunk_rows", "linear_kd_loss"]

# The limit for both logits of a chunk. Smaller chunks cost a CPU nothing (docs/linear.md); a GPU needs large products.
_CHUNK_BYTES = {"cpu": 64 << 20}
_CHUNK_BYTES_ELSEWHERE = 256 << 20
_LEAST_ROWS = 64
_unpack_dual: Any = forward_ad.unpack_dual
# The elements of a weight gradient that stay in a CPU's cache while they are added (docs/linear.md).
_BLOCK_ELEMENTS = 1 << 19


class _Constants(NamedTuple):
    """The inputs of a call that get no gradient."""

    options: KDOptions
    teacher_hidden: Tensor  # (K, d_t), K <= N
    teacher_weight: Tensor  # (C, d_t)
    teacher_bias: Tensor | None
    target: Tensor  # (N,)
    selected: Tensor | None  # (N,)
    class_weight: Tensor | None  # (C,)
    num_valid: Tensor | None  # 0-d, the denominator of a mean
    weight_sum: Tensor | None  # 0-d, the denominator of a mean of weighted cross-entropies
    grad_scale: Tensor | None  # 0-d, the factor of the stored gradients
    student_dtype: torch.dtype  # of the student's logits: the autocast dtype, or the inputs'
    teacher_dtype: torch.dtype
    chunk_rows: int  # 0: default_chunk_rows
    maps: list[float]  # scale and soft cap of the student's logits, then of the teacher's

    def student_map(self) -> LogitMap:
        return LogitMap(*self.maps[:2])

    def teacher_map(self) -> LogitMap:
        return LogitMap(*self.maps[2:])


class _NeedsGrad(NamedTuple):
    """Which of the student's tensors need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


def default_chunk_rows(rows: int, classes: int, bytes_per_class: int, device: str) -> int:
    """The default rows per chunk, in [1, rows], from the shapes and the type of the device alone.

    bytes_per_class: of one student logit and one teacher logit together. device: "cpu", "cuda". Both logits of a chunk
    fit in 64 MiB on the CPU and 256 MiB elsewhere, unless fewer than 64 rows do: a matrix product of fewer rows wastes
    the hardware. The chunks have equal sizes, rounded up to 64 rows.
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


def _chunk_loss(z: Tensor, v: Tensor, chunk: slice, constants: _Constants, with_gradient: bool) -> Tensor:
    """The chunk's share of the loss, 0-d; (n,) without a reduction. With with_gradient it overwrites z with the
    gradient of z.

    z: (n, C) student logits. v: (k, C) teacher logits of the chunk's first k <= n rows. The share is already divided by
    num_valid or weight_sum of the whole call, and the gradient is multiplied by grad_scale.
    """
    arguments = (
        z,
        v,
        constants.target[chunk],
        None if constants.selected is None else constants.selected[chunk],
        constants.class_weight,
        None,
        None,
        constants.num_valid,
        constants.weight_sum,
        constants.grad_scale,
        *constants.options,
    )
    loss: Tensor = (_ops.kd_loss_forward_(*arguments) if with_gradient else _ops.kd_loss_forward(*arguments, False))[0]
    return loss


def _multiplies_into_float32(tensor: Tensor) -> bool:
    """Whether the backend can write a float32 product of 16-bit matrices. Only CUDA can."""
    return tensor.is_cuda


def _add_transposed_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total (C, d) += gradient.T (C, n) @ hidden (n, d), accumulated in total's dtype.

    CUDA adds a product of 16-bit matrices to a float32 matrix in one call. The CPU returns 16-bit products: a chunk's
    bfloat16 product is rounded once and then added in float32; float16, in which a sum over rows could overflow, is
    converted to float32 first. The CPU works on blocks of classes: they stay in cache and need no second (C, d) buffer.
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
    """total (C,) += the sum of gradient (n, C) over its rows, in total's dtype."""
    # In blocks, because the CPU converts the whole input before it adds in another dtype.
    block = max(1, _BLOCK_ELEMENTS // max(1, gradient.shape[0])) if not gradient.is_cuda else gradient.shape[1]
    for part, columns in zip(torch.split(total, block), torch.split(gradient, block, dim=1), strict=True):
        part.add_(columns.sum(0, dtype=total.dtype))


def _product_into(out: Tensor, gradient: Tensor, weight: Tensor) -> None:
    """out (n, d) = gradient (n, C) @ weight (C, d). Only CUDA rounds the product directly to out's dtype.

    The dtypes differ under autocast, where out can be float32 or the other 16-bit type.
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


def _unread(constants: _Constants) -> Tensor:
    """(N, 1) bool: rows whose student logits no term reads. Their 0 * NaN must not reach the weight gradient."""
    options = constants.options
    unread = constants.target == options.ignore_index
    if options.ce_weight_unselected == 0:
        if constants.selected is not None:
            unread = unread | (constants.selected == 0)
        else:
            teacher_rows = constants.teacher_hidden.shape[0]
            unread = unread | (torch.arange(unread.shape[0], device=unread.device) >= teacher_rows)
    return unread[:, None]


_Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""The loss and the gradients of hidden, weight and bias; None for a gradient that is not needed."""


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    constants: _Constants,
    needs_grad: _NeedsGrad,
    row_gradient: Tensor | None = None,
) -> _Results:
    """The loss and the needed gradients, reduced and multiplied by grad_scale.

    The gradient of hidden has hidden's dtype. Those of weight and bias are the accumulators, float32 or float64.
    row_gradient: (N,), the derivative with respect to each row's loss where there is no reduction.
    """
    count, classes, device = hidden.shape[0], weight.shape[0], hidden.device
    student_dtype, teacher_dtype = constants.student_dtype, constants.teacher_dtype
    check_values(constants.target, constants.selected, classes, constants.options.ignore_index)
    bytes_per_class = student_dtype.itemsize + teacher_dtype.itemsize
    chunk_rows = constants.chunk_rows or default_chunk_rows(count, classes, bytes_per_class, device.type)

    # _check_classifier chose the dtypes that autocast would choose, so that autocast casts nothing below.
    teacher_hidden, teacher_bias = constants.teacher_hidden, constants.teacher_bias
    teacher_rows = teacher_hidden.shape[0]
    weight, teacher_weight = weight.to(student_dtype), constants.teacher_weight.to(teacher_dtype)
    bias = None if bias is None else bias.to(student_dtype)
    teacher_bias = None if teacher_bias is None else teacher_bias.to(teacher_dtype)

    accumulate = _accumulate_dtype(student_dtype)
    by_row = constants.options.reduction == _ops.NO_REDUCTION
    loss = torch.zeros(count if by_row else (), dtype=_accumulate_dtype(student_dtype, teacher_dtype), device=device)
    hidden_gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_grad.hidden else None
    weight_gradient = torch.zeros(weight.shape, dtype=accumulate, device=device) if needs_grad.weight else None
    bias_gradient = torch.zeros(classes, dtype=accumulate, device=device) if needs_grad.bias else None
    student_map, teacher_map = constants.student_map(), constants.teacher_map()
    capped = any(needs_grad) and student_map.softcap != 0
    unread = _unread(constants) if needs_grad.weight or capped else None

    z_buffer = torch.empty((min(chunk_rows, count), classes), dtype=student_dtype, device=device)
    v_buffer = torch.empty((min(chunk_rows, teacher_rows), classes), dtype=teacher_dtype, device=device)
    mapped_buffer = torch.empty_like(z_buffer) if capped else None
    for begin in range(0, count, chunk_rows):
        end = min(begin + chunk_rows, count)
        teacher_end = max(begin, min(end, teacher_rows))
        x = hidden[begin:end].to(student_dtype)
        z = _logits_into(z_buffer[: end - begin], x, weight, bias)
        v = v_buffer[: teacher_end - begin]
        if constants.options.kd_weight != 0 and teacher_end > begin:
            _logits_into(v, teacher_hidden[begin:teacher_end].to(teacher_dtype), teacher_weight, teacher_bias)
            teacher_map.apply_(v)
        student_map.apply_(z)
        mapped = None if mapped_buffer is None else mapped_buffer[: end - begin].copy_(z)
        share = _chunk_loss(z, v, slice(begin, end), constants, any(needs_grad))
        if by_row:
            loss[begin:end] = share
        else:
            loss += share
        if any(needs_grad):
            student_map.backward_(z, mapped)
            if row_gradient is not None:
                z.mul_(row_gradient[begin:end, None])
            if capped and unread is not None:
                z.masked_fill_(unread[begin:end], 0.0)  # 0 times the cap's derivative of NaN
        if hidden_gradient is not None:
            _product_into(hidden_gradient[begin:end], z, weight)
        if weight_gradient is not None and unread is not None:
            _add_transposed_product(weight_gradient, z, x.masked_fill(unread[begin:end], 0.0))
        if bias_gradient is not None:
            _add_column_sums(bias_gradient, z)
    return loss, hidden_gradient, weight_gradient, bias_gradient


# torch.compile sees one operator instead of the loop: it neither unrolls the chunks nor recompiles for another N.
@torch.library.custom_op(
    "lrds_fast::linear_kd_loss_forward",
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
        "Tensor? teacher_bias, Tensor target, Tensor? selected, Tensor? class_weight, Tensor? num_valid, "
        "Tensor? weight_sum, Tensor? grad_scale, ScalarType student_dtype, ScalarType teacher_dtype, int chunk_rows, "
        f"float[] maps, {SCHEMA}, bool hidden_gradient, bool weight_gradient, bool bias_gradient) "
        "-> (Tensor loss, Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient)"
    ),
)
def _forward_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_loss_and_gradients, with an empty tensor for each gradient that is not needed."""
    constants, needs_grad = _unpack(others)
    loss, *gradients = _loss_and_gradients(hidden, weight, bias, constants, needs_grad)
    first, second, third = (hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return loss, first, second, third


@_forward_op.register_fake
def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    constants, needs_grad = _unpack(others)
    accumulate = _accumulate_dtype(constants.student_dtype)
    return (
        hidden.new_empty(
            hidden.shape[0] if constants.options.reduction == _ops.NO_REDUCTION else (),
            dtype=_accumulate_dtype(constants.student_dtype, constants.teacher_dtype),
        ),
        hidden.new_empty(hidden.shape if needs_grad.hidden else (0,)),
        hidden.new_empty(weight.shape, dtype=accumulate) if needs_grad.weight else hidden.new_empty(0),
        hidden.new_empty(weight.shape[:1], dtype=accumulate) if needs_grad.bias else hidden.new_empty(0),
    )


def _pack(constants: _Constants, needs_grad: _NeedsGrad) -> tuple[Any, ...]:
    """The operator's arguments after bias: the tensors and dtypes, chunk_rows, the options, the needed gradients."""
    return (*constants[1:], *constants.options, *needs_grad)


def _unpack(others: tuple[Any, ...]) -> tuple[_Constants, _NeedsGrad]:
    """The inverse of _pack."""
    tensors = len(_Constants._fields) - 1
    options = tensors + len(KDOptions._fields)
    return _Constants(KDOptions(*others[tensors:options]), *others[:tensors]), _NeedsGrad(*others[options:])


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, constants: _Constants, needs_grad: _NeedsGrad
) -> _Results:
    if not torch.compiler.is_compiling():
        return _loss_and_gradients(hidden, weight, bias, constants, needs_grad)
    loss, *gradients = _forward_op(hidden, weight, bias, *_pack(constants, needs_grad))
    first, second, third = (
        gradient if needed else None for gradient, needed in zip(gradients, needs_grad, strict=True)
    )
    return loss, first, second, third


def _graph_is_kept() -> bool:
    # The retain_graph of the running backward pass; torch has no public name for it.
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _composed(hidden: Tensor, weight: Tensor, bias: Tensor | None, constants: _Constants) -> Tensor:
    """The loss in PyTorch ops, which have all kinds of derivatives. They hold all N x C logits at once."""
    z = F.linear(
        hidden.masked_fill(_unread(constants), 0.0).to(constants.student_dtype),
        weight.to(constants.student_dtype),
        None if bias is None else bias.to(constants.student_dtype),
    )
    v = F.linear(
        constants.teacher_hidden.to(constants.teacher_dtype),
        constants.teacher_weight.to(constants.teacher_dtype),
        None if constants.teacher_bias is None else constants.teacher_bias.to(constants.teacher_dtype),
    )
    z, v = constants.student_map()(z), constants.teacher_map()(v)
    scalars = (constants.num_valid, constants.weight_sum, None)
    tensors = (constants.target, constants.selected, constants.class_weight, None, None)
    return composite(z, v, *tensors, *scalars, *constants.options)[0]


def _versions(constants: _Constants) -> list[int | None]:
    """Each tensor's version, the number of its in-place changes; None for inference tensors, which have no version."""
    return [None if tensor.is_inference() else tensor._version for tensor in constants if isinstance(tensor, Tensor)]


def _has_tangent(tensor: Tensor | None) -> bool:
    if tensor is None or torch.compiler.is_compiling():
        return False
    return _unpack_dual(tensor).tangent is not None


def _is_readable(grad_output: Tensor) -> bool:
    """Whether a kernel can read grad_output: not if it is batched (is_grads_batched) or has a tangent."""
    keys = str(torch._C._dispatch_keys(grad_output))  # torch has no function that detects batched tensors
    return "Batched" not in keys and "FuncTorch" not in keys and not _has_tangent(grad_output)


class _LinearKDLoss(torch.autograd.Function):
    """Forward computes the loss and the gradients; backward multiplies them by grad_output / grad_scale."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, constants: _Constants, needs_grad: _NeedsGrad
    ) -> Tensor:
        loss, *gradients = _forward(hidden, weight, bias, constants, needs_grad)
        ctx.save_for_backward(*gradients, constants.grad_scale, hidden, weight, bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        if not torch.compiler.is_compiling():
            # As attributes: autograd refuses saved tensors that were changed in place, even where backward does not
            # read them.
            ctx.constants, ctx.versions, ctx.needs_grad = constants, _versions(constants), needs_grad
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, grad_scale, hidden, weight, bias = ctx.saved_tensors
        tracing = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not tracing:
            return (*_differentiable_gradients(ctx, gradients, (hidden, weight, bias), grad_output), None, None)
        in_place = not tracing and not _graph_is_kept()
        if in_place:
            ctx.constants = None
        is_readable = tracing or _is_readable(grad_output)
        results: list[Tensor | None] = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            if gradient is None:
                results.append(None)
                continue
            with torch.no_grad():
                if not is_readable:
                    factor = grad_output if grad_scale is None else grad_output / grad_scale
                    gradient = gradient.to(grad_output.dtype) * factor
                elif in_place:  # nobody reads the saved gradient again
                    torch.ops.lrds_fast.scale_gradient_.default(gradient, grad_output, grad_scale)
                else:
                    gradient = torch.ops.lrds_fast.scale_gradient.default(gradient, grad_output, grad_scale)
                results.append(gradient.to(dtype))
        return (*results, None, None)


class _LinearKDLossOfRows(torch.autograd.Function):
    """The loss of each row. Backward applies the classifiers again and computes the gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, constants: _Constants, needs_grad: _NeedsGrad
    ) -> Tensor:
        loss = _loss_and_gradients(hidden, weight, bias, constants, _NeedsGrad(False, False, False))[0]
        ctx.save_for_backward(hidden, weight, bias)
        ctx.constants, ctx.versions, ctx.needs_grad = constants, _versions(constants), needs_grad
        ctx.loss = loss.clone() if None in ctx.versions else None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = student = ctx.saved_tensors
        if ctx.versions != _versions(ctx.constants):
            raise _changed_in_place()
        if torch.is_grad_enabled() or not _is_readable(grad_output):
            with torch.enable_grad():
                loss = _composed(hidden, weight, bias, ctx.constants)
            return (*_gradients_of(loss, student, ctx.needs_grad, grad_output), None, None)
        # The largest factor multiplies last, because small ones would let 16-bit gradients of logits underflow.
        largest = grad_output.abs().amax() if grad_output.numel() else grad_output.new_ones(())
        largest = torch.where(largest > 0, largest, 1.0)
        loss, *gradients = _loss_and_gradients(
            hidden, weight, bias, ctx.constants, ctx.needs_grad, grad_output / largest
        )
        if ctx.loss is not None and not torch.allclose(loss, ctx.loss, 0.0, 0.0, equal_nan=True):
            raise _changed_in_place()
        results = [
            None if gradient is None or tensor is None else gradient.mul_(largest).to(tensor.dtype)
            for gradient, tensor in zip(gradients, student, strict=True)
        ]
        return (*results, None, None)


def _changed_in_place() -> RuntimeError:
    return RuntimeError(
        "linear_kd_loss: teacher_hidden, or another input without gradient, was changed in place before a derivative "
        "was computed from it; pass a clone() of it"
    )


def _gradients_of(
    loss: Tensor, student: Sequence[Tensor | None], needs_grad: _NeedsGrad, grad_output: Tensor
) -> list[Tensor | None]:
    """The needed gradients of hidden, weight and bias, differentiable themselves where gradients are enabled."""
    inputs = [tensor for tensor, needed in zip(student, needs_grad, strict=True) if needed and tensor is not None]
    create_graph = torch.is_grad_enabled()
    results = iter(torch.autograd.grad(loss, inputs, grad_output, create_graph=create_graph))
    return [next(results) if needed else None for needed in needs_grad]


def _differentiable_gradients(
    ctx: Any, gradients: Sequence[Tensor | None], student: tuple[Tensor, Tensor, Tensor | None], grad_output: Tensor
) -> list[Tensor | None]:
    """The needed gradients, computed by PyTorch ops, for higher-order derivatives.

    gradients: those of the forward pass. student: hidden (N, d), weight, bias.
    """
    unchanged = ctx.versions == _versions(ctx.constants)
    if None in ctx.versions and unchanged:
        # An inference tensor has no version. If the gradients are still those of the forward pass, it was not changed.
        with torch.no_grad():
            again = _loss_and_gradients(*student, ctx.constants, ctx.needs_grad)[1:]
        unchanged = all(
            before is None or (now is not None and torch.allclose(now, before, 0.0, 0.0, equal_nan=True))
            for now, before in zip(again, gradients, strict=True)
        )
    if not unchanged:
        raise _changed_in_place()
    # Views, so that the inputs' hooks do not run here: they run once, in the outer backward pass.
    hidden, weight, bias = student
    hidden, weight, bias = hidden.view_as(hidden), weight.view_as(weight), None if bias is None else bias.view_as(bias)
    loss = _composed(hidden, weight, bias, ctx.constants)
    return _gradients_of(loss, (hidden, weight, bias), ctx.needs_grad, grad_output)


# --- Arguments


class _Classifier(NamedTuple):
    """A linear classifier and its input: hidden (..., d), weight (C, d), bias (C,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def _check_matrix(name: str, tensor: Any, shape: str) -> None:
    check_tensor(name, tensor, f"shape {shape}", "last_hidden_state")
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be a plain Tensor of shape {shape}; got a DTensor: pass the whole one, {name}.full_tensor(), "
            "for a weight or a bias, and this process's rows, .to_local() with num_valid, for hidden states"
        )
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {tensor.dtype}")


def _check_classifier(who: str, classifier: _Classifier, device: torch.device | None) -> torch.dtype:
    """Checks one classifier; returns the dtype of its logits, which is F.linear's, under autocast too.

    who: "student" or "teacher". device: the student's, None for the student itself.
    """
    hidden, weight, bias = classifier
    _check_matrix(f"{who}_hidden", hidden, "(..., d)")
    _check_matrix(f"{who}_weight", weight, "(C, d)")
    if hidden.dim() < 2:
        raise ValueError(f"{who}_hidden must have shape (..., d), two dimensions or more; got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(f"{who}_weight must have shape (C, d) with C >= 1; got {tuple(weight.shape)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{who}_weight must have {hidden.shape[-1]} columns like {who}_hidden {tuple(hidden.shape)}; "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        _check_matrix(f"{who}_bias", bias, "(C,)")
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"{who}_bias must have shape ({weight.shape[0]},); got {tuple(bias.shape)}")
    device = device or hidden.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    expected = _cast_dtype(hidden.dtype, autocast)
    for name, tensor in zip(_Classifier._fields, classifier, strict=True):
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{who}_{name} must be on {device} like student_hidden; got {tensor.device}")
        if _cast_dtype(tensor.dtype, autocast) != expected:
            raise TypeError(f"{who}_{name} must be {hidden.dtype} like {who}_hidden; got {tensor.dtype}")
    return expected


def _cast_dtype(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    return dtype if autocast is None or dtype == torch.float64 else autocast


def _check_classifiers(student: _Classifier, teacher: _Classifier) -> tuple[torch.dtype, torch.dtype]:
    """Checks both classifiers; returns the dtypes of the student's and the teacher's logits."""
    student_dtype = _check_classifier("student", student, None)
    teacher_dtype = _check_classifier("teacher", teacher, student.hidden.device)
    classes = student.weight.shape[0]
    if teacher.weight.shape[0] != classes:
        raise ValueError(
            f"teacher_weight must have the student's {classes} classes; got shape {tuple(teacher.weight.shape)}: if "
            "the larger vocabulary is padded, pass classes='truncate'"
        )
    return student_dtype, teacher_dtype


def _check_chunks(chunk_rows: int | None) -> int:
    """chunk_rows as the operator takes it: 0 for None."""
    if chunk_rows is None:
        return 0
    chunk_rows = integer("chunk_rows", chunk_rows, "an int or None")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be >= 1; got {chunk_rows!r}")
    return chunk_rows


def _cut_classifiers(student: _Classifier, teacher: _Classifier, classes: str) -> tuple[_Classifier, _Classifier]:
    """Both classifiers without the classes that only one of them has, where classes is "truncate"."""
    if classes == "equal":
        return student, teacher
    for who, weight in (("student", student.weight), ("teacher", teacher.weight)):
        _check_matrix(f"{who}_weight", weight, "(C, d)")
    common = common_classes(classes, student.weight.shape[0], teacher.weight.shape[0])
    first, second = (
        _Classifier(side.hidden, *cut((side.weight, side.bias), common))  # type: ignore[arg-type]
        for side in (student, teacher)
    )
    return first, second


def _class_weight_sum(class_weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The sum over the valid rows of their class's weight, 0-d. It skips targets out of range, which check_values
    reports."""
    valid = (target != ignore_index) & (target >= 0) & (target < class_weight.shape[0])
    return torch.where(valid, class_weight[torch.where(valid, target, 0).long()], 0.0).sum(dtype=torch.float64)


def _float16_grad_scale(num_valid: Tensor, classes: int, options: KDOptions) -> Tensor:
    """The factor, 0-d float32, that keeps a float16 gradient from underflow; backward divides by it in float32.

    It undoes the division by the number of rows and, for a mean over classes, that by the number of classes, which is
    capped at 1024 because the cross-entropy's gradient is multiplied too.
    """
    reduction, divergence = options.reduction_name(), options.divergence_object()
    divisor = {"sum": torch.ones_like(num_valid), "mean": num_valid, "elementmean": num_valid * classes}[reduction]
    scale = torch.where(divisor > 0, divisor, 1).to(torch.float32)
    if not isinstance(divergence, MSE):
        return scale
    softness = min(options.temperature) if divergence.on == "probs" else 1.0
    return scale * min(1024.0, max(1.0, classes * softness / 2.0))


def _constants(
    student: _Classifier,
    teacher: _Classifier,
    target: Tensor | None,
    options: KDOptions,
    selected: Tensor | None,
    teacher_rows: int | None,
    class_weight: Tensor | None,
    num_valid: Tensor | float | None,
    weight_sum: Tensor | float | None,
    grad_scale: Tensor | float | None,
    chunk_rows: int | None,
    maps: tuple[LogitMap, LogitMap],
) -> _Constants:
    """Checks the arguments of linear_kd_loss and flattens their rows."""
    chunk_rows = _check_chunks(chunk_rows)
    student_dtype, teacher_dtype = _check_classifiers(student, teacher)
    hidden, classes = student.hidden, student.weight.shape[0]
    if target is None:
        options = without_target(options, partial=selected is not None or teacher_rows is not None)
        target = hidden.new_zeros(hidden.shape[:-1], dtype=torch.long)
    check_target(target, hidden, "student_hidden", probabilities=False)
    check_teacher_rows(hidden.shape, teacher.hidden.shape, teacher_rows, of="hidden")
    check_selected(selected, hidden, teacher_rows, "student_hidden")
    if class_weight is not None:
        check_class_weight(class_weight, classes, hidden.device)
        class_weight = class_weight.detach()
    target = target.reshape(-1)
    count = scalar_argument("num_valid", num_valid, hidden)
    if count is None:
        count = (target != options.ignore_index).sum()
    weights = scalar_argument("weight_sum", weight_sum, hidden)
    if weights is None and class_weight is not None:
        weights = _class_weight_sum(class_weight, target, options.ignore_index)
    scale = scalar_argument("grad_scale", grad_scale, hidden)
    if options.reduction == _ops.NO_REDUCTION:
        scale = None  # backward knows each row's factor
    elif scale is None and torch.float16 in (student_dtype, hidden.dtype):
        scale = _float16_grad_scale(count, classes, options)
    return _Constants(
        options=options,
        teacher_hidden=teacher.hidden.detach().reshape(-1, teacher.hidden.shape[-1]),
        teacher_weight=teacher.weight.detach(),
        teacher_bias=None if teacher.bias is None else teacher.bias.detach(),
        target=target,
        selected=None if selected is None else selected.detach().reshape(-1),
        class_weight=class_weight,
        num_valid=count,
        weight_sum=weights,
        grad_scale=scale,
        student_dtype=student_dtype,
        teacher_dtype=teacher_dtype,
        chunk_rows=chunk_rows,
        maps=[*maps[0], *maps[1]],
    )


def _loss(student: _Classifier, constants: _Constants) -> Tensor:
    """The loss, by the operator where it has the derivatives that are needed, else by PyTorch ops."""
    hidden = student.hidden.reshape(-1, student.hidden.shape[-1])
    by_row = constants.options.reduction == _ops.NO_REDUCTION
    if transforms_active() or any(_has_tangent(tensor) for tensor in student):
        loss = _composed(hidden, student.weight, student.bias, constants)
        return loss.view(student.hidden.shape[:-1]) if by_row else loss
    grad_enabled = torch.is_grad_enabled()
    needs_grad = _NeedsGrad(*(grad_enabled and tensor is not None and tensor.requires_grad for tensor in student))
    if not any(needs_grad):
        loss = _forward(hidden, student.weight, student.bias, constants, needs_grad)[0]
    elif by_row and torch.compiler.is_compiling():
        loss = _composed(hidden, student.weight, student.bias, constants)
    else:
        function = _LinearKDLossOfRows if by_row else _LinearKDLoss
        loss = function.apply(hidden, student.weight, student.bias, constants, needs_grad)
    return loss.view(student.hidden.shape[:-1]) if by_row else loss


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
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
    classes: str = "equal",
    logit_scale: LogitScale = 1.0,
    softcap: Softcap = None,
    chunk_rows: int | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """kd_loss(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T, target), which never stores the
    (N, C) logits.

    It applies both classifiers to chunk_rows rows at a time, runs kd_loss on this chunk, and adds the chunk's share to
    the gradients of student_hidden, student_weight and student_bias. Memory beyond inputs and gradients: two chunks of
    logits and, if student_weight has 16 bits, its gradient in float32.

    student_hidden: (..., d) floating, leading dimensions flattened to N rows. student_weight: (C, d), student_bias:
        (C,) or None; the same dtype. Autocast casts them as for F.linear.
    teacher_hidden: (..., d_t) with the same leading dimensions. teacher_weight: (C, d_t), teacher_bias: (C,) or None.
        The teacher's tensors get no gradient.
    teacher_rows: int K >= 0 if teacher_hidden has only the first K of the N rows, (K, d_t) or (B', ..., d_t). These
        rows are the selected ones, and `selected` must be None. The teacher's other logits are not computed.
    target: (...) int64/int32 class indices in [0, C), or ignore_index. None: the teacher's term alone, as in kd_loss.
    selected: as kd_loss. Rows of weight 0 are still multiplied by teacher_weight, because only the device knows which
        rows they are. To save this product, sort them to the end and pass teacher_rows.
    reduction: "mean", "sum" or "elementmean", whose gradients the forward pass computes; or "none", (...): each row's
        loss. Then backward, which alone knows each row's grad_output, applies both classifiers again.
    classes: "truncate" cuts the classes that only the larger vocabulary has; the gradient of the student's is 0.
    logit_scale, softcap: as kd_loss, of what the heads return: softcap=30.0 for Gemma 2, logit_scale=0.0625 for Cohere.
    grad_scale: as kd_loss. Without it, float16 gradients are divided by N only in backward, which multiplies by
        grad_output / N in float32 and so avoids underflow. Only "mse_probs" may need a grad_scale: its gradient is a
        product of two probabilities, which underflows float16 for thousands of equally likely classes.
    chunk_rows: rows per chunk >= 1. None: both logits of a chunk fit in 64 MiB on the CPU or 256 MiB on CUDA, with at
        least 64 rows. It changes the order in which rows are added, not the loss of a row.
    The other keywords are kd_loss's.

    Returns a 0-d float32 tensor (float64 if any logits are); (...) for reduction "none", where torch.compile stores the
    N x C logits. Gradients have the dtypes of their inputs; those of the weight and the bias are added over chunks in
    float32 (float64 for float64). A target out of range raises ValueError
    on the CPU; on CUDA, where nothing synchronises, it makes the loss NaN. PyTorch ops, which store all N x C logits,
    compute higher-order (create_graph=True), forward-mode and torch.func derivatives. torch.compile(fullgraph=True)
    makes one graph for every N. Raises ValueError or TypeError naming the argument.
    Source: Lan et al., "Improve Knowledge Distillation via Label Revision and Data Selection", arXiv 2404.03693.
    """
    if unknown:
        raise unknown_keyword(linear_kd_loss, unknown)
    options = kd_options(
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
    student, teacher = _cut_classifiers(
        _Classifier(student_hidden, student_weight, student_bias),
        _Classifier(teacher_hidden, teacher_weight, teacher_bias),
        classes,
    )
    scalars = (num_valid, weight_sum, grad_scale)
    rows = _constants(
        student,
        teacher,
        target,
        options,
        selected,
        teacher_rows,
        class_weight,
        *scalars,
        chunk_rows,
        logit_maps(logit_scale, softcap),
    )
    return _loss(student, rows)
