"""CIFAR-10 with tensorflow-datasets: train once with gates, convert, verify, export.

    python examples/cifar10.py --model=resnet20 --sparsity=0.5 --epochs=30
    python examples/cifar10.py --model=resnet20 --dense --epochs=30   # the baseline

The data are downloaded on first use; `--data_dir` points to a folder where they lie already.
`--smoke` ends in under two minutes on two cores and shows that everything works, no more.
"""

import contextlib
import functools
import json
from pathlib import Path

import keras
import models
import numpy as np
import reporting
from absl import app, flags, logging

import keras_polar

with contextlib.suppress(ImportError):  # benchmarks on JAX have their own pipeline
    import tensorflow as tf

CLASSES = 10
IMAGE_SHAPE = (32, 32, 3)
# Mean and standard deviation of the training images' channels, on a scale of 0 to 1.
CHANNEL_MEAN = (0.4914, 0.4822, 0.4465)
CHANNEL_STD = (0.2470, 0.2435, 0.2616)
PADDING = 1 / 8  # of the image's side, before a random crop
PARALLEL_CALLS = 4
MOMENTUM = 0.9
# Part of the run in which the learning rate rises to its peak.
WARMUP = 0.05

MODELS = ("resnet20", "resnet56", "vgg16", "mobilenet")
# What --smoke changes; a flag that the user gives wins.
SMOKE = {"epochs": 2, "train_images": 512, "test_images": 256, "width": 8, "batch_size": 64}


def define_flags(flag_values):
    """Defines the flags of this script in `flag_values` and returns their names."""
    number = functools.partial(flags.DEFINE_integer, lower_bound=1, flag_values=flag_values)
    real = functools.partial(flags.DEFINE_float, lower_bound=0.0, flag_values=flag_values)
    text = functools.partial(flags.DEFINE_string, flag_values=flag_values)
    choice = functools.partial(flags.DEFINE_enum, flag_values=flag_values)
    switch = functools.partial(flags.DEFINE_boolean, flag_values=flag_values)
    holders = (
        text("data_dir", None, "Folder of tensorflow-datasets. Default: its own, with download."),
        text("output_dir", "cifar10_output", "Folder for the models and result.json."),
        choice("model", "resnet20", MODELS, "Architecture."),
        number("width", None, "Channels of the first stage. Default: the architecture's own."),
        real("sparsity", 0.5, "Share of the measure to remove.", upper_bound=1.0),
        choice("measure", "weights", ("weights", "macs", "units"), "What --sparsity counts."),
        choice("gate", "dynamic", ("dynamic", "static"), "Kind of gate."),
        number("round_to", None, "Keep a multiple of this many units. Default: 8 if possible."),
        switch("dense", False, "Train the model as it is, without gates: the baseline."),
        number("epochs", 30, "Epochs."),
        number("batch_size", 128, "Images per step."),
        real("learning_rate", 0.1, "Peak learning rate of SGD with momentum and cosine decay."),
        real("weight_decay", 2e-4, "L2 penalty on the kernels."),
        flags.DEFINE_integer(
            "seed",
            0,
            "Seed of weights, data order and augmentation.",
            lower_bound=0,
            flag_values=flag_values,
        ),
        number("train_images", None, "Train on the first so many images. Default: all."),
        number("test_images", None, "Test on the first so many images. Default: all."),
        switch("smoke", False, "A run of under two minutes: few images, a narrow model."),
        switch("fake_data", False, "Noise instead of CIFAR-10: only tests the plumbing."),
    )
    return [holder.name for holder in holders]


# Data


def load_cifar10(data_dir=None):
    """((train images, labels), (test images, labels)): uint8 images, integer labels."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(
            f"--data_dir={data_dir} is not a folder. Expected one that tensorflow-datasets has "
            "filled (it holds cifar10/<version>/) or an empty one to download to. Leave "
            "--data_dir out to use the default folder of tensorflow-datasets."
        )
    if data_dir is not None:
        try:
            return _read_cifar10(data_dir, download=False)
        except Exception as error:  # Which one depends on what is missing, and on the version.
            logging.info("No CIFAR-10 in %s (%s): downloading it there.", data_dir, error)
    try:
        return _read_cifar10(data_dir, download=True)
    except Exception as error:
        raise RuntimeError(
            "CIFAR-10 could not be downloaded. Prepare it on a machine with a connection, "
            "`tfds build cifar10 --data_dir=FOLDER`, copy the folder and pass it as --data_dir; "
            "or try the script without data: --smoke --fake_data."
        ) from error


def _read_cifar10(data_dir, download):
    # Imported here: slow, and --fake_data works without it.
    import tensorflow_datasets as tfds

    whole = tfds.load(
        "cifar10",
        split=["train", "test"],
        batch_size=-1,
        as_supervised=True,
        data_dir=data_dir,
        download=download,
    )
    return tuple((images.numpy(), labels.numpy()) for images, labels in whole)


def fake_cifar10(seed, images=1024):
    """Noise in the shape of CIFAR-10: (train, test), one is as good as the other."""
    rng = np.random.default_rng(seed)

    def split():
        pixels = rng.integers(0, 256, (images, *IMAGE_SHAPE), dtype=np.uint8)
        return pixels, rng.integers(0, CLASSES, images)

    return split(), split()


def normalise(image):
    """Pixels of 0 to 255 -> float32 channels of mean 0 and deviation 1."""
    return (tf.cast(image, tf.float32) / 255.0 - CHANNEL_MEAN) / CHANNEL_STD


def augment(image, seed):
    """A random crop of the image, padded by reflection, and a random horizontal flip.

    `seed` (two integers) decides both: the same seed gives the same image.
    """
    border = round(PADDING * image.shape[0])
    padded = tf.pad(image, [[border, border], [border, border], [0, 0]], mode="REFLECT")
    cropped = tf.image.stateless_random_crop(padded, image.shape, seed)
    return tf.image.stateless_random_flip_left_right(cropped, seed)


def training_pipeline(images, labels, *, batch_size, seed):
    """Shuffled and augmented batches, different in every epoch, the same for the same seed."""
    examples = tf.data.Dataset.from_tensor_slices((images, labels))
    examples = examples.shuffle(len(images), seed=seed)
    seeds = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).batch(2, True)
    augmented = tf.data.Dataset.zip(examples, seeds).map(
        _augmented_example, num_parallel_calls=PARALLEL_CALLS
    )
    return _prefetched(augmented.batch(batch_size))


def _augmented_example(example, seed):
    image, label = example
    return normalise(augment(image, seed)), label


def evaluation_pipeline(images, labels, *, batch_size):
    """The images in their order, normalised."""
    batches = tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch_size)
    return _prefetched(
        batches.map(
            lambda image, label: (normalise(image), label), num_parallel_calls=PARALLEL_CALLS
        )
    )


def _prefetched(batches):
    """Batches made ahead, without tf.data's autotuning.

    The thread that tunes sleeps up to a minute, and at the end of an epoch the iterator's
    destructor waits for it: 14 s of every epoch of 40 s were that.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.prefetch(2).with_options(options)


# Training


def learning_rate_schedule(peak, steps):
    """Linear warm-up to `peak`, then cosine decay to zero at the last of `steps`."""
    warmup = max(1, round(WARMUP * steps))
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.1 * peak,
        warmup_target=peak,
        warmup_steps=warmup,
        decay_steps=max(1, steps - warmup),
    )


def compile_classifier(model, learning_rate, **options):
    """SGD with Nesterov momentum and cross-entropy on logits; `learning_rate` may be a schedule."""
    model.compile(
        keras.optimizers.SGD(learning_rate, momentum=MOMENTUM, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **options,
    )


@keras_polar.full_precision()
def accuracy(model, dataset):
    """Test accuracy of a compiled model."""
    return model.evaluate(dataset, verbose=0, return_dict=True)["accuracy"]


def check_same_accuracy(before, after):
    """Conversion may not change a single prediction's worth of accuracy."""
    if before != after:
        raise RuntimeError(
            f"Conversion changed the test accuracy from {before:.6f} to {after:.6f}. Expected "
            "the same: in inference mode the gated model and the small one are one function. "
            "One image of difference can be round-off between two classes that are level; more "
            "is a bug that is worth a report."
        )


# One run


def load_data(options):
    """(train, test) arrays, cut to what the flags ask for."""
    train, test = (
        fake_cifar10(options.seed) if options.fake_data else load_cifar10(options.data_dir)
    )
    return (
        tuple(array[: options.train_images] for array in train),
        tuple(array[: options.test_images] for array in test),
    )


def build_model(options):
    """The plain Keras model that the flags ask for."""
    return models.build(
        options.model,
        IMAGE_SHAPE,
        CLASSES,
        width=options.width,
        weight_decay=options.weight_decay,
    )


def gated_model(model, options):
    """The model with gates as the flags ask for; the model itself for the baseline."""
    if options.dense:
        return model
    return keras_polar.apply(
        model,
        options.sparsity,
        measure=options.measure,
        gate=options.gate,
        round_to=options.round_to,
    )


def train_model(model, train, test, options):
    """Compiles and fits; validation is on the test images and chooses nothing."""
    schedule = learning_rate_schedule(options.learning_rate, options.epochs * len(train))
    compile_classifier(model, schedule)
    model.fit(train, epochs=options.epochs, validation_data=test)


def converted(gated, options):
    """The small model, compiled for evaluation; the trained model itself for the baseline."""
    if options.dense:
        return gated
    small = keras_polar.convert(gated, verify=True)
    compile_classifier(small, options.learning_rate)
    small.optimizer.build(small.trainable_variables)  # saved as a whole, it loads without a warning
    return small


def costs(model):
    """Weights and multiply-accumulates, as plain integers for JSON."""
    cost = keras_polar.cost(model)
    return {"weights": int(cost.weights), "macs": int(cost.macs)}


def exported(model, path):
    """Writes the .tflite file and returns its size and how far it is from Keras."""
    report = keras_polar.export_tflite(model, str(path))
    return {
        "tflite_bytes": int(report.bytes),
        "tflite_difference": float(report.max_difference),
    }


def run(options):
    """Trains, converts, saves everything in --output_dir and returns what result.json holds."""
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train_data, test_data = load_data(options)
    keras.utils.set_random_seed(options.seed)
    train = training_pipeline(*train_data, batch_size=options.batch_size, seed=options.seed)
    test = evaluation_pipeline(*test_data, batch_size=options.batch_size)

    model = build_model(options)
    gated = gated_model(model, options)
    train_model(gated, train, test, options)
    small = converted(gated, options)

    small.save(folder / "small.keras")
    probe = normalise(test_data[0][:256])
    difference, largest = reporting.certificate(gated, small, probe)
    return {
        "model": options.model,
        "seed": options.seed,
        "achieved_sparsity": None if options.dense else float(gated.sparsity),
        "certificate_difference": difference,
        "largest_output": largest,
        "before": {"accuracy": accuracy(gated, test), **costs(model)},
        "after": {
            "accuracy": accuracy(small, test),
            **costs(small),
            **exported(small, folder / "small.tflite"),
        },
    }


def print_result(result, folder):
    """The table of a run: the model that went in beside the one that came out."""
    title = f"CIFAR-10, {result['model']}, seed {result['seed']}"
    caption = f"Files: {folder}"
    if result["achieved_sparsity"] is None:
        rows = reporting.result_rows(result["after"])
        return reporting.print_table(title, ("", "dense"), rows, caption)
    rows = reporting.comparison_rows(result["before"], result["after"])
    caption = (
        "Largest difference between the gated and the small model: "
        f"{result['certificate_difference']:.1e} (largest output "
        f"{result['largest_output']:.1f}).\n{caption}"
    )
    reporting.print_table(title, ("", "gated", "small", "ratio"), rows, caption)


def apply_smoke(flag_values):
    """Lets --smoke choose every flag that the user did not give."""
    if flag_values.smoke:
        for name, value in SMOKE.items():
            flag_values.set_default(name, value)


def main(argv, names):
    """Entry point of absl: `argv` is what is left beside the flags, which are called `names`."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    apply_smoke(flags.FLAGS)
    result = run(flags.FLAGS)
    result["flags"] = {name: flags.FLAGS[name].value for name in names}
    folder = Path(flags.FLAGS.output_dir)
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_result(result, folder)
    # Last: a difference must not cost the user what the training gave.
    check_same_accuracy(result["before"]["accuracy"], result["after"]["accuracy"])


if __name__ == "__main__":
    app.run(functools.partial(main, names=define_flags(flags.FLAGS)))
