"""The command line does what the functions do, and says in one line what went wrong."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import close_half, small_resnet
from keras import layers

import keras_polar
from keras_polar import cli


def call(*arguments):
    return cli.run(cli.parser().parse_args([str(a) for a in arguments]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a plain and a gated model."""
    folder = tmp_path_factory.mktemp("models")
    model = small_resnet()
    model.save(folder / "plain.keras")
    gated = keras_polar.apply(model, 0.5, gate="static")
    close_half(gated)
    gated.save(folder / "gated.keras")
    return folder


def test_inspect_and_cost_print_the_tables(files, capsys):
    model = keras.models.load_model(files / "plain.keras")
    assert call("inspect", files / "plain.keras") == 0
    assert capsys.readouterr().out == f"{keras_polar.inspect(model)}\n"
    assert call("inspect", files / "plain.keras", "--ignore=stem,block1_*") == 0
    ignored = keras_polar.inspect(model, ignore=["stem", "block1_*"])
    assert capsys.readouterr().out == f"{ignored}\n"
    assert call("cost", files / "plain.keras") == 0
    assert capsys.readouterr().out == f"{keras_polar.cost(model)}\n"


def test_convert_writes_the_small_model(files, tmp_path, capsys):
    assert call("convert", files / "gated.keras", tmp_path / "small.keras") == 0
    gated = keras.models.load_model(files / "gated.keras")
    small = keras.models.load_model(tmp_path / "small.keras")
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 1)).astype("float32")
    wanted = keras_polar.convert(gated)(x)
    np.testing.assert_array_equal(small(x), wanted)
    text = capsys.readouterr().out
    assert f"{small.count_params():,} weights" in text
    assert f"{gated.sparsity:.1%} of the weights" in text
    assert [p.name for p in tmp_path.iterdir()] == ["small.keras"]


def test_export_takes_samples_from_a_file(files, tmp_path, capsys):
    np.savez(tmp_path / "images.npz", images=np.ones((3, 8, 8, 1)))
    data = f"--data={tmp_path / 'images.npz'}"
    out = tmp_path / "small.tflite"
    assert call("export", files / "gated.keras", out, "--quantize=float16", data) == 0
    text = capsys.readouterr().out
    assert f"{out.stat().st_size:,} bytes, float16" in text
    assert "on 3 samples" in text


@pytest.mark.slow
def test_benchmark_compares_files(files, tmp_path, capsys):
    for name in ("plain", "gated"):
        model = keras.models.load_model(files / f"{name}.keras", compile=False)
        keras_polar.export_tflite(model, tmp_path / f"{name}.tflite")
    paths = [tmp_path / "plain.tflite", tmp_path / "gated.tflite"]
    assert call("benchmark", *paths, "--runs=3") == 0
    text = capsys.readouterr().out
    assert "1.00" in text
    assert all(f"{path.stat().st_size:,}" in text for path in paths)
    assert call("benchmark", tmp_path / "missing.tflite") == 1
    assert "missing.tflite" in capsys.readouterr().err


def test_samples_find_their_inputs_by_name(tmp_path):
    a, b = (keras.Input((n,), name=name) for n, name in ((2, "a"), (3, "b")))
    x, y = np.zeros((4, 2)), np.ones((4, 3))
    np.savez(tmp_path / "data.npz", b=y, a=x)
    sums = layers.Concatenate()([a, b])
    found = cli.read_samples(str(tmp_path / "data.npz"), keras.Model([a, b], sums))
    assert [f.shape for f in found] == [(4, 2), (4, 3)]
    found = cli.read_samples(str(tmp_path / "data.npz"), keras.Model({"a": a, "b": b}, sums))
    assert {name: f.shape for name, f in found.items()} == {"a": (4, 2), "b": (4, 3)}


def test_an_error_is_one_line_and_writes_nothing(files, tmp_path, capsys):
    assert call("convert", files / "plain.keras", tmp_path / "small.keras") == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert error.startswith("keras_polar: convert: expected a gated model")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "arguments", "stream", "text"),
    [
        (0, ["cost", "plain.keras"], "stdout", "5,266"),
        (0, ["export", "--help"], "stdout", "--quantize KIND"),
        (1, ["inspect", "missing.keras"], "stderr", "keras_polar: Expected a model"),
        (2, ["prune", "plain.keras"], "stderr", "invalid choice: 'prune'"),
    ],
)
def test_exit_codes_of_the_process(code, arguments, stream, text, files):
    command = [sys.executable, "-m", "keras_polar", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=files)
    assert done.returncode == code
    assert text in getattr(done, stream)
    assert "Traceback" not in done.stderr
