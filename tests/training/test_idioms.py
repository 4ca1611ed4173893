"""What people write around a compiled model gives on a gated one, while its gates are open, what it
gives on the plain model: the same lists, names, numbers and files.
"""

import pickle
import warnings

import keras
import numpy as np
import pytest
from helpers import quick
from keras import layers, ops

import keras_polar

BACKEND = keras.backend.backend()
# Keras says so of copies of compiled models, whose optimizers are not built.
pytestmark = pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
OURS = ("sparsity", "polarization")  # in the logs of training besides
LONG = keras_polar.Schedule(steps=1000)  # presses and settles after these tests


def data(n=48):
    x = np.random.default_rng(0).normal(size=(n, 6)).astype("float32")
    return x, (x[:, 0] > 0).astype("int64") + (x[:, 1] > 0.5)


@keras.saving.register_keras_serializable("idioms")
class Watched(layers.Layer):
    """A layer with a loss, a metric and a random state of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.size = keras.metrics.Mean(name="size")
        self.random = keras.random.SeedGenerator(5)

    def call(self, x, training=False):
        self.add_loss(0.01 * ops.mean(ops.square(x)))
        if BACKEND != "jax":  # there Keras takes the variables of metrics away meanwhile
            self.size.update_state(ops.mean(ops.abs(x)))
        return x


def network(*steps, outputs=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), name="x")
    x = layers.Dense(16, activation="tanh", name="one")(inputs)
    for step in steps:
        x = step(x)
    x = layers.Dense(16, activation="tanh", name="two")(x)
    heads = {n: layers.Dense(3, name=n)(x) for n in outputs or ("logits",)}
    return keras.Model(inputs, heads if outputs else heads["logits"], name="network")


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
COMPILED = {"loss": LOSS, "metrics": ["accuracy"], "jit_compile": False}
FIT = {"batch_size": 16, "epochs": 2, "shuffle": False, "verbose": 0}


def compiled(model, **options):
    model.compile(keras.optimizers.Adam(0.01), **{**COMPILED, **options})
    return model


def fitted(model, *args, **options):
    return compiled(model).fit(*(args or data()), **{**FIT, **options}).history


def tensorflow_step(self, data):
    import tensorflow as tf

    x, y = data
    with tf.GradientTape() as tape:
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
    variables = self.trainable_variables
    self.optimizer.apply(tape.gradient(loss, variables), variables)
    return measured(self, loss, y, y_pred)


def torch_step(self, data):
    import torch

    x, y = data
    self.zero_grad()
    y_pred = self(x, training=True)
    loss = self.compute_loss(y=y, y_pred=y_pred)
    loss.backward()
    weights = list(self.trainable_weights)
    with torch.no_grad():
        self.optimizer.apply([v.value.grad for v in weights], weights)
    return measured(self, loss, y, y_pred)


def measured(self, loss, y, y_pred):
    for metric in self.metrics:
        if metric.name == "loss":
            metric.update_state(loss)
        else:
            metric.update_state(y, y_pred)
    return {m.name: m.result() for m in self.metrics}


def jax_step(self, state, data):
    import jax

    def loss_and_updates(trainable, others):
        y_pred, others, losses = self.stateless_call(
            trainable, others, x, training=True, return_losses=True
        )
        return self.compute_loss(x, y, y_pred) + sum(losses), (y_pred, others)

    x, y = data
    trainable, others, slots, counts = state
    gradient = jax.value_and_grad(loss_and_updates, has_aux=True)
    (loss, (y_pred, others)), gradients = gradient(trainable, others)
    trainable, slots = self.optimizer.stateless_apply(slots, gradients, trainable)
    logs, new = {}, []
    for metric in self.metrics:
        own = counts[len(new) : len(new) + len(metric.variables)]
        seen = (loss,) if metric.name == "loss" else (y, y_pred)
        own = metric.stateless_update_state(own, *seen)
        logs[metric.name] = metric.stateless_result(own)
        new += own
    return logs, (trainable, others, slots, new)


def guide(model, folder):
    """The `train_step` of Keras' guides in a subclass."""
    steps = {"tensorflow": tensorflow_step, "torch": torch_step, "jax": jax_step}
    kind = type("Own", (type(model),), {"train_step": steps[BACKEND]})
    own = kind(model.input, model.output)
    return fitted(own), own.evaluate(*data(), verbose=0)


def lists(model, folder):
    x, y = data()
    fitted(model)
    loss, accuracy, *more = model.evaluate(x, y, verbose=0)
    return [
        loss, accuracy, more, model.evaluate(x, y, verbose=0, return_dict=True),
        model.test_on_batch(x, y), model.test_on_batch(x, y, return_dict=True),
        model.predict(x, verbose=0), model.predict_on_batch(x), [m.name for m in model.metrics],
    ]  # fmt: skip


def trained_by_hand(model, folder):
    x, y = data()
    compiled(model)
    results = [model.train_on_batch(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)]
    return results, model.train_on_batch(x, y, return_dict=True)


def built_in_callbacks(model, folder):
    callbacks = keras.callbacks
    some = [
        callbacks.EarlyStopping("val_loss", patience=3, restore_best_weights=True),
        callbacks.ModelCheckpoint(folder / "best.keras", save_best_only=True),
        callbacks.ModelCheckpoint(folder / "{epoch}.weights.h5", save_weights_only=True),
        callbacks.ReduceLROnPlateau("val_loss", patience=0, min_delta=1.0),
        callbacks.LearningRateScheduler(lambda epoch, rate: 0.9 * rate),
        callbacks.CSVLogger(folder / "log.csv"),
        callbacks.TerminateOnNaN(),
        callbacks.BackupAndRestore(folder / "backup"),
        callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(mine=epoch)),
    ]
    history = fitted(model, validation_data=data(), callbacks=some, epochs=3)
    loaded = keras.models.load_model(folder / "best.keras")
    return history, loaded.evaluate(*data(), verbose=0), sorted(p.name for p in folder.iterdir())


def tensorboard(model, folder):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("tensorflow")  # writes what it shows, on every backend
    from tensorflow import make_ndarray

    board = keras.callbacks.TensorBoard(folder / "logs", update_freq="batch")
    fitted(model, validation_data=data(), callbacks=[board])
    found = {}
    for part in ("train", "validation"):
        shown = events.EventAccumulator(str(folder / "logs" / part)).Reload()
        # Keras draws the graph of models of its own classes alone.
        for tag in {*shown.Tags()["tensors"]} - {"keras"}:
            written = shown.Tensors(tag)
            found[f"{part} {tag}"] = [[e.step, make_ndarray(e.tensor_proto)] for e in written]
    return found


def quantize(model, folder):
    x, _ = data()
    fitted(model)
    with warnings.catch_warnings():  # of layers that Keras leaves as they are
        warnings.filterwarnings("ignore", "Layer .* does not have a `quantize` method")
        model.quantize("int8")
    return model.predict(x, verbose=0), model.evaluate(*data(), verbose=0)


def validation(model, folder):
    return fitted(model, validation_split=0.25, validation_freq=2, epochs=4)


def weights_of_classes_and_samples(model, folder):
    x, y = data()
    compiled(model, weighted_metrics=["accuracy"])
    one = model.fit(x, y, class_weight={0: 1.0, 1: 2.0, 2: 0.5}, **FIT).history
    return one, model.fit(x, y, sample_weight=np.linspace(0, 1, len(x)), **FIT).history


def files(model, folder):
    fitted(model)
    found = []
    for name in ("all.keras", "all.h5"):
        with pytest.warns() if name.endswith("h5") else open(folder / "x", "w"):
            model.save(folder / name)
        loaded = keras.models.load_model(folder / name)
        found += [loaded.predict(data()[0], verbose=0), loaded.evaluate(*data(), verbose=0)]
    model.save_weights(folder / "only.weights.h5")
    again = keras.models.clone_model(model)
    again.load_weights(folder / "only.weights.h5")
    copied = pickle.loads(pickle.dumps(model))
    described = keras.models.model_from_json(model.to_json())
    described.set_weights(model.get_weights())
    return found, [m.predict(data()[0], verbose=0) for m in (again, copied, described)]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return tuple(a[16 * i : 16 * i + 16] for a in data())


def pydataset(model, folder):
    return fitted(model, Batches(), batch_size=None)


def generator(model, folder):
    def batches():
        while True:
            yield from (Batches()[i] for i in range(3))

    return fitted(model, batches(), batch_size=None, steps_per_epoch=3)


def tf_dataset(model, folder):
    import tensorflow as tf

    return fitted(model, tf.data.Dataset.from_tensor_slices(data()).batch(16), batch_size=None)


def torch_loader(model, folder):
    torch = pytest.importorskip("torch")
    pairs = torch.utils.data.TensorDataset(*map(torch.from_numpy, data()))
    return fitted(model, torch.utils.data.DataLoader(pairs, batch_size=16), batch_size=None)


def partly_frozen(model, folder):
    body = [model.get_layer(name) for name in ("one", "two")]
    for layer in body:
        layer.trainable = False
    first = fitted(model)
    for layer in body:
        layer.trainable = True
    return first, fitted(model), [np.abs(w).sum() for w in model.get_layer("one").get_weights()]


IDIOMS = {
    idiom.__name__: idiom
    for idiom in (
        *(lists, built_in_callbacks, validation, weights_of_classes_and_samples, files),
        *(pydataset, generator, partly_frozen, torch_loader, guide, tensorboard, quantize),
    )
}


def seen(idiom, build, folder, gate=None):
    keras.utils.set_random_seed(1)
    model = build()
    if gate:
        model = keras_polar.apply(model, 0.5, gate=gate, schedule=LONG)
    folder.mkdir()
    keras.utils.set_random_seed(2)
    return idiom(model, folder)


def without_ours(value):
    if isinstance(value, dict):
        return {k: without_ours(v) for k, v in value.items() if not k.endswith(OURS)}
    if isinstance(value, (list, tuple)):
        return [without_ours(v) for v in value]
    return value


def equal(one, two, path=""):
    assert type(one) is type(two), path
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for name in one:
            equal(one[name], two[name], f"{path}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(two), path
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            equal(a, b, f"{path}/{i}")
    elif isinstance(one, str):
        assert one == two, path
    else:
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5, err_msg=path)


def compare(idiom, build, folder, gate):
    plain = seen(idiom, build, folder / "plain")
    gated = seen(idiom, build, folder / "gated", gate)
    equal(without_ours(plain), without_ours(gated))


@pytest.mark.parametrize(
    ("name", "gate"),
    quick(
        [(n, "static") for n in IDIOMS if n != "quantize"],
        [(n, gate) for n in IDIOMS for gate in ("static", "dynamic")],
    ),
)
def test_a_gated_model_gives_what_the_plain_one_gives(name, gate, tmp_path):
    compare(IDIOMS[name], network, tmp_path, gate)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="written with TensorFlow")
def test_a_dataset_of_tensorflow(tmp_path):
    compare(tf_dataset, network, tmp_path, "static")


def test_by_hand(tmp_path):
    compare(trained_by_hand, network, tmp_path, "static")


@pytest.mark.parametrize("name", quick(["lists"], ["lists", "validation", "files"]))
def test_losses_and_metrics_of_layers(name, tmp_path):
    compare(IDIOMS[name], lambda: network(Watched(name="watched")), tmp_path, "static")


@pytest.mark.parametrize("name", ["fit", "weights"])
def test_outputs_by_name(name, tmp_path):
    def idiom(model, folder):
        x, y = data()
        targets = {"a": y, "b": y[::-1].copy()}
        weights = {"a": 1.0, "b": 0.5} if name == "weights" else None
        model.compile(
            "sgd", loss={"a": LOSS, "b": LOSS}, loss_weights=weights, jit_compile=False,
            metrics={"a": ["accuracy"], "b": ["accuracy"]},
        )  # fmt: skip
        history = model.fit(x, targets, **FIT).history
        return history, model.evaluate(x, targets, verbose=0), model.predict(x, verbose=0)

    compare(idiom, lambda: network(outputs=("a", "b")), tmp_path, "static")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_in_other_precisions(policy, tmp_path):
    if (BACKEND, policy) == ("jax", "float64"):
        pytest.skip("JAX has float64 only where it is enabled before it starts")
    x, y = data()
    keras.config.set_dtype_policy(policy)
    try:
        found = [
            seen(lambda m, _: fitted(m, x, y), network, tmp_path / (gate or "plain"), gate)
            for gate in (None, "static")
        ]
    finally:
        keras.config.set_dtype_policy("float32")
    loose = {"rtol": 3e-2} if "16" in policy else {"rtol": 1e-6}
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, **loose)


def test_scikit_learn():
    x, y = data()

    def classify(X, y):
        gated = keras_polar.apply(network(), 0.5)
        gated.compile("adam", keras.losses.CategoricalCrossentropy(from_logits=True))
        return gated

    classifier = keras.wrappers.SKLearnClassifier(classify, fit_kwargs={"epochs": 3, "verbose": 0})
    classifier.fit(x, y)
    assert classifier.predict(x).shape == (len(x),)
    assert classifier.model_.settled
    keras_polar.convert(classifier.model_, verify=x)
