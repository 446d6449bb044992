"""The names of the scores, and the mapping that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

#: What a sample's gradient is taken of: "gt", the cross-entropy with its label; "kd", the divergence from its teacher;
#: "delta", the change of its objective when it is given its teacher.
GRADIENTS = ("gt", "kd", "delta")

#: Every score by name, with its meaning. For all of them LOWER = keep the teacher.
SCORES: Mapping[str, str] = {
    "kd_gain": "n * predicted change of the held-out cross-entropy if the sample is given its teacher; < 0 helps",
    "teacher_harm": "kd_gain where the divergence alone raises the held-out cross-entropy; elsewhere the lower of both",
    "kd_gain_ns": "kd_gain with the Newton step's leverage correction: H as it is with the sample's teacher switched",
    "self_influence": "g^T H^-1 g of the cross-entropy; high = noise or memorisation",
    "param_shift": "|H^-1 g|, g of the cross-entropy (param_shift:gt), of the divergence (:kd), of the change (:delta)",
    "conflict": "-cos of the label's and the teacher's gradient; -1 = they agree",
    "random": "uniform in [0, 1), seed 0 (random:7 takes seed 7)",
    "all": "0 for every sample",
    "none": "1 for every sample",
    "teacher_correct": "0 where the teacher's top class is the label, else 1",
    "mismatch": "probability that the teacher's answer is another sample's, from its correlation with the student's",
    "ce": "cross-entropy of the student",
    "kd": "T^2 KL(p' || q) of the student",
    "el2n": "|softmax(z) - onehot(y)|",
    "grand": "norm of the cross-entropy's gradient in the layer's weights",
}


#: A column of standard errors has the score's name and this suffix.
ERROR_SUFFIX = "_standard_error"


class ScoreName(NamedTuple):
    """A requested score. key: as requested, such as "param_shift:kd"; kind: before the colon; argument: after it."""

    key: str
    kind: str
    argument: str

    @property
    def gradient(self) -> str:
        """The gradient that a param_shift is taken of; one of GRADIENTS."""
        return self.argument or GRADIENTS[0]

    @property
    def seed(self) -> int:
        """The seed of a random score."""
        return int(self.argument or 0)


def parse_score_names(scores: str | Sequence[str]) -> tuple[ScoreName, ...]:
    """The requested scores in order, without repetitions; ValueError for a name that does not exist."""
    requested = (scores,) if isinstance(scores, str) else tuple(scores)
    if not requested:
        raise ValueError(f"scores must name at least one of {', '.join(SCORES)}; got none")
    parsed = []
    for key in dict.fromkeys(requested):
        if not isinstance(key, str):
            raise TypeError(f"scores must be names; got {key!r} of type {type(key).__name__}")
        kind, colon, argument = key.partition(":")
        if kind not in SCORES:
            raise ValueError(f"scores: there is no score {key!r}; choose from {', '.join(SCORES)}")
        allowed = True
        if colon and kind == "param_shift":
            allowed = argument in GRADIENTS
        elif colon and kind == "random":
            allowed = argument.isascii() and argument.isdigit() and int(argument) < 2**63
        elif colon:
            allowed = False
        if not allowed:
            raise ValueError(
                f"scores: {key!r} has no meaning after the colon; only param_shift:{'|'.join(GRADIENTS)} and"
                " random:<seed> take an argument"
            )
        parsed.append(ScoreName(key, kind, argument))
    return tuple(parsed)


class Scores(Mapping[str, Tensor]):
    """Scores by name, each (N,) floating, one value per sample in the order of the scored samples.

    target: (N,) int64 labels. teacher_pred: (N,) int64, the teacher's top class (the label where it takes part in a
    tie). standard_error: from the name of a score to its (N,) standard errors over the choice of the held-out samples;
    kd_gain and teacher_harm have them where they were computed with folds. meta: how the scores were computed,
    JSON-ready: num_samples, num_classes, num_features, bias, curvature, hessian, damping (the absolute value that was
    used, None where no score needed a curvature), folds, loss and library_version. Raises ValueError for shapes that
    differ from target's.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        *,
        target: Tensor,
        teacher_pred: Tensor,
        meta: Mapping[str, object],
        standard_error: Mapping[str, Tensor] | None = None,
    ) -> None:
        errors = dict(standard_error or {})
        for name in errors:
            if name not in scores:
                raise ValueError(f"standard_error has {name!r}, which is none of the scores: {', '.join(scores)}")
        named_errors = {name + ERROR_SUFFIX: error for name, error in errors.items()}
        for name, score in {**scores, **named_errors}.items():
            if score.shape != target.shape or score.dim() != 1:
                raise ValueError(
                    f"score {name!r} must have shape ({target.shape[0]},), one value per target; got"
                    f" {tuple(score.shape)}"
                )
        if teacher_pred.shape != target.shape:
            raise ValueError(
                f"teacher_pred must have target's shape {tuple(target.shape)}; got {tuple(teacher_pred.shape)}"
            )
        self._scores = dict(scores)
        self.standard_error: Mapping[str, Tensor] = errors
        self.target = target
        self.teacher_pred = teacher_pred
        self.meta = dict(meta)

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._scores[name]
        except KeyError:
            raise KeyError(f"{name!r} was not computed; computed scores: {', '.join(self._scores)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __contains__(self, name: object) -> bool:
        return name in self._scores

    def with_score(self, name: str, values: Tensor) -> Scores:
        """These scores and one more. values: (N,)."""
        return Scores(
            {**self._scores, name: values},
            target=self.target,
            teacher_pred=self.teacher_pred,
            meta=self.meta,
            standard_error=self.standard_error,
        )

    def __repr__(self) -> str:
        return f"Scores({', '.join(self._scores)}; {self.target.shape[0]} samples)"


def split_errors(columns: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divides columns by name into scores and their standard errors; both are keyed by the name of the score."""
    scores = {name: column for name, column in columns.items() if not name.endswith(ERROR_SUFFIX)}
    errors = {name: columns[name + ERROR_SUFFIX] for name in scores if name + ERROR_SUFFIX in columns}
    return scores, errors
