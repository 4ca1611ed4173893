"""Times the operations of a network one by one: `latency_table`."""

import importlib.metadata
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import tree
from rich.progress import track

from keras_polar.backends import BACKEND
from keras_polar.costs.count import sizes_known
from keras_polar.costs.fusion import Fused, fused
from keras_polar.costs.latency import LatencyTable
from keras_polar.coupling.coupling import Coupling, analyze
from keras_polar.litert.benchmark import loaded, timed_runs
from keras_polar.litert.converter import not_exportable
from keras_polar.litert.float32_twin import is_float32, twin
from keras_polar.litert.modes import FLOAT32
from keras_polar.litert.runtime import check_positive
from keras_polar.litert.split_model import convert_each
from keras_polar.rules.call_site import sizes
from keras_polar.surgery.cut import Cutter

_WARM_UP = 5  # runs before the clock is read
_AT_ONCE = 2**27  # bytes of files that take turns; the runtime holds as much again
_PERCENTILE = 5  # of the times: what disturbs only ever adds time


def latency_table(
    model: Any, path: str | os.PathLike | None = None, *, threads: int = 1, runs: int = 100
) -> LatencyTable:
    """Measures how long each operation of a model takes on this machine, at several widths.

    Each layer, together with the batch normalization and activation that the runtime folds into
    it, is written as LiteRT files of its own, at full width and at a little more than half, half
    and a quarter of its input and output units (multiples of 8). All files take turns, so that a
    disturbance of the machine meets them alike, and the fifth percentile of each one's times is
    kept: disturbances only add time. Equal layers are measured once. What was measured is written
    to `path`, for large models in parts: a call that was stopped goes on from there.

    Args:
        model: a functional or built Sequential Keras model whose sizes are known; not changed.
        path: the file of a table (JSON) that is read and added to. None for one in the user's
            cache (`$XDG_CACHE_HOME/keras_polar` or `~/.cache/keras_polar`) for this processor,
            runtime and number of threads.
        threads: how many threads the runtime may use.
        runs: how often each file is timed.

    Returns:
        The table with the operations of this model; nanoseconds for one sample.

    Raises:
        ImportError: the LiteRT runtime is not installed.
        OSError: the folder of `path` does not exist or cannot be written to.
        TypeError: the model is not functional.
        ValueError: Keras does not run on TensorFlow, the model has unknown sizes or an operation
            that LiteRT cannot run, the table at `path` is of another device, or `threads` or
            `runs` is not a positive integer.

    Example:

        >>> table = keras_polar.latency_table(model)
        >>> gated = keras_polar.apply(model, 0.5, measure="latency", latency_table=table)
    """
    return measured_table(analyze(model), model.name, path, threads=threads, runs=runs)


def measured_table(
    coupling: Coupling,
    name: str,
    path: str | os.PathLike | None = None,
    *,
    threads: int = 1,
    runs: int = 100,
) -> LatencyTable:
    """`latency_table` of a model whose units are known already."""
    check_positive(threads=threads, runs=runs)
    check_sizes(coupling, name, "latency_table")
    path = Path(path) if path is not None else _cache_file(threads)
    pieces = {piece.key: piece for piece in fused(coupling)}
    table = _table_at(path, threads)
    missing = [key for key in pieces if key not in table.ops]
    if missing:
        _check_backend()
        for points in measured([pieces[key] for key in missing], threads, runs):
            # Read again: another process may have added to it.
            table = _table_at(path, threads)
            table = replace(table, ops={**table.ops, **points})
            table.save(path)
    return table.only(pieces)


def check_sizes(coupling: Coupling, name: str, what: str) -> None:
    """Raises unless every size is known."""
    if not sizes_known(coupling):
        raise ValueError(
            f"{what}: times need known sizes, but tensors of model {name!r} have unknown ones. "
            "Build it on `keras.Input` with all sizes, or use measure='weights'."
        )


def _check_backend() -> None:
    if BACKEND != "tensorflow":
        raise ValueError(
            "Expected Keras to run on TensorFlow, which writes the LiteRT files that are timed; "
            f"it runs on {BACKEND!r}. Measure in a process with KERAS_BACKEND=tensorflow, "
            "`keras_polar.latency_table(model).save(path)`, and pass latency_table=path here."
        )


# --- the file --------------------------------------------------------------------------------


def _cache_file(threads: int) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "keras_polar"
    folder.mkdir(parents=True, exist_ok=True)
    words = re.sub(r"\W+", "-", f"{processor()} {runtime()} {threads}")
    return folder / f"latency-{words}.json"


def _table_at(path: Path, threads: int) -> LatencyTable:
    """The table in a file, which must be of this machine; an empty one if there is no file."""
    empty = LatencyTable(processor(), runtime(), threads, {})
    if not path.exists():
        return empty
    table = LatencyTable.load(path)
    if table.only(()) != empty:
        raise ValueError(
            f"Expected a table of this machine at {str(path)!r} ({empty}); it holds times of "
            f"another ({table.only(())}). Choose another path; `apply(..., latency_table=path)` "
            "takes that table as it is."
        )
    return table


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    named = re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE)
    return named.group(1) if named else platform.processor() or platform.machine()


def runtime() -> str:
    """The name and version of the LiteRT runtime."""
    try:
        return f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            "Expected the LiteRT runtime, which runs .tflite files: pip install ai-edge-litert"
        ) from error


# --- operations ------------------------------------------------------------------------------


def measured(pieces: Sequence[Fused], threads: int, runs: int) -> Iterator[dict[str, tuple]]:
    """Sizes and nanoseconds of pieces at each of their widths, by their keys; in large parts."""
    with tempfile.TemporaryDirectory() as name:
        waiting: dict[Fused, list] = {}
        for i, piece in enumerate(track(pieces, "latency", transient=True)):
            waiting[piece] = _files(piece, Path(name) / str(i))
            files = [f for widths in waiting.values() for f in widths if f is not None]
            if sum(f.stat().st_size for f in files) > _AT_ONCE or piece is pieces[-1]:
                times = _nanoseconds(files, threads, runs)
                yield {p.key: _points(p, widths, times) for p, widths in waiting.items()}
                waiting = {}


def _points(piece: Fused, files: Sequence[Path | None], times: Mapping[Path, float]) -> tuple:
    """A row for each width; what computes nothing takes no time."""
    rows = zip(piece.variants, files, strict=True)
    return tuple((*piece.sizes(v), times[f] if f is not None else 0.0) for v, f in rows)


def _files(piece: Fused, folder: Path) -> list[Path | None]:
    """A file for each width; None where nothing is computed."""
    models = [_twin(piece, flags, f"width_{i}") for i, flags in enumerate(piece.variants)]
    try:
        contents = convert_each(models)
    except Exception as error:  # the converter raises whatever it meets, of many types
        why = not_exportable(models[0], FLOAT32, error)
        raise ValueError(f"latency_table: layer {piece.name!r} cannot be timed. {why}") from error
    folder.mkdir()
    paths = [folder / f"{i}.tflite" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return [path if content else None for path, content in zip(paths, contents, strict=True)]


def _twin(piece: Fused, flags: np.ndarray, name: str) -> keras.Model:
    """The piece as a model of its own, in float32, without some units."""
    cutter = Cutter(piece.coupling, flags)
    values: dict[int, Any] = dict(zip(piece.inputs, _inputs(piece, cutter), strict=True))
    inputs = list(values.values())
    for site in piece.sites:
        made = tree.flatten(cutter.visit(site.call, values))
        values.update(zip(site.call.outputs, made, strict=True))
    model = keras.Model(inputs, [values[t] for t in piece.outputs], name=name)
    return model if is_float32(model) else twin(model)


def _inputs(piece: Fused, cutter: Cutter) -> list[Any]:
    specs, first = piece.coupling.graph.specs, piece.sites[0]
    inputs = []
    for tensor in piece.inputs:
        ids = first.inputs[first.call.inputs.index(tensor)]
        shape = [cutter.kept.size(ids, axis) for axis in range(ids.ndim)]
        whole = sizes(specs[tensor].shape)
        shape = [n if ids.shape[a] == whole[a] else whole[a] for a, n in enumerate(shape)]
        inputs.append(keras.Input(batch_shape=shape, dtype=specs[tensor].dtype))
    return inputs


def _nanoseconds(files: Sequence[Path], threads: int, runs: int) -> dict[Path, float]:
    """The time of each file.

    Warm, for within a network an operation finds what the one before it has just written. Entering
    the runtime is part of it (a microsecond): about what it loses there to colder caches.
    """
    if not files:
        return {}
    ready = {str(f): loaded(str(f), threads) for f in files}
    timed_runs(ready, _WARM_UP)
    times = timed_runs(ready, runs, warm=True)
    return {f: 1e6 * float(np.percentile(times[str(f)], _PERCENTILE)) for f in files}
