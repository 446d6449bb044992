"""The training loop, top to bottom."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrds_fast.data import Data, derived_seed
from lrds_fast.features.distillation import FeatureDistillation
from lrds_fast.ranks import Ranks, any_process, joined, same_buffers
from lrds_fast.recipe.recipe import Recipe
from lrds_fast.train import rescoring
from lrds_fast.train.checkpoint import Position
from lrds_fast.train.evaluation import check_class_counts, evaluate
from lrds_fast.train.folder import CHECKPOINT, Folder, identity
from lrds_fast.train.lock import holding
from lrds_fast.train.notes import note
from lrds_fast.train.step import Step
from lrds_fast.train.stopping import Request, Stopped, stop_requests
from lrds_fast.train.summary import write_summary
from lrds_fast.train.teaching import CachedAnswers
from lrds_fast.train.trackers import Trackers

#: Steps between looks at whether the loss is finite: a look waits for the device.
CHECK_EVERY = 50
#: Steps between agreements of several processes on whether to stop.
AGREE_EVERY = 10


class TrainResult(NamedTuple):
    """records: one per epoch, as in the log. teacher_pred: (N,) int64 on the CPU, the class the teacher last gave each
    training sample, -1 where its answer never counted; None without a teacher. selected: (N,) bool, who kept the
    teacher in the last epoch; None is all."""

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
    cached: CachedAnswers | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], object] | None = None,
) -> TrainResult:
    """Trains `student` in place; log.jsonl, last.pt, best.safetensors, recipe.json and, at the end, summary.json go to
    the folder `out`.

    selected: (N,) bool over data.train's samples, those that keep the teacher; None is all. With
    recipe.selection.after it counts until the first scoring; what is selected then goes to selections/.
    cached: answers of the teacher, which then is not run. fingerprint: of the data; resuming on other data is an error.
    resume: goes on after out/last.pt, in the middle of an epoch too, with the same numbers as if never stopped (bit for
    bit on the CPU); without such a file it starts. overwrite: an older run in `out` may go. progress: a bar on stderr.
    say: is told of every epoch.

    Under torchrun every process makes this call with the same arguments: each batch is divided among them, and the
    gradients are those of the whole batch's mean. SIGTERM and Ctrl-C end the run after a checkpoint.

    Raises FileExistsError for an older run that may not go, or another that is going on in `out`, FloatingPointError
    where the loss is not finite, ValueError where class counts differ or scoring lacks what it needs, and Stopped on a
    signal, once the checkpoint is written.
    """
    with joined(recipe.run.device, recipe.run.timeout) as device, stop_requests() as request, ExitStack() as held:
        ranks = Ranks.current()
        _check(recipe, data, teacher, selected, ranks)
        memory_format = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
        student.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        if teacher is not None:
            teacher.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
            teacher.eval().requires_grad_(False)
        check_class_counts(data, student, teacher, device, memory_format)

        features = _features(recipe, data, student, teacher, device)
        torch.manual_seed(derived_seed("train", recipe.seed, *([ranks.rank] if ranks.rank else [])))
        steps_per_epoch = len(data.train)
        step = Step(
            recipe,
            student,
            teacher,
            device,
            num_classes=data.num_classes,
            num_samples=len(data.train.labels),
            steps_per_epoch=steps_per_epoch,
            ranks=ranks,
            cached=cached,
            features=features,
        )
        held.enter_context(holding(out, ranks=ranks))
        folder = Folder(out, recipe, identity(recipe, fingerprint, selected), step, ranks)
        position = folder.open(resume=resume, overwrite=overwrite)
        selected = folder.selected_at(position, selected)
        trackers = Trackers(recipe, out, position.epochs * steps_per_epoch) if ranks.first else None
        bar = tqdm(
            total=recipe.schedule.epochs * steps_per_epoch,
            initial=position.epochs * steps_per_epoch + position.steps,
            desc=recipe.name,
            disable=not progress or not ranks.first or sys.stderr is None,
            leave=False,
        )
        told = 0
        taught = teacher is not None or cached is not None
        for epoch in range(position.epochs, recipe.schedule.epochs):
            started = time.perf_counter()
            begun = position.steps if epoch == position.epochs else 0
            if teacher is not None and not begun and rescoring.is_due(recipe.selection, epoch):
                selected = rescoring.rescore(
                    recipe,
                    data,
                    student,
                    teacher,
                    epoch=epoch,
                    path=rescoring.path_of(out, epoch),
                    fingerprint=fingerprint,
                    selected=selected,
                    progress=progress,
                )
            student.train()
            step.begin_epoch(epoch, selected)
            if begun:
                step.load_state_dict(position.state, within_epoch=True)

            # ---- an epoch's steps ----
            for done, batch in enumerate(data.train.epoch(epoch, selected, **_part_of(begun, ranks)), start=begun + 1):
                number = epoch * steps_per_epoch + done - 1
                step(batch, number)
                bar.update()
                look = done % CHECK_EVERY == 0
                if look or device.type == "cpu":
                    step.totals.check_finite(recipe, out / CHECKPOINT)
                within = done < steps_per_epoch
                asked = ranks.count == 1 or done % AGREE_EVERY == 0
                if within and asked and any_process(request.signal != 0, ranks):
                    step.totals.check_finite(recipe, out / CHECKPOINT)
                    folder.save(Position(epoch, done, {}))
                    bar.close()
                    raise _stopped(request, epoch, done, out)
                if within and recipe.run.save_every_steps and done % recipe.run.save_every_steps == 0:
                    step.totals.check_finite(recipe, out / CHECKPOINT)
                    folder.save(Position(epoch, done, {}))
            step.totals.check_finite(recipe, out / CHECKPOINT)
            step.end_epoch()

            # ---- what it came to ----
            record: dict[str, Any] = {
                "epoch": epoch + 1,
                "step": (epoch + 1) * steps_per_epoch,
                **step.totals.means(ranks),
                "lr": step.optimizer.param_groups[0]["lr"],
            }
            _warn_of_revision(recipe, folder.records, record)
            unreadable = getattr(data.train, "errors", [])
            for _, where, reason in unreadable[told:]:
                note(f"{where} was replaced by a grey picture: {reason}", every_process=True)
            told = len(unreadable)
            record["unreadable"] = int(ranks.sum(torch.tensor(told)))
            same_buffers((student, step.ema), ranks)
            for split, loader in (("val", data.val), ("test", data.test)):
                if loader is not None:
                    judged = evaluate(step.judged, loader, device, memory_format, step.autocast, ranks)
                    record[f"{split}_acc"], record[f"{split}_ce"] = judged.accuracy, judged.cross_entropy
                    record[f"{split}_ece"] = judged.ece
            record["seconds"] = round(time.perf_counter() - started, 4)
            folder.add(record)
            if trackers is not None:
                trackers.log(record)
            stop = any_process(request.signal != 0, ranks)
            last = epoch + 1 == recipe.schedule.epochs
            if last and ranks.first:
                answers = step.predicted if taught else None
                write_summary(out, data, judged, answers, selected, device, ranks.count)
            if last or stop or (epoch + 1) % recipe.run.save_every == 0:
                folder.save(Position(epoch + 1, 0, {}))
            bar.set_postfix(loss=f"{record['train_loss']:.3f}", test=f"{record['test_acc']:.2%}")
            if say is not None and ranks.first:
                say(_line(recipe, record))
            if stop and not last:
                bar.close()
                raise _stopped(request, epoch + 1, 0, out)
        bar.close()
        if trackers is not None:
            trackers.close()
        if features is not None:
            features.close()
        if step.ema is not None:
            student.load_state_dict(step.ema.module.state_dict())
        return TrainResult(folder.records, step.predicted.cpu() if taught else None, selected)


def _check(recipe: Recipe, data: Data, teacher: nn.Module | None, selected: Tensor | None, ranks: Ranks) -> None:
    """Raises ValueError for what cannot be trained, before anything is written."""
    size = len(data.train.labels)
    if selected is not None and (selected.dtype != torch.bool or selected.shape != (size,)):
        raise ValueError(
            f"selected must be bool of shape ({size},), one per training sample;"
            f" got {selected.dtype} of shape {tuple(selected.shape)}"
        )
    parts = ranks.count * recipe.run.accumulate
    if parts > 1 and min(recipe.data.batch_size, size) < 2 * parts:
        raise ValueError(
            f"data.batch_size is what all processes and accumulation steps share: {min(recipe.data.batch_size, size)}"
            f" rows are fewer than 2 for each of {ranks.count} process(es) x {recipe.run.accumulate} step(s)"
        )
    rescoring.check(recipe, data, teacher)


def _features(
    recipe: Recipe, data: Data, student: nn.Module, teacher: nn.Module | None, device: torch.device
) -> FeatureDistillation | None:
    """The recipe's loss of inner features, with fresh adapters; None where it has none."""
    if not recipe.features.method:
        return None
    if teacher is None:
        raise ValueError("features.method needs teacher.model, the network whose features are taught")
    torch.manual_seed(derived_seed("features", recipe.seed))
    images = next(iter(data.test.epoch(0))).images[:2].to(device)
    labels = data.train.labels
    return FeatureDistillation(recipe.features, student, teacher, images, len(labels), labels)


def _warn_of_revision(recipe: Recipe, earlier: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
    """Prints a note, once a run, where revised rows give the label a higher probability than right rows do."""

    def too_sure(epoch: Mapping[str, Any]) -> bool:
        return bool(epoch.get("p_label_revised", 0.0) > epoch.get("p_label_right", 0.0))

    if too_sure(record) and not any(map(too_sure, earlier)):
        at_one = recipe.loss.revise_temperature == 1.0
        advice = "Set" if at_one else "Revise at T = 1 (loss.revise_temperature=1), or set"
        note(
            f"label revision gives the label a probability of {record['p_label_revised']:.2f} where the teacher is"
            f" wrong, {record['p_label_right']:.2f} is the teacher's own where it is right (means at the loss's"
            f" temperature): the hardest samples become the surest targets. {advice} loss.eta near 0.95 (it is"
            f" {recipe.loss.eta:g})"
        )


def _part_of(begun: int, ranks: Ranks) -> dict[str, Any]:
    """What a loader is asked for beyond a whole epoch."""
    part: dict[str, Any] = {}
    if begun:
        part["start"] = begun
    if ranks.count > 1:
        part["share"] = (ranks.rank, ranks.count)
    return part


def _stopped(request: Request, epochs: int, steps: int, out: Path) -> Stopped:
    name = signal.Signals(request.signal).name if request.signal else "another process's signal"
    where = f"{epochs} epochs" + (f" and {steps} steps" if steps else "")
    return Stopped(request.signal, f"stopped by {name} after {where}; {out / CHECKPOINT} is saved")


def _line(recipe: Recipe, record: Mapping[str, Any]) -> str:
    """An epoch for a terminal or a log file."""
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
