"""Gates, losses, fit and convert on whatever backend KERAS_BACKEND names."""

import keras
import numpy as np
import pytest
from certify import certify_model
from helpers import check, quick, randomise, small_resnet
from keras import layers
from random_first import FIRST_ELSEWHERE
from random_models import side_by_side

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.coupling.coupling import why_fixed
from keras_polar.surgery.certificate import difference, random_inputs


@pytest.mark.parametrize("gate", ["dynamic", "static"])
def test_apply_fit_convert(gate):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 8, 8, 1)).astype("float32")
    y = (x.mean(axis=(1, 2, 3)) > 0).astype("int64")
    late = keras_polar.Schedule(warmup=0.2, ramp=0.4, settle=0.4)
    gated = keras_polar.apply(small_resnet(classes=2), 0.5, gate=gate, schedule=late)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    gated.compile("adam", loss, metrics=["accuracy"])
    history = gated.fit(x, y, epochs=6, batch_size=32, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert history["sparsity"][0] == pytest.approx(0, abs=0.05)
    assert history["sparsity"][-1] == pytest.approx(gated.sparsity, abs=1e-5)
    assert abs(gated.sparsity - 0.5) <= 0.015  # one unit of this tiny model is about 1 %
    assert difference(gated, keras_polar.convert(gated, verify=x[:32]), x[:32]) <= 1e-4


@pytest.mark.parametrize("gate", quick(["dynamic"], ["dynamic", "static"]))
def test_units_inside_a_layer(gate):
    rng = np.random.default_rng(0)
    x = rng.integers(1, 20, (96, 6)) * (np.arange(6) < rng.integers(3, 7, (96, 1)))
    y = (x[:, 0] > 10).astype("int64")
    tokens = keras.Input((6,), dtype="int32")
    z = layers.Embedding(20, 8, mask_zero=True)(tokens)
    z = layers.Add()([z, layers.MultiHeadAttention(4, 6, dropout=0.1, name="attention")(z, z)])
    z = layers.LSTM(8, dropout=0.1, name="lstm")(z)
    gated = keras_polar.apply(
        keras.Model(tokens, layers.Dense(2)(z)), 0.4, gate=gate, compact=False
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    gated.compile(keras.optimizers.Adam(1e-2), loss)
    before = keras.ops.convert_to_numpy(keras.ops.copy(gated.get_layer("lstm").variables[1]))
    history = gated.fit(x, y, epochs=6, batch_size=32, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert abs(gated.sparsity - 0.4) <= 0.03
    now = keras.ops.convert_to_numpy(gated.get_layer("lstm").variables[1])
    assert now.shape == before.shape == (8, 32)
    assert (now != before).any(axis=1).all()
    assert difference(gated, keras_polar.convert(gated, verify=x[:32]), x[:32]) <= 1e-4


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="TensorFlow has no kernels for these on a CPU"
)
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_channels_first(rank):
    names = [n for n, (ranks, _) in FIRST_ELSEWHERE.items() if rank in ranks]
    coupling = certify_model(side_by_side(rank, names))
    produced = coupling.produced()
    assert not [n for n in names if why_fixed(coupling, produced[f"before {n}"])]


def network(shape, *steps):
    inputs = x = keras.Input(shape)
    for step in steps:
        x = step(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def attended(x):
    return layers.Add()([x, layers.MultiHeadAttention(4, 6, name="attention")(x, x)])


MODELS = {
    # Eight channels are left: with fewer, PyTorch 2.13 computes the gradient of a 1x1 convolution
    # with strides out of memory it never wrote (oneDNN, channels last), in any model of Keras.
    "residual": lambda: small_resnet(widths=(16, 32)),
    "depthwise": lambda: network(
        (8, 8, 3),
        layers.Conv2D(8, 1),
        layers.BatchNormalization(),
        layers.DepthwiseConv2D(3, depth_multiplier=2, activation="tanh"),
        layers.Conv2D(6, 1),
        layers.GlobalAveragePooling2D(),
    ),
    "dense": lambda: network((8,), layers.Dense(12, activation="tanh"), layers.Dense(8)),
    "attention": lambda: network((6, 8), layers.Dense(8), attended, layers.GlobalMaxPooling1D()),
    "lstm": lambda: network((6, 8), layers.LSTM(8, return_sequences=True), layers.LSTM(6)),
}


@pytest.mark.parametrize("gate", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_certificate(name, gate):
    check(randomise(MODELS[name]()), gate)


@pytest.mark.parametrize("gate", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_a_settled_model_learns_what_its_sub_network_learns(name, gate):
    gated = keras_polar.apply(randomise(MODELS[name]()), 0.01, gate=gate, measure="units")
    for group in gated.groups:
        if "key" not in group.name:  # narrower keys are rescaled, and learn at another rate
            group.set_mask(np.arange(group.units) % 2 == 0)
    gated.settle()
    small = keras_polar.convert(gated)
    x = random_inputs(gated, batch=29)
    y = np.random.default_rng(0).standard_normal((29, small.output_shape[-1]))
    before = small(x)
    for model in (gated, small):
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
        model.fit(x, y, epochs=3, batch_size=29, verbose=0)
    assert difference(lambda *_, **__: before, small, x) > 1e-2
    assert difference(gated, small, x) <= 1e-4


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="TensorFlow writes the files")
def test_other_backends_are_told_how_to_export(tmp_path):
    model = MODELS["dense"]()
    remedy = f"it runs on '{keras.backend.backend()}'.*set KERAS_BACKEND=tensorflow"
    for gone in (
        lambda: keras_polar.export_tflite(model, tmp_path / "net.tflite"),
        lambda: keras_polar.quantize_aware(model),
    ):
        with pytest.raises(ValueError, match=remedy):
            gone()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_widths_of_keys_and_values_go_together_where_the_backend_wants_them_equal(dropout):
    inputs = keras.Input((6, 8))
    x = layers.MultiHeadAttention(4, 6, dropout=dropout, name="attention")(inputs, inputs)
    names = [g.name for g in keras_polar.apply(keras.Model(inputs, layers.Dense(3)(x))).groups]
    is_tied = keras.backend.backend() == "jax" and not dropout
    assert ("attention.value" in names) is not is_tied


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scalars_and_arrays_of_any_precision_become_arrays(dtype):
    for value in (0.5, [0.5, 1.0]):
        found = to_numpy(keras.ops.convert_to_tensor(value, dtype))
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found.astype("float32"), value)


def test_a_nested_network_gets_its_inputs_by_their_names():
    """In whatever order they are written: PyTorch's trees do not sort dicts wherever others do."""
    inner = {
        "second": keras.Input((None, 4), name="second"),
        "first": keras.Input((None, 4), name="first"),
    }
    joined = inner["second"] - 2.0 * layers.Dense(4, name="dense")(inner["first"])
    inner = keras.Model(inner, joined, name="inner")
    whole = {name: keras.Input((6, 4), name=name) for name in ("second", "first")}
    y = layers.Dense(2, name="head")(layers.Dense(8, name="wide")(inner(whole)))
    check(keras.Model(whole, y))
