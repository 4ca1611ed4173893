"""Inputs made up for a model, and how far apart two models are on them."""

from typing import Any

import keras
import numpy as np
from keras import tree

from keras_polar.backends import to_numpy
from keras_polar.graph.keras_private import functional

UNKNOWN_SIZE = 32  # stands for a dimension the model leaves open, such as height and width


def random_inputs(model: Any, batch: int = 5, seed: int = 0) -> Any:
    """Random inputs for a functional model, in the structure the model takes.

    Floats are standard normal, integers 0 or 1; unknown sizes become 32. The batch is odd: Keras
    on TensorFlow adds (n, 1) to (n, n) as if it were a bias of n channels.

    Raises:
        ValueError: the model takes strings.
    """
    rng = np.random.default_rng(seed)

    def sample(x: Any) -> np.ndarray:
        shape = (x.shape[0] or batch, *(d or UNKNOWN_SIZE for d in x.shape[1:]))
        dtype = keras.backend.standardize_dtype(x.dtype)
        if "float" in dtype:
            return rng.standard_normal(shape).astype("float32")
        if dtype == "string":
            raise ValueError(
                f"Input {x.name!r} takes strings, of which there are no random ones: pass inputs."
            )
        return rng.integers(0, 2, shape).astype(dtype)

    # A Sequential model has no `input` of its own before it is called.
    return tree.map_structure(sample, (functional(model) or model).input)


def difference(a: Any, b: Any, inputs: Any) -> float:
    """max |a - b| over all outputs in inference mode, relative to the largest |output| of `a`."""
    pairs = zip(
        tree.flatten(a(inputs, training=False)),
        tree.flatten(b(inputs, training=False)),
        strict=True,
    )
    worst = [_relative(*map(to_numpy, pair)) for pair in pairs]
    return float(np.max(worst))


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype("float64"), b.astype("float64")
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))
