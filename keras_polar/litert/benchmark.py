"""How long .tflite files take, and how much memory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_polar.litert.runtime import check_positive, interpreter, open_shape
from keras_polar.litert.samples import random_array

_PEAK = Path(__file__).with_name("peak_memory.py")  # a script for a process of its own


@dataclass(frozen=True)
class Latency:
    """Time and memory of one inference.

    Attributes:
        median: milliseconds.
        lower: the lower quartile, milliseconds.
        upper: the upper quartile, milliseconds.
        peak_bytes: how far a fresh process grows at most while it loads the file and runs it
            once: the file's weights, the runtime's copies of them, and the activations. None
            where the system does not tell.
    """

    median: float
    lower: float
    upper: float
    peak_bytes: int | None = None

    def __str__(self) -> str:
        text = f"{self.median:.3g} ms ({self.lower:.3g} to {self.upper:.3g})"
        return (
            text if self.peak_bytes is None else f"{text}, peak {self.peak_bytes / 2**20:.1f} MiB"
        )


def benchmark_tflite(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    threads: int = 1,
    runs: int = 50,
    warmup: int = 5,
) -> dict[str, Latency]:
    """Times one inference (batch of one, random input) of one or several .tflite files.

    The files take turns, and who goes first changes, so that a disturbance of the machine meets
    all of them alike. The runtime's Python interface offers no profile by operation; Google's
    `benchmark_model` with `--enable_op_profiling=true` prints one for the same file.

    Args:
        paths: a file, or several to be compared.
        threads: how many threads the runtime may use.
        runs: how often each file is timed.
        warmup: how often each file is run before that.

    Returns:
        From path, as a string, to its latency in milliseconds, in the order given.

    Raises:
        FileNotFoundError: a file does not exist.
        ImportError: the LiteRT runtime is not installed.
        ValueError: there is no path, or `threads`, `runs` or `warmup` is not a positive integer.

    Example:
        >>> times = keras_polar.benchmark_tflite(["dense.tflite", "small.tflite"])
        >>> print(times["small.tflite"])
        0.41 ms (0.40 to 0.43), peak 5.2 MiB
    """
    check_positive(runs=runs, warmup=warmup)
    interpreters = {name: loaded(name, threads) for name in _path_names(paths)}
    peaks = {name: _peak_bytes(name, ready, threads) for name, ready in interpreters.items()}
    timed_runs(interpreters, warmup)
    times = timed_runs(interpreters, runs)
    return {name: _latency(values, peaks[name]) for name, values in times.items()}


def _path_names(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str]:
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not names:
        raise ValueError("Expected `paths` to name at least one .tflite file; received none.")
    return [str(name) for name in names]


def loaded(path: str, threads: int) -> Any:
    """An interpreter that is ready to run one random sample."""
    ready, arrays = interpreter(path, threads), {}
    rng = np.random.default_rng(0)
    for detail in ready.get_input_details():
        shape, dtype = (1, *open_shape(detail)[1:]), np.dtype(detail["dtype"]).name
        arrays[detail["index"]] = random_array(rng, shape, dtype, detail["name"])
        ready.resize_tensor_input(detail["index"], arrays[detail["index"]].shape)
    ready.allocate_tensors()
    for index, array in arrays.items():
        ready.set_tensor(index, array)
    return ready


def timed_runs(
    interpreters: Mapping[str, Any], runs: int, *, warm: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of each run; who goes first changes from round to round.

    Args:
        warm: each is run once more just before it is timed, so that caches hold its data.
    """
    names = list(interpreters)
    times: dict[str, list[float]] = {name: [] for name in interpreters}
    for turn in range(runs):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if warm:
                interpreters[name].invoke()
            start = time.perf_counter()
            interpreters[name].invoke()
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def _latency(times: Sequence[float], peak_bytes: int | None) -> Latency:
    lower, median, upper = np.percentile(times, [25, 50, 75])
    return Latency(float(median), float(lower), float(upper), peak_bytes)


def _peak_bytes(name: str, ready: Any, threads: int) -> int | None:
    if sys.platform != "linux":
        return None
    shapes = [detail["shape"].tolist() for detail in ready.get_input_details()]
    command = [sys.executable, str(_PEAK), name, str(threads), json.dumps(shapes)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(ran.stdout)
