"""Masks on the weights of a layer instead of on what it reads.

`(x * m) @ W` is the same as `x @ (m[:, None] * W)`, convolutions included: the layer is called with
that weight masked. There is no other way for units that live inside a layer (heads of an attention
layer, the state of an LSTM), where nothing stands between the maker and the reader. Elsewhere it is
cheaper, if all samples share the mask: a kernel is much smaller than a batch.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_polar.gates.gate import saved_as
from keras_polar.gates.stand_in import StandIn
from keras_polar.graph.clone import variable_at
from keras_polar.graph.keras_private import forget_losses


class Substituted(keras.StatelessScope):
    """Within it, variables have other values; whatever is assigned to them or to others, and
    losses that layers add, are collected: `updates` and `losses`.
    """

    def __init__(self, values: Sequence[tuple]) -> None:
        super().__init__(values, collect_losses=True, initialize_variables=False)
        self.updates: dict[int, tuple] = {}

    def __enter__(self) -> "Substituted":
        super().__enter__()
        if self.original_scope is not None:  # JAX trains in a stateless scope of its own
            for known, value in self.original_scope.state_mapping.items():
                self.state_mapping.setdefault(known, value)
        return self

    def add_update(self, update: tuple) -> None:
        super().add_update(update)
        self.updates[id(update[0])] = update


def masked_variables(layer: Any, masks: Sequence[tuple]) -> list[tuple]:
    """Pairs (variable, its value times its masks), as `Substituted` takes them.

    Args:
        masks: triples of the variable's attribute path, the axis, and a mask along it.
    """
    masked: dict[int, tuple] = {}
    for path, axis, mask in masks:
        variable = variable_at(layer, path)
        _, value = masked.get(id(variable), (variable, ops.convert_to_tensor(variable)))
        shape = [-1 if i == axis else 1 for i in range(len(value.shape))]
        masked[id(variable)] = variable, value * ops.cast(ops.reshape(mask, shape), value.dtype)
    return list(masked.values())


@saved_as("InnerMask")
class WeightMask(StandIn):
    """Calls a layer with some of its weights masked: closed units contribute nothing within it.

    Gates of shape (1, units) only: all samples share the weights.

    Args:
        layer: the layer, built.
        reads: lists `[variable, axis, index]`: the variable (an attribute path of the layer), the
            axis to be masked, and for every position along it the gate among the concatenated
            ones, or one past the end for units without a gate.
    """

    def __init__(self, layer: Any, reads: list, **kwargs: Any) -> None:
        super().__init__(layer, **kwargs)
        self.reads = reads

    def call(
        self,
        gates: list,
        *args: Any,
        options: dict | None = None,
        training: bool | None = None,
        **tensors: Any,
    ) -> Any:
        with Substituted(self._masked_variables(gates)) as scope:
            kwargs = {**tensors, **(options or {})}
            outputs = self.layer(*args, training=training, **kwargs)
        for variable, value in scope.updates.values():  # states of dropout, say
            variable.assign(value)
        forget_losses(self.layer)
        for loss in scope.losses:  # activity regularisers
            self.add_loss(loss)
        return outputs

    def _masked_variables(self, gates: list) -> list[tuple]:
        known = ops.concatenate([*gates, ops.ones_like(gates[0][:, :1])], axis=1)[0]
        masks = [
            (path, axis, ops.take(known, ops.convert_to_tensor(i, "int32")))
            for path, axis, i in self.reads
        ]
        return masked_variables(self.layer, masks)

    def get_config(self) -> dict:
        return {**super().get_config(), "reads": self.reads}
