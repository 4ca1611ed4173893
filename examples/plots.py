"""The pictures of the examples: pure functions from arrays to matplotlib figures.

They use matplotlib's `Figure` directly, without pyplot: no display, no global state.
"""

import math

import numpy as np
from matplotlib.figure import Figure

GREY = "#c8ccd2"
BLUE = "#2563a8"


def open_rates_figure(history, masks, *, columns=3):
    """One heatmap per group: how open each unit's gate was after each epoch.

    `history` maps a group's name to an array (times, units) of open rates in [0, 1]; row 0 is
    the state before the first epoch. `masks` maps the names to booleans: the units that stay.
    """
    columns = min(columns, len(history))
    rows = math.ceil(len(history) / columns)
    figure = Figure(figsize=(1.0 + 3.6 * columns, 0.9 + 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, rates) in zip(axes, history.items(), strict=False):
        image = _heatmap(axis, name, np.asarray(rates), np.asarray(masks[name], bool))
    for axis in axes[len(history) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes.tolist(), label="open rate (share of samples)", shrink=0.8)
    figure.suptitle("Open rates of the gates over training", fontsize=13)
    figure.supxlabel("training time (epochs)", fontsize=11)
    figure.supylabel("unit (below the white line: stays)", fontsize=11)
    return figure


def _heatmap(axis, name, rates, mask):
    """Units that stay lie below the white line, the most open first."""
    times, units = rates.shape
    order = np.lexsort((-rates.mean(axis=0), -rates[-1], ~mask))
    image = axis.imshow(
        rates[:, order].T,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="viridis",
        vmin=0.0,
        vmax=1.0,
        # Column t is centred on epoch t, unit u on u + 1/2.
        extent=(-0.5, times - 0.5, 0, units),
    )
    stay = int(mask.sum())
    axis.axhline(stay, color="white", linewidth=1.5)
    axis.set_title(f"{name}\n{stay} of {units} units stay", fontsize=10)
    axis.locator_params(integer=True, nbins=6)
    return image


def widths_figure(before, after):
    """Horizontal bars: units of every layer before (grey) and after (blue) conversion.

    Both arguments map layer names to units; a layer missing from `after` was removed.
    """
    names = list(before)
    full = np.array([before[name] for name in names])
    kept = np.array([after.get(name, 0) for name in names])
    figure = Figure(figsize=(8.0, 1.6 + 0.3 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.barh(names, full, color=GREY, label="before")
    axis.barh(names, kept, color=BLUE, height=0.5, label="after")
    for row, (k, n) in enumerate(zip(kept, full, strict=True)):
        axis.annotate(
            f"{k} / {n}", (n, row), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
    _finish_widths(axis, full.max())
    return figure


def _finish_widths(axis, widest):
    axis.invert_yaxis()  # The first layer on top, as the data flow.
    axis.set_xlim(0, 1.15 * widest)  # Room for the numbers beside the longest bar.
    axis.margins(y=0.01)
    axis.set_title("Width of each layer before and after pruning")
    axis.set_xlabel("units (output channels)")
    axis.set_ylabel("layer")
    axis.figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
