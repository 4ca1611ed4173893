"""A quantization mode is one object: who adds one writes it, and nothing else."""

import ast
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from keras_polar import cli
from keras_polar.litert import QuantizationMode, converter, export_tflite, modes, run_tflite

INT16X8 = QuantizationMode(
    "int16x8",
    weights="int8",
    activations="int16",
    operations=("EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8",),
)


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


@pytest.fixture
def in_the_table(monkeypatch):
    monkeypatch.setattr(modes, "MODES", (*modes.MODES, INT16X8))


def model_of(layer, shape=(4, 3)):
    x = inputs = keras.Input(shape, name="image")
    return keras.Model(inputs, layers.Dense(5)(layers.Flatten()(layer(x))), name="net")


def samples(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def dtypes(report):
    return [t.dtype for t in (*report.inputs, *report.outputs)]


def test_mode_in_the_table_is_exported_with_by_its_name(tmp_path, in_the_table):
    model, x = model_of(layers.Conv2D(8, 3, activation="relu"), (8, 8, 3)), samples(16, 8, 8, 3)
    report = export_tflite(model, tmp_path / "net.tflite", "int16x8", representative_data=x)
    assert report.quantize == "int16x8"
    assert "bytes, int16x8" in str(report)
    assert dtypes(report) == ["int16", "int16"]
    expected = model.predict(x, verbose=0)
    off = np.abs(run_tflite(report.path, x)["output_0"] - expected).max()
    assert 0 < off < 0.02 * np.abs(expected).max()


def test_command_line_knows_the_table(tmp_path, in_the_table, capsys):
    assert modes.modes_text().endswith("int8 (which needs --data) or int16x8 (which needs --data)")
    model, data = tmp_path / "net.keras", tmp_path / "data.npy"
    model_of(layers.Dense(4)).save(model)
    np.save(data, samples(8, 4, 3))
    command = ["export", model, tmp_path / "net.tflite", "--quantize=int16x8", f"--data={data}"]
    assert cli.run(cli.parser().parse_args([str(word) for word in command])) == 0
    assert "bytes, int16x8" in capsys.readouterr().out


def test_object_is_as_good_as_a_name(tmp_path):
    report = export_tflite(
        model_of(layers.Dense(4)),
        tmp_path / "net.tflite",
        INT16X8,
        representative_data=samples(8, 4, 3),
        io="float32",
    )
    assert report.quantize == "int16x8"
    assert dtypes(report) == ["float32", "float32"]
    assert report.float_operations == ()
    assert report.relative_difference < 0.02


def test_new_integer_mode_writes_loops_out(tmp_path):
    """What holds for int8 because its numbers are integers holds for every such mode."""
    model, path = model_of(layers.SimpleRNN(4)), tmp_path / "net.tflite"
    report = export_tflite(model, path, INT16X8, representative_data=samples(8, 4, 3))
    assert any("step by step (4 steps)" in note for note in report.notes)
    assert report.relative_difference < 0.05
    with pytest.raises(ValueError, match="at most 512 steps for quantize='int16x8'"):
        export_tflite(
            model_of(layers.SimpleRNN(4), (513, 3)),
            path,
            INT16X8,
            representative_data=samples(8, 513, 3),
        )


@pytest.mark.slow
def test_process_of_its_own_is_told_the_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(converter, "is_dangerous", lambda *_: True)
    report = export_tflite(
        model_of(layers.Dense(4)),
        tmp_path / "net.tflite",
        INT16X8,
        representative_data=samples(8, 4, 3),
    )
    assert dtypes(report) == ["int16", "int16"]
    assert report.relative_difference < 0.02


def test_integers_need_data(tmp_path):
    with pytest.raises(ValueError, match=r"representative_data.*'int16x8'.*'dynamic'"):
        export_tflite(model_of(layers.Dense(4)), tmp_path / "net.tflite", INT16X8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": "int4"}, "`weights` to be one of 'float32', 'float16', 'int8'.*'int4'"),
        ({"activations": "uint8"}, "`activations`.*'uint8'"),
        ({"activations": "int8"}, "`weights` to be one of 'int8'; received 'float32'"),
        ({"weights": "float16", "activations": "int8"}, "`weights` to be one of 'int8'"),
    ],
)
def test_what_the_converter_cannot_do_is_no_mode(settings, words):
    with pytest.raises(ValueError, match=words):
        QuantizationMode("new", **settings)


def test_unknown_operations_are_refused(tmp_path):
    mode = QuantizationMode("new", operations=("TFLITE_BUILTINS_INT4",))
    with pytest.raises(ValueError, match=r"`operations` to be one of.*'TFLITE_BUILTINS_INT4'"):
        export_tflite(model_of(layers.Dense(4)), tmp_path / "net.tflite", mode)


@pytest.mark.parametrize("quantize", ["int4", "FLOAT16", 8, ["int8"], False])
def test_unknown_names_are_refused_with_the_known(tmp_path, quantize):
    known = r"`quantize` to be one of None, 'float16', 'dynamic', 'int8'; received "
    with pytest.raises(ValueError, match=known):
        export_tflite(model_of(layers.Dense(4)), tmp_path / "net.tflite", quantize)


def test_no_other_module_compares_names():
    folder = Path(modes.__file__).parent
    others = [*(p for p in folder.glob("*.py") if p.name != "modes.py"), Path(cli.__file__)]
    names = {mode.name for mode in modes.MODES if mode.name}
    asked = [
        f"{path.name}: {ast.unparse(node)}"
        for path in others
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare)
        if names & {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
    ]
    assert not asked
