"""Weights that a network holds itself (a layer scale, say): a home for them in a functional model.

A functional model has weights in layers only. What is multiplied with every sample, or added, or
the like, comes out of a table instead that each sample reads whole: a stock Embedding.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, ops

from keras_polar.graph.keras_private import op_class
from keras_polar.graph.symbolic.record import (
    CannotTrace,
    RecordedCall,
    named,
    steps_between,
    tensors_in,
    watch_from,
)

_ELEMENTWISE = tuple(
    map(op_class, "Add Subtract Multiply Divide TrueDivide Maximum Minimum Power".split())
)


@dataclass(frozen=True, eq=False)
class Held:
    """A variable that a network's `call` uses itself.

    Attributes:
        variable: the network's.
        symbol: the tensor that stands for it in the calls.
        shape: of what each sample is given instead.
        policy: the network's, by which the variable is cast.
    """

    variable: Any
    symbol: KerasTensor
    shape: tuple
    policy: Any


def held_by(op: Any, symbols: dict, steps: list[RecordedCall], batch: int) -> list[Held]:
    """The variables that the recorded calls of a network use.

    Args:
        symbols: attribute of the network -> what stands for its variable.
        batch: the size that stands for the number of samples.

    Raises:
        CannotTrace: one is used in another way than element by element with every sample.
    """
    found = []
    for name, symbol in symbols.items():
        variable = getattr(op, name)
        readers = [s for s in steps if any(x is symbol for x in tensors_in((s.args, s.kwargs)))]
        shapes = {_beside(step, symbol, batch) for step in readers}
        if len(shapes) > 1 or None in shapes:
            raise CannotTrace(
                f"uses its own variable {variable.path!r} directly, not just element by element "
                "with every sample"
            )
        found += [Held(variable, symbol, shape, op.dtype_policy) for shape in shapes if shape]
    return found


def _beside(step: RecordedCall, symbol: Any, batch: int) -> tuple | None:
    """The shape per sample with which a variable can stand beside samples in a call."""
    others = [x for x in tensors_in((step.args, step.kwargs)) if x is not symbol]
    if not isinstance(step.op, _ELEMENTWISE) or len(others) != 1 or others[0].shape[:1] != (batch,):
        return None
    missing = len(others[0].shape) - len(symbol.shape)
    padded = (1,) * missing + tuple(symbol.shape)
    return padded[1:] or (1,) if missing >= 0 and padded[0] == 1 else None


def steps_to(held: Held, sample: KerasTensor) -> tuple[list[RecordedCall], Any, Any]:
    """The calls that give each sample the values of a variable; from which tensor, and the result.

    Args:
        sample: some input of the network.
    """
    x = keras.Input(batch_shape=sample.shape, dtype=sample.dtype)
    *rows, width = held.shape
    variable, count = held.variable, math.prod(rows)
    table = keras.layers.Embedding(
        count,
        width,
        embeddings_regularizer=variable.regularizer,
        embeddings_constraint=variable.constraint,
        dtype=held.policy,
    )
    y = table(_numbers(x, count))
    if len(rows) != 1:
        y = keras.layers.Reshape(held.shape)(y)
    table.embeddings.assign(ops.reshape(variable, (count, width)))
    table.embeddings.trainable = variable.trainable
    watch = watch_from(x)
    steps = named(steps_between([y], [x], watch), watch)
    return list(_finished(steps, table, variable.name)), x, y


def _numbers(x: Any, count: int) -> Any:
    """0 to `count - 1` for each sample."""
    if len(x.shape) > 1:
        x = ops.sum(x, axis=tuple(range(1, len(x.shape))))
    zero = ops.expand_dims(ops.cast(ops.zeros_like(x), "int32"), -1)
    return ops.add(zero, np.arange(count, dtype="int32")[None])


def _finished(steps: list[RecordedCall], table: Any, name: str) -> Iterable[RecordedCall]:
    for step in steps:
        step.op.name = name if step.op is table else f"{name}_{step.op.name}"
        shapes = [tuple(x.shape) for x in step.outputs]
        yield replace(step, path=step.op.name, shapes=shapes)
