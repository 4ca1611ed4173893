"""Writes measured numbers into README.md and the pages of docs: `make results`.

    python examples/benchmarks/pages.py --check

A page marks where they go, and what stands between the marks is written anew:

    <!-- results: longer -->
    <!-- end -->

The name is that of a function below, listed in BLOCKS. Each takes its numbers from committed files:
a line per run in `examples/benchmarks/results`, and rows beside the pages in `docs/benchmarks`.
--check changes nothing and fails if a page is not up to date.
"""

import functools
import json
import re
import statistics
import sys
import textwrap
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent / "comparison"))

import results

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 100  # of a page's source
RUNS = ROOT / "examples" / "benchmarks" / "results"
ROWS = ROOT / "docs" / "benchmarks"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Trainings: what all methods of a table have in common.
SMALL = {"regime": "scratch", "backend": "tensorflow"}
SHORT = {**SMALL, "model": "resnet20", "image_size": 16, "train_images": 12800, "epochs": 12}
LONG = {**SHORT, "epochs": 48}
FEW = {**SHORT, "train_images": 3200, "epochs": 96}
FEW_SHORT = {**SHORT, "train_images": 3200}
LARGE = {**SHORT, "image_size": 32}
WHOLE = {
    "regime": "scratch",
    "model": "resnet20",
    "image_size": 32,
    "train_images": 50000,
    "epochs": 50,
}
DEEP = {**SMALL, "model": "resnet56", "image_size": 16, "train_images": 6400, "epochs": 12}
WIDE = {**SMALL, "model": "vgg16", "image_size": 32, "train_images": 6400, "epochs": 12}

TRAINED = {"regime": "trained", "backend": "tensorflow", "steps": 200}
NETWORKS = {  # that were trained before
    "resnet20": "ResNet-20",
    "vgg16": "VGG16-BN, a quarter as wide",
    "mobilenet": "MobileNetV2, half as wide",
}
TRANSFER = {"regime": "pretrained", "model": "efficientnet_lite0", "epochs": 5}
SEEDS = range(5)  # of the rows that decide
ON_GPU = {**SHORT, "backend": "jax", "epochs": 48}

NAMES = {
    "dense": "dense, nothing removed",
    "static": "**keras_polar**, static gates",
    "dynamic": "**keras_polar**, dynamic gates",
    "static_logits": "static gates by logits alone, as in earlier versions",
    "dynamic_logits": "dynamic gates by logits alone, as in earlier versions",
    "both_logits": "the same on channels and on residual branches",
    "narrow": "a uniformly narrower network, from scratch",
    "narrow_longer": "the narrower network, with as many operations of training as ours",
    "shallow": "a shallower network, from scratch",
    "l1_even": "filters with the smallest L1 norm, cut when our gates settle",
    "random_even": "filters at random, cut when our gates settle",
    "fisher_per_cost": "least Fisher information over cost, cut when our gates settle",
    "slimming": "network slimming: L1 on the scales of BatchNorm (Liu et al., 2017)",
    "polarized_slimming": "the same with the polarization regulariser of Zhuang et al. (2020)",
    "group_norm_free": "smallest norm of all that makes a unit, over all groups (as OTO and ATO)",
    "three_stage": "three stages: trained, cut by L1, fine-tuned for half as many epochs",
    "relevance_even": "share of the unit in the logit of the true class (after Aketi et al., 2020)",
    "gradual": "smallest L1 norm, a little after every epoch until then (after Roy et al., 2020)",
    "density_even": "units that are zero most often (after Foldy-Porto et al., 2020)",
    "magnitude": "tfmot's magnitude pruning: half of every kernel is zeros",
}
COLUMNS = ("", "accuracy, %", "weights", "MACs", "training", ".tflite time")


# --- what there is ---------------------------------------------------------------------------


@functools.cache
def load():
    """All runs, as dicts."""
    texts = (p.read_text(encoding="utf-8") for p in sorted(RUNS.glob("*.jsonl")))
    return [json.loads(line) for text in texts for line in text.splitlines()]


@functools.cache
def rows(name):
    """Row name -> row of a file beside the pages."""
    lines = (ROWS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["name"]: row for row in map(json.loads, lines)}


def runs(method, training, measure="macs", sparsity=0.5, round_to=None, seed=None):
    """The runs of a method; those of the dense network depend on nothing but the training."""
    target = {"measure": measure, "sparsity": sparsity, "round_to": round_to}
    wanted = {"method": method, **training, **({} if method.startswith("dense") else target)}
    wanted |= {} if seed is None else {"seed": seed}
    measured = (r for r in load() if r["test"] is not None)
    found = [r for r in measured if all(r[k] == v for k, v in wanted.items())]
    if not found:
        raise LookupError(f"Expected runs with {wanted} in {RUNS}; there are none.")
    if len({r["seed"] for r in found}) < len(found):
        raise LookupError(f"Expected one run per seed with {wanted} in {RUNS}; say more of them.")
    return found


def mean(found, key):
    return statistics.mean(r[key] for r in found)


def accuracy(found):
    return 100 * mean(found, "test")


def effort(found, dense):
    """Multiply-accumulates of the training, those of the dense network's as 1."""
    return mean(found, "training_macs") / mean(dense, "training_macs")


def epochs(found):
    """For how long a network without gates was trained: a backward pass counts as two forward."""
    run = found[0]
    return round(run["training_macs"] / (3 * run["macs"] * run["train_images"]))


# --- words and tables ------------------------------------------------------------------------


def table(head, body):
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(found):
    """Mean accuracy and, of several runs, its sample standard deviation."""
    values = [100 * r["test"] for r in found]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def cells(found, dense):
    """What COLUMNS say about a method."""
    kept = (f"{mean(found, k):.0%}".replace("%", " %") for k in ("kept_weights", "kept_macs"))
    time = f"{mean(found, 'tflite_latency_ratio'):.2f}"
    return (spread(found), *kept, f"{effort(found, dense):.2f}", time)


def lines(methods, training, **target):
    """A row for each method; a pair is a method and its `round_to`."""
    dense, found = runs("dense", training, seed=target.get("seed")), []
    for method in methods:
        method, round_to = method if isinstance(method, tuple) else (method, None)
        name = f"the same with `round_to={round_to}`" if round_to else NAMES[method]
        own = runs(method, training, round_to=round_to, **target)
        found.append((name, *cells(own, dense)))
    return found


def images(training):
    side, count = training["image_size"], training["train_images"]
    return f"{count:,} images of {side}x{side} pixels, {training['epochs']} epochs"


def seeds(found):
    return "one seed" if len(found) == 1 else f"{len(found)} seeds, ± standard deviation"


def points(found, other):
    """How much better or worse: "0.5 points ahead of", "0.5 points behind"; "level with"."""
    gap = accuracy(found) - accuracy(other)
    if abs(gap) < 0.05:
        return "level with"
    return f"{abs(gap):.1f} points {'ahead of' if gap > 0 else 'behind'}"


def loss(found, dense):
    return f"{accuracy(dense) - accuracy(found):.1f}"


def share(found, key="kept_weights"):
    return f"{100 * mean(found, key):.0f} %"


def time(found):
    return f"{mean(found, 'tflite_latency_ratio'):.2f}"


def chance(found):
    return " One seed: differences under a point may be chance." if len(found) == 1 else ""


def wrapped(text):
    """Paragraphs and list items filled to the width of a page's source; tables as they are."""
    parts = re.split(r"(\n\n|\n(?=- |\|)|(?<=\|)\n)", text.strip())
    return "".join(p if p.startswith("|") or not p.strip() else _filled(p) for p in parts) + "\n"


def _filled(part):
    indent = "  " if part.startswith("- ") else ""
    return textwrap.fill(
        " ".join(part.split()),
        WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


# --- blocks ----------------------------------------------------------------------------------


def start():
    """The table of the README, and what it says."""
    names = NAMES | {
        "dense": "dense, trained on as long",
        "dynamic": "**keras_polar**",
        "fisher_per_cost": "cut at once by Fisher information over cost",
        "l1_even": "cut at once by L1 norm, the same share of every layer",
    }
    dense, ours, fisher, l1 = zip(*map(on_trained, NETWORKS), strict=True)
    methods = {"dense": dense, "dynamic": ours, "fisher_per_cost": fisher, "l1_even": l1}
    body = [
        (names[m], *(beside(*pair) for pair in zip(found, dense, strict=True)))
        for m, found in methods.items()
    ]
    weights = [runs("dynamic", TRAINED | {"model": n}, "weights", round_to=1) for n in NETWORKS]
    paired = (results.difference(*p, "test")[0] for p in zip(dense, weights, strict=True))
    of_weights = [f"{100 * gap:.1f}" for gap in paired]
    alone = runs("static", {**ON_GPU, "schedule": ""})
    whole, longer = (runs(m, ON_GPU) for m in ("dense", "narrow_longer"))
    own, (full, narrow) = runs("dynamic", LONG), (runs(m, LONG) for m in ("dense", "narrow_longer"))
    return f"""\
CIFAR-10, trained networks, half of their multiply-accumulates removed in one `fit` of 200 steps, a
seventh of the training before: accuracy in %, in brackets against the dense network; means of
{len(ours[0])} seeds, the same data and optimiser for all, images encoded as JPEG once more.

{table(("", *NETWORKS.values()), body)}
- **The loss against dense is {listed(loss(*p) for p in zip(ours, dense, strict=True))} points**,
  with half of the *weights* gone instead {listed(of_weights)}
  ({", ".join(str(len(own)) for own in weights)} seeds).
- Ahead of L1 by {listed(ahead(*p) for p in zip(ours, l1, strict=True))}, of Fisher by
  {listed(ahead(*p) for p in zip(ours, fisher, strict=True))} points (95 % intervals).
- From scratch (ResNet-20, {ON_GPU["epochs"]} epochs, static gates, {len(alone)} seeds, an H100)
  ours is {ahead(alone, longer)} points ahead of a narrow network with as many operations of
  training on test images, **{ahead(alone, longer, "held_out")} on training images held out**;
  **{ahead(alone, whole)} of dense**. With dynamic gates, one seed:
  {ahead(own, narrow)}, **{ahead(own, full)}**.
- {transferred()}
"""


def transferred():
    """What a pretrained network comes to, in a sentence."""
    own = runs("dynamic", {**TRANSFER, "schedule": ""}, round_to=1)
    dense, l1 = (runs(m, TRANSFER) for m in ("dense", "l1_even"))
    times = ([r for r in found if "tflite_latency_ratio" in r] for found in (own, l1))
    return f"""\
Transfer (EfficientNet-Lite0 with weights of ImageNet, {own[0]["train_images"]:,} images at 64
pixels, {own[0]["epochs"]} epochs that fine-tune and prune half of the MACs, {len(own)} seeds):
{accuracy(own):.1f} %, **the whole network {accuracy(dense):.1f} % ({ahead(own, dense)})**, cut at
the same step by L1 norm {accuracy(l1):.1f} % ({ahead(own, l1)}); our file takes
{" and L1's ".join(map(time, times))} of the whole network's time."""


def on_trained(network):
    """The runs of the README's methods on a network."""
    methods = {"dense": None, "dynamic": 1, "fisher_per_cost": None, "l1_even": None}
    training = TRAINED | {"model": network}
    return [runs(m, training, round_to=round_to) for m, round_to in methods.items()]


def beside(found, dense):
    """Accuracy, and in brackets what it is ahead of the dense network's."""
    gap = accuracy(found) - accuracy(dense)
    return f"{accuracy(found):.1f}" + ("" if found is dense else f" ({gap:+.1f})")


def ahead(found, control, key="test"):
    """Points ahead of a control on the same seeds, with half of the 95 % interval."""
    gap, half, _ = results.difference(found, control, key)
    return signed(gap, half)


def signed(mean, half):
    """In points, with half of the interval if there is one."""
    return f"{100 * mean:+.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")


def listed(texts):
    *others, last = texts
    return f"{', '.join(others)} and {last}"


def short_macs():
    methods = ("static_logits", ("static_logits", 1), "dynamic_logits", "narrow", "narrow_longer")
    methods += ("l1_even", "random_even")
    dense, ours = runs("dense", SHORT), runs("static_logits", SHORT)
    exact, longer = runs("static_logits", SHORT, round_to=1), runs("narrow_longer", SHORT)
    l1, large = runs("l1_even", SHORT), [runs(m, LARGE) for m in ("dense", "static_logits")]
    return f"""\
{images(SHORT)}; {seeds(ours)}.

{table(COLUMNS, lines(("dense", *methods), SHORT))}
- The loss against dense is {loss(ours, dense)} points (static) and
  {loss(runs("dynamic_logits", SHORT), dense)} (dynamic gates).
- The narrower network that is trained for as many operations, {epochs(longer)} epochs, is
  {points(longer, ours)} ours and {points(longer, dense)} the dense one: in so few epochs nothing
  here is trained to its end.
- Cuts by L1 norm at the same time, with the same widths and training as `round_to=1`, are
  {points(l1, exact)} static gates.
- By default kept widths are multiples of eight. At half of the MACs such a network is
  {points(ours, exact)} the one with `round_to=1`; its file needs {time(ours)} instead of
  {time(exact)} of the dense time.
- At 32x32 pixels (seed 0) the dense network has {spread(large[0])} %, static gates
  {spread(large[1])} %.
"""


def short_weights():
    methods = (
        "dense",
        "static_logits",
        "dynamic_logits",
        "narrow",
        "narrow_longer",
        "l1_even",
        "random_even",
    )
    ours = runs("static_logits", SHORT, "weights")
    return f"""\
{images(SHORT)}; {seeds(ours)}.

{table(COLUMNS, lines(methods, SHORT, measure="weights"))}"""


def shares():
    """Other shares of the multiply-accumulates, of one seed."""
    methods = ("dynamic_logits", "static_logits", "narrow", "l1_even")
    body = [[f"{s:.0%}", *(_beside(m, s) for m in methods)] for s in (0.3, 0.5, 0.7)]
    head = ("MACs removed", "dynamic gates", "static gates", "narrow, from scratch", "L1 cuts")
    return f"""\
{images(SHORT)}; seed 1. Accuracy in % and, in brackets, the time of the file over the dense one's:

{table(head, body)}"""


def _beside(method, sparsity):
    try:
        found = runs(method, SHORT, sparsity=sparsity, seed=1)
    except LookupError:
        return ""
    return f"{spread(found)} ({time(found)})"


def others():
    methods = (
        *(
            "static_logits",
            ("static_logits", 1),
            "l1_even",
            "slimming",
            "polarized_slimming",
            "group_norm_free",
        ),
        *("three_stage", "relevance_even", "gradual", "density_even", "magnitude"),
    )
    exact, polarized = (
        runs("static_logits", SHORT, round_to=1, seed=1),
        runs("polarized_slimming", SHORT),
    )
    stages, dense = runs("three_stage", SHORT), runs("dense", SHORT, seed=1)
    return f"""\
{images(SHORT)}; seed 1.

{table(COLUMNS, lines(("dense", *methods), SHORT, seed=1))}
None of the other methods rounds widths. With this seed polarized scales of BatchNorm are
{points(polarized, exact)} static gates with `round_to=1`; a single seed says no more. Three stages
take {effort(stages, dense) / effort(exact, dense):.1f} times our training. Zeros alone make no file
smaller or faster.
"""


def longer():
    methods = ("dense", "static_logits", ("static_logits", 1), "l1_even", "narrow", "narrow_longer")
    dense, ours, l1, more = (
        runs(m, LONG) for m in ("dense", "static_logits", "l1_even", "narrow_longer")
    )
    exact = runs("static_logits", LONG, round_to=1)
    few = ("dense", "static_logits", "l1_even", "narrow", "narrow_longer")
    return f"""\
{images(LONG)}; {seeds(ours)}.

{table(COLUMNS, lines(methods, LONG))}
The loss is {loss(ours, dense)} points, {loss(exact, dense)} with `round_to=1`. The narrower network
with equal training ({epochs(more)} epochs) is {points(more, ours)} ours, cuts by L1 norm are
{points(l1, ours)} ours and {points(l1, exact)} the network with `round_to=1`.

{images(FEW)}; {seeds(runs("static_logits", FEW))}.

{table(COLUMNS, lines(few, FEW))}
Where images rather than capacity are short, every sane way of halving the network will do.
"""


def whole():
    methods = ("dense", "static_logits", "narrow_longer")
    dense, ours, more = (runs(m, WHOLE) for m in methods)
    return f"""\
{images(WHOLE)}; {seeds(ours)}; JAX on an H100.

{table(COLUMNS, lines(methods, WHOLE))}
Where images are plenty, the loss is {loss(ours, dense)} points, and the narrower network with
equal training ({epochs(more)} epochs) is {points(more, ours)} ours, with {share(more)} of the
weights. L1 cuts and widths without rounding were not run here.
"""


def networks():
    deep = ("dense", "both_logits", "static_logits", "narrow", "shallow")
    wide = ("dense", "static_logits", "narrow", "l1_even")
    dense, both, shallow = (runs(m, DEEP) for m in ("dense", "both_logits", "shallow"))
    ours, narrow = (runs(m, WIDE, "weights") for m in ("static_logits", "narrow"))
    return f"""\
ResNet-56, half of the MACs: {images(DEEP)}; seed 1.

{table(COLUMNS, lines(deep, DEEP))}
With gates on residual branches too, `granularity=("channels", "blocks")`, the network is
{points(both, dense)} the dense one, with {share(both)} of the weights. **A shallower network from
scratch is {points(shallow, both)} that**, with {share(shallow)} of the weights: in so short a run
depth itself is in the way.

VGG16-BN of a quarter of the width, half of the weights: {images(WIDE)}; seed 1.

{table(COLUMNS, lines(wide, WIDE, measure="weights"))}
The narrower network from scratch is {points(narrow, ours)} ours.
"""


def compaction():
    small, masked = (spread(runs(m, FEW_SHORT)) for m in ("static_logits", "masked_logits"))
    return f"""\
Accuracy with and without compaction: {small} and {masked} % in runs of {images(FEW_SHORT)},
{seeds(runs("static_logits", FEW_SHORT))}, with the recipe of an earlier version.
"""


CUTS = {  # of a trained network, before it is trained on
    "random_even": "at random, the same share of every layer",
    "random_inside": "at random, inside the blocks only",
    "l1_even": "by L1 norm, the same share of every layer",
    "l1_inside": "by L1 norm, inside the blocks only",
    "group_norm_free": "by the norm of all that makes a unit, over all groups",
    "fisher_inside": "by Fisher information, inside the blocks only",
    "fisher_per_cost": "by Fisher information over cost, over all groups",
}


def controls():
    """How far the default is ahead of cuts at step 0, and on the mean of the networks."""
    body = [(what, *_leads(method)) for method, what in CUTS.items()]
    where = ("all three, held out", "all three, test")
    return table(("cut at once", *NETWORKS.values(), *where), body)


def _leads(method):
    """Points ahead on the test images of each network, and on the mean of the networks."""
    held_out, test = (
        [_lead(network, method, key) for network in NETWORKS] for key in ("held_out", "test")
    )
    together = (np.mean(gaps, axis=0) for gaps in (held_out, test))
    return [signed(*results.interval(gaps)) for gaps in (*test, *together)]


def _lead(network, method, key):
    """By seed: what the default loses of the dense network, and how much more the control does.

    The controls ran on JAX, ours on TensorFlow: each is set against the dense network of its own.
    """
    ours, control = ({**TRAINED, "model": network, "backend": b} for b in ("tensorflow", "jax"))
    return _gaps("dynamic", ours, key, round_to=1) - _gaps(method, control, key)


def _gaps(method, training, key, round_to=None):
    """By seed: how far a method is ahead of the dense network."""
    training = training | {"fit_rate": 0.02}
    own, dense = (
        {r["seed"]: r[key] for r in found}
        for found in (runs(method, training, round_to=round_to), runs("dense", training))
    )
    return np.array([own[seed] - dense[seed] for seed in SEEDS])


def transfers():
    """What was run on weights of ImageNet, the whole network trained on as long beside it."""
    methods = ("dense", "dynamic", "fisher_per_cost", "l1_even", "narrow", "magnitude")
    body = [_transfer(method, TRANSFER) for method in methods]
    body += [_transfer(method, {**TRANSFER, "epochs": 10}) for method in ("dense", "dynamic")]
    head = ("", "epochs", "seeds", "test, %", "of the whole, held out", "of the whole, test")
    return table(head, body)


def _transfer(method, training):
    dense, gaps = runs("dense", training), ("", "")
    own = dense
    if method != "dense":
        options = ({"schedule": ""}, 1) if method == "dynamic" else ({}, None)
        own = runs(method, training | options[0], round_to=options[1])
        gaps = [ahead(own, dense, key) for key in ("held_out", "test")]
    return (NAMES[method], f"{training['epochs']}", f"{len(own)}", spread(own), *gaps)


LENGTHS = (200, 600)  # steps of fits of all trained networks with the default
OTHER_LENGTHS = (  # network, steps, peak rate, backend, gates
    ("resnet20", 600, 0.02, "jax", "static"),
    ("vgg16", 600, 0.02, "jax", "static"),
    ("resnet20", 600, 0.05, "tensorflow", "dynamic"),
    ("resnet20", 600, 0.1, "tensorflow", "dynamic"),
)


def lengths():
    """How far the default is from the dense network trained on as long."""
    body = []
    for steps in LENGTHS:
        body += [_length(n, steps, 0.02, "tensorflow", "dynamic") for n in NETWORKS]
        body.append(_mean_length(steps))
    body += [_length(*other) for other in OTHER_LENGTHS]
    return table(("network", "steps", "peak rate", "gates", "seeds", "held out", "test"), body)


def _length(network, steps, rate, backend, gate):
    training = {**TRAINED, "model": network, "backend": backend, "steps": steps, "fit_rate": rate}
    own, dense = runs(gate, training, round_to=1), runs("dense", training)
    count = results.difference(own, dense, "test")[2]
    gaps = (ahead(own, dense, key) for key in ("held_out", "test"))
    return (NETWORKS[network], f"{steps}", f"{rate}", gate, f"{count}", *gaps)


def _mean_length(steps):
    """The mean of the networks, by seed."""
    trainings = [{**TRAINED, "model": network, "steps": steps} for network in NETWORKS]
    gaps = (
        np.mean([_gaps("dynamic", training, key, round_to=1) for training in trainings], axis=0)
        for key in ("held_out", "test")
    )
    words = ("**mean of the three**", f"{steps}", "0.02", "dynamic", f"{len(SEEDS)}")
    return (*words, *(signed(*results.interval(own)) for own in gaps))


TARGETS = (("macs", 0.3), ("macs", 0.5), ("macs", 0.7), ("weights", 0.5))
ON_JAX = (("vgg16", "macs", 0.3), ("vgg16", "macs", 0.7))  # with static gates


def targets():
    """Other shares than half of the MACs, of all trained networks."""
    body = [_target(network, *target) for network in NETWORKS for target in TARGETS]
    where = ("of dense, test", "of L1 cuts, held out", "of L1 cuts, test")
    return table(("network", "removed", "gates", "seeds", *where), body)


def _target(network, measure, share_gone):
    is_jax = (network, measure, share_gone) in ON_JAX
    backend, gate = ("jax", "static") if is_jax else ("tensorflow", "dynamic")
    training = TRAINED | {"model": network, "backend": backend, "fit_rate": 0.02}
    target = {"measure": measure, "sparsity": share_gone}
    own, l1 = runs(gate, training, round_to=1, **target), runs("l1_even", training, **target)
    dense, count = runs("dense", training), results.difference(own, l1, "test")[2]
    what = f"{share_gone:.0%} of the {'MACs' if measure == 'macs' else measure}"
    gaps = (ahead(own, dense), ahead(own, l1, "held_out"), ahead(own, l1))
    return (NETWORKS[network], what, gate, f"{count}", *gaps)


SHORTLY = {**TRAINED, "model": "resnet20", "fit_rate": 0.02}
LONGER = {**SHORTLY, "steps": 600, "fit_rate": 0.05}
TRIED = {  # what -> the method, the same without, their training
    "`teacher=model`, the network before pruning": ("dynamic+teacher", "dynamic", SHORTLY),
    "the same, 600 steps at a peak rate of 0.05": ("dynamic+teacher", "dynamic", LONGER),
    "the same teacher for cuts by L1 norm": ("l1_even+teacher", "l1_even", SHORTLY),
    "the same teacher for the whole network": ("dense+teacher", "dense", SHORTLY),
    "the rate's course begun anew when the gates settle": ("dynamic+restart", "dynamic", SHORTLY),
    "BatchNorm estimated anew at the cut, by L1 norm": ("l1_even+statistics", "l1_even", SHORTLY),
    "gates by their logits alone, settled after 40 %": ("dynamic_logits", "dynamic", SHORTLY),
    "EfficientNet-Lite0: pressed from 10 to 30 %, settled after 40 %": (
        "dynamic",
        "dynamic",
        {**TRANSFER, "schedule": "0.1,0.3,0.4"},
    ),
    "ResNet-20 from scratch, 48 epochs: from 4 to 24 %, settled after 40 %": (
        "static",
        "static",
        {**ON_GPU, "schedule": "0.04,0.24,0.4"},
    ),
}


def tried():
    """What was tried beside the default, on the same seeds."""
    return table(
        ("what", "seeds", "held out", "test"),
        [(what, *_beside_default(*tried)) for what, tried in TRIED.items()],
    )


def _beside_default(method, without, training):
    def of(method, training):
        return runs(method, training, round_to=1 if method.startswith("dynamic") else None)

    usual = {"schedule": ""} if "schedule" in training else {}
    own, other = of(method, training), of(without, training | usual)
    count = results.difference(own, other, "test")[2]
    return (f"{count}", *(ahead(own, other, key) for key in ("held_out", "test")))


def step_times():
    """Quartiles of the times of a step and of a run, over the dense network's."""
    ratios = rows("training_cost")["overhead"]["ratios"]
    kinds = {
        "static gates, under pressure": ("static", "static"),
        "dynamic gates, under pressure": ("dynamic", "dynamic"),
        "compacted: what trains once the gates are settled": _each("compacted, {}"),
        "**whole run, static gates**": _each("whole run, static, {}"),
        "**whole run, dynamic gates**": _each("whole run, dynamic, {}"),
        "three stages: train, cut, fine-tune for half as many epochs": _each("three stages, {}"),
    }
    head = ("step", "half of the weights gone", "half of the MACs gone")
    body = [(name, *(_quartiles(ratios[k]) for k in own)) for name, own in kinds.items()]
    return table(head, body)


def _each(name):
    return [name.format(m) for m in ("weights", "macs")]


def _quartiles(ratios):
    lower, median, upper = ratios
    return f"{median:.2f} ({lower:.2f}, {upper:.2f})"


def profile():
    """Where a step spends its time, in percent of a dense step."""
    percent = rows("training_cost")["profile"]["percent"]
    kinds = ("dense", "static", "dynamic")
    body = [
        (what, *(f"{own[k]:.1f}" if k in own else "" for k in kinds))
        for what, own in percent.items()
    ]
    return table(("for", *kinds), body)


def training():
    """What a run costs, in operations and in time."""
    ratios = rows("training_cost")["overhead"]["ratios"]
    small, large = (ratios[f"compacted, {m}"][1] for m in ("macs", "weights"))
    run = ratios["whole run, static, macs"][1]
    return f"""\
A training step of ResNet-20 with gates takes {ratios["static"][1]:.2f} (static) or
{ratios["dynamic"][1]:.2f} times (dynamic) as long as a dense one; once the gates are settled and
the network is compacted, {large:.2f} (half of the weights gone) or {small:.2f} (half of the MACs).
With the default schedule and half of the MACs removed a run of static gates takes {run:.2f} of
the dense time.
"""


def speed():
    """How much faster float32 files become."""
    found = rows("latency")
    kinds = {"default": "by default", **{k: f"with `{k}`" for k in ("round_to=16", "round_to=1")}}
    body = [(name, *(f"{_speed_up(row, k):.2f}" for k in kinds)) for name, row in found.items()]
    return f"""\
How many times as fast the float32 file is with half of the MACs removed (of an earlier version,
with the same cost and partly other widths):

{table(("", *kinds.values()), body)}"""


def _speed_up(row, variant):
    return row["files"]["dense"]["float32"]["ms"] / row["files"][variant]["float32"]["ms"]


def coverage():
    found = [r for name, r in rows("../coverage").items() if not name.startswith("task ")]
    good = sum(not row["failure"] for row in found)
    return f"""\
- **Tried on what people use.** {good} of {len(found)} models of `keras.applications` and KerasHub
  hold the certificate: [every row, with the failures](docs/coverage.md).
"""


def gates():
    """What other gates and schedules do."""

    def own(gate=None, schedule="0.2,0.4,0.4"):
        wanted = {**SHORT, "method": "static_logits", "gate": gate, "schedule": schedule}
        held_out = (r for r in load() if r["held_out"] is not None)
        (run,) = (r for r in held_out if all(r.get(k) == v for k, v in wanted.items()))
        return f"{100 * run['held_out']:.1f}"

    return f"""\
By logits alone, as in earlier versions, neither that slope nor the initial logit of 2 matters much:
ResNet-20, half of the MACs removed with static gates, {own()} %; with a constant slope
{own("identity")} %, one that is zero beyond ±2
{own("clipped")} %, an initial logit of 1 or 4 {own("open1")} % and {own("open4")} % (rows `gate=`
of the [comparison](benchmarks/comparison.md); {images(SHORT)}, training images held out, one seed,
with which half a point is chance). Nor does it matter when the gates settle, after 30 %
({own(schedule="0.2,0.3,0.3")} %), 40 % ({own()} %, the run above) or 50 % of the
run ({own(schedule="0.2,0.5,0.5")} %), or much how hard they are pressed: `Schedule(rate=100)`, ten
times the default, has {own(schedule="0.2,0.4,0.4,4,100")} % (the same table, rows
`schedule=0.2,0.3,0.3`, `0.2,0.5,0.5` and `0.2,0.4,0.4,4,100`).
"""


BLOCKS = {
    f.__name__: f
    for f in (
        *(start, short_macs, short_weights, shares, others, longer, whole, networks, compaction),
        *(transfers, controls, lengths, targets, tried),
        *(step_times, profile, training, speed, coverage, gates),
    )
}


# --- pages -----------------------------------------------------------------------------------


def pages():
    """README.md and the pages of docs that have blocks."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [p for p in found if BLOCK.search(p.read_text(encoding="utf-8"))]


def written(text):
    """A page with its blocks as they should be."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{wrapped(BLOCKS[m[2]]())}\n{m[3]}", text)


def main(arguments):
    """Rewrites the pages; with --check, the exit code says whether there was something to do."""
    old = {p: p.read_text(encoding="utf-8") for p in pages()}
    changed = {p: new for p, text in old.items() if (new := written(text)) != text}
    for path, text in changed.items():
        print(path.relative_to(ROOT))
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    return bool(changed) and "--check" in arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
