"""From a functional Keras model to the bytes of a .tflite file."""

import contextlib
import itertools
import keyword
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import keras

from keras_polar.litert.data import Samples, fixed_batch, input_names

QUANTIZE = (None, "float16", "dynamic", "int8")
IO = (None, "float32")
_CALIBRATION_BATCH = 8


def write(
    core: Any, path: Path, quantize: str | None, io: str | None, calibration: Samples | None
) -> None:
    """Writes the file.

    Raises:
        ValueError: the converter cannot do it; says why.
    """
    # Flat lists of inputs and a flat dict of outputs: nested structures cannot be exported.
    outputs = dict(zip(output_names(core), core.outputs, strict=True))
    flat = keras.Model(list(core.inputs), outputs, name=core.name)
    signature = [
        keras.InputSpec(shape=tensor.shape, dtype=tensor.dtype, name=name)
        for tensor, name in zip(core.inputs, signature_names(core), strict=True)
    ]
    options = _OPTIONS[quantize]()
    if quantize == "int8":
        options |= _integer_options(core, io, calibration)
    try:
        with quiet():
            flat.export(
                path, format="litert", verbose=False, input_signature=[signature], **options
            )
    except Exception as error:  # the converter raises whatever it meets, of many types
        raise ValueError(not_exportable(core, quantize, error)) from error


def signature_names(core: Any) -> list[str]:
    """The names of the model's inputs in the file."""
    return _identifiers(input_names(core))


def output_names(core: Any) -> list[str]:
    """The names of the model's outputs in the file."""
    if isinstance(core.output, dict) and len(core.output) == len(core.outputs):
        return sorted(core.output)
    return [f"output_{i}" for i in range(len(core.outputs))]


def _identifiers(names: Iterable[str]) -> list[str]:
    """The names as distinct Python identifiers: a TensorFlow signature accepts nothing else."""
    result: list[str] = []
    for name in names:
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        if not plain.isidentifier() or keyword.iskeyword(plain):
            plain = f"input_{plain}"
        twins = (f"{plain}_{i}" for i in itertools.count(2))
        result.append(next(n for n in itertools.chain([plain], twins) if n not in result))
    return result


# --- options of the converter ----------------------------------------------------------------


def _float32_options() -> dict[str, Any]:
    import tensorflow as tf

    # Builtin operations only: every LiteRT runtime has them.
    return {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}


def _dynamic_options() -> dict[str, Any]:
    import tensorflow as tf

    return {**_float32_options(), "optimizations": [tf.lite.Optimize.DEFAULT]}


def _float16_options() -> dict[str, Any]:
    import tensorflow as tf

    options = _dynamic_options()
    options["target_spec"]["supported_types"] = [tf.float16]
    return options


def _int8_options() -> dict[str, Any]:
    import tensorflow as tf

    options = _dynamic_options()
    # Nothing else: an operation without an integer kernel is an error, not a float one in disguise.
    options["target_spec"]["supported_ops"] = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return options


_OPTIONS = {
    None: _float32_options,
    "float16": _float16_options,
    "dynamic": _dynamic_options,
    "int8": _int8_options,
}


def _integer_options(core: Any, io: str | None, calibration: Samples | None) -> dict[str, Any]:
    import tensorflow as tf

    if calibration is None:
        raise ValueError("int8 needs samples to calibrate with.")
    names, size = signature_names(core), fixed_batch(core) or _CALIBRATION_BATCH

    def batches() -> Iterator[dict]:
        # By name: the converter orders the inputs of the file as it likes.
        return (dict(zip(names, x, strict=True)) for x in calibration.batches(size))

    ends = tf.float32 if io == "float32" else tf.int8
    return {
        "representative_dataset": batches,
        "inference_input_type": ends,
        "inference_output_type": ends,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what TensorFlow has to say below an error from the user's terminal."""
    from absl import logging as absl_logging

    tensorflow = logging.getLogger("tensorflow")
    before = tensorflow.level, absl_logging.get_verbosity()
    tensorflow.setLevel(logging.WARNING)
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its calibrator warns of its own interpreter
            yield
    finally:
        tensorflow.setLevel(before[0])
        absl_logging.set_verbosity(before[1])


# --- errors ----------------------------------------------------------------------------------


def not_exportable(core: Any, quantize: str | None, error: Exception) -> str:
    """What to tell the user when a model cannot be converted or run."""
    return (
        f"Expected a model that LiteRT can run; {core.name!r} cannot be exported: "
        f"{_reason(str(error).strip())}. {_remedy(core, quantize, str(error))}"
    )


def _reason(text: str) -> str:
    ops = re.search(r"(?:Select|Custom) ops: *(.+)", text)
    if ops:
        return f"no builtin LiteRT operation for {ops.group(1)}"
    messages = re.findall(r"error: (?:loc\(.*\): )?(.+)", text)
    return (messages[0] if messages else text)[:300].rstrip(".")


def _remedy(core: Any, quantize: str | None, text: str) -> str:
    open_sizes = {
        t.name: tuple(t.shape) for t in core.inputs if any(size is None for size in t.shape[1:])
    }
    if "TensorList" in text:
        return (
            "A recurrent layer is a loop over steps: fix the number of steps in `keras.Input` and "
            "build the layer with `unroll=True`."
        )
    if open_sizes:
        return (
            f"Its inputs have open sizes, {open_sizes}: fix them, `x = keras.Input(shape); "
            "model = keras.Model(x, model(x))`."
        )
    if quantize == "int8":
        return "Try quantize='dynamic' or 'float16', which compute in float32."
    return (
        "Replace the layer that needs it; `model.export(path, format='litert')` of Keras may "
        "still write a file that needs TensorFlow's own kernels."
    )
