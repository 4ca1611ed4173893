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


@dataclass(frozen=True, eq=False)
class Held:
    """A variable that a `call` gives to each sample, or uses element by element with each.

    Attributes:
        shape: of what each sample is given.
        symbols: tensors of the calls that this stands for.
    """

    weight: OwnWeight
    shape: tuple
    symbols: list[KerasTensor]

    @property
    def variable(self) -> Any:
        return self.weight.variable

    @property
    def rows(self) -> np.ndarray:
        """Those of a table that each sample reads."""
        given = self.weight.rows
        return np.arange(math.prod(self.shape[:-1])) if given is None else given.reshape(-1)

    @property
    def name(self) -> str:
        is_network = isinstance(self.weight.owner, keras.Model)
        return self.variable.name if is_network else self.weight.full_name


def held_by(
    weights: list[OwnWeight], steps: list[RecordedCall], batch: int
) -> tuple[list[Held], list[RecordedCall]]:
    """The variables that recorded calls use, and the calls that are left.

    Args:
        batch: the size that stands for the number of samples.

    Raises:
        CannotTrace: one is used in another way than element by element with every sample.
    """
    found: list[Held] = []
    for w in weights:
        forms, left = _forms(w.symbol, steps)
        shapes = {
            _per_sample(step, x, w.symbol, batch)
            for step in left
            for x in tensors_in((step.args, step.kwargs))
            if id(x) in forms
        }
        if len(shapes) > 1 or None in shapes:
            raise CannotTrace(
                f"uses its own variable {w.variable.path!r} directly, not just as a kernel, or "
                "element by element with every sample"
            )
        found += [Held(w, shape, list(forms.values())) for shape in shapes if shape]
        steps = left
    return found, steps


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
    """The shape per sample with which a form of a variable can stand beside samples in a call."""
    if math.prod(x.shape) == batch * math.prod(symbol.shape) and x.shape[0] == batch:
        return tuple(x.shape[1:])
    others = [y for y in tensors_in((step.args, step.kwargs)) if y is not x]
    if not isinstance(step.op, _ELEMENTWISE) or len(others) != 1 or others[0].shape[:1] != (batch,):
        return None
    missing = len(others[0].shape) - len(x.shape)
    padded = (1,) * missing + tuple(x.shape)
    return padded[1:] or (1,) if missing >= 0 and padded[0] == 1 else None


def table_of(held: Held) -> Any:
    """The layer that has the values of a variable."""
    if held.weight.rows is not None:
        return held.weight.owner
    variable = held.variable
    *rows, width = held.shape
    table = keras.layers.Embedding(
        math.prod(rows),
        width,
        embeddings_regularizer=variable.regularizer,
        embeddings_constraint=variable.constraint,
        dtype=held.weight.owner.dtype_policy,
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
    y = table(_numbers(x, held.rows))
    if len(held.shape) != 2:
        y = keras.layers.Reshape(held.shape)(y)
    watch = watch_from(x)
    watch.operations.append(table)  # has its name
    steps = named(steps_between([y], [x], watch), watch)
    del table._inbound_nodes[before:]  # it may be the caller's
    return list(_finished(steps, table, held.name)), x, y


def _numbers(x: Any, rows: np.ndarray) -> Any:
    """The same numbers for each sample."""
    if len(x.shape) > 1:
        x = ops.sum(x, axis=tuple(range(1, len(x.shape))))
    zero = ops.expand_dims(ops.cast(ops.zeros_like(x), "int32"), -1)
    return ops.add(zero, rows.astype("int32")[None])


def _finished(steps: list[RecordedCall], table: Any, name: str) -> Iterable[RecordedCall]:
    for step in steps:
        if step.op is not table:
            step.op.name = f"{name}_{step.op.name}"
        shapes = [tuple(x.shape) for x in step.outputs]
        yield replace(step, path=step.op.name, shapes=shapes)
