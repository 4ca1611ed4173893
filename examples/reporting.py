"""What the examples have in common when they say how a run ended."""

import numpy as np
from rich.console import Console
from rich.table import Table

from keras_polar import full_precision

FILE_WIDTH = 200  # characters of a table that goes to a file
# Measurement -> its row's label and its format; the rows come in this order.
ROWS = {
    "accuracy": ("test accuracy", "{:.2%}"),
    "weights": ("weights", "{:,}"),
    "macs": ("multiply-accumulates per image", "{:,}"),
    "tflite_bytes": (".tflite bytes", "{:,}"),
    "latency_ms": ("LiteRT latency, median", "{:.3f} ms"),
}


def result_rows(result):
    """Rows (label, value) of text for the measurements that `result` holds."""
    return [(label, _text(key, result)) for key, (label, _) in ROWS.items() if key in result]


def comparison_rows(full, small):
    """Rows (label, full, small, ratio) of text; "-" where `full` lacks a measurement."""
    return [
        (label, _text(key, full), _text(key, small), _ratio(key, full, small))
        for key, (label, _) in ROWS.items()
        if key in small
    ]


def _text(key, result):
    return ROWS[key][1].format(result[key]) if key in result else "-"


def _ratio(key, full, small):
    if key not in full:
        return "-"
    if key == "accuracy":
        return f"{100 * (small[key] - full[key]):+.2f} points"
    return f"{small[key] / full[key]:.2f} x"


def print_table(title, columns, rows, caption=None):
    """Prints a table; every column but the first holds numbers and is aligned to the right."""
    table = Table(title=title, caption=caption, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH  # no reason to cut columns short
    console.print(table)


@full_precision()
def certificate(gated, small, images):
    """Largest |gated - small| over the outputs for `images`, and the largest |output|."""
    before = gated.predict(images, verbose=0)
    after = small.predict(images, verbose=0)
    return float(np.max(np.abs(before - after))), float(np.max(np.abs(before)))
