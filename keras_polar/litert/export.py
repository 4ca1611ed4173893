"""`export_tflite`: convert, write, try out, compare, move into place."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras

from keras_polar.litert.compare import compare, difference_of, signature
from keras_polar.litert.converter import not_exportable, write
from keras_polar.litert.float32_twin import is_float32, twin
from keras_polar.litert.modes import QuantizationMode
from keras_polar.litert.operations import float_operations
from keras_polar.litert.qat import is_legacy, legacy_core, write_quantized
from keras_polar.litert.report import ExportReport
from keras_polar.litert.samples import Samples, random_samples, read_samples
from keras_polar.litert.validation import (
    check_finite,
    checked_mode,
    checked_path,
    draft_of,
    exportable_core,
    put_in_place,
)
from keras_polar.surgery.certificate import UNKNOWN_SIZE

_REPRESENTATIVE = 500  # samples; ranges of activations hardly change with more


def export_tflite(
    model: keras.Model,
    path: str | os.PathLike,
    quantize: str | QuantizationMode | None = None,
    *,
    representative_data: Any = None,
    evaluation_data: Any = None,
    io: str | None = None,
) -> ExportReport:
    """Writes a model as a LiteRT file, runs the file, and compares it with Keras.

    A gated model is converted first: the file always holds the small, static network. Only
    builtin LiteRT operations are used, so that the file runs on every LiteRT runtime. The file
    appears at `path` complete or not at all, even if the process is killed.

    The batch size stays open unless the model fixes it. Recurrent layers are loops over steps,
    which LiteRT runs for batches of a fixed size only: of a model with such layers (without
    `unroll=True`) the file takes one sample at a time. "int8" has no loops: their steps, 512 at
    most, are written out one by one. `ExportReport.notes` says so.

    A model in mixed or another precision is written as its float32 copy, with which the file is
    compared; `ExportReport.precision_difference` says how far the model is from that.

    In the file, inputs carry the names of the model's `keras.Input`s and outputs are called
    `output_0`, `output_1`, ...; where the model takes or returns a flat dict, its keys are the
    names. The model is not changed.

    Args:
        model: functional or Sequential, built; plain or gated; or what `quantize_aware` returned.
        path: where to write; ends in `.tflite`, its folder exists. A file there is replaced.
        quantize: None computes as the model does; "float16" stores weights in half the bytes and
            computes in float32; "dynamic" stores weights as int8 and decides the ranges of
            activations while it runs; "int8" is full integer: weights, activations, inputs and
            outputs (token ids and the like stay as they are). What has no integer kernel (ELU,
            cosine, floor, ...) stays float32 within such a file:
            `ExportReport.float_operations` names it. Or a `keras_polar.litert.QuantizationMode`
            of your own.
        representative_data: real samples; "int8" takes the ranges of activations from them
            (but for `quantize_aware` models, which have learnt their ranges). As
            `model.fit` takes data: an array of shape `(samples, ...)`; a list, tuple or dict of
            such arrays where the model has several inputs; a tuple `(inputs, labels)`; or batches
            of any of these from a `tf.data.Dataset`, a `PyDataset`, a generator or another
            iterable. The first 500 samples are used (whole batches, if the model fixes the batch
            size). None draws 8 random ones, uniform between 0 and 1 (integers: 0 or 1), for the
            comparison only.
        evaluation_data: samples for the comparison, in the same forms; all of them are used.
            None: the representative ones.
        io: "float32" keeps the inputs and outputs of an "int8" file float; None does not.

    Returns:
        The size of the file, its inputs and outputs with their scales, and how far it is from
        Keras: differences, agreement of classifiers, accuracy where the data have labels.

    Raises:
        TypeError: `model` is not functional or not built, `path` is no path, or the data have
            another dtype.
        ValueError: the model has weights that are not finite, an option is unknown, "int8" has no
            data, `path` does not end in `.tflite`, the data do not fit the inputs, Keras does not
            run on TensorFlow, or the model holds something LiteRT cannot do: strings and lookup
            tables, layers that Keras has quantized, ...
        OSError: the folder of `path` does not exist or cannot be written to.

    Example:
        >>> report = keras_polar.export_tflite(
        ...     small, "small.tflite", "int8", representative_data=images[:500],
        ...     evaluation_data=(test_images, test_labels))
        >>> report.bytes, report.accuracy, report.keras_accuracy
    """
    path = checked_path(path)
    mode = checked_mode(quantize, io)
    is_trained_for_it = is_legacy(model)
    core = legacy_core(model, mode) if is_trained_for_it else exportable_core(model)
    check_finite(core)
    original, core = core, core if is_trained_for_it or is_float32(core) else twin(core)
    if mode.is_integer and representative_data is None and not is_trained_for_it:
        raise ValueError(_no_data(mode))
    calibration, compared_on = _samples(core, representative_data, evaluation_data)
    with draft_of(path) as draft:
        notes: tuple[str, ...] = ()
        if is_trained_for_it:
            write_quantized(core, draft, io)
        else:
            notes = write(core, draft, mode, io, calibration)
        report = _finished(core, draft, path, mode, compared_on)
    off = None if original is core else difference_of(original, core, compared_on)
    return replace(report, notes=notes, precision_difference=off)


def _no_data(mode: QuantizationMode) -> str:
    return (
        f"Expected `representative_data` for quantize={mode.name!r}: the ranges of activations "
        "come from real samples. Pass some hundred inputs of the training data, or use "
        "quantize='dynamic', which needs none."
    )


def _finished(
    core: Any, draft: Path, path: Path, mode: QuantizationMode, samples: Samples
) -> ExportReport:
    """Tries a file out and moves it to its place."""
    try:
        comparison = compare(core, draft, samples)
    except RuntimeError as error:  # the runtime checks some limits only when it runs
        raise ValueError(
            f"{not_exportable(core, mode, error)}{_tried_on(core, samples)}"
        ) from error
    inputs, outputs = signature(core, draft)
    put_in_place(draft, path)
    return ExportReport(
        **vars(comparison),
        path=path,
        bytes=path.stat().st_size,
        quantize=mode.name,
        inputs=inputs,
        outputs=outputs,
        float_operations=float_operations(path) if mode.is_integer else (),
    )


def _tried_on(core: Any, samples: Samples) -> str:
    """That a file was tried on samples of sizes that may not be the user's."""
    if not samples.random or all(None not in x.shape[1:] for x in core.inputs):
        return ""
    return (
        f" It was tried on random samples of shapes {[x.shape[1:] for x in samples.arrays]}; sizes "
        f"that the model leaves open are {UNKNOWN_SIZE} there. Pass evaluation_data=x for others."
    )


def _samples(core: Any, representative: Any, evaluation: Any) -> tuple[Samples | None, Samples]:
    """Samples to calibrate with, and samples to compare on."""
    calibration = None
    if representative is not None:
        calibration = read_samples(core, representative, "representative_data", _REPRESENTATIVE)
    if evaluation is not None:
        return calibration, read_samples(core, evaluation, "evaluation_data")
    return calibration, calibration or random_samples(core)
