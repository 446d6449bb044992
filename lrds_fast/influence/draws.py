"""Random numbers that depend on a key alone: the same in every process, batch size and run."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

#: Samples whose random scores come from one generator, so that any range of samples can be drawn alone.
_BLOCK = 1 << 16


def keyed_generator(key: object) -> torch.Generator:
    """A CPU generator seeded by the text of `key` (sha256): equal keys give equal numbers on every machine."""
    digest = hashlib.sha256(str(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def uniform_scores(start: int, stop: int, seed: int, like: Tensor) -> Tensor:
    """(stop - start,) uniform in [0, 1): samples `start` to `stop` of the one sequence that `seed` defines.

    like: a tensor of the dtype and device of the result. The values do not depend on the device, nor on how the samples
    are divided among calls.
    """
    parts = []
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        values = torch.rand(_BLOCK, generator=keyed_generator(f"{seed} {block}"), dtype=torch.float64)
        first = block * _BLOCK
        parts.append(values[max(start - first, 0) : stop - first])
    return torch.cat(parts).to(like) if parts else like.new_empty(0)
