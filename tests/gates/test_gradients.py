"""Losses, gradients and moving averages are those of the formulas, written down in NumPy."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.gates.gate import GAIN, MOMENTUM, hard_step
from keras_polar.gates.objective import polarization_loss

BACKEND = keras.backend.backend()
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slope(x):
    return sigmoid(x) * (1 - sigmoid(x))


def value_and_gradient(function, x):
    """Of a function of one tensor, by the backend's own means."""
    x = ops.convert_to_tensor(x, "float32")
    if BACKEND == "jax":
        import jax

        return tuple(map(to_numpy, jax.value_and_grad(function)(x)))
    if BACKEND == "torch":
        x.requires_grad_()
        value = function(x)
        value.backward()
        return to_numpy(value), to_numpy(x.grad)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return to_numpy(value), to_numpy(tape.gradient(value, x))


def test_polarization():
    rates, weights = np.array([0.0, 0.2, 0.5, 1.0]), np.array([0.1, 0.2, 0.3, 0.4])
    constant = ops.convert_to_tensor(weights, "float32")
    value, gradient = value_and_gradient(lambda r: polarization_loss(r, constant), rates)
    np.testing.assert_allclose(value, 0.2 * 0.2 * 0.8 + 0.3 * 0.5 * 0.5, **CLOSE)
    mixed = [0, 1, 1, 0]  # units about which samples disagree
    np.testing.assert_allclose(gradient, mixed * weights * (1 - 2 * rates), **CLOSE)


def test_hard_step():
    logits, weights = np.array([-3.0, -0.1, 0.0, 0.1, 3.0]), np.arange(1.0, 6.0)
    constant = ops.convert_to_tensor(weights, "float32")
    value, gradient = value_and_gradient(lambda x: ops.sum(constant * hard_step(x)), logits)
    np.testing.assert_allclose(value, 4 + 5, **CLOSE)
    np.testing.assert_allclose(gradient, weights * slope(logits), **CLOSE)


@pytest.mark.parametrize("target", [0.6, 0.1])  # some is missing, or nothing is
def test_consensus(target):
    inputs = keras.Input((3,))
    x = layers.Dense(5, name="b")(layers.Dense(4, name="a")(inputs))
    schedule = keras_polar.Schedule(warmup=0.1, ramp=0.35, settle=0.5, polarization=4, rate=10)
    model = keras.Model(inputs, layers.Dense(2)(x))
    gated = keras_polar.apply(model, target, schedule=schedule, importance="logits")
    layer = gated.consensus
    for variable, value in ((layer.step, 20), (layer.steps, 100), (layer.multiplier, 0.3)):
        variable.assign(value)

    def loss(logits):
        gates = hard_step(logits)
        with keras.StatelessScope(collect_losses=True) as scope:
            layer(ops.zeros((7, 2)), [gates[:, :4], gates[:, 4:]], training=True)
        (found,) = scope.losses
        return found

    logits = 1 + np.random.default_rng(0).standard_normal((7, 9))
    value, gradient = value_and_gradient(loss, logits)
    rates = (logits > 0).mean(axis=0)
    a, b = rates[:4].sum(), rates[4:].sum()
    shares = np.repeat([1 / 8, 1 / 10], [4, 5])
    full, cost = 4 * 4 + 5 * 5 + 6 * 2, (3 + 1) * a + (a + 1) * b + (b + 1) * 2
    cost_slope = np.repeat([(4 + b) / full, (a + 3) / full], [4, 5])
    pressure = (0.2 - 0.1) / (0.35 - 0.1)
    missing = pressure * target - (1 - cost / full)
    multiplier = max(0.3 + 0.1 * missing, 0)
    assert (missing > 0) == (target == 0.6)
    wanted = multiplier * max(missing, 0) + pressure * 4 * (shares * rates * (1 - rates)).sum()
    mixed = (rates > 0) & (rates < 1)
    by_rate = pressure * 4 * mixed * shares * (1 - 2 * rates)
    by_rate += (missing > 0) * multiplier * cost_slope
    np.testing.assert_allclose(value, wanted, **CLOSE)
    np.testing.assert_allclose(gradient, by_rate / 7 * slope(logits), **CLOSE)


def one_hidden_layer(gate):
    """Gates of which some would close, and no losses that press them."""
    rng = np.random.default_rng(0)
    inputs = keras.Input((3,))
    hidden = layers.Dense(4, name="hidden")(inputs)
    schedule = keras_polar.Schedule(warmup=1, ramp=1, settle=1, steps=100)
    model = keras.Model(inputs, layers.Dense(2, name="head")(hidden))
    gated = keras_polar.apply(model, 0.5, gate=gate, schedule=schedule, importance="logits")
    for variable in gated.trainable_variables:
        variable.assign(rng.standard_normal(variable.shape))
    layer = gated.get_layer("hidden_gate")
    layer.bias.assign([-0.2, 0.1, 0.15, -0.05])
    layer.scores.assign([0.9, 0.1, 0.8, 0.2])  # the first stays open whatever its logit is
    assert layer.min_units == 1
    return gated, layer


def gradients_in_numpy(w, x, y, pressure):
    """Of the mean squared error, by the path of each variable; and gates and their sigmoids."""
    centred = x - x.mean(axis=1, keepdims=True)
    seen = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) / np.sqrt(3)
    logits = GAIN * (w["hidden_gate/bias"] + seen @ w.get("hidden_gate/kernel", np.zeros((3, 4))))
    gates = (logits > 0) | (np.arange(4) == 0)
    hidden = x @ w["hidden/kernel"] + w["hidden/bias"]
    masked = hidden * gates
    by_output = 2 * (masked @ w["head/kernel"] + w["head/bias"] - y) / y.size
    by_masked = by_output @ w["head/kernel"].T
    by_logits = pressure * by_masked * hidden * slope(logits) * GAIN
    found = {
        "head/kernel": masked.T @ by_output,
        "head/bias": by_output.sum(axis=0),
        "hidden/kernel": x.T @ (by_masked * gates),
        "hidden/bias": (by_masked * gates).sum(axis=0),
        "hidden_gate/bias": by_logits.sum(axis=0),
        "hidden_gate/kernel": seen.T @ by_logits,
    }
    return {path: found[path] for path in w}, gates, sigmoid(logits)


@pytest.mark.parametrize("pressure", [None, 0.25, 1.0])
@pytest.mark.parametrize("gate", ["dynamic", "static"])
def test_a_training_step(gate, pressure):
    """With a rate of 1, SGD takes the gradients off the weights; gates do not learn in warm-up."""
    gated, layer = one_hidden_layer(gate)
    if pressure:
        layer.pressure = lambda: pressure
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((6, n)).astype("float32") for n in (3, 2))
    before = {v.path: to_numpy(v).astype("float64") for v in gated.trainable_variables}
    scores = to_numpy(layer.scores)
    gated.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=False)
    gated.train_on_batch(x, y)
    wanted, gates, soft = gradients_in_numpy(before, x, y, pressure or 0)
    assert 0 < gates.mean() < 1
    for variable in gated.trainable_variables:
        found = before[variable.path] - to_numpy(variable)
        np.testing.assert_allclose(found, wanted[variable.path], 1e-4, 1e-5, err_msg=variable.path)
    rates = {"open_rates": (np.ones(4), gates), "scores": (scores, soft)}
    for name, (old, now) in rates.items():
        wanted_rate = MOMENTUM * old + (1 - MOMENTUM) * now.mean(axis=0)
        np.testing.assert_allclose(to_numpy(getattr(layer, name)), wanted_rate, **CLOSE)
