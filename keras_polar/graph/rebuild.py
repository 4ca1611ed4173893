"""From a graph to a functional model: how every new model of this library comes to be."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import tree

from keras_polar.graph.ir import Call, Graph, fill, refs_in

DEEPEST = 100_000  # nodes in a row


def new_inputs(graph: Graph) -> list:
    """Fresh `keras.Input` tensors with the names, shapes and dtypes of the graph's."""
    return [type(layer).from_config(layer.get_config()).output for layer in graph.input_layers]


def rebuild(
    graph: Graph,
    visit: Callable[[Call, dict[int, Any]], Any],
    model_class: Callable[..., Any],
    **kwargs: Any,
) -> Any:
    """A new model: `visit(call, values)` returns the outputs of each call in turn.

    Args:
        visit: gets the call and the tensors so far, keyed by the graph's tensor index.
        model_class: `keras.Model`, or whatever makes one of inputs, outputs and a name.
    """
    inputs = new_inputs(graph)
    values: dict[int, Any] = dict(zip(refs_in(graph.inputs), inputs, strict=True))
    said_sparse: set[int] = set()
    for call in graph.calls:
        for i in said_sparse.intersection(call.inputs) if _runs_its_call(call.op) else ():
            values[i] = keras.ops.cast(values[i], values[i].dtype)  # by Keras' word dense again
            said_sparse.remove(i)
        outputs = tree.flatten(visit(call, values))
        if not any(values[i].sparse for i in call.inputs):
            said_sparse.update(i for i, x in zip(call.outputs, outputs, strict=True) if x.sparse)
            _make_dense(outputs)
        values.update(zip(call.outputs, outputs, strict=True))
    struct = tree.pack_sequence_as(graph.inputs, inputs)
    with _deep_models_allowed():
        return model_class(struct, fill(graph.outputs, values), name=graph.name, **kwargs)


def _make_dense(outputs: list) -> None:
    """Keras says of a product of a dense tensor and a constant that it is sparse."""
    for x in outputs:
        x._sparse = False


def _runs_its_call(op: Any) -> bool:
    """Whether Keras runs the call of a layer to know its output: on a sparse tensor it may fail.

    It does so too when it loads a file, where nobody makes tensors dense.
    """
    names, plain = ("compute_output_spec", "compute_output_shape"), keras.layers.Layer
    is_layer = isinstance(op, plain)
    return is_layer and all(getattr(type(op), n) is getattr(plain, n) for n in names)


@contextlib.contextmanager
def _deep_models_allowed() -> Iterator[None]:
    """Room for Keras to walk a model recursively, one frame per node in a row.

    A model that Keras could just build must not fail once there is a mask in front of every layer.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, DEEPEST))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
