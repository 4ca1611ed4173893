"""One training on several machines with JAX: start the same command on every one of them.

    python examples/distributed.py                     # one process
    python examples/distributed.py --coordinator=10.0.0.1:1234 --processes=2 --process_id=0
    python examples/distributed.py --coordinator=10.0.0.1:1234 --processes=2 --process_id=1

The address is that of the machine with process 0; it converts, verifies and saves in the end. Put
your own data into `load` and your own model into `build`. With `--backup_dir` a run that was
interrupted goes on when the same commands are given again.
"""

import functools
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")  # before Keras is imported

import keras
import models
import reporting
from absl import app, flags
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_polar
from keras_polar.processes import require_agreement

CLASSES = 10
IMAGE_SHAPE = (8, 8, 1)
LEARNING_RATE = 2e-3
TEST_SHARE = 0.25
# What has to be the same on all machines.
SHARED = ("processes", "seed", "epochs", "batch_size", "sparsity", "gate")


def define_flags(flag_values):
    """Defines the flags of this script in `flag_values`."""
    number = functools.partial(flags.DEFINE_integer, flag_values=flag_values)
    text = functools.partial(flags.DEFINE_string, flag_values=flag_values)
    text("coordinator", None, "Address and free port of the machine with process 0: HOST:PORT.")
    number("processes", 1, "How many processes train together.", lower_bound=1)
    number("process_id", 0, "Which of them this is, from 0 on.", lower_bound=0)
    number("seed", 0, "Seed of the split, the weights and the data order.", lower_bound=0)
    number("epochs", 30, "Epochs.", lower_bound=1)
    number("batch_size", 64, "Images per step, those of all processes together.", lower_bound=1)
    flags.DEFINE_float(
        "sparsity", 0.5, "Share of the weights to remove.", 0.0, 1.0, flag_values=flag_values
    )
    flags.DEFINE_enum(
        "gate", "static", ("dynamic", "static"), "Kind of gate.", flag_values=flag_values
    )
    text("backup_dir", None, "Folder to resume from; each process has one of its own in it.")
    text("output_dir", "distributed_output", "Folder of the models, on the machine of process 0.")


def load(process, processes, seed):
    """((train images, labels), (test images, labels)): the part of one process.

    All parts are of the same size: all processes take as many steps.
    """
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).reshape(-1, *IMAGE_SHAPE).astype("float32")
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=TEST_SHARE, stratify=labels, random_state=seed
    )

    def part(array):
        return array[process::processes][: len(array) // processes]

    return (part(train_x), part(train_y)), (part(test_x), part(test_y))


def build():
    """The dense model; it ends in logits."""
    return models.build("resnet8", IMAGE_SHAPE, CLASSES)


def join(options):
    """Meets the other processes: what is made from here on is the same in all of them."""
    if options.processes == 1:
        return
    if options.coordinator is None:
        raise app.UsageError("--processes takes --coordinator=HOST:PORT, that of process 0.")
    where = options.coordinator, options.processes, options.process_id
    keras.distribution.initialize(*where)
    distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(distribution)
    require_agreement({name: options[name].value for name in SHARED}, "distributed.py")


def compile_classifier(model, steps=1):
    """Adam whose learning rate falls along a cosine over `steps`; cross-entropy on logits."""
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def train(options):
    """The gated model, trained by all processes together."""
    ours = options.process_id, options.processes
    images, test = load(*ours, options.seed)
    batch_size = options.batch_size // options.processes
    keras.utils.set_random_seed(options.seed)
    gated = keras_polar.apply(build(), options.sparsity, gate=options.gate)
    compile_classifier(gated, options.epochs * -(-len(images[0]) // batch_size))
    callbacks = []
    if options.backup_dir:
        folder = Path(options.backup_dir) / f"process{options.process_id}"
        callbacks.append(keras.callbacks.BackupAndRestore(folder))
    print(f"process {ours[0]} of {ours[1]}: {len(images[0])} images", flush=True)
    gated.fit(
        *images,
        batch_size=batch_size,
        epochs=options.epochs,
        validation_data=test,
        callbacks=callbacks,
        verbose=2 if options.process_id == 0 else 0,
    )
    return gated


def finish(gated, options):
    """What one process does alone: converts, verifies, saves and prints the table."""
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    gated.save(folder / "gated.keras")
    # Loaded without a distribution it belongs to this process, whose steps wait for no other one.
    keras.distribution.set_distribution(None)
    gated = keras.models.load_model(folder / "gated.keras")
    _, test = load(0, 1, options.seed)
    small = keras_polar.convert(gated, verify=test[0])
    compile_classifier(small)
    small.optimizer.build(small.trainable_variables)  # saved as a whole, it loads without a warning
    small.save(folder / "small.keras")
    print_result(*(measure(model, test) for model in (gated, small)), folder)


def measure(model, test):
    """Accuracy and cost of a model."""
    cost = keras_polar.cost(model)
    accuracy = model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]
    return {"accuracy": accuracy, "weights": int(cost.weights), "macs": int(cost.macs)}


def print_result(before, after, folder):
    """The table, gated beside small."""
    rows = reporting.comparison_rows(before, after)
    caption = f"Files: {folder / 'gated.keras'}, {folder / 'small.keras'}"
    reporting.print_table("Digits", ("", "gated", "small", "ratio"), rows, caption)


def main(argv):
    """Entry point of absl: `argv` is what is left beside the flags."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    join(flags.FLAGS)
    gated = train(flags.FLAGS)
    if flags.FLAGS.process_id == 0:
        finish(gated, flags.FLAGS)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
