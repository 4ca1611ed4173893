"""Trains under a strategy of tf.distribute: `python under_strategy.py KIND [INDEX PORT ...]`.

Prints a JSON object: for a plain and for a gated model how far its weights end from those that
one device trains, or the error. A process for each KIND: collectives are configured only once.
"""

import json
import os
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_polar
from keras_polar.backends import to_numpy


def central_storage():
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"], "CPU:0")


def multi_worker(index, *ports):
    """One of as many workers as there are ports."""
    addresses = [f"localhost:{port}" for port in ports]
    task = {"type": "worker", "index": int(index)}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    return tf.distribute.MultiWorkerMirroredStrategy()


def parameter_server(_, *ports):
    """One worker and one parameter server, both in this process."""
    jobs = {job: [f"localhost:{port}"] for job, port in zip(("worker", "ps"), ports, strict=True)}
    cluster = tf.train.ClusterSpec(jobs)
    for job in jobs:
        tf.distribute.Server(cluster, job, 0, "grpc", start=True)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    return tf.distribute.ParameterServerStrategy(resolver)


def build(is_gated):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(16, activation="tanh")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(hidden), name="network")
    model = keras_polar.apply(model, 0.5) if is_gated else model
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, jit_compile=False)
    return model


def fit(model):
    x = np.random.default_rng(0).standard_normal((320, 6)).astype("float32")
    model.fit(x, (x[:, 0] > 0).astype("int64"), 32, epochs=2, shuffle=False, verbose=0)
    return [to_numpy(w) for w in model.weights]


def compared(strategy, is_gated):
    with strategy.scope():
        model = build(is_gated)
    try:
        found = fit(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    wanted = fit(build(is_gated))
    return float(max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)))


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    strategy = globals()[kind](*arguments)
    # Before anything else: a worker that ends takes the others with it.
    print(json.dumps({"gated": compared(strategy, True), "plain": compared(strategy, False)}))
