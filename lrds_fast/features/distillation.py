"""Feature distillation: torchdistill's losses over the rows that have the teacher, added to the loss on logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrds_fast.features.losses import criterion
from lrds_fast.features.places import Tap, choose, unwrapped
from lrds_fast.recipe.feature_methods import METHODS, values
from lrds_fast.recipe.recipe import FeatureOptions


class FeatureDistillation(nn.Module):
    """weight * K / N * the method's loss over the K of a batch's N rows that have the teacher. As in kd_loss, the other
    rows count as 0 in the mean over the batch.

    options: a recipe's [features], with a method. student, teacher: the networks, on the device of `images`;
    DistributedDataParallel is unwrapped. images: (B, channels, height, width), B >= 2, run through both networks once,
    in eval mode, to find the features' shapes. num_samples: size of the training set. labels: its (num_samples,) int64
    targets, with which "crd" draws negatives from other classes; None: from all other samples.

    This module's parameters (regressors, embeddings) are trained with the student but are not a part of it; store its
    state dict, which also has crd's memory bank, in checkpoints. It draws from PyTorch's global generators. Features
    are converted to float32.
    Raises ImportError without torchdistill, ValueError for modules that do not exist, whose defaults are unknown, or
    whose features have a shape that the method cannot use.
    """

    def __init__(
        self,
        options: FeatureOptions,
        student: nn.Module,
        teacher: nn.Module,
        images: Tensor,
        num_samples: int,
        labels: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not options.method:
            raise ValueError(f"features.method must be one of {', '.join(METHODS)}; got ''")
        if num_samples < 1 or (labels is not None and labels.shape != (num_samples,)):
            shape = None if labels is None else tuple(labels.shape)
            raise ValueError(f"labels must have shape (num_samples,), num_samples >= 1; got {shape} and {num_samples}")
        self.method = options.method
        self.weight = METHODS[options.method].weight if options.weight < 0 else options.weight
        inner = unwrapped(student, "student"), unwrapped(teacher, "teacher")
        self.student_layers, self.teacher_layers = choose(
            options.method, *inner, options.student_layers, options.teacher_layers
        )
        shapes = [
            _shapes(network, places, role, images, options.method)
            for network, places, role in (
                (inner[0], self.student_layers, "student"),
                (inner[1], self.teacher_layers, "teacher"),
            )
        ]
        numbers = values(options.method, options.options)
        self.criterion = criterion(options.method, shapes[0], shapes[1], numbers, num_samples, labels)
        self.criterion.to(images.device)
        self._student = Tap(student, self.student_layers, "student")
        self._teacher = Tap(teacher, self.teacher_layers, "teacher")

    def forward(self, target: Tensor, indices: Tensor, rows: Tensor | int | None = None) -> Tensor:
        """The 0-dim float32 loss of the last forward passes of student and teacher, whose features are then released.

        target, indices: (N,) int64, the batch's labels and its samples' numbers in the training set. rows: which rows
        have the teacher. An int K: the first K, and the teacher ran at least on these (K = 0: it need not have run). A
        bool (N,): the teacher ran on all N rows. None: those that the teacher ran on, which are the first ones.
        For K = 0, and for K = 1 if the method compares rows or uses batch statistics, loss and gradients are 0. Raises
        RuntimeError if a forward pass is missing or the teacher ran in inference mode, ValueError for row numbers that
        do not fit.
        """
        student, teacher = self._student.take(), self._teacher.take()
        if not student:
            raise RuntimeError("features: the student did not run with gradients since the last loss; call it first")
        if not len(student[0]) == len(target) == len(indices):
            raise ValueError(
                f"target and indices must have the student's {len(student[0])} rows; got {len(target)} and"
                f" {len(indices)}"
            )
        if rows is None and not teacher:
            raise RuntimeError("features: the teacher did not run since the last loss; call it, or pass rows=0")
        with_teacher = _teacher_rows(rows, len(target), len(teacher[0]) if teacher else 0)
        count = with_teacher if isinstance(with_teacher, int) else len(with_teacher)
        if count < METHODS[self.method].least:
            return self._zero(student)
        if any(value.is_inference() for value in teacher):
            raise RuntimeError(
                "features: the teacher ran under torch.inference_mode, whose outputs cannot be saved for backward;"
                " run it under torch.no_grad"
            )

        def cut(value: Tensor) -> Tensor:
            return value[:with_teacher] if isinstance(with_teacher, int) else value[with_teacher.to(value.device)]

        device = student[0].device
        with torch.autocast(device.type, enabled=False):
            loss: Tensor = self.criterion(
                [cut(value).float() for value in student],
                [cut(value.detach()).float() for value in teacher],
                cut(indices).to(device),
                cut(target).to(device),
            )
        return self.weight * count / len(target) * loss

    def close(self) -> None:
        """Removes the hooks from both networks."""
        self._student.close()
        self._teacher.close()

    def extra_repr(self) -> str:
        pairs = zip(self.student_layers, self.teacher_layers, strict=True)
        return f"{self.method!r}, weight={self.weight:g}, " + ", ".join(f"{ours} <- {theirs}" for ours, theirs in pairs)

    def _zero(self, student: Sequence[Tensor]) -> Tensor:
        """0 with a graph to all inputs of a loss: a sum of empty slices, which is 0 even beside inf and NaN."""
        empty_sums = [value.flatten()[:0].float().sum() for value in (*student, *self.parameters())]
        return torch.stack(empty_sums).sum()


def _teacher_rows(rows: Tensor | int | None, total: int, taught: int) -> Tensor | int:
    """The rows with the teacher, as a number of first rows or as row numbers (K,) int64. The teacher ran on the first
    `taught` of `total` rows."""
    if isinstance(rows, Tensor):
        if rows.dtype != torch.bool or rows.shape != (total,) or taught != total:
            raise ValueError(
                f"rows must be bool of shape ({total},), with a teacher that ran on all of them; got {rows.dtype} of"
                f" shape {tuple(rows.shape)} and a teacher that ran on {taught} rows"
            )
        return rows.nonzero()[:, 0]
    count = taught if rows is None else rows
    if not 0 <= count <= min(total, taught if count else total):
        raise ValueError(f"rows must be 0 to {min(total, taught)}: the teacher ran on {taught} of {total}; got {count}")
    return count


def _shapes(network: nn.Module, places: Sequence[str], role: str, images: Tensor, method: str) -> list[torch.Size]:
    """The features' shapes, from a forward pass in eval mode that changes no state. ValueError if the method cannot use
    them."""
    tap = Tap(network, places, role)
    training = {module: module.training for module in network.modules()}
    try:
        network.eval()
        with torch.enable_grad():  # the student's hooks store features only then
            network(images[:2])
        shapes = [value.shape for value in tap.take()]
    finally:
        tap.close()
        for module, was in training.items():
            module.training = was
    if len(shapes) < len(places):
        raise ValueError(
            f"features.{role}_layers: {', '.join(places)}: none of these modules runs in a forward pass; name others"
        )
    for place, shape in zip(places, shapes, strict=True):
        if METHODS[method].places in ("hint", "stages", "last") and method != "sp" and len(shape) != 4:
            raise ValueError(
                f"features.{role}_layers: {method!r} takes maps (N, C, H, W); {place} gives {tuple(shape)}"
            )
        if method == "reviewkd" and (len(shape) not in (2, 4) or shape[2:3] != shape[3:4]):
            raise ValueError(
                f"features.{role}_layers: 'reviewkd' takes square maps (N, C, H, H) and vectors; {place} gives"
                f" {tuple(shape)}"
            )
    return shapes
