"""Prunable units as integer ids, and which of them must go together. Pure NumPy.

Every channel or neuron that could be removed has an id. A tensor is represented by an int32
array of ids of the tensor's own shape, batch axis first and of size 1, sizes that are not known
1 as well; -1 marks elements that belong to no unit (an input image, padding). The arrays are
broadcast views (stride 0) along every axis the ids do not vary on, so they stay tiny.
"""

from dataclasses import dataclass, field

import numpy as np

Ids = np.ndarray


def varies(ids: Ids, axis: int) -> bool:
    """Whether the ids may differ along an axis."""
    return ids.shape[axis] > 1 and ids.strides[axis] != 0


def broadcast_along(vector: Ids, axis: int, shape: tuple) -> Ids:
    """A view of `shape` that varies along one axis only: as `vector` (or constant)."""
    ones = [1] * len(shape)
    ones[axis] = len(vector)
    return np.broadcast_to(vector.reshape(ones), shape)


def no_unit(shape: tuple) -> Ids:
    """Ids of a tensor that belongs to no unit."""
    return np.broadcast_to(np.int32(-1), shape)


def drop_constant_axes(*arrays: Ids) -> list[Ids]:
    """The arrays (of one shape) without the axes along which none of them varies."""
    keep = tuple(
        slice(None) if any(varies(a, i) for a in arrays) else slice(0, 1)
        for i in range(arrays[0].ndim)
    )
    return [a[keep] for a in arrays]


def as_view(ids: Ids) -> Ids:
    """The same ids with stride 0 along every axis on which they turn out not to differ."""
    keep = drop_constant_axes(ids)[0]
    for axis in range(keep.ndim):
        if keep.shape[axis] > 1 and (keep == keep.take([0], axis)).all():
            keep = keep.take([0], axis)
    return np.broadcast_to(keep, ids.shape)


@dataclass
class Units:
    """Hands out ids and collects what is known about them: ties and pins."""

    count: int = 0
    _ties: list = field(default_factory=list)
    _pins: list = field(default_factory=list)

    def copy(self) -> "Units":
        """The same ids, ties and pins; what is added to one is not known to the other."""
        return Units(self.count, [*self._ties], [*self._pins])

    def fresh(self, n: int) -> Ids:
        """`n` new ids."""
        self.count += n
        return np.arange(self.count - n, self.count, dtype=np.int32)

    def pin(self, ids: Ids, reason: str) -> None:
        """These units stay, because of `reason`."""
        (ids,) = drop_constant_axes(ids)
        if (ids >= 0).any():
            self._pins.append((np.unique(ids[ids >= 0]), reason))

    def tie(self, a: Ids, b: Ids, reason: str) -> None:
        """Units at the same position go together; with elements of no unit they stay."""
        if a is b:
            return
        a, b = (x.ravel() for x in drop_constant_axes(*np.broadcast_arrays(a, b)))
        both = (a >= 0) & (b >= 0)
        self._ties.append((a[both & (a != b)], b[both & (a != b)]))
        self.pin(np.maximum(a, b)[~both], reason)

    def roots(self) -> np.ndarray:
        """For every id the smallest id it is tied to, shape (count,)."""
        left, right = (np.concatenate([t[i] for t in self._ties] or [[]]) for i in (0, 1))
        forest = Forest(np.arange(self.count, dtype=np.int32))
        forest.join(left.astype(np.int32), right.astype(np.int32))
        return forest.roots()

    def fixed(self, roots: np.ndarray) -> np.ndarray:
        """For every root whether its class stays, bool of shape (count,)."""
        flags = np.zeros(self.count, bool)
        for ids, _ in self._pins:
            flags[roots[ids]] = True
        return flags

    def pinned(self, roots: np.ndarray) -> dict[int, str]:
        """Root id -> the first reason why that class of units stays."""
        first = np.full(self.count, -1)
        for i, (ids, _) in reversed([*enumerate(self._pins)]):
            first[roots[ids]] = i
        stay = np.flatnonzero(first >= 0)
        places = zip(stay.tolist(), first[stay].tolist(), strict=True)
        return {root: self._pins[i][1] for root, i in places}


class Forest:
    """Union-find on whole arrays: of ids that are joined, the smallest is the root.

    Args:
        parents: for every id an id of its class that is not larger, int32 of shape (ids,); taken
            over, not copied.

    Example:

        >>> forest = Forest(np.arange(4, dtype=np.int32))
        >>> forest.join(np.int32([1, 2]), np.int32([3, 3]))
        >>> forest.roots()
        array([0, 1, 1, 1], dtype=int32)
    """

    def __init__(self, parents: np.ndarray) -> None:
        self.parents = parents

    def find(self, ids: Ids) -> Ids:
        """The roots of these ids; touches no others, and shortens the way for the next time."""
        here = ids
        while True:
            above = self.parents[here]
            top = self.parents[above]
            if (above == top).all():
                self.parents[ids] = above
                return above
            self.parents[here] = top
            here = top

    def join(self, first: Ids, second: Ids) -> None:
        """Makes one class of each pair, all pairs at once."""
        while first.size:
            first, second = self.find(first), self.find(second)
            apart = first != second
            first, second = first[apart], second[apart]
            np.minimum.at(self.parents, np.maximum(first, second), np.minimum(first, second))

    def roots(self) -> np.ndarray:
        """The root of every id, int32 of shape (ids,)."""
        return self.find(np.arange(len(self.parents), dtype=np.int32))


def look_up(table: np.ndarray, ids: Ids, default: int | bool) -> np.ndarray:
    """`table[ids]`, `default` for elements of no unit, broadcast views preserved."""
    (small,) = drop_constant_axes(ids)
    safe = np.where(small >= 0, small, 0)
    found = np.where(small >= 0, table[safe] if len(table) else 0, default)
    return np.broadcast_to(found.astype(np.asarray(table).dtype), ids.shape)
