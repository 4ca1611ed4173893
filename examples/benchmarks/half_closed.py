"""The certificate of a model by other means than the library's own: random masks and inputs."""

import keras
import numpy as np

import keras_polar

UNKNOWN_SIZE = 32  # stands for a size that the model leaves open


def close_half(gated, seed=0):
    """Random masks that close half of every group."""
    rng = np.random.default_rng(seed)
    for group in gated.groups:
        group.set_mask(rng.permutation(group.units) < group.units // 2)


def random_inputs(model, batch=5, seed=0):
    """Random inputs in the structure that a model takes: normal floats, integers 0 or 1."""
    rng = np.random.default_rng(seed)

    def sample(x):
        shape = (x.shape[0] or batch, *(d or UNKNOWN_SIZE for d in x.shape[1:]))
        if "float" in x.dtype:
            return rng.standard_normal(shape).astype("float32")
        return rng.integers(0, 2, shape).astype(x.dtype)

    # A Sequential model has no `input` of its own before it is called.
    is_chain = isinstance(model, keras.Sequential)
    return keras.tree.map_structure(sample, model.inputs[0] if is_chain else model.input)


@keras_polar.full_precision()
def difference(a, b, inputs):
    """max |a - b| over all outputs in inference mode, relative to the largest |output| of `a`."""
    outputs = [keras.tree.flatten(model(inputs, training=False)) for model in (a, b)]
    return max(relative(*map(_numbers, pair)) for pair in zip(*outputs, strict=True))


def _numbers(x):
    return keras.ops.convert_to_numpy(x).astype("float64")


def relative(a, b):
    """The largest difference of two arrays, over the largest number of the first."""
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))
