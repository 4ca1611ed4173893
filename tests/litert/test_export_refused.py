"""What LiteRT has no operations for: strings, tables and what Keras has quantized; adapters."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import quick
from keras import layers

import keras_polar
from keras_polar.litert import export_tflite, run_tflite

# Keras says of every other layer that it cannot be quantized.
pytestmark = pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")

VECTORS = layers.TextVectorization(max_tokens=6, output_sequence_length=2)
VECTORS.set_vocabulary(["a", "b"])
LOOKUPS = {
    "string": (layers.StringLookup(vocabulary=["a", "b"]), "string"),
    "text": (VECTORS, "string"),
    "integer": (layers.IntegerLookup(vocabulary=[5, 7]), "int64"),
    "hashed string": (layers.Hashing(5), "string"),
    "hashed integer": (layers.Hashing(5), "int64"),
}


def word_and_number(lookup, dtype):
    word, number = keras.Input((1,), dtype=dtype, name="word"), keras.Input((3,), name="number")
    x = layers.Flatten()(layers.Embedding(6, 4)(lookup(word)))
    return keras.Model([word, number], layers.Dense(2)(layers.Concatenate()([x, number])))


@pytest.mark.parametrize("kind", quick(["string"], LOOKUPS))
def test_lookups_are_refused_with_code_that_works(tmp_path, kind):
    lookup, dtype = LOOKUPS[kind]
    model, path = word_and_number(lookup, dtype), tmp_path / "net.tflite"
    with pytest.raises(ValueError, match="no strings and no tables") as caught:
        export_tflite(model, path)
    assert repr(lookup.name) in str(caught.value)
    code = str(caught.value).partition("`rest = ")[2].partition("`")[0]
    rest = eval(code, {"keras": keras, "model": model})
    report = export_tflite(rest, path)
    words = tf.constant([["a"], ["b"]]) if dtype == "string" else tf.constant([[5], [9]])
    numbers = tf.ones((2, 3))
    names = [tensor.name for tensor in report.inputs]
    got = run_tflite(path, dict(zip(names, [lookup(words).numpy(), numbers.numpy()], strict=True)))
    np.testing.assert_allclose(got["output_0"], model([words, numbers]), atol=1e-5)


def test_lookup_within_a_nested_model_is_to_stand_outside(tmp_path):
    word = keras.Input((1,), dtype="string")
    inner = keras.Model(word, layers.StringLookup(vocabulary=["a"], name="look")(word), name="in")
    x = keras.Input((1,), dtype="string")
    model = keras.Model(x, layers.Flatten()(layers.Embedding(3, 2)(inner(x))))
    with pytest.raises(ValueError, match=r"'in/look'.*outside"):
        export_tflite(model, tmp_path / "net.tflite")


def test_strings_without_a_lookup_are_refused(tmp_path):
    word = keras.Input((1,), dtype="string", name="word")
    length = layers.Lambda(lambda x: tf.cast(tf.strings.length(x), "float32"), output_shape=(1,))
    with pytest.raises(ValueError, match=r"inputs 'word'.*numbers"):
        export_tflite(keras.Model(word, layers.Dense(1)(length(word))), tmp_path / "net.tflite")


def test_buckets_are_numbers(tmp_path):
    x = keras.Input((2,))
    model = keras.Model(
        x, layers.Flatten()(layers.Embedding(4, 2)(layers.Discretization([0.5])(x)))
    )
    assert export_tflite(model, tmp_path / "net.tflite").relative_difference <= 1e-5


# --- quantized by Keras ----------------------------------------------------------------------


def dense_net(width=64):
    x = inputs = keras.Input((width,))
    for name in ("first", "second"):
        x = layers.Dense(width, activation="relu", name=name)(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x))


@pytest.mark.parametrize("mode", quick(["int8"], ["int8", "int4", "float8"]))
def test_quantized_layers_are_refused_with_the_order_that_works(tmp_path, mode):
    model, path = dense_net(), tmp_path / "net.tflite"
    x = np.random.default_rng(0).normal(size=(16, 64))
    before = export_tflite(model, path)
    assert export_tflite(model, path, "int8", representative_data=x).bytes < 0.5 * before.bytes
    path.unlink()
    model.quantize(mode)
    with pytest.raises(
        ValueError, match=r"as it was before `quantize`.*ai-edge-quantizer"
    ) as caught:
        export_tflite(model, path)
    assert f"'first' ({mode})" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def altered(gated, how):
    """The gated model after something that changes its layers."""
    layer = gated.get_layer(how.partition(" ")[0]) if how.startswith(("first", "head")) else None
    layer = getattr(layer, "layer", layer)
    if layer is None:
        gated.quantize(how)
    elif how.endswith("lora"):
        layer.enable_lora(2)
    else:
        layer.quantize("int8")
    return gated


@pytest.mark.parametrize(
    "how",
    quick(["head alone"], ["int8", "float8", "first alone", "head alone"]),
)
def test_convert_after_quantize_says_so(how):
    gated = keras_polar.apply(dense_net(16), 0.3, gate="static")
    gated.settle()
    altered(gated, how)
    with pytest.raises(ValueError, match="quantized by Keras") as caught:
        keras_polar.convert(gated)
    assert "`convert` first" in str(caught.value)
    assert "rule that cuts" not in str(caught.value)


@pytest.mark.parametrize("how", ["first lora", "head lora"])
def test_adapters_that_came_after_apply_are_cut_along(how):
    gated = keras_polar.apply(dense_net(16), 0.3, gate="static")
    gated.settle()
    altered(gated, how)
    layer = gated.get_layer(how.partition(" ")[0])
    rng = np.random.default_rng(0)
    for variable in (layer.lora_kernel_a, layer.lora_kernel_b):
        variable.assign(rng.normal(size=variable.shape))
    small = keras_polar.convert(gated, verify=rng.normal(size=(8, 16)))
    assert small.get_layer(layer.name).lora_enabled


@pytest.mark.parametrize("how", quick(["lora"], ["int8", "int4", "float8", "lora"]))
def test_the_other_order_works(how):
    gated = keras_polar.apply(dense_net(16), 0.3, gate="static")
    gated.settle()
    small = keras_polar.convert(gated)
    x = np.random.default_rng(0).normal(size=(8, 16)).astype("float32")
    before = small.predict(x, verbose=0)
    if how == "lora":
        small.get_layer("first").enable_lora(2)
    else:
        small.quantize(how)
    after = small.predict(x, verbose=0)
    assert np.abs(after - before).max() <= 0.2 * np.abs(before).max()


def test_apply_to_a_quantized_model_says_so():
    model = dense_net(16)
    model.quantize("int8")
    with pytest.raises(ValueError, match=r"first: has been quantized by Keras \(int8\)"):
        keras_polar.apply(model, 0.5)


def test_adapters_are_merged_by_the_export(tmp_path):
    model, path = dense_net(), tmp_path / "net.tflite"
    plain = export_tflite(model, path).bytes
    layer = model.get_layer("first")
    layer.enable_lora(4)
    for variable in (layer.lora_kernel_a, layer.lora_kernel_b):
        variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    report = export_tflite(model, path)
    assert report.relative_difference <= 1e-5
    assert report.bytes < plain + 1000


def test_a_length_that_is_too_short_for_the_model_is_ours(tmp_path):
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, layers.Dense(2)(layers.Conv1D(8, 41)(inputs)))
    told = r"tried on random samples of shapes \[\(32, 4\)\]; .*Pass evaluation_data=x"
    with pytest.raises(ValueError, match=told):
        export_tflite(model, tmp_path / "net.tflite")
    samples = np.random.default_rng(0).random((3, 60, 4), "float32")
    report = export_tflite(model, tmp_path / "net.tflite", evaluation_data=samples)
    assert report.relative_difference <= 1e-5


# --- other formats ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning")  # Keras, for tf2onnx
@pytest.mark.parametrize("format", ["tf_saved_model", "onnx", "openvino", "litert"])
def test_small_model_is_exported_by_keras(tmp_path, format):
    for needed in {"onnx": ["onnx", "tf2onnx"], "openvino": ["openvino"]}.get(format, []):
        pytest.importorskip(needed)
    gated = keras_polar.apply(dense_net(16), 0.3, gate="static")
    gated.settle()
    suffix = {"onnx": ".onnx", "openvino": ".xml", "litert": ".tflite"}.get(format, "")
    path = tmp_path / f"small{suffix}"
    small = keras_polar.convert(gated)
    small(np.zeros((1, 16)))  # Keras' ONNX export wants a model that has been called
    small.export(str(path), format=format, verbose=False)
    assert path.exists()
