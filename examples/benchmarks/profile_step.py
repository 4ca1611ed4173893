"""Where a training step spends its time, with and without gates, by TensorFlow's profiler.

    python examples/benchmarks/profile_step.py --steps=10 \
        --output=docs/benchmarks/training_cost.jsonl

The time of every operation of the step, forward and backward, added up by what it is for.
Operations that run side by side count in full, so that the sum may exceed the time of the step. For
models whose layers are called as in `examples/models.py`.
"""

import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import app, flags
from tensorflow.tsl.profiler.protobuf import xplane_pb2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import overhead
import reporting

_STEPS = flags.DEFINE_integer("steps", 10, "Steps that are looked at.", lower_bound=1)

# What is an operation of the model, and not of the runtime: "path/of/operation:Kind".
OPERATION = re.compile(r"([\w/]+):\w+")
# The first pattern that an operation's name fits says what it is for.
PURPOSES = {
    "gates and their losses": r"_gate(_\d+)?/|consensus",
    "masks on activations": r"_mask(_\d+)?/",
    "BatchNormalization": r"_bn(_\d+)?/",
    "convolutions and Dense": r"/convolution|MatMul|BiasAdd",
    "masks on kernels": r"(conv\d*|shortcut|stem|logits)(_\d+)?/",
    "activations, additions, pooling": r"(relu|add|pool)(_\d+)?/",
    "optimizer, weight decay, loss": r"",
}


def purpose(operation):
    """What an operation is for: a key of `PURPOSES`."""
    return next(name for name, pattern in PURPOSES.items() if re.search(pattern, operation))


def times(space):
    """Purpose -> milliseconds, of a profile as the profiler writes it."""
    total = dict.fromkeys(PURPOSES, 0.0)
    for plane in (p for p in space.planes if p.name == "/host:CPU"):
        for event in (e for line in plane.lines for e in line.events):
            named = OPERATION.fullmatch(plane.event_metadata[event.metadata_id].name)
            if named:
                total[purpose(named[1])] += event.duration_ps / 1e9
    return total


def profiled_step(model, batch):
    """Purpose -> milliseconds, of one training step."""
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            model.train_on_batch(*batch)
        (path,) = Path(folder).rglob("*.xplane.pb")
        return times(xplane_pb2.XSpace.FromString(path.read_bytes()))


def profile(contestants, batch, steps):
    """Model -> purpose -> median milliseconds; the models take turns."""
    for model in contestants.values():
        for _ in range(overhead.WARM_UP_ROUNDS):
            model.train_on_batch(*batch)
    rounds = [{k: profiled_step(m, batch) for k, m in contestants.items()} for _ in range(steps)]
    return {
        k: {p: float(np.median([r[k][p] for r in rounds])) for p in PURPOSES} for k in contestants
    }


def main(argv):
    """Entry point of absl."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    name, size = flags.FLAGS.model, flags.FLAGS.batch_size
    batch = overhead.random_batch(size)
    found = profile(overhead.under_pressure(name), batch, _STEPS.value)
    percent = shares(found)
    rows = [(p, *(f"{own.get(m, 0.0):.1f} %" for m in found)) for p, own in percent.items()]
    title = f"Operations of a training step, {name}, batch {size}: shares of the dense step's"
    reporting.print_table(title, ("for", *found), rows, f"{_STEPS.value} steps")
    overhead.keep("profile", steps=_STEPS.value, percent=percent)


def shares(found):
    """Purpose -> model -> percent of the dense step's time, of models that have such operations."""
    dense = sum(found["dense"].values())
    largest = sorted(PURPOSES, key=lambda p: -found["dense"][p])
    times = {p: {m: own[p] for m, own in found.items()} for p in largest}
    times["sum"] = {m: sum(own.values()) for m, own in found.items()}
    return {
        p: {m: round(100 * t / dense, 1) for m, t in own.items() if t} for p, own in times.items()
    }


if __name__ == "__main__":
    app.run(main)
