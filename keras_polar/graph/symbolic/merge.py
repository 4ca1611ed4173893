"""What two runs of a layer have in common, which is all that can be said of the layer.

The runs differ in the batch size (two prime numbers stand for it) and in the mode: what grows with
the batch is recognised by the primes, and any other difference means that a graph cannot say what
the layer does.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, tree

from keras_polar.backends import to_numpy
from keras_polar.graph.keras_private import backend, op_class
from keras_polar.graph.symbolic.record import (
    CannotTrace,
    DiffersInTraining,
    RecordedCall,
    RecordedRun,
    tensors_in,
)

# Stand for the batch size. Primes, and larger than what layers use as sizes inside, so that a
# multiple of both at once is the batch and nothing else.
BATCHES = (1009, 1013)
# Operations that give each sample the same.
SPREADS = tuple(map(op_class, ("BroadcastTo", "Tile", "Repeat")))


class _Batch:
    """Stands for a size that is `times` the batch size."""

    def __init__(self, times: int) -> None:
        self.times = times


@dataclass(frozen=True, eq=False)
class Expansion:
    """What a composite layer does: `steps` in order, from `inlets` to `outputs`."""

    inlets: list
    steps: list[RecordedCall]
    outputs: list
    closed: dict[int, str] = field(default_factory=dict)  # id(sublayer) -> why it was not opened
    variables: dict[str, Any] = field(default_factory=dict)  # of a leaf: name -> its symbol
    held: list = field(default_factory=list)  # `Held`: weights that the code uses itself


class Merge:
    """Reduces two runs, of different batch sizes and modes, to one that holds for both.

    Args:
        modes: of the runs, whether they were for training.
    """

    def __init__(
        self, first: RecordedRun, second: RecordedRun, modes: Iterable[bool] = (False, True)
    ) -> None:
        self.first, self.second, self.modes = first, second, list(modes)
        self.numbers: list[dict[int, int]] = [{}, {}]
        self._number(first.inlets, second.inlets)
        for a, b in zip(first.weights, second.weights, strict=True):
            self.value((a.variable.path, a.rows), (b.variable.path, b.rows))
        self.of_weights = {id(w.symbol) for w in first.weights}  # and what is made of them alone

    def _number(self, a: list, b: list) -> None:
        if len(a) != len(b):
            raise DiffersInTraining()
        for table, tensors in zip(self.numbers, (a, b), strict=True):
            table.update((id(x), len(table) + i) for i, x in enumerate(tensors))

    def opened(self) -> Expansion:
        if len(self.first.steps) != len(self.second.steps):
            raise DiffersInTraining()
        pairs = zip(self.first.steps, self.second.steps, strict=True)
        steps = [self._step(a, b) for a, b in pairs]
        self.value(self.first.outputs, self.second.outputs)
        return Expansion(self.first.inlets, steps, self.first.outputs)

    def _step(self, a: RecordedCall, b: RecordedCall) -> RecordedCall:
        is_layer = isinstance(a.op, keras.layers.Layer)
        if type(a.op) is not type(b.op) or (is_layer and not _alike(a.op, b.op)):
            raise DiffersInTraining()
        modes = [x.kwargs.get("training") for x in (a, b)]
        if modes not in (self.modes, [None, None]):
            raise CannotTrace(f"sets the mode of {a.op.name!r} (training={modes[0]}) itself")
        given = [{k: v for k, v in x.kwargs.items() if k != "training"} for x in (a, b)]
        args, kwargs = self.value((a.args, given[0]), (b.args, given[1]))
        args, kwargs = _resolved(a, args, kwargs)
        op = a.op if is_layer else self._operation(a, b.op)
        if self._is_of_weights(a):
            self.of_weights.update(map(id, a.outputs))
        self._number(a.outputs, b.outputs)
        shapes = [self._shape(x.shape, y.shape) for x, y in zip(a.outputs, b.outputs, strict=True)]
        return RecordedCall(op, a.path, args, kwargs, a.outputs, shapes)

    def _shape(self, a: tuple, b: tuple) -> tuple:
        dims = [self.value(x, y) for x, y in zip(a, b, strict=True)]
        return tuple(None if isinstance(d, _Batch) else d for d in dims)

    def _operation(self, step: RecordedCall, other: Any) -> Any:
        """The first of two `keras.ops` nodes, its attributes free of the batch size."""
        attributes, others = (_attributes(op) for op in (step.op, other))
        if attributes.keys() != others.keys():
            raise DiffersInTraining()
        merged = {k: self.value(attributes[k], others[k]) for k in attributes}
        if "newshape" in merged:
            merged["newshape"] = _newshape(merged["newshape"], step.outputs[0].shape)
        if any(isinstance(x, _Batch) for x in tree.flatten(merged)):
            if isinstance(step.op, SPREADS) and self._is_of_weights(step):
                return step.op  # held.py says what becomes of it
            raise CannotTrace(f"uses the batch size in {type(step.op).__name__}")
        changes = {k: v for k, v in merged.items() if isinstance(v, tuple) and v != attributes[k]}
        return with_attributes(step.op, changes) if changes else step.op

    def _is_of_weights(self, step: RecordedCall) -> bool:
        """Whether a call reads nothing but weights that the code uses itself."""
        read = tensors_in((step.args, step.kwargs))
        return bool(read) and all(id(x) in self.of_weights for x in read)

    def value(self, a: Any, b: Any) -> Any:
        """What stands for two values; raises if they differ in more than the batch size."""
        for kinds, merge in self._merges:
            if isinstance(a, kinds) and isinstance(b, kinds):
                return merge(a, b)
        if isinstance(a, (keras.Variable, keras.layers.Layer)):
            return _differ()
        if _is_array(a) and _is_array(b):
            return _constant(_numpy(a), _numpy(b))
        return a if a is b or a == b else _differ()

    @property
    def _merges(self) -> tuple:
        """Kinds of values, and how two of a kind become one; the first that fits counts."""
        return (
            ((tuple, list), self._sequence),
            (dict, self._dict),
            (KerasTensor, self._tensor),
            (keras.Variable, self._variable),
            (keras.layers.Layer, lambda a, b: a if a is b else _differ()),
            (slice, self._slice),
            ((bool, np.bool_), lambda a, b: a if a == b else _differ()),
            ((int, np.integer), _whole_number),
        )

    def _sequence(self, a: Any, b: Any) -> Any:
        if type(a) is not type(b) or len(a) != len(b):
            return a if a == b else _differ()
        return type(a)(self.value(x, y) for x, y in zip(a, b, strict=True))

    def _dict(self, a: dict, b: dict) -> dict:
        return {k: self.value(a[k], b[k]) for k in a} if a.keys() == b.keys() else _differ()

    def _tensor(self, a: KerasTensor, b: KerasTensor) -> Any:
        first, second = (t[id(x)] for t, x in zip(self.numbers, (a, b), strict=True))
        return a if first == second else _differ()

    def _variable(self, a: keras.Variable, b: keras.Variable) -> Any:
        if a is not b:
            return _differ()
        return _numpy(keras.ops.convert_to_tensor(a)) if id(a) in self.first.buffers else a

    def _slice(self, a: slice, b: slice) -> slice:
        parts = ((a.start, b.start), (a.stop, b.stop), (a.step, b.step))
        return slice(*(self.value(x, y) for x, y in parts))


class LeafMerge(Merge):
    """The same for a layer that stays whole: shapes may follow the number of units."""

    def __init__(self, first: RecordedRun, second: RecordedRun, resized: dict[int, int]) -> None:
        super().__init__(first, second)
        self.resized = resized

    def _shape(self, a: tuple, b: tuple) -> tuple:
        if len(a) != len(b):
            return _differ()
        return tuple(
            x if self.resized.get(x) == y else super(LeafMerge, self)._shape((x,), (y,))[0]
            for x, y in zip(a, b, strict=True)
        )

    def value(self, a: Any, b: Any) -> Any:
        if _is_array(a) and _is_array(b) and not isinstance(a, (int, np.integer)):
            per_sample = (a.shape[:1], b.shape[:1]) == ((BATCHES[0],), (BATCHES[1],))
            if per_sample and set(a.shape[1:]) | set(b.shape[1:]) <= {1}:
                return 0.0  # one number for each sample, of no interest: a random draw, say
        return super().value(a, b)


def _alike(a: Any, b: Any) -> bool:
    """One layer, or two without variables that a `call` has made anew, of the same config."""
    if a is b:
        return True
    if a.variables or b.variables:
        raise CannotTrace(f"makes a layer with variables in its call ({a.name!r})")
    configs = [{k: v for k, v in x.get_config().items() if k != "name"} for x in (a, b)]
    return bool(configs[0] == configs[1])


def _differ() -> Any:
    raise DiffersInTraining("behaves differently in training, or computes with the batch size")


def _whole_number(a: Any, b: Any) -> Any:
    if isinstance(a, bool) or isinstance(b, bool):
        return a if a == b else _differ()
    a, b = int(a), int(b)
    if a == b:
        return a
    first, second = BATCHES
    if a % first or b % second or a // first != b // second:
        return _differ()
    return _Batch(a // first)


def _is_array(x: Any) -> bool:
    return isinstance(x, (np.ndarray, np.generic)) or backend.is_tensor(x)


def _numpy(x: Any) -> np.ndarray:
    return np.asarray(x if isinstance(x, (np.ndarray, np.generic)) else to_numpy(x))


def _constant(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A constant of both runs; rows for each sample shrink to one if they are all alike."""
    if a.ndim != b.ndim or a.dtype != b.dtype:
        return _differ()
    for axis, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)):
        if n != m:
            row, other = a.take([0], axis), b.take([0], axis)
            if (n, m) != BATCHES or not ((a == row).all() and (b == other).all()):
                return _differ()
            a, b = row, other
    return a if np.array_equal(a, b) else _differ()


def _resolved(step: RecordedCall, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Checks that arguments hold for any batch: no sizes, constants that broadcast."""
    flat = tree.flatten((args, kwargs))
    if any(isinstance(x, _Batch) for x in flat):
        raise CannotTrace(f"uses the batch size in {type(step.op).__name__}")
    for variable in (x for x in flat if isinstance(x, keras.Variable)):
        raise CannotTrace(f"uses its own variable {variable.path!r} directly")
    before = tree.flatten((step.args, step.kwargs))
    shrunk = any(isinstance(x, np.ndarray) and x.shape != y.shape for x, y in _zip(flat, before))
    if shrunk and not isinstance(step.op, keras.layers.Layer):
        _require_same_shapes(step, args, kwargs)
    return args, kwargs


def _require_same_shapes(step: RecordedCall, args: tuple, kwargs: dict) -> None:
    shapes = [tuple(x.shape) for x in tensors_in(step.op.compute_output_spec(*args, **kwargs))]
    if shapes != [tuple(x.shape) for x in step.outputs]:
        raise CannotTrace(f"has a constant for each sample of the batch in {step.op.name!r}")


def _zip(a: list, b: list) -> Iterable:
    return zip(a, b, strict=False) if len(a) == len(b) else ()


def _attributes(op: Any) -> dict:
    config = getattr(op, "_auto_config", None)
    if config is not None:
        return dict(config.config)
    hidden = {"name", "built"}
    return {k: v for k, v in vars(op).items() if k not in hidden and not k.startswith("_")}


def with_attributes(op: Any, changes: dict) -> Any:
    """A copy of a `keras.ops` node's operation with other attributes, without graph nodes."""
    try:
        new = type(op)(**{**op._auto_config.config, **changes})
    except (AttributeError, NotImplementedError):  # arguments that Keras cannot serialise
        new = object.__new__(type(op))
        new.__dict__.update(op.__dict__)
        new._inbound_nodes, new._outbound_nodes = [], []
        for key, value in changes.items():
            setattr(new, key, value)
    new.name = op.name
    return new


def _newshape(shape: Any, output: tuple) -> tuple:
    """The shape of a Reshape with -1 for the batch; another -1 becomes the size it was."""
    shape = (shape,) if isinstance(shape, (int, _Batch)) else tuple(shape)
    if sum(isinstance(d, _Batch) for d in shape) != 1:
        return shape
    known = [output[i] if isinstance(d, int) and d == -1 else d for i, d in enumerate(shape)]
    return tuple(-1 if isinstance(d, _Batch) else d for d in known)
