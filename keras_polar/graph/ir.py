"""A functional model as plain data: calls of operations on numbered tensors."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from keras import tree


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor of a graph wherever a call's arguments mention one."""

    index: int


@dataclass(frozen=True)
class Spec:
    """Static shape (batch first, None where unknown) and dtype of a tensor."""

    shape: tuple
    dtype: str


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one operation: a layer or a `keras.ops` node."""

    op: Any
    name: str  # unique per operation, the name it has in rebuilt models
    path: str  # where it stands in the user's model: "backbone/conv1"
    args: tuple
    kwargs: dict
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    note: str = ""  # why a composite layer was left as it is
    is_part: bool = False  # of a composite layer that was opened


@dataclass(frozen=True, eq=False)
class Graph:
    """A model as data: `calls` in topological order over tensors numbered from 0."""

    name: str
    inputs: Any  # structure of Refs, as the model's own
    outputs: Any
    input_layers: tuple
    calls: tuple[Call, ...]
    specs: tuple[Spec, ...]


def alive(graph: Graph) -> Graph:
    """The graph without the calls that none of its outputs depends on."""
    wanted, live = set(refs_in(graph.outputs)), []
    for call in reversed(graph.calls):
        if not wanted.isdisjoint(call.outputs):
            wanted.update(call.inputs)
            live.append(call)
    return replace(graph, calls=tuple(reversed(live)))


def refs_in(structure: Any) -> tuple[int, ...]:
    """Indices of the tensors a structure mentions, in order."""
    return tuple(x.index for x in tree.flatten(structure) if isinstance(x, Ref))


def unused(name: str, used: set) -> str:
    """The name, numbered if it is used already."""
    numbered = (f"{name}_{i}" for i in itertools.count(1))
    return name if name not in used else next(n for n in numbered if n not in used)


def bypass(graph: Graph, stands_for: Callable[[Call], int | None]) -> Graph:
    """The graph without some of its calls.

    Args:
        stands_for: for a call, the index of the input tensor that takes the place of its output,
            -1 to drop the call (none may read it), or None to keep it.
    """
    table: dict[int, int] = {}
    calls = []
    for call in graph.calls:
        source = stands_for(call)
        if source is None:
            calls.append(_redirected(call, table))
        elif source >= 0:
            table[call.outputs[0]] = table.get(source, source)
    return replace(graph, calls=tuple(calls), outputs=_redirect(graph.outputs, table))


def _redirect(structure: Any, table: dict) -> Any:
    def swap(leaf: Any) -> Any:
        return Ref(table.get(leaf.index, leaf.index)) if isinstance(leaf, Ref) else leaf

    return tree.map_structure(swap, structure)


def _redirected(call: Call, table: dict) -> Call:
    args, kwargs = _redirect((call.args, call.kwargs), table)
    return replace(call, args=args, kwargs=kwargs, inputs=refs_in((args, kwargs)))


def fill(structure: Any, values: dict[int, Any]) -> Any:
    """The structure with every Ref replaced by its value."""

    def swap(leaf: Any) -> Any:
        return values[leaf.index] if isinstance(leaf, Ref) else leaf

    return tree.map_structure(swap, structure)
