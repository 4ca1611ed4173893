"""A layer or operation anew, from its config where that is possible, and its weights."""

import contextlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_polar.backends import to_numpy
from keras_polar.graph.configs import refuse_config, refused
from keras_polar.graph.deepcopy import duplicate
from keras_polar.graph.handed import SETTINGS, hand_on, handed_places, holds_variables
from keras_polar.graph.keras_private import has_parts, is_from_keras, layers_of
from keras_polar.graph.symbolic.merge import with_attributes
from keras_polar.graph.symbolic.record import CannotTrace


class Copies:
    """Copies of the operations of a graph: what several of them hold is one thing there as well.

    An embedding that a head holds too, or its table, is copied with the first that has it.

    Attributes:
        made: id of an operation, one of its parts or a variable -> the copy.
        split: ids of variables with several copies, for want of a way to hand one on.
    """

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}
        self.split: set[int] = set()

    def of(self, op: Any, name: str, is_cut: bool = False, **changes: Any) -> Any:
        """A copy of an operation with other values in its config; see `clone`."""
        new = clone(op, name, self.made, is_cut, **changes)
        if isinstance(op, keras.layers.Layer) and not is_cut and not changes:
            parts = zip(layers_of(op), layers_of(new), strict=False)  # some come with the call
            self.made.update((id(a), b) for a, b in parts if type(a) is type(b))
        return new

    def same(self, op: Any, name: str) -> Any:
        """The one copy of an operation, made if there is none: as a part it keeps its name."""
        if id(op) not in self.made:
            self.made[id(op)] = self.of(op, name)
        return self.made[id(op)]

    def note(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Variables and what they have become."""
        for old, new in pairs:
            if self.made.setdefault(id(old), new) is not new:
                self.split.add(id(old))


def clone(
    op: Any,
    name: str,
    made: Mapping[int, Any] = MappingProxyType({}),
    is_cut: bool = False,
    **changes: Any,
) -> Any:
    """A new operation with the same configuration but for `name` and `changes`; not built.

    Args:
        made: copies of parts and variables, by the ids of the originals, for it to hold.
        is_cut: whether it is to be built for inputs with fewer units.

    Raises:
        TypeError: the layer cannot be made anew from its `get_config()`.
    """
    new = _clone(op, name, changes, made, is_cut)
    if refused(op):
        refuse_config(new, refused(op))
    return new


def _clone(op: Any, name: str, changes: dict, made: Mapping[int, Any], is_cut: bool) -> Any:
    if not isinstance(op, keras.layers.Layer):
        return _clone_op_node(op, name, changes)
    is_special = not is_from_keras(op) or any(id(v) in made for v in op.weights)
    if not changes and op.built and (has_parts(op) or (is_special and not is_cut)):
        # A new one could make its variables in another order, under other names; what a config
        # leaves out nobody may have missed so far; and it would have variables of its own.
        with contextlib.suppress(TypeError):
            return duplicate(op, name, made=made)
    try:
        return _from_its_config(op, name, changes)
    except Exception as error:
        if not op.weights and not changes:  # nothing to train or to copy (a Lambda, say)
            return with_other_values(op, name=name)
        if not changes:
            return duplicate(op, name, made=made)
        raise TypeError(
            f"Layer {op.name!r} ({type(op).__name__}) cannot be rebuilt from its config: {error}. "
            "Expected `from_config(get_config())` to give an equal layer; implement `get_config`."
        ) from error


def _from_its_config(op: Any, name: str, changes: dict) -> Any:
    config = _config_of(op)
    arrays = _without_arrays(op, config) if changes else {}
    new = _from_config(op, {**config, **arrays, "name": name, **changes})
    hand_on(op, new)
    return new


def _config_of(op: Any) -> dict:
    """The config of a layer; a TypeError where one made from it would lose what it is."""
    if hasattr(op, "load_assets"):
        raise TypeError("its vocabulary is not part of it")
    with warnings.catch_warnings():  # what Keras says of lambdas is for those who save
        warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
        config = op.get_config()
    config |= _left_out(op, config)
    # A config holds values at most: what is assigned to variables later would not arrive.
    return config | {k: x for k, x in _live(op, config).items() if holds_variables(x)}


def _left_out(op: Any, config: dict) -> dict:
    """Arguments of a user's layer that its config lacks, as far as they are variables."""
    missing = [name for name in _parameters(type(op).__init__) if name not in config]
    handed = {place[0]: v for place, v in handed_places(op).items() if len(place) == 1}
    lost = [n for n in missing if n in vars(op) and n not in handed]
    if lost:
        raise TypeError(f"`get_config` lacks {', '.join(lost)}")
    return {n: handed[n] for n in missing if n in handed}


def _parameters(init: Any) -> list[str]:
    """Names of what a layer is made from; stock layers know what they leave out."""
    if init.__module__.partition(".")[0] == "keras":
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in inspect.signature(init).parameters.values() if p.kind in named]


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
        CannotTrace: there is none.
    """
    if not op.weights:
        return op, {}
    sized = _sized(op, resized)
    shapes = [tuple(resized.get(n, n) for n in w.shape) for w in op.weights]
    for keys in ({}, sized):
        twin = _built(op, args, kwargs, {k: resized[v] for k, v in keys.items()})
        if twin is not None and [tuple(w.shape) for w in twin.weights] == shapes:
            return twin, keys
    raise CannotTrace("cannot be rebuilt for fewer units")


def _sized(op: Any, numbers: Container[int]) -> dict[str, int]:
    """The keys of a layer's config that hold one of these numbers."""
    try:
        config = op.get_config()
    except Exception as error:
        raise CannotTrace("has no config to be rebuilt from") from error
    return {k: v for k, v in config.items() if type(v) is int and v in numbers}


def _built(op: Any, args: tuple, kwargs: dict, changes: dict) -> Any:
    """A new layer that was called on these KerasTensors; None if it cannot be."""
    try:
        twin = _from_its_config(op, op.name, changes)
        twin(*args, **kwargs)
    except Exception:
        return None
    return twin


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


def with_other_values(op: Any, **values: Any) -> Any:
    """The layer without its graph nodes, other attributes instead; everything else is shared."""
    new = object.__new__(type(op))
    vars(new).update(vars(op))
    vars(new).update(_inbound_nodes=[], _outbound_nodes=[], **values)
    return new


def _clone_op_node(op: Any, name: str, changes: dict) -> Any:
    new = with_attributes(op, changes)
    new.name = name
    return new


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
    layers = list(zip(layers_of(source), layers_of(target), strict=True))
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
