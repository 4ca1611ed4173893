"""A functional model as a flat list of calls.

Here, and in symbolic/, is all that touches Keras internals.

`trace` turns a functional or Sequential model, nested models included, into a `Graph`: plain
data that says which operation is called on which tensors, in order. `rebuild` runs such a graph
on other tensors, which is how every new model of this library comes to be.
"""

import contextlib
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import tree
from keras.src import backend
from keras.src.activations import activations
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell  # noqa: F401  (has no public name)
from keras.src.models.functional import Functional
from keras.src.ops import core, einops, image, linalg, math, nn
from keras.src.ops import numpy as keras_numpy

from keras_polar.graph.deepcopy import duplicate
from keras_polar.graph.handed import SETTINGS, hand_on, handed_places, holds_variables
from keras_polar.graph.symbolic.expand import open_layer, run_functional
from keras_polar.graph.symbolic.merge import Opened, with_attributes
from keras_polar.graph.symbolic.record import CannotOpen, Step, exact_shapes

DEEPEST = 100_000  # nodes in a row

OP_MODULES = (keras_numpy, nn, core, math, image, linalg, einops, activations)


def op_class(name: str) -> type:
    """The class behind a function of `keras.ops`: `op_class("Add")` is what `x + y` records."""
    for module in OP_MODULES:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"keras.ops has no operation class named {name!r}.")


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


@dataclass(frozen=True, eq=False)
class Graph:
    """A model as data: `calls` in topological order over tensors numbered from 0."""

    name: str
    inputs: Any  # structure of Refs, as the model's own
    outputs: Any
    input_layers: tuple
    calls: tuple[Call, ...]
    specs: tuple[Spec, ...]


# --- reading ---------------------------------------------------------------------------------


def functional(model: Any) -> Any:
    """The functional core of a Functional or Sequential model; None for anything else."""
    if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        return model._functional if model.built else None
    is_plain = isinstance(model, Functional) and type(model).call is Functional.call
    return model if is_plain else None


def core_of(model: Any) -> Any:
    """The functional core of a Functional or built Sequential model; TypeError for others."""
    core_model = functional(model)
    if core_model is None:
        raise TypeError(_not_functional(model))
    return core_model


def _not_functional(model: Any) -> str:
    what = f"Expected a functional or Sequential Keras model; received {type(model).__name__}"
    if isinstance(model, keras.Sequential) and not model.built:
        return (
            f"{what} {model.name!r}, which has no input shape yet. Add `keras.Input(shape)` as its "
            "first layer, or call `model.build(input_shape)`."
        )
    if isinstance(model, keras.Model):
        return (
            f"{what} {model.name!r}, whose `call` is Python code that cannot be rewritten. Make it "
            "functional: `x = keras.Input(shape); model = keras.Model(x, <layers called on x>)`."
        )
    return f"{what}. Pass a `keras.Model` built from `keras.Input` tensors."


def _nothing(op: Any) -> bool:
    return False


class _Tracer:
    """Turns nodes of functional models and steps of opened layers into calls, in order."""

    def __init__(self, opens: Callable[[Any], bool], keeps_masks: bool) -> None:
        self.opens, self.keeps_masks = opens, keeps_masks
        self.calls: list[Call] = []
        self.specs: list[Spec] = []
        self.notes: dict[int, str] = {}  # id(composite layer) -> why it is not opened
        self.masks: dict[int, tuple] = {}  # tensor -> Keras mask, and where to look it up
        self.alive: list[Opened] = []  # tables are keyed by id

    def new_tensor(self, tensor: Any, shape: Iterable) -> Ref:
        self.specs.append(Spec(tuple(shape), keras.backend.standardize_dtype(tensor.dtype)))
        return Ref(len(self.specs) - 1)

    def run(self, core_model: Any, refs: list, path: str, training: Any) -> Any:
        table = {id(x): ref for x, ref in zip(core_model.inputs, refs, strict=True)}
        for node in _ordered_nodes(core_model):
            if not node.is_input and all(id(x) in table for x in node.input_tensors):
                self.step(_as_step(node), table, path, training)
        return tree.map_structure(lambda x: table[id(x)], core_model._outputs_struct)

    def step(self, step: Step, table: dict, path: str, training: Any) -> None:
        """Adds the calls of one step; `table` gets the Refs of its outputs."""
        outputs = self._calls(step, table, path, training)
        table.update((id(x), r) for x, r in zip(step.outputs, outputs, strict=True))
        for x, ref in zip(step.outputs, outputs, strict=True):
            mask = backend.get_keras_mask(x)
            if mask is not None:
                self.masks[ref.index] = mask, table, path

    def _calls(self, step: Step, table: dict, path: str, training: Any) -> list:
        args, kwargs = _with_refs((step.args, step.kwargs), table)
        op = step.op
        if any(isinstance(x, keras.KerasTensor) for x in tree.flatten((args, kwargs))):
            raise CannotOpen(f"calls {op.name!r} on a tensor that is not part of the model")
        if training is not None and getattr(op, "_call_has_training_arg", False):
            kwargs = {**kwargs, "training": training}
        inner, refs = functional(op), _nested_inputs(op, args, kwargs)
        if inner is not None and refs is not None:
            return self._nested(step, inner, refs, args, kwargs, path)
        if self.opens(op) and id(op) not in self.notes:
            try:
                # In a functional model, training=False of a call does not outlive the model's own.
                is_fixed = kwargs.get("training") is True
                kwargs = {k: v for k, v in kwargs.items() if k != "training" or is_fixed}
                return self._inline(self._open, op, args, kwargs, path)
            except CannotOpen as error:
                self.notes[id(op)] = f"{NOT_OPENED}: it {error}"
        return self._call(step, args, kwargs, path)

    def _open(self, op: Any, args: tuple, kwargs: dict, opens: Callable) -> Opened:
        def inside(x: Any) -> bool:
            return functional(x) is not None or opens(x)

        return open_layer(op, args, kwargs, inside, self.keeps_masks)

    def _nested(
        self, step: Step, inner: Any, refs: list, args: tuple, kwargs: dict, path: str
    ) -> list:
        if not self._fits(inner, refs):
            try:
                return self._inline(_rerun, step.op, args, kwargs, path)
            except CannotOpen:
                pass  # its own nodes say as much, but for the sizes
        inside = path + step.path + "/"
        return tree.flatten(self.run(inner, refs, inside, kwargs.get("training")))

    def _call(self, step: Step, args: tuple, kwargs: dict, path: str) -> list:
        op, path = step.op, path + step.path
        outputs = list(map(self.new_tensor, step.outputs, self._exact(step, args, kwargs)))
        note, inputs = self.notes.get(id(op), ""), refs_in((args, kwargs))
        call = Call(op, op.name, path, args, kwargs, inputs, refs_in(outputs), note)
        self.calls.append(call)
        return outputs

    def _exact(self, step: Step, args: tuple, kwargs: dict) -> list[tuple]:
        """Shapes of a step's outputs: asked for again where they are vaguer than the inputs'."""
        read = {i: self.specs[i] for i in refs_in((args, kwargs))}
        is_vague = any(None in shape[1:] for shape in step.shapes)
        if not is_vague or any(None in spec.shape[1:] for spec in read.values()):
            return step.shapes
        symbols = {i: keras.KerasTensor(spec.shape, spec.dtype) for i, spec in read.items()}
        return exact_shapes(step.op, *fill((args, kwargs), symbols)) or step.shapes

    def _fits(self, inner: Any, refs: list) -> bool:
        """Whether a nested model's own nodes say what happens on these tensors."""
        shapes = [tuple(x.shape) for x in inner.inputs]
        if any(r.index in self.masks for r in refs) and any(map(self.opens, _layers_of(inner))):
            return False
        return shapes == [self.specs[r.index].shape for r in refs]

    def _inline(self, how: Callable, op: Any, args: tuple, kwargs: dict, path: str) -> list:
        refs = list(dict.fromkeys(refs_in((args, kwargs))))
        symbols = {i: self._symbol(i) for i in refs}
        opened = how(op, *fill((args, kwargs), symbols), self.opens)
        known = [Ref(i) for i in refs for i in (i, *self._mask_ref(i))]
        if len(known) != len(opened.inlets):
            raise CannotOpen("is called on a tensor that is not part of the model")
        table = {id(x): ref for x, ref in zip(opened.inlets, known, strict=True)}
        self.alive.append(opened)
        self.notes.update((k, f"{NOT_OPENED}: it {v}") for k, v in opened.closed.items())
        for step in opened.steps:
            self.step(step, table, path, kwargs.get("training"))
        return [table[id(x)] for x in opened.outputs]

    def _symbol(self, index: int) -> Any:
        spec = self.specs[index]
        symbol = keras.KerasTensor(spec.shape, spec.dtype)
        for mask in self._mask_ref(index):
            backend.set_keras_mask(symbol, self._symbol(mask))
        return symbol

    def _mask_ref(self, index: int) -> tuple[int, ...]:
        """The tensor that is the Keras mask of a tensor, if it has one."""
        if index not in self.masks:
            return ()
        mask, table, path = self.masks[index]
        self._ensure(mask, table, path)
        return (table[id(mask)].index,)

    def _ensure(self, tensor: Any, table: dict, path: str) -> None:
        if id(tensor) in table:
            return
        history = tensor._keras_history
        node = history.operation._inbound_nodes[history.node_index]
        for x in node.input_tensors:
            self._ensure(x, table, path)
        self.step(_as_step(node), table, path, None)


NOT_OPENED = "a composite layer that cannot be opened"


def _as_step(node: Any) -> Step:
    shapes = [tuple(x.shape) for x in node.outputs]
    arguments = node.arguments
    return Step(
        node.operation,
        node.operation.name,
        arguments.args,
        arguments.kwargs,
        list(node.outputs),
        shapes,
    )


def _rerun(model: Any, args: tuple, kwargs: dict, opens: Callable) -> Opened:
    return run_functional(model, args, kwargs, lambda x: functional(x) is not None, opens)


def trace(model: Any, opens: Callable[[Any], bool] = _nothing) -> Graph:
    """The graph of a functional (or built Sequential) model, nested models flattened.

    Args:
        opens: which layers are to be replaced by the calls they consist of, where that is
            possible; where it is not, `Call.note` says why.

    Raises:
        TypeError: `model` is not a functional or built Sequential model.
    """
    core_model = core_of(model)
    # By the masks of its outputs a model weighs its losses; anywhere else they are arguments.
    tracer = _Tracer(opens, any(backend.get_keras_mask(x) is not None for x in core_model.outputs))
    refs = [tracer.new_tensor(x, x.shape) for x in core_model.inputs]
    outputs = tracer.run(core_model, refs, "", None)
    inputs = tree.pack_sequence_as(core_model._inputs_struct, refs)
    layers = tuple(x._keras_history.operation for x in core_model.inputs)
    names = _flat_names([layer.name for layer in layers], tracer.calls)
    names |= _output_names(core_model.output_names, refs_in(outputs), tracer.calls, names)
    calls = [replace(call, name=names[id(call.op)]) for call in tracer.calls]
    # What only feeds an unused output of a nested model is not part of the function.
    return alive(Graph(model.name, inputs, outputs, layers, tuple(calls), tuple(tracer.specs)))


def alive(graph: Graph) -> Graph:
    """The graph without the calls that none of its outputs depends on."""
    wanted, live = set(refs_in(graph.outputs)), []
    for call in reversed(graph.calls):
        if not wanted.isdisjoint(call.outputs):
            wanted.update(call.inputs)
            live.append(call)
    return replace(graph, calls=tuple(reversed(live)))


def _ordered_nodes(core_model: Any) -> Iterator:
    for depth in sorted(core_model._nodes_by_depth, reverse=True):
        yield from core_model._nodes_by_depth[depth]


def _with_refs(structure: Any, table: dict) -> Any:
    def swap(leaf: Any) -> Any:
        return table.get(id(leaf), leaf) if isinstance(leaf, keras.KerasTensor) else leaf

    return tree.map_structure(swap, structure)


def _nested_inputs(op: Any, args: tuple, kwargs: dict) -> list | None:
    """The Refs a nested model is called on, in the order of its inputs; None if unclear."""
    inner = functional(op)
    if inner is None:
        return None
    given = args[0] if args else kwargs.get("inputs")
    if isinstance(given, dict) and not isinstance(inner._inputs_struct, dict):
        given = [given.get(x.name) for x in inner.inputs]
    flat = tree.flatten(given)
    matches = len(flat) == len(inner.inputs) and all(isinstance(x, Ref) for x in flat)
    return flat if matches else None


def refs_in(structure: Any) -> tuple[int, ...]:
    """Indices of the tensors a structure mentions, in order."""
    return tuple(x.index for x in tree.flatten(structure) if isinstance(x, Ref))


def _flat_names(taken: list[str], calls: list[Call]) -> dict[int, str]:
    """A unique name for every operation, without its path where possible, keyed by `id(op)`."""
    used, names = set(taken), {}
    for call in calls:
        if id(call.op) not in names:
            names[id(call.op)] = _unused(call, used)
            used.add(names[id(call.op)])
    return names


def _output_names(wanted: list, outputs: tuple, calls: list[Call], names: dict) -> dict[int, str]:
    """Names for the last layers of nested models: by outputs' names losses are given."""
    if len(wanted) == 1 or len(set(wanted)) < len(wanted):
        return {}
    makers: dict[int, list] = {id(c.op): [] for c in calls}
    for call in calls:
        makers[id(call.op)] += call.outputs
    only = {made[0]: op for op, made in makers.items() if len(made) == 1}
    pairs = zip(wanted, outputs, strict=True)
    return {only[i]: n for n, i in pairs if i in only and n not in names.values()}


def _unused(call: Call, used: set) -> str:
    return call.op.name if call.op.name not in used else unused(call.path.replace("/", "_"), used)


def unused(name: str, used: set) -> str:
    """The name, numbered if it is used already."""
    numbered = (f"{name}_{i}" for i in itertools.count(1))
    return name if name not in used else next(n for n in numbered if n not in used)


def warn_of_ties(graph: Graph, caller: str) -> None:
    """Warns of trained variables that several operations use: a new model has one for each."""
    users: dict[int, tuple[str, dict]] = {}  # id(variable) -> its path, {id(operation): name}
    for call in graph.calls:
        for variable in getattr(call.op, "trainable_variables", ()):
            _, found = users.setdefault(id(variable), (variable.path, {}))
            found[id(call.op)] = call.name
    for call in graph.calls:  # given to an operation, a variable stays what it is
        for x in tree.flatten((call.args, call.kwargs)):
            if id(x) in users:
                users[id(x)][1][id(call.op)] = call.name
    for path, found in users.values():
        if len(found) > 1:
            warnings.warn(
                f"{caller}: variable {path!r} of model {graph.name!r} is used by "
                f"{', '.join(map(repr, found.values()))}, which do not share it in the new model. "
                "Call one and the same layer several times instead (for tied embeddings "
                "keras.layers.ReversibleEmbedding).",
                stacklevel=3,
            )


# --- rewriting -------------------------------------------------------------------------------


def bypass(graph: Graph, stands_for: Callable[[Call], int | None]) -> Graph:
    """The graph without some of its calls.

    Args:
        stands_for: for a call, the index of the input tensor that takes the place of its output,
            -1 to drop the call (nobody may read it), or None to keep it.
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


def new_inputs(graph: Graph) -> list:
    """Fresh `keras.Input` tensors with the names, shapes and dtypes of the graph's."""
    return [type(layer).from_config(layer.get_config()).output for layer in graph.input_layers]


def rebuild(
    graph: Graph, visit: Callable[[Call, dict[int, Any]], Any], model_class: type, **kwargs: Any
) -> Any:
    """A new model: `visit(call, values)` returns the outputs of each call in turn.

    Args:
        visit: gets the call and the tensors so far, keyed by the graph's tensor index.
        model_class: `keras.Model` or a subclass without `__init__`.
    """
    inputs = new_inputs(graph)
    values: dict[int, Any] = dict(zip(refs_in(graph.inputs), inputs, strict=True))
    for call in graph.calls:
        outputs = tree.flatten(visit(call, values))
        if not any(values[i].sparse for i in call.inputs):
            _make_dense(outputs)
        values.update(zip(call.outputs, outputs, strict=True))
    struct = tree.pack_sequence_as(graph.inputs, inputs)
    with _deep_models_allowed():
        return model_class(struct, fill(graph.outputs, values), name=graph.name, **kwargs)


def _make_dense(outputs: list) -> None:
    """Keras says of a product of a dense tensor and a constant that it is sparse."""
    for x in outputs:
        x._sparse = False


@contextlib.contextmanager
def _deep_models_allowed() -> Iterator[None]:
    """Room for Keras to walk a model recursively, one frame per node in a row.

    A model that Keras could just build must not fail once there is a mask in front of every layer.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, DEEPEST))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


# --- copying layers and operations -----------------------------------------------------------


def clone(op: Any, name: str, **changes: Any) -> Any:
    """A new operation with the same configuration but for `name` and `changes`; not built.

    Raises:
        TypeError: the layer cannot be made anew from its `get_config()`.
    """
    if not isinstance(op, keras.layers.Layer):
        return _clone_op_node(op, name, changes)
    if not changes and op.built and has_parts(op):
        # A new one could make its variables in another order, under other names.
        with contextlib.suppress(TypeError):
            return duplicate(op, name)
    try:
        config = _config_of(op)
        arrays = _without_arrays(op, config) if changes else {}
        new = _from_config(op, {**config, **arrays, "name": name, **changes})
        hand_on(op, new)
        return new
    except Exception as error:
        if not op.weights and not changes:
            return _renamed(op, name)  # nothing to train and nothing to copy (a Lambda, say)
        if not changes:
            return duplicate(op, name)
        raise TypeError(
            f"Layer {op.name!r} ({type(op).__name__}) cannot be rebuilt from its config: {error}. "
            "Expected `from_config(get_config())` to give an equal layer; implement `get_config`."
        ) from error


def _config_of(op: Any) -> dict:
    """The config of a layer; a TypeError where one made from it would lose what it is."""
    if hasattr(op, "load_assets"):
        raise TypeError("its vocabulary is not part of it")
    with warnings.catch_warnings():  # what Keras says of lambdas is for those who save
        warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
        config = op.get_config()
    init = type(op).__init__
    if init.__module__.partition(".")[0] != "keras":  # stock layers know what they leave out
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(init).parameters.values()
        missing = [p.name for p in parameters if p.kind in named and p.name not in config]
        given = {place[0]: v for place, v in handed_places(op).items() if len(place) == 1}
        config |= {n: given[n] for n in missing if n in given}
        lost = [n for n in missing if n in vars(op) and n not in given]
        if lost:
            raise TypeError(f"`get_config` lacks {', '.join(lost)}")
    # A config holds values at most: what is assigned to variables later would not arrive.
    return config | {k: x for k, x in _live(op, config).items() if holds_variables(x)}


def _without_arrays(op: Any, config: dict) -> dict:
    """Zeros instead of initializers that only fit the whole layer: weights are copied."""
    found = {k: getattr(op, k, None) for k in config if k.endswith("_initializer")}
    constant = keras.initializers.Constant
    return {k: "zeros" for k, x in found.items() if isinstance(x, constant) and np.ndim(x.value)}


def smaller_twin(op: Any, args: tuple, kwargs: dict, resized: dict[int, int]) -> tuple[Any, dict]:
    """An equal layer built for inputs with fewer units.

    Args:
        args, kwargs: of its call, in KerasTensors.
        resized: number of units -> fewer.

    Returns:
        The layer, and which keys of its config hold numbers of units: {key: units of `op`}.

    Raises:
        CannotOpen: there is none.
    """
    if not op.weights:
        return op, {}
    try:
        config = op.get_config()
    except Exception as error:
        raise CannotOpen("has no config to be rebuilt from") from error
    sized = {k: v for k, v in config.items() if type(v) is int and v in resized}
    shapes = [tuple(resized.get(n, n) for n in w.shape) for w in op.weights]
    for keys in ({}, sized):
        try:
            twin = clone(op, op.name, **{k: resized[v] for k, v in keys.items()})
            twin(*args, **kwargs)
        except Exception:
            continue
        if [tuple(w.shape) for w in twin.weights] == shapes:
            return twin, keys
    raise CannotOpen("cannot be rebuilt for fewer units")


def _from_config(op: Any, config: dict) -> Any:
    """The layer of a config; keys that `get_config` reports but `__init__` derives are left out.

    Nothing is lost by that if the new layer reports them again with the same values.
    """
    try:
        return type(op).from_config(config)
    except (TypeError, ValueError):
        with contextlib.suppress(TypeError, ValueError):
            return type(op).from_config(config | _live(op, config))
        parameters = inspect.signature(type(op).__init__).parameters
        base = {"name", "trainable", "dtype"}
        known = {k: v for k, v in config.items() if k in parameters or k in base}
        new = type(op).from_config(known)
        if known.keys() == config.keys() or new.get_config() != config:
            raise
        return new


def _live(op: Any, config: dict) -> dict:
    """The objects behind those keys of a config that stand for functions, initializers and such.

    A user's own, not registered with Keras, cannot be read back from a config.
    """
    found = {k: getattr(op, k, None) for k, v in config.items() if isinstance(v, (dict, str))}
    return {k: x for k, x in found.items() if isinstance(x, SETTINGS) or inspect.isfunction(x)}


def _renamed(op: Any, name: str) -> Any:
    """The layer without its graph nodes, under another name; everything inside is shared."""
    new = object.__new__(type(op))
    vars(new).update(vars(op))
    vars(new).update(name=name, _inbound_nodes=[], _outbound_nodes=[])
    return new


def has_parts(op: Any) -> bool:
    """Whether a layer has sublayers."""
    return isinstance(op, keras.layers.Layer) and bool(op._layers)


def _clone_op_node(op: Any, name: str, changes: dict) -> Any:
    new = with_attributes(op, changes)
    new.name = name
    return new


def to_numpy(x: Any) -> np.ndarray:
    """A variable or tensor as a NumPy array."""
    # By way of a tensor: NumPy 2 warns about converting a TensorFlow variable directly.
    return keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(x))


def variable_at(op: Any, path: str) -> Any:
    """The variable that a dotted attribute path leads to ("cell.kernel"); None if there is none."""
    for name in path.split("."):
        op = getattr(op, name, None)
    return op


def copy_weights(source: Any, target: Any, cut: Callable[[Any, Any], Any]) -> list[tuple[Any, Any]]:
    """Assigns `cut(variable, value)` of every variable of `source` to its twin in `target`.

    Returns:
        The pairs of variables.
    """
    if source is target or not isinstance(source, keras.layers.Layer):
        return []
    layers = list(zip(_layers_of(source), _layers_of(target), strict=True))
    states = (_states(old, new) for old, new in layers)
    twins = [*_twins(source.variables, target.variables), *itertools.chain.from_iterable(states)]
    pairs = [(old, new) for old, new in twins if old is not new]  # some were handed to both
    for old, new in pairs:
        new.assign(cut(old, to_numpy(old)))
        new.regularizer, new.constraint = old.regularizer, old.constraint
    for old, new in layers:
        new.trainable = old.trainable
        new.activity_regularizer = old.activity_regularizer
        if isinstance(new, keras.layers.Normalization):
            new.finalize_state()  # its mean and variance are derived from its variables
    for old, new in pairs:
        if new.trainable != old.trainable:  # frozen one by one
            new.trainable = old.trainable
    return pairs


def _states(old: Any, new: Any) -> Iterable[tuple[Any, Any]]:
    """Pairs of the states that a recurrent layer carries from batch to batch.

    They are not among its variables.
    """
    if not (isinstance(new, keras.layers.RNN) and new.stateful):
        return ()
    return zip(tree.flatten(old.states), tree.flatten(new.states), strict=True)


def _twins(old: list, new: list) -> Iterable[tuple[Any, Any]]:
    """Pairs of variables of two equal layers: by their paths, in order if those are ambiguous.

    The order is that in which they were made, and a copy may be built in another.
    """
    paths = [_paths(old), _paths(new)]
    if set(paths[0]) == set(paths[1]) and len(set(paths[0])) == len(old) == len(new):
        found = dict(zip(paths[1], new, strict=True))
        return [(v, found[path]) for v, path in zip(old, paths[0], strict=True)]
    return zip(old, new, strict=True)


def _paths(variables: list) -> list[str]:
    return [v.path.partition("/")[2] or v.path for v in variables]


def _layers_of(op: Any) -> list:
    # Parents first: setting `trainable` on a parent overwrites that of its children.
    return list(op._flatten_layers())


def hand_on_masks(layer: Any, args: tuple, kwargs: dict, outputs: Any) -> None:
    """Gives symbolic outputs the masks that Keras would give them in a call of the layer."""
    if layer.supports_masking:
        first = [*args, *kwargs.values()][0]
        mask = kwargs.get("mask")
        before = tree.map_structure(backend.get_keras_mask, first) if mask is None else mask
        layer._set_mask_metadata(first, outputs, before)


def only_loss(layer: Any, loss: Any) -> None:
    """`layer.add_loss(loss)` that forgets what the same call has added before.

    Under tf.distribute the replicas run in threads that share the layer's list of losses. Called
    after the last synchronisation of a forward pass, this leaves each replica with its own.

    Keras adds it up with the loss of `compile`, which comes in `keras.config.floatx()`.
    """
    layer._losses.clear()
    layer.add_loss(keras.ops.cast(loss, keras.config.floatx()))


def forget_losses(layer: Any) -> None:
    """What a layer has added is another one's from now on, and is not counted twice.

    Keras on JAX tells whose a loss is by its id, whatever layer added it last, and remembers the
    ids of all steps that were ever traced.
    """
    for part in _layers_of(layer):
        part._losses.clear()
        part._loss_ids.clear()
