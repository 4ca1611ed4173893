"""A gated model without its gates, and what they say of its units."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from keras_polar.coupling.branches import shorten
from keras_polar.coupling.coupling import Coupling, couple, only
from keras_polar.gates.gate import Gate
from keras_polar.gates.groups import GateGroup
from keras_polar.gates.lesson import Lesson
from keras_polar.gates.mask import Mask
from keras_polar.gates.objective import PruningObjective
from keras_polar.gates.stand_in import StandIn, unpack
from keras_polar.graph.ir import Call, Graph, alive, bypass, refs_in
from keras_polar.rules import trace_model
from keras_polar.selection.importance import Importance

_PASSING = (Mask, PruningObjective, Lesson)  # the first input takes the place of the output


def stripped(gated: Any) -> Graph:
    """The graph of a gated model without its gates, and without the branches that they close."""
    graph = trace_model(gated)
    return strip(graph, _closed_branches(graph))


def strip(graph: Graph, closed: set[int]) -> Graph:
    """The graph of a gated model without its gates, and without the branches `closed`.

    Args:
        closed: the tensors that the masks of those branches make.
    """

    def stands_for(call: Call) -> int | None:
        if isinstance(call.op, Gate):
            return -1
        left = [t for t in call.inputs if t not in closed]
        is_alone = len(left) == 1 < len(call.inputs)
        return left[0] if is_alone or isinstance(call.op, _PASSING) else None

    calls = (shorten(_without_stand_in(c), closed) for c in graph.calls)
    return alive(bypass(replace(graph, calls=tuple(calls)), stands_for))


def coupled_without_gates(graph: Graph) -> Coupling:
    """The coupled graph of a gated model without its gates, closed branches included."""
    return couple(strip(graph, set()))


def _closed_branches(graph: Graph) -> set[int]:
    """The tensors that a closed gate of a residual branch makes zero."""
    gates = {t: c.op for c in graph.calls for t in c.outputs if isinstance(c.op, Gate)}
    masks = [c for c in graph.calls if isinstance(c.op, Mask) and c.op.axis is None]
    return {c.outputs[0] for c in masks if not GateGroup(gates[c.inputs[1]]).mask.any()}


def _without_stand_in(call: Call) -> Call:
    if not isinstance(call.op, StandIn):
        return call
    args, kwargs = call.args[1:], unpack(call.kwargs)
    inputs = refs_in((args, kwargs))
    return replace(call, op=call.op.layer, args=args, kwargs=kwargs, inputs=inputs)


def flags_for(gated: Any, coupling: Coupling) -> np.ndarray:
    """One flag per id of the stripped model, True where it stays by the gates' consensus.

    Units are found again by the names of the layers that make them: the order of calls may differ
    from the model that `apply` was given, and layers of closed branches are gone.
    """
    flags = np.ones(len(coupling.roots), bool)
    for group, roots, places in units_of(gated, coupling):
        flags[roots] = group.mask[places]
    return flags[coupling.roots]


def scores_of(gated: Any, importance: Importance) -> dict[str, np.ndarray]:
    """What an importance says of the units of each group, by the group's name; not of branches.

    Raises:
        ValueError: it gives arrays of other shapes.
    """
    coupling = _with_gates(gated, coupled_without_gates(trace_model(gated)))
    scores = [np.asarray(s, float) for s in importance.scores(coupling)]
    shapes = [(group.units,) for group in coupling.groups]
    if [s.shape for s in scores] != shapes:
        raise ValueError(
            f"Importance {importance.name!r}: expected arrays of shapes {shapes}, one for each of "
            f"coupling.groups; received {[s.shape for s in scores]}."
        )
    by_id = np.zeros(len(coupling.roots))
    for coupled, values in zip(coupling.groups, scores, strict=True):
        by_id[coupled.roots] = values
    by_group: dict[str, np.ndarray] = {}
    for group, roots, places in units_of(gated, coupling):
        by_group.setdefault(group.name, np.zeros(group.units))[places] = by_id[roots]
    return by_group


def _with_gates(gated: Any, coupling: Coupling) -> Coupling:
    """The same units, those of groups without gates kept: of ignored layers nothing is asked."""
    decided = np.zeros(len(coupling.roots), bool)
    for _, roots, _ in units_of(gated, coupling):
        decided[roots] = True
    return only(coupling, [g for g in coupling.groups if decided[g.roots].any()])


def units_of(gated: Any, coupling: Coupling) -> Iterator[tuple[GateGroup, np.ndarray, np.ndarray]]:
    """The units of each group that each layer of the stripped model makes: roots, and places."""
    produced = coupling.produced()
    for group in gated.groups:
        for layer in produced.keys() & group.members.keys():
            index = group.members[layer]
            index = np.arange(group.units) if index is None else np.asarray(index)
            yield group, coupling.roots[produced[layer][index >= 0]], index[index >= 0]
