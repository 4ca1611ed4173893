"""A functional model as a flat list of calls.

Here, and in symbolic/, is all that touches Keras internals.

`trace` turns a functional or Sequential model, nested models included, into a `Graph`: plain
data that says which operation is called on which tensors, in order. `rebuild` runs such a graph
on other tensors, which is how every new model of this library comes to be.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from typing import Any

import keras
from keras import tree
from keras.activations import linear

from keras_polar.graph.configs import is_found_again
from keras_polar.graph.ir import Call, Graph, Ref, Spec, alive, fill, refs_in, unused
from keras_polar.graph.keras_private import (
    backend,
    core_of,
    functional,
    has_parts,
    is_from_keras,
    layers_of,
    node_of,
    takes_training,
    with_other_values,
)
from keras_polar.graph.symbolic.expand import open_layer, run_functional
from keras_polar.graph.symbolic.held import Held, steps_to, table_of
from keras_polar.graph.symbolic.merge import Expansion
from keras_polar.graph.symbolic.products import Product
from keras_polar.graph.symbolic.record import (
    CannotTrace,
    RecordedCall,
    exact_shapes,
    variables_behind,
)


def _nothing(op: Any) -> bool:
    return False


def _agree(a: tuple, b: tuple) -> bool:
    """Whether two shapes may be the same, sizes that are not known being any."""
    return len(a) == len(b) and all(x == y or None in (x, y) for x, y in zip(a, b, strict=True))


class _Tracer:
    """Turns nodes of functional models and steps of opened layers into calls, in order."""

    def __init__(
        self, opens: Callable, opens_inside: Callable, keeps_masks: bool, elsewhere: frozenset
    ) -> None:
        self.opens, self.keeps_masks = opens, keeps_masks
        self.elsewhere = elsewhere  # ids of variables that several layers hold
        self.opens_inside = functools.cache(opens_inside)
        self.depth = 0  # of opened layers around the step that is added
        self.bare: dict[int, Any] = {}  # id(layer) -> the layer without its activation
        self.calls: list[Call] = []
        self.specs: list[Spec] = []
        self.notes: dict[int, str] = {}  # id(composite layer) -> why it is not opened
        self.masks: dict[int, tuple] = {}  # tensor -> Keras mask, and where to look it up
        self.alive: list[Any] = []  # tables are keyed by id
        self.tables: dict[int, Any] = {}  # id(variable that code uses) -> a layer that has it
        self.held: dict[tuple, Ref] = {}  # (that, which samples) -> what stands for it
        self.products: dict[tuple, Any] = {}  # ids of a kernel, its bias -> a layer that has them

    def new_tensor(self, tensor: Any, shape: Iterable) -> Ref:
        self.specs.append(Spec(tuple(shape), keras.backend.standardize_dtype(tensor.dtype)))
        return Ref(len(self.specs) - 1)

    def run(self, core_model: Any, refs: list, path: str, training: Any) -> Any:
        table = {id(x): ref for x, ref in zip(core_model.inputs, refs, strict=True)}
        for node in _ordered_nodes(core_model):
            if not node.is_input and all(id(x) in table for x in node.input_tensors):
                self.step(_as_step(node), table, path, training)
        return tree.map_structure(lambda x: table[id(x)], core_model._outputs_struct)

    def reached(self) -> set[int]:
        """Ids of the variables that calls use."""
        return {id(v) for call in self.calls for v in variables_behind(call.op).values()}

    def step(self, step: RecordedCall, table: dict, path: str, training: Any) -> None:
        """Adds the calls of one step; `table` gets the Refs of its outputs."""
        outputs = self._calls(step, table, path, training)
        table.update((id(x), r) for x, r in zip(step.outputs, outputs, strict=True))
        for x, ref in zip(step.outputs, outputs, strict=True):
            mask = backend.get_keras_mask(x)
            if mask is not None:
                self.masks[ref.index] = mask, table, path

    def _calls(self, step: RecordedCall, table: dict, path: str, training: Any) -> list:
        args, kwargs = _with_refs((step.args, step.kwargs), table)
        op = step.op
        if any(isinstance(x, keras.KerasTensor) for x in tree.flatten((args, kwargs))):
            raise CannotTrace(f"calls {op.name!r} on a tensor that is not part of the model")
        if training is not None and takes_training(op):
            kwargs = {**kwargs, "training": training}
        inner, refs = functional(op), _nested_inputs(op, args, kwargs)
        if inner is not None and refs is not None:
            return self._nested(step, inner, refs, args, kwargs, path)
        opened = self._opened(step, args, kwargs, path)
        if opened is None:
            activated = self._activated(step, args, kwargs, path)
            opened = self._call(step, args, kwargs, path) if activated is None else activated
        return opened

    def _opened(self, step: RecordedCall, args: tuple, kwargs: dict, path: str) -> list | None:
        """The outputs of a composite layer's parts; None if it is to stay whole, or has to."""
        op = step.op
        misstates = self._misstates(step, args, kwargs)
        if not (misstates or self.opens(op)) or id(op) in self.notes:
            return None
        # In a functional model, training=False of a call does not outlive the model's own.
        is_fixed = kwargs.get("training") is True
        kwargs = {k: v for k, v in kwargs.items() if k != "training" or is_fixed}
        self.depth += 1
        try:
            how = functools.partial(self._open, keeps_plain=not misstates)
            return self._inline(how, op, args, kwargs, path)
        except CannotTrace as error:
            if has_parts(op):
                self.notes[id(op)] = f"{NOT_OPENED}: it {error}"
            return None
        finally:
            self.depth -= 1

    def _open(
        self, op: Any, args: tuple, kwargs: dict, opens: Callable, keeps_plain: bool
    ) -> Expansion:
        def inside(x: Any) -> bool:
            return functional(x) is not None or self.opens_inside(x)

        return open_layer(op, args, kwargs, inside, self.keeps_masks, keeps_plain, self.elsewhere)

    def _activated(self, step: RecordedCall, args: tuple, kwargs: dict, path: str) -> list | None:
        """A part of an opened layer, followed by what an activation does that no file can tell.

        None if it has no such activation.
        """
        op = step.op
        if not (self.depth and type(op) in ACTIVATED) or is_found_again(op.activation):
            return None
        function = keras.layers.Activation(op.activation, name=f"{op.name}_activation")
        bare = self.bare.setdefault(id(op), with_other_values(op, activation=linear))
        (ref,) = self._call(replace(step, op=bare), args, kwargs, path)
        try:
            return self._inline(self._open_function, function, (ref,), {}, path)
        except CannotTrace:
            self.calls.pop()
            return None

    def _open_function(self, op: Any, args: tuple, kwargs: dict, opens: Callable) -> Expansion:
        return open_layer(op, args, kwargs, lambda x: x is op, keeps_masks=False)

    def _nested(
        self, step: RecordedCall, inner: Any, refs: list, args: tuple, kwargs: dict, path: str
    ) -> list:
        if not self._fits(inner, refs):
            try:
                return self._inline(_rerun, step.op, args, kwargs, path)
            except CannotTrace:
                pass  # its own nodes say as much, but for the sizes
        inside = path + step.path + "/"
        return tree.flatten(self.run(inner, refs, inside, kwargs.get("training")))

    def _call(self, step: RecordedCall, args: tuple, kwargs: dict, path: str) -> list:
        op, path = step.op, path + step.path
        outputs = list(map(self.new_tensor, step.outputs, self._exact(step, args, kwargs)))
        note, inputs = self.notes.get(id(op), ""), refs_in((args, kwargs))
        is_part = self.depth > 0
        call = Call(op, op.name, path, args, kwargs, inputs, refs_in(outputs), note, is_part)
        self.calls.append(call)
        return outputs

    def _misstates(self, step: RecordedCall, args: tuple, kwargs: dict) -> bool:
        """Whether a layer of somebody's own says another shape of its output than it has.

        What is recorded behind it would have that shape. Its calls tell the true one.
        """
        is_stock = not isinstance(step.op, keras.layers.Layer) or is_from_keras(step.op)
        if is_stock or has_parts(step.op) or self.opens is _nothing:
            return False
        found = exact_shapes(step.op, *self._in_symbols(args, kwargs))
        return found is not None and not all(map(_agree, found, step.shapes))

    def _in_symbols(self, args: tuple, kwargs: dict) -> tuple:
        read = {i: self.specs[i] for i in refs_in((args, kwargs))}
        symbols = {i: keras.KerasTensor(spec.shape, spec.dtype) for i, spec in read.items()}
        return fill((args, kwargs), symbols)

    def _exact(self, step: RecordedCall, args: tuple, kwargs: dict) -> list[tuple]:
        """Shapes of a step's outputs: asked for again where they are vaguer than the inputs'."""
        read = {i: self.specs[i] for i in refs_in((args, kwargs))}
        is_vague = any(None in shape[1:] for shape in step.shapes)
        if not is_vague or any(None in spec.shape[1:] for spec in read.values()):
            return step.shapes
        return exact_shapes(step.op, *self._in_symbols(args, kwargs)) or step.shapes

    def _fits(self, inner: Any, refs: list) -> bool:
        """Whether a nested model's own nodes say what happens on these tensors."""
        shapes = [tuple(x.shape) for x in inner.inputs]
        if any(r.index in self.masks for r in refs) and any(map(self.opens, layers_of(inner))):
            return False
        return shapes == [self.specs[r.index].shape for r in refs]

    def _inline(self, how: Callable, op: Any, args: tuple, kwargs: dict, path: str) -> list:
        refs = list(dict.fromkeys(refs_in((args, kwargs))))
        symbols = {i: self._symbol(i) for i in refs}
        opened = how(op, *fill((args, kwargs), symbols), self.opens)
        steps = list(map(self._made, opened.steps))
        known = [Ref(i) for i in refs for i in (i, *self._mask_ref(i))]
        if len(known) != len(opened.inlets):
            raise CannotTrace("is called on a tensor that is not part of the model")
        table = {id(x): ref for x, ref in zip(opened.inlets, known, strict=True)}
        self.alive.append(opened)
        for held in opened.held:
            table.update(dict.fromkeys(map(id, held.symbols), self._held(held, known[0], path)))
        self.notes.update((k, f"{NOT_OPENED}: it {v}") for k, v in opened.closed.items() if v)
        for step in steps:
            self.step(step, table, path, kwargs.get("training"))
        return [table[id(x)] for x in opened.outputs]

    def _held(self, held: Held, sample: Ref, path: str) -> Ref:
        """A tensor of the values of a variable that no layer has."""
        key = sample.index, *held.key
        if key not in self.held:
            if id(held.variable) not in self.tables:
                self.tables[id(held.variable)] = table_of(held)
            symbol = self._symbol(sample.index)
            steps, inlet, outlet = steps_to(held, self.tables[id(held.variable)], symbol)
            table = {id(inlet): sample}
            for step in steps:
                self.step(step, table, path, None)
            self.alive.append((steps, inlet))
            self.held[key] = table[id(outlet)]
        return self.held[key]

    def _made(self, step: RecordedCall) -> RecordedCall:
        """The step, its operation a layer if it only stands for one."""
        if not isinstance(step.op, Product):
            return step
        if step.op.key not in self.products:
            self.products[step.op.key] = step.op.layer()
        return replace(step, op=self.products[step.op.key])

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
        node = node_of(tensor)
        for x in node.input_tensors:
            self._ensure(x, table, path)
        self.step(_as_step(node), table, path, None)

    def say_of_open_sizes(self, core_model: Any) -> None:
        """Says first of layers that would have been opened were all sizes known."""
        if not self.notes or all(None not in x.shape[1:] for x in core_model.inputs):
            return
        found = {*self.notes}
        for size in STAND_INS:
            found &= self._closed_at(core_model, size)
        of_size = {k: f"{OPEN_LENGTH}; {note}" for k, note in self.notes.items() if k not in found}
        self.notes.update(of_size)
        new = {id(c): of_size[id(c.op)] for c in self.calls if id(c.op) in of_size}
        self.calls = [replace(c, note=new[id(c)]) if id(c) in new else c for c in self.calls]

    def _closed_at(self, core_model: Any, size: int) -> set[int]:
        """Ids of the layers that stay whole as well with this for all that is unknown."""
        other = _Tracer(self.opens, self.opens_inside, self.keeps_masks, self.elsewhere)
        shapes = [[x.shape[0], *(n or size for n in x.shape[1:])] for x in core_model.inputs]
        refs = list(map(other.new_tensor, core_model.inputs, shapes))
        inputs = tree.pack_sequence_as(core_model._inputs_struct, refs)
        try:
            other._inline(_rerun, core_model, (inputs,), {}, "")
        except CannotTrace:
            return {*self.notes}
        return {*other.notes}


STAND_INS = (7, 32)  # for sizes that are unknown: few models take neither
OPEN_LENGTH = (
    "the length is open: it is called on inputs of unknown size: build the model on inputs with "
    "fixed sizes (128, say): x = keras.tree.map_structure(lambda i: keras.Input([n or 128 for n in "
    "i.shape[1:]], dtype=i.dtype, name=i.name), model.input); model = keras.Model(x, model(x))"
)
NOT_OPENED = "a composite layer that cannot be opened"

_CONVOLUTIONS = ("Conv{}D", "Conv{}DTranspose", "DepthwiseConv{}D", "SeparableConv{}D")
_NAMES = ("Dense", "EinsumDense", *(c.format(n) for c in _CONVOLUTIONS for n in (1, 2, 3)))
# Layers that apply an activation to all they have computed, last of all.
ACTIVATED = tuple(getattr(keras.layers, n) for n in _NAMES if hasattr(keras.layers, n))


def _as_step(node: Any) -> RecordedCall:
    shapes = [tuple(x.shape) for x in node.outputs]
    arguments = node.arguments
    return RecordedCall(
        node.operation,
        node.operation.name,
        arguments.args,
        arguments.kwargs,
        list(node.outputs),
        shapes,
    )


def _rerun(model: Any, args: tuple, kwargs: dict, opens: Callable) -> Expansion:
    return run_functional(model, args, kwargs, lambda x: functional(x) is not None, opens)


def trace(
    model: Any,
    opens: Callable[[Any], bool] = _nothing,
    opens_inside: Callable[[Any], bool] | None = None,
) -> Graph:
    """The graph of a functional (or built Sequential) model, nested models flattened.

    Args:
        opens: which layers are to be replaced by the calls they consist of, where that is
            possible; where it is not, `Call.note` says why.
        opens_inside: the same for parts of layers that are opened; `opens` if None.

    Raises:
        TypeError: `model` is not a functional or built Sequential model.
    """
    core_model = core_of(model)
    # By the masks of its outputs a model weighs its losses; anywhere else they are arguments.
    keeps_masks = any(backend.get_keras_mask(x) is not None for x in core_model.outputs)
    for elsewhere in (_shared_variables(core_model), frozenset()):
        tracer = _Tracer(opens, opens_inside or opens, keeps_masks, elsewhere)
        refs = [tracer.new_tensor(x, x.shape) for x in core_model.inputs]
        outputs = tracer.run(core_model, refs, "", None)
        if elsewhere <= tracer.reached():
            break
    tracer.say_of_open_sizes(core_model)
    inputs = tree.pack_sequence_as(core_model._inputs_struct, refs)
    layers = tuple(x._keras_history.operation for x in core_model.inputs)
    names = _flat_names([layer.name for layer in layers], tracer.calls)
    names |= _output_names(core_model.output_names, refs_in(outputs), tracer.calls, names)
    calls = [replace(call, name=names[id(call.op)]) for call in tracer.calls]
    # What only feeds an unused output of a nested model is not part of the function.
    return alive(Graph(model.name, inputs, outputs, layers, tuple(calls), tuple(tracer.specs)))


def _shared_variables(core_model: Any) -> frozenset:
    layers = {id(x): x for x in _flat_operations(core_model)}
    held = Counter(id(v) for x in layers.values() for v in getattr(x, "weights", ()))
    return frozenset(i for i, n in held.items() if n > 1)


def _flat_operations(core_model: Any) -> Iterator:
    """The operations of a model, those of nested models in place of these."""
    for node in _ordered_nodes(core_model):
        inner = functional(node.operation)
        if inner is None:
            yield node.operation
        else:
            yield from _flat_operations(inner)


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


def _flat_names(taken: list[str], calls: list[Call]) -> dict[int, str]:
    """A unique name for every operation, without its path where possible, keyed by `id(op)`."""
    used, names = set(taken), {}
    for call in calls:
        if id(call.op) not in names:
            names[id(call.op)] = _unused(call, used)
            used.add(names[id(call.op)])
    return names


def _output_names(
    output_names: list, outputs: tuple, calls: list[Call], names: dict
) -> dict[int, str]:
    """Names for the last layers of nested models: by outputs' names losses are given."""
    if len(output_names) == 1 or len(set(output_names)) < len(output_names):
        return {}
    made_by: dict[int, list] = {id(c.op): [] for c in calls}
    for call in calls:
        made_by[id(call.op)] += call.outputs
    only = {made[0]: op for op, made in made_by.items() if len(made) == 1}
    pairs = zip(output_names, outputs, strict=True)
    return {only[i]: n for n, i in pairs if i in only and n not in names.values()}


def _unused(call: Call, used: set) -> str:
    return call.op.name if call.op.name not in used else unused(call.path.replace("/", "_"), used)


def warn_of_ties(graph: Graph, caller: str, split: Container[int]) -> None:
    """Warns of trained variables that several operations use, of which a new model has several.

    Args:
        split: ids of the variables of layers that have become several.
    """
    given: set[int] = set()
    users: dict[int, tuple[str, dict]] = {}  # id(variable) -> its path, {id(operation): name}
    for call in graph.calls:
        for variable in getattr(call.op, "trainable_variables", ()):
            _, names = users.setdefault(id(variable), (variable.path, {}))
            names[id(call.op)] = call.name
    for call in graph.calls:  # given to an operation, a variable stays what it is
        for x in tree.flatten((call.args, call.kwargs)):
            if id(x) in users:
                users[id(x)][1][id(call.op)] = call.name
                given.add(id(x))
    for key, (path, names) in users.items():
        if len(names) > 1 and (key in split or key in given):
            warnings.warn(
                f"{caller}: variable {path!r} of model {graph.name!r} is used by "
                f"{', '.join(map(repr, names.values()))}, which do not share it in the new model. "
                "Call one and the same layer several times instead (for tied embeddings "
                "keras.layers.ReversibleEmbedding).",
                stacklevel=3,
            )
