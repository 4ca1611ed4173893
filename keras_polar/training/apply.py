"""Puts gates into a model: one call before `fit`."""

import os
import re
import warnings
from collections import ChainMap, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from keras_polar.costs.count import sizes_known, unknown_macs
from keras_polar.costs.latency import LatencyTable
from keras_polar.costs.polynomial import MEASURES
from keras_polar.coupling.coupling import Coupling, couple, why_fixed
from keras_polar.gates.gate import DynamicGate, Gate, Mask
from keras_polar.gates.groups import is_gated
from keras_polar.gates.objective import Consensus
from keras_polar.gates.schedule import Schedule
from keras_polar.gates.weight_mask import InnerMask, pack
from keras_polar.graph.clone import clone, copy_weights
from keras_polar.graph.ir import Call, fill, unused
from keras_polar.graph.quantized import why_altered
from keras_polar.graph.rebuild import rebuild
from keras_polar.graph.trace import warn_of_ties
from keras_polar.litert.measure_latency import latency_table as measure_latency
from keras_polar.rules import Site, Term, read
from keras_polar.rules.call_site import inner_vector, line
from keras_polar.selection.select import Budget
from keras_polar.training.gate_specs import (
    Target,
    below_usual,
    blocks_of,
    budget_of,
    targets,
    usual_floors,
)
from keras_polar.training.model import GatedModel

GATES = {"dynamic": DynamicGate, "static": Gate}
GRANULARITIES = ("channels", "blocks")
TRAINING = ("train_step", "test_step", "compute_loss", "compute_metrics")
LISTED = 8  # groups that a warning names


def apply(
    model: Any,
    sparsity: float = 0.5,
    *,
    measure: str = "weights",
    gate: str = "dynamic",
    granularity: str | Iterable[str] = "channels",
    ignore: Iterable[str] = (),
    round_to: int | None = None,
    min_units: int = 1,
    max_sparsity: float | Mapping[str, float] | None = None,
    schedule: Schedule | None = None,
    compact: bool = True,
    latency_table: LatencyTable | str | os.PathLike | None = None,
) -> GatedModel:
    """Inserts gates, so that one training run finds and trains a smaller sub-network.

    After Zhi et al., "Learning a Consensus Sub-Network with Polarization Regularization and One
    Pass Training" (arXiv 2302.10798); the formulas are ours.

    Args:
        model: a functional or built Sequential Keras model, fresh or trained. It is not changed.
        sparsity: share of the cost to be removed, in (0, 1).
        measure: what `sparsity` is a share of: "weights" (`model.count_params()`), "macs"
            (multiply-accumulates per sample), "units" (channels and neurons) or "latency" (time
            of one inference with LiteRT, by a table of measured operations).
        gate: "dynamic" (decides per sample while training, the paper's) or "static" (one logit
            per unit). Units that are read inside the layer that makes them (attention heads, the
            hidden units of an LSTM) always have static gates: they are masked on the weights,
            which all samples share.
        granularity: what gates remove: "channels" (units of layers), "blocks" (residual branches
            as a whole: the network becomes shallower), or both, `("channels", "blocks")`.
        ignore: names of layers, glob patterns allowed, that keep all their units; branches with
            such a layer stay.
        round_to: kept units per group are a multiple of this. None for the largest of 8, 4, 2, 1
            with which `sparsity` is met to half a point: kernels compute eight channels at a time,
            so that other widths save weights but little time.
        min_units: units that stay in every group at least.
        max_sparsity: share of a group's units that may go at most, in [0, 1]: one number for all
            groups, or {layer name or glob pattern: number}, of which the smallest counts. By
            default, and for groups that no pattern matches, a quarter of `1 - sparsity` stays
            in every group, so that none collapses by accident (as far as `sparsity` can then
            be reached).
        schedule: a `keras_polar.Schedule`; None for the default.
        compact: once the consensus is settled, `fit` goes on with the smaller network, its
            optimizer cut along with it, so that the rest of the run costs less (on TensorFlow
            and JAX; PyTorch trains the masked network). The gated model is up to date after every
            epoch.
        latency_table: for `measure="latency"`: a `keras_polar.LatencyTable` of the device, or the
            path of one. None measures on this machine what the user's cache does not hold yet
            (TensorFlow only; minutes for a large model), with `keras_polar.latency_table`.

    Returns:
        A `GatedModel` with the model's weights, not compiled.

    Raises:
        FileNotFoundError: there is no table of latencies at that path.
        TypeError: the model is not functional, or an argument has the wrong type.
        ValueError: an argument is out of range or not known, the model has gates already, nothing
            in it can be pruned, `sparsity` cannot be reached (says what can), nobody can count the
            multiply-accumulates of a layer with weights (`measure="macs"`), or the table of
            latencies lacks a layer.

    Warns:
        UserWarning: `sparsity` is only reached with less in a group than usually stays there, or
            nobody can count the multiply-accumulates of a layer without weights
            (`measure="macs"`).

    Example:

        >>> gated = keras_polar.apply(model, sparsity=0.5)
        >>> gated.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        >>> gated.fit(x, y, epochs=10)
        >>> small = keras_polar.convert(gated)
    """
    kinds = (granularity,) if isinstance(granularity, str) else tuple(granularity)
    _check_options(sparsity, measure, gate, kinds, round_to, min_units, max_sparsity, schedule)
    if is_gated(model):
        raise ValueError(
            f"apply: model {model.name!r} has gates already. Pass the model without gates; to "
            "prune further, `convert` first and apply to the result."
        )
    coupling = couple(read(model), ignore if "channels" in kinds else "*")
    warn_of_ties(coupling.graph, "apply")
    blocks = blocks_of(coupling, ignore) if "blocks" in kinds else ()
    if not coupling.groups and not blocks:
        raise ValueError(
            f"apply: nothing in model {model.name!r} can be pruned. "
            f"{_why_nothing(coupling, kinds)}. See keras_polar.inspect(model)."
        )
    _check_sizes(coupling, model, measure)
    _check_macs(coupling, model, measure)
    timed = _timed(model, measure, latency_table)
    budget = budget_of(
        coupling,
        blocks,
        sparsity=sparsity,
        measure=measure,
        min_units=min_units,
        max_sparsity=max_sparsity,
        round_to=round_to,
        timed=timed,
    )
    _warn_of_low_groups(coupling, budget, measure, min_units, max_sparsity)
    found = targets(coupling, blocks, budget.floors)
    training = {
        "schedule": (schedule or Schedule()).get_config(),
        "compact": bool(compact),
        "round_to": round_to,
    }
    inserter = _Inserter(coupling, found, GATES[gate], budget, measure, training)
    gated = rebuild(coupling.graph, inserter.visit, GatedModel)
    gated.dtype_policy = model.dtype_policy  # by which `compile` decides about loss scaling
    _warn_of_own_training(model)
    return gated


def _warn_of_own_training(model: Any) -> None:
    own = [n for n in TRAINING if getattr(type(model), n) is not getattr(keras.Model, n)]
    if own:
        warnings.warn(
            f"apply: the gated model is not trained by {', '.join(own)} of "
            f"{type(model).__name__} {model.name!r}. Write them into a subclass of "
            "keras_polar.GatedModel and call `gated = ThatClass(gated.input, gated.output)`.",
            stacklevel=3,
        )


def _check_options(
    sparsity: Any,
    measure: Any,
    gate: Any,
    granularity: tuple,
    round_to: Any,
    min_units: Any,
    max_sparsity: Any,
    schedule: Any,
) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float, np.floating)):
        raise TypeError(f"apply: expected sparsity as a number in (0, 1), received {sparsity!r}.")
    if not 0 < sparsity < 1:
        raise ValueError(
            "apply: expected 0 < sparsity < 1, the share to be removed (0.5 removes half), "
            f"received {sparsity}."
        )
    for name, value, known in (
        ("measure", measure, MEASURES),
        ("gate", gate, tuple(GATES)),
        *(("granularity", kind, GRANULARITIES) for kind in granularity or (granularity,)),
    ):
        if value not in known:
            raise ValueError(f"apply: expected {name} to be one of {known}, received {value!r}.")
    for name, value in (("round_to", round_to), ("min_units", min_units)):
        if name == "round_to" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"apply: expected {name} as an int >= 1, received {value!r}.")
    limits = max_sparsity.values() if isinstance(max_sparsity, Mapping) else [max_sparsity]
    if not all(x is None or _is_share(x) for x in limits):
        raise ValueError(
            "apply: expected max_sparsity as a number in [0, 1] or {layer name: number in [0, 1]}, "
            f"received {max_sparsity!r}."
        )
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(
            f"apply: expected schedule as a keras_polar.Schedule or None, received {schedule!r}."
        )


def _is_share(x: Any) -> bool:
    is_number = isinstance(x, (int, float, np.floating)) and not isinstance(x, bool)
    return is_number and 0 <= x <= 1


def _why_nothing(coupling: Coupling, kinds: tuple) -> str:
    if "channels" not in kinds:
        return "It has no residual branch that could go as a whole"
    altered = {s.name: why_altered(s.op) for s in coupling.sites}
    why = [f"{name}: {reason}" for name, reason in altered.items() if reason]
    why += [f"{n}: {why_fixed(coupling, v)}" for n, v in coupling.produced().items()]
    return "; ".join(why) or "It has no layer whose units could go"


def _timed(model: Any, measure: str, table: Any) -> list[tuple[int, Term]]:
    """The cost terms of the measure "latency", none for others."""
    if measure != "latency":
        if table is not None:
            raise ValueError(
                f"apply: latency_table is for measure='latency'; received measure={measure!r}."
            )
        return []
    if table is None:
        table = measure_latency(model)
    elif isinstance(table, (str, os.PathLike)):
        table = LatencyTable.load(table)
    if not isinstance(table, LatencyTable):
        raise TypeError(
            "apply: expected latency_table as a keras_polar.LatencyTable, the path of one or None, "
            f"received {table!r}."
        )
    return table.terms(couple(read(model)))


def _check_sizes(coupling: Coupling, model: Any, measure: str) -> None:
    if measure in ("macs", "latency") and not sizes_known(coupling):
        raise ValueError(
            f"apply: measure={measure!r} needs known sizes, but tensors of model {model.name!r} "
            "have unknown ones. Build it on `keras.Input` with all sizes, or use measure='weights'."
        )


def _check_macs(coupling: Coupling, model: Any, measure: str) -> None:
    unknown = unknown_macs(coupling) if measure == "macs" else {}
    if not unknown:
        return
    kinds = {n: f"{n} ({type(s.op).__name__})" for n, s in unknown.items()}
    trained = [kinds[n] for n, s in unknown.items() if getattr(s.op, "weights", ())]
    text = (
        "apply: measure='macs' needs to know what every layer computes, but nobody can count the "
        f"multiply-accumulates of {', '.join(trained or kinds.values())} in model {model.name!r}"
    )
    remedy = (
        "Use measure='weights', or tell with keras_polar.register(<class>, <a keras_polar.Rule "
        "with `macs`>)"
    )
    if trained:
        raise ValueError(f"{text}. {remedy}.")
    warnings.warn(f"{text}: they count as none. {remedy}.", stacklevel=3)


def _warn_of_low_groups(
    coupling: Coupling, budget: Budget, measure: str, min_units: int, max_sparsity: Any
) -> None:
    def floors(sparsity: float) -> list[int]:
        return usual_floors(coupling, sparsity, min_units, max_sparsity)

    low, enough = below_usual(coupling, budget, floors)
    if low:
        more = f" and {len(low) - LISTED} more" if len(low) > LISTED else ""
        less = f"Ask for less (up to {enough:g} they keep it)" if enough else "Ask for less"
        warnings.warn(
            f"apply: sparsity={budget.sparsity:g} of the {measure} can only be reached with less "
            f"in some groups than usually stays: {', '.join(low[:LISTED])}{more}. {less}, keep "
            "layers whole with `ignore`, or say with `max_sparsity` what share of each group may "
            "go (1.0: all but min_units).",
            stacklevel=3,
        )


class _Inserter:
    """Rebuilds a graph with a mask in front of every reader of gated units."""

    def __init__(
        self,
        coupling: Coupling,
        found: list[Target],
        gate_class: type,
        budget: Budget,
        measure: str,
        training: dict,
    ) -> None:
        self.coupling, self.targets, self.gate_class = coupling, found, gate_class
        self.budget, self.measure, self.training = budget, measure, training
        self.sites = {id(s.call): i for i, s in enumerate(coupling.sites)}
        self.decided_at: dict[int, list[int]] = defaultdict(list)
        for i, target in enumerate(found):
            self.decided_at[target.site].append(i)
        self.branches = {t.adds: i for i, t in enumerate(found) if t.adds >= 0}
        self.clones: dict[int, Any] = {}
        self.inner_masks: dict[int, InnerMask] = {}
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
            local = local.new_child(self._consensus(call.inputs[0], local))
        return self._call(site, local)

    def _call(self, site: Site, values: Any) -> Any:
        call = site.call
        is_new = id(call.op) not in self.clones
        if is_new:
            self.clones[id(call.op)] = clone(call.op, call.name)
        op = self.clones[id(call.op)]
        args, kwargs = fill((call.args, call.kwargs), values)
        outputs = op(*args, **kwargs)
        if is_new:
            copy_weights(call.op, op, lambda _, value: value)
        reads = [*site.inner_reads, *self._masked_weights(site).values()]
        vectors = [inner_vector(site, *read) for read in reads]
        own = self._gated(vectors)
        if not own:
            return outputs
        masks = [[*r, self._arranged(v, own)] for r, v in zip(reads, vectors, strict=True)]
        return self._masked_inside(op, masks, own, args, kwargs)

    def _masked_inside(
        self, op: Any, masks: list, own: list[int], args: tuple, kwargs: dict
    ) -> Any:
        if id(op) not in self.inner_masks:
            self.inner_masks[id(op)] = InnerMask(op, masks)
        inner_mask = self.inner_masks[id(op)]
        return inner_mask([self.gates[i] for i in own], *args, **pack(kwargs))

    def _masked_weights(self, site: Site) -> dict[int, tuple]:
        """Input position -> (variable, axis) to be masked instead, where all samples agree.

        A kernel is much smaller than a batch of what it is multiplied with.
        """
        return {
            tensor: by
            for tensor, by in site.multiplied_by.items()
            if all(self.gates[i].shape[0] == 1 for i in self._gated([inner_vector(site, *by)]))
        }

    def _masked_inputs(self, site: Site, values: dict) -> dict:
        axes: dict[int, list] = {}
        instead = self._masked_weights(site)
        for tensor, axis in dict.fromkeys(r for r in site.reads if r[0] not in instead):
            axes.setdefault(site.call.inputs[tensor], []).append((tensor, axis))
        return {i: self._masked(site, i, tuple(own), values[i]) for i, own in axes.items()}

    def _masked_branches(self, site: Site, values: Any) -> dict:
        """The branches that a sum adds, each as a whole behind its gate."""
        return {
            tensor: Mask(None, name=self._name(f"{site.name}_mask"))(
                values[tensor], [self.gates[self.branches[tensor]]]
            )
            for tensor in site.call.inputs
            if tensor in self.branches
        }

    def _masked(self, site: Site, index: int, reads: tuple, value: Any) -> Any:
        key = (index, frozenset(axis for _, axis in reads))
        if key not in self.masked:
            for tensor, axis in reads:
                value = self._mask(site, tensor, axis, value)
            self.masked[key] = value
        return self.masked[key]

    def _mask(self, site: Site, tensor: int, axis: int, value: Any) -> Any:
        vector = line(site.inputs[tensor], axis)
        own = self._gated([vector])
        if not own:
            return value
        index = self._arranged(vector, own)
        fits = index == list(range(self.coupling.groups[own[0]].units))
        mask = Mask(axis, None if fits else index, name=self._name(f"{site.name}_mask"))
        return mask(value, [self.gates[i] for i in own])

    def _gated(self, vectors: list) -> list[int]:
        """Indices of the groups that any of the vectors mentions."""
        groups = np.concatenate([self._group_of(v) for v in vectors]) if vectors else np.array([])
        present, first = np.unique(groups, return_index=True)
        return [i for i in present[np.argsort(first)].tolist() if i >= 0]

    def _group_of(self, vector: Any) -> np.ndarray:
        return np.where(vector >= 0, self.coupling.group_of[vector], -1)

    def _arranged(self, vector: Any, own: list[int]) -> list[int]:
        """Where the gate of each element is among those of the groups `own` side by side.

        Elements without a gate point one past the end.
        """
        sizes = [self.coupling.groups[i].units for i in own]
        start = np.zeros(len(self.coupling.groups), int)
        start[own] = np.cumsum([0, *sizes[:-1]])
        group = self._group_of(vector)
        places = start[group] + self.coupling.index_of[vector]
        return np.where(group >= 0, places, sum(sizes)).tolist()

    def _gate(self, i: int, site: Site, values: Any) -> Any:
        target = self.targets[i]
        name = self._name(f"{re.sub('[^A-Za-z0-9_]', '_', target.name)}_gate")
        (tensor, axis), *_ = [*site.reads, (0, -1)]
        value = values[site.call.inputs[tensor]]
        gate_class = self.gate_class if target.per_sample else Gate
        gate = gate_class(
            target.units,
            target.name,
            list(target.layers),
            target.members,
            target.floor,
            axis,
            name=name,
        )
        return gate(value)

    def _name(self, wanted: str) -> str:
        name = unused(wanted, self.names)
        self.names.add(name)
        return name

    def _consensus(self, index: int, values: Any) -> dict:
        layer = Consensus(
            self.budget.sparsity,
            self.measure,
            self.budget.cost.get_config(),
            {t.name: t.units for t in self.targets},
            **self.training,
            name=self._name("consensus"),
        )
        gates = [self.gates[i] for i in range(len(self.targets))]
        return {index: layer(values[index], gates)}
