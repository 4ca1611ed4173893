"""Normalisation over open units: values and gradients in NumPy, and what `fit` makes of it."""

import keras
import numpy as np
import pytest
from helpers import close_half, model_of, randomise
from keras import layers, ops

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.gates.over_open import OverOpen
from keras_polar.graph.keras_private import op_class
from keras_polar.surgery.certificate import difference, random_inputs

RNG = np.random.default_rng(0)
SHAPE = (3, 4, 5)  # samples, positions, units


def mean(x, gates, axes):
    """Of the units, each as often as its gate says."""
    shares = np.broadcast_to(gates, x.shape)
    return (x * shares).sum(axes, keepdims=True) / shares.sum(axes, keepdims=True)


def layer_norm(layer, x, gates, gamma, beta, axes):
    centred = x - mean(x, gates, axes)
    variance = mean(centred**2, gates, axes)
    return centred / np.sqrt(variance + layer.epsilon) * gamma + beta


def rms_norm(layer, x, gates, gamma, beta, axes):
    return x / np.sqrt(mean(x**2, gates, axes) + layer.epsilon) * gamma


LAYERS = {
    "last": (lambda: layers.LayerNormalization(epsilon=0.1), layer_norm, (2,)),
    "both": (lambda: layers.LayerNormalization(axis=(1, 2)), layer_norm, (1, 2)),
    "bare": (lambda: layers.LayerNormalization(center=False, scale=False), layer_norm, (2,)),
    "rms": (lambda: layers.RMSNormalization(epsilon=0.1), rms_norm, (2,)),
}


def built(make):
    layer = make()
    layer.build(SHAPE)
    for variable in layer.variables:
        variable.assign(1 + 0.3 * RNG.standard_normal(variable.shape))
    return layer


def factors(layer):
    """Scale and offset in double precision."""
    found = (getattr(layer, n, None) for n in ("gamma", "beta"))
    gamma = layer.scale if isinstance(layer, layers.RMSNormalization) else next(found)
    beta = getattr(layer, "beta", None)
    given = zip((gamma, beta), (1.0, 0.0), strict=True)
    return [d if v is None else to_numpy(v).astype("float64") for v, d in given]


@pytest.mark.parametrize("rows", [1, SHAPE[0]])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_the_formulas(name, rows):
    """Gates between 0 and 1 as well: what a gate is told is how the loss changes with it."""
    make, formula, axes = LAYERS[name]
    layer = built(make)
    x, weights = RNG.standard_normal(SHAPE), RNG.standard_normal(SHAPE)
    gates = RNG.uniform(0.2, 1, (rows, SHAPE[-1]))
    gates[:, 1] = 0
    twin = OverOpen(layer, 2)

    def wanted(x, gates):
        return formula(layer, x, gates[:, None], *factors(layer), axes)

    def loss(x, gates):
        return ops.sum(twin([gates], x) * ops.convert_to_tensor(weights, "float32"))

    single = [np.float32(v) for v in (x, gates)]
    found = to_numpy(twin([ops.convert_to_tensor(single[1])], single[0]))
    np.testing.assert_allclose(found, wanted(x, gates), rtol=1e-4, atol=1e-5)
    gradients = gradient_of(loss, single)
    for i, gradient in enumerate(gradients):
        numeric = np.zeros_like((x, gates)[i])
        for place in np.ndindex(numeric.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [x.copy(), gates.copy()]
                moved[i][place] += step
                ends.append((wanted(*moved) * weights).sum())
            numeric[place] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(gradient, numeric, rtol=2e-3, atol=2e-4)


def gradient_of(function, values):
    """Of a function of several tensors, by the backend's own means."""
    if keras.backend.backend() == "jax":
        import jax

        return [np.asarray(g) for g in jax.grad(function, (0, 1))(*values)]
    tensors = [ops.convert_to_tensor(v) for v in values]
    if keras.backend.backend() == "torch":
        for x in tensors:
            x.requires_grad_()
        function(*tensors).backward()
        return [to_numpy(x.grad) for x in tensors]
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(*tensors)
    return [to_numpy(g) for g in tape.gradient(value, tensors)]


@pytest.mark.parametrize("name", LAYERS)
def test_with_all_gates_open_it_is_the_layer(name):
    layer = built(LAYERS[name][0])
    x = RNG.standard_normal(SHAPE).astype("float32")
    found = OverOpen(layer, 2)([ops.ones((1, SHAPE[-1]))], x)
    np.testing.assert_allclose(to_numpy(found), to_numpy(layer(x)), rtol=1e-5, atol=1e-6)


def test_each_sample_has_statistics_of_its_own_open_units():
    layer, x = built(LAYERS["last"][0]), RNG.standard_normal(SHAPE).astype("float32")
    gates = np.float32([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 1]])
    found = to_numpy(OverOpen(layer, 2)([ops.convert_to_tensor(gates)], x))
    gamma, beta = factors(layer)
    for sample, gate in enumerate(gates > 0):
        kept = x[sample][:, gate]
        centred = kept - kept.mean(-1, keepdims=True)
        wanted = centred / np.sqrt(kept.var(-1, keepdims=True) + layer.epsilon)
        wanted = wanted * gamma[gate] + beta[gate]
        np.testing.assert_allclose(found[sample][:, gate], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("log", [False, True])
def test_softmax_over_open_units(log):
    x = RNG.standard_normal(SHAPE).astype("float32")
    x[..., 1] = 300  # closed, and far above: its square must not become infinite behind
    gates = np.float32([[1, 0, 1, 1, 0]])
    found = to_numpy(
        OverOpen(op_class("LogSoftmax" if log else "Softmax")(axis=-1), 2)(
            [ops.convert_to_tensor(gates)], x
        )
    )
    assert np.isfinite(found**2).all()
    kept = np.exp(x[..., gates[0] > 0].astype("float64"))
    wanted = kept / kept.sum(-1, keepdims=True)
    wanted = np.log(wanted) if log else wanted
    np.testing.assert_allclose(found[..., gates[0] > 0], wanted, rtol=1e-4, atol=1e-5)


# --- in a gated model ------------------------------------------------------------------------


def stream(norm=layers.LayerNormalization, **options):
    """A residual stream that is normalised in front of every reader."""
    inputs = keras.Input((5, 3))
    x = layers.Dense(8, name="stem")(inputs)
    for i in range(2):
        y = norm(name=f"norm{i}", **options)(x)
        y = layers.Dense(12, activation="tanh", name=f"wide{i}")(y)
        x = layers.Add()([x, layers.Dense(8, name=f"narrow{i}")(y)])
    x = layers.GlobalAveragePooling1D()(norm(name="last_norm", **options)(x))
    return randomise(keras.Model(inputs, layers.Dense(2, name="head")(x)))


def gated_stream(norm=layers.LayerNormalization, gate="static", **options):
    gated = keras_polar.apply(stream(norm, **options), 0.3, gate=gate, compact=False)
    close_half(gated)
    return gated


NORMS = (layers.LayerNormalization, layers.RMSNormalization)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("norm", NORMS)
def test_in_half_precision_statistics_are_float32(norm, policy):
    keras.config.set_dtype_policy(policy)
    try:
        gated = gated_stream(norm)
        small = keras_polar.convert(gated, verify=True)
        assert small.get_layer("norm0").compute_dtype == gated.get_layer("norm0").compute_dtype
        # Sums of squares that halves cannot hold.
        x = 300 * random_inputs(gated)
        assert np.isfinite(to_numpy(ops.cast(gated(x), "float32"))).all()
    finally:
        keras.config.set_dtype_policy("float32")


def test_users_reach_the_layer_by_its_name():
    gated = gated_stream()
    norm = gated.get_layer("norm0")
    assert norm.gamma is norm.layer.gamma
    norm.trainable = False
    assert not norm.layer.trainable
    assert not keras_polar.convert(gated).get_layer("norm0").trainable


@pytest.mark.parametrize("gate", ["static", "dynamic"])
def test_a_gated_stream_is_saved_and_loads(gate, tmp_path):
    gated = gated_stream(gate=gate)
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    x = random_inputs(gated)
    assert difference(gated, loaded, x) == 0
    small = keras_polar.convert(loaded, verify=x)
    small.save(tmp_path / "small.keras")
    assert difference(small, keras.models.load_model(tmp_path / "small.keras"), x) == 0


def test_regularisers_see_open_units_alone():
    penalty = keras.regularizers.L2(0.1)
    options = dict.fromkeys(("gamma_regularizer", "beta_regularizer"), penalty)
    gated = gated_stream(activity_regularizer=penalty, **options)
    small = keras_polar.convert(gated)
    x = random_inputs(gated)
    losses = []
    for model in (gated, small):
        model(x, training=False)
        losses.append(sum(float(to_numpy(loss)) for loss in model.losses))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[1] > 0


@pytest.mark.parametrize("gate", ["static", "dynamic"])
def test_gates_of_a_stream_learn_through_its_norms(gate):
    """A stream that nothing but norms reads: what gates hear comes through them."""
    gated = keras_polar.apply(model_of(layers.LayerNormalization()), 0.2, gate=gate)
    gated.compile("sgd", "mse", jit_compile=False)
    x = random_inputs(gated, batch=16)
    gated.fit(x, RNG.standard_normal((16, 3)), epochs=2, batch_size=8, verbose=0)
    (group,) = gated.groups
    assert (to_numpy(group._gate.heard)[0] > 0).all()
