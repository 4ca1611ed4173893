"""What stands in the place of a layer or operation in a gated model: the same by the gates."""

import contextlib
from typing import Any

import keras
from keras import tree

from keras_polar.graph.ir import Ref
from keras_polar.graph.keras_private import hand_on_masks


class StandIn(keras.layers.Wrapper):
    """Called on gates and what a layer is called on, under the name of the layer.

    What users read and set on the layer (`trainable`, `units`, `kernel`, `reset_state`), they read
    and set through it.

    Args:
        layer: the layer, built; or an operation of `keras.ops`.
    """

    def __init__(self, layer: Any, **kwargs: Any) -> None:
        options = {"name": layer.name, "dtype": getattr(layer, "dtype_policy", None), **kwargs}
        keras.layers.Layer.__init__(self, **options)  # that of a Wrapper takes layers alone
        self.layer = layer
        self.supports_masking = True

    @property
    def trainable(self) -> bool:
        """That of the layer: the wrapper has no variables, and no say in the matter, of its own."""
        return getattr(inside_of(self), "trainable", True)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        if isinstance(inside_of(self), keras.layers.Layer):
            self.layer.trainable = value

    def __getattr__(self, name: str) -> Any:
        with contextlib.suppress(AttributeError):  # PyTorch's modules find their parts by it
            return super().__getattr__(name)
        inside = inside_of(self)
        if inside is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inside, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inside = inside_of(self)
        is_own = name.startswith("_") or name in vars(self) or hasattr(type(self), name)
        if is_own or inside is None or name == "layer" or not hasattr(inside, name):
            super().__setattr__(name, value)
        else:
            setattr(inside, name, value)

    def build(self, *shapes: Any) -> None:
        """The layer is built already."""

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


def inside_of(wrapper: Any) -> Any:
    """The layer of a wrapper, None before it has one; asks for no attribute that may be missing."""
    own = vars(wrapper)
    return {**own.get("_modules", {}), **own}.get("layer")  # PyTorch keeps it among its modules


def pack(kwargs: dict) -> dict:
    """Keyword arguments of a layer as a `StandIn` takes them: without tensors as `options`.

    Keras does not allow tensors and other values side by side in arguments it has no names for.
    """
    tensors = {k: v for k, v in kwargs.items() if _has_tensors(v) or k == "training"}
    options = {k: v for k, v in kwargs.items() if k not in tensors and v is not None}
    return {**tensors, "options": options} if options else tensors


def unpack(kwargs: dict) -> dict:
    """The keyword arguments of the layer itself, from those of a call of its `StandIn`."""
    return {**kwargs.get("options", {}), **{k: v for k, v in kwargs.items() if k != "options"}}


def _has_tensors(value: Any) -> bool:
    return any(isinstance(x, (keras.KerasTensor, Ref)) for x in tree.flatten(value))
