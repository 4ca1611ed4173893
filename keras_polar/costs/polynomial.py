"""What a network costs in weights, multiply-accumulates, units or time, for any mask.

Within a group all units cost the same, so that the cost depends on the number of open units per
group alone: a polynomial (bilinear for convolutions and Dense layers), exact for whole numbers
and differentiable in between.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from keras import ops

from keras_polar.costs.count import COUNTED, terms
from keras_polar.coupling.branches import Branch
from keras_polar.coupling.coupling import Coupling
from keras_polar.rules import CostTerm
from keras_polar.rules.ids import Ids

MEASURES = (*COUNTED, "latency")
# Kernels compute so many output channels at a time; what is left over can take as long as all.
TILE = 16


def in_tiles(count: int) -> int:
    """The count rounded up to whole blocks of channels."""
    return -(-count // TILE) * TILE


@dataclass(frozen=True)
class Polynomial:
    """A sum of products of open counts, one variable per group.

    Attributes:
        coefficients: one whole number per product.
        factors: the variables of each product, padded with -1 for "times one". With n variables,
            n + i is variable i rounded up to whole blocks of channels.
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
        """Places in (1, *counts, *counts in blocks), int32 of shape (products, factors)."""
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
        # Blocks are a staircase; its gradient is taken for that of a slope.
        steps = ops.ceil(counts / TILE) * TILE
        steps = counts + ops.stop_gradient(steps - counts)
        known = ops.concatenate([ops.ones((1,), counts.dtype), counts, steps])
        index = ops.convert_to_tensor(self._index, "int32")
        products = ops.prod(ops.take(known, index, axis=0), axis=-1)
        return ops.sum(products * ops.convert_to_tensor(self._scale / scale, "float32"))

    def get_config(self) -> dict:
        return {"coefficients": self.coefficients, "factors": self.factors}

    @classmethod
    def from_config(cls, config: dict) -> "Polynomial":
        factors = tuple(map(tuple, config["factors"]))
        return cls(tuple(config["coefficients"]), factors)


def polynomial(
    coupling: Coupling,
    measure: str,
    blocks: Sequence[Branch] = (),
    timed: Sequence[tuple[int, CostTerm]] = (),
) -> Polynomial:
    """The cost of a coupled graph in one of `MEASURES`, as a function of open counts.

    Its variables are the open units of each group, then 1 or 0 for each of `blocks`.

    Args:
        timed: the cost terms of "latency" (picoseconds), which cannot be counted, with their calls.
    """
    total: Counter = Counter()
    inside = _blocks_of_calls(coupling, blocks)
    for call, term in timed if measure == "latency" else terms(coupling):
        coefficient = getattr(term, measure)
        if coefficient:
            forms = [_linear(coupling, f) for f in term.factors]
            for i in term.blocks:
                forms[i] = _form_in_blocks(forms[i], len(coupling.groups) + len(blocks))
            _add_product(total, coefficient, [*forms, *({b: 1} for b in inside[call])])
    width = max([1, *map(len, total)])
    padded = [(*key, *[-1] * (width - len(key))) for key in total]
    return Polynomial(tuple(total.values()), tuple(padded))


def _blocks_of_calls(coupling: Coupling, blocks: Sequence[Branch]) -> dict[int, list[int]]:
    """Call -> the variables of the blocks that it is in; several where blocks are nested."""
    inside: dict[int, list[int]] = defaultdict(list)
    for variable, block in enumerate(blocks, len(coupling.groups)):
        for call in (*block.calls, *_sum_of_two(coupling, block)):
            inside[call].append(variable)
    return inside


def _sum_of_two(coupling: Coupling, block: Branch) -> tuple[int, ...]:
    """The sum that a branch ends in, if it goes with the branch."""
    return (block.merge,) if len(coupling.graph.calls[block.merge].inputs) == 2 else ()


def _linear(coupling: Coupling, vector: Ids) -> Counter:
    """Open elements of an id vector: {group: elements per open unit, -1: fixed elements}."""
    groups = np.where(vector >= 0, coupling.group_of[vector], -1)
    found = zip(*(x.tolist() for x in np.unique(groups, return_counts=True)), strict=True)
    return Counter({g: n if g < 0 else n // coupling.groups[g].units for g, n in found})


def _form_in_blocks(form: Counter, variables: int) -> Counter:
    """The same in whole blocks of channels, where that is a variable or a number."""
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
