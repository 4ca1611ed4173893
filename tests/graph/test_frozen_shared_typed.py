"""What users freeze, hand over, compute in and save: as with the model without gates."""

import copy
import itertools
import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import model_of, quick, randomise, small_resnet
from keras import layers, ops

import keras_polar
from keras_polar.surgery.certificate import difference

RNG = np.random.default_rng(0)
X = RNG.standard_normal((32, 5, 8)).astype("float32")
Y = RNG.standard_normal((32, 3)).astype("float32")


def network(**options):
    """Layers that are masked inside (r, a, with static gates d and head too) and others."""
    inputs = keras.Input((5, 8))
    x = layers.Dense(8, name="first", **options)(inputs)
    x = layers.LSTM(6, return_sequences=True, name="r", **options)(x)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 3, name="a", **options)(x, x)])
    x = layers.BatchNormalization(name="bn", **options)(x)
    x = layers.Dense(8, activation="relu", name="d", **options)(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x)))


NAMES = ("first", "r", "a", "bn", "d", "head")


def flags(model):
    """What each layer says of itself, and which of its variables are trained."""
    trained = {v.path for v in model.trainable_variables}
    return {
        n: (model.get_layer(n).trainable, sorted(v.path for v in model.get_layer(n).weights))
        for n in NAMES
    }, sorted(p for p in trained if p.partition("/")[0] in NAMES)


def fitted(model, epochs=3, **options):
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model.fit(X, Y, epochs=epochs, batch_size=8, verbose=0, **options).history


# --- frozen layers ---------------------------------------------------------------------------


def freeze_all(model):
    for name in NAMES:
        model.get_layer(name).trainable = False


def unfreeze_by_layer(model):
    for layer in model.layers:
        layer.trainable = True


def freeze_model(model):
    model.trainable = False


def tune_the_last(model):
    model.trainable = True
    for name in NAMES[:-2]:
        model.get_layer(name).trainable = False


STEPS = (freeze_all, unfreeze_by_layer, freeze_model, unfreeze_by_layer, tune_the_last)


@pytest.mark.parametrize("gate", ["dynamic", "static"])
@pytest.mark.parametrize("frozen", [True, False])
def test_freezing_and_unfreezing_is_as_in_the_model_without_gates(gate, frozen, tmp_path):
    model = network(trainable=not frozen)
    gated = keras_polar.apply(model, 0.3, gate=gate)
    assert flags(gated) == flags(model)
    for step in STEPS:
        step(model)
        step(gated)
        assert flags(gated) == flags(model), step.__name__
        gated.save(tmp_path / "gated.keras")
        loaded = keras.models.load_model(tmp_path / "gated.keras")
        assert flags(loaded)[0] == flags(model)[0], step.__name__


def test_layers_by_position_are_frozen_with_what_is_inside():
    gated = keras_polar.apply(network(), 0.3, gate="static")
    for layer in gated.layers[:-4]:
        layer.trainable = False
    for layer in gated.layers[-4:]:
        assert layer.trainable
    for layer in gated.layers[:-4]:
        assert not layer.trainable
        assert not layer.trainable_variables


def test_single_frozen_parts_of_a_masked_layer_stay_so():
    model = network()
    model.get_layer("a")._query_dense.trainable = False
    gated = keras_polar.apply(model, 0.3)
    assert flags(gated) == flags(model)


@pytest.mark.parametrize("gate", quick(["dynamic"], ["dynamic", "static"]))
def test_only_what_was_unfrozen_is_trained(gate):
    freeze_all(model := randomise(network()))
    gated = keras_polar.apply(model, 0.3, gate=gate, compact=False)
    gated.get_layer("r").trainable = True
    before = {n: gated.get_layer(n).get_weights() for n in NAMES}
    fitted(gated, validation_data=(X, Y))
    for name in NAMES:
        same = all(map(np.array_equal, before[name], gated.get_layer(name).get_weights()))
        assert same == (name != "r"), name


def test_frozen_gates_are_said():
    gated = keras_polar.apply(network(), 0.3, compact=False)
    for layer in gated.layers:
        layer.trainable = layer.name == "head"
    with pytest.warns(UserWarning, match="gates of .* are frozen.*first_gate"):
        fitted(gated)
    gated = keras_polar.apply(network(), 0.3, compact=False)
    for layer in gated.layers:
        layer.trainable = layer.name == "head" or "gate" in layer.name
    fitted(gated)


def test_masked_layers_have_what_the_layers_have():
    gated = keras_polar.apply(model := network(), 0.3, gate="static")
    r, plain = gated.get_layer("r"), model.get_layer("r")
    assert type(r) is not type(plain)
    assert (r.units, r.return_sequences, r.stateful) == (6, True, False)
    assert gated.get_layer("d").kernel is gated.get_layer("d").weights[0]
    assert [v.path for v in r.weights] == [v.path for v in plain.weights]
    r.set_weights([2 * w for w in plain.get_weights()])
    np.testing.assert_array_equal(r.cell.kernel, 2 * ops.convert_to_numpy(plain.cell.kernel))
    assert not hasattr(r, "unknown")
    with pytest.raises(AttributeError, match="unknown"):
        _ = r.unknown
    assert not hasattr(r, "_unknown")


def test_what_is_set_on_a_masked_layer_is_set_on_the_layer():
    model = network()
    gated = keras_polar.apply(model, 0.3, gate="static")
    for each in (model, gated):
        each.get_layer("d").activation = keras.activations.tanh
        each.get_layer("d").note = "mine"
    assert gated.get_layer("d").note == "mine"
    assert difference(model, gated, X) < 1e-5
    small = keras_polar.convert(settled(gated), verify=X)
    assert small.get_layer("d").activation is keras.activations.tanh


def test_stateful_layer_behind_its_mask_is_reset():
    inputs = keras.Input(batch_shape=(4, 5, 8))
    x = layers.GRU(8, stateful=True, name="r")(layers.Dense(8, "relu")(inputs))
    gated = keras_polar.apply(keras.Model(inputs, layers.Dense(3)(x)), 0.3)
    first = ops.convert_to_numpy(gated(X[:4]))
    assert np.abs(ops.convert_to_numpy(gated(X[:4])) - first).max() > 1e-4
    gated.get_layer("r").reset_state()
    np.testing.assert_allclose(ops.convert_to_numpy(gated(X[:4])), first, atol=1e-6)


def settled(gated):
    for group in gated.groups:
        group.set_mask(np.arange(group.units) % 2 == 0)
    return gated


# --- variables of the user -------------------------------------------------------------------


def knob(value=0.0, **options):
    return keras.Variable(value, trainable=False, **options)


class Penalty(layers.Layer):
    def __init__(self, weight, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight

    def call(self, x):
        self.add_loss(1000.0 * ops.convert_to_tensor(self.weight))
        return x


class Hidden(Penalty):
    """Keeps it under another name."""

    def __init__(self, weight, **kwargs):
        layers.Layer.__init__(self, **kwargs)
        self._own_name = weight

    @property
    def weight(self):
        return self._own_name


class Listed(Penalty):
    def __init__(self, weights, **kwargs):
        layers.Layer.__init__(self, **kwargs)
        self.knobs = {"kl": list(weights)}

    @property
    def weight(self):
        return self.knobs["kl"][0]


class WithConfig(Penalty):
    """Its config holds the value of the variable."""

    def get_config(self):
        return {
            **super(Penalty, self).get_config(),
            "weight": float(ops.convert_to_numpy(self.weight)),
        }


class Late(layers.Layer):
    """Gets it after it was made."""

    weight = None
    call = Penalty.call


class Scaled(layers.Layer):
    """With parts, one of which may have been handed the variable as well."""

    def __init__(self, weight, **kwargs):
        super().__init__(**kwargs)
        self.penalty = Penalty(weight)
        self.dense = layers.Dense(16)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.penalty(self.dense(x))


@keras.saving.register_keras_serializable("tests")
class Annealed(keras.regularizers.Regularizer):
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return 1000.0 * ops.convert_to_tensor(self.weight) + 0.0 * ops.sum(x)

    def get_config(self):
        return {"weight": float(ops.convert_to_numpy(self.weight))}


def late(weight):
    layer = Late()
    layer.weight = weight
    return layer


HANDED = {
    "argument": Penalty,
    "another name": Hidden,
    "list in a dict": lambda w: Listed([w]),
    "config": WithConfig,
    "attribute": late,
    "part": Scaled,
    "kernel regularizer": lambda w: layers.Dense(16, kernel_regularizer=Annealed(w)),
    "inside a wrapper": lambda w: layers.TimeDistributed(
        layers.Dense(16, kernel_regularizer=Annealed(w))
    ),
    "recurrent": lambda w: layers.GRU(8, kernel_regularizer=Annealed(w)),
    "activity regularizer": lambda w: layers.Dense(16, activity_regularizer=Annealed(w)),
}


def sequence_model(*steps):
    inputs = keras.Input((5, 8))
    x = layers.Dense(16, name="before")(inputs)
    for step in steps:
        x = step(x)
    x = x if len(x.shape) == 2 else layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Dense(16, name="behind")(x)))


def losses_at(model, weight, value):
    weight.assign(value)
    model(X[:4], training=True)
    return float(ops.convert_to_numpy(sum(model.losses)))


@pytest.mark.parametrize("kind", HANDED)
def test_variable_that_was_handed_to_a_layer_is_shared(kind):
    weight = knob()
    model = sequence_model(HANDED[kind](weight))
    gated = keras_polar.apply(model, 0.3, gate="static")
    small = keras_polar.convert(settled(gated))
    assert small.count_params() < model.count_params()
    models = (model, gated, small)
    grown = [losses_at(m, weight, 3.0) - losses_at(m, weight, 0.0) for m in models]
    assert grown == pytest.approx([grown[0]] * 3, rel=0.01)
    assert grown[0] > 700


@pytest.mark.parametrize("compact", [True, False])
def test_annealing_arrives_in_fit(compact):
    weight = knob()
    model = sequence_model(Penalty(weight), layers.Dense(16), Penalty(weight))
    anneal = keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, logs: weight.assign(float(e)))
    gated = keras_polar.apply(model, 0.3, gate="static", compact=compact)
    for each in (model, gated):
        losses = fitted(each, 5, callbacks=[anneal])["loss"]
        assert losses == pytest.approx([2000 * e for e in range(5)], rel=0.01, abs=10)
    small = keras_polar.convert(gated, verify=X)
    assert losses_at(small, weight, 2.0) == pytest.approx(4000, rel=0.01)


@pytest.mark.parametrize("compact", [True, False])
def test_losses_that_layers_add_count_once(compact):
    """Masked inside, behind a mask, and in the smaller network alike."""

    def far(x):
        return 1000.0 * ops.ones_like(x[0, 0, 0]) * ops.shape(x)[0]

    model = sequence_model(
        layers.Dense(16, activity_regularizer=far),
        layers.LSTM(8, return_sequences=True, activity_regularizer=far),
        Penalty(knob(1.0)),
    )
    gated = keras_polar.apply(model, 0.3, gate="static", compact=compact)
    for each in (model, gated):
        assert fitted(each, 4)["loss"] == pytest.approx([3000] * 4, abs=10)


def test_variable_captured_by_a_function_is_shared():
    weight = knob(1.0)
    model = sequence_model(
        layers.Dense(16, activation=lambda x: x * ops.convert_to_tensor(weight)),
        layers.Lambda(lambda x: x * ops.convert_to_tensor(weight), output_shape=(5, 16)),
    )
    gated = keras_polar.apply(randomise(model), 0.3, gate="static")
    small = keras_polar.convert(settled(gated))
    for value in (1.0, 3.0):
        weight.assign(value)
        keras_polar.convert(gated, verify=X)
        assert difference(gated, small, X) < 1e-5


class Counter(layers.Layer):
    """Makes a variable of its own, outside `build`."""

    def __init__(self, start=0.0, function=None, **kwargs):
        super().__init__(**kwargs)
        self.start = start
        self.count = keras.Variable(start, trainable=False)

    def call(self, x):
        self.count.assign(self.count + 1.0)
        return x

    def get_config(self):
        return {**super().get_config(), "start": self.start}


def test_what_a_layer_makes_by_itself_is_its_own():
    model = sequence_model(Counter(2.0, name="counter"), layers.BatchNormalization(name="bn"))
    gated = keras_polar.apply(model, 0.3)
    fitted(gated)
    for name in ("counter", "bn"):
        assert gated.get_layer(name).variables[0] is not model.get_layer(name).variables[0]
    assert ops.convert_to_numpy(model.get_layer("counter").count) == 2
    np.testing.assert_array_equal(model.get_layer("bn").moving_mean, np.zeros(16))


@pytest.mark.parametrize("gate", quick(["dynamic"], ["dynamic", "static"]))
def test_training_leaves_the_model_without_gates_alone(gate):
    model = randomise(network())
    before = [np.array(w) for w in model.get_weights()]
    fitted(keras_polar.apply(model, 0.3, gate=gate, compact=False))
    assert all(map(np.array_equal, before, model.get_weights()))


def test_trained_variable_is_not_shared():
    weight = keras.Variable(1.0)
    gated = keras_polar.apply(sequence_model(Penalty(weight)), 0.3)
    fitted(gated)
    assert ops.convert_to_numpy(weight) == 1


def test_knob_of_operations_is_not_said_to_come_apart():
    weight = knob(2.0)
    model = sequence_model(lambda x: ops.multiply(x, weight), lambda x: ops.add(x, weight))
    small = keras_polar.convert(settled(keras_polar.apply(randomise(model), 0.3)), verify=X)
    before = ops.convert_to_numpy(small(X))
    weight.assign(5.0)
    assert np.abs(ops.convert_to_numpy(small(X)) - before).max() > 1e-3


class Warm(layers.Dense):
    """Says nothing of its variable in its config, and is cut."""

    def __init__(self, *args, heat=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.heat = heat

    def call(self, x):
        return super().call(x) * ops.cast(ops.convert_to_tensor(self.heat), x.dtype)


@pytest.mark.parametrize("kind", ["own", "steps of an optimizer"])
def test_layer_that_was_handed_a_variable_is_cut(kind):
    keras_polar.register(Warm, like=layers.Dense)
    weight = knob(1.0) if kind == "own" else keras.optimizers.SGD().iterations
    weight.assign(1)
    model = randomise(sequence_model(Warm(16, heat=weight, name="warm")))
    gated = settled(keras_polar.apply(model, 0.3, gate="static"))
    small = keras_polar.convert(gated, verify=X)
    assert small.get_layer("warm").units == 8
    weight.assign(4)
    assert difference(gated, small, X) < 1e-5
    before = ops.convert_to_numpy(small(X))
    weight.assign(1)
    assert np.abs(ops.convert_to_numpy(small(X)) - before).max() > 1e-3


class Temperature(layers.Layer):
    """Uses what it was handed beside its parts: no constant may stand for that."""

    def __init__(self, weight, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight
        self.dense = layers.Dense(16)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x) * ops.convert_to_tensor(self.weight)


def test_composite_does_not_take_a_knob_for_a_constant():
    weight = knob(1.0)
    model = randomise(sequence_model(Temperature(weight)))
    gated = keras_polar.apply(model, 0.3, gate="static")
    small = keras_polar.convert(settled(gated))
    weight.assign(4.0)
    assert difference(gated, small, X) < 1e-5
    for group in gated.groups:
        group.set_mask(np.ones(group.units, bool))
    assert difference(model, gated, X) < 1e-5


# --- other floats than float32 ---------------------------------------------------------------


@pytest.fixture
def floatx():
    before = keras.config.floatx()
    yield keras.config.set_floatx
    keras.config.set_floatx(before)


def dense_model():
    return model_of(layers.Dense(16, activation="tanh", kernel_regularizer="l2"), shape=(8,))


def attended():
    inputs = keras.Input((5, 8))
    x = layers.Dense(8)(inputs)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 4)(x, x)])
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


TYPED = {
    "dense": dense_model,
    "residual": lambda: small_resnet(widths=(8, 16), classes=3),
    "attention": attended,
}
TOLERANCE = {"float64": 1e-12, "float16": 2e-2, "bfloat16": 2e-2}
FLOATS = [*itertools.product(TOLERANCE, TYPED, ("dynamic", "static"))]
NO_FLOAT64 = "JAX has float64 only where its process begins with it"
# Keras on PyTorch computes some of float64 in float32.
if keras.backend.backend() != "tensorflow":
    TOLERANCE["float64"] = 1e-5


def check_type(dtype, model, x, tmp_path, **options):
    y = RNG.standard_normal((len(x), 3))
    gated = keras_polar.apply(model, 0.3, **options)
    assert difference(model, gated, x) == 0
    gated.compile(keras.optimizers.SGD(0.01), "mse")
    history = gated.fit(x, y, epochs=3, batch_size=8, verbose=0, validation_data=(x, y)).history
    assert np.isfinite(np.array([float(v) for v in history["loss"]])).all()
    small = keras_polar.convert(gated, verify=x)
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    assert difference(gated, loaded, x) == 0
    assert difference(gated, small, x) <= TOLERANCE[dtype]
    assert {keras.backend.standardize_dtype(m(x).dtype) for m in (model, gated, small)} == {dtype}
    for group in gated.groups:
        for v in group._gate.variables:
            assert keras.backend.standardize_dtype(v.dtype) == "float32", v.path


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
@pytest.mark.parametrize(("dtype", "name", "gate"), quick(FLOATS[::4], FLOATS))
def test_trains_in_other_floats(dtype, name, gate, floatx, tmp_path):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip(NO_FLOAT64)
    if (dtype, name, keras.backend.backend()) == ("float16", "attention", "jax"):
        pytest.skip("JAX has no attention in float16 on a CPU")
    floatx(dtype)
    model = TYPED[name]()
    x = RNG.standard_normal((16, *model.input_shape[1:]))
    options = {"compact": name != "residual"}
    if name == "residual":
        options["granularity"] = ("channels", "blocks")
    check_type(dtype, model, x, tmp_path, gate=gate, **options)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere float64 is not")
def test_layers_of_another_type_keep_it():
    """The gates do not round what passes them to the type of the policy."""
    inputs = keras.Input((8,), dtype="float64")
    x = layers.Dense(16, dtype="float64", name="a")(inputs)
    x = layers.Dense(16, dtype="float64", name="b", activation="tanh")(x)
    model = randomise(keras.Model(inputs, layers.Dense(3, dtype="float64")(x)))
    gated = keras_polar.apply(model, 0.3)
    assert gated.output.dtype == "float64"
    x = RNG.standard_normal((16, 8))
    assert difference(model, gated, x) <= 1e-15
    assert difference(gated, keras_polar.convert(settled(gated)), x) <= 1e-14


# --- files and copies ------------------------------------------------------------------------


def by_h5(model, folder):
    model.save(folder / "model.h5")
    return keras.models.load_model(folder / "model.h5")


def by_weights(model, folder):
    model.save_weights(folder / "model.weights.h5")
    is_gated = isinstance(model, keras_polar.GatedModel)
    new = keras_polar.apply(network(), 0.3, gate="static") if is_gated else network()
    new.load_weights(folder / "model.weights.h5")
    return new


def by_json(model, folder):
    new = keras.models.model_from_json(model.to_json())
    new.set_weights(model.get_weights())
    return new


def by_clone(model, folder):
    new = keras.models.clone_model(model)
    new.set_weights(model.get_weights())
    return new


def by_pickle(model, folder):
    return pickle.loads(pickle.dumps(model))


def by_deepcopy(model, folder):
    return copy.deepcopy(model)


WAYS = (by_h5, by_weights, by_json, by_clone, by_pickle, by_deepcopy)


@pytest.mark.parametrize("way", WAYS)
def test_files_and_copies_are_the_model(way, tmp_path):
    model = randomise(network())
    model.get_layer("r").trainable = False
    gated = settled(keras_polar.apply(model, 0.3, gate="static"))
    assert difference(model, way(model, tmp_path), X) == 0
    new = way(gated, tmp_path)
    assert type(new) is keras_polar.GatedModel
    assert difference(gated, new, X) == 0
    if way is not by_weights:
        assert flags(new) == flags(gated)
    assert new.settled
    assert difference(gated, keras_polar.convert(new, verify=X), X) < 1e-5


def test_model_of_an_h5_file_goes_on_training(tmp_path):
    gated = by_h5(keras_polar.apply(sequence_model(), 0.4), tmp_path)
    fitted(gated, 5)
    assert gated.settled
    keras_polar.convert(gated, verify=X)


@pytest.mark.parametrize("gate", ["dynamic", "static"])
def test_h5_file_of_blocks(gate, tmp_path):
    model = randomise(small_resnet())
    gated = settled(keras_polar.apply(model, 0.2, gate=gate, granularity=("channels", "blocks")))
    x = RNG.standard_normal((4, 8, 8, 1))
    assert difference(gated, by_h5(gated, tmp_path), x) == 0


def test_h5_file_that_keras_could_not_load_is_not_written(tmp_path):
    inputs = keras.Input((5, 8))
    x = layers.Dense(8)(inputs) + layers.Dense(8)(inputs)
    gated = keras_polar.apply(keras.Model(inputs, layers.Dense(3)(x)), 0.3)
    with pytest.raises(ValueError, match=r"operations \(add\).*\.keras"):
        gated.save(tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())
    gated.save(tmp_path / "model.keras")
    gated.save_weights(tmp_path / "model.weights.h5")


def test_class_of_gated_models_is_known_to_a_new_process(tmp_path):
    gated = keras_polar.apply(sequence_model(), 0.4)
    gated.save(tmp_path / "model.h5")
    code = "import keras, keras_polar; keras.models.load_model('model.h5').consensus"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ)
