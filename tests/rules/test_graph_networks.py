"""Graph networks: nodes and edges are rows of the first axis, units are on the last."""

import keras
import numpy as np
import pytest
from helpers import close_half, predicted, randomise
from keras import layers, ops

import keras_polar
from keras_polar.surgery.certificate import difference

NODES, EDGES = 12, 31
RNG = np.random.default_rng(0)
INPUTS = [
    RNG.standard_normal((NODES, 6)).astype("float32"),
    RNG.integers(0, NODES, EDGES).astype("int32"),
    np.sort(np.arange(EDGES) % NODES).astype("int32"),  # every node is told something
]


def network(combine, take=lambda x, i: ops.take(x, i, axis=0)):
    nodes = keras.Input((6,))
    source, target = (keras.Input((), dtype="int32") for _ in range(2))
    h = layers.Dense(16, activation="relu", name="nodes")(nodes)
    messages = layers.Dense(16, activation="relu", name="messages")(take(h, source))
    h = layers.Add()([layers.Dense(16, name="skip")(h), combine(messages, target)])
    return keras.Model([nodes, source, target], layers.Dense(2)(h))


@pytest.mark.parametrize("kind", ["sum", "max", "min", "prod"])
def test_messages_are_pruned_along_with_what_they_are_added_to(kind):
    if not hasattr(ops, f"segment_{kind}"):
        pytest.skip(f"this version of Keras has no segment_{kind}")
    segment = getattr(ops, f"segment_{kind}")
    model = randomise(network(lambda x, ids: segment(x, ids, num_segments=NODES)))
    rows = {r.name: r for r in keras_polar.inspect(model).rows}
    assert [rows[n].prunable for n in ("nodes", "messages", "skip")] == [16] * 3
    assert rows["messages"].group == rows["skip"].group
    gated = keras_polar.apply(model, 0.01, gate="dynamic", measure="units")
    # Rows of nodes and of edges are not the same samples: gates decide for all alike.
    assert not any(g._gate.per_sample for g in gated.groups if "messages" in g.layers)
    assert difference(model, gated, INPUTS) <= 1e-4
    close_half(gated)
    small = keras_polar.convert(gated, verify=INPUTS)
    counts = [int(g.mask.sum()) for g in gated.groups]
    assert predicted(model, counts, "weights") == keras_polar.cost(small).weights
    assert small.get_layer("messages").units == 8


def test_what_combines_or_picks_units_themselves_keeps_them():
    x = keras.Input(batch_shape=(7, 6))
    h = ops.transpose(layers.Dense(5, name="turned")(x))
    turned = keras.Model(x, ops.transpose(ops.segment_sum(h, np.array([0, 0, 1, 1, 2]), 3)))
    picks = keras.Input((), dtype="int32")
    h = layers.Dense(5, name="picked")(x)
    picked = keras.Model([x, picks], layers.Dense(2)(ops.take(ops.transpose(h), picks, axis=0)))
    for model in (turned, picked):
        row = keras_polar.inspect(model).rows[0]
        assert row.prunable == 0
        assert row.reason


def test_rows_of_a_position_axis_are_taken_by_computed_indices():
    x, index = keras.Input((7, 6)), keras.Input((), dtype="int32")
    h = ops.take(layers.Dense(8, name="before")(x), index, axis=1)
    model = randomise(keras.Model([x, index], layers.Dense(2)(h)))
    inputs = [RNG.standard_normal((5, 7, 6)).astype("float32"), np.array([3, 0, 1], "int32")]
    gated = keras_polar.apply(model, 0.01, measure="units")
    close_half(gated)
    assert keras_polar.convert(gated, verify=inputs).get_layer("before").units == 4


def test_a_graph_network_trains():
    model = network(lambda x, ids: ops.segment_sum(x, ids, num_segments=NODES))
    gated = keras_polar.apply(model, 0.3, schedule=keras_polar.Schedule(steps=10))
    gated.compile("adam", "mse")
    x = [INPUTS[0], *(np.arange(NODES, dtype="int32")[::d] for d in (1, -1))]
    for _ in range(10):
        gated.train_on_batch(x, np.ones((NODES, 2), "float32"))
    assert gated.settled
    assert gated.sparsity == pytest.approx(0.3, abs=0.05)
