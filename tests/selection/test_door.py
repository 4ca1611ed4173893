"""An importance of one's own, or one by name, ranks the units when the gates settle."""

import keras
import numpy as np
import pytest
from helpers import randomise, small_resnet

import keras_polar
from keras_polar.backends import to_numpy


class Preferring(keras_polar.Importance):
    """Later units matter more."""

    name = "preferring_later"

    def scores(self, coupling):
        return [np.arange(group.units) for group in coupling.groups]


def applied(importance, **options):
    model = randomise(small_resnet())
    return model, keras_polar.apply(model, 0.5, importance=importance, round_to=1, **options)


def test_an_importance_of_ones_own_decides():
    _, gated = applied(Preferring())
    gated.settle()
    for group in gated.groups:
        kept = np.flatnonzero(group.mask)
        np.testing.assert_array_equal(kept, np.arange(group.units)[-len(kept) :])
    assert abs(gated.sparsity - 0.5) < 0.02
    keras_polar.convert(gated, verify=True)


def test_l1_norm_keeps_the_largest_filters():
    model, gated = applied("l1_norm")
    gated.settle()
    group = min(gated.groups, key=lambda g: len(g.layers))
    assert len(group.layers) == 1
    kernel = to_numpy(model.get_layer(group.layers[0]).kernel)
    norms = np.abs(kernel).reshape(-1, group.units).sum(axis=0)
    assert norms[group.mask].min() >= norms[~group.mask].max()


def test_free_importances_choose_the_shares_of_groups():
    _, gated = applied("group_norm")
    gated.settle()
    shares = [g.mask.mean() for g in gated.groups]
    assert max(shares) - min(shares) > 0.05
    assert abs(gated.sparsity - 0.5) < 0.02


def test_branches_are_ranked_by_their_gates():
    _, gated = applied("l1_norm", granularity=("channels", "blocks"))
    gated.settle()
    keras_polar.convert(gated, verify=True)


def test_saved_by_name_and_as_an_object(tmp_path):
    _, by_name = applied("l1_norm")
    by_name.save(tmp_path / "name.keras")
    keras.models.load_model(tmp_path / "name.keras").settle()
    _, own = applied(Preferring())
    own.save(tmp_path / "own.keras")
    loaded = keras.models.load_model(tmp_path / "own.keras")
    with pytest.raises(ValueError, match=r"preferring_later.*criterion"):
        loaded.settle()
    loaded.consensus.criterion = Preferring()
    loaded.settle()


def test_bad_importances():
    with pytest.raises(ValueError, match="importance to be one of"):
        applied("magic")
    with pytest.raises(NotImplementedError, match="scores"):
        applied(keras_polar.Importance())[1].settle()

    class Short(Preferring):
        def scores(self, coupling):
            return [np.zeros(1)]

    with pytest.raises(ValueError, match="expected arrays of shapes"):
        applied(Short())[1].settle()
