"""What gates decide about, and what must remain: groups of units, residual branches, floors."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from keras_polar.costs.polynomial import polynomial
from keras_polar.coupling.branches import Block, find_blocks
from keras_polar.coupling.coupling import Coupling, Group, off_batch, sites_of
from keras_polar.rules import Site, Term
from keras_polar.rules.call_site import inner_vector, line
from keras_polar.selection.select import Budget, ranking, settle

# Unless it is said otherwise, this part of the share that is to remain stays in every group.
FLOOR = 0.25


@dataclass(frozen=True, eq=False)
class Target:
    """What one gate decides about: the units of a group, or a residual branch.

    Attributes:
        name: of the group or branch.
        units: number of units; 1 for a branch.
        layers: names of the layers that produce the units, or that are in the branch.
        members: layer -> for each unit it makes, its place in the group or -1; None for all in
            order. Empty for a branch.
        floor: units that stay at least.
        site: index of the call whose input a gate can look at.
        per_sample: whether a gate can decide for each sample: there are features to look at, and
            the units are masked on tensors whose first axis is that of the samples.
        adds: the tensor that a branch adds to a sum, -1 for a group.
    """

    name: str
    units: int
    layers: tuple[str, ...]
    members: dict[str, list | None]
    floor: int
    site: int
    per_sample: bool
    adds: int = -1


def targets(coupling: Coupling, blocks: Sequence[Block], floors: Sequence[int]) -> list[Target]:
    """One target per group of a coupled graph, then one per block: the variables of its cost."""
    produced, apart = coupling.produced(), off_batch(coupling)
    seen = [_shows_features(coupling, site, apart) for site in coupling.sites]
    for_all = _groups_for_all_samples(coupling, apart)
    groups = enumerate(zip(coupling.groups, floors, strict=False))  # floors of blocks are all 0
    found = [
        _group_target(coupling, i, g, n, produced, seen[g.site] and i not in for_all)
        for i, (g, n) in groups
    ]
    return [*found, *(_block_target(b, seen) for b in blocks)]


def _groups_for_all_samples(coupling: Coupling, apart: set[int]) -> set[int]:
    """Groups that are masked where samples are not apart: on weights, on windows of images, say."""
    vectors = [inner_vector(site, *read) for site in coupling.sites for read in site.inner_reads]
    for site in coupling.sites:
        reads = [(t, axis) for t, axis in site.reads if site.call.inputs[t] in apart]
        vectors += [line(site.inputs[t], axis) for t, axis in reads]
    return {int(i) for v in vectors for i in np.unique(coupling.group_of[v[v >= 0]])}


def _group_target(
    coupling: Coupling, i: int, group: Group, floor: int, produced: dict, per_sample: bool
) -> Target:
    members = {n: _places(coupling, i, produced[n]) for n in group.layers}
    return Target(group.name, group.units, group.layers, members, floor, group.site, per_sample)


def _places(coupling: Coupling, i: int, vector: np.ndarray) -> list | None:
    own = (vector >= 0) & (coupling.group_of[vector] == i)
    places = np.where(own, coupling.index_of[vector], -1).tolist()
    return None if places == list(range(coupling.groups[i].units)) else places


def _block_target(block: Block, seen: Sequence[bool]) -> Target:
    site = next((i for i in block.calls if seen[i]), block.calls[0])
    return Target(block.name, 1, block.layers, {}, 0, site, seen[site], block.tensor)


def _shows_features(coupling: Coupling, site: Site, apart: set[int]) -> bool:
    """Whether a call reads units of a tensor that a gate can look at, sample by sample.

    A layer that reads no features (token ids, say) gives a gate nothing to look at.
    """
    read = [site.call.inputs[tensor] for tensor, _ in site.reads[:1]]
    has_features = any("float" in coupling.graph.specs[t].dtype for t in read)
    return has_features and apart.isdisjoint(site.call.inputs)


def blocks_of(coupling: Coupling, ignore: Iterable[str]) -> tuple[Block, ...]:
    """The branches of a coupled graph without a layer that is to be left alone."""
    kept = {s.name for found in sites_of(coupling.sites, ignore, "ignore").values() for s in found}
    return tuple(b for b in find_blocks(coupling.graph) if kept.isdisjoint(b.layers))


def budget_of(
    coupling: Coupling,
    blocks: Sequence[Block],
    *,
    sparsity: float,
    measure: str,
    min_units: int,
    max_sparsity: float | Mapping[str, float] | None,
    round_to: int | None,
    timed: Sequence[tuple[int, Term]] = (),
) -> Budget:
    """What may remain.

    Args:
        timed: the cost terms of the measure "latency", with their calls.

    Raises:
        ValueError: the sparsity cannot be reached; says what can.
    """
    units = (*(g.units for g in coupling.groups), *(1 for _ in blocks))
    cost = polynomial(coupling, measure, blocks, timed)

    def budget(floors: Sequence[int]) -> Budget:
        floors = (*floors, *(0 for _ in blocks))
        return Budget(cost, units, float(sparsity), floors, round_to)

    guarded = budget(usual_floors(coupling, sparsity, min_units, max_sparsity))
    is_enough = guarded.reachable >= sparsity
    found = guarded if is_enough else budget(_floors(coupling, max_sparsity, 1.0, min_units))
    if found.reachable < sparsity:
        raise ValueError(
            f"apply: sparsity={sparsity} of the {measure} cannot be reached; at most "
            f"{found.reachable:.3f} can go with min_units={min_units}, round_to={round_to}, "
            f"max_sparsity={max_sparsity} and the layers that keep their units. Ask for less; "
            "keras_polar.inspect(model) says which units stay and why."
        )
    return found


def usual_floors(
    coupling: Coupling,
    sparsity: float,
    min_units: int,
    max_sparsity: float | Mapping[str, float] | None,
) -> list[int]:
    """Units that stay in every group, as long as the sparsity can be reached with that."""
    return _floors(coupling, max_sparsity, 1 - FLOOR * (1 - sparsity), min_units)


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
    kept = settle(ranking(scores, [s == 0 for s in scores], budget), budget)
    counts = [int(mask.sum()) for mask in kept]
    found = [
        f"{g.name} ({n} of {g.units} units would stay, usually {least} at least)"
        for g, n, least in zip(coupling.groups, counts, usual, strict=False)
        if n < least
    ]
    return found, _largest(budget, floors)


def _largest(budget: Budget, floors: Callable[[float], Sequence[int]]) -> float:
    branches = budget.floors[len(floors(budget.sparsity)) :]
    for points in range(int(100 * budget.sparsity), 0, -1):
        lower = points / 100
        if replace(budget, floors=(*floors(lower), *branches)).reachable >= lower:
            return lower
    return 0.0


def _floors(coupling: Coupling, wanted: Any, otherwise: float, min_units: int) -> list[int]:
    limits = [otherwise if wanted is None else wanted] * len(coupling.groups)
    if isinstance(wanted, Mapping):
        by_layer = {p: _names(coupling, p) for p in wanted}
        limits = [_limit(g, wanted, by_layer, otherwise) for g in coupling.groups]
    least = (
        max(min_units, math.ceil((1 - limit) * g.units - 1e-9))
        for g, limit in zip(coupling.groups, limits, strict=True)
    )
    return [min(n, g.units) for n, g in zip(least, coupling.groups, strict=True)]


def _names(coupling: Coupling, pattern: str) -> set[str]:
    return {s.name for s in sites_of(coupling.sites, [pattern], "max_sparsity")[pattern]}


def _limit(group: Group, wanted: Mapping, by_layer: dict, otherwise: float) -> float:
    own = [wanted[p] for p, names in by_layer.items() if names.intersection(group.layers)]
    return min(own, default=otherwise)
