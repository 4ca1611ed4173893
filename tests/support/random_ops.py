"""Tables of operations for random models: table -> name -> (ranks, step), as in `random_steps`.

The operations of a table are called alike. Small differences between a model and its smaller twin
must stay small: operations are called where they are smooth, and what jumps (rounding, comparing,
counting) is multiplied by something that is zero where it does.
"""

import numpy as np
from keras import layers, ops
from keras.src.applications.inception_resnet_v2 import CustomScaleLayer
from random_steps import ANY, IMAGE, IMAGES, SIZE, SPATIAL, channels, constant, matched, space

from keras_polar.graph.keras_private import op_class


def layer(make):
    """A step that calls a layer on its tensor."""
    return lambda x, y, n: make(x, n)(x)


def table(ranks, make, names):
    """The same for each of several operations."""
    return {name: (ranks, make(op_class(name))) for name in names.split()}


# --- where operations are smooth --------------------------------------------------------------


def unit(x):
    return 0.7 * ops.tanh(x)


def positive(x):
    return 1.6 + 0.5 * ops.tanh(x)


def near_one(x):
    return 1 + 0.1 * ops.tanh(x)


def whole(x):
    """Whole numbers 0 to 3."""
    return ops.cast(ops.floor(4 * ops.sigmoid(x)), "int32")


def window(x):
    """Zero where `whole` jumps."""
    return ops.sin(4 * np.pi * ops.sigmoid(x))


def as_float(x):
    return x if x.dtype == "float32" else ops.cast(x, "float32")


# --- one tensor, element by element -----------------------------------------------------------


def unary(domain, *args):
    def make(cls):
        return lambda x, y, n: as_float(cls(*args)(domain(x)))

    return make


def jumping_at_integers(cls):
    def step(x, y, n):
        z = 1.5 * ops.tanh(x)
        return as_float(cls()(z)) * ops.sin(np.pi * z)

    return step


def jumping_at_halves(*args):
    def make(cls):
        def step(x, y, n):
            z = 0.8 * ops.tanh(x)
            return as_float(cls(*args)(z)) * ops.cos(np.pi * z)

        return step

    return make


UNARY = {
    **table(
        ANY,
        unary(unit),
        "Abs Absolute Arccos Arcsin Arcsinh Arctan Arctanh Array Celu Conj Conjugate "
        "ConvertToTensor Copy Cos Cosh Deg2rad Elu Erf Erfc Erfinv Exp Exp2 Expm1 Fabs Gelu "
        "HardSigmoid HardSilu HardTanh I0 Imag LeakyRelu LogSigmoid Mish NanToNum Negative "
        "OnesLike Rad2deg ReLU Real Relu Relu6 Selu Sigmoid Silu Sin Sinc Sinh SoftShrink "
        "Softplus Softsign SparsePlus SparseSigmoid Square Squareplus StopGradient Tan TanhShrink "
        "Tanh ZerosLike",
    ),
    **table(ANY, unary(positive), "Arccosh Cbrt Log Log10 Log1p Log2 Reciprocal Rsqrt Sqrt"),
    **table(ANY, unary(unit, "float64"), "Cast SaturateCast"),
    **table(
        ANY,
        jumping_at_integers,
        "Angle Ceil Floor Isfinite Isinf Isnan Isneginf Isposinf Isreal Sign Signbit Trunc",
    ),
    **table(ANY, jumping_at_halves(), "HardShrink Round"),
    **table(ANY, jumping_at_halves(0.5, -0.5), "Threshold"),
    **table(
        ANY,
        lambda cls: lambda x, y, n: as_float(cls()(whole(x))) * window(x),
        "BitwiseInvert BitwiseNot",
    ),
    **table(ANY, lambda cls: lambda x, y, n: unit(x) * as_float(cls()(x > 0)), "LogicalNot"),
}


# --- two tensors, element by element ----------------------------------------------------------


def partner(x, y, n):
    """Another tensor, or a constant."""
    return constant(channels(x)) if n == 6 else matched(x, y)


def binary(domain):
    def make(cls):
        return lambda x, y, n: as_float(cls()(domain(x), domain(partner(x, y, n))))

    return make


def compared(cls):
    """One tensor or the other: where they are equal it does not matter which."""

    def step(x, y, n):
        x, y = unit(x), unit(partner(x, y, n))
        return ops.where(cls()(x, y), x, y)

    return step


def logical(cls):
    def step(x, y, n):
        x, y = unit(x), unit(partner(x, y, n))
        return x * y * as_float(cls()(x > 0, y > 0))

    return step


def on_whole(cls):
    def step(x, y, n):
        y = partner(x, y, n)
        return as_float(cls()(whole(x), whole(y) + 1)) * window(x) * window(y)

    return step


def polar(x, y, n):
    return ops.real(op_class("Polar")()(unit(x), unit(partner(x, y, n))))


BINARY = {
    **table(
        ANY,
        binary(unit),
        "Add Subtract Multiply Maximum Minimum Fmax Fmin Hypot Logaddexp Logaddexp2 Nextafter",
    ),
    **table(ANY, binary(positive), "Divide TrueDivide DivideNoNan Power Arctan2"),
    **table(ANY, compared, "Equal NotEqual Greater GreaterEqual Less LessEqual Isclose"),
    **table(ANY, logical, "LogicalAnd LogicalOr LogicalXor"),
    **table(
        ANY,
        on_whole,
        "BitwiseAnd BitwiseOr BitwiseXor BitwiseLeftShift BitwiseRightShift LeftShift RightShift "
        "Gcd Lcm FloorDivide Mod Fmod",
    ),
    "Ldexp": (ANY, lambda x, y, n: ops.ldexp(unit(x), whole(y := partner(x, y, n))) * window(y)),
    "Heaviside": (ANY, lambda x, y, n: unit(x) * ops.heaviside(x, unit(partner(x, y, n)))),
    "Polar": (ANY, polar),
    "FullLike": (ANY, lambda x, y, n: ops.full_like(x, 0.5)),
    "BinaryCrossentropy": (
        ANY,
        lambda x, y, n: ops.binary_crossentropy(positive(x) / 3, positive(matched(x, y)) / 3),
    ),
    **{
        f"{cls.__name__} layer": (
            ANY, lambda x, y, n, cls=cls, args=args: cls(*args)([x, matched(x, y)])
        )
        for cls, *args in (
            (layers.Average,), (layers.Minimum,), (layers.Multiply,), (layers.Subtract,),
            (CustomScaleLayer, 0.3),
        )
    },
}  # fmt: skip


# --- along one axis: of positions, or that of the units ---------------------------------------


def axis_of(x, n):
    return 1 if space(x) and n < 5 else -1


def distance(x, axis):
    """Between the two values along an axis that are closest: zero where their order changes."""
    return ops.min(ops.diff(ops.sort(x, axis=axis), axis=axis), axis=axis, keepdims=True)


def reduced(function):
    """What remains of an axis is repeated along it."""

    def step(x, y, n):
        axis, keepdims = axis_of(x, n), {"keepdims": True} if n % 2 else {}
        if x.shape[axis] < 2:
            return x
        z = as_float(function(x, axis, keepdims))
        z = z if len(z.shape) == len(x.shape) else ops.expand_dims(z, axis)
        return ops.repeat(z, x.shape[axis], axis)

    return step


def plain(domain, **options):
    return lambda cls: reduced(lambda x, axis, k: cls(axis=axis, **k, **options)(domain(x)))


def quantile(share):
    return lambda cls: reduced(lambda x, axis, k: cls(axis=axis, **k)(unit(x), share))


def counted(cls):
    def count(x, axis, keepdims):
        keepdims = {} if cls is op_class("CountNonzero") else keepdims
        number = as_float(cls(axis=axis, **keepdims)(x > 0))
        return number * ops.min(ops.abs(unit(x)), axis=axis, keepdims=bool(keepdims))

    return reduced(count)


def placed(cls):
    def place(x, axis, keepdims):
        return as_float(cls(axis=axis, keepdims=True)(x)) * distance(x, axis)

    return reduced(place)


def moments(x, axis, keepdims):
    mean, variance = ops.moments(x, [axis], **keepdims)
    return mean + variance


def average(x, axis, keepdims):
    return ops.average(x, axis, constant(x.shape[axis]) + 1.5)


REDUCTIONS = {
    **table(
        ANY,
        plain(unit),
        "Mean Max Min Var Std Amax Amin Ptp Logsumexp Median Sum Nanmax Nanmean Nanmin Nanstd "
        "Nansum Nanvar",
    ),
    **table(ANY, plain(near_one), "Prod Nanprod"),
    **table(ANY, quantile(30), "Percentile"),
    **table(ANY, quantile(0.3), "Quantile"),
    **table(ANY, counted, "All Any CountNonzero"),
    **table(ANY, placed, "Argmax Argmin Nanargmax Nanargmin"),
    "Moments": (ANY, reduced(moments)),
    "Average": (ANY, reduced(average)),
    **{
        f"Norm of order {o}": (
            ANY,
            reduced(lambda x, axis, k, o=o: ops.norm(positive(x), o, axis, **k)),
        )
        for o in (None, 1, 3, np.inf)
    },
}


SLOW_OPS = {  # seconds a call on TensorFlow: not drawn at random
    **table(ANY, plain(unit), "Nanmedian"),
    **table(ANY, quantile(30), "Nanpercentile"),
    **table(ANY, quantile(0.3), "Nanquantile"),
}


def along(function, domain=unit):
    return lambda x, y, n: function(domain(x), axis_of(x, n), n)


def running(cls):
    return along(lambda x, axis, n: cls(axis=axis)(x))


def argsort(x, axis):
    return as_float(ops.argsort(x, axis=axis)) * distance(x, axis)


def argpartition(x):
    return as_float(ops.argpartition(x, 1, axis=-1)) * distance(x, -1)


def difference(x, axis, n):
    z = ops.diff(x, axis=axis)
    return ops.concatenate([z, ops.take(x, [0], axis=axis)], axis=axis)


def on_positions(function):
    """For operations on the last axes: the units are elsewhere, but for sequences of vectors."""
    return lambda x, y, n: ops.swapaxes(function(ops.swapaxes(unit(x), 1, -1)), 1, -1)


def scales(x, axis, number):
    return [constant(x.shape[axis])] * number


ALONG = {
    **table(ANY, running, "Cumsum Cumprod Nancumsum Nancumprod Sort Sparsemax Softmax LogSoftmax"),
    "Argsort": (SPATIAL, along(lambda x, axis, n: argsort(x, axis))),
    # Along other axes, and on images, Keras 3.15 on TensorFlow mixes up the sizes.
    "Argpartition": (SPATIAL[:1], on_positions(argpartition)),
    "Diff": (ANY, along(difference)),
    **table(IMAGES, lambda cls: on_positions(lambda x: cls()(x)), "Tril Triu"),
    "TopK": (SPATIAL, on_positions(lambda x: ops.top_k(x, x.shape[-1])[0])),
    "Normalize": (ANY, along(lambda x, axis, n: ops.normalize(x, axis, 1 + n % 2), positive)),
    "LayerNorm": (
        ANY, along(lambda x, axis, n: ops.layer_normalization(x, *scales(x, axis, 2), axis=axis)),
    ),
    "RMSNorm": (
        ANY,
        along(lambda x, axis, n: ops.rms_normalization(x, *scales(x, axis, axis < 0), axis=axis)),
    ),
    "BatchNorm": (
        ANY,
        along(lambda x, axis, n: ops.batch_normalization(
            x, constant(x.shape[axis]), 1 + constant(x.shape[axis]) ** 2, axis, *scales(x, axis, 2)
        )),
    ),
    "Softmax layer": (ANY, along(lambda x, axis, n: layers.Softmax(axis)(x))),
    "LayerNormalization": (ANY, along(lambda x, axis, n: layers.LayerNormalization(axis=axis)(x))),
    "RMSNormalization": (ANY, layer(lambda x, n: layers.RMSNormalization())),
    "BatchNormalization": (ANY, along(lambda x, axis, n: layers.BatchNormalization(axis)(x))),
    "UnitNormalization": (
        ANY,
        along(lambda x, axis, n: layers.UnitNormalization(axis=axis)(x), positive),
    ),
}  # fmt: skip


# --- elements that move -----------------------------------------------------------------------


def units_second(x):
    """Units on the axis behind the batch."""
    return ops.transpose(x, (0, len(x.shape) - 1, *space(x)))


def transposed(x, y, n):
    return ops.moveaxis(layers.BatchNormalization(axis=1)(units_second(x)), 1, -1)


def swapped(split, axis):
    """The two halves of an axis in the other order."""

    def step(x, y, n):
        return x if x.shape[axis] % 2 else ops.concatenate(split(x, 2)[::-1], axis=axis)

    return step


def unstacked(x, y, n):
    return ops.stack(ops.unstack(x, axis=1)[::-1], axis=1)


MOVES = {
    "Moveaxis": (ANY, transposed),
    "Rot90": (IMAGE, lambda x, y, n: ops.rot90(x, n, axes=(1, 2))),
    "Fliplr": (ANY, lambda x, y, n: ops.fliplr(x)),
    "Flipud": (ANY, lambda x, y, n: ops.flipud(x)),
    "Tile": (ANY, lambda x, y, n: ops.tile(x, 2) if channels(x) < 12 else x),
    "Append": (ANY, lambda x, y, n: ops.append(x, y, axis=-1)),
    "Hstack": (SPATIAL, lambda x, y, n: ops.hstack([x, matched(x, y)])[:, 1 : x.shape[1] + 1]),
    "Dstack": (IMAGE, lambda x, y, n: ops.dstack([x, matched(x, y)])[:, :, 1 : x.shape[2] + 1]),
    "ArraySplit": (ANY, swapped(lambda x, n: ops.array_split(x, n, -1), -1)),
    "ArraySplit of positions": (SPATIAL, swapped(lambda x, n: ops.array_split(x, n, 1), 1)),
    "Hsplit": (ANY, swapped(ops.hsplit, 1)),
    "Dsplit": (SPATIAL, swapped(ops.dsplit, 2)),
    "Unstack": (SPATIAL, unstacked),
    "RepeatVector": ((1,), lambda x, y, n: layers.RepeatVector(SIZE)(x)),
    "GetItem": (ANY, lambda x, y, n: ops.concatenate([x[..., n // 2 :], x[..., :1]], axis=-1)),
}  # fmt: skip
