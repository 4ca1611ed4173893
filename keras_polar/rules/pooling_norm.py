"""Layers that treat every channel alone (pooling, padding, BatchNormalization) or in groups."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import layers

from keras_polar.backends import to_numpy
from keras_polar.graph.ir import Ref
from keras_polar.graph.keras_private import op_class
from keras_polar.rules.dense_conv import channel_axis, spread
from keras_polar.rules.ids import Ids, along, nobody, varies
from keras_polar.rules.rule import Kept, Rule, Site, add


class SpatialRule(Rule):
    """Moves or pools positions within each channel: global pooling, padding, resizing."""

    def __init__(self, rank: int | None = None) -> None:
        self.rank = rank  # operations on images also take one image, without a batch axis

    def flow(self, site: Site) -> list[Ids]:
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

    def flow(self, site: Site) -> list[Ids]:
        axis = site.op.axis if isinstance(site.op.axis, int) else site.op.axis[0]
        _follow_or_fix(site, axis)
        return [site.inputs[0]]

    def weights(self, op: Any) -> dict[str, tuple]:
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        return dict.fromkeys(names, ("channels",))


def _follow_or_fix(site: Site, axis: int) -> None:
    """The axis "channels"; all of it stays where the units are on other axes."""
    ids = site.unmasked()[0]
    if varies(ids, axis) or not any(varies(ids, i) for i in range(ids.ndim)):
        site.follow("channels", axis)
    else:
        site.set_axis("channels", nobody((ids.shape[axis],)))


class GroupNormRule(Rule):
    """Whole groups go: fewer channels in a group would change its mean and variance."""

    def flow(self, site: Site) -> list[Ids]:
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

    def config(self, site: Site, kept: Kept) -> dict[str, Any]:
        return {"groups": kept.count(site.axes["group"])}


class AlongRule(Rule):
    """Mixes elements along some axes, whatever it does there: units on these stay.

    On all other axes every unit is treated alone: where units are on both (heads and their
    channels, say), those that are mixed go together.
    """

    def __init__(self, why: str, axes: Callable[[Any, int], Any]) -> None:
        self.why, self.axes = why, axes

    def flow(self, site: Site) -> list[Ids]:
        ids, *others = site.inputs
        axes = _axes(self.axes(site.op, ids.ndim), ids.ndim)
        if 0 in axes or any(len(s) != ids.ndim for s in site.output_shapes):
            return site.pin_all("mixes samples or changes the number of axes")
        one = None if others else site.tie_along(ids, axes)
        if one is None:
            return site.pin_all(self.why)
        return [np.broadcast_to(one, shape) for shape in site.output_shapes]


class LayerNormRule(AlongRule):
    """Mean and variance run over the units of its axes: they stay. Other axes are free."""

    def __init__(self) -> None:
        super().__init__("normalises over the units", lambda op, ndim: op.axis)


class UnitNormRule(Rule):
    """Divides by a norm over its axes: closed units add zero to it, so that they can go."""

    def flow(self, site: Site) -> list[Ids]:
        (ids,) = site.inputs
        axes = _axes(site.op.axis, ids.ndim)
        if 0 in axes or getattr(site.op, "order", 2) <= 0:
            return site.pin_all("normalises over the batch, or by a norm to which zeros add")
        axis = _widest(ids, axes)
        if axis is None:
            return [ids]
        return [along(site.read("in", axis), axis, ids.shape)]


class BatchNormOpRule(Rule):
    """`ops.batch_normalization` with constant statistics, which are cut with the units."""

    fuses = True

    def flow(self, site: Site) -> list[Ids]:
        if len(site.inputs) > 1 or not isinstance(site.op.axis, int):
            return site.pin_all("has statistics that are computed")
        _follow_or_fix(site, site.op.axis)
        return [site.inputs[0]]

    def arguments(self, site: Site, kept: Kept) -> tuple[tuple, dict]:
        """Statistics, scale and offset of the channels that stay."""
        if "channels" not in site.axes:
            return super().arguments(site, kept)

        def cut(value: Any) -> Any:
            is_fixed = value is None or isinstance(value, Ref)
            return value if is_fixed else to_numpy(value)[kept.where(site.axes["channels"])]

        args = tuple(map(cut, site.call.args))
        return args, {k: cut(v) for k, v in site.call.kwargs.items()}


class BlockRule(Rule):
    """`ops.space_to_depth` and `ops.depth_to_space`: blocks of positions become channels.

    All copies of a channel go together, so that `block * block` times the channels remain.
    """

    def __init__(self, times: Callable[[Any], int], to_depth: bool) -> None:
        self.times, self.to_depth = times, to_depth

    def flow(self, site: Site) -> list[Ids]:
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

    def flow(self, site: Site) -> list[Ids]:
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

    def flow(self, site: Site) -> list[Ids]:
        (ids,) = site.inputs
        return site.pin_all("masks by the values of all units") if varies(ids, -1) else [ids]


class ReduceRule(Rule):
    """`ops.mean` and the like: over axes without units they act channel by channel.

    A sum over the units reads them (a closed one adds zero); a mean or maximum over them would
    change when one is cut, so that they stay. Of units on several axes those go together that
    are reduced to one element.
    """

    def flow(self, site: Site) -> list[Ids]:
        if len(site.inputs) > 1:
            return site.pin_all("has arguments that are computed")
        (ids,) = site.inputs
        axes = _axes(_given_axes(site.op), ids.ndim)
        if 0 in axes:
            return site.pin_all("reduces over the batch")
        left = [n for i, n in enumerate(ids.shape) if i not in axes]
        keepdims = getattr(site.op, "keepdims", False)
        if any(len(s) != (ids.ndim if keepdims else len(left)) for s in site.output_shapes):
            return site.pin_all("units cannot be followed through it")
        one = None if self._reads(site, axes) else site.tie_along(ids, axes)
        if one is None:
            self._over_units(site, axes)
            return [nobody(shape) for shape in site.output_shapes]
        reduced = one if keepdims else one.reshape(left)
        return [np.broadcast_to(reduced, shape) for shape in site.output_shapes]

    def _reads(self, site: Site, axes: set) -> bool:
        """Whether to read the units on the reduced axes rather than let others pass."""
        return False

    def _over_units(self, site: Site, axes: set) -> None:
        site.pin(site.inputs[0], "reduces over the units")


class SumRule(ReduceRule):
    """A sum over the units reads them: a closed one adds zero.

    Of units on several axes those are free that leave more to choose from.
    """

    def _reads(self, site: Site, axes: set) -> bool:
        number = _units_on(site.inputs[0])
        return max(number[a] for a in axes) > max(n for a, n in enumerate(number) if a not in axes)

    def _over_units(self, site: Site, axes: set) -> None:
        site.read("in", max(axes, key=_units_on(site.inputs[0]).__getitem__))


class NormRule(SumRule):
    """`ops.norm`: as a sum if zeros add nothing to that norm."""

    def _reads(self, site: Site, axes: set) -> bool:
        return _ignores_zeros(site.op) and super()._reads(site, axes)

    def _over_units(self, site: Site, axes: set) -> None:
        if _ignores_zeros(site.op):
            super()._over_units(site, axes)
        else:
            site.pin(site.inputs[0], "takes a norm over the units to which zeros add")


def _ignores_zeros(op: Any) -> bool:
    return op.ord in (None, "fro", 1, 2, np.inf)


class AverageRule(ReduceRule):
    """`ops.average`, weighted or not: constant weights for one axis only."""

    def flow(self, site: Site) -> list[Ids]:
        weights = [*site.call.args[1:], *site.call.kwargs.values()]
        if any(w is not None and len(np.shape(to_numpy(w))) > 1 for w in weights if _constant(w)):
            return site.pin_all("has weights for every element")
        return super().flow(site)


def _constant(value: Any) -> bool:
    return not isinstance(value, Ref)


def _given_axes(op: Any) -> Any:
    return op.axes if hasattr(op, "axes") else op.axis


def _axes(axis: Any, ndim: int) -> set:
    axes = range(ndim) if axis is None else [axis] if isinstance(axis, int) else axis
    return {a % ndim for a in axes}


def _units_on(ids: Ids) -> list[int]:
    """For every axis its size if there are units on it, else 0."""
    return [n if varies(ids, a) else 0 for a, n in enumerate(ids.shape)]


def _widest(ids: Ids, axes: set) -> int | None:
    """Of these axes the one with most units; None if there are units on none of them."""
    number = _units_on(ids)
    own = [a for a in sorted(axes) if number[a]]
    return max(own, key=number.__getitem__, default=None)


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
add(
    LayerNormRule(),
    layers.LayerNormalization,
    layers.RMSNormalization,
    op_class("LayerNorm"),
    op_class("RMSNorm"),
)
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
    ReduceRule(),
    *map(
        op_class,
        "Mean Max Min Var Std Prod Amax Amin All Ptp Argmax Argmin Logsumexp Median Percentile "
        "Quantile Nanmax Nanmean Nanmedian Nanmin Nanpercentile Nanprod Nanquantile Nanstd Nanvar "
        "Nanargmax Nanargmin Moments".split(),
    ),
)
add(AverageRule(), op_class("Average"))
add(SumRule(), op_class("Sum"), op_class("Nansum"), op_class("Any"), op_class("CountNonzero"))
add(NormRule(), op_class("Norm"))
add(
    AlongRule("orders or accumulates the units", lambda op, ndim: op.axis),
    *map(op_class, "Cumsum Cumprod Nancumsum Nancumprod Sort Argsort Argpartition Diff".split()),
)
add(AlongRule("compares the units", lambda op, ndim: -1), op_class("TopK"))
add(AlongRule("normalises over the units", lambda op, ndim: op.axis), op_class("Sparsemax"))
add(AlongRule("masks units by their place", lambda op, ndim: (-2, -1)), op_class("Tril"))
add(AlongRule("masks units by their place", lambda op, ndim: (-2, -1)), op_class("Triu"))
