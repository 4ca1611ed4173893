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
    assert {"open_rates.png", "widths.png", "dense.tflite", "small.tflite", "small.keras"} <= files
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


@pytest.mark.slow
def test_latency_benchmark(tmp_path):
    run("benchmarks/latency.py", "--only=ResNet", "--runs=2", f"--output_dir={tmp_path}")
    row = json.loads((tmp_path / "latency.jsonl").read_text())
    for entry in row["files"]["round_to=8"].values():
        assert entry["ms"] > 0
    for precision, entry in row["files"]["round_to=1"].items():
        assert entry["bytes"] < 0.65 * row["files"]["dense"][precision]["bytes"]
    assert row["macs"]["round_to=1"] / row["macs"]["dense"] == pytest.approx(0.5, abs=0.01)
    assert (tmp_path / "latency.md").read_text().count("| ResNet-20 |") == 8
