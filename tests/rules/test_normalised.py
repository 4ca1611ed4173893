"""What averages over units: certificate, files, and that the units in front of it can go."""

import keras
import numpy as np
import pytest
from helpers import check, randomise
from keras import layers, ops

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.gates.over_open import OverOpen
from keras_polar.surgery.certificate import difference, random_inputs

RNG = np.random.default_rng(0)


def constant(*shape):
    return RNG.standard_normal(shape).astype("float32")


def model_of(*steps):
    """Eight units on a sequence, the steps, a reader and a head."""
    inputs = keras.Input((6, 4))
    x = layers.Dense(8, activation="tanh", name="first")(inputs)
    for step in steps:
        x = step(x)
    x = layers.Flatten()(layers.Dense(5)(x))
    return randomise(keras.Model(inputs, layers.Dense(3)(x)))


@keras.saving.register_keras_serializable("test")
class Rms(layers.Layer):
    """As language models write it."""

    def build(self, shape):
        self.scale = self.add_weight((shape[-1],), "ones", name="gamma")

    def call(self, x):
        y = ops.cast(x, "float32")
        square = ops.mean(ops.power(y, 2), axis=-1, keepdims=True)
        return ops.cast(y * ops.rsqrt(square + 1e-6) * self.scale, self.compute_dtype)


@keras.saving.register_keras_serializable("test")
class GlobalResponse(layers.Layer):
    """ConvNeXt V2's global response normalisation."""

    def build(self, shape):
        self.gamma = self.add_weight((shape[-1],), "ones", name="gamma")
        self.beta = self.add_weight((shape[-1],), "zeros", name="beta")

    def call(self, x):
        norm = ops.sqrt(ops.sum(ops.square(x), axis=1, keepdims=True) + 1e-6)
        return self.gamma * (x * norm / ops.mean(norm, axis=-1, keepdims=True)) + self.beta + x


@keras.saving.register_keras_serializable("test")
class ByMoments(layers.Layer):
    def call(self, x):
        mean, variance = ops.moments(x, axes=[-1], keepdims=True)
        return (x - mean) / ops.sqrt(variance + 1e-3)


@keras.saving.register_keras_serializable("test")
class ByNorm(layers.Layer):
    """Sums over the units: closed ones add zero."""

    def call(self, x):
        return x / ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + 1e-3)


@keras.saving.register_keras_serializable("test")
class ByOperation(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight((shape[-1],), "ones", name="gamma")

    def call(self, x):
        return ops.rms_normalization(x, self.scale) + ops.softmax(x)


@keras.saving.register_keras_serializable("test")
class UnitsSecond(layers.Layer):
    """Units are not on the last axis, and vanish from the result."""

    def call(self, x):
        return x - ops.expand_dims(ops.std(x, axis=1), 1)


def by_hand(x):
    centred = x - ops.mean(x, axis=-1, keepdims=True)
    return centred / ops.sqrt(ops.var(x, axis=-1, keepdims=True) + 1e-3)


def both(x):
    return layers.LayerNormalization()(layers.Concatenate()([x, layers.Dense(3)(x)]))


def per_head(x):
    """Half of the units stay free: as many on the heads as in each."""
    heads = ops.reshape(x, (-1, 6, 4, 2))
    return ops.reshape(layers.LayerNormalization()(heads), (-1, 6, 8))


def transposed(layer):
    return lambda x: ops.swapaxes(layer(ops.swapaxes(x, 1, 2)), 1, 2)


NORMAL = layers.LayerNormalization
CASES = {
    "layer": lambda: NORMAL(),
    "no_weights": lambda: NORMAL(center=False, scale=False),
    "two_axes": lambda: NORMAL(axis=(1, 2)),
    "positions": lambda: NORMAL(axis=1),
    "rms_of_two_axes": lambda: layers.RMSNormalization(axis=[-2, -1]),
    "time_distributed": lambda: layers.TimeDistributed(NORMAL()),
    "units": lambda: layers.UnitNormalization(),
    "concatenated": lambda: both,
    "heads": lambda: per_head,
    "own_rms": lambda: Rms(),
    "own_global_response": lambda: GlobalResponse(),
    "own_moments": lambda: ByMoments(),
    "own_norm": lambda: ByNorm(),
    "own_operation": lambda: ByOperation(),
    "own_on_second_axis": lambda: transposed(UnitsSecond()),
    "mean_and_variance": lambda: by_hand,
    "maximum": lambda: lambda x: x - ops.max(x, axis=-1, keepdims=True),
    "minimum_of_two_axes": lambda: lambda x: x * ops.min(x, axis=(1, 2), keepdims=True),
    "maximum_without_its_axis": lambda: lambda x: x + ops.amax(x, axis=2)[..., None],
    "deviation": lambda: lambda x: x * ops.expand_dims(ops.std(x, axis=-1), -1),
    "mean_of_two_axes": lambda: lambda x: x * ops.mean(x, axis=(1, 2), keepdims=True),
    "layer_operation": lambda: lambda x: ops.layer_normalization(x, constant(8), constant(8)),
    "layer_operation_bare": lambda: ops.layer_normalization,
    "rms_operation": lambda: lambda x: ops.rms_normalization(x, constant(8), axis=2),
    "softmax": lambda: layers.Softmax(),
    "softmax_operation": lambda: lambda x: ops.softmax(9 * x),
    "log_softmax": lambda: ops.log_softmax,
    "spectral": lambda: layers.SpectralNormalization(layers.Dense(7)),
}


@pytest.mark.parametrize("name", CASES)
def test_units_in_front_of_it_go(name, tmp_path):
    model = model_of(CASES[name]())
    gate = ("static", "dynamic")[list(CASES).index(name) % 2]
    rows = {r.name: r for r in keras_polar.inspect(model).rows}
    assert rows["first"].prunable == 8, rows["first"].reason
    gated, small = check(model, gate=gate)
    assert small.get_layer("first").units == 4
    x = random_inputs(gated)
    for i, saved in enumerate((gated, small)):
        saved.save(tmp_path / f"{i}.keras")
        assert difference(saved, keras.models.load_model(tmp_path / f"{i}.keras"), x) == 0
    keras_polar.convert(keras.models.load_model(tmp_path / "0.keras"), verify=x)


def test_a_network_with_a_norm_after_every_layer_can_go():
    inputs = x = keras.Input((12, 3))
    for i in range(3):
        x = layers.Conv1D(8, 3, padding="causal", activation="relu", name=f"conv{i}")(x)
        x = layers.LayerNormalization()(x)
    x = layers.LayerNormalization()(layers.Dense(7, activation="relu", name="dense")(x))
    model = randomise(keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x))))
    rows = {r.name: r.prunable for r in keras_polar.inspect(model).rows}
    assert rows == {"conv0": 8, "conv1": 8, "conv2": 8, "dense": 7, "head": 0}
    check(model, gate="dynamic")


@pytest.mark.parametrize("gate", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_a_stream_of_all_kinds_trains(gate):
    inputs = keras.Input((6, 4))
    x = layers.Dense(8, name="first")(inputs)
    for i, norm in enumerate((Rms(), GlobalResponse(), by_hand, layers.Softmax())):
        x = x + layers.Dense(8)(layers.Dense(6, activation="gelu", name=f"wide{i}")(norm(x)))
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(ops.layer_normalization(x))))
    options = {"gate": gate, "round_to": 1, "compact": gate == "static"}
    gated = keras_polar.apply(model, 0.4, **options)
    gated.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=False)
    x, y = constant(64, 6, 4), constant(64, 2)
    history = gated.fit(x, y, epochs=6, batch_size=16, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    stream = gated.groups[0]
    assert stream.units == 8
    assert (to_numpy(stream._gate.heard)[0] > 0).all()
    assert gated.sparsity == pytest.approx(0.4, abs=0.05)
    keras_polar.convert(gated, verify=x)


def test_a_shared_norm_without_weights_has_the_units_of_each_call():
    norm = layers.LayerNormalization(center=False, scale=False)
    inputs = keras.Input((6, 4))
    x = norm(layers.Dense(8, name="first")(inputs))
    x = norm(layers.Dense(7, name="second")(x))
    gated, small = check(randomise(keras.Model(inputs, layers.Dense(3)(x))), gate="dynamic")
    assert [g.units for g in gated.groups] == [8, 7]
    assert [small.get_layer(n).units for n in ("first", "second")] == [4, 3]


def test_a_shared_norm_with_weights_ties_its_units():
    norm, inputs = layers.LayerNormalization(), keras.Input((6, 4))
    x = norm(layers.Dense(8, name="first")(inputs))
    y = norm(layers.Dense(8, name="second")(layers.GlobalMaxPooling1D()(x)))
    gated, small = check(randomise(keras.Model(inputs, layers.Dense(3)(y))))
    assert [g.layers for g in gated.groups] == [["first", "second"]]
    assert small.get_layer(norm.name).gamma.shape == (4,)


def test_units_that_stay_count_in_the_statistics():
    """A stream of which one writer is ignored, beside another that goes."""
    inputs = keras.Input((6, 4))
    parts = [layers.Dense(5, name=n)(inputs) for n in ("stays", "goes")]
    x = layers.Dense(3)(layers.LayerNormalization(name="norm")(layers.Concatenate()(parts)))
    model = randomise(keras.Model(inputs, x))
    gated = keras_polar.apply(model, 0.1, ignore=["stays"], gate="dynamic")
    (group,) = gated.groups
    group.set_mask(np.array([True, False, True, False, False]))
    small = keras_polar.convert(gated, verify=True)
    assert small.get_layer("norm").gamma.shape == (7,)


def test_remove_gives_statistics_of_what_is_left():
    model = model_of(layers.LayerNormalization(name="norm"))
    small = keras_polar.remove(model, {"first": [0, 3, 7]})
    kept = [1, 2, 4, 5, 6]
    x = random_inputs(model)
    front = keras.Model(model.input, model.get_layer("first").output)
    values = ops.convert_to_numpy(front(x))[..., kept].astype("float64")
    norm = model.get_layer("norm")
    gamma, beta = (ops.convert_to_numpy(v)[kept] for v in (norm.gamma, norm.beta))
    centred = values - values.mean(-1, keepdims=True)
    wanted = centred / np.sqrt(values.var(-1, keepdims=True) + norm.epsilon) * gamma + beta
    found = keras.Model(small.input, small.get_layer("norm").output)(x)
    np.testing.assert_allclose(ops.convert_to_numpy(found), wanted, rtol=1e-4, atol=1e-5)


def test_the_plan_of_a_traced_layer_holds_for_any_length():
    layer = Rms()
    layer.build((None, None, 8))
    inputs, gates = keras.Input((None, 8)), keras.Input((8,))
    model = keras.Model([gates, inputs], OverOpen(layer, 2)([gates], inputs))
    shares = np.float32([[1, 0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0, 1]])
    for length in (1, 5, 8):
        x = constant(2, length, 8)
        square = (shares[:, None] * x**2).sum(-1, keepdims=True) / shares.sum(-1)[:, None, None]
        for found in (model([shares, x]), model.predict([shares, x], verbose=0)):
            np.testing.assert_allclose(found, x / np.sqrt(square + 1e-6), rtol=1e-4, atol=1e-5)


def convolutions():
    inputs = x = keras.Input((6, 6, 3))
    for kernel in (
        layers.Conv2D(8, 3, activation="relu", name="first"),
        layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2),
        layers.Conv2DTranspose(5, 3),
        layers.Dense(4),
    ):
        x = layers.SpectralNormalization(kernel)(x)
    return randomise(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))))


def test_spectral_normalization_is_cut_along_with_its_vector():
    model = convolutions()
    _, small = check(model, gate="dynamic")
    vectors = [v.shape for v in small.variables if v.path.endswith("vector_u")]
    kernels = [x.layer.kernel.shape for x in small.layers if hasattr(x, "power_iterations")]
    assert vectors == [(1, k[-1]) for k in kernels] == [(1, 4), (1, 2), (1, 8), (1, 2)]


def test_spectral_normalization_trains():
    gated = keras_polar.apply(convolutions(), 0.3)
    gated.compile("adam", "mse")
    x = random_inputs(gated, batch=16)
    with pytest.warns(UserWarning, match="norm of all of it, closed units included"):
        gated.fit(x, constant(16, 2), epochs=6, batch_size=8, verbose=0)
    keras_polar.convert(gated, verify=True)


def test_a_token_in_front_is_one_place_however_many_follow():
    """More tokens than channels, of two kinds: the channels are the units all the same."""
    x = keras.Input((16, 3))
    h = layers.Dense(8, name="patches")(x)
    first = layers.Dense(8, name="first")(ops.mean(x, axis=1, keepdims=True))
    h = layers.LayerNormalization()(ops.concatenate([first, h], axis=1))
    model = randomise(keras.Model(x, layers.Dense(3, name="head")(h[:, 0])))
    rows = {row.name: row for row in keras_polar.inspect(model).rows}
    assert rows["patches"].prunable == rows["first"].prunable == 8, rows["first"].reason
    check(model)
