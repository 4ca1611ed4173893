"""What has to hold before anything is written."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_polar.convert import convert
from keras_polar.gated import GatedModel
from keras_polar.graph import to_numpy
from keras_polar.litert.write import IO, QUANTIZE


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
    """A file in the making, in a folder of its own beside `path` that is gone afterwards."""
    try:
        # Inside the target folder, so that the final move cannot cross file systems.
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".draft-")
    except OSError as error:
        raise PermissionError(
            f"Expected a folder that can be written to; {str(path.parent)!r} cannot "
            f"({error.strerror}). Choose another folder."
        ) from error
    with folder as name:
        yield Path(name) / path.name


def check_options(quantize: str | None, io: str | None) -> None:
    """Raises unless the options are known and Keras runs on TensorFlow."""
    for name, value, known in (("quantize", quantize, QUANTIZE), ("io", io, IO)):
        if value not in known:
            raise ValueError(
                f"Expected `{name}` to be one of {', '.join(map(repr, known))}; received {value!r}."
            )
    check_backend()


def check_backend() -> None:
    """Raises unless Keras runs on TensorFlow."""
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ValueError(
            f"Expected Keras to run on TensorFlow, which writes LiteRT files; it runs on "
            f"{backend!r}. Save the model (.keras), set KERAS_BACKEND=tensorflow in a new process, "
            "load it there and export it."
        )


def converted(model: Any) -> keras.Model:
    """The model without gates."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Expected `model` to be a keras.Model; received {type(model).__name__}. "
            "A model saved on disk is read with `keras.models.load_model`."
        )
    return convert(model) if isinstance(model, GatedModel) else model


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
