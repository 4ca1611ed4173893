"""The gated model: what `apply` returns, what `fit` trains, what `convert` reads."""

import contextlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_polar.distribute import require_supported
from keras_polar.gates.gate import PACKAGE, Gate
from keras_polar.gates.groups import GateGroup
from keras_polar.gates.objective import Consensus
from keras_polar.graph.trace import forget_losses, to_numpy
from keras_polar.processes import alone, watch_processes
from keras_polar.selection.select import Budget, ranking, settle
from keras_polar.surgery.penalties import mask_penalties
from keras_polar.training.loop import Run


@keras.saving.register_keras_serializable(PACKAGE)
class GatedModel(keras.Model):
    """A functional model with gates; train it like any other, then `keras_polar.convert` it.

    In inference mode it always is the static sub-network of its current consensus.

    Attributes:
        stand_in: the `Compaction` that trains in its place at the moment, or None.
    """

    stand_in = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        gates = [layer for layer in self.layers if isinstance(layer, Gate)]
        for gate in gates:
            gate.pressure = self.consensus.pressure
        if gates:
            mask_penalties(self)

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
        floors = tuple(g._gate.min_units for g in self.groups)
        return Budget(layer.cost, layer.units, layer.sparsity, floors, layer.round_to)

    @property
    def settled(self) -> bool:
        """Whether all masks are fixed."""
        return all(g.settled for g in self.groups)

    def settle(self) -> None:
        """Fixes the consensus at the requested sparsity; `fit` does it on schedule.

        Units are ranked by how open their gates have been, group by group (see
        `keras_polar.selection.select.ranking`). Groups whose mask was set by hand keep it.

        Raises:
            FloatingPointError: trained values are not finite, so that there is no consensus.
        """
        if not self.settled:
            self.require_finite("before the gates were settled")
            masks = settle(self._wanted(), self.budget)
            for group, mask in zip(self.groups, masks, strict=True):
                if not group.settled:
                    group.set_mask(mask)
        self.consensus.settled.assign(1.0)

    def _wanted(self) -> list[np.ndarray]:
        """For `plan.settle`; infinite where masks were set by hand."""
        groups = self.groups
        scores = [g.open_rates + to_numpy(g._gate.scores) for g in groups]
        free = ranking(scores, [g.open_rates < 0.5 for g in groups], self.budget)
        return [
            np.where(g.mask, np.inf, -np.inf) if g.settled else wanted
            for g, wanted in zip(groups, free, strict=True)
        ]

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
            ValueError: processes of JAX that train together disagree.
        """
        require_supported(self)
        _warn_of_frozen_gates(self)
        bound = inspect.signature(super().fit).bind(*args, **kwargs)
        watch = watch_processes(self, bound.arguments)
        with Run(self, bound.arguments.get("callbacks"), watch) as run:
            bound.arguments["callbacks"] = run.callbacks
            return super().fit(*bound.args, **bound.kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.synchronize()  # validation within `fit`: callbacks look at the model meanwhile
        return super().evaluate(*args, **kwargs)

    def synchronize(self) -> None:
        """Brings this model up to date and back, should its sub-network train in its place."""
        if self.stand_in is not None:
            self.stand_in.leave()

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """`keras.Model.save`.

        Raises:
            ValueError: Keras could not load the file again.
        """
        _refuse_h5(self, filepath)
        with self._up_to_date(), alone():
            super().save(filepath, *args, **kwargs)

    def save_weights(self, *args: Any, **kwargs: Any) -> None:
        with self._up_to_date(), alone():
            super().save_weights(*args, **kwargs)

    @contextlib.contextmanager
    def _up_to_date(self) -> Iterator[None]:
        """In the middle of an epoch: the sub-network that trains goes on afterwards."""
        stand_in = self.stand_in
        self.synchronize()
        try:
            yield
        finally:
            if stand_in is not None:
                stand_in.enter()

    # What Keras' training step asks a model for.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.stand_in is None:
            self._refuse_distiller(kwargs.get("training"))
            return super().__call__(*args, **kwargs)
        if kwargs.get("training"):
            self.consensus.count_settled(self.stand_in.sparsity)
        return self.stand_in.model(*args, **kwargs)

    def stateless_call(self, *args: Any, **kwargs: Any) -> Any:
        # Keras on JAX comes in here, not by `__call__`, which would forget: a layer that remembers
        # the id of a loss of an earlier trace takes away whatever loss has that id in this one.
        forget_losses(self)
        if kwargs.get("training") and not kwargs.get("return_losses"):
            warnings.warn(
                f"stateless_call of {self.name!r} for training: expected return_losses=True; the "
                "losses by which gates learn which units go are left out. Add `sum(losses)` to "
                "yours: `y, states, losses = model.stateless_call(..., return_losses=True)`.",
                stacklevel=2,
            )
        return super().stateless_call(*args, **kwargs)

    @property
    def losses(self) -> list:
        # Keras on JAX hands the losses of a step over in between.
        if self.stand_in is None or self._losses_override:
            return super().losses
        return self.stand_in.model.losses

    @property
    def metrics(self) -> list:
        if self.stand_in is None:
            return super().metrics
        return [self.stand_in.metrics.get(id(m), m) for m in super().metrics]

    @property
    def variables(self) -> list:
        if self.stand_in is None:
            return super().variables
        return [*self.stand_in.model.variables, *self.consensus.variables]

    @property
    def trainable_weights(self) -> list:
        if self.stand_in is None:
            return super().trainable_weights
        return self.stand_in.model.trainable_weights

    def _refuse_distiller(self, training: Any) -> None:
        if training and _is_called_by(keras.distillation.Distiller.call):
            raise NotImplementedError(
                f"keras.distillation.Distiller cannot train the gated model {self.name!r}: it "
                "leaves out the losses of its student, the gates' among them, and the schedule "
                "that settles them. Expected a student without gates. Train the gated model with "
                "its own `fit` first; `small = keras_polar.convert(gated)` can be the student then."
            )


def _is_called_by(function: Any) -> bool:
    """Whether a function is being run. What Keras says of it differs between backends."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


def _warn_of_frozen_gates(gated: GatedModel) -> None:
    """Loops over all layers freeze gates as well: then nothing says which units are to go."""
    names = [g._gate.name for g in gated.groups if not g._gate.trainable and not g.settled]
    if names:
        warnings.warn(
            f"fit: gates of {gated.name!r} are frozen, so that they cannot learn which units go: "
            f"{', '.join(names)}. Freeze layers by name, or set gated.get_layer({names[0]!r})"
            ".trainable = True before `compile`.",
            stacklevel=3,
        )


def _refuse_h5(gated: GatedModel, filepath: Any) -> None:
    names = [x.name for x in gated.operations if not isinstance(x, keras.layers.Layer)]
    if names and str(filepath).endswith((".h5", ".hdf5")):
        raise ValueError(
            f"save of {gated.name!r}: Keras writes .h5 files with operations ({', '.join(names)}), "
            f"but cannot load them; received {str(filepath)!r}. Save it as a .keras file."
        )


# The .h5 format of Keras looks a model's class up by its bare name.
keras.saving.get_custom_objects()["GatedModel"] = GatedModel
