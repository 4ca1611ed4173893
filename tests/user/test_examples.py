"""The examples run to their end and leave what they promise."""

import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_polar import Schedule, export_tflite

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_demo(tmp_path):
    text = run("demo.py", "--epochs=4", f"--output_dir={tmp_path}")
    lines = text.splitlines()
    # A line for each phase, then the table, then the files and the pictures.
    assert [line[:3] for line in lines[:3]] == ["1/3", "2/3", "3/3"]
    assert "4/4" in lines[0]
    assert "accuracy" in lines[1]
    assert len(lines) < 30
    order = [text.index(x) for x in ("Digits, one run each", "Certificate", "Models:", "Pictures:")]
    assert order == sorted(order)
    named = [Path(line.strip()) for line in lines if line.startswith("  /")]
    assert {*named} == {*tmp_path.iterdir()}
    files = {p.name for p in tmp_path.iterdir()}
    pictures = {"open_rates.png", "polarization.png", "widths.png"}
    assert {*pictures, "dense.tflite", "small.tflite", "small.keras"} <= files
    assert (tmp_path / "small.tflite").stat().st_size < (tmp_path / "dense.tflite").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--gate=static",), ("--measure=macs",), ("--dense",)])
def test_cifar10_smoke(options, tmp_path):
    run("cifar10.py", "--smoke", "--fake_data", f"--output_dir={tmp_path}", *options)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["before"]["accuracy"] == result["after"]["accuracy"]
    small = keras.models.load_model(tmp_path / "small.keras")
    assert small.count_params() == result["after"]["weights"]
    if "--dense" not in options:
        assert abs(result["achieved_sparsity"] - 0.5) <= 0.01


@pytest.mark.slow
def test_overhead_benchmark(tmp_path):
    path = tmp_path / "overhead.json"
    run("benchmarks/overhead.py", "--batch_size=8", "--rounds=2", f"--output={path}")
    gates, measures = ("static", "dynamic"), ("weights", "macs")
    names = {*gates} | {f"{kind}, {m}" for kind in ("compacted", "three stages") for m in measures}
    names |= {f"whole run, {gate}, {m}" for gate in gates for m in measures}
    assert set(json.loads(path.read_text())) == names


# Runs a script where packages (with commas between) are missing.
ALONE = """
import runpy, sys
missing, script, *sys.argv[1:] = sys.argv[1:]
sys.modules |= dict.fromkeys(missing.split(","))
runpy.run_path(script, run_name="__main__")
"""

COMPARED = {
    *("dense", "narrow", "narrow_longer", "shallow", "dynamic", "static", "both", "masked"),
    *("random", "l1", "three_stage", "slimming", "polarized_slimming", "density", "gradual"),
    *("relevance", "group_norm"),
}


@pytest.mark.slow
def test_comparison(tmp_path):
    small = "--model=resnet8", "--image_size=8", "--epochs=4", "--batch_size=64", "--round_to=1"
    few = "--train_images=256", "--test_images=100", "--seeds=0", "--measure=macs"
    arguments = f"--methods={','.join(sorted(COMPARED))}", f"--results_dir={tmp_path}"
    run("benchmarks/compare.py", "--fake_data", *small, *few, *arguments)
    results = {r["method"]: r for r in map(json.loads, map(Path.read_text, tmp_path.iterdir()))}
    assert set(results) == COMPARED
    dense = results.pop("dense")
    assert dense["kept_weights"] == dense["kept_macs"] == 1
    assert results.pop("shallow")["kept_macs"] == 1  # no ResNet is shallower
    narrow, longer = results.pop("narrow"), results.pop("narrow_longer")
    assert narrow["kept_macs"] == longer["kept_macs"]
    assert longer["kept_macs"] == pytest.approx(0.5, abs=0.1)  # no width for every target
    # Whole epochs of one, whole epochs until the cut of the other.
    assert longer["training_macs"] == pytest.approx(results["l1"]["training_macs"], rel=0.15)
    kept = {method: r["kept_macs"] for method, r in results.items()}
    assert kept == {method: pytest.approx(0.5, abs=0.01) for method in kept}
    # Whole until the gates settle; three stages cost more than one.
    settle, effort = Schedule().settle, {m: r["training_macs"] for m, r in results.items()}
    for method in ("static", "dynamic", "both"):
        share = settle + (1 - settle) * results[method]["kept_macs"]
        assert effort[method] == pytest.approx(share * dense["training_macs"])
    assert effort["masked"] == dense["training_macs"] < effort["three_stage"]


def packed(path, **images):
    """A file as `packed.py` writes it, of noise."""
    from PIL import Image

    rng, arrays = np.random.default_rng(0), {}
    for split, count in images.items():
        files = [io.BytesIO() for _ in range(count)]
        for file in files:
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), "uint8")).save(file, "PNG")
        encoded = [file.getvalue() for file in files]
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(encoded), "uint8")
        arrays[f"{split}_lengths"] = [len(e) for e in encoded]
        arrays[f"{split}_labels"] = rng.integers(0, 10, count)
    np.savez(path, **arrays)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("jax"), reason="trains on JAX")
def test_comparison_on_jax_without_tensorflow(tmp_path):
    packed(tmp_path / "data.npz", train=128, test=50)
    arguments = (
        *("--model=resnet8", "--width=8", "--image_size=8", "--epochs=5", "--batch_size=64"),
        *("--train_images=128", "--test_images=50", "--seeds=0", "--measure=macs"),
        *("--methods=dense,static,l1", f"--packed={tmp_path}/data.npz"),
        *(f"--results_dir={tmp_path}/results", f"--models_dir={tmp_path}/models"),
    )

    def results():
        found = map(json.loads, map(Path.read_text, (tmp_path / "results").glob("*.json")))
        return {r["method"]: r for r in found}

    script = EXAMPLES / "benchmarks/compare.py"
    command = [sys.executable, "-c", ALONE, "tensorflow", script, *arguments]
    on_jax = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(script.parent)}
    subprocess.run(command, check=True, capture_output=True, env=on_jax)
    trained = results()
    full = trained["dense"]["training_macs"]
    for method in ("static", "l1"):
        kept = trained[method]["kept_macs"]
        assert kept == pytest.approx(0.5, abs=0.02)
        assert trained[method]["training_macs"] == pytest.approx((0.4 + 0.6 * kept) * full)
    assert all("tflite_bytes" not in r for r in trained.values())
    run("benchmarks/compare.py", *arguments)  # measures the files, trains nothing
    for method, result in results().items():
        sizes = result.pop("tflite_bytes"), result.pop("tflite_latency_ratio")
        assert min(sizes) > 0
        assert result == trained[method]


@pytest.mark.slow
def test_latency_benchmark(tmp_path):
    folders = f"--output_dir={tmp_path}", f"--files={tmp_path}/files"
    run("benchmarks/latency.py", "--only=ResNet", "--runs=2", "--round_to=1", *folders)
    row = json.loads((tmp_path / "latency.jsonl").read_text())
    for precision, entry in row["files"]["round_to=1"].items():
        assert entry["ms"] > 0
        # Early layers give most of the operations, and they have few weights.
        assert entry["bytes"] < 0.8 * row["files"]["dense"][precision]["bytes"]
    assert row["macs"]["round_to=1"] / row["macs"]["dense"] == pytest.approx(0.5, abs=0.01)
    assert (tmp_path / "latency.md").read_text().count("| ResNet-20 |") == 8


# --- deploy ----------------------------------------------------------------------------------


def classify(*arguments):
    script = EXAMPLES / "deploy" / "classify.py"
    missing = "tensorflow,keras,keras_polar,absl,PIL"
    command = [sys.executable, "-c", ALONE, missing, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def brightest_channel():
    """Says which colour an image has most of; logits of 10 times the mean, so that it is sure."""
    inputs = keras.Input((4, 6, 3))
    x = keras.layers.Dense(3, kernel_initializer="identity")(inputs)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(10 * x))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_classify_needs_only_numpy_and_the_runtime(tmp_path, quantize):
    data = np.random.default_rng(0).random((32, 4, 6, 3), "float32")
    model = tmp_path / "net.tflite"
    export_tflite(brightest_channel(), model, quantize, representative_data=data)
    pixels = np.zeros((2, 8, 9, 3), "uint8")  # larger than what the model takes
    pixels[0, ..., 2], pixels[1, ..., 0] = 200, 200
    np.save(tmp_path / "two.npy", pixels)
    (tmp_path / "blue.ppm").write_bytes(b"P6\n# a comment\n9 8\n255\n" + pixels[0].tobytes())
    labels = tmp_path / "labels.txt"
    labels.write_text("red\ngreen\nblue\n")
    ran = classify(model, tmp_path / "two.npy", tmp_path / "blue.ppm", f"--labels={labels}")
    assert ran.returncode == 0, ran.stderr
    found = [line.split() for line in ran.stdout.splitlines()]
    assert [line[:2] for line in found] == [
        ["two.npy", "blue"],
        ["two.npy", "red"],
        ["blue.ppm", "blue"],
    ]
    sure = 1 / (1 + 2 * np.exp(-2000 / 255))  # softmax of the logits
    for *_, confidence, milliseconds, unit in found:
        assert float(confidence.rstrip("%")) / 100 == pytest.approx(sure, abs=0.01)
        assert float(milliseconds) >= 0
        assert unit == "ms"
    (tmp_path / "photo.jpg").touch()
    assert "pip install pillow" in classify(model, tmp_path / "photo.jpg").stderr


@pytest.mark.slow
def test_end_to_end(tmp_path):
    text = run("deploy/end_to_end.py", "--smoke", "--model=resnet8", f"--output_dir={tmp_path}")
    sizes = [(tmp_path / f"{name}-int8.tflite").stat().st_size for name in ("dense", "small")]
    assert sizes[1] < sizes[0]
    assert text.count("images.npy  digit") == 8


@pytest.mark.slow
def test_quantisation_aware_training(tmp_path):
    pytest.importorskip("tf_keras")  # `make test-all` installs it
    run("deploy/qat.py", "--smoke", f"--output_dir={tmp_path}")
    result = json.loads((tmp_path / "qat.json").read_text())
    assert result["aware"] >= result["after_training"]
    assert min(result["agreement"].values()) > 0.9
