"""The gated model: what `apply` returns, what `fit` trains, what `convert` reads."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_polar.backends import require_supported, to_numpy
from keras_polar.gates.gate import PACKAGE, Gate
from keras_polar.gates.groups import GateGroup
from keras_polar.gates.lesson import Lesson
from keras_polar.gates.objective import BY_GATES, PruningObjective
from keras_polar.graph.configs import repair_configs
from keras_polar.graph.keras_private import forget_losses
from keras_polar.processes import alone, watch_processes
from keras_polar.selection.budget import BRANCH, CHANNELS, Budget
from keras_polar.selection.importance import Importance, per_cost
from keras_polar.selection.select import rank_units, select_units
from keras_polar.surgery.penalties import mask_penalties
from keras_polar.surgery.strip import scores_of
from keras_polar.surgery.tasks import Pipeline
from keras_polar.training.keras_hooks import (
    average_what_is_overwritten,
    caller,
    is_called_by,
    leaves_losses_out,
    losses_are_handed_over,
)
from keras_polar.training.loop import Run


@keras.saving.register_keras_serializable(PACKAGE)
class GatedModel(keras.Model):
    """A functional model with gates; train it like any other, then `keras_polar.convert` it.

    In inference mode it always is the static sub-network of its current consensus.

    Attributes:
        sub_network: the `Compaction` that trains in its place at the moment, or None.
        pipeline: the `Pipeline` of the task of KerasHub that `apply` was given, or None. Files do
            not hold it: a model that is loaded takes inputs that are preprocessed.
        not_loadable: layer name -> why a file of the model, once saved, cannot be loaded.
    """

    sub_network = None
    pipeline: Pipeline | None = None
    output_names: list[str]  # Keras'

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.not_loadable = repair_configs(self.layers)
        gates = [layer for layer in self.layers if isinstance(layer, Gate)]
        for gate in gates:
            gate.pressure = self.consensus.pressure
        if any(gate.listens for gate in gates):
            self.consensus.listeners = tuple(map(_listener, self.groups))
        if gates:
            mask_penalties(self)
            self.consensus.alarm = partial(_warn_of_another_fit, self.name)
        if self.lesson is not None:
            self._attend(self.lesson)

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
    def consensus(self) -> PruningObjective:
        """The layer that holds losses, schedule and target."""
        for layer in self.layers:
            if isinstance(layer, PruningObjective):
                return layer
        raise ValueError(
            f"GatedModel {self.name!r} has no gates. Expected one that keras_polar.apply made; "
            "it is not meant to be built by hand."
        )

    @property
    def lesson(self) -> Lesson | None:
        """The layer that asks the teacher, if there is one."""
        return next((layer for layer in self.layers if isinstance(layer, Lesson)), None)

    def _attend(self, lesson: Lesson) -> None:
        step = self.consensus.step
        lesson.clock = lambda: ops.convert_to_tensor(step)
        # By the names of outputs `compile` is given losses and metrics: they are their layers'.
        self.output_names = [lesson.passes if n == lesson.name else n for n in self.output_names]

    @property
    def budget(self) -> Budget:
        """What the settled network may cost."""
        layer = self.consensus
        floors = tuple(g._gate.min_units for g in self.groups)
        kinds = tuple(BRANCH if g.is_block else CHANNELS for g in self.groups)
        limits = (floors, layer.round_to, kinds, layer.tied)
        return Budget(layer.cost, layer.units, layer.sparsity, *limits)

    @property
    def settled(self) -> bool:
        """Whether all masks are fixed."""
        return all(g.settled for g in self.groups)

    def settle(self) -> None:
        """Fixes the consensus at the requested sparsity; `fit` does it on schedule.

        Units are ranked by how open their gates have been, group by group (see
        `keras_polar.selection.select.rank_units`). Groups whose mask was set by hand keep it.

        Raises:
            FloatingPointError: trained values are not finite, so that there is no consensus.
            ValueError: masks set by hand keep different counts in groups that are to keep equally
                many.
        """
        self._refuse_unequal()
        if not self.settled:
            self.require_finite("before the gates were settled")
            masks = select_units(self._importances(), self.budget)
            for group, mask in zip(self.groups, masks, strict=True):
                if not group.settled:
                    group.set_mask(mask)
        self.consensus.settled.assign(1.0)
        self.consensus.is_over = True

    def _refuse_unequal(self) -> None:
        groups = self.groups
        for tied in self.consensus.tied:
            by_hand = {g.name: int(g.mask.sum()) for g in (groups[i] for i in tied) if g.settled}
            if len(set(by_hand.values())) > 1:
                listed = ", ".join(f"{n} of {name!r}" for name, n in by_hand.items())
                raise ValueError(
                    f"settle of {self.name!r}: expected masks that keep equally many units in "
                    f"groups that `equal` ties, but those set by hand keep {listed}. Set masks "
                    "with equal counts by `group.set_mask`."
                )

    def _importances(self) -> list[np.ndarray]:
        """What `select_units` ranks units by; infinite where masks were set by hand."""
        groups = self.groups
        criterion = self._criterion()
        if criterion is not None:
            free = self._by_criterion(criterion)
        elif all(g._gate.listens for g in groups) and self._have_heard():
            # What the gates have closed by themselves goes before all that they left open.
            free = [to_numpy(g._gate.lead) - 1e3 * (g.open_rates < 0.5) for g in groups]
        else:
            free = self._ranked()
        return [
            np.where(g.mask, np.inf, -np.inf) if g.settled else importance
            for g, importance in zip(groups, free, strict=True)
        ]

    def _criterion(self) -> Importance | None:
        layer = self.consensus
        if layer.criterion is None and layer.importance not in BY_GATES:
            raise ValueError(
                f"settle of {self.name!r}: it was made with importance={layer.importance!r}, an "
                "object that a saved model does not hold. Set it again: "
                "`gated.consensus.criterion = <the keras_polar.Importance>`."
            )
        return layer.criterion

    def _by_criterion(self, criterion: Importance) -> list[np.ndarray]:
        """Branches, of which a criterion says nothing, are ranked by their gates."""
        known = scores_of(self, criterion)
        groups = self.groups
        scores = [known.get(g.name, g.open_rates + to_numpy(g._gate.scores)) for g in groups]
        if not criterion.is_free or any(g.is_block for g in groups):
            return rank_units(scores, [np.zeros(g.units, bool) for g in groups], self.budget)
        return per_cost(scores, self.budget) if criterion.is_per_cost else scores

    def _have_heard(self) -> bool:
        """Whether the loss has said anything of each group, and the gates were told."""
        return all(to_numpy(v).any() for g in self.groups for v in (g._gate.heard, g._gate.lead))

    def _ranked(self) -> list[np.ndarray]:
        groups = self.groups
        scores = [g.open_rates + to_numpy(g._gate.scores) for g in groups]
        return rank_units(scores, [g.open_rates < 0.5 for g in groups], self.budget)

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
        average_what_is_overwritten(self)
        return super().train_on_batch(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`keras.Model.compile`; what is left out, or "auto", is as the task of KerasHub has it."""
        arguments = inspect.signature(super().compile).bind(*args, **kwargs).arguments
        if self.pipeline is not None:
            told = {k: v for k, v in arguments.items() if not (isinstance(v, str) and v == "auto")}
            arguments = self.pipeline.compiled() | told
        super().compile(**arguments)

    def compile_from_config(self, config: dict) -> None:
        # Keras leaves a model that it loads uncompiled where the class has a `compile` of its own.
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.fit`; follows the schedule by itself.

        Raises:
            FloatingPointError: trained values are no longer finite after an epoch.
            NotImplementedError: Keras cannot train under the `tf.distribute` strategy.
            ValueError: processes of JAX that train together disagree.
        """
        require_supported(self)
        warn_of_frozen_gates(self)
        average_what_is_overwritten(self)
        arguments = inspect.signature(super().fit).bind(*args, **kwargs).arguments
        if self.pipeline is not None:
            arguments = self.pipeline.prepared_validation(arguments)
            arguments = self.pipeline.prepared(arguments, arguments.get("shuffle", True))
        watch = watch_processes(self, arguments)
        with Run(self, arguments.get("callbacks"), watch) as run:
            arguments["callbacks"] = run.callbacks
            return super().fit(**arguments)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.synchronize()  # validation within `fit`: callbacks look at the model meanwhile
        if self.pipeline is None or "_use_cached_eval_dataset" in kwargs:  # `fit` has prepared it
            return super().evaluate(*args, **kwargs)
        arguments = inspect.signature(super().evaluate).bind(*args, **kwargs).arguments
        return super().evaluate(**self.pipeline.prepared(arguments))

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        if self.pipeline is None:
            return super().predict(*args, **kwargs)
        arguments = inspect.signature(super().predict).bind(*args, **kwargs).arguments
        return super().predict(**self.pipeline.prepared(arguments))

    def predict_step(self, *args: Any) -> Any:
        outputs = super().predict_step(*args)
        if self.pipeline is None:
            return outputs
        if len(args) == 1:
            return self.pipeline.decoded(outputs, *args)
        outputs, state = outputs  # on JAX
        return self.pipeline.decoded(outputs, args[-1]), state

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        arguments = {"y": y, "y_pred": y_pred, "sample_weight": sample_weight}
        if self.pipeline is not None and self.pipeline.has_own_loss():
            loss, compared = self.pipeline.compared(x, {**arguments, "training": training})
            if compared is None:
                return sum(self.losses, loss)
            arguments = compared
        return super().compute_loss(x, **arguments, training=training)

    def synchronize(self) -> None:
        """Brings this model up to date and back, should its sub-network train in its place."""
        if self.sub_network is not None:
            self.sub_network.leave()

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
        sub_network = self.sub_network
        self.synchronize()
        try:
            yield
        finally:
            if sub_network is not None:
                sub_network.enter()

    # What Keras' training step asks a model for.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.sub_network is None:
            self._refuse_distiller(kwargs.get("training"))
            return super().__call__(*args, **kwargs)
        if kwargs.get("training"):
            self.consensus.count_settled(self.sub_network.sparsity)
        return self.sub_network.model(*args, **kwargs)

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
        if self.sub_network is None or losses_are_handed_over(self):
            return super().losses
        return self.sub_network.model.losses

    @property
    def metrics(self) -> list:
        if self.sub_network is None:
            return super().metrics
        return [self.sub_network.metrics.get(id(m), m) for m in super().metrics]

    @property
    def variables(self) -> list:
        if self.sub_network is None:
            return super().variables
        return [*self.sub_network.model.variables, *self.consensus.variables]

    @property
    def trainable_weights(self) -> list:
        if self.sub_network is None:
            return super().trainable_weights
        return self.sub_network.model.trainable_weights

    def _refuse_distiller(self, training: Any) -> None:
        if training and leaves_losses_out(caller(keras.distillation.Distiller.call)):
            raise NotImplementedError(
                f"keras.distillation.Distiller cannot train the gated model {self.name!r}: it "
                "leaves out the losses of its student, the gates' among them, and the schedule "
                "that settles them. Give `distiller.fit` callbacks=[keras_polar.callbacks.Follow("
                "gated)], which makes up for both, or a student without gates: train the gated "
                "model with its own `fit` first, and take `keras_polar.convert(gated)`."
            )


def _listener(group: GateGroup) -> tuple:
    """What the objective leads a gate by: functions, as a layer would own the variables it has."""
    gate = group._gate
    return gate.log_damage, gate.is_led_open, lambda lead: gate.lead.assign(lead)


def _warn_of_another_fit(name: str) -> None:
    """`fit` of a gated model settles its gates; that of another model knows nothing of them."""
    if is_called_by(keras.Model.fit):
        warnings.warn(
            f"The gated model {name!r} is trained by the `fit` of another model, which does not "
            "say how many steps there are and never settles the gates: nothing will be pruned. "
            "Give that fit callbacks=[keras_polar.callbacks.Follow(gated)], or "
            "call gated.settle() beforehand if it is to train the sub-network alone.",
            stacklevel=2,
        )


def warn_of_frozen_gates(gated: GatedModel) -> None:
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
