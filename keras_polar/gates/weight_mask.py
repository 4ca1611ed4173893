"""Masks on the weights of a layer instead of on what it reads.

`(x * m) @ W` is the same as `x @ (m[:, None] * W)`, convolutions included: the layer is called with
that weight masked. There is no other way for units that live inside a layer (heads of an attention
layer, the state of an LSTM), where nothing stands between the maker and the reader. Elsewhere it is
cheaper, if all samples share the mask: a kernel is much smaller than a batch.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops, tree

from keras_polar.gates.gate import saved_as
from keras_polar.graph.clone import variable_at
from keras_polar.graph.ir import Ref
from keras_polar.graph.keras_private import forget_losses, hand_on_masks


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
class WeightMask(keras.layers.Wrapper):
    """Calls a layer with some of its weights masked: closed units contribute nothing within it.

    It stands in the place of the layer, under the same name: what users read and set on the layer
    (`trainable`, `units`, `kernel`, `reset_state`), they read and set through it. Gates of shape
    (1, units) only: all samples share the weights.

    Args:
        layer: the layer, built.
        reads: lists `[variable, axis, index]`: the variable (an attribute path of the layer), the
            axis to be masked, and for every position along it the gate among the concatenated
            ones, or one past the end for units without a gate.
    """

    def __init__(self, layer: Any, reads: list, **kwargs: Any) -> None:
        options = {"name": layer.name, "dtype": layer.dtype_policy, **kwargs}
        super().__init__(layer, **options)
        self.reads = reads
        self.supports_masking = True

    @property
    def trainable(self) -> bool:
        """That of the layer: the wrapper has no variables, and no say in the matter, of its own."""
        return self.layer.trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self.layer.trainable = value

    def __getattr__(self, name: str) -> Any:
        with contextlib.suppress(AttributeError):  # PyTorch's modules find their parts by it
            return super().__getattr__(name)
        inside = _inside(self)
        if inside is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inside, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inside = _inside(self)
        is_own = name.startswith("_") or name in vars(self) or hasattr(type(self), name)
        if is_own or inside is None or name == "layer" or not hasattr(inside, name):
            super().__setattr__(name, value)
        else:
            setattr(inside, name, value)

    def build(self, *shapes: Any) -> None:
        """The layer is built already."""

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

    def compute_output_spec(
        self,
        gates: list,
        *args: Any,
        options: dict | None = None,
        training: Any = None,
        **tensors: Any,
    ) -> Any:
        outputs = self.layer.compute_output_spec(*args, **tensors, **(options or {}))
        hand_on_masks(self.layer, args, tensors, outputs)
        return outputs

    def compute_mask(self, *args: Any, **kwargs: Any) -> None:
        """None: the layer has set the masks of its outputs."""

    def get_config(self) -> dict:
        return {**super().get_config(), "reads": self.reads}


def _inside(wrapper: Any) -> Any:
    """The layer of a wrapper, None before it has one; asks for no attribute that may be missing."""
    own = vars(wrapper)
    return {**own.get("_modules", {}), **own}.get("layer")  # PyTorch keeps it among its modules


def pack(kwargs: dict) -> dict:
    """Keyword arguments of a layer as `WeightMask` takes them: without tensors as `options`.

    Keras does not allow tensors and other values side by side in arguments it has no names for.
    """
    tensors = {k: v for k, v in kwargs.items() if _has_tensors(v) or k == "training"}
    options = {k: v for k, v in kwargs.items() if k not in tensors and v is not None}
    return {**tensors, "options": options} if options else tensors


def unpack(kwargs: dict) -> dict:
    """The keyword arguments of the layer itself, from those of a call of its `WeightMask`."""
    return {**kwargs.get("options", {}), **{k: v for k, v in kwargs.items() if k != "options"}}


def _has_tensors(value: Any) -> bool:
    return any(isinstance(x, (keras.KerasTensor, Ref)) for x in tree.flatten(value))
