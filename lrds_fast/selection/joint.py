"""Which m of N vectors add up to the least: joint selection, where effects may cancel.

    minimise |sum_i w_i S_i|    over w in {0, 1}^N with sum w = m

Yang et al. 2023 (arXiv:2205.09329) state it for dataset pruning, S_i the shift of the optimum when sample i goes, and
solve it by simulated annealing. Here: projected gradient over 0 <= w <= 1 (FISTA), rounding that keeps the running sum
near the fractional one (greedy vector balancing), then swaps of one member for one outsider while they help.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Members, and outsiders, that a swap is looked for among: those that would lower the sum the most by themselves.
_CANDIDATES = 64


def least_sum(vectors: Tensor, counts: Sequence[int], groups: Tensor | None = None, *, swaps: int = 2000) -> Tensor:
    """(N,) bool: of every group its count of vectors, together of a small sum.

    vectors: (N, k) floating. counts: how many of each group, 0 <= count <= the group's size; one number without groups.
    groups: (N,) int64 in [0, len(counts)). swaps: at most so many. Deterministic; ties go to the lower index.
    """
    size = len(vectors)
    groups = torch.zeros(size, dtype=torch.int64) if groups is None else groups
    scale = float(vectors.norm(dim=1).mean()) if size else 1.0
    s = vectors / (scale or 1.0)
    wanted = torch.tensor(counts, dtype=s.dtype)
    w = _fractional(s, wanted, groups)
    mask = _rounded(s, w, counts, groups)
    return _swapped(s, mask, groups, len(counts), swaps)


def _fractional(s: Tensor, wanted: Tensor, groups: Tensor, iterations: int = 150) -> Tensor:
    """(N,) in [0, 1]: FISTA on |sum_i w_i S_i|^2 / 2 under the groups' sums."""
    sizes = torch.bincount(groups, minlength=len(wanted)).clamp(min=1)
    w = (wanted / sizes)[groups]
    top = float(torch.linalg.eigvalsh((s.T @ s).double())[-1])
    if top <= 0:
        return w
    ahead, momentum = w, 1.0
    for _ in range(iterations):
        gradient = s @ (ahead @ s)
        following = _onto_simplex(ahead - gradient / top, wanted, groups)
        grown = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
        ahead = following + (momentum - 1) / grown * (following - w)
        if float((following - w).abs().max()) < 1e-6:
            return following
        w, momentum = following, grown
    return w


def _onto_simplex(v: Tensor, wanted: Tensor, groups: Tensor) -> Tensor:
    """The nearest w in [0, 1]^N whose sum over each group is `wanted`: clip(v - shift of the group), by bisection."""
    low = torch.full_like(wanted, float(v.min()) - 1.0)
    high = torch.full_like(wanted, float(v.max()))
    for _ in range(40):
        middle = 0.5 * (low + high)
        total = torch.zeros_like(wanted).index_add_(0, groups, (v - middle[groups]).clamp_(0, 1))
        too_many = total > wanted
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return (v - (0.5 * (low + high))[groups]).clamp_(0, 1)


def _rounded(s: Tensor, w: Tensor, counts: Sequence[int], groups: Tensor) -> Tensor:
    """(N,) bool near w: each entry rounded to where the sum of the errors so far stays shorter."""
    mask = w > 0.5
    # One more coordinate a group, whose error is the number of members too many.
    error = s.new_zeros(s.shape[1])
    surplus = [0.0] * len(counts)
    open_ = ((w > 1e-4) & (w < 1 - 1e-4)).nonzero()[:, 0]
    rows, weights, of = s[open_], w[open_].tolist(), groups[open_].tolist()
    squares = rows.square().sum(dim=1).tolist()
    for place, weight, group, square, row in zip(open_.tolist(), weights, of, squares, rows, strict=True):
        # |error + (x - w) row|^2 for x = 1 less that for x = 0, the group's count as a coordinate of the rows' length.
        change = (1 - 2 * weight) * (square + 1.0) + 2 * (float(error @ row) + surplus[group])
        inside = change < 0
        mask[place] = inside
        step = (1.0 if inside else 0.0) - weight
        error.add_(row, alpha=step)
        surplus[group] += step
    total = s.T @ mask.to(s)
    for group, count in enumerate(counts):
        own = (groups == group).nonzero()[:, 0]
        excess = int(mask[own].sum()) - count
        for _ in range(abs(excess)):
            sign = -1.0 if excess > 0 else 1.0
            free = own[mask[own] == (excess > 0)]
            rows = s[free]
            chosen = free[torch.argmin(2 * sign * (rows @ total) + rows.square().sum(dim=1))]
            mask[chosen] = excess < 0
            total += sign * s[chosen]
    return mask


def _swapped(s: Tensor, mask: Tensor, groups: Tensor, group_count: int, swaps: int) -> Tensor:
    """The mask after swaps of a member and an outsider of one group that make the sum shorter."""
    mask = mask.clone()
    total = s.T @ mask.to(s)
    squares = s.square().sum(dim=1)
    members = [(groups == group).nonzero()[:, 0] for group in range(group_count)]
    group, idle = 0, 0
    while swaps > 0 and idle < group_count:
        own = members[group]
        best = _best_swap(s, squares, total, own[mask[own]], own[~mask[own]])
        if best is None:
            idle, group = idle + 1, (group + 1) % group_count
            continue
        out, into = best
        mask[out], mask[into] = False, True
        total += s[into] - s[out]
        swaps, idle = swaps - 1, 0
    return mask


def _best_swap(s: Tensor, squares: Tensor, total: Tensor, inside: Tensor, outside: Tensor) -> tuple[int, int] | None:
    """(member, outsider) whose swap shortens the sum most, among the likely ones; None where none does."""
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
    # Less than rounding can tell is no improvement: the search must end.
    if float(change[row, column]) >= -1e-6 * (1.0 + float(total.square().sum())):
        return None
    return int(inside[leaving[row]]), int(outside[entering[column]])
