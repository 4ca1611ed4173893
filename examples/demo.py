"""The main job in a minute: a small ResNet on scikit-learn's digits, dense beside pruned.

Trains twice for as many epochs, once as it is and once with gates; converts the gated model to
an ordinary smaller one, checks that both are the same function, exports both to LiteRT, and
prints one table. The pictures show the gates at work and the widths that they left.
"""

import functools
from pathlib import Path

import keras
import models
import reporting
from absl import app, flags
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_polar

BATCH_SIZE = 64
LEARNING_RATE = 2e-3
TEST_SHARE = 0.25
LATENCY_RUNS = 500


def define_flags(flag_values):
    """Defines the flags of this script in `flag_values`."""
    real = functools.partial(flags.DEFINE_float, flag_values=flag_values)
    number = functools.partial(flags.DEFINE_integer, flag_values=flag_values)
    real("sparsity", 0.5, "Share of the weights to remove.", lower_bound=0.0, upper_bound=1.0)
    number("epochs", 40, "Epochs of each of the two trainings.", lower_bound=1)
    number("seed", 0, "Seed of the split, the weights and the data order.", lower_bound=0)
    flags.DEFINE_enum(
        "gate", "dynamic", ("dynamic", "static"), "Kind of gate.", flag_values=flag_values
    )
    flags.DEFINE_string(
        "output_dir", "demo_output", "Folder of the models and pictures.", flag_values=flag_values
    )


def digits(seed):
    """((train images, labels), (test images, labels)): 1,797 scanned digits of 8x8 pixels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).reshape(-1, 8, 8, 1).astype("float32")
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=TEST_SHARE, stratify=labels, random_state=seed
    )
    return (train_x, train_y), (test_x, test_y)


def compile_classifier(model, steps=1):
    """Adam whose learning rate falls along a cosine over `steps`; cross-entropy on logits."""
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def fit(model, train, test, options, callbacks=()):
    """The same training for the dense and the gated model."""
    keras.utils.set_random_seed(options.seed)  # The same order of the data for both.
    compile_classifier(model, options.epochs * -(-len(train[0]) // BATCH_SIZE))
    model.fit(
        *train,
        batch_size=BATCH_SIZE,
        epochs=options.epochs,
        validation_data=test,
        callbacks=list(callbacks),
        verbose=2,
    )


def measure(model, test, path):
    """Accuracy, cost and .tflite size of a trained model; writes the file to `path`."""
    cost = keras_polar.cost(model)
    return {
        "accuracy": model.evaluate(*test, verbose=0, return_dict=True)["accuracy"],
        "weights": int(cost.weights),
        "macs": int(cost.macs),
        "tflite_bytes": int(keras_polar.export_tflite(model, str(path)).bytes),
    }


def draw(dense, small, history, folder):
    """Writes the pictures and returns their paths."""
    figures = {
        folder / "open_rates.png": keras_polar.plots.open_rates(history),
        folder / "polarization.png": keras_polar.plots.polarization(history),
        folder / "widths.png": keras_polar.plots.widths(dense, small),
    }
    for path, figure in figures.items():
        figure.savefig(path, dpi=130)
    return list(figures)


def run(options):
    """Trains both models, prints the table and says where the files are."""
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = digits(options.seed)

    keras.utils.set_random_seed(options.seed)
    dense = models.build("resnet8", train[0].shape[1:], 10)
    gated = keras_polar.apply(dense, options.sparsity, gate=options.gate)
    print(f"1/2 dense: {options.epochs} epochs", flush=True)
    fit(dense, train, test, options)
    print(f"2/2 with gates: {options.epochs} epochs", flush=True)
    rates = keras_polar.callbacks.OpenRates()
    fit(gated, train, test, options, [rates])

    small = keras_polar.convert(gated, verify=test[0])
    compile_classifier(small)
    small.optimizer.build(small.trainable_variables)  # saved as a whole, it loads without a warning
    files = [folder / "dense.tflite", folder / "small.tflite"]
    results = [measure(m, test, path) for m, path in zip((dense, small), files, strict=True)]
    latencies = keras_polar.benchmark_tflite(files, runs=LATENCY_RUNS)
    for result, path in zip(results, files, strict=True):
        result["latency_ms"] = latencies[str(path)].median

    small.save(folder / "small.keras")
    files += [folder / "small.keras", *draw(dense, small, rates.history, folder)]
    print_result(results, reporting.certificate(gated, small, test[0]), files)


def print_result(results, certificate, files):
    """The table, dense beside small, and the list of files."""
    difference, largest = certificate
    caption = (
        f"Certificate: gated and small model differ by at most {difference:.1e} on the test "
        f"images (largest output {largest:.1f})."
    )
    rows = reporting.comparison_rows(*results)
    reporting.print_table("Digits, one run each", ("", "dense", "small", "ratio"), rows, caption)
    print("Files:", *files, sep="\n  ")


def main(argv):
    """Entry point of absl: `argv` is what is left beside the flags."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    run(flags.FLAGS)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
