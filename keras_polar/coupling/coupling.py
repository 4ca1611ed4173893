"""Which units of a model belong together, and which of them can go.

Residual sums, element-wise products and the like tie units of several layers into one class: they
go together or not at all. Classes that the same layers make and read in the same way form a
`Group`, the level at which gates decide and costs are counted.

Example: in `y = conv2(relu(conv1(x))) + x0` with `x0 = conv0(x)`, channel 3 of conv0 and channel 3
of conv2 are one class; all of these form one group "conv0" with layers (conv0, conv2), while the
channels of conv1 form a group of their own.
"""

import fnmatch
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from keras_polar.graph.clone import variable_at
from keras_polar.graph.ir import Graph, refs_in
from keras_polar.rules import CallSite, rule_for, trace_model
from keras_polar.rules.call_site import set_rows, sizes
from keras_polar.rules.ids import (
    Forest,
    Ids,
    Units,
    as_view,
    broadcast_along,
    drop_constant_axes,
    no_unit,
)


@dataclass(frozen=True, eq=False)
class Group:
    """Classes of units with the same producers and consumers, hence interchangeable in cost.

    Attributes:
        name: of the first producing layer, with what the units are where it makes several kinds
            ("attention.heads"); numbered where that leaves several groups.
        layers: names of the producing layers.
        roots: the classes, as the smallest id of each, int32 of shape (units,).
        members: where the first layer has them: indices among its units, int32 of shape (units,).
        site: index of the first producing call.
    """

    name: str
    layers: tuple[str, ...]
    roots: np.ndarray
    members: np.ndarray
    site: int

    @property
    def units(self) -> int:
        return len(self.roots)


@dataclass(frozen=True, eq=False)
class Coupling:
    """The units of a graph.

    Attributes:
        sites: one per call of the graph, in order, with the ids of its tensors.
        roots: id -> smallest id of its class, int32 of shape (ids,).
        reasons: root -> why that class stays.
        groups: the prunable classes, grouped.
        group_of: id -> index of its group, -1 if it stays; int32 of shape (ids,).
        index_of: id -> index of its class within the group; int32 of shape (ids,).
        flowed: the ties and pins that the operations ask for, before anything is ignored.
    """

    graph: Graph
    sites: tuple[CallSite, ...]
    roots: np.ndarray
    reasons: dict[int, str]
    groups: tuple[Group, ...]
    group_of: np.ndarray
    index_of: np.ndarray
    flowed: Units

    def produced(self) -> dict[str, Ids]:
        """Layer name -> ids of the units it makes, shape (units of the layer,)."""
        return {
            s.name: np.concatenate([s.axes[p] for p in s.produces])
            for s in self.sites
            if s.produces
        }


def couple(graph: Graph, ignore: Iterable[str] = ()) -> Coupling:
    """Follows the units through a graph.

    Args:
        ignore: names of layers (glob patterns) that keep all their units.

    Raises:
        ValueError: a pattern of `ignore` matches no layer.
    """
    units = Units()
    return _solved(graph, _flow(graph, units), units, ignore)


def analyze(model: Any) -> Coupling:
    """The units of a model, composite layers without a rule opened.

    Raises:
        TypeError: `model` is not a functional or built Sequential model.
    """
    return couple(trace_model(model))


def ignoring(coupling: Coupling, ignore: Iterable[str]) -> Coupling:
    """The same units, with those of layers by these names (glob patterns) kept; see `couple`."""
    return _solved(coupling.graph, coupling.sites, coupling.flowed, ignore)


def only(coupling: Coupling, groups: Iterable[Group]) -> Coupling:
    """The same units, of which those of `groups` alone can go."""
    kept = tuple(groups)
    group_of, index_of = _places(kept, coupling.roots)
    return replace(coupling, groups=kept, group_of=group_of, index_of=index_of)


def keeping(coupling: Coupling, layers: Iterable[str], why: str) -> Coupling:
    """The same units, with those in the outputs of layers by these names kept for a reason."""
    names, flowed = set(layers), coupling.flowed.copy()
    for ids in (ids for s in coupling.sites if s.name in names for ids in s.outputs):
        flowed.pin(ids, why)
    return _solved(coupling.graph, coupling.sites, flowed, ())


def pinning(coupling: Coupling, stay: Iterable[tuple[Ids, str]]) -> Coupling:
    """The same units, of which some stay, each for a reason; what has stayed before does too."""
    flowed, before = coupling.flowed.copy(), defaultdict(list)
    for root, why in coupling.reasons.items():
        before[why].append(root)
    for why, roots in before.items():
        flowed.pin(np.array(roots, np.int32), why)
    for ids, why in stay:
        flowed.pin(ids, why)
    return _solved(coupling.graph, coupling.sites, flowed, ())


def _solved(
    graph: Graph, sites: tuple[CallSite, ...], flowed: Units, ignore: Iterable[str]
) -> Coupling:
    units = flowed.copy()
    _pin_ignored(sites, units, ignore)
    _make_rectangular(sites, units)
    roots = units.roots()
    reasons = units.pinned(roots)
    groups = _groups(sites, roots, reasons)
    return Coupling(graph, sites, roots, reasons, groups, *_places(groups, roots), flowed)


def _flow(graph: Graph, units: Units) -> tuple[CallSite, ...]:
    ids: dict[int, Ids] = {i: no_unit(sizes(graph.specs[i].shape)) for i in refs_in(graph.inputs)}
    shared: dict[int, dict] = {}
    rows = dict.fromkeys(ids, 1)
    sites = []
    for call in graph.calls:
        # Calls of a layer without weights are nothing to each other.
        axes = shared.setdefault(id(call.op), {}) if getattr(call.op, "weights", ()) else {}
        site = CallSite(
            call, graph.specs, units, [ids[i] for i in call.inputs], axes, rule_for(call.op)
        )
        site.outputs = [as_view(ids) for ids in _followed(site)]
        ids.update(zip(call.outputs, site.outputs, strict=True))
        rows.update(dict.fromkeys(call.outputs, set_rows(site, [rows[i] for i in call.inputs])))
        sites.append(site)
    for i in refs_in(graph.outputs):
        units.pin(ids[i], "is an output of the model")
    _pin_shared(sites)
    return tuple(sites)


def _pin_shared(sites: Iterable[CallSite]) -> None:
    """Units along the axes of variables that several operations have stay.

    How the others compute with them is not known here.
    """
    users: dict[int, dict[int, CallSite]] = {}
    for site in sites:
        for variable in getattr(site.op, "weights", ()):
            users.setdefault(id(variable), {})[id(site.op)] = site
    for key, sharing in users.items():
        for site in sharing.values() if len(sharing) > 1 else ():
            names = ", ".join(repr(s.name) for s in sharing.values() if s is not site)
            for vector in _along(site, key):
                site.pin(vector, f"has a variable that {names} has too")


def _along(site: CallSite, variable: int) -> list[Ids]:
    """The units along the axes of a call's variable, by its id."""
    weights = site.rule.weights(site.op).items()
    axes = [names for path, names in weights if id(variable_at(site.op, path)) == variable]
    return [site.axes[n] for names in axes for n in names if n in site.axes]


def _followed(site: CallSite) -> list[Ids]:
    """What the rule says; all of a call's units stay if it does not fit the tensors' shapes."""
    try:
        return site.rule.flow(site)
    except (IndexError, TypeError, ValueError) as error:
        site.reads, site.averaged, site.produces = [], [], []
        why = f"units cannot be followed through it: {error}"
        for vector in site.axes.values():
            site.pin(vector, why)
        return site.pin_all(why)


def _pin_ignored(sites: tuple[CallSite, ...], units: Units, ignore: Iterable[str]) -> None:
    for pattern, found in sites_of(sites, ignore, "ignore").items():
        for site in found:
            for vector in site.axes.values():
                units.pin(vector, f"ignored by {pattern!r}")


def sites_of(sites: tuple[CallSite, ...], patterns: Any, option: str) -> dict[str, list[CallSite]]:
    """The calls of the layers that each glob pattern matches, by name or by path.

    Raises:
        TypeError: the patterns are not strings; `option` is the option that they were given for.
        ValueError: a pattern matches none.
    """
    by_pattern = {p: [s for s in sites if _matches(s, p)] for p in strings_in(patterns, option)}
    for pattern in (p for p, matches in by_pattern.items() if not matches):
        names = sorted({s.name for s in sites if s.produces})
        raise ValueError(
            f"{option}: expected names or glob patterns of layers; {pattern!r} matches none. "
            f"Layers with units: {', '.join(names)}."
        )
    return by_pattern


def strings_in(patterns: Any, option: str) -> list[str]:
    """The patterns that were given for an option, one or several; raises unless strings."""
    is_list = isinstance(patterns, Iterable) and not isinstance(patterns, str)
    strings = [*patterns] if is_list else [patterns]
    for pattern in strings:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{option}: expected a list of names or glob patterns of layers, "
                f"['stem', 'block1_*'] say; received {pattern!r}."
            )
    return strings


def _matches(site: CallSite, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(n, pattern) for n in (site.name, site.call.path))


def _make_rectangular(sites: tuple[CallSite, ...], units: Units) -> None:
    """Ties units until every tensor can be cut along one axis at a time.

    A tensor whose units vary along several axes (heads and channels of a reshaped Dense, say)
    could otherwise lose scattered elements, and nothing rectangular would remain. The axis with
    the most distinct units stays free.
    """
    arrays = [ids for site in sites for ids in site.outputs if _spans_several(ids)]
    if not arrays:
        return
    roots = units.roots()
    # What stays is as good as no unit: only free units must form a rectangle.
    is_fixed = units.fixed(roots)
    forest = Forest(roots)
    for ids in arrays:
        _tie_to_best_axis(drop_constant_axes(ids)[0], forest, is_fixed, units)


def _spans_several(ids: Ids) -> bool:
    (small,) = drop_constant_axes(ids)
    return sum(_differs(small, axis) for axis in range(small.ndim)) > 1


def _differs(ids: Ids, axis: int) -> bool:
    return bool(ids.size) and bool((ids != ids.take([0], axis)).any())


def _tie_to_best_axis(ids: Ids, forest: Forest, is_fixed: np.ndarray, units: Units) -> None:
    # Only this array's roots are looked up: asking for all of them each time would be quadratic.
    rooted = np.where(ids >= 0, forest.find(np.maximum(ids, 0)), -1)
    rooted[_is_fixed(ids, forest, is_fixed)] = -1
    if not _spans_several(rooted):
        return
    lines = {a: np.moveaxis(rooted, a, 0).reshape(rooted.shape[a], -1) for a in range(ids.ndim)}
    best = max(lines, key=lambda a: len(np.unique(lines[a][:, 0])))
    vector = np.moveaxis(ids, best, 0).reshape(ids.shape[best], -1)[:, 0]
    ties = broadcast_along(vector, best, ids.shape)
    units.tie(ids, ties, "belongs to a tensor with fixed elements")
    both = (ids >= 0) & (ties >= 0)
    stays = (_is_fixed(ids, forest, is_fixed) | _is_fixed(ties, forest, is_fixed)) & both
    forest.join(ids[both], ties[both])
    # A class that something fixed has joined stays as a whole.
    stays |= (ids >= 0) != (ties >= 0)
    is_fixed[forest.find(np.maximum(ids, ties)[stays])] = True


def _is_fixed(ids: Ids, forest: Forest, is_fixed: np.ndarray) -> np.ndarray:
    return (ids >= 0) & is_fixed[forest.find(np.maximum(ids, 0))]


# --- groups ----------------------------------------------------------------------------------


def _groups(sites: tuple[CallSite, ...], roots: np.ndarray, reasons: dict) -> tuple[Group, ...]:
    signatures = _signatures(sites, roots)
    is_free = roots == np.arange(len(roots))
    is_free[list(reasons)] = False
    free = np.flatnonzero(is_free).astype(np.int32)
    _, first, inverse = np.unique(signatures[free], return_index=True, return_inverse=True)
    labels = np.full(len(roots), -1)
    labels[free] = inverse
    producers = _producers(sites, labels[roots])
    by_label = np.split(free[np.argsort(inverse, kind="stable")], np.cumsum(np.bincount(inverse)))
    names: dict[str, int] = {}
    found = []
    for label in np.argsort(first).tolist():
        if len(by_label[label]) > 1 and label in producers:
            found.append(_group(roots, by_label[label], producers[label], sites, names))
    return tuple(found)


def _group(
    roots: np.ndarray, classes: np.ndarray, producers: list[int], sites: tuple, names: dict
) -> Group:
    first = sites[producers[0]]
    name = (
        first.name if len(first.produces) == 1 else f"{first.name}.{_kind(first, roots, classes)}"
    )
    number = names[name] = names.get(name, 0) + 1
    name = name if number == 1 else f"{name}:{number}"
    made = roots[np.concatenate([first.axes[p] for p in first.produces])]
    found, places = np.unique(made, return_index=True)
    members = places[np.searchsorted(found, classes)].astype(np.int32)
    layers = tuple(dict.fromkeys(sites[i].name for i in producers))
    return Group(name, layers, classes, members, producers[0])


def _kind(site: CallSite, roots: np.ndarray, classes: np.ndarray) -> str:
    """The axis of a layer on which units of a group stand."""
    return next(p for p in site.produces if classes[0] in roots[site.axes[p]])


def _signatures(sites: tuple[CallSite, ...], roots: np.ndarray) -> np.ndarray:
    """For every class a number that says in which axes of which calls it appears how often."""
    signatures = np.zeros(len(roots), np.uint64)
    event = 0
    for site in sites:
        for vector in site.axes.values():
            event += 1
            members, counts = np.unique(roots[vector[vector >= 0]], return_counts=True)
            signatures[members] += _mix(np.uint64(event << 32) + counts.astype(np.uint64))
    return signatures


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64: scatters small numbers over all 64 bits, so that sums do not collide."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _producers(sites: tuple[CallSite, ...], labels: np.ndarray) -> dict[int, list[int]]:
    """Label -> indices of the calls that produce units with it (`labels[id]`), in order."""
    producers: dict[int, list[int]] = {}
    for i, site in enumerate(sites):
        for name in site.produces:
            for label in np.unique(labels[site.axes[name]]).tolist():
                producers.setdefault(label, []).append(i)
    return producers


def _places(groups: tuple[Group, ...], roots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    group_of, index_of = np.full(len(roots), -1, np.int32), np.zeros(len(roots), np.int32)
    for i, group in enumerate(groups):
        group_of[group.roots] = i
        index_of[group.roots] = np.arange(group.units)
    return (group_of[roots], index_of[roots]) if len(roots) else (group_of, index_of)


def why_fixed(coupling: Coupling, vector: Ids) -> str:
    """Why the units of a layer cannot be pruned; empty if they can."""
    own = np.unique(coupling.roots[vector[vector >= 0]])
    if (coupling.group_of[own] >= 0).any():
        return ""
    pinned = [coupling.reasons[r] for r in own.tolist() if r in coupling.reasons]
    if pinned:
        return pinned[0]
    return "has one unit" if len(vector) == 1 else "all its units are tied into one"


def off_batch(coupling: Coupling) -> set[int]:
    """Tensors whose first axis is not, or may not be, that of the model's samples."""
    found: set[int] = set()
    for site in coupling.sites:
        if found.intersection(site.call.inputs) or not (
            site.inputs and site.rule.keeps_batch(site)
        ):
            found.update(site.call.outputs)
    return found
