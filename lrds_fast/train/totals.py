"""An epoch's sums for the log. They stay on the device until the epoch ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lrds_fast
from lrds_fast.ranks import Ranks
from lrds_fast.recipe.recipe import Recipe

#: The label's probability is measured on the first rows of an epoch, because it reads the logits a second time.
MEASURED_ROWS = 4096
#: The log has mean label probabilities only if there are at least so many right and so many revised rows.
_LEAST_ROWS = 32
NO_STEP = torch.iinfo(torch.int64).max


class Totals:
    """An epoch's sums over the rows of this process."""

    def __init__(self, device: torch.device) -> None:
        # loss, ce, kd, features, valid rows, selected rows, revised rows; of the measured rows: the right ones, the sum
        # of their p_y, the revised ones, the sum of their p'_y.
        self._sums = torch.zeros(11, dtype=torch.float64, device=device)
        self._rows = 0
        self._teacher_rows = 0
        self._with_teacher = False
        self._with_features = False
        # The first step whose loss was not finite; NO_STEP while there is none.
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
        """Adds a micro-batch of the distillation loss, whose parts are sums over its rows divided by `denominator`."""
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
        self._record_step(loss + extra, step)

    def add_revised(
        self, teacher_logits: Tensor, target: Tensor, selected: Tensor | None, options: Mapping[str, Any]
    ) -> None:
        """Adds the label's probability: the teacher's, softened, on rows where the teacher is right, and the revised
        one on rows where it is wrong.

        teacher_logits: (K, C). target: (K,) int64. selected: (K,) bool, the rows that count; None is all. options: the
        keywords of kd_loss.
        """
        temperature = options["temperature"]
        if isinstance(temperature, (tuple, list)):
            temperature = temperature[0]
        v, place = teacher_logits.detach().float(), target[:, None]
        revised = lrds_fast.revise_labels(
            v,
            target,
            policy=options["revise"],
            temperature=temperature,
            eta=options["eta"],
            revise_temperature=options["revise_temperature"],
        )
        plain = torch.softmax(v / temperature, dim=1).gather(1, place)[:, 0]
        right = v.gather(1, place)[:, 0] >= v.amax(dim=1)
        counts = torch.ones_like(right) if selected is None else selected
        sums = []
        for rows, values in ((right & counts, plain), (~right & counts, revised.gather(1, place)[:, 0])):
            sums += [rows.sum().double(), torch.where(rows, values, 0.0).double().sum()]
        self._sums[7:] += torch.stack(sums)

    def add_cross_entropy(self, loss: Tensor, rows: int, step: int, *, denominator: Tensor | float) -> None:
        """Adds a micro-batch of training without a teacher."""
        value = loss.detach().double() * denominator
        self._sums[0] += value
        self._sums[4] += rows
        self._rows += rows
        self._record_step(loss.detach(), step)

    def _record_step(self, loss: Tensor, step: int) -> None:
        self._bad_step = torch.where(torch.isfinite(loss), self._bad_step, self._bad_step.clamp(max=step))

    def check_finite(self, recipe: Recipe, checkpoint: Path | None = None) -> None:
        """FloatingPointError naming the first step whose loss was not finite. checkpoint: the run's, if it exists."""
        step = int(self._bad_step)
        if step != NO_STEP:
            hints = [f"lower optimizer.lr ({recipe.optimizer.lr})", "set run.clip_grad_norm"]
            if recipe.run.amp == "fp16":
                hints.append("try run.amp=bf16")
            saved = checkpoint is not None and checkpoint.exists()
            older = f"{checkpoint} is older than this step" if saved else "there is no older checkpoint"
            raise FloatingPointError(
                f"the loss is not finite at step {step} (counted from 0); {', or '.join(hints)}; {older}"
            )

    def _over_processes(self, ranks: Ranks) -> Tensor:
        """The sums over all processes, followed by the rows and the teacher's rows."""
        counts = torch.tensor([self._rows, self._teacher_rows], dtype=torch.float64, device=self._sums.device)
        return ranks.sum(torch.cat([self._sums, counts]))

    def means(self, ranks: Ranks) -> dict[str, Any]:
        """The log's values over the rows of all processes: means over valid rows, and counts."""
        *sums, rows, teacher_rows = self._over_processes(ranks).tolist()
        loss, ce, kd, features, valid, selected, revised, n_right, p_right, n_wrong, p_wrong = sums
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
            if min(n_right, n_wrong) >= _LEAST_ROWS:
                values |= {"p_label_right": p_right / n_right, "p_label_revised": p_wrong / n_wrong}
        return values

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """The sums so far over all processes, for a checkpoint within an epoch."""
        return {
            "sums": self._over_processes(ranks).cpu(),
            "with_teacher": self._with_teacher,
            "with_features": self._with_features,
        }

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks) -> None:
        """The reverse of state_dict. The first process gets the sums, the others start from zero."""
        self._with_teacher, self._with_features = state["with_teacher"], state["with_features"]
        if ranks.first:
            self._sums.copy_(state["sums"][: len(self._sums)])
            self._rows, self._teacher_rows = map(int, state["sums"][len(self._sums) :].tolist())
