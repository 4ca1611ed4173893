"""What `export_tflite` writes runs on LiteRT, agrees with Keras, and fails with a remedy."""

import errno
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import quick
from keras import layers

import keras_polar
from keras_polar.litert import ExportReport, benchmark_tflite, export_tflite, run_tflite


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


def _conv_net(name="conv_net"):
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    x = layers.Conv2D(32, 3, strides=2)(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(5)(x), name=name)


def _two_in_two_out(*, as_dict):
    # The names sort against the order of the inputs, and each input has its own dtype.
    image = keras.Input((6, 6, 2), name="zebra")
    word = keras.Input((4,), dtype="int32", name="ant")
    x = layers.Flatten()(layers.Conv2D(3, 3)(image))
    y = layers.Flatten()(layers.Embedding(7, 3)(word))
    x = layers.Concatenate()([x, y])
    first, second = layers.Dense(2)(x), layers.Dense(3, activation="softmax")(x)
    if as_dict:
        return keras.Model({"zebra": image, "ant": word}, {"wide": second, "few": first})
    return keras.Model([image, word], [first, second])


def _images(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8, 8, 3)).astype("float32")


def _left_behind(folder):
    return sorted(p.name for p in folder.iterdir())


# --- agreement -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantize", "tolerance"), [(None, 1e-4), ("float16", 1e-2), ("dynamic", 3e-2)]
)
def test_file_agrees_with_keras(tmp_path, quantize, tolerance):
    model, path = _conv_net(), tmp_path / "net.tflite"
    report = export_tflite(model, path, quantize=quantize)
    assert report.relative_difference <= tolerance
    images = _images(20)
    expected = model.predict(images, verbose=0)
    got = run_tflite(path, images)["output_0"]
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def test_float16_file_is_smaller_and_less_exact(tmp_path):
    model = _conv_net()
    full = export_tflite(model, tmp_path / "full.tflite")
    half = export_tflite(model, tmp_path / "half.tflite", quantize="float16")
    assert half.bytes < full.bytes
    assert half.max_difference > full.max_difference


def test_report_describes_the_file(tmp_path):
    path = tmp_path / "net.tflite"
    report = export_tflite(_conv_net(), str(path))
    assert isinstance(report, ExportReport)
    assert report.path == path
    assert report.bytes == path.stat().st_size
    assert [(t.name, t.shape, t.dtype) for t in report.inputs] == [
        ("image", (None, 8, 8, 3), "float32")
    ]
    assert [(t.name, t.shape) for t in report.outputs] == [("output_0", (None, 5))]
    for word in (str(path), f"{report.bytes:,}", "image", "output_0", "8 random samples"):
        assert word in str(report)


@pytest.mark.parametrize("as_dict", [False, True])
def test_several_inputs_and_outputs_are_matched_by_name(tmp_path, as_dict):
    model, path = _two_in_two_out(as_dict=as_dict), tmp_path / "net.tflite"
    report = export_tflite(model, path)
    assert report.relative_difference <= 1e-4
    rng = np.random.default_rng(1)
    data = {
        "zebra": rng.normal(size=(5, 6, 6, 2)).astype("float32"),
        "ant": rng.integers(0, 7, (5, 4)).astype("int32"),
    }
    got = run_tflite(path, data)
    expected = model.predict(data if as_dict else [data["zebra"], data["ant"]], verbose=0)
    if not as_dict:
        expected = {f"output_{i}": x for i, x in enumerate(expected)}
    assert set(got) == set(expected) == {t.name for t in report.outputs}
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5)


def test_nested_structures_and_awkward_names_are_exported(tmp_path):
    a, b = keras.Input((3,), name="my input"), keras.Input((3,), name="class")
    outputs = {"z": [layers.Dense(2)(a - 2 * b), layers.Dense(2)(b)], "a": layers.Dense(2)(a)}
    model = keras.Model([a, {"other": b}], outputs)
    report = export_tflite(model, tmp_path / "net.tflite")
    assert report.relative_difference <= 1e-4
    assert [t.name for t in report.inputs] == ["my_input", "input_class"]
    assert len(report.outputs) == 3


def test_names_that_become_equal_stay_apart(tmp_path):
    a, b = keras.Input((3,), name="x y"), keras.Input((3,), name="x_y")
    report = export_tflite(keras.Model([a, b], layers.Dense(2)(a - b)), tmp_path / "net.tflite")
    assert [t.name for t in report.inputs] == ["x_y", "x_y_2"]
    assert report.relative_difference <= 1e-4


def test_sequential_model_is_exported(tmp_path):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, "relu"), layers.Dense(2)])
    assert export_tflite(model, tmp_path / "net.tflite").relative_difference <= 1e-4


def test_open_height_and_width_are_exported(tmp_path):
    inputs = keras.Input((None, None, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(inputs))
    model, path = keras.Model(inputs, x), tmp_path / "net.tflite"
    assert export_tflite(model, path).inputs[0].shape == (None, None, None, 3)
    images = _images(2)
    np.testing.assert_allclose(
        run_tflite(path, images)["output_0"], model.predict(images, verbose=0), atol=1e-5
    )


def test_fixed_batch_size_stays_fixed(tmp_path):
    inputs = keras.Input(batch_shape=(2, 6))
    report = export_tflite(keras.Model(inputs, layers.Dense(3)(inputs)), tmp_path / "net.tflite")
    assert report.inputs[0].shape == (2, 6)
    assert report.samples == 2


def test_given_samples_are_the_ones_compared(tmp_path):
    # Outside of [0, 1] the difference is another one: the random samples would not show it.
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3)(inputs))
    data = 1e4 * np.ones((5, 4))
    report = export_tflite(
        model, tmp_path / "net.tflite", quantize="float16", representative_data=data
    )
    drawn = export_tflite(model, tmp_path / "net.tflite", quantize="float16")
    assert report.samples == 5
    assert report.max_difference > 100 * drawn.max_difference


def test_gated_model_is_converted_first(tmp_path):
    gated = keras_polar.apply(_conv_net(), 0.5, gate="static")
    for group in gated.groups:
        group.set_mask(np.arange(group.units) % 2 == 0)
    small = export_tflite(gated, tmp_path / "small.tflite")
    dense = export_tflite(_conv_net(), tmp_path / "dense.tflite")
    images = _images(6)
    got, expected = run_tflite(small.path, images), gated.predict(images, verbose=0)
    np.testing.assert_allclose(got["output_0"], expected, atol=1e-4)
    assert small.bytes < dense.bytes


def test_model_is_not_changed(tmp_path):
    model = _conv_net()
    model.compile("adam", "mse", metrics=["mae"])
    model.layers[1].trainable = False
    config, weights = model.get_config(), [w.copy() for w in model.get_weights()]
    optimizer, trainable = model.optimizer, [x.trainable for x in model.layers]
    export_tflite(model, tmp_path / "net.tflite")
    assert model.get_config() == config
    assert model.optimizer is optimizer
    assert [x.trainable for x in model.layers] == trainable
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_nothing_is_printed(tmp_path, capsys):
    export_tflite(_conv_net(), tmp_path / "net.tflite")
    assert capsys.readouterr().out == ""


# --- failures --------------------------------------------------------------------------------


def _subclassed():
    class Sub(keras.Model):
        def call(self, x):
            return x

    return Sub(name="sub")


@pytest.mark.parametrize(
    ("make_model", "words"),
    [
        (lambda: "net.keras", ["keras.Model", "str", "load_model"]),
        (
            lambda: keras.Sequential([layers.Dense(2)], name="bare"),
            ["no input shape", "bare", "keras.Input"],
        ),
        (_subclassed, ["functional", "Sub", "sub", "keras.Input"]),
    ],
)
def test_wrong_model_is_refused(tmp_path, make_model, words):
    with pytest.raises(TypeError) as caught:
        export_tflite(make_model(), tmp_path / "net.tflite")
    assert all(word in str(caught.value) for word in words)
    assert _left_behind(tmp_path) == []


@pytest.mark.parametrize("quantize", ["int4", "FLOAT16", 16])
def test_unknown_quantize_is_refused_with_the_known_ones(tmp_path, quantize):
    with pytest.raises(ValueError, match="None, 'float16', 'dynamic', 'int8'") as caught:
        export_tflite(_conv_net(), tmp_path / "net.tflite", quantize=quantize)
    assert repr(quantize) in str(caught.value)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere") as caught:
        export_tflite(_conv_net(), tmp_path / "nowhere" / "net.tflite")
    assert "Create it" in str(caught.value)
    assert _left_behind(tmp_path) == []


def test_folder_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "net.tflite").mkdir()
    with pytest.raises(IsADirectoryError, match="another name"):
        export_tflite(_conv_net(), tmp_path / "net.tflite")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that even root cannot write to")
def test_unwritable_folder_is_named():
    with pytest.raises(PermissionError, match=r"'/proc' cannot.*another folder"):
        export_tflite(_conv_net(), "/proc/net.tflite")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, bad):
    model = _conv_net()
    bias = model.layers[-1].bias
    bias.assign([0, 0, bad, 0, 0])
    with pytest.raises(ValueError, match="diverged") as caught:
        export_tflite(model, tmp_path / "net.tflite")
    assert bias.path in str(caught.value)
    assert _left_behind(tmp_path) == []


def test_other_suffix_is_refused_with_a_better_path(tmp_path):
    with pytest.raises(ValueError, match=r"net\.keras") as caught:
        export_tflite(_conv_net(), tmp_path / "net.keras")
    assert "net.tflite" in str(caught.value)


def test_path_of_wrong_type_is_refused():
    with pytest.raises(TypeError, match="int"):
        export_tflite(_conv_net(), 3)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_images(4)[:, :7], ["(None, 8, 8, 3)", "(4, 7, 8, 3)", "image"]),
        (_images(4)[0], ["(None, 8, 8, 3)", "(8, 8, 3)", "first axis"]),
        (_images(0), ["at least one", "[0]"]),
        ([_images(4), _images(4)], ["1 inputs", "2 leaves", "image"]),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path, data, words):
    with pytest.raises(ValueError, match="representative_data") as caught:
        export_tflite(_conv_net(), tmp_path / "net.tflite", representative_data=data)
    assert all(word in str(caught.value) for word in words)
    assert _left_behind(tmp_path) == []


def test_dict_of_samples_needs_the_keys_of_the_inputs(tmp_path):
    model = _two_in_two_out(as_dict=True)
    data = {"zebra": np.zeros((2, 6, 6, 2)), "bee": np.zeros((2, 4))}
    with pytest.raises(ValueError, match=r"\['ant', 'zebra'\]"):
        export_tflite(model, tmp_path / "net.tflite", representative_data=data)


def test_uneven_numbers_of_samples_are_refused(tmp_path):
    data = [np.zeros((2, 6, 6, 2)), np.zeros((3, 4), int)]
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        export_tflite(
            _two_in_two_out(as_dict=False), tmp_path / "net.tflite", representative_data=data
        )


def test_open_sizes_that_cannot_be_converted_are_named(tmp_path):
    inputs = keras.Input((None, None, 3), name="photo")
    model = keras.Model(inputs, layers.UpSampling2D(2, interpolation="bilinear")(inputs + 1))
    with pytest.raises(ValueError, match=r"open sizes.*photo.*fix them"):
        export_tflite(model, tmp_path / "net.tflite")
    assert _left_behind(tmp_path) == []


def test_conversion_that_fails_names_the_operation_and_leaves_nothing(tmp_path):
    inputs = keras.Input((4, 4, 4, 2))
    model = keras.Model(inputs, layers.MaxPooling3D()(inputs), name="volume")
    with pytest.raises(ValueError, match="MaxPool3D") as caught:
        export_tflite(model, tmp_path / "net.tflite")
    assert "volume" in str(caught.value)
    assert _left_behind(tmp_path) == []


def test_file_that_cannot_run_never_replaces_a_good_one(tmp_path):
    # Converts without complaint, but the runtime has no grouped 3D convolution.
    inputs = keras.Input((5, 5, 5, 4))
    model = keras.Model(inputs, layers.Conv3D(4, 3, groups=2)(inputs))
    path = tmp_path / "net.tflite"
    export_tflite(_conv_net(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="LiteRT"):
        export_tflite(model, path)
    assert path.read_bytes() == before
    assert _left_behind(tmp_path) == ["net.tflite"]


_INTERRUPTED = """
import os, signal, sys
import keras, keras_polar
from keras_polar.litert import export
export.compare = lambda *args: os.kill(os.getpid(), int(sys.argv[2]))  # the file is written by then
inputs = keras.Input((3,))
keras_polar.export_tflite(keras.Model(inputs, keras.layers.Dense(2)(inputs)), sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("number", quick([signal.SIGKILL], [signal.SIGTERM, signal.SIGKILL]))
def test_process_that_is_killed_leaves_nothing_beside_the_file(tmp_path, number):
    path = tmp_path / "net.tflite"
    path.write_bytes(b"what was there")
    command = [sys.executable, "-c", _INTERRUPTED, str(path), str(int(number))]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -number
    assert _left_behind(tmp_path) == ["net.tflite"]
    assert path.read_bytes() == b"what was there"


def test_file_is_moved_to_another_file_system(tmp_path, monkeypatch):
    def same_file_system_only(source, target, replace=os.replace):
        if os.path.dirname(source) != os.path.dirname(target):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", same_file_system_only)
    report = export_tflite(_conv_net(), tmp_path / "net.tflite")
    assert _left_behind(tmp_path) == ["net.tflite"]
    assert run_tflite(report.path, _images(2))["output_0"].shape == (2, 5)


# --- running and timing ----------------------------------------------------------------------


def test_batches_make_no_difference(tmp_path):
    path = tmp_path / "net.tflite"
    export_tflite(_conv_net(), path)
    images = _images(7)
    at_once = run_tflite(path, images)["output_0"]
    np.testing.assert_allclose(
        run_tflite(path, images, batch_size=3, threads=2)["output_0"], at_once, atol=1e-6
    )


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ({"photo": _images(2)}, ValueError, ["['image']", "['photo']"]),
        (_images(2)[:, :5], ValueError, ["(None, 8, 8, 3)", "(2, 5, 8, 3)"]),
        (_images(0), ValueError, ["at least one"]),
        (np.zeros((2, 8, 8, 3), "complex64"), TypeError, ["float32", "complex64", "astype"]),
    ],
)
def test_inputs_that_do_not_fit_the_file_are_refused(tmp_path, inputs, error, words):
    path = tmp_path / "net.tflite"
    export_tflite(_conv_net(), path)
    with pytest.raises(error) as caught:
        run_tflite(path, inputs)
    assert all(word in str(caught.value) for word in words)


def test_missing_file_is_named(tmp_path):
    for call in (lambda p: run_tflite(p, _images(1)), benchmark_tflite):
        with pytest.raises(FileNotFoundError, match=r"gone\.tflite"):
            call(tmp_path / "gone.tflite")


def test_benchmark_times_every_file(tmp_path):
    inputs = keras.Input((64, 64, 3))
    heavy = keras.Model(inputs, layers.Conv2D(64, 7)(layers.Conv2D(32, 7)(inputs)))
    paths = [tmp_path / "heavy.tflite", tmp_path / "light.tflite"]
    for model, path in zip((heavy, _conv_net()), paths, strict=True):
        export_tflite(model, path)
    times = benchmark_tflite(paths, runs=9)
    assert list(times) == [str(p) for p in paths]
    for latency in times.values():
        assert 0 < latency.lower <= latency.median <= latency.upper
        assert "ms" in str(latency)
    dense, light = (times[str(path)] for path in paths)
    assert light.median < dense.median
    if sys.platform == "linux":
        activations = 4 * 52 * 52 * 64  # float32, of the last layer
        assert dense.peak_bytes > max(activations, light.peak_bytes)
        assert "MiB" in str(dense)


@pytest.mark.parametrize("options", [{"runs": 0}, {"threads": 0}, {"runs": 2.5}, {"warmup": 0}])
def test_benchmark_counts_must_be_positive_integers(tmp_path, options):
    path = tmp_path / "net.tflite"
    export_tflite(_conv_net(), path)
    with pytest.raises(ValueError, match=next(iter(options))):
        benchmark_tflite(path, **options)


def test_file_that_is_no_model_is_named(tmp_path):
    path = tmp_path / "net.tflite"
    path.write_text("no model")
    with pytest.raises(ValueError, match=r"net\.tflite.*cannot read it"):
        run_tflite(path, _images(1))


def test_benchmark_without_files_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        benchmark_tflite([])
