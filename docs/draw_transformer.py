"""Draws docs/images/transformer.png: what is cut of a transformer block's weights.

The masks are those of a gated model that was closed at random, and the difference in the caption
is the certificate of this model.

    python docs/draw_transformer.py
"""

from pathlib import Path

import keras
import numpy as np
from keras import layers
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

import keras_polar

OUT = Path(__file__).with_name("images") / "transformer.png"
STREAM, HEADS, DEPTH, INSIDE = 16, 4, 4, 24
GONE = "#ffffff"
COLOURS = {"norm": "#2ca02c", "attention": "#1f77b4", "feed-forward": "#e08214"}


def block():
    """A transformer of one block: normalisation, attention, feed-forward, all on one stream."""
    tokens = keras.Input((6,), dtype="int32")
    stream = layers.Embedding(20, STREAM, name="stream")(tokens)
    y = layers.LayerNormalization(name="norm")(stream)
    stream = layers.Add()([stream, layers.MultiHeadAttention(HEADS, DEPTH, name="attend")(y, y)])
    y = layers.Dense(INSIDE, "gelu", name="up")(layers.LayerNormalization()(stream))
    stream = layers.Add()([stream, layers.Dense(STREAM, name="down")(y)])
    return keras.Model(tokens, layers.Dense(3)(layers.LayerNormalization()(stream)))


def closed(model):
    """The gated model with units closed at random, and group name -> whether each unit stays."""
    gated = keras_polar.apply(model, 0.3, gate="static", round_to=1)
    rng = np.random.default_rng(3)
    for group in gated.groups:
        stays = np.ones(group.units, bool)
        stays[rng.choice(group.units, group.units * 3 // 8, replace=False)] = False
        group.set_mask(stays)
    return gated, {g.name: np.asarray(g.mask) > 0 for g in gated.groups}


def weights(masks):
    """(title, kind, kept rows, kept columns) of the block's weights, from left to right."""
    stream, inside = masks["stream"], masks["up"]
    queries = np.kron(masks["attend.q"], masks["attend.key"]).astype(bool)
    values = np.kron(masks["attend.q"], masks["attend.value"]).astype(bool)
    return [
        ("norm: scale", "norm", stream, np.ones(1, bool)),
        ("attention: query, key", "attention", stream, queries),
        ("attention: value", "attention", stream, values),
        ("attention: output", "attention", values, stream),
        ("feed-forward: up", "feed-forward", stream, inside),
        ("feed-forward: down", "feed-forward", inside, stream),
    ]


def width_of(columns):
    """Of a matrix and its title, in units."""
    return max(columns.size, 8)


def matrix(axis, title, kind, rows, columns):
    """A weight's rows and columns; what goes is white."""
    kept = np.outer(rows, columns)
    axis.pcolormesh(
        kept[::-1],
        cmap=ListedColormap([GONE, COLOURS[kind]]),
        vmin=0,
        vmax=1,
        edgecolor="#bbbbbb",
        lw=0.4,
    )
    axis.set_aspect("equal")
    axis.set_axis_off()
    middle = columns.size / 2
    axis.set_xlim(middle - width_of(columns) / 2 - 0.2, middle + width_of(columns) / 2 + 0.2)
    axis.set_ylim(rows.size - INSIDE, rows.size + 0.2)  # one scale for all
    before, after = (
        f"{a} x {b}" for a, b in ((rows.size, columns.size), (rows.sum(), columns.sum()))
    )
    axis.set_title(f"{title}\n{before}\n{after} stay", fontsize=8)


def draw():
    model = block()
    gated, masks = closed(model)
    samples = np.random.default_rng(0).integers(0, 20, (8, 6))
    small = keras_polar.convert(gated)
    off = np.abs(gated.predict(samples, verbose=0) - small.predict(samples, verbose=0)).max()
    found = weights(masks)
    widths = [width_of(columns) for *_, columns in found]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axis, own in zip(figure.subplots(1, len(found), width_ratios=widths), found, strict=True):
        matrix(axis, *own)
    figure.supxlabel(
        "Rows are inputs, columns outputs. A channel of the stream goes from all of them at once; "
        "the norm averages over those that stay.\n"
        f"{model.count_params():,} weights before, "
        f"{small.count_params():,} after; the gated and the small model differ by {off:.0e}.",
        fontsize=9,
    )
    return figure


if __name__ == "__main__":
    draw().savefig(OUT, dpi=110, bbox_inches="tight")
