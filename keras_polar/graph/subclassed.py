"""Subclassed networks as functional models: their `call` is one node, to be opened like a layer."""

import inspect
from collections.abc import Callable
from typing import Any

import keras

from keras_polar.graph.keras_private import functional, without_latest_call
from keras_polar.graph.symbolic.record import line_of, why


def as_functional(model: Any, input_shape: Any = None) -> Any:
    """A functional model that calls a subclassed one; any other model as it is.

    Args:
        input_shape: shape of one sample, or what `call` takes with shapes in the places of
            tensors; a `keras.Input` instead of a shape says the type as well. None for the shapes
            that the network was called on first, whatever the number of samples.

    Returns:
        The model itself if it is functional, or if nobody knows the shapes.

    Raises:
        TypeError: the network cannot be called on such tensors.
        ValueError: `input_shape` was given for a model that has inputs.
    """
    if not isinstance(model, keras.Model) or functional(model) is not None:
        _refuse_shape(model, input_shape)
        return model
    shapes = _called_on(model) if input_shape is None else {"": input_shape}
    if not shapes or (isinstance(model, keras.Sequential) and input_shape is None):
        return model
    inputs = {name: _map_shapes(_input, shape, name) for name, shape in shapes.items()}
    given = [inputs.pop("")] if "" in inputs else []
    try:
        outputs = model(*given, **inputs)
    except Exception as error:  # whatever the code of a network raises
        raise TypeError(_cannot_be_called(model, shapes, error)) from error
    whole = keras.Model(*given or [inputs], outputs, name=model.name)
    without_latest_call(model)
    return whole


def _refuse_shape(model: Any, input_shape: Any) -> None:
    if input_shape is not None:
        raise ValueError(
            f"input_shape={input_shape!r} is for subclassed networks; received a "
            f"{type(model).__name__}, which says its inputs itself. Leave it out."
        )


def _called_on(model: Any) -> dict[str, Any]:
    """Argument -> its shapes without the batch, "" for the first and only one; empty if unknown."""
    config = model.get_build_config() or {}
    found = config.get("shapes_dict") or {"_shape": config.get("input_shape")}
    return {
        name.removesuffix("_shape"): _map_shapes(lambda shape, _: tuple(shape[1:]), shapes)
        for name, shapes in found.items()
        if shapes is not None
    }


def _input(shape: tuple, name: str) -> Any:
    return keras.Input(tuple(shape), name=name or None)


def _map_shapes(function: Callable, shapes: Any, name: str = "") -> Any:
    """`function(shape, key)` of all shapes in a nested structure; what is a tensor already stays.

    Keras wants inputs in a dict to have the names of their keys.
    """
    if isinstance(shapes, keras.KerasTensor):
        return shapes
    if isinstance(shapes, dict):
        return {key: _map_shapes(function, value, key) for key, value in shapes.items()}
    if all(size is None or isinstance(size, int) for size in shapes):
        return function(shapes, name)
    mapped = [_map_shapes(function, value) for value in shapes]
    return mapped if isinstance(shapes, list) else tuple(mapped)  # Keras tracks what it remembers


def _cannot_be_called(model: Any, shapes: dict, error: Exception) -> str:
    shown = shapes.get("", shapes)
    takes = inspect.signature(type(model).call)
    return (
        f"{type(model).__name__} {model.name!r} cannot be made functional: called on symbolic "
        f"tensors of shapes {shown} (without the batch), it {why(error)}{line_of(model, error)}. "
        f"Expected a network whose `call{takes}` consists of layers and `keras.ops`. Give "
        "input_shape=keras.Input(shape, dtype=...) if it takes no floats; operations of a backend "
        "(tf., torch.) are to be written in keras.ops, and several arguments become one list."
    )
