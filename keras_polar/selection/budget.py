"""What a settled network may cost, and what each group keeps at least."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from keras_polar.costs.polynomial import Polynomial
from keras_polar.coupling.branches import Branch
from keras_polar.coupling.coupling import Coupling, Group, sites_of

CHANNELS, BRANCH = "channels", "branch"  # kinds of groups
TINY = 1e-12  # instead of a cost or a mean of zero


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
        kinds: what each group is, "channels" or "branch"; none stands for channels alone.
        equal: indices of groups that keep equally many units, and have equal floors.
    """

    cost: Polynomial
    units: tuple[int, ...]
    sparsity: float
    floors: tuple[int, ...]
    round_to: int | tuple[int, ...] | None = 1
    kinds: tuple[str, ...] = ()
    equal: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def full_cost(self) -> int:
        return self.cost(self.units)

    @cached_property
    def unit_costs(self) -> np.ndarray:
        """What one unit of each group saves, of the whole network."""
        full = np.asarray(self.units)
        ones = np.eye(len(full), dtype=int)
        return np.array([self.full_cost - self.cost(full - one) for one in ones], float)

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

    def step_of(self, groups: Sequence[int]) -> Any:
        """What the counts of some groups are rounded to, as `round_to` has it."""
        given = self.round_to
        return tuple(given[i] for i in groups) if isinstance(given, tuple) else given

    @property
    def reachable(self) -> float:
        """The largest sparsity that leaves every group its minimum."""
        return self.achieved(self.rounded(np.zeros(len(self.units), int)))


# Unless it is said otherwise, this part of the share that is to remain stays in every group.
FLOOR = 0.25


def budget_of(
    coupling: Coupling,
    branches: Sequence[Branch],
    cost: Polynomial,
    *,
    sparsity: float,
    measure: str,
    min_units: int,
    max_sparsity: float | Mapping[str, float] | None,
    round_to: int | tuple[int, ...] | None,
    equal: tuple[tuple[int, ...], ...] = (),
) -> Budget:
    """What may remain.

    Args:
        cost: of the open units of each group, then of branches.
        measure: its name.
        equal: indices of groups that keep equally many units.

    Raises:
        ValueError: the sparsity cannot be reached; says what can.
    """
    units = (*(g.units for g in coupling.groups), *(1 for _ in branches))
    kinds = (*(CHANNELS for _ in coupling.groups), *(BRANCH for _ in branches))

    def budget(floors: Sequence[int]) -> Budget:
        floors = (*floors, *(0 for _ in branches))
        return Budget(cost, units, sparsity, floors, round_to, kinds, equal)

    guarded = budget(usual_floors(coupling, sparsity, min_units, max_sparsity, equal))
    is_enough = guarded.reachable >= sparsity
    lowest = _floors(coupling, max_sparsity, 1.0, min_units, equal)
    chosen = guarded if is_enough else budget(lowest)
    if chosen.reachable < sparsity:
        raise ValueError(
            f"apply: sparsity={sparsity} of the {measure} cannot be reached; at most "
            f"{chosen.reachable:.3f} can go with min_units={min_units}, round_to={round_to}, "
            f"max_sparsity={max_sparsity} and the layers that keep their units. Ask for less; "
            "keras_polar.inspect(model) says which units stay and why."
        )
    return chosen


def usual_floors(
    coupling: Coupling,
    sparsity: float,
    min_units: int,
    max_sparsity: float | Mapping[str, float] | None,
    equal: tuple[tuple[int, ...], ...] = (),
) -> list[int]:
    """Units that stay in every group, as long as the sparsity can be reached with that."""
    return _floors(coupling, max_sparsity, 1 - FLOOR * (1 - sparsity), min_units, equal)


def _floors(
    coupling: Coupling, most: Any, otherwise: float, min_units: int, equal: Sequence
) -> list[int]:
    """From the largest shares that may go, as `max_sparsity` of `apply`."""
    limits = [otherwise if most is None else most] * len(coupling.groups)
    if isinstance(most, Mapping):
        by_layer = {p: _names(coupling, p) for p in most}
        limits = [_limit(g, most, by_layer, otherwise) for g in coupling.groups]
    least = (
        max(min_units, math.ceil((1 - limit) * g.units - 1e-9))
        for g, limit in zip(coupling.groups, limits, strict=True)
    )
    floors = [min(n, g.units) for n, g in zip(least, coupling.groups, strict=True)]
    for tied in equal:
        highest = max(floors[i] for i in tied)
        floors = [highest if i in tied else n for i, n in enumerate(floors)]
    return floors


def _names(coupling: Coupling, pattern: str) -> set[str]:
    return {s.name for s in sites_of(coupling.sites, [pattern], "max_sparsity")[pattern]}


def _limit(group: Group, most: Mapping, by_layer: dict, otherwise: float) -> float:
    limits = [most[p] for p, names in by_layer.items() if names.intersection(group.layers)]
    return min(limits, default=otherwise)
