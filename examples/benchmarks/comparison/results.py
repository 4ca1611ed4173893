"""What has been run, one JSON object per line and run, and what it says: means and differences."""

import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from json_lines import add_row, read_lines

# What a dense network depends on.
OF_DENSE = (
    "model",
    "width",
    "image_size",
    "train_images",
    "batch_size",
    "epochs",
    "learning_rate",
    "weight_decay",
)
# What the network and its training are; what is removed; what only our methods depend on.
TRAINING = ("regime", *OF_DENSE, "steps", "fit_rate", "backend")
TARGET = ("measure", "sparsity")
OPTIONS = ("schedule", "round_to", "max_sparsity", "gate")
IDENTITY = (*TRAINING, *TARGET, *OPTIONS, "method", "seed")
LEVEL = 0.95  # of intervals


def identity(run):
    """What tells a run from all others: two with the same are one, run twice."""
    return tuple(run.get(key) for key in IDENTITY)


def described(setting, method, seed, backend, *, ours, removes):
    """The fields of a run that its identity is made of; None for what it does not depend on."""
    run = {"method": method, "seed": seed, "backend": backend, **dataclasses.asdict(setting)}
    free = (*(() if ours else OPTIONS), *(() if removes else TARGET))
    return run | {key: None for key in free if key in run}


def load(folder):
    """All results of a folder; the later of two with the same identity."""
    runs = (run for path in sorted(Path(folder).glob("*.jsonl")) for run in read_lines(path))
    return list({identity(run): run for run in runs}.values())


def add(folder, run):
    """Appends a result to the file of its regime and network."""
    add_row(Path(folder) / f"{run['regime']}_{run['model']}.jsonl", run)


def grouped(runs, keys):
    """Pairs of what the runs of a group have in common, and the runs."""
    groups = defaultdict(list)
    for run in runs:
        groups[tuple(run.get(k) for k in keys)].append(run)
    pairs = sorted(groups.items(), key=lambda pair: str(pair[0]))
    return [(dict(zip(keys, values, strict=True)), own) for values, own in pairs]


def of_target(runs, target):
    """Runs in which that was removed, and those to which it does not matter."""
    return [r for r in runs if all(r.get(k) in (None, target[k]) for k in TARGET)]


def name(run):
    """The method, with its options."""
    return ", ".join([run["method"], *(f"{k}={run[k]}" for k in OPTIONS if run.get(k))])


def mean(runs, key):
    """The mean over the runs that have a value; None if none has."""
    values = [r[key] for r in runs if r.get(key) is not None]
    return float(np.mean(values)) if values else None


def deviation(runs, key):
    """Sample standard deviation; None of less than two."""
    values = [r[key] for r in runs if r.get(key) is not None]
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def difference(runs, control, key):
    """The mean of what runs are ahead of a control's runs of the same seeds.

    Returns:
        (mean, half of its 95 % interval by Student's t, pairs); the half is None for one pair.
        None without a pair.
    """
    known = {r["seed"]: r[key] for r in control if r.get(key) is not None}
    pairs = [
        r[key] - known[r["seed"]] for r in runs if r.get(key) is not None and r["seed"] in known
    ]
    return (*interval(pairs), len(pairs)) if pairs else None


def interval(values):
    """The mean, and half of its 95 % interval by Student's t: None of a single value."""
    return float(np.mean(values)), _half(np.array(values)) if len(values) > 1 else None


def _half(values):
    from scipy.stats import t  # slow to import

    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(t.ppf(0.5 + LEVEL / 2, len(values) - 1) * error)
