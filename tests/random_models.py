"""Random functional models, as programs that Hypothesis can shrink."""

import keras
import numpy as np
from hypothesis import strategies as st
from keras import layers, ops

SIZE = 4  # spatial size of every tensor, so that any two can meet


def conv(x, y, n):
    return layers.Conv2D(n, 3, padding="same", activation="relu")(x)


def grouped(x, y, n):
    groups = next(g for g in (3, 2, 1) if x.shape[-1] % g == 0)
    return layers.Conv2D(groups * (1 + n // 2), 1, groups=groups)(x)


def group_norm(x, y, n):
    groups = next(g for g in (3, 2, 1) if x.shape[-1] % g == 0)
    return layers.GroupNormalization(groups)(x)


def matched(x, y):
    """`y` with as many channels as `x`."""
    return y if y.shape[-1] == x.shape[-1] else layers.Conv2D(x.shape[-1], 1)(y)


def excite(x, y, n):
    s = layers.Dense(n, activation="relu")(layers.GlobalAveragePooling2D()(y))
    s = layers.Dense(x.shape[-1], activation="sigmoid")(s)
    return x * ops.reshape(s, (-1, 1, 1, x.shape[-1]))


def nested(x, y, n):
    inner = keras.Sequential([keras.Input(x.shape[1:]), layers.Conv2D(n, 1), layers.ReLU()])
    return layers.Add()([inner(x), inner(ops.tanh(x))])


def halves(x, y, n):
    if x.shape[-1] < 4:
        return x
    at = x.shape[-1] // 2
    left, right = x[..., :at], x[..., at:]
    return ops.concatenate([layers.Conv2D(n, 1)(right), left], axis=-1)


def split(x, y, n):
    if x.shape[-1] % 2:
        return x
    a, b = ops.split(x, 2, axis=-1)
    return layers.Conv2D(n, 1)(a) * layers.Conv2D(n, 1)(b)


def through_vector(x, y, n):
    v = layers.Dense(SIZE * SIZE * n)(layers.Flatten()(x))
    return layers.Reshape((SIZE, SIZE, n))(v)


def as_sequence(x):
    return layers.Reshape((SIZE * SIZE, x.shape[-1]))(x)


def as_image(x):
    return layers.Reshape((SIZE, SIZE, x.shape[-1]))(x)


def self_attention(x, y, n):
    query, value = as_sequence(x), as_sequence(y)
    y = layers.MultiHeadAttention(n, 3, value_dim=2, output_shape=n + 1)(query, value)
    return as_image(y)


def grouped_attention(x, y, n):
    query, value = as_sequence(x), as_sequence(matched(x, y))
    heads = {"num_query_heads": 2 * n, "num_key_value_heads": n if n % 2 else 2}
    return as_image(layers.GroupQueryAttention(2, **heads)(query, value))


def recurrent(x, y, n):
    kind = (layers.LSTM, layers.GRU, layers.SimpleRNN)[n % 3]
    return as_image(kind(n, return_sequences=True)(as_sequence(x)))


def bidirectional(x, y, n):
    layer = layers.Bidirectional(layers.GRU(n), merge_mode=("concat", "sum")[n % 2])
    return x * layers.Dense(1)(layer(as_sequence(y)))[:, None, None]


def luong(x, y, n):
    return as_image(layers.Attention()([as_sequence(x), as_sequence(matched(x, y))]))


def einsum(x, y, n):
    if n % 2:
        return layers.EinsumDense("...c,cd->...d", n, activation="tanh", bias_axes="d")(x)
    heads = layers.EinsumDense("bhwc,cnd->bhwnd", (SIZE, SIZE, n, 2), bias_axes="nd")(x)
    return layers.EinsumDense("bhwnd,ndc->bhwc", (SIZE, SIZE, n))(heads)


def per_step(x, y, n):
    return layers.TimeDistributed(layers.Conv1D(n, 3, padding="same"))(x)


def constants(x, y, n):
    return 1.0 - x * np.linspace(0.5, 2, x.shape[-1]).astype("float32")


STEPS = {
    "conv": conv,
    "pointwise": lambda x, y, n: layers.Conv2D(n, 1, use_bias=False)(x),
    "grouped": grouped,
    "depthwise": lambda x, y, n: layers.DepthwiseConv2D(3, padding="same")(x),
    "separable": lambda x, y, n: layers.SeparableConv2D(n, 3, padding="same")(x),
    "transposed": lambda x, y, n: layers.Conv2DTranspose(n, 3, padding="same")(x),
    "dense": lambda x, y, n: layers.Dense(n, activation="gelu")(x),
    "batch_norm": lambda x, y, n: layers.BatchNormalization()(x),
    "group_norm": group_norm,
    "layer_norm": lambda x, y, n: layers.LayerNormalization()(x),
    "prelu": lambda x, y, n: layers.PReLU(shared_axes=[1, 2])(x),
    "sigmoid": lambda x, y, n: ops.sigmoid(x),
    "dropout": lambda x, y, n: layers.SpatialDropout2D(0.3)(x),
    "pool": lambda x, y, n: layers.MaxPooling2D(2, strides=1, padding="same")(x),
    "resize": lambda x, y, n: layers.Cropping2D(2)(layers.UpSampling2D(2)(x)),
    "pad": lambda x, y, n: layers.ZeroPadding2D(1)(layers.AveragePooling2D(3, strides=1)(x)),
    "permute": lambda x, y, n: layers.Permute((2, 1, 3))(x),
    "flatten_space": lambda x, y, n: layers.Reshape((SIZE, SIZE, -1))(
        ops.reshape(x, (-1, SIZE * SIZE, x.shape[-1]))
    ),
    "add": lambda x, y, n: layers.Add()([x, matched(x, y)]),
    "subtract": lambda x, y, n: x - matched(x, y),
    "multiply": lambda x, y, n: ops.multiply(x, matched(x, y)),
    "maximum": lambda x, y, n: layers.Maximum()([x, matched(x, y)]),
    "concat": lambda x, y, n: layers.Concatenate()([x, y]),
    "excite": excite,
    "attend": lambda x, y, n: x * layers.Conv2D(1, 3, padding="same")(y),
    "nested": nested,
    "halves": halves,
    "split": split,
    "through_vector": through_vector,
    "constants": constants,
    "mean": lambda x, y, n: x + ops.mean(x, axis=(1, 2), keepdims=True),
    "sum": lambda x, y, n: x + 0.1 * ops.sum(y, axis=-1, keepdims=True),
    "softmax": lambda x, y, n: layers.Softmax()(x),
    "self_attention": self_attention,
    "grouped_attention": grouped_attention,
    "recurrent": recurrent,
    "bidirectional": bidirectional,
    "luong": luong,
    "einsum": einsum,
    "per_step": per_step,
}

programs = st.lists(
    st.tuples(
        st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9), st.integers(2, 6)
    ),
    min_size=1,
    max_size=12,
)


def build(program):
    """A model from a program: each step picks two earlier tensors and a width."""
    inputs = [keras.Input((SIZE, SIZE, 3), name="a"), keras.Input((SIZE, SIZE, 2), name="b")]
    tensors = [layers.Conv2D(4, 1)(inputs[0]), layers.Conv2D(5, 1)(inputs[1])]
    for name, first, second, width in program:
        # Counted from the end, so that most steps build on each other.
        x, y = (tensors[-1 - i % len(tensors)] for i in (first, second))
        tensors.append(STEPS[name](x, y, width))
    pooled = [layers.GlobalAveragePooling2D()(t) for t in tensors[-3:]]
    heads = [layers.Dense(2)(layers.Concatenate()(pooled)), layers.Flatten()(tensors[-1])]
    return keras.Model(inputs, heads)
