"""One device == two devices with the same global batch: losses, weights, open rates, masks."""

import itertools

import keras
import numpy as np
import pytest
from helpers import quick, randomise
from keras import layers

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.gates.gate import DynamicGate

BACKEND = keras.backend.backend()
pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="Keras distributes no training there")
STEPS, BATCH = 20, 32
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(synchronised):
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((8, 8, 1))
    for i, width in enumerate((8, 12)):
        x = layers.Conv2D(width, 3, padding="same", name=f"conv{i}")(x)
        if synchronised:
            # On JAX the statistics are the global batch's anyway, and Keras refuses the argument.
            on_tensorflow = BACKEND == "tensorflow"
            x = layers.BatchNormalization(synchronized=on_tensorflow, name=f"bn{i}")(x)
        x = layers.Activation("tanh")(x)  # smooth: no kink that round-off could flip
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


@pytest.fixture(scope="module")
def strategies():
    """One of each for all tests: TensorFlow mixes up the collectives of several mirrored ones."""
    if BACKEND == "jax":
        from keras.distribution import DataParallel

        return DataParallel(devices=["cpu:0"]), DataParallel(devices=["cpu:0", "cpu:1"])
    import tensorflow as tf

    one = tf.distribute.OneDeviceStrategy("CPU:0")
    return one, tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def trained(strategy, gate, synchronised, taught=None, watched=False, **options):
    schedule = keras_polar.Schedule(warmup=0.1, ramp=0.3, settle=0.7)
    options = {"schedule": schedule, **options}
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS * BATCH, 8, 8, 1)).astype("float32")
    y = rng.integers(0, 10, STEPS * BATCH)
    with strategy.scope():
        model = network(synchronised)
        if taught:
            options["teacher"] = keras_polar.Teacher(randomise(network(False)), **taught)
        gated = keras_polar.apply(model, 0.5, gate=gate, **options)
        divide(gated)
        gated.compile(keras.optimizers.SGD(0.05, momentum=0.9), LOSS, jit_compile=BACKEND == "jax")
        losses = (Watched if watched else PerStep)(gated)
        gated.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[losses])
    assert losses.was_compacted != watched
    return gated, losses.logs


def divide(gated):
    """Dynamic gates that disagree between samples, and so between replicas."""
    rng = np.random.default_rng(1)
    for layer in gated.layers:
        if isinstance(layer, DynamicGate):
            layer.kernel.assign(0.3 * rng.standard_normal(layer.kernel.shape))


class PerStep(keras.callbacks.Callback):
    """What is logged of each step, without looking at the model, which trains compacted then.

    It may be called some steps later: what the gates are at is that of then, the loss is not.
    """

    async_safe = True

    def __init__(self, gated):
        super().__init__()
        self.gated, self.by_step, self.was_compacted = gated, {}, False

    def on_train_batch_end(self, batch, logs=None):
        self.by_step[batch] = [logs[name] for name in ("loss", "sparsity", "polarization")]
        self.was_compacted = self.gated.sub_network is not None

    @property
    def logs(self):
        return [row for _, row in sorted(self.by_step.items())]


class Watched(PerStep):
    """Called at each step, so that nothing is compacted."""

    async_safe = False


@pytest.mark.parametrize(
    ("gate", "synchronised"),
    quick(
        [("static", False), ("dynamic", True)],
        [*itertools.product(("dynamic", "static"), (False, True))],
    ),
)
def test_two_devices_train_as_one(gate, synchronised, strategies):
    watched = not synchronised
    one, one_logs = trained(strategies[0], gate, synchronised, watched=watched)
    two, two_logs = trained(strategies[1], gate, synchronised, watched=watched)
    if watched:
        assert max(row[1] for row in one_logs) > 0.05  # the gates did move
        assert gate == "static" or min(row[2] for row in one_logs) < 0.9  # samples disagreed
        np.testing.assert_allclose(two_logs, one_logs, atol=1e-5)
    losses = [[row[0] for row in logs] for logs in (one_logs, two_logs)]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)
    for a, b in zip(one.weights, two.weights, strict=True):
        np.testing.assert_allclose(to_numpy(b), to_numpy(a), atol=1e-5, err_msg=a.path)
    for a, b in zip(one.groups, two.groups, strict=True):
        np.testing.assert_array_equal(b.mask, a.mask)


@pytest.mark.parametrize("every", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_two_devices_learn_from_a_teacher_as_one(every, strategies):
    teacher = {"every": every, "weight": 3.0}
    # Static gates of a group move together, at a step that round-off decides: here they do not.
    schedule = keras_polar.Schedule(warmup=0.7, ramp=0.7, settle=0.7)
    options = {"schedule": schedule, "importance": "l1_norm"}
    taught, logs = [], []
    for strategy in strategies:
        gated, by_step = trained(strategy, "static", True, teacher, **options)
        taught.append(gated)
        logs.append(by_step)
    losses = [[row[0] for row in by_step] for by_step in logs]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)
    _, alone = trained(strategies[0], "static", True, **options)
    assert abs(np.array(alone) - logs[0]).max() > 1e-2  # and it is heard
    for a, b in zip(*(gated.weights for gated in taught), strict=True):
        np.testing.assert_allclose(to_numpy(b), to_numpy(a), atol=1e-5, err_msg=a.path)


@pytest.mark.skipif(BACKEND != "jax", reason="Keras shards models on JAX")
def test_sharded_models_train_whole():
    from keras.distribution import DeviceMesh, LayoutMap, ModelParallel

    layout = LayoutMap(DeviceMesh((1, 2), ["batch", "model"], ["cpu:0", "cpu:1"]))
    layout["conv.*kernel"] = (None, None, None, "model")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((32, 8, 8, 1)).astype("float32"), rng.integers(0, 10, 32)
    with ModelParallel(layout_map=layout, batch_dim_name="batch").scope():
        gated = keras_polar.apply(network(False), 0.5, gate="static")
        gated.compile("adam", LOSS)
        gated.settle()
        with pytest.warns(UserWarning, match=r"whole network.*ModelParallel"):
            gated.fit(x, y, verbose=0)
    keras_polar.convert(gated, verify=x)
