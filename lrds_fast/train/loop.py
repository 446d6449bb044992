"""The training loop, top to bottom: train() makes a TrainingRun, whose train() goes through the epochs."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrds_fast.data import Data, Loader, derived_seed
from lrds_fast.features.distillation import FeatureDistillation
from lrds_fast.lock import holding
from lrds_fast.models.student import Description
from lrds_fast.notes import note
from lrds_fast.ranks import Ranks, any_process, joined, same_buffers
from lrds_fast.recipe.recipe import Recipe
from lrds_fast.train import rescoring
from lrds_fast.train.checkpoint import Position
from lrds_fast.train.checks import check_class_counts, check_run
from lrds_fast.train.evaluation import Evaluation, evaluate
from lrds_fast.train.folder import CHECKPOINT, Folder, identity
from lrds_fast.train.step import Step
from lrds_fast.train.stopping import Stopped, StopRequest, stop_requests
from lrds_fast.train.summary import write_summary
from lrds_fast.train.teaching import CachedLogits
from lrds_fast.train.trackers import Trackers

#: Steps between checks that the loss is finite: a check waits for the device.
CHECK_EVERY = 50
#: Steps between agreements of several processes on whether to stop.
AGREE_EVERY = 10


class TrainResult(NamedTuple):
    """records: one per epoch, as in the log. teacher_pred: (N,) int64 on the CPU, the class that the teacher last
    predicted for each training sample, -1 where its logits were never used; None without a teacher. selected: (N,)
    bool, the samples that had the teacher in the last epoch; None is all."""

    records: list[dict[str, Any]]
    teacher_pred: Tensor | None
    selected: Tensor | None


def train(
    recipe: Recipe,
    data: Data,
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    out: Path,
    fingerprint: str = "",
    selected: Tensor | None = None,
    cached: CachedLogits | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], object] | None = None,
) -> TrainResult:
    """Trains `student` in place. The folder `out` gets log.jsonl, last.pt, best.safetensors, recipe.json, student.json
    and, at the end, summary.json.

    selected: (N,) bool over data.train's samples, those that have the teacher; None is all. With recipe.selection.after
    it holds until the first scoring; later selections are written to selections/. cached: logits of the teacher, which
    is then not run. fingerprint: of the data. resume: continues from out/last.pt, also within an epoch, with the
    numbers of an uninterrupted run (bit for bit on the CPU); without that file it starts anew; another recipe, data,
    selection or teacher is an error. overwrite: replaces an older run in `out`. progress: shows a bar on stderr. say:
    is called with one line of text per epoch.

    Under torchrun every process makes this call with the same arguments: each batch is divided among them, and the
    gradients are those of the whole batch's mean. SIGTERM and Ctrl-C end the run after a checkpoint.

    Raises FileExistsError for an older run in `out` without resume or overwrite, or for another process that trains
    there, FloatingPointError where the loss is not finite, ValueError where class counts differ or scoring lacks what
    it needs, and Stopped on a signal, once the checkpoint is written.
    """
    with joined(recipe.run.device, recipe.run.timeout) as device:
        run = TrainingRun(
            recipe, data, student, teacher, device, out=out, fingerprint=fingerprint, selected=selected, cached=cached
        )
        return run.train(resume=resume, overwrite=overwrite, progress=progress, say=say)


class TrainingRun:
    """A training run: networks and step on the device, the folder, the log, and the selection that holds now.

    device: this process's; the other arguments are those of train(). Raises ValueError for what cannot be trained; no
    file is written before train().
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        student: nn.Module,
        teacher: nn.Module | None,
        device: torch.device,
        *,
        out: Path,
        fingerprint: str = "",
        selected: Tensor | None = None,
        cached: CachedLogits | None = None,
    ) -> None:
        self._recipe, self._data, self._student, self._teacher = recipe, data, student, teacher
        self._device, self._ranks = device, Ranks.current()
        self._out, self._fingerprint, self._selected = out, fingerprint, selected
        check_run(recipe, data, teacher, selected, self._ranks)
        self._memory_format = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
        student.to(device=device, memory_format=self._memory_format)  # type: ignore[call-overload]
        if teacher is not None:
            teacher.to(device=device, memory_format=self._memory_format)  # type: ignore[call-overload]
            teacher.eval().requires_grad_(False)
        check_class_counts(data, student, teacher, device, self._memory_format)
        self._features = _features(recipe, data, student, teacher, device)
        rank = self._ranks.rank
        torch.manual_seed(derived_seed("train", recipe.seed, *([rank] if rank else [])))
        self._steps_per_epoch = len(data.train)
        self._step = Step(
            recipe,
            student,
            teacher,
            device,
            num_classes=data.num_classes,
            num_samples=len(data.train.labels),
            steps_per_epoch=self._steps_per_epoch,
            ranks=self._ranks,
            cached=cached,
            features=self._features,
        )
        self._with_teacher = teacher is not None or cached is not None
        self._folder = Folder(out, recipe, identity(recipe, fingerprint, selected, teacher), self._step, self._ranks)
        self._trackers: Trackers | None = None
        self._errors_reported = 0

    def train(
        self,
        *,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool = True,
        say: Callable[[str], object] | None = None,
    ) -> TrainResult:
        """Trains all epochs that are left; see train()."""
        epochs = self._recipe.schedule.epochs
        with stop_requests() as stop, holding(self._out, ranks=self._ranks):
            position = self._folder.open(resume=resume, overwrite=overwrite)
            self._selected = self._folder.selected_at(position, self._selected)
            steps = position.epochs * self._steps_per_epoch
            if self._ranks.first:
                _description(self._recipe, self._data).write(self._out)
                self._trackers = Trackers(self._recipe, self._out, steps)
            bar = tqdm(
                total=epochs * self._steps_per_epoch,
                initial=steps + position.steps,
                desc=self._recipe.name,
                disable=not progress or not self._ranks.first or sys.stderr is None,
                leave=False,
            )
            with bar:
                for epoch in range(position.epochs, epochs):
                    started = time.perf_counter()
                    start = position.steps if epoch == position.epochs else 0
                    if start == 0:
                        self._select_if_due(epoch, progress)
                    self._student.train()
                    self._step.begin_epoch(epoch, self._selected)
                    if start > 0:
                        self._step.load_state_dict(position.state, within_epoch=True)
                    self._train_epoch(epoch, start, stop, bar)
                    record, test = self._evaluated(epoch)
                    record["seconds"] = round(time.perf_counter() - started, 4)
                    bar.set_postfix(loss=f"{record['train_loss']:.3f}", test=f"{record['test_acc']:.2%}")
                    self._finish_epoch(epoch, record, test, stop, say)
            self._close()
            teacher_pred = self._step.predicted.cpu() if self._with_teacher else None
            return TrainResult(self._folder.records, teacher_pred, self._selected)

    def _select_if_due(self, epoch: int, progress: bool) -> None:
        """Scores the samples and makes a new selection, if one is due before this epoch."""
        if self._teacher is not None and rescoring.is_due(self._recipe.selection, epoch):
            self._selected = rescoring.rescore(
                self._recipe,
                self._data,
                self._student,
                self._teacher,
                epoch=epoch,
                path=rescoring.path_of(self._out, epoch),
                fingerprint=self._fingerprint,
                selected=self._selected,
                progress=progress,
            )

    def _train_epoch(self, epoch: int, start: int, stop: StopRequest, bar: tqdm[Any]) -> None:
        """The steps of an epoch, after the first `start` ones."""
        arguments: dict[str, Any] = {"start": start} if start else {}
        if self._ranks.count > 1:
            arguments["share"] = (self._ranks.rank, self._ranks.count)
        batches = self._data.train.epoch(epoch, self._selected, **arguments)
        for done, batch in enumerate(batches, start=start + 1):
            self._step(batch, epoch * self._steps_per_epoch + done - 1)
            bar.update()
            if done % CHECK_EVERY == 0 or self._device.type == "cpu":
                self._check_finite()
            if done < self._steps_per_epoch:
                self._save_or_stop(epoch, done, stop)
        self._check_finite()
        self._step.end_epoch()

    def _save_or_stop(self, epoch: int, done: int, stop: StopRequest) -> None:
        """Writes a checkpoint after `done` steps of an epoch, where one is due; raises Stopped on a signal."""
        every = self._recipe.run.save_every_steps
        agree = self._ranks.count == 1 or done % AGREE_EVERY == 0
        stops = agree and any_process(stop.signal != 0, self._ranks)
        if stops or (every and done % every == 0):
            self._check_finite()
            self._folder.save(Position(epoch, done, {}))
        if stops:
            raise _stopped(stop, epoch, done, self._out)

    def _check_finite(self) -> None:
        self._step.totals.check_finite(self._recipe, self._out / CHECKPOINT)

    def _evaluated(self, epoch: int) -> tuple[dict[str, Any], Evaluation]:
        """The log's record of a trained epoch, without its duration, and the evaluation on the test split."""
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * self._steps_per_epoch,
            **self._step.totals.means(self._ranks),
            "lr": self._step.optimizer.param_groups[0]["lr"],
        }
        _warn_of_revision(self._recipe, self._folder.records, record)
        record["unreadable"] = self._report_unreadable()
        same_buffers((self._student, self._step.ema), self._ranks)
        if self._data.val is not None:
            self._evaluate("val", self._data.val, record)
        return record, self._evaluate("test", self._data.test, record)

    def _evaluate(self, split: str, loader: Loader, record: dict[str, Any]) -> Evaluation:
        """Evaluates the network on a split and adds the results to the record."""
        result = evaluate(
            self._step.judged, loader, self._device, self._memory_format, self._step.autocast, self._ranks
        )
        record[f"{split}_acc"], record[f"{split}_ce"] = result.accuracy, result.cross_entropy
        record[f"{split}_ece"] = result.ece
        return result

    def _report_unreadable(self) -> int:
        """Prints a note on every picture that this process could not read since the last call. Returns how many all
        processes could not read so far."""
        errors = getattr(self._data.train, "errors", [])
        for _, where, reason in errors[self._errors_reported :]:
            note(f"{where} was replaced by a grey picture: {reason}", every_process=True)
        self._errors_reported = len(errors)
        return int(self._ranks.sum(torch.tensor(self._errors_reported)))

    def _finish_epoch(
        self,
        epoch: int,
        record: dict[str, Any],
        test: Evaluation,
        stop: StopRequest,
        say: Callable[[str], object] | None,
    ) -> None:
        """Writes the record, the checkpoint where one is due, and after the last epoch the summary. Raises Stopped on a
        signal, unless the run is complete."""
        self._folder.add(record)
        if self._trackers is not None:
            self._trackers.log(record)
        stops = any_process(stop.signal != 0, self._ranks)
        last = epoch + 1 == self._recipe.schedule.epochs
        if last and self._ranks.first:
            teacher_pred = self._step.predicted if self._with_teacher else None
            write_summary(self._out, self._data, test, teacher_pred, self._selected, self._device, self._ranks.count)
        if last or stops or (epoch + 1) % self._recipe.run.save_every == 0:
            self._folder.save(Position(epoch + 1, 0, {}))
        if say is not None and self._ranks.first:
            say(_line(self._recipe, record))
        if stops and not last:
            raise _stopped(stop, epoch + 1, 0, self._out)

    def _close(self) -> None:
        """Closes what the run has opened, and gives the student the weights that were evaluated."""
        if self._trackers is not None:
            self._trackers.close()
        if self._features is not None:
            self._features.close()
        if self._step.ema is not None:
            self._student.load_state_dict(self._step.ema.module.state_dict())


def _features(
    recipe: Recipe, data: Data, student: nn.Module, teacher: nn.Module | None, device: torch.device
) -> FeatureDistillation | None:
    """The loss on inner features, its adapters initialised by the recipe's seed; None without features.method."""
    if not recipe.features.method or teacher is None:
        return None
    torch.manual_seed(derived_seed("features", recipe.seed))
    images = next(iter(data.test.epoch(0))).images[:2].to(device)
    labels = data.train.labels
    return FeatureDistillation(recipe.features, student, teacher, images, len(labels), labels)


def _warn_of_revision(recipe: Recipe, earlier: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
    """Prints a note, once per run, where the label's mean probability is higher on revised rows than on right rows."""

    def revised_is_higher(epoch: Mapping[str, Any]) -> bool:
        return bool(epoch.get("p_label_revised", 0.0) > epoch.get("p_label_right", 0.0))

    if revised_is_higher(record) and not any(map(revised_is_higher, earlier)):
        at_one = recipe.loss.revise_temperature == 1.0
        advice = "Set" if at_one else "Revise at T = 1 (loss.revise_temperature=1), or set"
        note(
            f"label revision gives the label a probability of {record['p_label_revised']:.2f} where the teacher is"
            f" wrong; the teacher itself gives it {record['p_label_right']:.2f} where it is right"
            " (means at the loss's temperature): the hardest samples get the most confident targets."
            f" {advice} loss.eta near 0.95 (it is {recipe.loss.eta:g})"
        )


def _description(recipe: Recipe, data: Data) -> Description:
    """What lrds_fast.models.load needs to know of the student."""
    transform = data.transform
    if transform is None:
        channels, height, width = next(iter(data.test.epoch(0))).images.shape[1:]
    else:
        channels, (height, width) = transform.channels, transform.crop
    names = data.class_names or tuple(str(number) for number in range(data.num_classes))
    return Description(recipe.student.model, names, (channels, height, width), transform, CHECKPOINT)


def _stopped(stop: StopRequest, epochs: int, steps: int, out: Path) -> Stopped:
    name = signal.Signals(stop.signal).name if stop.signal else "another process's signal"
    position = f"{epochs} epochs" + (f" and {steps} steps" if steps else "")
    return Stopped(stop.signal, f"stopped by {name} after {position}; {out / CHECKPOINT} is saved")


def _line(recipe: Recipe, record: Mapping[str, Any]) -> str:
    """An epoch as one line for a terminal or a log file."""
    left = (recipe.schedule.epochs - record["epoch"]) * record["seconds"]
    kept = f", {record['n_selected']}/{record['rows']} with teacher" if "n_selected" in record else ""
    return (
        f"{recipe.name}: epoch {record['epoch']}/{recipe.schedule.epochs}, loss {record['train_loss']:.4f},"
        f" test {record['test_acc']:.2%}{kept}, {record['seconds']:.1f} s, {_duration(left)} left"
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
