"""Many small .tflite files out of one conversion, which costs more than what it converts."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from keras_polar.litert.converter import quiet


def convert_each(models: Sequence[Any]) -> list[bytes]:
    """The .tflite file (float32) of each model; an empty one where nothing is computed.

    Args:
        models: functional models whose shapes are all fixed, the batch included.

    Raises:
        Exception: what the converter raises.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    content = _converted(models)
    whole = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    ends = iter(whole.subgraphs[0].outputs)
    files = []
    for model in models:
        part = _part(whole, [int(next(ends)) for _ in model.outputs])
        builder = flatbuffers.Builder(1024)
        if part is not None:
            builder.Finish(part.Pack(builder), b"TFL3")
        files.append(b"" if part is None else bytes(builder.Output()))
    return files


def _converted(models: Sequence[Any]) -> bytes:
    """One file that computes all of the models, side by side; outputs in order."""
    import tensorflow as tf
    from absl import logging

    def compute(*inputs: Any) -> list:
        left = iter(inputs)
        outputs = [m([next(left) for _ in m.inputs], training=False) for m in models]
        return tf.nest.flatten(outputs)

    specs = [tf.TensorSpec(x.shape, x.dtype) for m in models for x in m.inputs]
    with quiet():
        logging.set_verbosity(logging.ERROR)  # TensorFlow advises to go by way of a SavedModel
        # No SavedModel, as Keras exports: it takes several times as long and mixes up the outputs.
        function = tf.function(compute, autograph=False).get_concrete_function(*specs)
        return tf.lite.TFLiteConverter.from_concrete_functions([function], None).convert()


def _part(model: Any, outputs: list[int]) -> Any:
    """The file without what these outputs do not depend on; None if nothing is computed."""
    graph = model.subgraphs[0]
    operators = _needed(graph, outputs)
    if not operators:
        return None
    used = [t for o in operators for t in (*o.inputs, *o.outputs) if t >= 0]
    old = list(dict.fromkeys([*used, *outputs]))
    place = {t: i for i, t in enumerate(old)}
    subgraph = _with(
        graph,
        tensors=[_with(graph.tensors[t], buffer=i) for i, t in enumerate(old, 1)],
        operators=[_renumbered(o, place) for o in operators],
        inputs=[place[t] for t in graph.inputs if t in place],
        outputs=[place[t] for t in outputs],
    )
    # The first buffer is empty by definition.
    buffers = [model.buffers[0], *(model.buffers[graph.tensors[t].buffer] for t in old)]
    return _with(model, subgraphs=[subgraph], buffers=buffers, signatureDefs=[], metadata=[])


def _needed(graph: Any, outputs: Iterable[int]) -> list[Any]:
    """The operators that these tensors depend on, in order."""
    tensors, operators = set(outputs), []
    for operator in reversed(graph.operators):
        if not tensors.isdisjoint(operator.outputs):
            tensors.update(operator.inputs)
            operators.append(operator)
    return operators[::-1]


def _renumbered(operator: Any, place: dict[int, int]) -> Any:
    inputs = [place.get(t, -1) for t in operator.inputs]
    return _with(operator, inputs=inputs, outputs=[place[t] for t in operator.outputs])


def _with(record: Any, **changes: Any) -> Any:
    new = copy.copy(record)
    vars(new).update(changes)
    return new
