"""Groups that keep equally many units: those of the same rank are one block, decided at once."""

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from keras_polar.coupling.coupling import Coupling, sites_of, strings_in, why_fixed
from keras_polar.selection.budget import TINY, Budget

Tied = tuple[tuple[int, ...], ...]


def equal_groups(coupling: Coupling, patterns: Any, besides: Iterable[Iterable[str]] = ()) -> Tied:
    """Indices of the groups that each pattern ties; patterns with a group in common tie as one.

    Args:
        patterns: glob patterns of layers' or groups' names.
        besides: names of groups that are tied as well, each set apart from the others.

    Raises:
        TypeError: the patterns are not strings.
        ValueError: a pattern matches no layer, a layer whose units stay, or groups of different
            sizes.
    """
    places = {group.name: i for i, group in enumerate(coupling.groups)}
    tied = [{places[name] for name in names} for names in besides]
    for pattern in strings_in(patterns, "equal"):
        found = _matched(coupling, pattern)
        for other in [t for t in tied if t & found]:
            tied.remove(other)
            found |= other
        _refuse_sizes(coupling, pattern, found)
        tied.append(found)
    return tuple(tuple(sorted(t)) for t in tied if len(t) > 1)


def _matched(coupling: Coupling, pattern: str) -> set[int]:
    groups = enumerate(coupling.groups)
    found = {i for i, g in groups if fnmatch.fnmatchcase(g.name, pattern)}
    if found and not any(fnmatch.fnmatchcase(s.name, pattern) for s in coupling.sites):
        return found  # a kind of units: "attention.heads"
    names = {s.name for s in sites_of(coupling.sites, [pattern], "equal")[pattern]}
    _refuse_fixed(coupling, pattern, names)
    return found | {i for i, g in enumerate(coupling.groups) if names.intersection(g.layers)}


def _refuse_fixed(coupling: Coupling, pattern: str, names: Iterable[str]) -> None:
    """What keeps all its units could be equal to nothing that is cut."""
    made = coupling.produced()
    for name in sorted(made.keys() & names):
        why = why_fixed(coupling, made[name])
        if why:
            raise ValueError(
                f"equal: {pattern!r} matches layer {name!r}, all units of which stay: {why}. "
                "Expected layers whose units can go; keras_polar.inspect(model) lists them."
            )


def _refuse_sizes(coupling: Coupling, pattern: str, found: Iterable[int]) -> None:
    groups = [coupling.groups[i] for i in sorted(found)]
    if len({g.units for g in groups}) > 1:
        listed = ", ".join(f"{g.name!r} ({g.units} units)" for g in groups)
        raise ValueError(
            f"equal: expected groups of one size, but {pattern!r} ties {listed}. Give a pattern "
            "for those of each size."
        )


# --- blocks -------------------------------------------------------------------------------------


def blocks_of(budget: Budget) -> np.ndarray:
    """Of each group the place of its block among all; a group that is not tied is one alone."""
    first = np.arange(len(budget.units))
    for tied in budget.equal:
        first[list(tied)] = tied[0]
    return np.unique(first, return_inverse=True)[1]


def budget_of_blocks(budget: Budget, blocks: np.ndarray) -> Budget:
    """The same budget, of the counts of blocks."""
    if not budget.equal:
        return budget
    first = np.unique(blocks, return_index=True)[1].tolist()
    return replace(
        budget,
        cost=budget.cost.joined(blocks.tolist()),
        units=tuple(budget.units[i] for i in first),
        floors=tuple(budget.floors[i] for i in first),  # those of tied groups are alike
        round_to=budget.step_of(first),
        kinds=tuple(budget.kinds[i] for i in first if budget.kinds),
        equal=(),
    )


def scores_of_blocks(
    scores: Sequence[np.ndarray], budget: Budget, blocks: np.ndarray
) -> list[np.ndarray]:
    """How much blocks are wanted, for what they cost: means of their units', by what these cost."""
    if not budget.equal:
        return list(scores)
    costs = np.maximum(budget.unit_costs, TINY)
    members = [np.flatnonzero(blocks == i).tolist() for i in range(blocks.max() + 1)]
    return [
        np.average([np.sort(scores[i])[::-1] for i in tied], axis=0, weights=costs[tied])
        if len(tied) > 1
        else scores[tied[0]]
        for tied in members
    ]
