"""What a layer says of itself must be enough to make it again, or no file of it can be loaded.

A composite layer makes its parts with arguments that it knows; what their `get_config` says is read
by nobody. Once the composite is opened they are layers of a model of their own, and a file holds
what they say. Where no equal layer comes of that, the arguments of the constructor are looked for
among the layer's attributes, and what is found is tried before it is believed.
"""

import functools
import inspect
import json
import types
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_polar.graph.handed import SETTINGS, attributes_of_every_layer, handed
from keras_polar.graph.keras_private import (
    call_on_symbols,
    is_from_keras,
    layers_of,
    parts_of_layer,
    remembered_arguments,
    with_other_values,
    without_sharing,
)

_BASE = ("name", "trainable", "dtype")
_DEEPEST = 4  # objects within objects that are compared


def repair_configs(layers: Iterable[Any]) -> dict[str, str]:
    """Lets every built layer say what an equal one is made from, as far as that can be found out.

    Returns:
        Layer name -> why a saved model with it cannot be loaded, for all others.
    """
    layers = [x for x in layers if _is_layer(x)]
    with without_sharing():
        problems = {layer.name: why for x in layers for layer, why in _problems(x)}
        return {**_shared(layers), **problems}


def refuse_configs(layers: Iterable[Any], reasons: Mapping[str, str]) -> None:
    """Lets layers that cannot be made anew say so when they are saved, not when they are loaded.

    Args:
        reasons: by the names of these layers.
    """
    for x in (x for x in layers if _is_layer(x)):
        for layer in (x, *(layer for layer, _ in _problems(x))):
            if layer.name in reasons:
                refuse_config(layer, reasons[layer.name])


def refuse_config(layer: Any, why: str) -> None:
    """The same for one layer."""

    def get_config() -> dict:
        raise NotImplementedError(
            f"Layer {layer.name!r} ({type(layer).__name__}) cannot be saved: {why}. {REMEDY}."
        )

    get_config.why = why  # type: ignore[attr-defined]
    vars(layer)["get_config"] = get_config


def refused(layer: Any) -> str:
    """Why a layer refuses to say what it is made from; empty if it does not."""
    return getattr(vars(layer).get("get_config"), "why", "")


SHARED = "a part of it is used on its own as well"
OTHER_WEIGHTS = "made from its config it has weights of shapes"
REMEDY = "Give its class a `get_config` from which `from_config` makes an equal layer"


def can_be_told(layer: Any) -> bool:
    """Whether a file that holds a layer can be loaded by who knows nothing but Keras."""
    return is_from_keras(layer) or not (_is_nameless(type(layer)) or _config_of(layer)[1])


def can_be_made(layer: Any) -> bool:
    """Whether any layer at all comes of what a file says: some classes take no name, say."""
    return is_from_keras(layer) or any(_makes(layer, found) for found in _CANDIDATES)


def with_config(layer: Any) -> Any:
    """The layer, or one like it that says what it is made from, if that can be found out."""
    if _has_config(layer):
        return layer
    arguments, why = _config_of(layer)
    if why or arguments is None:
        return layer
    config = {**_base(layer), **arguments}
    return with_other_values(layer, get_config=lambda: config)


def is_found_again(activation: Any) -> bool:
    """Whether Keras knows an activation function by the name that a file has for it."""
    with warnings.catch_warnings():  # what Keras says of lambdas is for those who save
        warnings.simplefilter("ignore")
        try:
            return callable(keras.activations.get(keras.activations.serialize(activation)))
        except Exception:  # no function, or none that has a name
            return False


def _is_nameless(kind: type) -> bool:
    """Whether Keras cannot find a class by what a file says of it."""
    is_registered = keras.saving.get_registered_name(kind) != kind.__name__
    return not is_registered and kind.__module__.partition(".")[0] not in _IMPORTED


_IMPORTED = ("keras", "keras_hub", "keras_cv", "keras_nlp")  # what Keras looks for classes in


def _is_layer(x: Any) -> bool:
    return isinstance(x, keras.layers.Layer)


# --- finding a config ------------------------------------------------------------------------


def _problems(layer: Any) -> Iterator[tuple[Any, str]]:
    """The layers, this one or inside it, that cannot be made anew: what they say is mended first.

    The parts of a layer that is not Keras' own are its business.
    """
    if is_from_keras(layer) and _has_config(layer):
        for part in () if isinstance(layer, keras.Model) else parts_of_layer(layer):
            yield from _problems(part)
        return
    if refused(layer):
        yield layer, refused(layer)
        return
    if handed(layer):
        return  # no file holds what a layer was handed, nor did one of the model before
    for part in () if _has_config(layer) else parts_of_layer(layer):
        deque(_problems(part), maxlen=0)  # its config may be of theirs
    arguments, why = _config_of(layer)
    if why:
        arguments, why = _built_by_its_call(layer) or (arguments, why)
    if arguments is not None:
        _say(layer, arguments)
    if why:
        yield layer, why


def _shared(layers: list) -> dict[str, str]:
    """Layers that make a part themselves which others have too: in a file there would be two."""
    users = Counter(id(part) for x in layers for part in layers_of(x))
    return {
        x.name: f"{SHARED} ({part.name!r})"
        for x in layers
        if not is_from_keras(x)
        for part in layers_of(x)
        if users[id(part)] > 1 and part.weights and part is not x and not _says(x, part)
    }


def _says(layer: Any, part: Any) -> bool:
    """Whether the config of a layer holds a part, which is then found again in a file."""
    return _has_config(layer) and repr(part.name) in repr(_said(layer))


def _built_by_its_call(layer: Any) -> tuple[dict | None, str] | None:
    """What a layer can be made of if its file does not say for what shapes it is to be built.

    It would say so in lists, and a layer may take tuples only: these it gets from its first call.
    """
    vars(layer)["get_build_config"] = lambda: None
    arguments, why = _config_of(layer)
    if not why:
        return arguments, ""
    del vars(layer)["get_build_config"]
    return None


def _config_of(layer: Any) -> tuple[dict | None, str]:
    """What a layer can be made of, None if that is what it says; or else why it cannot be made."""
    why = ""
    for candidates in _CANDIDATES:
        try:
            arguments = candidates(layer)
            problem = _problem(layer, arguments)
        except Exception as error:  # whatever the code of a layer raises
            problem = _reason(error)
        if not problem:
            return None if candidates is _said else arguments, ""
        why = why or problem
    return None, why


def _has_config(layer: Any) -> bool:
    """Without one of their own, even stock layers have none if their dtype is a policy object."""
    try:
        _said(layer)
    except Exception:  # whatever the code of a layer raises
        return False
    return True


def _said(layer: Any) -> dict:
    with warnings.catch_warnings():  # what Keras says of lambdas is for those who save
        warnings.simplefilter("ignore")
        return dict(layer.get_config())


def _own_arguments(layer: Any) -> dict:
    """What the constructor of a layer's class takes, but for what it only hands on."""
    return _fitted(layer, _known(layer, next(_parameters(layer), [])))


def _all_arguments(layer: Any) -> dict:
    return _fitted(layer, _known(layer, [p for names in _parameters(layer) for p in names]))


def _known(layer: Any, names: Iterable[str]) -> dict:
    """The arguments of these names that the config of a layer or an attribute tells."""
    tables = (_said(layer) if _has_config(layer) else {}, vars(layer))
    found = {n: [t[k] for t in tables for k in (n, f"_{n}") if k in t] for n in names}
    usable = {n: [v for v in values if not _is_part(v)] for n, values in found.items()}
    return {n: values[0] for n, values in usable.items() if values}


def _is_part(x: Any) -> bool:
    return isinstance(x, (keras.layers.Layer, keras.Variable, keras.KerasTensor))


def _parameters(layer: Any) -> Iterator[list[str]]:
    """Names of what each constructor of a layer's class takes, but for what all layers do."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for kind in type(layer).__mro__:
        if kind is keras.layers.Layer:
            return
        if "__init__" in vars(kind):
            parameters = inspect.signature(kind).parameters.values()
            yield [p.name for p in parameters if p.kind in named and p.name not in _BASE]
            if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
                return


def _fitted(layer: Any, arguments: dict) -> dict:
    """The arguments, with others tried where a plain attribute of the new layer comes out wrong.

    An argument and the attribute that holds it may have different names.
    """
    names = next(_parameters(layer), [])
    for _ in names:
        lost = _unlike(layer, _made(layer, arguments), _DEEPEST)
        value = _attributes(layer).get(lost)
        if not lost or not (_is_plain(value) or isinstance(value, (list, tuple))):
            break
        fits = (n for n in names if lost not in _unlikes(layer, {**arguments, n: value}))
        name = next(fits, None)
        if name is None:
            break
        arguments = {**arguments, name: value}
    return arguments


def _makes(layer: Any, candidates: Callable) -> bool:
    try:
        return _made(layer, candidates(layer)) is not None
    except Exception:  # whatever the code of a layer raises
        return False


_CANDIDATES = (_said, remembered_arguments, _own_arguments, _all_arguments)


def _base(layer: Any) -> dict:
    policy = keras.dtype_policies.serialize(layer.dtype_policy)
    return {"name": layer.name, "trainable": layer.trainable, "dtype": policy}


def _say(layer: Any, arguments: dict) -> None:
    """From now on the config of a layer is what it is made from; what may change is asked for."""
    arguments = {k: v for k, v in arguments.items() if k not in _BASE}
    vars(layer)["get_config"] = lambda: {**_base(layer), **arguments}


def _made(layer: Any, arguments: dict) -> Any:
    """The layer as Keras makes it from a file that holds these arguments; not built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = keras.saving.serialize_keras_object({**_base(layer), **arguments})
        return type(layer).from_config(json.loads(json.dumps(written)))


def _problem(layer: Any, arguments: dict) -> str:
    """In what a layer made of these arguments differs, in words; empty if it is the same."""
    new, call = _made(layer, arguments), call_on_symbols(layer)
    shapes = layer.get_build_config()
    if shapes and not new.built:
        new.build_from_config(json.loads(json.dumps(shapes)))
    if call and _shapes(layer) != _shapes(new):
        new(*call[0], **call[1])  # parts may be built when they are first called
    if _shapes(layer) != _shapes(new):
        return f"{OTHER_WEIGHTS} {_shapes(new)}, not {_shapes(layer)}"
    name = _unlike(layer, new, _DEEPEST)
    return name and f"made from its config it has another {name!r}"


def _shapes(layer: Any) -> list:
    return [tuple(w.shape) for w in layer.weights]


def _reason(error: Exception) -> str:
    """What an error says; Keras has the innermost last, behind all that it was called with."""
    if isinstance(error, NotImplementedError):
        return "it has no `get_config` of its own"
    text = str(error).rpartition("Exception encountered: ")[2]
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"


# --- comparing layers ------------------------------------------------------------------------


def _unlike(a: Any, b: Any, depth: int) -> str:
    """The first attribute in which two objects of a kind differ."""
    return next(_all_unlike(a, b, depth), "")


def _unlikes(layer: Any, arguments: dict) -> list[str]:
    """All attributes in which a layer made of these arguments differs."""
    try:
        return list(_all_unlike(layer, _made(layer, arguments), _DEEPEST))
    except Exception:  # whatever the code of a layer raises
        return list(_attributes(layer))


def _all_unlike(a: Any, b: Any, depth: int) -> Iterator[str]:
    if type(a) is not type(b):
        yield type(b).__name__
        return
    if _is_layer(a) and a.dtype_policy.name != b.dtype_policy.name:
        yield "dtype"
    before, own = _attributes(a), _attributes(b)
    yield from own.keys() - before.keys()
    # What is plain and missing was an argument that got lost; the rest may come with a call.
    compared = {k: v for k, v in before.items() if k in own or _is_plain(v)}
    for name, value in compared.items():
        other = own.get(name)
        if not _is_noted(value, other) and (name not in own or not _alike(value, other, depth)):
            yield name


def _is_noted(a: Any, b: Any) -> bool:
    """A layer that notes in which mode it was called last is still the same."""
    return isinstance(a, bool) and b is None


def _attributes(x: Any) -> dict:
    """What an object holds, but for what Keras and TensorFlow keep of any layer."""
    skipped = attributes_of_every_layer() if _is_layer(x) else ()
    about_itself = ("_self_", "_obj_reference_counts", "get_", "build")
    own = {k: v for k, v in vars(x).items() if k not in skipped}
    return {k: v for k, v in own.items() if not k.startswith(about_itself)}


def _is_plain(x: Any) -> bool:
    return isinstance(x, (bool, int, float, str))


def _alike(a: Any, b: Any, depth: int) -> bool:
    if a is b or depth == 0:
        return True
    for kinds, same in _COMPARED:
        if isinstance(a, kinds) or isinstance(b, kinds):
            return bool(same(a, b, depth))
    return type(a) is type(b) and not (hasattr(a, "__dict__") and _unlike(a, b, depth - 1))


def _same_functions(a: Any, b: Any, depth: int) -> bool:
    """Functions of one place in the code; what a closure has captured may be anything."""
    code = [getattr(getattr(x, "__func__", x), "__code__", None) for x in (a, b)]
    captured = [getattr(x, "__closure__", None) or () for x in (a, b)]
    first, second = ([c.cell_contents for c in closure] for closure in captured)
    return code[0] is code[1] is not None and _same_lists(first, second, depth)


def _same_lists(a: Any, b: Any, depth: int) -> bool:
    is_list = isinstance(a, (list, tuple)) and isinstance(b, (list, tuple))
    pairs = zip(a, b, strict=True) if is_list and len(a) == len(b) else None
    return pairs is not None and all(_alike(x, y, depth) for x, y in pairs)


def _same_dicts(a: Any, b: Any, depth: int) -> bool:
    return (
        isinstance(a, dict)
        and isinstance(b, dict)
        and a.keys() == b.keys()
        and all(_alike(a[k], b[k], depth) for k in a)
    )


def _same_written(a: Any, b: Any, depth: int) -> bool:
    written = [keras.saving.serialize_keras_object(x) for x in (a, b)]
    return bool(written[0] == written[1])


def _same_arrays(a: Any, b: Any, depth: int) -> bool:
    return np.array_equal(*(keras.ops.convert_to_numpy(x) for x in (a, b)))


def _same_kinds(a: Any, b: Any, depth: int) -> bool:
    return type(a) is type(b)


# Kinds of attributes, and when two of a kind are alike; the first that fits counts.
_COMPARED: tuple[tuple[Any, Callable], ...] = (
    ((bool, int, float, str, bytes, type(None), type), lambda a, b, _: a == b),
    (keras.Variable, lambda a, b, _: a.shape == b.shape and a.dtype == b.dtype),
    (keras.Model, lambda a, b, _: type(a) is type(b) and _shapes(a) == _shapes(b)),
    ((keras.KerasTensor, keras.random.SeedGenerator, keras.metrics.Metric), _same_kinds),
    (keras.DTypePolicy, lambda a, b, _: a.name == b.name),
    (SETTINGS, _same_written),
    ((list, tuple), _same_lists),
    (dict, _same_dicts),
    ((types.FunctionType, types.MethodType, functools.partial), _same_functions),
    ((np.ndarray, np.generic), _same_arrays),
)
