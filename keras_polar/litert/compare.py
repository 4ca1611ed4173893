"""How far a .tflite file is from a Keras model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_polar.backends import full_precision
from keras_polar.litert.converter import output_names, signature_names
from keras_polar.litert.report import Comparison, TensorInfo
from keras_polar.litert.runtime import interpreter, run_batches, signature_runner, tensor_infos
from keras_polar.litert.samples import Samples, fixed_batch

_BATCH = 64


def compare(core: Any, path: Path, samples: Samples) -> Comparison:
    """Runs both on the samples.

    Raises:
        RuntimeError: LiteRT cannot run the file.
        ValueError: the labels do not fit the outputs.
    """
    runner = signature_runner(interpreter(path, 1), path)
    named = dict(zip(signature_names(core), samples.arrays, strict=True))
    outputs = run_batches(runner, named, _BATCH)
    got = [outputs[name] for name in output_names(core)]
    return compared(keras_outputs(core, samples), got, samples)


def compared(
    expected: Sequence[np.ndarray], got: Sequence[np.ndarray], samples: Samples
) -> Comparison:
    """Measures how far outputs are from the expected ones, output by output."""
    pairs = [_difference(e, g) for e, g in zip(expected, got, strict=True)]
    largest, mean, relative = (float(x) for x in np.max(pairs, axis=0))
    shares = _shares(expected, got, samples.labels)
    return Comparison(len(samples), samples.random, largest, mean, relative, *shares)


def signature(core: Any, path: Path) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """The inputs and outputs of a file, in the order of the model's."""
    runner = signature_runner(interpreter(path, 1), path)
    inputs = tensor_infos(runner.get_input_details(), signature_names(core))
    return inputs, tensor_infos(runner.get_output_details(), output_names(core))


@full_precision()
def keras_outputs(core: Any, samples: Samples) -> list[np.ndarray]:
    """The model's outputs in inference mode, in the order of `core.outputs`.

    States that layers keep from batch to batch are as before.
    """
    size = fixed_batch(core) or _BATCH
    with keras.StatelessScope():
        parts = [_call(core, batch) for batch in samples.batches(size)]
    return [np.concatenate(x) for x in zip(*parts, strict=True)]


def difference_of(original: Any, core: Any, samples: Samples) -> float:
    """How far a model is from its copy in another precision, as `relative_difference`."""
    expected, got = (keras_outputs(x, samples) for x in (core, original))
    return compared(expected, got, samples).relative_difference


def _call(core: Any, arrays: list[np.ndarray]) -> list[np.ndarray]:
    outputs = core(keras.tree.pack_sequence_as(core.input, arrays), training=False)
    return [keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(outputs)]


def _difference(expected: np.ndarray, got: np.ndarray) -> tuple[float, float, float]:
    """Largest and mean absolute difference; the largest as a part of the largest |expected|."""
    expected, got = expected.astype(np.float64), got.astype(np.float64)
    other = (expected != got) & ~(np.isnan(expected) & np.isnan(got))
    if not other.any():
        return 0.0, 0.0, 0.0
    differences = np.abs(expected[other] - got[other])
    largest, scale = differences.max(), np.abs(expected).max()
    mean = differences.sum() / expected.size
    return largest, mean, largest / scale if scale > 0 else np.inf


def _shares(
    expected: Sequence[np.ndarray], got: Sequence[np.ndarray], labels: np.ndarray | None
) -> tuple[float | None, float | None, float | None]:
    """Agreement, accuracy, and accuracy of what was expected."""
    if len(expected) != 1 or expected[0].ndim != 2 or expected[0].shape[1] < 2:
        return None, None, None
    by_keras, by_file = expected[0].argmax(1), got[0].argmax(1)
    agreement = float((by_keras == by_file).mean())
    if labels is None:
        return agreement, None, None
    classes = _class_ids(labels, expected[0].shape[1])
    return agreement, float((by_file == classes).mean()), float((by_keras == classes).mean())


def _class_ids(labels: np.ndarray, classes: int) -> np.ndarray:
    if labels.shape[1:] == (classes,):
        return labels.argmax(1)
    if labels.shape[1:] in ((), (1,)):
        return labels.reshape(-1)
    raise ValueError(
        f"Expected labels of shape (samples,) or (samples, {classes}); received {labels.shape}."
    )
