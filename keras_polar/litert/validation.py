"""What has to hold before anything is written."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_polar.backends import BACKEND, to_numpy
from keras_polar.gates.groups import is_gated
from keras_polar.graph.ir import Call, Graph, refs_in
from keras_polar.graph.keras_private import core_of
from keras_polar.graph.quantized import listed, quantized
from keras_polar.graph.trace import trace
from keras_polar.litert.modes import IO, QuantizationMode, check_known, mode_of
from keras_polar.surgery.convert import convert


def checked_path(path: str | os.PathLike) -> Path:
    """The path of a file that can be written."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"Expected `path` to be a string or pathlib.Path; received {type(path).__name__}."
        )
    path = Path(path)
    if path.suffix != ".tflite":
        raise ValueError(
            f"Expected `path` to end in '.tflite'; received {str(path)!r}. "
            f"Write to {str(path.with_suffix('.tflite')) if path.name else 'model.tflite'!r}."
        )
    if path.is_dir():
        raise IsADirectoryError(
            f"Expected `path` to be a file; {str(path)!r} is a folder. Choose another name."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Expected `path` in a folder that exists; received {str(path)!r}, and there is no "
            f"folder {str(path.parent)!r}. Create it first (`mkdir -p`)."
        )
    return path


@contextlib.contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A file in the making, in the system's folder for temporary files.

    Nothing stands beside `path` before `put_in_place`, whenever the process is killed.
    """
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise PermissionError(
            f"Expected a folder that can be written to; {str(path.parent)!r} cannot "
            f"({error.strerror}). Choose another folder."
        ) from error
    with tempfile.TemporaryDirectory(prefix="keras_polar-") as name:
        yield Path(name) / path.name


def put_in_place(draft: Path, path: Path) -> None:
    """Moves a finished file to its place, where it appears as a whole."""
    with contextlib.suppress(OSError):  # another file system
        os.replace(draft, path)
        return
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        shutil.copyfile(draft, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def checked_mode(quantize: str | QuantizationMode | None, io: str | None) -> QuantizationMode:
    """The mode; raises unless the options are known and Keras runs on TensorFlow."""
    mode = mode_of(quantize)
    check_known("io", io, IO)
    check_backend()
    import tensorflow as tf

    for name in mode.operations:
        check_known("operations", name, tuple(tf.lite.OpsSet.__members__))
    return mode


def check_backend() -> None:
    """Raises unless Keras runs on TensorFlow."""
    if BACKEND != "tensorflow":
        raise ValueError(
            f"Expected Keras to run on TensorFlow, which writes LiteRT files; it runs on "
            f"{BACKEND!r}. Save the model (.keras), set KERAS_BACKEND=tensorflow in a new process, "
            "load it there and export it."
        )


def converted(model: Any) -> keras.Model:
    """The model without gates."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Expected `model` to be a keras.Model; received {type(model).__name__}. "
            "A model saved on disk is read with `keras.models.load_model`."
        )
    return convert(model) if is_gated(model) else model


def exportable_core(model: Any) -> Any:
    """The functional core of a Keras model, without gates; raises if LiteRT cannot express it."""
    core = core_of(converted(model))
    check_no_strings(core)
    check_not_quantized(core)
    return core


def check_finite(core: Any) -> None:
    """Raises if a weight is NaN or infinite."""
    for variable in core.weights:
        values = to_numpy(variable)
        is_float = "float" in keras.backend.standardize_dtype(variable.dtype)
        # bfloat16 and its like are no floats to NumPy.
        if is_float and not np.isfinite(values.astype("float32")).all():
            path = getattr(variable, "path", variable.name)
            raise ValueError(
                f"Expected finite weights; {path!r} holds NaN or infinity: the training "
                "has diverged. Load an earlier checkpoint, or train with a smaller learning rate."
            )


# --- what LiteRT has no operations for -------------------------------------------------------

# Layers that look words or numbers up in a table, or hash them.
_LOOKUPS = (
    keras.layers.Hashing,
    keras.layers.HashedCrossing,
    keras.layers.IntegerLookup,
    keras.layers.StringLookup,
    keras.layers.TextVectorization,
)


def check_no_strings(core: Any) -> None:
    """Raises if a model takes strings, or looks its inputs up in tables."""
    graph = trace(core)
    strings = [x for x in core.inputs if x.dtype == "string"]
    lookups = {c.path: c for c in graph.calls if isinstance(c.op, _LOOKUPS)}
    if not strings and not lookups:
        return
    names = ", ".join(repr(x) for x in lookups) or ", ".join(repr(x.name) for x in strings)
    what = "layers" if lookups else "inputs"
    raise ValueError(
        f"Expected a model of numbers: LiteRT has no strings and no tables, which {what} {names} "
        f"of {core.name!r} need. {_behind(core, graph, list(lookups.values()))}"
    )


def _behind(core: Any, graph: Graph, lookups: list[Call]) -> str:
    """How to export the part of a model behind its lookup layers."""
    front, inputs = _frontier(graph, lookups)
    if not lookups or any("/" in call.path for call in front):
        return (
            "Turn strings into numbers before the model: build it on `keras.Input` of numbers, "
            "with the lookup layers outside of it, and export that."
        )
    names = [f"model.get_layer({c.path!r}).output" for c in front]
    names += [f"model.inputs[{i}]" for i in inputs]
    return (
        f"Export what comes behind: `rest = keras.Model([{', '.join(names)}], model.outputs)`; "
        f"the application calls {', '.join(repr(c.path) for c in front)} before the file."
    )


def _frontier(graph: Graph, lookups: list[Call]) -> tuple[list[Call], list[int]]:
    """The last lookups on the way to the outputs, and the inputs that reach them without one."""
    needed, front = set(refs_in(graph.outputs)), []
    for call in reversed(graph.calls):
        if needed.isdisjoint(call.outputs):
            continue
        if call in lookups:
            front.append(call)
        else:
            needed.update(call.inputs)
    return front[::-1], [i for i, t in enumerate(refs_in(graph.inputs)) if t in needed]


def check_not_quantized(core: Any) -> None:
    """Raises if Keras has quantized layers: what does convert then is larger, and may be wrong."""
    layers = quantized(core)
    if layers:
        raise ValueError(
            f"Expected a model that Keras has not quantized; {core.name!r} has the layers "
            f"{listed(layers)}. LiteRT quantizes in its own way: export the model as it was before "
            "`quantize`, with `export_tflite(model, path, 'int8', representative_data=x)`, say, or "
            "a float file that ai-edge-quantizer then quantizes."
        )
