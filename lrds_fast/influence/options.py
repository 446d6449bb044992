"""What a call of the scoring functions computes: its keywords, checked once, in frozen objects that are passed on."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrds_fast._numbers import integer
from lrds_fast.influence.inputs import check_choice, check_damping
from lrds_fast.influence.objective import TrainingObjective
from lrds_fast.influence.scores import ScoreName, parse_score_names
from lrds_fast.ranks import Ranks

if TYPE_CHECKING:
    from typing_extensions import Self

#: Curvatures of a last layer.
CURVATURES = ("identity", "kfac", "ekfac", "exact")
#: Curvatures that are a block per layer, which Factors holds; "exact" has the products between layers too.
BLOCK_CURVATURES = ("identity", "kfac", "ekfac")
#: The default number of parts of the held-out slice that a standard error is taken over.
FOLDS = 10
#: Predicted changes of the held-out loss: products with H^-1 times its gradient. They have standard errors.
GAINS = ("kd_gain", "teacher_harm")
#: Scores that need the gradient of the held-out slice.
HELD_OUT = (*GAINS, "kd_gain_ns")
#: Scores that need the inverse of H.
CURVED = (*HELD_OUT, "self_influence", "param_shift")


@dataclass(frozen=True)
class CurvatureOptions:
    """How H is approximated and damped; see influence.score for the fields.

    damping: absolute, None for damping_scale times the mean eigenvalue. labels: "all" or a number of draws, for blocks
    of several layers; the last layer's closed form takes all. choices: the legal curvatures. Raises ValueError or
    TypeError naming the field.
    """

    curvature: str = "ekfac"
    damping: float | None = None
    damping_scale: float = 0.1
    labels: int | str = 1
    choices: InitVar[Sequence[str]] = CURVATURES

    def __post_init__(self, choices: Sequence[str]) -> None:
        check_choice("curvature", self.curvature, choices)
        checked: dict[str, Any] = {"damping_scale": check_damping("damping_scale", self.damping_scale)}
        if self.damping is not None:
            checked["damping"] = check_damping("damping", self.damping)
        what = "'all' or a number of draws >= 1"
        if self.labels != "all":
            if isinstance(self.labels, str) or integer("labels", self.labels, what) < 1:
                raise ValueError(f"labels must be {what}; got {self.labels!r}")
            checked["labels"] = integer("labels", self.labels, what)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def absolute_damping(self, mean_eigenvalue: float) -> float:
        """What is added to every eigenvalue of a curvature with this mean eigenvalue."""
        return self.damping_scale * mean_eigenvalue if self.damping is None else self.damping


@dataclass(frozen=True, eq=False)
class HessianOptions:
    """Which Hessian is fitted to a training set, and how.

    selected: (N,) weights of the samples' teachers, checked by the caller, who knows N; None: 1 for all. dtype: of the
    scores.
    """

    curvature: CurvatureOptions
    objective: TrainingObjective
    selected: Tensor | None
    dtype: torch.dtype

    def normalised(self, ranks: Ranks, targets: Iterable[Tensor]) -> Self:
        """The options with class weights divided by their mean; see TrainingObjective.normalised."""
        return replace(self, objective=self.objective.normalised(ranks, targets))


@dataclass(frozen=True, eq=False)
class ScoreOptions(HessianOptions):
    """What is scored and how; see influence.score for the fields.

    scores: the requested names. folds: checked, with its default resolved. Raises ValueError or TypeError naming the
    field.
    """

    scores: str | Sequence[str]
    folds: int

    def __post_init__(self) -> None:
        assert self.names  # parsed here, so that a wrong name is an error now

    @functools.cached_property
    def names(self) -> tuple[ScoreName, ...]:
        """The requested scores in order, without repetitions."""
        return parse_score_names(self.scores)

    def include(self, kinds: Sequence[str]) -> bool:
        """Whether a score of one of these kinds is requested."""
        return bool(self.those_of(kinds))

    def those_of(self, kinds: Sequence[str]) -> list[str]:
        """The requested scores of these kinds."""
        return [name.key for name in self.names if name.kind in kinds]

    @property
    def parts(self) -> int:
        """Into how many parts the held-out slice is divided; at least 1."""
        return max(1, self.folds)
