"""Tasks of KerasHub: what they do around their network, and how they are put together again.

KerasHub is not imported here: a model can only be a task where somebody else has done it.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_polar.backends import to_numpy
from keras_polar.graph.keras_private import source_of

COMPILED = ("optimizer", "loss", "metrics", "weighted_metrics")


def is_task(model: Any) -> bool:
    """Whether the model is a `keras_hub.models.Task`."""
    hub = sys.modules.get("keras_hub")
    return hub is not None and isinstance(model, hub.models.Task)


def head_of(task: Any) -> list:
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
                these, a `keras.utils.PyDataset`, or a dataset that has `map`.
            shuffle: whether samples come in another order in each epoch.
        """
        if self.task.preprocessor is None or arguments.get("x") is None:
            return arguments
        arguments = dict(arguments)
        x, y, weights = (arguments.pop(name, None) for name in ("x", "y", "sample_weight"))
        if isinstance(x, keras.utils.PyDataset):
            return {**arguments, "x": PreparedBatches(self.task, x)}
        if hasattr(x, "map"):
            return {**arguments, "x": x.map(self.task.preprocess_samples)}
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
        self.task, self.samples = task, samples
        self.batch_size, self.shuffle = batch_size, shuffle
        self.order = np.arange(len(next(_leaves(samples))))
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


def _rows(x: Any, rows: np.ndarray) -> Any:
    if isinstance(x, dict):
        return {k: _rows(v, rows) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(_rows(v, rows) for v in x)
    if isinstance(x, list):
        return [x[i] for i in rows]
    return x if x is None else x[rows]


# --- around a smaller backbone --------------------------------------------------------------------


def put_together(small: keras.Model, task: Any) -> Any:
    """A task of the same class, with the preprocessor of `task`, around a smaller backbone.

    Args:
        small: the sub-network of the whole task.
        task: a task that is built like the one that was pruned.

    Raises:
        TypeError: `task` is no task.
        ValueError: the smaller network is not what the task's class puts together.
    """
    if not is_task(task):
        raise TypeError(
            f"convert: expected into= as a task of KerasHub, received {task!r}. Leave it out for "
            "an ordinary model."
        )
    backbone = _backbone(small, task)
    config = {**task.get_config(), "backbone": backbone, "preprocessor": task.preprocessor}
    made = type(task).from_config(config)
    for layer in head_of(made):
        _take_weights(layer, _named(small, layer.name, task))
    return made


def _backbone(small: keras.Model, task: Any) -> keras.Model:
    """The part of the smaller network in front of the head's layers."""
    inside, outputs = {id(x) for x in head_of(task)}, {}
    places = tree.flatten(_places(task.backbone.output))
    for layer in head_of(task):
        theirs = tree.flatten(_named(small, layer.name, task).input)
        for tensor, ours in zip(tree.flatten(layer.input), theirs, strict=True):
            operation, index = source_of(tensor)
            if operation is task.backbone:
                outputs[places[index]] = ours
            elif id(operation) not in inside:
                raise ValueError(
                    f"convert: {layer.name!r}, in the head of {type(task).__name__} "
                    f"{task.name!r}, reads what comes out of {operation.name!r}. Expected the "
                    "head to read its backbone alone. Leave into= out for an ordinary model."
                )
    inputs = tree.pack_sequence_as(task.backbone.input, small.inputs)
    return keras.Model(inputs, _of_structure(outputs), name=task.backbone.name)


def _places(output: Any) -> Any:
    """The name of each output, where the backbone has several."""
    return {k: k for k in output} if isinstance(output, dict) else "output"


def _of_structure(outputs: dict) -> Any:
    return outputs["output"] if [*outputs] == ["output"] else outputs


def _named(small: keras.Model, name: str, task: Any) -> Any:
    try:
        return small.get_layer(name)
    except ValueError:
        raise ValueError(
            f"convert: into={type(task).__name__} {task.name!r} has a layer {name!r} in its head, "
            "the pruned network has none. Expected the task that `apply` was given, or one that "
            "is built like it. Leave into= out for an ordinary model."
        ) from None


def _take_weights(layer: Any, trained: Any) -> None:
    shapes, theirs = ([tuple(v.shape) for v in x.weights] for x in (layer, trained))
    if shapes != theirs:
        raise ValueError(
            f"convert: {layer.name!r} of the task's head has weights of {shapes}, in the pruned "
            f"network of {theirs}: its class cannot have other widths. Keep them: "
            f"keras_polar.apply(task, ignore=[{layer.name!r}])."
        )
    layer.set_weights(trained.get_weights())
