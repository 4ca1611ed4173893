"""Random graphs with random masks keep the certificate; the coupling agrees with an oracle."""

import os

import keras
import numpy as np
import pytest
from helpers import check, randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import STEPS, build, programs

import keras_polar
from keras_polar.coupling import couple
from keras_polar.graph import trace
from keras_polar.samples import difference, random_inputs

FUZZ = settings(
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")),
    suppress_health_check=list(HealthCheck),
)


def certified(program):
    keras.backend.clear_session()
    model = randomise(build(program))
    if couple(trace(model)).groups:
        check(model)
    else:
        with pytest.raises(ValueError, match="nothing in model"):
            check(model)


@given(programs)
@FUZZ
def test_random_models_keep_the_certificate(program):
    certified(program)


@pytest.mark.slow
@given(programs)
@settings(FUZZ, max_examples=400)
def test_many_random_models_keep_the_certificate(program):
    certified(program)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_step_keeps_the_certificate(name):
    certified([("conv", 0, 0, 6), (name, 0, 1, 5), ("conv", 0, 0, 4)])


def zeroed(model, name, unit):
    """The model with the outgoing weights of a unit of a 1x1 convolution set to zero, by hand."""
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    kernel = twin.get_layer(name).kernel
    value = np.array(kernel.numpy())
    value[..., unit, :] = 0
    kernel.assign(value)
    return twin


@given(st.data())
@settings(FUZZ, max_examples=10)
def test_remove_equals_zeroed_outgoing_weights(data):
    keras.backend.clear_session()
    x = keras.Input((SIZE := 4, SIZE, 3))
    y = keras.layers.Conv2D(6, 3, activation="sigmoid", name="first")(x)
    y = keras.layers.BatchNormalization()(y)
    y = keras.layers.Conv2D(5, 1, name="second")(y)
    model = randomise(keras.Model(x, y))
    units = data.draw(st.sets(st.integers(0, 5), min_size=1, max_size=5))
    small = keras_polar.remove(model, {"first": sorted(units)})
    assert small.get_layer("first").filters == 6 - len(units)
    assert difference(zeroed(model, "second", sorted(units)), small, random_inputs(model)) < 1e-5


# --- the oracle: perturb a unit, see what it reaches -----------------------------------------


def reached(model, layer, unit, inputs):
    """Names of weight layers whose output changes when a unit of `layer` is shifted."""
    before = outputs_of(model, inputs)
    bias = model.get_layer(layer).bias
    value = np.array(bias.numpy())
    bias.assign(value + 3 * (np.arange(len(value)) == unit))
    after = outputs_of(model, inputs)
    bias.assign(value)
    return {n for n in before if np.abs(before[n] - after[n]).max() > 1e-6}


def outputs_of(model, inputs):
    probe = keras.Model(model.inputs, [x.output for x in model.layers[2:]])
    values = probe(inputs, training=False)
    names = [x.name for x in model.layers[2:]]
    return {n: keras.ops.convert_to_numpy(v) for n, v in zip(names, values, strict=True)}


ORACLE = ["conv", "depthwise", "dense", "batch_norm", "add", "concat", "sigmoid", "permute"]


@given(st.lists(st.tuples(st.sampled_from(ORACLE), *[st.integers(2, 4)] * 3), max_size=5))
@settings(FUZZ, max_examples=10)
def test_a_cut_unit_reaches_no_more_than_the_perturbed_one(program):
    keras.backend.clear_session()
    model = randomise(build([(n, 0, b, w) for n, _, b, w in program]))
    coupling = couple(trace(model))
    inputs = random_inputs(model)
    produced = coupling.produced()
    for layer, vector in produced.items():
        reach = reached(model, layer, 0, inputs)
        root = coupling.roots[vector[0]]
        changed = {
            s.name
            for s in coupling.sites
            for v in s.axes.values()
            if root in coupling.roots[v[v >= 0]]
        }
        makers = {n for n, v in produced.items() if root in coupling.roots[v]}
        # What reads the unit feels it; so does what shares its class, but for its makers.
        readers = {n for n in changed - makers if n in reach or n not in produced}
        assert changed - makers == readers
