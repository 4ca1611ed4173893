"""From a trained MobileNetV2-like network to a pruned int8 file that classifies images.

Trains on scikit-learn's digits (doubled to 16x16 pixels), prunes half of the weights in one
further training run, converts, quantizes to full-integer int8 with training images, compares with
Keras on the test images, times the files in turns, and lets `classify.py`, which needs neither
TensorFlow nor Keras, look at some test images.

    python examples/deploy/end_to_end.py
    python examples/deploy/end_to_end.py --smoke    # a few steps, to see that it works
"""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
import models

import keras_polar

SHOWN = 8  # images for classify.py

_SPARSITY = flags.DEFINE_float("sparsity", 0.5, "Share of the weights to remove.", 0.0, 1.0)
_MODEL = flags.DEFINE_enum("model", "mobilenet", tuple(models.BUILDERS), "Architecture.")
_EPOCHS = flags.DEFINE_integer("epochs", 20, "Epochs of each of the two trainings.", 1)
_SMOKE = flags.DEFINE_bool("smoke", False, "A few steps of a narrow network.")
_FOLDER = flags.DEFINE_string("output_dir", "deploy_output", "Folder of the files.")


def data(smoke):
    """((train images, labels), (test images, labels)) with pixels from 0 to 1."""
    sets = [(x.repeat(2, axis=1).repeat(2, axis=2), y) for x, y in demo.digits(seed=0)]
    return [(x[:256], y[:256]) for x, y in sets] if smoke else sets


def trained(model, train, test):
    """The model after a training run."""
    demo.compile_classifier(model, _EPOCHS.value * -(-len(train[0]) // demo.BATCH_SIZE))
    epochs = 1 if _SMOKE.value else _EPOCHS.value
    model.fit(*train, batch_size=demo.BATCH_SIZE, epochs=epochs, validation_data=test, verbose=2)
    return model


def exported(model, path, train, test):
    """The report of a full-integer file, compared on the test images."""
    return keras_polar.export_tflite(
        model, path, "int8", representative_data=train[0], evaluation_data=test
    )


def classify(model, test, folder):
    """Runs the script that a device would run."""
    images, labels = folder / "images.npy", folder / "labels.txt"
    np.save(images, np.round(255 * test[0][:SHOWN]).astype("uint8"))
    labels.write_text("\n".join(f"digit {i}" for i in range(10)), encoding="utf-8")
    script = Path(__file__).with_name("classify.py")
    command = [sys.executable, script, model, images, f"--labels={labels}"]
    print("$ python", *(str(part) for part in command[1:]), flush=True)
    subprocess.run(command, check=True)
    print("true labels:", *test[1][:SHOWN])


def main(argv):
    """Entry point of absl."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    folder = Path(_FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    train, test = data(_SMOKE.value)
    width = 4 if _SMOKE.value else 16
    dense = trained(models.build(_MODEL.value, train[0].shape[1:], 10, width=width), train, test)

    gated = keras_polar.apply(dense, _SPARSITY.value, gate="static")
    small = keras_polar.convert(trained(gated, train, test), verify=test[0])

    reports = [
        exported(model, folder / f"{name}-int8.tflite", train, test)
        for name, model in (("dense", dense), ("small", small))
    ]
    print(*reports, sep="\n")
    times = keras_polar.benchmark_tflite([report.path for report in reports])
    for path, latency in times.items():
        print(f"{path}: {latency}")
    classify(reports[-1].path, test, folder)


if __name__ == "__main__":
    app.run(main)
