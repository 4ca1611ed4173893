"""What all runs of a comparison share: settings, data, training recipes and how they are measured.

Three regimes, which differ in what a run begins with and when its controls cut:

  trained     a network that was trained once, the dense one; controls cut at step 0, then all train
              for `steps` steps at a tenth of the dense peak rate or so
  pretrained  weights of ImageNet and a new head; controls cut when our gates settle, all train for
              `epochs` epochs
  scratch     random weights; otherwise as pretrained

Everything else is the same: data, augmentation, optimiser, loss, the course of the learning rate.
Runs of a seed are pairs: they have the same dense network and the same order of batches.
"""

import dataclasses
import functools
import json
import os
import time
from pathlib import Path

import cifar10
import keras
import models
import numpy as np
import packed_data
import pretrained
import results

import keras_polar

HELD_OUT = 10_000  # the last of the training images: no run trains on them
SAMPLE = 512  # training images that a criterion of activations may look at
ESTIMATED_ON = 40  # batches: 0.9^40 of the old statistics is left
TEMPERATURE, OF_LABELS = 4.0, 0.1  # of a teacher's logits; the labels' share in the loss beside it

ON_JAX = keras.backend.backend() == "jax"
if ON_JAX:
    import epochs_on_jax


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that decides a run but its method and its seed; becomes part of the result.

    Attributes:
        regime: "trained", "pretrained" or "scratch".
        model: architecture, a name of `models.BUILDERS`.
        width: channels of the first stage; None for the architecture's own.
        image_size: pixels a side: smaller images are means of squares of the larger ones.
        train_images: the first so many are trained on.
        batch_size: images per step.
        epochs: of the dense network.
        learning_rate: its peak.
        weight_decay: L2 penalty on kernels.
        steps: of the fit on a trained network; None in other regimes.
        fit_rate: its peak rate; None in other regimes.
        sparsity: share that goes.
        measure: of what.
        schedule: of our methods: warmup,ramp,settle,polarization,rate; empty for the default.
        round_to: our methods keep multiples; None for the default.
        max_sparsity: share of a group that our methods close at most; None for the default.
    """

    regime: str = "trained"
    model: str = "resnet20"
    width: int | None = None
    image_size: int = 16
    train_images: int = 12_800
    batch_size: int = 128
    epochs: int = 14
    learning_rate: float = 0.1
    weight_decay: float = 2e-4
    steps: int | None = 200
    fit_rate: float | None = 0.02
    sparsity: float = 0.5
    measure: str = "macs"
    schedule: str = ""
    round_to: int | None = 1
    max_sparsity: float | None = None

    @property
    def course(self) -> keras_polar.Schedule:
        """The schedule of our methods."""
        values = map(float, filter(None, self.schedule.split(",")))
        names = ("warmup", "ramp", "settle", "polarization", "rate")
        return keras_polar.Schedule(**dict(zip(names, values, strict=False)))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.train_images // self.batch_size)

    @property
    def dense_steps(self) -> int:
        """Steps of the dense network's training."""
        return self.epochs * self.steps_per_epoch

    @property
    def total(self) -> int:
        """Steps of a run."""
        return self.steps or self.dense_steps

    @property
    def peak(self) -> float:
        """Peak learning rate of a run."""
        return self.fit_rate or self.learning_rate

    @property
    def settles_at(self) -> int:
        """The step at which our gates settle: where epochs count, the end of one."""
        if self.regime == "trained":
            return round(self.course.settle * self.total)
        return max(1, round(self.course.settle * self.epochs)) * self.steps_per_epoch

    @property
    def cuts_at(self) -> int:
        """The step at which controls cut."""
        return 0 if self.regime == "trained" else self.settles_at

    def build(self, width=None):
        """The dense network with random weights, or one of another width."""
        shape = (self.image_size, self.image_size, 3)
        options = {"width": width or self.width, "weight_decay": self.weight_decay}
        if self.regime == "pretrained":
            options["before"] = _as_pretrained
        return models.build(self.model, shape, cifar10.CLASSES, **options)

    def dense_path(self, folder, seed):
        """Where the trained dense network lies."""
        return Path(folder) / f"{self.model}_s{seed}.keras"


def _as_pretrained(images):
    """Normalised images of CIFAR-10 as the pretrained network wants them, and twice as large."""
    mean, deviation = np.float32(cifar10.CHANNEL_MEAN), np.float32(cifar10.CHANNEL_STD)
    scale = 255 * deviation / pretrained.SCALE
    offset = (255 * mean - pretrained.MEAN) / pretrained.SCALE
    images = keras.layers.Rescaling(scale.tolist(), offset.tolist(), name="pixels")(images)
    return keras.layers.UpSampling2D(2, interpolation="bilinear", name="larger")(images)


# Recipes: regime -> network -> what differs from the defaults of `Setting`.
PRETRAINED = {
    "steps": None,
    "fit_rate": None,
    "epochs": 5,
    "train_images": 8_000,
    "batch_size": 64,
    "learning_rate": 0.02,
}
FROM_SCRATCH = {"steps": None, "fit_rate": None, "epochs": 48, "round_to": None}
WIDTHS = {"vgg16": 16, "mobilenet": 16}
PIXELS = {"vgg16": 32, "efficientnet_lite0": 32}  # poolings and strides need them


def recipe(regime, model, **changes):
    """The setting of a regime and network, with changes.

    >>> recipe("trained", "vgg16", sparsity=0.7)
    """
    own = {"model": model, "width": WIDTHS.get(model), "image_size": PIXELS.get(model, 16)}
    regimes = {"trained": {}, "pretrained": PRETRAINED, "scratch": FROM_SCRATCH}
    return Setting(**{"regime": regime, **own, **regimes[regime], **changes})


# --- data ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """Pairs of uint8 images and labels; `held_out` is None where a run trains on all images."""

    train: tuple
    held_out: tuple | None
    test: tuple


def load(setting, data_dir=None, packed=None, fake=False, evaluation_images=None):
    """The images of a setting, reduced to its size.

    Args:
        data_dir: folder of tensorflow-datasets.
        packed: a file that packed_data.py made, instead.
        fake: noise instead.
        evaluation_images: the first so many are evaluated on; None for all.
    """
    train, test = _read(data_dir, packed, fake)
    spare = len(train[0]) - setting.train_images >= HELD_OUT or fake
    held_out = tuple(x[-HELD_OUT:][:evaluation_images] for x in train)
    shrink = functools.partial(_shrunk, side=setting.image_size)
    return Data(
        tuple(shrink(x[: setting.train_images]) for x in train),
        tuple(map(shrink, held_out)) if spare else None,
        tuple(shrink(x[:evaluation_images]) for x in test),
    )


def _read(data_dir, packed, fake):
    if fake:
        return cifar10.fake_cifar10(seed=0)
    return packed_data.read(packed) if packed else cifar10.load_cifar10(data_dir)


def _shrunk(array, side):
    """Images as means of squares of pixels; labels as they are."""
    if array.ndim == 1 or array.shape[1] == side:
        return array
    n, whole, _, channels = array.shape
    squares = array.reshape(n, side, whole // side, side, whole // side, channels)
    return squares.mean((2, 4)).round().astype("uint8")


# --- training -----------------------------------------------------------------------------------


class Rate(keras.optimizers.schedules.LearningRateSchedule):
    """The course of the learning rate: a warm-up and a cosine, once or twice.

    Args:
        peak: the largest rate.
        total: steps of the run.
        first: the step that counting starts at: of the rest of an interrupted run.
        restart: the step at which the course begins anew, over the steps that are left; 0 for
            never.
    """

    def __init__(self, peak, total, first=0, restart=0):
        self.peak, self.total, self.first, self.restart = peak, total, first, restart
        self.courses = [cifar10.learning_rate_schedule(peak, total)]
        if restart:
            self.courses = [*self.courses, cifar10.learning_rate_schedule(peak, total - restart)]

    def __call__(self, step):
        step = keras.ops.cast(step, "float32") + self.first
        if not self.restart:
            return self.courses[0](step)
        again = self.courses[1](keras.ops.maximum(step - self.restart, 0.0))
        return keras.ops.where(step < self.restart, self.courses[0](step), again)

    def get_config(self):
        names = ("peak", "total", "first", "restart")
        return {name: getattr(self, name) for name in names}


class Run:
    """One run: trains models in a setting and counts the multiply-accumulates that it takes.

    Args:
        setting: what to do.
        data: a `Data`.
        seed: of weights, of the order of batches, of augmentation, of what is drawn by lot.
        dense_dir: folder of trained dense networks.
        options: of "teacher" (the trained dense network teaches beside the labels), "restart"
            (the learning rate's course begins anew when our gates settle), "late" (controls cut
            when our gates settle) and "statistics" (those of BatchNorm are estimated at the cut).

    Attributes:
        macs: multiply-accumulates of all training so far, the dense network's included.
        notes: what a method wants to leave in the result.
    """

    def __init__(self, setting, data, seed, dense_dir=None, options=()):
        keras.utils.set_random_seed(seed)
        self.setting, self.data, self.seed = setting, data, seed
        self.dense_dir, self.options = dense_dir, frozenset(options)
        self.macs, self.notes, self.rng = 0, {}, np.random.default_rng(seed)
        self.teacher = None
        make = epochs_on_jax.Examples if ON_JAX else cifar10.training_pipeline
        self.batches = make(*data.train, batch_size=setting.batch_size, seed=seed)
        self.cuts_at = setting.settles_at if "late" in self.options else setting.cuts_at
        if "teacher" in self.options:
            self.teacher = self.dense_network()

    def start(self):
        """The network that a run begins with."""
        if self.setting.regime != "trained":
            network = self.setting.build()
            is_known = self.setting.regime == "pretrained"
            return pretrained.with_weights(network) if is_known else network
        network = self.dense_network()
        keras.utils.set_random_seed(self.seed)
        return network

    @property
    def restart(self):
        return self.setting.settles_at if "restart" in self.options else 0

    def dense_network(self):
        """A copy of the trained dense network; its training is counted, once."""
        path = self.setting.dense_path(self.dense_dir or ".", self.seed)
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: no trained dense network. Train it first: run.py --train_dense with "
                "the same --model, --seeds and --dense_dir."
            )
        _check_recipe(self.setting, path)
        network = keras.saving.load_model(path, compile=False)
        if not self.macs:
            self.macs = self.of_training(network, self.setting.dense_steps)
        return network

    def train(self, model, first=0, last=None, total=None, peak=None, restart=None):
        """Trains `model` from step `first` to before `last`, of `total` that the rate decays in."""
        total = total or self.setting.total
        last = total if last is None else last
        restart = self.restart if restart is None else restart
        rate = Rate(peak or self.setting.peak, total, first, restart)
        # Counted first: once branches are closed, the cost of a gated model is without them.
        self.macs += self.of_training(model, last - first)
        if last > first:
            (self._on_jax if ON_JAX else self._fit)(model, rate, first, last)
        return model

    def _fit(self, model, rate, first, last):
        trained = model
        if self.teacher and is_gated(model):  # they are taught by `apply`
            compile_classifier(model, rate, loss_weights=OF_LABELS)
        else:
            trained = taught(model, self.teacher) if self.teacher else model
            compile_classifier(trained, rate)
        epochs, rest = divmod(last - first, self.setting.steps_per_epoch)
        shape = (1, last - first) if rest else (epochs, self.setting.steps_per_epoch)
        course = dict(zip(("epochs", "steps_per_epoch"), shape, strict=True))
        trained.fit(self.batches.repeat(), shuffle=False, verbose=2, **course)  # shuffled already

    def _on_jax(self, model, rate, first, last):
        if self.teacher:
            raise ValueError("On JAX epochs are compiled as they are: no teacher.")
        epochs = [divmod(step, self.setting.steps_per_epoch) for step in (first, last)]
        if any(rest for _, rest in epochs):
            raise ValueError(f"On JAX whole epochs are trained; received steps {first} to {last}.")
        compile_classifier(model, rate)
        epochs_on_jax.fit(model, self.batches, *(epoch for epoch, _ in epochs))

    def estimate_statistics(self, model):
        """Moves those of BatchNorm to where the model's own activations are; trains nothing."""
        for images, _ in self.batches.take(ESTIMATED_ON):
            model(images, training=True)

    def of_training(self, model, steps):
        """A backward pass costs about two forward ones; a teacher has forward ones only."""
        macs = 3 * keras_polar.cost(model).macs
        if self.teacher:
            macs += keras_polar.cost(self.teacher).macs
        return self.of_images(macs, steps)

    def of_images(self, macs, steps):
        """Those of an image, for all images of so many steps."""
        images = self.setting.train_images / self.setting.steps_per_epoch
        return round(macs * steps * images)


def _check_recipe(setting, path):
    """Whether a dense network was trained as the setting says."""
    trained = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    wanted = dataclasses.asdict(setting)
    other = [k for k in results.OF_DENSE if trained[k] != wanted[k]]
    if other:
        was, should = ({k: recipe[k] for k in other} for recipe in (trained, wanted))
        raise ValueError(
            f"{path} was trained with {was}, the setting has {should}. Give another --dense_dir, "
            "or the flags that it was trained with."
        )


def compile_classifier(model, rate, **options):
    """As cifar10.py does; without XLA, which takes twice the time on CPUs."""
    cifar10.compile_classifier(model, rate, **options)
    model.jit_compile = ON_JAX


def taught(model, teacher):
    """A model whose `fit` trains `model` on labels and on a teacher's logits (Hinton et al.)."""
    return keras.distillation.Distiller(
        teacher, model, distillation(), student_loss_weight=OF_LABELS
    )


def distillation():
    """Kullback-Leibler divergence of softened answers; by its name Keras would take no softmax."""
    divergence = keras.losses.KLDivergence()
    return keras.distillation.LogitsDistillation(temperature=TEMPERATURE, loss=divergence)


def is_gated(model):
    """Whether the model is one of `keras_polar.apply`."""
    return hasattr(model, "consensus")


def train_dense(setting, data, seed, path, make=None):
    """Trains a dense network once and saves it, with its accuracies in a file beside it.

    Args:
        make: of the `Run`; None for its class.
    """
    scratch = dataclasses.replace(setting, regime="scratch", steps=None, fit_rate=None)
    run, began = (make or Run)(scratch, data, seed), time.perf_counter()
    model = run.train(scratch.build())
    found = {"seed": seed, **dataclasses.asdict(scratch), **accuracies(model, data)}
    found |= {"seconds": round(time.perf_counter() - began)}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft.keras")
    keras.Model(model.inputs, model.outputs, name=model.name).save(draft)
    path.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)
    return found


# --- measuring ----------------------------------------------------------------------------------


def accuracies(model, data):
    """Shares of right answers on images held out of the training images, and on test images."""
    parts = {"held_out": data.held_out, "test": data.test}
    return {name: part and accuracy(model, *part) for name, part in parts.items()}


def accuracy(model, images, labels):
    """Share of right answers; compiles the model anew."""
    if ON_JAX:
        return epochs_on_jax.accuracy(model, images, labels)
    compile_classifier(model, 0.0)
    batches = cifar10.evaluation_pipeline(images, labels, batch_size=500)
    return cifar10.accuracy(model, batches)
