"""Operations that only move elements: on ids they are the same operation in NumPy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import layers, tree

from keras_polar.backends import to_numpy
from keras_polar.graph.ir import Ref
from keras_polar.graph.keras_private import op_class
from keras_polar.rules.call_site import CallSite, ids_along, sizes
from keras_polar.rules.ids import Ids, varies
from keras_polar.rules.registry import add
from keras_polar.rules.rule import KeptUnits, Rule


class MoveRule(Rule):
    """`move(op, ids)` moves ids as the operation moves elements, batch axis included."""

    def __init__(self, move: Callable[[Any, Ids], Ids]) -> None:
        self.move = move

    def flow(self, site: CallSite) -> list[Ids]:
        if len(site.inputs) > 1:
            return site.pin_all("has arguments that are computed")
        try:
            moved, shape = self.move(site.op, site.inputs[0]), site.output_shapes[0]
            if moved.ndim == len(shape):
                return [np.broadcast_to(moved, shape)]
        except (ValueError, TypeError):  # a reshape of sizes that are not known, say
            pass
        return site.pin_all("units cannot be followed through it")

    def keeps_batch(self, site: CallSite) -> bool:
        samples = np.arange(7)
        try:
            moved = self.move(site.op, samples.reshape(7, *(1,) * (site.inputs[0].ndim - 1)))
        except ValueError:
            return False
        return len(moved) == 7 and bool((samples == moved.reshape(7, -1).T).all())


class ReshapeRule(MoveRule):
    """Also Reshape of ops and BroadcastTo: `attribute` holds sizes, which shrink with the units."""

    def __init__(self, move: Callable, attribute: str, first: int) -> None:
        super().__init__(move)
        self.attribute, self.first = attribute, first

    def flow(self, site: CallSite) -> list[Ids]:
        if _unknown_after_units(site):
            return site.pin_all("an axis of unknown size follows the units")
        return super().flow(site)

    def rows(self, site: CallSite, before: list[int]) -> int:
        """No element is lost: what leaves the other axes goes to the first."""
        shapes = [site.specs[i].shape for i in (*site.call.inputs[:1], *site.call.outputs)]
        if self.first or self.attribute != "newshape" or any(None in s[1:] for s in shapes):
            return super().rows(site, before)
        elements = [math.prod(sizes(s)) for s in shapes]
        return before[0] * elements[0] // elements[-1]

    def keeps_batch(self, site: CallSite) -> bool:
        if self.first:
            return True
        before = site.specs[site.call.inputs[0]].shape[1:]
        after = site.specs[site.call.outputs[0]].shape[1:]
        is_known = None not in before and None not in after
        return is_known and math.prod(before) == math.prod(after)

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        target, ids = getattr(site.op, self.attribute), site.outputs[0]
        new = [
            kept.size(ids, i + self.first) if i + self.first and n not in (-1, None) else n
            for i, n in enumerate(target)
        ]
        return {self.attribute: tuple(new)}


class FlattenRule(MoveRule):
    """Positions and units on one axis."""

    def flow(self, site: CallSite) -> list[Ids]:
        if _unknown_after_units(site):
            return site.pin_all("an axis of unknown size follows the units")
        return super().flow(site)


def _unknown_after_units(site: CallSite) -> bool:
    """Whether the place of units in memory depends on a size that is not known."""
    if not site.inputs:
        return False
    ids, shape = site.inputs[0], site.specs[site.call.inputs[0]].shape
    on = [i for i in range(ids.ndim) if varies(ids, i)]
    return bool(on) and None in shape[max(1, on[0]) :]


class SqueezeRule(MoveRule):
    """Names its axes, for an axis on which one unit is left must not vanish with the others."""

    def __init__(self) -> None:
        super().__init__(lambda op, ids: ids)

    def flow(self, site: CallSite) -> list[Ids]:
        axes = self._axes(site)
        (ids,) = site.inputs
        if 0 in axes:
            return site.pin_all("removes the batch axis")
        return [ids[tuple(0 if i in axes else slice(None) for i in range(ids.ndim))]]

    def _axes(self, site: CallSite) -> tuple:
        axis, shape = site.op.axis, site.specs[site.call.inputs[0]].shape
        if axis is None:
            return tuple(i for i, n in enumerate(shape) if n == 1)
        return tuple(a % len(shape) for a in ([axis] if isinstance(axis, int) else axis))

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        return {"axis": self._axes(site)}


class ConcatRule(Rule):
    """Units of all inputs side by side."""

    def __init__(self, axis: Callable[[Any], int | None] = lambda op: op.axis) -> None:
        self.axis = axis

    def flow(self, site: CallSite) -> list[Ids]:
        axis, shape = self.axis(site.op), site.output_shapes[0]
        if len(site.inputs) < len(tree.flatten(site.call.args)):
            return site.pin_all("has constants next to tensors")
        if axis is None or any(x.ndim != len(shape) for x in site.inputs):
            return site.pin_all("makes a new axis or flattens")
        if axis % len(shape) == 0:
            return site.pin_all("concatenates samples")
        return [concatenate(site.inputs, axis, shape)]

    def rows(self, site: CallSite, before: list[int]) -> int:
        is_first = self.axis(site.op) in (0, -len(site.output_shapes[0]))
        return sum(before) if is_first else super().rows(site, before)


class StackRule(Rule):
    """Units of all inputs along a new axis."""

    def flow(self, site: CallSite) -> list[Ids]:
        shape = site.output_shapes[0]
        axis = site.op.axis % len(shape)
        if shape[axis] != len(site.inputs) or len(site.inputs) < len(tree.flatten(site.call.args)):
            return site.pin_all("stacks along the batch axis, or constants")
        return [concatenate([np.expand_dims(x, axis) for x in site.inputs], axis, shape)]

    def keeps_batch(self, site: CallSite) -> bool:
        return site.op.axis % len(site.output_shapes[0]) != 0


def concatenate(arrays: list[Ids], axis: int, shape: tuple) -> Ids:
    """`np.concatenate` that leaves axes on which nothing varies as views."""
    axis %= len(shape)
    keep = tuple(
        slice(None) if i == axis or any(varies(a, i) for a in arrays) else slice(0, 1)
        for i in range(len(shape))
    )
    return np.broadcast_to(np.concatenate([a[keep] for a in arrays], axis), shape)


class PadRule(Rule):
    """`ops.pad`: what is padded with zeros belongs to no unit."""

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,), op = site.inputs, site.op
        widths = self._widths(site)
        units = {i for i in range(ids.ndim) if varies(ids, i)}
        if op.mode != "constant" and any(widths[i].any() for i in units):
            return site.pin_all("pads the units themselves")
        keep = tuple(slice(None) if i in units else slice(0, 1) for i in range(ids.ndim))
        needed = [tuple(widths[i]) if i in units else (0, 0) for i in range(ids.ndim)]
        padded = np.pad(ids[keep], needed, constant_values=-1)
        return [np.broadcast_to(padded, site.output_shapes[0])]

    def keeps_batch(self, site: CallSite) -> bool:
        return not self._widths(site)[0].any()

    def _widths(self, site: CallSite) -> np.ndarray:
        """Zeros before and after, for every axis."""
        return np.broadcast_to(np.asarray(site.op.pad_width), (site.inputs[0].ndim, 2))


class RollRule(Rule):
    """Moves positions in a circle; units themselves would be moved by a fixed number: pinned."""

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,), axes = site.inputs, site.op.axis
        axes = range(ids.ndim) if axes is None else [axes] if isinstance(axes, int) else axes
        return site.pin_all("shifts units") if any(varies(ids, a) for a in axes) else [ids]

    def keeps_batch(self, site: CallSite) -> bool:
        axes = site.op.axis
        return axes is not None and 0 not in ([axes] if isinstance(axes, int) else axes)


class SplitRule(Rule):
    """`ops.split`: the places of the cuts move with the units."""

    def __init__(self, axis: Callable = lambda op: op.axis, movable: bool = True) -> None:
        self.axis, self.movable = axis, movable

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,) = site.inputs
        axis = self.axis(site.op) % ids.ndim
        if axis == 0 or (varies(ids, axis) and not self.movable):
            return site.pin_all("splits the batch, or units into parts of a fixed size")
        if not varies(ids, axis):
            one = ids.take([0], axis)
            return [np.broadcast_to(one, shape) for shape in site.output_shapes]
        sizes = [shape[axis] for shape in site.output_shapes]
        parts = np.split(ids, np.cumsum(sizes)[:-1].tolist(), axis)
        for i, part in enumerate(parts):
            site.set_axis(f"part{i}", ids_along(part, axis))  # so that none vanishes
        return parts

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        axis = self.axis(site.op)
        if axis % site.inputs[0].ndim == 0 or not varies(site.inputs[0], axis):
            return {}
        ends = np.cumsum([kept.size(part, axis) for part in site.outputs])
        return {"indices_or_sections": ends[:-1].tolist()}


class UnstackRule(Rule):
    """One tensor per position of an axis.

    Units that differ in more than that axis (queries, keys and values, all heads of each, that one
    layer makes) go together along it; others stay.
    """

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,) = site.inputs
        axis = site.op.axis % ids.ndim
        is_batch = axis == 0 and not varies(ids, axis)
        one = None if is_batch else site.tie_along(ids, [axis])
        if one is None:
            return site.pin_all("makes one tensor per unit or sample")
        return [one.take(0, axis) for _ in site.output_shapes]


class TakeRule(Rule):
    """`ops.take` along one axis: constant indices of units are renumbered when units go.

    Along an axis without units (samples, the nodes of a graph) indices may be computed as well.
    """

    def flow(self, site: CallSite) -> list[Ids]:
        given = self._given(site)
        if not isinstance(site.call.args[0], Ref) or site.op.axis is None:
            return site.pin_all("takes from all samples, or by indices that are computed")
        ids, axis = site.inputs[0], site.op.axis % site.inputs[0].ndim
        site.pin_argument(given, "is used as indices")
        if not varies(ids, axis):
            return [self._from_fixed(site, ids, axis, len(site.shape_of(given)))]
        if isinstance(given, Ref) or axis == 0:
            return site.pin_all("takes from all samples, or by indices that are computed")
        index = self._index(site)
        if index.ndim != 1:
            return site.pin_all("picks single units")
        taken = np.take(ids, index % ids.shape[axis], axis)
        site.set_axis("taken", ids_along(taken, axis))  # so that not all of them vanish
        return [taken]

    def _given(self, site: CallSite) -> Any:
        given = site.call.kwargs.get("indices", (*site.call.args, None)[1])
        return given if isinstance(given, Ref) else to_numpy(given)

    def _index(self, site: CallSite) -> np.ndarray:
        return self._given(site).astype(int)

    def _from_fixed(self, site: CallSite, ids: Ids, axis: int, ndim: int) -> Ids:
        """What each row has is the same for all; indices of so many axes pick rows."""
        first = ids.take(np.zeros((1,) * ndim, int), axis)
        return np.broadcast_to(first, site.output_shapes[0])

    def keeps_batch(self, site: CallSite) -> bool:
        # Indices with a batch of their own pick from every sample.
        return isinstance(site.op.axis, int) and site.op.axis % site.inputs[0].ndim > 0

    def arguments(self, site: CallSite, kept: KeptUnits) -> tuple[tuple, dict]:
        """Indices of what stays, counted among what stays."""
        if "taken" not in site.axes:
            return super().arguments(site, kept)
        ids, axis = site.inputs[0], site.op.axis
        index = self._index(site) % ids.shape[axis]
        index = index[kept.where(site.outputs[0], axis)]
        return (site.call.args[0], np.searchsorted(kept.where(ids, axis), index)), {}


class TakeAlongAxisRule(Rule):
    """Each sample's own places on an axis without units, if they are the same for all units."""

    def flow(self, site: CallSite) -> list[Ids]:
        given = (*site.call.args, *site.call.kwargs.values())
        if not all(isinstance(x, Ref) for x in given) or site.op.axis is None:
            return site.pin_all("writes or reads at computed places")
        (ids, indices), axis = site.inputs, site.op.axis % site.inputs[0].ndim
        site.pin(indices, "is used as indices")
        on = [i for i in range(ids.ndim) if varies(ids, i)]
        if axis in on or any(site.shape_of(given[1])[i] != 1 for i in on):
            return site.pin_all("writes or reads at computed places")
        return [np.broadcast_to(ids.take([0], axis), site.output_shapes[0])]


class SegmentRule(Rule):
    """`ops.segment_sum` and the like: rows along the first axis are combined, unit by unit."""

    def flow(self, site: CallSite) -> list[Ids]:
        given = (*site.call.args, *site.call.kwargs.values())
        if not isinstance(given[0], Ref) or len(site.shape_of(given[1])) != 1:
            return site.pin_all("combines constants, or segments of several axes")
        site.pin_argument(given[1], "is used as numbers of segments")
        ids = site.inputs[0]
        if varies(ids, 0):
            return site.pin_all("combines units")
        return [np.broadcast_to(ids[:1], site.output_shapes[0])]

    def keeps_batch(self, site: CallSite) -> bool:
        return False


class GetItemRule(Rule):
    """`x[key]`: slices of units with step 1 are moved with the cut, single units stay.

    Units at one place of an axis go together with those at the others, as in `UnstackRule`.
    """

    def flow(self, site: CallSite) -> list[Ids]:
        (ids,), key = site.inputs, _full_key(self._key(site), site.inputs[0].ndim)
        if key is None:
            return site.pin_all("is indexed with something other than integers and slices")
        for axis, part in _consumed(key):
            if part != slice(None) and varies(ids, axis):
                self._part(site, ids, axis, part)
        out = ids[tuple(_on_unknown(p, ids, a) for p, a in zip(key, _axes_of(key), strict=True))]
        return [np.broadcast_to(out, site.output_shapes[0])]

    def keeps_batch(self, site: CallSite) -> bool:
        key = _full_key(self._key(site), site.inputs[0].ndim)
        return key is not None and key[0] == slice(None)

    def _key(self, site: CallSite) -> Any:
        return site.call.kwargs.get("key", (*site.call.args, None)[1])

    def _part(self, site: CallSite, ids: Ids, axis: int, part: Any) -> None:
        if isinstance(part, slice) and part.step in (None, 1):
            index = (slice(None),) * axis + (part,)
            site.set_axis(f"slice{axis}", ids_along(ids[index], axis))
        elif isinstance(part, slice) or site.tie_along(ids, [axis]) is None:
            site.pin(ids, "picks single units")

    def arguments(self, site: CallSite, kept: KeptUnits) -> tuple[tuple, dict]:
        ids = site.inputs[0]
        key = _full_key(self._key(site), ids.ndim)
        if key is None:
            return super().arguments(site, kept)
        new = tuple(_moved(p, ids, a, kept) for p, a in zip(key, _axes_of(key), strict=True))
        return (site.call.args[0], new), {}


def _full_key(key: Any, ndim: int) -> tuple | None:
    """The key with one entry per axis (and None for new ones); None if it is not basic."""
    key = tuple(key) if isinstance(key, (tuple, list)) else (key,)
    if not all(k is None or k is Ellipsis or isinstance(k, (int, slice)) for k in key):
        return None
    given = sum(k is not None and k is not Ellipsis for k in key)
    at = key.index(Ellipsis) if Ellipsis in key else len(key)
    return (*key[:at], *(slice(None),) * (ndim - given), *key[at + 1 :])


def _axes_of(key: tuple) -> list[int | None]:
    """The axis of the input that each entry of a full key is about."""
    axes, axis = [], 0
    for part in key:
        axes.append(None if part is None else axis)
        axis += part is not None
    return axes


def _consumed(key: tuple) -> list[tuple[int, Any]]:
    return [(a, p) for a, p in zip(_axes_of(key), key, strict=True) if a is not None]


def _on_unknown(part: Any, ids: Ids, axis: int | None) -> Any:
    """Axes without units, whose size may stand for another, are taken at their start."""
    if axis is None or varies(ids, axis):
        return part
    return 0 if isinstance(part, int) else slice(0, 1)


def _moved(part: Any, ids: Ids, axis: int | None, kept: KeptUnits) -> Any:
    if axis is None or part == slice(None) or not varies(ids, axis):
        return part
    if isinstance(part, int):  # a single unit, which stays: only its place has moved
        return int(np.searchsorted(kept.where(ids, axis), part % ids.shape[axis]))
    start, stop, _ = part.indices(ids.shape[axis])
    return slice(*np.searchsorted(kept.where(ids, axis), [start, stop]).tolist())


def _reshape(op: Any, ids: Ids) -> Ids:
    first, *rest = op.newshape
    if first not in (-1, None) or -1 in rest or len(rest) == 0:
        return ids.reshape(op.newshape)
    # The batch axis may take up positions or give some away: rows and samples are whole multiples.
    row, sample = math.prod(rest), math.prod(ids.shape)
    if row % sample == 0:
        ids = np.broadcast_to(ids, (row // sample, *ids.shape[1:]))
    folded = ids.reshape(-1, *rest)
    if len(folded) > 1 and varies(folded, 0) and (folded != folded[:1]).any():
        raise ValueError("units become samples")
    return folded[:1]


def _flatten(op: Any, ids: Ids) -> Ids:
    if getattr(op, "data_format", None) == "channels_first":
        ids = np.moveaxis(ids, 1, -1)
    return ids.reshape(len(ids), -1)


def _tile(op: Any, ids: Ids) -> Ids:
    repeats = (op.repeats,) if isinstance(op.repeats, int) else tuple(op.repeats)
    return np.tile(ids, (1,) * (ids.ndim - len(repeats)) + repeats)


def _repeat(op: Any, ids: Ids) -> Ids:
    if op.axis is None or not isinstance(op.repeats, int):
        raise ValueError("only a constant number of repeats along one axis moves whole units")
    return np.repeat(ids, op.repeats, op.axis)


add(FlattenRule(_flatten), layers.Flatten)
add(MoveRule(lambda op, x: x.transpose(0, *op.dims)), layers.Permute)
add(MoveRule(lambda op, x: x[:, None]), layers.RepeatVector)
add(MoveRule(lambda op, x: x.transpose(op.axes)), op_class("Transpose"))
add(MoveRule(lambda op, x: np.swapaxes(x, op.axis1, op.axis2)), op_class("Swapaxes"))
add(MoveRule(lambda op, x: np.moveaxis(x, op.source, op.destination)), op_class("Moveaxis"))
add(MoveRule(lambda op, x: np.expand_dims(x, op.axis)), op_class("ExpandDims"))
add(SqueezeRule(), op_class("Squeeze"))
add(MoveRule(lambda op, x: np.rot90(x, op.k, op.axes)), op_class("Rot90"))
add(MoveRule(lambda op, x: np.flip(x, 1)), op_class("Fliplr"))
add(MoveRule(lambda op, x: np.flip(x, 0)), op_class("Flipud"))
add(MoveRule(lambda op, x: np.flip(x, op.axis)), op_class("Flip"))
add(MoveRule(_tile), op_class("Tile"))
add(MoveRule(_repeat), op_class("Repeat"))
add(ReshapeRule(lambda op, x: x.reshape(1, *op.target_shape), "target_shape", 1), layers.Reshape)
add(ReshapeRule(_reshape, "newshape", 0), op_class("Reshape"))
add(
    ReshapeRule(lambda op, x: x.reshape((1,) * (len(op.shape) - x.ndim) + x.shape), "shape", 0),
    op_class("BroadcastTo"),
)
add(ConcatRule(), layers.Concatenate, op_class("Concatenate"), op_class("Append"))
add(ConcatRule(lambda op: 1), op_class("Hstack"))
add(ConcatRule(lambda op: 2), op_class("Dstack"))
add(StackRule(), op_class("Stack"))
add(PadRule(), op_class("Pad"))
add(RollRule(), op_class("Roll"))
add(SplitRule(), op_class("Split"))
add(SplitRule(movable=False), op_class("ArraySplit"))
add(SplitRule(lambda op: 1), op_class("Hsplit"))
add(SplitRule(lambda op: 2), op_class("Dsplit"))
add(UnstackRule(), op_class("Unstack"))
add(TakeRule(), op_class("Take"))
add(TakeAlongAxisRule(), op_class("TakeAlongAxis"))
add(SegmentRule(), *map(op_class, "SegmentSum SegmentMax SegmentMin SegmentProd".split()))
add(GetItemRule(), op_class("GetItem"))
