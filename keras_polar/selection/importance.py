"""How much each unit of a network matters, by weights or by gradients: one score per unit.

Scores of weights are taken from a coupled graph: every layer that makes units, or has weights of
its own for units that pass through (BatchNormalization, a depthwise convolution), says something
about them. What the layers of a group say is scaled to a mean of 1 per layer and added up.

Scores of gradients are taken from arrays of shape (samples, units): what the loss of each sample
would change by if the unit's gate, 1, were a little larger.

All functions return one float array of shape (units,) per group; the larger, the more a unit
matters.

Example::

    coupling = analyze(model)
    scores = l1_norm(coupling)
    scores = fisher(gate_gradients(model, coupling, loss, x, y))
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_polar.backends import to_numpy
from keras_polar.coupling.coupling import Coupling
from keras_polar.graph.clone import variable_at
from keras_polar.rules import CallSite
from keras_polar.rules.ids import Ids
from keras_polar.selection.budget import TINY, Budget

STATISTICS = ("moving_mean", "moving_variance")  # of activations: no weights of the unit


@dataclass(frozen=True, eq=False)
class Part:
    """Weights that a layer has for each of its units.

    Attributes:
        layer: the layer that makes the units; of a layer that passes them on, the one before it,
            as long as units come from one layer.
        op: the layer that has the weights.
        variable: their name, as in `Rule.weights`.
        ids: of the units, int32 of shape (units of the layer,).
        rows: the weights, one row per unit.
        is_kernel: whether they belong to more than the unit: to what it reads as well.
    """

    layer: str
    op: Any
    variable: str
    ids: Ids
    rows: np.ndarray
    is_kernel: bool


def parts_of(coupling: Coupling) -> Iterator[Part]:
    """All weights that belong to units, but not those by which others read them."""
    makers: dict[int, str] = {}  # tensor -> the layer that makes what is in it
    known = set()
    for site in coupling.sites:
        layer = _maker(site, makers)
        makers.update(dict.fromkeys(site.call.outputs, layer))
        if id(site.op) not in known:  # a shared layer has its weights once
            yield from _parts(site, layer)
        known.add(id(site.op))


def _maker(site: CallSite, makers: dict[int, str]) -> str:
    passes_on = len(site.call.inputs) == 1 and not site.produces
    return makers.get(site.call.inputs[0], site.name) if passes_on else site.name


def _parts(site: CallSite, layer: str) -> Iterator[Part]:
    reads = site.reads or site.inner_reads or site.produces
    unit_axes = set(site.produces if reads else site.axes)
    for name, axes in site.rule.weights(site.op).items():
        variable = variable_at(site.op, name)
        if variable is None or name in STATISTICS or name.startswith("lora_"):
            continue
        name = name.lstrip("_")  # what is computed with, adapters of low rank included
        values = to_numpy(variable_at(site.op, name))
        for axis in (i for i, axis in enumerate(axes) if axis in unit_axes):
            rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
            yield Part(layer, site.op, name, site.axes[axes[axis]], rows, values.ndim > 1)


def at_random(coupling: Coupling, seed: int | np.random.Generator = 0) -> list[np.ndarray]:
    """Scores drawn by lot: the control of all others."""
    rng = np.random.default_rng(seed)
    return [rng.random(group.units) for group in coupling.groups]


def l1_norm(coupling: Coupling) -> list[np.ndarray]:
    """The L1 norm of the kernel that makes the unit (Li et al., 2017)."""
    makers = {name for site in coupling.sites if site.produces for name in [site.name]}

    def norm(part: Part) -> np.ndarray | None:
        is_maker = part.is_kernel and part.op.name in makers
        return np.abs(part.rows).sum(axis=1) if is_maker else None

    return _scores(coupling, norm)


def group_norm(coupling: Coupling) -> list[np.ndarray]:
    """The norm of all that has to be zero for the unit to be zero (Chen et al., OTO, 2021)."""
    return _scores(coupling, lambda part: np.square(part.rows).sum(axis=1), np.sqrt)


def batch_norm_scale(coupling: Coupling) -> list[np.ndarray]:
    """The scale of the unit in BatchNormalization (Liu et al., 2017).

    Raises:
        ValueError: units of a group pass no BatchNormalization.
    """

    def scale(part: Part) -> np.ndarray | None:
        return np.abs(part.rows[:, 0]) if _is_scale(part) else None

    return _of_batch_norm(coupling, scale)


def density(coupling: Coupling) -> list[np.ndarray]:
    """How often a ReLU after BatchNormalization lets the unit through (Foldy-Porto et al., 2020).

    After normalisation a unit is about normal with mean beta and deviation |gamma|.

    Raises:
        ValueError: units of a group pass no BatchNormalization.
    """

    def share(part: Part) -> np.ndarray | None:
        if not _is_scale(part):
            return None
        offset = np.zeros(len(part.rows)) if part.op.beta is None else to_numpy(part.op.beta)
        ratio = offset / np.maximum(np.abs(part.rows[:, 0]), TINY)
        return 1 / (1 + np.exp(-1.702 * ratio))  # the logistic approximation of the integral

    return _of_batch_norm(coupling, share)


def _is_scale(part: Part) -> bool:
    return type(part.op) is keras.layers.BatchNormalization and part.variable == "gamma"


def _of_batch_norm(coupling: Coupling, measure: Callable) -> list[np.ndarray]:
    scores = _scores(coupling, measure)
    for group, of_group in zip(coupling.groups, scores, strict=True):
        if not of_group.any():
            raise ValueError(
                f"Units of group {group.name!r} (layers {', '.join(group.layers)}) pass no "
                "BatchNormalization with a scale, so that there is none to judge them by. Use a "
                "criterion of kernels or gradients: l1_norm, group_norm, taylor or fisher."
            )
    return scores


def _scores(
    coupling: Coupling, measure: Callable, finish: Callable = lambda x: x
) -> list[np.ndarray]:
    """Sums of what `measure` says of parts, per layer and unit; layers weigh alike.

    Args:
        measure: Part -> one number per row, or None to leave it out.
        finish: from the sums of a layer to its scores.
    """
    layers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for part in parts_of(coupling):
        values = measure(part)
        if values is not None:
            size = len(coupling.roots)
            total, is_there = layers.setdefault(part.layer, (np.zeros(size), np.zeros(size, bool)))
            roots, is_unit = coupling.roots[np.maximum(part.ids, 0)], part.ids >= 0
            np.add.at(total, roots[is_unit], values[is_unit])
            is_there[roots[is_unit]] = True
    scores = np.zeros(len(coupling.roots))
    for total, is_there in layers.values():
        of_layer = finish(total[is_there])
        scores[is_there] += of_layer / max(of_layer.mean(), TINY)
    return [scores[group.roots] for group in coupling.groups]


def taylor(gradients: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Absolute gate gradients, summed over samples (Molchanov et al., 2017)."""
    return [np.abs(g).sum(axis=0) for g in gradients]


def fisher(gradients: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Squared gate gradients, summed over samples (Theis et al., 2018; Liu et al., 2021)."""
    return [np.square(g).sum(axis=0) for g in gradients]


def per_cost(scores: Sequence[np.ndarray], budget: Budget) -> list[np.ndarray]:
    """Scores over what one unit of the group saves: what groups can be compared by."""
    return [s / max(cost, TINY) for s, cost in zip(scores, budget.unit_costs, strict=True)]


class Importance:
    """What ranks the units when the gates settle, instead of the gates.

    A subclass says in `scores` how much each unit matters.

    Attributes:
        name: as in saved models. One that is loaded needs the object again:
            `gated.consensus.criterion = <the object>`.
        is_free: whether units of different groups are compared with one another; otherwise every
            group gives the same share, the units with its lowest scores.
        is_per_cost: whether they are compared by their scores over what one unit of the group
            saves, in the measure that `apply` was given.

    Example:

        >>> class LargestWeight(keras_polar.Importance):
        ...     name = "largest_weight"
        ...     def scores(self, coupling):
        ...         return [rank(group) for group in coupling.groups]
        >>> gated = keras_polar.apply(model, 0.5, importance=LargestWeight())
    """

    name = "importance"
    is_free = False
    is_per_cost = False

    def scores(self, coupling: Coupling) -> list[np.ndarray]:
        """How much each unit matters.

        Args:
            coupling: of the network without gates, with the weights of now: its `groups`, and in
                `sites` the layers.

        Returns:
            One float array of shape (units,) per group.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected an importance with a method `scores(coupling)` that "
            "gives one float array of shape (units,) for each of `coupling.groups`."
        )


class Criterion(Importance):
    """An importance that is a function of the coupled network alone."""

    def __init__(self, function: Callable, is_free: bool = False) -> None:
        self.name, self.function, self.is_free = function.__name__, function, is_free

    def scores(self, coupling: Coupling) -> list[np.ndarray]:
        return self.function(coupling)


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion(l1_norm),
        Criterion(batch_norm_scale),
        Criterion(group_norm, is_free=True),
        Criterion(at_random),
    )
}
