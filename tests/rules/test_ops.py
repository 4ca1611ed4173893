"""Operations of `keras.ops` and small layers: the certificate, and how many units can go."""

import keras
import numpy as np
import pytest
from helpers import check, randomise
from keras import layers, ops

import keras_polar
from keras_polar.gates.gate import DynamicGate, Gate

RNG = np.random.default_rng(0)


def constant(*shape):
    return RNG.standard_normal(shape).astype("float32")


def heads(x, n):
    return ops.transpose(ops.reshape(x, (-1, x.shape[1], n, x.shape[2] // n)), (0, 2, 1, 3))


def attention(n=2, width=12, values=12, product=ops.matmul):
    """Attention by hand, as in many a notebook."""

    def apply(x):
        q, k = (heads(layers.Dense(width, name=name)(x), n) for name in ("query", "key"))
        v = heads(layers.Dense(values, name="value")(x), n)
        scores = product(q, ops.transpose(k, (0, 1, 3, 2))) / np.sqrt(width / n)
        mixed = product(ops.softmax(scores), v)
        mixed = ops.reshape(ops.transpose(mixed, (0, 2, 1, 3)), (-1, x.shape[1], values))
        return layers.Dense(5, name="out")(mixed)

    return apply


def einsum_attention(x):
    q, k, v = (ops.reshape(layers.Dense(12)(x), (-1, x.shape[1], 2, 6)) for _ in range(3))
    scores = ops.softmax(ops.einsum("bqhd,bkhd->bhqk", q, k))
    mixed = ops.einsum("bhqk,bkhd->bqhd", scores, v)
    return layers.Dense(5)(ops.reshape(mixed, (-1, x.shape[1], 12)))


def op_attention(n, width, **kwargs):
    def apply(x):
        q, k, v = (ops.reshape(layers.Dense(n * width)(x), (-1, 6, n, width)) for _ in range(3))
        y = ops.dot_product_attention(q, k, v, **kwargs)
        return layers.Dense(5)(ops.reshape(y, (-1, 6, n * width)))

    return apply


def windows(x):
    """Dense on windows that are samples of their own for a while."""
    y = ops.reshape(layers.Dense(8)(x), (-1, 2, 3, 8))
    y = layers.Dense(7)(ops.reshape(y, (-1, 3, 8)))
    return layers.Dense(5)(ops.reshape(y, (-1, 6, 7)))


def shuffle(x):
    x = layers.Dense(8)(x)
    x = ops.reshape(ops.swapaxes(ops.reshape(x, (-1, 6, 2, 4)), 2, 3), (-1, 6, 8))
    return layers.Dense(5)(x)


D8 = layers.Dense


def dense(*steps, shape=(6, 4), last=5):
    """Dense(8), the steps, Dense(last) and a head; the first 8 units are what is asked about."""

    def make():
        inputs = x = keras.Input(shape)
        x = layers.Dense(8, activation="tanh", name="first")(x)
        for step in steps:
            x = step(x)
        x = layers.Dense(last)(x)
        return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))

    return make


def whole(*steps, shape=(6, 4)):
    def make():
        inputs = x = keras.Input(shape)
        for step in steps:
            x = step(x)
        return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))

    return make


def halved(x):
    """Two heads."""
    return ops.reshape(x, (-1, 6, 2, 4))


IMAGE = (6, 6, 3)
# name: (model, how many units can go)
CASES = {
    "attention": (whole(attention()), 12 * 3 + 5),
    "attention_more_heads_than_width": (whole(attention(n=6)), 12 * 3 + 5),
    "attention_other_value_width": (whole(attention(values=8)), 12 * 2 + 8 + 5),
    "einsum_attention": (whole(einsum_attention), 12 * 3 + 5),
    "op_attention_widths": (whole(op_attention(2, 6)), 12 * 3 + 5),
    "op_attention_heads": (whole(op_attention(6, 2, is_causal=True)), 12 * 3 + 5),
    "op_attention_bias": (whole(op_attention(2, 6, bias=constant(1, 2, 6, 6))), 12 * 3 + 5),
    "op_attention_scaled": (whole(op_attention(2, 6, scale=0.3)), 12 * 3 + 5),
    "windows": (whole(windows), 8 + 7 + 5),
    "channel_shuffle": (whole(shuffle), 8 + 5),
    "matmul_constant": (dense(lambda x: ops.matmul(x, constant(8, 7))), 8 + 5),
    "matmul_constant_left": (dense(lambda x: ops.matmul(constant(9, 6), x)), 8 + 5),
    "matmul_vector": (dense(lambda x: ops.matmul(x, constant(8)), lambda x: x[..., None]), 8 + 5),
    "matmul_gram": (dense(lambda x: ops.matmul(x, ops.transpose(x, (0, 2, 1)))), 8 + 5),
    "matmul_free": (dense(lambda x: ops.matmul(ops.softmax(constant(1, 6, 6)), x)), 8 + 5),
    "einsum_constant": (dense(lambda x: ops.einsum("btc,cd->btd", x, constant(8, 7))), 8 + 5),
    "einsum_dots": (dense(lambda x: ops.einsum("...c,dc->...d", x, constant(7, 8))), 8 + 5),
    "einsum_scale": (dense(lambda x: ops.einsum("btc,c->btc", x, constant(8))), 8 + 5),
    "einsum_one": (dense(lambda x: ops.einsum("btc->bct", x), layers.Permute((2, 1))), 8 + 5),
    "einsum_sum": (dense(lambda x: ops.einsum("btc->bt", x), lambda x: x[..., None]), 8 + 5),
    "dot_constant": (dense(lambda x: ops.dot(x, constant(8, 7))), 8 + 5),
    "tensordot_constant": (dense(lambda x: ops.tensordot(x, constant(8, 7), axes=1)), 8 + 5),
    "inner_constant": (dense(lambda x: ops.inner(x, constant(7, 8))), 8 + 5),
    "dot_layer": (
        dense(lambda x: layers.Dot(axes=(2, 2))([x, layers.Dense(8)(ops.tanh(x))])), 16 + 5,
    ),
    "dot_layer_normalised": (
        dense(
            layers.GlobalAveragePooling1D(),
            lambda x: layers.Dot(axes=-1, normalize=True)([x, layers.Dense(8)(ops.tanh(x))]),
        ),
        16 + 5,
    ),
    "outer_products": (
        whole(lambda x: ops.einsum("btc,btd->btcd", layers.Dense(8)(x), layers.Dense(7)(x))), 8,
    ),
    "where": (dense(lambda x: ops.where(x > 0, x, 0.1 * ops.square(x))), 8 + 5),
    "where_constant": (dense(lambda x: ops.where(x > constant(8), x, constant(8))), 8 + 5),
    "logical": (
        dense(
            lambda x: ops.where(ops.logical_and(x > -1, ops.logical_not(x > 1)), x, -x),
            lambda x: x * ops.cast(ops.not_equal(x, 0.0), "float32"),
        ),
        8 + 5,
    ),
    "any": (
        dense(lambda x: x * ops.cast(ops.any(x > 0.5, axis=-1, keepdims=True), "float32")), 8 + 5,
    ),
    "clip_vector": (dense(lambda x: ops.clip(x, -abs(constant(8)), 1.0)), 8 + 5),
    "cumsum": (dense(lambda x: ops.cumsum(x, axis=1)), 8 + 5),
    "cumsum_over_units": (dense(lambda x: ops.cumsum(x, axis=-1)), 5),
    "sort": (dense(lambda x: ops.sort(x, axis=1)), 8 + 5),
    "top_k": (dense(lambda x: ops.top_k(x, 3)[0]), 5),
    "argmax": (
        dense(lambda x: ops.cast(ops.argmax(x, axis=1, keepdims=True), "float32")), 8 + 5,
    ),
    "logsumexp": (dense(lambda x: ops.logsumexp(x, axis=1, keepdims=True)), 8 + 5),
    # Unit 0 is taken twice, alone: not interchangeable with the others.
    "take": (dense(lambda x: ops.take(x, [5, 0, 0, -1, 3], axis=-1)), 8 - 1 + 5),
    "repeat_then_mean": (
        dense(lambda x: ops.mean(ops.repeat(x, 2, axis=-1), axis=1), layers.RepeatVector(2)), 13,
    ),
    "take_positions": (dense(lambda x: ops.take(x, [[0, 1], [2, 3]], axis=1)), 8 + 5),
    "take_one": (dense(lambda x: ops.take(x, 3, axis=-1), lambda x: x[..., None]), 5),
    "squeeze_all": (dense(lambda x: ops.squeeze(x[:, :1])), 8 + 5),
    "unstack": (dense(lambda x: sum(ops.unstack(x, axis=1))), 8 + 5),
    "roll": (dense(lambda x: ops.roll(x, 2, axis=1)), 8 + 5),
    "rot90": (dense(lambda x: ops.rot90(x, axes=(1, 2)), layers.Permute((2, 1))), 8 + 5),
    "hsplit": (dense(lambda x: ops.concatenate(ops.hsplit(x, 2), axis=-1)), 8 + 5),
    "array_split": (
        dense(lambda x: ops.hstack([layers.Dense(3)(p) for p in ops.array_split(x, 4, 1)])),
        8 + 4 * 3 + 5,
    ),
    "split_at": (
        dense(lambda x: ops.concatenate([layers.Dense(4)(p) for p in ops.split(x, [3], -1)], 1)),
        8 + 2 * 4 + 5,
    ),
    "append": (dense(lambda x: ops.append(x, layers.Dense(4)(x), axis=-1)), 8 + 4 + 5),
    "mean_over_heads": (dense(lambda x: ops.mean(halved(x), axis=2)), 8 + 5),
    "mean_within_heads": (dense(lambda x: ops.mean(halved(x), axis=3)), 8 + 5),
    "sum_within_heads": (dense(lambda x: ops.sum(halved(x), axis=3)), 8 + 5),
    "softmax_over_heads": (
        dense(lambda x: ops.reshape(ops.softmax(halved(x), axis=2), (-1, 6, 8))), 8 + 5,
    ),
    "layer_norm_within_heads": (
        dense(lambda x: ops.reshape(layers.LayerNormalization()(halved(x)), (-1, 6, 8))), 8 + 5,
    ),
    "batch_norm_of_positions": (
        dense(
            layers.BatchNormalization(axis=1),
            lambda x: ops.batch_normalization(x, constant(6), 1 + constant(6) ** 2, 1),
        ),
        8 + 5,
    ),
    "normalize": (dense(lambda x: ops.normalize(x, axis=-1)), 8 + 5),
    "unit_normalization": (dense(layers.UnitNormalization()), 8 + 5),
    "norm": (dense(lambda x: x * ops.norm(x, axis=-1, keepdims=True)), 8 + 5),
    "layer_norm_op": (dense(lambda x: ops.layer_normalization(x, constant(8), constant(8))), 8 + 5),
    "layer_norm_positions": (dense(lambda x: ops.layer_normalization(x, axis=1)), 8 + 5),
    "batch_norm_op": (
        dense(
            lambda x: ops.batch_normalization(
                x, constant(8), 1 + constant(8) ** 2, -1, constant(8), constant(8)
            )
        ),
        8 + 5,
    ),
    "moments": (
        dense(lambda x: x - ops.moments(x, axes=[1], keepdims=True)[0]), 8 + 5,
    ),
    "glu": (dense(lambda x: ops.glu(x)), 8 + 5),
    "sparsemax": (dense(lambda x: ops.sparsemax(x, axis=-1)), 5),
    "average": (
        dense(lambda x: ops.average(x, axis=1, weights=constant(6)), layers.RepeatVector(2)), 13,
    ),
    "masking_inside": (dense(layers.Masking(), layers.GlobalAveragePooling1D()), 5),
    "tril": (dense(lambda x: ops.tril(x)), 5),
    "conv_op": (dense(lambda x: ops.conv(x, constant(3, 3, 8, 7)), shape=IMAGE), 8 + 5),
    "depthwise_op": (dense(lambda x: ops.depthwise_conv(x, constant(3, 3, 8, 2)), shape=IMAGE), 13),
    "separable_op": (
        dense(
            lambda x: ops.separable_conv(x, constant(3, 3, 8, 2), constant(1, 1, 16, 7)),
            shape=IMAGE,
        ),
        8 + 5,
    ),
    "pool_ops": (
        dense(
            lambda x: ops.max_pool(x, 2, 1) + ops.average_pool(x, 2, 1),
            shape=IMAGE,
        ),
        8 + 5,
    ),
    "image_ops": (
        dense(
            lambda x: ops.image.resize(x, (9, 7)), lambda x: ops.image.pad_images(x, 1, 1, 1, 1),
            lambda x: ops.image.crop_images(x, 2, 1, 1, 1), shape=IMAGE,
        ),
        8 + 5,
    ),
    "image_layers": (
        dense(
            layers.Resizing(8, 8), layers.CenterCrop(6, 6), layers.RandomFlip(),
            layers.RandomRotation(0.1), layers.AdaptiveAveragePooling2D(3), shape=IMAGE,
        ),
        8 + 5,
    ),
    "space_to_depth": (dense(lambda x: ops.nn.space_to_depth(x, 2), shape=IMAGE), 8 + 5),
    "depth_to_space": (dense(lambda x: ops.nn.depth_to_space(x, 2), shape=IMAGE), 8 + 5),
    "space_to_depth_by_hand": (
        dense(
            lambda x: ops.transpose(ops.reshape(x, (-1, 3, 2, 3, 2, 8)), (0, 1, 3, 2, 4, 5)),
            lambda x: ops.reshape(x, (-1, 3, 3, 32)), shape=IMAGE,
        ),
        8 + 5,
    ),
    "patches": (dense(lambda x: ops.image.extract_patches(x, 2), shape=IMAGE), 8 + 5),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_operation(case):
    make, prunable = CASES[case]
    model = randomise(make())
    rows = keras_polar.inspect(model).rows
    assert sum(r.prunable for r in rows) == prunable
    assert all(r.reason for r in rows if r.prunable < r.units)
    check(model, gate="dynamic")


def test_a_shared_layer_without_weights_meets_tensors_of_different_widths():
    x = keras.Input((6, 6, 3))
    pool, squash = layers.MaxPooling2D(2), layers.Activation("tanh")
    reshape = layers.Reshape((9, -1))
    a, b = (reshape(squash(pool(layers.Conv2D(n, 1)(x)))) for n in (8, 5))
    y = layers.Concatenate()([layers.Dense(4)(a), layers.Dense(4)(b)])
    check(randomise(keras.Model(x, layers.Dense(2)(y))))


def test_a_shared_reshape_is_cut_differently_in_each_call():
    x = keras.Input((4,))
    reshape = layers.Reshape((2, 3))
    y = [layers.Dense(4)(reshape(layers.Dense(6, name=n)(x))) for n in ("a", "b")]
    model = randomise(keras.Model(x, layers.Dense(2)(layers.Flatten()(y[0] * y[1]))))
    small = keras_polar.remove(model, {"a": [0], "b": [1, 2]})
    assert small.get_layer("a").units < 6


def test_units_before_an_axis_of_unknown_size_are_not_followed_through_a_reshape():
    x = keras.Input((None, 4))
    y = layers.Permute((2, 1))(layers.Dense(8, name="first")(x))
    y = layers.Dense(5)(ops.reshape(y, (-1, 8)))
    row = keras_polar.inspect(keras.Model(x, y)).rows[0]
    assert row.prunable == 0
    assert "unknown size" in row.reason


ON_SAMPLES = {
    "flatten": (layers.Flatten(), True),
    "permute": (layers.Permute((2, 1)), True),
    "flip_of_units": (lambda x: ops.flip(x, -1), True),
    "flip_of_samples": (lambda x: ops.flip(x, 0), False),
    "flipud": (ops.flipud, False),
    "roll_of_positions": (lambda x: ops.roll(x, 2, axis=1), True),
    "roll_of_samples": (lambda x: ops.roll(x, 2, axis=0), False),
    "roll_of_all": (lambda x: ops.roll(x, 2), False),
    "twice_along_units": (lambda x: ops.concatenate([x, x], -1), True),
    "twice_as_many_samples": (lambda x: layers.Concatenate(axis=0)([x, x]), False),
    "stack_of_positions": (lambda x: ops.stack([x[:, 0], x[:, 1]], 1), True),
    "half_of_the_samples": (lambda x: ops.split(x, 2, axis=0)[0], False),
    "padded_positions": (lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 0))), True),
    "padded_batch": (lambda x: ops.pad(x, ((1, 0), (0, 0), (0, 0))), False),
    "first_samples": (lambda x: x[:2, :], False),
    "picked_samples": (lambda x: ops.take(x, [0, 1], axis=0), False),
    "sums_over_samples": (lambda x: ops.cumsum(x, axis=-3), False),
    "positions_as_samples": (lambda x: ops.reshape(x, (-1, 8)), False),
}


@pytest.mark.parametrize("case", ON_SAMPLES)
def test_gates_decide_per_sample_only_where_rows_are_samples(case):
    step, is_dynamic = ON_SAMPLES[case]
    inputs = keras.Input((6, 4))
    x = layers.Dense(9, name="behind")(step(layers.Dense(8, name="first")(inputs)))
    gated = keras_polar.apply(keras.Model(inputs, layers.Dense(2)(x)), 0.1, gate="dynamic")
    kinds = {g.name: type(g) for g in gated.layers if isinstance(g, Gate) and "behind" in g.name}
    assert [issubclass(k, DynamicGate) for k in kinds.values()] == [is_dynamic]


@pytest.mark.parametrize("gate", ["static", "dynamic"])
@pytest.mark.parametrize("case", ["windows", "attention", "outer_products"])
def test_gated_training_step_runs(case, gate):
    model = CASES[case][0]()
    gated = keras_polar.apply(model, 0.3, gate=gate)
    gated.compile("sgd", "mse")
    x = constant(8, 6, 4)
    loss = gated.fit(x, constant(8, 3), batch_size=4, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(loss).all()
