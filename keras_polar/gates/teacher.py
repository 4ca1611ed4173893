"""What a teacher is asked for: a network that is trained by nobody, and what is learned of it."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import keras

DistillationLoss = keras.distillation.DistillationLoss


@dataclass(frozen=True, eq=False)
class Teacher:
    """A network whose answers the gated model learns to give, besides those of the labels.

    `apply(model, teacher=model)` stands for `teacher=Teacher(model)`. What teaches is a frozen copy
    of the model as it is at the time of `apply`, in inference mode, before and after the gates have
    settled. Each training step then computes it forwards as well: about a third of the
    multiply-accumulates of a step without it, as long as the whole network trains. It is no part of
    what `evaluate` says, nor of the converted model. Weights of samples and classes do not weigh
    what it says.

    Args:
        model: a functional or built Sequential model without gates, with the inputs of the model
            that is taught. The very same model is the usual one.
        loss: a `keras.distillation` loss, or a list of them. None for `LogitsDistillation`, for all
            outputs. One loss given for several outputs counts for each of them. Outputs of a
            softmax are compared by their logarithms, which are logits. The layers that
            `FeatureDistillation` names keep all their units.
        weight: what the loss is multiplied with before it is added to the others; a list of
            numbers where there is a list of losses.
        every: only every so many steps the teacher is asked. Its loss counts `every` times as much
            then, so that it pulls as strongly on average.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a weight is negative or not finite, `every` < 1, or there are other numbers of
            losses and weights.

    Example:

        >>> loss = keras.distillation.LogitsDistillation(temperature=4.0)
        >>> teacher = keras_polar.Teacher(model, loss, weight=0.5, every=2)
        >>> gated = keras_polar.apply(model, 0.5, teacher=teacher)
    """

    model: Any
    loss: Any = None
    weight: Any = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.model, keras.Model):
            raise TypeError(f"Teacher: expected model as a keras.Model, received {self.model!r}.")
        for loss in self.losses:
            if not isinstance(loss, DistillationLoss):
                raise TypeError(
                    "Teacher: expected loss as a loss of keras.distillation, a list of them or "
                    f"None, received {loss!r}. Say LogitsDistillation(temperature=4.0), or "
                    "FeatureDistillation(loss='mse') for what is no logits."
                )
        self._check_weights()
        if not isinstance(self.every, numbers.Integral) or isinstance(self.every, bool):
            raise TypeError(f"Teacher: expected every as an int, received {self.every!r}.")
        if self.every < 1:
            raise ValueError(f"Teacher: expected every >= 1, received {self.every}.")

    def _check_weights(self) -> None:
        for weight in self.weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"Teacher: expected weight as a number, received {weight!r}.")
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"Teacher: expected weight >= 0 and finite, received {self.weight!r}."
                )
        if len(self.weights) != max(len(self.losses), 1):
            raise ValueError(
                f"Teacher: expected a weight for each of {max(len(self.losses), 1)} losses, "
                f"received weight={self.weight!r}."
            )

    @property
    def losses(self) -> list:
        """The losses that were given, in order; none for the default."""
        if self.loss is None:
            return []
        return [*self.loss] if isinstance(self.loss, (list, tuple)) else [self.loss]

    @property
    def weights(self) -> list:
        """One for each loss."""
        if isinstance(self.weight, (list, tuple)):
            return [*self.weight]
        return [self.weight] * max(len(self.losses), 1)
