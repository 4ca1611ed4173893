"""Which rule an operation has, and how users teach the library layers of their own."""

from typing import Any

import keras

from keras_polar.graph.configs import can_be_made, can_be_told, is_found_again
from keras_polar.graph.ir import Graph
from keras_polar.graph.keras_private import has_parts, layers_of
from keras_polar.graph.quantized import why_altered
from keras_polar.graph.trace import trace
from keras_polar.rules.call_site import CallSite, alone
from keras_polar.rules.ids import Ids
from keras_polar.rules.rule import CostTerm, PinRule, Rule


def register(layer_class: type, rule: Rule | None = None, *, like: type | None = None) -> None:
    """Teaches the library how a layer class behaves under pruning.

    Args:
        layer_class: the class; exactly it, not its subclasses.
        rule: a `keras_polar.Rule` object that answers how ids flow, how weights are cut and what
            the layer computes.
        like: instead of a rule, a class that behaves alike: same weights under the same names,
            same config keys (a subclass of `keras.layers.Dense` that only adds a log line, say).

    Raises:
        TypeError: `layer_class` is not a class, or neither or both of `rule` and `like` are given.
        ValueError: nothing is known about `like`.

    Example:

        >>> keras_polar.register(MyDense, like=keras.layers.Dense)
    """
    if not isinstance(layer_class, type) or not issubclass(layer_class, keras.Operation):
        raise TypeError(
            f"register: expected a subclass of keras.layers.Layer, received {layer_class!r}."
        )
    if (rule is None) == (like is None):
        raise TypeError(
            f"register: expected either a rule or like=<class> for {layer_class.__name__}; "
            f"received rule={rule!r}, like={like!r}."
        )
    add(_given(layer_class, rule) if like is None else _known(like), layer_class)


def _given(layer_class: type, rule: Any) -> Rule:
    if not isinstance(rule, Rule):
        raise TypeError(
            f"register: expected a keras_polar.Rule object for {layer_class.__name__}, received "
            f"{rule!r}. Subclass keras_polar.Rule and pass an instance."
        )
    return rule


def _known(like: type) -> Rule:
    rule = find(like)
    if rule is None or isinstance(rule, PinRule):
        raise ValueError(
            f"register: nothing is known about like={getattr(like, '__name__', like)!r}. Pass a "
            "class the library prunes (keras.layers.Dense, say) or a keras_polar.Rule."
        )
    return rule


_REGISTRY: dict[type, Rule] = {}
_BY_NAME: dict[str, Rule] = {}  # of classes whose package may not be there


class UnknownRule(Rule):
    """Nobody wrote a rule: all units that reach the operation stay."""

    def flow(self, site: CallSite) -> list[Ids]:
        unknown = site.call.note or "no rule for this operation; see keras_polar.register"
        return site.pin_all(why_altered(site.op) or unknown)

    def macs(self, site: CallSite) -> list[CostTerm] | None:
        """With other weights a layer computes what its class does, and what adapters add."""
        rule = find(type(site.op))
        own = None if rule is None else alone(site, rule)
        added = _adapter_macs(site, rule)
        return None if own is None or added is None else [*own, CostTerm((), macs=added)]


UNKNOWN = UnknownRule()


def _adapter_macs(site: CallSite, rule: Rule | None) -> int | None:
    # Without quantization, the adapters' product becomes part of the kernel: work that does not
    # grow with the samples.
    own = [x for x in parts_of(site.op) if getattr(x, "lora_enabled", False)]
    if rule is None or not any(getattr(x, "quantization_mode", None) for x in own):
        return 0
    return rule.adapter_macs(site)


def add(rule: Rule, *classes: type) -> None:
    """Registers `rule` for exactly these classes (subclasses may behave differently)."""
    _REGISTRY.update((c, rule) for c in classes)


def add_by_name(rule: Rule, *names: str) -> None:
    """Registers `rule` for classes by their full names, "package.module.Class"."""
    _BY_NAME.update(dict.fromkeys(names, rule))


def rule_for(op: Any) -> Rule:
    """The rule of an operation; the one that pins everything if there is none."""
    is_leaf = isinstance(op, keras.layers.Layer) and not has_parts(op)
    otherwise = _REGISTRY[keras.layers.Layer] if is_leaf else UNKNOWN  # see custom.py
    rule = find(type(op)) or otherwise
    if rule is UNKNOWN:
        return rule
    return rule if rule.applies(op) and not why_altered(op, rule.cuts_adapters) else UNKNOWN


def parts_of(op: Any) -> list:
    """An operation and all its sublayers."""
    return layers_of(op) if has_parts(op) else [op]


def is_unknown(op: Any) -> bool:
    """Whether nobody wrote a rule for an operation."""
    return rule_for(op) in (UNKNOWN, _REGISTRY[keras.layers.Layer])


def opens(op: Any) -> bool:
    """Whether a layer is to be replaced by its parts: it has some, and no rule of its own.

    A layer with a matrix may be one that multiplies by it, which is to say that a Dense is a part.
    """
    rule = rule_for(op)
    if rule is _REGISTRY[keras.layers.Layer]:
        return any(len(v.shape) > 1 for v in op.weights)
    return rule is UNKNOWN and has_parts(op)


def opens_inside(op: Any) -> bool:
    """Whether a part of an opened layer is to be replaced by what its `call` does.

    So is a function in the shape of a layer that no file can tell: the layer that it is a part of
    has made it, and is gone.
    """
    if type(op) is keras.layers.Activation:
        return not is_found_again(op.activation)
    is_plain = rule_for(op) is _REGISTRY[keras.layers.Layer]
    is_lost = is_plain and not (can_be_made(op) if op.variables else can_be_told(op))
    return opens(op) or is_lost


def trace_model(model: Any) -> Graph:
    """The graph of a model, composite layers without a rule opened.

    Raises:
        TypeError: `model` is not a functional or built Sequential model.
    """
    return trace(model, opens, opens_inside)


def find(layer_class: type) -> Rule | None:
    """The registered rule of a class, or None; also for what is none."""
    found = _REGISTRY.get(layer_class)
    if found is not None or not isinstance(layer_class, type):
        return found
    return _BY_NAME.get(f"{layer_class.__module__}.{layer_class.__qualname__}")
