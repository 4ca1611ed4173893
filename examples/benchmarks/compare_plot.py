"""Draws what compare.py has found: accuracy against the weights and the MACs that are kept.

python examples/benchmarks/compare_plot.py --model=resnet20 --picture=docs/images/compare.png
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import compare

_PICTURE = flags.DEFINE_string("picture", "compare.png", "Where the picture goes.")
AXES = {"kept_weights": "weights kept, %", "kept_macs": "multiply-accumulates kept, %"}
# One colour per method, the same in every picture; black is the dense network.
COLOURS = dict(zip(compare.METHODS, ["#000000", *map("C{}".format, range(10))] * 2, strict=False))


def points(results, setting):
    """Method -> its runs, gathered by what was to be removed."""
    same = ("model", "width", "epochs", "train_images", "image_size", "batch_size")
    found = defaultdict(lambda: defaultdict(list))
    for result in results:
        if all(result[k] == getattr(setting, k) for k in same):
            target = result["measure"], result["sparsity"], result["schedule"], result["round_to"]
            found[result["method"]][target].append(result)
    return {m: found[m] for m in compare.METHODS if m in found}


def draw(found, title):
    """One panel per measure; the targets of one method are joined."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, (key, label) in zip(panels, AXES.items(), strict=True):
        for number, (method, runs) in enumerate(found.items()):
            _draw_method(panel, method, runs.values(), key, marker="osD^v<>PX*hdp8"[number % 14])
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    figure.suptitle(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def _draw_method(panel, method, targets, key, marker):
    rows = sorted((100 * np.mean([r[key] for r in runs]), *_accuracy(runs)) for runs in targets)
    x, y, spread = zip(*rows, strict=True)
    panel.errorbar(
        x, y, spread, marker=marker, color=COLOURS[method], label=method, capsize=3, lw=1, ls="none"
    )


def _accuracy(runs):
    values = 100 * np.array([r["accuracy"] for r in runs])
    return values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0


def main(argv):
    """Entry point of absl."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    setting = compare.setting_from_flags()
    found = points(compare.load_results(flags.FLAGS.results_dir), setting)
    if not found:
        raise app.UsageError(f"No results of {setting} in {flags.FLAGS.results_dir}.")
    title = f"{setting.model}, {setting.train_images:,} images, {setting.epochs} epochs"
    draw(found, title).savefig(_PICTURE.value, dpi=150)
    print(f"Wrote {_PICTURE.value}")


if __name__ == "__main__":
    app.run(main)
