"""Selections that training makes as it goes: scored after a warm-up, and again every few epochs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrds_fast import influence
from lrds_fast.data import Batch, Data, Loader
from lrds_fast.ranks import Ranks
from lrds_fast.recipe.recipe import Recipe, SelectionOptions
from lrds_fast.selection import Selection, select, select_jointly
from lrds_fast.train.setup import scored_loss

FOLDER = "selections"
#: The "score" that is not ranked: the denied are chosen together.
JOINTLY = "set_shift"


def is_due(options: SelectionOptions, epoch: int) -> bool:
    """Whether samples are scored before `epoch`, counted from 0: after the warm-up, then every options.every epochs."""
    since = epoch - options.after
    return options.after > 0 and (since == 0 or (options.every > 0 and since > 0 and since % options.every == 0))


def path_of(out: Path, epoch: int) -> Path:
    """The file of the selection that is made after `epoch` epochs."""
    return out / FOLDER / f"epoch_{epoch:04d}.parquet"


def forget(out: Path) -> None:
    """Deletes an older run's selections from the folder."""
    for path in (out / FOLDER).glob("epoch_*.parquet"):
        path.unlink()


def latest(out: Path, options: SelectionOptions, epochs_done: int) -> Selection | None:
    """The selection in the last of a run's `epochs_done` epochs; None if the run had made none by then.

    Raises FileNotFoundError where its file is missing.
    """
    scored = [epoch for epoch in range(epochs_done) if is_due(options, epoch)]
    if not scored:
        return None
    path = path_of(out, scored[-1])
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the run cannot resume without it; start it again with --overwrite")
    return Selection.load(path)


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
    """(N,) bool, who keeps the teacher from now on; the selection is written to `path` before it counts.

    epoch: the one that comes, counted from 0; samples are scored by its objective. selected: who had it so far, which
    the objective's Hessian and the hysteresis go by.
    """
    options, how = recipe.selection, recipe.score
    curvature: dict[str, Any] = {
        "curvature": how.curvature,
        "hessian": how.hessian,
        "damping": None if how.damping < 0 else how.damping,
        "damping_scale": how.damping_scale,
        "selected": selected,
        "loss": scored_loss(recipe.loss, epoch),
        "progress": progress,
    }
    names = [name for name in dict.fromkeys((options.by, *how.scores)) if name != JOINTLY]
    scores = influence.score(
        student,
        teacher,
        _Batches(data.score),
        None if data.val is None else _Batches(data.val),
        scores=[name for name in names if data.val is not None or not name.startswith("kd_gain")],
        **curvature,
    )
    if options.by == JOINTLY:
        shift = influence.set_shift(student, teacher, _Batches(data.score), **curvature)
        selection = select_jointly(
            shift, ratio=options.ratio, per_class=options.per_class, scores=scores, dataset=fingerprint or None
        )
    else:
        selection = _ranked(options, scores, selected, fingerprint)
    ranks = Ranks.current()
    if ranks.first:
        path.parent.mkdir(parents=True, exist_ok=True)
        selection.save(path)
    ranks.wait()
    return ranks.same(selection.mask)


def _ranked(
    options: SelectionOptions, scores: influence.Scores, selected: Tensor | None, fingerprint: str
) -> Selection:
    """By one score, with what was selected before kept within the margin."""
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


class _Batches:
    """A split's batches in index order, as often as they are asked for."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader.epoch(0))
