"""The mask in front of those who read gated units."""

from typing import Any

import keras
from keras import ops

from keras_polar.gates.gate import PACKAGE


def gates_along(gates: list, index: list | None, axis: int | None, ndim: int) -> Any:
    """The gates of a tensor of `ndim` axes, to be broadcast against it; see `Mask`."""
    gate = gates[0] if index is None else _arranged(gates, index)
    shape = [1] * ndim
    shape[0] = -1
    if axis is not None:
        shape[axis] = gate.shape[1]
    return ops.reshape(gate, shape)


def _arranged(gates: list, index: list) -> Any:
    one = ops.ones_like(gates[0][:, :1])
    # Gates of one model have a batch axis or not all alike, but for those without an input.
    rows = max((g for g in [*gates, one]), key=lambda g: g.shape[0] != 1)
    wide = [ops.broadcast_to(g, (ops.shape(rows)[0], g.shape[1])) for g in [*gates, one]]
    # With its type: on JAX, Keras makes floats of whole numbers where floatx is bfloat16.
    places = ops.convert_to_tensor(index, "int32")
    return ops.take(ops.concatenate(wide, axis=1), places, axis=1)


@keras.saving.register_keras_serializable(PACKAGE)
class Mask(keras.layers.Layer):
    """Multiplies the units of a tensor by their gates: closed units arrive as zeros.

    Args:
        axis: the axis of the tensor that the units are on; None if all of it is one unit.
        index: for every position along `axis`, the gate among the concatenated ones, or one past
            the end for units without a gate; None where the one gate fits as it is.
    """

    # axis has a default as the .h5 format of Keras leaves out an axis that is None.
    def __init__(self, axis: int | None = None, index: list | None = None, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # what passes through keeps its type
        self.axis = axis
        self.index = index
        self.supports_masking = True

    def call(self, x: Any, gates: list) -> Any:
        gate = ops.cast(gates_along(gates, self.index, self.axis, len(x.shape)), x.dtype)
        return ops.logical_and(x, gate) if gate.dtype == "bool" else x * gate

    def compute_output_spec(self, x: Any, gates: list) -> Any:
        return keras.KerasTensor(x.shape, x.dtype)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return previous_mask

    def get_config(self) -> dict:
        return {**super().get_config(), "axis": self.axis, "index": self.index}
