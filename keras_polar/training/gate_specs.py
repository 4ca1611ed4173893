"""What gates decide about, and what must remain: groups of units, residual branches, floors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from keras_polar.coupling.branches import Branch, find_branches
from keras_polar.coupling.coupling import Coupling, Group, off_batch, sites_of
from keras_polar.rules import CallSite
from keras_polar.rules.call_site import ids_along, inner_vector


@dataclass(frozen=True, eq=False)
class GateSpec:
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


def gate_specs(
    coupling: Coupling, blocks: Sequence[Branch], floors: Sequence[int]
) -> list[GateSpec]:
    """One spec per group of a coupled graph, then one per branch: the variables of its cost."""
    produced, apart = coupling.produced(), off_batch(coupling)
    seen = [_shows_features(coupling, site, apart) for site in coupling.sites]
    for_all = _groups_for_all_samples(coupling, apart)
    groups = enumerate(zip(coupling.groups, floors, strict=False))  # floors of blocks are all 0
    of_groups = [
        _group_spec(coupling, i, g, n, produced, seen[g.site] and i not in for_all)
        for i, (g, n) in groups
    ]
    return [*of_groups, *(_branch_spec(b, seen) for b in blocks)]


def _groups_for_all_samples(coupling: Coupling, apart: set[int]) -> set[int]:
    """Groups that are masked where samples are not apart: on weights, on windows of images, say."""
    vectors = [inner_vector(site, *read) for site in coupling.sites for read in site.inner_reads]
    for site in coupling.sites:
        reads = [*site.reads, *site.averaged]
        reads = [(t, axis) for t, axis in reads if site.call.inputs[t] in apart]
        vectors += [ids_along(site.inputs[t], axis) for t, axis in reads]
    return {int(i) for v in vectors for i in np.unique(coupling.group_of[v[v >= 0]])}


def _group_spec(
    coupling: Coupling, i: int, group: Group, floor: int, produced: dict, per_sample: bool
) -> GateSpec:
    members = {n: _places(coupling, i, produced[n]) for n in group.layers}
    return GateSpec(group.name, group.units, group.layers, members, floor, group.site, per_sample)


def _places(coupling: Coupling, i: int, vector: np.ndarray) -> list | None:
    is_member = (vector >= 0) & (coupling.group_of[vector] == i)
    places = np.where(is_member, coupling.index_of[vector], -1).tolist()
    return None if places == list(range(coupling.groups[i].units)) else places


def _branch_spec(block: Branch, seen: Sequence[bool]) -> GateSpec:
    site = next((i for i in block.calls if seen[i]), block.calls[0])
    return GateSpec(block.name, 1, block.layers, {}, 0, site, seen[site], block.tensor)


def _shows_features(coupling: Coupling, site: CallSite, apart: set[int]) -> bool:
    """Whether a call reads units of a tensor that a gate can look at, sample by sample.

    A layer that reads no features (token ids, say) gives a gate nothing to look at.
    """
    read = [site.call.inputs[tensor] for tensor, _ in site.reads[:1]]
    has_features = any("float" in coupling.graph.specs[t].dtype for t in read)
    return has_features and apart.isdisjoint(site.call.inputs)


def branches_of(coupling: Coupling, ignore: Iterable[str]) -> tuple[Branch, ...]:
    """The branches of a coupled graph without a layer that is to be left alone."""
    kept = {s.name for found in sites_of(coupling.sites, ignore, "ignore").values() for s in found}
    return tuple(b for b in find_branches(coupling.graph) if kept.isdisjoint(b.layers))
