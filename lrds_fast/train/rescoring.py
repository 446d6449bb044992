"""Scoring the training samples of a recipe, and the selections that are made from the scores during training."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lrds_fast import influence
from lrds_fast.data import Batch, Data, Loader
from lrds_fast.influence.options import HELD_OUT
from lrds_fast.nn import KDLoss
from lrds_fast.notes import note
from lrds_fast.ranks import Ranks
from lrds_fast.recipe.recipe import Recipe, SelectionOptions
from lrds_fast.selection import Selection, select, select_jointly
from lrds_fast.selection.rule import weight_hint
from lrds_fast.selection.table import read_selection
from lrds_fast.train.setup import scored_loss

FOLDER = "selections"
#: The score that does not rank samples: those without a teacher are chosen together (select_jointly).
JOINTLY = "set_shift"


def is_due(options: SelectionOptions, epoch: int) -> bool:
    """Whether samples are scored before `epoch` (from 0): after the warm-up, then every options.every epochs."""
    since = epoch - options.after
    return options.after > 0 and (since == 0 or (options.every > 0 and since > 0 and since % options.every == 0))


def path_of(out: Path, epoch: int) -> Path:
    """The selection that was made when `epoch` epochs were done."""
    return out / FOLDER / f"epoch_{epoch:04d}.parquet"


def stored(out: Path) -> list[Path]:
    """The selections in a run's folder, by epoch."""
    return sorted((out / FOLDER).glob("epoch_*.parquet"))


def forget(out: Path) -> None:
    """Deletes the selections of an older run in the folder."""
    for path in stored(out):
        path.unlink()


def latest(out: Path, options: SelectionOptions, epochs_done: int) -> Selection | None:
    """The selection that a run had in the last of its `epochs_done` epochs; None where it had made none by then.

    Raises FileNotFoundError where the run's folder lacks it, ValueError where it is damaged.
    """
    scored = [epoch for epoch in range(epochs_done) if is_due(options, epoch)]
    if not scored:
        return None
    path = path_of(out, scored[-1])
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the run cannot continue without it; start again with --overwrite")
    return read_selection(path, otherwise="restore it from a copy, or start again with --overwrite")


def last(out: Path) -> Selection | None:
    """The last selection in a run's folder; None where there is none. ValueError for a damaged file."""
    paths = stored(out)
    return read_selection(paths[-1], otherwise="restore it from a copy") if paths else None


def rescore(
    recipe: Recipe,
    data: Data,
    student: nn.Module,
    teacher: nn.Module,
    *,
    epoch: int,
    path: Path,
    fingerprint: str,
    selected: Tensor | None,
    progress: bool,
) -> Tensor:
    """(N,) bool: the samples that keep their teacher from `epoch` on. The selection is first written to `path`.

    epoch: the next one, counted from 0; samples are scored by its objective. selected: (N,) bool, the samples that had
    the teacher so far, for the objective's Hessian and the hysteresis; None: all.
    """
    options = recipe.selection
    names = [options.by, *(name for name in recipe.score.scores if name != JOINTLY)]
    scored = score_samples(
        recipe,
        data,
        student,
        teacher,
        names=[name for name in names if data.val is not None or name not in HELD_OUT],
        loss=scored_loss(recipe, epoch),
        selected=selected,
        progress=progress,
    )
    scores = scored.scores
    if scored.shift is not None and options.by == JOINTLY:
        selection = select_jointly(
            scored.shift, ratio=options.ratio, per_class=options.per_class, scores=scores, dataset=fingerprint or None
        )
    else:
        selection = _ranked(options, scores, selected, fingerprint)
        hint = weight_hint(options.by, scores)
        if hint:
            note(f"after epoch {epoch}, {hint}")
    ranks = Ranks.current()
    if ranks.first:
        path.parent.mkdir(parents=True, exist_ok=True)
        selection.save(path)
    ranks.wait()
    return ranks.same(selection.mask)


def _ranked(
    options: SelectionOptions, scores: influence.Scores, selected: Tensor | None, fingerprint: str
) -> Selection:
    """The selection by one score; samples that were selected before stay within the margin."""
    if options.by_confidence:
        rule: dict[str, Any] = {"confidence": options.confidence, "max_drop": options.max_drop}
        leave = options.confidence + options.margin
    elif options.ratio >= 0:
        rule, leave = {"ratio": options.ratio}, min(options.ratio + options.margin, 1.0)
    elif options.outliers is not None:
        rule = {"outliers": options.outliers, "max_drop": options.max_drop}
        leave = options.outliers + options.margin
    else:
        assert options.threshold is not None
        rule, leave = {"threshold": options.threshold}, options.threshold + options.margin
    return select(
        scores,
        options.by,
        **rule,
        leave=leave,
        previous=None if selected is None else selected.cpu(),
        per_class=options.per_class,
        dataset=fingerprint or None,
    )


class Scored(NamedTuple):
    """scores: of the names other than set_shift. shift: influence.set_shift, (N, 512); None where it was not named."""

    scores: influence.Scores
    shift: Tensor | None


def score_samples(
    recipe: Recipe,
    data: Data,
    student: nn.Module,
    teacher: nn.Module | Tensor,
    *,
    names: Sequence[str],
    loss: KDLoss,
    selected: Tensor | None,
    progress: bool,
) -> Scored:
    """Scores the training samples, from the student's last layer, by the recipe's score.* keys.

    student, teacher: on the device that they run on; the teacher may be its logits (N, C). names: influence.SCORES and
    set_shift. selected: (N,), which samples had the teacher so far; None: all. Under torch.distributed every process
    makes this call and gets all scores. Raises ValueError or TypeError as influence.score.
    """
    options = recipe.score
    keywords: dict[str, Any] = {
        "curvature": options.curvature,
        "hessian": options.hessian,
        "damping": None if options.damping < 0 else options.damping,
        "damping_scale": options.damping_scale,
        "selected": selected,
        "loss": loss,
        "progress": progress and sys.stderr is not None,
    }
    train, held_out = _Batches(data.score), None if data.val is None else _Batches(data.val)
    ranked = [name for name in dict.fromkeys(names) if name != JOINTLY]
    scores = influence.score(student, teacher, train, held_out, scores=ranked, **keywords)
    return Scored(scores, influence.set_shift(student, teacher, train, **keywords) if JOINTLY in names else None)


class _Batches:
    """A split's batches in index order; can be iterated any number of times."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader.epoch(0))

    def __len__(self) -> int:
        return len(self._loader)
