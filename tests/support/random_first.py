"""Tables of layers and operations on images with their channels first."""

from keras import layers, ops
from random_layers import kernel, one_step, point
from random_ops import units_second
from random_steps import IMAGE, IMAGES, PLANE, SIZE, SPATIAL, VOLUME, channels, ranked

from keras_polar.graph.keras_private import op_class


def first(make, ranks=SPATIAL):
    """A layer on channels in front, the units back in their place behind it."""

    def step(x, y, n):
        z = make(x, n, {"data_format": "channels_first"})(units_second(x))
        return z if len(z.shape) == 2 else ops.moveaxis(z, 1, -1)

    return ranks, step


def in_front(pattern, *args, ranks=SPATIAL, **options):
    """A layer of the tensor's rank; the first argument None stands for a step's width."""

    def make(x, n, front):
        given = [n if a is None else a for a in args]
        return ranked(pattern, x)(*given, **options, **front)

    return first(make, ranks)


def upsampled(x, n, front):
    """And pooled again, so that tensors do not grow."""
    grow, shrink = (ranked(p, x)(2, **front) for p in ("UpSampling{}", "AveragePooling{}"))
    return lambda z: shrink(grow(z))


def on_image(name, *args, **options):
    cls = getattr(layers, name)
    return first(lambda x, n, front: cls(*args, **options, **front), IMAGE)


def op_in_front(name, ranks, *args, constants=None, **options):
    """An operation; `constants(x, n)` are its kernels."""
    cls = op_class(name)

    def make(x, n, front):
        given = constants(x, n) if constants else ()
        return lambda z: cls(*args, **options, **front)(z, *given)

    return first(make, ranks)


SAME = {"padding": "same"}

FIRST = {
    "Conv3D first": in_front("Conv{}", None, 3, ranks=VOLUME, **SAME),
    "DepthwiseConv first": in_front("DepthwiseConv{}", 3, ranks=PLANE, depth_multiplier=2, **SAME),
    "SeparableConv first": in_front("SeparableConv{}", None, 3, ranks=PLANE, **SAME),
    "MaxPooling first": in_front("MaxPooling{}", 2, strides=1, **SAME),
    "AveragePooling first": in_front("AveragePooling{}", 3, strides=1, **SAME),
    "GlobalMaxPooling first": in_front("GlobalMaxPooling{}"),
    "GlobalAveragePooling first": in_front("GlobalAveragePooling{}", keepdims=True),
    "AdaptiveMaxPooling first": in_front("AdaptiveMaxPooling{}", SIZE),
    "AdaptiveAveragePooling first": in_front("AdaptiveAveragePooling{}", 2),
    "ZeroPadding first": in_front("ZeroPadding{}", 1),
    "Cropping first": in_front("Cropping{}", 1, ranks=IMAGES),
    "UpSampling first": first(upsampled, IMAGES),
    "SpatialDropout first": in_front("SpatialDropout{}", 0.1, ranks=IMAGES),
    "Flatten first": first(lambda x, n, front: layers.Flatten(**front)),
    "Resizing first": on_image("Resizing", 3, 5),
    "CenterCrop first": on_image("CenterCrop", 2, 3),
    "RandomFlip first": on_image("RandomFlip"),
    "RandomRotation first": on_image("RandomRotation", 0.1),
    "RandomTranslation first": on_image("RandomTranslation", 0.1, 0.1),
    "RandomZoom first": on_image("RandomZoom", 0.1),
    "MaxPool first": op_in_front("MaxPool", SPATIAL, 2, 1, **SAME),
    "AveragePool first": op_in_front("AveragePool", SPATIAL, 2, 1, **SAME),
    "AdaptiveMaxPool first": op_in_front("AdaptiveMaxPool", SPATIAL[:1], (SIZE,)),
    "AdaptiveAveragePool first": op_in_front("AdaptiveAveragePool", SPATIAL[:1], (SIZE,)),
    "Resize first": op_in_front("Resize", IMAGE, (6, 3)),
    "PadImages first": op_in_front("PadImages", IMAGE, 1, 2, 1, 0),
    "CropImages first": op_in_front("CropImages", IMAGE, 1, 1, 0, 1),
    "SpaceToDepth first": first(
        lambda x, n, front: (
            lambda z: ops.nn.space_to_depth(layers.Resizing(SIZE, SIZE, **front)(z), 2, **front)
        ),
        IMAGE,
    ),
    "DepthToSpace first": first(
        lambda x, n, front: lambda z: ops.nn.depth_to_space(ops.tile(z, (4, 1, 1)), 2, **front),
        IMAGE,
    ),
    "DepthwiseConv op first": op_in_front(
        "DepthwiseConv", PLANE, constants=lambda x, n: [kernel(x, channels(x), 2)], **SAME
    ),
    "SeparableConv op first": op_in_front(
        "SeparableConv",
        PLANE,
        constants=lambda x, n: [kernel(x, channels(x), 2), point(x, 2 * channels(x), n)],
        **SAME,
    ),
}

SLOW_FIRST = {
    "ConvLSTM3D first": first(lambda x, n, front: lambda z: one_step(z, n, **front), VOLUME),
}

# TensorFlow has no kernels for these on a CPU.
FIRST_ELSEWHERE = {
    "Conv first": in_front("Conv{}", None, 3, **SAME),
    "grouped first": first(
        lambda x, n, front: ranked("Conv{}", x)(
            2 * channels(x), 3, groups=channels(x), **SAME, **front
        ),
    ),
    "ConvTranspose first": in_front("Conv{}Transpose", None, 3, **SAME),
    "ConvLSTM first": first(lambda x, n, front: lambda z: one_step(z, n, **front), PLANE),
    "Conv op first": op_in_front(
        "Conv", SPATIAL, constants=lambda x, n: [kernel(x, channels(x), n)], **SAME
    ),
    "ExtractPatches first": op_in_front("ExtractPatches", IMAGE, 2),
}
