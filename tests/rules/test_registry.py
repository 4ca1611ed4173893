"""Every layer and operation of Keras has a rule, or a place in the list of those that pin."""

import inspect

import keras
import pytest

from keras_polar import inspect as inspect_model
from keras_polar.graph.keras_private import OP_MODULES
from keras_polar.rules.registry import find
from keras_polar.rules.rule import PinRule
from keras_polar.rules.unprunable import PINNED


def layer_classes():
    found = vars(keras.layers).values()
    return {c for c in found if inspect.isclass(c) and issubclass(c, keras.layers.Layer)}


def op_classes():
    return {
        c
        for module in OP_MODULES
        for c in vars(module).values()
        if inspect.isclass(c)
        and issubclass(c, keras.Operation)
        and not issubclass(c, keras.layers.Layer)
        and c.__module__ == module.__name__
    }


@pytest.mark.parametrize("classes", [layer_classes, op_classes], ids=["layers", "ops"])
def test_every_class_has_a_rule_or_a_reason(classes):
    found = classes()
    assert len(found) > 100
    missing = sorted(c.__name__ for c in found if find(c) is None)
    assert not missing, (
        f"Keras {keras.__version__} has classes that are neither registered nor listed with a "
        f"reason in keras_polar/rules/unprunable.py: "
        f"{', '.join(missing)}. Write a rule or list them."
    )


def test_no_class_has_both_a_rule_and_a_reason():
    stale = sorted(c.__name__ for c in PINNED if not isinstance(find(c), PinRule))
    assert not stale, f"Delete from keras_polar/rules/unprunable.py: {', '.join(stale)}."


def test_inspect_gives_the_reason_of_a_listed_operation():
    x = keras.Input((6, 4))
    y = keras.layers.Dense(5, name="before")(x)
    y = keras.layers.Dense(2)(keras.ops.take_along_axis(y, x[..., :1] > 0, axis=-1))
    row = next(r for r in inspect_model(keras.Model(x, y)).rows if r.name == "before")
    assert row.prunable == 0
    assert "computed places" in row.reason
