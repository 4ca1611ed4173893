"""More tables for random models: layers that pool, resize, multiply or remember; users' layers."""

from keras import layers, ops
from keras.src.applications.convnext import LayerScale, StochasticDepth
from random_ops import layer, whole, window
from random_steps import (
    ANY,
    IMAGE,
    IMAGES,
    PLANE,
    SIZE,
    SPATIAL,
    VOLUME,
    as_sequence,
    channels,
    constant,
    matched,
    ranked,
    space,
    unrolled,
)

from keras_polar.graph.keras_private import op_class

# --- positions: pooling, resizing, images -----------------------------------------------------


def pool(name):
    """A pooling operation that leaves the number of positions."""
    cls = op_class(name)
    return lambda x, y, n: cls(2 + n % 2, strides=1, padding="same")(x)


POSITIONS = {
    "MaxPool": (SPATIAL, pool("MaxPool")),
    "AveragePool": (SPATIAL, pool("AveragePool")),
    "AdaptiveMaxPooling": (SPATIAL, layer(lambda x, n: ranked("AdaptiveMaxPooling{}", x)(n))),
    "AdaptiveAveragePooling": (
        SPATIAL, layer(lambda x, n: ranked("AdaptiveAveragePooling{}", x)(SIZE)),
    ),
    "GlobalAveragePooling": (
        SPATIAL, layer(lambda x, n: ranked("GlobalAveragePooling{}", x)(keepdims=n % 2 == 1)),
    ),
    "Resize": (IMAGE, lambda x, y, n: ops.image.resize(ops.image.resize(x, (n, 7)), (SIZE, SIZE))),
    "PadImages": (
        IMAGE, lambda x, y, n: ops.image.crop_images(
            ops.image.pad_images(x, 1, 2, 2, 1), 2, 1, 1, 2
        ),
    ),
    "ExtractPatches": (IMAGE, lambda x, y, n: ops.image.extract_patches(x, 2, 1, padding="same")),
    "CenterCrop": (IMAGE, layer(lambda x, n: layers.CenterCrop(n, SIZE))),
    "RandomCrop": (IMAGE, layer(lambda x, n: layers.RandomCrop(*x.shape[1:3]))),
    "RandomFlip": (IMAGE, layer(lambda x, n: layers.RandomFlip())),
    "RandomRotation": (IMAGE, layer(lambda x, n: layers.RandomRotation(0.1))),
    "RandomTranslation": (IMAGE, layer(lambda x, n: layers.RandomTranslation(0.1, 0.1))),
    "RandomZoom": (IMAGE, layer(lambda x, n: layers.RandomZoom(0.1))),
    "Masking": (SPATIAL, lambda x, y, n: layers.Masking()(as_sequence(x))),
}  # fmt: skip


# --- products, tables, states -----------------------------------------------------------------


def dot_layer(x, y, n):
    z = layers.Dot(-1, normalize=n % 2 == 1)([as_sequence(x), as_sequence(matched(x, y))])
    return unrolled(z, x)


def additive_attention(x, y, n):
    z = layers.AdditiveAttention()([as_sequence(x), as_sequence(matched(x, y))])
    return unrolled(z, x)


def cell(x, y, n):
    kind = (layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell)[n % 3]
    return unrolled(layers.RNN(kind(n), return_sequences=True)(as_sequence(x)), x)


def conv_lstm(x, n, data_format="channels_last"):
    """The first axis of positions, or of channels in front, is time."""
    kind = getattr(layers, f"ConvLSTM{len(x.shape) - 3}D")
    return kind(n, 3, padding="same", return_sequences=True, data_format=data_format)(x)


def one_step(x, n, data_format="channels_last"):
    return ops.squeeze(conv_lstm(ops.expand_dims(x, 1), n, data_format), 1)


def rows(y):
    """A whole number for every position, and what makes its jumps harmless."""
    return whole(y[..., 0]), window(y[..., :1])


def embedding(x, y, n):
    numbers, smooth = rows(y)
    return layers.Embedding(4, n)(numbers) * smooth


def reversible_embedding(x, y, n):
    numbers, smooth = rows(y)
    embed = layers.ReversibleEmbedding(4, channels(x), tie_weights=n % 2 == 0)
    return embed(embed(numbers) * smooth + x, reverse=True)


def kernel(x, *sizes):
    return constant(*[3] * len(space(x)), *sizes)


def point(x, *sizes):
    return constant(*[1] * len(space(x)), *sizes)


def separable_op(x, y, n):
    kernels = kernel(x, channels(x), 2), point(x, 2 * channels(x), n)
    return ops.separable_conv(x, *kernels, padding="same")


PRODUCTS = {
    "Dot": (ANY, lambda x, y, n: ops.dot(x, constant(channels(x), n))),
    "Inner": (ANY, lambda x, y, n: ops.inner(x, constant(n, channels(x)))),
    "Tensordot": (ANY, lambda x, y, n: ops.tensordot(x, constant(channels(x), n), 1)),
    "Dot layer": (SPATIAL, dot_layer),
    "AdditiveAttention": (SPATIAL, additive_attention),
    "RNN": (SPATIAL, cell),
    "ConvLSTM": (IMAGES, lambda x, y, n: conv_lstm(x, n)),
    "ConvLSTM of one step": (VOLUME, lambda x, y, n: one_step(x, n)),
    "Embedding": (ANY, embedding),
    "ReversibleEmbedding": (ANY, reversible_embedding),
    "Conv": (
        SPATIAL, lambda x, y, n: ops.conv(x, kernel(x, channels(x), n), padding="same"),
    ),
    "SeparableConv": (PLANE, separable_op),
    "DepthwiseConv": (
        PLANE,
        lambda x, y, n: ops.depthwise_conv(x, kernel(x, channels(x), 1 + n % 2), padding="same"),
    ),
}  # fmt: skip


# --- layers that act element by element, of the library's users, and made of layers ------------


class Swish(layers.Layer):
    """Nobody wrote a rule for it."""

    def build(self, shape):
        self.beta = self.add_weight((shape[-1],), "ones", name="beta")

    def call(self, x):
        return x * ops.sigmoid(self.beta * x)


class Block(layers.Layer):
    """A layer made of layers."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.wide = layers.Dense(width, activation="relu", name="wide")
        self.scale = Swish(name="scale")

    def build(self, shape):
        self.wide.build(shape)
        self.scale.build((*shape[:-1], self.width))
        self.narrow = layers.Dense(shape[-1], name="narrow")
        self.narrow.build((*shape[:-1], self.width))

    def call(self, x):
        return x + self.narrow(self.scale(self.wide(x)))

    def get_config(self):
        return {**super().get_config(), "width": self.width}


class Linear(layers.Layer):
    """Multiplies by a weight of its own, and gates by another."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def build(self, shape):
        self.kernel = self.add_weight((shape[-1], self.width), name="kernel")
        self.bias = self.add_weight((self.width,), name="bias")
        self.gain = self.add_weight((self.width,), "ones", name="gain")

    def call(self, x):
        return ops.tanh(ops.matmul(x, self.kernel) + self.bias) * ops.cast(self.gain, x.dtype)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


def shared_kernel(x, y, n):
    own = Linear(channels(x))
    return own(x) + own(ops.tanh(matched(x, y)))


def shared_block(x, y, n):
    block = Block(n)
    return block(x) + block(ops.tanh(matched(x, y)))


class Rms(layers.Layer):
    """As language models write it."""

    def build(self, shape):
        self.scale = self.add_weight((shape[-1],), "ones", name="gamma")

    def call(self, x):
        return x * ops.rsqrt(ops.mean(ops.square(x), -1, keepdims=True) + 1e-3) * self.scale


class GlobalResponse(layers.Layer):
    """ConvNeXt V2's."""

    def build(self, shape):
        self.gamma = self.add_weight((shape[-1],), "ones", name="gamma")
        self.beta = self.add_weight((shape[-1],), "zeros", name="beta")

    def call(self, x):
        axes = list(range(1, len(x.shape) - 1))
        norm = ops.sqrt(ops.sum(ops.square(x), axis=axes, keepdims=True) + 1e-3)
        norm = norm / (ops.mean(norm, axis=-1, keepdims=True) + 1e-3)
        return self.gamma * (x * norm) + self.beta + x


def by_hand(x):
    centred = x - ops.mean(x, axis=-1, keepdims=True)
    return centred / ops.sqrt(ops.var(x, axis=-1, keepdims=True) + 1e-3)


NORMS = (
    lambda: layers.LayerNormalization(),
    lambda: layers.RMSNormalization(),
    lambda: layers.LayerNormalization(center=False, scale=False),
    Rms,
    lambda: by_hand,
    GlobalResponse,
    lambda: layers.Softmax(),
)


def stream(x, y, n):
    """A block of a residual stream that is normalised in front of every reader."""
    z = NORMS[(n + channels(x)) % len(NORMS)]()(x)
    return x + layers.Dense(channels(x))(layers.Dense(n, activation="gelu")(z))


def normalised(x, y, n):
    """Normalised once more behind the sum, as BERT does."""
    return NORMS[n % len(NORMS)]()(stream(x, y, n + 1))


STREAMS = {
    "normalised stream": (ANY, stream),
    "normalised behind the sum": (ANY, normalised),
    "maximum of the stream": (
        ANY, lambda x, y, n: x - ops.max(stream(x, y, n), axis=-1, keepdims=True),
    ),
    "normalised sum of two": (
        ANY, lambda x, y, n: NORMS[n % len(NORMS)]()(layers.Dense(n)(x) + layers.Dense(n)(y)),
    ),
    "SpectralNormalization": (
        ANY, layer(lambda x, n: layers.SpectralNormalization(layers.Dense(n))),
    ),
}  # fmt: skip

LAYERS = {
    "ReLU layer": (ANY, layer(lambda x, n: layers.ReLU(6))),
    "ELU": (ANY, layer(lambda x, n: layers.ELU())),
    "LeakyReLU": (ANY, layer(lambda x, n: layers.LeakyReLU())),
    "Activation": (ANY, layer(lambda x, n: layers.Activation("gelu"))),
    "Dropout": (ANY, layer(lambda x, n: layers.Dropout(0.2))),
    "Identity": (ANY, layer(lambda x, n: layers.Identity())),
    "GaussianDropout": (ANY, layer(lambda x, n: layers.GaussianDropout(0.1))),
    "GaussianNoise": (ANY, layer(lambda x, n: layers.GaussianNoise(0.1))),
    "AlphaDropout": (ANY, layer(lambda x, n: layers.AlphaDropout(0.1))),
    "ActivityRegularization": (ANY, layer(lambda x, n: layers.ActivityRegularization(1e-4))),
    "Rescaling": (ANY, layer(lambda x, n: layers.Rescaling(0.5, 0.1))),
    "Normalization": (ANY, layer(lambda x, n: layers.Normalization(None, 0.1, 2.0))),
    "StochasticDepth": (ANY, layer(lambda x, n: StochasticDepth(0.1))),
    "LayerScale": (ANY, layer(lambda x, n: LayerScale(0.5, channels(x)))),
    "user's layer": (ANY, layer(lambda x, n: Swish())),
    "composite": (ANY, layer(lambda x, n: Block(n))),
    "shared composite": (ANY, shared_block),
    "own kernel": (ANY, layer(lambda x, n: Linear(n))),
    "shared own kernel": (ANY, shared_kernel),
}


# --- what keeps its units ---------------------------------------------------------------------


class Shift(layers.Layer):
    def call(self, x):
        return x - ops.logsumexp(x, axis=-1, keepdims=True)


PINNED = {
    "TakeAlongAxis": (ANY, lambda x, y, n: ops.take_along_axis(x, ops.argsort(x, -1), -1)),
    "Trapezoid": (SPATIAL, lambda x, y, n: x + ops.trapezoid(x, axis=-1)[..., None]),
    "user's layer that keeps its units": (ANY, layer(lambda x, n: Shift())),
}  # fmt: skip
