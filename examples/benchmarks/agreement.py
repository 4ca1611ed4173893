"""Whether .tflite files of trained, pruned networks decide as Keras does: agreement.md.

    python examples/benchmarks/agreement.py --only=MobileNet

The four networks of `latency.py` learn scikit-learn's scanned digits, enlarged to the size of
their images, and lose half of their multiply-accumulates in that one run. Every precision is
compared with Keras on test images that neither the training nor the calibration has seen. Rows are
kept in docs/benchmarks/agreement.jsonl; what is there is not made again.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags
from json_lines import add_row, read_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import latency

EPOCHS, BATCH_SIZE = 8, 32
CALIBRATION = 200  # training images
# Of BatchNorm. The networks' own, 0.99 and 0.999, are for longer runs than these 360 steps.
BN_MOMENTUM = 0.9
TEXT = """# Agreement

Written by `python examples/benchmarks/agreement.py`: networks that learned scikit-learn's digits,
enlarged to their images' size, for {epochs} epochs and lost half of their multiply-accumulates
(MACs) in that run (`apply(model, 0.5, measure="macs", gate="static")`); seed 0. Files of every
precision beside Keras, on {samples} test images; int8 is calibrated on {calibration} training
images. *Agreement*: share of images for which both choose the same class. *Difference*: the
largest one between outputs, relative to the largest output.

| network | MACs left | precision | accuracy, Keras | accuracy, file | agreement | difference |
|---|--:|---|--:|--:|--:|--:|
"""


def data(side):
    """Train and test images of shape (n, side, side, 3), float32 in [0, 255], with labels."""
    import demo

    def enlarged(images):
        columns = np.arange(side) * images.shape[1] // side
        return np.repeat(255 * images[:, columns][:, :, columns], 3, axis=-1)

    return [(enlarged(images), labels) for images, labels in demo.digits(0)]


def trained(name, train, test):
    """The dense network's MACs and the small network out of one `fit`."""
    import demo
    import keras

    import keras_polar

    dense = latency.build(name)
    for layer in dense.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = BN_MOMENTUM
    gated = keras_polar.apply(dense, latency.SPARSITY, measure="macs", gate="static")
    demo.compile_classifier(gated, EPOCHS * -(-len(train[0]) // BATCH_SIZE))
    gated.fit(*train, BATCH_SIZE, EPOCHS, validation_data=test, verbose=2)
    return keras_polar.cost(dense).macs, keras_polar.convert(gated, verify=train[0][:8])


def measure(name):
    """Share of MACs left; differences, agreement and accuracies of the file of each precision."""
    import keras_polar

    train, test = data(latency.build(name).input_shape[1])
    macs, small = trained(name, train, test)
    row = {"kept_macs": keras_polar.cost(small).macs / macs, "samples": len(test[0]), "files": {}}
    with tempfile.TemporaryDirectory() as folder:
        for precision, quantize in latency.PRECISIONS.items():
            report = keras_polar.export_tflite(
                small,
                f"{folder}/{precision}.tflite",
                quantize,
                representative_data=train[0][:CALIBRATION],
                evaluation_data=test,
            )
            row["files"][precision] = {
                "keras_accuracy": float(report.keras_accuracy),
                "accuracy": float(report.accuracy),
                "agreement": float(report.agreement),
                "difference": float(report.relative_difference),
            }
    return row


def page(rows):
    """The whole document."""
    samples = next(iter(rows.values()))["samples"]
    text = TEXT.format(epochs=EPOCHS, samples=samples, calibration=CALIBRATION)
    return text + "".join(line(row, p) for row in rows.values() for p in latency.PRECISIONS)


def line(row, precision):
    file = row["files"][precision]
    shares = " | ".join(f"{file[k]:.1%}" for k in ("keras_accuracy", "accuracy", "agreement"))
    kept = f"{row['kept_macs']:.1%}"
    return f"| {row['name']} | {kept} | {precision} | {shares} | {file['difference']:.0e} |\n"


def main(argv):
    """Entry point of absl."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    path = latency.DOCS / "agreement.jsonl"
    for name in latency.NAMES:
        if re.search(flags.FLAGS.only, name) and name not in read_rows(path):
            add_row(path, {"name": name} | measure(name))
            rows = read_rows(path)
            ordered = {n: rows[n] for n in latency.NAMES if n in rows}
            path.with_suffix(".md").write_text(page(ordered), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    app.run(main)
