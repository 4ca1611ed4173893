"""Puts gates into a model: one call before `fit`."""

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from keras_polar.costs.count import sizes_known, unknown_macs
from keras_polar.costs.latency import LatencyTable
from keras_polar.costs.polynomial import MEASURES
from keras_polar.coupling.coupling import Coupling, couple, why_fixed
from keras_polar.gates.gate import DynamicGate, Gate
from keras_polar.gates.groups import is_gated
from keras_polar.gates.schedule import Schedule
from keras_polar.graph.quantized import why_altered
from keras_polar.graph.rebuild import rebuild
from keras_polar.graph.trace import warn_of_ties
from keras_polar.litert.measure_latency import latency_table as measure_latency
from keras_polar.rules import CostTerm, trace_model
from keras_polar.selection.budget import Budget, budget_of, usual_floors
from keras_polar.selection.select import below_usual
from keras_polar.training.gate_specs import branches_of, gate_specs
from keras_polar.training.insertion import GateInserter
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
    coupling = couple(trace_model(model), ignore if "channels" in kinds else "*")
    warn_of_ties(coupling.graph, "apply")
    blocks = branches_of(coupling, ignore) if "blocks" in kinds else ()
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
    found = gate_specs(coupling, blocks, budget.floors)
    training = {
        "schedule": (schedule or Schedule()).get_config(),
        "compact": bool(compact),
        "round_to": round_to,
    }
    inserter = GateInserter(coupling, found, GATES[gate], budget, measure, training)
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


def _timed(model: Any, measure: str, table: Any) -> list[tuple[int, CostTerm]]:
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
    return table.terms(couple(trace_model(model)))


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
