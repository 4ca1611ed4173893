"""Inputs made up for a model, and how far apart two models are on them."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_polar.backends import full_precision, to_numpy
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


@full_precision()
def check_certificate(
    gated: Any, small: Any, inputs: Any = True, explain: Callable | None = None
) -> float:
    """The largest difference between two models' outputs, relative to the largest output.

    Args:
        inputs: inputs of both models, or True for random ones.
        explain: `explain(inputs, tolerance)` says in words where a difference begins.

    Raises:
        ValueError: the difference exceeds round-off (1e-4; 2e-2 in half precision).
    """
    is_random = inputs is True
    inputs = random_inputs(gated) if is_random else inputs
    try:
        deviation = difference(gated, small, inputs)
    except (TypeError, ValueError) as error:
        raise ValueError(_do_not_fit(gated, inputs, error, is_random)) from error
    except Exception as error:  # TensorFlow has errors of its own
        if not is_random:
            raise
        raise ValueError(_do_not_fit(gated, inputs, error, is_random)) from error
    is_half = any("16" in layer.compute_dtype for layer in gated.layers)
    tolerance = 2e-2 if is_half else 1e-4
    if not deviation <= tolerance:
        where = explain(inputs, tolerance) if explain else ""
        raise ValueError(
            f"Certificate: expected the converted model to equal {gated.name!r} to {tolerance:g} "
            f"of the largest output, but it differs by {deviation:g}. {where}. If that layer has a "
            "rule given to keras_polar.register, compare `flow`, `weights` and `config` with what "
            "its call computes."
        )
    return deviation


def _do_not_fit(model: Any, inputs: Any, error: Exception, is_random: bool) -> str:
    wanted = [tuple(x.shape) for x in model.inputs]
    received = [getattr(x, "shape", x) for x in tree.flatten(inputs)]
    if is_random:
        return (
            f"verify: model {model.name!r} cannot be called on random inputs of shapes {received}: "
            f"sizes that it leaves open, in {wanted}, are {UNKNOWN_SIZE} there, integers 0 or 1. "
            f"Pass inputs of your own, verify=x. {error}"
        )
    return (
        f"verify: expected at least one sample for each input of model {model.name!r}, in shapes "
        f"{wanted}, or True for random ones; received {received}. {error}"
    )
