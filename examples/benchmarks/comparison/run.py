"""Runs methods beside their controls, each on the same seeds; what has been run is not repeated.

    python examples/benchmarks/comparison/run.py --train_dense --dense_dir=FOLDER --seeds=0,1,2
    python examples/benchmarks/comparison/run.py --dense_dir=FOLDER --seeds=0,1,2 \
        --methods=dense,l1_even,l1_inside+teacher,static
    python examples/benchmarks/comparison/run.py --regime=scratch --methods=dense,narrow,static
    python examples/benchmarks/comparison/run.py --regime=pretrained --model=efficientnet_lite0
    python examples/benchmarks/comparison/run.py --list    # all methods and options

Every run leaves a line of JSON in --results_dir when it has ended; an interrupted comparison goes
on where it stopped. A run is measured on training images held out (`held_out`, by which recipes and
defaults are chosen) and on test images (`test`, which choose nothing).

The flags --model and --regime stand for a recipe (protocol.py); all others change it.

With KERAS_BACKEND=jax each epoch is one compiled program, which keeps a GPU busy
(epochs_on_jax.py). Our gates settle at the end of an epoch then, and the optimiser starts anew, as
it does for cuts. TensorFlow is not needed then, if packed_data.py has made a file of the data:
`--packed=FILE`. Networks may be measured as files elsewhere: `--models_dir=FOLDER` saves them, and
on a machine with TensorFlow the same command with --tflite adds what the results lack.
"""

import dataclasses
import functools
import sys
import tempfile
import time
from pathlib import Path

import keras
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import magnitude
import methods
import models
import protocol
import report
import results

import keras_polar


def define_flags():
    flags.DEFINE_enum(
        "regime", "trained", ("trained", "pretrained", "scratch"), "What a run begins with."
    )
    flags.DEFINE_enum("model", "resnet20", tuple(models.BUILDERS), "Architecture.")
    flags.DEFINE_list("methods", "dense,l1_even,static,dynamic", "What to run.")
    flags.DEFINE_list("seeds", "0,1,2", "Seeds; runs of a seed are pairs.")
    flags.DEFINE_enum("measure", None, ("weights", "macs"), "What is removed.")
    flags.DEFINE_string(
        "schedule", None, "Of our methods: warmup,ramp,settle,polarization,rate, as in 0.1,0.3,0.5."
    )
    number = functools.partial(flags.DEFINE_integer, default=None, lower_bound=1)
    number("width", help="Channels of the first stage.")
    number("image_size", help="Pixels a side, 32, 16 or 8.")
    number("train_images", help="The first so many are trained on.")
    number("batch_size", help="Images per step.")
    number("epochs", help="Epochs of the dense network, and of all from scratch.", lower_bound=2)
    number("steps", help="Steps of the fit on a trained network.")
    number("round_to", help="Our methods keep multiples; 0: the default.", lower_bound=0)
    number("evaluation_images", help="Evaluate on the first so many.")
    real = functools.partial(flags.DEFINE_float, default=None, lower_bound=0.0)
    real("learning_rate", help="Peak rate of the dense network, and of all from scratch.")
    real("fit_rate", help="Peak rate of the fit on a trained network.")
    real("weight_decay", help="L2 penalty on kernels.")
    real("sparsity", help="Share to remove.")
    real("max_sparsity", help="Share of a group that our methods close at most.")
    flags.DEFINE_string("data_dir", None, "Folder of tensorflow-datasets.")
    flags.DEFINE_string("packed", None, "File that packed_data.py made, instead.")
    flags.DEFINE_bool("fake_data", False, "Noise instead of CIFAR-10: only tests the plumbing.")
    flags.DEFINE_string("results_dir", str(report.RESULTS), "Folder of the results.")
    flags.DEFINE_string("dense_dir", "build/dense", "Folder of trained dense networks.")
    flags.DEFINE_string("models_dir", None, "Folder for the networks of runs; none: not kept.")
    flags.DEFINE_bool("train_dense", False, "Train the dense networks of the seeds, run nothing.")
    flags.DEFINE_bool("tflite", False, "Measure .tflite files, also of networks kept earlier.")
    flags.DEFINE_bool("list", False, "Run nothing, say what there is.")


def setting_of(options):
    """The recipe that the flags name, with their changes."""
    names = {f.name for f in dataclasses.fields(protocol.Setting)} - {"regime", "model"}
    changes = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    if changes.get("round_to") == 0:
        changes["round_to"] = None
    return protocol.recipe(options.regime, options.model, **changes)


def train_dense(setting, data, seeds, folder):
    """Trains the dense networks that are missing."""
    for seed in seeds:
        path = setting.dense_path(folder, seed)
        if not path.exists():
            found = protocol.train_dense(setting, data, seed, path)
            print(f"{path}: held out {found['held_out']}, test {found['test']}", flush=True)


def run_all(setting, data, options):
    """Runs what has not been run; one seed after the other, so that early tables make sense."""
    wanted = [methods.parsed(name) for name in options.methods]
    known = {results.identity(r): r for r in results.load(options.results_dir)}
    for seed in map(int, options.seeds):
        for method, extras in wanted:
            own = described(setting, method, extras, seed)
            kept = options.models_dir and _kept_path(options.models_dir, own)
            before = _before(known, own, options.tflite)
            if before is None:
                print(f"{results.name(own)}, seed {seed}: running", flush=True)
                own |= _ran(setting, data, method, extras, seed, kept, options)
                results.add(options.results_dir, own)
                print(f"held out {own['held_out']}, test {own['test']}", flush=True)
            elif options.tflite and "tflite_bytes" not in before and kept and kept.exists():
                model = keras.saving.load_model(kept, compile=False)
                results.add(options.results_dir, before | as_file(setting, model))
            keras.backend.clear_session()


def _before(known, own, of_any_backend):
    """A result of the same run; files are written on TensorFlow, also of networks of others."""
    backends = (own["backend"], *(("tensorflow", "jax", "torch") if of_any_backend else ()))
    identities = (results.identity(own | {"backend": b}) for b in backends)
    return next((known[i] for i in identities if i in known), None)


def described(setting, method, extras, seed):
    row, name = methods.METHODS[method], "+".join((method, *extras))
    backend = keras.backend.backend()
    return results.described(setting, name, seed, backend, ours=row.ours, removes=row.removes)


def _kept_path(folder, own):
    Path(folder).mkdir(parents=True, exist_ok=True)
    words = [own["regime"], own["model"], results.name(own), own["measure"], own["sparsity"]]
    return Path(folder) / ("_".join(map(str, [*words, f"s{own['seed']}"])) + ".keras")


def _ran(setting, data, method, extras, seed, kept, options):
    """Trains, tests, counts: the results of one run."""
    began = time.perf_counter()
    run = protocol.Run(setting, data, seed, options.dense_dir, extras)
    model = methods.METHODS[method].ship(run)
    if kept:
        model.save(kept)
    return {
        **outcome(run, model, protocol.accuracies(model, data)),
        "seconds": round(time.perf_counter() - began, 1),
        **(as_file(setting, model) if options.tflite and not protocol.ON_JAX else {}),
    }


def outcome(run, model, accuracies):
    """What a run has come to: the fields of a result."""
    full, cost = keras_polar.cost(run.setting.build()), keras_polar.cost(model)
    return {
        **accuracies,
        **run.notes,
        "weights": cost.weights,
        "macs": cost.macs,
        "kept_weights": cost.weights / full.weights,
        "kept_macs": cost.macs / full.macs,
        "nonzero": magnitude.nonzero(model),
        "training_macs": run.macs,
        "layers": {r.name: r.units for r in cost.rows if r.units},
    }


def as_file(setting, model):
    """Bytes of the float32 .tflite file, and its latency over that of the whole network's."""
    folder = _folder_of_whole(setting).name
    paths = [f"{folder}/{name}.tflite" for name in ("whole", "model")]
    found = keras_polar.export_tflite(model, paths[1])
    whole, own = (latency.median for latency in keras_polar.benchmark_tflite(paths).values())
    return {"tflite_bytes": found.bytes, "tflite_latency_ratio": own / whole}


@functools.cache
def _folder_of_whole(setting):
    """A folder with the whole network's file; exporting takes long enough to do it once."""
    folder = tempfile.TemporaryDirectory()
    keras_polar.export_tflite(setting.build(), f"{folder.name}/whole.tflite")
    return folder


def main(argv):
    """Entry point of absl."""
    options = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    if options.list:
        print("".join(f"{name}: {row.what}\n" for name, row in methods.METHODS.items()))
        return print("".join(f"+{name}: {what}\n" for name, what in methods.OPTIONS.items()))
    leaves = "dense_dir" if options.train_dense else "results_dir"
    if options.fake_data and not options[leaves].present:
        raise app.UsageError(f"--fake_data leaves nothing real: give another --{leaves}.")
    setting = setting_of(options)
    data = protocol.load(
        setting, options.data_dir, options.packed, options.fake_data, options.evaluation_images
    )
    if options.train_dense:
        return train_dense(setting, data, map(int, options.seeds), options.dense_dir)
    run_all(setting, data, options)
    report.print_tables(results.load(options.results_dir), setting)


if __name__ == "__main__":
    define_flags()
    app.run(main)
