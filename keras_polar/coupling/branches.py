"""Residual branches that can go as a whole, found from the graph alone.

In `x + F(x)` the sum without `F(x)` is still a model: what only fed the sum is dead code and
goes with it. A branch counts when it reads what the rest of the sum is made of as well, so that
projection shortcuts, `P(x) + F(x)`, have one too (the longer of the two).
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from keras_polar.graph.ir import Call, Graph, refs_in
from keras_polar.rules import rule_for


@dataclass(frozen=True)
class Branch:
    """A branch that ends in a sum.

    Attributes:
        name: of the sum, numbered where a sum has several.
        merge: index of the call that adds.
        tensor: what the branch adds.
        calls: indices of the calls that serve this branch alone, ascending.
        layers: names of those with weights.
    """

    name: str
    merge: int
    tensor: int
    calls: tuple[int, ...]
    layers: tuple[str, ...]


class _Wiring:
    """The producer and the consumers of each tensor of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.calls = graph.calls
        self.producer = {t: i for i, c in enumerate(graph.calls) for t in c.outputs}
        self.consumers: dict[int, list[int]] = defaultdict(list)
        self.calls_of: dict[int, list[int]] = defaultdict(list)
        for i, call in enumerate(graph.calls):
            self.calls_of[id(call.op)].append(i)
            for tensor in call.inputs:
                self.consumers[tensor].append(i)
        self.outputs = set(refs_in(graph.outputs))

    def producers(self, tensors: Iterable[int]) -> list[int]:
        """The calls that produce these tensors; model inputs have none."""
        return [self.producer[t] for t in tensors if t in self.producer]

    def exclusive(self, tensor: int, merge: int) -> tuple[int, ...]:
        """Calls whose results reach nothing but `merge` through `tensor`, ascending."""
        serving: set[int] = set()
        waiting = [-i for i in self.producers([tensor])] if self.only_read(tensor, merge) else []
        seen = set(waiting)
        while waiting:  # The latest call first: whether its consumers count is decided by then.
            call = -heapq.heappop(waiting)
            if self._serves(call, tensor, serving):
                serving.add(call)
                for producer in {-i for i in self.producers(self.calls[call].inputs)} - seen:
                    seen.add(producer)
                    heapq.heappush(waiting, producer)
        return tuple(sorted(serving))

    def only_read(self, tensor: int, consumer: int) -> bool:
        return self.consumers[tensor] == [consumer] and tensor not in self.outputs

    def _serves(self, call: int, tensor: int, serving: set) -> bool:
        return all(
            t == tensor or (t not in self.outputs and serving.issuperset(self.consumers[t]))
            for t in self.calls[call].outputs
        )

    def entries(self, calls: tuple[int, ...]) -> list[int]:
        """Tensors that the calls read and do not make."""
        own = {t for i in calls for t in self.calls[i].outputs}
        read = (t for i in calls for t in self.calls[i].inputs)
        return [t for t in dict.fromkeys(read) if t not in own]

    def descends(self, tensor: int, ancestors: list[int]) -> bool:
        """Whether `tensor` is one of `ancestors` or depends on any."""
        wanted, waiting, seen = set(ancestors), [tensor], {tensor}
        earliest = min((self.producer.get(t, -1) for t in ancestors), default=0)
        while waiting:
            current = waiting.pop()
            if current in wanted:
                return True
            producer = self.producer.get(current, -1)
            inputs = self.calls[producer].inputs if producer > earliest else ()
            new = [t for t in inputs if t not in seen]
            seen.update(new)
            waiting += new
        return False

    def weighted(self, calls: tuple[int, ...]) -> tuple[str, ...]:
        """Names of the layers with weights among these calls."""
        own = [self.calls[i] for i in calls]
        return tuple(dict.fromkeys(c.name for c in own if getattr(c.op, "weights", ())))

    def shares(self, calls: tuple[int, ...]) -> bool:
        """Whether a layer with weights among these calls is called elsewhere, too."""
        own = set(calls)
        ops = (self.calls[i].op for i in calls)
        return any(
            getattr(op, "weights", ()) and not own.issuperset(self.calls_of[id(op)]) for op in ops
        )


def find_branches(graph: Graph) -> tuple[Branch, ...]:
    """The branches of a graph that can be removed, in the order of their sums.

    A branch stays whose weights are used elsewhere as well: its cost would not go with it.
    """
    wiring = _Wiring(graph)
    branches: list[Branch] = []
    for i, call in enumerate(graph.calls):
        candidates = [b for p in _summands(graph, call) if (b := _branch(wiring, i, p)) is not None]
        if len(candidates) == len(call.inputs):  # Something has to stay.
            candidates.remove(min(candidates, key=lambda b: len(b.calls)))
        branches += [_numbered(b, n) for n, b in enumerate(candidates)]
    return tuple(branches)


def _summands(graph: Graph, call: Call) -> tuple[int, ...]:
    """Positions of what can be left out; nothing where the others are of another shape."""
    specs = {graph.specs[t] for t in (*call.inputs, *call.outputs)}
    alike = len(call.inputs) > 1 and len(specs) == 1
    return rule_for(call.op).summands(call) if alike else ()


def _branch(wiring: _Wiring, merge: int, position: int) -> Branch | None:
    inputs = wiring.calls[merge].inputs
    tensor, others = inputs[position], [t for i, t in enumerate(inputs) if i != position]
    calls = wiring.exclusive(tensor, merge)
    layers, entries = wiring.weighted(calls), wiring.entries(calls)
    if not layers or wiring.shares(calls) or not any(wiring.descends(t, entries) for t in others):
        return None
    return Branch(wiring.calls[merge].name, merge, tensor, calls, layers)


def _numbered(branch: Branch, number: int) -> Branch:
    name = f"block {branch.name}" + (f":{number + 1}" if number else "")
    return Branch(name, branch.merge, branch.tensor, branch.calls, branch.layers)


def shorten(call: Call, closed: set[int]) -> Call:
    """The call of a sum without the summands in `closed` (tensors), if several are left."""
    if not 1 < sum(t not in closed for t in call.inputs) < len(call.inputs):
        return call

    def left(argument: Any) -> Any:
        is_list = isinstance(argument, (list, tuple))
        return [x for x in argument if x.index not in closed] if is_list else argument

    args, kwargs = tuple(map(left, call.args)), {k: left(v) for k, v in call.kwargs.items()}
    return replace(call, args=args, kwargs=kwargs, inputs=refs_in((args, kwargs)))
