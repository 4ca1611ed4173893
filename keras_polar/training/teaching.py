"""From a teacher to a lesson: which tensors are compared, and a frozen copy that makes them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
from keras import tree

from keras_polar.gates.groups import is_gated
from keras_polar.gates.lesson import Comparison, FeatureDistillation, Lesson, LogitsDistillation
from keras_polar.gates.teacher import Teacher
from keras_polar.graph.clone import Copies
from keras_polar.graph.ir import Call, Graph, Ref, alive, fill, refs_in, unused
from keras_polar.graph.keras_private import op_class
from keras_polar.graph.rebuild import rebuild
from keras_polar.graph.trace import trace
from keras_polar.rules import trace_model
from keras_polar.surgery.tasks import writes
from keras_polar.surgery.writers import as_network

LOGITS, SOFTMAX, OTHER = "logits", "probabilities of a softmax", "probabilities"
Visit = Callable[[Call, dict], Any]
_STOCK = (LogitsDistillation, FeatureDistillation)
_REMEDY = (
    "keras_polar.Teacher(model, loss=keras.distillation.FeatureDistillation(loss={loss!r})) "
    "compares outputs as they are"
)


@dataclass(frozen=True, eq=False)
class Teaching:
    """What of a graph is compared, by which losses, with what a frozen teacher makes.

    Attributes:
        teacher: takes the graph's inputs, as a list.
        comparisons: take the tensors in order.
        pupil: the tensors of the graph.
        features: names of the layers among those that make them, all but the outputs'.
        every: only in every so many steps.
    """

    teacher: Any
    comparisons: tuple[Comparison, ...]
    pupil: tuple[int, ...]
    features: tuple[str, ...]
    every: int

    def wrap(self, graph: Graph, visit: Visit) -> Visit:
        """Rebuilds the graph as `visit` does, with the lesson behind its last output."""
        last = graph.calls[-1].name
        names = {c.name for c in graph.calls} | {i.name for i in graph.input_layers}
        lesson = Lesson(
            self.teacher, self.comparisons, self.every, last, name=unused("teacher", names)
        )
        return with_lesson(graph, visit, lesson, self.pupil)


def teaching_of(teacher: Any, graph: Graph) -> Teaching | None:
    """What a teacher teaches the model of a graph; None without a teacher.

    Raises:
        TypeError: it is no functional model.
        ValueError: it has gates, or its inputs or outputs do not fit.
    """
    if teacher is None:
        return None
    given = teacher if isinstance(teacher, Teacher) else _teacher(teacher)
    whole = as_network(given.model, _shapes(graph) if writes(given.model) else None)
    sides = _Side(graph), _Side(_traced(whole), trace_model(whole))
    losses = given.losses or [LogitsDistillation()]
    found = [_compared(loss, *sides) for loss in losses]
    comparisons = [
        Comparison(loss, float(weight), *flags)
        for (loss, _, flags), weight in zip(found, given.weights, strict=True)
    ]
    pairs = [pair for _, tensors, _ in found for pair in tensors]
    model = _copied(_made(sides[1].graph, graph, [theirs for _, theirs in pairs]))
    _refuse_shared(model, given.model)
    pupil = tuple(ours for ours, _ in pairs)
    return Teaching(model, tuple(comparisons), pupil, _features(losses), int(given.every))


def _shapes(graph: Graph) -> dict[str, tuple]:
    """Of one sample of each input, by its name."""
    inputs = zip(graph.input_layers, refs_in(graph.inputs), strict=True)
    return {layer.name: graph.specs[i].shape[1:] for layer, i in inputs}


def _features(losses: Sequence) -> tuple[str, ...]:
    """The layers of the pupil that losses name."""
    names = (getattr(loss, "student_layer_name", None) for loss in losses)
    return tuple(n for n in names if n is not None)


def with_lesson(graph: Graph, visit: Visit, lesson: Lesson, pupil: Sequence[int]) -> Visit:
    """Rebuilds a graph as `visit` does, its last output behind a lesson.

    Args:
        pupil: the tensors that are compared.
    """
    outputs, inputs = refs_in(graph.outputs), refs_in(graph.inputs)

    def visited(call: Call, values: dict) -> Any:
        if call is not graph.calls[-1]:
            return visit(call, values)
        made = dict(zip(call.outputs, tree.flatten(visit(call, values)), strict=True))
        known = {**values, **made}
        place = next(i for i in made if i in outputs)
        made[place] = lesson(made[place], [known[i] for i in pupil], [known[i] for i in inputs])
        return list(made.values())

    return visited


def lesson_of_twin(gated: Any) -> Callable[[Graph, Visit], Visit]:
    """Puts the lesson of a gated model, if there is one, behind its smaller twin."""

    def wrap(graph: Graph, visit: Visit) -> Visit:
        if gated.lesson is None:
            return visit
        whole = trace_model(gated)
        call = next(c for c in whole.calls if c.op is gated.lesson)
        # Stripped of its gates, a graph keeps its tensors' numbers, but for sums with one summand.
        passed = {call.outputs[0]: call.inputs[0]}
        outputs = [passed.get(i, i) for i in refs_in(whole.outputs)]
        moved = dict(zip(outputs, refs_in(graph.outputs), strict=True))
        pupil = [moved.get(i, i) for i in refs_in(call.args[1])]
        left = {t for c in graph.calls for t in c.outputs}
        if not left.issuperset(pupil):
            raise ValueError("what is compared with the teacher is in a branch that is closed")
        return with_lesson(graph, visit, gated.lesson, pupil)

    return wrap


# --- the teacher -----------------------------------------------------------------------------


def _teacher(model: Any) -> Teacher:
    if not isinstance(model, keras.Model):
        raise TypeError(
            "apply: expected teacher as a keras.Model, a keras_polar.Teacher or None, received "
            f"{model!r}."
        )
    return Teacher(model)


def _traced(model: Any) -> Graph:
    if is_gated(model):
        raise ValueError(
            f"apply: expected a teacher without gates, received {model.name!r}, which has some. "
            "Pass the model that it was made of, or `keras_polar.convert` it."
        )
    try:
        return trace(model)
    except TypeError as error:
        raise TypeError(f"apply: the teacher cannot be copied. {error}") from error


def _made(theirs: Graph, ours: Graph, tensors: Sequence[int]) -> Graph:
    """The teacher's graph from a list of the pupil's inputs to a list of tensors."""
    order = _fitting_inputs(theirs, ours)
    inputs = refs_in(theirs.inputs)
    return alive(
        replace(
            theirs,
            inputs=[Ref(inputs[i]) for i in order],
            input_layers=tuple(theirs.input_layers[i] for i in order),
            outputs=[Ref(i) for i in tensors],
        )
    )


def _copied(graph: Graph) -> Any:
    """A model of copies of a graph's layers, with the values that they have now."""
    copies = Copies()

    def visit(call: Call, values: dict) -> Any:
        return copies.call(call.op, call.name, *fill((call.args, call.kwargs), values))[1]

    return rebuild(graph, visit, keras.Model)


def _refuse_shared(copy: Any, model: Any) -> None:
    """A variable that a layer was handed is the same in its copy: it would be trained along."""
    own = {id(v) for v in model.variables}
    shared = [v.path for v in copy.variables if id(v) in own]
    if shared:
        raise ValueError(
            f"apply: the teacher {model.name!r} cannot be frozen, for its layers were handed "
            f"variables that are not theirs: {', '.join(shared[:3])}. Let the layer that uses a "
            "variable make it, with `add_weight`."
        )


# --- what fits what --------------------------------------------------------------------------


class _Side:
    """The tensors of one of the two that can be compared.

    Args:
        graph: its graph.
        opened: the same with composite layers opened, as far as it is another one.
    """

    def __init__(self, graph: Graph, opened: Graph | None = None) -> None:
        self.graph = graph
        self.outputs = refs_in(graph.outputs)
        opened = graph if opened is None else opened
        self.kinds = [_kind(opened, i) for i in refs_in(opened.outputs)]
        self.names = _output_names(graph)
        self.is_named = isinstance(graph.outputs, dict)

    def shape(self, tensor: int) -> tuple:
        return self.graph.specs[tensor].shape

    def feature(self, name: str | None, whose: str) -> int:
        """The output of a layer; without a name, the only one of the model."""
        if name is None:
            if len(self.outputs) != 1:
                raise ValueError(
                    f"apply: expected FeatureDistillation with the name of a layer of the {whose} "
                    f"{self.graph.name!r}, which has {len(self.outputs)} outputs."
                )
            return self.outputs[0]
        calls = [c for c in self.graph.calls if c.name == name]
        made = [t for c in calls for t in c.outputs]
        if len(made) != 1:
            what = f"is called {len(calls)} times" if calls else "it does not have"
            names = ", ".join(c.name for c in self.graph.calls)
            raise ValueError(
                f"apply: expected FeatureDistillation with the name of a layer of the {whose} "
                f"{self.graph.name!r} that makes one tensor; received {name!r}, which {what}. "
                f"Its layers: {names}."
            )
        return made[0]


def _output_names(graph: Graph) -> list[str]:
    if isinstance(graph.outputs, dict):
        return tree.flatten({name: name for name in graph.outputs})
    makers = {t: c.name for c in graph.calls for t in c.outputs}
    return [makers.get(i, "") for i in refs_in(graph.outputs)]


def _order(theirs: list[str], ours: list[str]) -> list[int]:
    """Where ours are among theirs: by names if those are the same, else one by one."""
    if len(set(ours)) == len(ours) and sorted(theirs) == sorted(ours):
        return [theirs.index(name) for name in ours]
    return list(range(len(ours)))


def _fitting_inputs(theirs: Graph, ours: Graph) -> list[int]:
    (their_names, their_specs), (our_names, our_specs) = map(_inputs, (theirs, ours))
    order = _order(their_names, our_names) if len(their_names) == len(our_names) else []
    pairs = [(their_specs[i], spec) for i, spec in zip(order, our_specs, strict=False)]
    if not pairs or not all(_alike(a.shape, b.shape) and _same_kind(a, b) for a, b in pairs):
        texts = [_described_inputs(theirs), _described_inputs(ours)]
        raise ValueError(
            f"apply: expected a teacher with the inputs of model {ours.name!r} ({texts[1]}); "
            f"{theirs.name!r} has {texts[0]}. Build it on inputs of the same shapes and types."
        )
    return order


def _inputs(graph: Graph) -> tuple[list, list]:
    """Names and specs of a graph's inputs."""
    specs = [graph.specs[i] for i in refs_in(graph.inputs)]
    return [layer.name for layer in graph.input_layers], specs


def _described_inputs(graph: Graph) -> str:
    return ", ".join(f"{n} {s.shape} {s.dtype}" for n, s in zip(*_inputs(graph), strict=True))


def _same_kind(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype or ("float" in a.dtype and "float" in b.dtype)


def _alike(a: Sequence, b: Sequence) -> bool:
    return len(a) == len(b) and all(
        m == n or m is None or n is None for m, n in zip(a, b, strict=True)
    )


def _fitting_outputs(ours: _Side, theirs: _Side) -> list[int]:
    """Which output of the teacher belongs to each of the pupil's."""
    order = _order(theirs.names, ours.names)
    is_named = ours.is_named or theirs.is_named
    fits = len(ours.names) == len(theirs.names)
    if fits and is_named and len(order) > 1:
        fits = sorted(ours.names) == sorted(theirs.names)
    if not fits:
        raise ValueError(
            f"apply: expected a teacher with the outputs of model {ours.graph.name!r} "
            f"({', '.join(ours.names)}); {theirs.graph.name!r} has {', '.join(theirs.names)}. Pass "
            "keras.Model(teacher.input, <those outputs>), or compare a layer of each with "
            "keras.distillation.FeatureDistillation."
        )
    return order


def _refuse_other_shape(ours: _Side, theirs: _Side, pair: tuple[int, int]) -> None:
    shapes = ours.shape(pair[0]), theirs.shape(pair[1])
    if not _alike(*shapes):
        raise ValueError(
            f"apply: expected what is compared with the teacher in its shape; of model "
            f"{ours.graph.name!r} it has shape {shapes[0]}, of the teacher {theirs.graph.name!r} "
            f"{shapes[1]}. Compare layers that are equally wide."
        )


# --- losses ----------------------------------------------------------------------------------


def _compared(loss: Any, ours: _Side, theirs: _Side) -> tuple[Any, list[tuple], tuple]:
    """A loss of flat lists, the pairs of tensors for it, and which are to be made logits."""
    names = [getattr(loss, f"{side}_layer_name", None) for side in ("student", "teacher")]
    if names != [None, None]:
        return _compared_features(loss, ours, theirs, names)
    order = _fitting_outputs(ours, theirs)
    loss, used = _used_outputs(loss, ours)
    pairs = [(ours.outputs[i], theirs.outputs[order[i]]) for i in used]
    for i, pair in zip(used, pairs, strict=True):
        _check(loss, ours, theirs, (i, order[i]), pair)
    is_logits = isinstance(loss, LogitsDistillation)
    flags = [
        tuple(is_logits and side.kinds[i] == SOFTMAX for i in where)
        for side, where in ((ours, used), (theirs, [order[i] for i in used]))
    ]
    return loss, pairs, (flags[0], flags[1])


def _used_outputs(loss: Any, ours: _Side) -> tuple[Any, list[int]]:
    """A loss of those outputs that it has a part for, and which they are."""
    if type(loss) not in _STOCK:
        return loss, list(range(len(ours.outputs)))
    parts = _parts(loss, ours)
    used = [i for i, part in enumerate(parts) if part is not None]
    return _flat(loss, [parts[i] for i in used]), used


def _compared_features(loss: Any, ours: _Side, theirs: _Side, names: list) -> tuple:
    pair = ours.feature(names[0], "model"), theirs.feature(names[1], "teacher")
    if type(loss) in _STOCK:
        _refuse_other_shape(ours, theirs, pair)
        loss = _flat(loss, [loss.loss])
    return loss, [pair], ((False,), (False,))


def _parts(loss: Any, ours: _Side) -> list:
    """The loss of each output, None for those that are left out."""
    if not tree.is_nested(loss.loss):
        return [loss.loss] * len(ours.outputs)
    try:
        tree.assert_same_structure(loss.loss, ours.graph.outputs)
    except ValueError as error:
        raise ValueError(
            f"apply: expected {type(loss).__name__}(loss=...) as one loss, or in the structure of "
            f"the outputs of model {ours.graph.name!r} ({', '.join(ours.names)}); received "
            f"{loss.loss!r}."
        ) from error
    return tree.flatten(loss.loss)


def _flat(loss: Any, parts: list) -> Any:
    """The same loss, of lists."""
    if type(loss) is LogitsDistillation:
        # Keras takes the name "kl_divergence", its default, for the function, but makes
        # probabilities of logits for the class alone: the function would be given logits.
        own = keras.losses.kl_divergence
        parts = [keras.losses.KLDivergence() if p is own else p for p in parts]
    parts = [_per_sample(p) for p in parts]
    inner = parts[0] if len(parts) == 1 else parts
    if type(loss) is LogitsDistillation:
        return LogitsDistillation(loss.temperature, inner)
    return FeatureDistillation(inner, loss.teacher_layer_name, loss.student_layer_name)


def _per_sample(loss: Any) -> Any:
    """The same loss without a mean, which is taken of it anyway.

    Keras' own mean is divided by the number of replicas, and so is whatever a layer adds.
    """
    if getattr(loss, "reduction", None) not in ("mean", "sum_over_batch_size"):
        return loss
    loss = copy.copy(loss)
    loss.reduction = "none"
    return loss


def _check(loss: Any, ours: _Side, theirs: _Side, places: tuple, pair: tuple) -> None:
    if type(loss) in _STOCK:
        _refuse_other_shape(ours, theirs, pair)
    kinds = ours.kinds[places[0]], theirs.kinds[places[1]]
    name = ours.names[places[0]]
    if isinstance(loss, LogitsDistillation):
        if OTHER in kinds:
            raise ValueError(
                f"apply: LogitsDistillation compares logits; output {name!r} is {kinds[0]}, that "
                f"of the teacher {theirs.graph.name!r} is {kinds[1]}. "
                f"{_REMEDY.format(loss='binary_crossentropy')}."
            )
        if ours.shape(pair[0])[-1] == 1:
            raise ValueError(
                f"apply: LogitsDistillation makes probabilities of classes, but output {name!r} "
                f"has one unit, whose share is always 1. {_REMEDY.format(loss='mse')}."
            )
    elif type(loss) is FeatureDistillation and kinds[0] != kinds[1]:
        raise ValueError(
            f"apply: FeatureDistillation compares outputs as they are, but {name!r} is {kinds[0]}, "
            f"and that of the teacher {theirs.graph.name!r} is {kinds[1]}. Give both the same last "
            "activation, or use keras.distillation.LogitsDistillation."
        )


# --- what outputs are ------------------------------------------------------------------------

_SOFTMAX_OPS = (op_class("Softmax"),)
_SIGMOID_OPS = tuple(map(op_class, ("Sigmoid", "HardSigmoid")))
_PASSING = (keras.layers.Activation, keras.layers.Identity, op_class("Cast"))


def _kind(graph: Graph, tensor: int) -> str:
    """Whether a tensor is logits, or probabilities by the activation of the layer that makes it."""
    makers = {t: c for c in graph.calls for t in c.outputs}
    while tensor in makers:
        call = makers[tensor]
        kind = _kind_of(call.op)
        if kind != LOGITS or type(call.op) not in _PASSING:
            return kind
        tensor = call.inputs[0]
    return LOGITS


def _kind_of(op: Any) -> str:
    if isinstance(op, keras.layers.Wrapper):
        return _kind_of(op.layer)
    if type(op) is keras.layers.Softmax or type(op) in _SOFTMAX_OPS:
        return SOFTMAX if op.axis == -1 else OTHER
    activation = getattr(op, "activation", None)
    if activation is keras.activations.softmax:
        return SOFTMAX
    is_sigmoid = activation in (keras.activations.sigmoid, keras.activations.hard_sigmoid)
    return OTHER if is_sigmoid or type(op) in _SIGMOID_OPS else LOGITS
