"""What compare.py has left in JSON files, as rows of tables."""

import json
from pathlib import Path

import numpy as np

COLUMNS = (
    "method",
    "accuracy, %",
    "seeds",
    "weights",
    "not zero",
    "MACs",
    "training TMACs",
    ".tflite, kB",
    "latency",
)
# What the network and its training are, and what is removed.
TRAINING = (
    "model",
    "width",
    "image_size",
    "train_images",
    "epochs",
    "batch_size",
    "learning_rate",
    "evaluate_on",
)
TARGET = ("measure", "sparsity")
OPTIONS = ("schedule", "round_to", "max_sparsity")  # of our methods alone


def load(folder):
    """All results in a folder, as dicts."""
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(Path(folder).glob("*.json"))]


def table_rows(runs, methods, setting, ours):
    """One row per method of a setting, in the order of `methods`."""
    by_method = {m: [r for r in runs if _belongs(r, m, setting, m in ours)] for m in methods}
    return [_row(method, own) for method, own in by_method.items() if own]


def _belongs(run, method, setting, is_ours):
    """Whether a run is one of a method in a setting, as far as the method depends on it."""
    keys = [*TRAINING, *(TARGET if method != "dense" else ()), *(OPTIONS if is_ours else ())]
    return run["method"] == method and all(run[k] == setting[k] for k in keys)


def _row(method, runs):
    mean = {k: np.mean([r[k] for r in runs]) for k, v in runs[0].items() if type(v) in (int, float)}
    kept = [f"{100 * mean[k]:.1f} %" for k in ("kept_weights", "nonzero", "kept_macs")]
    effort, size = mean["training_macs"] / 1e12, mean["tflite_bytes"] / 1e3
    time = f"{mean['tflite_latency_ratio']:.2f} x"
    return (method, spread(runs), str(len(runs)), *kept, f"{effort:.1f}", f"{size:.0f}", time)


def spread(runs):
    """Mean accuracy and, of several runs, their sample standard deviation, as text."""
    mean, deviation = accuracy(runs)
    return f"{mean:.2f} ± {deviation:.2f}" if len(runs) > 1 else f"{mean:.2f}"


def accuracy(runs):
    """Mean and sample standard deviation in percent; no deviation of a single run."""
    values = 100 * np.array([r["accuracy"] for r in runs])
    return values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
