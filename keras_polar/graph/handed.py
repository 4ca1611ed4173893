"""Variables that a user hands to a layer stay his: every copy of the layer reads the same ones.

What a callback anneals (a weight of a loss, a temperature) is a variable that no training changes
and that no layer has made. Its path says so: whatever a layer makes in `build` or `call`, or by
`add_weight`, has the layer's name in its path. Only what a constructor makes by `keras.Variable`
looks alike; that is what a layer made anew has again, while what was handed is missing there.
"""

import functools
import inspect
import types
import warnings
from collections.abc import Iterator
from typing import Any

import keras

# What a layer is configured with, besides numbers, names and functions.
SETTINGS = (
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
)
_DEEPEST = 4  # objects within objects that are looked into
_CONTAINERS = (list, tuple, set, frozenset)


def handed(layer: Any) -> dict[int, Any]:
    """The variables, by id, that were handed to a layer or to parts of it and are not trained."""
    parts = layer._flatten_layers()
    return {id(v): v for part in parts for v in handed_places(part).values()}


def handed_places(layer: Any) -> dict[tuple, Any]:
    """Where a layer, its parts apart, holds variables that were handed to it."""
    foreign = {place: v for place, v in _own(layer) if _is_foreign(layer, v)}
    if not foreign:
        return {}
    again = dict(_own(_again(layer)))
    return {
        place: v
        for place, v in foreign.items()
        if again.get(place, v) is v or _is_argument(layer, place)
    }


def hand_on(layer: Any, new: Any) -> None:
    """Gives a layer that was made anew the variables that were handed to the one before.

    Raises:
        TypeError: they are where they cannot be exchanged.
    """
    variables = handed(layer)
    if not variables:
        return
    present = dict(_own(new))
    for place, variable in handed_places(layer).items():
        if present.get(place) is not variable:
            _exchange(new, place, present.get(place), variable)
    if variables.keys() - handed(new).keys():
        raise TypeError("variables that its parts were handed are not part of its config")


def _exchange(new: Any, place: tuple, present: Any, variable: Any) -> None:
    if len(place) > 1:
        raise TypeError(
            f"the variable that it was handed as {place[0]!r} is not part of its config"
        )
    if present is not None:
        new._untrack_variable(present)
    setattr(new, place[0], variable)


def holds_variables(x: Any) -> bool:
    """Whether an object (a regularizer, a function) holds variables somewhere."""
    return any(True for _ in _variables_in(x, (), _DEEPEST))


def _is_foreign(layer: Any, variable: Any) -> bool:
    """Whether neither training changes a variable nor a method of the layer seems to have made it.

    What other objects have made (the steps of an optimizer) counts if it may be an argument.
    """
    if any(variable is v for v in layer._trainable_variables):
        return False
    makers = variable.path.split("/")[:-1]
    if not makers:
        return True
    is_own = layer.name in makers or variable.path.startswith(f"{layer.path}/")
    return not is_own and _had_objects(layer)


def _is_argument(layer: Any, place: tuple) -> bool:
    """Whether a place has the name of an argument that may have been a variable."""
    return _had_objects(layer) and place[0] in inspect.signature(type(layer).__init__).parameters


def _had_objects(layer: Any) -> bool:
    """Whether not all arguments of the constructor were numbers, words and the like.

    Keras keeps them if they were.
    """
    return getattr(layer, "_auto_config", None) is None


def _again(layer: Any) -> Any:
    """The layer as its constructor makes it; None if its config does not say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return type(layer).from_config(layer.get_config())
        except Exception:  # whatever the code of a layer raises
            return None


# --- what an object holds --------------------------------------------------------------------


@functools.cache
def attributes_of_every_layer() -> frozenset:
    """What Keras keeps in the attributes of any layer."""
    return frozenset(vars(keras.layers.Layer(name="any")))


def _own(layer: Any) -> Iterator[tuple[tuple, Any]]:
    """The variables in the attributes of a layer, with their places; its parts have their own.

    Settings and functions are handed on as they are, with all that is in them.
    """
    for name, value in vars(layer).items() if layer is not None else ():
        is_whole = isinstance(value, SETTINGS) or inspect.isroutine(value)
        if name not in attributes_of_every_layer() and not is_whole:
            yield from _variables_in(value, (name,), _DEEPEST)


def _variables_in(x: Any, place: tuple, depth: int) -> Iterator[tuple[tuple, Any]]:
    if isinstance(x, keras.Variable):
        yield place, x
    elif depth:
        for key, value in _inside(x):
            yield from _variables_in(value, (*place, key), depth - 1)


def _inside(x: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(x, dict):
        yield from x.items()
    elif isinstance(x, _CONTAINERS):
        yield from enumerate(x)
    elif isinstance(x, functools.partial):
        yield from enumerate((x.func, *x.args, *x.keywords.values()))
    elif inspect.ismethod(x):
        yield "__self__", x.__self__
    elif inspect.isfunction(x):
        yield from _captured(x)
    elif not isinstance(x, _OPAQUE):
        yield from getattr(x, "__dict__", {}).items()


def _captured(function: Any) -> Iterator[tuple[Any, Any]]:
    yield from enumerate(function.__defaults__ or ())
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a name that has no value yet
            continue


# Parts of a layer are looked at by themselves, and what keeps a state of its own is no argument.
_OPAQUE = (
    type,
    types.ModuleType,
    keras.layers.Layer,
    keras.Operation,
    keras.KerasTensor,
    keras.metrics.Metric,
    keras.optimizers.Optimizer,
    keras.random.SeedGenerator,
)
