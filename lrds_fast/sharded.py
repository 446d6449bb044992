"""DTensor logits: rows that several processes share. Imported only where a DTensor arrives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from lrds_fast.options import REDUCTION, KDOptions

Call = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def _row_placements(name: str, tensor: DTensor) -> list[Placement]:
    """The placements of a tensor (..., C) whose rows may be sharded. ValueError where a row is not whole."""
    for placement in tensor.placements:
        if isinstance(placement, Shard) and placement.dim % tensor.dim() < tensor.dim() - 1:
            continue
        if not isinstance(placement, Replicate):
            raise ValueError(
                f"{name} must be a DTensor whose rows are sharded or replicated, because a softmax needs a whole row; "
                f"got {tensor.placements}: pass {name}.redistribute(placements=[Shard(0)]), or {name}.full_tensor()"
            )
    return [Shard(p.dim % tensor.dim()) if isinstance(p, Shard) else Replicate() for p in tensor.placements]


def _local(name: str, tensor: object, mesh: Any, placements: list[Placement]) -> Any:
    """This process's part of a tensor with the given placements; None as None."""
    if tensor is None:
        return None
    if not isinstance(tensor, DTensor):
        raise TypeError(
            f"{name} must be a DTensor like student_logits; got {type(tensor).__name__}: distribute it "
            "(torch.distributed.tensor.distribute_tensor), or pass the local parts of all tensors and num_valid"
        )
    return tensor.redistribute(mesh, placements).to_local()


def _global(value: Tensor, mesh: Any, placements: list[Placement]) -> DTensor:
    """The sum over the processes that share the rows, not added up yet."""
    terms = [Partial() if isinstance(placement, Shard) else Replicate() for placement in placements]
    return DTensor.from_local(value, mesh, terms, run_check=False)


def sharded_call(
    call: Call,
    student_logits: Any,
    teacher_logits: Any,
    target: Any,
    options: KDOptions,
    selected: Any,
    teacher_rows: int | None,
    class_weight: Tensor | None,
    num_valid: Any,
    weight_sum: Any,
    grad_scale: Any,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kd_loss of DTensors: each process computes its rows with `call`; means are over the rows of all processes.

    The results are DTensors whose terms are not added up (Partial); those of reduction "none" are sharded like the
    rows. Raises TypeError or ValueError for tensors that are sharded otherwise.
    """
    if not isinstance(student_logits, DTensor):
        raise TypeError(
            "student_logits must be a DTensor like teacher_logits, target or selected; got Tensor: pass .to_local() of "
            "the DTensors and num_valid"
        )
    placements = _row_placements("student_logits", student_logits)
    if isinstance(teacher_logits, DTensor):
        _row_placements("teacher_logits", teacher_logits)
    if teacher_rows is not None:
        raise ValueError(
            "teacher_rows must be None for DTensors, whose first rows are on some processes; pass selected"
        )
    mesh = student_logits.device_mesh
    student, teacher, labels, rows = (
        _local(name, tensor, mesh, placements)
        for name, tensor in (
            ("student_logits", student_logits),
            ("teacher_logits", teacher_logits),
            ("target", target),
            ("selected", selected),
        )
    )
    class_weight, num_valid, weight_sum, grad_scale = (
        tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for tensor in (class_weight, num_valid, weight_sum, grad_scale)
    )

    def over_all(value: Tensor) -> Tensor:
        return _global(value, mesh, placements).full_tensor()

    if options.reduction in (REDUCTION["mean"], REDUCTION["elementmean"]):
        valid = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
        if labels is not None and not labels.is_floating_point():
            valid = labels != options.ignore_index
        num_valid = over_all(valid.sum()) if num_valid is None else num_valid
        if weight_sum is None and class_weight is not None and labels is not None and not labels.is_floating_point():
            known = labels[valid & (labels >= 0) & (labels < len(class_weight))]  # the call reports the others
            weight_sum = over_all(class_weight[known.long()].sum(dtype=torch.float64))
    scalars = (num_valid, weight_sum, grad_scale)
    outputs = call(student, teacher, labels, options, rows, None, class_weight, *scalars, *others)
    if options.reduction == REDUCTION["none"]:
        # The shape of all rows, because the processes may have different numbers of them.
        shape = student_logits.shape[:-1]
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        made = [
            DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=stride)
            for value in outputs[:3]
        ]
    else:
        made = [_global(value, mesh, placements) for value in outputs[:3]]
    return made[0], made[1], made[2], _global(outputs[3], mesh, placements)
