"""The groups of a gated model, and what its gates say about the model without them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from keras_polar.backends import to_numpy
from keras_polar.coupling.branches import shorten
from keras_polar.coupling.coupling import Coupling
from keras_polar.gates.gate import Gate, Mask
from keras_polar.gates.objective import Consensus
from keras_polar.gates.weight_mask import InnerMask, unpack
from keras_polar.graph.ir import Call, Graph, alive, bypass, refs_in
from keras_polar.rules import read


class GateGroup:
    """A view of one group of units that are decided together.

    Attributes:
        name: of the group, after its first layer.
        layers: names of the layers that produce its units; of a residual branch, those in it.
        units: number of units; 1 for a branch.
        members: layer -> for each unit it makes, its place in this group or -1; None for all in
            order. Empty for a branch.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.name, self.layers, self.units = gate.group, list(gate.producers), gate.units
        self.members = gate.members

    @property
    def is_block(self) -> bool:
        """Whether it is a residual branch that stays or goes as a whole."""
        return not self.members

    @property
    def open_rates(self) -> np.ndarray:
        """Moving average of each unit's gate over the samples, float32 of shape (units,)."""
        return to_numpy(self._gate.open_rates)

    @property
    def mask(self) -> np.ndarray:
        """The consensus, True for units that stay, bool of shape (units,)."""
        return to_numpy(self._gate.consensus()) > 0.5

    @property
    def settled(self) -> bool:
        """Whether the mask is fixed."""
        return bool(to_numpy(self._gate.settled) > 0.5)

    def set_mask(self, mask: Any) -> None:
        """Fixes the mask of this group by hand.

        Args:
            mask: bool of shape (units,), True for units that stay.

        Raises:
            ValueError: wrong shape or dtype, or no unit would stay.
        """
        mask = np.asarray(mask)
        if mask.shape != (self.units,) or mask.dtype != bool:
            raise ValueError(
                f"set_mask of group {self.name!r}: expected a bool array of shape ({self.units},), "
                f"received {mask.dtype} of shape {mask.shape}."
            )
        if not mask.any() and not self.is_block:
            raise ValueError(
                f"set_mask of group {self.name!r}: the mask closes all {self.units} units of "
                f"{', '.join(self.layers)}. Leave at least one open."
            )
        self._gate.settled_mask.assign(mask.astype("float32"))
        self._gate.open_rates.assign(mask.astype("float32"))
        self._gate.settled.assign(1.0)

    def __repr__(self) -> str:
        return f"<group {self.name!r}: {int(self.mask.sum())} of {self.units} units open>"


# --- reading a gated model -------------------------------------------------------------------


def is_gated(model: Any) -> bool:
    """Whether a model has gates."""
    return isinstance(model, keras.Model) and any(
        isinstance(x, Gate) for x in getattr(model, "layers", [])
    )


def require_gated(model: Any, what: str) -> None:
    """Raises a TypeError if `model` has no gates."""
    if not is_gated(model):
        name = f"{model.name!r} without gates" if isinstance(model, keras.Model) else ""
        raise TypeError(
            f"{what}: expected a gated model, as keras_polar.apply returns it; received "
            f"{type(model).__name__} {name}. Call `gated = keras_polar.apply(model, sparsity=0.5)` "
            "and train that; one saved on disk is read with `keras.models.load_model`."
        )


def stripped(gated: Any) -> Graph:
    """The graph of a gated model without its gates, and without the branches that they close."""
    graph = read(gated)
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
        return left[0] if is_alone or isinstance(call.op, (Mask, Consensus)) else None

    calls = (shorten(_without_inner_mask(c), closed) for c in graph.calls)
    return alive(bypass(replace(graph, calls=tuple(calls)), stands_for))


def _closed_branches(graph: Graph) -> set[int]:
    """The tensors that a closed gate of a residual branch makes zero."""
    gates = {t: c.op for c in graph.calls for t in c.outputs if isinstance(c.op, Gate)}
    masks = [c for c in graph.calls if isinstance(c.op, Mask) and c.op.axis is None]
    return {c.outputs[0] for c in masks if not GateGroup(gates[c.inputs[1]]).mask.any()}


def _without_inner_mask(call: Call) -> Call:
    if not isinstance(call.op, InnerMask):
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


def units_of(gated: Any, coupling: Coupling) -> Iterator[tuple[GateGroup, np.ndarray, np.ndarray]]:
    """The units of each group that each layer of the stripped model makes: roots, and places."""
    produced = coupling.produced()
    for group in gated.groups:
        for layer in produced.keys() & group.members.keys():
            index = group.members[layer]
            index = np.arange(group.units) if index is None else np.asarray(index)
            yield group, coupling.roots[produced[layer][index >= 0]], index[index >= 0]
