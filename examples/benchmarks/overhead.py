"""What gates cost while training: a step of the gated model beside one of the dense model.

    python examples/benchmarks/overhead.py --rounds=25 --output=docs/benchmarks/training_cost.jsonl

The models take turns within one process, so that a disturbance of the machine meets all of them
alike; what counts is the median of the ratios, round by round. The gates are under full pressure:
all losses are active, nothing is settled. The compacted models are what `fit` goes on with once
half of the weights or of the multiply-accumulates (MACs) are gone; units chosen by lot. A whole run
is the one kind of step until the gates settle and the other from then on, without the seconds that
it takes to compile the smaller network's. `make results` writes docs/benchmarks/training_cost.md
from the file.
"""

import sys
import time
from pathlib import Path

import keras
import numpy as np
from absl import app, flags
from json_lines import put_row
from settle_by_chance import settled

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import reporting

import keras_polar

IMAGE_SHAPE, CLASSES = (32, 32, 3), 10
WARM_UP_ROUNDS = 3

_MODEL = flags.DEFINE_enum("model", "resnet20", tuple(models.BUILDERS), "Architecture.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images per step.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 30, "Steps of each model.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "File of rows; the one of this script is replaced.")


def compiled(model):
    """The model with the optimizer and the loss of `examples/cifar10.py`."""
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def under_pressure(name):
    """The dense model and one with each kind of gate, under full pressure from the first step."""
    dense = models.build(name, IMAGE_SHAPE, CLASSES, weight_decay=2e-4)
    schedule = keras_polar.Schedule(warmup=0.0, ramp=0.0, settle=1.0, steps=1_000_000)
    gated = {
        gate: keras_polar.apply(dense, 0.5, gate=gate, schedule=schedule)
        for gate in ("static", "dynamic")
    }
    return {name: compiled(model) for name, model in {"dense": dense, **gated}.items()}


def contenders(name):
    """The models under pressure and what `fit` goes on with once their gates are settled."""
    found = under_pressure(name)
    return found | {f"compacted, {m}": compacted(found["dense"], m) for m in ("weights", "macs")}


def compacted(dense, measure):
    """The sub-network of a settled gated model, which is what `fit` trains from then on."""
    return compiled(keras_polar.convert(settled(dense, 0.5, measure=measure)))


def random_batch(size):
    """Images, shape (size, 32, 32, 3), and labels, shape (size,)."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((size, *IMAGE_SHAPE)).astype("float32")
    return images, rng.integers(0, CLASSES, size)


def timed_step(model, batch):
    """Seconds of one training step."""
    start = time.perf_counter()
    model.train_on_batch(*batch)
    return time.perf_counter() - start


def step_times(contestants, batch, rounds):
    """Name -> seconds of each step; who goes first changes from round to round."""
    times = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(WARM_UP_ROUNDS + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(timed_step(contestants[name], batch))
    return {name: np.array(values[WARM_UP_ROUNDS:]) for name, values in times.items()}


def summary(times):
    """Name -> quartiles of the ratio to the dense step of the same round."""
    ratios = {name: values / times["dense"] for name, values in times.items() if name != "dense"}
    return {
        name: [float(q) for q in np.percentile(values, [25, 50, 75])]
        for name, values in {**ratios, **whole_runs(ratios)}.items()
    }


def whole_runs(ratios):
    """Times of runs with the default schedule; three stages: dense, cut, half as long again."""
    settle, found = keras_polar.Schedule().settle, {}
    for m in ("weights", "macs"):
        small = ratios[f"compacted, {m}"]
        for gate in ("static", "dynamic"):
            found[f"whole run, {gate}, {m}"] = settle * ratios[gate] + (1 - settle) * small
        found[f"three stages, {m}"] = 1 + small / 2
    return found


def main(argv):
    """Entry point of absl."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    batch = random_batch(_BATCH_SIZE.value)
    ratios = summary(step_times(contenders(_MODEL.value), batch, _ROUNDS.value))
    rows = [(name, *(f"{q:.3f} x" for q in (r[1], r[0], r[2]))) for name, r in ratios.items()]
    title = f"Training step, {_MODEL.value}, batch {_BATCH_SIZE.value}: gated / dense"
    columns = ("model", "median", "lower quartile", "upper quartile")
    reporting.print_table(title, columns, rows, f"{_ROUNDS.value} rounds")
    keep("overhead", rounds=_ROUNDS.value, ratios=rounded(ratios, 2))


def rounded(values, digits):
    """Numbers in lists and dicts, rounded."""
    return keras.tree.map_structure(lambda x: round(x, digits), values)


def keep(name, **row):
    """Writes the row of a script into the file that it is to leave, if any."""
    if _OUTPUT.value:
        put_row(Path(_OUTPUT.value), {"name": name, **row})


if __name__ == "__main__":
    app.run(main)
