"""Runs the `call` of a layer on symbolic tensors and notes the calls that it makes.

Calls go to watched classes that the layers get for the time of the run, and the graph nodes that
Keras records on them are taken away again: the caller's layers are as before afterwards.
"""

import functools
import itertools
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, tree

from keras_polar.backends import to_numpy
from keras_polar.graph.handed import handed
from keras_polar.graph.keras_private import (
    CallContext,
    backend,
    global_state,
    node_of,
    to_snake_case,
)


class CannotTrace(Exception):
    """A layer whose `call` cannot be replaced by calls of its parts.

    The message says why: what the layer does or has, as follows on "it".
    """


class DiffersInTraining(CannotTrace):
    """A layer that computes something else in training, or with another batch size."""

    def __init__(self, message: str = "behaves differently in training") -> None:
        super().__init__(message)


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call that a composite layer makes: arguments and outputs in KerasTensors."""

    op: Any
    path: str
    args: tuple
    kwargs: dict
    outputs: list
    shapes: list


@dataclass(frozen=True, eq=False)
class OwnWeight:
    """A trained variable that a layer holds itself, as its attribute `name`.

    Attributes:
        symbol: the tensor that stands for it in the recorded calls.
        rows: of the table that the variable is, if the tensor stands for some of its rows.
        axis: of the tensor, along which a row lies then.
    """

    owner: Any
    name: str
    variable: Any
    symbol: KerasTensor
    rows: np.ndarray | None = None
    axis: int = -1

    @property
    def full_name(self) -> str:
        return f"{self.owner.name}_{self.name.strip('_')}"


# Layers that were made for weights that code uses itself -> these variables, in the same order.
MADE_FOR: weakref.WeakKeyDictionary[Any, tuple] = weakref.WeakKeyDictionary()


def variables_behind(op: Any) -> dict[int, Any]:
    """Id of each weight of a call's layer -> the variable of the model whose value it has."""
    own = getattr(op, "weights", ())
    return dict(zip(map(id, own), MADE_FOR.get(op, own), strict=True))


@dataclass(eq=False)
class RecordedRun:
    """What one run of a layer's `call` did, from `inlets` to `outputs`."""

    inlets: list
    steps: list[RecordedCall]
    outputs: list
    composites: list = field(default_factory=list)  # (layer, args, kwargs) opened on the way
    buffers: set[int] = field(default_factory=set)  # ids of variables that are constants
    inputs: list = field(default_factory=list)  # the inlets that are no variables
    variables: dict[str, Any] = field(default_factory=dict)  # of a leaf: name -> its symbol
    weights: list[OwnWeight] = field(default_factory=list)  # that the calls use themselves
    idle: set[int] = field(default_factory=set)  # ids of variables whose layers do not use them
    loses_mask: bool = False  # an output has a mask that the calls do not attach to it


def run_layer(
    op: Any,
    args: tuple,
    kwargs: dict,
    opens: Callable,
    closed: dict,
    batch: int | None,
    training: Any,
    needs_masks: Callable = lambda op: False,
) -> RecordedRun:
    """One run of a layer on inlets of its own.

    Args:
        args, kwargs: of the call; KerasTensors say the shapes.
        opens: which sublayers run their `call` in line.
        closed: id(sublayer) -> why it stays closed nevertheless.
        batch: what stands for a batch size that is not known.
        training: the mode; None leaves it to the layer.
        needs_masks: for which sublayers the calls that make their masks are wanted as well.

    Raises:
        CannotTrace: the call does not run on symbolic tensors, or does what no graph can say.
    """
    fresh: dict[int, Any] = {}

    def inlet(x: Any) -> Any:
        if isinstance(x, KerasTensor) and id(x) not in fresh:
            shape = tuple(batch if d is None and i == 0 else d for i, d in enumerate(x.shape))
            fresh[id(x)] = keras.Input(batch_shape=shape, dtype=x.dtype)
            mask = backend.get_keras_mask(x)
            if mask is not None:
                backend.set_keras_mask(fresh[id(x)], inlet(mask))
        return fresh.get(id(x), x)

    args, kwargs = mapped_in_order(inlet, (args, kwargs))
    if training is not None:
        kwargs = _with_training(op, kwargs, training)
    watch = CallRecorder(op, opens, closed, needs_masks)
    if batch is not None:
        watch.give_symbols()
    with watch(training):
        try:
            outputs = op(*args, **kwargs)
        except Exception as error:
            reason = f"{why(error)}{line_of(op, error)}"
            raise CannotTrace(_with_sizes(reason, args, kwargs)) from error
        inlets = [*fresh.values(), *(w.symbol for w in watch.weights)]
        flat = [x for x in tree.flatten(outputs) if x is not None]
        flat = [_symbolic(x, inlets[0]) for x in flat]
        steps = named(steps_between(flat, inlets, watch), watch)
    used = {id(x) for s in steps for x in tensors_in((s.args, s.kwargs))} | set(map(id, flat))
    weights = [w for w in watch.weights if id(w.symbol) in used]
    return RecordedRun(
        [*fresh.values(), *(w.symbol for w in weights)],
        steps,
        flat,
        watch.composites,
        watch.buffers,
        inputs=list(fresh.values()),
        weights=weights,
        idle={id(w.variable) for w in watch.weights if id(w.symbol) not in used and w.rows is None},
        loses_mask=watch.loses_mask,
    )


def _symbolic(output: Any, inlet: Any) -> Any:
    """The output, made a node of the graph if it is a constant."""
    if isinstance(output, KerasTensor):
        return output
    if not backend.is_tensor(output):
        raise CannotTrace(f"returns {type(output).__name__} besides tensors")
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
    lines = [s for s in lines if s and not s.startswith(skip)] or [""]
    text = lines[-1] if lines[0] == "in user code:" else lines[0]  # TensorFlow: a stack comes first
    if isinstance(error, CannotTrace):
        return text
    return f"does not run on symbolic tensors ({type(error).__name__}: {text[:200]})"


def _own_weights(layer: Any) -> dict[str, Any]:
    """The trained variables that a layer holds itself, by the names of its attributes."""
    own = {id(v) for v in layer._trainable_variables} - handed(layer).keys()
    return {k: v for k, v in vars(layer).items() if id(v) in own}


def _symbol_of(op: Any, variable: Any) -> KerasTensor:
    """What stands for a layer's variable in its call, in the type that it has there."""
    is_float = keras.backend.is_float_dtype(variable.dtype)
    dtype = op.compute_dtype if is_float else variable.dtype
    symbol = keras.Input(batch_shape=variable.shape, dtype=dtype)
    symbol.__class__ = _Sliced
    return symbol


class _Sliced(KerasTensor):
    """Takes `w[:n]` as variables do; Keras' own wants a tuple."""

    def __getitem__(self, key: Any) -> KerasTensor:
        return super().__getitem__((key,) if isinstance(key, slice) else key)


def line_of(op: Any, error: Exception) -> str:
    """The latest line of the code around a network's `call` that led to an error."""
    if isinstance(error, CannotTrace) or not isinstance(op, keras.Model):
        return ""
    file = type(op).call.__code__.co_filename
    frames = [f for f in _frames_behind(error) if f.filename == file]
    if not frames:
        return ""
    return f" at line {frames[-1].lineno} of {Path(file).name}: `{frames[-1].line}`"


def _frames_behind(error: BaseException | None) -> Iterator[traceback.FrameSummary]:
    """Where an error comes from; Keras and JAX raise others in its place."""
    while error is not None:
        yield from traceback.extract_tb(error.__traceback__)
        error = error.__cause__ or error.__context__


def _with_sizes(reason: str, args: tuple, kwargs: dict) -> str:
    if all(None not in x.shape for x in tensors_in((args, kwargs))):
        return reason
    return (
        "is called on inputs of unknown size: build the model on inputs with fixed sizes; as it is "
        f"it {reason}"
    )


def function_steps(function: Callable, units: int) -> list[RecordedCall]:
    """The operations of a function of one tensor, tried on a tensor of rank 3 with so many units.

    Raises:
        CannotTrace: it does not run on symbolic tensors.
    """
    x = keras.Input((3, units))
    watch = watch_from(x)
    try:
        with Reads(watch):
            y = function(x)
    except Exception as error:
        raise CannotTrace(why(error)) from error
    if not isinstance(y, KerasTensor):
        raise CannotTrace("does not return a tensor that depends on its input")
    return steps_between([y], [x], watch)


def watch_from(x: KerasTensor) -> "CallRecorder":
    """Who notes what is computed from a tensor, operation by operation: nothing is opened."""
    return CallRecorder(node_of(x).operation, lambda op: False, {}, lambda op: False)


# --- who calls whom, and what it changes -----------------------------------------------------


class Reads(keras.StatelessScope):
    """Notices who reads or writes a variable while a composite's own code runs."""

    def __init__(self, watch: "CallRecorder") -> None:
        super().__init__()
        self.watch = watch

    def get_current_value(self, variable: Any) -> Any:
        if not self.watch.is_paused:
            self.watch.use(variable)
        return super().get_current_value(variable)

    def add_update(self, update: tuple) -> None:
        if not self.watch.is_paused:
            raise CannotTrace(f"changes its own variable {update[0].path!r}")
        super().add_update(update)


class CallRecorder:
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
        self.buffers -= handed(root).keys()  # what their owner may change at any time
        self.weights: list[OwnWeight] = []
        self.has_symbols = False
        self.symbols: dict[int, dict] = {}  # id(layer) -> attribute -> what stands for a variable
        self.tables: dict[int, tuple] = {}  # id(embedding) -> its table, and what stands for it
        self.is_paused = False
        self.stack: list = []
        self.paths: dict[int, str] = {}
        self.composites: list = []
        self.loses_mask = False

    def give_symbols(self) -> None:
        """Lets symbols stand for the weights of the layers that run in line, while they do."""
        self.has_symbols = True
        known: dict[int, KerasTensor] = {}
        for layer in (x for x in self.layers if id(x) in self.inline):
            for name, v in _own_weights(layer).items():
                if id(v) not in known:
                    known[id(v)] = _symbol_of(layer, v)
                    self.weights.append(OwnWeight(layer, name, v, known[id(v)]))
                self.symbols.setdefault(id(layer), {})[name] = known[id(v)]
        for layer in (x for x in self.layers if _is_table(x)):
            table, symbol = layer.embeddings, _symbol_of(layer, layer.embeddings)
            rows = np.arange(table.shape[0])
            self.weights.append(OwnWeight(layer, "embeddings", table, symbol, rows))
            self.tables[id(layer)] = table, symbol

    @contextmanager
    def __call__(self, training: Any) -> Iterator:
        lengths = [(o, len(o._inbound_nodes), len(o._outbound_nodes)) for o in self.operations]
        classes = [(x, type(x)) for x in self.layers]
        watched = {c: self._watched(c) for c in {c for _, c in classes}}
        try:
            for layer, c in classes:
                object.__setattr__(layer, "__class__", watched[c])
                self._show_table(layer, 1)
            with Reads(self), in_mode(training):
                yield
        finally:
            for layer, c in classes:
                object.__setattr__(layer, "__class__", c)
                self._show_table(layer, 0)
            for o, inbound, outbound in lengths:
                del o._inbound_nodes[inbound:], o._outbound_nodes[outbound:]

    def _watched(self, layer_class: Any) -> type:
        watch = self

        def __call__(layer: Any, *args: Any, **kwargs: Any) -> Any:
            return watch.called(layer, layer_class, args, kwargs)

        def add_loss(layer: Any, loss: Any) -> None:
            if watch.is_paused:
                return  # only its shape is asked for
            raise CannotTrace(f"{watch.part(layer)}adds a loss in its call")

        return type(
            layer_class.__name__,
            (layer_class,),
            {"__call__": __call__, "add_loss": add_loss, "__module__": layer_class.__module__},
        )

    def _show_table(self, layer: Any, place: int) -> None:
        """What code finds that reads the table of an embedding: it, or what stands for it."""
        if id(layer) in self.tables:
            vars(layer)["_embeddings"] = self.tables[id(layer)][place]

    def called(self, layer: Any, layer_class: Any, args: tuple, kwargs: dict) -> Any:
        self._show_table(layer, 0)
        try:
            return self._called(layer, layer_class, args, kwargs)
        finally:
            self._show_table(layer, 1)

    def _called(self, layer: Any, layer_class: Any, args: tuple, kwargs: dict) -> Any:
        if not self.is_paused and self.has_symbols and _looks_up(layer, args, kwargs):
            return self._rows(layer, to_numpy(args[0]))
        if self.is_paused or not tensors_in((args, kwargs)):
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

    def _rows(self, table: Any, rows: np.ndarray) -> KerasTensor:
        """What stands for rows of an embedding that are always the same: positions, say."""
        shape = (*rows.shape, table.output_dim)
        symbol = keras.Input(batch_shape=shape, dtype=table.compute_dtype)
        own = OwnWeight(table, "embeddings", table.embeddings, symbol, rows)
        self.weights.append(own)
        return symbol

    def _check_stateless(self, layer: Any, layer_class: Any, args: tuple, kwargs: dict) -> None:
        """A layer that was never built may be called if a copy of it makes no variables."""
        self.is_paused = True
        try:
            twin = layer_class.from_config(layer.get_config())
            twin(*args, **kwargs)
        except Exception as error:
            raise CannotTrace(f"has a sublayer {layer.name!r} that is not built") from error
        finally:
            self.is_paused = False
        if twin.variables:
            raise CannotTrace(f"has a sublayer {layer.name!r} that is not built")

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
            raise CannotTrace(f"{self.part(layer)}has an activity regularizer")
        results, symbols = [], self.symbols.get(id(layer), {})
        variables = {name: vars(layer)[name] for name in symbols}

        def symbolic_call(*args: Any, **kwargs: Any) -> list:
            vars(layer).update(symbols)
            try:
                results.append(layer.call(*args, **kwargs))
            finally:
                vars(layer).update(variables)
            return [_twin(x) for x in tensors_in(results[0])]

        # Keras' own `__call__` casts the inputs, finds masks and sets the mode as ever, but the
        # node it records for the layer gets copies: the real outputs keep their history.
        layer.__dict__["symbolic_call"] = symbolic_call
        try:
            copies = layer_class.__call__(layer, *args, **kwargs)
        finally:
            del layer.__dict__["symbolic_call"]
        for x, copy in zip(tensors_in(results[0]), copies, strict=True):
            mask = backend.get_keras_mask(copy)
            if mask is not None and backend.get_keras_mask(x) is None:
                backend.set_keras_mask(x, mask)
                self.loses_mask = True
        return results[0]

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

    def part(self, layer: Any) -> str:
        """What leads from the layer that is run to one of its parts, in a sentence."""
        return "" if layer is self.root else f"has a sublayer {layer.name!r} that "

    def use(self, variable: Any) -> None:
        if id(variable) not in self.buffers:
            raise CannotTrace(f"uses its own variable {variable.path!r} directly")


def _is_table(layer: Any) -> bool:
    is_plain = type(layer) is keras.layers.Embedding and layer.built
    return is_plain and not layer.lora_enabled and layer.quantization_mode is None


def _looks_up(layer: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a call is of an embedding, on numbers that do not depend on any input."""
    is_table = type(layer).__mro__[1] is keras.layers.Embedding  # in its watched class
    is_fixed = len(args) == 1 and not kwargs and not isinstance(args[0], KerasTensor)
    return is_table and is_fixed and layer.built and not layer.mask_zero


def _exact_spec(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The output's shape, found by running the call where the layer itself is vague.

    EinsumDense, say, leaves sizes open that the code around it goes on to compute with.
    """
    spec = layer.compute_output_spec(*args, **kwargs)
    is_vague = any(None in x.shape for x in tensors_in(spec))
    if is_vague and all(None not in x.shape for x in tensors_in((args, kwargs))):
        return backend.compute_output_spec(layer.call, *args, **kwargs)
    return spec


def exact_shapes(op: Any, args: tuple, kwargs: dict) -> list[tuple] | None:
    """The shapes of what an operation returns for these KerasTensors; None if it does not say."""
    try:
        if isinstance(op, keras.layers.Layer):
            spec = backend.compute_output_spec(op.call, *args, **kwargs)
        else:
            spec = op.compute_output_spec(*args, **kwargs)
    except Exception:  # whatever the code of a layer raises on symbolic tensors
        return None
    return [tuple(x.shape) for x in tensors_in(spec)]


@contextmanager
def in_mode(training: Any) -> Iterator:
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


def mapped_in_order(function: Callable, structure: Any) -> Any:
    """`tree.map_structure` of a function that remembers, in the order of `tree.flatten`.

    That sorts the keys of dicts, which `map_structure` does not do on PyTorch.
    """
    for x in tree.flatten(structure):
        function(x)
    return tree.map_structure(function, structure)


def tensors_in(structure: Any) -> list:
    """The KerasTensors of a nested structure."""
    return [x for x in tree.flatten(structure) if isinstance(x, KerasTensor)]


def _twin(x: Any) -> Any:
    twin = KerasTensor(x.shape, x.dtype)
    if backend.get_keras_mask(x) is not None:
        backend.set_keras_mask(twin, backend.get_keras_mask(x))
    return twin


# --- from the outputs back to the inlets -----------------------------------------------------


def steps_between(outputs: list, inlets: list, watch: CallRecorder) -> list[RecordedCall]:
    """The nodes between inlets and outputs, each after those it depends on."""
    done: set[int] = set()
    steps: list[RecordedCall] = []
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
                RecordedCall(
                    node.operation, path, arguments.args, arguments.kwargs, node.outputs, []
                )
            )
        else:
            stack.append((node, True))
            needed = [*node.arguments.keras_tensors]
            if id(node.operation) in watch.masked:
                masks = map(backend.get_keras_mask, needed)
                needed = [*needed, *(m for m in masks if m is not None)]
            stack += [(_node(x, known), False) for x in reversed(needed)]
    return steps


def named(steps: list[RecordedCall], watch: CallRecorder) -> list[RecordedCall]:
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
        raise CannotTrace("uses a tensor of unknown origin")
    node = node_of(x)
    if node.is_input:
        raise CannotTrace(f"uses the tensor {x.name!r} that is not among its inputs")
    return node
