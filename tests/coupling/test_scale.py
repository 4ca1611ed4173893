"""Analysis stays small and near linear however deep the model is."""

import sys
import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from helpers import check, randomise
from keras import layers

from keras_polar.coupling.coupling import _make_rectangular, couple
from keras_polar.graph.rebuild import rebuild
from keras_polar.graph.trace import trace
from keras_polar.rules import trace_model
from keras_polar.rules.ids import Forest, Units


def buffers(coupling):
    """Bytes of every array that the id arrays of a model are views of, each once."""
    owners = {}
    for site in coupling.sites:
        for ids in (*site.inputs, *site.outputs, *site.axes.values()):
            while isinstance(ids.base, np.ndarray):
                ids = ids.base
            owners[id(ids)] = ids
    return sum(x.nbytes for x in owners.values())


def test_id_arrays_of_resnet50_are_views():
    model = keras.applications.ResNet50(weights=None, input_shape=(224, 224, 3))
    coupling = couple(trace_model(model))
    elements = sum(ids.size for site in coupling.sites for ids in site.outputs)
    assert elements > 30e6
    # One vector of int32 per layer that makes units, and little else.
    assert buffers(coupling) < 3 * 4 * len(coupling.roots)


def test_forest_agrees_with_a_search_of_connected_components():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 40))
        left, right = rng.integers(0, n, (2, int(rng.integers(0, 60)))).astype("int32")
        forest = Forest(np.arange(n, dtype=np.int32))
        half = len(left) // 2  # joined in two steps, with a look in between
        forest.join(left[:half], right[:half])
        forest.find(rng.integers(0, n, 3).astype("int32"))
        forest.join(left[half:], right[half:])
        assert forest.roots().tolist() == smallest_connected(n, left, right)


def smallest_connected(n, left, right):
    labels = list(range(n))
    for _ in range(n):
        for a, b in zip(left, right, strict=True):
            labels[a] = labels[b] = min(labels[a], labels[b])
    return labels


def test_forest_joins_a_long_chain_in_the_worst_order_quickly():
    n = 200_000
    forest = Forest(np.arange(n, dtype=np.int32))
    start = time.process_time()
    forest.join(np.arange(n - 1, dtype=np.int32)[::-1], np.arange(1, n, dtype=np.int32)[::-1])
    assert (forest.roots() == 0).all()
    assert time.process_time() - start < 5


def rectangular_seconds(n):
    """For `n` tensors of 4 x 4 units of their own, each of which has to be made rectangular."""
    units = Units()
    sites = tuple(SimpleNamespace(outputs=[units.fresh(16).reshape(1, 4, 4)]) for _ in range(n))
    start = time.process_time()
    _make_rectangular(sites, units)
    seconds = time.process_time() - start
    assert len(np.unique(units.roots())) == 4 * n
    return seconds


def test_making_many_tensors_rectangular_is_not_quadratic():
    rectangular_seconds(10)  # once for nothing: what happens at first use is no part of it
    # 8 times the tensors: 64 times the seconds were it quadratic.
    assert rectangular_seconds(3200) < 24 * rectangular_seconds(400)


def test_a_model_deeper_than_the_recursion_limit_can_be_rebuilt():
    """A mask before every layer doubles the depth, which Keras walks recursively."""
    inputs = x = keras.Input((2,))
    for _ in range(400):
        x = layers.ReLU()(x)
    graph = trace(keras.Model(inputs, x))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(380)
    try:
        with pytest.raises(RecursionError):
            keras.Model(inputs, x)
        rebuild(graph, lambda call, values: call.op(values[call.inputs[0]]), keras.Model)
        assert sys.getrecursionlimit() == 380
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.slow
def test_a_residual_net_of_a_thousand_layers_keeps_the_certificate():
    inputs = keras.Input((4,))
    x = layers.Dense(4)(inputs)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        for _ in range(333):
            x = layers.Add()([layers.Dense(4)(layers.Dense(4, activation="relu")(x)), x])
        check(randomise(keras.Model(inputs, layers.Dense(2)(x))))
    finally:
        sys.setrecursionlimit(limit)
