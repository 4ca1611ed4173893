"""What gates hear of the loss, which units they close for it, and that they decide themselves."""

import keras
import numpy as np
import pytest
from helpers import small_resnet
from keras import layers

import keras_polar
from keras_polar.backends import to_numpy
from keras_polar.costs.polynomial import Polynomial
from keras_polar.gates.gate import HEARD
from keras_polar.gates.listening import balance, of_batches

BACKEND = keras.backend.backend()


def one_hidden_layer(gate):
    rng = np.random.default_rng(0)
    inputs = keras.Input((3,))
    hidden = layers.Dense(5, name="hidden")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(hidden))
    schedule = keras_polar.Schedule(warmup=0, ramp=0.1, settle=1, steps=1000)
    gated = keras_polar.apply(model, 0.5, gate=gate, schedule=schedule, importance="gradients")
    for variable in [*gated.get_layer("hidden").weights, *gated.get_layer("head").weights]:
        variable.assign(rng.standard_normal(variable.shape))
    return gated, gated.get_layer("hidden_gate")


def gradients_per_sample(gated, x, y, mask):
    """Of a sample's squared error, for the gates of the hidden units, by hand."""
    w, b, v, c = (to_numpy(p).astype("float64") for p in _weights(gated))
    hidden = x @ w + b
    by_output = 2 * ((hidden * mask) @ v + c - y) / y.shape[1]
    return by_output @ v.T * hidden


def _weights(gated):
    return [*gated.get_layer("hidden").weights, *gated.get_layer("head").weights]


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("gate", ["dynamic", "static"])
def test_what_is_heard_is_the_mean_square_of_gradients_per_sample(gate, policy):
    """To a factor: that of loss scaling, which all units share."""
    keras.config.set_dtype_policy(policy)
    try:
        gated, layer = one_hidden_layer(gate)
    finally:
        keras.config.set_dtype_policy("float32")
    rng = np.random.default_rng(1)
    data = [[rng.standard_normal((32, n)).astype("float32") for n in (3, 2)] for _ in range(3)]
    lead = np.array([1.0, -1.0, 2.0, -0.5, 1.0], "float32")
    closed = lead < 0
    wanted = np.zeros(5)
    optimizer = keras.optimizers.SGD(0.0)
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
    gated.compile(optimizer, "mse", jit_compile=False)
    gated.consensus.step.assign(500)
    for x, y in data:
        layer.lead.assign(lead)
        gated.train_on_batch(x, y)
        g = gradients_per_sample(gated, x, y, ~closed)
        wanted += HEARD * (np.square(g).mean(axis=0) - wanted)
    heard = to_numpy(layer.heard)[0]
    scale = heard[0] / wanted[0] if policy == "mixed_float16" else 1
    close = {"rtol": 2e-2, "atol": 1e-2} if policy == "mixed_float16" else {"rtol": 1e-4}
    np.testing.assert_allclose(heard / scale, wanted, **close)


def test_of_sums_over_batches_the_mean_square_per_sample_is_estimated():
    """Gradients with a mean, of which a batch's square would be mostly made."""
    rng, size = np.random.default_rng(0), 64
    deviation, mean = np.array([1.0, 2.0, 0.5]), np.array([0.5, 0.0, -1.0])
    heard, rate = np.zeros((2, 3), "float32"), 0.01
    for _ in range(1500):
        g = mean + deviation * rng.standard_normal((size, 3))
        squares, last = of_batches(g.mean(axis=0, keepdims=True), heard, size)
        heard = np.stack([heard[0] + rate * (to_numpy(squares) - heard[0]), to_numpy(last)])
    np.testing.assert_allclose(heard[0], deviation**2 + mean**2, rtol=0.3)


@pytest.mark.parametrize("target", [30, 17, 5])
def test_the_threshold_lies_between_two_units_and_meets_the_cost(target):
    rng = np.random.default_rng(0)
    wanted = np.append(rng.standard_normal(30), [np.inf, np.inf]).astype("float32")
    above = to_numpy(balance(keras.ops.convert_to_tensor(wanted), keras.ops.sum, float(target)))
    assert (above > 0).sum() == target
    free = np.sort(above[:-2])
    assert abs(free[free > 0].min(initial=np.inf) + free[free < 0].max(initial=-np.inf)) < 1e-5 or (
        (free > 0).all()
    )


def test_slopes_of_a_polynomial_are_what_one_unit_more_costs():
    cost = Polynomial((3, 5, 7), ((0, 1), (0, -1), (1, 2)))
    counts = np.array([4, 6, 1])
    wanted = [cost(counts + step) - cost(counts) for step in np.eye(3, dtype=int)]
    found = cost.slopes(keras.ops.convert_to_tensor(counts, "float32"), 10.0)
    np.testing.assert_allclose(to_numpy(found), np.array(wanted) / 10, rtol=1e-6)


def test_a_closed_unit_comes_back_when_the_loss_misses_it():
    gated, layer = one_hidden_layer("static")
    gated.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    gated.consensus.step.assign(500)
    x, y = np.zeros((4, 3), "float32"), np.zeros((4, 2), "float32")
    worth = np.array([1e-6, 2, 3, 4, 5], "float32")
    for order in (worth, worth[::-1]):
        layer.heard.assign(order[None])
        gated.train_on_batch(x, y)
        lead = to_numpy(layer.lead)
        assert lead[np.argmin(order)] < 0 < lead[np.argmax(order)]


# --- a small network that has learned something ------------------------------------------------


def samples(count, seed):
    """Blurred patterns of six classes in noise."""
    patterns = np.random.default_rng(7).standard_normal((6, 8, 8, 1))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 6, count)
    return (patterns[y] + 1.2 * rng.standard_normal((count, 8, 8, 1))).astype("float32"), y


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(12, 3, padding="same", activation="relu", name="stem")(inputs)
    for i in range(2):
        y = layers.Conv2D(12, 3, padding="same", activation="relu", name=f"in{i}")(x)
        x = layers.Add()([x, layers.Conv2D(12, 3, padding="same", name=f"out{i}")(y)])
    x = layers.Dense(64, activation="relu", name="wide")(layers.Flatten()(x))
    model = keras.Model(inputs, layers.Dense(6, name="logits")(x))
    model.compile(keras.optimizers.Adam(3e-3), LOSS)
    model.fit(*samples(2048, 0), batch_size=64, epochs=3, verbose=0)
    return model


class Steps(keras.callbacks.Callback):
    """Not safe to be called later: then it would be given what the gates are at by then."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(dict(logs))


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["dynamic", "static"])
def test_the_gates_decide_by_themselves_and_meet_the_target_at_every_step(
    trained, gate, monkeypatch
):
    schedule = keras_polar.Schedule(warmup=0.1, ramp=0.3, settle=0.5, steps=200)
    options = {"measure": "units", "round_to": 1, "importance": "gradients"}
    gated = keras_polar.apply(trained, 0.5, gate=gate, schedule=schedule, **options)
    steps, seen = Steps(), {}
    settle = keras_polar.GatedModel.settle

    def looking(self):
        if not self.settled:
            seen["rates"] = np.concatenate([g.open_rates for g in self.groups])
            seen["own"] = np.concatenate([g.mask for g in self.groups])
        settle(self)

    monkeypatch.setattr(keras_polar.GatedModel, "settle", looking)
    gated.compile(keras.optimizers.SGD(0.005), LOSS)
    data = samples(64 * 100, 1)
    gated.fit(*data, batch_size=64, epochs=1, shuffle=False, verbose=0, callbacks=[steps])
    units = np.array(gated.budget.units)
    one = max(gated.budget.achieved(units - step) for step in np.eye(len(units), dtype=int))
    for step in range(1, 100):  # led by what the step before has told
        pressure = np.clip((step - 1 - 20) / 40, 0, 1)
        assert steps.logs[step]["sparsity"] == pytest.approx(0.5 * pressure, abs=one), step
    gated.settle()
    rates, own = seen["rates"], seen["own"]
    assert ((rates < 0.05) | (rates > 0.95)).mean() >= 0.95
    settled = np.concatenate([g.mask for g in gated.groups])
    assert (own != settled).mean() <= 0.02
    assert gated.sparsity == pytest.approx(0.5, abs=0.02)
    shares = [g.mask.mean() for g in gated.groups]
    assert max(shares) - min(shares) > 0.1  # come out of the run


def test_what_was_heard_is_saved_and_training_goes_on_equally(trained, tmp_path):
    schedule = keras_polar.Schedule(warmup=0.1, ramp=0.3, settle=0.9, steps=40)
    gated = keras_polar.apply(trained, 0.5, schedule=schedule, importance="gradients")
    gated.compile(keras.optimizers.SGD(0.01, momentum=0.9), LOSS)
    x, y = samples(64 * 20, 1)
    gated.fit(x, y, batch_size=64, epochs=1, shuffle=False, verbose=0)
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    for model in (gated, loaded):
        model.fit(x[:640], y[:640], batch_size=64, epochs=1, shuffle=False, verbose=0)
    assert any((to_numpy(g._gate.lead) < 0).any() for g in gated.groups)
    for a, b in zip(gated.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(to_numpy(b), to_numpy(a), 1e-4, 1e-6, err_msg=a.path)


# --- what gates hear beside what closing a unit really does ------------------------------------


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    noise = np.random.default_rng(0).standard_normal((len(x), 8, 8, 1))
    return (x.reshape(-1, 8, 8, 1) / 16 + 0.6 * noise).astype("float32"), y


def losses_without(gated, x, y):
    """For every group what closing each of its units alone adds to the loss."""
    groups, added = gated.groups, []

    def loss_of(group, mask):
        group.set_mask(mask)
        return float(LOSS(y, gated.predict_on_batch(x)))

    whole = [loss_of(g, np.ones(g.units, bool)) for g in groups][-1]
    for g in groups:
        added.append(
            np.array([loss_of(g, np.arange(g.units) != u) for u in range(g.units)]) - whole
        )
        g.set_mask(np.ones(g.units, bool))
    return added


def rank_correlation(a, b):
    return np.corrcoef(*(np.argsort(np.argsort(v)) for v in (a, b)))[0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["dynamic", "static"])
def test_what_is_heard_ranks_units_as_closing_each_does(gate):
    keras.utils.set_random_seed(0)
    model, (x, y) = small_resnet(classes=10), digits()
    model.compile(keras.optimizers.Adam(5e-3), LOSS)
    model.fit(x, y, batch_size=75, epochs=6, verbose=0)
    schedule = keras_polar.Schedule(warmup=0.02, ramp=0.12, settle=1.0, steps=10_000)
    options = {"measure": "macs", "round_to": 1, "schedule": schedule}
    gated = keras_polar.apply(model, 0.5, gate=gate, **options)
    gated.compile(keras.optimizers.SGD(1e-3), LOSS)
    gated.fit(x, y, batch_size=75, epochs=4, verbose=0)
    heard = [to_numpy(g._gate.heard)[0] for g in gated.groups]
    added = losses_without(gated, x, y)
    units = np.array(gated.budget.units)
    saved = [gated.budget.achieved(units - one) for one in np.eye(len(units), dtype=int)]
    inside = [rank_correlation(a, b) for a, b in zip(heard, added, strict=True)]
    assert np.mean(inside) >= 0.7
    overall = [
        np.concatenate([a / c for a, c in zip(s, saved, strict=True)]) for s in (heard, added)
    ]
    assert rank_correlation(*overall) >= 0.8
