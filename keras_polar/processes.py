"""Several processes of JAX that train one network: they start alike, stay so, or say so."""

import contextlib
import json
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_polar.backends import from_every_process, placed_like, process_count

# What is wrong where -> what to do. The first that a fact's name begins with counts.
_REMEDIES = {
    "distribution": "Call keras.distribution.set_distribution(keras.distribution.DataParallel("
    "auto_shard_dataset=False)) in every process, before the model is made. Processes that are to "
    "train each for itself do not call keras.distribution.initialize.",
    "data": "Every process feeds its part of every batch: as many samples, in batches of one size. "
    "Cut arrays to equal length, x[:n]; end a tf.data.Dataset in .batch(b, drop_remainder=True)"
    ".take(n); give generators steps_per_epoch.",
    "validation": "All processes validate together: give every one its part, of equal size.",
    "backup": "Every process has a BackupAndRestore with a folder of its own. Copy the whole "
    "folder of one process over that of the other, or remove the folders to start anew.",
    "weights": "Call keras.utils.set_random_seed with the same number in every process before the "
    "model is made, and load the same files.",
    "optimizer's state": "Start from the same state: compile anew, or load the same file.",
    "stop": "Callbacks that end a run belong into every process.",
}
_OTHERWISE = "Start every process with the same script, settings and versions."
_TOLERANCE = 1e-3  # of logs: machines of different kinds round differently


def require_agreement(facts: dict[str, Any], who: str = "this run") -> None:
    """Raises in every process of JAX if they do not all give the same facts; else does nothing.

    `fit` calls it by itself. Called with the settings of a script before the model is made, it
    says in words what JAX would show as arrays that differ. All processes have to call it.

    Args:
        facts: anything that `json.dumps` takes, by name.
        who: subject of the error.

    Raises:
        ValueError: a fact is not the same in all processes. Says which one, and who says what.

    Example:

        >>> keras.distribution.initialize("10.0.0.1:1234", num_processes=2, process_id=1)
        >>> keras_polar.processes.require_agreement({"seed": 0, "sparsity": 0.5})
    """
    if process_count() > 1:
        _compare(_tables(facts), who, "cannot train together: they disagree about")


def watch_processes(model: Any, arguments: dict[str, Any]) -> list[keras.callbacks.Callback]:
    """For `fit` in one of several processes of JAX: compares them, before and after every epoch.

    Args:
        model: the gated model.
        arguments: those of `fit`, by name.

    Returns:
        The callbacks that go on comparing, to be called after all others; none in one process.

    Raises:
        ValueError: the processes cannot train together.
    """
    if process_count() == 1:
        return []
    who = f"fit of {model.name!r}"
    require_agreement(_facts(model, arguments), who)
    if not _is_joint():
        raise ValueError(
            f"{who}: expected a distribution over all {process_count()} processes of JAX, received "
            f"{_distribution()!r}: each would train for itself. {_REMEDIES['distribution']}"
        )
    if _batches(arguments.get("x"), arguments, "batch_size", "steps_per_epoch") is None:
        warnings.warn(
            f"{who}: nobody knows how many batches its {process_count()} processes have. Where one "
            "has fewer than another, all wait for ever. Give `fit` steps_per_epoch.",
            stacklevel=3,
        )
    return [_Watch(who)]


class _Watch(keras.callbacks.Callback):
    """Raises in every process where they have drifted apart in an epoch, or one of them stops.

    What each sees of the data only reaches the logs: batches whose sizes differ go unnoticed by
    JAX, and every process scales the gradients by a size of its own.
    """

    def __init__(self, who: str) -> None:
        super().__init__()
        self.who = who

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        values = {f"data, seen in {name}": float(value) for name, value in (logs or {}).items()}
        tables = _tables({"stop": bool(self.model.stop_training), **values})
        _compare(tables, self.who, f"no longer agree after epoch {epoch + 1}:", _are_close)


def assign(variable: Any, value: np.ndarray) -> None:
    """`variable.assign` that asks no other process.

    JAX has all processes compare what is assigned, variable by variable: slow, and a process that
    is alone (it saves a file, or fails) would wait for ever.
    """
    variable.assign(value if process_count() == 1 else placed_like(value, variable.value))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """For what one of several processes may do without the others, such as saving.

    Keras makes an optimizer for comparison when it saves; its variables belong to this process.
    """
    if process_count() == 1:
        yield
        return
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


def _is_joint() -> bool:
    """Whether what is made now lies on the devices of several processes."""
    distribution = keras.distribution.distribution()
    return distribution is not None and distribution.device_mesh.backend_mesh.is_multi_process


def _distribution() -> str | None:
    """What is said of the distribution: its kind, and how many devices it has."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    return f"{type(distribution).__name__} on {distribution.device_mesh.devices.size} devices"


def _tables(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of every process, in the order of the processes."""
    text = np.frombuffer(json.dumps(facts, default=_plain).encode(), "uint8")
    lengths = from_every_process(np.asarray(text.size, "int32"))
    padded = np.pad(text, (0, lengths.max() - text.size))
    rows = zip(from_every_process(padded), lengths, strict=True)
    return [json.loads(bytes(row[:length])) for row, length in rows]


def _plain(value: Any) -> Any:
    """For what JSON lacks: numbers of NumPy as they are, of others their kind (no address)."""
    return value.item() if isinstance(value, np.generic) else type(value).__name__


def _compare(
    tables: list[dict[str, Any]], who: str, disagreement: str, same: Callable | None = None
) -> None:
    same = same or (lambda a, b: a == b)
    names = dict.fromkeys(name for table in tables for name in table)
    said = {name: [table.get(name) for table in tables] for name in names}
    wrong = [n for n, values in said.items() if not all(same(values[0], v) for v in values)]
    if wrong:
        lines = "".join(f"\n- {name}: {_who_says_what(said[name])}" for name in wrong)
        remedies = dict.fromkeys(map(_remedy, wrong))
        raise ValueError(
            f"{who}: its {len(tables)} processes {disagreement}{lines}\n{' '.join(remedies)}"
        )


def _who_says_what(values: list) -> str:
    """`8 (process 0, 2), 7 (process 1)`."""
    owners: dict[str, list[str]] = {}
    for i, value in enumerate(values):
        owners.setdefault("nothing" if value is None else str(value), []).append(str(i))
    return ", ".join(f"{value} (process {', '.join(ids)})" for value, ids in owners.items())


def _remedy(name: str) -> str:
    return next((r for start, r in _REMEDIES.items() if name.startswith(start)), _OTHERWISE)


def _are_close(a: Any, b: Any) -> bool:
    numbers = isinstance(a, float) and isinstance(b, float)
    return np.isclose(a, b, _TOLERANCE, 1e-6, equal_nan=True) if numbers else a == b


# What has to be the same.


def _facts(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "distribution": _distribution(),
        **_data_facts(arguments),
        **{name: arguments.get(name) for name in ("epochs", "initial_epoch")},
        "backup, by its epoch": _backups(arguments.get("callbacks")),
        **_settings(model),
        **_states(model),
    }


def _data_facts(arguments: dict[str, Any]) -> dict[str, Any]:
    x, validation = arguments.get("x"), arguments.get("validation_data")
    first = validation[0] if isinstance(validation, (list, tuple)) else validation
    names = ("validation_split", "validation_freq")
    return {
        "data, batches per epoch": _batches(x, arguments, "batch_size", "steps_per_epoch"),
        "data, samples": _samples(x),
        "data, batch_size": arguments.get("batch_size"),
        "validation, batches": _batches(
            first, arguments, "validation_batch_size", "validation_steps"
        ),
        "validation, samples": _samples(first),
        **{name: arguments.get(name) for name in names},
    }


def _samples(x: Any) -> int | None:
    """How many samples arrays hold; None for what hands out batches."""
    leaves = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    return int(leaves[0].shape[0]) if leaves and hasattr(leaves[0], "shape") else None


def _batches(x: Any, arguments: dict[str, Any], size: str, steps: str) -> int | None:
    """How many batches an epoch has; None if nobody knows."""
    if arguments.get(steps) is not None:
        return int(arguments[steps])
    samples = _samples(x)
    if samples is not None:
        return math.ceil(samples / (arguments.get(size) or arguments.get("batch_size") or 32))
    try:
        return len(x)
    except TypeError:  # a generator, or a dataset without a known or any end
        return None


def _backups(callbacks: Any) -> list:
    """For every BackupAndRestore the epoch that it goes on with."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    given: Iterable = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
    kind = keras.callbacks.BackupAndRestore
    return [_resumed_epoch(Path(c.backup_dir)) for c in given if isinstance(c, kind)]


def _resumed_epoch(folder: Path) -> Any:
    if not folder.is_dir():
        return "no backup"
    try:
        text = (folder / "training_metadata.json").read_text(encoding="utf-8")
        return json.loads(text)["epoch"] + 1
    except (OSError, ValueError, KeyError):
        return "unreadable"


def _settings(model: Any) -> dict[str, Any]:
    """Of the gates and the optimizer. Names are left out: Keras numbers them as they come."""
    consensus, optimizer = model.consensus, model.optimizer
    names = ("sparsity", "measure", "round_to", "compact")
    schedule = consensus.schedule.get_config().items()
    settings = {
        **{name: getattr(consensus, name) for name in names},
        **{f"schedule's {name}": value for name, value in schedule},
        "gates": [f"{type(g._gate).__name__} of {g.units}" for g in model.groups],
        "optimizer": type(optimizer).__name__,
    }
    if isinstance(optimizer, keras.optimizers.Optimizer):
        config = optimizer.get_config().items()
        settings |= {f"optimizer's {name}": value for name, value in config if name != "name"}
    return settings


def _states(model: Any) -> dict[str, Any]:
    groups, optimizer = model.groups, model.optimizer
    return {
        "masks (checksum)": _checksum(g.mask for g in groups if g.settled),
        "weights (checksum)": _checksum(map(_local, model.variables)),
        "optimizer's state (checksum)": _checksum(map(_local, getattr(optimizer, "variables", ()))),
    }


def _local(variable: Any) -> np.ndarray:
    """What this process has of a variable; of one that is sharded only the shape."""
    value = variable.value
    return np.asarray(value if value.is_fully_replicated else value.shape)


def _checksum(arrays: Iterable[np.ndarray]) -> str:
    found = 0
    for array in arrays:
        kind = f"{array.shape}{array.dtype}".encode()
        found = zlib.crc32(array.tobytes(), zlib.crc32(kind, found))
    return f"{found:08x}"
