"""Quantisation-aware training of a pruned network, beside quantization after training.

Trains and prunes a small ResNet on scikit-learn's digits in one run, converts it, writes an int8
file as it is, trains it a little longer with fake quantization, and writes that as int8 as well.
Needs the extra `qat`: pip install "keras_polar[examples,qat]".

    python examples/deploy/qat.py
    python examples/deploy/qat.py --smoke    # a few steps, to see that it works
"""

import json
import sys
from pathlib import Path

import keras
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
import models

import keras_polar

_SPARSITY = flags.DEFINE_float("sparsity", 0.7, "Share of the weights to remove.", 0.0, 1.0)
_MODEL = flags.DEFINE_enum("model", "resnet8", tuple(models.BUILDERS), "Architecture.")
_WIDTH = flags.DEFINE_integer("width", 8, "Channels of the first convolution.", 1)
_EPOCHS = flags.DEFINE_integer("epochs", 30, "Epochs of the training.", 1)
_QAT_EPOCHS = flags.DEFINE_integer("qat_epochs", 10, "Epochs with fake quantization.", 1)
_SMOKE = flags.DEFINE_bool("smoke", False, "A few steps only.")
_FOLDER = flags.DEFINE_string("output_dir", "deploy_output", "Folder of the files.")


def pruned(train, test):
    """A trained network without most of its weights."""
    keras.utils.set_random_seed(0)
    dense = models.build(_MODEL.value, train[0].shape[1:], 10, width=_WIDTH.value)
    gated = keras_polar.apply(dense, _SPARSITY.value, gate="static")
    epochs = 3 if _SMOKE.value else _EPOCHS.value
    demo.compile_classifier(gated, epochs * -(-len(train[0]) // demo.BATCH_SIZE))
    gated.fit(*train, batch_size=demo.BATCH_SIZE, epochs=epochs, validation_data=test, verbose=2)
    return keras_polar.convert(gated, verify=test[0])


def trained_quantized(small, train, test):
    """The network after some epochs with fake quantization: a tf_keras model."""
    qat = keras_polar.quantize_aware(small)
    import tf_keras  # after quantize_aware, which says what to install where it is missing

    epochs = 1 if _SMOKE.value else _QAT_EPOCHS.value
    steps = epochs * -(-len(train[0]) // demo.BATCH_SIZE)
    rate = tf_keras.optimizers.schedules.CosineDecay(demo.LEARNING_RATE / 4, steps)
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    qat.compile(tf_keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    qat.fit(*train, batch_size=demo.BATCH_SIZE, epochs=epochs, validation_data=test, verbose=2)
    return qat


def main(argv):
    """Entry point of absl."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    folder = Path(_FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = demo.digits(seed=0)
    small = pruned(train, test)
    after = keras_polar.export_tflite(
        small, folder / "after.tflite", "int8", representative_data=train, evaluation_data=test
    )
    qat = trained_quantized(small, train, test)
    aware = keras_polar.export_tflite(qat, folder / "aware.tflite", "int8", evaluation_data=test)
    print("Quantized after training:", after, "Trained for it:", aware, sep="\n")
    result = {
        "float": after.keras_accuracy,
        "after_training": after.accuracy,
        "aware": aware.accuracy,
        "agreement": {"after_training": after.agreement, "aware": aware.agreement},
    }
    text = json.dumps(result, indent=2)
    (folder / "qat.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    app.run(main)
