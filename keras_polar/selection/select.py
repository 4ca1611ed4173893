"""From gates to masks: which units stay when the consensus is settled. Pure NumPy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from keras_polar.costs.polynomial import Polynomial

CLOSE = 0.001  # a sparsity this near to the requested is not improved further
MANY = 500  # groups; among so many the ranking alone comes close enough
# Kernels compute eight channels at a time, or four: what is left over takes as long as all of them.
ROUNDINGS = (8, 4, 2, 1)
MISS = 0.005  # what the sparsity may be off for the sake of a rounding


@dataclass(frozen=True)
class Budget:
    """What a settled network may cost.

    Attributes:
        cost: the cost as a polynomial of the open counts.
        units: number of units of each group.
        sparsity: share of the full cost to be removed.
        floors: units that each group keeps at least.
        round_to: kept counts are multiples of this (or all units of the group); None for the
            largest of 8, 4, 2, 1 with which the sparsity is met to half a point. One for all, or
            one per group.
    """

    cost: Polynomial
    units: tuple[int, ...]
    sparsity: float
    floors: tuple[int, ...]
    round_to: int | tuple[int, ...] | None = 1

    @cached_property
    def full_cost(self) -> int:
        return self.cost(self.units)

    def achieved(self, counts: Sequence[int] | np.ndarray) -> float:
        """Share of the full cost that is removed when `counts` units stay per group."""
        return 1 - self.cost(counts) / self.full_cost

    def rounded(self, counts: np.ndarray) -> np.ndarray:
        """The smallest allowed counts that are not below `counts`."""
        counts = np.maximum(counts, self.floors)
        steps = np.asarray(self.round_to or 1)
        return np.minimum(-(-counts // steps) * steps, self.units)

    def left(self, closed: np.ndarray) -> np.ndarray:
        """What stays of each group when units of the groups `closed` go, one for each mention."""
        gone = np.bincount(closed, minlength=len(self.units))
        return self.rounded(np.asarray(self.units) - gone)

    def distance(self, counts: np.ndarray) -> float:
        """How far the achieved sparsity is from the requested."""
        return abs(self.achieved(counts) - self.sparsity)

    @property
    def reachable(self) -> float:
        """The largest sparsity that leaves every group its minimum."""
        return self.achieved(self.rounded(np.zeros(len(self.units), int)))


def ranking(
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
        budget: whose units and floors tell branches from groups.
    """
    is_branch = (np.asarray(budget.units) == 1) & (np.asarray(budget.floors) == 0)
    places = [_places(s) for s in scores]
    branches = np.flatnonzero(is_branch).tolist()
    for i, place in zip(branches, _places(_flat(scores[i] for i in branches)), strict=True):
        places[i] = place[None]
    return [place - closed for place, closed in zip(places, is_closed, strict=True)]


def _flat(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *arrays])


def _places(scores: np.ndarray) -> np.ndarray:
    """From 0 for the lowest score to 1 for the highest, both excluded."""
    return (np.argsort(np.argsort(scores, kind="stable")) + 0.5) / max(len(scores), 1)


def settle(scores: Sequence[np.ndarray], budget: Budget) -> list[np.ndarray]:
    """Closes the units with the lowest scores, over all groups, until the budget is met.

    Units are ranked one by one, so that ties cannot overshoot. Where the next step would (a whole
    branch, or `round_to` units at once), its group stays as it is and the ranking goes on.

    Args:
        scores: for every group how much its units are wanted, floats of shape (units,). Infinite
            scores are never closed, minus infinity first.
        budget: what may remain.

    Returns:
        For every group a bool array of shape (units,), True for units that stay.
    """
    for round_to in [budget.round_to] if budget.round_to else ROUNDINGS:
        counts = _kept_counts(scores, _leaving_decided(scores, budget, round_to))
        if budget.distance(counts) <= MISS:
            break
    return [_top(s, n) for s, n in zip(scores, counts, strict=True)]


def _leaving_decided(scores: Sequence[np.ndarray], budget: Budget, round_to: Any) -> Budget:
    """The budget where groups with infinite scores, which are decided, are not rounded."""
    decided = [bool(np.isinf(s).any()) for s in scores]
    floors = tuple(0 if d else n for d, n in zip(decided, budget.floors, strict=True))
    return replace(budget, floors=floors, round_to=tuple(1 if d else round_to for d in decided))


def _kept_counts(scores: Sequence[np.ndarray], budget: Budget) -> np.ndarray:
    groups = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
    flat = np.concatenate(scores)
    order = groups[np.argsort(flat, kind="stable")][: np.sum(flat < np.inf)]
    best, closed = budget.left(order[:0]), 0
    while budget.distance(best) > CLOSE and closed < len(order):
        closed = _first_to_meet(order, closed, budget)
        around = [budget.left(order[: closed - 1]), budget.left(order[:closed])]
        best = min([best, *around], key=budget.distance)
        closed -= budget.achieved(around[1]) > budget.sparsity
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
