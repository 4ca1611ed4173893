"""Custom layers without a rule: units are followed through their `call`, or stay and say why."""

import re

import keras
import pytest
from helpers import check, randomise
from keras import layers, ops

import keras_polar


def model_of(*parts, shape=(4, 4, 3)):
    inputs = x = keras.Input(shape)
    for part in (layers.Conv2D(10, 1, name="before"), *parts, layers.Conv2D(5, 1, name="after")):
        x = part(x)
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))


class Swish(layers.Layer):
    def call(self, x):
        return x * ops.sigmoid(1.5 * x)


class DropPath(layers.Layer):
    def __init__(self, rate=0.3, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.seed = keras.random.SeedGenerator(1)

    def call(self, x, training=False):
        if not training:
            return x
        shape = (ops.shape(x)[0],) + (1,) * (len(x.shape) - 1)
        kept = ops.cast(keras.random.uniform(shape, seed=self.seed) > self.rate, x.dtype)
        return x * kept / (1 - self.rate)


class Scale(layers.Layer):
    """One factor and offset per channel, sized by the input."""

    def build(self, shape):
        self.gamma = self.add_weight((shape[-1],), "ones", name="gamma")
        self.beta = self.add_weight((shape[-1],), "zeros", name="beta")

    def call(self, x):
        return self.gamma * x + ops.cast(self.beta, x.dtype)


class LayerScale(layers.Layer):
    """One factor per channel, sized by an argument."""

    def __init__(self, dim, **kwargs):
        super().__init__(**kwargs)
        self.dim = dim

    def build(self, shape):
        self.gamma = self.add_weight((self.dim,), "ones", name="gamma")

    def call(self, x):
        return x * self.gamma

    def get_config(self):
        return {**super().get_config(), "dim": self.dim}


class Residual(layers.Layer):
    def call(self, inputs, factor=0.5):
        x, y = inputs
        return x + factor * y


class First(layers.Layer):
    """What is made of a sequence: one row of it."""

    def call(self, x):
        return ops.expand_dims(x[:, 0], 1)


class Best(layers.Layer):
    """In every sample a row of its own."""

    def call(self, x, at=None):
        at = ops.argmax(ops.sum(at, axis=(2, 3)), axis=1)
        return ops.take_along_axis(x, ops.reshape(at, (-1, 1, 1, 1)), axis=1)

    def compute_output_shape(self, shape):
        return (shape[0], 1, *shape[2:])


class Squeezed(layers.Layer):
    def call(self, x):
        return ops.expand_dims(ops.squeeze(x[:, :1], axis=1), 1)


def before_and_places(x):
    """Reads its places from the image, of which no unit comes."""
    return Best()(x, at=x._keras_history.operation.input)


OPEN = {
    "first": lambda: [First()],
    "squeezed": lambda: [Squeezed()],
    "own_places": lambda: [before_and_places],
    "activation": lambda: [Swish()],
    "drop_path": lambda: [DropPath()],
    "scale": lambda: [Scale()],
    "layer_scale": lambda: [LayerScale(10)],
    "two_inputs": lambda: [lambda x: Residual()([x, layers.Conv2D(10, 3, padding="same")(x)])],
}


@pytest.mark.parametrize("case", OPEN)
def test_units_pass_through_a_layer_nobody_wrote_a_rule_for(case):
    model = randomise(model_of(*OPEN[case]()))
    gated, small = check(model)
    assert gated.groups[0].units == 10
    rows = {r.name: r for r in keras_polar.inspect(model).rows}
    assert rows["before"].prunable == 10
    assert small.get_layer("before").filters == 5


def test_the_layer_itself_stays_and_its_variables_are_cut():
    _, small = check(randomise(model_of(LayerScale(10, name="scale"))))
    assert small.get_layer("scale").get_config()["dim"] == 5
    assert tuple(small.get_layer("scale").gamma.shape) == (5,)


class Third(layers.Layer):
    """One unit for all."""

    def call(self, x):
        return x * x[..., 2:3]


class Total(layers.Layer):
    def call(self, x):
        return x - ops.logsumexp(x, axis=-1, keepdims=True)


class MeanOfHalf(layers.Layer):
    """An average over some of the units: the gates of all say nothing of their share."""

    def call(self, x):
        return x - ops.mean(x[..., ::2], axis=-1, keepdims=True)


class SumByCount(layers.Layer):
    """Knows the number of channels as a Python number."""

    def call(self, x):
        return x / float(x.shape[-1])


class Halves(layers.Layer):
    """Code that adapts to any width, but mixes other units once some are gone."""

    def call(self, x):
        a, b = ops.split(x, 2, axis=-1)
        return ops.concatenate([b, a], axis=-1)


class ManyOrFew(layers.Layer):
    """Does something else once few channels are left."""

    def call(self, x):
        return x if x.shape[-1] > 6 else 2 * x


class Fixed(layers.Layer):
    """A variable whose size is written down."""

    def build(self, shape):
        self.gamma = self.add_weight((10,), "ones", name="gamma")

    def call(self, x):
        return x * self.gamma


class Listed(layers.Layer):
    def build(self, shape):
        self.all = [self.add_weight((shape[-1],), "ones", name="gamma")]

    def call(self, x):
        return x * self.all[0]


class TrainsOtherwise(layers.Layer):
    """Inference is harmless; training mixes the units."""

    def call(self, x, training=False):
        return ops.softmax(x) if training else x


PINNED = {
    Total: "reduces over the units",
    Third: "computes with its units|but it does not run|differ",
    MeanOfHalf: "computes with its units|behaves differently",
    SumByCount: "differ",
    Halves: "computes with its units|but it does not run",
    ManyOrFew: "differ",
    Fixed: "cannot be rebuilt for fewer units",
    Listed: "holds variables in a structure",
    TrainsOtherwise: "computes with its units",
}


@pytest.mark.parametrize("kind", PINNED)
def test_a_layer_that_would_compute_something_else_pins_its_units(kind):
    model = randomise(model_of(kind(name="own"), layers.Conv2D(7, 1, name="free")))
    rows = {r.name: r for r in keras_polar.inspect(model).rows}
    assert rows["before"].prunable == 0
    assert re.search(PINNED[kind], rows["before"].reason), rows["before"].reason
    gated, _ = check(model)
    assert "before" not in [g.name for g in gated.groups]
