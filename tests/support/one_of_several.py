"""One of several processes of JAX: `python one_of_several.py JOB FOLDER ID COUNT PORT OPTIONS`.

OPTIONS is a JSON object. A job that ends leaves its result in FOLDER under the process' ID.
"""

import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
from keras import layers

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.gates.gate import DynamicGate
from keras_polar.processes import assign, require_agreement

STEPS, BATCH, EPOCHS = 5, 16, 4
# Of 20 steps: warm-up until 2, full pressure from 6, settled after 8, in the second epoch.
SCHEDULE = {"warmup": 0.1, "ramp": 0.3, "settle": 0.4}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(width=12):
    inputs = x = keras.Input((6,))
    for i, units in enumerate((16, width)):
        # No bias: BatchNormalization would leave it round-off for a gradient, and Adam amplify it.
        x = layers.Dense(units, use_bias=False, name=f"dense{i}")(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"bn{i}")(x)
        x = layers.Activation("tanh")(x)  # smooth: no kink that round-off could flip
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name="network")


def compiled(gate="static", sparsity=0.5, optimizer=None, **schedule):
    keras.utils.set_random_seed(0)
    schedule = keras_polar.Schedule(**{**SCHEDULE, **schedule})
    gated = keras_polar.apply(network(), sparsity, gate=gate, schedule=schedule)
    rng = np.random.default_rng(1)
    for layer in gated.layers:
        if isinstance(layer, DynamicGate):  # they disagree between samples, and so processes
            layer.kernel.assign(0.3 * rng.standard_normal(layer.kernel.shape))
    gated.compile(optimizer or keras.optimizers.Adam(0.01), LOSS)
    return gated


def part(process, count, steps=STEPS):
    """What a process feeds: its part of every batch."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((steps, BATCH, 6)).astype("float32")
    y = rng.integers(0, 4, (steps, BATCH))
    share = slice(process * BATCH // count, (process + 1) * BATCH // count)
    return x[:, share].reshape(-1, 6), y[:, share].reshape(-1)


class After(keras.callbacks.Callback):
    """Does something after a step of the whole run."""

    async_safe = True  # does not look at the model

    def __init__(self, step, what):
        super().__init__()
        self.step, self.what, self.done = step, what, 0

    def on_train_batch_end(self, batch, logs=None):
        self.done += 1
        if self.done == self.step:
            self.what()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise RuntimeError("no more data")


class Seen(keras.callbacks.Callback):
    """The loss after every step, and whether a smaller network trained in the end."""

    async_safe = True

    def __init__(self, gated):
        super().__init__()
        self.gated, self.by_step, self.was_compacted = gated, {}, False

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.by_step[self.epoch, batch] = logs["loss"]
        self.was_compacted = self.gated.sub_network is not None

    @property
    def losses(self):
        return [loss for _, loss in sorted(self.by_step.items())]


def train(folder, process, count, gate="static", seed=0, steps=STEPS, end=None, saving=False):
    """The whole run; process `end[0]` ends after step `end[1]`, process 0 may save within epochs.

    `end[2]` says whether that process is killed or fails.
    """
    require_agreement({"seed": seed})
    gated = compiled(gate)
    seen = Seen(gated)
    callbacks = [keras.callbacks.BackupAndRestore(folder / f"backup{process}"), seen]
    if end and end[0] == process:
        callbacks.append(After(end[1], {"kill": kill, "fail": fail}[end[2]]))
    if saving and process == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint(folder / "gated.keras", save_freq=3))
    options = {"batch_size": BATCH // count, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    gated.fit(*part(process, count, steps), callbacks=callbacks, **options)
    assert seen.was_compacted
    weights = {w.path: to_numpy(w) for w in gated.weights}
    np.savez(folder / f"{process}.npz", losses=seen.losses, **weights)


# --- what processes may disagree about -------------------------------------------------------


def disagree(folder, process, count):
    """Process 1 is odd, in one way after another; leaves the errors in words."""
    odd, gated = process == 1, compiled()
    found = {name: error_of(case, gated, odd) for name, case in BEFORE.items()}
    found["backup"] = error_of(fit, gated, odd, callbacks=backup(folder, odd))
    shutil.copytree(folder / "backup1", folder / "backup0", dirs_exist_ok=True)  # the remedy
    found["backup, copied"] = error_of(fit, gated, odd, epochs=3, callbacks=backup(folder, odd))
    gated = compiled()  # Keras goes on with the epoch of a backup in later fits as well
    found |= {name: error_of(case, gated, odd) for name, case in WHILE.items()}
    (folder / f"{process}.json").write_text(json.dumps(found))


def error_of(case, *args, **kwargs):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            case(*args, **kwargs)
        except ValueError as error:
            return str(error)
    return "".join(str(w.message) for w in warned if "processes" in str(w.message))


def fit(gated, odd, samples=16, **options):
    x, y = part(int(odd), 2)
    options = {"batch_size": 8, "epochs": 1, "shuffle": False, "verbose": 0, **options}
    gated.fit(x[:samples], y[:samples], **options)


def backup(folder, odd):
    """Only process 1 has one, made in the second epoch of an earlier run."""
    path = folder / f"backup{int(odd)}"
    found = keras.callbacks.BackupAndRestore(path, delete_checkpoint=False)
    if odd and not path.exists():
        path.mkdir()
        (path / "training_metadata.json").write_text('{"epoch": 2, "batch": 0}')
    return [found]


def otherwise(gated, odd, variable):
    """As if it came from another file; JAX compares what is assigned in the ordinary way."""
    before = to_numpy(variable)
    assign(variable, before + odd)
    try:
        fit(gated, odd)
    finally:
        assign(variable, before)


def other_mask(odd):
    gated = compiled()
    gated.settle()
    otherwise(gated, odd, gated.get_layer("dense0_gate").settled_mask)


def without_distribution(gated, odd, in_both=False):
    distribution = keras.distribution.distribution()
    if odd or in_both:
        keras.distribution.set_distribution(None)
    try:
        fit(gated, odd)
    finally:
        keras.distribution.set_distribution(distribution)


def batches(sizes):
    x, y = part(0, 1)
    yield from ((x[:n], y[:n]) for n in sizes)


class Stop(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


class Look(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.size = self.model.count_params()


BEFORE = {
    "callbacks": lambda gated, odd: fit(gated, odd, callbacks=[Look()] * odd),
    "batches": lambda gated, odd: fit(gated, odd, samples=16 - 8 * odd),
    "samples": lambda gated, odd: fit(gated, odd, samples=16 - 3 * odd),
    "batch size": lambda gated, odd: fit(gated, odd, 16 - 8 * odd, batch_size=8 - 4 * odd),
    "epochs": lambda gated, odd: fit(gated, odd, epochs=1 + odd),
    "validation": lambda gated, odd: fit(gated, odd, validation_data=part(0, 2) if odd else None),
    "sparsity": lambda _, odd: fit(compiled(sparsity=0.5 - 0.1 * odd), odd),
    "schedule": lambda _, odd: fit(compiled(polarization=4.0 + odd), odd),
    "optimizer": lambda _, odd: fit(
        compiled(optimizer=keras.optimizers.Adam(beta_1=0.9 - 0.1 * odd)), odd
    ),
    "weights": lambda gated, odd: otherwise(gated, odd, gated.trainable_variables[0]),
    "masks": lambda _, odd: other_mask(odd),
    "one without distribution": without_distribution,
    "none with distribution": lambda gated, odd: without_distribution(gated, odd, True),
    "seed": lambda _, odd: require_agreement({"seed": int(odd)}, "my script"),
}
# These train an epoch; the last one leaves a network that is not the same everywhere.
WHILE = {
    "no number": lambda gated, odd: gated.fit(batches([8, 8]), verbose=0),
    "stop": lambda gated, odd: fit(gated, odd, epochs=2, callbacks=[Stop()] * odd),
    "sizes": lambda gated, odd: gated.fit(
        batches([8 - 2 * odd] * 4), steps_per_epoch=2, epochs=2, verbose=0
    ),
}


def main(job, folder, process, count, port, options):
    process, count = int(process), int(count)
    if count > 1:
        keras.distribution.initialize(f"localhost:{port}", count, process)
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(auto_shard_dataset=False)
        )
    globals()[job](Path(folder), process, count, **json.loads(options))


if __name__ == "__main__":
    main(*sys.argv[1:])
