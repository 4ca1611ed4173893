"""Running .tflite files, with real numbers in and out whatever the file stores."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_polar.litert.report import TensorInfo
from keras_polar.litert.samples import matches


def run_tflite(
    path: str | os.PathLike, inputs: Any, *, batch_size: int = 256, threads: int = 1
) -> dict[str, np.ndarray]:
    """Runs a .tflite file on samples.

    Where the file's inputs are quantized, real numbers are quantized with the file's scale; an
    array of the file's own dtype is taken as it is. Outputs are always real numbers.

    Args:
        path: the file.
        inputs: an array of shape `(samples, ...)`, or a dict from input name to array where the
            file has several inputs (`ExportReport.inputs` lists the names).
        batch_size: how many samples the runtime gets at a time. A file made for one batch size
            gets that many.
        threads: how many threads the runtime may use.

    Returns:
        From output name to array of shape `(samples, ...)`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the LiteRT runtime is not installed.
        TypeError: an array's dtype does not fit the file's.
        ValueError: the names, the shapes, `batch_size` or `threads` do not fit.

    Example:
        >>> keras_polar.run_tflite("small.tflite", images)["output_0"].argmax(-1)
    """
    check_positive(batch_size=batch_size)
    runner = signature_runner(interpreter(path, threads), path)
    return run_batches(runner, _named_inputs(runner.get_input_details(), inputs, path), batch_size)


def check_positive(**numbers: int) -> None:
    """Raises unless all are positive integers."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"Expected `{name}` to be a positive integer; received {number!r}.")


def interpreter(path: str | os.PathLike, threads: int) -> Any:
    """The runtime's interpreter of a file."""
    check_positive(threads=threads)
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"Expected a .tflite file at {str(path)!r}; there is none. Write it with "
            "`export_tflite`."
        )
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ImportError(
            "Expected the LiteRT runtime, which runs .tflite files: pip install ai-edge-litert"
        ) from error
    try:
        return Interpreter(model_path=str(path), num_threads=threads)
    except ValueError as error:
        raise ValueError(
            f"Expected a .tflite file at {str(path)!r}; LiteRT cannot read it: {error}. Write it "
            "with `export_tflite`."
        ) from error


def signature_runner(of: Any, path: str | os.PathLike) -> Any:
    """Calls the one signature of a file, by the names of its inputs and outputs."""
    signatures = list(of.get_signature_list())
    if len(signatures) != 1:
        raise ValueError(
            f"Expected {str(path)!r} to have one signature; it has {signatures}. Write it with "
            "`export_tflite`."
        )
    return of.get_signature_runner(signatures[0])


def run_batches(
    runner: Any, named: Mapping[str, np.ndarray], batch_size: int
) -> dict[str, np.ndarray]:
    """Real outputs for real inputs, in batches of at most `batch_size`."""
    details = runner.get_input_details()
    total = len(next(iter(named.values())))
    size = _fixed_batch(details, total) or batch_size
    parts = []
    for start in range(0, total, size):
        batch = {n: stored(x[start : start + size], details[n]) for n, x in named.items()}
        parts.append(runner(**batch))
    outputs = runner.get_output_details()
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: real(x, outputs[name]) for name, x in joined.items()}


def _fixed_batch(details: Mapping[str, Any], total: int) -> int | None:
    size = next((n for d in details.values() if (n := open_shape(d)[0]) is not None), None)
    if size is not None and total % size:
        raise ValueError(
            f"Expected a multiple of {size} samples, the batch size of the file; received {total}."
        )
    return size


# --- real and stored numbers -----------------------------------------------------------------


def scale_of(detail: Mapping[str, Any]) -> tuple[float, int] | None:
    """Scale and zero point of a quantized tensor; None where values are stored as they are."""
    scale, zero_point = detail["quantization"]
    return (float(scale), int(zero_point)) if scale else None


def stored(array: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    """What a tensor of the file holds for these values."""
    dtype, quantized = np.dtype(detail["dtype"]), scale_of(detail)
    if quantized is None or array.dtype == dtype:
        return array.astype(dtype)
    limits = np.iinfo(dtype)
    rounded = np.round(array / quantized[0]) + quantized[1]
    return np.clip(rounded, limits.min, limits.max).astype(dtype)


def real(array: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    """The values that an array of a tensor of the file stands for."""
    quantized = scale_of(detail)
    if quantized is None:
        return array
    return (quantized[0] * (array.astype("float32") - quantized[1])).astype("float32")


# --- what a file takes and gives -------------------------------------------------------------


def tensor_infos(details: Mapping[str, Any], names: Iterable[str]) -> tuple[TensorInfo, ...]:
    """The tensors of a signature, in the order of `names`."""
    return tuple(_info(name, details[name]) for name in names)


def _info(name: str, detail: Mapping[str, Any]) -> TensorInfo:
    dtype = np.dtype(detail["dtype"]).name
    return TensorInfo(name, open_shape(detail), dtype, *(scale_of(detail) or (None, None)))


def open_shape(detail: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The shape of a tensor of the file; None where any size is accepted."""
    sizes = detail["shape_signature"]
    sizes = sizes if len(sizes) else detail["shape"]  # empty where no size is open
    return tuple(None if size < 0 else int(size) for size in sizes)


def _named_inputs(
    details: Mapping[str, Any], inputs: Any, path: str | os.PathLike
) -> dict[str, np.ndarray]:
    if not isinstance(inputs, Mapping) and len(details) == 1:
        inputs = {next(iter(details)): inputs}
    if not isinstance(inputs, Mapping) or set(inputs) != set(details):
        got = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(
            f"Expected `inputs` to be a dict with keys {sorted(details)}, the inputs of "
            f"{str(path)!r}; received {got}."
        )
    named = {name: _as_input(name, details[name], x) for name, x in inputs.items()}
    lengths = {name: len(x) for name, x in named.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(
            f"Expected the same number of samples, at least one, for every input; "
            f"received {lengths}."
        )
    return named


def _as_input(name: str, detail: Mapping[str, Any], value: Any) -> np.ndarray:
    array, shape = np.asarray(value), open_shape(detail)
    if array.ndim != len(shape) or not matches(array.shape[1:], shape[1:]):
        raise ValueError(
            f"Expected input {name!r} of shape {shape}; received {array.shape}. The first axis "
            "counts the samples."
        )
    dtype = "float32" if scale_of(detail) else np.dtype(detail["dtype"]).name
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise TypeError(
            f"Expected input {name!r} of dtype {dtype}; received {array.dtype}. Convert it with "
            "`.astype`."
        )
    return array
