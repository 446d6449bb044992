"""The training loop, top to bottom."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lrds_fast.data import Batch, Data, derived_seed, prefix_rows
from lrds_fast.train import checkpoint, rescoring
from lrds_fast.train.evaluate import check_class_counts, evaluate
from lrds_fast.train.files import append_record, read_records, remove_leftovers, rewrite_records, write_text
from lrds_fast.train.methods import objective
from lrds_fast.train.recipe import Recipe
from lrds_fast.train.setup import (
    autocast_factory,
    build_optimizer,
    kd_factor,
    lr_factor,
    moving_average,
    pick_device,
)
from lrds_fast.train.totals import Totals

CHECKPOINT = "last.pt"
LOG = "log.jsonl"
RECIPE = "recipe.json"

#: Steps between looks at whether the loss is finite: a look waits for the device.
CHECK_EVERY = 50


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
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Trains `student` in place and writes log.jsonl, last.pt and recipe.json to the folder `out`.

    selected: (N,) bool over data.train's samples, those that keep the teacher; None is all. With
    recipe.selection.after it counts until the first scoring; what is selected then goes to selections/.
    fingerprint: of the data; resuming on other data is an error. resume: goes on after out/last.pt, with the same
    numbers as if never stopped (bit for bit on the CPU); without such a file it starts. overwrite: an older run in
    `out` may go. progress: a bar on stderr.
    Raises FileExistsError for an older run that may not go, FloatingPointError where the loss is not finite, ValueError
    where class counts differ or scoring lacks what it needs.
    """
    device = pick_device(recipe.run.device)
    memory_format = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
    student.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    if teacher is not None:
        teacher.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        teacher.eval().requires_grad_(False)
    check_class_counts(data, student, teacher, device, memory_format)
    if selected is not None and (selected.dtype != torch.bool or selected.shape != data.train.labels.shape):
        raise ValueError(
            f"selected must be bool of shape ({len(data.train.labels)},), one per training sample;"
            f" got {selected.dtype} of shape {tuple(selected.shape)}"
        )

    rescoring.check(recipe, data, teacher)

    measure = objective(recipe.loss)
    autocast = autocast_factory(recipe.run.amp, device)
    optimizer = build_optimizer(recipe.optimizer, student)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.run.amp == "fp16")
    ema = moving_average(student, recipe.run.ema_decay)
    torch.manual_seed(derived_seed("train", recipe.seed))

    facts = identity(recipe, fingerprint, selected)
    parts: Mapping[str, checkpoint.Stateful | None] = {
        "optimizer": optimizer,
        "scaler": scaler,
        "ema": ema,
    }
    first_epoch, records = 0, []
    if resume and (out / CHECKPOINT).exists():
        first_epoch = checkpoint.resume(out / CHECKPOINT, facts=facts, student=student, parts=parts)
        records = [record for record in read_records(out / LOG) if record["epoch"] <= first_epoch]
        rewrite_records(out / LOG, records)
        made = rescoring.latest(out, recipe.selection, first_epoch)
        selected = selected if made is None else made.mask
    else:
        if (out / CHECKPOINT).exists() and not overwrite:
            raise FileExistsError(
                f"{out} holds a run already; go on with it (--resume), replace it (--overwrite), or set another run.out"
            )
        (out / CHECKPOINT).unlink(missing_ok=True)
        rescoring.forget(out)
        rewrite_records(out / LOG, [])
    remove_leftovers(out)
    write_text(out / RECIPE, recipe.to_json())

    teacher_pred = None if teacher is None else torch.full(data.train.labels.shape, -1, device=device)
    steps_per_epoch = len(data.train)
    bar = tqdm(
        total=recipe.schedule.epochs * steps_per_epoch,
        initial=first_epoch * steps_per_epoch,
        desc=recipe.name,
        disable=not progress,
        leave=False,
    )
    told = 0
    for epoch in range(first_epoch, recipe.schedule.epochs):
        started = time.perf_counter()
        if teacher is not None and rescoring.is_due(recipe.selection, epoch):
            selected = rescoring.rescore(
                recipe,
                data,
                student,
                teacher,
                path=rescoring.path_of(out, epoch),
                fingerprint=fingerprint,
                selected=selected,
                progress=progress,
            )
        student.train()
        kd_weight = recipe.loss.kd_weight * kd_factor(recipe.loss, epoch)
        kept = 0 if selected is None else int(selected.sum())
        totals = Totals(device)
        for step, batch in enumerate(data.train.epoch(epoch, selected), start=epoch * steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = recipe.optimizer.lr * lr_factor(recipe.schedule, step / steps_per_epoch)
            images = batch.images.to(device, non_blocking=True, memory_format=memory_format)
            target = batch.targets.to(device, non_blocking=True)
            shown, heard, mask = who_listens(batch, selected, kept, recipe.selection.compose)

            with autocast():
                logits = student(images)
            if teacher is None:
                loss = F.cross_entropy(logits.float(), target, label_smoothing=recipe.loss.label_smoothing)
                totals.add_cross_entropy(loss, len(target), step)
            else:
                with torch.inference_mode(), autocast():
                    taught = teacher(images[:shown]) if shown else logits.detach()[:0]
                parts_of_loss = measure(
                    logits,
                    taught[:heard],
                    target,
                    selected=None if mask is None else mask.to(device, non_blocking=True),
                    kd_weight=kd_weight,
                    # Known to the loss, the scale is folded in float32 before the gradient is rounded to half.
                    grad_scale=scaler._scale if scaler.is_enabled() else None,
                )
                loss = parts_of_loss.loss
                totals.add_parts(parts_of_loss, len(target), shown, step)
                if teacher_pred is not None and heard:
                    seen = batch.indices[:heard].to(device, non_blocking=True)
                    teacher_pred[seen] = predicted(taught[:heard], target[:heard])

            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(scaler.scale(loss))
            if recipe.run.clip_grad_norm > 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(student.parameters(), recipe.run.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            if ema is not None:
                ema.update_parameters(student)
            bar.update()
            if (step + 1) % CHECK_EVERY == 0 or device.type == "cpu":
                totals.check_finite(recipe)
        totals.check_finite(recipe)

        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * steps_per_epoch,
            **totals.means(),
        }
        record["lr"] = optimizer.param_groups[0]["lr"]
        unreadable = getattr(data.train, "errors", [])
        for _, where, reason in unreadable[told:]:
            bar.write(f"lrds-fast: {where} was replaced by a grey picture: {reason}", file=sys.stderr)
        told = record["unreadable"] = len(unreadable)
        judged = student if ema is None else ema.module
        for split, loader in (("val", data.val), ("test", data.test)):
            if loader is not None:
                accuracy, cross_entropy = evaluate(judged, loader, device, memory_format, autocast)
                record[f"{split}_acc"], record[f"{split}_ce"] = accuracy, cross_entropy
        record["seconds"] = round(time.perf_counter() - started, 4)
        append_record(out / LOG, record)
        records.append(record)
        if (epoch + 1) % recipe.run.save_every == 0 or epoch + 1 == recipe.schedule.epochs:
            checkpoint.save(out / CHECKPOINT, epoch=epoch + 1, facts=facts, student=student, parts=parts)
        bar.set_postfix(loss=f"{record['train_loss']:.3f}", test=f"{record['test_acc']:.2%}")
    bar.close()
    if ema is not None:
        student.load_state_dict(ema.module.state_dict())
    return TrainResult(records, None if teacher_pred is None else teacher_pred.cpu(), selected)


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


def predicted(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) the class of the highest logit; the target where it takes part in a tie, as the loss has it."""
    top, place = logits.max(dim=1)
    return torch.where(logits.gather(1, target[:, None])[:, 0] >= top, target, place)


def identity(recipe: Recipe, fingerprint: str, selected: Tensor | None) -> dict[str, str]:
    """What must not change between the start of a run and its resumption, as strings.

    All of the recipe but its name, where it is written, where it runs, and how many processes read the data.
    """
    free = (
        "name",
        "description",
        "run.out",
        "run.device",
        "run.save_every",
        "data.workers",
        "selection.path",
    )
    facts = {key: repr(value) for key, value in recipe.flat().items() if key not in free}
    facts["data's fingerprint"] = fingerprint
    mask = b"" if selected is None else selected.cpu().numpy().tobytes()
    facts["selection"] = hashlib.sha256(mask).hexdigest()[:16]
    return facts
