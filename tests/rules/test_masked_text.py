"""Masks that Keras hands from layer to layer: units in front of a masked layer can go."""

import keras
import numpy as np
import pytest
from helpers import check, randomise, saved_and_loaded
from keras import layers, ops

import keras_polar

TOKENS = np.array([[1, 2, 0, 3, 0, 4], [5, 1, 1, 1, 2, 3], [3, 0, 0, 0, 0, 0]], "int32")


class MeanOfWords(layers.Layer):
    """As tutorials write it."""

    def call(self, x, mask=None):
        weight = ops.cast(mask, x.dtype)[..., None]
        return ops.sum(x * weight, axis=1) / ops.sum(weight, axis=1)

    def compute_mask(self, x, mask=None):
        return None


class Scale(layers.Layer):
    supports_masking = True

    def build(self, shape):
        self.factor = self.add_weight((shape[-1],), "uniform", name="factor")

    def call(self, x, mask=None):
        return x * self.factor * ops.cast(mask, x.dtype)[..., None]


def pooled(*steps):
    def run(x):
        for step in steps:
            x = step(x)
        return layers.GlobalAveragePooling1D()(x)

    return run


def model_of_words(read):
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8, mask_zero=True, name="embedding")(tokens)
    x = layers.Dense(12, activation="tanh", name="before")(x)
    return randomise(keras.Model(tokens, layers.Dense(3, name="head")(read(x))))


def feed_forward():
    x = keras.Input((12,))
    return keras.Model(x, layers.Dense(5)(layers.Dense(7, activation="relu")(x)))


READERS = {
    "average": lambda: pooled(),
    "average of rows": lambda: (
        lambda x: layers.Reshape((12,))(layers.GlobalAveragePooling1D(keepdims=True)(x))
    ),
    "user's average": lambda: lambda x: MeanOfWords()(x),
    "user's factor": lambda: pooled(Scale()),
    "BatchNormalization": lambda: pooled(layers.BatchNormalization()),
    "TimeDistributed BatchNormalization": lambda: pooled(
        layers.TimeDistributed(layers.BatchNormalization())
    ),
    "TimeDistributed model": lambda: pooled(layers.TimeDistributed(feed_forward())),
    "TimeDistributed model, LSTM": lambda: (
        lambda x: layers.LSTM(5)(layers.TimeDistributed(feed_forward())(x))
    ),
    "LSTM": lambda: layers.LSTM(5),
    "Bidirectional": lambda: pooled(layers.Bidirectional(layers.GRU(5, return_sequences=True))),
    "Attention": lambda: lambda x: pooled()(layers.Attention()([x, x])),
    "MultiHeadAttention": lambda: lambda x: pooled()(layers.MultiHeadAttention(2, 4)(x, x)),
    "Concatenate": lambda: lambda x: pooled()(layers.Concatenate()([x, layers.Dense(5)(x)])),
    "Add": lambda: lambda x: pooled()(layers.Add()([x, layers.Dense(12)(x)])),
}


@pytest.mark.parametrize("gate", ["static", "dynamic"])
@pytest.mark.parametrize("name", READERS)
def test_units_before_a_masked_layer_can_go(name, gate):
    model = model_of_words(READERS[name]())
    check(model, gate, inputs=TOKENS)
    rows = keras_polar.inspect(model).rows
    assert all(r.prunable == r.units for r in rows if r.name != "head"), rows


def test_the_mask_still_counts():
    model = model_of_words(pooled())
    gated, small = check(model, inputs=TOKENS)
    padded = TOKENS[:1, [0, 1, 3, 5, 2, 4]]  # the average does not mind the order
    for m in (model, gated, small):
        assert np.allclose(
            m.predict(TOKENS[:1], verbose=0), m.predict(padded, verbose=0), atol=1e-6
        )


def test_a_mask_by_which_losses_are_weighed_is_not_lost():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Dense(12, name="before")(layers.Embedding(20, 8, mask_zero=True)(tokens))
    model = randomise(keras.Model(tokens, layers.TimeDistributed(feed_forward())(x)))
    gated, small = check(model, inputs=TOKENS)
    loaded = [saved_and_loaded(m) for m in (gated, small)]
    y = np.ones((3, 6, 5), "float32")
    losses = []
    for m in (gated, small, *loaded):
        m.compile(loss="mse")
        losses.append(m.evaluate(TOKENS, y, verbose=0, return_dict=True)["loss"])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    kept = (TOKENS != 0)[..., None] * (small.predict(TOKENS, verbose=0) - y) ** 2
    assert losses[1] == pytest.approx(kept.sum() / 5 / (TOKENS != 0).sum(), rel=1e-4)
