"""Samples for a model out of whatever users keep them in: arrays, tf.data, generators, ..."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_polar.surgery.certificate import UNKNOWN_SIZE

_RANDOM_SAMPLES = 8  # enough to see an error, few enough to cost nothing beside the conversion


@dataclass(frozen=True)
class Samples:
    """Samples of a model.

    Attributes:
        arrays: for each input, in the order of the model's `inputs`, `(samples, ...)`.
        labels: `(samples, ...)`, or None.
        random: whether they are made up.
    """

    arrays: list[np.ndarray]
    labels: np.ndarray | None = None
    random: bool = False

    def __len__(self) -> int:
        return len(self.arrays[0])

    def batches(self, size: int) -> Iterator[list[np.ndarray]]:
        """The arrays in slices of `size` samples; the last may be shorter."""
        for start in range(0, len(self), size):
            yield [array[start : start + size] for array in self.arrays]


def input_names(core: Any) -> list[str]:
    """The names of a model's inputs, as a dict of samples has them for keys."""
    if isinstance(core.input, dict) and len(core.input) == len(core.inputs):
        return sorted(core.input)
    return [tensor.name for tensor in core.inputs]


def fixed_batch(core: Any) -> int | None:
    """The batch size that a model is built for; None for any."""
    return next((t.shape[0] for t in core.inputs if t.shape[0] is not None), None)


def random_samples(core: Any) -> Samples:
    """Seeded random samples: floats between 0 and 1, integers 0 or 1, unknown sizes 32."""
    count, rng = fixed_batch(core) or _RANDOM_SAMPLES, np.random.default_rng(0)
    arrays = [random_array(rng, (count, *t.shape[1:]), t.dtype, t.name) for t in core.inputs]
    return Samples(arrays, random=True)


def random_array(
    rng: np.random.Generator, shape: Sequence[int | None], dtype: str, name: str
) -> np.ndarray:
    """Floats between 0 and 1, or integers that are in every vocabulary."""
    sizes = [UNKNOWN_SIZE if size is None else size for size in shape]
    if "float" in dtype:
        return rng.random(sizes).astype(dtype)
    if "int" in dtype or dtype == "bool":
        return rng.integers(0, 2, sizes).astype(dtype)
    raise ValueError(f"Expected inputs of numbers; input {name!r} has dtype {dtype!r}.")


def read_samples(core: Any, data: Any, argument: str, limit: int | None = None) -> Samples:
    """The samples in `data`, checked and cast to the dtypes of the model's inputs.

    Args:
        core: the functional model.
        data: see `keras_polar.export_tflite`.
        argument: what the user's argument is called, for errors.
        limit: so many samples at most; None for all.

    Raises:
        TypeError, ValueError: the data do not fit the model.
    """
    parts: list[list[np.ndarray]] = []
    labels: list[np.ndarray | None] = []
    for batch in _enough(core, _batches(data, argument, limit), argument, limit):
        parts.append(batch[0])
        labels.append(batch[1])
    if not parts or not len(parts[0][0]):
        received = [len(x) for x in parts[0]] if parts else "none"
        raise ValueError(
            f"Expected at least one sample in `{argument}`; received {received}. A generator can "
            "be read only once: make a new one for each call."
        )
    arrays = [
        _joined(x, t.name, argument)
        for x, t in zip(zip(*parts, strict=True), core.inputs, strict=True)
    ]
    known = [x for x in labels if x is not None]
    together = np.concatenate(known) if len(known) == len(parts) else None
    return _whole_batches(core, Samples(arrays, together), argument, limit)


# --- from anything to batches ----------------------------------------------------------------


def _batches(data: Any, argument: str, limit: int | None) -> Iterable[Any]:
    """Batches as `fit` takes them: inputs, or a tuple (inputs, labels) or more."""
    if isinstance(data, (np.ndarray, list, tuple, Mapping)) or hasattr(data, "__array__"):
        return [data]
    if isinstance(data, keras.utils.PyDataset):
        count = data.num_batches
        _refuse_endless(count is None, argument, limit)
        return (data[i] for i in (itertools.count() if count is None else range(count)))
    if hasattr(data, "as_numpy_iterator"):  # tf.data
        _refuse_endless(int(data.cardinality()) == -1, argument, limit)
        return data.as_numpy_iterator()
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        return data
    raise TypeError(
        f"Expected `{argument}` as arrays, a tf.data.Dataset, a PyDataset, or an iterable of "
        f"batches; received {type(data).__name__}. A function that makes a generator must be "
        "called."
    )


def _refuse_endless(endless: bool, argument: str, limit: int | None) -> None:
    if endless and limit is None:
        raise ValueError(
            f"Expected `{argument}` to come to an end; received an endless dataset. Use "
            "`dataset.take(n)`."
        )


def _enough(core: Any, batches: Iterable[Any], argument: str, limit: int | None) -> Iterator[tuple]:
    count = 0
    for batch in batches:
        arrays, labels = _read_batch(core, batch, argument)
        count += len(arrays[0])
        yield arrays, labels
        if limit is not None and count >= limit:
            return


def _read_batch(core: Any, batch: Any, argument: str) -> tuple[list, np.ndarray | None]:
    inputs, labels = batch, None
    is_labelled = isinstance(batch, tuple) and len(batch) in (2, 3)
    if is_labelled and len(keras.tree.flatten(batch)) != len(core.inputs):
        inputs, labels = batch[0], batch[1]
    arrays = _arrays(core, inputs, argument)
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"Expected `{argument}` with the same number of samples for every input; received "
            f"{lengths}."
        )
    return arrays, _read_labels(labels, lengths[0], argument)


def _arrays(core: Any, inputs: Any, argument: str) -> list[np.ndarray]:
    flat = _flat(core, inputs, argument)
    return [_fitting(x, t, argument) for x, t in zip(flat, core.inputs, strict=True)]


def _flat(core: Any, inputs: Any, argument: str) -> list[Any]:
    names = input_names(core)
    if isinstance(inputs, Mapping) and set(inputs) == set(names):
        return [inputs[name] for name in names]
    flat = keras.tree.flatten(inputs)
    keyed = isinstance(inputs, Mapping) or isinstance(core.input, dict)
    if keyed or len(flat) != len(core.inputs):
        what = f"a dict with keys {names}" if keyed else "one array"
        raise ValueError(
            f"Expected `{argument}` as `model.predict` takes it: {what} for each of the "
            f"{len(core.inputs)} inputs {names}; received {type(inputs).__name__} with {len(flat)} "
            "leaves. Samples are stacked into one array; labels go in a tuple: (inputs, labels)."
        )
    return flat


# --- checks of one array ---------------------------------------------------------------------


def _fitting(value: Any, tensor: Any, argument: str) -> np.ndarray:
    array = np.asarray(value)
    _check_shape(array, tensor, argument)
    if not np.can_cast(array.dtype, tensor.dtype, "same_kind"):
        raise TypeError(
            f"Expected `{argument}` of dtype {tensor.dtype} for input {tensor.name!r}; received "
            f"{array.dtype}. Convert it with `.astype`."
        )
    array = array.astype(tensor.dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(
            f"Expected finite numbers in `{argument}`; input {tensor.name!r} holds NaN or infinity."
        )
    return array


def _check_shape(array: np.ndarray, tensor: Any, argument: str) -> None:
    shape = tuple(tensor.shape)
    if array.ndim and matches(array.shape[1:], shape[1:]):
        return
    hint = "The first axis counts the samples."
    if matches(array.shape, shape[1:]):
        hint += " This is one sample: stack samples, or `dataset.batch(32)`."
    raise ValueError(
        f"Expected `{argument}` of shape {shape} for input {tensor.name!r}; received shape "
        f"{array.shape}. {hint}"
    )


def matches(shape: Sequence[int], pattern: Sequence[int | None]) -> bool:
    """Whether a shape is that of the pattern, None standing for any size."""
    return len(shape) == len(pattern) and all(
        size in (None, got) for size, got in zip(pattern, shape, strict=True)
    )


def _read_labels(labels: Any, count: int, argument: str) -> np.ndarray | None:
    if labels is None or len(keras.tree.flatten(labels)) != 1:
        return None  # labels of several outputs have no single accuracy
    array = np.asarray(keras.tree.flatten(labels)[0])
    if array.ndim == 0 or len(array) != count:
        raise ValueError(
            f"Expected one label for each of the {count} samples of `{argument}`; received labels "
            f"of shape {array.shape}."
        )
    return array


def _joined(parts: Sequence[np.ndarray], name: str, argument: str) -> np.ndarray:
    shapes = sorted({part.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise ValueError(
            f"Expected samples of one size in `{argument}`; input {name!r} has {shapes}. Resize or "
            "crop them."
        )
    return np.concatenate(parts)


def _whole_batches(core: Any, samples: Samples, argument: str, limit: int | None) -> Samples:
    size = fixed_batch(core) or 1
    count = (len(samples) if limit is None else min(len(samples), max(limit, size))) // size * size
    if not count:
        raise ValueError(
            f"Expected at least {size} samples in `{argument}`, the batch size the model is built "
            f"for; received {len(samples)}."
        )
    labels = None if samples.labels is None else samples.labels[:count]
    return Samples([array[:count] for array in samples.arrays], labels, samples.random)
