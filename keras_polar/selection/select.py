"""From gates to masks: which units stay when the consensus is settled. Pure NumPy."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from keras_polar.coupling.coupling import Coupling
from keras_polar.selection.budget import BRANCH, Budget
from keras_polar.selection.equal import blocks_of, budget_of_blocks, scores_of_blocks

CLOSE = 0.001  # a sparsity this near to the requested is not improved further
MANY = 500  # groups; among so many the ranking alone comes close enough
# Kernels compute eight channels at a time, or four: what is left over takes as long as all of them.
ROUNDINGS = (8, 4, 2, 1)
MISS = 0.005  # what the sparsity may be off for the sake of a rounding


def rank_units(
    scores: Sequence[np.ndarray], is_closed: Sequence[np.ndarray], budget: Budget
) -> list[np.ndarray]:
    """How much each unit is wanted, over all groups: the scores that `settle` takes.

    Gates compare units within a group; between groups their scores say more about widths and
    learning rates than about use. So every group gives the same share, as if the network were
    made narrower all over: the worst of its units go first, wherever they are, and no group can
    vanish. Branches, units of their own, are compared with one another. What the gates have
    closed by themselves goes before all that they left open.

    Args:
        scores: for every group how open its gates are, floats of shape (units,).
        is_closed: for every group bools of shape (units,).
        budget: whose kinds tell branches from channels.
    """
    places = [_places(s) for s in scores]
    branches = [i for i, kind in enumerate(budget.kinds) if kind == BRANCH]
    for i, place in zip(branches, _places(_flat(scores[i] for i in branches)), strict=True):
        places[i] = place[None]
    return [place - closed for place, closed in zip(places, is_closed, strict=True)]


def _flat(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *arrays])


def _places(scores: np.ndarray) -> np.ndarray:
    """From 0 for the lowest score to 1 for the highest, both excluded."""
    return (np.argsort(np.argsort(scores, kind="stable")) + 0.5) / max(len(scores), 1)


def select_units(scores: Sequence[np.ndarray], budget: Budget) -> list[np.ndarray]:
    """Closes the units with the lowest scores, over all groups, until the budget is met.

    Units are ranked one by one, so that ties cannot overshoot. Where the next step would (a whole
    branch, or `round_to` units at once), its group stays as it is and the ranking goes on.
    Of groups that keep equally many, units of the same rank go together.

    Args:
        scores: for every group how much its units are wanted, floats of shape (units,). Infinite
            scores are never closed, minus infinity first.
        budget: what may remain.

    Returns:
        For every group a bool array of shape (units,), True for units that stay.
    """
    blocks = blocks_of(budget)
    wanted, whole = scores_of_blocks(scores, budget, blocks), budget_of_blocks(budget, blocks)
    for round_to in [whole.round_to] if whole.round_to else ROUNDINGS:
        counts = _kept_counts(wanted, _leaving_decided(wanted, whole, round_to))
        if whole.distance(counts) <= MISS:
            break
    return [_top(s, n) for s, n in zip(scores, counts[blocks], strict=True)]


def _leaving_decided(scores: Sequence[np.ndarray], budget: Budget, round_to: Any) -> Budget:
    """The budget where groups with infinite scores, which are decided, are not rounded."""
    decided = [bool(np.isinf(s).any()) for s in scores]
    floors = tuple(0 if d else n for d, n in zip(decided, budget.floors, strict=True))
    steps = np.where(decided, 1, round_to)
    return replace(budget, floors=floors, round_to=tuple(steps.tolist()))


def _kept_counts(scores: Sequence[np.ndarray], budget: Budget) -> np.ndarray:
    groups = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
    flat = np.concatenate(scores)
    order = groups[np.argsort(flat, kind="stable")][: np.sum(flat < np.inf)]
    closed = decided = int(np.sum(flat == -np.inf))
    best = budget.left(order[:closed])
    while budget.distance(best) > CLOSE and closed < len(order):
        closed = _first_to_meet(order, closed, budget)
        before = max(closed - 1, decided)
        around = [budget.left(order[:before]), budget.left(order[:closed])]
        best = min([best, *around], key=budget.distance)
        closed = before if budget.achieved(around[1]) > budget.sparsity else closed
        later = order[closed:]
        order = np.concatenate([order[:closed], later[later != later[0]]]) if len(later) else order
    is_free = np.array([bool(np.isfinite(s).all()) for s in scores])
    return _nearer(best, budget, is_free)


def _nearer(counts: np.ndarray, budget: Budget, is_free: np.ndarray) -> np.ndarray:
    """Counts with a step more or less in one or two groups, if that comes closer to the budget.

    Steps of several units at once seldom add up to it in the order of the ranking alone.
    """
    if budget.distance(counts) <= CLOSE or is_free.sum() > MANY:
        return counts
    steps = np.diag(np.broadcast_to(np.asarray(budget.round_to or 1), counts.shape))[is_free]
    moves = np.stack([0 * counts, *steps, *-steps])
    alone = np.array([budget.achieved(budget.rounded(counts + move)) for move in moves])
    both = alone[:, None] + alone - alone[0]  # almost: costs are no sums
    pairs = np.argsort(np.abs(both - budget.sparsity), axis=None)[:8]
    near = [budget.rounded(counts + moves[i] + moves[j]) for i, j in _pairs(pairs, len(moves))]
    return min([counts, *near], key=budget.distance)


def _pairs(places: np.ndarray, size: int) -> np.ndarray:
    return np.stack(np.unravel_index(places, (size, size)), axis=1)


def _first_to_meet(order: np.ndarray, low: int, budget: Budget) -> int:
    """How many units of the ranking must go to meet the budget; all, if it cannot be met."""
    high = len(order)
    while low < high:
        middle = (low + high) // 2
        if budget.achieved(budget.left(order[:middle])) >= budget.sparsity:
            high = middle
        else:
            low = middle + 1
    return high


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(len(scores), bool)
    mask[np.argsort(-scores, kind="stable")[:count]] = True
    return mask


def below_usual(
    coupling: Coupling, budget: Budget, floors: Callable[[float], Sequence[int]]
) -> tuple[list[str], float]:
    """Groups of which less stays than usual when all give alike, in words.

    Args:
        floors: the usual floors for a sparsity.

    Returns:
        The groups, none if the floors hold; and the largest sparsity, to the point, at which they
        hold, 0 if at none.
    """
    usual = floors(budget.sparsity)
    if list(budget.floors[: len(usual)]) == list(usual):
        return [], budget.sparsity
    scores = [np.ones(n) for n in budget.units]
    kept = select_units(rank_units(scores, [s == 0 for s in scores], budget), budget)
    counts = [int(mask.sum()) for mask in kept]
    low = [
        f"{g.name} ({n} of {g.units} units would stay, usually {least} at least)"
        for g, n, least in zip(coupling.groups, counts, usual, strict=False)
        if n < least
    ]
    return low, _largest(budget, floors)


def _largest(budget: Budget, floors: Callable[[float], Sequence[int]]) -> float:
    branches = budget.floors[len(floors(budget.sparsity)) :]
    for points in range(int(100 * budget.sparsity), 0, -1):
        lower = points / 100
        if replace(budget, floors=(*floors(lower), *branches)).reachable >= lower:
            return lower
    return 0.0
