"""Importances that need data, and what an importance of your own can be made of.

`Taylor` and `Fisher` judge the units of a trained network by its loss. Nothing has to be trained
for it: the network is pruned in one shot, and trained afterwards as any other.

    gated = keras_polar.apply(trained, 0.5, importance=keras_polar.importances.Fisher(loss, x, y))
    gated.settle()
    small = keras_polar.convert(gated)

The functions give scores of a coupled network, as `Importance.scores` has to: one float array of
shape (units,) per group.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_polar.coupling.coupling import Coupling
from keras_polar.selection.importance import (
    Importance,
    at_random,
    batch_norm_scale,
    density,
    fisher,
    group_norm,
    l1_norm,
    taylor,
)
from keras_polar.training.probes import gate_gradients

__all__ = ["Fisher", "Taylor", "at_random", "batch_norm_scale", "density", "group_norm", "l1_norm"]


class OfGradients(Importance):
    """Scores made of what each sample's loss says about gates that are all 1; see `Taylor`."""

    is_free = True
    is_per_cost = True
    criterion: Callable[[Sequence[np.ndarray]], list[np.ndarray]]

    def __init__(
        self, loss: Callable[[Any, Any], Any], x: Any, y: Any, batch_size: int = 250
    ) -> None:
        self.loss, self.x, self.y, self.batch_size = loss, x, y, batch_size

    def scores(self, coupling: Coupling) -> list[np.ndarray]:
        gradients = gate_gradients(coupling, self.loss, self.x, self.y, self.batch_size)
        return type(self).criterion(gradients)


class Taylor(OfGradients):
    """How much the loss changes if a unit goes, to first order (Molchanov et al., 2017).

    The absolute gradient of a unit's gate, summed over samples. Units of all groups are compared,
    by that over what they save; `is_free = False` on the object gives every group the same share.

    Args:
        loss: (y, outputs) -> the loss of each sample, a tensor of shape (batch,), such as
            `keras.losses.sparse_categorical_crossentropy`.
        x: inputs as the model takes them, an array or a structure of arrays: some hundred samples
            of the training data, prepared as for training.
        y: what `loss` takes for them, an array or a structure of arrays.
        batch_size: samples at a time.

    Raises:
        ValueError: by `settle`, if units are masked for all samples at once (attention heads,
            hidden units of an LSTM): they have no gradients per sample. `ignore` their layers.

    Example:

        >>> loss = keras.losses.sparse_categorical_crossentropy
        >>> importance = keras_polar.importances.Taylor(loss, images[:500], labels[:500])
        >>> gated = keras_polar.apply(trained, 0.5, importance=importance)
        >>> gated.settle()
    """

    name = "taylor"
    criterion = staticmethod(taylor)


class Fisher(OfGradients):
    """What the loss rises by if a unit goes (Theis et al., 2018; Liu et al., 2021).

    The squared gradient of a unit's gate, summed over samples: the diagonal of the empirical
    Fisher information. All else is as `Taylor` has it.

    Example:

        >>> loss = keras.losses.sparse_categorical_crossentropy
        >>> importance = keras_polar.importances.Fisher(loss, images[:500], labels[:500])
        >>> gated = keras_polar.apply(trained, 0.5, importance=importance)
        >>> gated.settle()
    """

    name = "fisher"
    criterion = staticmethod(fisher)
