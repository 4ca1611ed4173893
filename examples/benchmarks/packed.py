"""CIFAR-10 as one file of 18 MB, for machines without tensorflow-datasets.

    python examples/benchmarks/packed.py --data_dir=FOLDER --output=cifar10.npz
    python examples/benchmarks/compare.py --packed=cifar10.npz ...

The images stay as they are encoded in the dataset (PNG, or JPEG in a folder prepared so); one
after the other, they are compressed once more.
"""

import io

import numpy as np
from absl import app, flags

SPLITS = ("train", "test")


def read(path):
    """((train images, labels), (test images, labels)): uint8 images, integer labels."""
    with np.load(path) as file:
        return tuple(
            (_images(file[f"{split}_bytes"], file[f"{split}_lengths"]), file[f"{split}_labels"])
            for split in SPLITS
        )


def _images(content, lengths):
    from PIL import Image  # only this way of reading needs it

    ends = np.cumsum(lengths)
    pieces = np.split(content, ends[:-1])
    return np.stack([np.asarray(Image.open(io.BytesIO(piece))) for piece in pieces])


def write(path, data_dir):
    """Puts the encoded images and the labels of tensorflow-datasets into one file."""
    import tensorflow_datasets as tfds

    arrays = {}
    for split in SPLITS:
        examples = tfds.as_numpy(
            tfds.load(
                "cifar10",
                split=split,
                data_dir=data_dir,
                decoders={"image": tfds.decode.SkipDecoding()},
            )
        )
        encoded, labels = zip(*((e["image"], e["label"]) for e in examples), strict=True)
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(encoded), "uint8")
        arrays[f"{split}_lengths"] = np.array([len(e) for e in encoded])
        arrays[f"{split}_labels"] = np.array(labels)
    np.savez_compressed(path, **arrays)


def main(argv):
    """Entry point of absl."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    write(flags.FLAGS.output, flags.FLAGS.data_dir)


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", None, "Folder of tensorflow-datasets.")
    flags.DEFINE_string("output", "cifar10.npz", "File to write.")
    app.run(main)
