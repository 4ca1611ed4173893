"""Scores of units: by weights, and by gradients that are checked against differences."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_polar.backends import to_numpy
from keras_polar.costs.measures import MEASURES, cost_of
from keras_polar.coupling.coupling import analyze
from keras_polar.selection import importance
from keras_polar.selection.budget import budget_of
from keras_polar.training.probes import gate_gradients, probed


def network():
    """A residual stream (stem, out), the inside of a block with a depthwise layer, and a head."""
    inputs = keras.Input((4, 4, 3))
    stem = layers.BatchNormalization(name="stem_bn")(layers.Conv2D(5, 3, name="stem")(inputs))
    x = layers.Conv2D(6, 1, use_bias=False, name="inside")(layers.ReLU()(stem))
    x = layers.BatchNormalization(name="inside_bn")(x)
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(x)
    x = layers.BatchNormalization(name="depthwise_bn")(x)
    x = layers.Conv2D(5, 1, use_bias=False, name="out")(layers.ReLU()(x))
    x = layers.Add()([stem, layers.BatchNormalization(name="out_bn")(x)])
    outputs = layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    rng = np.random.default_rng(0)
    for v in model.weights:
        values = rng.normal(size=v.shape)
        v.assign(np.abs(values) + 0.1 if "variance" in v.path else values)
    return model


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def coupling(model):
    return analyze(model)


def by_name(coupling, scores):
    return dict(zip([g.name for g in coupling.groups], scores, strict=True))


def scaled(*layers_scores):
    return sum(s / s.mean() for s in layers_scores)


def test_l1_norm_is_that_of_the_kernels_that_make_the_unit(model, coupling):
    found = by_name(coupling, importance.l1_norm(coupling))
    norm = {n: np.abs(to_numpy(model.get_layer(n).kernel)).sum((0, 1, 2)) for n in ("stem", "out")}
    np.testing.assert_allclose(found["stem"], scaled(*norm.values()), rtol=1e-5)
    inside = np.abs(to_numpy(model.get_layer("inside").kernel)).sum((0, 1, 2))
    np.testing.assert_allclose(found["inside"], scaled(inside), rtol=1e-5)


def test_group_norm_is_that_of_all_that_must_be_zero(model, coupling):
    """Kernel, bias, scale and offset; a depthwise layer's too, which makes no units of its own."""

    def squares(name, *variables):
        weights = [to_numpy(getattr(model.get_layer(name), v)) for v in variables]
        return sum(np.square(w).reshape(-1, w.shape[-1]).sum(0) for w in weights)

    stem = squares("stem", "kernel", "bias") + squares("stem_bn", "gamma", "beta")
    out = squares("out", "kernel") + squares("out_bn", "gamma", "beta")
    found = by_name(coupling, importance.group_norm(coupling))
    np.testing.assert_allclose(found["stem"], scaled(*map(np.sqrt, (stem, out))), rtol=1e-5)
    depthwise = np.square(to_numpy(model.get_layer("depthwise").kernel)).sum((0, 1, 3))
    inside = squares("inside", "kernel") + squares("inside_bn", "gamma", "beta")
    inside += depthwise + squares("depthwise_bn", "gamma", "beta")
    np.testing.assert_allclose(found["inside"], scaled(np.sqrt(inside)), rtol=1e-5)


def test_batch_norm_scale(model, coupling):
    found = by_name(coupling, importance.batch_norm_scale(coupling))
    gamma = {n: np.abs(to_numpy(model.get_layer(f"{n}_bn").gamma)) for n in ("stem", "out")}
    np.testing.assert_allclose(found["stem"], scaled(*gamma.values()), rtol=1e-5)


def test_density_is_the_share_of_a_normal_above_zero(model, coupling):
    for name, gamma, beta in (("stem_bn", 2.0, 3.0), ("out_bn", 1.0, 0.0)):
        model.get_layer(name).gamma.assign([gamma, *(4 * [1.0])])
        model.get_layer(name).beta.assign([beta, *(4 * [0.0])])
    found = by_name(coupling, importance.density(coupling))["stem"]
    assert found[0] / found[1] == pytest.approx(
        (0.9332 / (0.9332 + 4 * 0.5) * 5 + 1) / (0.5 / (0.9332 + 4 * 0.5) * 5 + 1), rel=0.01
    )


@pytest.mark.parametrize("criterion", [importance.batch_norm_scale, importance.density])
def test_units_without_batch_norm_have_no_scale(criterion):
    x = keras.Input((4,))
    y = layers.Dense(2)(layers.Dense(3, name="bare")(x))
    with pytest.raises(ValueError, match=r"'bare'.*l1_norm"):
        criterion(analyze(keras.Model(x, y)))


def test_a_shared_layer_counts_once():
    x, shared = keras.Input((3,)), layers.Dense(3, use_bias=False, name="shared")
    head = layers.Dense(2)(layers.Add()([shared(x), shared(2 * x)]))
    coupling = analyze(keras.Model(x, head))
    (found,) = importance.l1_norm(coupling)
    assert found.mean() == pytest.approx(1)


def test_heads_of_attention_have_scores():
    x = keras.Input((5, 8))
    y = layers.MultiHeadAttention(4, 2, name="attention")(x, x)
    coupling = analyze(keras.Model(x, layers.Dense(2)(y)))
    assert coupling.groups
    for scores, group in zip(importance.l1_norm(coupling), coupling.groups, strict=True):
        assert scores.shape == (group.units,)
        assert (scores > 0).all()


def test_chance_is_the_same_for_a_seed(coupling):
    first, again, other = (importance.at_random(coupling, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_scores_per_cost_are_over_what_a_unit_saves(coupling):
    options = {"min_units": 1, "max_sparsity": None, "round_to": 1}
    cost = cost_of(coupling, MEASURES["macs"])
    budget = budget_of(coupling, (), cost, sparsity=0.5, measure="macs", **options)
    ones = [np.ones(g.units) for g in coupling.groups]
    found = importance.per_cost(ones, budget)
    # macs of the 4 positions after a valid 3x3 convolution of 3 channels
    stem, inside, out, depthwise, head = 4 * 27, 4 * 5, 4 * 6, 4 * 9, 3
    saved = {"stem": stem + 4 * 6 + out + head, "inside": inside + depthwise + 4 * 5}
    for name, scores in by_name(coupling, found).items():
        np.testing.assert_allclose(1 / scores, saved[name])


# --- gradients of gates ------------------------------------------------------------------------


def squared(y, outputs):
    return keras.ops.sum(keras.ops.square(keras.ops.subtract(y, outputs)), axis=-1)


def samples(n):
    rng = np.random.default_rng(1)
    return rng.normal(size=(n, 4, 4, 3)).astype("float32"), rng.normal(size=(n, 3)).astype(
        "float32"
    )


def test_probes_of_one_change_nothing(model, coupling):
    x, _ = samples(3)
    ones = [np.ones((3, g.units), "float32") for g in coupling.groups]
    outputs = to_numpy(probed(coupling)([x, ones]))
    np.testing.assert_allclose(outputs, to_numpy(model(x)), rtol=1e-4, atol=1e-5)


def test_gate_gradients_are_those_of_each_sample(coupling):
    """Against central differences; in batches of which the last is smaller."""
    x, y = samples(5)
    found = gate_gradients(coupling, squared, x, y, batch_size=2)
    model, step = probed(coupling), 1e-2
    for i, group in enumerate(coupling.groups):
        for unit in (0, group.units - 1):
            sides = []
            for way in (step, -step):
                probes = [np.ones((5, g.units), "float32") for g in coupling.groups]
                probes[i][:, unit] += way
                sides.append(to_numpy(squared(y, model([x, probes]))))
            expected = (sides[0] - sides[1]) / (2 * step)
            atol = 0.02 * np.abs(expected).max()
            np.testing.assert_allclose(found[i][:, unit], expected, atol=atol)


def test_gradients_of_a_batch_are_sums_of_the_samples(coupling):
    """Fisher sums squares, Taylor absolute values, of single samples: batches change nothing."""
    x, y = samples(4)
    alone = gate_gradients(coupling, squared, x, y, batch_size=1)
    whole = gate_gradients(coupling, squared, x, y)
    for criterion, of in ((importance.fisher, np.square), (importance.taylor, np.abs)):
        for a, b in zip(criterion(whole), alone, strict=True):
            np.testing.assert_allclose(a, of(b).sum(0), rtol=1e-3)


def test_several_inputs_and_outputs():
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    x = layers.Concatenate()([layers.Dense(5)(a), layers.Dense(6)(b)])
    model = keras.Model({"a": a, "b": b}, [layers.Dense(1)(x), layers.Dense(2)(x)])
    coupling = analyze(model)
    x = {"a": np.ones((3, 3), "float32"), "b": np.ones((3, 4), "float32")}
    y = [np.zeros((3, 1), "float32"), np.zeros((3, 2), "float32")]

    def loss(y, outputs):
        return squared(y[0], outputs[0]) + squared(y[1], outputs[1])

    found = gate_gradients(coupling, loss, x, y)
    assert [g.shape for g in found] == [(3, 5), (3, 6)]
    assert all(np.abs(g).sum() > 0 for g in found)


def test_units_that_are_masked_on_weights_have_no_gradient_per_sample():
    x = keras.Input((5, 3))
    model = keras.Model(x, layers.Dense(2)(layers.LSTM(4, name="memory")(x)))
    with pytest.raises(ValueError, match=r"'memory'.*ignore=\['memory'\]"):
        probed(analyze(model))
