"""The examples run to their end and leave what they promise."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_polar
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
    path = tmp_path / "cost.jsonl"
    path.write_text('{"name": "overhead", "ratios": {}}\n{"name": "profile"}\n')
    run("benchmarks/overhead.py", "--batch_size=8", "--rounds=2", f"--output={path}")
    gates, measures = ("static", "dynamic"), ("weights", "macs")
    names = {*gates} | {f"{kind}, {m}" for kind in ("compacted", "three stages") for m in measures}
    names |= {f"whole run, {gate}, {m}" for gate in gates for m in measures}
    own, other = map(json.loads, path.read_text().splitlines())
    assert other == {"name": "profile"}
    committed = json_rows("training_cost.jsonl")["overhead"]
    assert own.keys() == committed.keys()
    assert own["ratios"].keys() == committed["ratios"].keys() == names
    assert all(lower <= median <= upper for lower, median, upper in own["ratios"].values())


@pytest.mark.slow
def test_profile_of_a_step(tmp_path):
    path = tmp_path / "cost.jsonl"
    arguments = "--model=resnet8", "--batch_size=8", "--steps=1", f"--output={path}"
    run("benchmarks/profile_step.py", *arguments)
    own, committed = json.loads(path.read_text()), json_rows("training_cost.jsonl")["profile"]
    assert own.keys() == committed.keys()
    assert own["percent"].keys() == committed["percent"].keys()
    assert own["percent"]["sum"]["dense"] == 100
    assert own["percent"]["masks on activations"].keys() == {"static", "dynamic"}


def json_rows(name):
    """Row name -> row of a committed file of results."""
    lines = (EXAMPLES.parent / "docs" / "benchmarks" / name).read_text().splitlines()
    return {row["name"]: row for row in map(json.loads, lines)}


# Runs a script where packages (with commas between) are missing.
ALONE = """
import runpy, sys
missing, script, *sys.argv[1:] = sys.argv[1:]
sys.modules |= dict.fromkeys(missing.split(","))
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture
def comparison(monkeypatch):
    """Imports a module of the comparison as its scripts do; they are forgotten afterwards."""
    folder = EXAMPLES / "benchmarks" / "comparison"
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if EXAMPLES in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
            del sys.modules[name]


def test_comparison_page_is_up_to_date(comparison):
    report, results = comparison("report"), comparison("results")
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.page(page, results.load(report.RESULTS)) == page, "run comparison/report.py"


def test_every_comparison_has_a_picture_of_its_own(comparison):
    report = comparison("report")
    shown = re.findall(r"\]\((images/compare_.*?)\)", report.PAGE.read_text(encoding="utf-8"))
    there = {f"images/{p.name}" for p in (report.PAGE.parent / "images").glob("compare_*")}
    assert len(shown) == len(set(shown))
    assert set(shown) == there
    alone = [{"method": "static", "regime": "trained"}]  # nothing to set it against
    assert not report._is_drawn(alone[0], alone)


def test_page_without_markers_is_refused(comparison):
    with pytest.raises(ValueError, match="runs: end"):
        comparison("report").page("<!-- runs: begin -->\n", [])


def test_differences_are_paired(comparison):
    """The spread between seeds is not that of differences; seeds without a pair do not count."""
    difference = comparison("results").difference
    control = [{"seed": s, "test": a} for s, a in enumerate([0.5, 0.7, 0.6])]
    runs = [{"seed": s, "test": a} for s, a in [(0, 0.51), (1, 0.72), (2, 0.63), (7, 0.1)]]
    mean, half, pairs = difference(runs, control, "test")
    assert (pairs, mean) == (3, pytest.approx(0.02))
    assert half == pytest.approx(4.303 * 0.01 / np.sqrt(3), rel=1e-3)  # t of 2 degrees of freedom
    assert difference(runs[:1], control, "test") == (pytest.approx(0.01), None, 1)
    assert difference(runs[3:], control, "test") is None
    assert difference(runs, control, "held_out") is None


def test_results_are_appended_and_the_later_of_two_counts(comparison, tmp_path):
    results = comparison("results")
    run = {"regime": "trained", "model": "resnet8", "method": "static", "seed": 0, "test": 0.5}
    results.add(tmp_path, run)
    results.add(tmp_path, run | {"seed": 1})
    (path,) = tmp_path.iterdir()
    with path.open("a") as file:
        file.write('{"regime": "trai')  # interrupted
    assert len(results.load(tmp_path)) == 2
    results.add(tmp_path, run | {"test": 0.6})
    assert [r["test"] for r in results.load(tmp_path)] == [0.6, 0.5]


def test_runs_of_controls_do_not_depend_on_our_options(comparison):
    results, setting = comparison("results"), comparison("protocol").Setting(schedule="0.1")
    other = comparison("protocol").Setting(schedule="0.2", sparsity=0.7)

    def same(**options):
        own = [results.described(s, "x", 0, "jax", **options) for s in (setting, other)]
        return results.identity(own[0]) == results.identity(own[1])

    assert same(ours=False, removes=False)  # the dense network
    assert not same(ours=False, removes=True)
    assert not same(ours=True, removes=True)


@pytest.mark.parametrize(
    ("name", "message"), [("l2", "No method"), ("static+late", "static has no option late")]
)
def test_methods_that_are_not_there(name, message, comparison):
    with pytest.raises(ValueError, match=message):
        comparison("methods").parsed(name)


def test_residual_streams_are_kept_whole(comparison):
    """What `inside` leaves: every group that several layers write."""
    methods, protocol = comparison("methods"), comparison("protocol")
    setting = protocol.recipe("scratch", "resnet8", width=8)
    run = protocol.Run(setting, protocol.load(setting, fake=True), 0)
    small = methods._cut(run, setting.build(), 0.5, methods.random, "inside")
    kept = {r.name: r.units for r in keras_polar.cost(small).rows if r.units}
    for stage, width in ((1, 8), (2, 16), (3, 32)):
        assert kept[f"stage{stage}_block1_conv2"] == width
        assert kept[f"stage{stage}_block1_conv1"] < width
    shares = keras_polar.cost(small).macs / keras_polar.cost(setting.build()).macs
    assert shares == pytest.approx(0.5, abs=0.02)


def test_learning_rate_begins_anew(comparison):
    rate = comparison("protocol").Rate(0.1, total=100, restart=40)
    plain = comparison("protocol").Rate(0.1, total=100)
    again = comparison("protocol").Rate(0.1, total=60)
    for step in (0, 5, 39):
        assert float(rate(step)) == float(plain(step))
    for step in (40, 43, 99):
        assert float(rate(step)) == pytest.approx(float(again(step - 40)), abs=1e-7)
    rest = comparison("protocol").Rate(0.1, total=100, first=30)
    assert float(rest(9)) == float(plain(39))


COMPARISON = "benchmarks/comparison/run.py"
TINY = (
    *("--fake_data", "--model=resnet8", "--image_size=8", "--batch_size=64"),
    *("--train_images=256", "--evaluation_images=100", "--seeds=0", "--measure=macs"),
    "--round_to=1",
)
COMPARED = {
    *("dense", "narrow", "narrow_longer", "narrow_inside", "shallow"),
    *("dynamic", "static", "both", "masked", "random_even", "l1_even", "l1_inside"),
    *("three_stage", "slimming", "polarized_slimming", "density_even", "gradual"),
    *("relevance_even", "group_norm_free", "static+restart", "l1_even+restart"),
}


def compared(folder):
    """Method -> what its run has left."""
    rows = (json.loads(r) for path in folder.iterdir() for r in path.read_text().splitlines())
    return {row["method"]: row for row in rows}


@pytest.mark.slow
def test_comparison_from_scratch(tmp_path):
    arguments = f"--methods={','.join(sorted(COMPARED))}", f"--results_dir={tmp_path}"
    run(COMPARISON, *TINY, "--regime=scratch", "--epochs=4", *arguments)
    results = compared(tmp_path)
    assert set(results) == COMPARED
    dense = results.pop("dense")
    assert dense["kept_weights"] == dense["kept_macs"] == 1
    assert results.pop("shallow")["kept_macs"] == 1  # no ResNet is shallower
    narrow, longer = results.pop("narrow"), results.pop("narrow_longer")
    assert narrow["kept_macs"] == longer["kept_macs"]
    assert longer["kept_macs"] == pytest.approx(0.5, abs=0.1)  # no width for every target
    assert longer["training_macs"] == pytest.approx(results["l1_even"]["training_macs"], rel=0.15)
    kept = {method: r["kept_macs"] for method, r in results.items()}
    assert kept == {method: pytest.approx(0.5, abs=0.01) for method in kept}
    # Whole until the gates settle; three stages cost more than one.
    settle, effort = Schedule().settle, {m: r["training_macs"] for m, r in results.items()}
    for method in ("static", "dynamic", "both", "static+restart"):
        share = settle + (1 - settle) * results[method]["kept_macs"]
        assert effort[method] == pytest.approx(share * dense["training_macs"])
    assert effort["masked"] == dense["training_macs"] < effort["three_stage"]


@pytest.mark.slow
def test_comparison_of_trained_networks(tmp_path):
    few = *TINY, "--epochs=2", "--steps=6", f"--dense_dir={tmp_path}/dense"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(COMPARISON, *few, "--methods=dense", f"--results_dir={tmp_path}/none")
    assert "--train_dense" in failed.value.stderr
    run(COMPARISON, *few, "--train_dense")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(COMPARISON, *few, "--epochs=3", "--methods=dense", f"--results_dir={tmp_path}/none")
    assert "'epochs': 2" in failed.value.stderr
    names = {
        *("as_trained", "dense", "dense+teacher", "random_inside", "l1_even", "narrow"),
        *("l1_even+teacher", "l1_even+late", "fisher_per_cost", "taylor_inside", "static"),
    }
    wanted = f"--methods={','.join(sorted(names))}", f"--results_dir={tmp_path}/results"
    run(COMPARISON, *few, *wanted)
    results = compared(tmp_path / "results")
    assert set(results) == names
    trained = json.loads((tmp_path / "dense" / "resnet8_s0.json").read_text())
    assert results["as_trained"]["test"] == pytest.approx(trained["test"])
    effort = {name: r["training_macs"] for name, r in results.items()}
    spent, full = effort["as_trained"], effort["dense"]  # 8 steps, and 6 more
    assert full == pytest.approx(spent * 14 / 8)
    assert effort["dense+teacher"] == pytest.approx(full + spent * 6 / 8 / 3)
    for name in ("l1_even", "fisher_per_cost", "random_inside"):
        assert effort[name] == pytest.approx(spent + (full - spent) / 2, rel=0.02)
    assert effort["l1_even"] < effort["l1_even+late"] < full
    before = next((tmp_path / "results").iterdir()).read_text()
    run(COMPARISON, *few, *wanted)  # repeats nothing
    assert next((tmp_path / "results").iterdir()).read_text() == before


def packed(path, **images):
    """A file as `packed_data.py` writes it, of noise."""
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
        *("--regime=scratch", "--model=resnet8", "--width=8", "--image_size=8", "--epochs=5"),
        *("--batch_size=64", "--train_images=128", "--evaluation_images=50", "--seeds=0"),
        *("--measure=macs", "--methods=dense,static,l1_even", f"--packed={tmp_path}/data.npz"),
        *(f"--results_dir={tmp_path}/results", f"--models_dir={tmp_path}/models"),
    )
    script = EXAMPLES / COMPARISON
    command = [sys.executable, "-c", ALONE, "tensorflow", script, *arguments]
    path = [str(script.parent), os.environ.get("PYTHONPATH", "")]
    on_jax = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": os.pathsep.join(path)}
    subprocess.run(command, check=True, capture_output=True, env=on_jax)
    trained = compared(tmp_path / "results")
    full = trained["dense"]["training_macs"]
    for method in ("static", "l1_even"):
        kept = trained[method]["kept_macs"]
        assert kept == pytest.approx(0.5, abs=0.02)
        assert trained[method]["training_macs"] == pytest.approx((0.2 + 0.8 * kept) * full)
    assert all("tflite_bytes" not in r for r in trained.values())
    run(COMPARISON, *arguments, "--tflite")  # measures the files, trains nothing
    for method, result in compared(tmp_path / "results").items():
        sizes = result.pop("tflite_bytes"), result.pop("tflite_latency_ratio")
        assert min(sizes) > 0
        assert result == trained[method]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("jax"), reason="trains on JAX")
def test_runs_that_share_a_compiled_program(tmp_path):
    packed(tmp_path / "data.npz", train=128, test=50)
    script = (EXAMPLES / COMPARISON).parent / "on_device.py"
    arguments = (
        *("--regime=trained", "--model=resnet8", "--width=8", "--image_size=8", "--epochs=2"),
        *("--steps=10", "--batch_size=64", "--train_images=128", "--evaluation_images=50"),
        *("--seeds=0", "--methods=dense,static,l1_even", f"--packed={tmp_path}/data.npz"),
        *(f"--results_dir={tmp_path}/results", f"--dense_dir={tmp_path}/dense"),
    )
    command = [sys.executable, "-c", ALONE, "tensorflow", script, *arguments]
    path = [str(script.parent), os.environ.get("PYTHONPATH", "")]
    on_jax = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": os.pathsep.join(path)}
    subprocess.run(command, check=True, capture_output=True, env=on_jax)
    trained = compared(tmp_path / "results")
    assert set(trained) == {"dense", "static", "l1_even"}
    full = trained["dense"]["training_macs"] / 14  # steps, of the dense network's training as well
    for method, cuts_at in (("static", 2), ("l1_even", 0)):
        kept = trained[method]["kept_macs"]
        assert kept == pytest.approx(0.5, abs=0.02)
        steps = 4 + cuts_at + (10 - cuts_at) * kept
        assert trained[method]["training_macs"] == pytest.approx(steps * full)
    assert {*trained["static"]} >= {"decided", "changed"}


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
