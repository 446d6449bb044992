"""Selections that are made again and again while a user's own loop trains the student."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrds_fast import influence
from lrds_fast._numbers import integer
from lrds_fast.nn import KDLoss
from lrds_fast.ranks import Ranks
from lrds_fast.selection.choose import select
from lrds_fast.selection.flagged import Flagged
from lrds_fast.selection.table import Selection

#: The default rule of recipes (SelectionOptions); docs/benchmarks/method.md has the evidence.
RULE: Mapping[str, Any] = {"confidence": 4.0, "max_drop": 0.1}


class SelectedDataset(Flagged):
    """A training set whose samples have a flag, True for the samples that keep their teacher.

    selected = SelectedDataset(train_data, teacher, held_out)
    for epoch in range(30):
        if epoch in (10, 20):
            selected.update(student)
        for x, target, flag in loader: ...          # loader = DataLoader(selected, shuffle=True)

    Every flag is True until the first update. (x, y, ...) becomes (x, y, ..., bool); samples that are dicts get the key
    "selected". Flags are in shared memory: an update reaches the workers of a DataLoader, but not the batches that they
    have already read, so update between epochs.
    """

    def __init__(
        self,
        of: Any,
        teacher: nn.Module | Tensor,
        val_data: Any = None,
        *,
        evaluated: Any = None,
        by: str = "teacher_harm",
        rule: Mapping[str, Any] | None = None,
        loss: KDLoss | None = None,
        **score: Any,
    ) -> None:
        """of: a map-style Dataset (or a list) of N samples. teacher, val_data, loss: as in influence.score; loss is the
        one that the student is trained with. evaluated: the same samples in the same order with the evaluation
        transform; None: `of`, which must then have no random augmentation. by: the score that decides. rule: select's
        arguments; None: confidence=4, max_drop=0.1. score: other arguments of influence.score.

        Raises TypeError for data without length and items, ValueError where `evaluated` has another length. Other
        arguments are checked by the first update.
        """
        for name, data in (("of", of), ("evaluated", of if evaluated is None else evaluated)):
            if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
                raise TypeError(
                    f"{name} must be a map-style Dataset, with a length and items; got {type(data).__name__}"
                )
        if evaluated is not None and len(evaluated) != len(of):
            raise ValueError(f"evaluated must have the {len(of)} samples of `of`, in their order; got {len(evaluated)}")
        super().__init__(of, torch.ones(len(of), dtype=torch.bool).share_memory_())
        self._teacher, self._evaluated, self._val_data = teacher, of if evaluated is None else evaluated, val_data
        self._by, self._rule, self._loss, self._score = by, dict(RULE if rule is None else rule), loss, score
        #: The last update's selection, for its save and report; None before the first one.
        self.selection: Selection | None = None
        self._updates = 0

    def update(self, student: nn.Module) -> Selection:
        """Scores all samples for the student, renews the flags, and returns the selection.

        With rule["leave"] the samples that are selected now stay selected up to that limit. Under torch.distributed all
        processes make this call; they share the scoring and get the first process's selection. Raises as
        influence.score and select do; flags then stay as they were.
        """
        before = self._mask.clone() if self._updates else None
        scores = influence.score(
            student,
            self._teacher,
            self._evaluated,
            self._val_data,
            scores=self._by,
            loss=self._loss,
            selected=before,
            **self._score,
        )
        previous = before if "leave" in self._rule else None
        chosen: Selection = Ranks.current().agree(select(scores, self._by, **self._rule, previous=previous))
        self._mask.copy_(chosen.mask)
        self.selection, self._updates = chosen, self._updates + 1
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: {"mask": the flags, (N,) bool, "updates": the number of updates so far}."""
        return {"mask": self._mask.clone(), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what state_dict returned. Raises ValueError unless the flags are (N,) bool."""
        mask = state["mask"]
        if mask.dtype != torch.bool or mask.shape != self._mask.shape:
            raise ValueError(
                f"state must hold the flags of {len(self)} samples, bool; got {mask.dtype} {tuple(mask.shape)}"
            )
        self._mask.copy_(mask)
        self._updates = int(state["updates"])


class UpdatesAfterEpochs:
    """Updates a SelectedDataset once after each of some epochs, also where a training resumes between an epoch's last
    step and its update. The base of the callbacks of lrds_fast.compat."""

    def __init__(self, selected: SelectedDataset, after: Collection[int]) -> None:
        """after: numbers of finished epochs. Raises TypeError or ValueError unless they are integers >= 1."""
        if not isinstance(after, Collection) or isinstance(after, (str, bytes)):
            raise TypeError(f"after must be a collection of numbers of epochs, such as (10, 20); got {after!r}")
        self.selected, self.after = selected, frozenset(integer("after", epoch) for epoch in after)
        if any(epoch < 1 for epoch in self.after):
            raise ValueError(f"after counts finished epochs, each must be >= 1; got {min(self.after)}")
        self._done: frozenset[int] = frozenset()

    def update_if_due(self, finished: int, student: nn.Module) -> None:
        """Updates if one of `after` is among the first `finished` epochs and has had no update."""
        due = {epoch for epoch in self.after if epoch <= finished} - self._done
        if due:
            self.selected.update(student)
            self._done |= due

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: SelectedDataset.state_dict, and the epochs whose update is done."""
        return {**self.selected.state_dict(), "done": sorted(self._done)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what state_dict returned."""
        self.selected.load_state_dict(state_dict)
        self._done = frozenset(state_dict["done"])
