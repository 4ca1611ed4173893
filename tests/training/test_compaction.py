"""A settled model trains as its smaller sub-network, and nobody notices but the clock."""

import warnings

import keras
import numpy as np
import pytest
from helpers import close_half, quick, randomise, small_resnet
from keras import layers, ops

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.surgery.certificate import difference
from keras_polar.training.compaction import Compaction

BACKEND = keras.backend.backend()
optimizers = keras.optimizers
LONG = keras_polar.Schedule(steps=10_000)  # settles later than these tests run
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
OPTIMIZERS = {
    "sgd": lambda: optimizers.SGD(0.05),
    "momentum": lambda: optimizers.SGD(0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "schedule": lambda: optimizers.SGD(optimizers.schedules.CosineDecay(0.1, 20), momentum=0.9),
    "adam": lambda: optimizers.Adam(1e-3),
    "amsgrad": lambda: optimizers.Adam(1e-3, amsgrad=True),
    "adamw": lambda: optimizers.AdamW(1e-3, weight_decay=0.1),
    "nadam": lambda: optimizers.Nadam(1e-3),
    "adamax": lambda: optimizers.Adamax(1e-3),
    "rmsprop": lambda: optimizers.RMSprop(1e-3, momentum=0.5, centered=True),
    "adagrad": lambda: optimizers.Adagrad(1e-2),
    "adadelta": lambda: optimizers.Adadelta(1.0),
    "ftrl": lambda: optimizers.Ftrl(1e-2),
    "lion": lambda: optimizers.Lion(1e-4),
    "ema": lambda: optimizers.SGD(0.05, use_ema=True, ema_overwrite_frequency=4),
    "clipping": lambda: optimizers.Adam(1e-3, global_clipnorm=0.5),
    "accumulation": lambda: optimizers.Adam(1e-3, gradient_accumulation_steps=3),
    "loss_scale": lambda: optimizers.LossScaleOptimizer(optimizers.Adam(1e-3), 8.0),
}


def images(n=64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 8, 8, 1)).astype("float32"), rng.integers(0, 10, n)


def plain():
    """Two residual stages without BatchNorm, whose statistics would blow up round-off."""
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, padding="same", name="stem")(inputs)
    for i in range(2):
        y = layers.Conv2D(12, 3, padding="same", activation="tanh", name=f"block{i}_a")(x)
        x = x + layers.Conv2D(8, 3, padding="same", name=f"block{i}_b")(y)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


class Rms(layers.Layer):
    def call(self, x):
        return x / ops.sqrt(ops.mean(ops.square(x), -1, keepdims=True) + 1e-3)


def normalised():
    """A stream that norms read."""
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, padding="same", name="stem")(inputs)
    for i, norm in enumerate((layers.LayerNormalization(), Rms())):
        y = layers.Dense(12, activation="tanh", name=f"wide{i}")(norm(x))
        x = x + layers.Dense(8, name=f"narrow{i}")(y)
    x = layers.GlobalAveragePooling2D()(layers.RMSNormalization()(x))
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


def gated_model(optimizer, build=plain, compact=True, seed=0, **options):
    keras.utils.set_random_seed(seed)
    gated = keras_polar.apply(build(), 0.3, gate="static", compact=compact, **options)
    gated.compile(optimizer, LOSS, metrics=["accuracy"], jit_compile=BACKEND == "jax")
    return gated


def masks(gated):
    return [group.mask.tolist() for group in gated.groups]


def states(gated):
    """Everything that is trained or remembered, at the units that stay and those that do not."""
    variables = [*gated.trainable_variables, *gated.optimizer.variables]
    return [to_numpy(v) for v in variables]


QUICK = ("adamw",)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS]
)
def test_the_run_goes_on_as_it_would_have(name):
    if (BACKEND, name) == ("jax", "ema"):
        pytest.skip("on JAX, Keras fits no model twice with an average of its weights")
    x, y = images()
    runs = []
    for compact in (True, False):
        gated = gated_model(OPTIMIZERS[name](), compact=compact, schedule=LONG)
        gated.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
        close_half(gated)
        history = gated.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0).history
        runs.append((history, gated))
    (history, small), (wanted, whole) = runs
    np.testing.assert_allclose(history["loss"], wanted["loss"], rtol=2e-5)
    assert difference(whole, small, x) <= 1e-4
    assert len(small.optimizer.variables) == len(whole.optimizer.variables)
    twins = {id(a): b for a, b in zip(_all(whole), _all(small), strict=True)}
    for piece in Compaction(whole).pieces:  # weights and slots of the units that stay
        found, expected = (piece.cut(to_numpy(v)) for v in (twins[id(piece.whole)], piece.whole))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def _all(gated):
    return [*gated.variables, *gated.optimizer.variables]


@pytest.mark.parametrize("kind", quick(["heads"], ["heads", "grouped", "in time"]))
def test_narrower_keys_learn_as_they_would_have(kind):
    """Attention goes on dividing its scores by the width of the whole keys."""
    inputs = keras.Input((4, 6, 8) if kind == "in time" else (6, 8))
    attention = layers.GroupQueryAttention(8, 4, 2) if kind == "grouped" else None
    attention = attention or layers.MultiHeadAttention(2, 8, name="attention")
    if kind == "in time":
        frame = keras.Input((6, 8))
        attended = keras.Model(frame, attention(frame, frame))
        x = layers.TimeDistributed(attended)(inputs)
    else:
        x = attention(inputs, inputs)
    x = layers.Dense(3)(layers.Flatten()(x))
    rng = np.random.default_rng(0)
    data = rng.standard_normal((32, *inputs.shape[1:])).astype("float32"), rng.integers(0, 3, 32)
    model = randomise(keras.Model(inputs, x))
    runs = []
    for compact in (True, False):
        gated = keras_polar.apply(model, 0.2, gate="static", compact=compact, schedule=LONG)
        gated.compile(optimizers.Adam(1e-2), LOSS, jit_compile=False)
        assert any("key" in group.name for group in gated.groups)
        close_half(gated)
        options = {"batch_size": 8, "epochs": 3, "shuffle": False, "verbose": 0}
        runs.append((gated.fit(*data, **options).history["loss"], gated))
    (losses, small), (wanted, whole) = runs
    np.testing.assert_allclose(losses, wanted, rtol=2e-5)
    assert losses[-1] < losses[0]
    assert difference(whole, small, data[0]) <= 1e-4
    keras_polar.convert(small, verify=data[0])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="written with TensorFlow")
@pytest.mark.parametrize("build", [plain, small_resnet, normalised])
def test_loss_and_gradients_before_and_after_the_switch(build):
    import tensorflow as tf

    gated = gated_model("sgd", lambda: randomise(build()), schedule=LONG)
    x, y = images()
    gated.train_on_batch(x, y)
    close_half(gated)
    compaction = Compaction(gated)

    def loss_and_gradients(model, variables):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        return float(loss), tape.gradient(loss, variables)

    pieces = [p for p in compaction.pieces if p.whole.trainable]
    before, wanted = loss_and_gradients(gated, [p.whole.value for p in pieces])
    compaction.enter()
    after, found = loss_and_gradients(compaction.model, [p.part.value for p in pieces])
    compaction.leave()
    assert after == pytest.approx(before, rel=1e-6)
    for piece, a, b in zip(pieces, wanted, found, strict=True):
        np.testing.assert_allclose(piece.cut(a.numpy()), b.numpy(), rtol=1e-4, atol=1e-6)


class Watch(keras.callbacks.Callback):
    """A user's callback that looks at the model at the end of epochs only."""

    async_safe = True

    def __init__(self, gated, x):
        super().__init__()
        self.gated, self.x, self.compacted, self.differences = gated, x, [], []

    def on_train_batch_end(self, batch, logs=None):
        self.compacted.append(self.gated.sub_network is not None)

    def on_epoch_end(self, epoch, logs=None):
        assert self.model.sub_network is None
        with warnings.catch_warnings():  # a look ahead, on purpose
            warnings.filterwarnings("ignore", ".*not settled")
            small = keras_polar.convert(self.model)
        self.differences.append(difference(self.model, small, self.x))
        assert logs.keys() >= {"loss", "accuracy", "val_loss", "sparsity", "polarization", "seen"}


class Count(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs["seen"] = epoch


def test_one_fit_without_a_seam(tmp_path):
    x, y = images(256)
    late = keras_polar.Schedule(warmup=0.2, ramp=0.4, settle=0.4)
    gated = gated_model(optimizers.Adam(1e-2), small_resnet, schedule=late)
    watch = Watch(gated, x[:16])
    callbacks = [
        Count(),
        watch,
        keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=10.0, factor=0.5),
        keras.callbacks.ModelCheckpoint(tmp_path / "epoch{epoch}.keras"),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
    ]
    history = gated.fit(
        x, y, epochs=8, batch_size=32, validation_split=0.25, verbose=0, callbacks=callbacks
    ).history
    assert watch.compacted == [False] * 19 + [True] * 29  # 40 % of 48 steps
    assert max(watch.differences) <= 1e-4
    assert {len(v) for v in history.values()} == {8}
    assert float(to_numpy(gated.optimizer.learning_rate)) == pytest.approx(
        1e-2 / 2**6  # no better than the last in 7 epochs, but for the first settled one
    )
    assert int(to_numpy(gated.optimizer.iterations)) == 48
    assert history["sparsity"][-1] == pytest.approx(gated.sparsity, abs=1e-5)
    assert history["polarization"][-1] == 1
    assert not {"val_sparsity", "val_polarization"} & set(history)
    small = keras_polar.convert(gated, verify=x[:16])
    small.compile(loss=LOSS)
    assert small.evaluate(x[192:], y[192:], verbose=0) == pytest.approx(
        history["val_loss"][-1], rel=1e-5
    )
    loaded = keras.models.load_model(tmp_path / "epoch8.keras")
    assert difference(loaded, gated, x[:16]) == 0
    for a, b in zip(states(loaded), states(gated), strict=True):
        np.testing.assert_array_equal(a, b)


def test_checkpoints_in_the_middle_of_an_epoch_are_up_to_date(tmp_path):
    x, y = images(128)
    gated = gated_model("adam")
    close_half(gated)
    save = keras.callbacks.ModelCheckpoint(tmp_path / "step.keras", save_freq=3)
    gated.fit(x, y, epochs=1, batch_size=32, shuffle=False, verbose=0, callbacks=[save])
    short = gated_model("adam")
    close_half(short)
    short.fit(x[:96], y[:96], epochs=1, batch_size=32, shuffle=False, verbose=0)
    loaded = keras.models.load_model(tmp_path / "step.keras")
    assert difference(loaded, short, x) <= 1e-6


class Crash(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 5:
            raise KeyboardInterrupt


def test_an_interrupted_run_is_up_to_date_and_resumes_small(tmp_path):
    x, y = images(128)
    options = {"epochs": 8, "batch_size": 32, "shuffle": False, "verbose": 0}
    straight = gated_model("adam")
    straight.fit(x, y, **options)
    gated = gated_model("adam")
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        gated.fit(x, y, callbacks=[backup, Crash()], **options)
    assert gated.sub_network is None
    assert gated.settled
    again = gated_model("adam", seed=1)
    watch = Watch(again, x[:8])
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    again.fit(x, y, callbacks=[backup, Count(), watch], validation_data=(x, y), **options)
    assert all(watch.compacted)
    assert masks(again) == masks(straight)
    assert difference(straight, again, x) <= 1e-4


def test_what_cannot_be_compacted_goes_on_whole_and_says_so():
    class Mine(optimizers.SGD):
        def get_config(self):
            raise NotImplementedError("no config")

    x, y = images()
    gated = gated_model(Mine(0.01))
    close_half(gated)
    with pytest.warns(UserWarning, match=r"whole network.*Mine.*no config"):
        gated.fit(x, y, epochs=2, verbose=0)


def test_masks_that_are_set_by_hand_in_the_middle_count():
    class Close(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                close_half(self.model, seed=5)

    x, y = images()
    gated = gated_model("sgd")
    close_half(gated)
    gated.fit(x, y, epochs=4, verbose=0, callbacks=[Close()])
    keras_polar.convert(gated, verify=x)
    other = gated_model("sgd")
    close_half(other, seed=5)
    assert masks(gated) == masks(other)


def test_constants_are_those_of_the_masks_of_now():
    def build():
        inputs = keras.Input((8, 8, 1))
        x = layers.Conv2D(8, 3, activation="tanh", name="conv")(inputs)
        x = layers.GlobalAveragePooling2D()(x * np.linspace(-3, 3, 8, dtype="float32"))
        return keras.Model(inputs, layers.Dense(10)(x))

    class Other(keras.callbacks.Callback):
        async_safe = True

        def on_train_batch_end(self, batch, logs=None):
            self.former = self._model.sub_network  # kept, as its compiled steps would be

        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                self.model.groups[0].set_mask(np.arange(8) < 4)

    x, y = images()
    runs = [gated_model("sgd", build, compact) for compact in (True, False)]
    for gated in runs:
        gated.groups[0].set_mask(np.arange(8) >= 4)
        gated.fit(x, y, epochs=2, shuffle=False, verbose=0, callbacks=[Other()])
    assert difference(*runs, x) <= 1e-5


@pytest.mark.parametrize("granularity", ["blocks", ("channels", "blocks")])
def test_closed_branches_do_not_train(granularity):
    x, y = images()
    gated = gated_model("adam", small_resnet, granularity=granularity)
    blocks = [g for g in gated.groups if g.is_block]
    blocks[0].set_mask(np.array([False]))
    gated.settle()
    kernel = next(v for v in gated.variables if v.path.endswith("block0_a/kernel"))
    before = to_numpy(kernel)
    gated.fit(x, y, epochs=2, verbose=0)
    np.testing.assert_array_equal(to_numpy(kernel), before)
    keras_polar.convert(gated, verify=x)
