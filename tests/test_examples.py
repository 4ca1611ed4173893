"""The examples run to their end and leave what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_demo(tmp_path):
    text = run("demo.py", "--epochs=4", f"--output_dir={tmp_path}")
    assert "Certificate" in text
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
    assert set(json.loads(path.read_text())) == {"static", "dynamic"}
