"""What several rule files ask of operations and ids."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_polar.rules.call_site import CallSite
from keras_polar.rules.ids import Ids, broadcast_along, drop_constant_axes, varies


def axes_of(axis: Any, ndim: int) -> set:
    """The axes that an argument names (None: all), counted from 0."""
    axes = range(ndim) if axis is None else [axis] if isinstance(axis, int) else axis
    return {a % ndim for a in axes}


def units_on(ids: Ids) -> list[int]:
    """For every axis its size if there are units on it, else 0."""
    return [n if varies(ids, a) else 0 for a, n in enumerate(ids.shape)]


def kinds_on(ids: Ids, axis: int) -> int:
    """How many places on an axis have different units.

    A token put in front of others has units of its own: these are two kinds of places.
    """
    (own,) = drop_constant_axes(ids)
    return len(np.unique(np.moveaxis(own, axis, 0).reshape(own.shape[axis], -1), axis=0))


def widest(ids: Ids, axes: set) -> int | None:
    """Of these axes the one with most units; None if there are units on none of them."""
    number = units_on(ids)
    own = [a for a in sorted(axes) if number[a]]
    return max(own, key=number.__getitem__, default=None)


def channel_axis(op: Any) -> int:
    """Axis of the channels, by the operation's `data_format` (None: Keras' global setting)."""
    found = getattr(op, "data_format", "channels_last") or keras.config.image_data_format()
    return 1 if found == "channels_first" else -1


def in_float32(x: Any) -> Any:
    """Statistics are taken in float32 at least, as Keras does in its layers."""
    return ops.cast(x, keras.backend.result_type(x.dtype, "float32"))


def mean_of_open(gates: Any, axes: Iterable[int]) -> Callable[[Any], Any]:
    """The mean over these axes, kept, in which units count as much as their gates.

    It is exactly the mean if all are open.
    """

    def mean(x: Any) -> Any:
        share = ops.cast(gates, x.dtype)
        over = {"axis": tuple(axes), "keepdims": True}
        return ops.mean(x * share, **over) / ops.mean(share, **over)

    return mean


def spread(site: CallSite, vector: Ids, axis: int) -> Ids:
    """The first output's ids: `vector` along `axis`, constant along all other axes."""
    shape = site.output_shapes[0]
    return broadcast_along(vector, axis % len(shape), shape)


def with_adapters(op: Any, axes: dict[str, tuple]) -> dict[str, tuple]:
    """Axes of a layer's weights, the first of which may have adapters of low rank (LoRA).

    With them that attribute is a sum: the variable behind it, and the product of two factors.
    """
    if not getattr(op, "lora_enabled", False):
        return axes
    (name, names), *others = axes.items()
    factors = {f"lora_{name}_a": (*names[:-1], None), f"lora_{name}_b": (None, names[-1])}
    return {f"_{name}": names, **factors, **dict(others)}
