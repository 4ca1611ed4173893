"""Puts gates into a model: one call before `fit`."""

from collections import ChainMap
from collections.abc import Iterable
from typing import Any

import numpy as np

from keras_polar.cost import MEASURES, polynomial, sizes_known
from keras_polar.coupling import Coupling, Group, couple, why_fixed
from keras_polar.gated import GatedModel, is_gated
from keras_polar.gates import DynamicGate, Gate, Mask
from keras_polar.graph import Call, clone, copy_weights, fill, rebuild, unused
from keras_polar.plan import Budget
from keras_polar.polarization import Consensus
from keras_polar.rules import Site, read
from keras_polar.rules.base import line
from keras_polar.schedule import Schedule

GATES = {"dynamic": DynamicGate, "static": Gate}
GRANULARITIES = ("channels",)


def apply(
    model: Any,
    sparsity: float = 0.5,
    *,
    measure: str = "weights",
    gate: str = "dynamic",
    granularity: str = "channels",
    ignore: Iterable[str] = (),
    round_to: int = 1,
    min_units: int = 1,
    schedule: Schedule | None = None,
) -> GatedModel:
    """Inserts gates, so that one training run finds and trains a smaller sub-network.

    After Zhi et al., "Learning a Consensus Sub-Network with Polarization Regularization and One
    Pass Training" (arXiv 2302.10798); the formulas are ours.

    Args:
        model: a functional or built Sequential Keras model, fresh or trained. It is not changed.
        sparsity: share of the cost to be removed, in (0, 1).
        measure: what `sparsity` is a share of: "weights" (`model.count_params()`), "macs"
            (multiply-accumulates per sample) or "units" (channels and neurons).
        gate: "dynamic" (decides per sample while training, the paper's) or "static" (one logit
            per unit).
        granularity: what a gate removes; "channels".
        ignore: names of layers, glob patterns allowed, that keep all their units.
        round_to: kept units per group are a multiple of this.
        min_units: units that stay in every group at least.
        schedule: a `keras_polar.Schedule`; None for the default.

    Returns:
        A `GatedModel` with the model's weights, not compiled.

    Raises:
        TypeError: the model is not functional, or an argument has the wrong type.
        ValueError: an argument is out of range or not known, the model has gates already, nothing
            in it can be pruned, or `sparsity` cannot be reached; says what can.

    Example:

        >>> gated = keras_polar.apply(model, sparsity=0.5)
        >>> gated.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        >>> gated.fit(x, y, epochs=10)
        >>> small = keras_polar.convert(gated)
    """
    _check_options(sparsity, measure, gate, granularity, round_to, min_units, schedule)
    if is_gated(model):
        raise ValueError(
            f"apply: model {model.name!r} has gates already. Pass the model without gates; to "
            "prune further, `convert` first and apply to the result."
        )
    coupling = couple(read(model), ignore)
    _check_prunable(coupling, model, measure)
    budget = _budget(coupling, sparsity, measure, min_units, round_to)
    inserter = _Inserter(coupling, GATES[gate], min_units, schedule or Schedule(), budget, measure)
    return rebuild(coupling.graph, inserter.visit, GatedModel)


def _check_options(
    sparsity: Any,
    measure: Any,
    gate: Any,
    granularity: Any,
    round_to: Any,
    min_units: Any,
    schedule: Any,
) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float, np.floating)):
        raise TypeError(f"apply: expected sparsity as a number in (0, 1), received {sparsity!r}.")
    if not 0 < sparsity < 1:
        raise ValueError(
            f"apply: expected 0 < sparsity < 1 (the share to be removed), received {sparsity}."
        )
    for name, value, known in (
        ("measure", measure, MEASURES),
        ("gate", gate, tuple(GATES)),
        ("granularity", granularity, GRANULARITIES),
    ):
        if value not in known:
            raise ValueError(f"apply: expected {name} to be one of {known}, received {value!r}.")
    for name, value in (("round_to", round_to), ("min_units", min_units)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"apply: expected {name} as an int >= 1, received {value!r}.")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(
            f"apply: expected schedule as a keras_polar.Schedule or None, received {schedule!r}."
        )


def _check_prunable(coupling: Coupling, model: Any, measure: str) -> None:
    if not coupling.groups:
        why = [f"{n}: {why_fixed(coupling, v)}" for n, v in coupling.produced().items()]
        raise ValueError(
            f"apply: nothing in model {model.name!r} can be pruned. "
            + ("; ".join(why) if why else "It has no layer whose units could go")
            + ". See keras_polar.inspect(model)."
        )
    if measure == "macs" and not sizes_known(coupling):
        raise ValueError(
            f"apply: measure='macs' needs known sizes, but tensors of model {model.name!r} have "
            "unknown ones. Build it on `keras.Input` with all sizes, or use measure='weights'."
        )


def _budget(
    coupling: Coupling, sparsity: float, measure: str, min_units: int, round_to: int
) -> Budget:
    units = tuple(g.units for g in coupling.groups)
    cost = polynomial(coupling, measure)
    budget = Budget(cost, units, float(sparsity), min_units, round_to)
    if sparsity > budget.reachable:
        raise ValueError(
            f"apply: sparsity={sparsity} of the {measure} cannot be reached; at most "
            f"{budget.reachable:.3f} can go with min_units={min_units}, round_to={round_to} and "
            "the layers that keep their units. Ask for less; keras_polar.inspect(model) says "
            "which units stay and why."
        )
    return budget


class _Inserter:
    """Rebuilds a graph with a mask in front of every reader of gated units."""

    def __init__(
        self,
        coupling: Coupling,
        gate_class: type,
        min_units: int,
        schedule: Schedule,
        budget: Budget,
        measure: str,
    ) -> None:
        self.coupling, self.gate_class, self.min_units = coupling, gate_class, min_units
        self.produced = coupling.produced()
        self.schedule, self.budget, self.measure = schedule, budget, measure
        self.sites = {id(s.call): i for i, s in enumerate(coupling.sites)}
        self.clones: dict[int, Any] = {}
        self.gates: dict[int, Any] = {}
        self.masked: dict[tuple, Any] = {}
        graph = coupling.graph
        self.names = {c.name for c in graph.calls} | {i.name for i in graph.input_layers}

    def visit(self, call: Call, values: dict) -> Any:
        position = self.sites[id(call)]
        site = self.coupling.sites[position]
        local = ChainMap(self._masked_inputs(site, values), values)
        for i, group in enumerate(self.coupling.groups):
            if group.site == position:
                self.gates[i] = self._gate(i, site, local)
        if call is self.coupling.graph.calls[-1]:
            # Last of all, so that every gate is known and the output keeps its layer's name.
            local = local.new_child(self._consensus(call.inputs[0], local))
        return self._call(call, local)

    def _call(self, call: Call, values: Any) -> Any:
        is_new = id(call.op) not in self.clones
        if is_new:
            self.clones[id(call.op)] = clone(call.op, call.name)
        op = self.clones[id(call.op)]
        outputs = op(*fill(call.args, values), **fill(call.kwargs, values))
        if is_new:
            copy_weights(call.op, op, lambda _, value: value)
        return outputs

    def _masked_inputs(self, site: Site, values: dict) -> dict:
        found = {}
        for tensor, axis in site.reads:
            index = site.call.inputs[tensor]
            key = (index, axis)
            if key not in self.masked:
                self.masked[key] = self._mask(site, tensor, axis, values[index])
            found[index] = self.masked[key]
        return found

    def _mask(self, site: Site, tensor: int, axis: int, value: Any) -> Any:
        vector = line(site.inputs[tensor], axis)
        group = np.where(vector >= 0, self.coupling.group_of[vector], -1)
        own = [i for i in dict.fromkeys(group.tolist()) if i >= 0]
        if not own:
            return value
        sizes = [self.coupling.groups[i].units for i in own]
        start = dict(zip(own, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        place = self.coupling.index_of[vector]
        index = [
            start[g] + int(p) if g >= 0 else sum(sizes)
            for g, p in zip(group.tolist(), place, strict=True)
        ]
        fits = len(own) == 1 and index == list(range(sizes[0]))
        mask = Mask(axis, None if fits else index, name=self._name(f"{site.name}_mask"))
        return mask(value, [self.gates[i] for i in own])

    def _gate(self, i: int, site: Site, values: Any) -> Any:
        group = self.coupling.groups[i]
        name = self._name(f"{group.name.replace(':', '_')}_gate")
        (tensor, axis), *_ = [*site.reads, (0, -1)]
        value = values[site.call.inputs[tensor]]
        # A layer that reads no features (token ids, say) gives a gate nothing to look at.
        gate_class = self.gate_class if site.reads and "float" in value.dtype else Gate
        gate = gate_class(
            group.units,
            group.name,
            list(group.layers),
            self._members(group),
            self._floor(group),
            axis,
            name=name,
        )
        return gate(value)

    def _members(self, group: Group) -> list | None:
        made = len(self.produced[group.layers[0]])
        places = group.members.tolist()
        return None if places == list(range(made)) else places

    def _floor(self, group: Group) -> int:
        return min(self.min_units, group.units)

    def _name(self, wanted: str) -> str:
        name = unused(wanted, self.names)
        self.names.add(name)
        return name

    def _consensus(self, index: int, values: Any) -> dict:
        layer = Consensus(
            self.budget.sparsity,
            self.measure,
            self.budget.cost.get_config(),
            {g.name: g.units for g in self.coupling.groups},
            self.schedule.get_config(),
            self.budget.round_to,
            self.min_units,
            name=self._name("consensus"),
        )
        gates = [self.gates[i] for i in range(len(self.coupling.groups))]
        return {index: layer(values[index], gates)}
