"""Influence scores: how the student changes when a training sample is given or denied its teacher.

    from lrds_fast import influence
    scores = influence.last_layer_scores(features=h, student_logits=z, teacher_logits=v, target=y,
                                         val_features=hv, val_logits=zv, val_target=yv)
    scores["kd_gain"]          # (N,), negative = the teacher helps on this sample

    scores = influence.score(student, teacher, train_data, val_data)       # the same, from the models and the data
    scores = influence.score(student, teacher, train_data, val_data, layers="all")

Definitions, formulas and measurements: docs/influence.md.
"""

from __future__ import annotations

from lrds_fast.influence.factors import Factors
from lrds_fast.influence.last_layer import last_layer_scores
from lrds_fast.influence.objective import HESSIANS
from lrds_fast.influence.options import CURVATURES
from lrds_fast.influence.queries import Pairwise, pairwise, self_influence
from lrds_fast.influence.scores import SCORES, Scores
from lrds_fast.influence.scoring import score
from lrds_fast.influence.shards import load_scores
from lrds_fast.influence.shift import set_shift

__all__ = [
    "CURVATURES",
    "HESSIANS",
    "SCORES",
    "Factors",
    "Pairwise",
    "Scores",
    "last_layer_scores",
    "load_scores",
    "pairwise",
    "score",
    "self_influence",
    "set_shift",
]
