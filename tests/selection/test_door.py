"""An importance of one's own, or one by name, ranks the units when the gates settle."""

import keras
import numpy as np
import pytest
from helpers import randomise, small_resnet

import keras_polar
from keras_polar import importances
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


class Worth(keras_polar.Importance):
    """All units of a group are worth the same."""

    name = "worth"
    is_free = True

    def __init__(self, worth, is_per_cost=False):
        self.worth, self.is_per_cost = worth, is_per_cost

    def scores(self, coupling):
        return [np.full(group.units, self.worth[group.name]) for group in coupling.groups]


def saved_by_one_unit():
    """Group -> what the network costs less without one unit of it."""
    saved = {}
    for name in [g.name for g in applied("logits", measure="macs")[1].groups]:
        _, gated = applied("logits", measure="macs")
        for group in gated.groups:
            group.set_mask(np.arange(group.units) >= (group.name == name))
        saved[name] = gated.sparsity
    return saved


def test_scores_per_cost_are_over_what_a_unit_saves():
    saved = saved_by_one_unit()
    worth = {name: share**0.5 for name, share in saved.items()}
    divided = Worth({name: worth[name] / share for name, share in saved.items()})
    found = []
    for importance in (divided, Worth(worth, is_per_cost=True), Worth(worth)):
        _, gated = applied(importance, measure="macs")
        gated.settle()
        found.append({group.name: int(group.mask.sum()) for group in gated.groups})
    assert found[0] == found[1] != found[2]


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(20, 8, 8, 1)).astype("float32"), rng.integers(0, 10, 20)


def loss_of_logits(y, outputs):
    return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)


@pytest.mark.parametrize("is_free", [True, False])
@pytest.mark.parametrize("kind", [importances.Fisher, importances.Taylor])
def test_importances_of_data(kind, is_free):
    """Units that nothing reads say nothing to the loss: they go first."""
    model = randomise(small_resnet())
    model.get_layer("block1_a_bn").beta.assign(
        np.ones(16)
    )  # a ReLU that is never open says no more
    reader, is_read = model.get_layer("block1_b"), np.arange(16) % 2
    reader.kernel.assign(to_numpy(reader.kernel) * is_read[:, None])
    importance = kind(loss_of_logits, *data(), batch_size=8)
    importance.is_free = is_free
    gated = keras_polar.apply(model, 0.3, importance=importance, round_to=1)
    gated.settle()
    (mask,) = (g.mask for g in gated.groups if g.name == "block1_a")
    assert 0 < np.sum(~mask) < 16
    assert mask[is_read == 0].sum() == 0 or mask[is_read == 1].all()
    keras_polar.convert(gated, verify=True)


def test_importances_of_data_decide_within_fit():
    _, gated = applied(importances.Fisher(loss_of_logits, *data()))
    gated.compile("sgd", loss_of_logits)
    gated.fit(*data(), batch_size=10, epochs=3, verbose=0)
    assert gated.settled
    assert abs(gated.sparsity - 0.5) < 0.02
    keras_polar.convert(gated, verify=True)


def network_with_memory():
    x = keras.Input((5, 8))
    y = keras.layers.Dense(6, activation="relu", name="front")(x)
    y = keras.layers.LSTM(4, name="memory")(y)
    y = keras.layers.Dense(7, activation="relu", name="back")(y)
    return keras.Model(x, keras.layers.Dense(2, activation="softmax")(y))


def test_of_ignored_layers_nothing_is_asked():
    """The remedy that the refusal of hidden units names; and groups are those with gates."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 5, 8)).astype("float32"), rng.integers(0, 2, 6)
    fisher = importances.Fisher(keras.losses.sparse_categorical_crossentropy, x, y)
    model = network_with_memory()
    with pytest.raises(ValueError, match=r"ignore=\['memory'\]"):
        keras_polar.apply(model, 0.3, importance=fisher).settle()
    gated = keras_polar.apply(model, 0.05, importance=fisher, ignore=["memory"], round_to=1)
    gated.settle()
    small = keras_polar.convert(gated, verify=True)
    assert small.get_layer("memory").units == 4
    assert small.count_params() < model.count_params()


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
