"""Residual branches that can go as a whole, found from the graph alone.

In `x + F(x)` the sum without `F(x)` is still a model: what only fed the sum is dead code and
goes with it. A branch counts when all it reads comes from where the rest of the sum comes from,
so that projection shortcuts, `P(x) + F(x)`, have one as well (the longer of the two).
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from keras_polar.graph import Call, Graph, refs_in


@dataclass(frozen=True)
class Block:
    """A branch that ends in a sum.

    Attributes:
        merge: index of the call that adds.
        position: which of the call's inputs is the branch.
        entry: index of the tensor that the branch reads.
        calls: indices of the calls that serve this branch alone, ascending.
    """

    merge: int
    position: int
    entry: int
    calls: tuple[int, ...]


class _Wiring:
    """Who makes and who reads each tensor of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.calls = graph.calls
        self.maker = {t: i for i, c in enumerate(graph.calls) for t in c.outputs}
        self.readers: dict[int, list[int]] = defaultdict(list)
        for i, call in enumerate(graph.calls):
            for tensor in call.inputs:
                self.readers[tensor].append(i)
        self.outputs = set(refs_in(graph.outputs))

    def makers(self, tensors: Iterable[int]) -> list[int]:
        """The calls that make these tensors; model inputs have none."""
        return [self.maker[t] for t in tensors if t in self.maker]

    def exclusive(self, tensor: int, merge: int) -> tuple[int, ...]:
        """Calls whose results reach nothing but `merge` through `tensor`, ascending."""
        found: set[int] = set()
        waiting = [-i for i in self.makers([tensor])] if self.only_read(tensor, merge) else []
        seen = set(waiting)
        while waiting:  # The latest call first: whether its readers count is decided by then.
            call = -heapq.heappop(waiting)
            if self._serves(call, tensor, found):
                found.add(call)
                for maker in {-i for i in self.makers(self.calls[call].inputs)} - seen:
                    seen.add(maker)
                    heapq.heappush(waiting, maker)
        return tuple(sorted(found))

    def only_read(self, tensor: int, reader: int) -> bool:
        return self.readers[tensor] == [reader] and tensor not in self.outputs

    def _serves(self, call: int, tensor: int, found: set) -> bool:
        return all(
            t == tensor or (t not in self.outputs and found.issuperset(self.readers[t]))
            for t in self.calls[call].outputs
        )

    def entries(self, calls: tuple[int, ...]) -> list[int]:
        """Tensors that the calls read and do not make."""
        own = {t for i in calls for t in self.calls[i].outputs}
        read = (t for i in calls for t in self.calls[i].inputs)
        return [t for t in dict.fromkeys(read) if t not in own]

    def descends(self, tensor: int, ancestors: list[int]) -> bool:
        """Whether `tensor` depends on every one of `ancestors`, or is it."""
        wanted, waiting, seen = set(ancestors), [tensor], {tensor}
        earliest = min((self.maker.get(t, -1) for t in ancestors), default=0)
        while waiting and wanted:
            current = waiting.pop()
            wanted.discard(current)
            maker = self.maker.get(current, -1)
            sources = self.calls[maker].inputs if maker > earliest else ()
            new = [t for t in sources if t not in seen]
            seen.update(new)
            waiting += new
        return not wanted


def find_blocks(graph: Graph, summands: Callable[[Call], tuple[int, ...]]) -> tuple[Block, ...]:
    """The branches of a graph that can be removed, in the order of their sums.

    Args:
        summands: for a call, the positions of inputs that its result is a sum of; empty where
            the call is no sum.
    """
    wiring = _Wiring(graph)
    found: list[Block] = []
    for i, call in enumerate(graph.calls):
        positions = summands(call)
        blocks = [b for p in positions if (b := _block(wiring, i, p)) is not None]
        if len(blocks) == len(call.inputs):  # Something has to stay.
            blocks.remove(min(blocks, key=lambda b: len(b.calls)))
        found += blocks
    return tuple(found)


def _block(wiring: _Wiring, merge: int, position: int) -> Block | None:
    inputs = wiring.calls[merge].inputs
    calls = wiring.exclusive(inputs[position], merge)
    entries = wiring.entries(calls)
    others = [t for i, t in enumerate(inputs) if i != position]
    is_branch = entries and any(wiring.descends(t, entries) for t in others)
    does_work = any(getattr(wiring.calls[i].op, "weights", ()) for i in calls)
    return Block(merge, position, entries[0], calls) if is_branch and does_work else None
