"""Every name of Keras that is not public, once, and what this library does with it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras import tree
from keras.src import backend
from keras.src.activations import activations
from keras.src.applications.convnext import LayerScale, StochasticDepth
from keras.src.applications.inception_resnet_v2 import CustomScaleLayer
from keras.src.backend.common import global_state
from keras.src.layers.layer import CallContext
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell
from keras.src.models.functional import Functional
from keras.src.ops import core, einops, image, linalg, math, nn
from keras.src.ops import numpy as keras_numpy
from keras.src.ops.function import Function, make_node_key
from keras.src.ops.node import KerasHistory
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils.backend_utils import DynamicBackend
from keras.src.utils.naming import to_snake_case
from keras.src.utils.tracking import TrackedDict, TrackedList, TrackedSet

# What has no public name, for the other modules.
__all__ = [
    "CallContext",
    "ConvLSTMCell",
    "CustomScaleLayer",
    "DynamicBackend",
    "Function",
    "Functional",
    "KerasSaveable",
    "LayerScale",
    "StochasticDepth",
    "TrackedDict",
    "TrackedList",
    "TrackedSet",
    "attended_axes",
    "backend",
    "call_on_symbols",
    "calls_in",
    "compute_loss_of",
    "core_of",
    "forget_losses",
    "functional",
    "global_state",
    "hand_on_masks",
    "has_parts",
    "is_from_keras",
    "is_fused_attention",
    "layers_of",
    "node_of",
    "nodes_in",
    "only_loss",
    "op_class",
    "own_variables",
    "parts_of_layer",
    "record_calls",
    "remembered_arguments",
    "scale_scores_alike",
    "source_of",
    "takes_training",
    "to_snake_case",
    "with_other_values",
    "without_latest_call",
    "without_metrics",
    "without_sharing",
]

OP_MODULES = (keras_numpy, nn, core, math, image, linalg, einops, activations)


def op_class(name: str) -> type:
    """The class behind a function of `keras.ops`: `op_class("Add")` is what `x + y` records."""
    for module in OP_MODULES:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"keras.ops has no operation class named {name!r}.")


def functional(model: Any) -> Any:
    """The functional core of a Functional or Sequential model; None for anything else."""
    if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        return model._functional if model.built else None
    is_plain = isinstance(model, Functional) and type(model).call is Functional.call
    return model if is_plain else None


def core_of(model: Any) -> Any:
    """The functional core of a Functional or built Sequential model; TypeError for others."""
    core_model = functional(model)
    if core_model is None:
        raise TypeError(_not_functional(model))
    return core_model


def _not_functional(model: Any) -> str:
    problem = f"Expected a functional or Sequential Keras model; received {type(model).__name__}"
    if isinstance(model, keras.Sequential) and not model.built:
        return (
            f"{problem} {model.name!r}, which has no input shape yet. Add `keras.Input(shape)` as "
            "its first layer, or call `model.build(input_shape)`."
        )
    if isinstance(model, keras.Model):
        return (
            f"{problem} {model.name!r}, whose `call` is Python code that cannot be rewritten. Make "
            "it functional: `x = keras.Input(shape); model = keras.Model(x, <layers called on x>)`."
            " If its `call` consists of layers and keras.ops, `apply` and `inspect` do that: for a "
            "network that has been called, or given input_shape=."
        )
    return f"{problem}. Pass a `keras.Model` built from `keras.Input` tensors."


def has_parts(op: Any) -> bool:
    """Whether a layer has sublayers."""
    return isinstance(op, keras.layers.Layer) and bool(op._layers)


def layers_of(op: Any) -> list:
    """A layer and all its sublayers, parents first.

    Setting `trainable` on a parent overwrites that of its children.
    """
    return list(op._flatten_layers())


def is_from_keras(op: Any) -> bool:
    """Whether the class of a layer or operation is one of Keras, or of this library."""
    return type(op).__module__.partition(".")[0] in ("keras", "keras_polar")


def parts_of_layer(layer: Any) -> list:
    """The sublayers of a layer, not those of its sublayers."""
    return [x for x in layer._layers if isinstance(x, keras.layers.Layer)]


def call_on_symbols(op: Any) -> tuple[tuple, dict] | None:
    """The arguments of the first call of an operation, on tensors that belong to no model."""
    if not op._inbound_nodes:
        return None
    arguments = op._inbound_nodes[0].arguments

    def free(x: Any) -> Any:
        return keras.KerasTensor(x.shape, x.dtype) if isinstance(x, keras.KerasTensor) else x

    args, kwargs = tree.map_structure(free, (arguments.args, arguments.kwargs))
    return args, kwargs


def remembered_arguments(op: Any) -> dict:
    """What an operation was made with, if that was nothing but numbers and words.

    Raises:
        KeyError: it was something else.
    """
    remembered = getattr(op, "_auto_config", None)
    if remembered is None:
        raise KeyError(op.name)
    return dict(remembered.config)


def hand_on_masks(layer: Any, args: tuple, kwargs: dict, outputs: Any) -> None:
    """Gives outputs the masks that Keras would give them in a call of the layer."""
    if getattr(layer, "supports_masking", False):  # operations have no masks
        first = [*args, *kwargs.values()][0]
        mask = kwargs.get("mask")
        before = tree.map_structure(backend.get_keras_mask, first) if mask is None else mask
        layer._set_mask_metadata(first, outputs, before)


def only_loss(layer: Any, loss: Any) -> None:
    """`layer.add_loss(loss)` that forgets what the same call has added before.

    Under tf.distribute the replicas run in threads that share the layer's list of losses. Called
    after the last synchronisation of a forward pass, this leaves each replica with its own.

    Keras adds it up with the loss of `compile`, which comes in `keras.config.floatx()`.
    """
    layer._losses.clear()
    layer.add_loss(keras.ops.cast(loss, keras.config.floatx()))


def forget_losses(layer: Any) -> None:
    """What a layer has added is another one's from now on, and is not counted twice.

    Keras on JAX tells whose a loss is by its id, whatever layer added it last, and remembers the
    ids of all steps that were ever traced.
    """
    for part in layers_of(layer):
        part._losses.clear()
        part._loss_ids.clear()


def compute_loss_of(model: Any, x: Any, **arguments: Any) -> tuple[Any, dict | None]:
    """The `compute_loss` of a model's class, apart from the losses that it is compiled with.

    Args:
        x: inputs of a batch.
        arguments: what else `compute_loss` takes: y, y_pred, sample_weight, training.

    Returns:
        The loss and None; or, where the class leaves it to the losses of `compile`, anything, and
        the arguments that these are called with instead of y, y_pred and sample_weight.
    """
    compared: list[dict] = []

    def compiled(y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        compared.append({"y": y, "y_pred": y_pred, "sample_weight": sample_weight})
        return keras.ops.zeros(())

    twin = object.__new__(type(model))
    vars(twin).update(vars(model))
    vars(twin).update(_compile_loss=compiled, _layers=[], _losses=[])
    loss = twin.compute_loss(x=x, **arguments)
    return loss, compared[0] if compared else None


def without_metrics(layer: Any) -> None:
    """The metrics that a layer and its parts own are no longer told to the models they are in."""
    for part in layers_of(layer):
        part._metrics.clear()


@contextlib.contextmanager
def without_sharing() -> Iterator[None]:
    """Makes objects from configs anew, and writes all of a config, also while Keras loads a file.

    Keras does that in a scope in which it takes what it has made once for what is written again.
    """
    names = [f"shared_objects/id_to_{x}_map" for x in ("obj", "config")]
    before = [global_state.get_global_attribute(name) for name in names]
    for name in names:
        global_state.set_global_attribute(name, None)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            global_state.set_global_attribute(name, value)


def takes_training(layer: Any) -> bool:
    """Whether the layer's `call` is told if it is training."""
    return getattr(layer, "_call_has_training_arg", False)


def own_variables(layer: Any) -> list:
    """The variables that a layer has made itself, not those of its sublayers."""
    return layer._trainable_variables + layer._non_trainable_variables


def attended_axes(attention: Any) -> tuple:
    """The axes of the values that each position of an attention layer attends to."""
    return getattr(attention, "_attention_axes", None) or (1,)


def is_fused_attention(attention: Any) -> bool:
    """Whether `ops.dot_product_attention` computes a MultiHeadAttention."""
    return not attention._dropout and len(attended_axes(attention)) == 1


def source_of(tensor: Any) -> tuple[Any, int, list]:
    """The operation that made a symbolic tensor, as which of its outputs, and of what tensors."""
    history = tensor._keras_history
    return history.operation, history.tensor_index, node_of(tensor).input_tensors


def node_of(tensor: Any) -> Any:
    """The call, a node of Keras' graph, that a symbolic tensor comes out of."""
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def calls_in(functions: list) -> list[tuple[Any, list]]:
    """The operations that functional models consist of, each with its calls there, in order.

    What makes the masks of their tensors is among them, though not in the models.
    """
    todo = [node for function in functions for node in nodes_in(function)]
    own, nodes = {id(node) for node in todo}, {}
    while todo:
        node = todo.pop()
        if id(node) not in nodes:
            nodes[id(node)] = node
            masks = [backend.get_keras_mask(x) for x in node.outputs]
            sources = () if id(node) in own else node.input_tensors
            todo += [node_of(x) for x in (*masks, *sources) if _is_made(x)]
    operations = {id(node.operation): node.operation for node in nodes.values()}
    return [(op, [n for n in op._inbound_nodes if id(n) in nodes]) for op in operations.values()]


def _is_made(tensor: Any) -> bool:
    return getattr(getattr(tensor, "_keras_history", None), "operation", None) is not None


def record_calls(calls: list[tuple[Any, list]], functions: list) -> None:
    """Lets operations know of calls, their outputs where they come from, and models what is theirs.

    Args:
        calls: like those of `calls_in`.
        functions: the models that these calls belong to.
    """
    for op, nodes in calls:
        for node in nodes:
            place = len(op._inbound_nodes)
            op._inbound_nodes.append(node)
            for i, x in enumerate(node.outputs):
                x._keras_history = KerasHistory(op, place, i)
    for function in functions:
        function._nodes = {
            make_node_key(n.operation, n.operation._inbound_nodes.index(n))
            for n in nodes_in(function)
        }


def nodes_in(function: Any) -> list:
    """The calls that a functional model consists of."""
    return [node for nodes in function._nodes_by_depth.values() for node in nodes]


def without_latest_call(op: Any) -> None:
    """Takes the graph node of the latest symbolic call away from an operation; its model has it."""
    del op._inbound_nodes[-1:]


def scale_scores_alike(source: Any, target: Any) -> bool:
    """Has attention divide its scores as another layer does; whether there is anything to divide.

    Stock layers divide by the root of the width of their own keys.
    """
    names = [n for n in ("_inverse_sqrt_key_dim", "_inverse_sqrt_head_dim") if n in vars(source)]
    for name in names:
        setattr(target, name, getattr(source, name))
    return bool(names)


def with_other_values(op: Any, **values: Any) -> Any:
    """The layer without its graph nodes, other attributes instead; everything else is shared."""
    new = object.__new__(type(op))
    vars(new).update(vars(op))
    vars(new).update(_inbound_nodes=[], _outbound_nodes=[], **values)
    return new
