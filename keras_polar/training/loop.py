"""What happens around Keras' own loop in `fit` of a gated model: schedule, switch, logs, monitors.

Two callbacks stand around those of the user. What begins, an epoch or a batch, begins with the
last of all: what the user's callbacks assign then is known to the network that trains. What ends
ends with the first: they find the gated model up to date.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import keras

from keras_polar.backends import CAN_COMPACT, Reported, to_numpy
from keras_polar.processes import require_agreement
from keras_polar.training.compaction import CannotCompact, Compaction

_BATCH_HOOKS = ("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end")


class Course:
    """The schedule of a gated model in one run, counted by the model's own training steps.

    Args:
        gated: the model.
        attach: makes sure that the model's variables hold the state of the run (Keras on JAX takes
            it out of them meanwhile).

    Attributes:
        total: steps of the whole run, those before it included; 0 while not known.
        before: steps done before this epoch.
    """

    def __init__(self, gated: Any, attach: Callable[[], Any]) -> None:
        self.gated, self.attach = gated, attach
        self.total = self.before = 0
        self.due: float = math.inf
        self.settled = False

    def begin_epoch(self) -> None:
        self.before = self.steps_done()
        self.settled = self.gated.settled
        if self.settled:
            self.gated.settle()  # all masks may have been set by hand: that ends the pressure

    def planned(self, steps: float | None) -> int:
        """Steps of the whole run, 0 if not known.

        Args:
            steps: those from this epoch to the run's end, if they are known.
        """
        if self.gated.consensus.schedule.steps:
            return self.gated.consensus.schedule.steps
        if steps:
            return self.before + round(steps)
        known = int(to_numpy(self.gated.consensus.steps))  # of the run that is resumed
        return known if self.before < known else 0

    def announce(self, total: int) -> None:
        self.total = total
        schedule = self.gated.consensus.schedule
        self.due = schedule.settle_step(total) if total else math.inf
        self.gated.consensus.steps.assign(float(total))

    def settle_if_due(self, done: float) -> bool:
        if done < self.due or self.settled:
            return False
        self.attach()
        self.gated.settle()
        self.settled = True
        return True

    def end_epoch(self, epoch: int, epochs: int) -> None:
        done = self.steps_done()
        self.gated.require_finite(f"in epoch {epoch + 1} (steps {self.before + 1} to {done})")
        is_news = not self.total
        if is_news:
            self.announce(done + (done - self.before) * (epochs - epoch - 1))
        if self.settle_if_due(done) and is_news:
            warnings.warn(
                "fit did not know how many steps there are before the first epoch was over: the "
                "gates are settled without having been pressed. Give `fit` steps_per_epoch, or "
                "`apply` schedule=keras_polar.Schedule(steps=n).",
                stacklevel=2,
            )

    def end(self) -> None:
        """Last of all callbacks: some put weights of an earlier epoch back when training ends."""
        if self.gated.settled:
            return
        if self.settled:
            warnings.warn(
                "fit ended with the weights of an epoch before the gates settled, which a callback "
                "has put back. They are settled now, and this sub-network has not been trained "
                "alone. Let that callback choose among the epochs after the settle step.",
                stacklevel=2,
            )
        elif self.gated.consensus.schedule.steps is None:
            warnings.warn(
                "fit ended before the schedule settled the gates (a callback stopped it, or the "
                "run was too short); they are settled now, and the sub-network has not been "
                "trained alone.",
                stacklevel=2,
            )
        else:
            return  # another `fit` goes on with the schedule
        self.gated.settle()

    def steps_done(self) -> int:
        return int(to_numpy(self.gated.consensus.step))


class Run:
    """One `fit` of a gated model, from the first epoch that it trains to the last.

    As a context manager it leaves the gated model for itself again, however the run ends.

    Args:
        gated: the model.
        callbacks: what the user gave `fit`.
        more: our own, to stand behind them.

    Attributes:
        callbacks: what `fit` is to be given instead.
        course: where the run stands in the schedule.
    """

    def __init__(self, gated: Any, callbacks: Any, more: Iterable[Any] = ()) -> None:
        self.gated = gated
        self.course = Course(gated, lambda: self.first.model)
        self.compaction: Compaction | None = None
        reported = list(gated.consensus.latest.items())
        self.names = [name for name, _ in reported]
        self.reported = Reported(gated, [variable for _, variable in reported])
        self.callbacks, self.theirs = self._around(callbacks, list(more))
        self.monitors = Monitors(self.theirs, is_fresh=not self.course.steps_done())
        may_compact = gated.consensus.compact and CAN_COMPACT
        self.may_compact = may_compact and not any(map(sees_batches, self.theirs))
        # Processes of JAX that trained networks of different sizes would wait for ever.
        fact = {"callbacks that may look at batches": not self.may_compact}
        require_agreement(fact, f"fit of {gated.name!r}")

    def _around(self, callbacks: Any, more: list) -> tuple[Any, list]:
        """The user's callbacks between the first and the last one, and they alone."""
        # Keras need not wait for the results of a step to call a hook that is said to be safe.
        # Nothing asks for `callback.model` between steps: Keras on JAX copies the state to answer.
        self.first = keras.callbacks.LambdaCallback(
            on_epoch_end=self.end_epoch,
            on_train_batch_end=lambda batch, logs: self._report(logs),
            on_test_begin=lambda logs: self.course.settle_if_due(self.course.steps_done()),
            async_safe=True,
        )
        self.last = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: self.begin_epoch(epoch),
            on_train_batch_begin=lambda batch, logs: self.begin_batch(batch),
            on_train_end=lambda logs: self.course.end(),
        )
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            theirs = [c for c in keras.tree.flatten(callbacks) if c is not None]
            return [self.first, *theirs, *more, self.last], theirs
        theirs = list(callbacks.callbacks)
        for callback in (self.first, *more, self.last):
            callback.set_model(self.gated)
            callback.set_params(callbacks.params)
        callbacks.callbacks[:] = [self.first, *theirs, *more, self.last]
        return callbacks, theirs

    def __enter__(self) -> "Run":
        self.gated.consensus.is_attended = True
        return self

    def __exit__(self, *error: Any) -> None:
        self.gated.consensus.is_attended = False
        self.gated.synchronize()
        self.reported.forget()
        self.monitors.release()
        if isinstance(self.callbacks, keras.callbacks.CallbackList):
            self.callbacks.callbacks[:] = self.theirs

    def begin_epoch(self, epoch: int) -> None:
        # Not when training begins: BackupAndRestore loads its state only then.
        course, steps = self.course, self.first.params.get("steps")
        course.begin_epoch()
        self.monitors.begin_epoch(course.settled)
        left = steps and steps * (self._epochs - epoch)
        course.announce(course.total or course.planned(left))
        self._compact()

    def begin_batch(self, batch: int) -> None:
        if self.course.settle_if_due(self.course.before + batch):
            self._compact()

    def end_epoch(self, epoch: int, logs: Any) -> None:
        """First of all callbacks, so that none saves a broken state over a good one."""
        self.gated.synchronize()
        self.course.end_epoch(epoch, self._epochs)
        self.monitors.end_epoch(epoch, self.course.settled)
        self._report(logs)

    @property
    def _epochs(self) -> int:
        return self.first.params.get("epochs", 1)

    def _compact(self) -> None:
        """A settled model is replaced by its sub-network until the epoch ends."""
        if self.course.settled and self.may_compact:
            try:
                self._enter()
            except CannotCompact as error:
                self.may_compact = False
                warnings.warn(f"fit goes on with the whole network: {error}.", stacklevel=2)
        self.reported.watch()

    def _enter(self) -> None:
        if self.compaction is None or not self.compaction.is_current:
            self.compaction = Compaction(self.gated)
        self.compaction.enter()

    def _report(self, logs: Any) -> None:
        """Puts into the logs of a step or an epoch what the gates are at."""
        if logs is not None:
            logs.update(zip(self.names, self.reported.read(), strict=False))


def sees_batches(callback: Any) -> bool:
    """Whether a callback may look at the model, or assign to it, between two steps.

    Keras' own do not, but to save it. Others say so by `async_safe = True`, Keras' word for hooks
    that may be called while the next step runs.
    """
    hooks = (getattr(callback, name, None) for name in _BATCH_HOOKS)
    modules = (getattr(hook, "__module__", None) or "" for hook in hooks)
    is_theirs = any(m.partition(".")[0] != "keras" for m in modules)
    return is_theirs and not getattr(callback, "async_safe", False)


class Monitors:
    """Callbacks that look for the best epoch, and which epochs they may choose from.

    An epoch before the settle step is that of another network than the one that is shipped.
    """

    def __init__(self, callbacks: Iterable[Any], is_fresh: bool) -> None:
        callbacks = list(callbacks)
        stops = [c for c in callbacks if isinstance(c, keras.callbacks.EarlyStopping)]
        self.first_epochs = [(c, c.start_from_epoch) for c in stops]
        # A checkpoint may have been given a value to beat; later it is that of an earlier `fit`.
        self.bests = [(c, c.best if is_fresh else None) for c in callbacks if _is_monitor(c)]
        self.tuners = [c for c in callbacks if _is_tuners(c)]
        self.was_settled = True

    def begin_epoch(self, settled: bool) -> None:
        self.was_settled = settled

    def end_epoch(self, epoch: int, settled: bool) -> None:
        """Before the callbacks themselves are told of the end of this epoch."""
        for stop, first in self.first_epochs:
            stop.start_from_epoch = first if settled else max(first, epoch + 1)
        if settled and not self.was_settled:
            self._start_anew()

    def _start_anew(self) -> None:
        for monitor, best in self.bests:
            monitor.best = best
            monitor.wait = 0  # of ReduceLROnPlateau
        for tuner in self.tuners:
            is_max = getattr(tuner.objective, "direction", "min") == "max"
            tuner.best_value = -math.inf if is_max else math.inf

    def release(self) -> None:
        for stop, first in self.first_epochs:
            stop.start_from_epoch = first


def _is_monitor(callback: Any) -> bool:
    kinds = (keras.callbacks.ModelCheckpoint, keras.callbacks.ReduceLROnPlateau)
    return isinstance(callback, kinds)


def _is_tuners(callback: Any) -> bool:
    """Whether it is KerasTuner's, which keeps the weights of the best epoch of a trial."""
    return hasattr(callback, "best_value") and hasattr(callback, "objective")
