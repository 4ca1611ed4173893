"""Opens a composite layer: the sublayers and `keras.ops` that its `call` uses, in order.

`open_layer` calls the layer once more, on symbolic tensors of its own, and lets every sublayer
that is to be opened as well run its `call` in line. What remains are calls of plain layers and
operations, and that is what the layer computes: nothing about any class has to be known.

Python code can do more than a graph can say, so that every layer is opened twice, with two batch
sizes, once in training and once in inference mode. What is the same both times is what the layer
does; sizes that grow with the batch are recognised by the prime numbers that stand for it. A layer
that differs in anything else, that uses a trainable variable of its own, changes one, draws random
numbers or adds a loss is not opened (`CannotOpen` says why), because something of it would be lost.

The caller's layers are as before afterwards: calls go to watched classes that the layers get for
the time of the trace, and the graph nodes that Keras records on them are taken away again.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, tree
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.layers.layer import CallContext
from keras.src.utils.naming import to_snake_case

# Stand for the batch size. Primes, and larger than what layers use as sizes inside, so that a
# multiple of both at once is the batch and nothing else.
BATCHES = (1009, 1013)


class CannotOpen(Exception):
    """A layer whose `call` cannot be replaced by calls of its parts; the message says why."""


class _Batch:
    """Stands for a size that is `times` the batch size."""

    def __init__(self, times: int) -> None:
        self.times = times


@dataclass(frozen=True, eq=False)
class Step:
    """One call that a composite layer makes: arguments and outputs in KerasTensors."""

    op: Any
    path: str
    args: tuple
    kwargs: dict
    outputs: list
    shapes: list


@dataclass(frozen=True, eq=False)
class Opened:
    """What a composite layer does: `steps` in order, from `inlets` to `outputs`."""

    inlets: list
    steps: list[Step]
    outputs: list
    closed: dict[int, str] = field(default_factory=dict)  # id(sublayer) -> why it was not opened
    variables: dict[str, Any] = field(default_factory=dict)  # of a leaf: name -> its symbol


def open_layer(op: Any, args: tuple, kwargs: dict, opens: Callable[[Any], bool]) -> Opened:
    """The calls that `op(*args, **kwargs)` consists of.

    Args:
        op: a built layer with sublayers.
        args, kwargs: of the call; KerasTensors, with masks attached as Keras does, say the shapes.
        opens: which of the sublayers (and their sublayers) are to be opened in turn.

    Raises:
        CannotOpen: the layer has to stay as it is.
    """
    closed: dict[int, str] = {}
    while True:
        settings = zip(BATCHES, (False, True), strict=True)
        first = _traced(op, args, kwargs, opens, closed, *next(settings))
        known = len(closed)
        second = _traced(op, args, kwargs, opens, closed, *next(settings))
        if len(closed) > known:
            continue
        try:
            opened = _Merge(first, second).opened()
        except CannotOpen:
            if not _close_culprits(first, opens, closed):
                raise
            continue
        _check_variables(op, opened)
        return replace(opened, closed=closed)


def run_functional(
    model: Any, args: tuple, kwargs: dict, is_functional: Callable, needs_masks: Callable
) -> Opened:
    """The calls of a functional model on tensors of other shapes than it was built with.

    Args:
        is_functional: which sublayers are functional models, to be run in line.
        needs_masks: for which sublayers the calls that make their masks are wanted as well.
    """
    run = _traced(model, args, kwargs, is_functional, {}, None, None, needs_masks)
    steps = [replace(s, shapes=[tuple(x.shape) for x in s.outputs]) for s in run.steps]
    return Opened(run.inlets, steps, run.outputs)


# --- one run of the layer's `call` -----------------------------------------------------------


@dataclass(eq=False)
class _Run:
    inlets: list
    steps: list[Step]
    outputs: list
    composites: list = field(default_factory=list)  # (layer, args, kwargs) opened on the way
    buffers: set[int] = field(default_factory=set)  # ids of variables that are constants
    inputs: list = field(default_factory=list)  # of a leaf: the inlets that are no variables
    variables: dict[str, Any] = field(default_factory=dict)


class _Reads(keras.StatelessScope):
    """Notices who reads or writes a variable while a composite's own code runs."""

    def __init__(self, watch: "_Watch") -> None:
        super().__init__()
        self.watch = watch

    def get_current_value(self, variable: Any) -> Any:
        if not self.watch.is_paused:
            self.watch.use(variable)
        return super().get_current_value(variable)

    def add_update(self, update: tuple) -> None:
        if not self.watch.is_paused:
            raise CannotOpen(f"changes its own variable {update[0].path!r}")
        super().add_update(update)


class _Watch:
    """Follows the calls that a layer makes, in its own class for each layer's class."""

    def __init__(
        self, root: Any, opens: Callable, closed: dict[int, str], needs_masks: Callable
    ) -> None:
        self.root, self.closed = root, closed
        self.layers = list(root._flatten_layers())
        self.operations = [o for x in self.layers for o in (x, *getattr(x, "_operations", ()))]
        self.masked = {id(x) for x in self.layers if needs_masks(x)}
        self.inline = {id(x) for x in self.layers if x is root or opens(x)} - set(closed)
        # What no training changes may become a constant, unless the call itself changes it.
        self.buffers = {id(v) for x in self.layers for v in _made_untrainable(x)}
        self.is_paused = False
        self.stack: list = []
        self.paths: dict[int, str] = {}
        self.composites: list = []
        self.loses_mask = False

    @contextmanager
    def __call__(self, training: Any) -> Iterator:
        lengths = [(o, len(o._inbound_nodes), len(o._outbound_nodes)) for o in self.operations]
        classes = [(x, type(x)) for x in self.layers]
        watched = {c: self._watched(c) for c in {c for _, c in classes}}
        try:
            for layer, c in classes:
                object.__setattr__(layer, "__class__", watched[c])
            with _Reads(self), _mode(training):
                yield
        finally:
            for layer, c in classes:
                object.__setattr__(layer, "__class__", c)
            for o, inbound, outbound in lengths:
                del o._inbound_nodes[inbound:], o._outbound_nodes[outbound:]

    def _watched(self, layer_class: Any) -> type:
        watch = self

        def __call__(layer: Any, *args: Any, **kwargs: Any) -> Any:
            return watch.called(layer, layer_class, args, kwargs)

        def add_loss(layer: Any, loss: Any) -> None:
            if watch.is_paused:
                return  # only its shape is asked for
            raise CannotOpen(f"{layer.name!r} adds a loss in its call")

        return type(
            layer_class.__name__,
            (layer_class,),
            {"__call__": __call__, "add_loss": add_loss, "__module__": layer_class.__module__},
        )

    def called(self, layer: Any, layer_class: Any, args: tuple, kwargs: dict) -> Any:
        if self.is_paused or not _tensors((args, kwargs)):
            return layer_class.__call__(layer, *args, **kwargs)
        if not layer.built and layer_class.build is not keras.layers.Layer.build:
            self._check_stateless(layer, layer_class, args, kwargs)
        self.stack.append(layer.name)
        try:
            if id(layer) in self.inline:
                return self._opened(layer, layer_class, args, kwargs)
            return self._kept(layer, layer_class, args, kwargs)
        finally:
            self.stack.pop()

    def _check_stateless(self, layer: Any, layer_class: Any, args: tuple, kwargs: dict) -> None:
        """A layer that was never built may be called if a copy of it makes no variables."""
        self.is_paused = True
        try:
            twin = layer_class.from_config(layer.get_config())
            twin(*args, **kwargs)
        except Exception as error:
            raise CannotOpen(f"its sublayer {layer.name!r} is not built") from error
        finally:
            self.is_paused = False
        if twin.variables:
            raise CannotOpen(f"its sublayer {layer.name!r} is not built")

    def _opened(self, layer: Any, layer_class: Any, args: tuple, kwargs: dict) -> Any:
        self.composites.append((layer, args, kwargs))
        if layer is self.root:
            return self._in_line(layer, layer_class, args, kwargs)
        depth = len(self.stack)
        try:
            return self._in_line(layer, layer_class, args, kwargs)
        except Exception as error:
            del self.stack[depth:]
            self._close(layer, error)
            return self._kept(layer, layer_class, args, kwargs)

    def _close(self, layer: Any, error: Exception) -> None:
        self.inline.discard(id(layer))
        self.closed[id(layer)] = why(error)

    def _in_line(self, layer: Any, layer_class: Any, args: tuple, kwargs: dict) -> Any:
        if layer.activity_regularizer is not None:
            raise CannotOpen(f"{layer.name!r} has an activity regularizer")
        found = []

        def symbolic_call(*args: Any, **kwargs: Any) -> list:
            found.append(layer.call(*args, **kwargs))
            return [_twin(x) for x in _tensors(found[0])]

        # Keras' own `__call__` casts the inputs, finds masks and sets the mode as ever, but the
        # node it records for the layer gets stand-ins: the real outputs keep their history.
        layer.__dict__["symbolic_call"] = symbolic_call
        try:
            stand_ins = layer_class.__call__(layer, *args, **kwargs)
        finally:
            del layer.__dict__["symbolic_call"]
        for x, stand_in in zip(_tensors(found[0]), stand_ins, strict=True):
            mask = backend.get_keras_mask(stand_in)
            if mask is not None and backend.get_keras_mask(x) is None:
                backend.set_keras_mask(x, mask)
                self.loses_mask = True
        return found[0]

    def _kept(self, layer: Any, layer_class: Any, args: tuple, kwargs: dict) -> Any:
        self.is_paused = True
        layer.__dict__["symbolic_call"] = functools.partial(_exact_spec, layer)
        try:
            outputs = layer_class.__call__(layer, *args, **kwargs)
        finally:
            del layer.__dict__["symbolic_call"]
            self.is_paused = False
        self.paths[id(layer._inbound_nodes[-1])] = "/".join(self.stack)
        return outputs

    def use(self, variable: Any) -> None:
        if id(variable) not in self.buffers:
            raise CannotOpen(f"uses its own variable {variable.path!r} directly")


def _exact_spec(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The output's shape, found by running the call where the layer itself is vague.

    EinsumDense, say, leaves sizes open that the code around it goes on to compute with.
    """
    spec = layer.compute_output_spec(*args, **kwargs)
    is_vague = any(None in x.shape for x in _tensors(spec))
    if is_vague and all(None not in x.shape for x in _tensors((args, kwargs))):
        return backend.compute_output_spec(layer.call, *args, **kwargs)
    return spec


@contextmanager
def _mode(training: Any) -> Iterator:
    """What Keras does around the outermost call, without clearing that layer's losses."""
    before = global_state.get_global_attribute("current_call_ctx")
    context = CallContext(entry_layer=None)
    context.set_value("training", training)
    global_state.set_global_attribute("current_call_ctx", context)
    try:
        yield
    finally:
        global_state.set_global_attribute("current_call_ctx", before)


def _made_untrainable(layer: Any) -> list:
    return getattr(layer, "_non_trainable_variables", [])


def _tensors(structure: Any) -> list:
    return [x for x in tree.flatten(structure) if isinstance(x, KerasTensor)]


def _twin(x: Any) -> Any:
    twin = KerasTensor(x.shape, x.dtype)
    if backend.get_keras_mask(x) is not None:
        backend.set_keras_mask(twin, backend.get_keras_mask(x))
    return twin


def _traced(
    op: Any,
    args: tuple,
    kwargs: dict,
    opens: Callable,
    closed: dict,
    batch: int | None,
    training: Any,
    needs_masks: Callable = lambda op: False,
) -> _Run:
    fresh: dict[int, Any] = {}

    def inlet(x: Any) -> Any:
        if isinstance(x, KerasTensor) and id(x) not in fresh:
            shape = tuple(batch if d is None and i == 0 else d for i, d in enumerate(x.shape))
            fresh[id(x)] = keras.Input(batch_shape=shape, dtype=x.dtype)
            mask = backend.get_keras_mask(x)
            if mask is not None:
                backend.set_keras_mask(fresh[id(x)], inlet(mask))
        return fresh.get(id(x), x)

    args, kwargs = tree.map_structure(inlet, (args, kwargs))
    if training is not None:
        kwargs = _with_training(op, kwargs, training)
    watch = _Watch(op, opens, closed, needs_masks)
    with watch(training):
        try:
            outputs = op(*args, **kwargs)
        except Exception as error:
            raise CannotOpen(_with_sizes(why(error), args, kwargs)) from error
        inlets, flat = list(fresh.values()), [x for x in tree.flatten(outputs) if x is not None]
        flat = [_symbolic(x, inlets[0]) for x in flat]
        if watch.loses_mask:
            raise CannotOpen("passes an implicit mask on; pass the mask as an argument instead")
        steps = _named(_steps(flat, inlets, watch), watch)
    return _Run(inlets, steps, flat, watch.composites, watch.buffers)


def _symbolic(output: Any, inlet: Any) -> Any:
    """The output, made a node of the graph if it is a constant."""
    if isinstance(output, KerasTensor):
        return output
    if not backend.is_tensor(output):
        raise CannotOpen(f"returns {type(output).__name__} besides tensors")
    zero = keras.ops.zeros_like(keras.ops.sum(inlet))
    return keras.ops.add(keras.ops.cast(zero, output.dtype), output)


def _with_training(op: Any, kwargs: dict, training: bool) -> dict:
    # A functional model sets the mode of all its layers, also of those called with another.
    return {**kwargs, "training": training} if op._call_has_training_arg else kwargs


def why(error: Exception) -> str:
    """The first line of an error that says something."""
    # Keras wraps messages in what was called with what, and in escape codes for bold.
    lines = [
        s.replace("\x1b[1m", "").replace("\x1b[0m", "").strip() for s in str(error).split("\n")
    ]
    skip = ("Exception encountered when calling", "Arguments received by")
    text = next((s for s in lines if s and not s.startswith(skip)), "")
    if isinstance(error, CannotOpen):
        return text
    return f"its call does not run on symbolic tensors ({type(error).__name__}: {text[:200]})"


def _with_sizes(reason: str, args: tuple, kwargs: dict) -> str:
    if all(None not in x.shape for x in _tensors((args, kwargs))):
        return reason
    return f"unknown size: build the model on inputs with fixed sizes; {reason}"


def _steps(outputs: list, inlets: list, watch: _Watch) -> list[Step]:
    """The nodes between inlets and outputs, each after those it depends on."""
    done: set[int] = set()
    steps: list[Step] = []
    known = {id(x) for x in inlets}
    stack = [(_node(x, known), False) for x in reversed(outputs)]
    while stack:
        node, is_ready = stack.pop()
        if node is None or id(node) in done:
            continue
        if is_ready:
            done.add(id(node))
            path = watch.paths.get(id(node), f"{watch.root.name}/{node.operation.name}")
            arguments = node.arguments
            steps.append(
                Step(node.operation, path, arguments.args, arguments.kwargs, node.outputs, [])
            )
        else:
            stack.append((node, True))
            needed = [*node.arguments.keras_tensors]
            if id(node.operation) in watch.masked:
                needed += filter(None.__ne__, map(backend.get_keras_mask, needed))
            stack += [(_node(x, known), False) for x in reversed(needed)]
    return steps


def _named(steps: list[Step], watch: _Watch) -> list[Step]:
    """Gives the operations that the run has made names that do not depend on earlier runs."""
    known, used = {id(o) for o in watch.operations}, set()
    for i, step in enumerate(steps):
        if id(step.op) not in known:
            kind = to_snake_case(type(step.op).__name__)
            numbered = (f"{kind}_{n}" if n else kind for n in itertools.count())
            step.op.name = next(n for n in numbered if n not in used)
            used.add(step.op.name)
            steps[i] = replace(step, path=f"{watch.root.name}/{step.op.name}")
    return steps


def _node(x: Any, known: set[int]) -> Any:
    if id(x) in known:
        return None
    history = getattr(x, "_keras_history", None)
    if history is None or history.operation is None:
        raise CannotOpen("uses a tensor of unknown origin")
    node = history.operation._inbound_nodes[history.node_index]
    if node.is_input:
        raise CannotOpen(f"uses the tensor {x.name!r} that is not among its inputs")
    return node


@dataclass(frozen=True, eq=False)
class Leaf:
    """A call of a layer without sublayers, in KerasTensors."""

    op: Any
    args: tuple
    kwargs: dict


def takes_mask(op: Any) -> bool:
    """Whether Keras hands the layer's call masks that are not among its arguments."""
    return any(n == "mask" or n.endswith("_mask") for n in op._call_signature.parameters)


def trace_leaf(leaf: Leaf, twin: Leaf, resized: dict[int, int], training: Any) -> Opened:
    """What a layer's `call` does with its input and variables, the same for any number of units.

    Args:
        leaf: the layer, with inputs whose batch size is None.
        twin: an equal layer, on inputs with fewer units.
        resized: number of units in `leaf` -> in `twin`.

    Raises:
        CannotOpen: it cannot be traced, or does different things.
    """
    pair = [_leaf_run(x, b, training) for x, b in zip((leaf, twin), BATCHES, strict=True)]
    variables = [run.variables for run in pair]
    if variables[0].keys() != variables[1].keys():
        raise CannotOpen("has other variables on fewer units")
    for a, b in ((variables[0][k], variables[1][k]) for k in variables[0]):
        expected = tuple(resized.get(n, n) for n in a.shape)
        if tuple(b.shape) not in (expected, tuple(a.shape)):
            raise CannotOpen("has variables that do not follow the size of its input")
        if tuple(b.shape) != expected:
            raise CannotOpen("has a variable of a fixed size")
    merge = _LeafMerge(pair[0], pair[1], resized)
    return replace(merge.opened(), inlets=pair[0].inputs, variables=variables[0])


def _leaf_run(leaf: Leaf, batch: int, training: Any) -> _Run:
    fresh: dict[int, Any] = {}

    def inlet(x: Any) -> Any:
        if isinstance(x, KerasTensor) and id(x) not in fresh:
            fresh[id(x)] = keras.Input(batch_shape=(batch, *x.shape[1:]), dtype=x.dtype)
        return fresh.get(id(x), x)

    args, kwargs = tree.map_structure(inlet, (leaf.args, leaf.kwargs))
    if training is not None:
        kwargs = {**kwargs, "training": training}
    names = [k for k, v in vars(leaf.op).items() if any(v is w for w in leaf.op.weights)]
    if len(names) != len(leaf.op.weights):
        raise CannotOpen("holds variables in a structure")
    own = {n: getattr(leaf.op, n) for n in names}
    symbols = {n: keras.Input(batch_shape=v.shape, dtype=v.dtype) for n, v in own.items()}
    watch = _Watch(leaf.op, lambda op: False, {}, lambda op: False)
    watch.is_paused = True  # it may draw random numbers: it stays whole, and the scope undoes it
    vars(leaf.op).update(symbols)
    try:
        with _Reads(watch), _mode(training):
            outputs = leaf.op.call(*args, **kwargs)
    except Exception as error:
        raise CannotOpen(why(error)) from error
    finally:
        vars(leaf.op).update(own)
    flat = tree.flatten(outputs)
    if not all(isinstance(x, KerasTensor) for x in flat):
        raise CannotOpen("returns something that does not depend on its inputs")
    inlets = [*fresh.values(), *symbols.values()]
    steps = _named(_steps(flat, inlets, watch), watch)
    return _Run(inlets, steps, flat, inputs=list(fresh.values()), variables=symbols)


def function_steps(function: Callable) -> list[Step]:
    """The operations of a function of one tensor, tried on a tensor of rank 3.

    Raises:
        CannotOpen: it does not run on symbolic tensors.
    """
    x = keras.Input((3, 5))
    watch = _Watch(x._keras_history.operation, lambda op: False, {}, lambda op: False)
    try:
        with _Reads(watch):
            y = function(x)
    except Exception as error:
        raise CannotOpen(why(error)) from error
    if not isinstance(y, KerasTensor):
        raise CannotOpen("does not return a tensor that depends on its input")
    return _steps([y], [x], watch)


# --- what two runs have in common ------------------------------------------------------------


class _Merge:
    """Reduces two runs, of different batch sizes and modes, to one that holds for both."""

    def __init__(self, first: _Run, second: _Run) -> None:
        self.first, self.second = first, second
        self.numbers: list[dict[int, int]] = [{}, {}]
        self._number(first.inlets, second.inlets)

    def _number(self, a: list, b: list) -> None:
        if len(a) != len(b):
            raise CannotOpen("behaves differently in training")
        for table, tensors in zip(self.numbers, (a, b), strict=True):
            table.update((id(x), len(table) + i) for i, x in enumerate(tensors))

    def opened(self) -> Opened:
        if len(self.first.steps) != len(self.second.steps):
            raise CannotOpen("behaves differently in training")
        pairs = zip(self.first.steps, self.second.steps, strict=True)
        steps = [self._step(a, b) for a, b in pairs]
        self.value(self.first.outputs, self.second.outputs)
        return Opened(self.first.inlets, steps, self.first.outputs)

    def _step(self, a: Step, b: Step) -> Step:
        is_layer = isinstance(a.op, keras.layers.Layer)
        if type(a.op) is not type(b.op) or (is_layer and not _alike(a.op, b.op)):
            raise CannotOpen("behaves differently in training")
        modes = [x.kwargs.get("training") for x in (a, b)]
        if modes not in ([False, True], [None, None]):
            raise CannotOpen(f"sets the mode of {a.op.name!r} (training={modes[0]}) itself")
        given = [{k: v for k, v in x.kwargs.items() if k != "training"} for x in (a, b)]
        args, kwargs = self.value((a.args, given[0]), (b.args, given[1]))
        args, kwargs = _resolved(a, args, kwargs)
        op = a.op if is_layer else self._operation(a, b.op)
        self._number(a.outputs, b.outputs)
        shapes = [self._shape(x.shape, y.shape) for x, y in zip(a.outputs, b.outputs, strict=True)]
        return Step(op, a.path, args, kwargs, a.outputs, shapes)

    def _shape(self, a: tuple, b: tuple) -> tuple:
        dims = [self.value(x, y) for x, y in zip(a, b, strict=True)]
        return tuple(None if isinstance(d, _Batch) else d for d in dims)

    def _operation(self, step: Step, other: Any) -> Any:
        """The first of two `keras.ops` nodes, its attributes free of the batch size."""
        own, others = (_attributes(op) for op in (step.op, other))
        if own.keys() != others.keys():
            raise CannotOpen("behaves differently in training")
        found = {k: self.value(own[k], others[k]) for k in own}
        if "newshape" in found:
            found["newshape"] = _newshape(found["newshape"], step.outputs[0].shape)
        if any(isinstance(x, _Batch) for x in tree.flatten(found)):
            raise CannotOpen(f"uses the batch size in {type(step.op).__name__}")
        changes = {k: v for k, v in found.items() if isinstance(v, tuple) and v != own[k]}
        return with_attributes(step.op, changes) if changes else step.op

    def value(self, a: Any, b: Any) -> Any:
        """What stands for two values; raises if they differ in more than the batch size."""
        if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
            return type(a)(self.value(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {k: self.value(a[k], b[k]) for k in a}
        if isinstance(a, KerasTensor) and isinstance(b, KerasTensor):
            first, second = (t[id(x)] for t, x in zip(self.numbers, (a, b), strict=True))
            return a if first == second else _differ()
        if isinstance(a, keras.Variable) and a is b and id(a) in self.first.buffers:
            return _numpy(keras.ops.convert_to_tensor(a))
        if isinstance(a, (keras.Variable, keras.layers.Layer)):
            return a if a is b else _differ()
        if isinstance(a, slice) and isinstance(b, slice):
            parts = ((a.start, b.start), (a.stop, b.stop), (a.step, b.step))
            return slice(*(self.value(x, y) for x, y in parts))
        if isinstance(a, (bool, np.bool_)) or isinstance(b, (bool, np.bool_)):
            return a if a == b else _differ()
        if isinstance(a, (int, np.integer)) and isinstance(b, (int, np.integer)):
            return _whole(int(a), int(b))
        if _is_array(a) and _is_array(b):
            return _constant(_numpy(a), _numpy(b))
        return a if a is b or a == b else _differ()


class _LeafMerge(_Merge):
    """The same for a layer that stays whole: shapes may follow the number of units."""

    def __init__(self, first: _Run, second: _Run, resized: dict[int, int]) -> None:
        super().__init__(first, second)
        self.resized = resized

    def _shape(self, a: tuple, b: tuple) -> tuple:
        if len(a) != len(b):
            return _differ()
        return tuple(
            x if self.resized.get(x) == y else super(_LeafMerge, self)._shape((x,), (y,))[0]
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
        raise CannotOpen(f"makes a layer with variables in its call ({a.name!r})")
    configs = [{k: v for k, v in x.get_config().items() if k != "name"} for x in (a, b)]
    return bool(configs[0] == configs[1])


def _differ() -> Any:
    raise CannotOpen("behaves differently in training, or computes with the batch size")


def _whole(a: int, b: int) -> Any:
    if a == b:
        return a
    first, second = BATCHES
    if a % first or b % second or a // first != b // second:
        return _differ()
    return _Batch(a // first)


def _is_array(x: Any) -> bool:
    return isinstance(x, (np.ndarray, np.generic)) or backend.is_tensor(x)


def _numpy(x: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(x))


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


def _resolved(step: Step, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Checks that arguments hold for any batch: no sizes, constants that broadcast."""
    flat = tree.flatten((args, kwargs))
    if any(isinstance(x, _Batch) for x in flat):
        raise CannotOpen(f"uses the batch size in {type(step.op).__name__}")
    if any(isinstance(x, keras.Variable) for x in flat):
        name = next(x.path for x in flat if isinstance(x, keras.Variable))
        raise CannotOpen(f"uses its own variable {name!r} directly")
    before = tree.flatten((step.args, step.kwargs))
    shrunk = any(isinstance(x, np.ndarray) and x.shape != y.shape for x, y in _zip(flat, before))
    if shrunk and not isinstance(step.op, keras.layers.Layer):
        shapes = [tuple(x.shape) for x in _tensors(step.op.compute_output_spec(*args, **kwargs))]
        if shapes != [tuple(x.shape) for x in step.outputs]:
            raise CannotOpen(f"has a constant for each sample of the batch in {step.op.name!r}")
    return args, kwargs


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
    config = getattr(op, "_auto_config", None)
    if config is not None:
        new = type(op)(**{**config.config, **changes})
    else:  # arguments that Keras cannot serialise
        new = copy.copy(op)
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


# --- who is to blame -------------------------------------------------------------------------


def _close_culprits(run: _Run, opens: Callable, closed: dict[int, str]) -> bool:
    """Finds composites inside that cannot be opened on their own, innermost first."""
    (root, *_), *inner = run.composites
    before = len(closed)
    for layer, args, kwargs in reversed(inner):
        if id(layer) not in closed and layer is not root:
            _try_alone(layer, args, kwargs, opens, closed)
    return len(closed) > before


def _try_alone(layer: Any, args: tuple, kwargs: dict, opens: Callable, closed: dict) -> None:
    def free(x: Any) -> Any:
        if not isinstance(x, KerasTensor):
            return x
        shape = [None if i == 0 and d % BATCHES[0] == 0 else d for i, d in enumerate(x.shape)]
        twin = KerasTensor(shape, x.dtype)
        mask = backend.get_keras_mask(x)
        if mask is not None:
            backend.set_keras_mask(twin, free(mask))
        return twin

    args, kwargs = tree.map_structure(free, (args, kwargs))
    kwargs = {k: v for k, v in kwargs.items() if k != "training"}
    try:
        pair = [
            _traced(layer, args, kwargs, lambda x: opens(x) and id(x) not in closed, {}, b, t)
            for b, t in zip(BATCHES, (False, True), strict=True)
        ]
        _Merge(*pair).opened()
    except CannotOpen as error:
        closed[id(layer)] = str(error)


def _check_variables(op: Any, opened: Opened) -> None:
    """Nothing that is trained may be missing from the calls that stand for the layer."""
    reached = {id(v) for s in opened.steps for v in getattr(s.op, "weights", ())}
    for variable in op.weights:
        if variable.trainable and id(variable) not in reached:
            raise CannotOpen(f"does not use its variable {variable.path!r} by way of a sublayer")
