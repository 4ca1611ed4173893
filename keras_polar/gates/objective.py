"""The losses that turn per-sample gates into one static sub-network, and their layer."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_polar.backends import global_mean, to_numpy
from keras_polar.costs.polynomial import Polynomial
from keras_polar.gates.gate import saved_as
from keras_polar.gates.listening import as_blocks, balance
from keras_polar.gates.schedule import Schedule
from keras_polar.graph.keras_private import only_loss
from keras_polar.selection.importance import CRITERIA, Importance


def polarization_loss(open_rates: Any, weights: Any) -> Any:
    """`sum_u w_u r_u (1 - r_u)`: zero exactly when all samples agree about every unit.

    Units about which they agree get no gradient. The formula's own, `w_u (1 - 2 r_u)`, would be
    largest there: it would push open units ever further open, and since `w_u` is smaller in wide
    groups, decide by the width of a group which units go.

    Args:
        open_rates: `r_u`, the mean over the batch of each unit's binary gate; shape (units,).
        weights: `w_u`, with a sum of 1; shape (units,).

    Returns:
        A scalar in [0, 1/4].
    """
    disagreement = open_rates * (1 - open_rates)
    agreed = ops.stop_gradient(disagreement) <= 0
    return ops.sum(ops.convert_to_tensor(weights) * ops.where(agreed, 0.0, disagreement))


# What an open unit is ahead of a closed one at the settle step, as a logarithm: units come and go
# by noise when nothing is decided yet, and no longer when everything is.
STAY = 2.0
APART = 0.01  # the logarithm by which the order of units decides where nothing else does


# What gates listen to when they decide themselves.
BY_GATES = ("logits", "gradients")


@saved_as("Consensus")
class PruningObjective(keras.layers.Layer):
    """Adds the polarization and sparsity losses of all gates; passes its first input through.

    The sparsity loss is a Lagrangian: `multiplier * (missing sparsity)`, where the multiplier
    grows with what is still missing and shrinks with what is too much.

    Args:
        sparsity: the requested share of the cost to be removed, in (0, 1).
        measure: "weights", "macs", "units" or "latency".
        cost: config of the `Polynomial` that gives the cost for open counts per group.
        groups: number of units of each group, by its name, in the order of the polynomial.
        schedule: config of the `Schedule`.
        round_to: what `settle` has to respect, for all groups or for each.
        compact: whether `fit` goes on with the smaller network once the consensus is settled.
        importance: what gates listen to, as `apply` has it.
        equal: names of groups that keep equally many units, for each such set.

    Attributes:
        criterion: the `Importance` that ranks units when the gates settle; None for the gates.
        latest: "sparsity" (expected, of the last training step) and "polarization" (1 if all
            samples agreed), scalar variables. `fit` puts them into its logs. They are no metrics:
            those are the user's, in the order that he compiled.
        listeners: for every group the gate's `log_damage`, `is_led_open`, and a setter of its
            `lead`; the gated model sets them. None of them where gates decide alone.
        is_attended: whether somebody announces the steps of the run and settles the gates in time.
        is_over: whether the gates have been settled, as far as can be known without a look at the
            variables: while Keras on JAX trains, they are empty.
        alarm: called in training steps that nobody attends to; the gated model sets it.
    """

    listeners: tuple = ()
    is_attended = is_over = False
    alarm: Callable[[], None] | None = None

    def __init__(
        self,
        sparsity: float,
        measure: str,
        cost: dict,
        groups: dict,
        schedule: dict,
        round_to: int | Sequence[int] | None = None,
        compact: bool = True,
        importance: str = "logits",
        equal: Sequence[Sequence[str]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)  # what passes through keeps its type
        self.sparsity = sparsity
        self.measure = measure
        self.cost = Polynomial.from_config(cost)
        self.groups = dict(groups)
        self.units = tuple(groups.values())
        # All groups weigh the same in the polarization loss, a branch as much as many channels.
        shares = [np.full(n, 1 / (n * len(self.units)), "float32") for n in self.units]
        self.shares = np.concatenate(shares)
        self.schedule = Schedule(**schedule)
        self.round_to = tuple(round_to) if isinstance(round_to, Sequence) else round_to
        self.compact = compact
        self.importance = importance
        self.equal = tuple(map(tuple, equal))
        self.criterion: Importance | None = CRITERIA.get(importance)
        self.supports_masking = True
        self.full_cost = self.cost(self.units)

    def build(self, *shapes: Any) -> None:
        self.step = self._state("step", 0)
        self.steps = self._state("steps", self.schedule.steps or 0)
        self.multiplier = self._state("multiplier", 0)
        self.settled = self._state("settled", 0)
        # All replicas of a tf.distribute strategy report the same.
        first = "only_first_replica"
        self.latest = {name: self._state(name, 0, first) for name in ("sparsity", "polarization")}

    def _state(self, name: str, value: float, aggregation: str = "mean") -> Any:
        return self.add_weight(
            (),
            keras.initializers.Constant(value),
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation=aggregation,
            name=name,
        )

    def call(self, x: Any, gates: list, training: bool = False) -> Any:
        if training:
            if self.alarm is not None and not (self.is_attended or self.is_over):
                self.alarm()
            local = [ops.mean(ops.cast(g, "float32"), axis=0) for g in gates]
            rates = global_mean(ops.concatenate(local))
            sparsity = self.expected_sparsity(rates)
            disagreement = polarization_loss(rates, self.shares)
            self._report(sparsity, 1 - 4 * disagreement)
            if self.listeners:
                self._lead(1 - self.pressure() * self.sparsity)
            self._press(sparsity, disagreement)
        return x

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(store)
        self.is_over = bool(to_numpy(self.settled) > 0.5)

    def _lead(self, target: Any) -> None:
        """Tells the gates which units are worth their cost when no more than `target` may stay.

        All compete in one currency: what closing a unit adds to the loss, over what it saves.
        """
        now = ops.concatenate([is_open() for _, is_open, _ in self.listeners])
        step = ops.convert_to_tensor(self.step)
        stay = STAY * ops.square(self.schedule.certainty(step, self.steps))
        saved = self.cost.slopes(self._counts(now), self.full_cost)
        of_units = ops.take(saved, self._groups(), axis=0)
        worth = ops.concatenate([log_damage(stay) for log_damage, _, _ in self.listeners])
        worth = worth - ops.log(ops.maximum(of_units, 1e-12))
        # Units that are worth the same (nothing, say) go one by one.
        order = np.linspace(0, APART, sum(self.units), dtype="float32")
        worth = self._tied(worth + ops.convert_to_tensor(order), saved)
        above = balance(worth, lambda kept: 1 - self.expected_sparsity(kept), target)
        ends = np.cumsum(self.units)
        for (_, _, tell), end, n in zip(self.listeners, ends, self.units, strict=True):
            tell(above[end - n : end])

    def _tied(self, worth: Any, saved: Any) -> Any:
        """The same, where units of groups that keep equally many go as blocks."""
        if not self.equal:
            return worth
        parts = ops.split(worth, np.cumsum(self.units)[:-1].tolist())
        for tied in self.tied:
            of_tied = ops.take(saved, np.asarray(tied, "int32"), axis=0)
            found = as_blocks([parts[i] for i in tied], of_tied)
            parts = [found[tied.index(i)] if i in tied else p for i, p in enumerate(parts)]
        return ops.concatenate(parts)

    @property
    def tied(self) -> tuple[tuple[int, ...], ...]:
        """Indices of groups that keep equally many units."""
        places = {name: i for i, name in enumerate(self.groups)}
        return tuple(tuple(places[name] for name in tied) for tied in self.equal)

    def _groups(self) -> Any:
        """Of all units, the group."""
        groups = np.repeat(np.arange(len(self.units)), self.units)
        return ops.convert_to_tensor(groups, "int32")

    def _counts(self, rates: Any) -> Any:
        return ops.segment_sum(rates, self._groups(), len(self.units))

    def _report(self, sparsity: Any, polarization: Any) -> None:
        self.latest["sparsity"].assign(sparsity)
        self.latest["polarization"].assign(polarization)

    def count_settled(self, sparsity: float) -> None:
        """A training step of the sub-network alone, to what is reported and counted."""
        self._report(sparsity, 1.0)
        self.step.assign(self.step + 1)

    def pressure(self) -> Any:
        """What the schedule says for the current step, a scalar in [0, 1]."""
        return self.schedule.pressure(ops.convert_to_tensor(self.step), self.steps)

    def expected_sparsity(self, open_rates: Any) -> Any:
        """Share of the cost that is gated away; `open_rates` of all groups, concatenated."""
        return 1 - self.cost.expected(self._counts(open_rates), self.full_cost)

    def _press(self, sparsity: Any, disagreement: Any) -> None:
        pressure = self.pressure() * (1 - self.settled)
        missing = pressure * self.sparsity - sparsity
        rate = self.schedule.rate / ops.maximum(self.steps, 1.0)
        grown = ops.maximum(self.multiplier + rate * ops.stop_gradient(missing), 0)
        self.multiplier.assign(ops.where(pressure > 0, grown, 0.0))
        sparsity_loss = ops.stop_gradient(grown) * ops.maximum(missing, 0)
        if self.listeners:  # the threshold meets the target
            sparsity_loss = 0.0
        polarization = self.schedule.polarization * disagreement
        self.step.assign(self.step + 1)
        # Last: assignments synchronise replicas, and a loss must come after that (see only_loss).
        only_loss(self, ops.where(pressure > 0, sparsity_loss + pressure * polarization, 0.0))

    def compute_output_spec(self, x: Any, gates: list, training: bool = False) -> Any:
        return keras.KerasTensor(x.shape, x.dtype)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return previous_mask

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "sparsity": self.sparsity,
            "measure": self.measure,
            "cost": self.cost.get_config(),
            "groups": dict(self.groups),
            "schedule": self.schedule.get_config(),
            "round_to": self.round_to,
            "compact": self.compact,
            "importance": self.importance,
            **({"equal": [list(tied) for tied in self.equal]} if self.equal else {}),
        }
