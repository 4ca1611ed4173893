"""Layers that treat every channel alone (pooling, padding, BatchNormalization) or in groups."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_polar.backends import to_numpy
from keras_polar.graph.ir import Ref
from keras_polar.graph.keras_private import op_class
from keras_polar.rules.call_site import CallSite
from keras_polar.rules.common import (
    axes_of,
    channel_axis,
    in_float32,
    kinds_on,
    mean_of_open,
    spread,
    widest,
)
from keras_polar.rules.ids import Ids, broadcast_along, no_unit, varies
from keras_polar.rules.registry import add
from keras_polar.rules.rule import KeptUnits, Rule


class SpatialRule(Rule):
    """Moves or pools positions within each channel: global pooling, padding, resizing."""

    def __init__(self, rank: int | None = None) -> None:
        self.rank = rank  # operations on images also take one image, without a batch axis

    def flow(self, site: CallSite) -> list[Ids]:
        axis = channel_axis(site.op)
        if self.rank is not None and site.inputs[0].ndim != self.rank:
            return site.pin_all("is called without a batch axis")
        ids, *others = site.unmasked()
        if others:
            return site.pin_all("has arguments that are computed")
        # Global pooling without keepdims leaves (batch, channels).
        shape = site.output_shapes[0]
        out = axis if len(shape) > 2 else -1
        if len(shape) not in (2, ids.ndim) or shape[out] != ids.shape[axis]:
            return site.pin_all("Keras states a shape with other channels or axes for it")
        return [spread(site, site.follow("channels", axis), out)]


class BatchNormRule(Rule):
    """One scale, offset, mean and variance per channel, or per position."""

    fuses = True

    def flow(self, site: CallSite) -> list[Ids]:
        axis = site.op.axis if isinstance(site.op.axis, int) else site.op.axis[0]
        _follow_or_fix(site, axis)
        return [site.inputs[0]]

    def weights(self, op: Any) -> dict[str, tuple]:
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        return dict.fromkeys(names, ("channels",))


def _follow_or_fix(site: CallSite, axis: int) -> None:
    """The axis "channels"; all of it stays where the units are on other axes."""
    ids = site.unmasked()[0]
    if varies(ids, axis) or not any(varies(ids, i) for i in range(ids.ndim)):
        site.follow("channels", axis)
    else:
        site.set_axis("channels", no_unit((ids.shape[axis],)))


class GroupNormRule(Rule):
    """Whole groups go: fewer channels in a group would change its mean and variance."""

    def flow(self, site: CallSite) -> list[Ids]:
        axis = site.op.axis
        vector = site.follow("channels", axis)
        # groups == -1 is Keras' spelling of "one channel per group" (instance normalisation).
        groups = len(vector) if site.op.groups == -1 else site.op.groups
        by_group = vector.reshape(groups, -1)
        reason = f"a group of {site.name!r} contains fixed channels"
        site.units.tie(by_group, by_group[:, :1], reason)
        site.set_axis("group", by_group[:, 0])
        return [site.inputs[0]]

    def weights(self, op: Any) -> dict[str, tuple]:
        return {"gamma": ("channels",), "beta": ("channels",)}

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        return {"groups": kept.count(site.axes["group"])}


class AlongRule(Rule):
    """Mixes elements along some axes, whatever it does there: units on these stay.

    On all other axes every unit is treated alone: where units are on both (heads and their
    channels, say), those that are mixed go together.
    """

    def __init__(self, why: str, axes: Callable[[Any, int], Any]) -> None:
        self.why, self.axes = why, axes

    def flow(self, site: CallSite) -> list[Ids]:
        ids, *others = site.inputs
        axes = axes_of(self.axes(site.op, ids.ndim), ids.ndim)
        if 0 in axes or any(len(s) != ids.ndim for s in site.output_shapes):
            return site.pin_all("mixes samples or changes the number of axes")
        one = None if others else site.tie_along(ids, axes)
        if one is None:
            return site.pin_all(self.why)
        return [np.broadcast_to(one, shape) for shape in site.output_shapes]


class LayerNormRule(Rule):
    """Mean and variance run over the units of its axes: those that are open, in the gated model.

    Of units on its axes and on others those are free that leave more to choose from.
    """

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,) = site.inputs
        axes = {axis % ids.ndim: axis for axis in site.op.axis}
        if 0 in axes:
            return site.pin_all("normalises over the batch")
        axis = _freest(ids, set(axes))
        if axis is None:
            one = site.tie_along(ids, axes)
            return [ids if one is None else np.broadcast_to(one, ids.shape)]
        return [broadcast_along(site.average(str(axes[axis]), axes[axis]), axis, ids.shape)]

    def weights(self, op: Any) -> dict[str, tuple]:
        return dict.fromkeys(("gamma", "beta"), tuple(map(str, op.axis)))

    def over_open(self, op: Any, gates: Any, *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())
        y = _layer_norm(op, mean_of_open(gates, op.axis), x, op.gamma, op.beta)
        return ops.cast(y, op.compute_dtype)


class RMSNormRule(LayerNormRule):
    """The same with the mean square."""

    def weights(self, op: Any) -> dict[str, tuple]:
        return {"scale": tuple(map(str, op.axis))}

    def over_open(self, op: Any, gates: Any, *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())
        y = _rms_norm(op, mean_of_open(gates, op.axis), x, op.scale)
        return ops.cast(y, x.dtype)


class NormOpRule(Rule):
    """`ops.layer_normalization` and its like: scale and offset are cut with the units."""

    def __init__(self, normalised: Callable) -> None:
        self.normalised = normalised

    def flow(self, site: CallSite) -> list[Ids]:
        ids, *others = site.inputs
        axes = axes_of(site.op.axis, ids.ndim)
        axis = _freest(ids, axes)
        if 0 in axes or (others and axis is None) or (axis is not None and len(axes) > 1):
            return site.pin_all("normalises over the units and other axes, or over the batch")
        if axis is None:
            one = site.tie_along(ids, axes)
            return [ids if one is None else np.broadcast_to(one, ids.shape)]
        vector = site.average("units", axis)
        for other in others:
            site.units.tie(vector, other, f"scaled with fixed elements by {site.name!r}")
        return [broadcast_along(vector, axis, ids.shape)]

    def arguments(self, site: CallSite, kept: KeptUnits) -> tuple[tuple, dict]:
        return _cut_vectors(site, "units", kept)

    def over_open(self, op: Any, gates: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        mean = mean_of_open(gates, axes_of(op.axis, len(x.shape)))
        return ops.cast(self.normalised(op, mean, x, *args, **kwargs), x.dtype)


def _layer_norm(op: Any, mean: Callable, x: Any, gamma: Any = None, beta: Any = None) -> Any:
    x = in_float32(x)
    centred = x - mean(x)
    y = (x if op.rms_scaling else centred) / _root(op, mean(ops.square(centred)))
    return _scaled(op, y, gamma, beta)


def _rms_norm(op: Any, mean: Callable, x: Any, scale: Any = None) -> Any:
    x = in_float32(x)
    return _scaled(op, x / _root(op, mean(ops.square(x))), scale, None)


def _root(op: Any, square: Any) -> Any:
    epsilon = keras.backend.epsilon() if op.epsilon is None else op.epsilon
    return ops.sqrt(square + epsilon)


def _scaled(op: Any, y: Any, scale: Any, offset: Any) -> Any:
    """Times scale, plus offset, which have one size for each axis of the operation."""
    places = axes_of(op.axis, len(y.shape))
    shape = [n if i in places else 1 for i, n in enumerate(y.shape)]
    scale, offset = (
        x if x is None else ops.cast(ops.reshape(ops.convert_to_tensor(x), shape), y.dtype)
        for x in (scale, offset)
    )
    y = y if scale is None else y * scale
    return y if offset is None else y + offset


def _freest(ids: Ids, axes: set) -> int | None:
    """Of these axes the one with most units, None if there are more on one of the others."""
    axis, other = widest(ids, axes), widest(ids, {*range(ids.ndim)} - axes)
    if axis is None or other is None:
        return axis
    return axis if kinds_on(ids, axis) > kinds_on(ids, other) else None


class UnitNormRule(Rule):
    """Divides by a norm over its axes: closed units add zero to it, so that they can go."""

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,) = site.inputs
        axes = axes_of(site.op.axis, ids.ndim)
        if 0 in axes or getattr(site.op, "order", 2) <= 0:
            return site.pin_all("normalises over the batch, or by a norm to which zeros add")
        axis = widest(ids, axes)
        if axis is None:
            return [ids]
        return [broadcast_along(site.read("in", axis), axis, ids.shape)]


class BatchNormOpRule(Rule):
    """`ops.batch_normalization` with constant statistics, which are cut with the units."""

    fuses = True

    def flow(self, site: CallSite) -> list[Ids]:
        if len(site.inputs) > 1 or not isinstance(site.op.axis, int):
            return site.pin_all("has statistics that are computed")
        _follow_or_fix(site, site.op.axis)
        return [site.inputs[0]]

    def arguments(self, site: CallSite, kept: KeptUnits) -> tuple[tuple, dict]:
        """Statistics, scale and offset of the channels that stay."""
        return _cut_vectors(site, "channels", kept)


def _cut_vectors(site: CallSite, axis: str, kept: KeptUnits) -> tuple[tuple, dict]:
    """The call's arguments, constant vectors among them cut along with a named axis."""

    def cut(value: Any) -> Any:
        is_fixed = axis not in site.axes or value is None or isinstance(value, Ref)
        return value if is_fixed else to_numpy(value)[kept.where(site.axes[axis])]

    args = tuple(map(cut, site.call.args))
    return args, {k: cut(v) for k, v in site.call.kwargs.items()}


class BlockRule(Rule):
    """`ops.space_to_depth` and `ops.depth_to_space`: blocks of positions become channels.

    All copies of a channel go together, so that `block * block` times the channels remain.
    """

    def __init__(self, times: Callable[[Any], int], to_depth: bool) -> None:
        self.times, self.to_depth = times, to_depth

    def flow(self, site: CallSite) -> list[Ids]:
        axis = channel_axis(site.op)
        if site.inputs[0].ndim != 4:
            return site.pin_all("is called without a batch axis or on volumes")
        vector, times = site.follow("channels", axis), self.times(site.op)
        if self.to_depth:
            return [spread(site, np.tile(vector, times), axis)]
        blocks = vector.reshape(times, -1)
        site.units.tie(blocks, blocks[:1], f"a block of {site.name!r} contains fixed channels")
        return [spread(site, blocks[0], axis)]


class GluRule(Rule):
    """One half gates the other: the two halves go together."""

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,), axis = site.inputs, site.op.axis
        if axis % ids.ndim == 0 or not varies(ids, axis):
            shape = site.output_shapes[0]
            start = ids.take([0], axis)
            return (
                [np.broadcast_to(start, shape)]
                if axis % ids.ndim
                else site.pin_all("halves the samples")
            )
        vector = site.follow("in", axis)
        first, second = np.split(vector, 2)
        site.units.tie(first, second, f"halves of {site.name!r} are multiplied")
        return [spread(site, first, axis)]


class MaskingRule(Rule):
    """Masks positions whose features all have one value: features in front of it stay."""

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,) = site.inputs
        return site.pin_all("masks by the values of all units") if varies(ids, -1) else [ids]


def _area(size: Any) -> int:
    return size**2 if isinstance(size, int) else int(np.prod(size))


def _ranks(pattern: str, ranks: str = "1D 2D 3D") -> list[type]:
    return [getattr(layers, pattern.format(rank)) for rank in ranks.split()]


add(
    SpatialRule(),
    *_ranks("MaxPooling{}"),
    *_ranks("AveragePooling{}"),
    *_ranks("GlobalMaxPooling{}"),
    *_ranks("GlobalAveragePooling{}"),
    *_ranks("ZeroPadding{}"),
    *_ranks("Cropping{}"),
    *_ranks("UpSampling{}"),
)
add(BatchNormRule(), layers.BatchNormalization)
add(GroupNormRule(), layers.GroupNormalization)
add(LayerNormRule(), layers.LayerNormalization)
add(RMSNormRule(), layers.RMSNormalization)
add(NormOpRule(_layer_norm), op_class("LayerNorm"))
add(NormOpRule(_rms_norm), op_class("RMSNorm"))
add(UnitNormRule(), layers.UnitNormalization, op_class("Normalize"))
add(BatchNormOpRule(), op_class("BatchNorm"))
add(
    SpatialRule(),
    *_ranks("AdaptiveAveragePooling{}"),
    *_ranks("AdaptiveMaxPooling{}"),
    *map(op_class, "MaxPool AveragePool AdaptiveMaxPool AdaptiveAveragePool".split()),
)
add(
    SpatialRule(4),
    layers.Resizing,
    layers.CenterCrop,
    layers.RandomCrop,
    layers.RandomFlip,
    layers.RandomRotation,
    layers.RandomTranslation,
    layers.RandomZoom,
    *map(op_class, "Resize PadImages CropImages".split()),
)
add(MaskingRule(), layers.Masking)
add(BlockRule(lambda op: op.block_size**2, to_depth=True), op_class("SpaceToDepth"))
add(BlockRule(lambda op: op.block_size**2, to_depth=False), op_class("DepthToSpace"))
add(BlockRule(lambda op: _area(op.size), to_depth=True), op_class("ExtractPatches"))
add(GluRule(), op_class("Glu"))
add(
    AlongRule("orders or accumulates the units", lambda op, ndim: op.axis),
    *map(op_class, "Cumsum Cumprod Nancumsum Nancumprod Sort Argsort Argpartition Diff".split()),
)
add(AlongRule("compares the units", lambda op, ndim: -1), op_class("TopK"))
add(AlongRule("normalises over the units", lambda op, ndim: op.axis), op_class("Sparsemax"))
add(AlongRule("masks units by their place", lambda op, ndim: (-2, -1)), op_class("Tril"))
add(AlongRule("masks units by their place", lambda op, ndim: (-2, -1)), op_class("Triu"))
