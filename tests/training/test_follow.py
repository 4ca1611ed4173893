"""A gated model inside the `fit` of another one: followed it is pruned, left alone it is told."""

import keras
import numpy as np
import pytest
from helpers import quick
from keras import layers, ops

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.callbacks import Follow

BACKEND = keras.backend.backend()
SCHEDULE = keras_polar.Schedule(warmup=0.2, ramp=0.4, settle=0.4)
JIT = BACKEND == "jax"  # there it is quicker, and what people have
GATES = ["sparsity", "polarization"]


def data(n=64):
    x = np.random.default_rng(0).normal(size=(n, 8)).astype("float32")
    return x, x[:, :3].copy()


def network():
    x = inputs = keras.Input((8,))
    for name in ("before", "after"):
        x = layers.Dense(16, activation="tanh", name=name)(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def gated_network(gate="static", schedule=SCHEDULE, **options):
    keras.utils.set_random_seed(0)
    options = {"importance": "logits"} | options  # quick to compile
    return keras_polar.apply(network(), 0.5, gate=gate, schedule=schedule, **options)


def around(gated):
    inputs = keras.Input((8,))
    return keras.Model(inputs, gated(inputs))


def fit(model, *callbacks, **options):
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=JIT)
    options = {"epochs": 5, "batch_size": 16, "shuffle": False, "verbose": 0} | options
    return model.fit(*data(), callbacks=list(callbacks), **options).history


def count(gated):
    return int(to_numpy(gated.consensus.step)), int(to_numpy(gated.consensus.steps))


@pytest.mark.parametrize("gate", quick(["static"], ["static", "dynamic"]))
def test_a_followed_fit_does_what_the_models_own_does(gate):
    options = {"importance": "gradients", "compact": False}
    alone, part = (gated_network(gate, **options) for _ in range(2))
    own = fit(alone, validation_data=data(32))
    other = fit(around(part), Follow(part), validation_data=data(32))
    assert own.keys() == other.keys()
    for name in own:
        np.testing.assert_allclose(own[name], other[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert part.settled
    assert part.sparsity == pytest.approx(0.5, abs=0.06)
    for a, b in zip(alone.groups, part.groups, strict=True):
        np.testing.assert_array_equal(a.mask, b.mask)
    keras_polar.convert(part, verify=True)


class Twice(keras.Model):
    """Calls one gated model twice in a step, and one once, as a GAN does."""

    def __init__(self, twice, once):
        super().__init__()
        self.twice, self.once = twice, once

    def call(self, x, training=False):
        first = self.twice(x, training=training)
        return first + self.twice(-x, training=training) + self.once(x, training=training)


def test_steps_are_those_of_the_gated_model_and_each_has_its_logs():
    twice, once = gated_network(), gated_network()
    history = fit(Twice(twice, once), Follow(twice), Follow(once))
    assert count(twice) == (40, 40)
    assert count(once) == (20, 20)
    names = [*GATES, *(f"{once.name}_{name}" for name in GATES)]
    assert set(history) == {"loss", *names}
    for name in names:
        assert len(history[name]) == 5
    for gated, name in ((twice, "sparsity"), (once, f"{once.name}_sparsity")):
        assert gated.settled
        # The gates settle with the end of the second of five epochs.
        np.testing.assert_allclose(history[name][2:], gated.sparsity, rtol=1e-5)
        assert history[name][0] < 0.25


def test_a_second_fit_follows_anew_and_one_that_is_not_followed_trains_on_in_silence():
    gated = gated_network(schedule=keras_polar.Schedule(0.2, 0.4, settle=0.8, steps=20))
    model = around(gated)
    fit(model, Follow(gated), epochs=3)
    assert not gated.settled
    fit(model, Follow(gated), epochs=2)
    assert gated.settled
    assert count(gated) == (20, 20)
    fit(model, epochs=1)


def test_gates_that_are_part_of_a_longer_graph_are_followed():
    gated = gated_network()
    model = keras.Model(gated.input, layers.Dense(3)(layers.ReLU()(gated.output)))
    fit(model, Follow(gated))
    assert gated.settled


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
@pytest.mark.skipif(BACKEND != "tensorflow", reason="only tf.data hides how long an epoch is")
def test_the_length_of_the_run_is_found_out_after_an_epoch():
    gated = gated_network(schedule=keras_polar.Schedule(0.2, 0.6, settle=0.6))

    import tensorflow as tf

    x, y = data()
    stream = tf.data.Dataset.from_tensor_slices((x, y)).batch(16).filter(lambda x, y: True)
    model = around(gated)
    model.compile("adam", "mse")
    history = model.fit(stream, epochs=5, verbose=0, shuffle=False, callbacks=[Follow(gated)])
    assert gated.settled
    sparsity = history.history["sparsity"]
    assert sparsity[0] == 0 < sparsity[3] == pytest.approx(gated.sparsity, 1e-5) == sparsity[4]


def test_a_run_that_is_stopped_early_settles_at_its_end_and_says_so():
    gated = gated_network()
    model = around(gated)

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    with pytest.warns(UserWarning, match="fit ended before the schedule settled the gates"):
        fit(model, Follow(gated), Stop())
    assert gated.settled


# --- the distiller ---------------------------------------------------------------------------


def distilled(student, *callbacks, features=False):
    distillation = keras.distillation
    losses = distillation.LogitsDistillation(temperature=3.0)
    if features:
        losses = [losses, distillation.FeatureDistillation("mse", "before", "before")]
    distiller = distillation.Distiller(network(), student, losses)
    distiller.compile("adam", loss=keras.losses.MeanSquaredError(), jit_compile=JIT)
    options = {"epochs": 5, "batch_size": 16, "verbose": 0, "callbacks": list(callbacks)}
    return distiller.fit(*data(), **options).history


@pytest.mark.parametrize("schedule", [SCHEDULE, keras_polar.Schedule(0.2, 0.4, 0.4, steps=20)])
def test_a_distiller_that_is_followed_trains_the_gates_losses_too(schedule):
    gated = gated_network("dynamic", schedule=schedule)
    history = distilled(gated, Follow(gated))
    assert gated.settled
    assert count(gated) == (20, 20)
    of_gates = np.subtract(history["loss"], history["total_loss"])  # the one is Keras' own sum
    assert of_gates[1] > 1e-3
    np.testing.assert_allclose(of_gates[2:], 0, atol=1e-5)
    keras_polar.convert(gated, verify=True)


def test_a_distiller_of_features_calls_its_student_twice():
    gated = gated_network()
    distilled(gated, Follow(gated), features=True)
    assert gated.settled
    done, announced = count(gated)
    assert done == announced
    keras_polar.convert(gated, verify=True)


# --- nobody follows --------------------------------------------------------------------------


def test_the_fit_of_another_model_warns_that_nobody_settles_the_gates():
    gated = gated_network(schedule=keras_polar.Schedule(0.2, 0.4, 0.4, steps=20))
    with pytest.warns(UserWarning, match="by the `fit` of another model, .* never settles"):
        fit(around(gated), epochs=3)
    with pytest.warns(UserWarning, match=r"Nobody followed its training: .*Follow\(gated\)"):
        keras_polar.convert(gated)


def test_settled_gates_are_trained_by_another_model_without_a_word(tmp_path):
    gated = gated_network()
    gated.settle()
    gated.save(tmp_path / "gated.keras")
    for each in (gated, keras.models.load_model(tmp_path / "gated.keras")):
        mask = each.groups[0].mask
        fit(around(each), epochs=1)
        np.testing.assert_array_equal(each.groups[0].mask, mask)


def test_calls_for_training_outside_of_any_fit_are_no_reason_to_warn():
    gated = gated_network()
    gated(data()[0], training=True)
    around(gated)(data()[0], training=True)


def test_in_the_fit_of_the_gated_model_itself_there_is_nothing_to_follow():
    histories = []
    for with_it in (True, False):
        gated = gated_network()
        histories.append(fit(gated, *([Follow(gated)] if with_it else [])))
    assert histories[0] == histories[1]


def test_what_cannot_be_followed_is_said():
    with pytest.raises(TypeError, match="Follow: expected a gated model"):
        Follow(network())
    gated = gated_network()
    with pytest.raises(ValueError, match=r"keras.Model\(x, gated\(x\)\)"):
        fit(network(), Follow(gated))
    with pytest.raises(ValueError, match="none of its gates"):
        fit(around(gated_network()), Follow(gated))


def test_frozen_gates_are_told():
    gated = gated_network()
    gated.trainable = False
    with pytest.warns(UserWarning, match="gates of .* are frozen"):
        fit(keras.Model(gated.input, layers.Dense(3)(gated.output)), Follow(gated))


# --- tasks -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_keras_hub_task_around_a_gated_backbone():
    models = pytest.importorskip("keras_hub").models
    backbone = models.BertBackbone(
        *(40, 1, 2, 16, 32), max_sequence_length=8, dropout=0.0, name="backbone"
    )
    gated = keras_polar.apply(backbone, 0.2, schedule=SCHEDULE)
    task = models.BertTextClassifier(backbone=gated, num_classes=2, preprocessor=None)
    task.compile("adam", jit_compile=JIT)
    tokens = np.random.default_rng(0).integers(0, 40, (32, 8))
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens), "segment_ids": 0 * tokens}
    options = {"epochs": 5, "batch_size": 8, "shuffle": False, "verbose": 0}
    task.fit(x, np.zeros(32, int), callbacks=[Follow(gated)], **options)
    assert gated.settled
    assert gated.sparsity == pytest.approx(0.2, abs=0.05)
    small = keras_polar.convert(gated, verify=x)
    assert small.count_params() < 0.85 * backbone.count_params()
    assert ops.shape(small(x)["pooled_output"]) == (32, 16)
