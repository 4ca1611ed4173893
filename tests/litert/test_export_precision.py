"""Models that do not compute in float32 are exported as their float32 copies."""

import threading

import keras
import numpy as np
import pytest
from helpers import quick
from keras import layers, ops

import keras_polar
from keras_polar.litert import export_tflite, run_tflite
from keras_polar.litert.float32_twin import is_float32, twin

SHAPE = (4, 4, 3)
PRECISIONS = ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"]


class Composite(layers.Layer):
    """Has sublayers, a variable of its own, and no config."""

    def __init__(self, units):
        super().__init__()
        self.dense, self.norm = layers.Dense(units), layers.LayerNormalization()

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build((*shape[:-1], self.dense.units))
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return self.norm(self.dense(x)) * self.scale + ops.cast(0.5, self.compute_dtype)


class Holder(layers.Layer):
    """Has a functional model for a sublayer."""

    def __init__(self, units):
        super().__init__()
        inputs = keras.Input((4, 4, units))
        self.model = keras.Model(inputs, layers.Dense(units)(inputs))

    def call(self, x):
        return self.model(x)


@keras.saving.register_keras_serializable("tests")
class Locked(layers.Dense):
    """Cannot be copied, only remade from its config."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lock = threading.Lock()


def nested(x):
    inputs = keras.Input(x.shape[1:])
    return keras.Model(inputs, layers.Conv2D(8, 1)(inputs), name="inner")(x)


def adapted():
    layer = layers.Normalization()
    layer.adapt(np.random.default_rng(0).normal(2.1, 3.3, (20, 4, 4, 8)).astype("float32"))
    return layer


def shared(x):
    layer = layers.Dense(8)
    return layer(layer(x))


STEPS = {
    "convolutions": lambda x: layers.SeparableConv2D(8, 3, padding="same")(layers.Conv2D(8, 1)(x)),
    "norms": lambda x: layers.GroupNormalization(4)(layers.BatchNormalization()(x)),
    "statistics": lambda x: adapted()(x),
    "operations": lambda x: ops.relu(x) * 2.0 + np.ones(8, "float16"),
    "cast": lambda x: ops.cast(x, "float16"),
    "nested": nested,
    "sequential": lambda x: keras.Sequential([layers.Dense(8), layers.ReLU()])(x),
    "attention": lambda x: layers.MultiHeadAttention(2, 4)(x, x),
    "composite": lambda x: Composite(8)(x),
    "holder": lambda x: Holder(8)(x),
    "locked": lambda x: Locked(8)(x),
    "shared": shared,
    "lambda": lambda x: layers.Lambda(lambda t: 0.5 * t)(x),
    "recurrent": lambda x: layers.Bidirectional(layers.LSTM(4))(layers.Reshape((16, 8))(x)),
}


def model_of(precision, *names, head=None):
    """A model in some precision; its weights are those of every other precision."""
    before = keras.config.dtype_policy(), keras.config.floatx()
    try:
        keras.config.set_dtype_policy(precision)
        if precision in ("float16", "float64"):
            keras.config.set_floatx(precision)
        x = inputs = keras.Input(SHAPE, name="image")
        x = layers.Conv2D(8, 1, kernel_initializer="glorot_uniform")(x)
        for name in names:
            x = STEPS[name](x)
        model = keras.Model(inputs, layers.Dense(3, dtype=head)(layers.Flatten()(x)))
    finally:
        keras.config.set_dtype_policy(before[0])
        keras.config.set_floatx(before[1])
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        if "float" in keras.backend.standardize_dtype(weight.dtype):
            weight.assign(np.abs(0.2 * rng.normal(size=weight.shape)) + 0.05)
    return model


def images(count=8):
    return np.random.default_rng(1).random((count, *SHAPE)).astype("float32")


@pytest.mark.parametrize("name", STEPS)
def test_copy_computes_the_same_in_float32(name):
    model = model_of("mixed_float16", name)
    copy = twin(model)
    assert not is_float32(model)
    assert is_float32(copy)
    assert copy.output.dtype == "float32"
    assert {id(v) for v in copy.variables}.isdisjoint(id(v) for v in model.variables)
    got = ops.convert_to_numpy(copy(images()))
    half = ops.convert_to_numpy(model(images())).astype("float32")
    assert np.abs(got - half).max() <= 1e-2 * np.abs(half).max()
    if name != "cast":  # to float16, in a float32 model too
        full = ops.convert_to_numpy(model_of("float32", name)(images()))
        np.testing.assert_allclose(got, full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", quick(["mixed_float16", "float64"], PRECISIONS))
def test_every_precision_is_exported(tmp_path, precision):
    model = model_of(precision, "convolutions", "norms", "operations")
    policies = [x.dtype_policy.name for x in model._flatten_layers()]
    weights = [w.copy() for w in model.get_weights()]
    report = export_tflite(model, tmp_path / "net.tflite", representative_data=images())
    assert report.relative_difference <= 1e-5
    assert 0 < report.precision_difference <= (0.1 if "bfloat16" in precision else 0.01)
    assert [(t.name, t.dtype) for t in report.inputs] == [("image", "float32")]
    assert "float32 copy" in str(report)
    expected = ops.convert_to_numpy(model(images())).astype("float64")
    off = np.abs(run_tflite(report.path, images())["output_0"] - expected).max()
    assert off / np.abs(expected).max() == pytest.approx(
        report.precision_difference, rel=0.1, abs=1e-6
    )
    assert [x.dtype_policy.name for x in model._flatten_layers()] == policies
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("names", [["convolutions"], ["recurrent"]])
@pytest.mark.parametrize(
    ("quantize", "tolerance"),
    quick([("float16", 0.01)], [("float16", 0.01), ("dynamic", 0.05), ("int8", 0.1)]),
)
def test_mixed_precision_is_quantized(tmp_path, names, quantize, tolerance):
    model = model_of("mixed_float16", *names, head="float32")
    report = export_tflite(model, tmp_path / "net.tflite", quantize, representative_data=images(16))
    assert report.relative_difference <= tolerance
    assert report.precision_difference <= 0.01


def test_float32_models_are_written_as_they_are(tmp_path):
    report = export_tflite(model_of("float32"), tmp_path / "net.tflite")
    assert report.precision_difference is None
    assert "float32 copy" not in str(report)


def test_cast_to_another_precision_within_a_float32_model_is_exported(tmp_path):
    model = model_of("float32", "cast")
    assert not is_float32(model)
    report = export_tflite(model, tmp_path / "net.tflite", representative_data=images())
    assert report.relative_difference <= 1e-5
    assert 0 < report.precision_difference <= 0.01


def test_gated_model_in_mixed_precision_is_exported(tmp_path):
    gated = keras_polar.apply(model_of("mixed_float16", "convolutions"), 0.3, gate="static")
    gated.settle()
    report = export_tflite(gated, tmp_path / "net.tflite", representative_data=images())
    assert report.relative_difference <= 1e-5


def test_latency_of_mixed_precision_is_measured(tmp_path):
    model = model_of("mixed_float16")
    table = keras_polar.latency_table(model, tmp_path / "table.json", runs=2)
    assert len(table.ops) == 3
