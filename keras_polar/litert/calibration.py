"""Integer files without danger to the process.

TensorFlow's calibrator ends the process on some models: on loops that pass tensors through
(tensorflow issues 75140 and 87468), and where activations are infinite (issue 120295). What may
be such a model is converted in a process of its own. So is every such file run for the first time:
XNNPACK frees memory twice on some whose activations were always zero.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_polar.litert.modes import QuantizationMode

_SCRIPT = Path(__file__).with_name("calibrate.py")
_TRIAL = (
    "import sys; from ai_edge_litert.interpreter import Interpreter;"
    "of = Interpreter(sys.argv[1]); of.allocate_tensors(); of.invoke()"
)
Batches = Iterable[Mapping[str, np.ndarray]]
_LOOPS = ("While", "StatelessWhile")


def is_dangerous(model: Any, signature: list, batches: Batches) -> bool:
    """Whether the calibrator may end the process.

    Args:
        model: functional; takes a list of inputs, in the order of `signature`.
        batches: what to calibrate with, from input name to array.
    """
    arrays = ([batch[spec.name] for spec in signature] for batch in batches)
    return _has_loop(model, signature) or not _is_finite(model, arrays)


def _has_loop(model: Any, signature: list) -> bool:
    import tensorflow as tf

    specs = [tf.TensorSpec(s.shape, s.dtype) for s in signature]
    compute = tf.function(lambda *x: model(list(x), training=False), autograph=False)
    graph = compute.get_concrete_function(*specs).graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    return any(node.op in _LOOPS for node in nodes)


def _is_finite(model: Any, batches: Iterable[list]) -> bool:
    """Whether no operation makes anything infinite or NaN."""
    import tensorflow as tf

    tf.debugging.enable_check_numerics()
    try:
        with keras.StatelessScope():  # states that layers keep stay as they are
            for arrays in batches:
                model(arrays, training=False)
    except tf.errors.InvalidArgumentError:
        return False
    finally:
        tf.debugging.disable_check_numerics()
    return True


def convert_apart(
    model: Any, signature: list, mode: QuantizationMode, ends: str, batches: Batches
) -> bytes:
    """The content of an integer file, made in a process of its own.

    Args:
        ends: dtype of the inputs and outputs of the file.

    Raises:
        RuntimeError: the converter raised an error, or ended its process.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.export(name, format="tf_saved_model", verbose=False, input_signature=[signature])
        arrays: Any = {
            f"{i}.{key}": x for i, batch in enumerate(batches) for key, x in batch.items()
        }
        np.savez(folder / "samples.npz", **arrays)
        command = [sys.executable, str(_SCRIPT), name, ends, *mode.operations]
        code = subprocess.run(command, capture_output=True, check=False).returncode
        if (folder / "model.tflite").exists():
            return (folder / "model.tflite").read_bytes()
        if (folder / "error.txt").exists():
            raise RuntimeError((folder / "error.txt").read_text(encoding="utf-8"))
        raise RuntimeError(f"TensorFlow's calibrator breaks down, and its process ends ({code})")


def check_runs(path: Path) -> None:
    """Runs a file in a process of its own.

    Raises:
        RuntimeError: the runtime ended that process.
    """
    command = [sys.executable, "-c", _TRIAL, str(path)]
    code = subprocess.run(command, capture_output=True, check=False).returncode
    if code not in (0, 1):  # 1 stands for what Python raises, which the comparison says better
        raise RuntimeError(
            f"LiteRT breaks down on it, and its process ends ({code}); steps or channels that are "
            "zero, or masked, in all of `representative_data` may be why"
        )
