"""Tasks of KerasHub through all steps: raw samples, fit, convert, answers, a preset elsewhere."""

import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LITTLE = 1e-6  # of the weights, which `apply` is asked to remove: the masks are ours
TOLERANCE = 1e-4


def task_row(case) -> dict:
    """What becomes of a task: shares, differences and seconds."""
    import keras
    import tensorflow

    import keras_polar

    task = case.make()
    start = time.perf_counter()
    gated = keras_polar.apply(task, 0.1, **case.options)
    gated.compile("adam")
    gated.fit(*case.data(), batch_size=4, epochs=3, verbose=0)
    made = keras_polar.convert(gated, into=task)
    seconds = time.perf_counter() - start
    asked = case.data()[0]
    row = {
        "weights": task.count_params(),
        "kept_weights": made.count_params() / task.count_params(),
        "whole": apart(case.answers(task), case.answers(untouched(task, case))),
        "difference": apart(gated.predict(asked, verbose=0), made.predict(asked, verbose=0)),
        "preset": trouble_with_preset(made, case),
        "seconds": seconds,
        "versions": {"keras": keras.__version__, "tensorflow": tensorflow.__version__},
    }
    return {**row, "failure": failure_of(row)}


def failure_of(row: dict) -> str:
    if row["kept_weights"] >= 1:
        return "nothing is gone"
    if max(row["whole"], row["difference"]) > TOLERANCE:
        return f"answers differ by {max(row['whole'], row['difference']):.0e}"
    return f"preset: {row['preset']}" if row["preset"] not in LOADED else ""


def untouched(task, case):
    """The task after `apply` and `convert`, no gate closed."""
    import keras_polar

    gated = keras_polar.apply(task, LITTLE, gate="static", **case.options)
    for group in gated.groups:
        group.set_mask(np.ones(group.units, bool))
    made = keras_polar.convert(gated, into=task)
    if hasattr(task, "sampler"):
        made.compile(sampler=task.sampler)
    return made


def apart(a, b) -> float:
    """The largest difference, relative to the largest number; of texts 0 or infinite."""
    import keras
    from half_closed import relative

    if isinstance(a, (str, list)):
        return 0.0 if a == b else float("inf")
    pairs = zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True)
    return max(relative(*pair) for pair in pairs)


LOADED = ("yes", "with keras_polar")
ALONE, HELPED = "keras_hub", "keras_hub, keras_polar"


def trouble_with_preset(task, case) -> str:
    """Whether another process that loads the preset gets the same answers; or why not."""
    wanted = case.answers(task)
    with tempfile.TemporaryDirectory() as folder:
        task.save_to_preset(f"{folder}/preset")
        given = base_of(task), case.questions, case.texts, case.loaded, case.given
        Path(folder, "asked").write_bytes(pickle.dumps(given))
        for modules, word in zip((ALONE, HELPED), LOADED, strict=True):
            code = f"import {modules}, task_trip; task_trip.answer({folder!r})"
            command = [sys.executable, "-c", code]
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=Path(__file__).parent
            )
            if not done.returncode:
                found = pickle.loads(Path(folder, "answers").read_bytes())
                return word if apart(wanted, found) <= TOLERANCE else "it is another task"
    return done.stderr.strip().splitlines()[-1]


def base_of(task) -> str:
    """The class of KerasHub by which presets of such tasks are loaded: "CausalLM", say."""
    import keras_hub

    names = [c.__name__ for c in type(task).__mro__[1:]]
    return next(name for name in names if hasattr(keras_hub.models, name))


def answer(folder: str) -> None:
    """What the task of a preset says."""
    import keras_hub
    from hub_tasks import said

    base, asked, texts, attributes, given = pickle.loads(Path(folder, "asked").read_bytes())
    task = getattr(keras_hub.models, base).from_preset(f"{folder}/preset", **given)
    for name, value in attributes.items():
        setattr(task.preprocessor, name, value)
    if texts:
        task.compile(sampler="greedy")
    Path(folder, "answers").write_bytes(pickle.dumps(said(task, asked, texts)))
