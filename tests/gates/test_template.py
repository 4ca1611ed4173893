"""A gate of one's own, or one by name with other options, trains, is saved, and leaves."""

import itertools

import keras
import numpy as np
import pytest
from helpers import quick, randomise
from keras import layers, ops

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.gates.gate import GAIN, OPEN, SLOPE
from keras_polar.gates.template import template_of
from keras_polar.surgery.certificate import difference

registered = keras.saving.register_keras_serializable("tests")


@registered
class MaximumGate(keras_polar.Gate):
    """Looks at the largest value of each channel in the sample."""

    per_sample = True

    def __init__(self, sharpness=1.0, **kwargs):
        super().__init__(**kwargs)
        self.sharpness = sharpness

    def build_logits(self, input_shape):
        super().build_logits(input_shape)
        shape = (input_shape[self.axis], self.units)
        self.kernel = self.add_weight(shape, "random_normal", name="kernel")

    def logits(self, x):
        axis = self.axis % len(x.shape)
        largest = ops.max(x, axis=[i for i in range(1, len(x.shape)) if i != axis])
        return super().logits(x) + self.sharpness * ops.matmul(largest, self.kernel)

    def get_config(self):
        return {**super().get_config(), "sharpness": self.sharpness}


@registered
class DenseGate(keras_polar.Gate):
    """Has a layer of its own, and no bias beside it."""

    per_sample = True

    def build_logits(self, input_shape):
        self.dense = layers.Dense(self.units, bias_initializer="ones")
        self.dense.build((None, input_shape[self.axis]))

    def logits(self, x):
        axis = self.axis % len(x.shape)
        return self.dense(ops.mean(x, axis=[i for i in range(1, len(x.shape)) if i != axis]))


@registered
class NoisyGate(keras_polar.Gate):
    """Logistic noise on the logits of all samples: Gumbel-sigmoid."""

    def __init__(self, sharpness=1.0, **kwargs):
        super().__init__(**kwargs)
        self.sharpness = sharpness
        self.seed = keras.random.SeedGenerator(0)

    def logits(self, x):
        u = keras.random.uniform((1, self.units), 0.01, 0.99, seed=self.seed)
        return self.sharpness * (super().logits(x) + ops.log(u) - ops.log(1 - u))

    def get_config(self):
        return {**super().get_config(), "sharpness": self.sharpness}


def image():
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(8, 3, activation="relu", name="stem")(inputs)
    x = layers.Conv2D(8, 3, activation="relu", name="wide")(x)
    return randomise(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))


def text():
    """Hidden units are read by the layer that makes them; its weights are masked."""
    inputs = keras.Input((4, 5))
    x = layers.LSTM(8, name="hidden")(layers.Dense(6, name="stem")(inputs))
    return randomise(keras.Model(inputs, layers.Dense(3)(x)))


def gates_of(gated):
    return {x.group: x for x in gated.layers if isinstance(x, keras_polar.Gate)}


def applied(model, gate, **options):
    schedule = keras_polar.Schedule(warmup=0.1, ramp=0.3, settle=0.5)
    options = {"schedule": schedule, "round_to": 1, "importance": "logits", **options}
    return keras_polar.apply(model, 0.5, gate=gate, **options)


# --- a gate of one's own ---------------------------------------------------------------------


def name_of(x):
    return getattr(x, "__name__", None) or (x if isinstance(x, str) else type(x).__name__)


OWN = (MaximumGate(3.0, gain=5.0), DenseGate(gain=5.0), NoisyGate(3.0, gain=5.0))
CASES = list(itertools.product(OWN, (image, text), ("logits", "gradients")))


@pytest.mark.parametrize(("template", "make", "importance"), quick(CASES[1::5], CASES), ids=name_of)
def test_own_gate_trains_is_saved_and_leaves(template, make, importance, tmp_path):
    model, own = make(), type(template)
    gated = applied(model, template, importance=importance)
    kinds = {name: type(g) for name, g in gates_of(gated).items()}
    if make is image:
        assert kinds == {"stem": own, "wide": own}
    else:
        assert kinds == {"stem": own, "hidden": keras_polar.Gate if own.per_sample else own}
    assert {g.gain for g in gates_of(gated).values()} == {5.0}
    x, y = (random(32, *shape[1:]) for shape in (model.input_shape, model.output_shape))
    before = [to_numpy(v) for v in gates_of(gated)["stem"].trainable_variables]
    gated.compile("adam", "mse", jit_compile=False)
    gated.fit(x, y, batch_size=8, epochs=4, verbose=0)
    after = [to_numpy(v) for v in gates_of(gated)["stem"].trainable_variables]
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
    loaded = after_saving(gated, tmp_path)
    assert configs(loaded) == configs(gated)
    assert loaded.settled
    assert difference(gated, loaded, x) == 0
    small = keras_polar.convert(loaded, verify=x)
    assert small.count_params() < 0.6 * model.count_params()
    assert not gates_of(small)


def test_training_goes_on_from_a_file(tmp_path):
    model = image()
    x, y = random(32, *model.input_shape[1:]), random(32, 3)
    gated = applied(model, OWN[0], schedule=keras_polar.Schedule(settle=0.5, steps=16))
    gated.compile("adam", "mse", jit_compile=False)
    gated.fit(x, y, batch_size=8, epochs=1, verbose=0)
    loaded = after_saving(gated, tmp_path)
    assert configs(loaded) == configs(gated)
    assert not loaded.settled
    loaded.fit(x, y, batch_size=8, initial_epoch=1, epochs=4, verbose=0)
    assert loaded.settled
    keras_polar.convert(loaded, verify=x)


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def configs(gated):
    return {n: (type(g), g.get_config()) for n, g in gates_of(gated).items()}


def after_saving(gated, folder):
    gated.save(folder / "gated.keras")
    return keras.models.load_model(folder / "gated.keras")


def test_own_logits_decide():
    gated = applied(image(), MaximumGate(sharpness=2.0))
    gate = gates_of(gated)["stem"]
    gate.kernel.assign(random(2, 8))
    gate.scores.assign(np.linspace(1, 0.5, 8))  # the first stay open whatever their logits are
    x = random(5, 6, 6, 2)
    logits = OPEN + 2.0 * x.max(axis=(1, 2)) @ to_numpy(gate.kernel)
    is_open = (logits > 0) | (np.arange(8) < gate.min_units)
    assert 0 < is_open.mean() < 1
    np.testing.assert_array_equal(to_numpy(gate(x, training=True)), is_open)


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
def test_what_decides_is_float32(policy):
    keras.config.set_dtype_policy(policy)
    try:
        gated = applied(image(), MaximumGate(sharpness=2.0))
    finally:
        keras.config.set_dtype_policy("float32")
    for gate in gates_of(gated).values():
        assert {v.dtype for v in gate.variables} == {"float32"}
        x = ops.ones((5, 4, 4, gate.kernel.shape[0]), "float16")
        assert keras.backend.standardize_dtype(gate(x, training=True).dtype) == "float16"


def test_noise_is_new_at_every_step():
    gated = applied(image(), NoisyGate(initial_logit=0.1, gain=1.0))
    gate = gates_of(gated)["stem"]
    x = np.zeros((5, 6, 6, 2), "float32")
    steps = [to_numpy(gate(x, training=True)) for _ in range(4)]
    assert {s.shape for s in steps} == {(1, 8)}
    assert not all(np.array_equal(steps[0], s) for s in steps)
    assert all(np.array_equal(to_numpy(gate(x)), np.ones((1, 8))) for _ in range(2))


# --- gain and initial logit ------------------------------------------------------------------


CLASSES = {"static": keras_polar.Gate, "dynamic": keras_polar.DynamicGate}


@pytest.mark.parametrize("kind", CLASSES)
def test_gates_by_name_are_those_of_their_class(kind):
    by_name, by_object = (applied(image(), g) for g in (kind, CLASSES[kind]()))
    assert configs(by_name) == configs(by_object)
    assert {type(g) for g in gates_of(by_name).values()} == {CLASSES[kind]}
    gate = gates_of(by_name)["stem"]
    assert (gate.gain, gate.initial_logit) == (GAIN, OPEN)
    assert not {"gain", "initial_logit", "per_sample"} & gate.get_config().keys()


@pytest.mark.parametrize("make", [image, text])
@pytest.mark.parametrize("kind", CLASSES)
def test_logits_begin_at_the_initial_logit(kind, make, tmp_path):
    gated = applied(make(), CLASSES[kind](gain=4.0, initial_logit=3.0))
    for model in (gated, after_saving(gated, tmp_path)):
        for gate in gates_of(model).values():
            assert (gate.gain, gate.initial_logit) == (4.0, 3.0)
            np.testing.assert_allclose(to_numpy(gate.bias), 3 / 4)
            channels = gate.kernel.shape[0] if gate.per_sample else 1
            x = ops.zeros((*(2 for _ in model.input_shape[1:]), channels))
            logits = to_numpy(gate.logits(x))
            np.testing.assert_allclose(logits, 3.0, rtol=1e-6)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_step_moves_logits_by_the_square_of_the_gain(kind):
    """Once in the forward pass, once in the backward pass."""
    moves = []
    for gain in (2.0, 4.0):
        keras.utils.set_random_seed(0)
        schedule = keras_polar.Schedule(warmup=0.0, ramp=0.0, settle=1.0, steps=100, rate=0)
        gated = applied(image(), CLASSES[kind](gain=gain), schedule=schedule)
        gate = gates_of(gated)["stem"]
        gated.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=False)
        gated.consensus.step.assign(1)
        x = random(8, 6, 6, 2)
        before = [to_numpy(v) * gain for v in gate.trainable_variables]
        gated.train_on_batch(x, np.ones((8, 3), "float32"))
        after = [to_numpy(v) * gain for v in gate.trainable_variables]
        moves.append([b - a for a, b in zip(after, before, strict=True)])
    for small, large in zip(*moves, strict=True):
        assert np.abs(small).max() > 1e-4
        np.testing.assert_allclose(large, 4 * small, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("pressure", [0.0, 1.0])
def test_gates_that_are_led_forget_where_they_began(pressure):
    """Not in the warm-up: no unit is closed then."""
    gated = applied(image(), keras_polar.Gate(initial_logit=7.0), importance="gradients")
    gate = gates_of(gated)["stem"]
    lead = np.where(np.arange(8) % 2, -2 / SLOPE, 2 / SLOPE)
    gate.lead.assign(lead)
    gate.pressure = lambda: ops.convert_to_tensor(pressure)
    gates = to_numpy(gate(np.zeros((3, 6, 6, 2), "float32"), training=True))
    np.testing.assert_array_equal(gates, np.tile((lead > 0) | (pressure == 0), (3, 1)))


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("stochastic", r"gate to be one of \('dynamic', 'static'\) or a keras_polar.Gate.*'stoch"),
        (MaximumGate, r"or a keras_polar.Gate, received <class.*gate=MaximumGate\(\)\."),
        (layers.Dense(3), r"or a keras_polar.Gate, received <Dense"),
        (None, r"or a keras_polar.Gate, received None"),
    ],
)
def test_no_gates(gate, message):
    with pytest.raises(ValueError, match=message):
        applied(image(), gate)


def test_classes_of_other_doors_are_refused_alike():
    class Energy(keras_polar.Measure):
        name = "energy"

    with pytest.raises(ValueError, match=r"or a keras_polar.Measure, .*measure=Energy\(\)\."):
        applied(image(), "static", measure=Energy)


def test_a_gate_that_has_a_group_already():
    gated = applied(image(), MaximumGate())
    with pytest.raises(ValueError, match=r"units=8, group='stem'.*Pass a new one, MaximumGate\(\)"):
        applied(image(), gates_of(gated)["stem"])
    with pytest.raises(ValueError, match=r"min_units=3.*argument of apply"):
        applied(image(), keras_polar.Gate(min_units=3))


def test_a_gate_stands_for_several_models():
    gate = MaximumGate(gain=5.0)
    for _ in range(2):
        gated = applied(image(), gate)
        assert not gate.built
        assert all(g is not gate for g in gates_of(gated).values())


def test_a_config_that_lacks_an_argument():
    class Forgetful(keras_polar.Gate):
        def __init__(self, sharpness=1.0, **kwargs):
            super().__init__(**kwargs)
            self._sharpness = sharpness

    with pytest.raises(TypeError, match=r"`get_config` of gate Forgetful lacks sharpness.*return"):
        template_of(Forgetful(2.0))


def test_an_init_that_does_not_hand_its_arguments_on():
    class Closed(keras_polar.Gate):
        def __init__(self):
            super().__init__()

    class Dropping(keras_polar.Gate):
        def __init__(self, **kwargs):
            super().__init__()

    with pytest.raises(TypeError, match=r"'stem_gate' can be made like Closed.*\*\*kwargs"):
        applied(image(), Closed())
    with pytest.raises(ValueError, match=r"Dropping.*has no units.*hands `\*\*kwargs` on"):
        applied(image(), Dropping())


def test_logits_of_a_wrong_shape():
    class PerSample(keras_polar.Gate):
        def logits(self, x):
            return super().logits(x) + ops.max(x, axis=(1, 2, 3))[:, None]

    class TooFew(keras_polar.Gate):
        def logits(self, x):
            return super().logits(x)[:, :1]

    x = np.zeros((5, 6, 6, 2), "float32")
    for kind, received in ((PerSample, r"\(5, 8\)"), (TooFew, r"\(1, 1\)")):
        gate = gates_of(applied(image(), kind()))["stem"]
        with pytest.raises(ValueError, match=rf"'stem_gate': expected .*\(1, 8\).*{received}"):
            gate(x, training=True)
    PerSample.per_sample = True
    gate = gates_of(applied(image(), PerSample()))["stem"]
    assert to_numpy(gate(x, training=True)).shape == (5, 8)


@pytest.mark.parametrize("kind", CLASSES.values())
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "2", True, None])
@pytest.mark.parametrize("name", ["gain", "initial_logit"])
def test_gains_and_logits_out_of_range(name, value, kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: expected {name} as a finite number"):
        kind(**{name: value})
