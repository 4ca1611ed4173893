"""What has been run, for people to read: tables in docs/benchmarks/comparison.md, and pictures.

    python examples/benchmarks/comparison/report.py

Everything between the markers of the page is written anew; the text around them is written by hand.
"""

import dataclasses
import sys
from pathlib import Path

import keras
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import methods
import reporting
import results

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = BENCHMARKS / "results"
PAGE = BENCHMARKS.parents[1] / "docs" / "benchmarks" / "comparison.md"
MARKERS = "<!-- runs: begin -->\n", "<!-- runs: end -->\n"
CONTROLS = ("dense", "l1_even")  # that the others are set against, on the same seeds
IMAGES = {"held_out": "held out", "test": "test"}
# Column -> the key that it shows the mean of, and how.
SHOWN = {
    "weights": ("kept_weights", "{:.1%}"),
    "not zero": ("nonzero", "{:.1%}"),
    "MACs": ("kept_macs", "{:.1%}"),
    "training TMACs": ("training_macs", "{:.1f}"),
    ".tflite, kB": ("tflite_bytes", "{:.0f}"),
    "latency": ("tflite_latency_ratio", "{:.2f} x"),
}
UNITS = {"training_macs": 1e-12, "tflite_bytes": 1e-3}
NAMED = ("width", "image_size", "train_images", "epochs", "steps", "fit_rate")  # in commands


# --- tables -------------------------------------------------------------------------------------


def table(runs):
    """Columns and rows of the runs of one training and target.

    One row per method and options of it, in the order of `methods.METHODS`; columns in which
    nothing would stand are left out.
    """
    alike = [own for _, own in results.grouped(runs, ("method", *results.OPTIONS))]
    alike.sort(key=lambda own: _place(own[0]["method"]))
    controls = {c: [r for r in runs if r["method"] == c] for c in CONTROLS}
    columns = _columns(controls)
    rows = [[text(own) for text in columns.values()] for own in alike]
    filled = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    names = list(columns)
    return [names[i] for i in filled], [[row[i] or "-" for i in filled] for row in rows]


def _place(method):
    return list(methods.METHODS).index(method.split("+")[0])


def _columns(controls):
    """Title -> from the runs of a row to a text, empty if there is nothing to say."""
    columns = {"method": lambda own: results.name(own[0]), "seeds": lambda own: str(len(own))}
    for key, where in IMAGES.items():
        columns[f"{where}, %"] = lambda own, key=key: _accuracy(own, key)
        for control, others in controls.items():
            columns[f"{where}: ahead of {control}"] = lambda own, key=key, others=others: _ahead(
                own, others, key
            )
    for title, (key, form) in SHOWN.items():
        columns[title] = lambda own, key=key, form=form: _mean(own, key, form)
    return columns


def _accuracy(runs, key):
    mean, deviation = results.mean(runs, key), results.deviation(runs, key)
    if mean is None:
        return ""
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def _ahead(runs, control, key):
    """The mean difference in points and its 95 % interval, which takes two pairs.

    Says how many pairs there are where some seeds have none.
    """
    if runs[0]["method"] == (control[0]["method"] if control else ""):
        return ""
    found = results.difference(runs, control, key)
    if found is None:
        return ""
    mean, half, pairs = found
    text = f"{100 * mean:+.2f}" + ("" if half is None else f" ± {100 * half:.2f}")
    return text + ("" if pairs == len(runs) else f" ({pairs} of {len(runs)} seeds)")


def _mean(runs, key, form):
    mean = results.mean(runs, key)
    return "" if mean is None else form.format(mean * UNITS.get(key, 1)).replace("%", " %")


def print_tables(runs, setting):
    """What has been run in a setting, as a table on the screen."""
    known = {**dataclasses.asdict(setting), "backend": keras.backend.backend()}
    same = {k: known[k] for k in results.TRAINING}
    own = [r for r in runs if all(r.get(k) == v for k, v in same.items())]
    target = {k: getattr(setting, k) for k in results.TARGET}
    columns, rows = table(results.of_target(own, target))
    reporting.print_table(f"{_title(same)}; {_removed(target)}", columns, rows)


# --- the page -----------------------------------------------------------------------------------


def written(runs):
    """What stands between the markers."""
    text = f"{_described(runs)}"
    for training, own in _trainings(runs):
        text += f"\n## {_title(training)}\n"
        if _is_drawn(training, own):
            text += f"\n![{_caption(training)}]({_picture(training)})\n"
        for target in _targets(own):
            columns, rows = table(results.of_target(own, target))
            lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
            found = "".join(f"| {' | '.join(line)} |\n" for line in lines)
            command = _command(training | target)
            text += f"\n### {_removed(target)}\n\n    {command}\n\n{found}"
    return text


def page(before, runs):
    """The page with what is between its markers written anew.

    Raises:
        ValueError: the page has not both markers.
    """
    begin, end = MARKERS
    if begin not in before or end not in before:
        raise ValueError(f"Expected the lines {begin.strip()} and {end.strip()} in the page.")
    head, rest = before.split(begin, 1)
    return head + begin + written(runs) + end + rest.split(end, 1)[1]


def _described(runs):
    """The methods and options that were run."""
    known = {r["method"].split("+")[0] for r in runs}
    text = "\nThe methods:\n\n"
    text += "".join(f"- `{n}`: {m.what}\n" for n, m in methods.METHODS.items() if n in known)
    extras = {o for r in runs for o in r["method"].split("+")[1:]}
    own = "".join(f"- `+{n}`: {what}\n" for n, what in methods.OPTIONS.items() if n in extras)
    return text + own


def _trainings(runs):
    """Pairs of a training and its runs, if something was removed; those from scratch last."""
    pairs = results.grouped(runs, results.TRAINING)
    pruned = [(training, own) for training, own in pairs if _targets(own)]
    order = ("trained", "pretrained", "scratch")
    return sorted(pruned, key=lambda pair: order.index(pair[0]["regime"]))


def _targets(runs):
    """What was removed, with whatever else."""
    found = [target for target, _ in results.grouped(runs, results.TARGET)]
    return [t for t in found if t["measure"] is not None]


def _title(training):
    width = f" of width {training['width']}" if training["width"] else ""
    side = training["image_size"]
    images = f"{training['train_images']:,} training images of {side}x{side} pixels"
    steps = f"{training['steps']} steps at a peak rate of {training['fit_rate']}"
    ways = {
        "trained": f"trained for {training['epochs']} epochs, then {steps}",
        "pretrained": f"{training['epochs']} epochs on weights of ImageNet",
        "scratch": f"{training['epochs']} epochs from scratch",
    }
    on = ", on JAX" if training["backend"] == "jax" else ""
    return f"{training['model']}{width}, {images}, {ways[training['regime']]}{on}"


def _removed(target):
    return f"{target['sparsity']:.0%} of the {target['measure']} removed"


def _command(setting):
    given = {k: setting[k] for k in (*NAMED, *results.TARGET) if setting[k] is not None}
    flags_given = " ".join(f"--{k}={v}" for k, v in given.items())
    script = "python examples/benchmarks/comparison/run.py"
    if setting["backend"] == "jax":
        script = "KERAS_BACKEND=jax python examples/benchmarks/comparison/on_device.py"
    return f"{script} --regime={setting['regime']} --model={setting['model']} {flags_given}"


def _picture(training):
    begun = [training["regime"]] if training["regime"] != "scratch" else []
    words = ["compare", *begun, training["model"]]
    words += [f"w{training['width']}"] if training["width"] else []
    words += [f"{training['image_size']}px", training["train_images"], f"e{training['epochs']}"]
    words += [f"steps{training['steps']}", f"rate{training['fit_rate']}"] * bool(training["steps"])
    words += ["jax"] if training["backend"] == "jax" else []
    return f"images/{'_'.join(map(str, words))}.png"


# --- pictures -----------------------------------------------------------------------------------


def _caption(training):
    return "Accuracy against what is kept" if training["regime"] == "scratch" else "Differences"


def _control(runs):
    """What others are set against in a picture: L1 with even shares, or dense; None if neither."""
    known = {r["method"] for r in runs}
    return next((c for c in reversed(CONTROLS) if c in known), None)


def _is_drawn(training, runs):
    """A picture of trained networks shows differences, for which there has to be a control."""
    return training["regime"] == "scratch" or _control(runs) is not None


def draw(runs, training):
    """The picture of a training."""
    kept = training["regime"] == "scratch"
    return draw_kept(runs, _title(training)) if kept else draw_ahead(runs, _title(training))


PANELS = (
    ("weights", "kept_weights", "weights kept, %"),
    ("macs", "kept_macs", "multiply-accumulates (MACs) kept, %"),
    ("macs", "tflite_latency_ratio", "latency where MACs were removed, % of dense"),
)


def _looks():
    """One colour and one marker per method, the same in every picture; black is the dense one."""
    names = [n for n in methods.METHODS if n != "as_trained"]
    colours = ["black", *(f"C{i % 10}" for i in range(len(names)))]
    markers = "sov^D<>pP*XhHd1234+x"
    return {
        n: {"color": colour, "marker": markers[i % len(markers)]}
        for i, (n, colour) in enumerate(zip(names, colours, strict=False))
    }


def draw_kept(runs, title):
    """Test accuracy against what is kept, and against time; bars are standard deviations."""
    import matplotlib.pyplot as plt

    runs = [r for r in runs if r["test"] is not None]
    shown = [panel for panel in PANELS if any(r["measure"] == panel[0] for r in runs)]
    figure = plt.figure(figsize=(2.5 + 4 * len(shown), 4.5), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, (measure, key, label) in zip(panels, shown, strict=True):
        own = [r for r in runs if r["measure"] in (None, measure) and r.get(key) is not None]
        for method, looks in _looks().items():
            _draw_method(panel, [r for r in own if r["method"] == method], key, looks)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    drawn = [panel.get_legend_handles_labels() for panel in panels]
    named = {name: handle for own in drawn for handle, name in zip(*own, strict=True)}
    figure.suptitle(title)
    figure.legend(named.values(), named, loc="outside right center", frameon=False)
    return figure


def _draw_method(panel, runs, key, looks):
    """A line per set of options, from target to target."""
    for options, alike in results.grouped(runs, results.OPTIONS):
        points = sorted(
            [100 * (f or 0) for f in (of(key), of("test"), results.deviation(some, "test"))]
            for _, some in results.grouped(alike, ("sparsity",))
            for of in [lambda k, some=some: results.mean(some, k)]
        )
        other = {"ls": ":", "mfc": "none"} if any(options.values()) else {}
        own = looks | {"lw": 1, "capsize": 3} | other
        panel.errorbar(*zip(*points, strict=True), label=results.name(alike[0]), **own)


def draw_ahead(runs, title):
    """Points ahead of the control, with 95 % intervals; a panel per target."""
    import matplotlib.pyplot as plt

    targets, control = _targets(runs), _control(runs)
    figure = plt.figure(figsize=(2 + 4 * len(targets), 6), layout="constrained")
    panels = figure.subplots(1, len(targets), squeeze=False)[0]
    for panel, target in zip(panels, targets, strict=True):
        _draw_target(panel, results.of_target(runs, target), control)
        panel.set_title(_removed(target), fontsize="medium")
        panel.set_xlabel(f"points ahead of {control} on the same seeds")
    panels[0].legend(loc="best")
    figure.suptitle(title.replace(", trained", ",\ntrained"), fontsize="medium")
    return figure


def _draw_target(panel, runs, control):
    others = [r for r in runs if r["method"] == control]
    rows = {results.name(own[0]): own for _, own in results.grouped(runs, results.IDENTITY[:-1])}
    found = {
        key: {n: results.difference(own, others, key) for n, own in rows.items()} for key in IMAGES
    }
    known = [n for n in rows if found["held_out"][n]]
    ordered = sorted(known, key=lambda n: found["held_out"][n][0])
    for i, (key, label) in enumerate(IMAGES.items()):
        means, halves = ([found[key][n][j] or 0 for n in ordered] for j in (0, 1))
        places = [place + 0.2 * (0.5 - i) for place in range(len(ordered))]
        bars = {"fmt": "o", "ms": 4, "capsize": 2, "label": label}
        panel.errorbar([100 * m for m in means], places, xerr=[100 * h for h in halves], **bars)
    panel.set_yticks(range(len(ordered)), ordered)
    panel.axvline(0, color="black", lw=0.8)
    panel.grid(alpha=0.3)


def main(argv):
    """Entry point of absl."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    runs, path = results.load(flags.FLAGS.results_dir), Path(flags.FLAGS.page)
    path.write_text(page(path.read_text(encoding="utf-8"), runs), encoding="utf-8")
    (path.parent / "images").mkdir(exist_ok=True)
    for training, own in _trainings(runs):
        if _is_drawn(training, own):
            _save(draw(own, training), path.parent / _picture(training))


def _save(figure, path):
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    flags.DEFINE_string("results_dir", str(RESULTS), "Folder of the results.")
    flags.DEFINE_string("page", str(PAGE), "The page to write.")
    app.run(main)
