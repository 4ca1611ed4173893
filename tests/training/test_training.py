"""Training with gates: it converges, polarizes, meets the target; its state saves and loads."""

import keras
import numpy as np
import pytest
from helpers import quick, small_resnet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.surgery.certificate import difference

LATE = keras_polar.Schedule(warmup=0.2, ramp=0.4, settle=0.4)  # not in the first epoch

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16).astype("float32")
    return train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)


def fit(model, digits, epochs, seed=0, **kwargs):
    x, x_test, y, y_test = digits
    keras.utils.set_random_seed(seed)
    model.compile(keras.optimizers.Adam(3e-3), LOSS, metrics=["accuracy"], jit_compile=False)
    options = {"batch_size": 64, "verbose": 0, "validation_data": (x_test, y_test), **kwargs}
    return model.fit(x, y, epochs=epochs, **options).history


@pytest.mark.parametrize("gate", quick(["dynamic"], ["dynamic", "static"]))
def test_fit_meets_the_target_polarizes_and_ships_what_it_validates(gate, digits):
    gated = keras_polar.apply(small_resnet(widths=(16, 32)), 0.5, gate=gate, schedule=LATE)
    history = fit(gated, digits, epochs=12)
    assert abs(gated.sparsity - 0.5) <= 0.01
    if gate == "dynamic":  # static gates agree by themselves; few units are in dispute
        assert min(history["polarization"]) < 1
    assert history["polarization"][-1] == pytest.approx(1)
    assert history["sparsity"][-1] == pytest.approx(gated.sparsity, abs=1e-5)
    small = keras_polar.convert(gated, verify=digits[1])
    small.compile(loss=LOSS, metrics=["accuracy"])
    accuracy = small.evaluate(digits[1], digits[3], verbose=0, return_dict=True)["accuracy"]
    assert accuracy == pytest.approx(history["val_accuracy"][-1], abs=1e-6)
    assert accuracy > 0.9
    assert small.count_params() < 0.55 * small_resnet(widths=(16, 32)).count_params()


@pytest.mark.parametrize("gate", quick(["dynamic"], ["dynamic", "static"]))
def test_saved_gated_model_goes_on(gate, digits, tmp_path):
    gated = keras_polar.apply(small_resnet(), 0.4, gate=gate, schedule=LATE)
    fit(gated, digits, epochs=2)
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    assert isinstance(loaded, keras_polar.GatedModel)
    assert loaded.sparsity == gated.sparsity
    assert difference(gated, loaded, digits[1][:32]) == 0
    assert difference(keras_polar.convert(gated), keras_polar.convert(loaded), digits[1][:32]) == 0


def test_callers_model_is_left_alone(digits):
    model = small_resnet()
    model.get_layer("stem").trainable = False
    model.compile("adam", LOSS)
    before = model.get_config(), model.get_weights(), [v.trainable for v in model.weights]
    gated = keras_polar.apply(model, 0.4, gate="static", schedule=LATE)
    fit(gated, digits, epochs=1)
    assert not gated.get_layer("stem").trainable
    assert model.get_config() == before[0]
    assert all((a == b).all() for a, b in zip(model.get_weights(), before[1], strict=True))
    assert [v.trainable for v in model.weights] == before[2]
    assert model.compiled
    assert model.loss is LOSS


def test_gates_that_stay_open_change_nothing(digits):
    model = small_resnet()
    gated = keras_polar.apply(model, 0.4, schedule=LATE)
    assert difference(model, gated, digits[1][:32]) == 0
    assert gated.sparsity == 0


# Keras says so of every dataset whose length it does not know.
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_fit_of_unknown_length_settles(digits):
    x, _, y, _ = digits

    def batches():
        for i in range(0, 512, 64):
            yield x[i : i + 64], y[i : i + 64]

    import tensorflow as tf

    spec = (tf.TensorSpec((None, 8, 8, 1)), tf.TensorSpec((None,), "int64"))
    data = tf.data.Dataset.from_generator(batches, output_signature=spec)
    gated = keras_polar.apply(small_resnet(), 0.5, schedule=LATE)
    gated.compile("adam", LOSS, jit_compile=False)
    gated.fit(data, epochs=4, verbose=0, shuffle=False)
    assert abs(gated.sparsity - 0.5) <= 0.01


def test_fit_that_stops_early_says_so(digits):
    gated = keras_polar.apply(small_resnet(), 0.5, schedule=LATE)
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(gated, "stop_training", True)
    )
    with pytest.warns(UserWarning, match="before the schedule settled"):
        fit(gated, digits, epochs=10, callbacks=[stop])
    assert abs(gated.sparsity - 0.5) <= 0.01


@pytest.mark.parametrize("importance", quick(["gradients"], ["logits", "gradients"]))
def test_custom_training_loop(importance, digits):
    import tensorflow as tf

    x, _, y, _ = digits
    steps = 30
    schedule = keras_polar.Schedule(steps=steps)
    options = {"schedule": schedule, "importance": importance}
    gated = keras_polar.apply(small_resnet(), 0.5, **options)
    optimizer = keras.optimizers.Adam(3e-3)
    extra = []
    for i in range(steps):
        rows = slice(32 * i, 32 * i + 32)
        with tf.GradientTape() as tape:
            loss = LOSS(y[rows], gated(x[rows], training=True)) + sum(gated.losses)
        extra.append(float(sum(gated.losses)))
        optimizer.apply(tape.gradient(loss, gated.trainable_weights), gated.trainable_weights)
        if i == schedule.settle_step(steps):
            gated.settle()
    assert extra[0] == 0  # warm-up
    if importance == "logits":
        assert max(extra) > 0  # pressure
    else:
        assert all(to_numpy(g._gate.heard).any() for g in gated.groups)
    assert extra[-1] == 0  # settled
    assert abs(gated.sparsity - 0.5) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["dynamic", "static"])
def test_accuracy_lost_is_small(gate, digits):
    lost = []
    for seed in range(3):
        accuracies = []
        for build in (lambda m: m, lambda m: keras_polar.apply(m, 0.5, gate=gate)):
            keras.utils.set_random_seed(seed)
            model = build(small_resnet(widths=(16, 32, 64)))
            accuracies.append(fit(model, digits, epochs=20, seed=seed)["val_accuracy"][-1])
        lost.append(accuracies[0] - accuracies[1])
    print(f"{gate} gates, dense minus small accuracy: {np.mean(lost):.4f} (seeds: {lost})")
    assert np.mean(lost) < 0.02
