"""Around Keras' own loop in `fit`: what callbacks assign, read and monitor is the one network."""

import keras
import numpy as np
import pytest
from helpers import quick, small_resnet
from keras import layers, ops

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.training.loop import sees_batches

BACKEND = keras.backend.backend()
LATE = keras_polar.Schedule(warmup=0.2, ramp=0.4, settle=0.4)  # not in the first epoch
JIT = BACKEND == "jax"  # there it is quicker, and what people have
HOOKS = {
    "epoch begins": ["on_epoch_begin"],
    "training": ["on_train_begin", "on_epoch_end", "on_train_end"],
    "batches": ["on_train_batch_begin", "on_train_batch_end"],
    "validation": ["on_test_begin", "on_test_batch_begin", "on_test_batch_end", "on_test_end"],
}


def data(n=64):
    x = np.random.default_rng(0).normal(size=(n, 8)).astype("float32")
    return x, x[:, :3].copy()


class Penalty(layers.Layer):
    def build(self, shape):
        self.beta = self.add_weight((), "zeros", trainable=False, name="beta")

    def call(self, x):
        self.add_loss(1.0 * self.beta)
        return x


def network(*steps, width=32):
    inputs = keras.Input((8,))
    x = layers.Dense(width, activation="tanh", name="before")(inputs)
    for step in steps:
        x = step(x)
    x = layers.Dense(width, activation="tanh", name="after")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def gated_of(build, compact=True, **options):
    keras.utils.set_random_seed(0)
    gated = keras_polar.apply(
        build(), 0.5, compact=compact, gate="static", schedule=LATE, **options
    )
    gated.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=JIT)
    return gated


def both(build, callback=lambda gated: None, **options):
    """The histories and models of two equal runs, with compaction and without."""
    x, y = data()
    runs = []
    for compact in (True, False):
        gated = gated_of(build, compact)
        extra = callback(gated)
        history = gated.fit(
            *(x, y),
            validation_data=(x, y),
            callbacks=[extra] if extra else None,
            **{"epochs": 6, "batch_size": 16, "shuffle": False, "verbose": 0, **options},
        ).history
        runs.append((history, gated, extra))
    return runs


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("what", ["not compiled", "lengths", "type"])
def test_mistakes_before_training_are_told_by_keras(what):
    x, y = data(10)
    model = network()
    told = []
    for each in (model, keras_polar.apply(model, 0.3)):
        if what != "not compiled":
            each.compile("adam", "mse")
        with pytest.raises(ValueError, match=r"compile\(\)|cardinality|Unrecognized") as error:
            each.fit(["a"] * 10 if what == "type" else x, y[:9] if what == "lengths" else y)
        told.append(str(error.value))
    assert told[0] == told[1]


class Meddle(keras.callbacks.Callback):
    """Reads the model and assigns to it, whenever one of the hooks is called."""

    def __init__(self, gated, hooks):
        super().__init__()
        self.gated, self.seen, self.count = gated, [], 0
        for hook in hooks:
            setattr(self, hook, self.meddle)

    def meddle(self, *args, logs=None):
        model = self.model if BACKEND == "jax" else self.gated  # by which its state is there
        self.count += 1
        beta, kernel = model.get_layer("penalty").beta, model.get_layer("head").kernel
        mask = next(g.mask for g in model.groups if g.name == "after")
        self.seen.append(to_numpy(beta) + np.abs(to_numpy(kernel)[mask]).sum())
        beta.assign(self.count)
        kernel.assign(0.9 * to_numpy(kernel))


@pytest.mark.parametrize("when", quick(["epoch begins", "batches"], HOOKS))
def test_what_a_callback_assigns_acts_and_what_it_reads_is_of_now(when):
    (one, gated, meddled), (two, whole, other) = both(
        lambda: network(Penalty(name="penalty")), lambda gated: Meddle(gated, HOOKS[when])
    )
    same(one, two)
    np.testing.assert_allclose(meddled.seen, other.seen, rtol=1e-4)
    last = (m.get_layer("penalty").beta for m in (gated, whole))
    assert [float(to_numpy(v)) for v in last] == [meddled.count] * 2
    if when == "epoch begins":
        np.testing.assert_allclose(np.floor(one["loss"]), range(1, 7))


def test_callbacks_that_see_no_batches_leave_the_smaller_network_to_train():
    callbacks, hook = keras.callbacks, lambda batch, logs=None: None

    class OfEpochs(callbacks.TensorBoard):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)

    safe = callbacks.LambdaCallback(on_train_batch_end=hook)
    safe.async_safe = True
    for callback in (
        *(callbacks.EarlyStopping(), callbacks.TerminateOnNaN(), callbacks.ProgbarLogger()),
        *(callbacks.LambdaCallback(on_epoch_end=hook), OfEpochs(), safe),
    ):
        assert not sees_batches(callback)
    assert sees_batches(callbacks.LambdaCallback(on_train_batch_end=hook))
    assert sees_batches(Meddle(None, ["on_batch_begin"]))


class Stateful(layers.Layer):
    """Everything that a layer may remember: a counter, an average, random numbers, a metric."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = keras.metrics.Mean(name="seen")
        self.random = keras.random.SeedGenerator(3)
        self.supports_jit = JIT

    def build(self, shape):
        self.count = self.add_weight((), "zeros", trainable=False, name="count")
        self.average = self.add_weight((shape[-1],), "zeros", trainable=False, name="average")

    def call(self, x, training=False):
        if training:
            self.count.assign(self.count + 1)
            self.average.assign(0.9 * self.average + 0.1 * ops.mean(x, axis=0))
        if BACKEND != "jax":  # there Keras takes the variables of metrics away meanwhile
            self.seen.update_state(ops.max(ops.abs(x)))
        return x + keras.random.uniform((1,), seed=self.random)


def in_stateful(x):
    x = layers.BatchNormalization(name="normed", momentum=0.8)(x)
    return layers.Dense(5, name="narrow")(x)


def test_states_of_layers_go_through_the_switch_and_back():
    def build():
        return network(in_stateful, Stateful(name="state"))

    (one, gated, _), (two, whole, _) = both(build)
    same(one, two)
    if BACKEND != "jax":
        assert all(v > 0.1 for v in one["seen"] + one["val_seen"])
    for model in (gated, whole):
        assert float(to_numpy(model.get_layer("state").count)) == 24
    mask = next(g.mask for g in gated.groups if g.name == "before")
    for layer, name in (("state", "average"), ("normed", "moving_mean"), ("state", "random.state")):
        states = []
        for model in (gated, whole):
            state = model.get_layer(layer)
            for part in name.split("."):
                state = getattr(state, part)
            states.append(to_numpy(state)[mask if layer == "normed" else slice(None)])
        np.testing.assert_allclose(*states, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras on JAX trains no stateful recurrent layers")
@pytest.mark.skipif(BACKEND == "torch", reason="Keras on PyTorch overwrites what gradients need")
def test_what_a_recurrent_layer_carries_goes_through_the_switch_and_back():
    def build():
        inputs = keras.Input((8,), batch_size=16)
        x = layers.Reshape((4, 2))(layers.Dense(24, name="wide")(layers.Dense(8)(inputs))[:, :8])
        x = layers.LSTM(4, stateful=True, name="carries")(x)
        x = layers.Dense(24, activation="tanh", name="before")(x)
        return keras.Model(inputs, layers.Dense(3)(x))

    (one, gated, _), (two, whole, _) = both(build)
    same(one, two)
    for a, b in zip(*(m.get_layer("carries").states for m in (gated, whole)), strict=True):
        assert np.abs(to_numpy(a)).max() > 1e-3
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-3, atol=1e-5)


class Adds(layers.Layer):
    loss = None

    def call(self, x):
        if self.loss is not None:
            self.add_loss(self.loss)
        return x


def test_no_loss_is_taken_away_by_a_layer_that_remembers_its_id():
    """Traces follow one another, and so the ids of their losses may be the same."""
    keras.utils.set_random_seed(0)
    gated = keras_polar.apply(network(Adds(name="early"), Adds(name="late")), 0.5, schedule=LATE)
    early, late = (gated.get_layer(name) for name in ("early", "late"))
    one, two, three = (ops.convert_to_tensor(float(i)) for i in (1, 2, 3))
    variables = [[v.value for v in gated.trainable_variables]]
    variables += [[v.value for v in gated.non_trainable_variables]]
    for early.loss, late.loss in ((one, two), (two, three)):
        _, _, losses = gated.stateless_call(*variables, data()[0], return_losses=True)
        assert [float(to_numpy(x)) for x in losses] == [float(early.loss), float(late.loss)]


def test_a_step_of_ones_own_that_leaves_the_losses_out_is_told():
    gated = keras_polar.apply(network(), 0.5, schedule=LATE)
    variables = [[v.value for v in gated.trainable_variables]]
    variables += [[v.value for v in gated.non_trainable_variables]]
    with pytest.warns(UserWarning, match="expected return_losses=True"):
        gated.stateless_call(*variables, data()[0], training=True)
    *_, losses = gated.stateless_call(*variables, data()[0], training=True, return_losses=True)
    assert len(losses) == 1
    gated.stateless_call(*variables, data()[0])


L1, L2 = keras.regularizers.L1(0.01), keras.regularizers.L2(0.05)


def penalised():
    options = {"kernel_regularizer": L2, "bias_regularizer": L1, "bias_initializer": "ones"}
    return network(
        layers.Dense(24, activation="relu", activity_regularizer=L2, **options),
        layers.ActivityRegularization(l1=0.01),
        layers.BatchNormalization(gamma_regularizer=L2, beta_regularizer=L1),
    )


def penalised_twice():
    """A layer that is called twice, penalised and held."""
    options = {"kernel_constraint": keras.constraints.MaxNorm(0.4), "kernel_regularizer": L2}
    shared = layers.Dense(16, activity_regularizer=L1, name="shared", **options)
    inputs = keras.Input((8,))
    x = layers.Add()([shared(layers.Dense(12)(inputs)), shared(layers.Dense(12)(inputs))])
    return keras.Model(inputs, layers.Dense(3)(x))


def penalised_sequence():
    inputs = keras.Input((8,))
    x = layers.Reshape((4, 2))(inputs)
    x = layers.LSTM(12, kernel_regularizer=L2, recurrent_regularizer=L1, return_sequences=True)(x)
    x = layers.Conv1D(16, 3, kernel_regularizer=L2, activity_regularizer=L1)(x)
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(3, kernel_regularizer=L1)(x))


def penalised_branches():
    inputs = keras.Input((8,))
    x = layers.Dense(8, name="stem")(inputs)
    for i in range(3):
        y = layers.Dense(16, activation="relu", kernel_regularizer=L2, name=f"a{i}")(x)
        y = layers.ReLU(activity_regularizer=L1)(y)
        x = layers.Add()([x, layers.Dense(8, kernel_regularizer=L1, name=f"b{i}")(y)])
    return keras.Model(inputs, layers.Dense(3)(x))


BUILDS = [penalised, penalised_twice, penalised_sequence, penalised_branches]
ALL = [(build, gate) for build in BUILDS for gate in ("static", "dynamic")]


@pytest.mark.parametrize(
    ("build", "gate"), quick([(penalised, "dynamic"), (penalised_branches, "static")], ALL)
)
def test_penalties_count_what_is_open(build, gate, tmp_path):
    """Before the switch, after it, in the small model and in one that is loaded."""
    x, y = data()
    options = {"granularity": ("channels", "blocks")} if "branches" in build.__name__ else {}
    keras.utils.set_random_seed(0)
    gated = keras_polar.apply(build(), 0.5, gate=gate, schedule=LATE, **options)
    gated.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=JIT)

    def losses(model):
        if BACKEND != "jax":
            return model.evaluate(x, y, batch_size=16, verbose=0)
        # There layers of a plain model, such as the small one, remember the ids of losses of
        # earlier traces: by chance Keras leaves one out.
        error = ops.mean(keras.losses.mean_squared_error(y, model(x)))
        return float(error + sum(model.losses))

    class Compare(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            gate = gated.groups[epoch % len(gated.groups)]._gate
            if not gated.settled:  # something that the consensus closes by now
                gate.open_rates.assign(np.arange(gate.units) % 2)
            elif BACKEND != "jax":
                assert losses(gated) == pytest.approx(logs["val_loss"], rel=1e-5)
            if epoch not in (0, 3):
                return
            small = keras_polar.convert(gated)
            small.compile(loss="mse")
            assert losses(gated) == pytest.approx(losses(small), rel=1e-5)

    with pytest.warns(UserWarning, match="not settled"):  # a look ahead
        gated.fit(
            *(x, y), validation_data=(x, y), batch_size=16, epochs=4, verbose=0,
            callbacks=[Compare()],
        )  # fmt: skip
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    small = keras_polar.convert(loaded)
    small.save(tmp_path / "small.keras")
    assert "keras_polar" not in str(small.get_config())
    small.compile(loss="mse")
    assert losses(gated) == pytest.approx(losses(loaded), rel=1e-6)
    assert losses(gated) == pytest.approx(losses(small), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_regularizer": L2, "activity_regularizer": L1},
        pytest.param(
            {"kernel_constraint": keras.constraints.MaxNorm(0.5)},
            marks=pytest.mark.skipif(BACKEND == "jax", reason="an optimizer sees no gates there"),
        ),
    ],
)
def test_penalties_and_constraints_train_the_network_that_is_open(options):
    (one, gated, _), (two, whole, _) = both(lambda: network(layers.Dense(24, **options)))
    same(one, two)
    x, _ = data()
    np.testing.assert_allclose(
        gated.predict(x, verbose=0), whole.predict(x, verbose=0), rtol=1e-3, atol=1e-5
    )


def accuracy_model():
    gated = keras_polar.apply(network(), 0.5, schedule=LATE)
    gated.compile("adam", "mse", metrics=["mae"], jit_compile=JIT)
    return gated


def test_metrics_are_the_users_and_the_gates_are_in_the_logs(tmp_path, capsys):
    x, y = data()
    gated = accuracy_model()
    history = gated.fit(
        *(x, y), validation_data=(x, y), epochs=3, verbose=1,
        callbacks=[keras.callbacks.CSVLogger(tmp_path / "log.csv")],
    ).history  # fmt: skip
    names = {"loss", "mae", "val_loss", "val_mae", "sparsity", "polarization"}
    assert set(history) == names
    assert history["sparsity"][-1] == pytest.approx(gated.sparsity, abs=1e-6)
    assert history["sparsity"][0] < 0.5
    shown = capsys.readouterr().out
    assert shown.count("sparsity: ") > 3  # batch by batch
    assert {*(tmp_path / "log.csv").read_text().splitlines()[0].split(",")} == {"epoch", *names}
    assert len(gated.evaluate(x, y, verbose=0)) == 2
    assert set(gated.evaluate(x, y, verbose=0, return_dict=True)) == {"loss", "mae"}
    assert len(gated.test_on_batch(x, y)) == 2
    assert [m.name for m in gated.metrics] == ["loss", "compile_metrics"]


def test_train_on_batch_returns_what_was_compiled():
    x, y = data()
    gated = keras_polar.apply(network(), 0.5, schedule=keras_polar.Schedule(steps=8))
    gated.compile("adam", "mse", metrics=["mae"], jit_compile=JIT)
    gated.fit(x, y, epochs=1, batch_size=16, verbose=0)
    for _ in range(4):
        assert len(gated.train_on_batch(x[:16], y[:16])) == 2
    assert gated.settled


# --- which epoch is kept ---------------------------------------------------------------------


def growing(gated):
    """A callback by whose logs the first epoch is the best of all."""
    logs = {"on_epoch_end": lambda epoch, logs: logs.update(score=float(epoch))}
    return keras.callbacks.LambdaCallback(**logs)


def run(*callbacks, epochs=10, gated=None):
    gated = gated or gated_of(network)
    x, y = data()
    history = gated.fit(
        x, y, epochs=epochs, batch_size=16, verbose=0, callbacks=[growing(gated), *callbacks]
    )
    return gated, len(history.epoch)


@pytest.mark.parametrize("first", [0, 6])
def test_early_stopping_chooses_among_settled_epochs(first):
    stop = keras.callbacks.EarlyStopping(
        "score", mode="min", patience=2, restore_best_weights=True, start_from_epoch=first
    )
    gated, epochs = run(stop)
    assert epochs == max(4, first + 1) + 2  # settled within the fourth epoch, 16 of 40 steps
    assert stop.best_epoch == epochs - 3
    assert stop.start_from_epoch == first
    assert gated.settled
    assert abs(gated.sparsity - 0.5) < 0.02


@pytest.mark.parametrize("threshold", [None, 4.5])
def test_the_best_checkpoint_is_of_a_settled_epoch(threshold, tmp_path):
    save = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.keras", "score", mode="min", save_best_only=True,
        initial_value_threshold=threshold,
    )  # fmt: skip
    run(save)
    best = keras.models.load_model(tmp_path / "best.keras")
    assert best.settled
    assert int(to_numpy(best.consensus.step)) == 16
    keras_polar.convert(best, verify=True)


def test_a_plateau_is_one_of_settled_epochs():
    slow = keras.callbacks.ReduceLROnPlateau("score", mode="min", patience=4, factor=0.5)
    gated, _ = run(slow, epochs=8)
    rate = float(to_numpy(gated.optimizer.learning_rate))
    assert rate == pytest.approx(0.005)  # once after the best of 3 to 7, not before


class PutBack(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            self.weights = self.model.get_weights()

    def on_train_end(self, logs=None):
        self.model.set_weights(self.weights)


def test_weights_of_before_that_a_callback_puts_back_are_settled_and_it_is_said():
    with pytest.warns(UserWarning, match="an epoch before the gates settled, which a callback"):
        gated, _ = run(PutBack())
    assert gated.settled
    assert abs(gated.sparsity - 0.5) < 0.02


@pytest.mark.slow
# KerasTuner's, and Keras' about optimizers of models that it loads.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Skipping variable loading")
def test_the_best_model_of_a_tuner_is_settled(tmp_path):
    keras_tuner = pytest.importorskip("keras_tuner")

    def build(choices):
        choices.Choice("width", [16, 32])
        return gated_of(network)

    tuner = keras_tuner.RandomSearch(
        build, keras_tuner.Objective("score", "min"), max_trials=2, directory=tmp_path
    )
    x, y = data()
    tuner.search(x, y, epochs=8, batch_size=16, verbose=0, callbacks=[growing(None)])
    (best,) = tuner.get_best_models()
    assert best.settled
    keras_polar.convert(best, verify=True)


def test_a_list_of_callbacks_made_before_is_left_as_it_was():
    gated, (x, y) = gated_of(network), data()
    history = keras.callbacks.History()
    made = keras.callbacks.CallbackList([history], model=gated, epochs=4, steps=4)
    gated.fit(x, y, epochs=4, batch_size=16, verbose=0, callbacks=made)
    assert gated.settled
    assert made.callbacks == [history]
    assert len(history.history["sparsity"]) == 4


def test_branches_and_averages_of_weights():
    swap = keras.callbacks.SwapEMAWeights if BACKEND != "jax" else None
    x, y = np.random.default_rng(0).normal(size=(32, 8, 8, 1)), np.arange(32) % 10
    losses = []
    for compact in (True, False):
        keras.utils.set_random_seed(0)
        gated = keras_polar.apply(
            small_resnet(), 0.4, gate="static", compact=compact, schedule=LATE
        )
        optimizer = keras.optimizers.SGD(0.01, use_ema=swap is not None, ema_momentum=0.8)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        gated.compile(optimizer, loss, jit_compile=JIT)
        history = gated.fit(
            *(x, y), epochs=5, batch_size=8, shuffle=False, verbose=0,
            validation_data=(x, y), callbacks=[swap()] if swap else None,
        ).history  # fmt: skip
        losses.append(history)
    same(*losses)


# --- training by others ----------------------------------------------------------------------


def distilled(student):
    losses = keras.distillation.LogitsDistillation(temperature=3.0)
    distiller = keras.distillation.Distiller(
        teacher=network(), student=student, distillation_losses=losses
    )
    distiller.compile("adam", loss=keras.losses.MeanSquaredError(), jit_compile=JIT)
    return distiller.fit(*data(), epochs=2, verbose=0).history


def test_a_distiller_is_refused_with_the_reason_and_the_small_model_can_be_its_student():
    with pytest.raises(NotImplementedError, match="leaves out the losses of its student"):
        distilled(keras_polar.apply(network(), 0.5, schedule=LATE))
    gated = keras_polar.apply(network(), 0.5, schedule=LATE)
    gated.compile("adam", "mse", jit_compile=JIT)
    gated.fit(*data(), epochs=3, verbose=0)
    small = keras_polar.convert(gated)
    history = distilled(small)
    assert history["loss"][1] < history["loss"][0]
