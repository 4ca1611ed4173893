"""The steps of random models: what a tensor, another of its positions and a width are made into.

These are the ways in which layers meet in real models. Every other operation that the library has
a rule for is in the tables of `random_ops`.
"""

import keras
import numpy as np
from keras import layers, ops

SIZE = 4  # of every spatial axis, so that tensors can meet

ACTIVATIONS = (
    layers.ReLU, layers.ELU, layers.LeakyReLU, lambda: layers.Activation("gelu"),
    lambda: layers.Dropout(0.2),
)  # fmt: skip


def ranked(pattern, x):
    """The layer class of the tensor's rank: "Conv{}" is Conv2D for images."""
    return getattr(layers, pattern.format(f"{len(x.shape) - 2}D"))


def channels(x):
    return x.shape[-1]


def divisor(x):
    return next(g for g in (3, 2, 1) if channels(x) % g == 0)


def constant(*shape):
    return np.linspace(-1, 1.3, int(np.prod(shape)), dtype="float32").reshape(shape)


def matched(x, y):
    """`y` with as many channels as `x`."""
    return y if channels(y) == channels(x) else layers.Dense(channels(x))(y)


def space(x):
    return tuple(range(1, len(x.shape) - 1))


def back(x, like):
    """A vector, broadcastable over the positions of another tensor."""
    return ops.reshape(x, (-1, *[1] * len(space(like)), channels(x)))


def average(x):
    return ops.mean(x, axis=space(x)) if space(x) else x


def as_sequence(x):
    return layers.Reshape((int(np.prod(x.shape[1:-1])), channels(x)))(x)


def grouped(x, y, n):
    g = divisor(x)
    return ranked("Conv{}", x)(g * (1 + n // 2), 1, groups=g)(x)


def excite(x, y, n):
    s = layers.Dense(channels(x), activation="sigmoid")(layers.Dense(n)(average(y)))
    return x * back(s, x)


def residual(x, y, n):
    """Branches that can go as a whole; one of them reads another tensor, too."""
    z = layers.Dense(channels(x))(layers.Dense(n, activation="tanh")(x))
    parts = [x, z, layers.Dense(channels(x))(x * matched(x, y))][: 2 + n % 2]
    return layers.Add()(parts) if n % 3 else sum(parts)


def nested(x, y, n):
    inner = keras.Sequential([keras.Input(x.shape[1:]), layers.Dense(n), layers.ReLU()])
    return layers.Add()([inner(x), inner(ops.tanh(x))])


def nested_functional(x, y, n):
    a, b = keras.Input(x.shape[1:]), keras.Input(y.shape[1:])
    c = layers.Dense(n)(a)
    inner = keras.Model([a, b], [layers.BatchNormalization()(c), layers.Dense(n + 1)(b)])
    return layers.Concatenate()(inner([x, y]))


def shared(x, y, n):
    layer, act = layers.Dense(n), layers.PReLU(shared_axes=[*space(x)] or None)
    return act(layer(x)) - layer(ops.tanh(matched(x, y)))


def halves(x, y, n):
    at = channels(x) // 2
    if at < 1:
        return x
    return ops.concatenate([layers.Dense(n)(x[..., at:]), x[..., :at]], axis=-1)


def split(x, y, n):
    if channels(x) % 2:
        x = ops.pad(x, [(0, 0)] * (len(x.shape) - 1) + [(0, 1)])
    a, b = ops.split(x, 2, axis=-1)
    return layers.Dense(n)(a) * layers.Dense(n)(b)


def through_vector(x, y, n):
    v = layers.Dense(int(np.prod(x.shape[1:-1])) * n)(layers.Flatten()(x))
    return layers.Reshape((*x.shape[1:-1], n))(v)


def attention(x, y, n):
    """Two heads of width n, on all positions of a tensor, with keys of another."""
    shape, (x, y) = x.shape, (as_sequence(x), as_sequence(y))
    q, k, v = (
        layers.Reshape((t.shape[1], 2, n))(layers.Dense(2 * n)(t)) for t in (x, y, ops.tanh(y))
    )
    if n % 2:
        scores = ops.matmul(ops.transpose(q, (0, 2, 1, 3)), ops.transpose(k, (0, 2, 3, 1)))
        mixed = ops.matmul(ops.softmax(scores), ops.transpose(v, (0, 2, 1, 3)))
        mixed = ops.transpose(mixed, (0, 2, 1, 3))
    else:
        mixed = ops.dot_product_attention(q, k, v)
    return layers.Reshape((*shape[1:-1], 2 * n))(mixed)


def einsum(x, y, n):
    scores = ops.einsum("...ac,...bc->...ab", x, matched(x, y))
    return ops.einsum("...ab,...bc->...ac", scores, y if n % 2 else layers.Dense(n)(y))


def shuffle(x, y, n):
    g = divisor(x)
    z = ops.reshape(x, (-1, *x.shape[1:-1], g, channels(x) // g))
    return ops.reshape(ops.swapaxes(z, -1, -2), (-1, *x.shape[1:]))


def fold(x, y, n):
    """Positions as samples, and back."""
    z = layers.Dense(n)(ops.reshape(x, (-1, *x.shape[2:])))
    return ops.reshape(z, (-1, *x.shape[1:-1], n))


def channels_first(x, y, n):
    last = len(x.shape) - 1
    z = layers.Permute((last, *space(x)))(x)
    z = layers.BatchNormalization(axis=1)(z)
    if last == 3:
        z = layers.ZeroPadding2D(1, data_format="channels_first")(z)
        z = layers.Cropping2D(1, data_format="channels_first")(z)
    return layers.Permute((*range(2, last + 1), 1))(z)


def glu(x, y, n):
    return ops.glu(ops.concatenate([x, matched(x, y)], axis=-1))


def blocks(x, y, n):
    if any(size % 2 for size in x.shape[1:-1]):
        return x
    return ops.nn.depth_to_space(layers.Dense(4 * n)(ops.nn.space_to_depth(x, 2)), 2)


def to_image(x, y, n):
    return layers.Reshape((SIZE, SIZE, n))(layers.Dense(SIZE * SIZE * n)(layers.Flatten()(x)))


def resize(x, y, n):
    if set(x.shape[1:-1]) != {SIZE}:
        return x
    return ranked("Cropping{}", x)(SIZE // 2)(ranked("UpSampling{}", x)(2)(x))


def conv(x, y, n):
    return ranked("Conv{}", x)(n, 3, padding="same", activation="relu")(x)


def depthwise(x, y, n):
    layer = ranked("DepthwiseConv{}", x)
    return layer(3, padding="same", depth_multiplier=1 + n % 2)(x)


def max_pool(x, y, n):
    return ranked("MaxPooling{}", x)(2, strides=1, padding="same")(x)


def average_pool(x, y, n):
    if SIZE not in x.shape[1:2]:
        return x
    return ranked("ZeroPadding{}", x)(1)(ranked("AveragePooling{}", x)(3, strides=1)(x))


def pad_units(x, y, n):
    return ops.pad(x, [*[(0, 0)] * (len(x.shape) - 1), (1, 0)], constant_values=0.5)


def squeeze(x, y, n):
    if 1 in x.shape:
        return x
    return ops.squeeze(ops.expand_dims(x, 1), 1 if n % 2 else None)


def self_attention(x, y, n):
    layer = layers.MultiHeadAttention(n, 3, value_dim=2, output_shape=n + 1)
    return unrolled(layer(as_sequence(x), as_sequence(y)), x)


def grouped_attention(x, y, n):
    heads = {"num_query_heads": 2 * n, "num_key_value_heads": n if n % 2 else 2}
    layer = layers.GroupQueryAttention(2, **heads)
    return unrolled(layer(as_sequence(x), as_sequence(matched(x, y))), x)


def recurrent(x, y, n):
    kind = (layers.LSTM, layers.GRU, layers.SimpleRNN)[n % 3]
    return unrolled(kind(n, return_sequences=True)(as_sequence(x)), x)


def bidirectional(x, y, n):
    layer = layers.Bidirectional(layers.GRU(n), merge_mode=("concat", "sum")[n % 2])
    return layer(as_sequence(y))


def luong(x, y, n):
    return unrolled(layers.Attention()([as_sequence(x), as_sequence(matched(x, y))]), x)


def einsum_dense(x, y, n):
    if n % 2:
        return layers.EinsumDense("...c,cd->...d", n, activation="tanh", bias_axes="d")(x)
    z = as_sequence(x)
    heads = layers.EinsumDense("btc,cnd->btnd", (z.shape[1], n, 2), bias_axes="nd")(z)
    return unrolled(layers.EinsumDense("btnd,ndc->btc", (z.shape[1], n))(heads), x)


def unrolled(z, x):
    """A sequence in the shape of the image that it was made of."""
    return layers.Reshape((*x.shape[1:-1], z.shape[-1]))(z)


def per_step(x, y, n):
    """A layer, or a model, for each place along the first axis of positions."""
    if n % 2 == 0:
        return layers.TimeDistributed(layers.Dense(n, activation="tanh"))(x)
    inputs = keras.Input(x.shape[2:])
    z = layers.Dense(channels(x))(layers.Dense(n, activation="relu")(inputs))
    return layers.TimeDistributed(keras.Model(inputs, inputs + z))(x)


# Ranks without the batch axis.
ANY, SPATIAL, PLANE, IMAGE = (1, 2, 3, 4), (2, 3, 4), (2, 3), (3,)
IMAGES, VOLUME = (3, 4), (4,)

STEPS = {
    "conv": (SPATIAL, conv),
    "grouped": (SPATIAL, grouped),
    "depthwise": (PLANE, depthwise),
    "separable": (PLANE, lambda x, y, n: ranked("SeparableConv{}", x)(n, 3, padding="same")(x)),
    "transposed": (SPATIAL, lambda x, y, n: ranked("Conv{}Transpose", x)(n, 3, padding="same")(x)),
    "dense": (ANY, lambda x, y, n: layers.Dense(n, activation="gelu")(x)),
    "linear": (ANY, lambda x, y, n: layers.Dense(n, use_bias=False)(x)),
    "batch_norm": (ANY, lambda x, y, n: layers.BatchNormalization()(x)),
    "group_norm": (SPATIAL, lambda x, y, n: layers.GroupNormalization(divisor(x))(x)),
    "layer_norm": (ANY, lambda x, y, n: layers.Dense(n)(layers.LayerNormalization()(x))),
    "prelu": (ANY, lambda x, y, n: layers.PReLU()(x)),
    "activation": (ANY, lambda x, y, n: ACTIVATIONS[n % len(ACTIVATIONS)]()(x)),
    "spatial_dropout": (SPATIAL, lambda x, y, n: ranked("SpatialDropout{}", x)(0.3)(x)),
    "max_pool": (SPATIAL, max_pool),
    "average_pool": (SPATIAL, average_pool),
    "resize": (SPATIAL, resize),
    "resizing": (IMAGE, lambda x, y, n: layers.Resizing(*x.shape[1:3])(layers.Resizing(5, 7)(x))),
    "permute": (IMAGE, lambda x, y, n: layers.Permute((2, 1, 3))(x)),
    "channels_first": (SPATIAL, channels_first),
    "as_sequence": (SPATIAL, lambda x, y, n: as_sequence(x)),
    "to_image": (ANY, to_image),
    "through_vector": (ANY, through_vector),
    "flatten": (SPATIAL, lambda x, y, n: layers.Dense(n)(layers.Flatten()(x))),
    "global_pool": (SPATIAL, lambda x, y, n: ranked("GlobalMaxPooling{}", x)()(x)),
    "fold": (SPATIAL, fold),
    "blocks": (IMAGE, blocks),
    "add": (ANY, lambda x, y, n: layers.Add()([x, matched(x, y)])),
    "subtract": (ANY, lambda x, y, n: x - matched(x, y)),
    "multiply": (ANY, lambda x, y, n: ops.multiply(x, matched(x, y))),
    "maximum": (ANY, lambda x, y, n: layers.Maximum()([x, matched(x, y)])),
    "where": (ANY, lambda x, y, n: ops.where(x > 0.1, x, matched(x, y))),
    "concat": (ANY, lambda x, y, n: layers.Concatenate()([x, y])),
    "stack": (ANY, lambda x, y, n: ops.max(ops.stack([x, matched(x, y)], axis=-1), axis=-1)),
    "excite": (ANY, excite),
    "attend": (ANY, lambda x, y, n: x * layers.Dense(1)(y)),
    "attention": (SPATIAL, attention),
    "einsum": (SPATIAL, einsum),
    "self_attention": (SPATIAL, self_attention),
    "grouped_attention": (SPATIAL, grouped_attention),
    "recurrent": (SPATIAL, recurrent),
    "bidirectional": (SPATIAL, bidirectional),
    "luong": (SPATIAL, luong),
    "einsum_dense": (SPATIAL, einsum_dense),
    "per_step": (SPATIAL, per_step),
    "nested": (ANY, nested),
    "residual": (ANY, residual),
    "nested_functional": (ANY, nested_functional),
    "shared": (ANY, shared),
    "halves": (ANY, halves),
    "split": (ANY, split),
    "shuffle": (ANY, shuffle),
    "glu": (ANY, glu),
    "constants": (ANY, lambda x, y, n: 1.0 - x * constant(channels(x))),
    "clip": (ANY, lambda x, y, n: ops.clip(x, -0.5, 0.5 + np.abs(constant(channels(x))))),
    "take": (ANY, lambda x, y, n: ops.take(x, np.arange(n + 1) * 3 % channels(x), axis=-1)),
    "repeat": (ANY, lambda x, y, n: ops.repeat(x, 2, axis=-1) if channels(x) < 12 else x),
    "pad_units": (ANY, pad_units),
    "flip": (ANY, lambda x, y, n: ops.flip(x, -1)),
    "roll": (SPATIAL, lambda x, y, n: ops.roll(x, n, axis=1)),
    "squeeze": (ANY, squeeze),
    "normalize": (ANY, lambda x, y, n: ops.normalize(x, axis=-1)),
    "matmul": (ANY, lambda x, y, n: ops.matmul(x, constant(channels(x), n))),
    "mean": (SPATIAL, lambda x, y, n: x + ops.mean(x, axis=space(x), keepdims=True)),
    "sum_units": (ANY, lambda x, y, n: x + 0.1 * ops.sum(y, axis=-1, keepdims=True)),
    "mean_units": (ANY, lambda x, y, n: x + ops.mean(y, axis=-1, keepdims=True)),
    "cumsum": (SPATIAL, lambda x, y, n: 0.3 * ops.cumsum(x, axis=1)),
    "softmax": (ANY, lambda x, y, n: layers.Softmax()(x)),
    "sort": (ANY, lambda x, y, n: ops.sort(x, axis=1)),
}  # fmt: skip
