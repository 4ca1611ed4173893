"""A model in the form that LiteRT's converter takes: float32, recurrent layers without loops.

A copy computes the same function with variables of its own; the caller's model is not changed.
"""

from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_polar.graph.clone import clone, copy_weights
from keras_polar.graph.deepcopy import duplicate, is_other_float
from keras_polar.graph.ir import Call, Graph, fill
from keras_polar.graph.keras_private import layers_of
from keras_polar.graph.rebuild import rebuild
from keras_polar.graph.trace import trace

PRECISION = "float32"  # what LiteRT's float kernels compute in


def is_float32(core: Any) -> bool:
    """Whether a functional model computes in float32 throughout."""
    parts = [x for x in layers_of(core) if x is not core]
    dtypes = [d for x in parts for d in (x.compute_dtype, x.variable_dtype)]
    return not any(map(_is_other, (*dtypes, *(x.dtype for x in trace(core).specs))))


def has_loops(core: Any) -> bool:
    """Whether a model, or a layer, has recurrent layers that are not unrolled."""
    return any(not x.unroll for x in _recurrent(core))


def steps_of(core: Any) -> int:
    """How often the longest loop of the recurrent layers of a model runs; 0 if that is open."""
    graph = trace(core)
    looping = [c for c in graph.calls if _is_layer(c.op) and has_loops(c.op)]
    return max((_steps(call, graph) for call in looping), default=0)


def _steps(call: Call, graph: Graph) -> int:
    """As they were when the layers were built, which are inside of others; else those of the call.

    A nested model may have been built with an open size and be called with a fixed one.
    """
    built = [steps for x in _recurrent(call.op) if (steps := _steps_when_built(x))]
    called = (graph.specs[i].shape for i in call.inputs)
    return max(built or (s[1] or 0 for s in called if len(s) > 2), default=0)


def _steps_when_built(layer: Any) -> int | None:
    config = layer.get_build_config() or {}
    shape = config.get("input_shape") or config.get("shapes_dict", {}).get("sequences_shape")
    return shape[1] if shape else None


def twin(core: Any, *, unrolled: bool = False) -> keras.Model:
    """A copy of a functional model that computes in float32, with variables of its own.

    Args:
        unrolled: write the steps of recurrent layers out one by one.

    Raises:
        TypeError: a layer can neither be copied nor remade from its config.
        ValueError: the number of steps to be written out is open.
    """
    graph = trace(core)
    made: dict[int, Any] = {}

    def visit(call: Call, values: dict) -> Any:
        is_new = id(call.op) not in made
        if is_new:
            made[id(call.op)] = _copy(call, unrolled)
        op = made[id(call.op)]
        args, kwargs = fill(_as_float32((call.args, call.kwargs)), values)
        outputs = op(*args, **kwargs)
        if is_new:
            copy_weights(call.op, op, lambda _, value: value)
        return outputs

    new = rebuild(_with_inputs(graph), visit, keras.Model)
    for tensor, old in zip(new.inputs, core.inputs, strict=True):
        tensor.name = old.name  # that of an input without a name is not its layer's
    return new


def _is_layer(op: Any) -> bool:
    return isinstance(op, keras.layers.Layer)


def _recurrent(layer: Any) -> list[Any]:
    return [x for x in layers_of(layer) if isinstance(x, keras.layers.RNN)]


def _is_other(dtype: Any) -> bool:
    return is_other_float(dtype, PRECISION)


def _with_inputs(graph: Graph) -> Graph:
    """The graph with inputs of float32 where they are other floats."""
    layers = [_input_as_float32(x) if _is_other(x.dtype) else x for x in graph.input_layers]
    return replace(graph, input_layers=tuple(layers))


def _input_as_float32(layer: Any) -> Any:
    return type(layer).from_config({**layer.get_config(), "dtype": PRECISION})


def _copy(call: Call, unrolled: bool) -> Any:
    if not _is_layer(call.op):
        return clone(call.op, call.name, {}, False, **_names_of_floats(call.op))
    try:
        new = duplicate(call.op, call.name, PRECISION)
    except TypeError:
        new = clone(call.op, call.name, dtype=PRECISION)
    for part in _recurrent(new) if unrolled else ():
        part.unroll = True
    return new


def _names_of_floats(op: Any) -> dict[str, str]:
    """Attributes of a `keras.ops` node that name another float, as a cast has."""
    return {k: PRECISION for k, v in vars(op).items() if isinstance(v, str) and _is_other(v)}


def _as_float32(structure: Any) -> Any:
    """The arguments of a call, constants of other floats as float32."""

    def cast(leaf: Any) -> Any:
        is_array = isinstance(leaf, (np.ndarray, np.generic)) or keras.ops.is_tensor(leaf)
        return keras.ops.cast(leaf, PRECISION) if is_array and _is_other(leaf.dtype) else leaf

    return tree.map_structure(cast, structure)
