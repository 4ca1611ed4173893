"""From a functional Keras model to the bytes of a .tflite file."""

import contextlib
import itertools
import keyword
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from keras_polar.litert.calibration import check_runs, convert_apart, is_dangerous
from keras_polar.litert.float32_twin import has_loops, steps_of, twin
from keras_polar.litert.modes import QuantizationMode
from keras_polar.litert.samples import Samples, fixed_batch, input_names

MOST_STEPS = 512  # of a loop that is written out
_CALIBRATION_BATCH = 8


def write(
    core: Any, path: Path, mode: QuantizationMode, io: str | None, calibration: Samples | None
) -> tuple[str, ...]:
    """Writes the file.

    Returns:
        What is otherwise in the file than in the model, in words.

    Raises:
        ValueError: the converter cannot do it; says why.
    """
    loops, model, notes = has_loops(core), core, []
    is_unrolled = loops and mode.is_integer
    if is_unrolled:
        steps = _checked_steps(core, mode)
        notes.append(f"recurrent layers are written out, step by step ({steps} steps)")
    try:
        if is_unrolled:
            model = twin(core, unrolled=True)
        batch = _written(model, path, Options(mode, io, calibration), 1 if loops else None)
        if mode.is_integer:
            check_runs(path)
    except Exception as error:  # the converter raises whatever it meets, of many types
        raise ValueError(not_exportable(core, mode, error)) from error
    if batch is not None:
        notes.append(f"the batch size is fixed at {batch}, because of loops over steps")
    return tuple(notes)


@dataclass(frozen=True)
class Options:
    """How a file is to be written; see `export_tflite`."""

    mode: QuantizationMode
    io: str | None
    calibration: Samples | None


def _written(core: Any, path: Path, options: Options, batch: int | None) -> int | None:
    """Writes the file; returns the size of batches where it is fixed and the model's is not."""
    batch = None if fixed_batch(core) else batch
    try:
        _convert(core, path, options, batch)
    except Exception as error:
        if batch or fixed_batch(core) or "TensorList" not in str(error):
            raise
        # A loop of some other layer, whose tensors need a shape that is known.
        return _written(core, path, options, 1)
    return batch


def _convert(core: Any, path: Path, options: Options, batch: int | None) -> None:
    # Flat lists of inputs and a flat dict of outputs: nested structures cannot be exported.
    outputs = dict(zip(output_names(core), core.outputs, strict=True))
    flat = keras.Model(list(core.inputs), outputs, name=core.name)
    signature = [
        keras.InputSpec(shape=(batch or t.shape[0], *t.shape[1:]), dtype=t.dtype, name=name)
        for t, name in zip(core.inputs, signature_names(core), strict=True)
    ]
    mode, settings = options.mode, _settings(options.mode)
    with quiet():
        if mode.is_integer:
            ends, batches = mode.ends(options.io), _batches(core, options, batch)
            if is_dangerous(flat, signature, batches()):
                path.write_bytes(convert_apart(flat, signature, mode, ends, batches()))
                return
            settings |= _integer_settings(batches, ends)
        flat.export(path, format="litert", verbose=False, input_signature=[signature], **settings)


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


# --- settings of the converter ---------------------------------------------------------------


def _settings(mode: QuantizationMode) -> dict[str, Any]:
    """What a mode tells TensorFlow's converter: attributes of it, as Keras' exporter sets them."""
    import tensorflow as tf

    return {
        "optimizations": [tf.lite.Optimize.DEFAULT] if mode.is_quantized else [],
        "target_spec": {
            "supported_ops": [tf.lite.OpsSet[name] for name in mode.operations],
            "supported_types": [tf.as_dtype(name) for name in mode.float_types],
        },
    }


def _integer_settings(batches: Callable, ends: str) -> dict[str, Any]:
    import tensorflow as tf

    return {
        "representative_dataset": batches,
        "inference_input_type": tf.as_dtype(ends),
        "inference_output_type": tf.as_dtype(ends),
    }


def _batches(core: Any, options: Options, batch: int | None) -> Callable:
    if options.calibration is None:
        raise ValueError(f"{options.mode.name} needs samples to calibrate with.")
    names, samples = signature_names(core), options.calibration
    size = batch or fixed_batch(core) or _CALIBRATION_BATCH
    # By name: the converter orders the inputs of the file as it likes.
    return lambda: (dict(zip(names, x, strict=True)) for x in samples.batches(size))


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


def not_exportable(core: Any, mode: QuantizationMode, error: Exception) -> str:
    """What to tell the user when a model cannot be converted or run."""
    return (
        f"Expected a model that LiteRT can run; {core.name!r} cannot be exported: "
        f"{_reason(str(error).strip())}. {_remedy(core, mode, str(error))}"
    )


def _checked_steps(core: Any, mode: QuantizationMode) -> int:
    """How many steps are to be written out; raises if that cannot be done."""
    steps = steps_of(core)
    if steps > MOST_STEPS:
        raise ValueError(
            f"Expected at most {MOST_STEPS} steps for quantize={mode.name!r}, which writes "
            f"recurrent layers out step by step; those of {core.name!r} have {steps}. Files become "
            "large then and no faster: use quantize='dynamic', which keeps the loop and stores "
            "weights as int8."
        )
    if not steps and _open_sizes(core):
        raise ValueError(
            f"Expected a fixed number of steps for quantize={mode.name!r}, which writes recurrent "
            f"layers out step by step. {_fix(core)} Or use quantize='dynamic', which keeps the "
            "loop."
        )
    return steps


def _reason(text: str) -> str:
    ops = re.search(r"(?:Select|Custom) ops: *(.+)", text)
    if ops:
        return f"no builtin LiteRT operation for {ops.group(1)}"
    messages = re.findall(r"error: (?:loc\(.*\): )?(.+)", text)
    return (messages[0] if messages else text)[:300].rstrip(".")


def _remedy(core: Any, mode: QuantizationMode, text: str) -> str:
    if "TensorList" in text:
        return (
            "A recurrent layer is a loop over steps: fix the number of steps in `keras.Input` and "
            "build the layer with `unroll=True`."
        )
    if _open_sizes(core):
        return _fix(core)
    if mode.is_integer:
        fix = "Fix the batch size, `x = keras.Input(shape, batch_size=1); model = keras.Model(x, "
        fix = f"{fix}model(x))`, or try" if "XNNPACK" in text else "Try"
        return f"{fix} quantize='dynamic' or 'float16', which compute in float32."
    return (
        "Replace the layer that needs it; `model.export(path, format='litert')` of Keras may "
        "still write a file that needs TensorFlow's own kernels."
    )


def _open_sizes(core: Any) -> dict[str, tuple]:
    """The shapes of the inputs with sizes, besides the batch's, that are not fixed."""
    return {t.name: tuple(t.shape) for t in core.inputs if None in t.shape[1:]}


def _fix(core: Any) -> str:
    return (
        f"Its inputs have open sizes, {_open_sizes(core)}: fix them, `x = keras.Input(shape); "
        "model = keras.Model(x, model(x))`."
    )
