"""What compare.py has left in JSON files, as rows of tables."""

import json
from collections import defaultdict
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
OURS = ("dynamic", "static", "both", "masked")


def load(folder):
    """All results in a folder, as dicts; None stands for what a method does not depend on."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(Path(folder).glob("*.json"))]
    return [r | dict.fromkeys(_indifferent(r["method"])) for r in found]


def _indifferent(method):
    if method in OURS:
        return ()
    return (*TARGET, *OPTIONS) if method == "dense" else OPTIONS


def table_rows(runs, methods, setting):
    """Rows of a setting, in the order of `methods`: one per method and options of it."""
    own = [r for r in runs if _belongs(r, setting)]
    ordered = [[r for r in own if r["method"] == method] for method in methods]
    return [_row(alike) for found in ordered for _, alike in grouped(found, OPTIONS)]


def _belongs(run, setting):
    """Whether a run is one of a setting, as far as its method depends on it."""
    same = all(run[k] == setting[k] for k in TRAINING)
    return same and all(run[k] in (None, setting[k]) for k in TARGET)


def grouped(runs, keys):
    """Pairs of what the runs of a group have in common, and the runs."""
    found = defaultdict(list)
    for run in runs:
        found[tuple(run[k] for k in keys)].append(run)
    pairs = sorted(found.items(), key=lambda pair: str(pair[0]))
    return [(dict(zip(keys, values, strict=True)), own) for values, own in pairs]


def name(run):
    """The method, with its options."""
    return ", ".join([run["method"], *(f"{k}={run[k]}" for k in OPTIONS if run[k])])


def _row(runs):
    mean = {k: np.mean([r[k] for r in runs]) for k, v in runs[0].items() if type(v) in (int, float)}
    kept = [f"{100 * mean[k]:.1f} %" for k in ("kept_weights", "nonzero", "kept_macs")]
    effort, size = mean["training_macs"] / 1e12, mean.get("tflite_bytes", np.nan) / 1e3
    time = f"{mean.get('tflite_latency_ratio', np.nan):.2f} x"
    accuracies, seeds = spread(runs), str(len(runs))
    return (name(runs[0]), accuracies, seeds, *kept, f"{effort:.1f}", f"{size:.0f}", time)


def spread(runs):
    """Mean accuracy and, of several runs, their sample standard deviation, as text."""
    mean, deviation = accuracy(runs)
    return f"{mean:.2f} ± {deviation:.2f}" if len(runs) > 1 else f"{mean:.2f}"


def accuracy(runs):
    """Mean and sample standard deviation in percent; no deviation of a single run."""
    values = 100 * np.array([r["accuracy"] for r in runs])
    return values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
