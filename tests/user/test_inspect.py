"""`inspect` says how much of a model can go, and its numbers are what `remove` achieves."""

import keras
import pytest
from helpers import small_resnet
from keras import layers

import keras_polar


def test_prunable_shares_are_what_is_gone_when_every_group_keeps_one_unit():
    model = small_resnet()
    found = keras_polar.inspect(model)
    gated = keras_polar.apply(model, gate="static")
    cut = {g.layers[0]: range(1, g.units) for g in gated.groups}
    before, after = keras_polar.cost(model), keras_polar.cost(keras_polar.remove(model, cut))
    assert found.prunable_weights == pytest.approx(1 - after.weights / before.weights)
    assert found.prunable_macs == pytest.approx(1 - after.macs / before.macs)


def test_prunable_weights_is_the_largest_sparsity_that_apply_accepts():
    model = small_resnet()
    most = keras_polar.inspect(model).prunable_weights
    keras_polar.apply(model, most - 1e-6, gate="static")
    with pytest.raises(ValueError, match="cannot be reached"):
        keras_polar.apply(model, most + 1e-6, gate="static")


@pytest.mark.parametrize("gate", ["static", "dynamic"])
def test_gates_change_neither_what_can_go_nor_what_a_model_costs(gate):
    model = small_resnet()
    gated = keras_polar.apply(model, 0.5, gate=gate)
    assert keras_polar.inspect(gated).rows == keras_polar.inspect(model).rows
    assert keras_polar.cost(gated).rows == keras_polar.cost(model).rows


def test_branches_that_can_go_are_listed():
    model = small_resnet()
    branches = keras_polar.inspect(model).branches
    assert [names[::2] for names in branches] == [
        ("block0_a", "block0_b"),
        ("block1_a", "block1_b"),
    ]
    assert len(keras_polar.inspect(model, ignore="block0_a").branches) == 1
    assert "as a whole: 2" in " ".join(str(keras_polar.inspect(model)).split())


def test_nothing_is_prunable_in_a_model_of_outputs_only():
    found = keras_polar.inspect(keras.Sequential([keras.Input((4,)), layers.Dense(3)]))
    assert found.prunable == found.prunable_weights == found.prunable_macs == 0


def test_ignored_layers_lower_the_prunable_shares():
    model = small_resnet()
    free, held = keras_polar.inspect(model), keras_polar.inspect(model, ignore=["block1_*"])
    assert held.prunable_weights < free.prunable_weights
    assert held.prunable_macs < free.prunable_macs


def test_a_model_without_multiplications_has_no_macs_to_lose():
    model = keras.Sequential([keras.Input((4,)), keras.layers.ReLU()])
    assert keras_polar.inspect(model).prunable_macs == 0
