"""`remove` on random unit choices equals zeroing the units' outgoing weights by hand.

The oracle knows nothing of the library: while a model is built it writes down, in plain Python
sets, which unit arrives at which kernel entry of which reader and which units are summed.
"""

import itertools

import keras
import numpy as np
import pytest
from helpers import randomise
from keras import layers

import keras_polar
from keras_polar.surgery.certificate import difference, random_inputs


class Ledger:
    """A model in the making: tensors come with one set of units (layer, index) per channel."""

    def __init__(self, rng):
        self.rng, self.number = rng, itertools.count()
        self.readers, self.ties, self.fixed, self.units = [], [], set(), {}

    def name(self):
        return f"layer{next(self.number)}"

    def made(self, name, n):
        self.units[name] = n
        return [frozenset({(name, i)}) for i in range(n)]

    def convolve(self, x, tags, n, size=3):
        name = self.name()
        y = layers.Conv2D(n, size, padding="same", activation="sigmoid", name=name)(x)
        self.readers += [(name, t, (..., i, slice(None))) for i, t in enumerate(tags)]
        return y, self.made(name, n)

    def grouped(self, x, tags):
        """One input channel to two outputs per group: a group's units go together."""
        name, groups = self.name(), len(tags)
        y = layers.Conv2D(2 * groups, 3, padding="same", groups=groups, name=name)(x)
        own = self.made(name, 2 * groups)
        for i, tag in enumerate(tags):
            pair = slice(2 * i, 2 * i + 2)
            self.readers.append((name, tag, (..., 0, pair)))
            self.tie([tag, *own[pair]])
        return y, own

    def depthwise(self, x, tags):
        y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name=self.name())(x)
        return y, [t for t in tags for _ in range(2)]

    def normalised(self, x, tags):
        return layers.ReLU()(layers.BatchNormalization(name=self.name())(x)), tags

    def add(self, x, tags):
        y, own = self.convolve(*self.convolve(x, tags, 5), len(tags), 1)
        merged = [a | b for a, b in zip(tags, own, strict=True)]
        for a, b in zip(tags, own, strict=True):
            self.tie([a, b])
        return layers.Add()([x, y]), merged

    def concat(self, x, tags):
        y, own = self.convolve(x, tags, 4)
        return layers.Concatenate()([y, x]), own + tags

    def through_dense(self, x, tags):
        name, last, positions = self.name(), self.name(), x.shape[1] * x.shape[2]
        y = layers.Dense(7, name=name)(layers.Flatten()(x))
        y = layers.Dense(positions * 6, name=last)(y)
        rows = enumerate(tags * positions)
        self.readers += [(name, t, (i, slice(None))) for i, t in rows]
        middle = self.made(name, 7)
        self.readers += [(last, t, (i, slice(None))) for i, t in enumerate(middle)]
        own = self.made(last, positions * 6)
        per_channel = [frozenset().union(*own[c::6]) for c in range(6)]
        for tag in per_channel:
            self.tie([tag])
        return layers.Reshape((*x.shape[1:3], 6))(y), per_channel

    def tie(self, tags):
        if any(not t for t in tags):
            self.fixed |= set().union(*tags)
        self.ties.append(set().union(*tags))

    def closure(self, units):
        """The units that go when these go."""
        units = set(units)
        while True:
            more = units.union(*(t for t in self.ties if t & units))
            if more == units:
                return units
            units = more


STEPS = ("grouped", "depthwise", "normalised", "add", "concat", "through_dense")


def random_model(seed):
    rng = np.random.default_rng(seed)
    ledger = Ledger(rng)
    inputs = keras.Input((3, 3, 2))
    x, tags = ledger.convolve(inputs, [frozenset()] * 2, 6)
    for step in rng.choice(STEPS, size=rng.integers(2, 6)):
        x, tags = getattr(ledger, step)(x, tags)
        if len(tags) > 20:
            x, tags = ledger.convolve(x, tags, 6)
    x, tags = ledger.convolve(x, tags, 4, 1)
    ledger.fixed |= set().union(*tags)
    return ledger, randomise(keras.Model(inputs, x), seed)


def zeroed(model, ledger, gone):
    """A copy of the model in which nobody reads the units that are gone."""
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    for name, tag, where in ledger.readers:
        if tag & gone:
            kernel = twin.get_layer(name).kernel
            value = np.array(keras.ops.convert_to_numpy(kernel.value))
            value[where] = 0
            kernel.assign(value)
    return twin


@pytest.mark.parametrize(
    "seed", [n if n < 8 else pytest.param(n, marks=pytest.mark.slow) for n in range(40)]
)
def test_remove_equals_zeroed_outgoing_weights(seed):
    ledger, model = random_model(seed)
    for name in ledger.rng.permutation(sorted(ledger.units))[:2]:
        n = ledger.units[name]
        chosen = ledger.rng.choice(n, size=ledger.rng.integers(1, n), replace=False)
        gone = ledger.closure((str(name), int(i)) for i in chosen)
        left = {layer: n - sum(g[0] == layer for g in gone) for layer, n in ledger.units.items()}
        if gone & ledger.closure(ledger.fixed):
            with pytest.raises(ValueError, match="cannot go"):
                keras_polar.remove(model, {str(name): chosen})
        elif not all(left.values()):
            with pytest.raises(ValueError, match="would lose all"):
                keras_polar.remove(model, {str(name): chosen})
        else:
            small = keras_polar.remove(model, {str(name): chosen})
            for layer, n in left.items():
                assert small.get_layer(layer).kernel.shape[-1] == n
            assert difference(zeroed(model, ledger, gone), small, random_inputs(model)) < 1e-5
