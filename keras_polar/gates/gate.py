"""Binary gates: who decides about a unit, and the mask in front of those who read it.

The forward pass uses hard 0/1 gates, the backward pass the slope of a sigmoid (straight-through).
A static gate has one logit per unit; a dynamic gate decides per sample, from the average of the
input of the layer that makes the units (Zhi et al., arXiv 2302.10798; the formulas are ours).
Another kind is a subclass that says what its logits are.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_polar.backends import replicas
from keras_polar.gates.listening import listen, log_damage

PACKAGE = "keras_polar"
# Logits are this much larger than the variables behind them: gates have far fewer steps than
# weights to go from open to closed, under any optimiser.
GAIN = 10.0
OPEN = 2.0  # initial logit: sigmoid(2) = 0.88
MOMENTUM = 0.95  # of the moving averages of the gates
HEARD = 0.05  # rate of the moving averages of what the loss says
SETTLING = 0.3  # rate of the open rates of gates that are led
# Of the logits of such gates at full pressure, by the logarithm of what a unit is worth.
SLOPE = 40.0
# What decides about units, whatever floats the model computes in: in halves the small steps of
# logits and averages would be lost.
FLOAT32 = {"dtype": "float32", "autocast": False}


def saved_as(name: str) -> Callable:
    """Registers a class with Keras under a name that is not its own: that of files of before.

    Keras looks for a layer's weights under the class's `__name__`.
    """

    def register(saved: type) -> type:
        saved.__name__ = name
        return keras.saving.register_keras_serializable(PACKAGE)(saved)

    return register


def hard_step(logits: Any, soft_of: Callable = ops.sigmoid) -> Any:
    """0/1 forward, the gradient of `soft_of(logits)` backward."""
    soft = soft_of(logits)
    hard = ops.cast(logits > 0, soft.dtype)
    return soft + ops.stop_gradient(hard - soft)


def consensus(open_rates: Any, min_units: int) -> Any:
    """0/1 per unit: open for most samples, and at least the `min_units` most open ones."""
    return ops.maximum(ops.cast(open_rates >= 0.5, "float32"), most_open(open_rates, min_units))


def most_open(scores: Any, count: int) -> Any:
    """0/1 per unit, 1 for the `count` units with the highest scores, and their equals."""
    if not count:
        return ops.zeros_like(scores)
    return ops.cast(scores >= ops.top_k(scores, count)[0][-1], scores.dtype)


@keras.saving.register_keras_serializable(PACKAGE)
class Gate(keras.layers.Layer):
    """Decides about the units of one group; static: one logit per unit, whatever the input.

    In training it returns hard gates and keeps moving averages of how open each unit is; in
    inference, and once settled, it returns the consensus of shape (1, units). In warm-up it learns
    nothing, so that all units are open: what the loss says of units then is mostly noise.

    `apply(model, gate=...)` takes one without units, and makes one like it for every group: what it
    tells each is `units` to `listens` below. A subclass says what its logits are, by `logits` and,
    if it has variables, `build_logits`. It hands `**kwargs` on, has its own arguments in
    `get_config`, and is registered with Keras, so that saved models load.

    Args:
        units: number of units; 0 for one that stands for those of all groups.
        group: name of the group.
        layers: names of the layers that produce the units; of a residual branch, those in it.
        members: layer -> for each unit it makes, its place among those of the gate or -1; None
            for all in order. Empty for a branch, which is a single unit.
        min_units: units that the consensus always leaves open.
        axis: the channel axis of the input (dynamic gates average over all others).
        listens: whether it keeps the squares of its gradients, and is led by what they say (see
            `keras_polar.gates.listening`), instead of by its own logits alone: those of "samples",
            for which it has a gate each, or of a "batch", or none.
        gain: how many times larger logits are than the variables behind them. Gates have far fewer
            steps than weights to go from open to closed; the larger, the sooner they do.
        initial_logit: logits begin here, above zero: open. The larger, the longer they stay so.

    Raises:
        ValueError: `gain` or `initial_logit` is not a finite number above zero.

    Attributes:
        per_sample: whether it has logits for each sample. Units that are masked for all samples at
            once (those of attention heads, on the weights) get a static gate instead of such a one.
        pressure: returns that of the schedule, 0 in warm-up to 1; the gated model sets it. None
            stands for 1.

    Example:

        >>> gated = keras_polar.apply(model, 0.5, gate=keras_polar.Gate(gain=5.0))
    """

    per_sample = False
    pressure: Callable | None = None

    def __init__(
        self,
        units: int = 0,
        group: str = "",
        layers: Sequence[str] = (),
        members: dict | None = None,
        min_units: int = 1,
        axis: int = -1,
        listens: str | None = None,
        gain: float = GAIN,
        initial_logit: float = OPEN,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)  # what it looks at keeps its precision
        self.gain = _above_zero(self, "gain", gain)
        self.initial_logit = _above_zero(self, "initial_logit", initial_logit)
        self.units = units
        self.group = group
        self.producers = tuple(layers)
        self.members = members or {}
        self.min_units = min_units
        self.axis = axis
        self.listens = listens

    def build(self, input_shape: tuple) -> None:
        if not self.units:
            raise ValueError(
                f"{type(self).__name__} {self.name!r} has no units. Expected a gate that is handed "
                "to keras_polar.apply(model, gate=...), which makes one like it for each group; an "
                "`__init__` of one's own hands `**kwargs` on to `super().__init__`."
            )
        self.build_logits(input_shape)
        self.open_rates = self._state("open_rates", "ones", (self.units,))
        self.scores = self._state("scores", "ones", (self.units,))
        self.settled_mask = self._state("settled_mask", "ones", (self.units,))
        self.settled = self._state("settled", "zeros", ())
        if self.listens:
            self.lead = self._state("lead", "zeros", (self.units,))
            options = {"overwrite_with_gradient": True, "aggregation": "mean"}
            rows = 1 if self.listens == "samples" else 2
            self.heard = self.add_weight((rows, self.units), "zeros", name="importance", **options)

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        return super().add_weight(*args, **{**FLOAT32, **kwargs})

    def _state(self, name: str, initializer: str, shape: tuple) -> Any:
        # aggregation: over the replicas of a tf.distribute strategy
        options = {"trainable": False, "aggregation": "mean"}
        return self.add_weight(shape, initializer, name=name, **options)

    def build_logits(self, input_shape: tuple) -> None:
        """Makes the variables behind the logits, float32 in any policy; here one bias per unit.

        Args:
            input_shape: of what `logits` looks at.
        """
        start = keras.initializers.Constant(self.initial_logit / self.gain)
        self.bias = self.add_weight((self.units,), start, name="bias")

    def logits(self, x: Any) -> Any:
        """The logits of a training step; units are open where they are above zero.

        Args:
            x: the input of the layer that makes the units; its channels are on `axis`.

        Returns:
            Floats of shape (1, units), or (batch, units) if the gate decides per sample.
        """
        return self.gain * ops.convert_to_tensor(self.bias)[None]

    def call(self, x: Any, training: bool = False) -> Any:
        if not training:
            return ops.cast(self.consensus()[None], self.compute_dtype)
        logits = self._led(self._pressed(self._checked(self.logits(x))))
        gates = self._with_floor(hard_step(logits))
        self._observe(gates, ops.sigmoid(logits))
        gates = self._listened(gates, x)
        settled = ops.cast(self.settled, "float32")
        fixed = ops.convert_to_tensor(self.settled_mask)
        return ops.cast(settled * fixed + (1 - settled) * gates, self.compute_dtype)

    def _checked(self, logits: Any) -> Any:
        """Masks broadcast: by logits of a wrong shape they would be wrong without a word."""
        shape = tuple(logits.shape)
        if shape[1:] != (self.units,) or not (self.per_sample or shape[0] == 1):
            rows = "batch or 1" if self.per_sample else "1"
            raise ValueError(
                f"{type(self).__name__} {self.name!r}: expected logits of shape ({rows}, "
                f"{self.units}), one for each unit, received {shape}. A gate that decides for each "
                "sample says so by `per_sample = True` in its class."
            )
        return ops.cast(logits, "float32")

    def _with_floor(self, gates: Any) -> Any:
        """The units that have been most open stay so for all samples: no group ever collapses."""
        openness = self.lead if self.listens else self.scores
        floor = most_open(ops.convert_to_tensor(openness), self.min_units)
        return gates + ops.stop_gradient(ops.maximum(gates, floor) - gates)

    def _pressed(self, logits: Any) -> Any:
        """The same logits, with a gradient in proportion to the pressure."""
        if self.pressure is None:
            return logits
        still = ops.stop_gradient(logits)
        return still + self.pressure() * (logits - still)

    def _led(self, logits: Any) -> Any:
        """Under pressure, logits by what the loss says of the units; own ones are added to that."""
        if not self.listens:
            return logits
        pressure = ops.cast(1.0 if self.pressure is None else self.pressure(), "float32")
        lead = SLOPE * pressure * ops.convert_to_tensor(self.lead)
        return logits - self.initial_logit + ops.where(pressure > 0, lead, self.initial_logit)

    def _listened(self, gates: Any, x: Any) -> Any:
        if not self.listens:
            return gates
        samples = ops.shape(x)[0]
        if self.listens == "samples":
            gates = ops.broadcast_to(gates, (samples, self.units))
        rate = HEARD * (1 - ops.cast(self.settled, "float32"))
        count = replicas() * ops.cast(samples, "float32")
        return listen(gates, ops.convert_to_tensor(self.heard), count, rate)

    def log_damage(self, stay: Any = 0.0) -> Any:
        """Logarithm of what closing each unit adds to the loss, infinite where it has to stay.

        Args:
            stay: what open units are ahead of closed ones.
        """
        heard = ops.stop_gradient(ops.convert_to_tensor(self.heard))
        logs = log_damage(heard[0]) + stay * self.is_led_open()
        return ops.where(most_open(logs, self.min_units) > 0, float("inf"), logs)

    def is_led_open(self) -> Any:
        """0/1 per unit; all 1 as long as nothing has been told."""
        return ops.cast(ops.convert_to_tensor(self.lead) >= 0, "float32")

    def consensus(self) -> Any:
        """0/1 per unit, float32 of shape (units,): what inference uses."""
        free = consensus(ops.convert_to_tensor(self.open_rates), self.min_units)
        fixed = ops.convert_to_tensor(self.settled_mask)  # JAX wants no variables here
        return ops.where(self.settled > 0.5, fixed, free)

    def _observe(self, gates: Any, soft: Any) -> None:
        for state, now in ((self.open_rates, gates), (self.scores, soft)):
            rate = SETTLING if self.listens else 1 - MOMENTUM
            rate = rate * (1 - self.settled)  # settled gates are history
            state.assign(state + rate * (ops.stop_gradient(ops.mean(now, axis=0)) - state))

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        is_each = self.per_sample or self.listens == "samples"
        return (input_shape[0] if is_each else 1, self.units)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        return None

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "units": self.units,
            "group": self.group,
            "layers": list(self.producers),
            "members": self.members,
            "min_units": self.min_units,
            "axis": self.axis,
            **({"listens": self.listens} if self.listens else {}),
            **({"gain": self.gain} if self.gain != GAIN else {}),
            **({"initial_logit": self.initial_logit} if self.initial_logit != OPEN else {}),
        }


def _above_zero(gate: Gate, name: str, value: Any) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):
        raise ValueError(
            f"{type(gate).__name__}: expected {name} as a finite number above zero, received "
            f"{value!r}."
        )
    return float(value)


@keras.saving.register_keras_serializable(PACKAGE)
class DynamicGate(Gate):
    """A gate that looks at each sample: average the input over all positions, normalise, map.

    Example:

        >>> gated = keras_polar.apply(model, 0.5, gate=keras_polar.DynamicGate(initial_logit=3.0))
    """

    per_sample = True

    def build_logits(self, input_shape: tuple) -> None:
        super().build_logits(input_shape)
        shape = (input_shape[self.axis], self.units)
        small = keras.initializers.RandomNormal(stddev=0.1 / self.gain)
        self.kernel = self.add_weight(shape, small, name="kernel")

    def logits(self, x: Any) -> Any:
        # The gate learns from the features, the features do not learn to please the gate; that
        # also saves the backward pass through the average.
        x = ops.cast(ops.stop_gradient(x), "float32")
        axis = self.axis % len(x.shape)
        x = ops.mean(x, axis=[i for i in range(1, len(x.shape)) if i != axis])
        centred = x - ops.mean(x, axis=-1, keepdims=True)
        scale = ops.rsqrt(ops.mean(ops.square(centred), axis=-1, keepdims=True) + 1e-5)
        root = math.sqrt(x.shape[-1])
        return super().logits(x) + self.gain * ops.matmul(centred * scale, self.kernel) / root
