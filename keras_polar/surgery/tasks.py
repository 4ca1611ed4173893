"""Tasks of KerasHub: what they do around their network, and how they are put together again.

KerasHub is not imported here: a model can only be a task where somebody else has done it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_polar.backends import to_numpy
from keras_polar.graph.ir import refs_in
from keras_polar.graph.keras_private import (
    compute_loss_of,
    layers_of,
    nodes_in,
    source_of,
)
from keras_polar.graph.symbolic.record import MADE_FOR
from keras_polar.rules import trace_model

COMPILED = ("optimizer", "loss", "metrics", "weighted_metrics")


def is_task(model: Any) -> bool:
    """Whether the model is a `keras_hub.models.Task`."""
    hub = sys.modules.get("keras_hub")
    return hub is not None and isinstance(model, hub.models.Task)


def writes(model: Any) -> bool:
    """Whether the model is a task of KerasHub that writes texts."""
    if not is_task(model):
        return False
    models = sys.modules["keras_hub"].models
    return isinstance(model, (models.CausalLM, models.Seq2SeqLM))


def widths_of_head(model: Any, sites: Iterable) -> list[str]:
    """Names of the layers with units in the head of a task: its class says how many they have."""
    if not is_task(model):
        return []
    inside = {id(x) for layer in _head(model) for x in layers_of(layer)}
    inside -= {id(x) for x in layers_of(model.backbone)}  # an embedding that the head reads again
    return sorted({site.name for site in sites if site.produces and id(site.op) in inside})


def _head(task: Any) -> list:
    """The layers that the task puts onto its backbone."""
    inputs = keras.layers.InputLayer
    return [x for x in task.layers if x is not task.backbone and not isinstance(x, inputs)]


# --- training as the task does --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pipeline:
    """What a task does around its network; a gated model that was made from the task does it, too.

    Attributes:
        task: the `keras_hub.models.Task`; it may get another preprocessor, or None.
    """

    task: Any

    def compiled(self) -> dict:
        """Optimizer, loss and metrics like those that the task is compiled with."""
        config = self.task.get_compile_config() or {}
        made = {k: keras.saving.deserialize_keras_object(config.get(k)) for k in COMPILED}
        return {k: v for k, v in made.items() if v is not None}

    def prepared(self, arguments: dict, shuffle: bool = False) -> dict:
        """Arguments of `fit` and its like, the data of which go through the preprocessor.

        Args:
            arguments: by name; "x" may be arrays, lists of strings, dictionaries and tuples of
                these, a `keras.utils.PyDataset`, or a dataset of tf.data or grain.
            shuffle: whether samples come in another order in each epoch.

        Raises:
            TypeError: the data are something else.
        """
        if self.task.preprocessor is None or arguments.get("x") is None:
            return arguments
        arguments = dict(arguments)
        x, y, weights = (arguments.pop(name, None) for name in ("x", "y", "sample_weight"))
        if isinstance(x, keras.utils.PyDataset):
            return {**arguments, "x": PreparedBatches(self.task, x)}
        if hasattr(x, "map") and hasattr(x, "batch"):
            return {**arguments, "x": x.map(self.task.preprocess_samples)}
        if not hasattr(x, "__len__"):
            raise TypeError(
                f"The preprocessor of {self.task.name!r} takes arrays, lists of strings, dicts and "
                f"tuples of these, a PyDataset or a dataset of tf.data; received {type(x).__name__}"
                ". Set task.preprocessor = None and yield what task.preprocess_samples(x, y) gives."
            )
        size = arguments.pop("batch_size", None) or 32  # Keras' own
        samples = PreparedSamples(self.task, (x, y, weights), size, shuffle)
        return {**arguments, "x": samples}

    def prepared_validation(self, arguments: dict) -> dict:
        """Arguments of `fit`, the validation data of which go through the preprocessor."""
        data = arguments.get("validation_data")
        if data is None:
            return arguments
        parts = data if isinstance(data, tuple) else (data,)
        samples = dict(zip(("x", "y", "sample_weight"), parts, strict=False))
        samples["batch_size"] = arguments.get("validation_batch_size")
        return {**arguments, "validation_data": self.prepared(samples)["x"]}

    def has_own_loss(self) -> bool:
        """Whether the class of the task does something with targets before they are compared."""
        return type(self.task).compute_loss is not keras.Model.compute_loss

    def compared(self, x: Any, arguments: dict) -> tuple[Any, dict | None]:
        """The loss of a batch, or else what losses are to compare; see `compute_loss_of`."""
        return compute_loss_of(self.task, x, **arguments)

    def decoded(self, outputs: Any, batch: Any) -> Any:
        """Outputs of the network as `predict` of the task gives them: boxes, of a detector."""
        if not hasattr(self.task, "decode_predictions"):
            return outputs
        return self.task.decode_predictions(outputs, keras.utils.unpack_x_y_sample_weight(batch)[0])

    def inputs(self, x: Any) -> Any:
        """Raw inputs as the network takes them."""
        return _preprocessed(self.task, (x,))[0]


class PreparedBatches(keras.utils.PyDataset):
    """Batches of another dataset, as the task's preprocessor makes them."""

    def __init__(self, task: Any, batches: Any) -> None:
        super().__init__()
        self.task, self.batches = task, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple:
        return _preprocessed(self.task, self.batches[index])

    def on_epoch_end(self) -> None:
        self.batches.on_epoch_end()


class PreparedSamples(keras.utils.PyDataset):
    """Batches of samples in memory, as the task's preprocessor makes them."""

    def __init__(self, task: Any, samples: tuple, batch_size: int, shuffle: bool) -> None:
        super().__init__()
        self.task, self.samples = task, _map(_array, samples)
        self.batch_size, self.shuffle = batch_size, shuffle
        self.order = np.arange(len(next(_leaves(self.samples))))
        self.on_epoch_end()

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, index: int) -> tuple:
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return _preprocessed(self.task, _rows(self.samples, rows))

    def on_epoch_end(self) -> None:
        if self.shuffle:
            np.random.shuffle(self.order)


def _preprocessed(task: Any, batch: Any) -> tuple:
    batch = task.preprocess_samples(*(batch if isinstance(batch, tuple) else (batch,)))
    batch = batch if isinstance(batch, tuple) else (batch,)
    return tree.map_structure(lambda x: None if x is None else to_numpy(x), batch)


# A list is one tensor here, of strings perhaps; `keras.tree` would go into it.


def _leaves(x: Any) -> Iterator:
    if isinstance(x, (dict, tuple)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _leaves(part)
    elif x is not None:
        yield x


def _map(function: Callable, x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _map(function, v) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(_map(function, v) for v in x)
    return x if x is None else function(x)


def _array(x: Any) -> Any:
    """Numbers as an array, strings as the list that preprocessors take."""
    array = np.asarray(x)
    return array.tolist() if array.dtype.kind in "USO" else array


def _rows(x: Any, rows: np.ndarray) -> Any:
    return _map(lambda x: [x[i] for i in rows] if isinstance(x, list) else x[rows], x)


# --- around a smaller backbone --------------------------------------------------------------------


def put_together(small: keras.Model, task: Any) -> Any:
    """A task of the same class, with the preprocessor of `task`, around a smaller backbone.

    Args:
        small: the sub-network of the whole task.
        task: a task that is built like the one that was pruned.

    Raises:
        TypeError: `task` is no task, or one of a class that needs more than a network.
        ValueError: the smaller network is not what the task's class puts together.
    """
    if not is_task(task):
        raise TypeError(
            f"convert: expected into= as a task of KerasHub, received {task!r}. Leave it out for "
            "an ordinary model."
        )
    if hasattr(task, "generate"):  # images, say; see writers.py for texts
        raise TypeError(
            f"convert: into={type(task).__name__} {task.name!r} generates by calling the layers of "
            "its backbone one by one, which a network of other widths does not have. Leave into= "
            "out for an ordinary model."
        )
    match = _Match(task)
    match.follow(refs_in(match.graph.outputs)[: len(task.outputs)], small.outputs)
    made = _around(_backbone(match, small), task)
    heads = {layer.name: layer for layer in _head(task)}
    for layer in _head(made):
        _take_weights(layer, heads[layer.name], match)
    return made


def _backbone(match: "_Match", small: keras.Model) -> tuple:
    """Inputs, outputs and name of the part of the sub-network in front of the head."""
    task, whole = match.task, match.task.backbone
    known = {id(x): other for x, other in zip(task.inputs, small.inputs, strict=True)}
    paths = [path for path, _ in tree.flatten_with_path(whole.output)]
    read = {paths[i]: tensor for i, tensor in sorted(match.outputs.items())}
    if any(len(path) > 1 for path in read):
        raise TypeError(
            f"convert: the head of into={type(task).__name__} {task.name!r} reads outputs within "
            "outputs of its backbone, of which no smaller one is put together. Leave into= out for "
            "an ordinary model that gives what the task decodes."
        )
    outputs = read[()] if () in read else {path[0]: tensor for path, tensor in read.items()}
    inputs = tree.pack_sequence_as(whole.input, [known[id(x)] for x in match.read])
    return inputs, outputs, whole.name


def _around(backbone: tuple, task: Any) -> Any:
    """The task anew; what its class asks its backbone for beyond a network, that is given."""
    inputs, outputs, name = backbone
    try:
        return with_backbone(task, keras.Model(inputs, outputs, name=name))
    except AttributeError:  # it asks for more
        known = PrunedBackbone(inputs, outputs, name=name)
        known.constants = _constants(task.backbone)
        return with_backbone(task, known)


def with_backbone(task: Any, backbone: keras.Model) -> Any:
    """A task like this one, with its preprocessor, around another backbone."""
    config = task.get_config()  # anew each time: what is made of it may write into it
    given = {"preprocessor": task.preprocessor, "backbone": backbone}
    return type(task).from_config({**config, **given})


def _constants(backbone: Any) -> dict:
    return {k: v for k, v in vars(backbone).items() if k[0] != "_" and _is_simple(v)}


def _is_simple(x: Any) -> bool:
    if isinstance(x, (list, tuple)):
        return all(map(_is_simple, x))
    return isinstance(x, (bool, int, float, str, type(None)))


@keras.saving.register_keras_serializable("keras_polar")
class PrunedBackbone(keras.Model):
    """A smaller backbone that knows what heads ask theirs for: constants, and layers by name.

    Presets of such tasks are loaded where `keras_polar` has been imported.

    Attributes:
        constants: by name, those of the backbone that was pruned.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.constants: dict = {}

    def __getattr__(self, name: str) -> Any:
        own = vars(self)
        known = {x.name: x for x in own.get("_layers", ())} | {**own.get("constants", {})}
        if name in known:
            return known[name]
        if hasattr(super(), "__getattr__"):  # PyTorch's modules
            return super().__getattr__(name)
        raise AttributeError(f"A pruned backbone has no {name!r}, which it is asked for.")

    def get_config(self) -> dict:
        constants = keras.saving.serialize_keras_object(dict(self.constants))
        return {**super().get_config(), "constants": constants}

    @classmethod
    def from_config(cls, config: dict, **kwargs: Any) -> "PrunedBackbone":
        config = dict(config)
        constants = keras.saving.deserialize_keras_object(config.pop("constants"))
        made = super().from_config(config, **kwargs)
        made.constants = constants
        return made


class _Match:
    """Goes through the heads of a task and of its sub-network side by side, to the backbone.

    Attributes:
        graph: of the task, layers of the head opened as in its sub-network. Behind the task's
            outputs it has those of the backbone.
        read: the inputs of the backbone.
        outputs: of the backbone's outputs that are read, by their places, the sub-network's.
        layers: id of a layer of the head, or a part of one -> the sub-network's.
    """

    def __init__(self, task: Any) -> None:
        calls = [node for node in nodes_in(task) if node.operation is task.backbone]
        ends = [x for node in calls for x in node.outputs]
        self.task, self.read = task, calls[0].input_tensors
        self.graph = trace_model(keras.Model(task.inputs, [*task.outputs, *ends], name=task.name))
        places = [place for node in calls for place in range(len(node.outputs))]
        indices = refs_in(self.graph.outputs)[len(task.outputs) :]
        self.places = dict(zip(indices, places, strict=True))
        self.made_by = {i: call for call in self.graph.calls for i in call.outputs}
        self.outputs: dict[int, Any] = {}
        self.layers: dict[int, Any] = {}

    def follow(self, tensors: Sequence[int], theirs: Sequence) -> None:
        if len(tensors) != len(theirs):
            raise self.mismatch(f"{len(tensors)} tensors", f"{len(theirs)}")
        for pair in zip(tensors, theirs, strict=True):
            self._one(*pair)

    def _one(self, tensor: int, other: Any) -> None:
        if tensor in self.places:
            self.outputs[self.places[tensor]] = other
            return
        operation, index, inputs = source_of(other)
        call = self.made_by.get(tensor)
        if call is None:  # an input of the task, which its head reads as well
            if not isinstance(operation, keras.layers.InputLayer):
                raise self.mismatch("an input of the task", other.name)
            return
        if (type(call.op), call.outputs.index(tensor)) != (type(operation), index):
            raise self.mismatch(f"{type(call.op).__name__} {call.op.name!r}", other.name)
        if isinstance(operation, keras.layers.Layer):
            self.layers[id(call.op)] = operation
        self.follow(call.inputs, inputs)

    def used_by_code(self) -> dict[int, Any]:
        """Variables of the task, by id, that code of its head uses itself -> the trained ones."""
        made = [c.op for c in self.graph.calls if id(c.op) in self.layers and c.op in MADE_FOR]
        return {
            id(old): new
            for op in made
            for old, new in zip(MADE_FOR[op], self.layers[id(op)].weights, strict=True)
        }

    def mismatch(self, expected: str, found: str) -> ValueError:
        return ValueError(
            f"convert: the pruned network is not built like into={type(self.task).__name__} "
            f"{self.task.name!r}: expected {expected} in its head, found {found!r}. Hand over the "
            "task that `apply` was given, or leave into= out for an ordinary model."
        )


def _take_weights(layer: Any, whole: Any, match: _Match) -> None:
    """Gives a layer of a new head its trained weights; some parts belong to the backbone.

    Args:
        whole: the layer of the task that was pruned.

    Raises:
        ValueError: not all weights are known.
    """
    for new, old in zip(layers_of(layer), layers_of(whole), strict=True):
        if id(old) in match.layers and new.weights:
            _set_weights(new, match.layers[id(old)])
    known = {id(v) for x in layers_of(whole) if id(x) in match.layers for v in x.weights}
    known |= {id(v) for v in match.task.backbone.weights}
    trained = match.used_by_code()
    for new, old in zip(layer.trainable_variables, whole.trainable_variables, strict=True):
        if id(old) in trained:
            new.assign(keras.ops.reshape(trained[id(old)], new.shape))
        elif id(old) not in known:
            raise match.mismatch(f"a layer with {old.path!r}", "none")


def _set_weights(layer: Any, trained: Any) -> None:
    shapes, theirs = ([tuple(v.shape) for v in x.weights] for x in (layer, trained))
    if shapes != theirs:
        raise ValueError(
            f"convert: {layer.name!r} of the task's head has weights of {shapes}, in the pruned "
            f"network of {theirs}. Hand over a task that is built like the one that was pruned."
        )
    layer.set_weights(trained.get_weights())
