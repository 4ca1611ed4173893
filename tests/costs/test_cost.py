"""Multiply-accumulates against counts by hand: of layers without a rule, wrapped or adapted too."""

import keras
import numpy as np
import pytest
from helpers import check, quick, randomise
from keras import layers, ops

import keras_polar


def model_on(shape, *steps, dtype="float32"):
    inputs = x = keras.Input(shape, dtype=dtype)
    for step in steps:
        x = step(x)
    return keras.Model(inputs, x)


def with_adapters(model, rank=2):
    for layer in model._flatten_layers():
        if hasattr(layer, "enable_lora"):
            layer.enable_lora(rank)
    return model


def macs(model):
    found = keras_polar.cost(model)
    assert not found.unknown
    assert found.weights == model.count_params()
    return found.macs


class OwnDense(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.kernel = self.add_weight((shape[-1], self.units), name="kernel")

    def call(self, x):
        return ops.matmul(x, self.kernel)


class OwnConv(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight((3, 3, shape[-1], 7), name="kernel")

    def call(self, x):
        return ops.conv(x, self.kernel, padding="same")


class LowRank(layers.Layer):
    """The kernel is a product of weights: the same for all samples, made once."""

    def build(self, shape):
        self.a = self.add_weight((shape[-1], 2), name="a")
        self.b = self.add_weight((2, 6), name="b")

    def call(self, x):
        return ops.matmul(x, ops.matmul(self.a, self.b))


class Gram(layers.Layer):
    def call(self, x):
        return ops.matmul(ops.matmul(x, ops.transpose(x, (0, 2, 1))), x)


def lstm_cells(*units):
    return layers.RNN([layers.LSTMCell(n) for n in units])


COUNTED = {
    "SpectralNormalization": ((32, 32, 3), [layers.SpectralNormalization, layers.Conv2D, 64, 3],
                              30 * 30 * 64 * 27),
    "TimeDistributed SpectralNormalization": (
        (5, 8), [lambda: layers.TimeDistributed(layers.SpectralNormalization(layers.Dense(4)))],
        5 * 8 * 4),
    "RNN of two cells": ((5, 8), [lambda: lstm_cells(6, 7)], 5 * 4 * (8 * 6 + 6 * 6 + 6 * 7 + 49)),
    "user's Dense": ((5, 8), [lambda: OwnDense(6)], 5 * 8 * 6),
    "user's convolution": ((6, 6, 3), [OwnConv], 36 * 27 * 7),
    "product of weights": ((5, 8), [LowRank], 5 * 8 * 6),
    "user's layer without weights": ((5, 8), [Gram], 2 * 5 * 5 * 8),
    "Lambda": ((5, 8), [lambda: layers.Lambda(lambda x: ops.matmul(x, ops.ones((8, 3))))], 120),
    "Lambda of single elements": ((5, 8), [lambda: layers.Lambda(lambda x: 2 * x)], 0),
    "dropout, pooling, activation": (
        (8, 8, 3),
        [lambda: keras.Sequential([
            layers.Dropout(0.1), layers.AveragePooling2D(2), layers.ReLU(), layers.Softmax(),
            layers.BatchNormalization(), layers.UpSampling2D(), layers.Flatten(),
        ])],
        0),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_what_a_layer_computes_is_counted(name):
    shape, (make, *inner), wanted = COUNTED[name]
    layer = make(inner[0](*inner[1:])) if inner else make()
    assert macs(model_on(shape, layer)) == wanted


class Windows(layers.Layer):
    """As in window attention: the windows of an image stand in the batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.up, self.down = layers.Dense(12, name="up"), layers.Dense(6, name="down")

    def build(self, shape):
        self.up.build((None, 16, 6))
        self.down.build((None, 16, 12))

    def call(self, x):
        x = ops.transpose(ops.reshape(x, (-1, 2, 4, 2, 4, 6)), (0, 1, 3, 2, 4, 5))
        x = self.down(ops.relu(self.up(ops.reshape(x, (-1, 16, 6)))))
        x = ops.transpose(ops.reshape(x, (-1, 2, 2, 4, 4, 6)), (0, 1, 3, 2, 4, 5))
        return ops.reshape(x, (-1, 8, 8, 6))

    def compute_output_shape(self, shape):
        return shape


def time_first(x):
    x = ops.transpose(x, (1, 0, 2))
    x = ops.matmul(layers.Dense(5)(x), np.ones((5, 4), "float32"))
    return ops.transpose(x, (1, 0, 2))


@pytest.mark.parametrize("batch", [None, 2])
def test_all_windows_of_a_sample_are_counted(batch):
    inputs = keras.Input(batch_shape=(batch, 8, 8, 6))
    x = ops.concatenate([inputs, inputs], axis=0)
    model = keras.Model(inputs, Windows()(inputs))
    assert macs(model) == 64 * 6 * 12 * 2
    assert macs(keras.Model(inputs, layers.Dense(7)(Windows()(inputs)))) == 64 * (144 + 42)
    if batch is None:
        assert macs(keras.Model(inputs, layers.Dense(7)(x))) == 2 * 64 * 42
        check(randomise(model_on((8, 8, 6), Windows(), layers.Flatten(), layers.Dense(2))))


def test_positions_in_front_of_the_batch_are_counted():
    assert macs(model_on((3, 8), time_first)) == 3 * 8 * 5 + 3 * 5 * 4


@pytest.mark.parametrize("kind", [OwnConv, Gram, LowRank, lambda: OwnDense(6)])
def test_costs_of_users_layers_are_the_same_before_and_after_pruning(kind):
    steps = [layers.Dense(6), kind(), layers.Dense(8, activation="relu"), layers.Flatten()]
    shape = (6, 6, 3) if kind is OwnConv else (5, 8)
    check(randomise(model_on(shape, *steps, layers.Dense(2))))


@pytest.mark.parametrize(
    ("shape", "make"),
    [
        ((6, 6, 3), lambda: layers.Conv2D(8, 3)),
        ((5, 8), lambda: layers.Dense(16)),
        ((5, 8), lambda: layers.EinsumDense("abc,cde->abde", (None, 4, 6))),
        ((5, 8), lambda: layers.TimeDistributed(layers.Dense(4))),
    ],
)
def test_adapters_of_low_rank_become_part_of_the_kernel(shape, make):
    plain = model_on(shape, make())
    assert macs(with_adapters(model_on(shape, make()))) == macs(plain)


def test_inspect_says_the_same_of_adapters_before_and_after_saving(tmp_path):
    model = model_on((8,), *(layers.Dense(n, name=f"d{n}") for n in (32, 16, 3)))
    model.get_layer("d32").enable_lora(2)
    model.save(tmp_path / "lora.keras")
    found = keras_polar.inspect(model)
    assert keras_polar.inspect(keras.models.load_model(tmp_path / "lora.keras")).rows == found.rows
    reasons = {r.name: r.reason for r in found.rows}
    assert reasons["d32"] == ""


@pytest.mark.parametrize("mode", quick(["int4", "float8"], ["int8", "int4", "float8"]))
@pytest.mark.filterwarnings("ignore:Layer InputLayer")
def test_a_quantized_layer_computes_what_it_did(mode):
    steps = [
        layers.Dense(16),
        layers.EinsumDense("abc,cde->abde", (None, 4, 6)),
        layers.TimeDistributed(layers.Dense(6)),
    ]
    model = model_on((5, 8), *steps)
    wanted = 5 * 8 * 16 + 5 * 16 * 24 + 5 * 4 * 6 * 6
    assert macs(model) == wanted
    model.quantize(mode)
    assert macs(model) == wanted


@pytest.mark.parametrize("mode", quick(["int8"], ["int8", "int4"]))
@pytest.mark.filterwarnings("ignore:Layer InputLayer")
def test_adapters_next_to_quantized_weights_compute_by_themselves(mode):
    words = [layers.Embedding(50, 16), layers.Dense(8)]
    model = model_on((5,), *words, layers.EinsumDense("abc,cd->abd", (None, 6)), dtype="int32")
    model.quantize(mode)
    with_adapters(model)
    rows = {r.kind: r.macs for r in keras_polar.cost(model).rows}
    assert rows["Embedding"] == 5 * 2 * 16
    assert rows["Dense"] == 5 * (16 * 8 + 16 * 2 + 2 * 8)
    assert rows["EinsumDense"] == 5 * (8 * 6 + 8 * 2 + 2 * 6)


# --- what nobody can count ---------------------------------------------------------------------


class Whole(layers.Layer):
    """Cannot be opened, and its parts have weights."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.part = layers.Dense(8, name="part")

    def build(self, shape):
        self.part.build(shape)
        self.factor = self.add_weight((), "ones", name="factor")

    def call(self, x):
        return self.part(x) * ops.absolute(self.factor)

    def compute_output_shape(self, shape):
        return (*shape[:-1], 8)


def hidden_product(x):
    return ops.fft((x, ops.zeros_like(x)))[0]


def unknown_model(*steps):
    return model_on((8,), layers.Dense(32, name="free"), layers.Dense(8, name="fixed"), *steps)


@pytest.mark.parametrize(
    "step", [lambda: Whole(name="whole"), lambda: layers.Lambda(hidden_product, name="whole")]
)
def test_what_is_not_known_is_never_shown_as_zero(step):
    model = unknown_model(step())
    found = keras_polar.cost(model)
    assert found.unknown == ("whole",)
    assert found.macs == 2 * 8 * 32
    assert [r.name for r in found.rows if not r.macs_known] == ["whole"]
    lines = str(found).splitlines()
    assert " ? " in next(line for line in lines if " whole " in line)
    assert "512 + ?" in next(line for line in lines if " total " in line)
    assert "MACs that cannot be counted: whole" in lines[-1]
    inspected = keras_polar.inspect(model)
    assert inspected.unknown == ("whole",)
    assert {r.name: r.macs_share for r in inspected.rows}["whole"] is None
    assert "not those of whole" in " ".join(str(inspected).split())


def test_a_share_of_an_unknown_cost_is_refused_and_the_remedies_work():
    model = unknown_model(Whole(name="whole"))
    with pytest.raises(ValueError, match=r"multiply-accumulates of whole \(Whole\)"):
        keras_polar.apply(model, 0.5, measure="macs")
    keras_polar.apply(model, 0.5, measure="weights")

    class Known(keras_polar.Rule):
        def macs(self, site):
            return [keras_polar.rules.Term((), macs=8 * 8)]

    class Told(Whole):
        pass

    keras_polar.register(Told, Known())
    told = unknown_model(Told(name="whole"))
    assert macs(told) == 2 * 8 * 32 + 64
    keras_polar.apply(told, 0.5, measure="macs")


def test_a_layer_without_weights_and_of_unknown_cost_is_warned_of():
    model = unknown_model(layers.Lambda(hidden_product, name="whole"))
    with pytest.warns(UserWarning, match=r"whole \(Lambda\).*they count as none"):
        keras_polar.apply(model, 0.5, measure="macs")


def test_a_harmless_lambda_is_no_reason_to_warn():
    keras_polar.apply(unknown_model(layers.Lambda(lambda x: 2 * x)), 0.5, measure="macs")


def test_a_number_of_steps_that_is_not_known_is_said():
    model = model_on((None, 8), layers.LSTM(16), layers.Dense(3))
    assert not keras_polar.cost(model).sizes_known
    with pytest.raises(ValueError, match="needs known sizes"):
        keras_polar.apply(model, 0.5, measure="macs")


def test_a_layer_that_is_called_twice_has_one_line():
    shared = layers.Dense(8, name="shared")
    table = str(keras_polar.cost(model_on((8,), shared, shared)))
    (line,) = (x for x in table.splitlines() if " shared " in x)
    assert " 72 " in line
    assert " 128 " in line


def test_reasons_read_as_sentences():
    class Fails(Whole):
        def call(self, x):
            return np.asarray(x)

    class FailsAlone(layers.Layer):
        def call(self, x):
            return ops.convert_to_tensor(np.asarray(x))

        def compute_output_shape(self, shape):
            return shape

    for kind in (Fails, FailsAlone):
        rows = keras_polar.inspect(unknown_model(kind(name="whole"))).rows
        reason = next(r.reason for r in rows if r.name == "whole")
        assert "it does not run on symbolic tensors (" in reason, reason
