"""Weights that code uses itself (a layer scale, say): a home for them in a functional model.

A functional model has weights in layers only. What every sample is given (a token that stands for
the class, say), what is multiplied with every sample, or added, or the like, comes out of a table
instead that each sample reads whole: a stock Embedding.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, ops

from keras_polar.backends import to_numpy
from keras_polar.graph.keras_private import op_class
from keras_polar.graph.symbolic.merge import SPREADS
from keras_polar.graph.symbolic.record import (
    MADE_FOR,
    CannotTrace,
    OwnWeight,
    RecordedCall,
    named,
    steps_between,
    tensors_in,
    watch_from,
)

_ELEMENTWISE = tuple(
    map(op_class, "Add Subtract Multiply Divide TrueDivide Maximum Minimum Power".split())
)
_RESHAPES = tuple(map(op_class, "Reshape ExpandDims Squeeze".split()))
_MOVES = tuple(map(op_class, "Take GetItem Transpose Swapaxes Moveaxis".split()))


@dataclass(frozen=True, eq=False)
class Held:
    """A variable that a `call` gives to each sample, or uses element by element with each.

    Attributes:
        shape: of what each sample, or each part of one, is given.
        symbols: tensors of the calls that this stands for.
        parts: into which each sample is split along the batch (windows of an image, say).
    """

    weight: OwnWeight
    shape: tuple
    symbols: list[KerasTensor]
    parts: int = 1

    @property
    def variable(self) -> Any:
        return self.weight.variable

    @property
    def rows(self) -> np.ndarray:
        """Those of a table that each sample reads."""
        given = self.weight.rows
        return np.arange(math.prod(self.shape[:-1])) if given is None else given

    @property
    def key(self) -> tuple:
        """The same for all that are the same numbers."""
        return id(self.variable), self.rows.tobytes(), self.shape, self.weight.axis, self.parts

    @property
    def name(self) -> str:
        is_network = isinstance(self.weight.owner, keras.Model)
        return self.variable.name if is_network else self.weight.full_name


def held_by(
    weights: list[OwnWeight], steps: list[RecordedCall], outputs: list, batch: int
) -> tuple[list[Held], list[RecordedCall]]:
    """The variables that recorded calls use, and the calls that are left.

    Args:
        outputs: of all the calls.
        batch: the size that stands for the number of samples.

    Raises:
        CannotTrace: one is used in another way than element by element with every sample.
    """
    found: list[Held] = []
    weights, steps = _gathered(weights, steps, outputs)
    for w in weights:
        forms, left = _forms(w.symbol, steps)
        uses = {
            _per_sample(step, x, w.symbol, batch)
            for step in left
            for x in tensors_in((step.args, step.kwargs))
            if id(x) in forms
        }
        uses |= {_for_each(x, w.symbol, batch) for x in outputs if id(x) in forms}
        if len(uses) > 1 or None in uses:
            raise CannotTrace(
                f"uses its own variable {w.variable.path!r} directly, not just as a kernel, or "
                "element by element with every sample"
            )
        found += [Held(w, u[0], list(forms.values()), u[1]) for u in uses if u is not None]
        steps = left
    return found, steps


def _gathered(
    weights: list[OwnWeight], steps: list[RecordedCall], outputs: list
) -> tuple[list[OwnWeight], list[RecordedCall]]:
    """Rows of the tables whose entries are only read in another order, and the calls that are left.

    Which entries that are, the calls themselves say, of the numbers of all entries.
    """
    made: list[OwnWeight] = []
    for w in weights:
        numbers, left = _moved(w, steps)
        read = {id(x): x for s in left for x in tensors_in((s.args, s.kwargs)) if id(x) in numbers}
        found = [_rows(w, x, numbers[i]) for i, x in read.items()]
        rows = [r for r in found if r is not None]
        is_output = any(id(x) in numbers for x in outputs)
        if len(left) == len(steps) or len(rows) < len(found) or is_output:
            made.append(w)
        else:
            made, steps = made + rows, left
    return made, steps


def _moved(
    w: OwnWeight, steps: list[RecordedCall]
) -> tuple[dict[int, np.ndarray], list[RecordedCall]]:
    """The numbers of the entries in all tensors, by id, that move those of a table; other calls."""
    shape = w.symbol.shape
    is_table = w.rows is None and len(shape) == 2
    if not is_table or not any(isinstance(s.op, _MOVES) for s in steps):
        return {}, steps
    numbers, left = {id(w.symbol): np.arange(math.prod(shape), dtype="int32").reshape(shape)}, []
    for step in steps:
        first = id(step.args[0]) if step.args else None
        is_alone = len(tensors_in((step.args, step.kwargs))) == 1
        if isinstance(step.op, (*_RESHAPES, *_MOVES)) and is_alone and first in numbers:
            call: Any = step.op
            found = call(numbers[first], *step.args[1:], **step.kwargs)
            numbers[id(step.outputs[0])] = to_numpy(found)
        else:
            left.append(step)
    is_moved = any(isinstance(s.op, _MOVES) for s in steps if id(s.outputs[0]) in numbers)
    return (numbers, left) if is_moved else ({}, steps)


def _rows(weight: OwnWeight, symbol: KerasTensor, numbers: np.ndarray) -> OwnWeight | None:
    """The rows of a table that a tensor consists of, whole; None if it does not."""
    width = weight.symbol.shape[-1]
    for axis in reversed(range(numbers.ndim)):
        found = np.moveaxis(numbers, axis, -1)
        rows = found[..., 0] // width
        if np.array_equal(found, rows[..., None] * width + np.arange(width)):
            return replace(weight, symbol=symbol, rows=rows, axis=axis)
    return None


def _forms(symbol: KerasTensor, steps: list[RecordedCall]) -> tuple[dict, list[RecordedCall]]:
    """The tensors, by id, that have a weight's values and nothing else, and the other calls."""
    forms, left = {id(symbol): symbol}, []
    for step in steps:
        if isinstance(step.op, (*_RESHAPES, *SPREADS)) and id(step.args[0]) in forms:
            forms[id(step.outputs[0])] = step.outputs[0]
        else:
            left.append(step)
    return forms, left


def _per_sample(step: RecordedCall, x: Any, symbol: Any, batch: int) -> tuple | None:
    """The shape with which a form of a variable can stand beside parts of a sample; how many."""
    if (given := _for_each(x, symbol, batch)) is not None:
        return given
    others = [y for y in tensors_in((step.args, step.kwargs)) if y is not x]
    if not isinstance(step.op, _ELEMENTWISE) or len(others) != 1 or not others[0].shape:
        return None
    parts, rest = divmod(others[0].shape[0], batch)
    missing = len(others[0].shape) - len(x.shape)
    padded = (1,) * missing + tuple(x.shape)
    fits = parts and not rest and missing >= 0 and padded[0] == 1
    return (padded[1:] or (1,), parts) if fits else None


def _for_each(x: Any, symbol: Any, batch: int) -> tuple | None:
    """The same of a form that has been spread over the samples."""
    is_spread = math.prod(x.shape) == batch * math.prod(symbol.shape) and x.shape[0] == batch
    return (tuple(x.shape[1:]), 1) if is_spread else None


def table_of(held: Held) -> Any:
    """The layer that has the values of a variable."""
    variable, owner = held.variable, held.weight.owner
    if variable is getattr(owner, "embeddings", None) and held.weight.rows is not None:
        return owner
    *rows, width = held.shape if held.weight.rows is None else variable.shape
    table = keras.layers.Embedding(
        math.prod(rows),
        width,
        embeddings_regularizer=variable.regularizer,
        embeddings_constraint=variable.constraint,
        dtype=owner.dtype_policy,
        name=held.name,
    )
    table.build()
    table.embeddings.assign(ops.reshape(variable, table.embeddings.shape))
    table.embeddings.trainable = variable.trainable
    MADE_FOR[table] = (variable,)
    return table


def steps_to(held: Held, table: Any, sample: KerasTensor) -> tuple[list[RecordedCall], Any, Any]:
    """The calls that give each sample the values of a variable; from which tensor, and the result.

    Args:
        table: as `table_of` makes it.
        sample: some input of the layer or network.
    """
    x = keras.Input(batch_shape=sample.shape, dtype=sample.dtype)
    before = len(table._inbound_nodes)
    y = _in_place(table(_numbers(x, held)), held)
    if tuple(y.shape[1:]) != held.shape:
        y = keras.layers.Reshape(held.shape)(y)
    watch = watch_from(x)
    watch.operations.append(table)  # has its name
    steps = named(steps_between([y], [x], watch), watch)
    del table._inbound_nodes[before:]  # it may be the caller's
    return list(_finished(steps, table, held.name)), x, y


def _in_place(y: Any, held: Held) -> Any:
    """Rows one after the other, with these along the axis where they lie in the code."""
    axis, rank = held.weight.axis, held.rows.ndim
    if axis in (-1, rank):
        return y
    y = keras.layers.Reshape((*held.rows.shape, y.shape[-1]))(y)
    order = [*range(1, rank + 1)]
    return ops.transpose(y, (0, *order[:axis], rank + 1, *order[axis:]))


def _numbers(x: Any, held: Held) -> Any:
    """The same numbers of rows for each part of each sample."""
    if len(x.shape) > 1:
        x = ops.sum(x, axis=tuple(range(1, len(x.shape))))
    zero = ops.expand_dims(ops.cast(ops.zeros_like(x), "int32"), -1)
    if held.parts > 1:
        zero = ops.reshape(ops.add(zero, np.zeros((1, held.parts), "int32")), (-1, 1))
    return ops.add(zero, held.rows.reshape(1, -1).astype("int32"))


def _finished(steps: list[RecordedCall], table: Any, name: str) -> Iterable[RecordedCall]:
    for step in steps:
        if step.op is not table:
            step.op.name = f"{name}_{step.op.name}"
        shapes = [tuple(x.shape) for x in step.outputs]
        yield replace(step, path=step.op.name, shapes=shapes)
