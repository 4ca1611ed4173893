"""Pictures of a pruning run: pure functions from numbers or models to matplotlib figures.

They use matplotlib's `Figure` directly, without pyplot: no display, no global state. After
`%matplotlib inline` a notebook shows a returned figure by itself; `figure.savefig("name.png")`
writes it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_polar.gates.groups import require_gated
from keras_polar.inspection import cost

GREY = "#c8ccd2"
BLUE = "#2563a8"
COLOURS = (BLUE, "#d9822b", "#4a9b5f", "#a94f9c", "#6b7280", "#c0392b")
MARKERS = "osD^vP"
BINS = 20


def _figure(width: float, height: float) -> Any:
    """An empty figure, in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "keras_polar.plots needs matplotlib, which is not installed: "
            "`pip install 'keras_polar[plots]'`."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _checked(history: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not history:
        raise ValueError(
            "plots: expected open rates of at least one group, received none. Pass "
            "`rates = keras_polar.callbacks.OpenRates()` to fit, then `rates.history` here."
        )
    arrays = {name: np.asarray(rates, "float32") for name, rates in history.items()}
    for name, rates in arrays.items():
        if rates.ndim != 2 or not rates.size:
            raise ValueError(
                f"plots: expected open rates of shape (times, units) for group {name!r}, received "
                f"shape {rates.shape}. `keras_polar.callbacks.OpenRates` records them so."
            )
    return arrays


# --- the gates over time ---------------------------------------------------------------------


def open_rates(history: Mapping[str, Any], *, columns: int = 3) -> Any:
    """One map per group: how open each unit's gate was after each epoch.

    Args:
        history: group name -> open rates of shape (times, units) in [0, 1], the first before
            training, as `keras_polar.callbacks.OpenRates` records them.
        columns: maps side by side.

    Returns:
        A `matplotlib.figure.Figure`. Units that are open at the end lie below the white line.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `history` is empty or has another shape.

    Example:

        >>> keras_polar.plots.open_rates(rates.history)
    """
    maps = _checked(history)
    columns = min(columns, len(maps))
    rows = math.ceil(len(maps) / columns)
    figure = _figure(1.0 + 3.6 * columns, 0.9 + 2.7 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, rates) in zip(axes, maps.items(), strict=False):
        image = _heatmap(axis, name, rates)
    for axis in axes[len(maps) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes.tolist(), label="open rate (share of samples)", shrink=0.8)
    figure.suptitle("Open rates of the gates over training", fontsize=13)
    figure.supxlabel("training time (epochs)", fontsize=11)
    figure.supylabel("unit (below the white line: open at the end)", fontsize=11)
    return figure


def _heatmap(axis: Any, name: str, rates: np.ndarray) -> Any:
    """Units that are open at the end lie below the white line, the most open first."""
    times, units = rates.shape
    stays = rates[-1] >= 0.5
    order = np.lexsort((-rates.mean(axis=0), -rates[-1], ~stays))
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
    axis.axhline(stays.sum(), color="white", linewidth=1.5)
    axis.set_title(f"{name}\n{stays.sum()} of {units} units open", fontsize=10)
    axis.locator_params(integer=True, nbins=6)
    return image


def polarization(history: Mapping[str, Any]) -> Any:
    """How open rates split into open and closed: their histogram after each epoch.

    Under the pressure of the polarization loss all samples come to agree about every unit, so
    that open rates leave the middle for 0 or 1 (Zhi et al., arXiv 2302.10798).

    Args:
        history: as for `open_rates`; the units of all groups are counted together.

    Returns:
        A `matplotlib.figure.Figure`: histograms above, polarization (1: full agreement) below.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `history` is empty or has another shape.

    Example:

        >>> keras_polar.plots.polarization(rates.history)
    """
    groups = [*_checked(history).values()]
    rates = np.concatenate(groups, axis=1)
    figure = _figure(7.0, 5.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    image = _histograms(above, rates)
    label = f"share of the {rates.shape[1]:,} units"
    figure.colorbar(image, ax=above, label=label, format=_percent_of_any_size())
    above.set_title("Polarization of the gates over training")
    above.set_ylabel("open rate (share of samples)")
    # As the metric of `fit` has it: all groups weigh the same.
    disagreement = np.mean([np.mean(r * (1 - r), axis=1) for r in groups], axis=0)
    below.plot(1 - 4 * disagreement, color=BLUE, marker="o", markersize=3)
    below.set_ylim(-0.05, 1.05)
    below.set_ylabel("polarization")
    below.set_xlabel("training time (epochs)")
    below.locator_params(axis="x", integer=True)
    _open_frame(below)
    return figure


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0)


def _percent_of_any_size() -> Any:
    """For logarithmic scales, on which `PercentFormatter` rounds 0.1 % to 0 %."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda share, _: f"{100 * share:g}%")


def _histograms(axis: Any, rates: np.ndarray) -> Any:
    """An image whose columns are histograms of one time each."""
    from matplotlib.colors import LogNorm

    counts = np.stack([np.histogram(r, BINS, (0, 1))[0] for r in rates], axis=1)
    shares = counts / rates.shape[1]
    return axis.imshow(
        np.where(counts, shares, np.nan),  # nothing is drawn where there is no unit
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="viridis_r",
        # Few units are on their way at a time: on a linear scale none of them would show.
        norm=LogNorm(vmin=min(0.5, 1 / rates.shape[1]), vmax=1.0),
        extent=(-0.5, len(rates) - 0.5, 0, 1),
    )


# --- before and after ------------------------------------------------------------------------


def widths(before: keras.Model, after: keras.Model) -> Any:
    """Units of every layer before (grey) and after (blue) pruning, as horizontal bars.

    Args:
        before: the full model.
        after: what `convert` or `remove` made of it; its layers have the same names.

    Returns:
        A `matplotlib.figure.Figure`; layers whose units cannot go are drawn as well.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: a model is not functional.
        ValueError: `before` has no layer with units.

    Example:

        >>> keras_polar.plots.widths(model, small).savefig("widths.png")
    """
    full, kept = _units(before), _units(after)
    if not full:
        raise ValueError(f"plots.widths: model {before.name!r} has no layer with units to draw.")
    names = [*full]
    figure = _figure(8.0, 1.6 + 0.3 * len(names))
    axis = figure.subplots()
    rows = np.arange(len(names))
    axis.barh(rows, [full[n] for n in names], color=GREY, label="before")
    axis.barh(rows, [kept.get(n, 0) for n in names], color=BLUE, height=0.5, label="after")
    axis.set_yticks(rows, names)
    for row, name in enumerate(names):
        text, place = f"{kept.get(name, 0):,} / {full[name]:,}", (full[name], row)
        axis.annotate(text, place, (4, 0), textcoords="offset points", va="center", fontsize=9)
    _finish_widths(axis, max(full.values()))
    return figure


def shares(gated: Any) -> Any:
    """Of each group the share of its units that stays, beside the share that is uniform.

    Args:
        gated: the gated model; settled, or as its consensus is now.

    Returns:
        A `matplotlib.figure.Figure`. The dashed line is the share that would leave the same cost
        if it were that of every group: a network made narrower all over.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: the model has no gates.

    Example:

        >>> keras_polar.plots.shares(gated).savefig("shares.png")
    """
    require_gated(gated, "plots.shares")
    groups = gated.groups
    figure = _figure(8.0, 1.6 + 0.3 * len(groups))
    axis = figure.subplots()
    rows, kept = np.arange(len(groups)), [g.mask.mean() for g in groups]
    axis.barh(rows, np.ones(len(groups)), color=GREY, label="pruned")
    axis.barh(rows, kept, color=BLUE, height=0.5, label="kept")
    uniform = _uniform_share(gated)
    axis.axvline(uniform, color="black", linestyle="--", label=f"uniform: {uniform:.0%}")
    axis.set_yticks(rows, [g.name for g in groups])
    for row, group in enumerate(groups):
        text = f"{group.mask.sum():,} / {group.units:,}"
        axis.annotate(text, (1, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    _finish_shares(axis)
    return figure


def _uniform_share(gated: Any) -> float:
    """By bisection: cost grows with the share."""
    units, goal = np.array(gated.budget.units), gated.sparsity
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        is_enough = gated.budget.achieved(middle * units) >= goal
        low, high = (middle, high) if is_enough else (low, middle)
    return low


def _finish_shares(axis: Any) -> None:
    axis.invert_yaxis()  # the first group on top, as the data flow
    axis.set_xlim(0, 1.15)  # room for the numbers beside the bars
    axis.margins(y=0.01)
    axis.xaxis.set_major_formatter(_percent())
    axis.set_title("Share of each group that stays")
    axis.set_xlabel("units of the group")
    axis.set_ylabel("group, after its first layer")
    axis.figure.legend(loc="outside lower center", ncols=3, frameon=False)
    _open_frame(axis)


def _units(model: keras.Model) -> dict[str, int]:
    """Layer name -> units, in the order of the model."""
    return {row.name: row.units for row in cost(model).rows if row.units}


def _finish_widths(axis: Any, widest: int) -> None:
    axis.invert_yaxis()  # the first layer on top, as the data flow
    axis.set_xlim(0, 1.2 * widest)  # room for the numbers beside the longest bar
    axis.margins(y=0.01)
    axis.set_title("Width of each layer before and after pruning")
    axis.set_xlabel("units (channels, neurons)")
    axis.set_ylabel("layer")
    axis.figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _open_frame(axis)


def trade_off(
    results: Mapping[str, Sequence[tuple[float, float]]],
    *,
    size: str = "weights",
    score: str = "accuracy",
) -> Any:
    """What size costs: one line per method, one marker per trained model.

    Args:
        results: method -> (size, score) of its models, in any order; scores in [0, 1].
        size: what the sizes are, with their unit: "weights", "MACs", ".tflite size (kB)".
        score: what the scores are: "test accuracy".

    Returns:
        A `matplotlib.figure.Figure`; sizes are on a logarithmic scale if they span more than 10 x.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no results, they are not pairs, or a score is not in [0, 1].

    Example:

        >>> dense, pruned = [(2e5, 0.92)], [(5e4, 0.91), (1e5, 0.92)]
        >>> keras_polar.plots.trade_off({"dense": dense, "pruned": pruned})
    """
    lines = {name: _pairs(name, pairs) for name, pairs in results.items()}
    if not lines:
        raise ValueError("plots.trade_off: expected a method -> its (size, score) pairs; got none.")
    figure = _figure(7.0, 4.6)
    axis = figure.subplots()
    for i, (name, pairs) in enumerate(lines.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axis.plot(*pairs.T, label=name, **style)
    sizes = np.concatenate([*lines.values()])[:, 0]
    _finish_trade_off(axis, size, score, is_wide=sizes.max() > 10 * sizes.min())
    return figure


def _pairs(name: str, pairs: Any) -> np.ndarray:
    """(size, score) of shape (models, 2), the smallest first."""
    points = np.asarray(pairs, "float64")
    if points.ndim != 2 or points.shape[1] != 2 or not points.size:
        raise ValueError(
            f"plots.trade_off: expected {name!r} with a list of (size, score) pairs, received "
            f"shape {points.shape}."
        )
    if not ((points[:, 0] > 0).all() and ((points[:, 1] >= 0) & (points[:, 1] <= 1)).all()):
        raise ValueError(
            f"plots.trade_off: expected sizes > 0 and scores in [0, 1] (0.92 for 92 %) of "
            f"{name!r}, received {points.tolist()}."
        )
    return points[np.argsort(points[:, 0])]


def _finish_trade_off(axis: Any, size: str, score: str, *, is_wide: bool) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    if is_wide:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axis.yaxis.set_major_formatter(_percent())
    axis.margins(0.06)
    axis.grid(color=GREY, linewidth=0.5)
    axis.set_title(f"{score[:1].upper()}{score[1:]} against {size}")
    axis.set_xlabel(f"{size} (log scale)" if is_wide else size)
    axis.set_ylabel(score)
    axis.legend(frameon=False)
    _open_frame(axis)


def _open_frame(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
