"""m of N vectors with a short sum: joint selection, in which the effects of samples may cancel.

    minimise |sum_i w_i S_i|    over w in {0, 1}^N with sum w = m

Yang et al. 2023 (arXiv:2205.09329) state the problem for dataset pruning, S_i the shift of the optimum when sample i is
removed, and solve it by simulated annealing. Here it is solved by projected gradient over 0 <= w <= 1 (FISTA), rounding
that keeps the running sum near the fractional one (greedy vector balancing), then swaps of one chosen and one other
vector as long as they shorten the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: A swap is searched among so many chosen and so many other vectors: those that alone would shorten the sum most.
_CANDIDATES = 64


def least_sum(vectors: Tensor, counts: Sequence[int], groups: Tensor | None = None, *, swaps: int = 2000) -> Tensor:
    """(N,) bool: counts[g] vectors of each group g, chosen so that their sum is short.

    vectors: (N, k) floating. counts: 0 <= counts[g] <= the group's size; one number without groups. groups: (N,) int64
    in [0, len(counts)). swaps: the most swaps. Deterministic; ties go to the lower index.
    """
    size = len(vectors)
    groups = torch.zeros(size, dtype=torch.int64) if groups is None else groups
    scale = float(vectors.norm(dim=1).mean()) if size else 1.0
    s = vectors / (scale or 1.0)
    targets = torch.tensor(counts, dtype=s.dtype)
    w = _fractional(s, targets, groups)
    mask = _rounded(s, w, counts, groups)
    return _swapped(s, mask, groups, len(counts), swaps)


def _fractional(s: Tensor, targets: Tensor, groups: Tensor, iterations: int = 150) -> Tensor:
    """(N,) in [0, 1]: FISTA on |sum_i w_i S_i|^2 / 2 under the groups' sums."""
    sizes = torch.bincount(groups, minlength=len(targets)).clamp(min=1)
    w = (targets / sizes)[groups]
    top = float(torch.linalg.eigvalsh((s.T @ s).double())[-1])
    if top <= 0:
        return w
    ahead, momentum = w, 1.0
    for _ in range(iterations):
        gradient = s @ (ahead @ s)
        following = _onto_simplex(ahead - gradient / top, targets, groups)
        grown = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
        ahead = following + (momentum - 1) / grown * (following - w)
        if float((following - w).abs().max()) < 1e-6:
            return following
        w, momentum = following, grown
    return w


def _onto_simplex(v: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
    """The nearest w in [0, 1]^N whose sum over each group is targets[group]: clip(v - its shift), by bisection."""
    low = torch.full_like(targets, float(v.min()) - 1.0)
    high = torch.full_like(targets, float(v.max()))
    for _ in range(40):
        middle = 0.5 * (low + high)
        total = torch.zeros_like(targets).index_add_(0, groups, (v - middle[groups]).clamp_(0, 1))
        too_many = total > targets
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return (v - (0.5 * (low + high))[groups]).clamp_(0, 1)


def _rounded(s: Tensor, w: Tensor, counts: Sequence[int], groups: Tensor) -> Tensor:
    """(N,) bool near w: each entry is rounded so that the sum of the errors so far stays shorter."""
    mask = w > 0.5
    # Each group has one more coordinate, whose error is the number of vectors chosen too many.
    error = s.new_zeros(s.shape[1])
    surplus = [0.0] * len(counts)
    undecided = ((w > 1e-4) & (w < 1 - 1e-4)).nonzero()[:, 0]
    rows, weights, of = s[undecided], w[undecided].tolist(), groups[undecided].tolist()
    squares = rows.square().sum(dim=1).tolist()
    for place, weight, group, square, row in zip(undecided.tolist(), weights, of, squares, rows, strict=True):
        # |error + (x - w) row|^2 for x = 1 less that for x = 0, the group's count as a coordinate of the rows' length.
        change = (1 - 2 * weight) * (square + 1.0) + 2 * (float(error @ row) + surplus[group])
        inside = change < 0
        mask[place] = inside
        step = (1.0 if inside else 0.0) - weight
        error.add_(row, alpha=step)
        surplus[group] += step
    total = s.T @ mask.to(s)
    for group, count in enumerate(counts):
        members = (groups == group).nonzero()[:, 0]
        excess = int(mask[members].sum()) - count
        for _ in range(abs(excess)):
            sign = -1.0 if excess > 0 else 1.0
            free = members[mask[members] == (excess > 0)]
            rows = s[free]
            chosen = free[torch.argmin(2 * sign * (rows @ total) + rows.square().sum(dim=1))]
            mask[chosen] = excess < 0
            total += sign * s[chosen]
    return mask


def _swapped(s: Tensor, mask: Tensor, groups: Tensor, group_count: int, swaps: int) -> Tensor:
    """The mask after swaps, each of a chosen and another vector of one group, that shorten the sum."""
    mask = mask.clone()
    total = s.T @ mask.to(s)
    squares = s.square().sum(dim=1)
    members = [(groups == group).nonzero()[:, 0] for group in range(group_count)]
    group, idle = 0, 0
    while swaps > 0 and idle < group_count:
        rows = members[group]
        best = _best_swap(s, squares, total, rows[mask[rows]], rows[~mask[rows]])
        if best is None:
            idle, group = idle + 1, (group + 1) % group_count
            continue
        out, into = best
        mask[out], mask[into] = False, True
        total += s[into] - s[out]
        swaps, idle = swaps - 1, 0
    return mask


def _best_swap(s: Tensor, squares: Tensor, total: Tensor, inside: Tensor, outside: Tensor) -> tuple[int, int] | None:
    """(chosen, other) whose swap shortens the sum most, among the candidates; None where no swap does."""
    if not len(inside) or not len(outside):
        return None
    along = s[inside] @ total, s[outside] @ total
    leave, enter = squares[inside] - 2 * along[0], squares[outside] + 2 * along[1]
    leaving = leave.argsort(stable=True)[:_CANDIDATES]
    entering = enter.argsort(stable=True)[:_CANDIDATES]
    products = s[inside[leaving]] @ s[outside[entering]].T
    change = leave[leaving][:, None] + enter[entering] - 2 * products
    place = int(change.argmin())
    row, column = divmod(place, change.shape[1])
    # A change within rounding is no improvement: the search must end.
    if float(change[row, column]) >= -1e-6 * (1.0 + float(total.square().sum())):
        return None
    return int(inside[leaving[row]]), int(outside[entering[column]])
