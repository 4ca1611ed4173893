"""Residual branches are found from the graph alone."""

import keras
import pytest
from keras import layers

from keras_polar.blocks import find_blocks
from keras_polar.graph import op_class, trace

SUMS = (layers.Add, op_class("Add"))


def blocks_of(model):
    graph = trace(model)
    blocks = find_blocks(graph, lambda c: tuple(range(len(c.inputs))) * (type(c.op) in SUMS))
    return graph, blocks


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
    assert block.position == 1


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
