"""A copy of a built layer, for layers that cannot be made anew from their config."""

import io
import itertools
import pickle
import types
from collections.abc import Mapping
from typing import Any

import keras

from keras_polar.backends import BACKEND
from keras_polar.graph.handed import SETTINGS, handed
from keras_polar.graph.keras_private import (
    DynamicBackend,
    Function,
    KerasSaveable,
    TrackedDict,
    TrackedList,
    TrackedSet,
    calls_in,
    record_calls,
)

_FLOATS = ("float16", "bfloat16", "float32", "float64")

# What a layer's attributes may refer to without owning it.
_SHARED = (
    *SETTINGS,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    keras.DTypePolicy,
    DynamicBackend,
)


def duplicate(
    layer: Any,
    name: str,
    dtype: str | None = None,
    made: Mapping[int, Any] = types.MappingProxyType({}),
) -> Any:
    """A layer with the same sublayers and variables of the same values, sharing none of them.

    Its sublayers keep their names; functions, initializers and the like are shared, and so are
    variables that the layer was handed.

    Args:
        dtype: of all floats in the copy and of what it computes; None for the layer's own.
        made: id of a sublayer or variable -> what the copy is to hold instead of a copy of it.

    Raises:
        TypeError: the layer holds something that cannot be copied.
    """
    trained = {id(v) for part in layer._flatten_layers() for v in part._trainable_variables}
    writer = _Writer(buffer := io.BytesIO(), dtype, handed(layer), trained, made)
    try:
        writer.dump(layer)
        # Of what was written already a second dump of the same writer gives the same copies.
        writer.dump((calls_in(writer.functions), writer.functions))
        buffer.seek(0)
        reader = _Reader(buffer, writer.kept)
        new = reader.load()
        record_calls(*reader.load())
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"Layer {layer.name!r} ({type(layer).__name__}) can neither be rebuilt from its config "
            f"nor copied: {error}. {_remedy(layer)}"
        ) from error
    vars(new)["name"] = name
    _name_variables(layer, new, {id(v) for x in made.values() for v in _variables_of(x)})
    if dtype is not None:
        _set_policies(new, dtype)
    return new


def _remedy(layer: Any) -> str:
    """What lets a layer be made from its config; tried, since that may be forbidden only."""
    try:
        type(layer).from_config(layer.get_config())
    except ValueError as error:
        if "enable_unsafe_deserialization" in str(error):
            return (
                "Its config says how, but Keras loads code with it: if you trust where that comes "
                "from, call keras.config.enable_unsafe_deserialization() before."
            )
    except Exception:  # whatever the code of a layer raises
        pass
    return "Implement `get_config` so that `from_config(get_config())` gives an equal layer."


def is_other_float(dtype: Any, float_name: str) -> bool:
    """Whether a dtype is one of floats, and another than `float_name`."""
    name = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    return name in _FLOATS and name != float_name


def _set_policies(layer: Any, dtype: str) -> None:
    for part in layer._flatten_layers():
        if is_other_float(part.compute_dtype, dtype):
            part.dtype_policy = dtype
        if isinstance(part, keras.layers.Normalization):
            part.finalize_state()  # its mean and variance are derived from its variables


def _variables_of(x: Any) -> list:
    return [x] if isinstance(x, keras.Variable) else getattr(x, "variables", [])


def _name_variables(layer: Any, new: Any, others: set[int]) -> None:
    """Gives the variables the paths of a layer that was built under the new name.

    By its path Keras on PyTorch finds a variable whose gradient of the last step is to be cleared.
    """
    pairs = zip(layer.variables, new.variables, strict=True)
    for old, own in ((a, b) for a, b in pairs if a is not b and id(b) not in others):
        own._path = f"{new.name}/{old.path.removeprefix(f'{layer.name}/')}"
    if BACKEND == "torch":  # its modules keep lists of their own
        for part in new._flatten_layers():
            part._track_variables()


class _Writer(pickle.Pickler):
    """Walks the object; variables and shared things are kept aside under a number.

    Args:
        dtype: of all floats in the copy, or None.
        shared: variables that are not copied, by id.
        trained: ids of those that were made to be trained, frozen by now or not.
        made: what is there already, by the id of what it is a copy of.
    """

    def __init__(
        self,
        file: Any,
        dtype: str | None,
        shared: dict[int, Any],
        trained: set[int],
        made: Mapping[int, Any],
    ) -> None:
        super().__init__(file)
        self.dtype, self.shared, self.trained, self.made = dtype, shared, trained, made
        self.kept: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}
        self.count = itertools.count()
        self.alive: list[Any] = []
        self.functions: list[Any] = []

    def persistent_id(self, x: Any) -> int | None:
        if isinstance(x, keras.KerasTensor):
            return None
        is_variable = isinstance(x, keras.Variable) or id(x) in self.made
        if not is_variable and not isinstance(x, _SHARED) and not keras.ops.is_tensor(x):
            return None
        if id(x) not in self.numbers:
            number = self.numbers[id(x)] = next(self.count)
            self.kept[number] = self._kept(x)
            self.alive.append(x)
        return self.numbers[id(x)]

    def _kept(self, x: Any) -> Any:
        if id(x) in self.made:
            return self.made[id(x)]
        is_variable, dtype = isinstance(x, keras.Variable), self._dtype_of(x)
        if dtype is None or id(x) in self.shared:
            return x
        return _copied(x, dtype, id(x) in self.trained) if is_variable else keras.ops.cast(x, dtype)

    def _dtype_of(self, x: Any) -> str | None:
        """The type of the copy of a variable or tensor; None for what is kept as it is."""
        is_variable = isinstance(x, keras.Variable)
        is_tensor = keras.ops.is_tensor(x)
        if self.dtype and (is_variable or is_tensor) and is_other_float(x.dtype, str(self.dtype)):
            return self.dtype
        return x.dtype if is_variable else None

    def reducer_override(self, x: Any) -> Any:
        if isinstance(x, Function):
            self.functions.append(x)
        if isinstance(x, keras.KerasTensor):
            return _blank, (type(x),), _without_history(x)
        if isinstance(x, KerasSaveable):
            return _blank, (type(x),), _state(x)
        for kind, fill in _TRACKED.items():
            if isinstance(x, kind):
                items = dict(x) if kind is TrackedDict else list(x)
                return kind.__new__, (kind,), (vars(x), items), None, None, fill
        return NotImplemented


# `build` and configs are about this very object, and so is what TensorFlow tracks it by. Attention
# layers of KerasHub have attributes of their own that begin with _self_.
_OF_ITSELF = ("build", "get_config", "get_build_config")
_TRACKING = (
    "_obj_reference_counts",
    "_self_name_based_restores",
    "_self_saveable_object_factories",
    "_self_setattr_tracking",
    "_self_tracked_trackables",
    "_self_unconditional_",
    "_self_update_uid",
)


def _state(x: Any) -> dict:
    nodes: dict = {"_inbound_nodes": [], "_outbound_nodes": []}
    own = {k: v for k, v in vars(x).items() if k not in _OF_ITSELF and not k.startswith(_TRACKING)}
    return {**own, **{k: v for k, v in nodes.items() if k in own}}


def _without_history(tensor: Any) -> dict:
    """What a symbolic tensor is, but for the call that it comes out of: the copy has its own."""
    return {k: v for k, v in vars(tensor).items() if k != "_keras_history"}


def _copied(variable: Any, dtype: Any, is_trained: bool) -> Any:
    new = keras.Variable(
        keras.ops.copy(variable),  # on PyTorch, a variable takes the memory that it is given
        dtype=dtype,
        # TensorFlow records no gradients of what is made untrainable, unfrozen later or not.
        trainable=is_trained or variable.trainable,
        autocast=variable._autocast,
        aggregation=variable.aggregation,
        name=variable.name,
    )
    new.regularizer, new.constraint = variable.regularizer, variable.constraint
    new.trainable = variable.trainable
    new._path = variable.path  # says that a layer has made it
    return new


def _blank(kind: type) -> Any:
    return object.__new__(kind)


# Keras' own containers report what enters them to a tracker, which is not there yet.


def _fill_list(new: Any, state: tuple) -> None:
    vars(new).update(state[0])
    list.extend(new, state[1])


def _fill_dict(new: Any, state: tuple) -> None:
    vars(new).update(state[0])
    dict.update(new, state[1])


def _fill_set(new: Any, state: tuple) -> None:
    vars(new).update(state[0])
    set.update(new, state[1])


_TRACKED = {TrackedList: _fill_list, TrackedDict: _fill_dict, TrackedSet: _fill_set}


class _Reader(pickle.Unpickler):
    def __init__(self, file: Any, kept: dict[int, Any]) -> None:
        super().__init__(file)
        self.kept = kept

    def persistent_load(self, number: int) -> Any:
        return self.kept[number]
