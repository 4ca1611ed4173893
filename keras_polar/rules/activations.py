"""Activations, as layers and inside others: whether they might mix the units."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import KerasTensor, activations, layers, tree

from keras_polar.graph.symbolic.record import CannotTrace, RecordedCall, function_steps
from keras_polar.rules.call_site import CallSite
from keras_polar.rules.elementwise import ElementwiseRule, MergeRule, SumRule
from keras_polar.rules.ids import Ids
from keras_polar.rules.registry import add, find, rule_for

ELEMENTWISE_ACTIVATIONS = frozenset(
    getattr(activations, name)
    for name in (
        "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear "
        "log_sigmoid mish relu relu6 selu sigmoid silu soft_shrink softplus softsign sparse_plus "
        "sparse_sigmoid squareplus tanh tanh_shrink threshold"
    ).split()
)


class ActivationRule(ElementwiseRule):
    """Any function: element-wise, or it may mix the units."""

    def flow(self, site: CallSite) -> list[Ids]:
        why = why_mixing(site.op.activation)
        return site.pin_all(why) if why else super().flow(site)


def why_mixing(activation: Any) -> str:
    """Why the units before an activation (None, function or layer) stay; "" if they need not."""
    if activation is None or is_elementwise(activation):
        return ""
    name = getattr(activation, "__name__", type(activation).__name__)
    return f"activation {name!r} is not known to act element by element"


def is_elementwise(activation: Any) -> bool:
    """Whether an activation (function or layer) is known to act on each element alone."""
    if isinstance(activation, layers.Activation):
        return is_elementwise(activation.activation)
    if isinstance(activation, layers.Layer):
        return isinstance(find(type(activation)), ElementwiseRule)
    return activation in ELEMENTWISE_ACTIVATIONS or acts_elementwise(activation)


@functools.lru_cache(maxsize=256)
def acts_elementwise(function: Callable) -> bool:
    """Whether a function of one tensor consists of element-wise operations and scalars.

    The scalars have to be the same for any number of units.
    """
    try:
        runs = [function_steps(function, units) for units in (5, 7)]
    except CannotTrace:
        return False
    return _scalars(runs[0]) == _scalars(runs[1]) and all(map(_is_elementwise, runs[0]))


def _scalars(steps: list[RecordedCall]) -> list:
    flat = tree.flatten([(step.args, step.kwargs) for step in steps])
    return [x for x in flat if isinstance(x, (int, float))]


def _is_elementwise(step: RecordedCall) -> bool:
    rule, flat = rule_for(step.op), tree.flatten((step.args, step.kwargs))
    constants = [x for x in flat if hasattr(x, "shape") and not isinstance(x, KerasTensor)]
    if type(rule) in (MergeRule, SumRule):
        return all(np.size(x) == 1 for x in constants)
    return type(rule) is ElementwiseRule and not constants


add(ActivationRule(), layers.Activation)


def activated(site: CallSite, ids: Ids) -> list[Ids]:
    """The ids after the layer's own activation; pinned if that might mix channels."""
    why = why_mixing(getattr(site.op, "activation", None))
    if why:
        site.pin(ids, why)
    return [ids]
