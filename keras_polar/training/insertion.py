"""A graph rebuilt with a mask in front of every consumer of gated units."""

import re
from collections import ChainMap, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_polar.coupling.coupling import Coupling
from keras_polar.gates.mask import Mask
from keras_polar.gates.objective import PruningObjective
from keras_polar.gates.over_open import OverOpen
from keras_polar.gates.stand_in import StandIn, pack
from keras_polar.gates.template import for_all_samples, made_like
from keras_polar.gates.weight_mask import WeightMask
from keras_polar.graph.clone import Copies
from keras_polar.graph.ir import Call, fill, unused
from keras_polar.rules import CallSite
from keras_polar.rules.call_site import ids_along, inner_vector
from keras_polar.training.gate_specs import GateSpec
from keras_polar.training.problem import PruningProblem


class MaskInserter:
    """Rebuilds a graph with a mask in front of every consumer of gated units.

    What decides about the units is a subclass's (`_gate`), and so is what comes last (`_last`).
    """

    def __init__(self, coupling: Coupling, specs: Sequence[GateSpec]) -> None:
        self.coupling, self.specs = coupling, specs
        self.sites = {id(s.call): i for i, s in enumerate(coupling.sites)}
        self.decided_at: dict[int, list[int]] = defaultdict(list)
        for i, spec in enumerate(self.specs):
            self.decided_at[spec.site].append(i)
        self.branches = {t.adds: i for i, t in enumerate(self.specs) if t.adds >= 0}
        self.copies = Copies()
        self.stand_ins: dict[tuple, StandIn] = {}
        self.gates: dict[int, Any] = {}
        self.masked: dict[tuple, Any] = {}
        graph = coupling.graph
        self.names = {c.name for c in graph.calls} | {i.name for i in graph.input_layers}

    def visit(self, call: Call, values: dict) -> Any:
        position = self.sites[id(call)]
        site = self.coupling.sites[position]
        local = ChainMap(self._masked_inputs(site, values), values)
        for i in self.decided_at[position]:
            self.gates[i] = self._gate(i, site, local)
        local = local.new_child(self._masked_branches(site, local))
        if call is self.coupling.graph.calls[-1]:
            # Last of all, so that every gate is known and the output keeps its layer's name.
            local = local.new_child(self._last(call.inputs[0], local))
        return self._call(site, local)

    def _call(self, site: CallSite, values: Any) -> Any:
        call = site.call
        args, kwargs = fill((call.args, call.kwargs), values)
        op, outputs = self.copies.call(call.op, call.name, args, kwargs)
        averaged = [ids_along(site.inputs[tensor], axis) for tensor, axis in site.averaged]
        reads = [*site.inner_reads, *self._masked_weights(site).values()]
        vectors = averaged or [inner_vector(site, *read) for read in reads]
        groups = self._gated(vectors)
        if not groups:
            return outputs
        if averaged:
            stand_in = self._over_open(op, site.averaged[0][1], self._places(averaged[0], groups))
        else:
            masks = [[*r, self._arranged(v, groups)] for r, v in zip(reads, vectors, strict=True)]
            stand_in = self.stand_ins.get((id(op),)) or WeightMask(op, masks)
            self.stand_ins[(id(op),)] = stand_in
        return stand_in([self.gates[i] for i in groups], *args, **pack(kwargs))

    def _over_open(self, op: Any, axis: int, places: list | None) -> StandIn:
        # A shared layer without weights may be called on units of several groups.
        key = (id(op), axis, str(places))
        if key not in self.stand_ins:
            is_first = all(known[0] != id(op) for known in self.stand_ins)
            name = op.name if is_first else self._name(op.name)
            self.stand_ins[key] = OverOpen(op, axis, places, name=name)
        return self.stand_ins[key]

    def _masked_weights(self, site: CallSite) -> dict[int, tuple]:
        """Input position -> (variable, axis) to be masked instead, where all samples agree.

        A kernel is much smaller than a batch of what it is multiplied with.
        """
        return {
            tensor: by
            for tensor, by in site.multiplied_by.items()
            if all(self.gates[i].shape[0] == 1 for i in self._gated([inner_vector(site, *by)]))
        }

    def _masked_inputs(self, site: CallSite, values: dict) -> dict:
        axes: dict[int, list] = {}
        instead = self._masked_weights(site)
        for tensor, axis in dict.fromkeys(r for r in site.reads if r[0] not in instead):
            axes.setdefault(site.call.inputs[tensor], []).append((tensor, axis))
        return {i: self._masked(site, i, tuple(reads), values[i]) for i, reads in axes.items()}

    def _masked_branches(self, site: CallSite, values: Any) -> dict:
        """The branches that a sum adds, each as a whole behind its gate."""
        return {
            tensor: Mask(None, name=self._name(f"{site.name}_mask"))(
                values[tensor], [self.gates[self.branches[tensor]]]
            )
            for tensor in site.call.inputs
            if tensor in self.branches
        }

    def _masked(self, site: CallSite, index: int, reads: tuple, value: Any) -> Any:
        key = (index, frozenset(axis for _, axis in reads))
        if key not in self.masked:
            for tensor, axis in reads:
                value = self._mask(site, tensor, axis, value)
            self.masked[key] = value
        return self.masked[key]

    def _mask(self, site: CallSite, tensor: int, axis: int, value: Any) -> Any:
        vector = ids_along(site.inputs[tensor], axis)
        groups = self._gated([vector])
        if not groups:
            return value
        index = self._places(vector, groups)
        mask = Mask(axis, index, name=self._name(f"{site.name}_mask"))
        return mask(value, [self.gates[i] for i in groups])

    def _gated(self, vectors: list) -> list[int]:
        """Indices of the groups that any of the vectors mentions."""
        groups = np.concatenate([self._group_of(v) for v in vectors]) if vectors else np.array([])
        present, first = np.unique(groups, return_index=True)
        return [i for i in present[np.argsort(first)].tolist() if i >= 0]

    def _group_of(self, vector: Any) -> np.ndarray:
        return np.where(vector >= 0, self.coupling.group_of[vector], -1)

    def _places(self, vector: Any, groups: list[int]) -> list[int] | None:
        """The same, None where the one gate fits as it is."""
        index = self._arranged(vector, groups)
        return None if index == [*range(self.coupling.groups[groups[0]].units)] else index

    def _arranged(self, vector: Any, groups: list[int]) -> list[int]:
        """Where the gate of each element is among those of these groups side by side.

        Elements without a gate point one past the end.
        """
        sizes = [self.coupling.groups[i].units for i in groups]
        start = np.zeros(len(self.coupling.groups), int)
        start[groups] = np.cumsum([0, *sizes[:-1]])
        group = self._group_of(vector)
        places = start[group] + self.coupling.index_of[vector]
        return np.where(group >= 0, places, sum(sizes)).tolist()

    def _name(self, base: str) -> str:
        name = unused(base, self.names)
        self.names.add(name)
        return name

    def _gate(self, i: int, site: CallSite, values: Any) -> Any:
        """The gates of a spec, a symbolic tensor of shape (batch or 1, units)."""
        raise NotImplementedError

    def _last(self, index: int, values: Any) -> dict:
        """What replaces the first input of the last call, once all gates are known."""
        return {}


class GateInserter(MaskInserter):
    """Rebuilds the graph of a problem with gates and their losses."""

    def __init__(self, problem: PruningProblem) -> None:
        super().__init__(problem.coupling, problem.specs)
        self.problem = problem

    def _gate(self, i: int, site: CallSite, values: Any) -> Any:
        spec = self.specs[i]
        name = self._name(f"{re.sub('[^A-Za-z0-9_]', '_', spec.name)}_gate")
        (tensor, axis), *_ = [*site.reads, (0, -1)]
        value = values[site.call.inputs[tensor]]
        template = self.problem.gate if spec.per_sample else for_all_samples(self.problem.gate)
        gate = made_like(
            template,
            name,
            units=spec.units,
            group=spec.name,
            layers=list(spec.layers),
            members=spec.members,
            min_units=spec.floor,
            axis=axis,
            listens=self._listens(spec),
        )
        return gate(value)

    def _listens(self, spec: GateSpec) -> str | None:
        """To each sample, where there is something to mask for each, also if all share the gate.

        Masks on weights would be cheaper; the sum over a batch says much less of a unit.
        """
        if self.problem.options.importance != "gradients":
            return None
        return "samples" if spec.per_sample else "batch"

    def _last(self, index: int, values: Any) -> dict:
        budget, options = self.problem.budget, self.problem.options
        importance = options.importance
        layer = PruningObjective(
            budget.sparsity,
            self.problem.measure.name,
            budget.cost.get_config(),
            {t.name: t.units for t in self.specs},
            options.schedule.get_config(),
            budget.round_to,
            options.compact,
            importance if isinstance(importance, str) else importance.name,
            [[self.specs[i].name for i in tied] for tied in budget.equal],
            name=self._name("consensus"),
        )
        if not isinstance(importance, str):
            layer.criterion = importance
        gates = [self.gates[i] for i in range(len(self.specs))]
        return {index: layer(values[index], gates)}
