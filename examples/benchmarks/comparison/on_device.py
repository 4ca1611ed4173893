"""Runs of a comparison on JAX where all runs of a network share one compiled program.

    python examples/benchmarks/comparison/packed_data.py --data_dir=FOLDER --output=cifar10.npz
    KERAS_BACKEND=jax python examples/benchmarks/comparison/on_device.py --packed=cifar10.npz \
        --model=resnet20 --seeds=0,1,2 --methods=dense,l1_even,static --minutes=5

A small network is trained in less time than it takes to compile its training. So nothing is cut
here: every method trains the network with gates, whose masks are set when the method says. Units
that are masked do nothing and learn nothing, so that this is what a network that was cut would have
become; what is measured is the network that `convert` gives in the end. Only networks of other
widths (`narrow`, `narrow_longer`) are programs of their own.

Data, batches, optimiser, learning rate and results are those of run.py, but for the random numbers.
No run is started once --minutes are over, and what has been run is not repeated: a comparison may
take several sittings. On a large GPU several of these, each with its --results_dir, go well beside
one another. Dense networks of the regime "trained" that are missing are trained first.
"""

import functools
import itertools
import sys
import time
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cifar10
import jax
import keras
import methods
import numpy as np
import protocol
import results
import run as one_by_one
from absl import app, flags
from epochs_on_jax import DEVICE, assign, augmented, predicted, train_step
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
        self._predict = jax.jit(functools.partial(predicted, model))

    def start(self, model):
        """All as it was, but for weights, which are those of `model`."""
        weights = {w.path: w.value for w in model.weights}
        for variable, value in zip(
            itertools.chain(*self.variables), self.first_values, strict=True
        ):
            variable.assign(weights.pop(variable.path, value))
        if weights:
            raise ValueError(f"The network to be trained has no {', '.join(weights)}.")

    def train(self, seed, rates, first, last):
        """Trains from step `first` to before `last`; `rates` has a learning rate for each step."""
        with jax.default_device(DEVICE):
            state = self._on_device(self.variables)
            rows = self._rows(seed)
            padded = jnp.asarray(np.resize(rates, self.capacity), "float32")
            key = jax.random.fold_in(jax.random.key(seed), 1)
            state, loss = self._run(state, self.images, self.labels, rows, padded, key, first, last)
        assign(self.variables, state)
        return float(loss)

    def _on_device(self, variables):
        return [[jnp.asarray(np.asarray(v.value)) for v in vs] for vs in variables]

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
            state = self._on_device(self.variables[:2])
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
        x = augmented(images[rows[number]], jax.random.fold_in(key, number))
        state, (loss, _) = train_step(model, [trained, other, slots], x, labels[rows[number]])
        return state, loss

    return jax.lax.fori_loop(first, last, step, (state, jnp.zeros((), "float32")))


def rates_of(peak, total):
    """The learning rates of a run, one per step."""
    return np.asarray(jax.vmap(protocol.Rate(peak, total))(jnp.arange(total, dtype="float32")))


class Run(protocol.Run):
    """A run whose networks are trained by a `Trainer`; those of the same shapes by the same one."""

    trainers: ClassVar[dict] = {}

    def train(self, model, first=0, last=None, total=None, peak=None, restart=None):
        total = total or self.setting.total
        last = total if last is None else last
        self.macs += self.of_training(model, last - first)
        key = (total, *(tuple(w.shape) for w in model.weights))
        if key not in self.trainers:
            self.trainers[key] = Trainer(model, self.data, self.setting.batch_size, total)
        trainer = self.trainers[key]
        trainer.start(model)
        trainer.train(self.seed, rates_of(peak or self.setting.peak, total), first, last)
        self.accuracies = trainer.accuracies()
        return trainer.model


# --- methods ------------------------------------------------------------------------------------


class Gated:
    """All methods that remove units of one network: whatever they close, one program.

    Args:
        setting: what to do.
        data: a `protocol.Data`.
        gates: options of `apply`.
    """

    def __init__(self, setting, data, **gates):
        options = {name: getattr(setting, name) for name in ("measure", "round_to", "max_sparsity")}
        options |= {"schedule": setting.course, **gates, "compact": False}
        self.model = keras_polar.apply(setting.build(), setting.sparsity, **options)
        self.trainer = Trainer(self.model, data, setting.batch_size, setting.total)

    def ship(self, run, method):
        """The network that a method comes to, and its accuracies."""
        network, setting = run.start(), run.setting
        self.trainer.start(network)
        if method == "dense":
            cuts_at = setting.total
            self._train(run, 0, cuts_at, opened=True)
        elif methods.METHODS[method].ours:
            cuts_at = setting.settles_at
            self.model.consensus.steps.assign(setting.total)
            self._train(run, 0, cuts_at)
            run.notes |= self._decided()
        else:
            cuts_at = run.cuts_at
            self._train(run, 0, cuts_at, opened=True)
            self._cut(run, **methods.METHODS[method].ship.keywords)
        self._train(run, cuts_at, setting.total)
        small = keras_polar.convert(self.model)
        for model, steps in ((network, cuts_at), (small, setting.total - cuts_at)):
            run.macs += run.of_training(model, steps)
        return small, self.trainer.accuracies()

    def _train(self, run, first, last, opened=False):
        if opened:
            for group in self.model.groups:
                group.set_mask(np.ones(group.units, bool))
        if last > first:
            rates = rates_of(run.setting.peak, run.setting.total)
            self.trainer.train(run.seed, rates, first, last)

    def _decided(self):
        """Settles; what share of units the gates had decided, and of how many settling differs."""
        rates, closed = (
            np.concatenate([getattr(group, name) for group in self.model.groups])
            for name in ("open_rates", "mask")
        )
        self.model.settle()
        settled = np.concatenate([group.mask for group in self.model.groups])
        decided = (rates < 0.05) | (rates > 0.95)
        return {"decided": float(decided.mean()), "changed": float((closed != settled).mean())}

    def _cut(self, run, scores, shares, penalty=None):
        """As `methods._cut`, whatever multiples our methods keep."""
        for layer in self.model.layers:
            if isinstance(layer, keras_polar.Gate):
                layer.settled.assign(0.0)
        objective = self.model.consensus
        ours, objective.round_to = objective.round_to, 1
        objective.criterion = methods.Shared(functools.partial(scores, run), shares)
        self.model.settle()
        objective.criterion, objective.round_to = None, ours


class Sitting:
    """Runs methods of a setting one after the other; what they share is compiled once."""

    def __init__(self, setting, data, dense_dir):
        self.setting, self.data, self.dense_dir = setting, data, dense_dir
        self.programs = {}

    def run(self, method, seed):
        """The results of a method."""
        began, row = time.perf_counter(), methods.METHODS[method]
        self._require_dense(seed)
        run = Run(self.setting, self.data, seed, self.dense_dir)
        cuts = isinstance(row.ship, functools.partial) and row.ship.func is methods.cut_once
        if method == "dense" or row.ours or cuts:
            gates = row.ship.keywords if row.ours else {"gate": "static"}
            model, run.accuracies = self._gated(**gates).ship(run, method)
        else:
            model = row.ship(run)
        seconds = round(time.perf_counter() - began, 1)
        return {**one_by_one.outcome(run, model, run.accuracies), "seconds": seconds}

    def _gated(self, **gates):
        key = str(gates)
        if key not in self.programs:
            self.programs[key] = Gated(self.setting, self.data, **gates)
        return self.programs[key]

    def _require_dense(self, seed):
        path = self.setting.dense_path(self.dense_dir, seed)
        if self.setting.regime == "trained" and not path.exists():
            protocol.train_dense(self.setting, self.data, seed, path, Run)


def main(argv):
    """Entry point of absl."""
    del argv
    options, ends = flags.FLAGS, time.monotonic() + 60 * flags.FLAGS.minutes
    setting = one_by_one.setting_of(options)
    data = protocol.load(
        setting, options.data_dir, options.packed, options.fake_data, options.evaluation_images
    )
    sitting = Sitting(setting, data, options.dense_dir)
    known = {results.identity(r) for r in results.load(options.results_dir)}
    for seed in map(int, options.seeds):
        for method in options.methods:
            result = one_by_one.described(setting, method, (), seed)
            if results.identity(result) not in known and time.monotonic() < ends:
                result |= sitting.run(method, seed)
                results.add(options.results_dir, result)
                print(f"{method}, seed {seed}: {result['held_out']} {result['test']}", flush=True)


if __name__ == "__main__":
    one_by_one.define_flags()
    flags.DEFINE_float("minutes", 60.0, "After so many no run is started.")
    app.run(main)
