"""Whether a teacher's answer belongs to another sample, from logits alone.

r_i is Pearson's correlation of sample i's student and teacher logits over the classes, f_i = atanh(r_i) (Fisher's z).
The model of f is a mixture of two normal distributions:

    another sample's answer    N(m_0, s_0^2), m_0 and s_0 those of f where answers have been exchanged at random
    the sample's own answer    N(m_1, s_1^2), unknown, as is the share of each kind; by EM

The score is the posterior probability of the first.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast.influence.draws import uniform_scores
from lrds_fast.ranks import Ranks

#: With fewer samples whose correlation is defined, nothing is estimated and the score is 0.
LEAST_SAMPLES = 20
# Correlations are clamped to this; atanh(0.999) = 3.8.
_LARGEST = 0.999
# Lower bound of the standard deviations of Fisher's z. They would be 0 where a student copies its teacher.
_LEAST_DEVIATION = 1e-3
# No exchanged answer lies more than this many standard deviations above the mean of the exchanged ones. An own answer
# can, and still lie so far below most own answers that the mixture would call it another sample's.
_REACH = 4.0
# random:<seed> takes seeds below this one.
_SEED = 1 << 63
# Samples that answers are exchanged among, at most; fewer where there are many classes, within about 2^22 logits.
_MOST_EXCHANGED, _LEAST_EXCHANGED, _EXCHANGED_LOGITS = 4096, 256, 1 << 22


def agreement(z: Tensor, v: Tensor) -> Tensor:
    """Pearson's correlation of rows z, v (N, C) over the classes that neither excludes by -inf: (N,) float64.

    NaN where it is undefined, a row being constant, or says nothing, fewer than three classes being left.
    """
    both = z.isfinite() & v.isfinite()
    count = both.sum(dim=1, keepdim=True)

    def centred(logits: Tensor) -> Tensor:
        # The largest difference becomes 1: no square overflows, and of a constant row 0 / 0 remains.
        x = logits.double()
        x = x - x.masked_fill(~both, -torch.inf).amax(dim=1, keepdim=True)
        x = (x / -x.masked_fill(~both, 0.0).amin(dim=1, keepdim=True)).masked_fill(~both, 0.0)
        return (x - x.sum(dim=1, keepdim=True) / count).masked_fill(~both, 0.0)

    found: Tensor = F.cosine_similarity(centred(z), centred(v), eps=0.0)
    return found.masked_fill(count[:, 0] < 3, torch.nan)


def mixture(found: Tensor, exchanged: Tensor, rounds: int = 100) -> Tensor:
    """The posterior probability (N,) float64 that an answer is another sample's, by the module's model.

    found: (N,) correlations of students' and teachers' logits. exchanged: (M,) the same with exchanged answers.
    """
    found, exchanged = (r.double().clamp(-_LARGEST, _LARGEST).atanh() for r in (found, exchanged))
    share = torch.tensor(0.1, dtype=torch.float64)
    mean, std = found.median(), found.std().clamp(min=_LEAST_DEVIATION)
    foreign_density = _log_density(found, exchanged.mean(), exchanged.std().clamp(min=_LEAST_DEVIATION))
    foreign = torch.zeros_like(found)
    for _ in range(rounds):
        foreign = torch.sigmoid(share.logit() + foreign_density - _log_density(found, mean, std))
        # An answer above the mean of the own answers is an own one, however wide the other distribution is.
        foreign = torch.where(found > mean, 0.0, foreign)
        share = foreign.mean().clamp(1e-6, 0.9)
        own = 1.0 - foreign
        total = own.sum().clamp(min=torch.finfo(own.dtype).tiny)
        mean = (own * found).sum() / total
        std = ((own * (found - mean).square()).sum() / total).sqrt().clamp(min=_LEAST_DEVIATION)
    return foreign


def _log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of the normal distribution, but for a constant."""
    return -0.5 * ((x - mean) / std).square() - std.log()


def probabilities(found: Tensor, exchanged: Tensor) -> Tensor:
    """The score: as `mixture`, with undefined correlations (NaN) left out, and 0 where nothing is known.

    0 for a sample whose correlation is undefined, for one above the reach of exchanged answers, and, with a warning,
    for all where fewer than LEAST_SAMPLES correlations of either kind are defined.
    """
    result = torch.zeros_like(found, dtype=torch.float64)
    known, exchanged = found.isfinite(), exchanged[exchanged.isfinite()]
    fewest = min(int(known.sum()), len(exchanged))
    if fewest < LEAST_SAMPLES:
        warnings.warn(
            f"mismatch needs {LEAST_SAMPLES} samples with logits over at least 3 classes that are not all equal; got"
            f" {fewest}, so the score is 0 for all and denies none",
            stacklevel=3,
        )
        return result
    result[known] = mixture(found[known], exchanged)
    fisher = exchanged.clamp(-_LARGEST, _LARGEST).atanh()
    highest = fisher.mean() + _REACH * fisher.std()
    return torch.where(found.clamp(-_LARGEST, _LARGEST).atanh() > highest, 0.0, result)


class Agreements:
    """Collects samples' correlations, and the logits of some whose answers are then exchanged.

    Those are the samples with the lowest values of a seeded sequence over the samples' numbers, and in its order each
    gets the next one's answer. So the exchange does not depend on how samples are divided among calls and processes.
    """

    def __init__(self) -> None:
        self._found: list[tuple[int, Tensor]] = []
        self._keys = torch.empty(0, dtype=torch.float64)
        self._z = self._v = torch.empty(0, 0)
        self._most = 0

    def add(self, start: int, z: Tensor, v: Tensor) -> None:
        """Samples start to start + len(z): student's and teacher's logits (n, C)."""
        if not len(z):
            return
        self._found.append((start, agreement(z, v).cpu()))
        self._most = min(_MOST_EXCHANGED, max(_LEAST_EXCHANGED, _EXCHANGED_LOGITS // z.shape[1]))
        keys = uniform_scores(start, start + len(z), _SEED, self._keys)
        if len(self._keys) == self._most:
            chosen = keys < self._keys[-1]
            keys, z, v = keys[chosen], z[chosen.to(z.device)], v[chosen.to(v.device)]
        if len(keys):
            self._keep(keys, z.cpu(), v.cpu())

    def _keep(self, keys: Tensor, z: Tensor, v: Tensor) -> None:
        """Takes the lowest keys of those there are and these, in their order."""
        if len(self._keys):
            keys, z, v = (torch.cat(pair) for pair in zip((self._keys, self._z, self._v), (keys, z, v), strict=True))
        order = keys.argsort(stable=True)[: self._most]
        self._keys, self._z, self._v = keys[order], z[order], v[order]

    def probabilities(self, ranks: Ranks) -> Tensor:
        """The score of all processes' samples, in their order: (N,) float64 on the CPU, the same in each process."""
        everyone = [part for parts in ranks.gather(self._found) for part in parts]
        keys = torch.cat(ranks.gather(self._keys)).sort().values
        self._most = max(ranks.gather(self._most))
        own = self._keys <= keys[: self._most][-1]
        for theirs in ranks.gather((ranks.rank, self._keys[own], self._z[own], self._v[own])):
            if theirs[0] != ranks.rank and len(theirs[1]):
                self._keep(*theirs[1:])
        found = torch.cat([part for _, part in sorted(everyone, key=lambda part: part[0])])
        exchanged = agreement(self._z, self._v.roll(-1, 0))
        # Of the first process: what depends on how a machine rounds must not differ.
        result: Tensor = ranks.agree(probabilities(found, exchanged) if ranks.first else None)
        return result
