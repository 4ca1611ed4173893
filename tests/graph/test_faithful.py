"""What `apply` and `convert` must not lose: functions, penalties, vocabularies, names, ties."""

import keras
import numpy as np
import pytest
from helpers import check, model_of, randomise
from keras import layers, ops

import keras_polar
from keras_polar.graph.clone import Copies
from keras_polar.surgery.certificate import difference

RNG = np.random.default_rng(0)
X = RNG.standard_normal((16, 6)).astype("float32")
Y = RNG.standard_normal((16, 3)).astype("float32")


def mlp(**options):
    return model_of(layers.Dense(16, **options), layers.Dense(16, **options), shape=(6,))


def trained(model, x=X, y=Y, optimizer="sgd", **options):
    gated = keras_polar.apply(model, 0.4, **options)
    gated.compile(optimizer, "mse")
    gated.fit(x, y, epochs=5, batch_size=4, verbose=0)
    return gated


def times_two(x):
    return ops.tanh(x) * 2


def by_width(x):
    return x / x.shape[-1]


class Size(keras.regularizers.Regularizer):
    def __call__(self, x):
        return 0.01 * ops.sum(ops.abs(x))

    def get_config(self):
        return {}


# --- functions that mix units ----------------------------------------------------------------


@pytest.mark.parametrize("function", ["softmax", by_width])
def test_activation_layer_that_mixes_units_pins_them(function):
    model = model_of(layers.Dense(8, name="d"), layers.Activation(function), shape=(6,))
    row = next(r for r in keras_polar.inspect(model).rows if r.name == "d")
    assert not row.prunable
    assert "element by element" in row.reason


def test_activation_layer_of_elements_prunes():
    check(model_of(layers.Dense(8), layers.Activation("gelu"), layers.Dense(8), shape=(6,)))


# --- layers that their config does not describe ----------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"activation": times_two},
        {"activation": lambda x: ops.tanh(x)},
        {"kernel_regularizer": Size()},
    ],
    ids=["function", "lambda", "regularizer"],
)
def test_what_keras_cannot_read_back_is_handed_on(options):
    gated = trained(mlp(**options))
    small = keras_polar.convert(gated, verify=X)
    assert small.count_params() < gated.count_params()
    assert len(small.losses) == len(mlp(**options).losses)


def test_array_as_initializer():
    table = keras.initializers.Constant(RNG.standard_normal((10, 8)))
    embedding = layers.Embedding(10, 8, embeddings_initializer=table, trainable=False)
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Dense(8, "relu")(layers.GlobalAveragePooling1D()(embedding(tokens)))
    given = RNG.integers(0, 10, (16, 5))
    gated = trained(keras.Model(tokens, layers.Dense(3)(x)), given)
    keras_polar.convert(gated, verify=given)


class Gain(layers.Dense):
    def __init__(self, *args, gain=2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = gain

    def call(self, x):
        return super().call(x) * self.gain


def test_argument_that_get_config_lacks_is_kept():
    model = model_of(layers.Dense(16, "relu"), layers.Dense(8), Gain(8, gain=5.0), shape=(6,))
    gated = keras_polar.apply(model, 0.3)
    assert difference(model, gated, X) < 1e-5


def test_noise_shape_follows_the_units():
    dropout = layers.Dropout(0.5, noise_shape=(None, 1, 8))
    model = model_of(layers.Dense(8, "relu"), dropout, layers.Dense(8, "relu"), shape=(5, 6))
    x, y = RNG.standard_normal((16, 5, 6)), np.zeros((16, 3))
    small = keras_polar.convert(trained(model, x, y), verify=x)
    small.compile("sgd", "mse")
    small.fit(x, y, verbose=0)


class Residual(keras.Sequential):
    def call(self, x, training=None, mask=None):
        return x + super().call(x, training=training, mask=mask)


def test_call_of_a_sequential_subclass_is_followed():
    inner = Residual([layers.Dense(16, "relu"), layers.Dense(8)])
    check(model_of(layers.Dense(8), inner, layers.Dense(3), shape=(6,)))
    with pytest.raises(TypeError, match="cannot be rewritten"):
        keras_polar.apply(Residual([keras.Input((6,)), layers.Dense(6)]), 0.3)


# --- what belongs to variables ---------------------------------------------------------------

PENALTIES = {"kernel_regularizer": "l2", "kernel_constraint": "non_neg"}


@pytest.mark.parametrize(
    "layer",
    [
        layers.LSTM(8, recurrent_constraint="non_neg", **PENALTIES),
        layers.Bidirectional(layers.GRU(8, **PENALTIES)),
        layers.TimeDistributed(layers.Dense(8, **PENALTIES)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_regularizers_and_constraints_stay(layer):
    model = model_of(layer, layers.Dense(8, "relu"), layers.Dense(2), shape=(5, 6))
    gated = keras_polar.apply(model, 0.3)
    assert np.isclose(float(sum(gated.losses)), float(sum(model.losses)), rtol=1e-5)
    gated.settle()
    small = keras_polar.convert(gated)
    for other in (gated, small):
        for what in ("regularizer", "constraint"):
            assert _count(other, what) == _count(model, what) > 0
    assert np.isclose(float(sum(gated.losses)), float(sum(small.losses)), rtol=1e-5)


def _count(model, what):
    return sum(getattr(v, what) is not None for v in model.variables)


def test_single_frozen_variable_stays_frozen():
    frozen = layers.Dense(8, "relu", name="frozen")
    model = model_of(frozen, layers.Dense(8, "relu"), layers.Dense(2), shape=(6,))
    frozen.bias.trainable = False
    gated = keras_polar.apply(model, 0.3)
    gated.settle()
    for other in (gated, keras_polar.convert(gated)):
        assert "frozen/bias" not in [v.path for v in other.trainable_variables]


def test_state_of_a_recurrent_layer_goes_along():
    inputs = keras.Input(batch_shape=(4, 5, 6))
    x = layers.GRU(8, stateful=True)(layers.Dense(8, "relu")(inputs))
    model = keras.Model(inputs, layers.Dense(3)(layers.Dense(8, "relu")(x)))
    x = RNG.standard_normal((4, 5, 6)).astype("float32")
    model(x)
    gated = keras_polar.apply(model, 0.3)
    assert difference(model, gated, x) < 1e-5
    gated.settle()
    keras_polar.convert(gated, verify=x)


class Tied(layers.Layer):
    def __init__(self, table=None, **kwargs):
        super().__init__(**kwargs)
        self.table = table

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.table.embeddings))


class TiedByVariable(layers.Layer):
    def __init__(self, table=None, **kwargs):
        super().__init__(**kwargs)
        self.table = table

    def build(self, shape):
        self.bias = self.add_weight((20,), "zeros", name="bias")

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.table)) + self.bias


def tied_model(tie, first):
    """A language model whose head has the table of its embedding, and may be called before it."""
    table, tokens = layers.Embedding(20, 8, name="table"), keras.Input((5,), dtype="int32")
    table.build((None, 5))
    head = tie(table)
    early = layers.Dense(8)(head(layers.Dense(8)(ops.one_hot(tokens, 20)))) if first else 0.0
    x = layers.Dense(16, "relu", name="hidden")(table(tokens) + early)
    return randomise(keras.Model(tokens, head(layers.Dense(8)(x))))


HEADS = {
    "layer": lambda table: Tied(table, name="head"),
    "variable": lambda table: TiedByVariable(table.embeddings, name="head"),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("tie", HEADS)
def test_what_two_layers_have_is_one_thing_in_new_models(tie, first):
    model = tied_model(HEADS[tie], first)
    assert keras_polar.cost(model).weights == model.count_params()
    gated, small = check(model)
    again = keras_polar.remove(model, {"hidden": [0, 1]})
    for new in (gated, small, again):
        table, head = new.get_layer("table"), new.get_layer("head")
        assert any(v is table.embeddings for v in head.weights)
        assert table.embeddings is not model.get_layer("table").embeddings
    assert small.count_params() < model.count_params()
    (row,) = (r for r in keras_polar.inspect(model).rows if r.name == "table")
    assert row.prunable == 0
    assert "'head' has too" in row.reason
    gated.compile("sgd", "mse")
    tokens = np.ones((4, 5), "int32")
    gated.fit(tokens, np.zeros((4, 5, 20)), verbose=0)
    assert difference(gated, keras_polar.convert(gated), tokens) < 1e-5


def test_ties_that_come_apart_are_said():
    table, tokens = layers.Embedding(20, 8, name="table"), keras.Input((5,), dtype="int32")
    x = layers.Dense(8)(layers.Dense(16, "relu")(table(tokens)))
    model = keras.Model(tokens, ops.einsum("btd,vd->btv", x, table.embeddings))
    for prune in (lambda: keras_polar.apply(model, 0.3), lambda: keras_polar.remove(model, {})):
        with pytest.warns(UserWarning, match="table/embeddings.*do not share it"):
            prune()


# --- names and vocabularies ------------------------------------------------------------------


def test_outputs_of_nested_models_keep_their_names():
    inputs = keras.Input((6,))
    x = layers.Dense(16, "relu")(inputs)
    heads = [
        keras.Sequential([keras.Input((16,)), layers.Dense(8, "relu"), layers.Dense(n)], name=name)
        for name, n in (("class", 3), ("box", 4))
    ]
    model = keras.Model(inputs, [head(x) for head in heads])
    y = {"class": np.zeros((16, 3)), "box": np.zeros((16, 4))}
    gated = keras_polar.apply(model, 0.4)
    gated.compile("sgd", loss={"class": "mse", "box": "mae"}, loss_weights={"class": 1, "box": 0.5})
    gated.fit(X, y, epochs=5, batch_size=4, verbose=0)
    assert gated.output_names == ["class", "box"]
    assert keras_polar.convert(gated, verify=X).output_names == ["class", "box"]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="strings are TensorFlow's")
def test_adapted_vocabulary_stays():
    import tensorflow as tf

    words = np.array([["a"], ["b"], ["zz"], ["c"]])
    lookup = layers.StringLookup()
    lookup.adapt(words[:2])
    inputs = keras.Input((1,), dtype="string")
    x = layers.Flatten()(layers.Embedding(lookup.vocabulary_size(), 8)(lookup(inputs)))
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(8, "relu", name="d")(x)))
    gated = keras_polar.apply(model, 0.3)
    np.testing.assert_allclose(gated(tf.constant(words)), model(tf.constant(words)), atol=1e-6)
    assert keras_polar.remove(model, {"d": [0]})(tf.constant(words)).shape == (4, 2)
    gated.settle()
    keras_polar.convert(gated, verify=tf.constant(words))
    with pytest.raises(ValueError, match="strings"):
        keras_polar.convert(gated, verify=True)


def test_pipeline_of_augmentations():
    flips = layers.Pipeline([layers.RandomFlip("horizontal")])
    model = model_of(flips, layers.Conv2D(8, 3), layers.Conv2D(8, 3), shape=(16, 16, 3))
    check(model)


def test_adapters_inside_attention_keep_their_units():
    inputs = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(4, 8, name="attention")
    x = attention(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(8, "relu")(x)))
    attention._query_dense.enable_lora(2)
    check(model)


# --- in fit ----------------------------------------------------------------------------------


def test_masks_set_by_hand_end_the_pressure():
    gated = keras_polar.apply(mlp(), 0.6, compact=False)
    for group in gated.groups:
        group.set_mask(np.arange(group.units) < group.units - 1)
    gated.compile(keras.optimizers.SGD(0.0), "mse")
    history = gated.fit(X, Y, epochs=5, batch_size=4, verbose=0, validation_data=(X, Y)).history
    np.testing.assert_allclose(history["loss"], history["val_loss"], rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="data of tf.data")
def test_gates_that_were_never_pressed_are_said():
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).filter(lambda x, y: True)
    gated = keras_polar.apply(mlp(), 0.4)
    gated.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="without having been pressed"):
        gated.fit(data, epochs=1, shuffle=False, verbose=0)
    assert gated.settled


def test_muon_goes_on_with_the_smaller_network():
    gated = trained(mlp(), optimizer=keras.optimizers.Muon(0.01), gate="static")
    keras_polar.convert(gated, verify=X)


@pytest.mark.parametrize("compact", [True, False])
def test_validation_and_callbacks_see_the_network_of_now(compact):
    losses = []

    class Evaluate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            found = self.model.evaluate(X, Y, verbose=0, return_dict=True)["loss"]
            losses.append((found, logs.get("val_loss", found)))

    gated = keras_polar.apply(mlp(), 0.5, compact=compact, gate="static")
    gated.compile(keras.optimizers.Adam(0.05), "mse")
    # After the switch: an epoch without validation, then one with.
    options = {"validation_data": (X, Y), "validation_freq": 2, "callbacks": [Evaluate()]}
    gated.fit(X, Y, epochs=6, batch_size=4, verbose=0, **options)
    evaluated, validated = np.transpose(losses)
    np.testing.assert_allclose(evaluated, validated, rtol=1e-4)


class Unknown(layers.Dense):
    """Cannot be made from its config."""

    @classmethod
    def from_config(cls, config):
        raise ValueError("no config")


def test_training_survives_a_layer_that_cannot_be_cut():
    keras_polar.register(Unknown, like=layers.Dense)
    model = model_of(Unknown(16, activation="relu"), layers.Dense(16), shape=(6,))
    gated = keras_polar.apply(model, 0.4)
    gated.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="goes on with the whole network"):
        gated.fit(X, Y, epochs=5, batch_size=4, verbose=0)
    with pytest.raises(TypeError, match="cannot be rebuilt"):
        keras_polar.convert(gated)


def test_copies_have_what_a_layer_calls_as_it_likes():
    """Names that begin like TensorFlow's (_self_) or like those of methods (build, get_config)."""

    class Attends(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self._self_attention = layers.Dense(4)
            self.build_rate, self.get_config_rate = 2.0, 3.0

        def build(self, shape):
            self._self_attention.build(shape)

        def call(self, x):
            return self._self_attention(x) * self.build_rate * self.get_config_rate

    inputs = keras.Input((4,))
    model = keras.Model(inputs, Attends(name="attends")(inputs))
    copy, _ = Copies().call(model.get_layer("attends"), "copy", (inputs,), {})
    x = np.ones((2, 4), "float32")
    found = ops.convert_to_numpy(copy(x))
    np.testing.assert_allclose(found, model.predict(x, verbose=0), atol=1e-6)
