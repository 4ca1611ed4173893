"""Opens a composite layer: the sublayers and `keras.ops` that its `call` uses, in order.

`open_layer` calls the layer once more, on symbolic tensors of its own, and lets every sublayer
that is to be opened as well run its `call` in line. What remains are calls of plain layers and
operations, and that is what the layer computes: nothing about any class has to be known.

Python code can do more than a graph can say, so that every layer is opened twice, with two batch
sizes, once in training and once in inference mode. What is the same both times is what the layer
does; sizes that grow with the batch are recognised by the prime numbers that stand for it. A layer
that differs otherwise, that changes a variable of its own, draws random numbers or adds a loss is
not opened (`CannotTrace` says why): something of it would be lost. Of a whole network inference
mode counts then, with a warning. Variables of its own that the code uses get a layer, if they are
kernels (see products.py) or used element by element (see held.py).
"""

import ast
import inspect
import textwrap
import warnings
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
from keras import KerasTensor, tree

from keras_polar.graph.configs import can_be_made
from keras_polar.graph.keras_private import backend, has_parts
from keras_polar.graph.symbolic.held import held_by
from keras_polar.graph.symbolic.merge import BATCHES, Expansion, LeafMerge, Merge
from keras_polar.graph.symbolic.products import Product, with_products
from keras_polar.graph.symbolic.record import (
    CallRecorder,
    CannotTrace,
    DiffersInTraining,
    Reads,
    RecordedRun,
    in_mode,
    mapped_in_order,
    named,
    run_layer,
    steps_between,
    why,
)


def open_layer(
    op: Any,
    args: tuple,
    kwargs: dict,
    opens: Callable[[Any], bool],
    keeps_masks: bool = True,
    keeps_plain: bool = True,
    elsewhere: Collection[int] = (),
) -> Expansion:
    """The calls that `op(*args, **kwargs)` consists of.

    Args:
        op: a built layer.
        args, kwargs: of the call; KerasTensors, with masks attached as Keras does, say the shapes.
        opens: which of the sublayers (and their sublayers) are to be opened in turn.
        keeps_masks: whether the masks that Keras attaches to its outputs are wanted on them:
            operations do not hand them on, though who takes one as an argument has it anyway.
        keeps_plain: whether a layer without sublayers and kernels stays as it is.
        elsewhere: ids of variables that others use, so that the layer itself need not.

    Raises:
        CannotTrace: the layer has to stay as it is.
    """
    closed: dict[int, str] = {}
    while True:
        settings = zip(BATCHES, (False, True), strict=True)
        first = run_layer(op, args, kwargs, opens, closed, *next(settings))
        known = len(closed)
        second = run_layer(op, args, kwargs, opens, closed, *next(settings))
        if keeps_masks:
            _check_masks(first)
        if len(closed) > known:
            continue
        try:
            opened = _merged(first, second)
        except CannotTrace as error:
            if _close_culprits(first, opens, closed):
                continue
            if not isinstance(error, DiffersInTraining):
                raise
            again = run_layer(op, args, kwargs, opens, closed, BATCHES[1], False)
            opened = _in_inference(op, first, again, second, error)
        if keeps_plain and _close_plain(first, opened, closed):
            continue
        opened = replace(opened, inlets=first.inputs, closed=closed)
        _check_variables(op, opened, {*elsewhere} | (first.idle & second.idle))
        return opened


def _merged(first: RecordedRun, second: RecordedRun, modes: tuple = (False, True)) -> Expansion:
    """What two runs have in common, layers in place of the weights that the code uses itself."""
    opened, weights = Merge(first, second, modes).opened(), first.weights
    steps = with_products(opened.steps, weights, opened.outputs, BATCHES[0])
    held, steps = held_by(weights, steps, opened.outputs, BATCHES[0])
    return replace(opened, steps=steps, held=held)


def _close_plain(run: RecordedRun, opened: Expansion, closed: dict[int, str]) -> bool:
    """Leaves layers without sublayers as they are where nothing is gained: see rules/custom.py."""
    owners = {id(s.op.kernel.owner) for s in opened.steps if isinstance(s.op, Product)}
    plain = [
        x for x, *_ in run.composites if not has_parts(x) and id(x) not in owners and x.weights
    ]
    plain = [x for x in plain if can_be_made(x)]
    if plain and plain[0] is run.composites[0][0]:
        raise CannotTrace("has no kernel that its call multiplies its inputs with")
    closed.update((id(x), "") for x in plain)
    return bool(plain)


def _in_inference(
    op: Any, first: RecordedRun, again: RecordedRun, trained: RecordedRun, error: CannotTrace
) -> Expansion:
    """What a whole network does in inference mode, should it do something else in training.

    Layers inside stay as they are: what they do in training (BatchNormalization, Dropout, a block
    that is left out at random) is not to be lost.
    """
    where = mode_asked_for(op)
    why_not = DiffersInTraining(f"{error}{where and f' ({where})'}")
    if not isinstance(op, keras.Model):
        raise why_not from error
    try:
        opened = _merged(first, again, (False, False))
    except CannotTrace:
        raise why_not from error
    fixed = {id(s.op) for s in trained.steps if s.kwargs.get("training") is False}
    if any(id(s.op) in fixed for s in opened.steps):
        raise why_not from error
    warnings.warn(
        f"{type(op).__name__} {op.name!r} {why_not}: what is made of it computes, in training as "
        "well, what that does in inference mode. What only training has (outputs, losses) is "
        "left out; layers that differ by themselves, Dropout say, go on to do so.",
        stacklevel=2,
    )
    return opened


def mode_asked_for(op: Any) -> str:
    """Where the `call` of a layer asks whether it is training; empty if that is not to be seen."""
    try:
        lines, start = inspect.getsourcelines(type(op).call)
        code = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return ""
    file = Path(inspect.getsourcefile(type(op)) or "").name
    asked = [x.test for x in ast.walk(code) if isinstance(x, (ast.If, ast.IfExp))]
    for test in asked:
        if "training" in {getattr(x, "id", "") for x in ast.walk(test)}:
            line = lines[test.lineno - 1].strip()
            return f"line {start + test.lineno - 1} of {file}: `{line}`"
    return ""


def run_functional(
    model: Any, args: tuple, kwargs: dict, is_functional: Callable, needs_masks: Callable
) -> Expansion:
    """The calls of a functional model on tensors of other shapes than it was built with.

    Args:
        is_functional: which sublayers are functional models, to be run in line.
        needs_masks: for which sublayers the calls that make their masks are wanted as well.
    """
    run = run_layer(model, args, kwargs, is_functional, {}, None, None, needs_masks)
    _check_masks(run)
    steps = [replace(s, shapes=[tuple(x.shape) for x in s.outputs]) for s in run.steps]
    return Expansion(run.inlets, steps, run.outputs)


def _check_masks(run: RecordedRun) -> None:
    if run.loses_mask:
        raise CannotTrace("passes an implicit mask on; pass the mask as an argument instead")


def _check_variables(op: Any, opened: Expansion, needless: Container[int]) -> None:
    """Nothing that is trained may be missing from the calls that stand for the layer."""
    reached = {id(v) for s in opened.steps for v in getattr(s.op, "weights", ())}
    reached |= {id(h.variable) for h in opened.held}
    for variable in op.weights:
        if variable.trainable and id(variable) not in reached and id(variable) not in needless:
            raise CannotTrace(f"does not use its variable {variable.path!r} by way of a sublayer")


# --- who is to blame -------------------------------------------------------------------------


def _close_culprits(run: RecordedRun, opens: Callable, closed: dict[int, str]) -> bool:
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
            run_layer(layer, args, kwargs, lambda x: opens(x) and id(x) not in closed, {}, b, t)
            for b, t in zip(BATCHES, (False, True), strict=True)
        ]
        _merged(pair[0], pair[1])
    except CannotTrace as error:
        closed[id(layer)] = str(error)


# --- layers without sublayers ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Leaf:
    """A call of a layer without sublayers, in KerasTensors."""

    op: Any
    args: tuple
    kwargs: dict


def trace_leaf(leaf: Leaf, twin: Leaf, resized: dict[int, int], training: Any) -> Expansion:
    """What a layer's `call` does with its input and variables, the same for any number of units.

    Args:
        leaf: the layer, with inputs whose batch size is None.
        twin: an equal layer, on inputs with fewer units.
        resized: number of units in `leaf` -> in `twin`.

    Raises:
        CannotTrace: it cannot be traced, or does different things.
    """
    pair = [_leaf_run(x, b, training) for x, b in zip((leaf, twin), BATCHES, strict=True)]
    variables = [run.variables for run in pair]
    if variables[0].keys() != variables[1].keys():
        raise CannotTrace("has other variables on fewer units")
    for a, b in ((variables[0][k], variables[1][k]) for k in variables[0]):
        expected = tuple(resized.get(n, n) for n in a.shape)
        if tuple(b.shape) not in (expected, tuple(a.shape)):
            raise CannotTrace("has variables that do not follow the size of its input")
        if tuple(b.shape) != expected:
            raise CannotTrace("has a variable of a fixed size")
    merge = LeafMerge(pair[0], pair[1], resized)
    return replace(merge.opened(), inlets=pair[0].inputs, variables=variables[0])


def _leaf_run(leaf: Leaf, batch: int, training: Any) -> RecordedRun:
    fresh: dict[int, Any] = {}

    def inlet(x: Any) -> Any:
        if isinstance(x, KerasTensor) and id(x) not in fresh:
            fresh[id(x)] = keras.Input(batch_shape=(batch, *x.shape[1:]), dtype=x.dtype)
        return fresh.get(id(x), x)

    args, kwargs = mapped_in_order(inlet, (leaf.args, leaf.kwargs))
    if training is not None:
        kwargs = {**kwargs, "training": training}
    names = [k for k, v in vars(leaf.op).items() if any(v is w for w in leaf.op.weights)]
    if len(names) != len(leaf.op.weights):
        raise CannotTrace("holds variables in a structure")
    variables = {n: getattr(leaf.op, n) for n in names}
    symbols = {n: keras.Input(batch_shape=v.shape, dtype=v.dtype) for n, v in variables.items()}
    watch = CallRecorder(leaf.op, lambda op: False, {}, lambda op: False)
    watch.is_paused = True  # it may draw random numbers: it stays whole, and the scope undoes it
    vars(leaf.op).update(symbols)
    try:
        with Reads(watch), in_mode(training):
            outputs = leaf.op.call(*args, **kwargs)
    except Exception as error:
        raise CannotTrace(why(error)) from error
    finally:
        vars(leaf.op).update(variables)
    flat = tree.flatten(outputs)
    if not all(isinstance(x, KerasTensor) for x in flat):
        raise CannotTrace("returns something that does not depend on its inputs")
    inlets = [*fresh.values(), *symbols.values()]
    steps = named(steps_between(flat, inlets, watch), watch)
    return RecordedRun(inlets, steps, flat, inputs=list(fresh.values()), variables=symbols)
