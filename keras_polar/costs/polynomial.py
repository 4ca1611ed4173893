"""What a network costs in weights, multiply-accumulates, units or time, for any mask.

Within a group all units cost the same, so that the cost depends on the number of open units per
group alone: a polynomial (bilinear for convolutions and Dense layers), exact for whole numbers
and differentiable in between.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from keras import ops

from keras_polar.coupling.coupling import Coupling
from keras_polar.rules.ids import Ids

# Kernels compute so many output channels at a time; what is left over can take as long as all.
TILE = 16


def in_tiles(count: int) -> int:
    """The count rounded up to whole tiles of channels."""
    return -(-count // TILE) * TILE


@dataclass(frozen=True)
class Amount:
    """What is paid for each combination of open units: a product.

    Attributes:
        factors: id vectors, whose open elements are counted; those of no unit (-1) always are.
        amount: what one combination costs, in the unit of a measure.
        tiled: positions of factors that count in whole tiles of channels (`TILE`).
    """

    factors: tuple[Ids, ...]
    amount: int
    tiled: tuple[int, ...] = ()


@dataclass(frozen=True)
class Polynomial:
    """A sum of products of open counts, one variable per group.

    Attributes:
        coefficients: one whole number per product.
        factors: the variables of each product, padded with -1 for "times one". With n variables,
            n + i is variable i rounded up to whole tiles of channels.
    """

    coefficients: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]

    def __call__(self, counts: Any) -> Any:
        """The exact value (int) for whole counts, one per group."""
        # int64 is exact up to 9e18; the largest networks take 1e13 multiply-accumulates.
        whole = [int(n) for n in counts]
        known = np.array([1, *whole, *map(in_tiles, whole)], np.int64)
        return int(known[self._index].prod(axis=-1) @ self._scale)

    @cached_property
    def _index(self) -> np.ndarray:
        """Places in (1, *counts, *counts in tiles), int32 of shape (products, factors)."""
        width = len(self.factors[0]) if self.factors else 1  # nothing costs anything
        return np.asarray(self.factors, "int32").reshape(-1, width) + 1

    @cached_property
    def _scale(self) -> np.ndarray:
        return np.asarray(self.coefficients, np.int64)

    def expected(self, counts: Any, scale: float) -> Any:
        """The value divided by `scale`, as a differentiable float32 tensor.

        Args:
            counts: tensor of shape (groups,), open units per group, fractions allowed.
        """
        # Tiles are a staircase; its gradient is taken for that of a slope.
        steps = ops.ceil(counts / TILE) * TILE
        steps = counts + ops.stop_gradient(steps - counts)
        known = ops.concatenate([ops.ones((1,), counts.dtype), counts, steps])
        index = ops.convert_to_tensor(self._index, "int32")
        products = ops.prod(ops.take(known, index, axis=0), axis=-1)
        return ops.sum(products * ops.convert_to_tensor(self._scale / scale, "float32"))

    def slopes(self, counts: Any, scale: float) -> Any:
        """What one unit more in each group costs, divided by `scale`: float32 of shape (groups,).

        Whole tiles of channels are taken for a slope.

        Args:
            counts: as in `expected`.
        """
        groups = counts.shape[0]
        index = np.where(self._index > groups, self._index - groups, self._index)
        factors = ops.take(ops.concatenate([ops.ones((1,), counts.dtype), counts]), index, axis=0)
        factors = ops.cast(factors, "float32")
        scaled = ops.convert_to_tensor(self._scale / scale, "float32")
        total = ops.zeros((groups + 1,), "float32")
        for i in range(index.shape[1]):
            others = np.delete(np.arange(index.shape[1], dtype="int32"), i)
            rest = scaled * ops.prod(ops.take(factors, others, axis=1), axis=1)
            owner = ops.convert_to_tensor(index[:, i], "int32")
            total = total + ops.segment_sum(rest, owner, groups + 1)
        return total[1:]

    def joined(self, owners: Sequence[int]) -> "Polynomial":
        """The same of fewer variables: of each of ours, the one that it is."""
        fewer = max(owners) + 1
        places = [*owners, *(fewer + i for i in owners), -1]
        factors = (tuple(places[i] for i in product) for product in self.factors)
        return Polynomial(self.coefficients, tuple(factors))

    def get_config(self) -> dict:
        return {"coefficients": self.coefficients, "factors": self.factors}

    @classmethod
    def from_config(cls, config: dict) -> "Polynomial":
        factors = tuple(map(tuple, config["factors"]))
        return cls(tuple(config["coefficients"]), factors)


def polynomial(
    coupling: Coupling,
    amounts: Iterable[tuple[int, Amount]],
    branches: Sequence[Iterable[int]] = (),
) -> Polynomial:
    """The sum of what is paid for combinations of open units, as a function of open counts.

    Args:
        amounts: pairs of a call and what is paid for it.
        branches: the calls that go with each residual branch. Its variables, 1 or 0, come after
            the open units of each group.
    """
    total: Counter = Counter()
    groups = len(coupling.groups)
    inside: dict[int, list[dict]] = defaultdict(list)
    for i, calls in enumerate(branches, groups):
        for call in calls:
            inside[call].append({i: 1})
    for call, term in amounts:
        if term.amount:
            forms = [_linear(coupling, f) for f in term.factors]
            for i in term.tiled:
                forms[i] = _in_tiles(forms[i], groups + len(branches))
            _add_product(total, term.amount, [*forms, *inside[call]])
    width = max([1, *map(len, total)])
    padded = [(*key, *[-1] * (width - len(key))) for key in total]
    return Polynomial(tuple(total.values()), tuple(padded))


def _linear(coupling: Coupling, vector: Ids) -> Counter:
    """Open elements of an id vector: {group: elements per open unit, -1: fixed elements}."""
    groups = np.where(vector >= 0, coupling.group_of[vector], -1)
    found = zip(*(x.tolist() for x in np.unique(groups, return_counts=True)), strict=True)
    return Counter({g: n if g < 0 else n // coupling.groups[g].units for g, n in found})


def _in_tiles(form: Counter, variables: int) -> Counter:
    """The same in whole tiles of channels, where that is a variable or a number."""
    if list(form) == [-1]:
        return Counter({-1: in_tiles(form[-1])})
    is_one_group = list(form.values()) == [1]
    return Counter({variables + i: 1 for i in form}) if is_one_group else form


def _add_product(total: Counter, coefficient: int, forms: list[dict]) -> None:
    product: Counter = Counter({(): coefficient})
    for form in forms:
        product = _times(product, form)
    total.update(product)


def _times(products: Counter, form: dict) -> Counter:
    out: Counter = Counter()
    for key, a in products.items():
        for group, b in form.items():
            out[tuple(sorted((*key, group))) if group >= 0 else key] += a * b
    return out


# --- counted layer by layer ------------------------------------------------------------------
