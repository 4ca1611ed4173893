"""What pruning gains where a model runs: docs/benchmarks/latency.md.

Four networks at half of their multiply-accumulates, with the widths that `apply` settles on
(within a layer chance picks the channels) and untrained weights, in every precision that
`export_tflite` knows and with kept channels rounded up to multiples of 1, 4, 8 and 16, and as
`apply` does by default. All files of a network take turns, so that a disturbance of the machine
meets them alike. Files are kept in build/latency and rows in docs/benchmarks/latency.jsonl; what
is there is not made again.

    make latency
    python examples/benchmarks/latency.py --only=ResNet --runs=50
    python examples/benchmarks/latency.py --target

The last prunes two networks for time, measure="latency", and compares the share of it that goes
with what was asked for: rows in docs/benchmarks/latency_target.jsonl.
"""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
from absl import app, flags
from json_lines import add_row, read_rows
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "benchmarks"
SPARSITY = 0.5
PRECISIONS = {"float32": None, "float16": "float16", "dynamic": "dynamic", "int8": "int8"}
CALIBRATION = 16  # samples; speed does not depend on the ranges
NAMES = ("ResNet-20", "VGG16-BN", "MobileNetV2", "EfficientNetB0")
TARGETS = {"ResNet-20": "resnet20", "MobileNetV2 (32 x 32)": "mobilenet"}

_ONLY = flags.DEFINE_string("only", "", "Regular expression: networks to measure.")
_RUNS = flags.DEFINE_integer("runs", 500, "Timed runs of each file.", lower_bound=1)
_ROUNDINGS = flags.DEFINE_multi_integer("round_to", [1, 4, 8, 16], "Roundings, 1 among them.")
_TARGET = flags.DEFINE_bool("target", False, "Measure what pruning for time gains, no other row.")
_FOLDER = flags.DEFINE_string("output_dir", str(DOCS), "Where latency.md and .jsonl are.")
_FILES = flags.DEFINE_string("files", str(ROOT / "build" / "latency"), "Where .tflite files go.")


# --- one network -----------------------------------------------------------------------------


def build(name):
    """The dense network, with random weights."""
    import keras
    import models

    keras.utils.set_random_seed(0)
    if name in ("ResNet-20", "VGG16-BN"):
        return models.build({"ResNet-20": "resnet20"}.get(name, "vgg16"), (32, 32, 3), 10)
    return getattr(keras.applications, name)(
        weights=None, input_shape=(96, 96, 3), classes=100, classifier_activation=None
    )


def halved(dense, round_to):
    """Half of the multiply-accumulates: widths as `apply` has them, channels as chance has it."""
    from settle_by_chance import settled

    import keras_polar

    return keras_polar.convert(settled(dense, SPARSITY, measure="macs", round_to=round_to))


def measure(name, runs, folder):
    """Bytes, latency and difference from Keras of every file; multiply-accumulates."""
    import tensorflow

    kept = {variant: exported(name, variant, n, folder) for variant, n in variants().items()}
    files = {variant: entry["files"] for variant, entry in kept.items()}
    add_latencies(files, runs)
    macs = {variant: entry["macs"] for variant, entry in kept.items()}
    return {"runs": runs, "tensorflow": tensorflow.__version__, "macs": macs, "files": files}


def variants():
    """Name -> rounding; 0 for the dense network, None for the default."""
    return {"dense": 0} | {f"round_to={n}": n for n in _ROUNDINGS.value} | {"default": None}


def exported(name, variant, round_to, folder):
    """What the files of a variant are like, by precision; they are made once."""
    note = folder / f"{name}-{variant}.json"
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        dense = build(name)
        model = dense if round_to == 0 else halved(dense, round_to)
        note.write_text(json.dumps(export(model, note.with_suffix(""))), encoding="utf-8")
    return json.loads(note.read_text(encoding="utf-8"))


def export(model, stem):
    """Writes the files `stem`-PRECISION.tflite."""
    import keras_polar

    shape = (CALIBRATION, *model.inputs[0].shape[1:])
    images, files = np.random.default_rng(0).random(shape, "float32"), {}
    for precision, quantize in PRECISIONS.items():
        path = stem.with_name(f"{stem.name}-{precision}.tflite")
        report = keras_polar.export_tflite(model, path, quantize, representative_data=images)
        files[precision] = {
            "path": str(path),
            "bytes": report.bytes,
            "relative_difference": report.relative_difference,
        }
    return {"macs": int(keras_polar.cost(model).macs), "files": files}


def add_latencies(files, runs):
    """Times all files in turns and adds what was found to their entries."""
    import keras_polar

    entries = [entry for variant in files.values() for entry in variant.values()]
    times = keras_polar.benchmark_tflite([entry["path"] for entry in entries], runs=runs)
    for entry in entries:
        latency = times[entry.pop("path")]
        entry |= {"ms": latency.median, "lower": latency.lower, "upper": latency.upper}
        entry["peak_bytes"] = latency.peak_bytes


# --- the tables ------------------------------------------------------------------------------

INTRODUCTION = """# Latency

Written by `make latency` with tensorflow {tensorflow}: one inference (batch of one) with LiteRT's
CPU kernels on one thread, on 2 cores **with other work running**: times are medians of {runs} runs
in which all files of a network took turns; only ratios within a network mean much. ResNet-20 and
VGG16 with batch normalization at 32 x 32 pixels, MobileNetV2 and EfficientNetB0 at 96 x 96. Half of
the multiply-accumulates (MACs) are cut (`apply(model, 0.5, measure="macs")`); within a layer chance
picks the channels, and weights are untrained. Peak is what a process grows by while it loads and
runs the file.

## Dense and pruned, `round_to=1`

*Speed-up* is dense time / pruned time of the same precision, *MAC ratio* dense MACs / pruned MACs;
gain is the first as a part of the second. *Difference* is that of the pruned file from Keras,
relative to the largest output (for int8 of an untrained network it says little).

| network | precision | dense bytes | pruned bytes | dense ms | pruned ms (quartiles) | speed-up | \
MAC ratio | gain | dense peak | pruned peak | difference |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""
ROUNDING = """
## Rounding of widths

Gain (speed-up / MAC ratio) for each `round_to`; in brackets the MAC ratio that came out.
The kernels work on channels in blocks: a width that is no multiple of a block takes as long as the
next one, which tells where layers are narrow.

| network | precision | {columns} |
|---|---|{rules}|
"""


def write_tables(folder):
    """docs/benchmarks/latency.md from the rows that there are."""
    rows = read_rows(folder / "latency.jsonl")
    rows = {name: rows[name] for name in NAMES if name in rows}
    if not rows:
        return
    text = INTRODUCTION.replace("\\\n", "").format(**next(iter(rows.values())))
    text += "".join(main_line(n, p, r) for n, r in rows.items() for p in PRECISIONS)
    columns = [v.removeprefix("round_to=") for v in variants() if v != "dense"]
    text += ROUNDING.format(columns=" | ".join(columns), rules="|".join("--:" for _ in columns))
    text += "".join(rounding_line(n, p, r) for n, r in rows.items() for p in PRECISIONS)
    found = read_rows(folder / "latency_target.jsonl").values()
    text += target_tables(list(found)) if found else ""
    (folder / "latency.md").write_text(text, encoding="utf-8")


def ratios(row, variant, precision):
    """Speed-up and MAC ratio against the dense network."""
    dense, small = row["files"]["dense"][precision], row["files"][variant][precision]
    return dense["ms"] / small["ms"], row["macs"]["dense"] / row["macs"][variant]


def main_line(name, precision, row):
    dense, small = row["files"]["dense"][precision], row["files"]["round_to=1"][precision]
    speed_up, mac_ratio = ratios(row, "round_to=1", precision)
    cells = [
        *(f"{x['bytes']:,}" for x in (dense, small)),
        f"{dense['ms']:.3f}",
        f"{small['ms']:.3f} ({small['lower']:.3f} to {small['upper']:.3f})",
        *(f"{x:.2f}" for x in (speed_up, mac_ratio, speed_up / mac_ratio)),
        *(f"{x['peak_bytes'] / 2**20:.1f} MiB" for x in (dense, small)),
        f"{small['relative_difference']:.0e}",
    ]
    return f"| {name} | {precision} | {' | '.join(cells)} |\n"


def rounding_line(name, precision, row):
    cells = [rounding_cell(row, v, precision) for v in variants() if v != "dense"]
    return f"| {name} | {precision} | {' | '.join(cells)} |\n"


def rounding_cell(row, variant, precision):
    if variant not in row["files"]:
        return "-"
    speed, macs = ratios(row, variant, precision)
    return f"{speed / macs:.2f} ({macs:.2f})"


# --- pruned for time -------------------------------------------------------------------------


def measure_target(name, runs, folder):
    """Predicted and measured shares of time removed, and predicted and measured dense times."""
    import models
    from settle_by_chance import settled

    import keras_polar

    dense = models.build(TARGETS[name], (32, 32, 3), 10)
    table = keras_polar.latency_table(dense, runs=runs)
    folder.mkdir(parents=True, exist_ok=True)
    paths, predicted = [str(folder / f"{TARGETS[name]}-dense.tflite")], []
    keras_polar.export_tflite(dense, paths[0])
    for sparsity, round_to, seed in TARGET_CASES:
        options = {"measure": "latency", "round_to": round_to, "latency_table": table}
        gated = settled(dense, sparsity, seed, **options)
        predicted.append(gated.sparsity)
        paths.append(str(folder / f"{TARGETS[name]}-latency-{len(paths)}.tflite"))
        keras_polar.export_tflite(keras_polar.convert(gated), paths[-1])
    times = keras_polar.benchmark_tflite(paths, runs=runs)
    whole, *small = (latency.median for latency in times.values())
    return {
        "device": table.device,
        "runtime": table.runtime,
        "runs": runs,
        "dense_ms": [gated.budget.full_cost / 1e9, whole],
        "cases": [
            [*case, p, 1 - t / whole]
            for case, p, t in zip(TARGET_CASES, predicted, small, strict=True)
        ],
    }


# Sparsity, round_to, seed of the channels. At round_to=16 half of the time may be out of reach.
TARGET_CASES = [(0.3, None, 0), (0.5, None, 0), (0.5, None, 1), (0.4, 16, 0)]
TARGET = """
## Pruned for time

`python examples/benchmarks/latency.py --target`: `apply(model, s, measure="latency")` with the
table that `keras_polar.latency_table` measured on the same machine ({device}, {runtime}, one
thread, nothing else running), channels picked at random, float32, images of 32 x 32 pixels.
*Removed* is the share of the dense network's time (medians of {runs} runs in turns) that is gone,
*off* how far the time that is left is from the predicted. Dense time, as the sum of the operations
timed one by one and timed as a whole: {dense}.

| network | asked | round_to | predicted removed | removed | off |
|---|--:|--:|--:|--:|--:|
"""


def target_tables(rows):
    dense = (f"{r['name']} {r['dense_ms'][0]:.2f} and {r['dense_ms'][1]:.2f} ms" for r in rows)
    text = TARGET.format(**rows[0] | {"dense": ", ".join(dense)})
    return text + "".join(target_line(row["name"], *case) for row in rows for case in row["cases"])


def target_line(name, asked, round_to, seed, predicted, removed):
    off = (1 - removed) / (1 - predicted) - 1
    shares = f"{predicted:.1%} | {removed:.1%} | {off:+.1%}"
    return f"| {name} | {asked:.0%} | {round_to or 'default'} | {shares} |\n"


def is_missing(name, rows):
    """Whether a row is to be made: there is none, or it lacks a variant."""
    return name not in rows or (not _TARGET.value and not set(variants()) <= {*rows[name]["files"]})


def main(argv):
    """Entry point of absl."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    folder = Path(_FOLDER.value)
    path = folder / "latency.jsonl"
    make, names = measure, NAMES
    if _TARGET.value:
        path, make, names = folder / "latency_target.jsonl", measure_target, TARGETS
    todo = [n for n in names if is_missing(n, read_rows(path)) and re.search(_ONLY.value, n)]
    for name in track(todo, "latency"):
        add_row(path, {"name": name, **make(name, _RUNS.value, Path(_FILES.value))})
        write_tables(folder)
    write_tables(folder)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    app.run(main)
