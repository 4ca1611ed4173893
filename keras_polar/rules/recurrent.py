"""Recurrent layers: LSTM, GRU, SimpleRNN, RNN with one of their cells, ConvLSTM, Bidirectional.

The hidden units are read by the layer itself, through the rows of the recurrent kernel. All else
happens unit by unit, so that what the state of a closed unit is does not matter to the others.
"""

import copy
import math
from typing import Any

import numpy as np
from keras import layers, tree

from keras_polar.graph.clone import variable_at
from keras_polar.graph.keras_private import ConvLSTMCell
from keras_polar.rules.activations import why_mixing
from keras_polar.rules.call_site import CallSite, sizes
from keras_polar.rules.ids import broadcast_along
from keras_polar.rules.registry import add
from keras_polar.rules.rule import CostTerm, KeptUnits, Rule

# Cell -> how many gates stand side by side in the last axis of its weights.
GATES = {layers.LSTMCell: 4, layers.GRUCell: 3, layers.SimpleRNNCell: 1}
CONV_LSTM_GATES = 4
CELL_WEIGHTS = ("kernel", "recurrent_kernel", "bias")


class RecurrentRule(Rule):
    """One or, in Bidirectional, two recurrent layers side by side."""

    def flow(self, site: CallSite) -> list:
        parts = self.parts(site.op)
        cells = [layer.cell for layer in parts.values()]
        if not all(map(gates_of, cells)):
            kinds = ", ".join(dict.fromkeys(type(cell).__name__ for cell in cells))
            return site.pin_all(f"is read by a cell of a kind that is not known: {kinds}")
        arguments = site.given()
        tensor = site.place(next(iter(arguments.values())))
        if tensor < 0:
            return site.pin_all("reads something that is not a tensor of the model")
        site.read("in", self.axis(site, len(site.inputs[tensor].shape)), tensor)
        site.pin_argument(arguments.get("mask"), "is used as a mask")
        out = site.produce_inside("out", units_of(cells[0]))
        for prefix, cell in zip(parts, cells, strict=True):
            site.set_axis(f"{prefix}packed", np.tile(out, gates_of(cell)))
            site.read_inside(f"{prefix}cell.recurrent_kernel", len(cell.recurrent_kernel.shape) - 2)
        self._tie_initial_states(site, arguments.get("initial_state"))
        why = self._why_fixed(site.op, cells)
        if why:
            site.pin(out, why)
        return self.outputs(site)

    def parts(self, op: Any) -> dict[str, Any]:
        """Attribute path of each recurrent layer, with a dot at its end -> the layer."""
        return {"": op}

    def outputs(self, site: CallSite) -> list:
        """Ids of the output and the states."""
        return [self._along(site, shape) for shape in site.output_shapes]

    def _along(self, site: CallSite, shape: tuple) -> np.ndarray:
        """The units on their axis of an output or a state."""
        return broadcast_along(site.axes["out"], self.axis(site, len(shape)) % len(shape), shape)

    def axis(self, site: CallSite, ndim: int) -> int:
        """The axis of the units in a tensor of a call."""
        return -1

    def _tie_initial_states(self, site: CallSite, states: Any) -> None:
        for state in tree.flatten(states) if states is not None else []:
            place = site.place(state)
            why = f"starts from fixed elements in {site.name!r}"
            if place < 0:
                site.pin(site.axes["out"], "starts from a state that is not a tensor of the model")
            else:
                ids = site.inputs[place]
                site.units.tie(self._along(site, ids.shape), ids, why)

    def _why_fixed(self, op: Any, cells: list) -> str:
        if op.stateful:
            return "keeps its state from batch to batch"
        functions = [
            f for c in cells for f in (c.activation, getattr(c, "recurrent_activation", None))
        ]
        mixing = next(filter(None, map(why_mixing, functions)), "")
        if mixing:
            return mixing
        if len({units_of(cell) for cell in cells}) > 1:
            return "has a different width in each direction"
        return ""

    def weights(self, op: Any) -> dict[str, tuple]:
        axes_of = {}
        for prefix in self.parts(op):
            packed = f"{prefix}packed"
            for name, axes in zip(
                CELL_WEIGHTS, (("in", packed), ("out", packed), (packed,)), strict=True
            ):
                path = f"{prefix}cell.{name}"
                variable = variable_at(op, path)
                if variable is not None:  # windows and GRU's two biases stand in front
                    axes_of[path] = (*(None,) * (len(variable.shape) - len(axes)), *axes)
        return axes_of

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        config = site.op.get_config()
        units = kept.count(site.axes["out"])
        return resized(config, units)

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        axes = site.axes
        place = site.place(next(iter(site.given().values())))
        steps = sizes(site.specs[site.call.inputs[place]].shape)[1]
        if "out" not in axes:
            return self._fixed_macs(site.op, steps)
        terms = []
        for layer in self.parts(site.op).values():
            gates, window = gates_of(layer.cell), _window(layer.cell)
            macs = gates * window * steps * self.positions(site)
            terms += [CostTerm((axes[n], axes["out"]), macs=macs) for n in ("in", "out")]
        return terms

    def _fixed_macs(self, op: Any, steps: int) -> list[CostTerm] | None:
        """Of cells on top of each other, whose units stay."""
        cells = [c for x in self.parts(op).values() for c in getattr(x.cell, "cells", [x.cell])]
        if not all(type(cell) in GATES for cell in cells):
            return None
        kernels = [k for c in cells for k in (c.kernel, c.recurrent_kernel)]
        return [CostTerm((), macs=steps * sum(math.prod(k.shape) for k in kernels))]

    def positions(self, site: CallSite) -> int:
        """Positions at which the cell computes in one step."""
        return 1


class ConvLSTMRule(RecurrentRule):
    """ConvLSTM1D/2D/3D: filters instead of units, and positions within a step."""

    def axis(self, site: CallSite, ndim: int) -> int:
        if site.op.data_format == "channels_last":
            return -1
        return ndim - site.op.cell.rank - 1

    def positions(self, site: CallSite) -> int:
        shape, rank = site.output_shapes[0], site.op.cell.rank
        is_last = site.op.data_format == "channels_last"
        return math.prod(shape[-rank - 1 : -1] if is_last else shape[-rank:])


class BidirectionalRule(RecurrentRule):
    """The same unit of both directions goes: Keras wants both to be equally wide."""

    def parts(self, op: Any) -> dict[str, Any]:
        return {"forward_layer.": op.forward_layer, "backward_layer.": op.backward_layer}

    def flow(self, site: CallSite) -> list:
        known = (layers.LSTM, layers.GRU, layers.SimpleRNN, layers.RNN)
        if any(type(part) not in known for part in self.parts(site.op).values()):
            kind = type(site.op.forward_layer).__name__
            return site.pin_all(f"is read by a layer that is not known in Bidirectional: {kind}")
        return super().flow(site)

    def outputs(self, site: CallSite) -> list:
        first, *rest = site.output_shapes
        if site.op.merge_mode != "concat":
            return super().outputs(site)
        both = np.tile(site.axes["out"], 2)
        return [broadcast_along(both, len(first) - 1, first), *(self._along(site, s) for s in rest)]

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        config, units = site.op.get_config(), kept.count(site.axes["out"])
        return {name: _resized_object(config[name], units) for name in ("layer", "backward_layer")}


def gates_of(cell: Any) -> int:
    """How many gates a cell has; 0 if nothing is known about it."""
    is_conv = type(cell) is ConvLSTMCell
    return CONV_LSTM_GATES if is_conv else GATES.get(type(cell), 0)


def units_of(cell: Any) -> int:
    """How many hidden units a cell has."""
    return cell.filters if type(cell) is ConvLSTMCell else cell.units


def _window(cell: Any) -> int:
    return math.prod(cell.kernel_size) if type(cell) is ConvLSTMCell else 1


def resized(config: dict, units: int) -> dict[str, Any]:
    """What changes in the config of a recurrent layer when `units` hidden units remain."""
    if "cell" in config:
        return {"cell": _resized_object(config["cell"], units)}
    return {"filters" if "filters" in config else "units": units}


def _resized_object(serialised: dict, units: int) -> dict:
    """A serialised layer or cell with another number of units; not built."""
    new = copy.deepcopy(serialised)
    new["config"].update(resized(new["config"], units))
    new.pop("build_config", None)
    return new


add(RecurrentRule(), layers.LSTM, layers.GRU, layers.SimpleRNN, layers.RNN)
add(ConvLSTMRule(), layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D)
add(BidirectionalRule(), layers.Bidirectional)
