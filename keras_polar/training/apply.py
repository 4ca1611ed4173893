"""Puts gates into a model: one call before `fit`."""

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from keras_polar.costs.latency import LatencyTable
from keras_polar.costs.measures import Measure
from keras_polar.gates.gate import Gate
from keras_polar.gates.groups import is_gated
from keras_polar.gates.schedule import Schedule
from keras_polar.gates.teacher import Teacher
from keras_polar.graph.configs import OTHER_WEIGHTS, REMEDY, SHARED, refuse_configs
from keras_polar.graph.ir import Graph
from keras_polar.graph.rebuild import rebuild
from keras_polar.graph.trace import warn_of_ties
from keras_polar.selection.importance import Importance
from keras_polar.surgery.tasks import Pipeline, is_task
from keras_polar.surgery.writers import as_network
from keras_polar.training.insertion import GateInserter
from keras_polar.training.model import GatedModel
from keras_polar.training.problem import Options, pruning_problem

TRAINING = ("train_step", "test_step", "compute_loss", "compute_metrics")
OF_TASKS = ("compute_loss",)  # what a `Pipeline` does as well


def apply(
    model: Any,
    sparsity: float = 0.5,
    *,
    measure: str | Measure = "weights",
    gate: str | Gate = "dynamic",
    granularity: str | Iterable[str] = "channels",
    ignore: Iterable[str] = (),
    round_to: int | None = None,
    min_units: int = 1,
    max_sparsity: float | Mapping[str, float] | None = None,
    schedule: Schedule | None = None,
    compact: bool = True,
    latency_table: LatencyTable | str | os.PathLike | None = None,
    importance: str | Importance = "gradients",
    teacher: Teacher | keras.Model | None = None,
    input_shape: Any = None,
    equal: Iterable[str] = (),
) -> GatedModel:
    """Inserts gates, so that one training run finds and trains a smaller sub-network.

    After Zhi et al., "Learning a Consensus Sub-Network with Polarization Regularization and One
    Pass Training" (arXiv 2302.10798); the formulas are ours.

    Args:
        model: a functional or built Sequential Keras model, fresh or trained, or a subclassed one
            whose `call` consists of layers and `keras.ops`. It is not changed. A task of KerasHub:
            the gated model compiles and preprocesses as the task does; its head keeps its units,
            so that `convert(gated, into=task)` can put it together again. Of tasks that write
            texts only what the config of their backbone can say goes, equally many in all layers.
        sparsity: share of the cost to be removed, in (0, 1).
        measure: what `sparsity` is a share of: "weights" (`model.count_params()`), "macs"
            (multiply-accumulates per sample), "units" (channels and neurons), "latency" (time
            of one inference with LiteRT, by a table of measured operations) or a
            `keras_polar.Measure` of your own.
        gate: "dynamic" (decides per sample while training, the paper's), "static" (one logit per
            unit) or a `keras_polar.Gate`: one of these with other options, or one of your own.
            Units that are read inside the layer that makes them (attention heads, the hidden units
            of an LSTM) never have gates that decide per sample, but static ones instead: they are
            masked on the weights, which all samples share.
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
        importance: what decides about units. "gradients": what the squares of the gates' gradients
            say that closing them adds to the loss, over what they cost; the shares of groups come
            out of it. "logits": the gates' own logits alone, every group gives the same share.
            "l1_norm", "batch_norm_scale", "group_norm" (units of all groups compared), "at_random"
            or a `keras_polar.Importance` of your own: weights as they are when the gates settle,
            whatever the gates say; these are controls. `keras_polar.importances` has some that
            judge a trained network by data.
        teacher: a trained model, `model` itself in most cases, or a `keras_polar.Teacher` that
            also says how: the gated model learns to give its outputs, besides the labels, before
            and after the gates settle. A frozen copy teaches, with the values of this moment.
        input_shape: of a subclassed network: the shape of one sample (None for open sizes), or
            what its `call` takes with shapes in the places of tensors; a `keras.Input` instead of
            a shape says the type as well. By default the shapes that it was called on first. Of a
            task that writes texts: (length,) or {input: shape}, by default its preprocessor's.
        equal: names of layers or groups, glob patterns allowed: all groups of units that one
            pattern matches keep equally many; which ones may differ from group to group.

    Returns:
        A `GatedModel` with the model's weights, not compiled.

    Raises:
        FileNotFoundError: there is no table of latencies at that path.
        TypeError: the model is not functional and cannot be made so, or an argument has the wrong
            type.
        ValueError: an argument is out of range or not known, the model has gates already, nothing
            in it can be pruned, `sparsity` cannot be reached (says what can), nobody can count the
            multiply-accumulates of a layer with weights (`measure="macs"`), or the table of
            latencies lacks a layer, or a teacher has gates, shares variables with other layers, or
            has inputs or outputs that do not fit.

    Warns:
        UserWarning: `sparsity` is only reached with less in a group than usually stays there;
            nobody can count the multiply-accumulates of a layer without weights
            (`measure="macs"`); layers stay whole because sizes of the inputs are open; a layer
            cannot be made anew from what it says of itself, so that neither the gated nor the
            small model can be saved as a whole; a subclassed network does something else in
            training.

    Example:

        >>> gated = keras_polar.apply(model, sparsity=0.5)
        >>> gated.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        >>> gated.fit(x, y, epochs=10)
        >>> small = keras_polar.convert(gated)
    """
    if is_gated(model):
        raise ValueError(
            f"apply: model {model.name!r} has gates already. Pass the model without gates; to "
            "prune further, `convert` first and apply to the result."
        )
    options = Options(
        sparsity=sparsity,
        measure=measure,
        gate=gate,
        granularity=(granularity,) if isinstance(granularity, str) else tuple(granularity),
        ignore=ignore,
        round_to=round_to,
        min_units=min_units,
        max_sparsity=max_sparsity,
        schedule=Schedule() if schedule is None else schedule,
        compact=bool(compact),
        latency_table=latency_table,
        importance=importance,
        teacher=teacher,
        equal=equal,
    )
    network, model = model, as_network(model, input_shape)
    problem = pruning_problem(model, options, network)
    graph, inserter = problem.coupling.graph, GateInserter(problem)
    taught = problem.teaching
    visit = inserter.visit if taught is None else taught.wrap(graph, inserter.visit)
    gated = rebuild(graph, visit, GatedModel)
    gated.dtype_policy = network.dtype_policy  # by which `compile` decides about loss scaling
    gated.pipeline = Pipeline(network) if is_task(network) else None
    warn_of_ties(graph, "apply", inserter.copies.split)
    _warn_of_own_training(network)
    _warn_of_files(gated, graph)
    return gated


def _warn_of_own_training(model: Any) -> None:
    names = [n for n in TRAINING if not (is_task(model) and n in OF_TASKS)]
    overridden = [n for n in names if getattr(type(model), n) is not getattr(keras.Model, n)]
    if overridden:
        warnings.warn(
            f"apply: the gated model is not trained by {', '.join(overridden)} of "
            f"{type(model).__name__} {model.name!r}. Write them into a subclass of "
            "keras_polar.GatedModel and call `gated = ThatClass(gated.input, gated.output)`.",
            stacklevel=3,
        )


def _warn_of_files(gated: GatedModel, graph: Graph) -> None:
    """Parts of opened layers, which would have made them, and what surely comes back as another.

    Saving them fails from now on: better than a file that nobody can load.
    """
    parts = {call.name for call in graph.calls if call.is_part}
    found = gated.not_loadable.items()
    reasons = {n: why for n, why in found if n in parts or why.startswith((OTHER_WEIGHTS, SHARED))}
    if reasons:
        refuse_configs(gated.layers, reasons)
        listed = "; ".join(f"{name!r}: {why}" for name, why in reasons.items())
        warnings.warn(
            f"apply: the gated model can be trained, converted and exported, but neither it nor "
            f"the small one can be saved as a whole: Keras could not load it again ({listed}). "
            f"{REMEDY}, or save weights alone (ModelCheckpoint(..., save_weights_only=True)).",
            stacklevel=3,
        )
