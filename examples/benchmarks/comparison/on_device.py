"""Runs of a comparison on JAX where all runs of a network are one compiled program.

    python examples/benchmarks/comparison/packed_data.py --data_dir=FOLDER --output=cifar10.npz
    KERAS_BACKEND=jax python examples/benchmarks/comparison/on_device.py --packed=cifar10.npz \
        --model=resnet20 --seeds=0,1,2 --methods=dense,l1_even,static --minutes=5

A small network is trained in less time than it takes to compile its training. So nothing is cut
here: every method trains the network with gates, its masks set when the method says. Masked units
do nothing, learn nothing and are counted as gone, so that this is what a cut would have trained;
only networks of other widths (`narrow_longer`) need programs of their own. Data, order of batches,
optimiser and learning rate are those of protocol.py; a run leaves the same line of results.

Runs stop being started when --minutes are over, and what has been run is not repeated: a comparison
may take several sittings. Dense networks of regime "trained" that are missing are trained first.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cifar10
import jax
import keras
import methods
import numpy as np
import protocol
import results
from absl import app, flags
from epochs_on_jax import DEVICE, _augmented, _normalised, _step
from jax import numpy as jnp

import keras_polar


class Trainer:
    """Trains one network for any number of steps, compiled once; knows how it began."""

    def __init__(self, model, data, batch_size, capacity):
        self.model, self.data, self.batch_size, self.capacity = model, data, batch_size, capacity
        model.compile(
            keras.optimizers.SGD(0.1, momentum=cifar10.MOMENTUM, nesterov=True),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.optimizer.build(model.trainable_variables)
        self.variables = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
        )
        self.first_values = [np.asarray(v.value) for vs in self.variables for v in vs]
        with jax.default_device(DEVICE):
            self.images = jnp.asarray(data.train[0])
            self.labels = jnp.asarray(data.train[1], "int32")
        self._run = jax.jit(functools.partial(_steps, model), donate_argnums=0)
        self._predict = jax.jit(functools.partial(_predicted, model))

    def reset(self, values=None):
        flat = [v for vs in self.variables for v in vs]
        for variable, value in zip(flat, values or self.first_values, strict=True):
            variable.assign(value)

    def train(self, seed, rates, first, last):
        """Trains from step `first` to before `last`; `rates` has a learning rate for each step."""
        with jax.default_device(DEVICE):
            state = [[jnp.asarray(np.asarray(v.value)) for v in vs] for vs in self.variables]
            rows = self._rows(seed)
            padded = jnp.asarray(np.resize(rates, self.capacity), "float32")
            key = jax.random.fold_in(jax.random.key(seed), 1)
            state, loss = self._run(
                state, self.images, self.labels, rows, padded, key, first, last
            )
        for vs, values in zip(self.variables, state, strict=True):
            for variable, value in zip(vs, values, strict=True):
                variable.assign(np.asarray(value))
        return float(loss)

    @functools.lru_cache(2)  # noqa: B019
    def _rows(self, seed):
        """Of each step, which images: one order of all of them after the other."""
        rng, n = np.random.default_rng(seed), len(self.data.train[0])
        per_epoch = -(-n // self.batch_size)
        epochs = [
            np.resize(rng.permutation(n), (per_epoch, self.batch_size))
            for _ in range(-(-self.capacity // per_epoch))
        ]
        return jnp.asarray(np.concatenate(epochs)[: self.capacity], "int32")

    def accuracies(self):
        parts = {"held_out": self.data.held_out, "test": self.data.test}
        return {name: part and self._accuracy(*part) for name, part in parts.items()}

    def _accuracy(self, images, labels, size=1000):
        with jax.default_device(DEVICE), jax.default_matmul_precision("highest"):
            state = [[jnp.asarray(np.asarray(v.value)) for v in vs] for vs in self.variables[:2]]
            pieces = [
                self._predict(state, jnp.asarray(images[i : i + size]))
                for i in range(0, len(images), size)
            ]
        return float(np.mean(np.concatenate(pieces) == labels))


def _steps(model, state, images, labels, rows, rates, key, first, last):
    """Steps `first` to before `last`; the loss of the last one."""
    place = [v.name for v in model.optimizer.variables].index("learning_rate")

    def step(number, carried):
        trained, other, slots = carried[0]
        slots = [rates[number] if i == place else v for i, v in enumerate(slots)]
        x = _augmented(images[rows[number]], jax.random.fold_in(key, number))
        state, (loss, _) = _step(model, [trained, other, slots], x, labels[rows[number]])
        return state, loss

    return jax.lax.fori_loop(first, last, step, (state, jnp.zeros((), "float32")))


def _predicted(model, state, images):
    logits, _ = model.stateless_call(*state, _normalised(images), training=False)
    return jnp.argmax(logits, axis=-1)


def rates_of(peak, total):
    """The learning rates of a run, one per step."""
    rate = protocol.Rate(peak, total)
    return np.asarray(jax.vmap(rate)(jnp.arange(total, dtype="float32")))
