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
from keras_polar.litert.samples import Samples, fixed_batch, input_names

QUANTIZE = (None, "float16", "dynamic", "int8")
IO = (None, "float32")
MOST_STEPS = 512  # of a loop that is written out
_CALIBRATION_BATCH = 8


def write(
    core: Any, path: Path, quantize: str | None, io: str | None, calibration: Samples | None
) -> tuple[str, ...]:
    """Writes the file.

    Returns:
        What is otherwise in the file than in the model, in words.

    Raises:
        ValueError: the converter cannot do it; says why.
    """
    loops, model, notes = has_loops(core), core, []
    is_unrolled = loops and quantize == "int8"
    if is_unrolled:
        steps = _checked_steps(core)
        notes.append(f"recurrent layers are written out, step by step ({steps} steps)")
    try:
        if is_unrolled:
            model = twin(core, unrolled=True)
        batch = _written(model, path, Options(quantize, io, calibration), 1 if loops else None)
        if quantize == "int8":
            check_runs(path)
    except Exception as error:  # the converter raises whatever it meets, of many types
        raise ValueError(not_exportable(core, quantize, error)) from error
    if batch is not None:
        notes.append(f"the batch size is fixed at {batch}, because of loops over steps")
    return tuple(notes)


@dataclass(frozen=True)
class Options:
    """How a file is to be written; see `export_tflite`."""

    quantize: str | None
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
    given = _OPTIONS[options.quantize]()
    with quiet():
        if options.quantize == "int8":
            ends = options.io or "int8"
            batches = _batches(core, options.calibration, batch)
            if is_dangerous(flat, signature, batches()):
                path.write_bytes(convert_apart(flat, signature, ends, batches()))
                return
            given |= _integer_options(batches, ends)
        flat.export(path, format="litert", verbose=False, input_signature=[signature], **given)


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


def _integer_options(batches: Callable, ends: str) -> dict[str, Any]:
    import tensorflow as tf

    return {
        "representative_dataset": batches,
        "inference_input_type": getattr(tf, ends),
        "inference_output_type": getattr(tf, ends),
    }


def _batches(core: Any, calibration: Samples | None, batch: int | None) -> Callable:
    if calibration is None:
        raise ValueError("int8 needs samples to calibrate with.")
    names, size = signature_names(core), batch or fixed_batch(core) or _CALIBRATION_BATCH
    # By name: the converter orders the inputs of the file as it likes.
    return lambda: (dict(zip(names, x, strict=True)) for x in calibration.batches(size))


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


def _checked_steps(core: Any) -> int:
    """How many steps are to be written out; raises if that cannot be done."""
    steps = steps_of(core)
    if steps > MOST_STEPS:
        raise ValueError(
            f"Expected at most {MOST_STEPS} steps for quantize='int8', which writes recurrent "
            f"layers out step by step; those of {core.name!r} have {steps}. Files become large "
            "then and no faster: use quantize='dynamic', which keeps the loop and stores weights "
            "as int8."
        )
    if not steps and _open_sizes(core):
        raise ValueError(
            "Expected a fixed number of steps for quantize='int8', which writes recurrent layers "
            f"out step by step. {_fix(core)} Or use quantize='dynamic', which keeps the loop."
        )
    return steps


def _reason(text: str) -> str:
    ops = re.search(r"(?:Select|Custom) ops: *(.+)", text)
    if ops:
        return f"no builtin LiteRT operation for {ops.group(1)}"
    messages = re.findall(r"error: (?:loc\(.*\): )?(.+)", text)
    return (messages[0] if messages else text)[:300].rstrip(".")


def _remedy(core: Any, quantize: str | None, text: str) -> str:
    if "TensorList" in text:
        return (
            "A recurrent layer is a loop over steps: fix the number of steps in `keras.Input` and "
            "build the layer with `unroll=True`."
        )
    if _open_sizes(core):
        return _fix(core)
    if quantize == "int8":
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
