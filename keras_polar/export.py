"""A Keras model as a LiteRT (.tflite) file: write it, run it, compare it with Keras, time it.

Everything that needs TensorFlow or the LiteRT runtime is imported where it is used, so that the
package can be imported on any Keras backend.
"""

import contextlib
import itertools
import keyword
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_polar.graph import functional
from keras_polar.samples import UNKNOWN_SIZE

_QUANTIZE = (None, "float16")
_SAMPLES = 8  # enough to see an error, few enough to cost nothing beside the conversion
_WARM_UP = 5


# --- what the functions return ---------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a .tflite file.

    Attributes:
        name: its name in the file's signature.
        shape: batch first; None where any size is accepted.
        dtype: name of the NumPy dtype, such as "float32".
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {self.shape}"


@dataclass(frozen=True)
class ExportReport:
    """What `export_tflite` wrote, and how far it is from the Keras model.

    Attributes:
        path: the file.
        bytes: its size.
        quantize: how the weights are stored: None (as in Keras) or "float16".
        max_difference: largest |LiteRT - Keras| over all outputs of `samples` samples.
        relative_difference: the same, each output divided by its own largest |Keras| value.
        samples: how many samples were compared.
        inputs: in the order of the Keras model's inputs.
        outputs: in the order of the Keras model's outputs.
    """

    path: Path
    bytes: int
    quantize: str | None
    max_difference: float
    relative_difference: float
    samples: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.bytes:,} bytes, weights {self.quantize or 'not quantized'}",
            f"  against Keras on {self.samples} samples: max difference "
            f"{self.max_difference:.2g} (relative {self.relative_difference:.2g})",
            *(f"  input  {tensor}" for tensor in self.inputs),
            *(f"  output {tensor}" for tensor in self.outputs),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Latency:
    """Time of one inference in milliseconds: median, lower and upper quartile."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ms ({self.lower:.3g} to {self.upper:.3g})"


# --- the public functions --------------------------------------------------------------------


def export_tflite(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    quantize: str | None = None,
    representative_data: Any = None,
) -> ExportReport:
    """Writes a model as a LiteRT file, runs the file, and compares it with Keras.

    A gated model is converted first: the file always holds the small, static network. Only
    builtin LiteRT operations are used, so that the file runs on every LiteRT runtime. The batch
    size stays open unless the model fixes it. The file appears at `path` complete or not at all.

    In the file, inputs carry the names of the model's `keras.Input`s and outputs are called
    `output_0`, `output_1`, ...; where the model takes or returns a flat dict, its keys are the
    names. The model is not changed.

    Args:
        model: functional or Sequential, built; plain or gated.
        path: where to write; ends in `.tflite`, its folder exists. A file there is replaced.
        quantize: None stores the weights as they are; "float16" stores them in half the bytes
            and computes in float32.
        representative_data: samples for the comparison, as `model.predict` takes them: one array
            of shape `(samples, ...)`, or a list or dict of such arrays where the model has
            several inputs. The first 8 samples are used. None draws seeded random ones, uniform
            between 0 and 1 (integers: 0 or 1).

    Returns:
        The size of the file, its inputs and outputs, and its difference from Keras.

    Raises:
        TypeError: `model` is no Keras model, or `path` no path.
        ValueError: the model is unbuilt or subclassed, `quantize` is unknown, `path` does not end
            in `.tflite`, the data does not fit the inputs, Keras does not run on TensorFlow, or
            the model holds something LiteRT cannot do.
        FileNotFoundError: the folder of `path` does not exist.

    Example:
        >>> report = keras_polar.export_tflite(small, "small.tflite", quantize="float16")
        >>> report.bytes, report.max_difference
    """
    path = _checked_path(path)
    _check_options(quantize)
    model = _converted(model)
    core = _core(model)
    arrays = _samples(core, representative_data)
    # Inside the target folder, so that the final move cannot cross file systems.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        draft = Path(folder) / "model.tflite"
        _write(core, draft, quantize)
        found = _try_out(core, draft, arrays)
        os.replace(draft, path)
    return ExportReport(path, path.stat().st_size, quantize, *found)


def run_tflite(
    path: str | os.PathLike, inputs: Any, *, batch_size: int = 256, threads: int = 1
) -> dict[str, np.ndarray]:
    """Runs a .tflite file on samples.

    Args:
        path: the file.
        inputs: an array of shape `(samples, ...)`, or a dict from input name to array where the
            file has several inputs (`ExportReport.inputs` lists the names).
        batch_size: how many samples the runtime gets at a time.
        threads: how many threads the runtime may use.

    Returns:
        From output name to array of shape `(samples, ...)`.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: an array's dtype does not fit the file's.
        ValueError: the names, the shapes, `batch_size` or `threads` do not fit.

    Example:
        >>> keras_polar.run_tflite("small.tflite", images)["output_0"].argmax(-1)
    """
    _check_positive(batch_size=batch_size)
    interpreter = _interpreter(path, threads)
    runner = _runner(interpreter, path)
    named = _named_inputs(runner.get_input_details(), inputs, path)
    total = len(next(iter(named.values())))
    starts = range(0, total, batch_size)
    parts = [runner(**{n: x[i : i + batch_size] for n, x in named.items()}) for i in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def benchmark_tflite(
    paths: str | os.PathLike | Iterable[str | os.PathLike], *, runs: int = 50, threads: int = 1
) -> dict[str, Latency]:
    """Times one inference (batch of one, random input) of one or several .tflite files.

    The files take turns, so that a disturbance of the machine meets all of them alike.

    Args:
        paths: a file, or several to be compared.
        runs: how often each file is run, after a few runs that do not count.
        threads: how many threads the runtime may use.

    Returns:
        From path, as a string, to its latency in milliseconds, in the order given.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: there is no path, or `runs` or `threads` is not a positive integer.

    Example:
        >>> times = keras_polar.benchmark_tflite(["dense.tflite", "small.tflite"])
        >>> print(times["small.tflite"])
    """
    _check_positive(runs=runs)
    interpreters = {name: _interpreter(name, threads) for name in _path_names(paths)}
    for interpreter in interpreters.values():
        _fill_randomly(interpreter)
    _timed_runs(interpreters, _WARM_UP)
    times = _timed_runs(interpreters, runs)
    return {name: _latency(values) for name, values in times.items()}


# --- checks ----------------------------------------------------------------------------------


def _checked_path(path: str | os.PathLike) -> Path:
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
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Expected `path` in a folder that exists; received {str(path)!r}, and there is no "
            f"folder {str(path.parent)!r}. Create it first (`mkdir -p`)."
        )
    return path


def _check_options(quantize: str | None) -> None:
    if quantize not in _QUANTIZE:
        raise ValueError(
            f"Expected `quantize` to be one of {', '.join(map(repr, _QUANTIZE))}; received "
            f"{quantize!r}. Pass None to keep the weights as they are."
        )
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ValueError(
            f"Expected Keras to run on TensorFlow, which writes LiteRT files; it runs on "
            f"{backend!r}. Save the model (.keras), set KERAS_BACKEND=tensorflow in a new process, "
            "load it there and export it."
        )


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"Expected `{name}` to be a positive integer; received {number!r}.")


def _converted(model: Any) -> keras.Model:
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Expected `model` to be a keras.Model; received {type(model).__name__}. "
            "A model saved on disk is read with `keras.models.load_model`."
        )
    # Here, not at the top: both modules are far above this one's plain part.
    from keras_polar.apply import GatedModel
    from keras_polar.convert import convert

    return convert(model) if isinstance(model, GatedModel) else model


def _core(model: keras.Model) -> Any:
    core = functional(model)
    if core is not None:
        return core
    if isinstance(model, keras.Sequential):
        raise ValueError(
            f"Expected a built model; received Sequential {model.name!r} without an input shape. "
            "Add `keras.Input(shape)` as its first layer, or call `model.build(input_shape)`."
        )
    raise ValueError(
        f"Expected a functional or Sequential model; received {type(model).__name__} "
        f"{model.name!r}, whose `call` is Python code. Make it functional: `x = keras.Input(shape);"
        " model = keras.Model(x, <layers called on x>)`."
    )


# --- samples ---------------------------------------------------------------------------------


def _samples(core: Any, data: Any) -> list[np.ndarray]:
    """An array of samples for each input, in the order of `core.inputs`."""
    samples = next((t.shape[0] for t in core.inputs if t.shape[0] is not None), _SAMPLES)
    if data is None:
        rng = np.random.default_rng(0)
        return [_random_array(rng, (samples, *t.shape[1:]), t.dtype, t.name) for t in core.inputs]
    flat = _same_structure(core, data)
    for array, tensor in zip(flat, core.inputs, strict=True):
        _check_fits(array, tensor)
    if len({len(array) for array in flat}) > 1 or len(flat[0]) == 0:
        raise ValueError(
            "Expected `representative_data` with the same number of samples, at least one, for "
            f"every input; received {[len(array) for array in flat]}."
        )
    return [x[:samples].astype(t.dtype) for x, t in zip(flat, core.inputs, strict=True)]


def _same_structure(core: Any, data: Any) -> list[np.ndarray]:
    wanted, flat = core.input, keras.tree.flatten(data)
    keys_differ = isinstance(wanted, dict) and (
        not isinstance(data, dict) or set(data) != set(wanted)
    )
    if keys_differ or len(flat) != len(core.inputs):
        what = f"a dict with keys {sorted(wanted)}" if isinstance(wanted, dict) else "arrays"
        raise ValueError(
            f"Expected `representative_data` as `model.predict` takes it: {what}, one array for "
            f"each of the {len(core.inputs)} inputs {_input_names(core)}; received "
            f"{type(data).__name__} with {len(flat)} leaves. Stack the samples into NumPy arrays."
        )
    return [np.asarray(leaf) for leaf in flat]


def _check_fits(array: np.ndarray, tensor: Any) -> None:
    known = [(want, got) for want, got in zip(tensor.shape[1:], array.shape[1:], strict=False)]
    fits = all(want in (None, got) for want, got in known)
    if array.ndim != len(tensor.shape) or not fits:
        raise ValueError(
            f"Expected `representative_data` of shape {tuple(tensor.shape)} for input "
            f"{tensor.name!r}; received shape {array.shape}. The first axis counts the samples."
        )


def _random_array(
    rng: np.random.Generator, shape: Sequence[int | None], dtype: str, name: str
) -> np.ndarray:
    sizes = [UNKNOWN_SIZE if size is None else size for size in shape]
    if "float" in dtype:
        return rng.random(sizes).astype(dtype)
    if "int" in dtype or dtype == "bool":
        return rng.integers(0, 2, sizes).astype(dtype)  # 0 and 1 are in every vocabulary
    raise ValueError(f"Expected inputs of numbers; input {name!r} has dtype {dtype!r}.")


# --- writing ---------------------------------------------------------------------------------


def _input_names(core: Any) -> list[str]:
    if isinstance(core.input, dict) and len(core.input) == len(core.inputs):
        return sorted(core.input)
    return [tensor.name for tensor in core.inputs]


def _output_names(core: Any) -> list[str]:
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


def _write(core: Any, path: Path, quantize: str | None) -> None:
    # Flat lists of inputs and a flat dict of outputs: nested structures cannot be exported.
    outputs = dict(zip(_output_names(core), core.outputs, strict=True))
    flat = keras.Model(list(core.inputs), outputs, name=core.name)
    names = _identifiers(_input_names(core))
    signature = [
        keras.InputSpec(shape=tensor.shape, dtype=tensor.dtype, name=name)
        for tensor, name in zip(core.inputs, names, strict=True)
    ]
    options = _converter_options(quantize)
    try:
        with _warnings_only():
            flat.export(
                path, format="litert", verbose=False, input_signature=[signature], **options
            )
    except Exception as error:  # the converter raises whatever it meets, of many types
        raise ValueError(_not_exportable(core.name, error)) from error


@contextlib.contextmanager
def _warnings_only() -> Iterator[None]:
    """Keeps what TensorFlow has to say below a warning from the user's terminal."""
    from absl import logging as absl_logging

    tensorflow = logging.getLogger("tensorflow")
    before = tensorflow.level, absl_logging.get_verbosity()
    tensorflow.setLevel(logging.WARNING)
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        yield
    finally:
        tensorflow.setLevel(before[0])
        absl_logging.set_verbosity(before[1])


def _converter_options(quantize: str | None) -> dict[str, Any]:
    import tensorflow as tf

    target: dict[str, Any] = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    if quantize is None:
        return {"target_spec": target}
    target["supported_types"] = [tf.float16]
    return {"target_spec": target, "optimizations": [tf.lite.Optimize.DEFAULT]}


def _not_exportable(name: str, error: Exception) -> str:
    text = str(error).strip()
    ops = re.search(r"(?:Select|Custom) ops: *(.+)", text)
    reason = f"no builtin LiteRT operation for {ops.group(1)}" if ops else text[:300]
    return (
        f"Expected a model that LiteRT can run; {name!r} cannot be exported: {reason}. "
        "Replace the layer that needs it; `model.export(path, format='litert')` of Keras may "
        "still write a file that needs TensorFlow's own kernels."
    )


# --- comparing -------------------------------------------------------------------------------


def _try_out(core: Any, path: Path, arrays: list[np.ndarray]) -> tuple:
    """The fields of an `ExportReport` that need the file to be run."""
    names = _identifiers(_input_names(core))
    runner = _runner(_interpreter(path, 1), path)
    try:
        outputs = runner(**dict(zip(names, arrays, strict=True)))
    except RuntimeError as error:  # the runtime checks some limits only when it runs
        raise ValueError(_not_exportable(core.name, error)) from error
    got = [outputs[name] for name in _output_names(core)]
    inputs_info = _infos(runner.get_input_details(), names)
    outputs_info = _infos(runner.get_output_details(), _output_names(core))
    return *_differences(_call(core, arrays), got), len(arrays[0]), inputs_info, outputs_info


def _call(core: Any, arrays: list[np.ndarray]) -> list[np.ndarray]:
    outputs = core(keras.tree.pack_sequence_as(core.input, arrays), training=False)
    return [keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(outputs)]


def _differences(expected: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> tuple[float, float]:
    pairs = [_difference(e, g) for e, g in zip(expected, got, strict=True)]
    absolute, relative = np.max(pairs, axis=0)
    return float(absolute), float(relative)


def _difference(expected: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Largest absolute difference, and the same as a part of the largest |expected|."""
    expected, got = expected.astype(np.float64), got.astype(np.float64)
    other = (expected != got) & ~(np.isnan(expected) & np.isnan(got))
    if not other.any():
        return 0.0, 0.0
    largest = np.abs(expected[other] - got[other]).max()
    scale = np.abs(expected).max()
    return largest, largest / scale if scale > 0 else np.inf


def _infos(details: Mapping[str, Any], names: Iterable[str]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(name, _open_shape(details[name]), np.dtype(details[name]["dtype"]).name)
        for name in names
    )


def _open_shape(detail: Mapping[str, Any]) -> tuple[int | None, ...]:
    sizes = detail["shape_signature"]
    sizes = sizes if len(sizes) else detail["shape"]  # empty where no size is open
    return tuple(None if size < 0 else int(size) for size in sizes)


# --- running ---------------------------------------------------------------------------------


def _interpreter(path: str | os.PathLike, threads: int) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    _check_positive(threads=threads)
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"Expected a .tflite file at {str(path)!r}; there is none. Write it with "
            "`export_tflite`."
        )
    return Interpreter(model_path=str(path), num_threads=threads)


def _runner(interpreter: Any, path: str | os.PathLike) -> Any:
    signatures = list(interpreter.get_signature_list())
    if len(signatures) != 1:
        raise ValueError(
            f"Expected {str(path)!r} to have one signature; it has {signatures}. Write it with "
            "`export_tflite`."
        )
    return interpreter.get_signature_runner(signatures[0])


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
    array, shape = np.asarray(value), _open_shape(detail)
    fits = array.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape[1:], array.shape[1:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"Expected input {name!r} of shape {shape}; received {array.shape}. The first axis "
            "counts the samples."
        )
    if not np.can_cast(array.dtype, detail["dtype"], "same_kind"):
        raise TypeError(
            f"Expected input {name!r} of dtype {np.dtype(detail['dtype']).name}; received "
            f"{array.dtype}. Convert it with `.astype`."
        )
    return array.astype(detail["dtype"])


# --- timing ----------------------------------------------------------------------------------


def _path_names(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str]:
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not names:
        raise ValueError("Expected `paths` to name at least one .tflite file; received none.")
    return [str(name) for name in names]


def _fill_randomly(interpreter: Any) -> None:
    rng, arrays = np.random.default_rng(0), {}
    for detail in interpreter.get_input_details():
        shape = (1, *_open_shape(detail)[1:])
        dtype = np.dtype(detail["dtype"]).name
        arrays[detail["index"]] = _random_array(rng, shape, dtype, detail["name"])
        interpreter.resize_tensor_input(detail["index"], arrays[detail["index"]].shape)
    interpreter.allocate_tensors()
    for index, array in arrays.items():
        interpreter.set_tensor(index, array)


def _timed_runs(interpreters: Mapping[str, Any], runs: int) -> dict[str, list[float]]:
    """Milliseconds of each run; who goes first changes from round to round."""
    names = list(interpreters)
    times: dict[str, list[float]] = {name: [] for name in interpreters}
    for turn in range(runs):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            interpreters[name].invoke()
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def _latency(times: Sequence[float]) -> Latency:
    lower, median, upper = np.percentile(times, [25, 50, 75])
    return Latency(float(median), float(lower), float(upper))
