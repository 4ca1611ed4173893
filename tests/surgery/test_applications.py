"""keras.applications, every model class: certificate, costs, and how much of it can go."""

import itertools

import keras
import pytest
from helpers import check, check_loads_alone, close_half, quick, randomise
from keras import layers
from keras.src.applications.convnext import LayerScale, StochasticDepth
from keras.src.applications.inception_resnet_v2 import CustomScaleLayer

import keras_polar
from keras_polar.surgery.certificate import difference, random_inputs

NAMES = sorted(n for n in dir(keras.applications) if n[0].isupper())
SIZES = {"InceptionResNetV2": 96, "InceptionV3": 96, "Xception": 96}


def backbone(name):
    size = SIZES.get(name, 64)
    build = getattr(keras.applications, name)
    return build(weights=None, include_top=False, input_shape=(size, size, 3))


def with_top(name):
    size = SIZES.get(name, 64)
    build = getattr(keras.applications, name)
    # Logits: behind a softmax of random weights every output would look alike.
    return build(weights=None, input_shape=(size, size, 3), classifier_activation=None)


def sequential_head(name):
    return keras.Sequential([backbone(name), layers.GlobalAveragePooling2D(), layers.Dense(5)])


def functional_head(name):
    body = backbone(name)
    body.trainable = False
    inputs = keras.Input(body.input_shape[1:])
    x = layers.GlobalAveragePooling2D()(body(inputs, training=False))
    return keras.Model(inputs, layers.Dense(5)(layers.Dropout(0.2)(x)))


VARIANTS = {f.__name__: f for f in (with_top, backbone, sequential_head, functional_head)}


def certified(model):
    """The certificate, for masks that matter: they change what the model says."""
    gated, small = check(randomise(model))
    assert difference(model, small, random_inputs(model)) > 1e-3
    return gated, small


ALL = [*itertools.product(NAMES, VARIANTS)]
QUICK = [("MobileNetV2", "with_top"), ("MobileNetV2", "backbone")]


@pytest.mark.parametrize(("name", "variant"), quick(QUICK, ALL))
def test_every_model_of_keras_applications(name, variant):
    certified(VARIANTS[variant](name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nine_tenths_of_the_weights_are_prunable(name):
    assert keras_polar.inspect(with_top(name)).prunable_weights > 0.9


def convnext_block(x, width):
    y = layers.Conv2D(width, 3, padding="same", groups=width)(x)
    y = layers.LayerNormalization(name="norm")(y)
    y = layers.Dense(4 * width, activation="gelu", name="wide")(y)
    y = layers.Dense(width, name="narrow")(y)
    y = StochasticDepth(0.3)(LayerScale(1e-6, width, name="scale")(y))
    return x + y


def test_the_stream_of_a_convnext_block_goes_through_its_layer_norm():
    inputs = keras.Input((8, 8, 3))
    x = convnext_block(layers.Conv2D(6, 1, name="stem")(inputs), 6)
    _, small = certified(model := keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))
    rows = {r.name: r for r in keras_polar.inspect(model).rows}
    assert [rows[n].prunable for n in ("wide", "stem", "narrow")] == [24, 6, 6]
    assert small.get_layer("norm").gamma.shape == (3,)


def test_layer_scale_and_stochastic_depth_follow_their_units():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 1, name="conv")(inputs)
    x = StochasticDepth(0.3, name="depth")(LayerScale(1e-6, 8, name="scale")(x))
    model = keras.Model(inputs, layers.Conv2D(4, 1)(x))
    _, small = certified(model)
    scale = small.get_layer("scale")
    assert scale.projection_dim == 4 == scale.gamma.shape[0]
    assert small.get_layer("depth").drop_path_rate == 0.3


def test_custom_scale_layer_is_a_residual_sum():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 1, name="stem")(inputs)
    x = CustomScaleLayer(0.3, name="sum")([x, layers.Conv2D(8, 3, padding="same", name="up")(x)])
    model = keras.Model(inputs, layers.Conv2D(4, 1)(x))
    gated, small = certified(model)
    assert set(gated.groups[0].layers) == {"stem", "up"}
    assert small.get_layer("sum").scale == 0.3
    assert small.get_layer("sum").output.shape[-1] == 4


def test_saved_small_models_of_keras_applications_load_without_keras_polar(tmp_path):
    inputs = keras.Input((8, 8, 3))
    x = convnext_block(layers.Conv2D(6, 1)(inputs), 6)
    x = CustomScaleLayer(0.3)([layers.Conv2D(8, 1)(x), layers.Conv2D(8, 1)(x)])
    x = LayerScale(1e-6, 8)(layers.Conv2D(8, 1)(x))
    model = randomise(keras.Model(inputs, layers.Dense(3)(x)))
    gated = keras_polar.apply(model, 0.2, gate="static")
    close_half(gated)
    small = keras_polar.convert(gated, verify=True)
    check_loads_alone(small, tmp_path)
