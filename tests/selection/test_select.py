"""From scores to masks: exact to the unit, floors and multiples respected."""

import dataclasses
import re

import keras
import numpy as np
import pytest
from helpers import small_resnet
from keras import layers

import keras_polar
from keras_polar.costs.polynomial import Polynomial
from keras_polar.selection.budget import Budget
from keras_polar.selection.select import rank_units, select_units

CHAIN = Polynomial((3, 1, 5), ((0, -1), (0, 1), (1, -1)))  # 3a + ab + 5b


def budget(sparsity, units=(40, 60), floors=(1, 1), cost=CHAIN, **options):
    return Budget(cost, units, sparsity, floors, **options)


def kept(scores, found):
    return [int(mask.sum()) for mask in select_units(scores, found)]


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_least_wanted_units_go_until_the_budget_is_met(sparsity):
    rng = np.random.default_rng(0)
    scores, wanted = [rng.random(40), rng.random(60)], budget(sparsity)
    masks = select_units(scores, wanted)
    assert wanted.distance(np.array(kept(scores, wanted))) <= 0.005
    for mask, own in zip(masks, scores, strict=True):
        assert own[mask].min() > own[~mask].max()


def test_ties_do_not_overshoot():
    wanted = budget(0.5)
    assert wanted.distance(np.array(kept([np.ones(40), np.ones(60)], wanted))) <= 0.01


@pytest.mark.parametrize("round_to", [1, 4, 8, 16])
def test_kept_counts_are_multiples(round_to):
    rng = np.random.default_rng(1)
    cost = Polynomial(tuple(rng.integers(1, 9, 60)), tuple((i % 30, i * 7 % 30) for i in range(60)))
    wanted = budget(0.5, (64,) * 30, (1,) * 30, cost, round_to=round_to)
    counts = kept([rng.random(64) for _ in range(30)], wanted)
    assert all(n % round_to == 0 for n in counts)
    assert wanted.distance(np.array(counts)) <= 0.01


def test_floors_hold():
    scores = [np.linspace(0, 0.1, 40), np.linspace(0.9, 1, 60)]  # the first group wants to go
    assert kept(scores, budget(0.9))[0] == 1
    assert kept(scores, budget(0.9, floors=(12, 1)))[0] == 12


def test_infinite_scores_are_kept_and_minus_infinity_goes_first():
    scores = [np.where(np.arange(40) < 30, np.inf, -np.inf), np.ones(60)]
    first, _ = select_units(scores, budget(0.5))
    assert first.tolist() == [True] * 30 + [False] * 10


def test_a_step_that_overshoots_is_passed_over():
    """A branch with half of the cost, least wanted but too dear: channels go instead."""
    cost = Polynomial((50, 1), ((0,), (1,)))
    scores = [np.array([0.1]), np.linspace(0.2, 1, 50)]
    assert kept(scores, budget(0.3, (1, 50), (0, 1), cost)) == [1, 20]
    assert kept(scores, budget(0.5, (1, 50), (0, 1), cost)) == [0, 50]
    assert kept(scores, budget(0.6, (1, 50), (0, 1), cost)) == [0, 40]


# --- what every group gives ---------------------------------------------------------------------


def open_gates(*units):
    """Scores in [0, 1) and gates of which none is closed."""
    rng = np.random.default_rng(2)
    return [rng.random(n) for n in units], [np.zeros(n, bool) for n in units]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_every_group_gives_the_same_share(sparsity):
    """Whatever its units cost, and on whatever scale its scores are."""
    priced = Polynomial((9, 1), ((0,), (1,)))
    found = budget(sparsity, (1000, 500), (1, 1), priced)
    scores, is_closed = open_gates(1000, 500)
    masks = select_units(rank_units([10 * scores[0], scores[1] - 3], is_closed, found), found)
    for mask, own in zip(masks, scores, strict=True):
        assert mask.mean() == pytest.approx(1 - sparsity, abs=0.003)
        assert own[mask].min() > own[~mask].max()


def test_what_the_gates_have_closed_goes_first():
    scores, is_closed = open_gates(40, 60)
    is_closed[1][scores[1] < 0.5] = True
    ranked = rank_units(scores, is_closed, budget(0.5))
    assert ranked[1][is_closed[1]].max() < min(
        r[~c].min() for r, c in zip(ranked, is_closed, strict=True)
    )


def test_branches_are_compared_with_one_another():
    cost = Polynomial((1, 900, 100), ((0,), (1,), (2,)))
    scores, is_closed = open_gates(60, 1, 1)
    kinds = ("channels", "branch", "branch")
    found = dataclasses.replace(budget(0.1, (60, 1, 1), (1, 0, 0), cost), kinds=kinds)
    _, first, second = rank_units([scores[0], np.ones(1), np.zeros(1)], is_closed, found)
    assert first == 0.75
    assert second == 0.25
    only = budget(0.1, (1, 1), (0, 0), Polynomial((900, 100), ((0,), (1,))))
    only = dataclasses.replace(only, kinds=kinds[1:])
    assert np.concatenate(rank_units([np.ones(1), np.zeros(1)], is_closed[1:], only)).argmin() == 1


# --- options of apply -------------------------------------------------------------------------


def floors(model, sparsity=0.3, **options):
    gated = keras_polar.apply(model, sparsity, **options)
    return dict(zip((g.name for g in gated.groups), gated.budget.floors, strict=True))


def two_layers():
    x = keras.Input((8,))
    y = layers.Dense(50, name="second")(layers.Dense(20, name="first")(x))
    return keras.Model(x, layers.Dense(2, name="head")(y))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (4, 9)),  # a quarter of 0.7
        ({"min_units": 6}, (6, 9)),
        ({"max_sparsity": 1.0}, (1, 1)),
        ({"max_sparsity": 0.6}, (8, 20)),
        ({"max_sparsity": {"first": 0.7}}, (6, 9)),
        ({"max_sparsity": {"first": 0, "*": 0.6}}, (20, 20)),
        ({"max_sparsity": 0.6, "min_units": 30}, (20, 30)),
    ],
)
def test_floors_of_apply(options, wanted):
    assert tuple(floors(two_layers(), **options).values()) == wanted


def test_a_group_that_all_want_to_close_keeps_its_floor():
    limits = {"max_sparsity": {"first": 0.8}, "round_to": 1}
    gated = keras_polar.apply(two_layers(), 0.75, gate="static", **limits)
    first = gated.groups[0]
    first._gate.open_rates.assign(np.zeros(20, "float32"))
    first._gate.scores.assign(np.zeros(20, "float32"))
    assert first.mask.sum() >= 4
    gated.settle()
    assert first.mask.sum() == 4
    assert abs(gated.sparsity - 0.75) <= 0.01


@pytest.mark.parametrize("gate", ["static", "dynamic"])
@pytest.mark.parametrize("importance", ["logits", "gradients"])
def test_a_group_does_not_collapse_while_it_trains(importance, gate):
    options = {"max_sparsity": 0.8, "importance": importance}
    gated = keras_polar.apply(two_layers(), 0.5, gate=gate, **options)
    x = np.random.default_rng(0).random((6, 8)).astype("float32")
    layer = gated.groups[0]._gate
    layer.scores.assign(np.linspace(0, 1, 20))
    layer.bias.assign(np.full(20, -1.0))  # closed, all of them
    if importance == "gradients":
        layer.lead.assign(np.linspace(-1, -0.1, 20))
        layer.pressure = None
    found = keras.ops.convert_to_numpy(layer(x, training=True))
    np.testing.assert_array_equal(found, np.tile(np.arange(20) >= 16, (len(found), 1)))


def test_protection_gives_way_to_the_request():
    with pytest.raises(ValueError, match=r"at most 0\.846"):
        keras_polar.apply(two_layers(), 0.85, ignore="first")
    with pytest.warns(UserWarning, match="usually stays"):
        gated = keras_polar.apply(two_layers(), 0.84, ignore="first")
    assert gated.budget.floors == (1,)  # two, if a quarter of the rest stayed


def test_a_group_below_its_usual_floor_is_named_and_the_remedies_work():
    model = two_layers()
    with pytest.warns(UserWarning, match="usually stays") as found:
        gated = keras_polar.apply(model, 0.84, ignore="first")
    (text,) = (str(w.message) for w in found if w.category is UserWarning)
    assert "second (1 of 50 units would stay, usually 2 at least)" in text
    gated.settle()
    assert gated.groups[0].mask.sum() == 1
    lower = float(re.search(r"up to ([\d.]+) they keep it", text)[1])
    keras_polar.apply(model, lower, ignore="first")  # warnings are errors
    assert lower > 0.8
    meant = keras_polar.apply(model, 0.84, ignore="first", max_sparsity=1.0)
    assert meant.budget.floors == gated.budget.floors
    keras_polar.apply(model, 0.84, ignore="first", max_sparsity={"second": 1.0})


def test_no_warning_as_long_as_the_usual_floors_hold():
    for sparsity in (0.1, 0.5, 0.9):
        keras_polar.apply(two_layers(), sparsity)


def test_only_groups_that_the_user_did_not_limit_are_warned_of():
    with pytest.warns(UserWarning, match="usually stays") as found:
        keras_polar.apply(two_layers(), 0.84, max_sparsity={"first": 0.0})
    (text,) = (str(w.message) for w in found if w.category is UserWarning)
    assert "second (" in text
    assert "first (" not in text


@pytest.mark.parametrize("value", [1.5, -0.1, "half", {"first": 2}, True])
def test_bad_max_sparsity(value):
    with pytest.raises(ValueError, match="max_sparsity"):
        keras_polar.apply(two_layers(), 0.3, max_sparsity=value)


def test_max_sparsity_of_no_layer():
    with pytest.raises(ValueError, match=r"max_sparsity.*'third'.*first, head, second"):
        keras_polar.apply(two_layers(), 0.3, max_sparsity={"third": 0.5})


@pytest.mark.parametrize("round_to", [4, 8])
def test_round_to_after_settling(round_to):
    gated = keras_polar.apply(small_resnet(widths=(32, 64)), 0.5, round_to=round_to)
    gated.settle()
    assert all(g.mask.sum() % round_to == 0 for g in gated.groups)
    assert abs(gated.sparsity - 0.5) <= 0.01


def test_the_default_rounds_as_coarsely_as_the_target_allows():
    scores = [np.random.default_rng(i).random(64) for i in range(30)]
    each = Polynomial((1,) * 30, tuple((i, -1) for i in range(30)))
    wide = budget(0.5, (64,) * 30, (1,) * 30, each, round_to=None)
    assert all(n % 8 == 0 for n in kept(scores, wide))
    single = budget(0.45, (64,), (1,), Polynomial((1,), ((0, -1),)), round_to=None)
    assert kept(scores[:1], single) == [35]  # 32 and 40 would miss the target by points


def test_masks_set_by_hand_are_not_rounded():
    gated = keras_polar.apply(small_resnet(widths=(32, 64)), 0.5, round_to=8)
    gated.groups[0].set_mask(np.arange(32) < 5)
    gated.settle()
    assert gated.groups[0].mask.sum() == 5
    assert abs(gated.sparsity - 0.5) < 0.05
