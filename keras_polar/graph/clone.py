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
from keras_polar.graph.configs import refuse_config, refused, with_config
from keras_polar.graph.deepcopy import duplicate
from keras_polar.graph.handed import SETTINGS, hand_on, handed_places, holds_variables
from keras_polar.graph.keras_private import has_parts, is_from_keras, layers_of, with_other_values
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
        self.called: set[int] = set()

    def of(self, op: Any, name: str, is_cut: bool = False, /, **changes: Any) -> Any:
        """A copy of an operation with other values in its config; see `clone`."""
        new = clone(op, name, self.made, is_cut, **changes)
        if not changes:
            self.made[id(op)] = new
            self._note_parts(op, new)
        return new

    def _note_parts(self, op: Any, new: Any) -> None:
        if isinstance(op, keras.layers.Layer):
            parts = zip(layers_of(op), layers_of(new), strict=False)  # some come with the call
            self.made.update((id(a), b) for a, b in parts if type(a) is type(b))

    def same(self, op: Any, name: str) -> Any:
        """The one copy of an operation, made if there is none: as a part it keeps its name."""
        return self.made[id(op)] if id(op) in self.made else self.of(op, name)

    def call(self, op: Any, name: str, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        """The one copy of an operation and its outputs; with the first call come the weights."""
        new = self.same(op, name)
        outputs = new(*args, **kwargs)
        if id(op) not in self.called:
            self.called.add(id(op))
            self.note(copy_weights(op, new, lambda _, value: value))
        return new, outputs

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
    /,
    **changes: Any,
) -> Any:
    """A new operation with the same configuration but for `name` and `changes`; not built.

    Args:
        made: copies of parts and variables, by the ids of the originals, for it to hold.
        is_cut: whether its variables will have other sizes: even without `changes`, where a layer
            takes them from its input.

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
    if not changes and op.built and _is_special(op, made, is_cut):
        with contextlib.suppress(TypeError):
            return duplicate(op, name, made=made)
    try:
        return _from_its_config(op, name, changes)
    except Exception as error:
        if not op.weights and not changes:  # nothing to train or to copy (a Lambda, say)
            return with_other_values(op, name=name)
        if not (changes or is_cut):
            return _copied_or_shared(op, name, made)
        raise TypeError(
            f"Layer {op.name!r} ({type(op).__name__}) cannot be rebuilt from its config: {error}. "
            "Expected `from_config(get_config())` to give an equal layer; implement `get_config`."
        ) from error


def _is_special(op: Any, made: Mapping[int, Any], is_cut: bool) -> bool:
    """Whether a layer is rather copied than made anew.

    A new one could make its variables in another order, under other names; what a config leaves out
    nobody may have missed so far; and it would have variables of its own.
    """
    is_foreign = not (is_cut or is_from_keras(op))
    return has_parts(op) or is_foreign or any(id(v) in made for v in op.weights)


def _from_its_config(op: Any, name: str, changes: dict) -> Any:
    told = with_config(op)
    config = _config_of(told, changes)
    arrays = _without_arrays(told, config) if changes else {}
    new = _from_config(told, {**config, **arrays, "name": name, **changes})
    hand_on(op, new)
    return new


def _copied_or_shared(op: Any, name: str, made: Mapping[int, Any]) -> Any:
    """A copy; of what cannot be copied (a graph of TensorFlow, say) the very same, not trained.

    Units in front of it stay, as nobody knows what it does with them, so that it never has to be
    cut; were it trained, the caller's model would change as well.
    """
    try:
        return duplicate(op, name, made=made)
    except TypeError as error:
        if has_parts(op):  # whose variables are those of its parts
            raise
        if op.trainable_variables:
            warnings.warn(
                f"{error} Until then the new model shares this layer with the one that it is made "
                "of, and does not train it.",
                stacklevel=2,
            )
        return _fixed(with_other_values(op, name=name))


def _fixed(op: Any) -> Any:
    """The layer with variables that read the same memory, but are not trained by those who have it.

    Of a layer that is not to be trained Keras freezes the variables: here those of the caller's.
    """
    vars(op).update(
        _trainable=False,
        _trainable_variables=[],
        _non_trainable_variables=[_untrained(v) for v in op.variables],
        is_shared=True,
    )
    return op


def _untrained(variable: Any) -> Any:
    new = object.__new__(type(variable))
    vars(new).update(vars(variable), _trainable=False)
    return new


def _config_of(op: Any, changes: dict) -> dict:
    """The config of a layer; a TypeError where one made from it would lose what it is.

    Args:
        changes: what is given instead of, or besides, what the config says.
    """
    if hasattr(op, "load_assets"):
        raise TypeError("its vocabulary is not part of it")
    with warnings.catch_warnings():  # what Keras says of lambdas is for those who save
        warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
        config = op.get_config()
    config |= _left_out(op, config | changes)
    # A config holds values at most: what is assigned to variables later would not arrive.
    return config | {k: x for k, x in _live(op, config).items() if holds_variables(x)}


def _left_out(op: Any, config: dict) -> dict:
    """Arguments of a user's layer that its config lacks, as far as they are variables."""
    defaults = _parameters(type(op).__init__)
    # What is as by default, a layer made from the config has as well.
    missing = [n for n, x in defaults.items() if n not in config and vars(op).get(n) is not x]
    handed = {place[0]: v for place, v in handed_places(op).items() if len(place) == 1}
    lost = [n for n in missing if n in vars(op) and n not in handed]
    if lost:
        raise TypeError(f"`get_config` lacks {', '.join(lost)}")
    return {n: handed[n] for n in missing if n in handed}


def _parameters(init: Any) -> dict[str, Any]:
    """What a layer is made from, with the defaults; stock layers know what they leave out."""
    if init.__module__.partition(".")[0] == "keras":
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(init).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in named}


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
    op = with_config(op)
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
    """A clone that was called on these KerasTensors; None if it cannot be."""
    try:
        twin = clone(op, op.name, {}, True, **changes)
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
        left_out, again = config.keys() - known.keys(), new.get_config()
        if not left_out or left_out - again.keys() or config | again != config:
            raise
        return new


def _live(op: Any, config: dict) -> dict:
    """The objects behind those keys of a config that stand for functions, initializers and such.

    A user's own, not registered with Keras, cannot be read back from a config.
    """
    found = {k: getattr(op, k, None) for k, v in config.items() if isinstance(v, (dict, str))}
    return {k: x for k, x in found.items() if isinstance(x, SETTINGS) or inspect.isfunction(x)}


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
    is_shared = source is target or getattr(target, "is_shared", False)
    if is_shared or not isinstance(source, keras.layers.Layer):
        return []
    layers = list(zip(layers_of(source), layers_of(target), strict=True))
    states = (_states(old, new) for old, new in layers)
    twins = [*_twins(source.variables, target.variables), *itertools.chain.from_iterable(states)]
    pairs = [(old, new) for old, new in twins if old is not new]  # some were handed to both
    for old, new in pairs:
        new.assign(cut(old, to_numpy(old)))
        new.regularizer, new.constraint = old.regularizer, old.constraint
    for old, new in layers:
        _copy_attributes(old, new)
    for old, new in pairs:
        if new.trainable != old.trainable:  # frozen one by one
            new.trainable = old.trainable
    return pairs


def _copy_attributes(old: Any, new: Any) -> None:
    new.trainable = old.trainable
    new.activity_regularizer = old.activity_regularizer
    if getattr(old, "lora_enabled", False):
        new.lora_alpha = old.lora_alpha  # Keras' Dense and Embedding do not build with it
    if isinstance(new, keras.layers.Normalization):
        new.finalize_state()  # its mean and variance are derived from its variables


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
