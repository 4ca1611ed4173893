"""How users teach the library layers of their own."""

from typing import Any

import keras

from keras_polar.rules.rule import PinRule, Rule, add, find


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
