"""Tasks of KerasHub: what they do around their network, and how they are put together again.

KerasHub is not imported here: a model can only be a task where somebody else has done it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_polar.backends import to_numpy
from keras_polar.graph.keras_private import layers_of, source_of

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
    match.follow(task.outputs, small.outputs)
    made = _around(_backbone(match, small), task)
    trained = {layer.name: small_layer for layer, small_layer in match.layers}
    for layer in _head(made):
        if layer.weights and layer.name in trained:
            _take_weights(layer, trained[layer.name])
    return made


def _backbone(match: "_Match", small: keras.Model) -> tuple:
    """Inputs, outputs and name of the part of the sub-network in front of the head."""
    whole, theirs = match.task.backbone, zip(match.task.inputs, small.inputs, strict=True)
    known, places = {id(x): other for x, other in theirs}, _places(whole.output)
    outputs = {places[i]: tensor for i, tensor in sorted(match.outputs.items())}
    inputs = tree.map_structure(lambda x: known[id(x)], whole.input)
    return inputs, outputs.get("", outputs), whole.name


def _around(backbone: tuple, task: Any) -> Any:
    """The task anew; what its class asks its backbone for beyond a network, that is given."""
    inputs, outputs, name = backbone
    rest = {**task.get_config(), "preprocessor": task.preprocessor}
    plain = keras.Model(inputs, outputs, name=name)
    try:
        return type(task).from_config({**rest, "backbone": plain})
    except AttributeError:  # it asks for more
        known = PrunedBackbone(inputs, outputs, name=name)
        known.constants = _constants(task.backbone)
        return type(task).from_config({**rest, "backbone": known})


def _constants(backbone: Any) -> dict:
    simple = (bool, int, float, str, type(None))
    return {k: v for k, v in vars(backbone).items() if k[0] != "_" and isinstance(v, simple)}


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
        return {**super().get_config(), "constants": dict(self.constants)}

    @classmethod
    def from_config(cls, config: dict, **kwargs: Any) -> "PrunedBackbone":
        config = dict(config)
        constants = config.pop("constants")
        made = super().from_config(config, **kwargs)
        made.constants = constants
        return made


def _places(output: Any) -> list[str]:
    """Of each of a backbone's outputs, the name; empty if there is only one."""
    return sorted(output) if isinstance(output, dict) else [""]


class _Match:
    """Goes through the heads of a task and of its sub-network side by side, to the backbone.

    Attributes:
        outputs: of the backbone's outputs that are read, by their places, the sub-network's.
        layers: pairs of layers of the two heads.
    """

    def __init__(self, task: Any) -> None:
        self.task = task
        self.outputs: dict[int, Any] = {}
        self.layers: list[tuple] = []

    def follow(self, tensors: Any, theirs: Any) -> None:
        if len(tensors) != len(theirs):
            raise self._mismatch(f"{len(tensors)} tensors", f"{len(theirs)}")
        for pair in zip(tensors, theirs, strict=True):
            self._one(*pair)

    def _one(self, tensor: Any, other: Any) -> None:
        operation, index, inputs = source_of(tensor)
        if operation is self.task.backbone:
            self.outputs[index] = other
            return
        their_operation, their_index, their_inputs = source_of(other)
        if (type(operation), index) != (type(their_operation), their_index):
            raise self._mismatch(f"{type(operation).__name__} {operation.name!r}", other.name)
        if isinstance(operation, keras.layers.Layer):
            self.layers.append((operation, their_operation))
        self.follow(inputs, their_inputs)

    def _mismatch(self, expected: str, found: str) -> ValueError:
        return ValueError(
            f"convert: the pruned network is not built like into={type(self.task).__name__} "
            f"{self.task.name!r}: expected {expected} in its head, found {found!r}. Hand over the "
            "task that `apply` was given, or leave into= out for an ordinary model."
        )


def _take_weights(layer: Any, trained: Any) -> None:
    shapes, theirs = ([tuple(v.shape) for v in x.weights] for x in (layer, trained))
    if shapes != theirs:
        raise ValueError(
            f"convert: {layer.name!r} of the task's head has weights of {shapes}, in the pruned "
            f"network of {theirs}. Hand over a task that is built like the one that was pruned."
        )
    layer.set_weights(trained.get_weights())
