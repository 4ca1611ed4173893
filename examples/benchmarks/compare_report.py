"""What compare.py has found, for people to read: docs/comparison.md and its pictures.

python examples/benchmarks/compare_report.py
"""

import sys
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import compare
import comparison

_FOLDER = flags.DEFINE_string(
    "output_dir", str(Path(__file__).resolve().parents[2] / "docs"), "Folder of the page."
)
# What was removed in the runs of a panel, what is read off them, and its name.
PANELS = (
    ("weights", "kept_weights", "weights kept, %"),
    ("macs", "kept_macs", "multiply-accumulates (MACs) kept, %"),
    ("macs", "tflite_latency_ratio", "latency where MACs were removed, % of dense"),
)
# One colour and one marker per method, the same in every picture; black is the dense network.
LOOKS = {
    method: {"color": colour, "marker": marker}
    for method, colour, marker in zip(
        compare.METHODS,
        ["black", *(f"C{i % 10}" for i in range(len(compare.METHODS)))],
        "sov^D<>pP*XhHd1234+x"[: len(compare.METHODS)],
        strict=False,
    )
}

INTRODUCTION = """# Comparison

Written by `python examples/benchmarks/compare_report.py` from the JSON files in
`examples/benchmarks/results`, which `python examples/benchmarks/compare.py` leaves, one per run.

CIFAR-10, the test accuracy after the last epoch on all 10,000 test images; mean ± sample standard
deviation over the seeds. Within a run they choose nothing. The defaults of keras_polar were chosen
on seed 0, 12,800 images of 16x16 pixels, first by test accuracies, later on training images held
out (`--evaluate_on=held_out`): at that size the tables have other seeds. **The images had been
encoded as JPEG once more** than the original ones. All methods of a table share data, augmentation,
optimiser (SGD, Nesterov momentum 0.9, cosine decay), epochs and seeds. *weights*, *MACs*: what is
left of the dense network's weights and multiply-accumulates. *not zero*: share of the weights that
are left and not zero. *training TMACs*: 10^12 multiply-accumulates spent on the whole training, a
backward pass counted as two forward passes. *latency*: of the float32 .tflite file on one thread,
over the dense one's, measured in turns. All runs are of TensorFlow on CPUs but those with 50,000
images, which are of JAX on an H100 (products rounded to TF32). The runs of keras_polar with 3,200
images and 12 epochs are older than its present warm-up and shares.

The methods:

"""


def page(runs):
    """The whole document; pictures are named, not drawn."""
    text = INTRODUCTION + _methods(runs)
    for network, own in _networks(runs):
        text += f"\n## {_title(network)}\n\n![Accuracy against what is kept]({_picture(network)})\n"
        pruned = [r for r in own if r["method"] != "dense"]
        for target, _ in comparison.grouped(pruned, comparison.TARGET):
            text += _section(own, network | target)
    return text


def _networks(runs):
    """Pairs of a network with its training, and its runs; those of which something was removed."""
    pairs = comparison.grouped(runs, comparison.TRAINING)
    return [pair for pair in pairs if {r["method"] for r in pair[1]} != {"dense"}]


def _methods(runs):
    """What compare.py says about the methods that were run."""
    lines = compare.__doc__.split("Methods:\n")[1].rstrip().splitlines()
    items, known = [], {r["method"] for r in runs}
    for line in lines:
        name, _, what = line.strip().partition(" ")
        if line.startswith("  ") and not line.startswith("   "):
            items.append([name, what.strip()])
        else:
            items[-1][1] += f" {line.strip()}"
    return "".join(f"- `{name}`: {what}\n" for name, what in items if name in known)


def _section(runs, setting):
    rows = comparison.table_rows(runs, compare.METHODS, setting)
    title = f"{setting['sparsity']:.0%} of the {setting['measure']} removed"
    lines = [comparison.COLUMNS, ["---", *["---:"] * (len(comparison.COLUMNS) - 1)], *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"\n### {title}\n\n    {_command(setting)}\n\n{table}"


def _command(setting):
    named = ("model", "width", "image_size", "train_images", "epochs", "measure", "sparsity")
    given = " ".join(f"--{k}={setting[k]}" for k in named if setting[k] is not None)
    return f"python examples/benchmarks/compare.py {given}"


def _title(network):
    width = f" of width {network['width']}" if network["width"] else ""
    side = network["image_size"]
    images = f"{network['train_images']:,} training images of {side}x{side} pixels"
    return f"{network['model']}{width}, {images}, {network['epochs']} epochs"


def _picture(network):
    width = f"_w{network['width']}" if network["width"] else ""
    run = f"{network['image_size']}px_{network['train_images']}_e{network['epochs']}"
    return f"images/compare_{network['model']}{width}_{run}.png"


def draw(runs, title):
    """Accuracy against what is kept, and against time; bars are standard deviations."""
    import matplotlib.pyplot as plt

    shown = [panel for panel in PANELS if any(r["measure"] == panel[0] for r in runs)]
    figure = plt.figure(figsize=(2.5 + 4 * len(shown), 4.5), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, (measure, key, label) in zip(panels, shown, strict=True):
        own = [r for r in runs if r["measure"] in (None, measure)]
        for method in compare.METHODS:
            _draw_method(panel, [r for r in own if r["method"] == method], key)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    drawn = [panel.get_legend_handles_labels() for panel in panels]
    named = {name: handle for own in drawn for handle, name in zip(*own, strict=True)}
    figure.suptitle(title)
    figure.legend(named.values(), named, loc="outside right center", frameon=False)
    return figure


def _draw_method(panel, runs, key):
    """A line per set of options, from target to target."""
    for options, alike in comparison.grouped(runs, comparison.OPTIONS):
        points = sorted(
            (100 * np.mean([r[key] for r in some]), *comparison.accuracy(some))
            for _, some in comparison.grouped(alike, ("sparsity",))
        )
        other = {"ls": ":", "mfc": "none"} if any(options.values()) else {}
        looks = LOOKS[alike[0]["method"]] | {"lw": 1, "capsize": 3} | other
        panel.errorbar(*zip(*points, strict=True), label=comparison.name(alike[0]), **looks)


def main(argv):
    """Entry point of absl."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    folder, runs = Path(_FOLDER.value), comparison.load(flags.FLAGS.results_dir)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for network, own in _networks(runs):
        draw(own, _title(network)).savefig(folder / _picture(network), dpi=120)
    (folder / "comparison.md").write_text(page(runs), encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
