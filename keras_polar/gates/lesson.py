"""The layer that asks the teacher, and adds to the losses how far its pupil is from it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops, tree

from keras_polar.gates.gate import PACKAGE
from keras_polar.graph.keras_private import forget_losses, layers_of, only_loss, without_metrics
from keras_polar.rules.registry import add
from keras_polar.rules.rule import PinRule

LogitsDistillation = keras.distillation.LogitsDistillation
FeatureDistillation = keras.distillation.FeatureDistillation
# Keras reads a single loss back from the configs of these two, but no dictionary of them.
_STOCK = {c.__name__: c for c in (LogitsDistillation, FeatureDistillation)}


@dataclass(frozen=True, eq=False)
class Comparison:
    """One loss, and what of pupil and teacher goes into it.

    Attributes:
        loss: of `keras.distillation`; gets lists where it compares several tensors.
        weight: what it is multiplied with.
        pupil, teacher: for every tensor that is compared, whether it is probabilities of which the
            loss is to see the logarithms.
    """

    loss: Any
    weight: float
    pupil: tuple[bool, ...]
    teacher: tuple[bool, ...]

    def __call__(self, pupil: list, teacher: list) -> Any:
        theirs = list(map(_as_logits, teacher, self.teacher))
        ours = list(map(_as_logits, pupil, self.pupil))
        if len(ours) == 1:
            theirs, ours = theirs[0], ours[0]
        return self.weight * self.loss.compute_loss(theirs, ours)

    def get_config(self) -> dict:
        return {
            "loss": _loss_config(self.loss),
            "weight": self.weight,
            "pupil": list(self.pupil),
            "teacher": list(self.teacher),
        }

    @classmethod
    def from_config(cls, config: dict) -> "Comparison":
        config = {**config, "loss": _loss_of(config["loss"])}
        return cls(
            config["loss"], config["weight"], *map(tuple, (config["pupil"], config["teacher"]))
        )


def _as_logits(x: Any, is_probabilities: bool) -> Any:
    # In float32: half precision has no room for the logarithms of small probabilities.
    x = ops.cast(x, "float32")
    return ops.log(ops.maximum(x, keras.config.epsilon())) if is_probabilities else x


def _loss_config(loss: Any) -> dict:
    if type(loss) not in _STOCK.values():
        return keras.saving.serialize_keras_object(loss)
    config = {**loss.get_config(), "loss": keras.saving.serialize_keras_object(loss.loss)}
    return {"stock": type(loss).__name__, "config": config}


def _loss_of(config: dict) -> Any:
    if "stock" not in config:
        return keras.saving.deserialize_keras_object(config)
    inner = config["config"]
    inner = {**inner, "loss": keras.saving.deserialize_keras_object(inner["loss"])}
    return _STOCK[config["stock"]](**inner)


@keras.saving.register_keras_serializable(PACKAGE)
class Lesson(keras.layers.Layer):
    """Adds what a frozen teacher says of a model's outputs; passes its first input through.

    Args:
        teacher: a functional model of the pupil's inputs, as a list, whose outputs are compared;
            its variables are frozen for good.
        comparisons: these take the pupil's tensors and the teacher's in
            order.
        every: only in every so many steps.
        passes: the name of the output that is passed through.

    Attributes:
        clock: says in which training step the model is; the gated model sets it. None for always.
    """

    clock: Callable | None = None

    def __init__(
        self,
        teacher: Any,
        comparisons: Iterable[Comparison],
        every: int,
        passes: str,
        **kwargs: Any,
    ) -> None:
        # What passes through keeps its type, and losses are computed in float32.
        super().__init__(autocast=False, **{**kwargs, "dtype": "float32", "trainable": False})
        self.teacher = frozen(teacher)
        self.comparisons = tuple(comparisons)
        self.every = every
        self.passes = passes
        self.supports_masking = True

    @property
    def trainable(self) -> bool:
        """False, whatever is said of all layers of a model at once."""
        return False

    @trainable.setter
    def trainable(self, value: bool) -> None:
        pass

    def build(self, *shapes: Any) -> None:
        pass

    def call(self, x: Any, pupil: list, inputs: list, training: bool = False) -> Any:
        if training:
            only_loss(self, self._in_turn(pupil, inputs))
        return x

    def _in_turn(self, pupil: list, inputs: list) -> Any:
        """The loss, or zero if it is not the teacher's turn."""
        if self.every == 1 or self.clock is None:
            return self.loss_of(pupil, inputs)
        is_due = ops.equal(ops.mod(self.clock(), float(self.every)), 0.0)
        return ops.cond(
            is_due,
            lambda: self.every * self.loss_of(pupil, inputs),
            lambda: ops.zeros((), "float32"),
        )

    def loss_of(self, pupil: list, inputs: list) -> Any:
        """How far the pupil's tensors are from the teacher's on these inputs, a float32 scalar."""
        taught = tree.flatten(self.teacher(list(inputs), training=False))
        forget_losses(self.teacher)
        taught = [ops.stop_gradient(x) for x in taught]
        total, start = ops.zeros((), "float32"), 0
        for comparison in self.comparisons:
            end = start + len(comparison.pupil)
            total = total + comparison(pupil[start:end], taught[start:end])
            start = end
        return total

    def compute_output_spec(self, x: Any, pupil: list, inputs: list, training: bool = False) -> Any:
        return keras.KerasTensor(x.shape, x.dtype)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return previous_mask

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "teacher": keras.saving.serialize_keras_object(self.teacher),
            "comparisons": [c.get_config() for c in self.comparisons],
            "every": self.every,
            "passes": self.passes,
        }

    @classmethod
    def from_config(cls, config: dict) -> "Lesson":
        teacher = keras.saving.deserialize_keras_object(config["teacher"])
        comparisons = map(Comparison.from_config, config["comparisons"])
        return cls(**{**config, "teacher": teacher, "comparisons": comparisons})


def frozen(model: Any) -> Any:
    """The model itself, never to be trained again, and silent about penalties and metrics."""
    model.trainable = False
    for layer in layers_of(model):
        layer.activity_regularizer = None
    without_metrics(model)
    return model


# It stays whole: its teacher is no part of the network that is pruned.
add(PinRule("belongs to the teacher"), Lesson)
