"""Sums of one epoch that stay on the device until somebody asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lrds_fast
from lrds_fast.influence.ranks import Ranks
from lrds_fast.train.recipe import Recipe

NO_STEP = torch.iinfo(torch.int64).max


class Totals:
    """Sums of one epoch over the rows of this process."""

    def __init__(self, device: torch.device) -> None:
        # loss, ce, kd, features, valid rows, selected, revised; then what add_label_probability counts
        self._sums = torch.zeros(11, dtype=torch.float64, device=device)
        self._rows = 0
        self._teacher_rows = 0
        self._with_teacher = False
        self._with_features = False
        # The first step whose loss was not finite; a number beyond every step while there is none.
        self._bad_step = torch.full((), NO_STEP, device=device)

    def add(
        self,
        parts: lrds_fast.KDLossParts,
        rows: int,
        teacher_rows: int,
        step: int,
        *,
        denominator: Tensor | float,
        features: Tensor | None = None,
    ) -> None:
        """A batch of the distillation loss, whose parts are sums over its rows divided by `denominator`."""
        loss = parts.loss.detach()
        extra = torch.zeros_like(loss) if features is None else features.detach()
        self._sums[:7] += torch.stack(
            [
                *((value.double() * denominator) for value in (loss + extra, parts.ce, parts.kd, extra)),
                *(count.double() for count in (parts.n_valid, parts.n_selected, parts.n_revised)),
            ]
        )
        self._with_teacher = True
        self._with_features |= features is not None
        self._rows += rows
        self._teacher_rows += teacher_rows
        self._note(loss + extra, step)

    def add_label_probability(self, revised: Tensor, teacher: Tensor, target: Tensor, right: Tensor) -> None:
        """revised, teacher: (R, C) probabilities of some rows with and without label revision; target (R,), right (R,)
        bool: whether the teacher is right. Counts the label's probability on revised rows, and on the right ones."""
        label = target[:, None]
        values = torch.where(right, teacher.gather(1, label)[:, 0], revised.gather(1, label)[:, 0]).double()
        self._sums[7:] += torch.stack([values[~right].sum(), (~right).sum(), values[right].sum(), right.sum()])

    def add_cross_entropy(self, loss: Tensor, rows: int, step: int, *, denominator: Tensor | float) -> None:
        """A batch without a teacher."""
        value = loss.detach().double() * denominator
        self._sums[0] += value
        self._sums[4] += rows
        self._rows += rows
        self._note(loss.detach(), step)

    def _note(self, loss: Tensor, step: int) -> None:
        self._bad_step = torch.where(torch.isfinite(loss), self._bad_step, self._bad_step.clamp(max=step))

    def check_finite(self, recipe: Recipe, checkpoint: Path | None = None) -> None:
        """FloatingPointError naming the first step whose loss was not finite. checkpoint: the run's, if it exists."""
        step = int(self._bad_step)
        if step != NO_STEP:
            hints = [f"lower optimizer.lr ({recipe.optimizer.lr})", "set run.clip_grad_norm"]
            if recipe.run.amp == "fp16":
                hints.append("try run.amp=bf16")
            saved = checkpoint is not None and checkpoint.exists()
            left = f"{checkpoint} is older than this step" if saved else "there is no older checkpoint"
            raise FloatingPointError(
                f"the loss is not finite at step {step} (counted from 0); {', or '.join(hints)}; {left}"
            )

    def _together(self, ranks: Ranks) -> Tensor:
        """The sums over all processes, and the rows and the teacher's rows."""
        counts = torch.tensor([self._rows, self._teacher_rows], dtype=torch.float64, device=self._sums.device)
        return ranks.sum(torch.cat([self._sums, counts]))

    def means(self, ranks: Ranks) -> dict[str, Any]:
        """The log's values over the rows of all processes: means over valid rows, and counts."""
        loss, ce, kd, features, valid, selected, revised, *labels, rows, teacher_rows = self._together(ranks).tolist()
        per_row = 1.0 / max(valid, 1.0)
        values: dict[str, Any] = {"train_loss": loss * per_row, "rows": int(rows)}
        if self._with_teacher:
            values |= {"train_ce": ce * per_row, "train_kd": kd * per_row}
            if self._with_features:
                values["train_features"] = features * per_row
            values |= {
                "n_selected": int(selected),
                "n_revised": int(revised),
                "teacher_rows": int(teacher_rows),
            }
            on_revised, n_revised, on_right, n_right = labels
            if n_revised and n_right:
                values |= {"revised_label_p": on_revised / n_revised, "right_label_p": on_right / n_right}
        return values

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """Everything so far over all processes, for a checkpoint in the middle of an epoch."""
        return {
            "sums": self._together(ranks).cpu(),
            "with_teacher": self._with_teacher,
            "with_features": self._with_features,
        }

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks) -> None:
        """The reverse of state_dict: the first process goes on with the sums, the others from nothing."""
        self._with_teacher, self._with_features = state["with_teacher"], state["with_features"]
        if ranks.first:
            self._sums.copy_(state["sums"][: len(self._sums)])
            self._rows, self._teacher_rows = map(int, state["sums"][len(self._sums) :].tolist())
