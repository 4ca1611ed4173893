"""Residual branches are found from the graph alone."""

import keras
import numpy as np
import pytest
from helpers import close_half, randomise, small_resnet
from keras import layers, ops
from keras.src.applications.convnext import LayerScale, StochasticDepth
from keras.src.applications.inception_resnet_v2 import CustomScaleLayer

import keras_polar
from keras_polar.coupling.branches import find_branches
from keras_polar.rules import trace_model
from keras_polar.surgery.certificate import difference, random_inputs


def blocks_of(model):
    graph = trace_model(model)
    return graph, find_branches(graph)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ResNet50", 16),
        ("ResNet50V2", 16),
        ("MobileNetV2", 10),
        ("EfficientNetB0", 9),
        ("VGG16", 0),
    ],
)
def test_blocks_of_known_architectures(name, count):
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3))
    _, blocks = blocks_of(model)
    assert len(blocks) == count
    taken = [i for b in blocks for i in b.calls]
    assert len(taken) == len(set(taken))


def names(graph, block):
    return [graph.calls[i].name for i in block.calls]


def test_the_longer_branch_goes_where_both_could():
    x = keras.Input((4, 4, 3))
    stem = layers.Conv2D(4, 1, name="stem")(x)
    short = layers.Conv2D(4, 1, name="projection")(stem)
    long = layers.Conv2D(4, 1, name="second")(layers.Conv2D(4, 1, name="first")(stem))
    graph, (block,) = blocks_of(keras.Model(x, short + long))
    assert names(graph, block) == ["first", "second"]
    assert graph.calls[-1].inputs[1] == block.tensor


def test_a_branch_that_something_else_reads_stays():
    x = keras.Input((4,))
    y = layers.Dense(4)(x)
    assert blocks_of(keras.Model(x, [x + y, layers.Dense(2)(y)]))[1] == ()
    assert blocks_of(keras.Model(x, [x + y, y]))[1] == ()


def test_a_branch_from_elsewhere_stays():
    a, b = keras.Input((4,)), keras.Input((4,))
    assert blocks_of(keras.Model([a, b], layers.Dense(4)(a) + layers.Dense(4)(b)))[1] == ()


def test_nested_branches():
    x = keras.Input((4,))
    inner_in = layers.Dense(4, name="outer_a")(x)
    inner = inner_in + layers.Dense(4, name="inner")(inner_in)
    graph, blocks = blocks_of(keras.Model(x, x + layers.Dense(4, name="outer_b")(inner)))
    assert [names(graph, b) for b in blocks] == [
        ["inner"],
        ["outer_a", "inner", blocks and graph.calls[blocks[0].merge].name, "outer_b"],
    ]


# --- gates on branches ------------------------------------------------------------------------


def mobile(x, n, stride=1):
    y = layers.BatchNormalization()(layers.Conv2D(2 * n, 1)(x))
    y = layers.DepthwiseConv2D(3, strides=stride, padding="same")(layers.ReLU(6.0)(y))
    y = layers.BatchNormalization()(layers.Conv2D(n, 1)(y))
    return layers.Add()([x, y]) if stride == 1 and x.shape[-1] == n else y


def preactivated(x, n):
    y = layers.Conv2D(n, 3, padding="same")(layers.ReLU()(layers.BatchNormalization()(x)))
    return x + layers.Conv2D(n, 3, padding="same")(layers.ReLU()(y))


def convnext(x, n):
    y = layers.LayerNormalization()(layers.DepthwiseConv2D(7, padding="same")(x))
    y = LayerScale(0.5, n)(layers.Dense(n)(layers.Dense(4 * n, activation="gelu")(y)))
    return x + StochasticDepth(0.1)(y)


def two_branches(x, n):
    branches = [layers.Conv2D(n, k, padding="same", activation="relu")(x) for k in (1, 3)]
    return layers.Add()([x, *branches])


def scaled(x, n):
    y = layers.Conv2D(n, 1)(layers.Conv2D(3, 3, padding="same", activation="relu")(x))
    return CustomScaleLayer(0.3)([x, y])


def image_model(*steps):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", name="stem")(inputs)
    for step in steps:
        x = step(x, 6)
    x = layers.GlobalAveragePooling2D()(x)
    return randomise(keras.Model(inputs, layers.Dense(3, name="head")(x)))


def transformer():
    inputs = keras.Input((5, 8))
    x = layers.Dense(8)(inputs)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, 4)(y, y)
        y = layers.Dense(16, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dropout(0.1)(layers.Dense(8)(y))])
    return randomise(keras.Model(inputs, layers.Dense(3)(layers.LayerNormalization()(x))))


MODELS = {
    "projections": (lambda: randomise(small_resnet()), 2),
    "inverted": (lambda: image_model(mobile, mobile, mobile), 3),
    "preactivation": (lambda: image_model(preactivated, preactivated), 2),
    "convnext": (lambda: image_model(convnext, convnext), 2),
    "two in one sum": (lambda: image_model(two_branches, two_branches), 4),
    "scaled": (lambda: image_model(scaled, scaled), 2),
    "transformer": (transformer, 4),
}


def some_masks(count):
    """All closed, every second closed, the others closed."""
    return [[bool(i >> b & 1) for b in range(count)] for i in (0, 0b0101, 0b1010)]


@pytest.mark.parametrize("granularity", ["blocks", ("channels", "blocks")])
@pytest.mark.parametrize("name", MODELS)
def test_closed_branches_are_gone(name, granularity):
    build, count = MODELS[name]
    model = build()
    inputs = random_inputs(model)
    for gate, mask in zip(("static", "dynamic") * 8, some_masks(count), strict=False):
        gated = keras_polar.apply(model, 0.02, granularity=granularity, gate=gate)
        assert difference(model, gated, inputs) <= 1e-5
        blocks = [g for g in gated.groups if g.is_block]
        assert len(blocks) == count
        close_half(gated, sum(mask))
        for block, is_open in zip(blocks, mask, strict=True):
            block.set_mask(np.array([is_open]))
        small = keras_polar.convert(gated, verify=inputs)
        left = {layer.name for layer in small.layers}
        for block, is_open in zip(blocks, mask, strict=True):
            assert left.issuperset(block.layers) if is_open else left.isdisjoint(block.layers)
        counts = [int(g.mask.sum()) for g in gated.groups]
        found = keras_polar.cost(small)
        assert gated.budget.cost(counts) == found.weights == small.count_params()
        assert len(small.layers) <= len(model.layers)


def test_weights_of_a_branch_that_are_used_elsewhere_stay():
    x = keras.Input((4,))
    shared = layers.Dense(4)
    y = layers.Dense(4, name="stem")(x)
    z = y + shared(y)
    assert blocks_of(keras.Model(x, layers.Dense(2)(z + shared(z))))[1] == ()
    model = keras.Model(x, layers.Dense(2)(y + shared(ops.tanh(shared(y)))))
    assert len(blocks_of(model)[1]) == 1


def test_branches_that_are_ignored_stay():
    model = small_resnet()
    gated = keras_polar.apply(model, 0.05, granularity="blocks", ignore="block1_a")
    assert [g.layers[0] for g in gated.groups] == ["block0_a"]
    assert gated.groups[0].units == 1
    with pytest.raises(ValueError, match=r"pruned\. It has no residual branch"):
        keras_polar.apply(model, 0.05, granularity="blocks", ignore="block*")
    with pytest.raises(ValueError, match=r"granularity.*'heads'"):
        keras_polar.apply(model, 0.05, granularity=("channels", "heads"))


def test_a_branch_may_lack_a_padding_mask():
    """What only closed branches read may even be an input."""
    x, keep = keras.Input((5, 8)), keras.Input((5,), dtype="bool")
    y = layers.Dense(8)(x)
    y = y + layers.MultiHeadAttention(2, 4)(y, y, attention_mask=keep[:, None, :])
    gated = keras_polar.apply(keras.Model([x, keep], layers.Dense(3)(y)), 0.1, granularity="blocks")
    gated.groups[0].set_mask(np.array([False]))
    small = keras_polar.convert(gated, verify=True)
    assert len(small.inputs) == 2


def test_training_with_gates_on_branches_meets_the_target(tmp_path):
    x, y = np.random.default_rng(0).random((128, 8, 8, 1)), np.arange(128) % 10
    gated = keras_polar.apply(small_resnet(), 0.5, granularity=("channels", "blocks"))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    gated.compile("adam", loss, jit_compile=False)
    gated.fit(x, y, epochs=6, batch_size=16, verbose=0)
    assert abs(gated.sparsity - 0.5) <= 0.01
    gated.save(tmp_path / "gated.keras")
    small = keras_polar.convert(gated, verify=x)
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    assert difference(keras_polar.convert(loaded), small, x) == 0
