"""Gated networks that are settled without training: for what does not depend on which units go."""

import numpy as np


def settled(gated, seed=0):
    """The gated network, settled as `fit` would, on channels that chance ranks."""
    from keras_polar.gates.gate import Gate

    rng = np.random.default_rng(seed)
    for layer in gated.layers:
        if isinstance(layer, Gate):
            layer.scores.assign(rng.random(layer.units))
    gated.settle()
    return gated
