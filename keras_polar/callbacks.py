"""What can be watched while a gated model trains, and what another model's `fit` has to be given.

The gates' sparsity and polarization are in the logs of `fit`: in the progress bar, in
`history` and, as `epoch_sparsity` and `epoch_polarization`, in TensorBoard, if `fit` is given
`keras.callbacks.TensorBoard`; with `histogram_freq=1` that callback also writes histograms of
every gate's `open_rates`. Only what the pictures of `keras_polar.plots` need is recorded here.
"""

from typing import Any

import keras
import numpy as np

from keras_polar.backends import Reported
from keras_polar.gates.groups import require_gated
from keras_polar.training.keras_hooks import (
    add_losses,
    average_what_is_overwritten,
    leaves_losses_out,
)
from keras_polar.training.loop import Course
from keras_polar.training.model import warn_of_frozen_gates


class Follow(keras.callbacks.Callback):
    """Prunes a gated model in the `fit` of another model that it is a part of.

    A gated model's own `fit` follows the schedule by itself and needs no callback. That of a model
    around it (a KerasHub task with a gated backbone, `keras.distillation.Distiller` with a gated
    student, a GAN with a gated generator) knows nothing of gates: this announces the steps,
    settles the gates on schedule and puts sparsity and polarization into the logs. The masked
    network trains to the end. A step of the gated model is a call for training, however many there
    are in a step of `fit`; `Schedule(steps=...)` counts calls, too.

    A `train_step` of one's own has to add `sum(model.losses)` to its loss, as Keras' own does; a
    `Distiller`, which does not, is made to.

    Args:
        gated: the model with gates, as `keras_polar.apply` returned it.

    Raises:
        TypeError: `gated` has no gates.
        ValueError: when training begins: it is not a part of the model that trains.

    Example:

        >>> gated = keras_polar.apply(backbone, 0.5)
        >>> task = keras_hub.models.BertTextClassifier(backbone=gated, num_classes=2)
        >>> task.fit(x, y, epochs=10, callbacks=[keras_polar.callbacks.Follow(gated)])
        >>> small = keras_polar.convert(gated)
    """

    async_safe = True  # hooks at the end of a step may be called late, and in any order

    def __init__(self, gated: Any) -> None:
        super().__init__()
        require_gated(gated, "Follow")
        self.gated = gated
        self.course: Course | None = None  # None while it is not followed
        self.calls: float | None = None  # for training, in a step of `fit`
        self.seen = 0  # steps of `fit` in this epoch

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        if model is self.gated:
            return
        reported = self.gated.consensus.latest
        if not {id(v) for v in reported.values()} <= {id(v) for v in model.variables}:
            raise ValueError(_not_a_part(self.gated, model))
        warn_of_frozen_gates(self.gated)
        average_what_is_overwritten(model)
        if leaves_losses_out(model):
            add_losses(model)
        self.names, self.stride = list(reported), model.steps_per_execution
        self.reported = Reported(model, list(reported.values()))
        self.course, self.calls = Course(self.gated, lambda: self.model), None
        self.gated.consensus.is_attended = True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.course is not None:
            self.epoch, self.seen = epoch, 0
            self.course.begin_epoch()
            self._announce()
            self.reported.watch()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        course = self.course
        if course is None:
            return
        if batch and not self.calls:
            self._count(batch)
            self._announce()
        self.seen = batch + self.stride
        course.settle_if_due(course.before + batch * (self.calls or 0))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._report(logs)

    def on_test_begin(self, logs: Any = None) -> None:
        """Validation within `fit` is of what is shipped, if the gates settle with this epoch."""
        if self.course is not None:
            self.course.settle_if_due(self.course.steps_done())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.course is not None:
            self._count(min(self.seen, self.params.get("steps") or self.seen))
            self.course.end_epoch(epoch, self.params.get("epochs", 1))
            self._report(logs)

    def on_train_end(self, logs: Any = None) -> None:
        if self.course is not None:
            self.course.end()
            self.reported.forget()
            self.gated.consensus.is_attended, self.course = False, None

    def _count(self, steps: int) -> None:
        """Calls for training in a step of `fit`, so far in this epoch."""
        course = self.course
        if course is not None and self.model is not None:  # puts the state back (Keras on JAX)
            self.calls = (course.steps_done() - course.before) / max(1, steps)

    def _announce(self) -> None:
        course, steps = self.course, self.params.get("steps")
        if course is not None:
            epochs = self.params.get("epochs", 1) - self.epoch
            course.announce(course.planned(steps and steps * epochs * (self.calls or 1)))

    def _report(self, logs: Any) -> None:
        """A metric of that name, or other gates in the same `fit`, keep theirs."""
        if self.course is not None and logs is not None:
            for name, value in zip(self.names, self.reported.read(), strict=False):
                logs[name if name not in logs else f"{self.gated.name}_{name}"] = value


def _not_a_part(gated: Any, model: Any) -> str:
    return (
        f"Follow({gated.name!r}): expected a gated model that is a part of the model whose `fit` "
        f"is given this callback; {type(model).__name__} {model.name!r} has none of its gates. "
        "Build that model around the gated one itself, not a copy: keras.Model(x, gated(x))."
    )


class OpenRates(keras.callbacks.Callback):
    """Records how open every gate is: before training and after each epoch.

    Attributes:
        history: group name -> list of float32 arrays of shape (units,), rates in [0, 1]; the
            first is the state before training. A second `fit` goes on where the first ended.

    Example:

        >>> rates = keras_polar.callbacks.OpenRates()
        >>> gated.fit(x, y, epochs=10, callbacks=[rates])
        >>> keras_polar.plots.open_rates(rates.history).savefig("open_rates.png")
    """

    def __init__(self) -> None:
        super().__init__()
        self.history: dict[str, list[np.ndarray]] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        if not self.history:
            self._record()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._record()

    def _record(self) -> None:
        for group in self.model.groups:
            self.history.setdefault(group.name, []).append(np.array(group.open_rates))
