"""How analysis, apply and convert grow with the model: docs/benchmarks/scaling.md.

Chains and residual nets of 100, 1,000 and 5,000 layers, and the largest models of
keras.applications, each in a process of its own. Seconds are processor time, which other work on
the machine disturbs least. Keras' own `clone_model` is the yardstick: what it takes to build a
model of that size at all. Rows are kept in docs/benchmarks/scaling.jsonl and not repeated.

    make scaling
    python examples/benchmarks/scaling.py --only=residual
"""

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from absl import app, flags
from json_lines import add_row, read_rows
from rich.progress import track

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "docs" / "benchmarks" / "scaling.jsonl"
TABLE = ROOT / "docs" / "benchmarks" / "scaling.md"
DEPTHS = (100, 1000, 5000)
WIDTH = 4
LARGE = {"ResNet50": 224, "EfficientNetV2L": 64, "NASNetLarge": 64, "ConvNeXtXLarge": 64}
STEPS = ("clone", "couple", "apply", "convert")
TIMEOUT = 3600

_ONLY = flags.DEFINE_string("only", "", "Regular expression: rows to make, of those missing.")
_WORKER = flags.DEFINE_string("worker", None, "Internal: makes one row.")


# --- the models ------------------------------------------------------------------------------


def chain(layers_count: int):
    """Dense layers in a row: every one is a group of its own."""
    import keras

    inputs = x = keras.Input((WIDTH,))
    for _ in range(layers_count):
        x = keras.layers.Dense(WIDTH)(x)
    return keras.Model(inputs, x)


def residual(layers_count: int):
    """Blocks of two Dense layers and an Add: one stream is tied in every block."""
    import keras

    inputs = keras.Input((WIDTH,))
    x = keras.layers.Dense(WIDTH)(inputs)
    for _ in range(layers_count // 3):
        y = keras.layers.Dense(WIDTH, activation="relu")(x)
        x = keras.layers.Add()([keras.layers.Dense(WIDTH)(y), x])
    return keras.Model(inputs, keras.layers.Dense(WIDTH)(x))


def application(name: str):
    import keras

    return getattr(keras.applications, name)(
        weights=None, input_shape=(LARGE[name], LARGE[name], 3), classifier_activation=None
    )


def builders() -> dict[str, Callable]:
    deep = {f"{f.__name__} {n}": lambda f=f, n=n: f(n) for n in DEPTHS for f in (chain, residual)}
    return {**{name: lambda name=name: application(name) for name in LARGE}, **deep}


# --- one row ---------------------------------------------------------------------------------


def measure(build: Callable) -> dict:
    import keras
    import tensorflow

    import keras_polar

    sys.setrecursionlimit(100_000)  # Keras walks a model recursively, one frame per layer in a row
    keras_polar.apply(keras.Sequential([keras.Input((2,)), *dense(3)]), 0.1)  # first use is slow
    model, built = timed(build)
    own = peak_memory()
    cost, couple_s = timed(lambda: keras_polar.cost(model))
    row = {
        "calls": len(cost.rows),
        "units": sum(r.units for r in keras_polar.inspect(model).rows),
        "build_s": built,
        "couple_s": couple_s,
    }
    gated, row["apply_s"] = timed(lambda: keras_polar.apply(model, 0.01, measure="units"))
    row["groups"] = len(gated.groups)
    for group in gated.groups:
        group.set_mask(np.arange(group.units) < group.units // 2)
    small, row["convert_s"] = timed(partial(keras_polar.convert, gated))
    row |= {"model_gib": own, "peak_gib": peak_memory()}
    del gated, small
    _, row["clone_s"] = timed(lambda: keras.models.clone_model(model))
    return {**row, "keras": keras.__version__, "tensorflow": tensorflow.__version__}


def dense(count: int) -> list:
    import keras

    return [keras.layers.Dense(2) for _ in range(count)]


def timed(function: Callable) -> tuple:
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def peak_memory() -> float:
    """GiB this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --- running ---------------------------------------------------------------------------------


def make_row(name: str) -> None:
    """One row, in a process of its own, so that its peak of memory is its own."""
    command = [sys.executable, __file__, f"--worker={name}"]
    try:
        done = subprocess.run(command, timeout=TIMEOUT, capture_output=True, text=True)
        why = f"the process ended with {done.returncode}: {done.stderr.strip()[-200:]}"
    except subprocess.TimeoutExpired:
        why = f"not done within {TIMEOUT} s"
    if name not in read_rows(ROWS):
        add_row(ROWS, {"name": name, "failure": why})


# --- the table -------------------------------------------------------------------------------

INTRODUCTION = """# Scaling

Written by `make scaling` with keras {keras} and tensorflow {tensorflow}: seconds of processor time
with one TensorFlow thread, on 2 cores with other work running. *clone* is
`keras.models.clone_model` of the same model, the yardstick; *analysis* is what `cost` does (trace
and couple, mostly). Dynamic gates; half of every group is closed. *Peak* is the most memory the
process held with the model, the gated model and the small model alive; *model* what it held after
building the model alone. keras.applications at 64 x 64 pixels, ResNet50 at 224 x 224.

| net | calls | units | groups | clone | analysis | apply | convert | apply / clone | model | peak |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""
EXPONENTS = """
The exponent of growth, fitted over the three depths (slope of log seconds over log layers; 1 is
linear, 2 quadratic):

| net | clone | analysis | apply | convert |
|---|--:|--:|--:|--:|
"""


def write_table() -> None:
    rows = {n: r for n, r in read_rows(ROWS).items() if "failure" not in r}
    failed = [r for r in read_rows(ROWS).values() if "failure" in r]
    if not rows:
        return
    versions = next(iter(rows.values()))
    text = INTRODUCTION.format(keras=versions["keras"], tensorflow=versions["tensorflow"])
    text += "".join(_line(n, rows[n]) for n in builders() if n in rows)
    text += "".join(f"| {r['name']} {'| ' * 9}| **{r['failure']}** |\n" for r in failed)
    fits = {k: _exponents(k, rows) for k in ("chain", "residual")}
    text += EXPONENTS + "".join(
        f"| {k} | {' | '.join(f'{e:.2f}' for e in fit)} |\n" for k, fit in fits.items() if fit
    )
    TABLE.write_text(text, encoding="utf-8")


def _line(name: str, row: dict) -> str:
    cells = [
        *(f"{row[k]:,}" for k in ("calls", "units", "groups")),
        *(f"{row[f'{k}_s']:.2f} s" for k in STEPS),
        f"{row['apply_s'] / row['clone_s']:.1f}",
        *(f"{row[k]:.1f} GiB" for k in ("model_gib", "peak_gib")),
    ]
    return f"| {name} | {' | '.join(cells)} |\n"


def _exponents(kind: str, rows: dict) -> list[float]:
    """Slopes for each of STEPS; empty as long as a depth is missing."""
    own = [rows[n] for d in DEPTHS if (n := f"{kind} {d}") in rows]
    if len(own) < len(DEPTHS):
        return []
    depths = np.log(DEPTHS)
    return [float(np.polyfit(depths, np.log([r[f"{s}_s"] for r in own]), 1)[0]) for s in STEPS]


def main(argv: list[str]) -> None:
    del argv
    if _WORKER.value:
        add_row(ROWS, {"name": _WORKER.value, **measure(builders()[_WORKER.value])})
        return
    have = read_rows(ROWS)
    todo = [n for n in builders() if n not in have and re.search(_ONLY.value, n)]
    for name in track(todo, "scaling"):
        make_row(name)
        write_table()
    write_table()


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for variable in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(variable, "1")
    app.run(main)
