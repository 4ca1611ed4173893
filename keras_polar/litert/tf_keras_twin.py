"""A Keras 3 model as the same tf_keras (Keras 2) model, which tensorflow-model-optimization takes.

Only what has an exact twin is translated; the two models are compared before anyone uses them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_polar.backends import full_precision, to_numpy
from keras_polar.graph.ir import Call, Graph, fill, refs_in
from keras_polar.graph.keras_private import op_class
from keras_polar.rules import trace_model
from keras_polar.surgery.certificate import random_inputs

TOLERANCE, TOLERANCE_HALF = 1e-4, 2e-2  # relative to the largest output

# Operations of keras.ops -> the class of tf_keras.layers and its settings.
_OPERATIONS = {
    op_class("Add"): ("Add", {}),
    op_class("Multiply"): ("Multiply", {}),
    op_class("Relu"): ("ReLU", {}),
    op_class("Relu6"): ("ReLU", {"max_value": 6.0}),
}
# What Keras 2 calls otherwise; leaving it out would be an error of numbers, not of names.
_RENAMED = {keras.layers.LeakyReLU: {"negative_slope": "alpha"}}
# Settings without a say in what a trained model computes. Regularizers go with them: what is left
# of the training is short, and their classes are other ones.
_TRAINING_ONLY = ("_initializer", "_regularizer", "_constraint")


def translated(model: Any) -> Any:
    """The tf_keras twin of a functional model, with its weights.

    Raises:
        TypeError: the model is not functional.
        ValueError: something in it has no twin, or the twin computes something else.
    """
    graph = trace_model(model)
    twin = _built(graph)
    _check_equal(model, twin)
    return twin


def _built(graph: Graph) -> Any:
    import tf_keras

    indices = refs_in(graph.inputs)
    inputs = {
        i: tf_keras.Input(batch_shape=graph.specs[i].shape, dtype=graph.specs[i].dtype, name=x.name)
        for i, x in zip(indices, graph.input_layers, strict=True)
    }
    values, twins = dict(inputs), {}
    for call in graph.calls:
        if id(call.op) not in twins:
            twins[id(call.op)] = _twin(call)
        outputs = twins[id(call.op)](_argument(call, values))
        _copy_weights(call, twins[id(call.op)])
        values.update(zip(call.outputs, keras.tree.flatten(outputs), strict=True))
    return tf_keras.Model(
        keras.tree.pack_sequence_as(graph.inputs, list(inputs.values())),
        fill(graph.outputs, values),
        name=graph.name,
    )


def _argument(call: Call, values: dict) -> Any:
    """What the twin is called on: a tensor or a list of tensors."""
    args = fill((*call.args, *(v for k, v in call.kwargs.items() if k != "training")), values)
    args = [x for x in args if x is not None]
    tensors = [values[i] for i in call.inputs]
    if len(keras.tree.flatten(args)) != len(tensors):
        raise ValueError(_no_twin(call, "it is called with more than tensors"))
    return tensors[0] if len(tensors) == 1 else tensors


def _twin(call: Call) -> Any:
    import tf_keras

    if type(call.op) in _OPERATIONS:
        name, config = _OPERATIONS[type(call.op)]
        return getattr(tf_keras.layers, name)(**config, name=call.name)
    is_stock = type(call.op) is getattr(keras.layers, type(call.op).__name__, None)
    twin_class = getattr(tf_keras.layers, type(call.op).__name__, None)
    if not is_stock or twin_class is None:
        raise ValueError(_no_twin(call, "tf_keras has no such layer"))
    return twin_class.from_config(_config(call, twin_class))


def _config(call: Call, twin_class: type) -> dict[str, Any]:
    # Fake quantization computes in float32: of a mixed precision that of the variables is left.
    config = call.op.get_config() | {"name": call.name, "dtype": call.op.variable_dtype}
    for old, new in _RENAMED.get(type(call.op), {}).items():
        config[new] = config.pop(old)
    config = {k: v for k, v in config.items() if not k.endswith(_TRAINING_ONLY)}
    unknown = set(config) - _accepted(twin_class)
    used = {k for k in unknown if config[k] not in (None, False)}
    if used:
        raise ValueError(_no_twin(call, f"tf_keras does not know its settings {sorted(used)}"))
    return {k: v for k, v in config.items() if k not in unknown}


def _accepted(layer_class: type) -> set[str]:
    import tf_keras

    names = {"name", "trainable", "dtype"}
    for base in layer_class.__mro__:
        if base is tf_keras.layers.Layer:
            break
        names |= set(inspect.signature(base.__init__).parameters)  # type: ignore[misc]
    return names


def _copy_weights(call: Call, twin: Any) -> None:
    weights = [to_numpy(v) for v in getattr(call.op, "weights", ())]
    shapes = [tuple(v.shape) for v in twin.weights]
    if [x.shape for x in weights] != shapes:
        raise ValueError(_no_twin(call, f"its weights in tf_keras have the shapes {shapes}"))
    if weights:
        twin.set_weights(weights)


def _no_twin(call: Call, why: str) -> str:
    return (
        f"quantize_aware: layer {call.path!r} ({type(call.op).__name__}) cannot be translated to "
        f"tf_keras: {why}. {FLOAT_PATH}"
    )


FLOAT_PATH = (
    "Quantize after training instead: "
    "`export_tflite(model, path, 'int8', representative_data=images)`."
)


@full_precision()
def _check_equal(model: Any, twin: Any) -> None:
    inputs = random_inputs(model)
    difference = _difference(model, twin, inputs)
    is_half = any("16" in layer.compute_dtype for layer in model.layers)
    tolerance = TOLERANCE_HALF if is_half else TOLERANCE
    if not difference <= tolerance:
        raise ValueError(
            f"quantize_aware: expected the tf_keras twin of {model.name!r} to equal it to "
            f"{tolerance:g} of the largest output; it differs by {difference:g}. {FLOAT_PATH}"
        )


def _difference(model: Any, twin: Any, inputs: Any) -> float:
    pairs = zip(*(_outputs(x, inputs) for x in (model, twin)), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in pairs)


def _outputs(model: Callable, inputs: Any) -> list[np.ndarray]:
    return [np.asarray(x, "float64") for x in keras.tree.flatten(model(inputs, training=False))]
