"""The gated model: what `apply` returns, what `fit` trains, what `convert` reads."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_polar.compaction import CannotCompact, Compaction
from keras_polar.gates import PACKAGE, Gate
from keras_polar.graph import to_numpy
from keras_polar.groups import GateGroup
from keras_polar.plan import Budget, settle
from keras_polar.polarization import Consensus


@keras.saving.register_keras_serializable(PACKAGE)
class GatedModel(keras.Model):
    """A functional model with gates; train it like any other, then `keras_polar.convert` it.

    In inference mode it always is the static sub-network of its current consensus.

    Attributes:
        stand_in: the `Compaction` that trains in its place at the moment, or None.
    """

    stand_in = None

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
        return next(layer for layer in self.layers if isinstance(layer, Consensus))

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

        Units are ranked over all groups by how open their gates have been. Groups whose mask was
        set by hand keep it. Does nothing once all groups are settled.
        """
        if self.settled:
            return
        groups = self.groups
        masks = settle([_wanted(g) for g in groups], self.budget)
        for group, mask in zip(groups, masks, strict=True):
            if not group.settled:
                group.set_mask(mask)
        self.consensus.settled.assign(1.0)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.fit`; follows the schedule by itself."""
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

    def save(self, *args: Any, **kwargs: Any) -> None:
        with self._whole():
            super().save(*args, **kwargs)

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
        if kwargs.get("training"):
            self.consensus.report_settled(self.stand_in.sparsity)
        return self.stand_in.model(*args, **kwargs)

    @property
    def losses(self) -> list:
        return super().losses if self.stand_in is None else self.stand_in.model.losses

    @property
    def trainable_weights(self) -> list:
        if self.stand_in is None:
            return super().trainable_weights
        return self.stand_in.model.trainable_weights


def _wanted(group: GateGroup) -> np.ndarray:
    if group.settled:
        return np.where(group.mask, np.inf, -np.inf)
    return group.open_rates + to_numpy(group._gate.scores)


class FollowSchedule(keras.callbacks.Callback):
    """Tells the gated model how long the run is, settles it in time, and has it compacted."""

    def __init__(self) -> None:
        super().__init__()
        self.compaction: Compaction | None = None
        self.is_in_vain = keras.backend.backend() != "tensorflow"  # JAX keeps state elsewhere

    def on_train_begin(self, logs: Any = None) -> None:
        self.steps_per_epoch = self.params.get("steps")
        self._announce()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.before = self._steps_done()
        self.settled = self.model.settled
        self._compact()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.in_epoch = batch + 1
        steps = self._total()
        due = self.model.consensus.schedule.settle_step(steps)
        if steps and not self.settled and self.before + self.in_epoch >= due:
            self._settle()
            self._compact()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        # Callbacks behind this one, and checkpoints, see the gated model as it is now.
        if self.model.stand_in is not None:
            self.model.stand_in.leave()
            self.model.consensus.step.assign(float(self.before + self.in_epoch))
        if not self.steps_per_epoch:
            self.steps_per_epoch = self.in_epoch
            self._announce()
        self._add_to(logs)

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
            self._forget_functions()
        self.compaction.enter()
        self.model.make_train_function()

    def finish(self) -> None:
        """The gated model stands for itself again."""
        if self.compaction is not None:
            if self.model.stand_in is not None:
                self.model.stand_in.leave()
            self._forget_functions()
            self.compaction = None

    def _forget_functions(self) -> None:
        """Keras compiles its steps once; they have to see who trains now."""
        model = self.model
        model.train_function = model.test_function = model.predict_function = None

    def _add_to(self, logs: Any) -> None:
        """Puts into the epoch's logs what the metrics of the consensus cannot say."""
        if logs is not None and not self.model.consensus.has_metrics:
            latest = self._sync().consensus.latest.items()
            logs.update((name, float(to_numpy(value))) for name, value in latest)

    def on_train_end(self, logs: Any = None) -> None:
        if not self._sync().settled and self.model.consensus.schedule.steps is None:
            warnings.warn(
                "fit ended before the schedule settled the gates (EarlyStopping, or a run too "
                "short); they are settled now, and the sub-network has not been trained alone.",
                stacklevel=2,
            )
            self._settle()

    def _total(self) -> int:
        planned = self.model.consensus.schedule.steps
        return planned or (self.steps_per_epoch or 0) * self.params.get("epochs", 1)

    def _announce(self) -> None:
        self._sync().consensus.steps.assign(float(self._total()))

    def _steps_done(self) -> int:
        return int(to_numpy(self._sync().consensus.step))

    def _settle(self) -> None:
        self._sync().settle()
        self.settled = True

    def _sync(self) -> GatedModel:
        # JAX keeps the state of a running fit outside the variables.
        getattr(self.model, "jax_state_sync", lambda: None)()
        return self.model
