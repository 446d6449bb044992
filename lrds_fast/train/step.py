"""One optimizer step of distillation, as a recipe has it: teacher, student, loss, backward, update."""

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

from lrds_fast.data import Batch, prefix_rows
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
    kd_factor,
    loss_arguments,
    lr_factor,
    moving_average,
)
from lrds_fast.train.teaching import CachedAnswers, Teacher
from lrds_fast.train.totals import MEASURED_ROWS, Totals


class Step:
    """Carries out optimizer steps on `student`, in place.

    recipe: decides precision, memory format, compilation, accumulation, optimizer, loss. student, teacher: on `device`;
    the teacher in eval mode and frozen, None where labels alone teach or `cached` answers. num_classes: C. num_samples:
    of the training split. steps_per_epoch: for the schedule. ranks: the processes that share every batch; gradients are
    those of the mean over all rows of all of them. features: a loss of inner features beside that of the logits; what
    it learns itself is trained along.

    begin_epoch() comes first; then a call for each batch. Afterwards totals has the epoch's sums, predicted (N,) int64
    the class that the teacher last gave each sample, -1 where it has not been asked.
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
        cached: CachedAnswers | None = None,
        features: FeatureDistillation | None = None,
    ) -> None:
        options = recipe.run
        self.recipe, self.student, self.device = recipe, student, device
        self.ranks = ranks or Ranks()
        self._steps_per_epoch = steps_per_epoch
        self._memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.amp = available_amp(options.amp, device, emulated=options.amp_emulated)
        self.autocast = autocast_factory(self.amp, device)
        self._measure = objective(recipe.loss)
        self._loss_arguments = loss_arguments(recipe.loss)
        self._revises = recipe.loss.revise != "none" and recipe.loss.divergence != "rld"
        self._measured = -(-MEASURED_ROWS // recipe.data.batch_size)
        self.features = features
        self.optimizer = build_optimizer(
            recipe.optimizer, student if features is None else nn.ModuleList([student, features])
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")
        self.ema = moving_average(student, options.ema_decay)

        def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
            if options.compile == "off":
                return model
            run: Callable[[Tensor], Tensor] = torch.compile(model, mode=options.compile)
            return run

        self._parallel: DistributedDataParallel | None = None
        if self.ranks.count > 1:
            self._parallel = DistributedDataParallel(
                student, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        self._student = compiled(student if self._parallel is None else self._parallel)
        self._teacher: Teacher | None = None
        if teacher is not None or cached is not None:
            precision = available_amp(recipe.teacher.amp or options.amp, device, emulated=options.amp_emulated)
            self._teacher = Teacher(
                None if cached is not None else teacher,
                device,
                autocast=autocast_factory(precision, device),
                run=None if teacher is None or cached is not None else compiled(teacher),
                cached=cached,
                own_stream=recipe.teacher.own_stream,
                keep_tensors=features is not None,
            )
        self._cached = cached is not None
        self._mix: Mix | None = None
        if recipe.data.mixup or recipe.data.cutmix:
            self._mix = Mix(recipe.data.mixup, recipe.data.cutmix, num_classes, probability=recipe.data.mix_probability)
        self._num_classes, self._num_samples = num_classes, num_samples
        self._asked = self._teacher is not None
        self.predicted = torch.full((num_samples,), -1, device=device)
        self.begin_epoch(0, None)

    @property
    def parts(self) -> Mapping[str, Stateful | None]:
        """What has state besides the student, by the names that checkpoints use."""
        return {"optimizer": self.optimizer, "scaler": self.scaler, "ema": self.ema, "features": self.features}

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated: the moving average where there is one."""
        return self.student if self.ema is None else self.ema.module

    def begin_epoch(self, epoch: int, selected: Tensor | None) -> None:
        """selected: (num_samples,) bool, who has the teacher; None is all."""
        self._epoch = epoch
        self._selected = selected
        self._kept = 0 if selected is None else int(selected.sum())
        self._warm = kd_factor(self.recipe.loss, epoch)
        self._kd_weight = self.recipe.loss.kd_weight * self._warm
        self.totals = Totals(self.device)
        self._seen = torch.full_like(self.predicted, -1)

    def end_epoch(self) -> None:
        """Puts what the processes' teachers said together."""
        seen = self._seen_by_all()
        self.predicted = torch.where(seen >= 0, seen, self.predicted)

    def _seen_by_all(self) -> Tensor:
        if self.ranks.count > 1:
            dist.all_reduce(self._seen, dist.ReduceOp.MAX)
        return self._seen

    def state_dict(self) -> dict[str, Any]:
        """The epoch so far over all processes, beside `parts`; every process makes this call."""
        return {
            "predicted": self.predicted.cpu(),
            "seen": self._seen_by_all().cpu(),
            "totals": self.totals.state_dict(self.ranks),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, within_epoch: bool) -> None:
        """The reverse of state_dict. within_epoch: after begin_epoch, where an epoch was left in the middle."""
        self.predicted.copy_(state["predicted"])
        if within_epoch:
            self._seen.copy_(state["seen"])
            self.totals.load_state_dict(state["totals"], self.ranks)

    def __call__(self, batch: Batch, number: int) -> None:
        """One step. batch: this process's rows; empty where the last batch of an epoch is too small to be divided among
        the processes. number: the step's number over all epochs, from 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * lr_factor(self.recipe.schedule, number / self._steps_per_epoch)
        if self.recipe.run.compile not in ("off", "default"):
            mark: Any = torch.compiler.cudagraph_mark_step_begin  # untyped
            mark()
        rows = len(batch.indices)
        last_of_epoch = self.ranks.count > 1 and (number + 1) % self._steps_per_epoch == 0
        divided = not (last_of_epoch and any_process(rows == 0, self.ranks))
        parts = _divided(batch, min(self.recipe.run.accumulate, max(rows // 2, 1))) if rows else []
        # What a row counts: with several processes DistributedDataParallel takes the mean of their gradients.
        denominator: Tensor | float | None = None
        if len(parts) > 1 or self.ranks.count > 1:
            denominator = rows_of_all(rows, self.device, self.ranks) / (self.ranks.count if divided else 1)
        self.optimizer.zero_grad(set_to_none=True)
        for place, part in enumerate(parts):
            last = place + 1 == len(parts)
            with nullcontext() if last or self._parallel is None else self._parallel.no_sync():
                self._forward_backward(part, number, place, denominator, self._student if divided else self.student)
        with record_function("optimizer"):
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

    def _forward_backward(
        self,
        batch: Batch,
        number: int,
        place: int,
        denominator: Tensor | float | None,
        student: Callable[[Tensor], Tensor],
    ) -> None:
        images = self._placed(batch.images)
        target = batch.targets.to(self.device, non_blocking=True)
        rows = len(target)
        listeners = Listeners(0, 0, None)
        if self._asked:
            listeners = who_listens(batch, self._selected, self._kept, self.recipe.selection.compose)
        shown, heard, mask = listeners
        labels = target
        if self._mix is not None:
            if mask is not None:
                raise ValueError("data.mixup and data.cutmix need selection.compose 'prefix' and a loader that sorts")
            seed = (self.recipe.seed, self._epoch, number, place, self.ranks.rank)
            images, labels = self._mix(images, target, heard, *seed)

        asked = heard if self._cached else shown
        seen, second = images[:asked], batch.strong
        if second is not None:  # both views at once, the first in front
            second = self._placed(second)
            images, seen = torch.cat([images, second]), torch.cat([seen, second[:asked]])
        answers: Tensor | TopKTeacher | None = None
        if self._teacher is not None and asked:
            with record_function("teacher"):
                answers = self._teacher.ask(seen, batch.indices[:asked], self._epoch)
        with record_function("student"), self.autocast():
            logits = student(images)
        with record_function("loss"):
            if self._teacher is None:
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.loss.label_smoothing)
                if denominator is not None:
                    loss = loss * (rows / denominator)
                self.totals.add_cross_entropy(loss, rows, number, denominator=denominator or float(rows))
            else:
                taught = logits.detach()[:0] if answers is None else self._teacher.answered(answers)
                more: dict[str, Any] = {}
                if second is not None and isinstance(taught, Tensor):
                    first_view = len(taught) // 2
                    more["strong"] = logits[rows:], taught[first_view:][:heard]
                    logits, taught = logits[:rows], taught[:first_view]
                taught = first(taught, heard)
                selected = None if mask is None else mask.to(self.device, non_blocking=True)
                if self._revises and labels is target and heard and number % self._steps_per_epoch < self._measured:
                    dense = taught.dense(logits.shape[1]) if isinstance(taught, TopKTeacher) else taught
                    chosen = None if selected is None else selected[:heard]
                    self.totals.add_revised(dense, target[:heard], chosen, self._loss_arguments)
                measured = self._measure(
                    logits,
                    taught,
                    labels,
                    selected=selected,
                    kd_weight=self._kd_weight,
                    num_valid=denominator,
                    # Known to the loss, the scale is folded in float32 before the gradient is rounded to half.
                    grad_scale=self.scaler._scale if self.scaler.is_enabled() else None,
                    **more,
                )
                loss, share = measured.loss, float(rows) if denominator is None else denominator
                inner: Tensor | None = None
                if self.features is not None:
                    inner = self.features(target, batch.indices, heard if selected is None else selected)
                    inner = inner * (self._warm * rows / share)
                    loss = loss + inner
                self.totals.add(measured, rows, asked, number, denominator=share, features=inner)
                if heard and self._mix is None:
                    place_of = batch.indices[:heard].to(self.device, non_blocking=True)
                    self._seen[place_of] = predicted(taught, target[:heard])
        with record_function("backward"):
            torch.autograd.backward(self.scaler.scale(loss))

    def _placed(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True, memory_format=self._memory_format)


class Listeners(NamedTuple):
    """shown: how many rows of a batch, from the first on, the teacher sees. heard: how many of these the loss gets.
    mask: which of them count, None where all do."""

    shown: int
    heard: int
    mask: Tensor | None


def who_listens(batch: Batch, selected: Tensor | None, kept: int, compose: str) -> Listeners:
    """kept: the number of selected samples. A batch that begins with its share of them shows the teacher as many rows
    as the largest share has, so that every batch of a size asks the same of it; the loss leaves out one too many."""
    rows = len(batch.indices)
    if selected is None:
        return Listeners(rows, rows, None)
    mask = selected[batch.indices]
    count = int(mask.sum())
    if compose == "prefix" and bool(mask[:count].all()):
        return Listeners(max(count, prefix_rows(rows, len(selected), kept)), count, None)
    return Listeners(rows, rows, mask)


def predicted(answers: Tensor | TopKTeacher, target: Tensor) -> Tensor:
    """(N,) the class of the highest logit; the target where it takes part in a tie, as the loss has it."""
    if isinstance(answers, TopKTeacher):
        top, place = answers.values.max(dim=1)
        tied = ((answers.indices == target[:, None]) & (answers.values >= top[:, None])).any(dim=1)
        return torch.where(tied, target, answers.indices.gather(1, place[:, None])[:, 0].long())
    top, place = answers.max(dim=1)
    return torch.where(answers.gather(1, target[:, None])[:, 0] >= top, target, place)


def first(answers: Tensor | TopKTeacher, rows: int) -> Tensor | TopKTeacher:
    """The answers to the first rows."""
    if isinstance(answers, TopKTeacher):
        return answers._replace(
            values=answers.values[:rows],
            indices=answers.indices[:rows],
            logsumexp=answers.logsumexp[:rows],
            rest=None if answers.rest is None else answers.rest[:rows],
        )
    return answers[:rows]


def _divided(batch: Batch, count: int) -> list[Batch]:
    """A batch in `count` parts of every count-th row, so that selected samples stay in front."""
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
