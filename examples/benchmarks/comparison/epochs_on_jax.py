"""Trains on JAX, each epoch as one compiled program over images in the memory of the device.

Networks for CIFAR-10 are so small that a GPU would mostly wait for Python between two steps of
`fit`. The loop is that of Keras' guide to custom training loops in JAX; shuffling, augmentation,
optimiser, losses and schedule are those of `fit` on batches of `cifar10.training_pipeline`, with
other random numbers. There are no callbacks: gates have to be settled by the caller.
"""

import functools
import itertools
import time

import cifar10
import jax
import numpy as np
from jax import numpy as jnp

from keras_polar import full_precision

HOST, DEVICE = jax.local_devices(backend="cpu")[0], jax.local_devices()[0]
# Whatever is not a whole epoch stays on the host: a GPU takes longer to compile than to compute it.
jax.config.update("jax_default_device", HOST)


class Examples:
    """Images and labels in the memory of the device, and the key of the order of batches."""

    def __init__(self, images, labels, *, batch_size, seed):
        with jax.default_device(DEVICE):
            self.images, self.labels = jnp.asarray(images), jnp.asarray(labels, "int32")
        self.batch_size, self.key = batch_size, jax.random.key(seed)


def fit(model, examples, first, last):
    """Trains a compiled model from epoch `first` to before `last`."""
    model.optimizer.build(model.trainable_variables)
    variables = (*_variables(model), model.optimizer.variables)
    with jax.default_device(DEVICE):
        state = _trained(model, _values(variables), examples, range(first, last))
    assign(variables, state)


def assign(variables, state):
    """Puts what was computed on the device into the variables, which are the host's."""
    flat = itertools.chain.from_iterable
    for variable, value in zip(flat(variables), flat(state), strict=True):
        variable.assign(np.asarray(value))


def _variables(model):
    return model.trainable_variables, model.non_trainable_variables


def _values(variables):
    return [[v.value for v in own] for own in variables]


def _trained(model, state, examples, epochs):
    run = jax.jit(functools.partial(_epoch, model, examples.batch_size), donate_argnums=0)
    for number in epochs:
        start = time.perf_counter()
        key = jax.random.fold_in(examples.key, number)
        state, (loss, accuracy) = run(state, examples.images, examples.labels, key)
        text = f"accuracy: {float(accuracy):.4f} - loss: {float(loss):.4f}"
        print(f"epoch {number + 1} - {time.perf_counter() - start:.2f} s - {text}", flush=True)
    return state


def predicted(model, state, images):
    """The class of each image, by a model of logits in inference mode."""
    logits, _ = model.stateless_call(*state, _normalised(images), training=False)
    return jnp.argmax(logits, axis=-1)


@full_precision()
def accuracy(model, images, labels, batch_size=500):
    """Share of images that get their label, by a model of logits in inference mode."""
    state = _values(_variables(model))

    predict = jax.jit(functools.partial(predicted, model))
    with jax.default_device(DEVICE):
        batches = range(0, len(images), batch_size)
        found = [predict(state, images[i : i + batch_size]) for i in batches]
    return float(np.mean(np.concatenate(found) == labels))


def _epoch(model, batch_size, state, images, labels, key):
    """One pass over the images in a new order; the last batch is filled up from the first."""
    order, augmentation = jax.random.split(key)
    steps = -(-len(images) // batch_size)
    rows = jnp.resize(jax.random.permutation(order, len(images)), (steps, batch_size))
    keys = jax.random.split(augmentation, steps)

    def step(state, drawn):
        rows, key = drawn
        return train_step(model, state, augmented(images[rows], key), labels[rows])

    state, logs = jax.lax.scan(step, state, (rows, keys))
    return state, [jnp.mean(x) for x in logs]


def train_step(model, state, x, y):
    """One step of training: (trained, other, optimizer's variables) and what `fit` would log."""

    def loss_of(trained, other):
        logits, other, penalties = model.stateless_call(
            trained, other, x, training=True, return_losses=True
        )
        loss = model.loss(y, logits) + sum(penalties)
        return loss, (other, jnp.mean(jnp.argmax(logits, axis=-1) == y))

    trained, other, of_optimizer = state
    gradient = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (other, hits)), slopes = gradient(trained, other)
    trained, of_optimizer = model.optimizer.stateless_apply(of_optimizer, slopes, trained)
    return [list(trained), list(other), list(of_optimizer)], (loss, hits)


def augmented(images, key):
    """As `cifar10.augment`: a random crop of the padded image and a random flip; normalised."""
    n, side = images.shape[:2]
    border = round(cifar10.PADDING * side)
    padded = jnp.pad(images, [(0, 0), (border, border), (border, border), (0, 0)], "reflect")
    for_corner, for_flip = jax.random.split(key)
    corners = jax.random.randint(for_corner, (n, 2), 0, 2 * border + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), (side, side, 3))

    cropped = jax.vmap(crop)(padded, corners)
    flips = jax.random.bernoulli(for_flip, shape=(n, 1, 1, 1))
    return _normalised(jnp.where(flips, cropped[:, :, ::-1], cropped))


def _normalised(images):
    scaled = jnp.asarray(images, "float32") / 255.0
    return (scaled - jnp.array(cifar10.CHANNEL_MEAN)) / jnp.array(cifar10.CHANNEL_STD)
