"""How long the operations of a network take on a device, for any widths.

The table holds what was measured: operation by operation, the time at a few widths. Between them
time is a constant plus so much per element read, element written and multiply-accumulate, with
output channels counted one by one or in whole tiles, as the measurements say, and with no
coefficient below zero. For a convolution that is a constant, a part for each input channel, one for
each output channel and one for each pair: the latency of a network is a polynomial of its open
counts, as its other costs are.
"""

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_polar.costs.fusion import Fused, fused
from keras_polar.costs.measures import Measure
from keras_polar.costs.polynomial import Amount
from keras_polar.coupling.coupling import Coupling

FORMAT = 1  # of the file
SIZES = 5  # of a piece, see fusion.py
PICOSECONDS = 1000  # per nanosecond
_FULL = 10.0  # how much more the full width counts than others: the dense network has to be right


@dataclass(frozen=True)
class LatencyTable(Measure):
    """How long operations take on a device, measured one by one.

    Made by `keras_polar.latency_table`; `keras_polar.apply` takes it.

    Attributes:
        device: name of the processor.
        runtime: name and version of the runtime.
        threads: how many threads it used.
        ops: from operation, in words with a digest of its configuration, to what was measured:
            one row for each combination of widths, full width first. A row holds the elements
            read, elements written and multiply-accumulates of one inference, the last two again
            with output channels in whole tiles of 16, and the time in nanoseconds.

    Example:

        >>> table = keras_polar.latency_table(model)        # on the device
        >>> table.save("phone.json")
        >>> keras_polar.apply(model, 0.5, measure="latency", latency_table="phone.json")
    """

    device: str
    runtime: str
    threads: int
    ops: Mapping[str, tuple[tuple[float, ...], ...]]

    name = "latency"
    needs_sizes = True

    def __str__(self) -> str:
        """A line per operation, the time at full width and at the smallest."""
        lines = [f"{self.device}, {self.runtime}, threads: {self.threads}"]
        for key, points in self.ops.items():
            full, small = points[0][-1], points[-1][-1]
            lines.append(f"{full / 1000:10.1f} us, {small / 1000:10.1f} us at the smallest  {key}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the table as JSON, complete or not at all.

        Raises:
            OSError: the folder does not exist or cannot be written to.
        """
        path = Path(path)
        draft = path.with_name(f".{path.name}-{os.getpid()}")
        content = {"format": FORMAT, **vars(self), "ops": dict(self.ops)}
        draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(draft, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LatencyTable":
        """Reads a table that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"Expected a table of latencies at {str(path)!r}; there is no such file. Write it "
                "on the device: `keras_polar.latency_table(model).save(path)`."
            )
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls._read(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"Expected a table of latencies in {str(path)!r}, as LatencyTable.save writes it; "
                f"it cannot be read ({type(error).__name__}: {error}). Delete it and measure again."
            ) from error

    @classmethod
    def _read(cls, content: Any) -> "LatencyTable":
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        ops = {key: tuple(map(_point, points)) for key, points in content["ops"].items()}
        return cls(str(content["device"]), str(content["runtime"]), int(content["threads"]), ops)

    def only(self, keys: Iterable[str]) -> "LatencyTable":
        """The table of these operations alone, as far as they are in it."""
        return replace(self, ops={k: self.ops[k] for k in keys if k in self.ops})

    def terms(self, coupling: Coupling) -> list[tuple[int, Amount]]:
        """The time of every piece of a graph in picoseconds, with the first call of the piece.

        Args:
            coupling: of the whole model, nothing ignored: what varies in an operation is part of
                what tells it from others.

        Raises:
            ValueError: an operation is not in the table.
        """
        return [(p.calls[0], t) for p in fused(coupling) for t in self._piece_terms(p)]

    def _piece_terms(self, piece: Fused) -> list[Amount]:
        if piece.key not in self.ops:
            raise ValueError(
                f"The table of latencies ({self.device}, {self.runtime}) does not hold layer "
                f"{piece.name!r} ({piece.key}). Measure this very model on the device, "
                "`keras_polar.latency_table(model).save(path)`, and pass that table."
            )
        constant, *slopes = coefficients(self.ops[piece.key])
        found = [Amount((), round(PICOSECONDS * constant))]
        for slope, terms in zip(slopes, piece.parts, strict=True):
            found += [_timed(t, slope) for t in terms]
        return found


def _timed(term: Amount, slope: float) -> Amount:
    return replace(term, amount=round(PICOSECONDS * slope * term.amount))


def _point(values: Sequence) -> tuple[float, ...]:
    if len(values) != SIZES + 1:
        raise ValueError(f"a row of {len(values)} numbers, expected {SIZES + 1}")
    *known, nanoseconds = values
    return (*map(int, known), float(nanoseconds))


def coefficients(points: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Nanoseconds: a constant, and for each of the sizes of a piece.

    Least squares with no coefficient below zero: what is closed never costs time.
    """
    known = np.array(points, float)
    sizes = np.column_stack([np.ones(len(known)), known[:, :-1]])
    scale = np.maximum(sizes[0], 1)
    weights = np.where(np.arange(len(known)) == 0, _FULL, 1.0)
    found = _non_negative(sizes / scale * weights[:, None], known[:, -1] * weights)
    return tuple((found / scale).tolist())


def _non_negative(matrix: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Non-negative least squares of a few columns: the best of all sets of columns."""
    best, error = np.zeros(matrix.shape[1]), np.inf
    for used in itertools.product((False, True), repeat=matrix.shape[1]):
        found = np.zeros(len(used))
        found[list(used)] = np.linalg.lstsq(matrix[:, used], times, rcond=None)[0]
        off = float(np.sum((matrix @ found - times) ** 2))
        if (found >= 0).all() and off < error:
            best, error = found, off
    return best
