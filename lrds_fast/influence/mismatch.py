"""The score mismatch: the probability that a teacher's logits belong to another sample, from logits alone.

r_i is Pearson's correlation of sample i's student and teacher logits over the classes, f_i = atanh(r_i) (Fisher's z).
The model of f is a mixture of two normal distributions:

    foreign logits (of another sample)      N(m_0, s_0^2), m_0 and s_0 those of f with randomly exchanged teacher logits
    matching logits (of the same sample)    N(m_1, s_1^2); EM fits m_1, s_1 and the share of each kind

The score is the posterior probability of the first.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast.influence.draws import uniform_scores
from lrds_fast.ranks import Ranks

#: With fewer defined correlations nothing is estimated, and the score is 0.
LEAST_SAMPLES = 20
# Correlations are clamped to this; atanh(0.999) = 3.8.
_LARGEST = 0.999
# Lower bound of the standard deviations of Fisher's z, which are 0 where a student copies its teacher.
_LEAST_DEVIATION = 1e-3
# A correlation more than this many standard deviations above the mean of the exchanged ones is of matching logits, even
# where it lies so far below most matching ones that the mixture would call it foreign.
_REACH = 4.0
# A seed that no score random:<seed> has; those are smaller.
_SEED = 1 << 63
# The most samples whose teacher logits are exchanged, and the least; with many classes fewer, about 2^22 logits in all.
_MOST_EXCHANGED, _LEAST_EXCHANGED, _EXCHANGED_LOGITS = 4096, 256, 1 << 22


def agreement(z: Tensor, v: Tensor) -> Tensor:
    """Pearson's correlation of rows z, v (N, C) over the classes that neither excludes by -inf: (N,) float64.

    NaN where it is undefined, because a row is constant, or meaningless, because fewer than three classes are left.
    """
    both = z.isfinite() & v.isfinite()
    count = both.sum(dim=1, keepdim=True)

    def centred(logits: Tensor) -> Tensor:
        # The largest difference becomes 1, so that no square overflows; a constant row becomes 0 / 0.
        x = logits.double()
        x = x - x.masked_fill(~both, -torch.inf).amax(dim=1, keepdim=True)
        x = (x / -x.masked_fill(~both, 0.0).amin(dim=1, keepdim=True)).masked_fill(~both, 0.0)
        return (x - x.sum(dim=1, keepdim=True) / count).masked_fill(~both, 0.0)

    correlation: Tensor = F.cosine_similarity(centred(z), centred(v), eps=0.0)
    return correlation.masked_fill(count[:, 0] < 3, torch.nan)


def mixture(correlations: Tensor, exchanged: Tensor, rounds: int = 100) -> Tensor:
    """The posterior probability (N,) float64 that teacher logits are foreign, by the module's model.

    correlations: (N,) of students' and teachers' logits. exchanged: (M,) the same with exchanged teacher logits.
    rounds: of EM.
    """
    f, f_exchanged = (r.double().clamp(-_LARGEST, _LARGEST).atanh() for r in (correlations, exchanged))
    share = torch.tensor(0.1, dtype=torch.float64)
    mean, std = f.median(), f.std().clamp(min=_LEAST_DEVIATION)
    foreign_density = _log_density(f, f_exchanged.mean(), f_exchanged.std().clamp(min=_LEAST_DEVIATION))
    foreign = torch.zeros_like(f)
    for _ in range(rounds):
        foreign = torch.sigmoid(share.logit() + foreign_density - _log_density(f, mean, std))
        # Above the mean of the matching ones nothing is foreign, however wide the other distribution is.
        foreign = torch.where(f > mean, 0.0, foreign)
        share = foreign.mean().clamp(1e-6, 0.9)
        matching = 1.0 - foreign
        total = matching.sum().clamp(min=torch.finfo(matching.dtype).tiny)
        mean = (matching * f).sum() / total
        std = ((matching * (f - mean).square()).sum() / total).sqrt().clamp(min=_LEAST_DEVIATION)
    return foreign


def _log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The log-density of the normal distribution, up to a constant."""
    return -0.5 * ((x - mean) / std).square() - std.log()


def probabilities(correlations: Tensor, exchanged: Tensor) -> Tensor:
    """The score (N,) float64: `mixture` over the defined correlations; arguments as there, NaN where undefined.

    It is 0 for a sample whose correlation is undefined, for one above the reach of exchanged logits, and, with a
    warning, for all samples where fewer than LEAST_SAMPLES correlations of either kind are defined.
    """
    result = torch.zeros_like(correlations, dtype=torch.float64)
    defined, exchanged = correlations.isfinite(), exchanged[exchanged.isfinite()]
    fewest = min(int(defined.sum()), len(exchanged))
    if fewest < LEAST_SAMPLES:
        warnings.warn(
            f"mismatch needs {LEAST_SAMPLES} samples with logits over at least 3 classes that are not all equal; got"
            f" {fewest}, so the score is 0 for all and denies none",
            stacklevel=3,
        )
        return result
    result[defined] = mixture(correlations[defined], exchanged)
    fisher = exchanged.clamp(-_LARGEST, _LARGEST).atanh()
    highest = fisher.mean() + _REACH * fisher.std()
    return torch.where(correlations.clamp(-_LARGEST, _LARGEST).atanh() > highest, 0.0, result)


class Agreements:
    """Collects the samples' correlations, and the logits of some samples whose teacher logits are then exchanged.

    These are the samples with the lowest keys, which a seed and the samples' numbers determine. In the order of the
    keys each gets the next one's teacher logits, so the exchange does not depend on how samples are divided among calls
    and processes.
    """

    def __init__(self) -> None:
        self._correlations: list[tuple[int, Tensor]] = []
        self._keys = torch.empty(0, dtype=torch.float64)
        self._z = self._v = torch.empty(0, 0)
        self._most = 0

    def add(self, start: int, z: Tensor, v: Tensor) -> None:
        """Adds the samples from `start` on: student's and teacher's logits z, v (n, C)."""
        if not len(z):
            return
        self._correlations.append((start, agreement(z, v).cpu()))
        self._most = min(_MOST_EXCHANGED, max(_LEAST_EXCHANGED, _EXCHANGED_LOGITS // z.shape[1]))
        keys = uniform_scores(start, start + len(z), _SEED, self._keys)
        if len(self._keys) == self._most:
            chosen = keys < self._keys[-1]
            keys, z, v = keys[chosen], z[chosen.to(z.device)], v[chosen.to(v.device)]
        if len(keys):
            self._keep(keys, z.cpu(), v.cpu())

    def _keep(self, keys: Tensor, z: Tensor, v: Tensor) -> None:
        """Adds samples (n,) with these keys, and keeps the self._most lowest keys, in order."""
        if len(self._keys):
            keys, z, v = (torch.cat(pair) for pair in zip((self._keys, self._z, self._v), (keys, z, v), strict=True))
        order = keys.argsort(stable=True)[: self._most]
        self._keys, self._z, self._v = keys[order], z[order], v[order]

    def probabilities(self, ranks: Ranks) -> Tensor:
        """The score of all processes' samples, in their order: (N,) float64 on the CPU, the same in each process."""
        parts = [part for of_rank in ranks.gather(self._correlations) for part in of_rank]
        keys = torch.cat(ranks.gather(self._keys)).sort().values
        self._most = max(ranks.gather(self._most))
        needed = self._keys <= keys[: self._most][-1]
        for rank, *samples in ranks.gather((ranks.rank, self._keys[needed], self._z[needed], self._v[needed])):
            if rank != ranks.rank and len(samples[0]):
                self._keep(*samples)
        correlations = torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])])
        exchanged = agreement(self._z, self._v.roll(-1, 0))
        # The first process computes the score: processes may round differently.
        result: Tensor = ranks.agree(probabilities(correlations, exchanged) if ranks.first else None)
        return result
