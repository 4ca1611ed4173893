"""Draws docs/images/ids.png: ids that flow through a residual block.

python docs/draw_ids.py
"""

from pathlib import Path

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

OUT = Path(__file__).with_name("images") / "ids.png"
UNITS = 4
CELL = 0.5  # height of a unit
WIDTH = 0.72  # of a bar of units
# Closed units, one group each: the stream (stem and conv2, tied) and what is inside the block.
STREAM, INSIDE = "#1f77b4", "#e08214"
CLOSED = {STREAM: {2}, INSIDE: {0}}
INK, GREY, PALE = "#222222", "#777777", "#eeeeee"
SHORTCUT = 2.1  # height of the shortcut


def shade(colour, unit):
    """Units of a group share a hue; the further down, the paler."""
    share = 0.25 + 0.5 * unit / (UNITS - 1)
    return tuple((1 - share) * c + share for c in to_rgb(colour))


def cell(axis, x, unit, width, text, **style):
    y = (UNITS / 2 - unit - 1) * CELL
    axis.add_patch(Rectangle((x - width / 2, y), width, CELL, ec=INK, lw=0.8, zorder=2, **style))
    colour = "white" if style["fc"] == INK else INK
    options = {"ha": "center", "va": "center", "fontsize": 9, "color": colour, "zorder": 3}
    axis.text(x, y + CELL / 2, text, **options)


def units(axis, x, colour, ids):
    """The units of a tensor, an id in each."""
    for unit, text in enumerate(ids):
        cell(axis, x, unit, WIDTH, text, fc=shade(colour, unit))


def mask(axis, x, colour):
    """1 lets a unit through, 0 stops it."""
    for unit in range(UNITS):
        closed = unit in CLOSED[colour]
        cell(axis, x, unit, 0.4, "0" if closed else "1", fc=INK if closed else "white")
    axis.text(x, -UNITS / 2 * CELL - 0.14, "mask", ha="center", va="top", fontsize=8, color=INK)


def operation(axis, x, name, half=0.46):
    style = {"boxstyle": "round,pad=0,rounding_size=0.12", "fc": PALE, "ec": GREY, "zorder": 2}
    axis.add_patch(FancyBboxPatch((x - half, -0.45), 2 * half, 0.9, **style))
    axis.text(x, 0, name, ha="center", va="center", fontsize=9, color=INK, zorder=3)


def arrow(axis, start, end):
    style = {"arrowstyle": "-|>", "color": GREY, "lw": 1.0, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=style, zorder=1)


def shortcut(axis, start, end):
    axis.plot([start, start, end], [0, SHORTCUT, SHORTCUT], color=GREY, lw=1.0, zorder=1)
    arrow(axis, (end, SHORTCUT), (end, 0.45))
    label = "shortcut: carries ids 0 to 3"
    axis.text((start + end) / 2, SHORTCUT + 0.12, label, ha="center", fontsize=9, color=INK)


def captions(axis):
    lines = [
        (STREAM, "group 1: made by stem and conv2; the Add ties 0 with 8, 1 with 9, ..."),
        (INSIDE, "group 2: made by conv1; BN and ReLU pass its ids on"),
    ]
    for i, (colour, text) in enumerate(lines):
        y = -2.0 - 0.55 * i
        axis.add_patch(Rectangle((0.0, y - 0.17), 0.4, 0.34, fc=shade(colour, 1), ec=INK, lw=0.8))
        axis.text(0.6, y, text, va="center", fontsize=9, color=INK)
    text = "A mask stands in front of every reader.\nUnits with a 0 arrive nowhere and are cut out."
    axis.text(11.2, -2.27, text, va="center", fontsize=9, color=INK)


def block(axis):
    """Everything from left to right."""
    fresh, inner, summed = (
        [str(i) for i in range(4)],
        [str(i) for i in range(4, 8)],
        [f"{i}={i + 8}" for i in range(4)],
    )
    arrow(axis, (-0.3, 0), (16.75, 0))
    operation(axis, 0.45, "stem")
    units(axis, 1.6, STREAM, fresh)
    mask(axis, 2.8, STREAM)
    operation(axis, 3.7, "conv1")
    units(axis, 4.85, INSIDE, inner)
    operation(axis, 6.0, "BN", 0.35)
    operation(axis, 7.0, "ReLU", 0.42)
    units(axis, 8.1, INSIDE, inner)
    mask(axis, 9.0, INSIDE)
    operation(axis, 9.9, "conv2")
    units(axis, 11.05, STREAM, [str(i) for i in range(8, 12)])
    operation(axis, 12.35, "Add")
    units(axis, 13.6, STREAM, summed)
    mask(axis, 14.5, STREAM)
    operation(axis, 15.5, "conv3")
    shortcut(axis, 2.25, 12.35)


def draw():
    figure = Figure(figsize=(11, 3.7), layout="constrained")
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set_aspect("equal")
    axis.set_xlim(-0.4, 17)
    axis.set_ylim(-2.9, 2.6)
    block(axis)
    captions(axis)
    return figure


if __name__ == "__main__":
    draw().savefig(OUT, dpi=110)
