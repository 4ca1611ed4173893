"""What `apply(gate=...)` takes, a name or a gate without units, and the gates made like it."""

import inspect
from collections.abc import Callable
from typing import Any

from keras_polar.gates.gate import DynamicGate, Gate

GATES = {"dynamic": DynamicGate, "static": Gate}
# What each group says for itself, and no argument of a gate that stands for all of them.
OF_A_GROUP = ("units", "group", "layers", "members", "min_units", "axis", "listens")


def template_of(gate: str | Gate) -> Gate:
    """The gate of this name; an object is taken as it is.

    Raises:
        TypeError: its config lacks arguments of its class.
        ValueError: it is the gate of a group already.
    """
    template = GATES[gate](name=gate) if isinstance(gate, str) else gate
    _check_is_new(template)
    _check_config(template)
    return template


def _check_is_new(template: Gate) -> None:
    blank, config = Gate(name="gate").get_config(), template.get_config()
    told = [f"{k}={config[k]!r}" for k in OF_A_GROUP if k in config and config[k] != blank.get(k)]
    if told:
        raise ValueError(
            f"apply: expected a gate that is not one of a group yet, received {_kind(template)} "
            f"{template.name!r} with {', '.join(told)}. Pass a new one, {_kind(template)}(), "
            "without these; `min_units` is an argument of apply."
        )


def _check_config(template: Gate) -> None:
    of_class, of_all = (_parameters(c.__init__) for c in (type(template), Gate))
    lost = sorted(of_class - of_all - template.get_config().keys())
    if lost:
        raise TypeError(
            f"apply: `get_config` of gate {_kind(template)} lacks {', '.join(lost)}. Expected all "
            "arguments of `__init__`, from which a gate like it is made for each group, and by "
            "which it is loaded: return {**super().get_config(), " + f"{lost[0]!r}: ...}}."
        )


def _parameters(init: Callable) -> set[str]:
    parameters = [*inspect.signature(init).parameters.values()][1:]  # but self
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def for_all_samples(template: Gate) -> Gate:
    """The gate itself, or a static one in place of one that decides per sample."""
    if not template.per_sample:
        return template
    options = {"dtype": template.dtype_policy, "trainable": template.trainable}
    return Gate(gain=template.gain, initial_logit=template.initial_logit, name="static", **options)


def made_like(template: Gate, name: str, **group: Any) -> Gate:
    """A gate of the same class and options that decides about the units of a group.

    Args:
        group: what `OF_A_GROUP` names.

    Raises:
        TypeError: the class does not take them.
    """
    config = {**template.get_config(), **group, "name": name}
    try:
        return type(template).from_config(config)
    except TypeError as error:
        why = str(error).splitlines()[-1].rstrip(".")  # in front, Keras writes the config
        raise TypeError(
            f"apply: no gate {name!r} can be made like {_kind(template)} {template.name!r}: {why}. "
            "Expected an `__init__` that takes `**kwargs` and hands them on to "
            "`super().__init__(**kwargs)`."
        ) from error


def _kind(gate: Gate) -> str:
    return type(gate).__name__
