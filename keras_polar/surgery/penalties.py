"""Penalties and constraints of a gated model: on its open units alone, as in the smaller model.

A regularizer of a kernel, or of what a layer puts out, sums over all units. Those that are closed
are in the gated model still, and would count in its loss but not in that of the smaller one.
So each is applied to the weights, or outputs, times the consensus masks of their units. That is
the same for whatever ignores zeros: L1, L2, norms; not for a penalty that divides by the number of
weights (`OrthogonalRegularizer`), nor for the kernel of attention's queries, which is rescaled when
its keys get narrower.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_polar.backends import IS_STATE_TAKEN
from keras_polar.gates.gate import PACKAGE, Gate
from keras_polar.gates.mask import Mask
from keras_polar.graph.clone import variable_at
from keras_polar.graph.ir import Graph
from keras_polar.graph.keras_private import layers_of, own_variables
from keras_polar.rules import CallSite, trace_model
from keras_polar.rules.ids import Ids, drop_constant_axes
from keras_polar.surgery.strip import coupled_without_gates, strip, units_of


class OpenUnits:
    """Whose elements of an array count: the product of some masks, which broadcast.

    Args:
        masks: pairs of the gates and, for every element along the axes, the place among their
            units side by side, or one past the end for elements that always count.
    """

    def __init__(self, masks: list[tuple[list[Gate], np.ndarray]]) -> None:
        self.masks = masks

    def of(self, x: Any) -> Any:
        """0/1, to be multiplied with an array, in its dtype."""
        product = math.prod(itertools.starmap(_mask, self.masks), start=1.0)
        return ops.cast(product, x.dtype)


def _mask(gates: list[Gate], places: np.ndarray) -> Any:
    known = [gate.consensus() for gate in gates]
    units = sum(gate.units for gate in gates)
    # Most layers have all units of one gate in order: a gather in each step would cost time.
    if places.size == units and (places.ravel() == np.arange(units)).all():
        return ops.reshape(ops.concatenate(known) if len(known) > 1 else known[0], places.shape)
    return ops.take(ops.concatenate([*known, ops.ones((1,))]), places)


@keras.saving.register_keras_serializable(PACKAGE)
class MaskedRegularizer(keras.regularizers.Regularizer):
    """A regularizer of what is open; saved without its masks, which the gated model gives anew."""

    def __init__(self, inner: Any, units: OpenUnits | None = None) -> None:
        self.inner = keras.regularizers.get(inner)
        self.units = units

    def __call__(self, x: Any) -> Any:
        x = ops.convert_to_tensor(x)
        return self.inner(x if self.units is None else x * self.units.of(x))

    def get_config(self) -> dict:
        return {"inner": keras.regularizers.serialize(self.inner)}


class MaskedConstraint(keras.constraints.Constraint):
    """A constraint of what is open; the rest stays as it is."""

    def __init__(self, inner: Any, units: OpenUnits) -> None:
        self.inner, self.units = inner, units

    def __call__(self, w: Any) -> Any:
        w = ops.convert_to_tensor(w)
        mask = self.units.of(w)
        return mask * self.inner(w * mask) + (1 - mask) * w


def mask_penalties(gated: Any) -> None:
    """Wraps the regularizers and constraints in a gated model, each once."""
    layers = [x for x in layers_of(gated)[1:] if not isinstance(x, Gate)]
    for layer in layers:
        unmask_penalties(layer)
    if any(map(_has_penalty, layers)):
        places = _Places(gated)
        # All calls of a shared layer have the same units.
        for site in {id(s.op): s for s in places.coupling.sites}.values():
            if isinstance(site.op, keras.layers.Layer):
                _wrap(places, site)


def unmask_penalties(layer: Any) -> None:
    """The layer has its own regularizers and constraints again."""
    parts = layers_of(layer) if isinstance(layer, keras.layers.Layer) else ()
    for part in parts:
        part.activity_regularizer = _inner(part.activity_regularizer)
        for variable in own_variables(part):
            variable.regularizer = _inner(variable.regularizer)
            variable.constraint = _inner(variable.constraint)


def _inner(penalty: Any) -> Any:
    return penalty.inner if isinstance(penalty, (MaskedRegularizer, MaskedConstraint)) else penalty


def _has_penalty(layer: Any) -> bool:
    given = (x for v in own_variables(layer) for x in (v.regularizer, v.constraint))
    return layer.activity_regularizer is not None or any(x is not None for x in given)


class _Places:
    """Where among all units with gates each id of a gated model is, and what branches close."""

    def __init__(self, gated: Any) -> None:
        graph = trace_model(gated)
        self.coupling = coupled_without_gates(graph)
        self.gates = [group._gate for group in gated.groups]
        self.ends = np.cumsum([gate.units for gate in self.gates])
        self.place = self._places(gated)
        self.closed_by = self._closed_by(graph)

    def _places(self, gated: Any) -> np.ndarray:
        """For every id its place, -1 for those without a gate."""
        found = np.full(len(self.coupling.roots), -1)
        start = dict(zip((g.name for g in gated.groups), [0, *self.ends[:-1]], strict=True))
        for group, roots, places in units_of(gated, self.coupling):
            found[roots] = start[group.name] + places
        return found[self.coupling.roots]

    def _closed_by(self, graph: Graph) -> dict[int, list[int]]:
        """id of an operation -> the gates without whose branch it would be gone."""
        gates = {t: c.op for c in graph.calls for t in c.outputs if isinstance(c.op, Gate)}
        branches = [c for c in graph.calls if isinstance(c.op, Mask) and c.op.axis is None]
        operations = {id(c.op) for c in self.coupling.graph.calls}
        closed: dict[int, list[int]] = defaultdict(list)
        for call in branches:
            left = strip(graph, {call.outputs[0]})
            for operation in operations - {id(c.op) for c in left.calls}:
                closed[operation].append(self.gates.index(gates[call.inputs[1]]))
        return closed

    def open_units(self, site: CallSite, arrays: Iterable[Ids]) -> OpenUnits | None:
        """The units of id arrays of one rank, at a call; None if all of them are always open."""
        arrays = list(arrays)
        masks = [self._mask(a) for a in arrays if (self._of(a) >= 0).any()]
        masks += [([self.gates[i]], np.zeros((), "int32")) for i in self.closed_by[id(site.op)]]
        return OpenUnits(masks) if masks else None

    def _of(self, ids: Ids) -> np.ndarray:
        return np.where(ids >= 0, self.place[ids], -1)

    def _mask(self, ids: Ids) -> tuple[list[Gate], np.ndarray]:
        places = self._of(ids)
        which = np.where(places >= 0, np.searchsorted(self.ends, places, side="right"), -1)
        gate_indices = [i for i in np.unique(which).tolist() if i >= 0]
        sizes = np.array([self.gates[i].units for i in gate_indices])
        shift = np.zeros(len(self.gates), int)
        shift[gate_indices] = np.cumsum([0, *sizes[:-1]]) - (self.ends[gate_indices] - sizes)
        index = np.where(which >= 0, places + shift[which], sizes.sum())
        return [self.gates[i] for i in gate_indices], index.astype("int32")


def _wrap(places: _Places, site: CallSite) -> None:
    layer, outputs = site.op, site.outputs
    if layer.activity_regularizer is not None and len(outputs) == 1:
        units = places.open_units(site, drop_constant_axes(outputs[0]))
        if units is not None:
            layer.activity_regularizer = MaskedRegularizer(layer.activity_regularizer, units)
    for variable in layer.variables:
        units = places.open_units(site, _along_axes(site, variable))
        if units is not None and variable.regularizer is not None:
            variable.regularizer = MaskedRegularizer(variable.regularizer, units)
        # Where an optimizer is given nothing but what it trains, it cannot look at gates.
        if units is not None and variable.constraint is not None and not IS_STATE_TAKEN:
            variable.constraint = MaskedConstraint(variable.constraint, units)


def _along_axes(site: CallSite, variable: Any) -> Iterator[Ids]:
    """The ids of the units along each axis of a variable, as arrays of its rank."""
    for path, names in site.rule.weights(site.op).items():
        if variable_at(site.op, path) is variable:
            known = [(i, site.axes[n]) for i, n in enumerate(names) if n in site.axes]
            for axis, ids in known:
                yield ids.reshape([-1 if i == axis else 1 for i in range(len(names))])
