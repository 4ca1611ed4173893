"""A task of KerasHub around a smaller backbone.

What a task is made of besides its backbone (the preprocessor, a head) its constructor makes again
from its config; the weights of the head come from the small model.
"""

from typing import Any

import keras
from keras import tree

from keras_polar.graph.keras_private import layers_of, tensors_of_call
from keras_polar.rules import trace_model


def task_around(small: keras.Model, task: Any) -> Any:
    """A task of the same class as `task`, of which `small` is the smaller network.

    Raises:
        TypeError: `task` is not a task of KerasHub.
        ValueError: `small` does not have its backbone, or another head.
    """
    backbone = getattr(task, "backbone", None)
    if backbone is None or not hasattr(task, "preprocess_samples"):
        raise TypeError(
            "convert: expected into as the task of KerasHub that the gated model was made of, with "
            f"a `backbone`; received {type(task).__name__}."
        )
    new = _made_anew(task, _backbone_of(small, task))
    _copy_head(small, new)
    return new


def _backbone_of(small: keras.Model, task: Any) -> keras.Model:
    """The part of the small model that stands for the task's backbone."""
    outputs = tensors_of_call(task, task.backbone)
    if outputs is None:
        raise ValueError(
            f"convert: {type(task).__name__} {task.name!r} does not call its backbone as a whole, "
            "so that there is none to put a smaller one in place of. Leave `into` out."
        )
    found = tree.map_structure(lambda x: _tensor_in(small, task, x), outputs)
    if isinstance(found, dict):  # what nobody reads is not part of the network
        found = {k: x for k, x in found.items() if x is not None}
    if not found if isinstance(found, dict) else found is None:
        raise ValueError(
            f"convert: the output of the backbone of {task.name!r} is not among the layers of the "
            f"small model {small.name!r}. Expected `into` to be the task that the gated model was "
            "made of. Leave `into` out for the plain model."
        )
    small_backbone = keras.Model(small.input, found, name=task.backbone.name)
    small_backbone.dtype_policy = task.backbone.dtype_policy
    if hasattr(task.backbone, "data_format"):
        small_backbone.data_format = task.backbone.data_format
    return small_backbone


def _tensor_in(small: keras.Model, task: Any, tensor: Any) -> Any:
    """The tensor of the small model that stands for one of the task; None if there is none."""
    graph = trace_model(keras.Model(task.input, tensor))
    index = graph.outputs.index
    call = next((c for c in graph.calls if index in c.outputs), None)
    layer = next((x for x in small.operations if call is not None and x.name == call.name), None)
    if call is None or layer is None:
        return None
    return tree.flatten(layer.output)[call.outputs.index(index)]


def _made_anew(task: Any, backbone: keras.Model) -> Any:
    given = {"backbone": backbone, "preprocessor": task.preprocessor}
    config = {k: v for k, v in task.get_config().items() if k not in given}
    try:
        return type(task)(**config, **given)
    except Exception as error:  # whatever the code of a task raises
        raise ValueError(
            f"convert: {type(task).__name__} cannot be made around a backbone that is a plain "
            f"keras.Model: {error}. Leave `into` out for the plain model."
        ) from error


def _copy_head(small: keras.Model, new: Any) -> None:
    inside = {id(x) for x in layers_of(new.backbone)}
    by_name = {x.name: x for x in small.layers}
    for layer in new.layers:
        if id(layer) in inside or not layer.weights:
            continue
        source = by_name.get(layer.name)
        if source is None or _shapes(source) != _shapes(layer):
            raise ValueError(
                f"convert: layer {layer.name!r} of the head of {type(new).__name__} has lost units "
                "of its own, which its constructor makes anew. Keep them: keras_polar.apply(task, "
                f"ignore=[{layer.name!r}]). Or leave `into` out for the plain model."
            )
        layer.set_weights(source.get_weights())


def _shapes(layer: Any) -> list:
    return [tuple(w.shape) for w in layer.weights]
