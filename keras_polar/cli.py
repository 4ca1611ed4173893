"""The command line: what needs no Python of one's own.

    keras_polar inspect model.keras
    keras_polar export gated.keras small.tflite --data=samples.npz

Exit codes: 0 done, 1 the files or the model do not allow it (one line on stderr), 2 wrong usage.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import app
from absl.flags import argparse_flags

from keras_polar._version import __version__
from keras_polar.gates.groups import require_gated
from keras_polar.inspection import cost, inspect
from keras_polar.litert import benchmark_tflite, export_tflite
from keras_polar.litert.modes import modes_text
from keras_polar.litert.validation import draft_of, put_in_place
from keras_polar.surgery.convert import convert
from keras_polar.tables import table_text

ARGUMENTS: dict[str, dict] = {
    "model": {"help": "a model that Keras saved (.keras)"},
    "gated": {"help": "a trained gated model that Keras saved (.keras)"},
    "out": {"help": "file to write; one that exists is replaced"},
    "--ignore": {
        "default": "",
        "metavar": "NAMES",
        "help": "layers that keep all their units, separated by commas; patterns such as stem*",
    },
    "files": {"nargs": "+", "metavar": "file.tflite", "help": "LiteRT files to compare"},
    "--threads": {"type": int, "default": 1, "help": "how many threads the runtime may use"},
    "--runs": {"type": int, "default": 50, "help": "how often each file is timed"},
    "--quantize": {"metavar": "KIND", "help": modes_text()},
    "--data": {
        "metavar": "FILE",
        "help": "samples for comparison and calibration: .npy, or .npz with an array per input",
    },
}


def inspect_command(options: argparse.Namespace) -> str:
    """Every layer: its prunable units, its group, its share of the cost, or why it stays."""
    return str(inspect(load(options.model), ignore=_names(options.ignore)))


def cost_command(options: argparse.Namespace) -> str:
    """Weights, multiply-accumulates and units, in total and per layer."""
    return str(cost(load(options.model)))


def convert_command(options: argparse.Namespace) -> str:
    """Writes the small model of a gated one, after checking that both compute the same."""
    out = _writable(options.out, ".keras")
    gated = load(options.gated)
    require_gated(gated, "convert")
    small = convert(gated, verify=True)
    _save(small, out)
    return (
        f"{out}: {small.count_params():,} weights; the gates removed {gated.sparsity:.1%} of the "
        f"{gated.consensus.measure}. Checked: it computes what {options.gated} computes."
    )


def export_command(options: argparse.Namespace) -> str:
    """Writes a model, converted first if it has gates, as a LiteRT file and tries the file out."""
    model = load(options.model)
    data = None if options.data is None else read_samples(options.data, model)
    report = export_tflite(model, options.out, quantize=options.quantize, representative_data=data)
    return str(report)


def benchmark_command(options: argparse.Namespace) -> str:
    """Times LiteRT files in alternation: one inference each, median and quartiles."""
    latencies = benchmark_tflite(options.files, threads=options.threads, runs=options.runs)
    base = next(iter(latencies.values())).median
    rows = [
        (name, f"{os.path.getsize(name):,}", str(t), f"{t.median / base:.2f}")
        for name, t in latencies.items()
    ]
    return table_text(["file", "bytes", "one inference", "of the first"], rows)


def load(path: str) -> keras.Model:
    """A saved model, not compiled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: Keras cannot read it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"Expected a model saved by Keras at {path!r}; there is no such file. Write it with "
            "`model.save('model.keras')`."
        )
    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:  # of many types, up to those of the layers in the file
        raise ValueError(
            f"Keras cannot load {path!r}: {' '.join(str(error).split())[:200]} ... If the model "
            "has layers of your own, load it in Python, where they can be imported, and call "
            "keras_polar there."
        ) from error


def read_samples(path: str, model: keras.Model) -> Any:
    """The arrays of a .npy or .npz file in the structure that a model takes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: NumPy cannot read it, or its arrays are not called as the model's inputs.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"Expected --data to name a .npy or .npz file; there is no file {path!r}. Write it "
            "with `numpy.savez(path, images)`."
        )
    try:
        with open(path, "rb") as file:
            content = np.load(file)
            arrays = content if isinstance(content, np.ndarray) else dict(content)
    except ValueError as error:
        raise ValueError(
            f"Expected --data={path!r} to hold arrays of numbers as numpy.savez writes them: "
            f"{error}"
        ) from error
    return arrays if isinstance(arrays, np.ndarray) else _as_inputs(arrays, model, path)


def _as_inputs(arrays: dict, model: keras.Model, path: str) -> Any:
    if len(arrays) == len(model.inputs) == 1:
        return next(iter(arrays.values()))
    names = [x.name for x in model.inputs]
    keys = sorted(model.input) if isinstance(model.input, dict) else names
    if set(arrays) != set(keys):
        raise ValueError(
            f"Expected --data={path!r} with one array for each input of the model, {keys}; it "
            f"holds {sorted(arrays)}. Name them so: `numpy.savez(path, {keys[0]}=...)`."
        )
    return arrays if isinstance(model.input, dict) else [arrays[name] for name in names]


def _writable(path: str, suffix: str) -> Path:
    out = Path(path)
    if out.suffix != suffix:
        raise ValueError(f"Expected a file that ends in {suffix!r} to write; received {path!r}.")
    if not out.parent.is_dir():
        raise FileNotFoundError(
            f"Cannot write {path!r}: there is no folder {str(out.parent)!r}. Create it first."
        )
    return out


def _save(model: keras.Model, path: Path) -> None:
    """The file appears complete or not at all."""
    with draft_of(path) as draft:
        model.save(draft)
        put_in_place(draft, path)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parser() -> argparse.ArgumentParser:
    """What the command line understands."""
    top = argparse_flags.ArgumentParser(
        prog="keras_polar",
        description="Structured pruning for Keras 3. Training needs Python (keras_polar.apply); "
        "what comes before and after does not.",
        epilog="keras_polar COMMAND --help says more.",
    )
    top.add_argument("--version", action="version", version=f"keras_polar {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    _add(commands, "inspect", inspect_command, "model", "--ignore")
    _add(commands, "cost", cost_command, "model")
    _add(commands, "convert", convert_command, "gated", "out")
    _add(commands, "export", export_command, "model", "out", "--quantize", "--data")
    _add(commands, "benchmark", benchmark_command, "files", "--threads", "--runs")
    return top


def _add(commands: Any, name: str, run: Any, *arguments: str) -> None:
    """A subcommand that prints what `run(options)` returns."""
    command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
    for argument in arguments:
        command.add_argument(argument, **ARGUMENTS[argument])
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs a parsed command line; the exit code."""
    try:
        print(options.run(options))
    except (OSError, TypeError, ValueError) as error:
        print(f"keras_polar: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def main() -> None:
    """Entry point of `keras_polar` and `python -m keras_polar`."""
    app.run(run, flags_parser=lambda argv: parser().parse_args(argv[1:]))
