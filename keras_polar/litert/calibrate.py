"""A script: an integer .tflite file out of a SavedModel and samples.

    python calibrate.py FOLDER ENDS OPERATIONS...

FOLDER holds the SavedModel and `samples.npz`, an array for each batch and input: "3.image" is input
"image" of batch 3. ENDS is what the file takes and gives: int8 or float32, say. OPERATIONS are
what it may hold, as names in `tf.lite.OpsSet`. TensorFlow's calibrator ends its process on some
models: here it is this one. FOLDER gets `model.tflite`, or `error.txt` with what the converter
says.
"""

import os
import sys
from collections.abc import Iterator, Sequence

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the calibrator does not compute on it

import numpy as np
import tensorflow as tf


def batches(folder: str) -> Iterator[dict]:
    """The samples, batch by batch, from input name to array."""
    with np.load(os.path.join(folder, "samples.npz")) as arrays:
        samples: dict[int, dict] = {}
        for key in arrays.files:
            number, _, name = key.partition(".")
            samples.setdefault(int(number), {})[name] = arrays[key]
        yield from samples.values()


def converted(folder: str, ends: str, operations: Sequence[str]) -> bytes:
    """The content of the file."""
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.experimental_enable_resource_variables = True
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_ops = [tf.lite.OpsSet[name] for name in operations]
    converter.representative_dataset = lambda: batches(folder)
    converter.inference_input_type = converter.inference_output_type = tf.as_dtype(ends)
    return converter.convert()


def main(folder: str, ends: str, *operations: str) -> None:
    """Writes the file, or what went wrong."""
    try:
        content, name = converted(folder, ends, operations), "model.tflite"
    except Exception as error:
        content, name = str(error).encode(), "error.txt"
    with open(os.path.join(folder, name), "wb") as out:
        out.write(content)


if __name__ == "__main__":
    main(*sys.argv[1:])
