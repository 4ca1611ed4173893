"""From a plan of what stays to a physically smaller model: gated -> small, and direct surgery."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_polar.backends import full_precision, to_numpy
from keras_polar.coupling.coupling import Coupling, couple
from keras_polar.gates.groups import flags_for, is_gated, require_gated, stripped
from keras_polar.gates.weight_mask import Substituted, masked_variables
from keras_polar.graph.clone import clone, copy_weights, variable_at
from keras_polar.graph.ir import Call, fill, refs_in, unused
from keras_polar.graph.quantized import why_altered
from keras_polar.graph.rebuild import rebuild
from keras_polar.graph.trace import warn_of_ties
from keras_polar.rules import Kept, Site, read
from keras_polar.rules.call_site import inner_vector
from keras_polar.rules.ids import compact, varies
from keras_polar.surgery.certificate import difference, random_inputs
from keras_polar.surgery.penalties import unmask_penalties


def cut(coupling: Coupling, flags: np.ndarray) -> keras.Model:
    """A new model of the units that stay.

    Args:
        flags: bool of shape (ids,), True for ids that stay, equal within each class.
    """
    return rebuild(coupling.graph, Cutter(coupling, flags).visit, keras.Model)


class Cutter:
    """Calls the smaller twins of a graph's operations, made when first needed.

    Attributes:
        twins: pairs of an operation and its smaller twin.
        pieces: what each variable of the twins was cut out of.
    """

    def __init__(self, coupling: Coupling, flags: np.ndarray) -> None:
        self.coupling, self.kept = coupling, Kept(flags)
        self.made: dict[tuple, Any] = {}
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
            self.made[key] = clone(site.op, self._name(site), **changes)
        op = self.made[key]
        args, kwargs = site.rule.arguments(site, self.kept)
        outputs = op(*fill(args, values), **fill(kwargs, values))
        if is_new:
            self.twins.append((site.op, op))
            self.pieces += _copy_cut_weights(site, op, self.kept)
            unmask_penalties(op)
        return outputs

    def _name(self, site: Site) -> str:
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


def _masked(site: Site, kept: Kept, values: dict) -> dict:
    found = {}
    for tensor, axis in site.reads:
        index, ids = site.call.inputs[tensor], site.inputs[tensor]
        x = keras.ops.convert_to_tensor(values[index])
        shape = [1] * len(x.shape)
        shape[axis] = ids.shape[axis]
        mask = np.isin(np.arange(shape[axis]), kept.where(ids, axis)).reshape(shape)
        found[index] = x * keras.ops.cast(mask, x.dtype)
    return found


def _masked_inside(site: Site, kept: Kept) -> list[tuple]:
    masks = []
    for path, axis in site.inner_reads:
        vector = inner_vector(site, path, axis)
        masks.append((path, axis, np.isin(np.arange(len(vector)), kept.where(vector))))
    return masked_variables(site.op, masks)


def _off(full: Any, small: Any, ids: np.ndarray, kept: Kept) -> float:
    """How far two outputs are apart on the units that stay, relative to the largest."""
    full, small = to_numpy(full).astype("float64"), to_numpy(small).astype("float64")
    for axis in range(ids.ndim):
        if varies(ids, axis):
            full = np.take(full, kept.where(ids, axis), axis)
    if full.shape != small.shape:
        return np.inf
    return float(np.abs(full - small).max(initial=0) / max(np.abs(full).max(initial=0), 1e-30))


def _changes(site: Site, kept: Kept) -> dict[str, Any]:
    is_cut = any(not kept.all(v) for v in site.axes.values())
    is_cut = is_cut or any(not kept.flags[i[i >= 0]].all() for i in _small(site))
    return site.rule.config(site, kept) if is_cut else {}


def _small(site: Site) -> list[np.ndarray]:
    return [compact(ids)[0] for ids in site.outputs]


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


def _copy_cut_weights(site: Site, new: Any, kept: Kept) -> list[Piece]:
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


def convert(gated: Any, *, verify: Any = None) -> keras.Model:
    """The static sub-network of a gated model, as an ordinary smaller Keras model.

    Args:
        gated: what `keras_polar.apply` returned.
        verify: inputs of the model, or True for random ones: checks the certificate, that both
            models give the same outputs.

    Returns:
        A functional `keras.Model` of stock layers, with the weights of `gated`; not compiled.

    Raises:
        TypeError: `gated` has no gates.
        ValueError: a gated layer has been quantized, or given LoRA adapters, since `apply`; the
            certificate does not hold (says by how much), or the inputs do not fit.

    Warns:
        UserWarning: the gates are not settled, and what their consensus removes by now is more
            than a point off the requested sparsity.

    Example:

        >>> small = keras_polar.convert(gated, verify=True)
        >>> small.save("small.keras")
    """
    require_gated(gated, "convert")
    _warn_of_early_conversion(gated)
    small, cutter = small_twin(gated)
    if verify is not None and verify is not False:
        check_certificate(gated, small, verify, cutter.first_difference)
    return small


def _warn_of_early_conversion(gated: Any) -> None:
    wanted, found = gated.consensus.sparsity, gated.sparsity
    if not gated.settled and abs(found - wanted) > 0.01:
        warnings.warn(
            f"convert({gated.name!r}): the gates are not settled, and their consensus removes "
            f"{found:.1%} of the {gated.consensus.measure} by now instead of {wanted:.1%}. Let "
            "`fit` reach the settle step of the schedule, or call gated.settle() first.",
            stacklevel=3,
        )


def small_twin(gated: Any) -> tuple[keras.Model, "Cutter"]:
    """The sub-network of a gated model, and the cutter that made it."""
    coupling = couple(stripped(gated))
    cutter = Cutter(coupling, _flags(gated, coupling))
    return rebuild(coupling.graph, cutter.visit, keras.Model), cutter


def _flags(gated: Any, coupling: Coupling) -> np.ndarray:
    """What stays by the gates' consensus.

    Raises:
        ValueError: a layer cannot be cut any more.
    """
    made, flags = coupling.produced(), flags_for(gated, coupling)
    makers = {name for group in gated.groups for name in group.members}
    lost = [s for s in coupling.sites if s.name in makers - made.keys()]
    closed = np.unique(coupling.roots[~flags]).tolist()
    reasons = [f"{s.name!r} {why_altered(s.op) or 'has no rule'}" for s in lost]
    reasons += [coupling.reasons[root] for root in closed if root in coupling.reasons]
    if reasons:
        raise ValueError(
            f"convert: the closed units of {gated.name!r} cannot be cut out any more, for a layer "
            f"has changed since `apply`: {reasons[0]}. Load a gated model saved before that."
        )
    return flags


@full_precision()
def check_certificate(
    gated: Any, small: Any, inputs: Any = True, explain: Callable | None = None
) -> float:
    """The largest difference between two models' outputs, relative to the largest output.

    Args:
        inputs: inputs of both models, or True for random ones.
        explain: `explain(inputs, tolerance)` says in words where a difference begins.

    Raises:
        ValueError: the difference exceeds round-off (1e-4; 2e-2 in half precision).
    """
    inputs = random_inputs(gated) if inputs is True else inputs
    try:
        found = difference(gated, small, inputs)
    except (TypeError, ValueError) as error:
        raise ValueError(_do_not_fit(gated, inputs, error)) from error
    is_half = any("16" in layer.compute_dtype for layer in gated.layers)
    tolerance = 2e-2 if is_half else 1e-4
    if not found <= tolerance:
        where = explain(inputs, tolerance) if explain else ""
        raise ValueError(
            f"Certificate: expected the converted model to equal {gated.name!r} to {tolerance:g} "
            f"of the largest output, but it differs by {found:g}. {where}. If that layer has a "
            "rule given to keras_polar.register, compare `flow`, `weights` and `config` with what "
            "its call computes."
        )
    return found


def _do_not_fit(model: Any, inputs: Any, error: Exception) -> str:
    wanted = [tuple(x.shape) for x in model.inputs]
    received = [getattr(x, "shape", x) for x in tree.flatten(inputs)]
    return (
        f"verify: expected at least one sample for each input of model {model.name!r}, in shapes "
        f"{wanted}, or True for random ones; received {received}. {error}"
    )


def remove(model: Any, units: Mapping[str, Any]) -> keras.Model:
    """Cuts units out of a model, without training; units that depend on them follow.

    Args:
        model: a functional or built Sequential Keras model; it is not changed.
        units: layer name -> indices of the units (channels, neurons) to cut. Units of other
            layers that are tied to them (by a residual sum, say) go as well.

    Returns:
        A smaller functional `keras.Model`.

    Raises:
        TypeError: the model is not functional, or `units` is not a dict.
        ValueError: the model has gates; unknown layer, index out of range, a unit that cannot go
            (says why), or a layer that would lose all its units.

    Example:

        >>> small = keras_polar.remove(model, {"conv1": [0, 3, 5]})
    """
    if not isinstance(units, Mapping):
        raise TypeError(
            "remove: expected a dict of layer name -> indices of units, {'conv1': [0, 3]} say; "
            f"received {units!r}."
        )
    if is_gated(model):
        raise ValueError(
            f"remove: model {model.name!r} has gates. `convert` it first and cut the result, or "
            "close units of the gated model with `gated.groups[i].set_mask(mask)`."
        )
    coupling = couple(read(model))
    warn_of_ties(coupling.graph, "remove")
    produced = coupling.produced()
    flags = np.ones(len(coupling.roots), bool)
    for name, indices in units.items():
        flags[_roots_to_cut(coupling, produced, name, indices)] = False
    flags = flags[coupling.roots]
    _refuse_empty(coupling, flags)
    return cut(coupling, flags)


def _roots_to_cut(coupling: Coupling, produced: dict, name: str, indices: Any) -> np.ndarray:
    if name not in produced:
        raise ValueError(
            f"remove: expected the name of a layer with units; received {name!r}. "
            f"Layers with units: {', '.join(sorted(produced))}."
        )
    vector = produced[name]
    try:
        chosen = np.unique(np.asarray(indices).ravel())
    except ValueError:  # ragged
        chosen = np.array([np.nan])
    if chosen.size and (
        chosen.dtype.kind not in "iu" or chosen.min() < 0 or chosen.max() >= len(vector)
    ):
        raise ValueError(
            f"remove: layer {name!r} has units 0 to {len(vector) - 1}; expected the indices of "
            f"those to cut, received {indices}."
        )
    roots = coupling.roots[vector[chosen.astype(int)]]
    for root in roots.tolist():
        if root in coupling.reasons:
            raise ValueError(
                f"remove: units of layer {name!r} cannot go: {coupling.reasons[root]}. "
                "keras_polar.inspect(model) lists the layers whose units can."
            )
    return roots


def _refuse_empty(coupling: Coupling, flags: np.ndarray) -> None:
    kept = Kept(flags)
    for site in coupling.sites:
        for vector in site.axes.values():
            if len(vector) and not kept.count(vector):
                raise ValueError(
                    f"remove: layer {site.name!r} would lose all its {len(vector)} units. Leave at "
                    "least one, or remove the layer from the architecture."
                )
