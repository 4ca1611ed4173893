"""Quantisation-aware training: an exact translation, int8 files, and a process left unharmed."""

import importlib.util
import os
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import randomise
from keras import layers

import keras_polar
from keras_polar.litert.tf_keras_twin import translated
from keras_polar.surgery.certificate import random_inputs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_model_optimization") is None,
    reason="needs the extra qat; `make test-all` installs it",
)


def conv_net(*middle):
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(x)
    x = layers.ReLU(name="stem_relu")(layers.BatchNormalization(name="stem_bn")(x))
    for step in middle:
        x = step(x)
    x = layers.GlobalAveragePooling2D()(x)
    return randomise(keras.Model(inputs, layers.Dense(5, name="logits")(x), name="conv_net"))


def residual(x):
    y = layers.Conv2D(8, 1, use_bias=False)(x)
    return layers.ReLU()(layers.Add()([x, layers.BatchNormalization()(y)]))


def images(count=32):
    return np.random.default_rng(0).normal(size=(count, 8, 8, 3)).astype("float32")


SHARED = layers.Conv2D(8, 3, padding="same", activation="tanh")


@pytest.mark.parametrize(
    "middle",
    [
        [layers.DepthwiseConv2D(3, strides=2, padding="same"), layers.LeakyReLU(0.07)],
        [layers.SeparableConv2D(6, 3), layers.ReLU(6.0), layers.MaxPooling2D()],
        [layers.Conv2D(6, 3, groups=2, dilation_rate=2), layers.Activation("silu")],
        [layers.Conv2DTranspose(4, 3, strides=2), layers.ZeroPadding2D(), layers.Dropout(0.5)],
        [lambda x: layers.Concatenate()([x, layers.UpSampling2D()(layers.AveragePooling2D(2)(x))])],
        [lambda x: keras.ops.relu6(x + layers.Conv2D(8, 1)(x)) * x],
        [SHARED, SHARED],
        [keras.Sequential([layers.Conv2D(4, 3), layers.PReLU()], name="nested")],
        [lambda x: layers.Reshape((4, 16, 8))(x), layers.BatchNormalization(scale=False)],
    ],
)
def test_translation_is_exact(middle):
    model = conv_net(*middle)
    twin, x = translated(model), random_inputs(model, batch=7, seed=3)
    expected = keras.ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(twin(x).numpy(), expected, atol=1e-6 * np.abs(expected).max() + 1e-7)
    assert [tuple(w.shape) for w in twin.trainable_weights] == [
        tuple(w.shape) for w in model.trainable_weights
    ]


def test_mixed_precision_becomes_float32():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = conv_net(layers.Conv2D(4, 3))
    finally:
        keras.config.set_dtype_policy("float32")
    twin, x = translated(model), images()
    expected = keras.ops.convert_to_numpy(model(x)).astype("float32")
    assert twin(x).dtype == tf.float32
    assert 0 < np.abs(twin(x).numpy() - expected).max() < 2e-2 * np.abs(expected).max()


def test_inputs_keep_their_structure():
    a, b = keras.Input((3,), name="z"), keras.Input((3,), name="a")
    out = layers.Dense(2)(layers.Concatenate()([a, b]))
    model = keras.Model({"z": a, "a": b}, {"sum": out, "same": layers.ReLU()(out)})
    x = random_inputs(model)
    expected, got = model(x), translated(model)(x)
    assert set(got) == set(expected)
    np.testing.assert_allclose(got["same"].numpy(), expected["same"], atol=1e-6)


class Doubled(layers.Layer):
    def call(self, x):
        return 2 * x


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda x: x + 1.0, ["more than tensors", "Add"]),
        (lambda x: keras.ops.tanh(x), ["no such layer", "Tanh"]),
        (layers.GroupNormalization(2, name="norm"), ["norm", "cannot quantize"]),
        (layers.Rescaling(0.5, name="half"), ["half", "cannot quantize"]),
        (layers.BatchNormalization(name="norm"), ["norm", "cannot quantize"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_float_path(step, words):
    with pytest.raises(ValueError, match=r"export_tflite\(model, path, 'int8'") as caught:
        keras_polar.quantize_aware(conv_net(step))
    assert all(word in str(caught.value) for word in words)


def test_gated_model_ends_as_int8_and_leaves_keras_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("TF_USE_LEGACY_KERAS", raising=False)
    gated = keras_polar.apply(conv_net(residual), 0.3, gate="static")
    for group in gated.groups:
        group.set_mask(np.arange(group.units) % 2 == 0)
    qat = keras_polar.quantize_aware(gated)
    assert "TF_USE_LEGACY_KERAS" not in os.environ
    assert tf.keras.__version__ == keras.__version__

    x = images()
    labels = gated.predict(x, verbose=0).argmax(1)
    qat.compile("sgd", "mse")
    qat.fit(x, np.eye(5)[labels], verbose=0)  # learns the ranges of its activations
    path = tmp_path / "net.tflite"
    report = keras_polar.export_tflite(qat, path, "int8", evaluation_data=(x, labels))
    assert [t.dtype for t in (*report.inputs, *report.outputs)] == ["int8", "int8"]
    assert report.inputs[0].name == "image"
    assert report.relative_difference < 0.1
    assert report.samples == len(x)
    assert report.accuracy is not None
    expected = qat.predict(x, verbose=0)
    got = keras_polar.run_tflite(path, x)["output_0"]
    assert np.abs(got - expected).max() == pytest.approx(report.max_difference, rel=1e-3)
    with pytest.raises(ValueError, match="quantize='int8'"):
        keras_polar.export_tflite(qat, path)


def test_plain_tf_keras_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="quantize_aware"):
        keras_polar.export_tflite(translated(conv_net()), tmp_path / "net.tflite", "int8")


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_model_optimization", None)
    with pytest.raises(ImportError, match=r'pip install "keras_polar\[qat\]"'):
        keras_polar.quantize_aware(conv_net())
