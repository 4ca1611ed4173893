"""The gated model: what `apply` returns, what `fit` trains, what `convert` reads."""

import inspect
import math
import warnings
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_polar.coupling import Coupling
from keras_polar.distribute import require_supported
from keras_polar.gates import PACKAGE, Gate, Mask
from keras_polar.graph import Call, Graph, bypass, refs_in, to_numpy
from keras_polar.inner import InnerMask, unpack
from keras_polar.plan import Budget, settle
from keras_polar.polarization import Consensus
from keras_polar.rules import read


class GateGroup:
    """A view of one group of units that are decided together.

    Attributes:
        name: of the group, after its first layer.
        layers: names of the layers that produce its units.
        units: number of units.
        members: which units of the first layer they are; None for all of them, in order.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.name, self.layers, self.units = gate.group, list(gate.producers), gate.units
        self.members = gate.members

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
        if not mask.any():
            raise ValueError(
                f"set_mask of group {self.name!r}: the mask closes all {self.units} units of "
                f"{', '.join(self.layers)}. Leave at least one open."
            )
        self._gate.settled_mask.assign(mask.astype("float32"))
        self._gate.open_rates.assign(mask.astype("float32"))
        self._gate.settled.assign(1.0)

    def __repr__(self) -> str:
        return f"<group {self.name!r}: {int(self.mask.sum())} of {self.units} units open>"


@keras.saving.register_keras_serializable(PACKAGE)
class GatedModel(keras.Model):
    """A functional model with gates; train it like any other, then `keras_polar.convert` it.

    In inference mode it always is the static sub-network of its current consensus.
    """

    @property
    def groups(self) -> list[GateGroup]:
        """The groups of units with gates, in the order of the model."""
        gates = {layer.group: layer for layer in self.layers if isinstance(layer, Gate)}
        return [GateGroup(gates[name]) for name in self.consensus.groups]

    @property
    def sparsity(self) -> float:
        """Share of the cost, in the chosen measure, that the current consensus removes."""
        return self.budget.achieved([int(g.mask.sum()) for g in self.groups])

    @property
    def consensus(self) -> Consensus:
        """The layer that holds losses, schedule and target."""
        for layer in self.layers:
            if isinstance(layer, Consensus):
                return layer
        raise ValueError(
            f"GatedModel {self.name!r} has no gates. Expected one that keras_polar.apply made; "
            "it is not meant to be built by hand."
        )

    @property
    def budget(self) -> Budget:
        """What the settled network may cost."""
        layer = self.consensus
        return Budget(layer.cost, layer.units, layer.sparsity, layer.min_units, layer.round_to)

    @property
    def settled(self) -> bool:
        """Whether all masks are fixed."""
        return all(g.settled for g in self.groups)

    def settle(self) -> None:
        """Fixes the consensus at the requested sparsity; `fit` does it on schedule.

        Units are ranked over all groups by how open their gates have been. Groups whose mask was
        set by hand keep it. Does nothing once all groups are settled.

        Raises:
            FloatingPointError: trained values are not finite, so that there is no consensus.
        """
        if self.settled:
            return
        self.require_finite("before the gates were settled")
        groups = self.groups
        masks = settle([_wanted(g) for g in groups], self.budget)
        for group, mask in zip(groups, masks, strict=True):
            if not group.settled:
                group.set_mask(mask)
        self.consensus.settled.assign(1.0)

    def require_finite(self, when: str) -> None:
        """Raises a FloatingPointError that names the layers whose trained values are not finite."""
        trained = self._trained()
        broken = [v.path for v in trained if not bool(ops.all(ops.isfinite(v)))]
        if broken:
            raise FloatingPointError(
                f"Training of {self.name!r} broke {when}: {len(broken)} of {len(trained)} trained "
                f"variables hold NaN or infinity, the first of them {', '.join(broken[:3])}. Go on "
                "from the last saved state with a smaller learning rate or `clipnorm=1.0` in the "
                "optimizer, and look for NaN in the data."
            )

    def _trained(self) -> list:
        states = [(g._gate.open_rates, g._gate.scores) for g in self.groups]
        return [*self.trainable_variables, *(v for pair in states for v in pair)]

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.train_on_batch`; settles the gates when their schedule says so.

        Raises:
            ValueError: the schedule does not say how many steps there will be.
        """
        schedule, steps = self.consensus.schedule, self.consensus.step
        if schedule.steps is None:
            raise ValueError(
                f"train_on_batch of {self.name!r}: expected a schedule that says how many steps "
                "there will be. Give `apply` schedule=keras_polar.Schedule(steps=n)."
            )
        if to_numpy(steps) >= schedule.settle_step(schedule.steps):
            self.settle()
        return super().train_on_batch(*args, **kwargs)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.fit`; follows the schedule by itself.

        Raises:
            FloatingPointError: trained values are no longer finite after an epoch.
            NotImplementedError: Keras cannot train under the `tf.distribute` strategy.
        """
        require_supported(self)
        bound = inspect.signature(super().fit).bind(*args, **kwargs)
        callbacks = bound.arguments.get("callbacks")
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks.append(FollowSchedule())
        else:
            given = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
            bound.arguments["callbacks"] = [FollowSchedule(), *filter(None, given)]
        return super().fit(*bound.args, **bound.kwargs)


def _wanted(group: GateGroup) -> np.ndarray:
    if group.settled:
        return np.where(group.mask, np.inf, -np.inf)
    return group.open_rates + to_numpy(group._gate.scores)


class FollowSchedule(keras.callbacks.Callback):
    """Tells the gated model how long the run is, settles it in time, and stops it if it breaks.

    It has no `on_train_batch_end`, for which Keras would wait for the results of every step, and
    it leaves `self.model` alone between steps: Keras on JAX copies the state there to answer.
    """

    def on_train_begin(self, logs: Any = None) -> None:
        self.total = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # Not when training begins: BackupAndRestore loads its state only then.
        self.before = self._steps_done()
        self.settled = self.model.settled
        self._announce(self.total or self._planned(epoch))

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._settle_if_due(self.before + batch)

    def on_test_begin(self, logs: Any = None) -> None:
        self._settle_if_due(self._steps_done())  # validation sees what will be saved

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        done = self._steps_done()
        # First of all callbacks, so that none saves a broken state over a good one.
        self.model.require_finite(f"in epoch {epoch + 1} (steps {self.before + 1} to {done})")
        if not self.total:
            self._announce(done + (done - self.before) * (self._epochs - epoch - 1))
        self._settle_if_due(done)
        self._add_to(logs)

    def on_train_end(self, logs: Any = None) -> None:
        if not self.model.settled and self.model.consensus.schedule.steps is None:
            warnings.warn(
                "fit ended before the schedule settled the gates (EarlyStopping, or a run too "
                "short); they are settled now, and the sub-network has not been trained alone.",
                stacklevel=2,
            )
            self.model.settle()

    @property
    def _epochs(self) -> int:
        return self.params.get("epochs", 1)

    def _planned(self, epoch: int) -> int:
        """Steps of the whole run, those before this `fit` included; 0 if not known."""
        if self.model.consensus.schedule.steps:
            return self.model.consensus.schedule.steps
        if self.params.get("steps"):
            return self.before + self.params["steps"] * (self._epochs - epoch)
        known = int(to_numpy(self.model.consensus.steps))  # of the run that is resumed
        return known if self.before < known else 0

    def _announce(self, total: int) -> None:
        self.total = total
        schedule = self.model.consensus.schedule
        self.due = schedule.settle_step(total) if total else math.inf
        self.model.consensus.steps.assign(float(total))

    def _settle_if_due(self, done: int) -> None:
        if done >= self.due and not self.settled:
            self.model.settle()
            self.settled = True

    def _add_to(self, logs: Any) -> None:
        """Puts into the epoch's logs what the metrics of the consensus cannot say."""
        if logs is not None and not self.model.consensus.has_metrics:
            latest = self.model.consensus.latest.items()
            logs.update((name, float(to_numpy(value))) for name, value in latest)

    def _steps_done(self) -> int:
        return int(to_numpy(self.model.consensus.step))


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
    """The graph of a gated model without its gates."""

    def stands_for(call: Call) -> int | None:
        if isinstance(call.op, Gate):
            return -1
        return call.inputs[0] if isinstance(call.op, (Mask, Consensus)) else None

    graph = read(gated)
    bare = replace(graph, calls=tuple(map(_without_inner_mask, graph.calls)))
    return bypass(bare, stands_for)


def _without_inner_mask(call: Call) -> Call:
    if not isinstance(call.op, InnerMask):
        return call
    args, kwargs = call.args[1:], unpack(call.kwargs)
    inputs = refs_in((args, kwargs))
    return replace(call, op=call.op.layer, args=args, kwargs=kwargs, inputs=inputs)


def flags_for(gated: GatedModel, coupling: Coupling) -> np.ndarray:
    """One flag per id of the stripped model, True where it stays by the gates' consensus.

    Gates are found again by the units of their first layer: the order of calls, and with it the
    names of groups, may differ from the model that `apply` was given.
    """
    produced = coupling.produced()
    flags = np.ones(len(coupling.roots), bool)
    for group in gated.groups:
        own = produced[group.layers[0]]
        own = own if group.members is None else own[group.members]
        flags[coupling.roots[own]] = group.mask
    return flags[coupling.roots]
