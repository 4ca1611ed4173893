"""Sums, means, maxima and norms over axes of a tensor."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_polar.backends import to_numpy
from keras_polar.graph.ir import Ref
from keras_polar.graph.keras_private import op_class
from keras_polar.rules.call_site import CallSite
from keras_polar.rules.common import axes_of, in_float32, mean_of_open, units_on
from keras_polar.rules.ids import Ids, no_unit
from keras_polar.rules.registry import add
from keras_polar.rules.rule import Rule


class ReduceRule(Rule):
    """`ops.mean` and the like: over axes without units they act channel by channel.

    A sum over the units reads them (a closed one adds zero), a mean or maximum is taken over open
    ones; a product would change when one is cut, so that they stay. Of units on several axes those
    go together that are reduced to one element.
    """

    def flow(self, site: CallSite) -> list[Ids]:
        if len(site.inputs) > 1:
            return site.pin_all("has arguments that are computed")
        (ids,) = site.inputs
        axes = axes_of(_given_axes(site.op), ids.ndim)
        if 0 in axes:
            return site.pin_all("reduces over the batch")
        reduced = _reduced(ids.shape, axes, getattr(site.op, "keepdims", False))
        if any(len(shape) != len(reduced) for shape in site.output_shapes):
            return site.pin_all("units cannot be followed through it")
        one = None if self._reads(site, axes) else site.tie_along(ids, axes)
        if one is None:
            self._over_units(site, axes)
            return [no_unit(shape) for shape in site.output_shapes]
        return [np.broadcast_to(one.reshape(reduced), shape) for shape in site.output_shapes]

    def _reads(self, site: CallSite, axes: set) -> bool:
        """Whether to read the units on the reduced axes rather than let others pass."""
        return False

    def _over_units(self, site: CallSite, axes: set) -> None:
        site.pin(site.inputs[0], "reduces over the units")


def _reduced(shape: tuple, axes: set, keepdims: bool) -> list[int]:
    """The shape that is left of a reduction over some axes."""
    sizes = [1 if i in axes else n for i, n in enumerate(shape)]
    return sizes if keepdims else [n for i, n in enumerate(sizes) if i not in axes]


class ReduceSumRule(ReduceRule):
    """A sum over the units reads them: a closed one adds zero.

    Of units on several axes those are free that leave more to choose from.
    """

    def _reads(self, site: CallSite, axes: set) -> bool:
        number = units_on(site.inputs[0])
        own = max((n for a, n in enumerate(number) if a in axes), default=0)
        return own > max((n for a, n in enumerate(number) if a not in axes), default=0)

    def _over_units(self, site: CallSite, axes: set) -> None:
        site.read("in", max(axes, key=units_on(site.inputs[0]).__getitem__))


class OverOpenRule(ReduceSumRule):
    """What is taken of the units is, in the gated model, of those that are open."""

    def _over_units(self, site: CallSite, axes: set) -> None:
        site.average("in", max(axes, key=units_on(site.inputs[0]).__getitem__))


class StatisticsRule(OverOpenRule):
    """A mean or variance over the units."""

    def __init__(self, statistics: Callable[[Any, Any], Any]) -> None:
        self.statistics = statistics

    def over_open(self, op: Any, gates: Any, *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())
        axes = tuple(sorted(axes_of(_given_axes(op), len(x.shape))))
        found = self.statistics(mean_of_open(gates, axes), in_float32(x))

        def finished(y: Any) -> Any:
            y = y if op.keepdims else ops.squeeze(y, axes)
            return ops.cast(y, keras.backend.result_type(x.dtype, float))

        return tree.map_structure(finished, found)


def _variance(mean: Callable, x: Any) -> Any:
    return mean(ops.square(x - mean(x)))


class ExtremeRule(OverOpenRule):
    """A maximum or minimum over the units.

    Args:
        never: what no closed unit is ahead of.
    """

    def __init__(self, never: float) -> None:
        self.never = never

    def over_open(self, op: Any, gates: Any, *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())
        share = ops.cast(gates, x.dtype)
        return op(ops.where(share > 0, x * share, ops.full_like(x, self.never)))


class NormRule(ReduceSumRule):
    """`ops.norm`: as a sum if zeros add nothing to that norm."""

    def _reads(self, site: CallSite, axes: set) -> bool:
        return _ignores_zeros(site.op) and super()._reads(site, axes)

    def _over_units(self, site: CallSite, axes: set) -> None:
        if _ignores_zeros(site.op):
            super()._over_units(site, axes)
        else:
            site.pin(site.inputs[0], "takes a norm over the units to which zeros add")


def _ignores_zeros(op: Any) -> bool:
    return op.ord in (None, "fro", 1, 2, np.inf)


class AverageRule(ReduceRule):
    """`ops.average`, weighted or not: constant weights for one axis only."""

    def flow(self, site: CallSite) -> list[Ids]:
        weights = [*site.call.args[1:], *site.call.kwargs.values()]
        if any(w is not None and len(np.shape(to_numpy(w))) > 1 for w in weights if _constant(w)):
            return site.pin_all("has weights for every element")
        return super().flow(site)


def _constant(value: Any) -> bool:
    return not isinstance(value, Ref)


def _given_axes(op: Any) -> Any:
    return op.axes if hasattr(op, "axes") else op.axis


add(StatisticsRule(lambda mean, x: mean(x)), op_class("Mean"))
add(StatisticsRule(_variance), op_class("Var"))
add(StatisticsRule(lambda mean, x: ops.sqrt(_variance(mean, x))), op_class("Std"))
add(StatisticsRule(lambda mean, x: (mean(x), _variance(mean, x))), op_class("Moments"))
add(ExtremeRule(-np.inf), op_class("Max"), op_class("Amax"))
add(ExtremeRule(np.inf), op_class("Min"), op_class("Amin"))
add(
    ReduceRule(),
    *map(
        op_class,
        "Prod All Ptp Argmax Argmin Logsumexp Median Percentile "
        "Quantile Nanmax Nanmean Nanmedian Nanmin Nanpercentile Nanprod Nanquantile Nanstd Nanvar "
        "Nanargmax Nanargmin".split(),
    ),
)
add(AverageRule(), op_class("Average"))
add(ReduceSumRule(), op_class("Sum"), op_class("Nansum"), op_class("Any"), op_class("CountNonzero"))
add(NormRule(), op_class("Norm"))
