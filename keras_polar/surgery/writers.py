"""Tasks of KerasHub that write texts: traced at one length, and put around smaller backbones.

They call the layers of their backbone one by one, with what these remember of the texts so far. So
a smaller backbone has to be of the same class, made from a config with smaller sizes: what such a
config cannot say, that stays.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_polar.backends import to_numpy
from keras_polar.coupling.coupling import Coupling, pinning
from keras_polar.graph.clone import variable_at
from keras_polar.graph.keras_private import layers_of, without_latest_call
from keras_polar.graph.subclassed import as_functional
from keras_polar.graph.symbolic.record import variables_behind
from keras_polar.rules import trace_model
from keras_polar.surgery.certificate import check_certificate
from keras_polar.surgery.tasks import with_backbone, writes

# Sizes that a config gives, those that only change together in one row.
SETTINGS = (
    ("intermediate_dim",),
    ("num_query_heads", "num_key_value_heads"),
    ("num_query_heads",),
    ("num_attention_heads", "num_key_value_heads"),
    ("num_heads",),
    ("num_attention_heads",),
    ("feedforward_expansion_factor",),
)


class Equal(NamedTuple):
    """Groups that a setting of a config gives the size of: they have to keep equally many units.

    Attributes:
        names: of the groups.
        step: units for each 1 in the setting.
    """

    names: tuple[str, ...]
    step: int


# --- at one length ------------------------------------------------------------------------------


def as_network(model: Any, input_shape: Any = None) -> Any:
    """The functional model to be pruned: of a task that writes, its network at one length.

    Args:
        input_shape: of such a task: shape of one sample in all its inputs, or {name: shape}; by
            default the lengths of its preprocessor. Of other models as `as_functional` has it.

    Raises:
        TypeError, ValueError: nobody knows the shapes, or they do not fit.
    """
    if not writes(model):
        return as_functional(model, input_shape)
    inputs = {
        name: keras.Input(_shape(model, name, input_shape), dtype=x.dtype, name=name)
        for name, x in model.input.items()
    }
    whole = keras.Model(inputs, model(inputs), name=model.name)
    without_latest_call(model)
    return whole


def _shape(task: Any, name: str, given: Any) -> tuple:
    own = tuple(task.input[name].shape[1:])
    if None not in own:
        return own
    shape = given.get(name) if isinstance(given, dict) else given
    if shape is None:
        shape = (_length(task.preprocessor, name), *own[1:])
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    fits = len(shape) == len(own) and all(o in (None, n) for o, n in zip(own, shape, strict=True))
    if None in shape or not fits:
        raise ValueError(
            f"{type(task).__name__} {task.name!r}: its widths can be pruned where texts have one "
            f"length, and nobody knows that of {name!r}, of shape {own}. Expected a preprocessor "
            f"with a sequence_length, or input_shape={tuple(n or 128 for n in own)}, say, or "
            f"{{name: shape}} for each of {', '.join(task.input)}; received "
            f"preprocessor={_kind(task.preprocessor)}, input_shape={given!r}."
        )
    return shape


def _kind(preprocessor: Any) -> str:
    return "None" if preprocessor is None else type(preprocessor).__name__


def _length(preprocessor: Any, name: str) -> int | None:
    kind = next((k for k in ("encoder_", "decoder_") if name.startswith(k)), "")
    return getattr(preprocessor, f"{kind}sequence_length", None)


# --- what a config can say ----------------------------------------------------------------------


def expressible(coupling: Coupling, task: Any) -> tuple[Coupling, tuple[Equal, ...]]:
    """The same units, those kept that no setting of the backbone's config is the number of.

    Returns:
        And the groups, for each setting, that it gives the size of.
    """
    backbone, axes = task.backbone, _axes(coupling)
    kind = type(backbone).__name__
    whys = dict.fromkeys(range(len(coupling.groups)), f"{kind} has no setting for it")
    equal = []
    for keys in SETTINGS:
        changed = _changed(backbone, keys)
        found = {i for place in changed for i in axes.get(place, {-1})}
        apart = {place for place, groups in axes.items() if groups & found} - changed
        sizes = {coupling.groups[i].units for i in found if i >= 0}
        if found and -1 not in found and not apart and len(sizes) == 1:
            names = tuple(coupling.groups[i].name for i in sorted(found))
            largest = max(backbone.get_config()[k] for k in keys)
            equal.append(Equal(names, max(1, sizes.pop() // largest)))
            whys = {i: why for i, why in whys.items() if i not in found}
        else:
            why = f"{kind} has no setting for it alone: {' and '.join(keys)} is that of others too"
            whys |= {i: why for i in found if i in whys}
    stay = [(coupling.groups[i].roots, why) for i, why in whys.items()]
    return pinning(coupling, stay), tuple(equal)


def _axes(coupling: Coupling) -> dict[tuple[int, int], set[int]]:
    """(id of a variable, axis) -> the groups whose units are along it, -1 for units that stay."""
    found: dict[tuple[int, int], set[int]] = {}
    for site in coupling.sites:
        behind = variables_behind(site.op)
        for path, names in site.rule.weights(site.op).items():
            variable = variable_at(site.op, path)
            for axis, name in enumerate(names):
                own = behind.get(id(variable))
                if own is not None and own.shape == variable.shape and name in site.axes:
                    ids = site.axes[name]
                    groups = np.where(ids >= 0, coupling.group_of[ids], -1)
                    found.setdefault((id(own), axis), set()).update(groups.tolist())
    return found


def _changed(backbone: Any, keys: Sequence[str]) -> set[tuple[int, int]]:
    """(id of a variable, axis) where the size follows from a setting; none if there is no such."""
    config = backbone.get_config()
    halves = {k: config[k] // 2 for k in keys if isinstance(config.get(k), int)}
    if len(halves) < len(keys) or not all(halves.values()):
        return set()
    try:
        smaller = _made_anew(backbone, halves)
    except Exception:  # sizes that do not fit others of the config
        return set()
    return {
        (id(old), axis)
        for old, new in zip(backbone.weights, smaller.weights, strict=True)
        for axis, n in enumerate(old.shape)
        if n != new.shape[axis]
    }


def _made_anew(backbone: Any, changes: dict) -> Any:
    made = type(backbone).from_config({**backbone.get_config(), **changes})
    _adapt(backbone, made)
    return made


def _adapt(model: Any, made: Any) -> None:
    """What layers have got since they were made: adapters of low rank, and whether they train."""
    for old, new in zip(layers_of(model), layers_of(made), strict=True):
        new.trainable = old.trainable
        if getattr(old, "lora_enabled", False):
            new.enable_lora(old.lora_rank, lora_alpha=old.lora_alpha)


# --- and back -----------------------------------------------------------------------------------


def rewritten(small: keras.Model, task: Any) -> Any:
    """A task of the same class around a backbone of the same class, with smaller sizes.

    Args:
        small: the sub-network of the whole task.
        task: a task that is built like the one that was pruned.

    Raises:
        ValueError: the smaller network is none that the config of a backbone can say, or what was
            put together computes something else.
    """
    trained = _trained(small, task)
    backbone = _made_anew(task.backbone, _sizes(task.backbone, trained))
    made = with_backbone(task, backbone)
    for own, new in zip(task.weights, made.weights, strict=True):
        source = trained.get(id(own), own)
        if math.prod(source.shape) != math.prod(new.shape):
            raise _no_such(task, f"{own.path} of shape {tuple(source.shape)}")
        new.assign(to_numpy(source).reshape(new.shape))  # some had to become a table
    if hasattr(task, "sampler"):  # it has been compiled
        made.compile(sampler=task.sampler)
    texts = _texts(small, task.backbone)
    check_certificate(small, made, texts, lambda *_: _not_alike(task))
    return made


def _trained(small: keras.Model, task: Any) -> dict[int, Any]:
    """Id of a variable of the task -> that of the sub-network."""
    shapes = {name: tuple(x.shape[1:]) for name, x in small.input.items()}
    theirs = {call.name: call.op for call in trace_model(small).calls}
    found: dict[int, Any] = {}
    for call in trace_model(as_network(task, shapes)).calls:
        own = variables_behind(call.op).values()
        other = getattr(theirs.get(call.name), "weights", ())
        if len(own) != len(other):
            raise ValueError(
                f"convert: expected {len(own)} variables of layer {call.name!r}, found "
                f"{len(other)}. {_not_alike(task)}."
            )
        found.update((id(v), w) for v, w in zip(own, other, strict=True))
    return found


def _sizes(backbone: Any, trained: dict) -> dict[str, int]:
    """The settings of the smaller backbone."""
    own = {id(v): v for v in backbone.weights}
    config = backbone.get_config()
    sizes: dict[str, int] = {}
    for keys in SETTINGS:
        places = [(i, axis) for i, axis in _changed(backbone, keys) if i in trained]
        cut = {Fraction(trained[i].shape[axis], own[i].shape[axis]) for i, axis in places}
        if len(cut) == 1:
            (share,) = cut
            sizes |= {k: int(config[k] * share) for k in keys if share != 1}
    return sizes


def _not_alike(task: Any) -> str:
    return (
        f"The pruned network is not built like into={type(task).__name__} {task.name!r}: hand over "
        "the task that `apply` was given, or leave into= out for an ordinary model"
    )


def _no_such(task: Any, what: str) -> ValueError:
    kind = type(task.backbone).__name__
    return ValueError(
        f"convert: no {kind} of smaller sizes has the variable {what} that stays. All its layers "
        "have equal sizes: expected a gated model that `apply` made of the task, with gates that "
        "are settled by `fit` or `gated.settle()`. Leave into= out for an ordinary model."
    )


def _texts(small: keras.Model, backbone: Any) -> dict[str, np.ndarray]:
    """Random inputs, token ids all over the vocabulary."""
    rng, words = np.random.default_rng(0), getattr(backbone, "vocabulary_size", 2)

    def sample(name: str, x: Any) -> np.ndarray:
        shape = (3, *x.shape[1:])
        if "float" in keras.backend.standardize_dtype(x.dtype):
            return rng.standard_normal(shape).astype("float32")
        return rng.integers(0, words if "token_ids" in name else 2, shape)

    return {name: sample(name, x) for name, x in small.input.items()}
