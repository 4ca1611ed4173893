"""Subclassed networks: what their `call` does is followed, or said with the line in the way."""

import keras
import numpy as np
import pytest
from helpers import check, check_loads_alone, close_half, predicted, randomise
from keras import layers, ops

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.graph.subclassed import as_functional
from keras_polar.surgery.certificate import difference

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).standard_normal((5, 6)).astype("float32")


class Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(8, activation="relu", name="first")
        self.drop = layers.Dropout(0.5)
        self.norm = layers.BatchNormalization()
        self.last = layers.Dense(3, name="last")

    def features(self, x):
        return self.norm(self.drop(self.first(x)))

    def call(self, x):
        return self.last(self.features(x))


class PassesMode(Net):
    def call(self, x, training=False):
        return self.last(self.norm(self.drop(self.first(x), training=training), training=training))


class Scaled(Net):
    """A layer scale, an offset for all and a temperature, used in every way around."""

    def __init__(self):
        super().__init__()
        self.gamma = self.add_weight(
            (8,), "ones", name="gamma", regularizer=keras.regularizers.L2()
        )
        self.beta = self.add_weight((1, 8), "zeros", name="beta")
        self.temperature = self.add_weight((1,), "ones", name="temperature")

    def call(self, x):
        h = ops.add(self.gamma * self.features(x), self.beta)
        return self.last(h * self.gamma) / self.temperature


class Placed(keras.Model):
    """Positions with vectors of their own, as many axes as the tokens have, or one fewer."""

    def __init__(self):
        super().__init__()
        self.positions = self.add_weight((1, 4, 8), "ones", name="positions")
        self.again = self.add_weight((4, 8), "ones", name="again")
        self.table = layers.Embedding(20, 8)
        self.last = layers.Dense(3)

    def call(self, tokens):
        h = ops.maximum(self.table(tokens) + self.positions, self.again)
        return self.last(ops.mean(h, axis=1))


class Structured(Net):
    def call(self, inputs):
        h = self.features(inputs["a"]) + self.first(inputs["b"][0])
        return {"classes": self.last(h), "features": ops.sum(h, axis=-1)}


class Several(Net):
    def build(self, a_shape, b_shape):
        self.first.build(a_shape)
        self.drop.build((None, 8))
        self.norm.build((None, 8))
        self.last.build((None, 8))

    def call(self, a, b):
        return self.last(self.features(a) + self.first(b))


def certified(net, *args, inputs=None):
    """Gates on a network that was called; the small model equals it, masked."""
    randomise(net)
    inputs = args[0] if inputs is None else inputs
    gated = keras_polar.apply(net, 0.01, gate="static", measure="units")
    wanted, found = net(*args, training=False), gated(inputs, training=False)
    pairs = zip(keras.tree.flatten(wanted), keras.tree.flatten(found), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-4, atol=1e-5)
    close_half(gated)
    small = keras_polar.convert(gated)
    assert difference(gated, small, inputs) <= 1e-4
    counted = keras_polar.cost(small)
    counts = [int(g.mask.sum()) for g in gated.groups]
    for measure in ("weights", "macs", "units"):
        whole = as_functional(net)
        assert predicted(whole, counts, measure) == getattr(counted, measure), measure
    assert counted.weights == small.count_params() < net.count_params()
    assert gated.sparsity > 0
    return gated, small


@pytest.mark.parametrize("kind", [Net, PassesMode, Scaled])
def test_a_network_that_was_called_is_pruned_like_a_functional_one(kind, tmp_path):
    net = kind()
    net(X)
    before, nodes = [to_numpy(w) for w in net.weights], len(net._inbound_nodes)
    assert keras_polar.cost(net).weights == net.count_params()
    assert keras_polar.inspect(net).prunable == pytest.approx(
        8 / 11 if kind is not Scaled else 1, 0.3
    )
    _, small = certified(net, X)
    assert len(net._inbound_nodes) == nodes
    assert [w.shape for w in net.weights] == [w.shape for w in before]
    if kind is Scaled:
        check_loads_alone(small, tmp_path)


def test_weights_of_the_networks_own_are_trained_regularized_and_kept():
    net = Scaled()
    net(X)
    gated = keras_polar.apply(net, 0.3, gate="static")
    gated.compile("sgd", "mse")
    before = to_numpy(net.gamma)
    gated.fit(X, X[:, :3], epochs=2, verbose=0)
    gamma = gated.get_layer("gamma").embeddings
    assert np.abs(to_numpy(gamma)[0] - before).max() > 1e-4
    np.testing.assert_array_equal(to_numpy(net.gamma), before)
    kept = keras_polar.convert(gated).get_layer("gamma").embeddings
    assert kept.regularizer is net.gamma.regularizer
    mask = next(g.mask for g in gated.groups if "first" in g.layers)
    np.testing.assert_allclose(to_numpy(kept)[0], to_numpy(gamma)[0, mask], rtol=1e-6)


def test_a_frozen_weight_of_the_networks_own_stays_as_it_is():
    net = Scaled()
    net(X)
    net.gamma.trainable = False
    gated = keras_polar.apply(net, 0.3, gate="static")
    assert not gated.get_layer("gamma").embeddings.trainable


def test_tokens_and_positions():
    net = Placed()
    tokens = np.arange(20, dtype="int32").reshape(5, 4)
    net(tokens)
    gated, _ = certified(net, tokens)
    assert gated.groups[0].units == 8
    typed = keras_polar.apply(net, 0.1, input_shape=keras.Input((4,), dtype="int32", name="tokens"))
    assert typed.inputs[0].dtype == "int32"


def test_structures_and_several_arguments():
    net, inputs = Structured(), {"a": X, "b": [X[:, ::-1]]}
    net(inputs)
    gated, _ = certified(net, inputs)
    assert set(gated.output) == {"classes", "features"}
    several = Several()
    several(X, X)
    certified(several, X, -X, inputs={"a": X, "b": -X})


def test_a_network_that_was_not_called_is_given_the_shape():
    net = Net(name="fresh")
    with pytest.raises(TypeError, match=r"received Net 'fresh'.*input_shape="):
        keras_polar.apply(net, 0.3)
    assert keras_polar.cost(net, input_shape=(6,)).weights == 6 * 8 + 8 + 4 * 8 + 8 * 3 + 3
    assert keras_polar.inspect(Net(), input_shape=(6,)).prunable == 8 / 11
    assert keras_polar.apply(Net(), 0.3, input_shape=[6]).input_shape == (None, 6)
    image = layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(2)

    class Convolutions(keras.Model):
        def __init__(self):
            super().__init__()
            self.steps = list(image)

        def call(self, x):
            for step in self.steps:
                x = step(x)
            return x

    gated = keras_polar.apply(Convolutions(), 0.3, input_shape=(None, None, 3))
    assert gated.input_shape == (None, None, None, 3)
    with pytest.raises(ValueError, match="is for subclassed networks; received a Functional"):
        keras_polar.apply(gated_source(), 0.3, input_shape=(6,))


def gated_source():
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(8)(inputs)))


def test_units_of_a_network_are_removed_by_name_and_a_network_can_teach():
    net = Net()
    net(X)
    small = keras_polar.remove(net, {"first": [0, 1]})
    assert small.get_layer("first").units == 6
    gated = keras_polar.apply(net, 0.3, gate="static", teacher=net)
    gated.compile("sgd", "mse")
    gated.fit(X, X[:, :3], verbose=0)


# --- what only training has ------------------------------------------------------------------


class More(Net):
    def call(self, x, training=False):
        h = self.features(x)
        if training:
            return self.last(h), h
        return self.last(h)


class Noisy(Net):
    def call(self, x, training=False):
        h = self.features(x)
        h = h + 1.0 if training else h
        return self.last(h)


@pytest.mark.parametrize("kind", [More, Noisy])
def test_inference_counts_where_training_differs_and_the_line_is_told(kind):
    net = kind()
    net(X)
    with pytest.warns(
        UserWarning, match=r"behaves differently in training.* \(line \d+ of test_sub.*if"
    ):
        gated = keras_polar.apply(net, 0.3, gate="static")
    np.testing.assert_allclose(to_numpy(gated(X)), to_numpy(net(X)), rtol=1e-4, atol=1e-5)
    # Layers inside know that it is training: the statistics of the batch have been seen.
    gated.compile("sgd", "mse")
    gated.fit(X, X[:, :3], verbose=0)
    norm = next(x for x in gated.layers if isinstance(x, layers.BatchNormalization))
    assert np.abs(to_numpy(norm.moving_mean)).max() > 0


class FixesMode(Net):
    def call(self, x, training=False):
        h = self.norm(self.first(x), training=False)
        return self.last(h + 1.0 if training else h)


def test_a_mode_that_is_fixed_inside_is_not_lost():
    net = FixesMode()
    net(X)
    with pytest.raises(ValueError, match=r"behaves differently in training .*line \d+ of test_sub"):
        keras_polar.apply(net, 0.3)


class Multiplied(Net):
    def __init__(self):
        super().__init__()
        self.kernel = self.add_weight((8, 8), name="kernel")

    def call(self, x):
        return self.last(ops.matmul(self.features(x), self.kernel))


def test_a_network_may_have_a_kernel_of_its_own():
    net = Multiplied()
    net(X)
    assert keras_polar.inspect(net).prunable == pytest.approx(16 / 19)
    certified(net, X)


class Sorted(Multiplied):
    def call(self, x):
        return self.last(ops.matmul(self.features(x), ops.sort(self.kernel)))


class Numeric(Net):
    def call(self, x):
        return self.last(self.features(x) * float(np.mean(to_numpy(x))))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Sorted, "uses its own variable .*kernel' directly"),
        (Numeric, r"(?s)line \d+ of test_subclassed.py: .*np.mean"),
    ],
)
def test_what_is_in_the_way_is_said_by_apply_and_by_inspect(kind, why):
    net = kind()
    net(X)
    with pytest.raises((TypeError, ValueError), match=why):
        keras_polar.apply(net, 0.3, input_shape=(6,))
    if kind is Sorted:
        reasons = [row.reason for row in keras_polar.inspect(net).rows]
        assert any("kernel" in reason for reason in reasons)


def test_a_network_inside_a_functional_model_holds_weights_as_well():
    inputs = keras.Input((6,))
    check(keras.Model(inputs, layers.Dense(2)(Scaled()(layers.Dense(6)(inputs)))))
