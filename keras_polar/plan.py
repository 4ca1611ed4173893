"""From gates to masks: which units stay when the consensus is settled. Pure NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from keras_polar.cost import Polynomial


@dataclass(frozen=True)
class Budget:
    """What a settled network may cost.

    Attributes:
        cost: the cost as a polynomial of the open counts.
        units: number of units of each group.
        sparsity: share of the full cost to be removed.
        min_units: units that every group keeps at least.
        round_to: kept counts are multiples of this (or all units of the group).
    """

    cost: Polynomial
    units: tuple[int, ...]
    sparsity: float
    min_units: int = 1
    round_to: int = 1

    @cached_property
    def full_cost(self) -> int:
        return self.cost(self.units)

    def achieved(self, counts: Sequence[int] | np.ndarray) -> float:
        """Share of the full cost that is removed when `counts` units stay per group."""
        return 1 - self.cost(counts) / self.full_cost

    def rounded(self, counts: np.ndarray) -> np.ndarray:
        """The smallest allowed counts that are not below `counts`."""
        counts = np.maximum(counts, self.min_units)
        up = -(-counts // self.round_to) * self.round_to
        return np.minimum(up, self.units)

    @property
    def reachable(self) -> float:
        """The largest sparsity that leaves every group its minimum."""
        return self.achieved(self.rounded(np.zeros(len(self.units), int)))


def settle(scores: Sequence[np.ndarray], budget: Budget) -> list[np.ndarray]:
    """Closes the units with the lowest scores, over all groups, until the budget is met.

    Units are ranked one by one, so that ties cannot overshoot: of the two kept counts around the
    budget the closer one is taken.

    Args:
        scores: for every group how much its units are wanted, floats of shape (units,). Infinite
            scores are never closed, minus infinity first.
        budget: what may remain.

    Returns:
        For every group a bool array of shape (units,), True for units that stay.
    """
    groups = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
    flat = np.concatenate(scores)
    order = groups[np.argsort(flat, kind="stable")]
    closable = int(np.isfinite(flat).sum() + np.isneginf(flat).sum())

    def counts(closed: int) -> np.ndarray:
        gone = np.bincount(order[:closed], minlength=len(scores))
        return budget.rounded(np.asarray(budget.units) - gone)

    low, high = 0, closable
    while low < high:
        middle = (low + high) // 2
        if budget.achieved(counts(middle)) >= budget.sparsity:
            high = middle
        else:
            low = middle + 1
    below, above = counts(max(low - 1, 0)), counts(low)
    closer = _fill_up(below, order[low:closable], budget)
    best = min(closer, above, key=lambda c: abs(budget.achieved(c) - budget.sparsity))
    return [_top(s, n) for s, n in zip(scores, best, strict=True)]


def _fill_up(counts: np.ndarray, order: np.ndarray, budget: Budget) -> np.ndarray:
    """Closes one more step of each group, in the order of the ranking, where the budget allows."""
    for group in dict.fromkeys(order.tolist()):
        fewer = counts - budget.round_to * (np.arange(len(counts)) == group)
        fewer = budget.rounded(fewer)
        if budget.achieved(fewer) <= budget.sparsity:
            counts = fewer
    return counts


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(len(scores), bool)
    mask[np.argsort(-scores, kind="stable")[:count]] = True
    return mask
