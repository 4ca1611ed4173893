"""Gates under every way of training that Keras has: they settle in time and meet the target."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.surgery.certificate import difference

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
SAMPLES, BATCH, EPOCHS = 320, 32, 4
STEPS = SAMPLES // BATCH
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="written with TensorFlow"
)


def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((SAMPLES, 6)).astype("float32")
    return x, (x[:, 0] > 0).astype("int64") + (x[:, 1] > 1)


def network():
    inputs = x = keras.Input((6,))
    for i in range(2):
        x = layers.Dense(16, activation="tanh", name=f"hidden{i}")(x)
    return keras.Model(inputs, layers.Dense(3, name="logits")(x), name="network")


class Seen(keras.callbacks.Callback):
    """After how many steps of the model's own count it was found settled."""

    def __init__(self):
        super().__init__()
        self.open, self.steps = 0, []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(int(to_numpy(self.model.consensus.step)))
        if not self.model.settled:
            self.open = self.steps[-1]


def halfway(steps=None):
    """A schedule that settles after half of the run."""
    return keras_polar.Schedule(settle=0.5, steps=steps)


def trained(*args, network=network, optimizer=None, schedule=None, compiled=(), **options):
    gated = keras_polar.apply(network(), 0.5, schedule=schedule or halfway())
    options = {"epochs": EPOCHS, "verbose": 0, **options}
    gated.compile(
        optimizer or keras.optimizers.Adam(0.01), LOSS, **{"jit_compile": False, **dict(compiled)}
    )
    seen = Seen()
    history = gated.fit(*args, callbacks=[seen], **options).history
    return gated, seen, history


def check(gated, seen=None, *, open_steps=EPOCHS * STEPS // 2):
    """Settled in time and to the target; the small model computes the same."""
    assert gated.settled
    assert abs(gated.sparsity - 0.5) <= 0.04  # a unit of this network is up to 4 %
    if seen is not None:
        assert seen.open == open_steps
    assert all(np.isfinite(to_numpy(w)).all() for w in gated.weights)
    keras_polar.convert(gated, verify=data()[0][:32])


@pytest.mark.parametrize(
    "policy",
    [
        "mixed_float16",
        pytest.param("mixed_bfloat16", marks=pytest.mark.slow),
        pytest.param("float64", marks=pytest.mark.slow),
    ],
)
def test_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy("float32")
    gated, seen, history = trained(*data(), network=lambda: model)
    check(gated, seen)
    assert history["loss"][-1] < history["loss"][0]
    is_scaled = isinstance(gated.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (policy == "mixed_float16")
    hidden = keras_polar.convert(gated).get_layer("hidden0")
    assert hidden.compute_dtype == model.get_layer("hidden0").compute_dtype


@pytest.mark.slow
def test_xla():
    check(*trained(*data(), compiled={"jit_compile": True})[:2])


@pytest.mark.slow
def test_accumulated_clipped_and_averaged_gradients():
    optimizer = keras.optimizers.Adam(
        0.02, gradient_accumulation_steps=2, global_clipnorm=1.0, use_ema=True, ema_momentum=0.8
    )
    gated, seen, history = trained(*data(), optimizer=optimizer)
    check(gated, seen)
    assert history["loss"][-1] < history["loss"][0]


@on_tensorflow
@pytest.mark.parametrize(("per_execution", "open_steps"), [(1, 26), (4, 28), (7, 27)])
def test_settles_within_an_epoch_at_the_next_execution(per_execution, open_steps):
    gated, seen, _ = trained(
        *data(),
        schedule=keras_polar.Schedule(settle=0.65),  # 26 of 40 steps
        compiled={"steps_per_execution": per_execution},
    )
    assert seen.steps[-1] == EPOCHS * STEPS
    check(gated, seen, open_steps=open_steps)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return STEPS

    def __getitem__(self, i):
        x, y = data()
        return x[BATCH * i : BATCH * (i + 1)], y[BATCH * i : BATCH * (i + 1)]


def generator(epochs):
    for _ in range(epochs):
        yield from (Batches()[i] for i in range(STEPS))


@pytest.mark.slow
def test_kinds_of_data():
    check(*trained(Batches())[:2])
    check(*trained(generator(EPOCHS), steps_per_epoch=STEPS, shuffle=False)[:2])


@pytest.mark.slow
def test_weighted_classes_and_samples():
    x, y = data()
    check(*trained(x, y, class_weight={0: 1.0, 1: 2.0, 2: 0.5})[:2])
    check(*trained(x, y, sample_weight=np.linspace(0, 1, SAMPLES))[:2])


def test_validation_of_the_epoch_in_which_it_settles_sees_the_settled_network():
    x, y = data()
    found = []

    class Validated(keras.callbacks.Callback):
        def on_test_end(self, logs=None):
            found.append(self.model.settled)

    gated = keras_polar.apply(network(), 0.5, schedule=halfway())
    gated.compile("sgd", LOSS, jit_compile=False)
    gated.fit(x, y, epochs=4, validation_data=(x, y), verbose=0, callbacks=[Validated()])
    assert found == [False, True, True, True]


def test_a_second_fit_trains_the_settled_network():
    x, y = data()
    gated, seen, _ = trained(x, y, epochs=2)
    check(gated, seen, open_steps=STEPS)
    masks = [g.mask for g in gated.groups]
    again = Seen()
    history = gated.fit(x, y, epochs=2, verbose=0, callbacks=[again]).history
    check(gated, again, open_steps=0)
    assert again.steps[-1] == 4 * STEPS
    assert history["sparsity"] == pytest.approx([gated.sparsity] * 2, abs=1e-6)
    assert all((g.mask == m).all() for g, m in zip(gated.groups, masks, strict=True))


def test_two_fits_can_share_one_schedule():
    x, y = data()
    gated, seen, _ = trained(x, y, epochs=1, schedule=halfway(32))
    assert not gated.settled
    assert seen.open == 10  # of 16
    again = Seen()
    gated.fit(x, y, epochs=2, verbose=0, callbacks=[again])
    check(gated, again, open_steps=16)


def test_initial_epoch_of_a_fresh_model_shortens_the_run():
    gated, seen, _ = trained(*data(), epochs=6, initial_epoch=2)
    check(gated, seen, open_steps=2 * STEPS)


def test_initial_epoch_of_a_loaded_model_goes_on_with_the_schedule(tmp_path):
    x, y = data()
    save = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    gated = keras_polar.apply(network(), 0.5, schedule=halfway())
    gated.compile("sgd", LOSS, jit_compile=False)
    gated.fit(x, y, epochs=4, verbose=0, callbacks=[save])
    loaded = keras.models.load_model(tmp_path / "1.keras")
    seen = Seen()
    loaded.fit(x, y, epochs=4, initial_epoch=1, verbose=0, callbacks=[seen])
    check(loaded, seen, open_steps=2 * STEPS)


@on_tensorflow
@pytest.mark.slow
# Keras says so of every dataset whose length it does not know.
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_data_of_unknown_length_resumed_before_it_settles(tmp_path):
    import tensorflow as tf

    known = tf.data.Dataset.from_tensor_slices(data()).batch(BATCH)
    unknown = known.filter(lambda x, y: True)
    save = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    gated = keras_polar.apply(network(), 0.5, schedule=keras_polar.Schedule(settle=0.6))
    gated.compile("sgd", LOSS, jit_compile=False)
    seen = Seen()
    gated.fit(unknown, epochs=4, shuffle=False, verbose=0, callbacks=[save, seen])
    check(gated, seen, open_steps=26)  # TensorFlow counts a step without data in every epoch
    loaded = keras.models.load_model(tmp_path / "2.keras")
    seen = Seen()
    loaded.fit(unknown, epochs=4, initial_epoch=2, shuffle=False, verbose=0, callbacks=[seen])
    check(loaded, seen, open_steps=26)


def test_train_on_batch_follows_a_schedule_of_known_length():
    x, y = data()
    gated = keras_polar.apply(network(), 0.5, schedule=halfway(2 * STEPS))
    gated.compile(keras.optimizers.Adam(0.01), LOSS, jit_compile=False)
    settled = []
    for x, y in generator(2):
        gated.train_on_batch(x, y)
        settled.append(gated.settled)
    assert settled == [False] * STEPS + [True] * STEPS
    check(gated)


@keras.saving.register_keras_serializable("tests")
class TwiceTheLoss(keras_polar.GatedModel):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


def test_a_training_of_ones_own_is_a_subclass_of_the_gated_model(tmp_path):
    x, y = data()
    plain = keras_polar.apply(
        network(), 0.5, schedule=keras_polar.Schedule(warmup=1, ramp=1, settle=1)
    )
    own = TwiceTheLoss(plain.input, plain.output, name="own")
    plain.compile("sgd", LOSS, jit_compile=False)
    own.compile("sgd", LOSS, jit_compile=False)
    once, twice = (m.evaluate(x, y, verbose=0, return_dict=True)["loss"] for m in (plain, own))
    assert twice == pytest.approx(2 * once, rel=1e-5)
    own.fit(x, y, epochs=2, verbose=0)
    check(own)
    own.save(tmp_path / "own.keras")
    loaded = keras.models.load_model(tmp_path / "own.keras")
    assert type(loaded) is TwiceTheLoss
    assert difference(own, loaded, x[:8]) == 0


def test_a_training_that_would_get_lost_is_told():
    class Own(keras.Model):
        def train_step(self, *args):
            return super().train_step(*args)

    model = network()
    with pytest.warns(UserWarning, match=r"train_step of Own 'own'.*keras_polar\.GatedModel"):
        keras_polar.apply(Own(model.input, model.output, name="own"), 0.5)


class Spoil(keras.callbacks.Callback):
    """Puts NaN into a variable in the second step of the third epoch."""

    def __init__(self, layer, name):
        super().__init__()
        self.layer, self.name = layer, name

    def on_epoch_begin(self, epoch, logs=None):
        self.is_due = epoch == 2

    def on_train_batch_end(self, batch, logs=None):
        if self.is_due and batch == 1:
            variable = getattr(self.model.get_layer(self.layer), self.name)
            variable.assign(np.full(variable.shape, np.nan))


@pytest.mark.parametrize(
    ("layer", "name", "settle", "message"),
    [
        ("hidden0", "kernel", 0.1, r"in epoch 3 \(steps 21 to 30\): .* hidden0/kernel"),
        ("hidden1_gate", "bias", 0.6, "before the gates were settled: .* hidden0/kernel"),
        ("hidden0_gate", "scores", 0.9, "in epoch 3.*: 1 of .* hidden0_gate/scores"),
    ],
)
def test_values_that_are_not_finite_end_the_run_and_leave_the_last_good_state(
    layer, name, settle, message, tmp_path
):
    schedule = keras_polar.Schedule(warmup=0, ramp=0.1, settle=settle)
    gated = keras_polar.apply(network(), 0.5, gate="static", schedule=schedule)
    gated.compile("sgd", LOSS, jit_compile=False)
    callbacks = [
        Spoil(layer, name),
        keras.callbacks.ModelCheckpoint(tmp_path / "last.weights.h5", save_weights_only=True),
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
    ]
    with pytest.raises(FloatingPointError, match=f"'network' broke {message}"):
        gated.fit(*data(), epochs=4, verbose=0, callbacks=callbacks)
    for file in ("last.weights.h5", "backup/latest.weights.h5"):
        gated.load_weights(tmp_path / file)
        assert int(to_numpy(gated.consensus.step)) == 20
        gated.require_finite("in the file")
