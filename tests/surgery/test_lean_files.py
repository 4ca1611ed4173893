"""A converted network leaves nothing behind in its file: the same operations as a small one."""

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from helpers import randomise
from keras import layers

import keras_polar
from keras_polar.litert import export_tflite

FULL, HALF = (8, 16, 12), (4, 8, 6)  # channels of the groups
X = np.random.default_rng(0).normal(size=(16, 12, 12, 3)).astype("float32")


def network(widths):
    """Residual block, squeeze-and-excite, depthwise convolution; a width for each group."""
    stem, inner, top = widths

    def conv(x, width, size, name):
        x = layers.Conv2D(width, size, padding="same", use_bias=False, name=name)(x)
        return layers.BatchNormalization(name=f"{name}_bn")(x)

    inputs = keras.Input((12, 12, 3))
    x = layers.ReLU()(conv(inputs, stem, 3, "stem"))
    y = layers.ReLU(6.0)(conv(x, inner, 1, "expand"))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(y)
    y = layers.ReLU()(layers.BatchNormalization(name="depthwise_bn")(y))
    squeezed = layers.GlobalAveragePooling2D(keepdims=True)(y)
    y = y * layers.Conv2D(inner, 1, activation="sigmoid", name="excite")(squeezed)
    x = layers.Add()([x, conv(y, stem, 1, "project")])
    x = layers.ReLU()(conv(x, top, 3, "top"))
    return randomise(keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling2D()(x))))


def half_of(model):
    gated = keras_polar.apply(model, 0.1, measure="units")
    for group in gated.groups:
        group.set_mask(np.arange(group.units) % 2 == 0)
    return keras_polar.convert(gated)


def contents(path):
    """Names of the operations with the shapes of their tensors; the tensors that nothing uses."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    (graph,) = model.subgraphs
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}

    def shapes(indices):
        return [tuple(graph.tensors[i].shape) for i in indices if i >= 0]

    operations = [
        (names[model.operatorCodes[o.opcodeIndex].builtinCode], shapes(o.inputs), shapes(o.outputs))
        for o in graph.operators
    ]
    used = {i for o in graph.operators for i in (*o.inputs, *o.outputs)}
    unused = set(range(len(graph.tensors))) - used - {*graph.inputs, *graph.outputs}
    return operations, unused


@pytest.mark.parametrize("quantize", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_file_is_that_of_a_network_built_small(tmp_path, quantize):
    models = {"cut": half_of(network(FULL)), "built": network(HALF)}
    for name, model in models.items():
        export_tflite(model, tmp_path / f"{name}.tflite", quantize, representative_data=X)
    cut, built = (contents(tmp_path / f"{name}.tflite") for name in models)
    assert cut == built
    assert cut[1] == set()
    kinds = [name for name, _, _ in cut[0]]
    # Batch normalization is folded; gates, masks and the identity are gone.
    assert kinds.count("CONV_2D") == 5
    float_kinds = {"CONV_2D", "DEPTHWISE_CONV_2D", "MEAN", "LOGISTIC", "MUL", "ADD"}
    assert set(kinds) == float_kinds | {"FULLY_CONNECTED"}
