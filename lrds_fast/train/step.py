"""One optimizer step of distillation: teacher and student forward, loss, backward, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from lrds_fast.data import Batch
from lrds_fast.features.distillation import FeatureDistillation
from lrds_fast.ranks import Ranks, any_process, average_gradients, rows_of_all, sum_gradients
from lrds_fast.recipe.recipe import Recipe
from lrds_fast.topk import TopKTeacher
from lrds_fast.train.checkpoint import Stateful
from lrds_fast.train.methods import objective
from lrds_fast.train.mix import Mix
from lrds_fast.train.setup import (
    autocast_factory,
    available_amp,
    build_optimizer,
    in_epoch,
    kd_factor,
    loss_arguments,
    lr_factor,
    moving_average,
)
from lrds_fast.train.teaching import CachedLogits, Teacher, TeacherRows, leading_rows, predicted, teacher_rows
from lrds_fast.train.totals import MEASURED_ROWS, Totals


class _MicroBatch(NamedTuple):
    """The rows of one forward and backward pass, on the device.

    images: (N, ...), or (2 N, ...) with the strongly augmented view behind the first. teacher_images: of the first
    `teacher_batch` rows, likewise. target: (N,) int64. labels: target, or (N, C) shares of mixed labels. indices: (N,),
    of the samples. rows: the rows that have a teacher. teacher_batch: the number of rows with teacher logits. views: 1
    or 2. step: the optimizer step's number over all epochs. denominator: the divisor of sums over rows; None is N."""

    images: Tensor
    teacher_images: Tensor
    target: Tensor
    labels: Tensor
    indices: Tensor
    rows: TeacherRows
    teacher_batch: int
    views: int
    step: int
    denominator: Tensor | float | None


class Step:
    """Carries out optimizer steps on `student`, in place.

    recipe: decides precision, memory format, compilation, accumulation, optimizer and loss. student, teacher: on
    `device`; the teacher in eval mode and frozen, None for training without a teacher or with `cached` logits.
    num_classes: C. num_samples: of the training split. steps_per_epoch: for the schedule. ranks: the processes that
    share every batch; gradients are those of the mean over all of their rows. features: a loss on inner features that
    is added to the loss on logits; its own parameters are trained with the student.

    Call begin_epoch() first, then the step once per batch, then end_epoch(). Afterwards `totals` has the epoch's sums,
    and `predicted`, (N,) int64, the class that the teacher last predicted for each sample, -1 where its logits were
    never used.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: nn.Module,
        teacher: nn.Module | None,
        device: torch.device,
        *,
        num_classes: int,
        num_samples: int,
        steps_per_epoch: int,
        ranks: Ranks | None = None,
        cached: CachedLogits | None = None,
        features: FeatureDistillation | None = None,
    ) -> None:
        options, data = recipe.run, recipe.data
        self.recipe, self.student, self.device, self.features = recipe, student, device, features
        self.ranks = ranks or Ranks()
        self._steps_per_epoch = steps_per_epoch
        self._memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.amp = available_amp(options.amp, device, emulated=options.amp_emulated)
        self.autocast = autocast_factory(self.amp, device)
        self._loss_arguments = loss_arguments(recipe.loss)
        # Label revision is measured in the first steps of an epoch.
        revises = recipe.loss.revise != "none" and recipe.loss.divergence != "rld"
        self._measured_steps = -(-MEASURED_ROWS // data.batch_size) if revises else 0
        trained = student if features is None else nn.ModuleList([student, features])
        self.optimizer = build_optimizer(recipe.optimizer, trained)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")
        self.ema = moving_average(student, options.ema_decay)
        self._parallel: DistributedDataParallel | None = None
        if self.ranks.count > 1:
            self._parallel = DistributedDataParallel(
                student, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        self._student = _compiled(student if self._parallel is None else self._parallel, options.compile)
        self._teacher = _teacher(recipe, teacher, cached, device, with_features=features is not None)
        self._cached = cached is not None
        self._mix: Mix | None = None
        if data.mixup or data.cutmix:
            self._mix = Mix(data.mixup, data.cutmix, num_classes, probability=data.mix_probability)
        self.predicted = torch.full((num_samples,), -1, device=device)
        self.begin_epoch(0, None)

    @property
    def parts(self) -> Mapping[str, Stateful | None]:
        """The objects besides the student that have state, by their names in checkpoints."""
        return {"optimizer": self.optimizer, "scaler": self.scaler, "ema": self.ema, "features": self.features}

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated: the moving average where there is one, else the student."""
        return self.student if self.ema is None else self.ema.module

    def begin_epoch(self, epoch: int, selected: Tensor | None) -> None:
        """selected: (num_samples,) bool, the samples that have the teacher; None is all."""
        self._epoch = epoch
        self._selected = selected
        self._num_selected = 0 if selected is None else int(selected.sum())
        self._objective = objective(in_epoch(self.recipe.loss, epoch, self.recipe.schedule.epochs))
        self._kd_factor = kd_factor(self.recipe.loss, epoch)
        self.totals = Totals(self.device)
        self._predicted_now = torch.full_like(self.predicted, -1)

    def end_epoch(self) -> None:
        """Merges the teacher's predictions of all processes into `predicted`."""
        now = self._predicted_by_all()
        self.predicted = torch.where(now >= 0, now, self.predicted)

    def _predicted_by_all(self) -> Tensor:
        """This epoch's predictions of the teacher in all processes; -1 where there is none yet."""
        if self.ranks.count > 1:
            dist.all_reduce(self._predicted_now, dist.ReduceOp.MAX)
        return self._predicted_now

    def state_dict(self) -> dict[str, Any]:
        """The epoch so far over all processes, without `parts`; every process must make this call."""
        return {
            "predicted": self.predicted.cpu(),
            "seen": self._predicted_by_all().cpu(),
            "totals": self.totals.state_dict(self.ranks),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, within_epoch: bool) -> None:
        """The reverse of state_dict. within_epoch: also the unfinished epoch's state; call begin_epoch before."""
        self.predicted.copy_(state["predicted"])
        if within_epoch:
            self._predicted_now.copy_(state["seen"])
            self.totals.load_state_dict(state["totals"], self.ranks)

    def __call__(self, batch: Batch, number: int) -> None:
        """One optimizer step.

        batch: this process's rows; empty where an epoch's last batch has too few rows for all processes. number: the
        step's number over all epochs, from 0.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * lr_factor(self.recipe.schedule, number / self._steps_per_epoch)
        if self.recipe.run.compile not in ("off", "default"):
            mark: Any = torch.compiler.cudagraph_mark_step_begin  # untyped
            mark()
        rows = len(batch.indices)
        last_of_epoch = self.ranks.count > 1 and (number + 1) % self._steps_per_epoch == 0
        divided = not (last_of_epoch and any_process(rows == 0, self.ranks))
        micro_batches = _split(batch, min(self.recipe.run.accumulate, max(rows // 2, 1))) if rows else []
        denominator: Tensor | float | None = None
        if len(micro_batches) > 1 or self.ranks.count > 1:
            # DistributedDataParallel averages the processes' gradients, hence the division by their number.
            denominator = rows_of_all(rows, self.device, self.ranks) / (self.ranks.count if divided else 1)
        self.optimizer.zero_grad(set_to_none=True)
        for place, part in enumerate(micro_batches):
            last = place + 1 == len(micro_batches)
            with nullcontext() if last or self._parallel is None else self._parallel.no_sync():
                micro = self._on_device(part, number, place, denominator)
                self._forward_backward(micro, self._student if divided else self.student)
        with record_function("optimizer"):
            self._update(divided)

    def _update(self, divided: bool) -> None:
        """Updates the parameters. divided: whether every process had rows, so that its gradients are averaged."""
        if not divided:
            self.scaler.scale(torch.zeros((), device=self.device))  # GradScaler.step needs a scaled loss
            sum_gradients([p for group in self.optimizer.param_groups for p in group["params"]], self.ranks)
        elif self.features is not None:
            average_gradients(self.features.parameters(), self.ranks)
        if self.recipe.run.clip_grad_norm > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.run.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.student)

    def _on_device(self, batch: Batch, number: int, place: int, denominator: Tensor | float | None) -> _MicroBatch:
        """Moves a micro-batch to the device, and mixes its samples where the recipe does. place: its number in the
        batch, from 0."""
        images, target = self._moved(batch.images), batch.targets.to(self.device, non_blocking=True)
        rows = TeacherRows(0, 0, None)
        if self._teacher is not None:
            rows = teacher_rows(batch, self._selected, self._num_selected, self.recipe.selection.compose)
        labels = target
        if self._mix is not None:
            if rows.mask is not None:
                raise ValueError(
                    "data.mixup and data.cutmix need selection.compose 'prefix' and a loader that puts the"
                    " selected samples first"
                )
            seed = (self.recipe.seed, self._epoch, number, place, self.ranks.rank)
            images, labels = self._mix(images, target, rows.used, *seed)
        teacher_batch = rows.used if self._cached else rows.prefix
        teacher_images, views = images[:teacher_batch], 1
        if batch.strong is not None:
            strong, views = self._moved(batch.strong), 2
            images, teacher_images = torch.cat([images, strong]), torch.cat([teacher_images, strong[:teacher_batch]])
        return _MicroBatch(
            images,
            teacher_images,
            target,
            labels,
            batch.indices,
            rows,
            teacher_batch=teacher_batch,
            views=views,
            step=number,
            denominator=denominator,
        )

    def _moved(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True, memory_format=self._memory_format)

    def _forward_backward(self, micro: _MicroBatch, student: Callable[[Tensor], Tensor]) -> None:
        """Adds the micro-batch's gradients to the parameters and its loss to the totals."""
        teacher_logits: Tensor | TopKTeacher | None = None
        if self._teacher is not None and micro.teacher_batch:
            with record_function("teacher"):
                indices = micro.indices[: micro.teacher_batch]
                teacher_logits = self._teacher.start(micro.teacher_images, indices, self._epoch)
        with record_function("student"), self.autocast():
            logits = student(micro.images)
        with record_function("loss"):
            if self._teacher is None:
                loss = self._cross_entropy(micro, logits)
            elif teacher_logits is None:  # no row of this micro-batch has a teacher
                loss = self._distillation(micro, logits, logits.detach()[:0])
            else:
                loss = self._distillation(micro, logits, self._teacher.wait(teacher_logits))
        with record_function("backward"):
            torch.autograd.backward(self.scaler.scale(loss))

    def _cross_entropy(self, micro: _MicroBatch, logits: Tensor) -> Tensor:
        """The loss without a teacher."""
        rows = len(micro.target)
        loss = F.cross_entropy(logits.float(), micro.labels, label_smoothing=self.recipe.loss.label_smoothing)
        if micro.denominator is not None:
            loss = loss * (rows / micro.denominator)
        self.totals.add_cross_entropy(loss, rows, micro.step, denominator=micro.denominator or float(rows))
        return loss

    def _distillation(self, micro: _MicroBatch, logits: Tensor, teacher_logits: Tensor | TopKTeacher) -> Tensor:
        """The loss with a teacher. logits: (N, C), teacher_logits: (teacher_batch, C), or twice as many rows with two
        views."""
        rows, used = len(micro.target), micro.rows.used
        strong: dict[str, Any] = {}
        if micro.views == 2 and isinstance(teacher_logits, Tensor):
            half = len(teacher_logits) // 2
            strong["strong"] = logits[rows:], teacher_logits[half:][:used]
            logits, teacher_logits = logits[:rows], teacher_logits[:half]
        teacher_logits = leading_rows(teacher_logits, used)
        mask = None if micro.rows.mask is None else micro.rows.mask.to(self.device, non_blocking=True)
        if micro.labels is micro.target and used and micro.step % self._steps_per_epoch < self._measured_steps:
            dense = teacher_logits.dense(logits.shape[1]) if isinstance(teacher_logits, TopKTeacher) else teacher_logits
            self.totals.add_revised(
                dense, micro.target[:used], None if mask is None else mask[:used], self._loss_arguments
            )
        parts = self._objective(
            logits,
            teacher_logits,
            micro.labels,
            selected=mask,
            num_valid=micro.denominator,
            # The loss multiplies by the scale in float32, before it rounds its gradient to half precision.
            grad_scale=self.scaler._scale if self.scaler.is_enabled() else None,
            **strong,
        )
        denominator = float(rows) if micro.denominator is None else micro.denominator
        loss, feature_loss = parts.loss, None
        if self.features is not None:
            feature_loss = self.features(micro.target, micro.indices, used if mask is None else mask)
            feature_loss = feature_loss * (self._kd_factor * rows / denominator)
            loss = loss + feature_loss
        self.totals.add(parts, rows, micro.teacher_batch, micro.step, denominator=denominator, features=feature_loss)
        if used and self._mix is None:
            indices = micro.indices[:used].to(self.device, non_blocking=True)
            self._predicted_now[indices] = predicted(teacher_logits, micro.target[:used])
        return loss


def _compiled(model: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    if mode == "off":
        return model
    run: Callable[[Tensor], Tensor] = torch.compile(model, mode=mode)
    return run


def _teacher(
    recipe: Recipe,
    model: nn.Module | None,
    cached: CachedLogits | None,
    device: torch.device,
    *,
    with_features: bool,
) -> Teacher | None:
    """The teacher in the recipe's precision: the cached logits where there are some, else the network; None without
    either. with_features: whether a loss uses its activations."""
    if model is None and cached is None:
        return None
    options = recipe.run
    amp = available_amp(recipe.teacher.amp or options.amp, device, emulated=options.amp_emulated)
    runs = model is not None and cached is None
    return Teacher(
        model if runs else None,
        device,
        autocast=autocast_factory(amp, device),
        run=_compiled(model, options.compile) if model is not None and runs else None,
        cached=cached,
        own_stream=recipe.teacher.own_stream,
        keep_tensors=with_features,
    )


def _split(batch: Batch, count: int) -> list[Batch]:
    """`count` micro-batches of every count-th row, so that in each the selected samples stay in front."""
    if count == 1:
        return [batch]
    return [
        Batch(
            batch.images[i::count],
            batch.targets[i::count],
            batch.indices[i::count],
            None if batch.strong is None else batch.strong[i::count],
        )
        for i in range(count)
    ]
