"""The certificate: gated in inference mode == converted, and cost predicted == cost counted."""

import keras
import numpy as np
import pytest
from helpers import check, check_loads_alone, close_half, randomise, small_resnet
from keras import layers, ops

import keras_polar


def body(*steps, shape=(8, 8, 4), head=True):
    """A functional model of steps (layers or functions), ended by a Dense head."""
    inputs = x = keras.Input(shape)
    for step in steps:
        x = step(x)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)) if head else x)


def residual(*branch):
    def apply(x):
        y = x
        for step in branch:
            y = step(y)
        return layers.Add()([x, y])

    return apply


CONV = {"padding": "same"}
CASES = {
    "conv_bn": lambda: body(
        layers.Conv2D(8, 3), layers.BatchNormalization(), layers.ReLU(), layers.Conv2D(6, 3)
    ),
    "conv1d": lambda: body(
        layers.Conv1D(8, 3), layers.MaxPooling1D(2), layers.Conv1D(6, 3), shape=(16, 3)
    ),
    "conv3d": lambda: body(
        layers.Conv3D(8, 3), layers.AveragePooling3D(2), layers.Conv3D(6, 1), shape=(6, 6, 6, 2)
    ),
    "transposed": lambda: body(
        layers.Conv2DTranspose(8, 3, strides=2, activation="relu"),
        layers.Conv2DTranspose(6, 3),
        layers.Cropping2D(2),
    ),
    "transposed1d": lambda: body(
        layers.Conv1DTranspose(8, 3), layers.UpSampling1D(2), layers.ZeroPadding1D(1),
        layers.Conv1D(5, 2), shape=(8, 3),
    ),
    "transposed3d": lambda: body(
        layers.Conv3DTranspose(6, 2), layers.GlobalAveragePooling3D(keepdims=True),
        layers.Conv3D(5, 1), shape=(3, 3, 3, 2),
    ),
    "depthwise": lambda: body(
        layers.Conv2D(8, 1), layers.DepthwiseConv2D(3, depth_multiplier=2, activation="elu"),
        layers.Conv2D(5, 1),
    ),
    "depthwise1d": lambda: body(
        layers.Conv1D(8, 1), layers.DepthwiseConv1D(3), layers.Conv1D(5, 1), shape=(9, 3)
    ),
    "separable": lambda: body(
        layers.SeparableConv2D(8, 3, depth_multiplier=2), layers.SeparableConv2D(6, 3)
    ),
    "separable1d": lambda: body(
        layers.SeparableConv1D(8, 3), layers.SeparableConv1D(6, 3), shape=(12, 3)
    ),
    "grouped_many": lambda: body(
        layers.Conv2D(12, 1), layers.Conv2D(12, 3, groups=6), layers.Conv2D(5, 1)
    ),
    "grouped_few": lambda: body(
        layers.Conv2D(12, 1), layers.Conv2D(8, 3, groups=2), layers.Conv2D(5, 1)
    ),
    "grouped_input": lambda: body(layers.Conv2D(8, 3, groups=2), layers.Conv2D(5, 1)),
    "dense_rank3": lambda: body(
        layers.Dense(8, activation="gelu"), layers.Dense(6), shape=(5, 3)
    ),
    "dense_to_image": lambda: body(
        layers.Dense(4 * 4 * 6), layers.Reshape((4, 4, 6)), layers.UpSampling2D(2),
        layers.Conv2D(5, 3), shape=(7,),
    ),
    "rectangle": lambda: body(
        layers.Dense(12), layers.Reshape((3, 4)), layers.Permute((2, 1)), shape=(7,)
    ),
    "repeat_vector": lambda: body(
        layers.Dense(6), layers.RepeatVector(3), layers.Conv1D(5, 2), shape=(7,)
    ),
    "group_norm": lambda: body(
        layers.Conv2D(12, 1), layers.GroupNormalization(6), layers.Conv2D(5, 1)
    ),
    "instance_norm": lambda: body(
        layers.Conv2D(12, 1), layers.GroupNormalization(-1), layers.Conv2D(5, 1)
    ),
    "layer_norm_inside": lambda: body(
        layers.LayerNormalization(), layers.Dense(8, activation="silu"), layers.Dense(6),
        shape=(5, 3),
    ),
    "prelu": lambda: body(
        layers.Conv2D(8, 1), layers.PReLU(shared_axes=[1, 2]), layers.Conv2D(6, 1), layers.PReLU()
    ),
    "activations": lambda: body(
        layers.Conv2D(8, 1), layers.LeakyReLU(), layers.ELU(), layers.Activation("swish"),
        layers.ReLU(6.0), ops.sigmoid, layers.Conv2D(6, 1),
    ),
    "dropout": lambda: body(
        layers.Conv2D(8, 1), layers.SpatialDropout2D(0.5), layers.GaussianNoise(0.5),
        layers.Dropout(0.5), layers.Conv2D(6, 1),
    ),
    "residual": lambda: body(
        layers.Conv2D(8, 1), residual(layers.Conv2D(8, 3, **CONV), layers.BatchNormalization()),
        residual(layers.Conv2D(5, 1), layers.Conv2D(8, 1)), layers.Conv2D(4, 1),
    ),
    "squeeze_excite": lambda: body(
        layers.Conv2D(8, 1),
        lambda x: x
        * layers.Conv2D(8, 1, activation="sigmoid")(
            layers.Conv2D(4, 1, activation="relu")(layers.GlobalAveragePooling2D(keepdims=True)(x))
        ),
        layers.Conv2D(4, 1),
    ),
    "spatial_attention": lambda: body(
        layers.Conv2D(8, 1), lambda x: x * layers.Conv2D(1, 3, **CONV)(x), layers.Conv2D(4, 1)
    ),
    "merges": lambda: body(
        lambda x: [layers.Conv2D(8, 1)(x) for _ in range(4)],
        lambda xs: layers.Subtract()([layers.Average()(xs), layers.Maximum()(xs[:2])]),
        lambda x: layers.Minimum()([x, layers.Multiply()([x, x])]),
        layers.Conv2D(4, 1),
    ),
    "dense_block": lambda: body(
        layers.Conv2D(6, 1), lambda x: ops.concatenate([x, layers.Conv2D(4, 1)(x)], axis=-1),
        layers.BatchNormalization(), layers.ReLU(),
        lambda x: layers.Concatenate()([x, layers.Conv2D(4, 1)(x)]), layers.Conv2D(5, 1),
    ),
    "constants": lambda: body(
        layers.Conv2D(8, 1), lambda x: x * np.arange(1.0, 9.0, dtype="float32") + 0.5,
        lambda x: 2.0 - x / 3.0, layers.Conv2D(5, 1),
    ),
    "ops_movement": lambda: body(
        layers.Conv2D(8, 1), lambda x: ops.transpose(x, (0, 2, 1, 3)),
        lambda x: ops.reshape(x, (-1, 64, 8)), lambda x: ops.expand_dims(x, 1),
        lambda x: ops.squeeze(x, 1), lambda x: ops.flip(x, 2), layers.Conv1D(5, 2),
    ),
    "ops_split": lambda: body(
        layers.Conv2D(12, 1), lambda x: ops.split(x, 3, axis=-1),
        lambda xs: layers.Conv2D(6, 1)(xs[0]) + layers.Conv2D(6, 1)(xs[1] * xs[2]),
        layers.Conv2D(5, 1),
    ),
    "ops_getitem": lambda: body(
        layers.Conv2D(12, 1),
        lambda x: layers.Conv2D(6, 1)(x[..., :5]) * layers.Conv2D(6, 1)(x[..., 5:]),
        lambda x: x[:, 1:-1, ::2], layers.Conv2D(5, 1),
    ),
    "ops_pad": lambda: body(
        layers.Conv2D(8, 1), lambda x: ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 3))),
        layers.Conv2D(5, 1),
    ),
    "ops_reduce": lambda: body(
        layers.Conv2D(8, 1), lambda x: ops.mean(x, axis=(1, 2)), layers.Dense(7),
        lambda x: x + ops.sum(x, axis=-1, keepdims=True), layers.Dense(6),
    ),
    "mean_over_units": lambda: body(
        layers.Conv2D(8, 1), layers.Conv2D(6, 1), lambda x: ops.mean(x, axis=-1, keepdims=True)
    ),
    "units_beside_nobody": lambda: body(
        lambda x: ops.concatenate([layers.Dense(4)(x), x], axis=1), layers.Dense(5), shape=(3, 4),
    ),
    "channels_first": lambda: body(
        layers.Permute((3, 1, 2)),
        layers.ZeroPadding2D(1, data_format="channels_first"),
        layers.Permute((2, 3, 1)), layers.Conv2D(8, 1), layers.Permute((3, 1, 2)),
        layers.BatchNormalization(axis=1), layers.Flatten(data_format="channels_first"),
        layers.Dense(5),
    ),
    "unknown_size": lambda: body(
        layers.Conv2D(8, 3), layers.ReLU(), layers.Conv2D(6, 3), layers.GlobalMaxPooling2D(),
        shape=(None, None, 3),
    ),
    "softmax_inside": lambda: body(
        layers.Conv2D(8, 1), layers.Conv2D(6, 1), layers.Softmax(), layers.Conv2D(5, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_one_construct(case, seed):
    model = CASES[case]()
    check(randomise(model), gate=("static", "dynamic")[seed], seed=seed)


def test_nested_shared_multiple_inputs_and_outputs():
    inner = keras.Sequential(
        [keras.Input((8, 8, 4)), layers.Conv2D(6, 3, name="conv"), layers.ReLU()]
    )
    a, b = keras.Input((8, 8, 4), name="a"), keras.Input((8, 8, 4), name="b")
    conv = layers.Conv2D(4, 3, padding="same", name="conv")
    x, y = inner(conv(a)), inner(conv(b))
    outputs = {
        "sum": layers.Dense(3, name="sum")(layers.Flatten()(x + y)),
        "both": layers.Dense(2, name="both")(
            layers.GlobalAveragePooling2D()(layers.Concatenate()([x, y]))
        ),
    }
    model = keras.Model({"a": a, "b": b}, outputs)
    _, small = check(randomise(model))
    assert set(small.output) == {"sum", "both"}
    assert {x.name for x in small.inputs} == {"a", "b"}


def test_frozen_backbone_keeps_its_inference_mode_and_flags():
    backbone = small_resnet()
    backbone.trainable = False
    x = keras.Input((8, 8, 1))
    model = keras.Model(x, layers.Dense(2)(layers.Dense(6)(backbone(x, training=False))))
    gated, small = check(randomise(model))
    assert not gated.get_layer("stem").trainable
    assert not small.get_layer("stem").trainable


@pytest.mark.slow
def test_saved_small_model_loads_without_keras_polar(tmp_path):
    model = randomise(keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3)))
    gated = keras_polar.apply(model, gate="static")
    close_half(gated)
    small = keras_polar.convert(gated, verify=True)
    check_loads_alone(small, tmp_path)


def test_wrong_user_rule_is_caught():
    class Swapped(layers.Dense):
        pass

    class WrongRule(keras_polar.Rule):
        def flow(self, site):
            site.read("in", -1)
            return [site.produce("out", site.op.units, -1)]

        def weights(self, op):
            return {"kernel": ("out", "in"), "bias": ("out",)}

        def config(self, site, kept):
            return {"units": kept.count(site.axes["out"])}

    keras_polar.register(Swapped, WrongRule())
    model = body(Swapped(8, name="swapped"), layers.Dense(8), shape=(8,))
    gated = keras_polar.apply(model, gate="static")
    gated.groups[0].set_mask(np.arange(8) < 3)
    gated.settle()
    with pytest.raises(ValueError, match="swapped"):
        keras_polar.convert(gated, verify=True)


def test_a_rule_that_fits_in_shape_but_not_in_function_is_caught_at_its_layer():
    class Reversed(layers.Dense):
        """Its units come out in the opposite order."""

        def call(self, x, training=None):
            return ops.flip(super().call(x), -1)

    keras_polar.register(Reversed, like=layers.Dense)
    model = randomise(
        body(layers.Dense(7, name="a"), Reversed(8, name="reversed"), layers.Dense(6), shape=(8,))
    )
    gated = keras_polar.apply(model, gate="static")
    close_half(gated)
    with pytest.raises(ValueError, match=r"first layer that differs is 'reversed' \(Reversed\)"):
        keras_polar.convert(gated, verify=True)


def test_random_inputs_that_a_model_with_open_sizes_cannot_take_are_told_apart_from_the_users():
    inputs = keras.Input((None, 4))
    x = layers.Conv1D(8, 3)(layers.Conv1D(8, 41, activation="relu")(inputs))
    gated = keras_polar.apply(keras.Model(inputs, layers.Dense(2)(x)), 0.1, gate="static")
    gated.settle()
    told = (
        r"random inputs of shapes \[\(5, 32, 4\)\]: sizes that it leaves open.* are 32 .*verify=x"
    )
    with pytest.raises(ValueError, match=told):
        keras_polar.convert(gated, verify=True)
    keras_polar.convert(gated, verify=np.ones((3, 60, 4), "float32"))
