"""Groups that keep equally many units, whatever decides about them."""

import json

import keras
import numpy as np
import pytest
from helpers import quick, small_resnet
from keras import layers

import keras_polar
from keras_polar.costs.polynomial import Polynomial
from keras_polar.gates.listening import as_blocks
from keras_polar.selection.budget import Budget
from keras_polar.selection.select import select_units
from keras_polar.surgery.certificate import difference, random_inputs

SOON = keras_polar.Schedule(warmup=0.1, ramp=0.4, settle=0.6)


def mlp(widths=(32, 32, 24)):
    x = inputs = keras.Input((8,))
    for i, width in enumerate(widths):
        x = layers.Dense(width, activation="relu", name=f"hidden{i}")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="mlp")


def residual_mlp(blocks=3, width=24):
    x = layers.Dense(16, name="stem")(keras.Input((8,)))
    inputs = x._keras_history.operation.input
    for i in range(blocks):
        y = layers.Dense(width, activation="relu", name=f"block{i}_in")(x)
        x = layers.Add()([x, layers.Dense(16, name=f"block{i}_out")(y)])
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="residual_mlp")


def same_width_resnet():
    return small_resnet(widths=(16, 16))


MODELS = {"mlp": (mlp, "hidden[01]"), "resnet": (same_width_resnet, "block*_a")}
MODELS["residual"] = (residual_mlp, "block*_in")


def counts_of(gated):
    return {g.name: int(g.mask.sum()) for g in gated.groups}


def tied_counts(gated):
    kept = counts_of(gated)
    return [kept[name] for tied in gated.consensus.equal for name in tied]


def fitted(gated, epochs=3):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, *gated.input_shape[1:])).astype("float32")
    y = rng.integers(0, 3, 48)
    gated.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    gated.fit(x, y, batch_size=16, epochs=epochs, verbose=0)
    return gated


KINDS = ("gradients", "logits", "l1_norm", "group_norm")
EVERY = [(n, g, i) for n in MODELS for g in ("static", "dynamic") for i in KINDS]
QUICK = (("residual", "static", "gradients"), ("mlp", "dynamic", "logits"))


@pytest.mark.parametrize(("name", "gate", "importance"), quick(QUICK, EVERY))
def test_trained_to_equal_counts_and_to_the_budget(name, gate, importance):
    make, pattern = MODELS[name]
    keras.utils.set_random_seed(0)
    model = make()
    options = {"gate": gate, "importance": importance, "schedule": SOON}
    gated = fitted(keras_polar.apply(model, 0.4, equal=[pattern], **options))
    kept = tied_counts(gated)
    assert len(kept) == len(gated.consensus.equal[0]) > 1
    assert len(set(kept)) == 1
    assert kept[0] < gated.consensus.groups[gated.consensus.equal[0][0]]
    small = keras_polar.convert(gated)
    assert difference(gated, small, random_inputs(model)) <= 1e-4
    assert small.count_params() == round((1 - gated.sparsity) * model.count_params())
    assert abs(gated.sparsity - 0.4) <= 0.05


def test_without_it_counts_differ():
    keras.utils.set_random_seed(0)
    model = residual_mlp()
    free = keras_polar.apply(model, 0.4, gate="static", importance="group_norm", round_to=1)
    model.get_layer("block0_in").kernel.assign(model.get_layer("block0_in").kernel * 3)
    model.get_layer("block0_in").bias.assign(np.linspace(0, 1, 24))
    free = keras_polar.apply(model, 0.4, gate="static", importance="group_norm", round_to=1)
    free.settle()
    kept = counts_of(free)
    assert len({kept[f"block{i}_in"] for i in range(3)}) > 1


@pytest.mark.parametrize("round_to", [None, 1, 4, 8])
def test_rounding_and_floors_hold_for_blocks(round_to):
    options = {"gate": "static", "importance": "l1_norm", "round_to": round_to}
    limits = {"max_sparsity": {"block1_in": 0.25, "*": 0.9}}
    gated = keras_polar.apply(residual_mlp(), 0.2, equal="block*_in", **options, **limits)
    assert len(set(gated.budget.floors[1:])) == 1  # that of the one that keeps most
    gated.settle()
    (kept,) = set(tied_counts(gated))
    assert kept >= 18
    assert kept % (round_to or 1) == 0


def test_which_units_stay_differs_by_group():
    model = residual_mlp(2)
    orders = [np.arange(24), np.arange(24)[::-1]]
    for i, order in enumerate(orders):
        layer = model.get_layer(f"block{i}_in")
        layer.kernel.assign(np.ones((16, 1)) * (1.0 + order))
    options = {"gate": "static", "importance": "l1_norm", "ignore": "stem"}
    gated = keras_polar.apply(model, 0.4, equal=["block*_in"], round_to=1, **options)
    gated.settle()
    first, second = (g.mask for g in gated.groups)
    assert first.sum() == second.sum() < 24
    np.testing.assert_array_equal(first, second[::-1])
    assert first[-1]


def test_a_block_is_wanted_as_its_units_are_for_what_they_cost():
    """Scores over costs 3/1 and 1/9: the block is worth (3 + 1) / 10, less than 0.5 of others."""
    cost = Polynomial((1, 9, 10), ((0,), (1,), (2,)))
    scores = [np.full(10, 3.0), np.full(10, 1 / 9), np.full(10, 0.5)]
    budget = Budget(cost, (10, 10, 10), 0.25, (1, 1, 1), equal=((0, 1),))
    assert [int(m.sum()) for m in select_units(scores, budget)] == [5, 5, 10]
    scores[2] = np.full(10, 0.3)
    assert [int(m.sum()) for m in select_units(scores, budget)] == [10, 10, 5]


def test_counts_of_a_block_are_multiples_of_its_own_step():
    cost = Polynomial((1, 1, 1), ((0,), (1,), (2,)))
    scores = [np.arange(12.0), np.arange(12.0), 6 + np.arange(10.0)]
    equal = {"round_to": (4, 4, 1), "equal": ((0, 1),)}
    budget = Budget(cost, (12, 12, 10), 0.3, (1, 1, 1), **equal)
    kept = [int(m.sum()) for m in select_units(scores, budget)]
    assert kept == [8, 8, 8]
    scores[2][:2] = -np.inf  # that group is decided, and not rounded
    assert [int(m.sum()) for m in select_units(scores, budget)] == [8, 8, 8]


def test_blocks_of_gates_are_worth_what_all_their_units_are():
    worth = np.array([[0.0, 2.0, np.inf, 1.0], [5.0, np.inf, -3.0, 0.5]], "float32")
    found = as_blocks(list(worth), np.array([1.0, 3.0], "float32"))
    found = np.stack([keras.ops.convert_to_numpy(x) for x in found])
    blocks = [np.inf, *(np.log(np.exp(a) + 3 * np.exp(b)) - np.log(4) for a, b in ((2, 5),))]
    blocks += [np.log((np.exp(a) + 3 * np.exp(b)) / 4) for a, b in ((1, 0.5), (0, -3))]
    np.testing.assert_allclose(found[0], np.array(blocks)[[3, 1, 0, 2]], rtol=1e-5)
    np.testing.assert_allclose(found[1], np.array(blocks)[[1, 0, 3, 2]], rtol=1e-5)


def test_gates_are_led_to_equal_counts_before_they_settle():
    keras.utils.set_random_seed(0)
    late = keras_polar.Schedule(settle=0.99)
    gated = keras_polar.apply(
        residual_mlp(), 0.5, gate="static", equal=["block*_in"], schedule=late
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 8)).astype("float32"), rng.integers(0, 3, 64)
    gated.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: led.append(
            [int((keras.ops.convert_to_numpy(g._gate.lead) >= 0).sum()) for g in gated.groups[1:]]
        )
    )
    led = []
    gated.fit(x, y, batch_size=8, epochs=8, verbose=0, callbacks=[stop])
    assert min(led)[0] < 24
    assert all(len(set(kept)) == 1 for kept in led)


def test_files_hold_what_is_tied(tmp_path):
    gated = keras_polar.apply(residual_mlp(), 0.4, gate="static", equal=["block*_in"])
    gated.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    assert loaded.budget.equal == gated.budget.equal == ((1, 2, 3),)
    loaded.settle()
    assert len(set(tied_counts(loaded))) == 1
    plain = keras_polar.apply(residual_mlp(), 0.4, gate="static")
    assert "equal" not in json.dumps(plain.consensus.get_config())


def test_patterns_with_a_group_in_common_tie_as_one():
    patterns = ["block[01]_in", "block[12]_in"]
    gated = keras_polar.apply(residual_mlp(4), 0.4, gate="static", equal=patterns)
    assert gated.consensus.equal == (("block0_in", "block1_in", "block2_in"),)


def test_kinds_of_units_of_one_layer_have_names_of_their_own():
    x = inputs = keras.Input((6, 16))
    for i in range(2):
        attended = layers.MultiHeadAttention(4, 8, name=f"attention{i}")(x, x)
        x = layers.Add()([x, attended])
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))
    gated = keras_polar.apply(model, 0.3, gate="static", equal=["attention*.q"])
    assert gated.consensus.equal == (("attention0.q", "attention1.q"),)
    with pytest.raises(ValueError, match=r"one size, but 'attention\*' ties 'attention0\.q' "):
        keras_polar.apply(model, 0.3, equal=["attention*"])


def test_masks_set_by_hand_say_how_many_stay():
    gated = keras_polar.apply(residual_mlp(), 0.3, gate="static", equal=["block*_in"], round_to=8)
    gated.groups[2].set_mask(np.arange(24) < 7)
    gated.settle()
    assert tied_counts(gated) == [7, 7, 7]
    gated = keras_polar.apply(residual_mlp(), 0.3, gate="static", equal=["block*_in"])
    gated.groups[2].set_mask(np.arange(24) < 7)
    gated.groups[3].set_mask(np.arange(24) < 9)
    with pytest.raises(ValueError, match=r"equally many.*7 of 'block1_in', 9 of 'block2_in'"):
        gated.settle()


@pytest.mark.parametrize(
    ("pattern", "error", "match"),
    [
        ("nowhere*", ValueError, r"equal: .*'nowhere\*' matches none\. Layers with units"),
        ([3], TypeError, "equal: expected a list of names or glob patterns"),
        ("hidden*", ValueError, r"one size.*'hidden0' \(32 units\).*'hidden2' \(24 units\)"),
        ("head", ValueError, "equal: 'head' matches layer 'head', all units of which stay: is an"),
    ],
)
def test_what_cannot_be_tied(pattern, error, match):
    with pytest.raises(error, match=match):
        keras_polar.apply(mlp(), 0.3, equal=pattern)


def test_low_floors_are_told_of_as_without_ties():
    with pytest.warns(UserWarning, match="usually stays"):
        keras_polar.apply(residual_mlp(2), 0.83, equal=["block*_in"], ignore="stem")
