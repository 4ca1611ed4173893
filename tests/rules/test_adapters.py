"""Adapters of low rank (LoRA): a frozen kernel and its two factors are cut along."""

import keras
import numpy as np
import pytest
from helpers import check, randomise
from keras import layers

import keras_polar
from keras_polar.backends import to_numpy

RNG = np.random.default_rng(0)
SHAPES = {"image": (8, 8, 3), "text": (6,), "plain": (5, 8)}


def image():
    inputs = keras.Input(SHAPES["image"])
    x = layers.Conv2D(8, 3, activation="relu", name="first")(inputs)
    x = layers.Conv2D(8, 3, groups=2, name="second")(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def text():
    inputs = keras.Input(SHAPES["text"], dtype="int32")
    x = layers.Embedding(20, 8, name="first")(inputs)
    x = layers.EinsumDense("abc,cde->abde", (6, 4, 6), bias_axes="de", name="second")(x)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def plain():
    inputs = keras.Input(SHAPES["plain"])
    x = layers.Dense(12, activation="relu", name="first")(inputs)
    x = layers.Dense(10, name="second")(x)
    return keras.Model(inputs, layers.Dense(3)(x))


def with_adapters(model):
    """Adapters that do something, on layers that have units before and behind them."""
    for name in ("first", "second"):
        layer = model.get_layer(name)
        layer.enable_lora(2, lora_alpha=3)
        for variable in (v for v in layer.trainable_variables if "lora" in v.path):
            variable.assign(0.3 * RNG.standard_normal(variable.shape))
    return randomise(model)


@pytest.mark.parametrize("build", [image, text, plain])
@pytest.mark.parametrize("gate", ["static", "dynamic"])
def test_both_factors_are_cut(build, gate):
    model = with_adapters(build())
    rows = {r.name: r for r in keras_polar.inspect(model).rows}
    before = {r.name: r for r in keras_polar.inspect(build()).rows}
    assert {n: r.prunable for n, r in rows.items()} == {
        n: before[n].prunable for n in ("first", "second")
    } | {r.name: 0 for r in rows.values() if r.name not in before}
    _, small = check(model, gate)
    for name in ("first", "second"):
        old, new = model.get_layer(name), small.get_layer(name)
        assert new.lora_enabled
        assert (new.lora_rank, new.lora_alpha) == (2, 3)
        b = to_numpy(new.lora_kernel_b if hasattr(new, "lora_kernel_b") else new.lora_embeddings_b)
        assert b.shape[0] == 2
        assert np.abs(b).max() > 0
        own = [v.trainable for v in new.variables]
        assert own == [v.trainable for v in old.variables]
        assert own.count(False) == 1


def test_only_adapters_learn_and_kernels_are_cut_with_them(tmp_path):
    model = with_adapters(plain())
    x, y = RNG.standard_normal((64, 5, 8)), np.ones((64, 5, 3))
    gated = keras_polar.apply(model, 0.4, gate="static", importance="logits")
    gated.compile("adam", "mse")
    frozen = to_numpy(gated.get_layer("first")._kernel)
    gated.fit(x, y, epochs=4, verbose=0)
    np.testing.assert_array_equal(to_numpy(gated.get_layer("first")._kernel), frozen)
    small = keras_polar.convert(gated, verify=True)
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), small.predict(x, verbose=0), atol=1e-5)
    assert loaded.get_layer("first").lora_enabled


def test_norms_are_of_what_is_computed_with():
    model = plain()
    model.get_layer("first").enable_lora(2)
    layer = model.get_layer("first")
    for variable in (layer.lora_kernel_a, layer.lora_kernel_b):
        variable.assign(RNG.standard_normal(variable.shape))
    gated = keras_polar.apply(model, 0.4, importance="l1_norm")
    group = next(i for i, g in enumerate(gated.groups) if "first" in g.layers)
    effective = np.abs(to_numpy(layer.kernel)).sum(axis=0)
    gated.settle()
    mask = gated.groups[group].mask
    assert effective[mask].min() >= effective[~mask].max()
