"""Operations that only move elements: on ids they are the same operation in NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import layers

from keras_polar.graph import op_class
from keras_polar.rules.base import Kept, Rule, Site, add, line
from keras_polar.units import Ids, varies


class MoveRule(Rule):
    """`move(op, ids)` moves ids as the operation moves elements, batch axis included."""

    def __init__(self, move: Callable[[Any, Ids], Ids]) -> None:
        self.move = move

    def flow(self, site: Site) -> list[Ids]:
        try:
            moved, shape = self.move(site.op, site.inputs[0]), site.output_shapes[0]
            if moved.ndim == len(shape):
                return [np.broadcast_to(moved, shape)]
        except (ValueError, TypeError):  # a reshape of sizes that are not known, say
            pass
        return site.pin_all("units cannot be followed through it")


class ReshapeRule(MoveRule):
    """Also Reshape of ops and BroadcastTo: `attribute` holds sizes, which shrink with the units."""

    def __init__(self, move: Callable, attribute: str, first: int) -> None:
        super().__init__(move)
        self.attribute, self.first = attribute, first

    def config(self, site: Site, kept: Kept) -> dict[str, Any]:
        target, ids = getattr(site.op, self.attribute), site.outputs[0]
        new = [
            kept.size(ids, i + self.first) if i + self.first and n not in (-1, None) else n
            for i, n in enumerate(target)
        ]
        return {self.attribute: tuple(new)}


class ConcatRule(Rule):
    """Units of all inputs side by side."""

    def flow(self, site: Site) -> list[Ids]:
        return [concatenate(site.inputs, site.op.axis, site.output_shapes[0])]


class StackRule(Rule):
    """Units of all inputs along a new axis."""

    def flow(self, site: Site) -> list[Ids]:
        shape = site.output_shapes[0]
        axis = site.op.axis % len(shape)
        return [concatenate([np.expand_dims(x, axis) for x in site.inputs], axis, shape)]


def concatenate(arrays: list[Ids], axis: int, shape: tuple) -> Ids:
    """`np.concatenate` that leaves axes on which nothing varies as views."""
    axis %= len(shape)
    keep = tuple(
        slice(None) if i == axis or any(varies(a, i) for a in arrays) else slice(0, 1)
        for i in range(len(shape))
    )
    return np.broadcast_to(np.concatenate([a[keep] for a in arrays], axis), shape)


class PadRule(Rule):
    """`ops.pad`: what is padded with zeros belongs to nobody."""

    def flow(self, site: Site) -> list[Ids]:
        (ids,), op = site.inputs, site.op
        widths = np.broadcast_to(np.asarray(op.pad_width), (ids.ndim, 2))
        units = {i for i in range(ids.ndim) if varies(ids, i)}
        if op.mode != "constant" and any(widths[i].any() for i in units):
            return site.pin_all("pads the units themselves")
        keep = tuple(slice(None) if i in units else slice(0, 1) for i in range(ids.ndim))
        needed = [tuple(widths[i]) if i in units else (0, 0) for i in range(ids.ndim)]
        padded = np.pad(ids[keep], needed, constant_values=-1)
        return [np.broadcast_to(padded, site.output_shapes[0])]


class RollRule(Rule):
    """Moves positions in a circle; units themselves would be moved by a fixed number: pinned."""

    def flow(self, site: Site) -> list[Ids]:
        (ids,), axes = site.inputs, site.op.axis
        axes = range(ids.ndim) if axes is None else [axes] if isinstance(axes, int) else axes
        return site.pin_all("shifts units") if any(varies(ids, a) for a in axes) else [ids]


class SplitRule(Rule):
    """`ops.split`: the places of the cuts move with the units."""

    def flow(self, site: Site) -> list[Ids]:
        try:
            parts = np.split(site.inputs[0], site.op.indices_or_sections, site.op.axis)
        except ValueError:  # along an axis whose size here is a stand-in
            return site.pin_all("units cannot be followed through it")
        for i, part in enumerate(parts):
            site.set_axis(f"part{i}", line(part, site.op.axis))  # so that none vanishes
        return parts

    def config(self, site: Site, kept: Kept) -> dict[str, Any]:
        if "part0" not in site.axes:
            return {}
        ends = np.cumsum([kept.size(part, site.op.axis) for part in site.outputs])
        return {"indices_or_sections": ends[:-1].tolist()}


class GetItemRule(Rule):
    """`x[key]`: slices of units with step 1 are moved with the cut, single units stay."""

    def flow(self, site: Site) -> list[Ids]:
        (ids,), key = site.inputs, _full_key(self._key(site), site.inputs[0].ndim)
        if key is None:
            return site.pin_all("is indexed with something other than integers and slices")
        for axis, part in _consumed(key):
            if part != slice(None) and varies(ids, axis):
                self._part(site, ids, axis, part)
        out = ids[tuple(_on_unknown(p, ids, a) for p, a in zip(key, _axes_of(key), strict=True))]
        return [np.broadcast_to(out, site.output_shapes[0])]

    def _key(self, site: Site) -> Any:
        return site.call.kwargs.get("key", (*site.call.args, None)[1])

    def _part(self, site: Site, ids: Ids, axis: int, part: Any) -> None:
        if isinstance(part, slice) and part.step in (None, 1):
            index = (slice(None),) * axis + (part,)
            site.set_axis(f"slice{axis}", line(ids[index], axis))
        else:
            site.pin(ids, "picks single units")

    def arguments(self, site: Site, kept: Kept) -> tuple[tuple, dict]:
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
    """Axes without units, whose size may be a stand-in, are taken at their start."""
    if axis is None or varies(ids, axis):
        return part
    return 0 if isinstance(part, int) else slice(0, 1)


def _moved(part: Any, ids: Ids, axis: int | None, kept: Kept) -> Any:
    if axis is None or part == slice(None) or not varies(ids, axis):
        return part
    if isinstance(part, int):  # a single unit, which stays: only its place has moved
        return int(np.searchsorted(kept.where(ids, axis), part % ids.shape[axis]))
    start, stop, _ = part.indices(ids.shape[axis])
    return slice(*np.searchsorted(kept.where(ids, axis), [start, stop]).tolist())


def _flatten(op: Any, ids: Ids) -> Ids:
    if getattr(op, "data_format", None) == "channels_first":
        ids = np.moveaxis(ids, 1, -1)
    return ids.reshape(1, -1)


def _tile(op: Any, ids: Ids) -> Ids:
    repeats = (op.repeats,) if isinstance(op.repeats, int) else tuple(op.repeats)
    return np.tile(ids, (1,) * (ids.ndim - len(repeats)) + repeats)


def _repeat(op: Any, ids: Ids) -> Ids:
    if op.axis is None or not isinstance(op.repeats, int):
        raise ValueError("only a constant number of repeats along one axis moves whole units")
    return np.repeat(ids, op.repeats, op.axis)


add(MoveRule(_flatten), layers.Flatten)
add(MoveRule(lambda op, x: x.transpose(0, *op.dims)), layers.Permute)
add(MoveRule(lambda op, x: x[:, None]), layers.RepeatVector)
add(MoveRule(lambda op, x: x.transpose(op.axes)), op_class("Transpose"))
add(MoveRule(lambda op, x: np.swapaxes(x, op.axis1, op.axis2)), op_class("Swapaxes"))
add(MoveRule(lambda op, x: np.moveaxis(x, op.source, op.destination)), op_class("Moveaxis"))
add(MoveRule(lambda op, x: np.expand_dims(x, op.axis)), op_class("ExpandDims"))
add(MoveRule(lambda op, x: np.squeeze(x, op.axis)), op_class("Squeeze"))
add(MoveRule(lambda op, x: np.flip(x, op.axis)), op_class("Flip"))
add(MoveRule(_tile), op_class("Tile"))
add(MoveRule(_repeat), op_class("Repeat"))
add(ReshapeRule(lambda op, x: x.reshape(1, *op.target_shape), "target_shape", 1), layers.Reshape)
add(ReshapeRule(lambda op, x: x.reshape(op.newshape), "newshape", 0), op_class("Reshape"))
add(
    ReshapeRule(lambda op, x: x.reshape((1,) * (len(op.shape) - x.ndim) + x.shape), "shape", 0),
    op_class("BroadcastTo"),
)
add(ConcatRule(), layers.Concatenate, op_class("Concatenate"))
add(StackRule(), op_class("Stack"))
add(PadRule(), op_class("Pad"))
add(RollRule(), op_class("Roll"))
add(SplitRule(), op_class("Split"))
add(GetItemRule(), op_class("GetItem"))
