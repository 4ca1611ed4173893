"""Plain Keras models for small images (CIFAR style: the first convolution keeps the resolution).

Every model is functional, made of stock layers only, and ends in **logits** (a Dense without
softmax): train with `SparseCategoricalCrossentropy(from_logits=True)`.
Nothing here knows about pruning; `keras_polar.apply` takes these models as they are.
"""

import functools

import keras

# Share of the past in the moving statistics. Keras' default, 0.99, lags behind by hundreds of
# steps, which spoils the validation accuracy of trainings of a few epochs.
BN_MOMENTUM = 0.9

# Output channels and number of convolutions of each VGG16 stage, in multiples of `width`.
VGG16_STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))

# MobileNetV2: expansion, output channels (for a stem of 32), blocks, stride of the first block.
# The strides are those commonly used for 32x32 images: the first two are 1 instead of 2.
MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


# EfficientNet-Lite0: the same, and the kernel's size of the depthwise convolutions.
LITE0_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


def resnet(depth, input_shape, classes, width=16, *, weight_decay=0.0):
    """ResNet for small images: three stages of basic blocks, `depth = 6n + 2`.

    Shortcuts that change shape are 1x1 convolutions. Returns logits.

    >>> resnet(20, (32, 32, 3), 10).output_shape
    (None, 10)
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(
            f"A ResNet for small images has depth 6n + 2 (8, 14, 20, 32, 56, ...), received "
            f"depth={depth}."
        )
    conv = functools.partial(_conv_bn, weight_decay=weight_decay)
    inputs = keras.Input(input_shape, name="image")
    x = conv(inputs, width, 3, relu=True, name="stem")
    for stage in range(1, 4):
        for block in range(1, (depth - 2) // 6 + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            name = f"stage{stage}_block{block}"
            x = _basic_block(conv, x, width * 2 ** (stage - 1), strides, name)
    outputs = _head(x, classes, weight_decay)
    return keras.Model(inputs, outputs, name=f"resnet{depth}")


def vgg16(input_shape, classes, width=64, *, weight_decay=0.0):
    """VGG16 with batch normalization and a small head: global average pooling and one Dense.

    The five poolings need images of at least 32x32. Returns logits.
    """
    conv = functools.partial(_conv_bn, weight_decay=weight_decay)
    inputs = x = keras.Input(input_shape, name="image")
    for stage, (multiple, convolutions) in enumerate(VGG16_STAGES, start=1):
        for i in range(1, convolutions + 1):
            x = conv(x, width * multiple, 3, relu=True, name=f"stage{stage}_conv{i}")
        x = keras.layers.MaxPooling2D(name=f"stage{stage}_pool")(x)
    outputs = _head(x, classes, weight_decay)
    return keras.Model(inputs, outputs, name="vgg16")


def mobilenet(input_shape, classes, width=32, *, weight_decay=0.0):
    """MobileNetV2 for small images: inverted residuals with ReLU6. Returns logits.

    `width` is the number of channels of the stem; all others scale with it.
    """
    conv = functools.partial(_conv_bn, weight_decay=weight_decay, max_value=6.0)
    inputs = keras.Input(input_shape, name="image")
    x = conv(inputs, width, 3, relu=True, name="stem")
    x = _inverted_residuals(conv, x, MOBILENET_STAGES, width)
    outputs = _head(x, classes, weight_decay)
    return keras.Model(inputs, outputs, name="mobilenet")


def efficientnet_lite0(input_shape, classes, width=32, *, weight_decay=0.0, before=None):
    """EfficientNet-Lite0 of Liu and Tan: inverted residuals with ReLU6, no squeezing. Logits.

    Args:
        before: called on the images before the first convolution, which halves their sides.
    """
    conv = functools.partial(_conv_bn, weight_decay=weight_decay, max_value=6.0)
    inputs = x = keras.Input(input_shape, name="image")
    x = conv(before(x) if before else x, width, 3, strides=2, relu=True, name="stem")
    x = _inverted_residuals(conv, x, LITE0_STAGES, width)
    outputs = _head(x, classes, weight_decay)
    return keras.Model(inputs, outputs, name="efficientnet_lite0")


BUILDERS = {
    **{f"resnet{depth}": functools.partial(resnet, depth) for depth in range(8, 57, 6)},
    "vgg16": vgg16,
    "mobilenet": mobilenet,
    "efficientnet_lite0": efficientnet_lite0,
}


def build(name, input_shape, classes, *, width=None, **options):
    """Builds a model by name; `width=None` is the width that the architecture is known by."""
    if name not in BUILDERS:
        raise ValueError(f"Unknown model {name!r}. Expected one of: {', '.join(BUILDERS)}.")
    options |= {} if width is None else {"width": width}
    return BUILDERS[name](input_shape, classes, **options)


def _basic_block(conv, x, filters, strides, name):
    """relu(shortcut(x) + F(x)) with F = conv-BN-ReLU-conv-BN."""
    shortcut = x
    if strides != 1 or x.shape[-1] != filters:
        shortcut = conv(x, filters, 1, strides=strides, name=f"{name}_shortcut")
    x = conv(x, filters, 3, strides=strides, relu=True, name=f"{name}_conv1")
    x = conv(x, filters, 3, name=f"{name}_conv2")
    x = keras.layers.Add(name=f"{name}_add")([shortcut, x])
    return keras.layers.ReLU(name=f"{name}_relu")(x)


def _inverted_residuals(conv, x, stages, width):
    """The stages of a MobileNetV2 or its like, and the convolution on top of them."""
    for stage, (expansion, channels, blocks, stride, *size) in enumerate(stages, start=1):
        for block in range(1, blocks + 1):
            shape = (expansion, _scaled(channels, width), stride if block == 1 else 1)
            x = _inverted_residual(conv, x, *shape, f"stage{stage}_block{block}", *size)
    return conv(x, _scaled(1280, width), 1, relu=True, name="top")


def _inverted_residual(conv, x, expansion, filters, strides, name, size=3):
    """Expand (1x1), filter (depthwise), project (1x1); a shortcut where shapes agree."""
    shortcut = x
    if expansion != 1:
        x = conv(x, expansion * x.shape[-1], 1, relu=True, name=f"{name}_expand")
    x = conv(x, None, size, strides=strides, relu=True, name=f"{name}_depthwise")
    x = conv(x, filters, 1, name=f"{name}_project")
    if strides == 1 and shortcut.shape[-1] == filters:
        x = keras.layers.Add(name=f"{name}_add")([shortcut, x])
    return x


def _conv_bn(x, filters, size, *, name, strides=1, relu=False, max_value=None, weight_decay=0.0):
    """Convolution (depthwise when `filters` is None), batch normalization, ReLU on request."""
    x = _convolution(filters, size, strides, _l2(weight_decay), name)(x)
    x = keras.layers.BatchNormalization(momentum=BN_MOMENTUM, name=f"{name}_bn")(x)
    return keras.layers.ReLU(max_value, name=f"{name}_relu")(x) if relu else x


def _convolution(filters, size, strides, regularizer, name):
    """No bias: the batch normalization that follows has one."""
    shared = {"strides": strides, "padding": "same", "use_bias": False, "name": name}
    if filters is None:
        return keras.layers.DepthwiseConv2D(
            size, depthwise_initializer="he_normal", depthwise_regularizer=regularizer, **shared
        )
    return keras.layers.Conv2D(
        filters, size, kernel_initializer="he_normal", kernel_regularizer=regularizer, **shared
    )


def _head(x, classes, weight_decay):
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.layers.Dense(
        classes,
        kernel_initializer="he_normal",
        kernel_regularizer=_l2(weight_decay),
        name="logits",
    )(x)


def _l2(weight_decay):
    return keras.regularizers.L2(weight_decay) if weight_decay else None


def _scaled(channels, width):
    return max(1, round(channels * width / 32))
