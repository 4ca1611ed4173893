"""Products of two tensors summed over common axes: `ops.matmul`, `ops.einsum`, attention by hand.

Every axis of the two operands has a label, as in an Einstein sum. Units on an axis that is summed
over belong to both operands: they are tied and read. Units on any other axis pass through.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import layers

from keras_polar.backends import to_numpy
from keras_polar.graph.ir import Ref
from keras_polar.graph.keras_private import op_class
from keras_polar.rules.call_site import CallSite
from keras_polar.rules.ids import Ids, broadcast_along, no_unit, varies
from keras_polar.rules.registry import add
from keras_polar.rules.rule import CostTerm, KeptUnits, Rule

Labels = tuple[tuple, ...]  # one tuple of labels per operand, then one for the result


@dataclass(frozen=True, eq=False)
class Operand:
    """One factor: its labels and sizes; a constant has no ids."""

    labels: tuple
    shape: tuple
    ids: Ids | None
    tensor: int

    @property
    def varying(self) -> dict[Any, int]:
        """Label -> axis, for the axes that units are on."""
        if self.ids is None:
            return {}
        return {n: i for i, n in enumerate(self.labels) if varies(self.ids, i)}


class ContractionRule(Rule):
    """`labels(op, ranks)` names the axes of the operands and of the result.

    Of an operand with units on several axes (heads and their channels) one axis is chosen, the
    one with more units that the other operand can follow; units that differ along the others go
    together. Constants are cut with the units they meet.
    """

    def __init__(self, labels: Callable[[Any, list[int]], Labels]) -> None:
        self.labels = labels

    def flow(self, site: CallSite) -> list[Ids]:
        try:
            operands, out = self._operands(site)
        except ValueError as error:
            return site.pin_all(str(error))
        out_label = None
        for operand, label in zip(operands, _choices(operands, out), strict=True):
            if label is None and operand.ids is not None:
                site.pin(operand.ids, "meets fixed elements or other units")
            elif label is not None:
                vector = self._take(site, operand, label, label in out)
                out_label = label if label in out else out_label
                site.units.tie(site.axes["units"], vector, f"meets fixed elements in {site.name!r}")
        shape = site.output_shapes[0]
        if out_label is None or len(shape) != len(out):
            return [no_unit(shape)]
        return [broadcast_along(site.axes["units"], out.index(out_label), shape)]

    def _take(self, site: CallSite, operand: Operand, label: Any, passes: bool) -> Ids:
        take = site.follow if passes else site.read
        return take("units", operand.labels.index(label), operand.tensor)

    def _operands(self, site: CallSite) -> tuple[list[Operand], tuple]:
        operands, out = self._labelled(site)
        _check(operands, out)
        return operands, out

    def _labelled(self, site: CallSite) -> tuple[list[Operand], tuple]:
        given: Any = site.call.args
        given = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
        values = [x if isinstance(x, Ref) else to_numpy(x) for x in given]
        shapes = [site.specs[x.index].shape if isinstance(x, Ref) else x.shape for x in values]
        *names, out = self.labels(site.op, [len(s) for s in shapes])
        operands, tensor = [], 0
        for value, shape, own in zip(values, shapes, names, strict=True):
            is_tensor = isinstance(value, Ref)
            ids = site.inputs[tensor] if is_tensor else None
            operands.append(Operand(own, tuple(shape), ids, tensor))
            tensor += is_tensor
        return operands, out

    def arguments(self, site: CallSite, kept: KeptUnits) -> tuple[tuple, dict]:
        """Constants that meet units are cut with them."""
        try:
            operands, out = self._operands(site)
        except ValueError:
            return super().arguments(site, kept)
        chosen = {label for label in _choices(operands, out) if label is not None}
        args = list(site.call.args)
        for i, operand in enumerate(operands):
            for axis, label in enumerate(operand.labels):
                # A constant of size 1 is broadcast along the units.
                if operand.ids is None and label in chosen and operand.shape[axis] > 1:
                    args[i] = np.take(to_numpy(args[i]), kept.where(site.axes["units"]), axis)
        return tuple(args), site.call.kwargs

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        try:
            operands, out = self._labelled(site)
        except ValueError:
            return None
        if len(operands) > 2:  # in which order they are multiplied is the backend's choice
            return None
        chosen = {label for label in _choices(operands, out) if label is not None}
        size: dict = {}
        for operand in operands:
            for label, n in zip(operand.labels, operand.shape, strict=True):
                size[label] = max(size.get(label, 1), n or 1)
        # The first axis is the batch, unless its size is known and that of another is not.
        batch = out[:1] if site.output_shapes[0][:1] == (1,) else ()
        fixed = math.prod(n for label, n in size.items() if label not in {*chosen, *batch})
        return [CostTerm((site.axes["units"],) if chosen else (), macs=fixed)]


def _check(operands: list[Operand], out: tuple) -> None:
    for operand in operands:
        if len(set(operand.labels)) < len(operand.labels):
            raise ValueError("takes a diagonal")
        if operand.ids is not None and operand.labels[:1] != out[:1]:
            raise ValueError("mixes samples")
    if len(operands) > 2:
        raise ValueError("multiplies more than two tensors at once")


def _choices(operands: list[Operand], out: tuple) -> list:
    """For every operand the label whose units can go, or None; all the same label."""
    size = _sizes(operands)
    legal = [n for n in size if all(_can_follow(x, n, out) for x in operands)]
    # A label that more operands have comes first: those who lack it would have to be pinned.
    order = {n: (sum(n in x.varying for x in operands), size[n], str(n)) for n in legal}
    best = max(legal, key=order.__getitem__, default=None)
    return [best if best in operand.varying else None for operand in operands]


def _sizes(operands: list[Operand]) -> dict:
    """Label -> the most units that an operand has on it, for labels with units."""
    found: dict = {}
    for operand in operands:
        for label, axis in operand.varying.items():
            found[label] = max(found.get(label, 0), operand.ids.shape[axis])  # type: ignore[union-attr]
    return found


def _can_follow(operand: Operand, label: Any, out: tuple) -> bool:
    """Whether units on the axes of this label may go, as far as this operand is concerned."""
    if label not in operand.labels or operand.ids is None or label in operand.varying:
        return True
    return label in out and operand.shape[operand.labels.index(label)] == 1


# --- the labels of each operation ------------------------------------------------------------


def _matmul(op: Any, ranks: list[int]) -> Labels:
    batch = tuple(range(max(ranks) - 2))
    first, second = ((*batch[len(batch) - max(r - 2, 0) :],) for r in ranks)
    left = (*first, "i", "k") if ranks[0] > 1 else ("k",)
    right = (*second, "k", "j") if ranks[1] > 1 else ("k",)
    out = (*batch, *(n for n in ("i", "j") if n in (*left, *right)))
    return left, right, out


def _dot(op: Any, ranks: list[int]) -> Labels:
    left = (*_names("a", ranks[0] - 1), "k")
    free = _names("b", ranks[1] - 1)
    right = (*free[:-1], "k", *free[-1:])
    return left, right, (*left[:-1], *free)


def _inner(op: Any, ranks: list[int]) -> Labels:
    left, right = _names("a", ranks[0] - 1), _names("b", ranks[1] - 1)
    return (*left, "k"), (*right, "k"), (*left, *right)


def _tensordot(op: Any, ranks: list[int]) -> Labels:
    axes = op.axes
    if isinstance(axes, int):
        axes = range(ranks[0] - axes, ranks[0]), range(axes)
    first, second = ([x] if isinstance(x, int) else list(x) for x in axes)
    left, right = list(_names("a", ranks[0])), list(_names("b", ranks[1]))
    for n, (i, j) in enumerate(zip(first, second, strict=True)):
        left[i] = right[j] = f"k{n}"
    common = set(left) & set(right)
    return tuple(left), tuple(right), tuple(x for x in left + right if x not in common)


def _names(prefix: str, n: int) -> tuple:
    return tuple(f"{prefix}{i}" for i in range(n))


def _einsum(op: Any, ranks: list[int]) -> Labels:
    given, arrow, out = op.subscripts.replace(" ", "").partition("->")
    terms = given.split(",")
    if len(terms) != len(ranks):
        raise ValueError("has another number of operands than subscripts")
    hidden = max(r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True))
    dots = _names(".", hidden)
    expanded = [_expanded(t, r, dots) for t, r in zip(terms, ranks, strict=True)]
    if not arrow:  # Keras and its backends do not agree about what that means
        raise ValueError("has subscripts without '->'")
    return (*expanded, _expanded(out, len(out.replace("...", "")) + hidden, dots))


def _expanded(term: str, rank: int, dots: tuple) -> tuple:
    """The letters of a term, with one name per axis that its ellipsis stands for."""
    before, found, after = term.partition("...")
    wide = rank - len(before) - len(after) if found else 0
    return (*before, *dots[len(dots) - wide :], *after)


def _dot_layer(op: Any, ranks: list[int]) -> Labels:
    axes = [op.axes, op.axes] if isinstance(op.axes, int) else op.axes
    left, right = ["batch", *_names("a", ranks[0] - 1)], ["batch", *_names("b", ranks[1] - 1)]
    left[axes[0]] = right[axes[1]] = "k"
    free = [x for x in left[1:] + right[1:] if x != "k"]
    return tuple(left), tuple(right), ("batch", *free)


def _may_have_heads(site: CallSite) -> bool:
    """Whether a bias or mask of an attention may have an axis of heads."""
    others = (*site.call.args[3:], *site.call.kwargs.values())
    return len(site.inputs) > 3 or any(np.ndim(getattr(x, "shape", ())) for x in others)


class DotProductAttentionRule(Rule):
    """`ops.dot_product_attention` of (batch, positions, heads, channels) tensors.

    Either whole heads go, or the same channels of query, key and value out of every head,
    whichever leaves more to choose from. (The operation promises a result of the query's shape:
    value has as many channels as query and key.)
    """

    def flow(self, site: CallSite) -> list[Ids]:
        axis = self._axis(site)
        for ids in site.inputs[3:]:
            site.pin(ids, "is a bias or mask of attention")
        if axis is None:
            return site.pin_all("query, key and value do not have their units on the same axis")
        take = site.read if axis == 3 else site.follow
        first, *others = [take(name, axis, i) for i, name in enumerate(("query", "key", "value"))]
        for vector in others:
            site.units.tie(first, vector, f"meets fixed elements in {site.name!r}")
        return [broadcast_along(first, axis, site.output_shapes[0])]

    def _axis(self, site: CallSite) -> int | None:
        inputs = site.inputs[:3]
        are_tensors = [isinstance(x, Ref) for x in site.call.args[:3]] == [True] * 3
        if not are_tensors or len({x.shape[2:] for x in inputs}) > 1:
            return None
        may_go = (3,) if _may_have_heads(site) else (2, 3)
        axes = [a for a in may_go if all(varies(x, a) for x in inputs)]
        return max(axes, key=lambda a: inputs[0].shape[a], default=None)

    def arguments(self, site: CallSite, kept: KeptUnits) -> tuple[tuple, dict]:
        """The scale stays that of the full width."""
        args, kwargs = list(site.call.args), dict(site.call.kwargs)
        scale = args[5] if len(args) > 5 else kwargs.get("scale")
        if scale is None:
            width = site.inputs[0].shape[3]
            args, kwargs = args[:5], {**kwargs, "scale": 1 / math.sqrt(width)}
        return tuple(args), kwargs

    def macs(self, site: CallSite) -> list[CostTerm]:
        query, key = (site.specs[i].shape for i in site.call.inputs[:2])
        positions = 2 * (query[1] or 1) * (key[1] or 1)
        axis = self._axis(site)
        if axis is None:
            return [CostTerm((), macs=positions * math.prod(n or 1 for n in query[2:]))]
        return [CostTerm((site.axes["query"],), macs=positions * (query[5 - axis] or 1))]


add(ContractionRule(_matmul), op_class("Matmul"))
add(ContractionRule(_dot), op_class("Dot"))
add(ContractionRule(_inner), op_class("Inner"))
add(ContractionRule(_tensordot), op_class("Tensordot"))
add(ContractionRule(_einsum), op_class("Einsum"))
add(ContractionRule(_dot_layer), layers.Dot)
add(DotProductAttentionRule(), op_class("DotProductAttention"))
