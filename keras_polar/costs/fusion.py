"""What a runtime computes as one operation, at which widths it can be, and how large it is then.

A runtime folds batch normalization and simple activations into what comes before them: a layer
and its followers take as long as the layer alone. Such a piece is timed by itself
(litert/measure_latency.py); its time is told by its sizes, which are sums of products of open
counts for every kind of layer: elements read, elements written and multiply-accumulates, and the
last two with output channels counted in whole tiles, as kernels compute them.
"""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import keras
import numpy as np

from keras_polar.costs.polynomial import TILE, Amount, in_tiles
from keras_polar.coupling.coupling import Coupling
from keras_polar.graph.ir import Ref, refs_in
from keras_polar.rules import CallSite
from keras_polar.rules.call_site import ids_along, sizes
from keras_polar.rules.ids import Ids, varies

LEVELS = 4  # widths that are timed, of the inputs and of the outputs
_STEP = 8  # they are multiples of it
# What says nothing about how long a layer takes.
_IRRELEVANT = "name trainable seed rate momentum epsilon build_config".split()
_ENDINGS = ("_initializer", "_regularizer", "_constraint")


@dataclass(frozen=True, eq=False)
class Fused:
    """Calls that a runtime computes as one operation: a first one and its followers.

    Attributes:
        calls: indices of the calls, in order.
        inputs: tensors that they read and do not make.
        outputs: tensors of the last call.
    """

    coupling: Coupling
    calls: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def sites(self) -> list[CallSite]:
        return [self.coupling.sites[i] for i in self.calls]

    @property
    def name(self) -> str:
        return self.sites[0].name

    @cached_property
    def parts(self) -> list[list[Amount]]:
        """What its sizes are sums of; see `sizes`."""
        first, last = self.sites[0], self.sites[-1]
        places = ((first.call.inputs.index(t), t) for t in self.inputs)
        read = [_elements(self.coupling, t, first.inputs[i]) for i, t in places]
        made = zip(self.outputs, last.outputs, strict=True)
        written = [_elements(self.coupling, t, ids) for t, ids in made]
        macs = [Amount(t.factors, t.macs) for s in self.sites for t in s.macs or ()]
        own = [f for t in written for f in t.factors]
        return [read, written, macs, *([_tiled(t, own) for t in x] for x in (written, macs))]

    @cached_property
    def variants(self) -> list[np.ndarray]:
        """Which ids stay at each of the widths that are timed; all of them first."""
        read, made = self._groups()
        levels = [range(LEVELS if own else 1) for own in (read, made)]
        distinct: dict[tuple, dict[int, int]] = {}
        for of_read, of_made in itertools.product(*levels):
            counts = {g: _level(self.coupling, g, of_read) for g in read}
            counts |= {g: _level(self.coupling, g, of_made) for g in made}
            distinct.setdefault(tuple(counts.values()), counts)
        return [_flags(self.coupling, counts) for counts in distinct.values()]

    def _groups(self) -> tuple[list[int], list[int]]:
        """Groups with units in the inputs, and those that appear in the piece alone."""
        first = self.sites[0]
        inputs = (first.inputs[first.call.inputs.index(t)] for t in self.inputs)
        read = _groups_in(self.coupling, inputs)
        own = (v for s in self.sites for v in (*s.axes.values(), *s.outputs))
        return read, [g for g in _groups_in(self.coupling, own) if g not in read]

    def sizes(self, flags: np.ndarray) -> tuple[int, ...]:
        """What its time depends on when ids are gone.

        Elements read, elements written, multiply-accumulates; the last two with output channels
        in whole tiles.
        """
        return tuple(sum(_value(t, flags) for t in terms) for terms in self.parts)

    @cached_property
    def key(self) -> str:
        """The same for pieces that take the same time at the same widths.

        Says in words what it is; a digest stands for the rest.
        """
        specs = self.coupling.graph.specs
        tensors = (*self.inputs, *self.outputs)
        shapes = [[*sizes(specs[t].shape), specs[t].dtype] for t in tensors]
        what = [[_described(s) for s in self.sites], shapes, [self.sizes(f) for f in self.variants]]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        kinds = "+".join(type(s.op).__name__ for s in self.sites)
        made = [specs[t].shape for t in self.outputs]
        return f"{kinds} {_words(specs[t].shape for t in self.inputs)} -> {_words(made)} {digest}"


def fused(coupling: Coupling) -> list[Fused]:
    """The pieces of a coupled graph, in order; every call is in one of them."""
    consumers = Counter(t for s in coupling.sites for t in dict.fromkeys(s.call.inputs))
    consumers.update(refs_in(coupling.graph.outputs))
    chains: list[list[int]] = []
    ends: dict[int, list[int]] = {}  # tensor -> the chain that a follower would join
    for i, site in enumerate(coupling.sites):
        own = set(site.call.inputs)
        chain = ends.get(next(iter(own))) if len(own) == 1 and site.rule.fuses else None
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(i)
        if len(site.call.outputs) == 1 and consumers[site.call.outputs[0]] == 1:
            ends[site.call.outputs[0]] = chain
    return [_piece(coupling, chain) for chain in chains]


def _piece(coupling: Coupling, chain: list[int]) -> Fused:
    inputs = tuple(dict.fromkeys(coupling.sites[chain[0]].call.inputs))
    return Fused(coupling, tuple(chain), inputs, coupling.sites[chain[-1]].call.outputs)


# --- sizes -----------------------------------------------------------------------------------


def _elements(coupling: Coupling, tensor: int, ids: Ids) -> Amount:
    """How many elements a tensor has: its units along one axis times all others."""
    total = math.prod(sizes(coupling.graph.specs[tensor].shape))
    for axis in range(ids.ndim):
        if varies(ids, axis) and _groups_in(coupling, [ids_along(ids, axis)]):
            return Amount((ids_along(ids, axis),), total // ids.shape[axis])
    return Amount((), total)


def _tiled(term: Amount, made: list[Ids]) -> Amount:
    """The term with the units that a piece makes counted in tiles."""
    factors = enumerate(term.factors)
    tiled = tuple(i for i, f in factors if any(np.array_equal(f, own) for own in made))
    return replace(term, tiled=tiled)


def _value(term: Amount, flags: np.ndarray) -> int:
    counts = [int(np.sum((v < 0) | flags[v])) for v in term.factors]
    each = (in_tiles(n) if i in term.tiled else n for i, n in enumerate(counts))
    return term.amount * math.prod(each)


def _groups_in(coupling: Coupling, arrays: Iterable[Ids]) -> list[int]:
    groups: dict[int, None] = {}
    for ids in arrays:
        lines = [ids_along(ids, axis) for axis in range(ids.ndim)]
        vector = np.concatenate([np.zeros(0, int), *lines])
        groups |= dict.fromkeys(np.unique(coupling.group_of[vector[vector >= 0]]).tolist())
    return [g for g in groups if g >= 0]


def _level(coupling: Coupling, group: int, level: int) -> int:
    """All units, some more than half of them, half, or a quarter, in steps that kernels make.

    More than half by half a tile, so that steps of whole tiles show.
    """
    units = coupling.groups[group].units
    step = _STEP if units > _STEP else 1
    quarter, half = (-(-units // (step * n)) * step for n in (4, 2))
    half = in_tiles(half) if units > TILE else half
    return min(units, (units, half + step, half, quarter)[level])


def _flags(coupling: Coupling, counts: dict[int, int]) -> np.ndarray:
    flags = np.ones(len(coupling.roots), bool)
    for group, count in counts.items():
        flags[coupling.groups[group].roots[count:]] = False
    return flags[coupling.roots]


# --- descriptions ----------------------------------------------------------------------------


def _described(site: CallSite) -> list:
    """All that tells how long a call takes, as JSON can hold it."""
    op = site.op
    if isinstance(op, keras.layers.Layer):
        try:
            options = op.get_config()
        except (NotImplementedError, TypeError, ValueError):
            options = {}
    else:
        options = {k: v for k, v in vars(op).items() if not k.startswith("_")}
    weights = [list(w.shape) for w in getattr(op, "weights", ())]
    return [type(op).__name__, _plain(options), _plain([site.call.args, site.call.kwargs]), weights]


def _plain(value: Any) -> Any:
    """Numbers, words and containers as they are, arrays by shape, anything else by kind."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if _is_relevant(str(k))}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Ref):
        return "tensor"
    shape = getattr(value, "shape", None)
    return [type(value).__name__, "" if shape is None else str(tuple(shape))]


def _is_relevant(key: str) -> bool:
    return key not in _IRRELEVANT and not key.endswith(_ENDINGS)


def _words(shapes: Iterable[tuple]) -> str:
    return ", ".join("x".join(map(str, sizes(s)[1:])) or "1" for s in shapes)
