"""The main job in a minute: a small ResNet on scikit-learn's digits, dense beside pruned.

Trains twice for as many epochs, once as it is and once with gates; converts the gated model to
an ordinary smaller one, checks that both are the same function, exports both to LiteRT, and
prints one table and where the pictures are: the gates at work and the widths that they left.
"""

import functools
from pathlib import Path

import keras
import models
import reporting
from absl import app, flags
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
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


def phases():
    """Progress bars, one line for each phase of the demo."""
    text = TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn()
    return Progress(*text, TimeElapsedColumn(), TextColumn("{task.fields[note]}"))


class EpochBar(keras.callbacks.Callback):
    """A line that grows with the epochs and shows the validation accuracy."""

    async_safe = True  # looks at nothing but `logs`

    def __init__(self, bars, name, epochs):
        super().__init__()
        self.bars, self.line = bars, bars.add_task(name, total=epochs, note="")

    def on_epoch_end(self, epoch, logs=None):
        note = f"accuracy {logs['val_accuracy']:.1%}"
        self.bars.update(self.line, advance=1, note=note)


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
        verbose=0,
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


def draw(dense, gated, small, history, folder):
    """Writes the pictures and returns their paths."""
    figures = {
        folder / "open_rates.png": keras_polar.plots.open_rates(history),
        folder / "polarization.png": keras_polar.plots.polarization(history),
        folder / "shares.png": keras_polar.plots.shares(gated),
        folder / "widths.png": keras_polar.plots.widths(dense, small),
    }
    for path, figure in figures.items():
        figure.savefig(path, dpi=130)
    return list(figures)


def run(options):
    """Trains both models, prints the table and says where the files are."""
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    data = digits(options.seed)
    with phases() as bars:
        dense, gated, rates = trained(data, options, bars)
        small, results = compared(dense, gated, data[1], folder, bars)
    pictures = draw(dense, gated, small, rates.history, folder)
    files = [folder / name for name in ("dense.tflite", "small.tflite", "small.keras")]
    certificate = reporting.certificate(gated, small, data[1][0])
    print_result(results, certificate, files, pictures)


def trained(data, options, bars):
    """The dense and the gated model, each after its training, and what the gates did in it."""
    (train, test), epochs = data, options.epochs
    keras.utils.set_random_seed(options.seed)
    dense = models.build("resnet8", train[0].shape[1:], 10)
    gated = keras_polar.apply(dense, options.sparsity, gate=options.gate)
    fit(dense, train, test, options, [EpochBar(bars, "1/3 train dense", epochs)])
    rates = keras_polar.callbacks.OpenRates()
    fit(gated, train, test, options, [rates, EpochBar(bars, "2/3 train with gates", epochs)])
    return dense, gated, rates


def compared(dense, gated, test, folder, bars):
    """The small model, saved, and what dense and small one measure, their files included."""
    line = bars.add_task("3/3 convert, export", total=3, note="")
    small = keras_polar.convert(gated, verify=test[0])
    compile_classifier(small)
    small.optimizer.build(small.trainable_variables)  # saved as a whole, it loads without a warning
    small.save(folder / "small.keras")
    files, results = [folder / "dense.tflite", folder / "small.tflite"], []
    for model, path in zip((dense, small), files, strict=True):
        results.append(measure(model, test, path))
        bars.advance(line)
    latencies = keras_polar.benchmark_tflite(files, runs=LATENCY_RUNS)
    bars.advance(line)
    times = [{"latency_ms": latencies[str(path)].median} for path in files]
    return small, [{**r, **t} for r, t in zip(results, times, strict=True)]


def print_result(results, certificate, files, pictures):
    """The table, dense beside small, and where the files and pictures are."""
    difference, largest = certificate
    caption = (
        f"Certificate: gated and small model differ by at most {difference:.1e} on the test "
        f"images (largest output {largest:.1f})."
    )
    rows = reporting.comparison_rows(*results)
    reporting.print_table("Digits, one run each", ("", "dense", "small", "ratio"), rows, caption)
    print("Models:", *files, sep="\n  ")
    print("Pictures:", *pictures, sep="\n  ")


def main(argv):
    """Entry point of absl: `argv` is what is left beside the flags."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    run(flags.FLAGS)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
