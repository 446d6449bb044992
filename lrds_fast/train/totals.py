"""Sums of one epoch that stay on the device until somebody asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lrds_fast
from lrds_fast.train.recipe import Recipe

NO_STEP = torch.iinfo(torch.int64).max


class Totals:
    """Sums of one epoch, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(7, dtype=torch.float64, device=device)
        self._rows = 0
        self._teacher_rows = 0
        self._with_teacher = False
        # The first step whose loss was not finite; a number beyond every step while there is none.
        self._bad_step = torch.full((), NO_STEP, device=device)

    def add_parts(self, parts: lrds_fast.KDLossParts, rows: int, teacher_rows: int, step: int) -> None:
        """One batch of the distillation loss."""
        loss = parts.loss.detach()
        valid = parts.n_valid
        self._sums += torch.stack(
            [
                *((value.double() * valid) for value in (loss, parts.ce, parts.kd)),
                *(count.double() for count in (valid, parts.n_selected, parts.n_revised)),
                valid.new_ones((), dtype=torch.float64),
            ]
        )
        self._with_teacher = True
        self._rows += rows
        self._teacher_rows += teacher_rows
        self._note(loss, step)

    def add_cross_entropy(self, loss: Tensor, rows: int, step: int) -> None:
        """One batch without a teacher."""
        value = loss.detach().double() * rows
        self._sums[:4] += torch.stack([value, value, torch.zeros_like(value), torch.full_like(value, rows)])
        self._rows += rows
        self._note(loss.detach(), step)

    def _note(self, loss: Tensor, step: int) -> None:
        self._bad_step = torch.where(torch.isfinite(loss), self._bad_step, self._bad_step.clamp(max=step))

    def check_finite(self, recipe: Recipe) -> None:
        """FloatingPointError naming the step where the loss was first not finite."""
        step = int(self._bad_step)
        if step != NO_STEP:
            hints = [f"lower optimizer.lr ({recipe.optimizer.lr})", "set run.clip_grad_norm"]
            if recipe.run.amp == "fp16":
                hints.append("try run.amp=bf16")
            raise FloatingPointError(
                f"the loss is not finite at step {step} (counted from 0); {', or '.join(hints)}."
                " The last checkpoint is from before it"
            )

    def means(self) -> dict[str, Any]:
        """The log's values: means over valid rows, and counts."""
        loss, ce, kd, valid, selected, revised, _ = self._sums.tolist()
        per_row = 1.0 / max(valid, 1.0)
        values: dict[str, Any] = {"train_loss": loss * per_row, "rows": self._rows}
        if self._with_teacher:
            values |= {"train_ce": ce * per_row, "train_kd": kd * per_row}
            values |= {
                "n_selected": int(selected),
                "n_revised": int(revised),
                "teacher_rows": self._teacher_rows,
            }
        return values
