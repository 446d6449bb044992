"""The columns of a selection's table: scores, and what is known of the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrds_fast.influence import Scores
from lrds_fast.influence.scores import ERROR_SUFFIX
from lrds_fast.selection.table import ARROW_FLOATS, RESERVED, dataset_fingerprint, fingerprint_of, label_tensor


class SampleFacts(NamedTuple):
    """What scores, labels and dataset know of N samples; None for what none of them knows.

    labels, teacher_pred: (N,) int64 on the CPU. meta: of the scores.
    """

    labels: Tensor | None
    teacher_pred: Tensor | None
    num_classes: int | None
    fingerprint: str | None
    meta: Mapping[str, object]


def sample_facts(
    scores: Mapping[str, Tensor], labels: Tensor | Sequence[int] | None, dataset: object, size: int
) -> SampleFacts:
    """The facts of `size` samples; arguments as select's. ValueError where scores, labels and dataset disagree."""
    y = None if labels is None else label_tensor("labels", labels)
    if y is not None and len(y) != size:
        raise ValueError(f"labels must have one entry per sample, {size}; got {len(y)}")
    classes = scores.meta.get("num_classes") if isinstance(scores, Scores) else None
    num_classes = classes if isinstance(classes, int) else None
    of_dataset = None if dataset is None else fingerprint_of(dataset, num_classes)
    if not isinstance(scores, Scores):
        return SampleFacts(y, None, None, of_dataset, {})
    target = scores.target.cpu()
    if y is not None and not torch.equal(y, target):
        raise ValueError("labels differ from scores.target; leave labels out, Scores carry their own")
    fingerprint = of_dataset if num_classes is None else dataset_fingerprint(target, num_classes)
    if of_dataset is not None and fingerprint != of_dataset:
        raise ValueError(
            f"scores were computed for another dataset (fingerprint {str(fingerprint)[:12]}; dataset's is"
            f" {of_dataset[:12]}); score this dataset"
        )
    return SampleFacts(target, scores.teacher_pred.cpu(), num_classes, fingerprint, scores.meta)


def default_score(scores: Scores | Mapping[str, Tensor]) -> str:
    """The score to select by where none is named: teacher_harm where it was computed, else kd_gain."""
    has_harm = isinstance(scores, Mapping) and "teacher_harm" in scores
    return "teacher_harm" if has_harm else "kd_gain"


def score_columns(scores: Scores | Mapping[str, Tensor], by: str) -> dict[str, Tensor]:
    """The scores by name, and their standard errors as `<name>_standard_error`.

    TypeError for scores that are no mapping, ValueError where they have no `by`.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores must be Scores or a mapping from names to tensors; got {type(scores).__name__}")
    if by not in scores:
        raise ValueError(f"by must be one of the computed scores, {', '.join(map(str, scores))}; got {by!r}")
    errors = scores.standard_error if isinstance(scores, Scores) else {}
    return {**scores, **{name + ERROR_SUFFIX: error for name, error in errors.items()}}


def score_tensor(name: object, values: object) -> Tensor:
    """(N,) float32 or float64 on the CPU. TypeError or ValueError for other values, or a reserved name."""
    if not isinstance(name, str) or not name or name in RESERVED:
        raise ValueError(f"scores must have names other than {', '.join(RESERVED)}; got {name!r}")
    try:
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"score {name!r} must be a tensor of numbers; got {type(values).__name__}") from error
    if tensor.dim() != 1 or tensor.is_complex():
        raise ValueError(f"score {name!r} must be real with shape (N,); got {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.dtype not in ARROW_FLOATS:
        narrow = tensor.dtype in (torch.float16, torch.bfloat16)
        tensor = tensor.to(torch.float32 if narrow else torch.float64)
    return tensor
