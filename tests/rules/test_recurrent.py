"""Recurrent layers and wrappers: hidden units really go, and the certificate holds."""

import functools

import helpers
import keras
import numpy as np
import pytest
from helpers import check, close_half, randomise
from keras import layers, ops

import keras_polar
from keras_polar.surgery.certificate import difference, random_inputs

KINDS = {
    "lstm": layers.LSTM,
    "gru": layers.GRU,
    "gru_reset_before": lambda *a, **k: layers.GRU(*a, reset_after=False, **k),
    "simple": layers.SimpleRNN,
    "cell": lambda n, **k: layers.RNN(
        layers.GRUCell(n), **{a: b for a, b in k.items() if a != "dropout"}
    ),
}


model_of = functools.partial(helpers.model_of, shape=(5, 6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_sequences": True, "go_backwards": True, "dropout": 0.2},
        {"return_sequences": True, "unroll": True},
    ],
)
def test_hidden_units_go(kind, options):
    model = randomise(model_of(KINDS[kind](6, name="recurrent", **options)))
    gated, small = check(model, gate="dynamic")
    assert {g.name: g.layers for g in gated.groups}["recurrent"] == ["recurrent"]
    cell = small.get_layer("recurrent").cell
    assert cell.units == 3
    assert cell.kernel.shape[0] == 4
    assert cell.recurrent_kernel.shape[0] == 3
    assert all(type(x).__module__.startswith("keras.") for x in small.layers)


def encoder_decoder(kind):
    def apply(x):
        encoder = kind(6, return_state=True, return_sequences=True, name="encoder")
        y, *state = encoder(x)
        decoder = kind(6, return_sequences=True, recurrent_dropout=0.1, name="decoder")
        return layers.Concatenate()([decoder(y, initial_state=state), y])

    return apply


def shared(x):
    lstm = layers.LSTM(6, return_sequences=True, name="shared")
    return layers.Add()([lstm(x), lstm(ops.sin(x))])


def stacked(x):
    return layers.LSTM(4, name="second")(layers.GRU(6, return_sequences=True, name="first")(x))


def bidirectional_states(x):
    layer = layers.Bidirectional(layers.LSTM(6, return_state=True), name="both")
    y, *states = layer(x)
    z = layers.Bidirectional(layers.LSTM(6, return_sequences=True), name="again")
    return layers.Concatenate()([y, layers.Flatten()(z(x, initial_state=states))])


def two_outputs(x):
    layer = layers.Bidirectional(layers.GRU(6), merge_mode=None, name="both")
    return layers.Dense(5)(layers.Subtract()(layer(x)))


CASES = {
    "encoder_decoder_lstm": [encoder_decoder(layers.LSTM)],
    "encoder_decoder_gru": [encoder_decoder(layers.GRU)],
    "shared": [shared],
    "stacked": [stacked],
    "bidirectional_states": [bidirectional_states],
    "bidirectional_two_outputs": [two_outputs],
    "bidirectional_mixed": [
        layers.Bidirectional(
            layers.LSTM(6, return_sequences=True),
            backward_layer=layers.GRU(6, return_sequences=True, go_backwards=True),
        ),
        layers.Dense(4),
    ],
    "bidirectional_cell": [layers.Bidirectional(layers.RNN(layers.LSTMCell(6)))],
    "no_bias": [layers.LSTM(6, use_bias=False, recurrent_dropout=0.2)],
    "residual": [lambda x: layers.Add()([x, layers.LSTM(8, return_sequences=True)(x)])],
    "step_dense": [layers.TimeDistributed(layers.Dense(6, activation="relu")), layers.Dense(4)],
    "step_norm": [layers.TimeDistributed(layers.BatchNormalization()), layers.LSTM(4)],
    "step_movement": [
        layers.Reshape((5, 2, 4)), layers.TimeDistributed(layers.Permute((2, 1))),
        layers.TimeDistributed(layers.Flatten()), layers.Dense(5),
    ],
    "step_lstm": [
        layers.Reshape((5, 1, 8)), layers.TimeDistributed(layers.LSTM(6)), layers.Dense(5)
    ],
    "step_bidirectional": [
        layers.Reshape((5, 1, 8)),
        layers.TimeDistributed(layers.Bidirectional(layers.LSTM(6))), layers.Dense(5),
    ],
    "step_spectral": [
        layers.TimeDistributed(layers.SpectralNormalization(layers.Dense(6))), layers.Dense(4),
        layers.Dense(4),
    ],
    "spectral": [layers.SpectralNormalization(layers.Dense(6)), layers.Dense(4), layers.Dense(4)],
    "stacked_cells": [
        layers.RNN(layers.StackedRNNCells([layers.LSTMCell(4), layers.GRUCell(3)])),
        layers.Dense(4), layers.Dense(4),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gate", ["static", "dynamic"])
def test_one_construct(case, gate):
    _, small = check(randomise(model_of(*CASES[case])), gate=gate)
    assert all(type(x).__module__.startswith("keras.") for x in small.layers)


@pytest.mark.parametrize("mode", ["concat", "sum", "mul", "ave"])
@pytest.mark.parametrize("sequences", [True, False])
def test_both_directions_of_bidirectional_shrink(mode, sequences):
    inner = layers.LSTM(6, return_sequences=sequences)
    both = layers.Bidirectional(inner, merge_mode=mode, name="both")
    _, small = check(randomise(model_of(both, layers.Dense(4))))
    layer = small.get_layer("both")
    assert layer.forward_layer.units == layer.backward_layer.units == 3


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_filters_of_conv_lstm_go(rank):
    kind = getattr(layers, f"ConvLSTM{rank}D")
    inputs = keras.Input((3, *(4,) * rank, 2))
    x = kind(6, 3, padding="same", return_sequences=True, name="first")(inputs)
    x = kind(4, 2, strides=2, name="second")(x)
    model = randomise(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))))
    _, small = check(model)
    assert (small.get_layer("first").filters, small.get_layer("second").filters) == (3, 2)


def padded(n=8, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 20, (n, 7))
    return np.where(np.arange(7) < rng.integers(2, 8, (n, 1)), tokens, 0).astype("int32")


def reader(*steps):
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(20, 8, mask_zero=True, name="embedding")(tokens)
    for step in steps:
        x = step(x)
    return keras.Model(tokens, layers.Dense(2, name="head")(x))


READERS = {
    "lstm": lambda: reader(layers.LSTM(6, return_sequences=True), layers.GRU(4)),
    "bidirectional": lambda: reader(layers.Bidirectional(layers.LSTM(6, return_sequences=True)),
                                    layers.LSTM(4)),
    "between": lambda: reader(layers.Dense(6, activation="tanh"), layers.SimpleRNN(4)),
}  # fmt: skip


@pytest.mark.parametrize("case", READERS)
def test_padding_stays_masked(case):
    model, tokens = randomise(READERS[case]()), padded()
    gated, small = check(model, gate="dynamic", inputs=tokens)
    assert small.get_layer("embedding").output_dim == 4
    for one in (gated, small):
        longer = np.pad(tokens, ((0, 0), (0, 3)))
        a, b = (ops.convert_to_numpy(one(x, training=False)) for x in (tokens, longer))
        assert np.allclose(a, b, atol=1e-6)


def test_explicit_mask_argument_is_kept():
    x, mask = keras.Input((5, 6)), keras.Input((5,), dtype="bool")
    y = layers.LSTM(6, name="lstm")(layers.Dense(8)(x), mask=mask)
    model = randomise(keras.Model([x, mask], layers.Dense(2)(y)))
    inputs = [random_inputs(model, batch=2)[0], np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], bool)]
    gated, _ = check(model, inputs=inputs)
    everything = [inputs[0], np.ones((2, 5), bool)]
    a, b = (ops.convert_to_numpy(gated(i, training=False)) for i in (inputs, everything))
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("gate", [pytest.param("static", marks=pytest.mark.slow), "dynamic"])
def test_gated_reader_trains_saves_and_loads(gate, tmp_path):
    model = reader(
        layers.Bidirectional(layers.LSTM(6, return_sequences=True, dropout=0.1)),
        layers.GRU(6, recurrent_dropout=0.1, kernel_regularizer="l2"),
    )
    schedule = keras_polar.Schedule(0.1, 0.4, 0.8)  # of 12 steps, some in which gates learn
    gated = keras_polar.apply(model, 0.3, gate=gate, schedule=schedule)
    tokens, labels = padded(64), np.arange(64) % 2
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    gated.compile("adam", loss, jit_compile=False)
    before = [ops.convert_to_numpy(ops.copy(v)) for v in gated.trainable_weights]
    gated.fit(tokens, labels, batch_size=16, epochs=3, verbose=0)
    for variable, value in zip(gated.trainable_weights, before, strict=True):
        assert (ops.convert_to_numpy(variable) != value).any(), variable.path
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    assert difference(gated, loaded, tokens) == 0
    small = keras_polar.convert(loaded, verify=tokens)
    small.save(tmp_path / "small.keras")
    assert difference(small, keras.models.load_model(tmp_path / "small.keras"), tokens) == 0


def test_gradient_reaches_gate_and_recurrent_kernel():
    import tensorflow as tf

    gated = keras_polar.apply(randomise(model_of(layers.LSTM(6, name="lstm"))), 0.2, gate="static")
    inputs = random_inputs(gated, batch=8)
    (gate,) = (x for x in gated.layers if getattr(x, "group", "") == "lstm")
    gate.pressure = None  # not in warm-up, when gates do not learn
    kernel = gated.get_layer("lstm").layer.cell.recurrent_kernel
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(gated(inputs, training=True) ** 2)
    for gradient in tape.gradient(loss, [gate.bias, kernel]):
        assert (np.abs(gradient.numpy()).reshape(6, -1).max(axis=1) > 0).all()


def test_dropout_differs_from_step_to_step():
    lstm = layers.LSTM(6, recurrent_dropout=0.5, seed=1, name="lstm")
    gated = keras_polar.apply(randomise(model_of(lstm)), 0.2)
    close_half(gated)
    inputs = random_inputs(gated)
    first, second = (ops.convert_to_numpy(gated(inputs, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-4


def test_stateful_layer_keeps_its_units_and_says_why():
    inputs = keras.Input(batch_shape=(2, 5, 6))
    x = layers.LSTM(4, stateful=True, name="lstm")(layers.Dense(8)(inputs))
    model = randomise(keras.Model(inputs, layers.Dense(3)(x)))
    gated = keras_polar.apply(model, 0.01, gate="static", measure="units")
    close_half(gated)
    small = keras_polar.convert(gated)
    for _ in range(2):  # the state of one call is where the next begins
        assert difference(gated, small, random_inputs(model)) <= 1e-4
    reasons = {r.name: r.reason for r in keras_polar.inspect(model).rows}
    assert "keeps its state" in reasons["lstm"]


def test_frozen_recurrent_layer_stays_frozen():
    model = model_of(layers.LSTM(6, name="lstm"))
    model.get_layer("lstm").trainable = False
    gated, small = check(randomise(model))
    assert not gated.get_layer("lstm").layer.trainable_weights
    assert not small.get_layer("lstm").trainable


def test_removed_units_equal_zeroed_rows():
    model = randomise(model_of(layers.GRU(6, name="gru")))
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    for variable in (twin.get_layer("gru").cell.recurrent_kernel, twin.get_layer("head").kernel):
        value = np.array(ops.convert_to_numpy(variable))
        value[[1, 4]] = 0
        variable.assign(value)
    small = keras_polar.remove(model, {"gru": [1, 4]})
    assert small.get_layer("gru").units == 4
    assert difference(twin, small, random_inputs(model)) < 1e-5


class Squared(layers.Dense):
    """Nobody wrote a rule for it."""

    def call(self, x):
        return super().call(x) ** 2


PINS = {
    "softmax": (lambda: layers.GRU(4, activation="softmax", name="odd"), "element by element"),
    "widths": (
        lambda: layers.Bidirectional(
            layers.LSTM(4), backward_layer=layers.LSTM(3, go_backwards=True), name="odd"
        ),
        "different width in each direction",
    ),
    "stacked": (
        lambda: layers.RNN(layers.StackedRNNCells([layers.LSTMCell(4)]), name="odd"),
        "StackedRNNCells",
    ),
    "no_rule_in_steps": (
        lambda: layers.TimeDistributed(Squared(4), name="odd"),
        "its own variable",
    ),
    "spectral": (lambda: layers.SpectralNormalization(Squared(4), name="odd"), "cannot be opened"),
}


@pytest.mark.parametrize("case", PINS)
def test_what_stays_says_why(case):
    build, reason = PINS[case]
    reasons = {r.name: r.reason for r in keras_polar.inspect(model_of(build())).rows}
    assert reason in reasons["odd"]
