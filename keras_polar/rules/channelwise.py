"""Layers that treat every channel alone (pooling, padding, BatchNormalization) or in groups."""

from typing import Any

import numpy as np
from keras import layers

from keras_polar.graph import op_class
from keras_polar.rules.base import Kept, Rule, Site, add
from keras_polar.rules.linear import channel_axis, spread
from keras_polar.units import Ids, varies


class SpatialRule(Rule):
    """Moves or pools positions within each channel: global pooling, padding, resizing."""

    def flow(self, site: Site) -> list[Ids]:
        axis = channel_axis(site.op)
        vector = site.follow("channels", axis)
        # Global pooling without keepdims leaves (batch, channels).
        return [spread(site, vector, axis if len(site.output_shapes[0]) > 2 else -1)]


class BatchNormRule(Rule):
    """One scale, offset, mean and variance per channel."""

    def flow(self, site: Site) -> list[Ids]:
        site.follow("channels", site.op.axis if isinstance(site.op.axis, int) else site.op.axis[0])
        return [site.inputs[0]]

    def weights(self, op: Any) -> dict[str, tuple]:
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        return dict.fromkeys(names, ("channels",))


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


class LayerNormRule(Rule):
    """Mean and variance run over the units of its axes: they stay. Other axes are free."""

    def flow(self, site: Site) -> list[Ids]:
        (ids, *_), axis = site.inputs, site.op.axis
        for i in [axis] if isinstance(axis, int) else axis:
            if varies(ids, i):
                site.pin(ids, "normalises over the units")
        return [ids]


class ReduceRule(Rule):
    """`ops.mean` and the like: over axes without units they act channel by channel.

    A sum over the units reads them (a closed one adds zero); a mean or maximum over them would
    change when one is cut, so that they stay.
    """

    def flow(self, site: Site) -> list[Ids]:
        (ids,) = site.inputs
        axes = _axes(site.op.axis, ids.ndim)
        if 0 in axes:
            return site.pin_all("reduces over the batch")
        for axis in axes:
            if varies(ids, axis):
                self._over_units(site, axis)
        index = tuple(slice(0, 1) if i in axes else slice(None) for i in range(ids.ndim))
        reduced = ids[index] if not self._whole(site, axes) else np.full_like(ids[index], -1)
        return [np.broadcast_to(reduced.reshape(_dropped(reduced, axes, site)), _out(site))]

    def _whole(self, site: Site, axes: set) -> bool:
        return any(varies(site.inputs[0], a) for a in axes)

    def _over_units(self, site: Site, axis: int) -> None:
        site.pin(site.inputs[0], "reduces over the units")


class SumRule(ReduceRule):
    """A sum over the units reads them: a closed one adds zero."""

    def _over_units(self, site: Site, axis: int) -> None:
        site.read("in", axis)


def _axes(axis: Any, ndim: int) -> set:
    axes = range(ndim) if axis is None else [axis] if isinstance(axis, int) else axis
    return {a % ndim for a in axes}


def _dropped(ids: Ids, axes: set, site: Site) -> tuple:
    return tuple(n for i, n in enumerate(ids.shape) if site.op.keepdims or i not in axes)


def _out(site: Site) -> tuple:
    return site.output_shapes[0]


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
    layers.UnitNormalization,
)
add(ReduceRule(), *map(op_class, ("Mean", "Max", "Min", "Var", "Std", "Prod", "Amax", "Amin")))
add(SumRule(), op_class("Sum"))
