"""Magnitude pruning of tensorflow-model-optimization: weights become zeros, nothing gets smaller.

tfmot takes Keras 2 models only, so that the network is translated to tf_keras, trained and pruned
there, and its weights are brought back.
"""

import inspect

import cifar10
import keras
import numpy as np


def train(model, data, *, sparsity, ramp, steps, learning_rate, weight_decay):
    """Trains `model` and zeroes the smallest weights of every kernel on the way.

    Args:
        model: a Keras 3 model; it gets the weights of the pruned one.
        data: batches without end, as `fit` takes them.
        sparsity: share of each kernel's weights that end as zeros.
        ramp: first and last step of tfmot's polynomial schedule.
        steps: training steps altogether.
        learning_rate: its peak.
        weight_decay: L2 penalty on kernels; translation leaves regularizers behind.

    Returns:
        `model`.
    """
    import tensorflow_model_optimization as tfmot

    schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, sparsity, *ramp, frequency=10)
    twin = _with_decay(translated(model), weight_decay)
    pruned = _prunable(twin, pruning_schedule=schedule)
    _compile(pruned, learning_rate, steps)
    update = tfmot.sparsity.keras.UpdatePruningStep()
    pruned.fit(data, steps_per_epoch=steps, verbose=2, callbacks=[update])
    stripped = tfmot.sparsity.keras.strip_pruning(pruned)
    for layer in model.layers:
        layer.set_weights(stripped.get_layer(layer.name).get_weights())
    return model


def translated(model):
    """The same network in tf_keras, with the weights: of one whose layers are called once each.

    Settings that tf_keras does not know, and initializers and regularizers, are left behind.
    """
    import tf_keras

    twins = {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):
            twin = tf_keras.Input(batch_shape=layer.batch_shape, name=layer.name)
            twins[layer.output.name] = twin
            continue
        twin = _twin(layer, getattr(tf_keras.layers, type(layer).__name__))
        inputs = keras.tree.map_structure(lambda x: twins[x.name], layer.input)
        twins[layer.output.name] = twin(inputs)
        twin.set_weights(layer.get_weights())
    ends = [[twins[x.name] for x in own] for own in (model.inputs, model.outputs)]
    twin = tf_keras.Model(*ends, name=model.name)
    images = np.random.default_rng(0).normal(size=(4, *model.input_shape[1:])).astype("float32")
    outputs = [np.asarray(m(images, training=False)) for m in (model, twin)]
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-4 * np.abs(outputs[0]).max())
    return twin


def _twin(layer, cls):
    own = inspect.signature(cls.__init__).parameters
    left_behind = ("_initializer", "_regularizer", "_constraint")
    config = layer.get_config().items()
    known = {k: v for k, v in config if k in own and not k.endswith(left_behind)}
    return cls(**known, name=layer.name)


def _with_decay(twin, weight_decay):
    """A copy whose kernels are regularized: a layer that is built looks at its own only once."""
    import tf_keras

    for layer in twin.layers:
        if hasattr(layer, "kernel_regularizer"):
            layer.kernel_regularizer = tf_keras.regularizers.L2(weight_decay)
    copy = tf_keras.models.clone_model(twin)
    copy.set_weights(twin.get_weights())
    return copy


def _prunable(twin, **options):
    """The same network around the layers as tfmot wraps them: it refuses some without weights."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    def wrapped(layer):
        wrap = tfmot.sparsity.keras.prune_low_magnitude
        return wrap(layer, **options) if layer.weights else layer

    return tf_keras.models.clone_model(twin, clone_function=wrapped)


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
    weights = model.get_weights()
    return float(sum(map(np.count_nonzero, weights)) / sum(w.size for w in weights))
