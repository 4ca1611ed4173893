"""What keras_polar makes of every model of keras.applications and KerasHub: docs/coverage.md.

Each model is gated, half of every group is closed at random, and the result is converted. A row
says how much of the model can go, whether the small model equals the gated one, and how long it
took; or why it failed. Rows are kept in docs/coverage.jsonl: what stands there is not repeated
(`--redo=REGEX` does it again), so that an interrupted run goes on where it stopped.

    make coverage-matrix
    python examples/benchmarks/coverage_matrix.py --only='ResNet50 .*top'
"""

import gc
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags
from json_lines import add_row, read_rows
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from task_trip import LITTLE, TOLERANCE, task_row

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "docs" / "coverage.jsonl"
TABLE = ROOT / "docs" / "coverage.md"
COMMAND = "make coverage-matrix"
SIZES = {"InceptionResNetV2": 96, "InceptionV3": 96, "Xception": 96}
VARIANTS = ("top", "no top", "Sequential head", "functional head")
BARE = ("SAM3PromptableConceptBackbone",)  # says another shape of an output than it has
NEITHER = "nor does the whole model"
TIMEOUT = 1800  # seconds per model, all its variants together

_ONLY = flags.DEFINE_string("only", "", "Regular expression: rows to make, of those missing.")
_REDO = flags.DEFINE_string("redo", None, "Regular expression: rows to make anew.")
_WORKER = flags.DEFINE_string("worker", None, "Internal: makes the rows of one model.")


# --- the models ------------------------------------------------------------------------------


def application_names() -> list[str]:
    import keras

    return sorted(n for n in dir(keras.applications) if n[0].isupper())


def application(name: str, variant: str):
    """A model of keras.applications with random weights, on small images."""
    import keras

    size = SIZES.get(name, 64)
    build = getattr(keras.applications, name)
    options = {"weights": None, "input_shape": (size, size, 3)}
    if variant == "top":
        # Logits: behind a softmax of random weights all outputs would look alike.
        return build(**options, classifier_activation=None)
    body = build(**options, include_top=False)
    if variant == "no top":
        return body
    pool, head = keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)
    if variant == "Sequential head":
        return keras.Sequential([body, pool, head])
    inputs = keras.Input(body.input_shape[1:])
    return keras.Model(inputs, head(pool(body(inputs, training=False))))


def hub_backbones() -> dict[str, Callable]:
    """KerasHub's backbones by name; none where KerasHub is not installed."""
    try:
        return importlib.import_module("hub_models").BACKBONES
    except ImportError:
        return {}


def hub_tasks() -> dict[str, Any]:
    """KerasHub's tasks by name; none where KerasHub is not installed."""
    try:
        return importlib.import_module("hub_tasks").TASKS
    except ImportError:
        return {}


def builders(name: str) -> dict[str, Callable]:
    """Row name -> what builds its model."""
    package, model = name.split(" ", 1)
    if package == "hub":
        head = (lambda body: body) if model in BARE else with_head
        return {name: lambda: head(hub_backbones()[model]())}
    return {f"{name} ({v})": lambda v=v: application(model, v) for v in VARIANTS}


def with_head(body):
    """The backbone with a Dense on each of its outputs, as a task has: no stream is an output."""
    import keras

    def head(y):
        return keras.layers.Dense(2)(y) if len(y.shape) > 1 and y.shape[-1] else y

    inputs = keras.tree.map_structure(
        lambda x: keras.Input(x.shape[1:], dtype=x.dtype, name=x.name), body.input
    )
    return keras.Model(inputs, keras.tree.map_structure(head, body(inputs)), name=body.name)


# --- one row ---------------------------------------------------------------------------------


def measure(build: Callable) -> dict:
    """The row of one model: shares, certificate and seconds."""
    import keras
    from half_closed import close_half, difference, random_inputs

    import keras_polar

    model = randomise(build())
    found = keras_polar.inspect(model)
    start = time.perf_counter()
    gated = keras_polar.apply(model, LITTLE, gate="static")
    applied = time.perf_counter()
    close_half(gated)
    closed = time.perf_counter()
    small = keras_polar.convert(gated)
    converted = time.perf_counter()
    before, after = keras_polar.cost(model), keras_polar.cost(small)
    inputs = random_inputs(model, batch=2)  # SAM3 takes no other
    row = {
        "weights": before.weights,
        "prunable_units": found.prunable,
        "prunable_weights": found.prunable_weights,
        "prunable_macs": found.prunable_macs,
        "pins": pins(found),
        "difference": difference(gated, small, inputs),
        "effect": difference(model, small, inputs),
        "kept_weights": after.weights / before.weights,
        "kept_macs": after.macs / max(1, before.macs),
        "counted_as_predicted": after.weights == small.count_params() == predicted(before, gated),
        "file": file_of(model, gated, small, inputs),
        "apply_s": applied - start,
        "convert_s": converted - closed,
        "versions": {"keras": keras.__version__, "tensorflow": tensorflow_version()},
    }
    return {**row, "failure": failure_of(row)}


def file_of(model, gated, small, inputs) -> str:
    """Why gated or small model does not survive a file, or that the whole model does not either."""
    from file_trip import trouble

    found = trouble({"small": small, "gated": gated}, inputs)
    return found and (f"{NEITHER}: {found}" if trouble({"whole": model}, inputs) else found)


def failure_of(row: dict) -> str:
    if row["file"] and not row["file"].startswith(NEITHER):
        return f"file: {row['file']}"
    if not row["difference"] <= TOLERANCE:
        return f"certificate: differs by {row['difference']:.1e}"
    if not row["counted_as_predicted"]:
        return "cost predicted is not the cost counted"
    return "" if row["effect"] > 1e-3 else "no test: the masks do not change the output"


def predicted(before, gated) -> int:
    """Weights of the converted model, from the share that the masks remove by the gated one."""
    return round((1 - gated.sparsity) * before.weights)


def pins(found) -> list[list]:
    """The commonest reasons why units stay, with how many: [[reason, units], ...]."""
    count: Counter = Counter()
    for row in found.rows:
        if row.reason:
            # Layers that stay for the same kind of reason count together, whatever their names.
            count[re.sub(r" \([A-Za-z0-9]+ '.*'\)| '[^']*'", "", row.reason)] += (
                row.units - row.prunable
            )
    return [list(pair) for pair in count.most_common(3)]


def randomise(model, seed: int = 0):
    """Random offsets and statistics: a fresh model has too many zeros to prove anything."""
    import keras
    import numpy as np

    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if len(weight.shape) == 1 and "float" in weight.dtype:
            noise = 0.1 * rng.standard_normal(weight.shape)
            if "variance" in weight.path:
                noise = 1 + abs(noise)
            weight.assign(1 + noise if "gamma" in weight.path else noise)
        elif "kernel" in weight.path and "float" in weight.dtype:
            # Transformers start so small that what a mask changes would drown in round-off.
            scale = 1 / np.sqrt(np.prod(weight.shape[:-1]))
            if float(keras.ops.std(weight)) < 0.3 * scale:
                weight.assign(scale * rng.standard_normal(weight.shape))
    return model


def tensorflow_version() -> str:
    import tensorflow

    return tensorflow.__version__


# --- running ---------------------------------------------------------------------------------


def work(name: str, wanted: list[str]) -> None:
    """Makes the rows of one model; runs in a process of its own, which gives its memory back."""
    import keras

    for row_name, row_of in measurements(name).items():
        if row_name not in wanted:
            continue
        keras.backend.clear_session()
        gc.collect()
        keras.utils.set_random_seed(0)
        try:
            row = row_of()
        except Exception as error:  # the reason is what the table is for
            row = {"failure": f"{type(error).__name__}: {error}"}
        add_row(ROWS, {"name": row_name, **row})


def measurements(name: str) -> dict[str, Callable]:
    """Row name -> what makes the row."""
    if name.startswith("task "):
        return {name: partial(task_row, hub_tasks()[name.removeprefix("task ")])}
    return {row: partial(measure, build) for row, build in builders(name).items()}


def make_rows(name: str, wanted: list[str]) -> None:
    """The missing rows of one model, in a process of its own; what kills it becomes its row."""
    command = [sys.executable, __file__, f"--worker={name}", "--", *wanted]
    try:
        done = subprocess.run(command, timeout=TIMEOUT, capture_output=True, text=True)
        why = f"the process ended with {done.returncode}: {done.stderr.strip()[-200:]}"
    except subprocess.TimeoutExpired:
        why = f"not done within {TIMEOUT} s"
    have = read_rows(ROWS)
    for row_name in wanted:
        if row_name not in have:
            add_row(ROWS, {"name": row_name, "failure": why})


def all_rows() -> dict[str, list[str]]:
    """Model -> names of its rows."""
    names = [f"keras.applications {n}" for n in application_names()]
    names += [f"hub {n}" for n in hub_backbones()]
    return {n: list(builders(n)) for n in names} | {
        n: [n] for n in map("task {}".format, hub_tasks())
    }


def missing(rows: list[str], have: dict) -> list[str]:
    return [r for r in rows if r not in have and re.search(_ONLY.value, r)]


def forget(pattern: str) -> None:
    rows = [r for r in read_rows(ROWS).values() if not re.search(pattern, r["name"])]
    ROWS.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


# --- the table -------------------------------------------------------------------------------


def write_table() -> None:
    rows = sorted(read_rows(ROWS).values(), key=lambda r: r["name"].lower())
    models = [r for r in rows if not r["name"].startswith("task ")]
    good = sum(not r["failure"] for r in models)
    versions = next((r["versions"] for r in reversed(rows) if "versions" in r), {})
    text = INTRODUCTION.format(command=COMMAND, rows=len(models), good=good, **versions)
    for title, prefix in (("keras.applications", "keras.applications "), ("KerasHub", "hub ")):
        own = [r for r in rows if r["name"].startswith(prefix)]
        if own:
            lines = [_line(r, r["name"].removeprefix(prefix)) for r in own]
            text += "\n".join(["", f"## {title}", "", *HEADING, *lines, ""])
    tasks = [r for r in rows if r["name"].startswith("task ")]
    if tasks:
        text += "\n".join([TASKS_INTRODUCTION, *TASKS_HEADING, *map(_task_line, tasks), ""])
    TABLE.write_text(text, encoding="utf-8")


INTRODUCTION = """# Coverage

Written by `{command}` with keras {keras} and tensorflow {tensorflow}. {good} of {rows} rows hold
the certificate. The seconds were taken on 2 cores with other work running.

Every model has random weights and small inputs (64 or 96 pixels for images), backbones of KerasHub
a Dense on each output; half of the units of every group were closed at random.

- *prunable*: the share of units that can go, and the share of weights and of multiply-accumulates
  (MACs) that is gone when every group keeps one unit, as `keras_polar.inspect` gives it.
- *certificate*: the largest difference between gated and converted model, relative to the largest
  output; at most 1e-4 is asked for. Every row's weights, counted, were as predicted.
- *kept*: weights and MACs of the converted model at these masks.
- *file*: whether gated and converted model, saved, are the same when another process has loaded
  them, the converted one without keras_polar; "?" where that was not tried. "nor does the whole
  model": the model itself cannot be saved and loaded either.
- *what stays*: the commonest reasons, with the number of units; or why the row failed.
"""
HEADING = (
    "| model | weights | prunable units | weights | MACs | certificate | kept weights | MACs "
    "| file | apply | convert | what stays, or the failure |",
    "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|---|",
)


TASKS_INTRODUCTION = """
## Tasks of KerasHub

Raw images or texts go through `apply(task, 0.1)`, three epochs of `fit` and `convert(gated,
into=task)`: small configs, random weights.

- *untouched*: how far apart the answers of the task are when no unit is closed; of tasks that write
  texts "same" (`generate`).
- *certificate*: the largest difference between what the gated model and the smaller task predict.
- *preset*: whether another process that loads the smaller task from its preset answers the same;
  "with keras_polar" where it has to be imported.
"""
TASKS_HEADING = (
    "| task | weights | kept | untouched | certificate | preset | all steps | failure |",
    "|---|--:|--:|--:|--:|---|--:|---|",
)


def _task_line(row: dict) -> str:
    name, failure = row["name"].removeprefix("task "), _plain(row["failure"])
    if "difference" not in row:
        return f"| {name} {'| ' * 6}| **{failure}** |"
    cells = [
        _size(row["weights"]),
        f"{row['kept_weights']:.1%}",
        f"{row['whole']:.0e}" if row["whole"] else "same",
        f"{row['difference']:.0e}",
        _plain(row["preset"][:200]),
        f"{row['seconds']:.0f} s",
        f"**{failure}**" if failure else "",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _line(row: dict, name: str) -> str:
    failure = _plain(row["failure"])
    if "difference" not in row:
        return f"| {name} {'| ' * 10}| **{failure}** |"
    share = [row[k] for k in ("prunable_units", "prunable_weights", "prunable_macs")]
    cells = [
        _size(row["weights"]),
        *(f"{x:.1%}" for x in share),
        f"{row['difference']:.0e}",
        *(f"{row[k]:.1%}" for k in ("kept_weights", "kept_macs")),
        _plain(row.get("file", "?")[:200]) or "yes",
        *(f"{row[k]:.1f} s" for k in ("apply_s", "convert_s")),
        f"**{failure}**" if failure else "; ".join(f"{n:,}: {why}" for why, n in row["pins"]),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _plain(error: str) -> str:
    """An error as text of a table's cell: no colours, nothing that Markdown takes for a link."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", error)
    return " ".join(text.split()).replace("|", "/").replace("[", r"\[")


def _size(weights: int) -> str:
    return f"{weights / 1e6:.1f} M" if weights >= 1e5 else f"{weights / 1e3:.1f} k"


def main(argv: list[str]) -> None:
    if _WORKER.value:
        work(_WORKER.value, argv[1:])
        return
    if _REDO.value:
        forget(_REDO.value)
    have = read_rows(ROWS)
    todo = {n: rows for n, r in all_rows().items() if (rows := missing(r, have))}
    columns = [TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("coverage", total=sum(map(len, todo.values())))
        for name, rows in todo.items():
            progress.update(task, description=name)
            make_rows(name, rows)
            progress.advance(task, len(rows))
            write_table()
    write_table()


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    app.run(main)
