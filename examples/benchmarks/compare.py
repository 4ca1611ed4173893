"""Polarized gates beside their controls: the same data, epochs, optimiser and seeds for all.

    python examples/benchmarks/compare.py --data_dir=FOLDER --seeds=0,1,2
    python examples/benchmarks/compare.py --table     # what has been run, as a table and a picture

Every run leaves a JSON file in --results_dir and is not repeated, so that an interrupted comparison
goes on where it stopped. Test images are only looked at after the last epoch. To choose a recipe,
`--evaluate_on=held_out` looks at the last 10,000 training images instead, which no run trains on.

With KERAS_BACKEND=jax, each epoch is one compiled program, which keeps a GPU busy (on_device.py).
Our gates settle at the end of an epoch then, and the optimiser starts anew, as it does for cuts.
TensorFlow is not needed then, if `packed.py` has made a file of the data: `--packed=FILE`.
Networks may be measured as files elsewhere: `--models_dir=FOLDER` saves them, and on a machine with
TensorFlow the same command adds what the results lack.

Methods:
  dense      the whole network
  narrow     a uniformly narrower network of the same cost, from scratch: the one to beat
  narrow_longer  the same with more epochs: as many training MACs as a run that is cut when our
             gates settle
  shallow    a ResNet of full width and fewer blocks, as close to the same cost as depths go
  dynamic    keras_polar with gates that look at each sample
  static     keras_polar with one logit per unit
  both       keras_polar with static gates on channels and on residual branches
  masked     as static, but the whole network trains to the end (compact=False)
  random     units chosen by lot are cut when our gates settle, the same share of every group
  l1         the same, filters with the smallest L1 norm (Li et al., 2017)
  three_stage   trained to the end, cut as l1, fine-tuned for half as many epochs at a tenth of the
             learning rate: what one pass saves
  slimming   L1 on the scales of BatchNorm, smallest scales cut, over all groups (Liu et al., 2017)
  polarized_slimming   the same with the polarization regulariser of Zhuang et al. (2020)
  density    units whose activation is zero most often (after Foldy-Porto et al., 2020)
  gradual    as l1, but a little after every epoch until then (after Roy et al., 2020)
  relevance  units with the least share in the logit of the true class (after Aketi et al., 2020)
  group_norm units whose zero-invariant group has the smallest norm, over all groups (the
             criterion of OTO and ATO, without ATO's controller network)
  magnitude  tfmot's magnitude pruning: that share of every kernel becomes zeros, none goes (needs
             the extra qat)
"""

import bisect
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cifar10
import comparison
import magnitude
import models
import packed
import reporting

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.costs.measures import MEASURES, cost_of
from keras_polar.coupling.coupling import couple
from keras_polar.rules import trace_model
from keras_polar.selection.budget import budget_of
from keras_polar.selection.select import select_units

SLIMMING = 1e-4  # weight of the penalty on BatchNorm scales, as Liu et al. have it
POLARIZATION_T = 1.2  # Zhuang et al. recommend 1.0 to 1.4
HELD_OUT = 10_000  # training images
SAMPLE = 512  # training images that a criterion may look at

ON_JAX = keras.backend.backend() == "jax"
if ON_JAX:
    import on_device

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of tensorflow-datasets.")
_PACKED = flags.DEFINE_string("packed", None, "File that packed.py made, instead of the folder.")
_MODELS = flags.DEFINE_string("models_dir", None, "Folder for trained networks; none: not kept.")
_RESULTS = flags.DEFINE_string(
    "results_dir", str(Path(__file__).parent / "results"), "Folder of the JSON files."
)
_MODEL = flags.DEFINE_enum("model", "resnet20", tuple(models.BUILDERS), "Architecture.")
_WIDTH = flags.DEFINE_integer("width", None, "Channels of the first stage.", lower_bound=1)
_METHODS = flags.DEFINE_list("methods", "dense,narrow,dynamic,static,random,l1", "What to run.")
_SEEDS = flags.DEFINE_list("seeds", "0,1,2", "Seeds of weights, data order and augmentation.")
_SPARSITY = flags.DEFINE_float("sparsity", 0.5, "Share to remove.", 0.0, 1.0)
_MEASURE = flags.DEFINE_enum("measure", "weights", ("weights", "macs"), "What is removed.")
_SCHEDULE = flags.DEFINE_string(
    "schedule",
    "",
    "Of our methods: warmup,ramp,settle,polarization,rate, as in 0.1,0.35,0.5; empty: default.",
)
_ROUND_TO = flags.DEFINE_integer(
    "round_to", None, "Our methods keep multiples; none: default.", lower_bound=1
)
_EPOCHS = flags.DEFINE_integer("epochs", 12, "Epochs of every method.", lower_bound=2)
_MAX_SPARSITY = flags.DEFINE_float(
    "max_sparsity",
    None,
    "Share of a group that our methods close at most; none: default.",
    0.0,
    1.0,
)
_TRAIN_IMAGES = flags.DEFINE_integer("train_images", 12_800, "The first so many.", lower_bound=1)
_TEST_IMAGES = flags.DEFINE_integer("test_images", 10_000, "The first so many.", lower_bound=1)
_EVALUATE_ON = flags.DEFINE_enum(
    "evaluate_on", "test", ("test", "held_out"), "Images that accuracy is measured on."
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", 32, "Pixels a side, 32, 16 or 8: smaller images are means of the larger ones."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images per step.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.1, "Peak learning rate.", 0.0)
_WEIGHT_DECAY = flags.DEFINE_float("weight_decay", 2e-4, "L2 penalty on kernels.", 0.0)
_FAKE_DATA = flags.DEFINE_bool(
    "fake_data", False, "Noise instead of CIFAR-10: only tests the plumbing."
)
_TABLE = flags.DEFINE_bool("table", False, "Run nothing, show what has been run.")


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that decides a run but its method and its seed; becomes part of the result."""

    model: str
    width: int | None
    sparsity: float
    measure: str
    schedule: str
    round_to: int | None
    max_sparsity: float | None
    epochs: int
    train_images: int
    test_images: int
    evaluate_on: str
    image_size: int
    batch_size: int
    learning_rate: float
    weight_decay: float

    @property
    def course(self) -> keras_polar.Schedule:
        """The schedule of our methods."""
        given = map(float, filter(None, self.schedule.split(",")))
        names = ("warmup", "ramp", "settle", "polarization", "rate")
        return keras_polar.Schedule(**dict(zip(names, given, strict=False)))

    @property
    def epochs_until_cut(self) -> int:
        """Whole epochs until our gates settle: then baselines cut."""
        return max(1, round(self.course.settle * self.epochs))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.train_images // self.batch_size)

    def effort(self, kept):
        """Training MACs over the dense run's, if a share `kept` of the MACs trains once settled."""
        select_units = self.course.settle
        return select_units + (1 - select_units) * kept

    def build(self, width=None):
        """The dense network, or one of another width."""
        return models.build(
            self.model,
            (self.image_size, self.image_size, 3),
            cifar10.CLASSES,
            width=width or self.width,
            weight_decay=self.weight_decay,
        )


class Shifted(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that starts at a later step: the rest of an interrupted run."""

    def __init__(self, schedule, offset):
        self.schedule, self.offset = schedule, offset

    def __call__(self, step):
        return self.schedule(step + self.offset)

    def get_config(self):
        return {"schedule": self.schedule, "offset": self.offset}


class Trainer:
    """Trains models in one setting and counts the multiply-accumulates that it takes."""

    def __init__(self, setting, data, seed):
        self.setting, self.macs, self.rng = setting, 0, np.random.default_rng(seed)
        self.sample = [x[:SAMPLE] for x in data]
        make = on_device.Examples if ON_JAX else cifar10.training_pipeline
        self.data = make(*data, batch_size=setting.batch_size, seed=seed)

    def __call__(self, model, first=0, last=None, epochs=None, penalty=None, gain=1.0):
        """Fits `model` from epoch `first` to before `last`, of `epochs` that the rate decays in.

        `gain` multiplies the learning rate.
        """
        setting = self.setting
        epochs = epochs or setting.epochs
        last = last or epochs
        rate = cifar10.learning_rate_schedule(
            gain * setting.learning_rate, epochs * setting.steps_per_epoch
        )
        cifar10.compile_classifier(model, Shifted(rate, first * setting.steps_per_epoch))
        if penalty is not None:
            _penalise_scales(model, penalty)
        # A backward pass costs about two forward ones. Counted first: once branches are closed,
        # the cost of a gated model is without them.
        self.macs += 3 * _macs(model) * setting.train_images * (last - first)
        if ON_JAX:
            on_device.fit(model, self.data, first, last)
        else:
            model.fit(self.data, epochs=last, initial_epoch=first, verbose=2)
        return model


def _macs(model):
    return keras_polar.cost(model).macs


# --- methods: (trainer, setting) -> the network that would be shipped ---------------------------


def dense(trainer, setting):
    return trainer(setting.build())


def narrow(trainer, setting):
    return trainer(_narrow(setting))


def narrow_longer(trainer, setting):
    model = _narrow(setting)
    share = _macs(model) / _macs(setting.build())
    effort = setting.effort(1 - setting.sparsity)
    return trainer(model, epochs=round(setting.epochs * effort / share))


def _narrow(setting):
    """A uniformly narrower network, as close to the wanted cost as widths go."""
    return setting.build(_narrow_width(setting))


@functools.cache
def _narrow_width(setting):
    stem = setting.build().get_layer("stem" if "vgg" not in setting.model else "stage1_conv1")
    wanted, costs = _wanted(setting), {}

    def cost(width):
        costs[width] = _cost(setting.build(width), setting.measure)
        return costs[width]

    bisect.bisect_left(range(1, int(stem.filters) + 1), wanted, key=cost)
    return min(costs, key=lambda width: abs(costs[width] - wanted))


def _wanted(setting):
    return (1 - setting.sparsity) * _cost(setting.build(), setting.measure)


def shallow(trainer, setting):
    if not setting.model.startswith("resnet"):
        raise app.UsageError(f"shallow: depths of ResNets are known, received {setting.model}.")
    depths = (name for name in models.BUILDERS if name.startswith("resnet"))
    networks = (dataclasses.replace(setting, model=name).build() for name in depths)
    wanted = _wanted(setting)
    return trainer(min(networks, key=lambda net: abs(_cost(net, setting.measure) - wanted)))


def _cost(model, measure):
    return getattr(keras_polar.cost(model), measure)


def gated(trainer, setting, **options):
    full = setting.build()
    own = {name: getattr(setting, name) for name in ("measure", "round_to", "max_sparsity")}
    own |= {"schedule": setting.course, **options}
    model = keras_polar.apply(full, setting.sparsity, **own)
    if ON_JAX:
        return _in_two_parts(trainer, setting, model)
    small = keras_polar.convert(trainer(model), verify=True)
    if options.get("compact", True):
        trainer.macs *= setting.effort(_macs(small) / _macs(full))
    return small


def _in_two_parts(trainer, setting, model):
    """What `fit` does in one on TensorFlow, up to the optimiser's momentum at the settle step."""
    then = setting.epochs_until_cut
    model.consensus.steps.assign(setting.epochs * setting.steps_per_epoch)
    trainer(model, last=then).settle()
    if not model.consensus.compact:
        return keras_polar.convert(trainer(model, first=then), verify=True)
    return trainer(keras_polar.convert(model, verify=True), first=then)


def magnitude_pruned(trainer, setting):
    full, steps = setting.build(), setting.epochs * setting.steps_per_epoch
    course = setting.course
    trainer.macs += 3 * _macs(full) * setting.train_images * setting.epochs
    return magnitude.train(
        full,
        trainer.data,
        sparsity=setting.sparsity,
        ramp=(round(course.warmup * steps), round(course.settle * steps)),
        steps=steps,
        epochs=setting.epochs,
        learning_rate=setting.learning_rate,
        weight_decay=setting.weight_decay,
    )


def cut_once(trainer, setting, *, scores, shares="even", penalty=None):
    """Dense until our gates would settle, then the units with the lowest scores go for good.

    Args:
        scores: (model, layer name, trainer) -> one number per unit.
        shares: "even", the same out of every group; "free", scores compete over groups.
        penalty: on the scales of BatchNorm, until then.
    """
    then = setting.epochs_until_cut
    model = trainer(setting.build(), last=then, penalty=penalty)
    model = _cut(model, setting.sparsity, trainer, scores, shares)
    return trainer(model, first=then)


def three_stage(trainer, setting):
    model = _cut(trainer(setting.build()), setting.sparsity, trainer, l1_norm)
    return trainer(model, epochs=setting.epochs // 2, gain=0.1)


def cut_gradually(trainer, setting, *, scores):
    """A little after every epoch until our gates would settle; the cost falls in equal steps."""
    then, model = setting.epochs_until_cut, setting.build()
    full = _cost(model, setting.measure)
    for epoch in range(then):
        trainer(model, first=epoch, last=epoch + 1)
        wanted = full * (1 - setting.sparsity * (epoch + 1) / then)
        missing = 1 - wanted / _cost(model, setting.measure)
        model = _cut(model, missing, trainer, scores)
    return trainer(model, first=then)


def _cut(model, sparsity, trainer, scores, shares="even"):
    coupling = couple(trace_model(model))
    ranked = [_group_scores(model, coupling, g, scores, trainer) for g in coupling.groups]
    budget = _budget(coupling, sparsity, trainer.setting.measure)
    if shares == "even":
        ranked = [(np.argsort(np.argsort(r)) + 0.5) / len(r) for r in ranked]
    masks = select_units(ranked, budget)
    goes = {g.layers[0]: g.members[~mask] for g, mask in zip(coupling.groups, masks, strict=True)}
    return keras_polar.remove(model, goes)


def _budget(coupling, sparsity, measure):
    """The same floors as `keras_polar.apply` keeps by default."""
    options = {"min_units": 1, "max_sparsity": None, "round_to": 1}
    cost = cost_of(coupling, MEASURES[measure])
    return budget_of(coupling, (), cost, sparsity=sparsity, measure=measure, **options)


def _group_scores(model, coupling, group, scores, trainer):
    """The sum over a group's layers, each scaled to a mean of 1."""
    total, produced = np.zeros(group.units), coupling.produced()
    for layer in group.layers:
        own = scores(model, layer, trainer)
        roots = coupling.roots[produced[layer]]
        place = np.searchsorted(group.roots, roots)
        inside = (group.roots[np.minimum(place, group.units - 1)] == roots).nonzero()[0]
        np.add.at(total, place[inside], own[inside] / max(own.mean(), 1e-12))
    return total


def by_lot(model, layer, trainer):
    return trainer.rng.random(model.get_layer(layer).filters)


def l1_norm(model, layer, trainer):
    return np.abs(_filters(model, layer)).sum(axis=0)


def _filters(model, layer):
    """The kernel of a layer, one column per unit."""
    kernel = to_numpy(model.get_layer(layer).kernel)
    return kernel.reshape(-1, kernel.shape[-1])


def group_norm(model, layer, trainer):
    """All that has to be zero for the unit to be zero: its filter, scale and offset."""
    norm = model.get_layer(f"{layer}_bn")
    rows = [_filters(model, layer), to_numpy(norm.gamma)[None], to_numpy(norm.beta)[None]]
    return np.linalg.norm(np.concatenate(rows), axis=0)


def relevance(model, layer, trainer):
    """Share of the unit in the logit of the true class: activation times gradient.

    For networks of ReLU that is layer-wise relevance propagation (LRP-0).
    """
    import tensorflow as tf

    images, labels = trainer.sample
    units = model.get_layer(f"{layer}_bn").output
    probe = keras.Model(model.inputs, [units, model.output])
    with tf.GradientTape() as tape:
        found, logits = probe(cifar10.normalise(images))
        wanted = tf.reduce_sum(tf.gather(logits, labels, batch_dims=1))
    shares = tf.reduce_sum(found * tape.gradient(wanted, found), axis=(1, 2))
    return tf.reduce_mean(tf.abs(shares), axis=0).numpy()


def batch_norm_scale(model, layer, trainer):
    return np.abs(to_numpy(model.get_layer(f"{layer}_bn").gamma))


def density(model, layer, trainer):
    """How often the unit is not zero, from the scale and offset of its BatchNorm.

    After normalisation a channel is about normal with mean beta and deviation |gamma|.
    """
    norm = model.get_layer(f"{layer}_bn")
    ratio = to_numpy(norm.beta) / np.maximum(np.abs(to_numpy(norm.gamma)), 1e-12)
    return 1 / (1 + np.exp(-1.702 * ratio))  # the logistic approximation of the normal integral


def l1_penalty(scales):
    return keras.ops.sum(keras.ops.abs(scales))


def polarization_penalty(scales):
    """Zhuang et al., NeurIPS 2020, equation 2: t |g|_1 - |g - mean(g)|_1."""
    centred = scales - keras.ops.mean(scales)
    return POLARIZATION_T * l1_penalty(scales) - l1_penalty(centred)


class _ScalePenalty(keras.regularizers.Regularizer):
    def __init__(self, penalty):
        self.penalty = penalty

    def __call__(self, scales):
        return SLIMMING * self.penalty(scales)


def _penalise_scales(model, penalty):
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.regularizer = _ScalePenalty(penalty)


METHODS: dict[str, Callable] = {
    "dense": dense,
    "narrow": narrow,
    "narrow_longer": narrow_longer,
    "shallow": shallow,
    "dynamic": functools.partial(gated, gate="dynamic"),
    "static": functools.partial(gated, gate="static"),
    "both": functools.partial(gated, gate="static", granularity=("channels", "blocks")),
    "masked": functools.partial(gated, gate="static", compact=False),
    "random": functools.partial(cut_once, scores=by_lot),
    "l1": functools.partial(cut_once, scores=l1_norm),
    "three_stage": three_stage,
    "slimming": functools.partial(
        cut_once, scores=batch_norm_scale, shares="free", penalty=l1_penalty
    ),
    "polarized_slimming": functools.partial(
        cut_once, scores=batch_norm_scale, shares="free", penalty=polarization_penalty
    ),
    "density": functools.partial(cut_once, scores=density),
    "gradual": functools.partial(cut_gradually, scores=l1_norm),
    "relevance": functools.partial(cut_once, scores=relevance),
    "group_norm": functools.partial(cut_once, scores=group_norm, shares="free"),
    "magnitude": magnitude_pruned,
}


# --- runs --------------------------------------------------------------------------------------


def result_of(method, setting, seed, data):
    """One run: trains, tests, counts."""
    keras.utils.set_random_seed(seed)
    train, test = data
    full = keras_polar.cost(setting.build())
    trainer = Trainer(setting, train, seed)
    model = METHODS[method](trainer, setting)
    cost = keras_polar.cost(model)
    return {
        "method": method,
        "seed": seed,
        "backend": keras.backend.backend(),
        **dataclasses.asdict(setting),
        "accuracy": _accuracy(model, *test),
        "weights": cost.weights,
        "macs": cost.macs,
        "kept_weights": cost.weights / full.weights,
        "kept_macs": cost.macs / full.macs,
        "nonzero": magnitude.nonzero(model),
        "training_macs": trainer.macs,
        **({} if ON_JAX else _as_file(setting, model)),
        "layers": {r.name: r.units for r in cost.rows if r.units},
    }, model


def _accuracy(model, images, labels):
    if ON_JAX:
        return on_device.accuracy(model, images, labels)
    cifar10.compile_classifier(model, 0.0)
    return cifar10.accuracy(model, cifar10.evaluation_pipeline(images, labels, batch_size=500))


def _as_file(setting, model):
    """Bytes of the float32 .tflite file, and its latency over that of the whole network's."""
    folder = _folder_of_whole(setting).name
    paths = [f"{folder}/{name}.tflite" for name in ("whole", "model")]
    report = keras_polar.export_tflite(model, paths[1])
    whole, own = (latency.median for latency in keras_polar.benchmark_tflite(paths).values())
    return {"tflite_bytes": report.bytes, "tflite_latency_ratio": own / whole}


@functools.cache
def _folder_of_whole(setting):
    """A folder with the whole network's file; exporting takes long enough to do it once."""
    folder = tempfile.TemporaryDirectory()
    keras_polar.export_tflite(setting.build(), f"{folder.name}/whole.tflite")
    return folder


def result_path(folder, method, setting, seed):
    """Where a result lies; dense runs do not depend on what would be removed."""
    what = "" if method == "dense" else f"_{setting.measure}{round(100 * setting.sparsity)}"
    size = f"w{setting.width}" if setting.width else ""
    pixels = "" if setting.image_size == 32 else f"_{setting.image_size}px"
    run = f"{setting.model}{size}{pixels}_n{setting.train_images}_e{setting.epochs}"
    if method in comparison.OURS:
        what += f"_{setting.schedule}" if setting.schedule else ""
        what += f"_round{setting.round_to}" if setting.round_to else ""
        what += f"_max{round(100 * setting.max_sparsity)}" if setting.max_sparsity else ""
    what += "_held_out" if setting.evaluate_on == "held_out" else ""
    return Path(folder) / f"{run}_{method}{what}_s{seed}.json"


def run_all(setting, data):
    """Runs what has not been run; one seed after the other, so that early tables make sense."""
    folder = Path(_RESULTS.value)
    for made in filter(None, (folder, _MODELS.value)):
        Path(made).mkdir(parents=True, exist_ok=True)
    for seed in map(int, _SEEDS.value):
        for method in _METHODS.value:
            path = result_path(folder, method, setting, seed)
            kept = _MODELS.value and Path(_MODELS.value) / f"{path.stem}.keras"
            if path.exists():
                _measure_missing_file(path, setting, kept)
                continue
            print(f"{path.stem}: running", flush=True)
            result = _trained_before(method, setting, seed)
            if result is None:
                result, model = result_of(method, setting, seed, data)
                if kept:
                    model.save(kept)
            _write(path, result)
            keras.backend.clear_session()


def _write(path, result):
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _measure_missing_file(path, setting, kept):
    """Adds the size and latency of the .tflite file to a result of a machine that makes none."""
    if ON_JAX or not kept or not kept.exists():
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    if "tflite_bytes" not in result:
        model = keras.saving.load_model(kept, compile=False)
        _write(path, result | _as_file(setting, model))


def _trained_before(method, setting, seed):
    """The run of the same narrow network for another measure, as one for this measure."""
    if method not in ("narrow", "narrow_longer"):
        return None
    own, free = dataclasses.asdict(setting), ("measure", *comparison.OPTIONS)
    same = {k: v for k, v in own.items() if k not in free}
    same |= {"method": method, "seed": seed, "weights": _cost(_narrow(setting), "weights")}
    found = (r for r in comparison.load(_RESULTS.value) if same.items() <= r.items())
    return next(({**r, **own} for r in found), None)


def _shrunk(array, side):
    """Images as means of squares of pixels; labels as they are."""
    if array.ndim == 1 or array.shape[1] == side:
        return array
    n, whole, _, channels = array.shape
    squares = array.reshape(n, side, whole // side, side, whole // side, channels)
    return squares.mean((2, 4)).round().astype("uint8")


def load(setting):
    """Images and labels to train on, and others to evaluate on."""
    if _FAKE_DATA.value:
        train, test = cifar10.fake_cifar10(seed=0)
    elif _PACKED.value:
        train, test = packed.read(_PACKED.value)
    else:
        train, test = cifar10.load_cifar10(_DATA_DIR.value)
    if setting.evaluate_on == "held_out":
        train, test = (
            [x[part] for x in train] for part in (slice(-HELD_OUT), slice(-HELD_OUT, None))
        )
    shrink = functools.partial(_shrunk, side=setting.image_size)
    return (
        tuple(shrink(x[: setting.train_images]) for x in train),
        tuple(shrink(x[: setting.test_images]) for x in test),
    )


def setting_from_flags():
    """The setting that the flags ask for."""
    fields = [f.name for f in dataclasses.fields(Setting)]
    return Setting(**{name: flags.FLAGS[name].value for name in fields})


def main(argv):
    """Entry point of absl."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    if _FAKE_DATA.value and not flags.FLAGS["results_dir"].present:
        raise app.UsageError("--fake_data leaves no real results: give another --results_dir.")
    setting = setting_from_flags()
    if not _TABLE.value:
        run_all(setting, load(setting))
    title = f"{setting.model}, {setting.sparsity:.0%} of the {setting.measure} removed"
    runs = comparison.load(_RESULTS.value)
    rows = comparison.table_rows(runs, METHODS, dataclasses.asdict(setting))
    reporting.print_table(title, comparison.COLUMNS, rows)


if __name__ == "__main__":
    app.run(main)
