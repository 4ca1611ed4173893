"""Layers without a rule of their own: their `call` is run on symbolic tensors to see what it does.

The layer itself stays as it is in every model; the trace only says how units flow through it. That
it will do the same on fewer units is not taken for granted: a twin, made from its config and built
for fewer units, is traced too, and every operation, argument and constant must be the same.

Where it sums or averages over its units, it stays as it is as well, but a gated model runs the
operations of its call one by one, those that use the units by the gates.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, ops

from keras_polar.graph.clone import smaller_twin
from keras_polar.graph.ir import Call, Ref, Spec, fill, refs_in
from keras_polar.graph.keras_private import takes_training
from keras_polar.graph.symbolic.expand import Leaf, trace_leaf
from keras_polar.graph.symbolic.merge import Expansion
from keras_polar.graph.symbolic.record import CannotTrace, tensors_in
from keras_polar.rules.call_site import CallSite, fixed_term, ids_along, set_rows, sizes
from keras_polar.rules.elementwise import MergeRule
from keras_polar.rules.ids import Ids, Units, broadcast_along, no_unit, varies
from keras_polar.rules.movement import GetItemRule, SqueezeRule
from keras_polar.rules.pooling_norm import NormOpRule
from keras_polar.rules.registry import add, rule_for
from keras_polar.rules.rule import CostTerm, KeptUnits, PinRule, Rule


class TracedRule(Rule):
    """A layer without sublayers whose `call` consists of `keras.ops` on its input."""

    def flow(self, site: CallSite) -> list[Ids]:
        if not any((ids >= 0).any() for ids in map(_small, site.inputs)):
            return [no_unit(shape) for shape in site.output_shapes]
        try:
            return self._follow(site)
        except CannotTrace as error:
            why = f"its call was traced, but it {error}"
        except (IndexError, TypeError, ValueError):  # positions of unknown size, say
            why = "its call was traced, but units cannot be followed through it"
        return site.pin_all(f"no rule for this operation (see keras_polar.register); {why}")

    def _follow(self, site: CallSite) -> list[Ids]:
        # One unit fewer, and as few as can be: code may ask whether there are more than so many.
        for is_far in (False, True):
            resized = _resized(site, is_far)
            runs, keys = _traces(site, resized)
        vectors = self.own_variables(site, runs[0], resized)
        for key, size in keys.items():
            same = [v for v in vectors.values() if len(v) == size] or [_lines(site)[size]]
            for other in same[1:]:
                site.units.tie(same[0], other, f"sized by {key!r} of {site.name!r}")
            site.set_axis(f"config {key}", same[0])
        first, *rest = [_through(site, run, vectors) for run in runs]
        if any(_uses(site, part) for part in site.parts):
            axis, spec = _unit_axis(site.inputs[0]), site.specs[site.call.inputs[0]]
            _plan(site.op, *_arguments(site, [KerasTensor(spec.shape, spec.dtype)]), axis)
            site.average("units", axis)
        site.parts = _dependent(runs[0], site.parts[: len(runs[0].steps)])  # in inference mode
        for outputs in rest:
            for a, b in zip(first, outputs, strict=True):
                site.units.tie(a, b, f"mixed with fixed elements by {site.name!r} in training")
        return first

    def own_variables(self, site: CallSite, run: Expansion, resized: dict) -> dict[str, Ids]:
        """Ids of the layer's own variables: those of its input, where they are sized by it."""
        lines = _lines(site)
        ids_of: dict[str, Ids] = {}
        for name, symbol in run.variables.items():
            axes = [i for i, n in enumerate(symbol.shape) if n in resized and n in lines]
            if len(axes) > 1:
                raise CannotTrace(f"has a variable {name!r} with units on several axes")
            for axis in axes:
                vector = site.set_axis(f"{name} {axis}", lines[symbol.shape[axis]])
                ids_of[name] = vector
        return ids_of

    def weights(self, op: Any) -> dict[str, tuple]:
        return {
            name: tuple(f"{name} {i}" for i in range(len(value.shape)))
            for name, value in vars(op).items()
            if any(value is w for w in op.weights)
        }

    def config(self, site: CallSite, kept: KeptUnits) -> dict[str, Any]:
        keys = [k for k in site.axes if k.startswith("config ")]
        return {k.removeprefix("config "): kept.count(site.axes[k]) for k in keys}

    def over_open(self, op: Any, gates: Any, *args: Any, **kwargs: Any) -> Any:
        axis = next(i for i, n in enumerate(gates.shape) if i and n != 1)
        return _plan(op, args, kwargs, axis).run(op, gates, *_tensors((args, kwargs)))

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        return _sum_of(site.parts) if site.parts else traced_macs(site)


def _sum_of(parts: list[CallSite]) -> list[CostTerm] | None:
    terms: list[CostTerm] = []
    for part in parts:
        if part.macs is None:
            return None
        terms += part.macs
    return terms


def traced_macs(site: CallSite) -> list[CostTerm] | None:
    """What the call of a layer computes, whose units all stay; None if it cannot be traced."""
    try:
        leaf = Leaf(site.op, *_arguments(site, _symbols(site, {})))
        run = trace_leaf(leaf, leaf, {}, False if takes_training(site.op) else None)
        twin = CallSite(site.call, site.specs, Units(), site.inputs, {}, site.rule)
        _through(twin, run, {})
    except (CannotTrace, IndexError, TypeError, ValueError):
        return None
    found = _sum_of(_dependent(run, twin.parts))
    return None if found is None else [fixed_term(found)]


def _dependent(run: Expansion, parts: list[CallSite]) -> list[CallSite]:
    """The calls that compute with the inputs: what is made of weights alone is made once."""
    known = {id(x) for x in run.inlets}
    dependent = []
    for step, part in zip(run.steps, parts, strict=True):
        if any(id(x) in known for x in tensors_in((step.args, step.kwargs))):
            known.update(map(id, step.outputs))
            dependent.append(part)
    return dependent


class TracedPinRule(PinRule):
    """Units stay, but what the layer computes can be seen."""

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        return traced_macs(site)


def _traces(site: CallSite, resized: dict[int, int]) -> tuple[list[Expansion], dict[str, int]]:
    """What the call does in each mode, if a twin for fewer units does the same."""
    leaf = Leaf(site.op, *_arguments(site, _symbols(site, {})))
    args, kwargs = _arguments(site, _symbols(site, resized))
    twin, keys = smaller_twin(site.op, args, kwargs, resized)
    modes = (False, True) if takes_training(site.op) else (None,)
    return [trace_leaf(leaf, Leaf(twin, args, kwargs), resized, m) for m in modes], keys


def _small(ids: Ids) -> Ids:
    return ids[tuple(slice(None) if varies(ids, i) else slice(0, 1) for i in range(ids.ndim))]


def _lines(site: CallSite) -> dict[int, Ids]:
    """Size -> the ids along the input axis of that size, of the first input that has one."""
    lines: dict[int, Ids] = {}
    for ids in site.inputs:
        for axis in range(1, ids.ndim):
            if varies(ids, axis):
                lines.setdefault(ids.shape[axis], ids_along(ids, axis))
    return lines


def _resized(site: CallSite, is_far: bool) -> dict[int, int]:
    """Sizes of axes with units -> fewer, that no other axis has: one or many fewer."""
    lines = _lines(site)
    taken = {d for ids in site.inputs for d in ids.shape}
    resized: dict[int, int] = {}
    for n in lines:
        smaller = range(2, n) if is_far else range(n - 1, 1, -1)
        fewer = next((m for m in smaller if m not in taken), None)
        if fewer is None:
            raise CannotTrace("has too few units to see how it depends on their number")
        taken.add(fewer)
        resized[n] = fewer
    return resized


def _symbols(site: CallSite, resized: dict) -> list:
    return [_symbol(site, i, resized) for i in range(len(site.inputs))]


def _symbol(site: CallSite, position: int, resized: dict) -> Any:
    spec, ids = site.specs[site.call.inputs[position]], site.inputs[position]
    if None in spec.shape[1:]:
        shape = [None if i == 0 else d or 7 for i, d in enumerate(spec.shape)]
    else:
        shape = list(spec.shape)
    for axis in range(1, ids.ndim):
        if varies(ids, axis):
            shape[axis] = resized.get(shape[axis], shape[axis])
        elif shape[axis] in _lines(site):
            raise CannotTrace("has a position axis as long as its units")
    return KerasTensor([None, *shape[1:]], spec.dtype)


def _arguments(site: CallSite, symbols: list) -> tuple[tuple, dict]:
    values = dict(zip(site.call.inputs, symbols, strict=True))
    args, kwargs = fill((site.call.args, site.call.kwargs), values)
    return args, {k: v for k, v in kwargs.items() if k != "training"}


class _Inner(CallSite):
    """A call inside a layer; shapes of variables have no batch axis."""

    @property
    def output_shapes(self) -> list[tuple]:
        shapes = [self.specs[i].shape for i in self.call.outputs]
        return [sizes(s) if None in s else tuple(s) for s in shapes]


def _through(site: CallSite, run: Expansion, vectors: dict[str, Ids]) -> list[Ids]:
    """Ids of the outputs of a traced call."""
    inputs = iter(site.inputs)
    table = {id(x): next(inputs) for x in run.inlets}
    for name, symbol in run.variables.items():
        table[id(symbol)] = _variable_ids(site, name, tuple(symbol.shape), vectors)
    rows = dict.fromkeys(table, 1)
    for step in run.steps:
        inner = _site(site, step, table)
        before = [rows[id(x)] for x in tensors_in((step.args, step.kwargs))]
        rows.update(dict.fromkeys(map(id, step.outputs), set_rows(inner, before)))
        site.parts.append(inner)
        table.update(zip(map(id, step.outputs), _inner_outputs(site, inner), strict=True))
    outputs = zip(run.outputs, site.output_shapes, strict=True)
    return [np.broadcast_to(table[id(x)], shape) for x, shape in outputs]


def _variable_ids(site: CallSite, name: str, shape: tuple, vectors: dict[str, Ids]) -> Ids:
    axes = [i for i in range(len(shape)) if f"{name} {i}" in site.axes]
    return broadcast_along(vectors[name], axes[0], shape) if axes else no_unit(shape)


def _inner_outputs(site: CallSite, inner: CallSite) -> list[Ids]:
    """What the rule of a call inside says; its units stay where it computes with them."""
    outputs = inner.rule.flow(inner)
    used = [*inner.reads, *inner.averaged]
    if inner.produces or not _adapts(inner) or _uses(site, inner) != used:
        for ids in inner.inputs:
            site.pin(ids, f"computes with its units ({type(inner.op).__name__})")
    return outputs


def _adapts(inner: CallSite) -> bool:
    """Whether an operation does the right thing on fewer units without any change."""
    kind = type(inner.rule)
    is_plain = kind.config is Rule.config and kind.arguments is Rule.arguments
    if kind is GetItemRule:
        return not inner.axes  # slices of units have to be moved
    if kind is SqueezeRule:
        return inner.op.axis is not None  # or one unit that is left would vanish
    return is_plain or issubclass(kind, (MergeRule, NormOpRule))


def _site(site: CallSite, step: Any, table: dict) -> _Inner:
    tensors: list[Any] = []

    def swap(leaf: Any) -> Any:
        if not isinstance(leaf, KerasTensor):
            return leaf
        tensors.append(leaf)
        return Ref(len(tensors) - 1)

    args, kwargs = keras.tree.map_structure(swap, (step.args, step.kwargs))
    inputs = refs_in((args, kwargs))
    outputs = tuple(range(len(tensors), len(tensors) + len(step.outputs)))
    specs = [Spec(tuple(x.shape), x.dtype) for x in tensors]
    specs += [Spec(tuple(s), x.dtype) for s, x in zip(step.shapes, step.outputs, strict=True)]
    call = Call(
        step.op, f"{site.name}/{step.op.name}", site.call.path, args, kwargs, inputs, outputs
    )
    ids = [table[id(x)] for x in tensors]
    return _Inner(call, tuple(specs), site.units, ids, {}, rule_for(step.op))


# --- by the gates ----------------------------------------------------------------------------

LENGTHS = (997, 991)  # stand for sizes that are not known


def _unit_axis(ids: Ids) -> int:
    return next(axis for axis in range(1, ids.ndim) if varies(ids, axis))


def _uses(site: CallSite, inner: CallSite) -> list[tuple[int, int]]:
    """The (input position, axis) where a call inside sums or averages over the layer's units.

    Only if they are all of them, for whose gates the layer can be asked, and in any mode.
    """
    is_simple = len(site.inputs) == len(site.call.outputs) == 1 and not takes_training(site.op)
    if not is_simple or sum(varies(site.inputs[0], a) for a in range(site.inputs[0].ndim)) != 1:
        return []
    units = ids_along(site.inputs[0], _unit_axis(site.inputs[0]))
    used = [*inner.reads, *inner.averaged]
    return [(t, a) for t, a in used if np.array_equal(ids_along(inner.inputs[t], a), units)]


@dataclass(frozen=True, eq=False)
class _Plan:
    """The operations of a layer's call on its one tensor, and where they use its units.

    Attributes:
        steps: triples of a recorded call, the same as a rule sees it, and what `_uses` finds.
    """

    trace: Expansion
    steps: list[tuple]

    def run(self, op: Any, gates: Any, x: Any) -> Any:
        own = {id(s): getattr(op, name) for name, s in self.trace.variables.items()}
        table = {k: ops.convert_to_tensor(v) for k, v in own.items()}
        table[id(self.trace.inlets[0])] = x
        for step, part, uses in self.steps:
            outputs = keras.tree.flatten(_by_gates(step, part, uses, gates, table))
            table.update(zip(map(id, step.outputs), outputs, strict=True))
        return table[id(self.trace.outputs[0])]


def _by_gates(step: Any, part: CallSite, uses: list, gates: Any, table: dict) -> Any:
    values = {i: table[id(x)] for i, x in enumerate(tensors_in((step.args, step.kwargs)))}
    for tensor, axis in (use for use in uses if use not in part.averaged):
        x = values[part.call.inputs[tensor]]
        values[part.call.inputs[tensor]] = x * ops.cast(_turned(gates, axis, x), x.dtype)
    args, kwargs = fill((part.call.args, part.call.kwargs), values)
    if not uses or not part.averaged:
        return step.op(*args, **kwargs)
    ((tensor, axis),) = part.averaged
    share = _turned(gates, axis, values[part.call.inputs[tensor]])
    return part.rule.over_open(step.op, share, *args, **kwargs)


def _turned(gates: Any, axis: int, x: Any) -> Any:
    """The gates, to be broadcast against a tensor with its units on this axis."""
    shape = [1] * len(x.shape)
    shape[axis] = max(gates.shape[1:])
    return ops.reshape(gates, [-1, *shape[1:]])


_PLANS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _plan(op: Any, args: tuple, kwargs: dict, axis: int) -> _Plan:
    """The plan of a layer for such arguments, made when it is first asked for.

    In a gated model that is when it is built, not within a training step.

    Raises:
        CannotTrace: there is none, for lengths that are not known.
    """
    (x,) = _tensors((args, kwargs))
    plans = _PLANS.setdefault(op, {})
    kind = (len(x.shape), keras.backend.standardize_dtype(x.dtype), axis)
    fitting = (p for (k, shape), p in plans.items() if k == kind and _fits(shape, x.shape))
    found = next(fitting, None)
    if found is None:
        found = plans[kind, tuple(x.shape[1:])] = _planned(op, args, kwargs, axis)
    return found


def _tensors(arguments: Any) -> list:
    return [x for x in keras.tree.flatten(arguments) if _is_tensor(x)]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, KerasTensor) or ops.is_tensor(x)


def _fits(known: tuple, shape: Any) -> bool:
    return all(a in (None, b) for a, b in zip(known, shape[1:], strict=True))


def _planned(op: Any, args: tuple, kwargs: dict, axis: int) -> _Plan:
    leaf, twin = (Leaf(op, *_with_length(args, kwargs, length)) for length in LENGTHS)
    trace = trace_leaf(leaf, twin, dict([LENGTHS]), None)
    (x,), (y,) = _tensors((leaf.args, leaf.kwargs)), trace.outputs
    specs = (Spec(tuple(x.shape), x.dtype), Spec((None, *y.shape[1:]), y.dtype))
    call = Call(op, op.name, op.name, (Ref(0),), {}, (0,), (1,))
    ids = broadcast_along(np.arange(x.shape[axis], dtype="int32"), axis, sizes(x.shape))
    rule = TracedRule()
    site = CallSite(call, specs, Units(), [ids], {}, rule)
    _through(site, trace, rule.own_variables(site, trace, {x.shape[axis]: 0}))
    pairs = zip(trace.steps, site.parts, strict=True)
    return _Plan(trace, [(step, part, _uses(site, part)) for step, part in pairs])


def _with_length(args: tuple, kwargs: dict, length: int) -> tuple[tuple, dict]:
    def symbol(x: Any) -> Any:
        if not _is_tensor(x):
            return x
        return KerasTensor([None, *(d or length for d in x.shape[1:])], x.dtype)

    return keras.tree.map_structure(symbol, (args, kwargs))


add(TracedRule(), keras.layers.Layer)
