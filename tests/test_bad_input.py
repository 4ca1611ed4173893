"""Errors say what was expected, what came, which layer, and what to do."""

import keras
import numpy as np
import pytest
from helpers import small_resnet
from keras import layers

import keras_polar


class Subclassed(keras.Model):
    def call(self, x):
        return x


def unprunable():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, name="only")])


APPLY = [
    ({"sparsity": 0.0}, ValueError, "0 < sparsity < 1"),
    ({"sparsity": 1}, ValueError, "0 < sparsity < 1"),
    ({"sparsity": "half"}, TypeError, "half"),
    ({"sparsity": 0.9999}, ValueError, "cannot be reached; at most 0.9"),
    ({"measure": "flops"}, ValueError, "measure.*'macs'.*'flops'"),
    ({"gate": "soft"}, ValueError, "gate.*'static'.*'soft'"),
    ({"granularity": "layers"}, ValueError, "granularity.*'channels'.*'layers'"),
    ({"round_to": 0}, ValueError, "round_to.*>= 1.*0"),
    ({"min_units": 1.5}, ValueError, "min_units.*1.5"),
    ({"schedule": "fast"}, TypeError, "Schedule.*fast"),
    ({"ignore": ["stem*", "nonsense"]}, ValueError, "nonsense.*matches none.*block0_a"),
    ({"ignore": ["*"]}, ValueError, "nothing.*can be pruned.*ignored by"),
]


@pytest.mark.parametrize(("options", "error", "message"), APPLY)
def test_apply_options(options, error, message):
    with pytest.raises(error, match=message):
        keras_polar.apply(small_resnet(), **{"sparsity": 0.5, **options})


def test_unknown_option():
    with pytest.raises(TypeError, match="speed"):
        keras_polar.apply(small_resnet(), 0.5, speed=3)


MODELS = [
    (lambda: keras.Sequential([layers.Dense(3)]), TypeError, "keras.Input"),
    (lambda: Subclassed(name="mine"), TypeError, "mine.*functional"),
    (lambda: "model.keras", TypeError, "received str"),
    (unprunable, ValueError, "only: is an output of the model"),
    (lambda: keras_polar.apply(small_resnet()), ValueError, "has gates already"),
]


@pytest.mark.parametrize(("build", "error", "message"), MODELS)
def test_apply_models(build, error, message):
    with pytest.raises(error, match=message):
        keras_polar.apply(build(), 0.5)


def test_macs_of_unknown_sizes():
    x = keras.Input((None, None, 3))
    y = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3)(x))
    with pytest.raises(ValueError, match=r"unknown ones.*measure='weights'"):
        keras_polar.apply(keras.Model(x, layers.Dense(2)(y)), measure="macs")


REMOVE = [
    ({"nonsense": [0]}, "nonsense.*stem"),
    ({"stem": [8]}, "stem.*units 0 to 7.*8"),
    ({"stem": [-1]}, "stem.*units 0 to 7.*-1"),
    ({"stem": [0.5]}, "stem.*0.5"),
    ({"stem": range(8)}, "would lose all its 8 units"),
    ({"logits": [1]}, "logits.*output of the model"),
]


@pytest.mark.parametrize(("units", "message"), REMOVE)
def test_remove(units, message):
    with pytest.raises(ValueError, match=message):
        keras_polar.remove(small_resnet(), units)


MASKS = [
    (np.ones(7, bool), r"\(8,\).*\(7,\)"),
    (np.zeros(8, bool), "stem.*closes all 8"),
    (np.ones(8), "bool.*float64"),
]


@pytest.mark.parametrize(("mask", "message"), MASKS)
def test_set_mask(mask, message):
    gated = keras_polar.apply(small_resnet())
    with pytest.raises(ValueError, match=message):
        gated.groups[0].set_mask(mask)


def test_convert_without_gates():
    with pytest.raises(TypeError, match=r"small_resnet.*without gates.*keras_polar.apply"):
        keras_polar.convert(small_resnet())


SCHEDULES = [({"warmup": 0.6}, "warmup=0.6"), ({"steps": 0}, "steps"), ({"rate": -1}, "rate=-1")]


@pytest.mark.parametrize(("options", "message"), SCHEDULES)
def test_schedule(options, message):
    with pytest.raises(ValueError, match=message):
        keras_polar.Schedule(**options)


def test_register():
    with pytest.raises(TypeError, match=r"subclass of keras\.layers\.Layer"):
        keras_polar.register("Dense", like=layers.Dense)
    with pytest.raises(TypeError, match="either a rule or like"):
        keras_polar.register(layers.Dense)
    with pytest.raises(ValueError, match="nothing is known about like='Lambda'"):
        keras_polar.register(Subclassed, like=layers.Lambda)
