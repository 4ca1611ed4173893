"""Quantized files: what they take, what they say, and the forms of data that users have."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import randomise
from keras import layers

import keras_polar
from keras_polar.litert import export_tflite, run_tflite
from keras_polar.litert.compare import compared
from keras_polar.litert.samples import Samples, read_samples

CLASSES = 5


def conv_net(**options):
    x = inputs = keras.Input((8, 8, 3), name="image", **options)
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(32, 3, strides=2)(x))
    return randomise(keras.Model(inputs, layers.Dense(CLASSES)(x), name="conv_net"))


def images(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8, 8, 3)).astype("float32")


X, Y = images(12), np.arange(12) % CLASSES


def image_and_word():
    """Inputs whose names sort against their order, of two dtypes."""
    image, word = keras.Input((6, 6, 2), name="zebra"), keras.Input((4,), dtype="int32", name="ant")
    x = layers.Flatten()(layers.Conv2D(3, 3)(image))
    y = layers.Flatten()(layers.Embedding(7, 3)(word))
    return keras.Model([image, word], layers.Dense(2)(layers.Concatenate()([x, y])))


def pair(count=6):
    rng = np.random.default_rng(1)
    zebra = rng.normal(size=(count, 6, 6, 2)).astype("float32")
    return {"zebra": zebra, "ant": rng.integers(0, 7, (count, 4)).astype("int32")}


# --- what is in the file ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A float and an int8 file of the same network, its outputs for X, and the int8 report."""
    keras.utils.set_random_seed(0)
    model, folder = conv_net(), tmp_path_factory.mktemp("files")
    full = export_tflite(model, folder / "full.tflite")
    report = export_tflite(model, folder / "net.tflite", "int8", representative_data=X)
    return full, report, model.predict(X, verbose=0)


def test_int8_file_is_integer_throughout(exported):
    full, report, expected = exported
    assert report.bytes < 0.6 * full.bytes
    assert [t.dtype for t in (*report.inputs, *report.outputs)] == ["int8", "int8"]
    assert 0 < report.mean_difference < report.max_difference
    assert report.relative_difference < 0.05
    assert not report.random
    off = np.abs(run_tflite(report.path, X)["output_0"] - expected).max()
    assert off == pytest.approx(report.max_difference, rel=1e-3)


def test_float_ends_stay_if_asked_for(tmp_path, exported):
    report = export_tflite(
        conv_net(), tmp_path / "net.tflite", "int8", representative_data=X, io="float32"
    )
    for tensor in (*report.inputs, *report.outputs):
        assert (tensor.dtype, tensor.scale, tensor.zero_point) == ("float32", None, None)
    assert report.relative_difference < 0.05
    assert abs(report.bytes - exported[1].bytes) < 1000  # as small inside


def with_activation(function):
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = layers.GlobalAveragePooling2D()(function(layers.Conv2D(8, 3)(x)))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (layers.ELU(), {"ELU"}),
        (lambda x: keras.ops.cos(layers.ELU()(keras.ops.floor(x))), {"COS", "ELU", "FLOOR"}),
        (layers.ReLU(), set()),
        (layers.Activation("sigmoid"), set()),
    ],
)
@pytest.mark.parametrize("io", [None, "float32"])
def test_what_stays_float_in_an_integer_file_is_named(tmp_path, function, names, io):
    options = {"representative_data": X, "io": io}
    report = export_tflite(with_activation(function), tmp_path / "net.tflite", "int8", **options)
    assert set(report.float_operations) == names
    assert len(report.float_operations) == len(names)
    assert ("in float32" in str(report)) == bool(names)
    assert all(name in str(report) for name in names)


def test_what_is_float_on_purpose_is_not_named(tmp_path):
    for quantize in (None, "dynamic"):
        report = export_tflite(with_activation(layers.ELU()), tmp_path / "net.tflite", quantize)
        assert report.float_operations == ()


def test_scale_and_zero_point_say_what_the_integers_mean(exported):
    _, report, _ = exported
    (tensor,) = report.inputs
    # The range of the data, and 0 exactly, in 256 steps.
    assert tensor.scale == pytest.approx((X.max() - X.min()) / 255, rel=1e-3)
    integers = np.clip(np.round(X / tensor.scale) + tensor.zero_point, -128, 127).astype("int8")
    np.testing.assert_array_equal(
        run_tflite(report.path, integers)["output_0"], run_tflite(report.path, X)["output_0"]
    )
    assert f"scale {tensor.scale:.6g}" in str(report)


def test_unsigned_integers_are_values_not_stored_numbers(exported):
    _, report, _ = exported
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)).astype("uint8")
    np.testing.assert_array_equal(
        run_tflite(report.path, x)["output_0"],
        run_tflite(report.path, x.astype("float32"))["output_0"],
    )


def test_dynamic_file_is_small_and_float_outside(tmp_path):
    inputs = keras.Input((64,))
    model = keras.Model(inputs, layers.Dense(64)(layers.Dense(256, "relu")(inputs)))
    full = export_tflite(model, tmp_path / "full.tflite")
    small = export_tflite(model, tmp_path / "small.tflite", "dynamic")
    assert small.bytes < 0.35 * full.bytes
    assert small.inputs == full.inputs
    assert small.relative_difference < 0.05


def test_token_ids_stay_integers(tmp_path):
    report = export_tflite(
        image_and_word(), tmp_path / "net.tflite", "int8", representative_data=pair()
    )
    zebra, ant = report.inputs
    assert (zebra.name, zebra.dtype) == ("zebra", "int8")
    assert (ant.name, ant.dtype, ant.scale) == ("ant", "int32", None)
    assert report.relative_difference < 0.05


def test_gated_model_arrives_as_int8(tmp_path):
    gated = keras_polar.apply(conv_net(), 0.3, gate="static")
    for group in gated.groups:
        group.set_mask(np.arange(group.units) % 2 == 0)
    x = images(40)
    report = export_tflite(gated, tmp_path / "net.tflite", "int8", representative_data=x)
    expected = gated.predict(x, verbose=0)
    off = np.abs(run_tflite(report.path, x)["output_0"] - expected).max()
    assert off < 0.05 * np.abs(expected).max()


def test_fixed_batch_size_and_a_rest(tmp_path):
    model = conv_net(batch_size=4)
    report = export_tflite(model, tmp_path / "net.tflite", "int8", representative_data=images(11))
    assert report.samples == 8
    assert report.inputs[0].shape == (4, 8, 8, 3)
    with pytest.raises(ValueError, match="multiple of 4 samples"):
        run_tflite(report.path, images(11))


# --- agreement and accuracy ------------------------------------------------------------------


def test_accuracy_is_that_of_the_file_and_of_keras(tmp_path):
    x, model = images(60), conv_net()
    labels = model.predict(x, verbose=0).argmax(1)
    labels[:15] = (labels[:15] + 1) % CLASSES
    report = export_tflite(
        model,
        tmp_path / "net.tflite",
        "int8",
        representative_data=images(40, seed=1),
        evaluation_data=(x, labels),
    )
    got = run_tflite(report.path, x)["output_0"].argmax(1)
    assert report.samples == 60
    assert report.keras_accuracy == 0.75
    assert report.accuracy == (got == labels).mean()
    assert report.agreement == (got == model.predict(x, verbose=0).argmax(1)).mean()
    assert f"accuracy {report.accuracy:.2%} (Keras 75.00%)" in str(report)


def compare_outputs(outputs, labels=None):
    samples = Samples([np.zeros((len(outputs), 1))], labels)
    return compared([outputs], [outputs + 0.1], samples)


@pytest.mark.parametrize("form", [lambda y: y, lambda y: y[:, None], lambda y: np.eye(CLASSES)[y]])
def test_labels_may_be_columns_or_one_hot(form):
    outputs = np.random.default_rng(0).normal(size=(9, CLASSES))
    found = compare_outputs(outputs, form(outputs.argmax(1)))
    assert found.accuracy == found.keras_accuracy == found.agreement == 1
    assert found.mean_difference == pytest.approx(0.1)


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(9, 3\)"):
        compare_outputs(np.zeros((9, CLASSES)), np.zeros((9, 3), int))
    with pytest.raises(ValueError, match="one label for each of the 9"):
        read_samples(conv_net(), (images(9), np.zeros(8, int)), "evaluation_data")


@pytest.mark.parametrize("shape", [(9, 1), (9,), (9, 4, 4)])
def test_what_is_no_classifier_has_no_agreement(shape):
    found = compare_outputs(np.ones(shape), np.ones(9))
    assert found.agreement is None
    assert found.accuracy is None


# --- forms of data ---------------------------------------------------------------------------


class Batches(keras.utils.PyDataset):
    def __init__(self, arrays):
        super().__init__()
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays[0]) // 4

    def __getitem__(self, index):
        return tuple(x[4 * index : 4 * index + 4] for x in self.arrays)


@pytest.mark.parametrize(
    ("data", "labelled"),
    [
        (lambda: X, False),
        (lambda: [X], False),
        (lambda: {"image": X}, False),
        (lambda: tf.constant(X), False),
        (lambda: X.astype("float64"), False),
        (lambda: (X, Y), True),
        (lambda: (X, Y, np.ones(12)), True),
        (lambda: tf.data.Dataset.from_tensor_slices(X).batch(5), False),
        (lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(5), True),
        (lambda: tf.data.Dataset.from_tensor_slices({"image": X}).batch(5), False),
        (lambda: Batches([X]), False),
        (lambda: Batches([X, Y]), True),
        (lambda: (X[i : i + 5] for i in range(0, 12, 5)), False),
        (lambda: ([X[i : i + 1]] for i in range(12)), False),  # what TFLite's converter takes
        (lambda: zip(np.split(X, 3), np.split(Y, 3), strict=True), True),
    ],
)
def test_every_form_of_one_input_means_the_same(data, labelled):
    samples = read_samples(conv_net(), data(), "representative_data")
    np.testing.assert_array_equal(samples.arrays[0], X)
    assert samples.arrays[0].dtype == "float32"
    if labelled:
        np.testing.assert_array_equal(samples.labels, Y)
    else:
        assert samples.labels is None


@pytest.mark.parametrize(
    ("data", "labelled"),
    [
        (lambda z, a, y: [z, a], False),
        (lambda z, a, y: (z, a), False),
        (lambda z, a, y: {"ant": a, "zebra": z}, False),
        (lambda z, a, y: ([z, a], y), True),
        (lambda z, a, y: ({"ant": a, "zebra": z}, y, y), True),
        (lambda z, a, y: tf.data.Dataset.from_tensor_slices(((z, a), y)).batch(4), True),
        (
            lambda z, a, y: tf.data.Dataset.from_tensor_slices({"ant": a, "zebra": z}).batch(4),
            False,
        ),
        (lambda z, a, y: iter([(z[:2], a[:2]), (z[2:], a[2:])]), False),
    ],
)
def test_every_form_of_two_inputs_means_the_same(data, labelled):
    zebra, ant = pair().values()
    samples = read_samples(image_and_word(), data(zebra, ant, np.arange(6)), "evaluation_data")
    np.testing.assert_array_equal(samples.arrays[0], zebra)
    np.testing.assert_array_equal(samples.arrays[1], ant)
    assert (samples.labels is not None) == labelled


def test_endless_data_are_read_as_far_as_needed():
    endless, model = tf.data.Dataset.from_tensor_slices(X).repeat().batch(50), conv_net()
    assert len(read_samples(model, endless, "representative_data", limit=120)) == 120
    with pytest.raises(ValueError, match="take"):
        read_samples(model, endless, "evaluation_data")


# --- failures --------------------------------------------------------------------------------


def test_int8_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"representative_data.*'dynamic'"):
        export_tflite(conv_net(), tmp_path / "net.tflite", "int8")
    assert list(tmp_path.iterdir()) == []


def test_unknown_io_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`io` to be one of None, 'float32'; received 'uint8'"):
        export_tflite(conv_net(), tmp_path / "net.tflite", "int8", io="uint8")


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (iter([]), ValueError, ["at least one sample", "received none", "only once"]),
        (tf.data.Dataset.from_tensor_slices(X), ValueError, ["one sample", "batch(32)"]),
        (iter([X, X[:, :4]]), ValueError, ["(None, 8, 8, 3)", "(12, 4, 8, 3)"]),
        (X.astype("complex64"), TypeError, ["complex64", "float32", "image", "astype"]),
        (np.full_like(X, np.nan), ValueError, ["finite", "image", "NaN"]),
        (lambda: iter([X]), TypeError, ["function", "called"]),
        ("images", TypeError, ["str"]),
        ({"photo": X}, ValueError, ["['image']", "dict"]),
        (7, TypeError, ["int"]),
    ],
)
def test_data_that_do_not_fit_are_refused(tmp_path, data, error, words):
    with pytest.raises(error, match="representative_data") as caught:
        export_tflite(conv_net(), tmp_path / "net.tflite", "int8", representative_data=data)
    assert all(word in str(caught.value) for word in words)
    assert list(tmp_path.iterdir()) == []


def test_words_are_not_numbers(tmp_path):
    data = pair()
    data["ant"] = data["ant"] + 0.5
    with pytest.raises(TypeError, match=r"int32 for input 'ant'; received float64"):
        export_tflite(image_and_word(), tmp_path / "net.tflite", representative_data=data)


def test_samples_of_several_sizes_are_refused(tmp_path):
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(inputs))
    data = iter([np.ones((2, 4, 3)), np.ones((2, 5, 3))])
    with pytest.raises(ValueError, match=r"one size.*\(4, 3\), \(5, 3\)"):
        export_tflite(model, tmp_path / "net.tflite", representative_data=data)


def test_too_few_samples_for_a_fixed_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 4 samples"):
        export_tflite(
            conv_net(batch_size=4), tmp_path / "net.tflite", representative_data=images(3)
        )


def test_operation_without_integer_kernel_is_refused_with_the_float_path(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.ops.erf(layers.Dense(4)(inputs)))
    with pytest.raises(ValueError, match="'dynamic' or 'float16'"):
        export_tflite(model, tmp_path / "net.tflite", "int8", representative_data=np.ones((8, 4)))
    assert list(tmp_path.iterdir()) == []


def test_missing_runtime_says_what_to_install(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match="pip install ai-edge-litert"):
        run_tflite(exported[1].path, X)
