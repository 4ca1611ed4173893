"""From ids that stay to a physically smaller model."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_polar.backends import to_numpy
from keras_polar.coupling.coupling import Coupling
from keras_polar.gates.weight_mask import Substituted, masked_variables
from keras_polar.graph.clone import Copies, copy_weights, variable_at
from keras_polar.graph.configs import repair_configs
from keras_polar.graph.ir import Call, fill, refs_in, unused
from keras_polar.graph.rebuild import rebuild
from keras_polar.graph.trace import warn_of_ties
from keras_polar.rules import CallSite, KeptUnits
from keras_polar.rules.call_site import inner_vector
from keras_polar.rules.ids import drop_constant_axes, varies
from keras_polar.surgery.penalties import unmask_penalties


def cut(coupling: Coupling, flags: np.ndarray) -> keras.Model:
    """A new model of the units that stay.

    Args:
        flags: bool of shape (ids,), True for ids that stay, equal within each class.
    """
    cutter = Cutter(coupling, flags)
    small = rebuild(coupling.graph, cutter.visit, keras.Model)
    repair_configs(small.layers)
    warn_of_ties(coupling.graph, "remove", cutter.copies.split)
    return small


class Cutter:
    """Calls the smaller twins of a graph's operations, made when first needed.

    Attributes:
        twins: pairs of an operation and its smaller twin.
        pieces: what each variable of the twins was cut out of.
    """

    def __init__(self, coupling: Coupling, flags: np.ndarray) -> None:
        self.coupling, self.kept = coupling, KeptUnits(flags)
        self.made: dict[tuple, Any] = {}
        self.copies = Copies()
        self.cloned: set[int] = set()
        self.twins: list[tuple[Any, Any]] = []
        self.pieces: list[Piece] = []
        self.sites = {id(s.call): s for s in coupling.sites}
        self.names = {c.name for c in coupling.graph.calls}

    def visit(self, call: Call, values: dict) -> Any:
        site = self.sites[id(call)]
        changes = _changes(site, self.kept)
        # A shared layer without weights (a Reshape, say) may be cut differently in each call.
        key = (id(call.op), repr(sorted(changes.items())))
        is_new = key not in self.made
        if is_new:
            copies, name = self.copies, self._name(site)
            is_cut = _is_cut(site, self.kept)
            own = (
                copies.of(site.op, name, True, **changes) if is_cut else copies.same(site.op, name)
            )
            self.made[key] = own
        op = self.made[key]
        args, kwargs = site.rule.arguments(site, self.kept)
        outputs = op(*fill(args, values), **fill(kwargs, values))
        if is_new:
            self.twins.append((site.op, op))
            pieces = _copy_cut_weights(site, op, self.kept)
            self.copies.note((piece.whole, piece.part) for piece in pieces)
            self.pieces += pieces
            unmask_penalties(op)
        return outputs

    def _name(self, site: CallSite) -> str:
        name = unused(site.name, self.names) if id(site.op) in self.cloned else site.name
        self.cloned.add(id(site.op))
        self.names.add(name)
        return name

    def first_difference(self, inputs: Any, tolerance: float) -> str:
        """The first call whose twin computes something else on its units, in words."""
        graph = self.coupling.graph
        given = dict(zip(refs_in(graph.inputs), tree.flatten(inputs), strict=True))
        full = {i: keras.ops.convert_to_tensor(x) for i, x in given.items()}
        small = dict(full)
        for site in self.coupling.sites:
            call = site.call
            masked = {**full, **_masked(site, self.kept, full)}
            with Substituted(_masked_inside(site, self.kept)):
                wanted = call.op(*fill(call.args, masked), **fill(call.kwargs, masked))
            found = self.visit(call, small)
            full.update(zip(call.outputs, tree.flatten(wanted), strict=True))
            small.update(zip(call.outputs, tree.flatten(found), strict=True))
            for index, ids in zip(call.outputs, site.outputs, strict=True):
                off = _off(full[index], small[index], ids, self.kept)
                if off > tolerance:
                    kind = type(call.op).__name__
                    return f"The first layer that differs is {site.name!r} ({kind}), by {off:g}"
        return "No single layer differs"


def _masked(site: CallSite, kept: KeptUnits, values: dict) -> dict:
    masked = {}
    for tensor, axis in site.reads:
        index, ids = site.call.inputs[tensor], site.inputs[tensor]
        x = keras.ops.convert_to_tensor(values[index])
        shape = [1] * len(x.shape)
        shape[axis] = ids.shape[axis]
        mask = np.isin(np.arange(shape[axis]), kept.where(ids, axis)).reshape(shape)
        masked[index] = x * keras.ops.cast(mask, x.dtype)
    return masked


def _masked_inside(site: CallSite, kept: KeptUnits) -> list[tuple]:
    masks = []
    for path, axis in site.inner_reads:
        vector = inner_vector(site, path, axis)
        masks.append((path, axis, np.isin(np.arange(len(vector)), kept.where(vector))))
    return masked_variables(site.op, masks)


def _off(full: Any, small: Any, ids: np.ndarray, kept: KeptUnits) -> float:
    """How far two outputs are apart on the units that stay, relative to the largest."""
    full, small = to_numpy(full).astype("float64"), to_numpy(small).astype("float64")
    for axis in range(ids.ndim):
        if varies(ids, axis):
            full = np.take(full, kept.where(ids, axis), axis)
    if full.shape != small.shape:
        return np.inf
    return float(np.abs(full - small).max(initial=0) / max(np.abs(full).max(initial=0), 1e-30))


def _is_cut(site: CallSite, kept: KeptUnits) -> bool:
    is_cut = any(not kept.all(v) for v in site.axes.values())
    return is_cut or any(not kept.flags[i[i >= 0]].all() for i in _small(site))


def _changes(site: CallSite, kept: KeptUnits) -> dict[str, Any]:
    return site.rule.config(site, kept) if _is_cut(site, kept) else {}


def _small(site: CallSite) -> list[np.ndarray]:
    return [drop_constant_axes(ids)[0] for ids in site.outputs]


@dataclass(frozen=True, eq=False)
class Piece:
    """A variable of a smaller model and what it was cut out of.

    Attributes:
        whole, part: the variables.
        where: for every axis of `whole` which indices `part` has, None for all.
        factor: what the values of `part` were multiplied by.
    """

    whole: Any
    part: Any
    where: tuple
    factor: float = 1.0

    def cut(self, value: np.ndarray) -> np.ndarray:
        """The values of `part` in an array of the shape of `whole`."""
        for axis, where in enumerate(self.where):
            value = value if where is None else np.take(value, where, axis)
        return value

    def paste(self, value: np.ndarray, part: np.ndarray) -> np.ndarray:
        """The array with the values of `part` in their places."""
        sizes = zip(value.shape, self.where, strict=True)
        places = [range(n) if where is None else where for n, where in sizes]
        value = value.copy()
        value[np.ix_(*places)] = part
        return value


def _copy_cut_weights(site: CallSite, new: Any, kept: KeptUnits) -> list[Piece]:
    rule, slices = site.rule, {}
    for attribute, names in rule.weights(site.op).items():
        variable = variable_at(site.op, attribute)
        if variable is not None:
            slices[id(variable)] = tuple(
                kept.where(site.axes[n]) if n in site.axes else None for n in names
            )
    given = rule.factors(site, kept).items()
    factors = {id(variable_at(site.op, path)): factor for path, factor in given}

    def piece(variable: Any, part: Any = None) -> Piece:
        where = slices.get(id(variable), (None,) * len(variable.shape))
        return Piece(variable, part, where, factors.get(id(variable), 1.0))

    def cut_variable(variable: Any, value: np.ndarray) -> np.ndarray:
        own = piece(variable)
        part = own.cut(value)
        return part if own.factor == 1 else (part * own.factor).astype(value.dtype)

    try:
        pairs = copy_weights(site.op, new, cut_variable)
    except ValueError as error:
        raise ValueError(
            f"Layer {site.name!r} ({type(site.op).__name__}): the rule that cuts its weights does "
            f"not fit the smaller layer: {error} Check `weights` and `config` of its rule."
        ) from error
    return [piece(old, part) for old, part in pairs]
