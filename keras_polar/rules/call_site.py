"""One call of one operation, as a rule sees it."""

import inspect
import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import keras
from keras import tree

from keras_polar.graph.clone import variable_at
from keras_polar.graph.ir import Call, Ref, Spec
from keras_polar.rules.ids import Ids, Units, broadcast_along, no_unit, varies
from keras_polar.rules.rule import CostTerm, Rule


def ids_along(ids: Ids, axis: int) -> Ids:
    """The ids along one axis, taken at the start of all others."""
    axis %= ids.ndim
    return ids[tuple(slice(None) if i == axis else 0 for i in range(ids.ndim))]


@dataclass(eq=False)
class CallSite:
    """One call of one operation, as a rule sees it.

    Attributes:
        inputs: id arrays of the input tensors, in the order of the call's arguments.
        rule: what is known about the operation.
        output_shapes: shapes of the outputs, batch and unknown sizes as 1.
        outputs: id arrays of the output tensors, once `flow` has been asked.
        axes: the layer's named id vectors; calls of a shared layer have the same ones.
        reads: (input position, axis) whose closed units must arrive as zeros.
        inner_reads: (variable, axis) of the layer's own weights, the variable named as in
            `Rule.weights`, whose slices for closed units must be zeros.
        averaged: (input position, axis) over whose units the operation averages, at most one. In
            the gated model it does so over the open ones (`Rule.over_open`).
        multiplied_by: which (variable, axis) all that is read at an input position is multiplied
            with, and nothing else: zeros may stand there instead.
        refused: why all that reaches the operation stays, and nothing it makes can go; else empty.
        parts: the calls that the operation consists of, as its rule has seen them.
        rows: rows along the first axis that one sample takes (windows of an image, say).
    """

    call: Call
    specs: tuple[Spec, ...]
    units: Units
    inputs: list[Ids]
    shared_axes: dict[str, Ids]
    rule: Rule
    axes: dict[str, Ids] = field(default_factory=dict)
    outputs: list[Ids] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)
    inner_reads: list[tuple[str, int]] = field(default_factory=list)
    averaged: list[tuple[int, int]] = field(default_factory=list)
    multiplied_by: dict[int, tuple[str, int]] = field(default_factory=dict)
    produces: list[str] = field(default_factory=list)
    refused: str = ""
    parts: list["CallSite"] = field(default_factory=list)
    rows: int = 1

    @property
    def op(self) -> Any:
        return self.call.op

    @property
    def name(self) -> str:
        return self.call.name

    @property
    def output_shapes(self) -> list[tuple]:
        return [sizes(self.specs[i].shape) for i in self.call.outputs]

    @cached_property
    def macs(self) -> "list[CostTerm] | None":
        """Multiply-accumulates per sample, once `flow` has been asked; None if nobody knows."""
        found = alone(self, self.rule) if self.refused else self.rule.macs(self)
        return found and [replace(t, macs=self.rows * t.macs) for t in found]

    def positions(self, tensor: int | None, but: int = -1, *, output: bool = False) -> int:
        """Elements per row of an input (or output) tensor with the axis `but` left out."""
        index = (self.call.outputs if output else self.call.inputs)[tensor or 0]
        shape = sizes(self.specs[index].shape)
        return math.prod(shape) // shape[but]

    def given(self) -> dict[str, Any]:
        """The call's arguments by name, those left out not among them; tensors as `Ref`s."""
        bound = inspect.signature(self.op.call).bind(*self.call.args, **self.call.kwargs)
        return {n: v for n, v in bound.arguments.items() if v is not None}

    def place(self, argument: Any) -> int:
        """Position among `inputs` of the tensor given for an argument; -1 if it is none."""
        return self.call.inputs.index(argument.index) if isinstance(argument, Ref) else -1

    def shape_of(self, value: Any) -> tuple:
        """Shape of an argument, a tensor of the model or a constant."""
        return tuple((self.specs[value.index] if isinstance(value, Ref) else value).shape)

    # --- what `flow` can say ---

    def follow(self, name: str, axis: int, tensor: int = 0) -> Ids:
        """The units along `axis` pass through one by one (BatchNormalization, pooling)."""
        ids = self.inputs[tensor]
        self.tie_across(ids, axis)
        return self.set_axis(name, ids_along(ids, axis))

    def read(self, name: str, axis: int, tensor: int = 0, by: tuple[str, int] | None = None) -> Ids:
        """All units along `axis` are read and mixed (Conv, Dense).

        Args:
            by: the variable, and its axis, that the tensor is multiplied with and nothing else.
        """
        vector = self.follow(name, axis, tensor)
        self.reads.append((tensor, axis % self.inputs[tensor].ndim))
        if by is not None and not getattr(self.op, "lora_enabled", False):  # or it is a sum
            self.multiplied_by[tensor] = by
        return vector

    def average(self, name: str, axis: int, tensor: int = 0) -> Ids:
        """The operation averages over the units along `axis`; its rule has `over_open`."""
        vector = self.follow(name, axis, tensor)
        self.averaged.append((tensor, axis))  # as it is spelled: calls of a shared layer are alike
        return vector

    def produce(self, name: str, n: int, axis: int, output: int = 0) -> Ids:
        """The layer makes `n` units of its own, along `axis` of its output."""
        shape = self.output_shapes[output]
        return broadcast_along(self.produce_inside(name, n), axis % len(shape), shape)

    def produce_inside(self, name: str, n: int, arrange: Callable[[Ids], Ids] | None = None) -> Ids:
        """The layer makes `n` units that need not show in its output; returns their vector.

        Args:
            arrange: from the vector of fresh ids to the axis they stand on, should units take
                several places there.
        """
        vector = self.shared_axes.get(name)
        if vector is None:
            fresh = self.units.fresh(n)
            vector = fresh if arrange is None else arrange(fresh)
        self.produces.append(name)
        return self.set_axis(name, vector)

    def read_inside(self, variable: str, axis: int) -> None:
        """The layer itself reads its units, through `axis` of one of its weights."""
        self.inner_reads.append((variable, axis))

    def set_axis(self, name: str, vector: Ids) -> Ids:
        """Names an id vector; the calls of a shared layer get tied."""
        known = self.shared_axes.setdefault(name, vector)
        self.units.tie(known, vector, f"layer {self.name!r} is shared with a fixed input")
        self.axes[name] = vector
        return vector

    def tie_across(self, ids: Ids, axis: int) -> None:
        """Elements that differ only in the other axes belong to one unit."""
        first = broadcast_along(ids_along(ids, axis), axis % ids.ndim, ids.shape)
        self.units.tie(ids, first, f"fixed elements are mixed in at {self.name!r}")

    def tie_along(self, ids: Ids, axes: Iterable[int]) -> Ids | None:
        """Units that differ only along `axes` go together; returns the ids at the axes' start.

        None, and nothing is tied, if there are no units on other axes: all would be one.
        """
        at_start = tuple(slice(0, 1) if i in axes else slice(None) for i in range(ids.ndim))
        if any(varies(ids, i) for i in axes):
            if not any(varies(ids, i) for i in range(ids.ndim) if i not in axes):
                return None
            why = f"fixed elements are mixed in at {self.name!r}"
            self.units.tie(ids, ids[at_start], why)
        return ids[at_start]

    def pin(self, ids: Ids, why: str) -> None:
        self.units.pin(ids, f"{why} ({type(self.op).__name__} {self.name!r})")

    def pin_argument(self, argument: Any, why: str) -> None:
        """Pins all tensors of an argument (a mask, say)."""
        for leaf in tree.flatten(argument):
            if isinstance(leaf, Ref):
                self.pin(self.inputs[self.place(leaf)], why)

    def unmasked(self) -> list[Ids]:
        """The inputs but for the mask that Keras hands on, whose own units stay.

        A mask says which positions count, in the same way for all units.
        """
        mask = self.given().get("mask") if isinstance(self.op, keras.layers.Layer) else None
        self.pin_argument(mask, "is used as a mask")
        return [ids for i, ids in enumerate(self.inputs) if i != self.place(mask)]

    def pin_all(self, why: str) -> list[Ids]:
        """Pins every input; the outputs belong to no unit."""
        self.refused = why
        for ids in self.inputs:
            self.pin(ids, why)
        return [no_unit(shape) for shape in self.output_shapes]


def sizes(shape: Iterable) -> tuple:
    """A static shape with the batch and unknown sizes as 1.

    The first axis is the batch, unless its size is known and that of another is not.
    """
    first, *others = tuple(shape) or (None,)
    is_batch = first is None or None not in others
    return (1 if is_batch else first, *(1 if d is None else d for d in others))


def weight_terms(
    site: CallSite, weights: dict[str, tuple], known: Container[int] = ()
) -> list[CostTerm]:
    """One term per variable: its named axes are factors, all others count in full.

    Args:
        known: ids of variables that are counted elsewhere.
    """
    terms, counted = [], 0
    for attribute, names in weights.items():
        variable = variable_at(site.op, attribute)
        if variable is not None and id(variable) not in known:
            terms.append(_variable_term(variable, names, site))
            counted += math.prod(variable.shape)
    own = (w for w in getattr(site.op, "weights", ()) if id(w) not in known)
    rest = sum(math.prod(w.shape) for w in own) - counted
    return [*terms, CostTerm((), weights=rest)] if rest else terms


def inner_vector(site: CallSite, variable: str, axis: int) -> Ids:
    """The ids along an axis of one of the layer's variables."""
    name = site.rule.weights(site.op)[variable][axis]
    return site.axes[name]


def alone(site: CallSite, rule: Rule) -> list[CostTerm] | None:
    """What a rule counts for a call whose units all stay, as if there were none before it."""
    twin = CallSite(
        site.call, site.specs, Units(), [no_unit(ids.shape) for ids in site.inputs], {}, rule
    )
    try:
        twin.outputs = rule.flow(twin)
        found = rule.macs(twin)
    except (IndexError, KeyError, TypeError, ValueError):  # a call that the rule does not fit
        return None
    return None if found is None else [fixed_term(found)]


def fixed_term(terms: Iterable[CostTerm]) -> CostTerm:
    """Multiply-accumulates of units that all stay."""
    return CostTerm((), macs=sum(t.macs * math.prod(map(len, t.factors)) for t in terms))


def set_rows(site: CallSite, before: list[int]) -> int:
    """Tells a call how many rows a sample takes; returns how many in its outputs."""
    after = site.rule.rows(site, before)
    site.rows = max([after, *before])
    return after


def _variable_term(variable: Any, names: tuple, site: CallSite) -> CostTerm:
    factors = tuple(site.axes[n] for n in names if n in site.axes)
    other = [size for size, n in zip(variable.shape, names, strict=True) if n not in site.axes]
    return CostTerm(factors, weights=math.prod(other))
