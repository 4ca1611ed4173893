"""Quantisation-aware training: int8 files that were trained to be int8."""

import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras

from keras_polar.graph.keras_private import core_of
from keras_polar.litert.converter import not_exportable, output_names, quiet, signature_names
from keras_polar.litert.modes import INT8, QuantizationMode
from keras_polar.litert.tf_keras_twin import FLOAT_PATH, translated
from keras_polar.litert.validation import check_backend, check_finite, converted

TRAINED_FOR = INT8  # what tensorflow-model-optimization inserts by default


def quantize_aware(model: keras.Model) -> Any:
    """A model that computes as its int8 file will, for a short training that makes up for it.

    The model is translated to tf_keras (Keras 2), the only Keras that
    tensorflow-model-optimization takes, both are compared, and fake quantization is inserted:
    rounding in the forward pass, none in the gradient (Jacob et al., "Quantization and Training
    of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv 1712.05877). Your
    own Keras stays what it is: the environment and `tf.keras` are as before.

    What comes back is a tf_keras model: compile it with names ("adam") or with objects of
    `tf_keras`, not of `keras`. Regularizers are not taken along. Needs the extra `qat`:
    `pip install "keras_polar[qat]"`.

    Args:
        model: functional or Sequential, built and trained, plain or gated (which is converted
            first); of layers that tensorflow-model-optimization can quantize. It is not changed.

    Returns:
        A `tf_keras.Model`, not compiled. `export_tflite(qat, path, "int8")` writes the file.

    Raises:
        ImportError: the extra `qat` is not installed.
        TypeError: `model` is not functional or not built.
        ValueError: the model holds something that cannot be translated or that
            tensorflow-model-optimization refuses; names the layer.

    Example:
        >>> import tf_keras
        >>> small = keras_polar.convert(gated)
        >>> qat = keras_polar.quantize_aware(small)
        >>> loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> qat.compile(tf_keras.optimizers.Adam(1e-4), loss, metrics=["accuracy"])
        >>> qat.fit(x, y, epochs=2)
        >>> keras_polar.export_tflite(qat, "small.tflite", "int8", evaluation_data=(x_test, y_test))
    """
    check_backend()
    model = converted(model)
    check_finite(core_of(model))
    quantization = _tfmot().quantization.keras
    twin = translated(model)
    try:
        with quiet():
            return quantization.quantize_model(twin)
    except Exception as error:  # tfmot raises whatever it meets, of many types
        raise ValueError(
            f"quantize_aware: tensorflow-model-optimization cannot quantize {model.name!r}: "
            f"{str(error).split(' You can quantize this layer')[0]} {FLOAT_PATH}"
        ) from error


def _tfmot() -> Any:
    """tensorflow_model_optimization, imported without harm to the rest of the process."""
    import tensorflow as tf

    variable = "TF_USE_LEGACY_KERAS"
    before = os.environ.get(variable)
    _ = tf.keras.__name__  # decides which Keras `tf.keras` is, before tfmot sets the variable
    try:
        with quiet():
            importlib.import_module("tf_keras")
            return importlib.import_module("tensorflow_model_optimization")
    except ImportError as error:
        raise ImportError(
            "Expected tensorflow-model-optimization and tf_keras for quantisation-aware training; "
            f'{error.name or error} is missing: pip install "keras_polar[qat]"'
        ) from error
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


# --- the file --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LegacyCore:
    """What the comparison needs to know of a tf_keras model, as a Keras 3 model would say it."""

    model: Any = field(repr=False)
    name: str
    input: Any
    inputs: list
    output: Any
    outputs: list
    weights: list = field(repr=False)

    def __call__(self, inputs: Any, training: bool = False) -> Any:
        return self.model(inputs, training=training)


def is_legacy(model: Any) -> bool:
    """Whether a model is one of tf_keras."""
    return any(c.__module__.split(".")[0] == "tf_keras" for c in type(model).__mro__)


def legacy_core(model: Any, mode: QuantizationMode) -> LegacyCore:
    """A model that `quantize_aware` made, described."""
    if not any(type(layer).__name__.startswith("Quantize") for layer in model.layers):
        raise TypeError(
            f"Expected a keras.Model, or what `quantize_aware` returns; received {model.name!r}, a "
            "tf_keras model without quantization."
        )
    if mode != TRAINED_FOR:
        raise ValueError(
            f"Expected quantize={TRAINED_FOR.name!r} for {model.name!r}, which was trained for "
            f"{TRAINED_FOR.name}; received {mode.name!r}. Other files come from the model that was "
            "given to `quantize_aware`."
        )
    names = dict(zip((x.name for x in model.inputs), model.input_names, strict=True))
    inputs, outputs = (
        keras.tree.map_structure(lambda x: _described(x, names.get(x.name)), structure)
        for structure in (model.input, model.output)
    )
    flat = [keras.tree.flatten(x) for x in (inputs, outputs)]
    return LegacyCore(model, model.name, inputs, flat[0], outputs, flat[1], model.weights)


def _described(tensor: Any, name: str | None) -> keras.KerasTensor:
    return keras.KerasTensor(tuple(tensor.shape), tensor.dtype.name, name=name)


def write_quantized(core: LegacyCore, path: Path, io: str | None) -> None:
    """Writes the int8 file of a model that was trained with fake quantization."""
    import tensorflow as tf

    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            module = tf.Module()
            # Not the model itself: Keras would save every layer on its own, twice.
            module.kept = core.model.variables
            tf.saved_model.save(module, folder, signatures=_signature(core))
            converter = tf.lite.TFLiteConverter.from_saved_model(folder)
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            ends = tf.as_dtype(TRAINED_FOR.ends(io))
            converter.inference_input_type = converter.inference_output_type = ends
            path.write_bytes(converter.convert())
    except Exception as error:  # the converter raises whatever it meets, of many types
        raise ValueError(not_exportable(core, TRAINED_FOR, error)) from error


def _signature(core: LegacyCore) -> Callable:
    import tensorflow as tf

    names = signature_names(core)

    def serve(**inputs: Any) -> dict[str, Any]:
        arrays = [inputs[name] for name in names]
        outputs = core(keras.tree.pack_sequence_as(core.input, arrays))
        return dict(zip(output_names(core), keras.tree.flatten(outputs), strict=True))

    specs = {
        name: tf.TensorSpec(x.shape, x.dtype, name=name)
        for name, x in zip(names, core.inputs, strict=True)
    }
    return tf.function(serve).get_concrete_function(**specs)
