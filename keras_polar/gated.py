"""The gated model: what `apply` returns, what `fit` trains, what `convert` reads."""

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_polar.compaction import CannotCompact, Compaction
from keras_polar.distribute import require_supported
from keras_polar.gates import PACKAGE, Gate
from keras_polar.graph import to_numpy
from keras_polar.groups import GateGroup
from keras_polar.plan import Budget, ranking, settle
from keras_polar.polarization import Consensus


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
        for gate in (layer for layer in self.layers if isinstance(layer, Gate)):
            gate.pressure = self.consensus.pressure

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
        `keras_polar.plan.ranking`). Groups whose mask was set by hand keep it.

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
        """
        require_supported(self)
        _warn_of_frozen_gates(self)
        bound = inspect.signature(super().fit).bind(*args, **kwargs)
        callbacks, follow = bound.arguments.get("callbacks"), FollowSchedule()
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks.append(follow)
        else:
            given = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
            bound.arguments["callbacks"] = [follow, *filter(None, given)]
        try:
            return super().fit(*bound.args, **bound.kwargs)
        finally:
            follow.finish()  # however it ends, the gated model is up to date

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """`keras.Model.save`.

        Raises:
            ValueError: Keras could not load the file again.
        """
        _refuse_h5(self, filepath)
        with self._whole():
            super().save(filepath, *args, **kwargs)

    def save_weights(self, *args: Any, **kwargs: Any) -> None:
        with self._whole():
            super().save_weights(*args, **kwargs)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Up to date, even while a smaller network trains."""
        stand_in = self.stand_in
        if stand_in is not None:
            stand_in.leave()
        yield
        if stand_in is not None:
            stand_in.enter()

    # What Keras' training step asks a model for.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.stand_in is None:
            return super().__call__(*args, **kwargs)
        self.consensus.count_settled(self.stand_in.sparsity, bool(kwargs.get("training")))
        return self.stand_in.model(*args, **kwargs)

    @property
    def losses(self) -> list:
        # On JAX, Keras keeps those of the forward pass for the time in which it adds them up.
        if self.stand_in is None or self._losses_override:
            return super().losses
        return self.stand_in.model.losses

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


class FollowSchedule(keras.callbacks.Callback):
    """Tells the gated model how long the run is, settles it in time, and stops it if it breaks.

    Once it is settled, its sub-network trains in its place, up to the end of each epoch. There is
    no `on_train_batch_end`, for which Keras would wait for the results of every step, and nothing
    asks for `self.model` between steps: Keras on JAX copies the state there to answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.compaction: Compaction | None = None
        self.is_in_vain = keras.backend.backend() == "torch"

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # Not when training begins: BackupAndRestore loads its state only then.
        self.before = self._steps_done()
        self.settled = self.model.settled
        if self.settled:
            self.model.settle()  # all masks may have been set by hand: that ends the pressure
        self._announce(self.total or self._planned(epoch))
        self._compact()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._settle_if_due(self.before + batch):
            self._compact()

    def on_test_begin(self, logs: Any = None) -> None:
        self._settle_if_due(self._steps_done())  # validation sees what will be saved

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.model.stand_in is not None:
            self.model.stand_in.leave()
        done = self._steps_done()
        # First of all callbacks, so that none saves a broken state over a good one.
        self.model.require_finite(f"in epoch {epoch + 1} (steps {self.before + 1} to {done})")
        is_news = not self.total
        if is_news:
            self._announce(done + (done - self.before) * (self._epochs - epoch - 1))
        if self._settle_if_due(done) and is_news:
            warnings.warn(
                "fit did not know how many steps there are before the first epoch was over: the "
                "gates are settled without having been pressed. Give `fit` steps_per_epoch, or "
                "`apply` schedule=keras_polar.Schedule(steps=n).",
                stacklevel=2,
            )
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

    def _settle_if_due(self, done: int) -> bool:
        if done < self.due or self.settled:
            return False
        self.model.settle()
        self.settled = True
        return True

    def _compact(self) -> None:
        """A settled model is replaced by its sub-network until the epoch ends."""
        if not self.settled or not self.model.consensus.compact or self.is_in_vain:
            return
        if self.compaction is None or not self.compaction.is_current:
            try:
                self.compaction = Compaction(self.model)
            except CannotCompact as error:
                self.is_in_vain = True
                warnings.warn(f"fit goes on with the whole network: {error}.", stacklevel=2)
                return
        self.compaction.enter()
        self.model.make_train_function()

    def finish(self) -> None:
        """The gated model stands for itself again."""
        if self.model.stand_in is not None:
            self.model.stand_in.leave()
        self.compaction = None

    def _add_to(self, logs: Any) -> None:
        """Puts into the epoch's logs what the metrics of the consensus cannot say."""
        if logs is not None and not self.model.consensus.has_metrics:
            latest = self.model.consensus.latest.items()
            logs.update((name, float(to_numpy(value))) for name, value in latest)

    def _steps_done(self) -> int:
        return int(to_numpy(self.model.consensus.step))
