"""Magnitude pruning of tensorflow-model-optimization: weights become zeros, nothing gets smaller.

tfmot takes Keras 2 models only, so that the network is translated to tf_keras, trained and pruned
there, and its weights are brought back.
"""

import cifar10
import numpy as np

from keras_polar.backends import to_numpy
from keras_polar.litert.tf_keras_twin import translated


def train(model, data, *, sparsity, ramp, steps, epochs, learning_rate, weight_decay):
    """Trains `model` and zeroes the smallest weights of every kernel on the way.

    Args:
        model: a Keras 3 model; it gets the weights of the pruned one.
        data: batches, as `fit` takes them.
        sparsity: share of each kernel's weights that end as zeros.
        ramp: first and last step of tfmot's polynomial schedule.
        steps: training steps altogether.
        epochs: training epochs.
        learning_rate: its peak.
        weight_decay: L2 penalty on kernels; translation leaves regularizers behind.

    Returns:
        `model`.
    """
    import tensorflow_model_optimization as tfmot

    schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, sparsity, *ramp, frequency=10)
    twin = _with_decay(translated(model), weight_decay)
    pruned = tfmot.sparsity.keras.prune_low_magnitude(twin, pruning_schedule=schedule)
    _compile(pruned, learning_rate, steps)
    update = tfmot.sparsity.keras.UpdatePruningStep()
    pruned.fit(data, epochs=epochs, verbose=2, callbacks=[update])
    stripped = tfmot.sparsity.keras.strip_pruning(pruned)
    for layer in model.layers:
        layer.set_weights(stripped.get_layer(layer.name).get_weights())
    return model


def _with_decay(twin, weight_decay):
    """A copy whose kernels are regularized: a layer that is built looks at its own only once."""
    import tf_keras

    for layer in twin.layers:
        if hasattr(layer, "kernel_regularizer"):
            layer.kernel_regularizer = tf_keras.regularizers.L2(weight_decay)
    copy = tf_keras.models.clone_model(twin)
    copy.set_weights(twin.get_weights())
    return copy


def _compile(model, peak, steps):
    """What `cifar10.compile_classifier` and its learning rate are, in tf_keras."""
    import tf_keras

    decay = cifar10.learning_rate_schedule(peak, steps).get_config()
    rate = tf_keras.optimizers.schedules.CosineDecay(**decay)
    model.compile(
        tf_keras.optimizers.SGD(rate, momentum=cifar10.MOMENTUM, nesterov=True),
        tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def nonzero(model):
    """Share of the weights that are not zero."""
    weights = [to_numpy(v) for v in model.weights]
    return float(sum(map(np.count_nonzero, weights)) / sum(w.size for w in weights))
